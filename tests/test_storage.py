"""Saved curvature comes back bit for bit, or with one clear error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.blocks.block_cases import random_psd
from torch import Tensor, nn

import kronfac as kf
from kronfac import storage
from kronfac.blocks import Block, Dense, Diagonal, DiagonalKronecker, Kronecker
from kronfac.curvature import BlockDiagonal
from kronfac.curvature_coupled import CoupledCurvature
from kronfac.storage import StorageError, load, save

safetensors = pytest.importorskip("safetensors.torch")
layers = pytest.importorskip("kronfac.layers")


class Model(nn.Module):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.conv = nn.Conv2d(4, 4, 2, groups=2)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, classes)


def block_for(adapter: Any, seed: int) -> Block:
    shape = adapter.shape
    *stack, d_out, d_in = shape
    if adapter.name == "head":
        return Diagonal(torch.rand(shape))
    if adapter.diagonal_input:
        return DiagonalKronecker(torch.rand(*stack, d_in), random_psd(*stack, d_out, d_out, seed=seed).float())
    if adapter.unit_wise:
        return Dense(random_psd(*stack, d_out * d_in, d_out * d_in, seed=seed).float(), shape)
    input = random_psd(*stack, d_in, d_in, seed=seed).float()
    return Kronecker(input, random_psd(*stack, d_out, d_out, seed=seed + 1).float())


@pytest.fixture
def curvature() -> BlockDiagonal:
    adaptation = layers.adapt_model(Model())
    blocks = {name: block_for(adapter, i) for i, (name, adapter) in enumerate(adaptation.adapters.items())}
    options = {"sharing": "expand", "norm": "unitwise"}
    return BlockDiagonal(blocks, adaptation.adapters, adaptation.order, options)


@pytest.fixture
def saved(curvature: BlockDiagonal, tmp_path: Path) -> Path:
    path = tmp_path / "curvature.safetensors"
    save(curvature, path)
    return path


def rewrite(path: Path, change: Callable[[dict[str, Tensor], dict[str, str], dict[str, Any]], None]) -> None:
    """Change tensors, metadata or description of a file in place."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    content = json.loads(metadata["content"])
    change(tensors, metadata, content)
    if "content" in metadata and metadata["content"] != "{":
        metadata["content"] = json.dumps(content)
    safetensors.save_file(tensors, path, metadata)


def test_round_trip_is_exact(curvature: BlockDiagonal, saved: Path) -> None:
    again = load(saved, Model())
    assert list(again.blocks) == list(curvature.blocks)
    assert {type(block) for block in again.blocks.values()} == {Kronecker, DiagonalKronecker, Diagonal, Dense}
    for name, block in curvature.blocks.items():
        assert type(again.blocks[name]) is type(block)
        assert again.blocks[name].shape == block.shape
        for key, tensor in block.tensors().items():
            assert torch.equal(again.blocks[name].tensors()[key], tensor)
    assert again.parameter_names == curvature.parameter_names
    assert again.options == curvature.options
    assert torch.equal(again.to_dense(), curvature.to_dense())


def test_the_options_reach_the_adapters(curvature: BlockDiagonal, tmp_path: Path) -> None:
    adapter = layers.adapt_model(Model(), sharing="reduce").adapters["conv"]
    blocks = {"conv": curvature.blocks["conv"]}
    options = {"sharing": "reduce", "norm": "unitwise"}
    save(BlockDiagonal(blocks, {"conv": adapter}, adapter.parameter_names, options), tmp_path / "reduced")
    again = load(tmp_path / "reduced", Model())
    assert again.layouts["conv"].sharing == "reduce"  # type: ignore[attr-defined]
    assert again.options == options


def test_float64_stays_float64(curvature: BlockDiagonal, tmp_path: Path) -> None:
    blocks = {name: block.to(dtype=torch.float64) for name, block in curvature.blocks.items()}
    save(BlockDiagonal(blocks, curvature.layouts, curvature.parameter_names), tmp_path / "double")
    assert load(tmp_path / "double", Model()).blocks["head"].dtype == torch.float64


def test_factors_that_share_memory(curvature: BlockDiagonal, tmp_path: Path) -> None:
    shared = torch.rand(3, 5)
    block = Diagonal(shared)
    blocks = curvature.blocks | {"head": block, "norm": Dense(torch.eye(2).expand(4, 2, 2), (4, 1, 2))}
    save(BlockDiagonal(blocks, curvature.layouts, curvature.parameter_names), tmp_path / "shared")
    assert torch.equal(load(tmp_path / "shared", Model()).blocks["norm"].to_dense(), torch.eye(8))


