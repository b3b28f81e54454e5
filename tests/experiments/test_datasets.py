from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from kronfac.experiments import datasets
from kronfac.experiments.datasets import cache, faces, hub
from kronfac.experiments.errors import DatasetError, ExperimentError

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 28, 28), dtype=np.uint8)


def png(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(array).save(out, "PNG")
    return out.getvalue()


def write_mnist(root: Path, images: np.ndarray = PIXELS, labels: list[object] | None = None, **columns: object) -> Path:
    folder = root / "ylecun/mnist/mnist"
    folder.mkdir(parents=True, exist_ok=True)
    cells = [{"bytes": png(image), "path": None} for image in images]
    table = pa.table(columns or {"image": cells, "label": labels or [i % 10 for i in range(len(images))]})
    for split in ("train", "test"):
        pq.write_table(table, folder / f"{split}-00000-of-00001.parquet")
    return folder / "train-00000-of-00001.parquet"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KRONFAC_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "data"


def test_digits_are_whole_and_always_split_alike() -> None:
    one, two = datasets.load("digits"), datasets.load("digits")
    assert one.train.images.shape == (1500, 1, 8, 8)
    assert one.test.images.shape == (297, 1, 8, 8)
    assert torch.equal(one.train.images, two.train.images)
    pixels = one.pixels(one.train)
    assert pixels.min() == 0.0
    assert pixels.max() == 1.0
    assert set(one.train.labels.tolist()) == set(range(10))


def test_parquet_is_decoded_exactly(root: Path) -> None:
    write_mnist(root)
    data = datasets.load("mnist")
    assert torch.equal(data.train.images, torch.from_numpy(PIXELS).unsqueeze(1))
    assert data.train.labels.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert torch.equal(data.pixels(data.test), torch.from_numpy(PIXELS).unsqueeze(1).float() / 255)


def test_standardised_images_have_mean_zero_and_deviation_one_per_channel(root: Path) -> None:
    write_mnist(root)
    train, _ = datasets.load("mnist").standardised()
    assert abs(train.mean()) < 1e-5
    assert abs(train.std() - 1) < 1e-5


def test_second_load_reads_the_cache(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mnist(root)
    first = datasets.load("mnist")
    monkeypatch.setattr(hub, "decode", lambda *arguments: pytest.fail("decoded twice"))
    assert torch.equal(datasets.load("mnist").train.images, first.train.images)


def test_a_replaced_source_is_not_read_from_the_cache(root: Path) -> None:
    write_mnist(root)
    datasets.load("mnist")
    path = write_mnist(root, 255 - PIXELS)
    os.utime(path, ns=(1, 1))
    assert torch.equal(datasets.load("mnist").train.images, torch.from_numpy(255 - PIXELS).unsqueeze(1))


def test_a_damaged_cache_is_decoded_again(root: Path) -> None:
    write_mnist(root)
    datasets.load("mnist")
    for path in cache.folder().glob("*.npz"):
        path.write_bytes(path.read_bytes()[:100])
    assert len(datasets.load("mnist").train.images) == 12


def test_an_unwritable_cache_is_done_without(root: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    write_mnist(root)
    assert len(datasets.load("mnist").train.images) == 12


def test_a_missing_file_names_the_variable_and_the_hub_id(root: Path) -> None:
    with pytest.raises(DatasetError, match=r"KRONFAC_DATA=.*ylecun/mnist"):
        datasets.load("mnist")


def test_a_truncated_file_is_named(root: Path) -> None:
    path = write_mnist(root)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DatasetError, match=rf"{path.name}.*truncated.*fetch it again"):
        datasets.load("mnist")


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({"labels": [1] * 11 + [10]}, "row 11: label 10 is not one of 0..9"),
        ({"labels": ["a"] * 12}, "row 0: label 'a'"),
        ({"images": PIXELS[:, :20]}, r"row 0: an image of shape \(1, 20, 28\)"),
        ({"picture": [1], "label": [1]}, "no column 'image'"),
        ({"image": [{"bytes": b"no image"}], "label": [1]}, "row 0: the image cannot be decoded"),
        ({"image": [1], "label": [1]}, "row 0: the image cannot be decoded"),
        ({"image": pa.array([], pa.int64()), "label": pa.array([], pa.int64())}, "no rows"),
    ],
)
def test_a_foreign_file_is_refused(root: Path, contents: dict[str, object], message: str) -> None:
    write_mnist(root, **contents)  # type: ignore[arg-type]
    with pytest.raises(DatasetError, match=message):
        datasets.load("mnist")
    assert not list(cache.folder().glob("*")) if cache.folder().exists() else True


def test_without_a_folder_the_hub_is_asked_and_its_failure_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub

    asked: list[tuple[object, ...]] = []

    def no_network(*arguments: object, **options: object) -> None:
        asked.append(arguments)
        raise OSError("no network")

    monkeypatch.delenv("KRONFAC_DATA", raising=False)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", no_network)
    with pytest.raises(DatasetError, match=r"uoft-cs/cifar10.*no network.*KRONFAC_DATA"):
        datasets.load("cifar10")
    assert asked == [("uoft-cs/cifar10", "plain_text/train-00000-of-00001.parquet")]


def test_an_unknown_dataset_is_refused() -> None:
    with pytest.raises(ExperimentError, match="unknown dataset 'mnits'; known: digits, curves, faces, mnist"):
        datasets.load("mnits")


def test_curves_are_drawn_alike_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kronfac.experiments.datasets.curves.TRAIN", 3_000)
    monkeypatch.setattr("kronfac.experiments.datasets.curves.TEST", 1_000)
    first, again = datasets.load("curves"), datasets.load("curves")
    assert first.train.images.shape == (3_000, 1, 28, 28)
    assert first.test.images.shape == (1_000, 1, 28, 28)
    assert torch.equal(first.train.images, again.train.images)
    ink = first.pixels(first.train).sum((1, 2, 3))
    assert 5 < float(ink.min()) < float(ink.max()) < 200  # each is a stroke
    assert len(first.train.images.flatten(1).unique(dim=0)) == 3_000


def write_faces(root: Path, **arrays: np.ndarray) -> None:
    root.mkdir(parents=True, exist_ok=True)
    faces = np.random.default_rng(0).integers(0, 256, (400, 64, 64), dtype=np.uint8)
    faces[300:] = 7  # the people of the test set
    whole = {"x": faces, "y": (np.arange(400) // 10).astype(np.uint8)}
    np.savez(root / "olivetti_faces.npz", **{**whole, **arrays})


def test_faces_are_the_same_in_every_run_and_of_other_people_in_the_test_set(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faces, "TRAIN", 60)
    monkeypatch.setattr(faces, "TEST", 20)
    write_faces(root)
    one, two = datasets.load("faces"), datasets.load("faces")
    assert one.train.images.shape == (60, 1, 25, 25)
    assert torch.equal(one.train.images, two.train.images)
    assert int(one.train.labels.max()) < 30 <= int(one.test.labels.min())
    # A constant photograph stays constant however it is turned: nothing from outside its border gets in.
    assert one.test.images.unique().tolist() == [7]


def test_faces_that_are_not_there_or_are_something_else(root: Path) -> None:
    with pytest.raises(DatasetError, match=r"olivetti_faces.npz"):
        datasets.load("faces")
    write_faces(root, x=np.zeros((3, 8, 8), np.uint8))
    with pytest.raises(DatasetError, match="are not Olivetti's"):
        datasets.load("faces")
    (root / "olivetti_faces.npz").write_bytes(b"nothing")
    with pytest.raises(DatasetError, match="cannot be read"):
        datasets.load("faces")


def test_faces_turn_by_the_angle_that_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without rotation, at the smallest scale and in the middle, the crop is the middle of the photograph."""
    monkeypatch.setattr(torch, "rand", lambda *size, generator: torch.full(size, 0.5))
    ramp = torch.linspace(0, 1, 64).expand(1, 1, 64, 64)
    row = faces._turned(ramp, torch.Generator()).float()[0, 0] / 255
    wanted = 0.5 + (torch.arange(25) - 12) / 25 / 1.6
    torch.testing.assert_close(row[12], wanted, atol=0.01, rtol=0)
    torch.testing.assert_close(row[0], row[24])