def test_a_failed_save_leaves_what_was_there(
    curvature: BlockDiagonal, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved.read_bytes()

    def full_disk(tensors: object, path: str, metadata: object) -> None:
        Path(path).write_bytes(b"half a fi")
        raise OSError("no space left on device")

    monkeypatch.setattr(safetensors, "save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        save(curvature.scale(2.0), saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_saving_replaces_what_was_there(curvature: BlockDiagonal, saved: Path) -> None:
    save(curvature.scale(2.0), str(saved))
    assert torch.equal(load(str(saved), Model()).to_dense(), curvature.scale(2.0).to_dense())
    assert list(saved.parent.iterdir()) == [saved]


def test_only_curvature_is_saved(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="got dict"):
        save({}, tmp_path / "x")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.safetensors"):
        load(tmp_path / "absent.safetensors", Model())


@pytest.mark.parametrize("content", [b"", b"not a curvature at all", b"\x80\x04\x95", bytes(64)])
def test_foreign_bytes(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "foreign"
    path.write_bytes(content)
    with pytest.raises(StorageError, match="foreign is damaged, or no curvature"):
        load(path, Model())


def test_a_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
            return (Path.touch, (tmp_path / "exploded",))

    torch.save(Bomb(), tmp_path / "bomb")
    with pytest.raises(StorageError, match="no curvature"):
        load(tmp_path / "bomb", Model())
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("keep", [4, 100, -1])
def test_truncated_file(saved: Path, keep: int) -> None:
    saved.write_bytes(saved.read_bytes()[:keep])
    with pytest.raises(StorageError, match="is damaged"):
        load(saved, Model())


def test_safetensors_of_something_else(tmp_path: Path) -> None:
    safetensors.save_file({"weight": torch.ones(2)}, tmp_path / "weights")
    with pytest.raises(StorageError, match="weights is no curvature saved by kronfac"):
        load(tmp_path / "weights", Model())


def test_another_version(saved: Path) -> None:
    rewrite(saved, lambda tensors, metadata, content: metadata.update(version="99"))
    with pytest.raises(StorageError, match=r"version '99'.*reads version 1"):
        load(saved, Model())


def test_a_layer_that_the_model_lacks(saved: Path) -> None:
    model = Model()
    del model.conv
    with pytest.raises(StorageError, match="'conv', which the model lacks"):
        load(saved, model)


def test_parameters_of_another_shape(saved: Path) -> None:
    with pytest.raises(StorageError, match=r"\(3, 4\).*layer 'head'.*\(5, 4\)"):
        load(saved, Model(classes=5))


def test_parameters_that_were_frozen_since(saved: Path) -> None:
    wanted = load(saved, Model())
    for frozen in ("head.bias", ""):
        model = Model()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith(frozen))
        before = [parameter.requires_grad for parameter in model.parameters()]
        found = load(saved, model)
        assert [parameter.requires_grad for parameter in model.parameters()] == before
        assert found.parameter_names == wanted.parameter_names
        assert torch.equal(found.to_dense(), wanted.to_dense())
        assert torch.equal(load(saved, nn.DataParallel(model)).to_dense(), wanted.to_dense())


def _drop_tensor(tensors: dict[str, Tensor], metadata: dict[str, str], content: dict[str, Any]) -> None:
    del tensors["0.input"]


def _misshape_tensor(tensors: dict[str, Tensor], metadata: dict[str, str], content: dict[str, Any]) -> None:
    tensors["0.input"] = tensors["0.input"][:-1].clone()


def _half_tensor(tensors: dict[str, Tensor], metadata: dict[str, str], content: dict[str, Any]) -> None:
    tensors["0.input"] = tensors["0.input"].half()


def _unknown_kind(tensors: dict[str, Tensor], metadata: dict[str, str], content: dict[str, Any]) -> None:
    content["layers"][0]["kind"] = "sparse"


def _unknown_option(tensors: dict[str, Tensor], metadata: dict[str, str], content: dict[str, Any]) -> None:
    content["options"]["colour"] = "red"


def _unknown_option_value(tensors: dict[str, Tensor], metadata: dict[str, str], content: dict[str, Any]) -> None:
    content["options"]["sharing"] = "fair"


def _no_options(tensors: dict[str, Tensor], metadata: dict[str, str], content: dict[str, Any]) -> None:
    del content["options"]


def _no_layers(tensors: dict[str, Tensor], metadata: dict[str, str], content: dict[str, Any]) -> None:
    content["layers"] = []


def _foreign_tensor(tensors: dict[str, Tensor], metadata: dict[str, str], content: dict[str, Any]) -> None:
    tensors["17.input"] = torch.ones(2, 2)


def _layer_twice(tensors: dict[str, Tensor], metadata: dict[str, str], content: dict[str, Any]) -> None:
    content["layers"].append(content["layers"][0])


def _layers_of_numbers(tensors: dict[str, Tensor], metadata: dict[str, str], content: dict[str, Any]) -> None:
    content["layers"] = [1, 2]


def _no_parameters(tensors: dict[str, Tensor], metadata: dict[str, str], content: dict[str, Any]) -> None:
    del content["layers"][0]["parameters"]


def _no_shape(tensors: dict[str, Tensor], metadata: dict[str, str], content: dict[str, Any]) -> None:
    content["layers"][0]["shape"] = None


def _no_content(tensors: dict[str, Tensor], metadata: dict[str, str], content: dict[str, Any]) -> None:
    del metadata["content"]


def _broken_json(tensors: dict[str, Tensor], metadata: dict[str, str], content: dict[str, Any]) -> None:
    metadata["content"] = "{"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop_tensor, "block of layer 'embedding' is damaged"),
        (_misshape_tensor, "block of layer 'embedding' is damaged"),
        (_half_tensor, "float32 or float64"),
        (_unknown_kind, "unknown kind 'sparse'"),
        (_unknown_option, "unknown options.*colour"),
        (_unknown_option_value, "fair"),
        (_no_options, "damaged"),
        (_no_layers, "tensors that are no layer's: '0.input', "),
        (_foreign_tensor, "tensors that are no layer's: '17.input'"),
        (_layer_twice, "a layer is in it twice"),
        (_layers_of_numbers, "damaged"),
        (_no_parameters, "damaged"),
        (_no_shape, "damaged"),
        (_no_content, "damaged"),
        (_broken_json, "damaged"),
    ],
)
def test_damaged_descriptions(
    saved: Path, change: Callable[[dict[str, Tensor], dict[str, str], dict[str, Any]], None], message: str
) -> None:
    rewrite(saved, change)
    with pytest.raises(StorageError, match=message):
        load(saved, Model())


def test_without_safetensors_the_extra_is_named(
    curvature: BlockDiagonal, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(storage.importlib, "import_module", absent)
    for call in (lambda: save(curvature, saved), lambda: load(saved, Model())):
        with pytest.raises(ImportError, match=r"pip install 'kronfac\[io\]'"):
            call()


@pytest.fixture
def coupled(tmp_path: Path) -> tuple[CoupledCurvature, nn.Module, Path]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))
    found = kf.estimate(model, kf.Categorical(), (torch.randn(9, 5), None), approximation="kkfac", seed=0)
    path = tmp_path / "coupled.safetensors"
    save(found, path)
    return found, model, path


def test_blocks_between_layers_come_back(coupled: tuple[CoupledCurvature, nn.Module, Path]) -> None:
    found, model, path = coupled
    again = load(path, model)
    assert isinstance(again, CoupledCurvature)
    assert list(again.blocks) == list(found.blocks)
    assert again.options == found.options
    assert torch.equal(again.to_dense(), found.to_dense())


@pytest.mark.parametrize(
    ("name", "tensor"),
    [("coupled.input", None), ("coupled.output", torch.zeros(7, 6)), ("coupled.input", torch.zeros(10, 10))],
)
def test_damaged_blocks_between_layers_are_refused(
    coupled: tuple[CoupledCurvature, nn.Module, Path], name: str, tensor: Tensor | None
) -> None:
    _, model, path = coupled

    def change(tensors: dict[str, Tensor], *_: object) -> None:
        del tensors[name]
        if tensor is not None:
            tensors[name] = tensor

    rewrite(path, change)
    with pytest.raises(StorageError, match="does not fit the model"):
        load(path, model)


def test_unknown_coupled_layers_are_refused(coupled: tuple[CoupledCurvature, nn.Module, Path]) -> None:
    _, model, path = coupled
    for layers in (["9"], 3, ["0"]):
        rewrite(path, lambda t, m, content, layers=layers: content.update(coupled=layers))
        with pytest.raises(StorageError, match=r"damaged|does not fit"):
            load(path, model)


def test_what_was_read_lies_in_memory_as_what_was_written(tmp_path: Path) -> None:
    """Products of matrices that begin elsewhere differ in their last bits, and with them a run that goes on."""
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    curvature = kf.estimate(model, kf.Gaussian(), (torch.randn(8, 3), None))
    kf.save(curvature, tmp_path / "c.safetensors")
    for block in kf.load(tmp_path / "c.safetensors", model).blocks.values():
        assert all(tensor.data_ptr() % 64 == 0 for tensor in block.tensors().values())
