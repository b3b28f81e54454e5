"""Small faces, turned and scaled at random: made from the Olivetti photographs as Hinton and Salakhutdinov (2006) did.

Their FACES file is not public; this set is like it, not the same, so that figures on it are comparable with each other
but not with published ones.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from kronfac.experiments.datasets.base import Dataset, Split
from kronfac.experiments.errors import DatasetError, need, reason_of

TRAIN, TEST, SIDE = 20_000, 5_000, 25
#: People in the training set; the others are in the test set alone.
_KNOWN = 30
_FILE = "olivetti_faces.npz"
_CHUNK = 2_500


def load_faces() -> Dataset:
    """Make 20,000 training images of 30 people and 5,000 test images of 10 others, the same in every run.

    Each is a photograph rotated by up to 90 degrees either way, scaled by 1.4 to 1.8, cropped at random and sampled at
    25 by 25 pixels.

    Returns:
        The dataset; labels are the people.
    """
    photographs, people = _photographs()
    generator = torch.Generator().manual_seed(0)
    known = people < _KNOWN
    train = _split(photographs[known], people[known], TRAIN, generator)
    test = _split(photographs[~known], people[~known], TEST, generator)
    return Dataset(name="faces", train=train, test=test, classes=40)


def _photographs() -> tuple[Tensor, Tensor]:
    """The 400 photographs, ``[400, 1, 64, 64]`` in [0, 1], and who is on them."""
    numpy = need("numpy", "data")
    root = os.environ.get("KRONFAC_DATA")
    if root:
        path = Path(root).expanduser() / _FILE
        try:
            with numpy.load(path, allow_pickle=False) as archive:
                images, labels = archive["x"].astype("float32") / 255, archive["y"]
        except FileNotFoundError as error:
            raise DatasetError(
                f"dataset 'faces': no file {path}; it must hold the Olivetti photographs as arrays x (uint8, [400, 64, "
                "64]) and y, or KRONFAC_DATA must be unset so that scikit-learn downloads them"
            ) from error
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise DatasetError(f"dataset 'faces': {path} cannot be read: {error}") from error
    else:
        try:
            bunch = need("sklearn.datasets", "data").fetch_olivetti_faces()
        except Exception as error:  # the client raises many unrelated types for "no network"
            raise DatasetError(
                f"dataset 'faces': scikit-learn could not download the Olivetti photographs ({reason_of(error)}); set "
                f"KRONFAC_DATA to a folder that holds {_FILE}"
            ) from error
        images, labels = bunch.images.astype("float32"), bunch.target
    if images.shape != (400, 64, 64) or labels.shape != (400,):
        raise DatasetError(f"dataset 'faces': arrays of shape {images.shape} and {labels.shape} are not Olivetti's")
    return torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels.astype("int64"))


def _split(photographs: Tensor, people: Tensor, count: int, generator: torch.Generator) -> Split:
    chosen = torch.randint(len(photographs), (count,), generator=generator)
    images = torch.cat([_turned(photographs[part], generator) for part in chosen.split(_CHUNK)])
    return Split(images, people[chosen])


def _turned(photographs: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate, scale, crop and sample each photograph; what lies outside repeats the border."""
    count = len(photographs)
    angle, scale, across, down = torch.rand(4, count, generator=generator)
    angle = (angle - 0.5) * math.pi
    extent = 1 / (1.4 + 0.4 * scale)  # of the window, over the photograph's
    cosine, sine = extent * angle.cos(), extent * angle.sin()
    shift = (1 - extent) / 2
    rows = [
        torch.stack([cosine, -sine, (2 * across - 1) * shift], 1),
        torch.stack([sine, cosine, (2 * down - 1) * shift], 1),
    ]
    grid = functional.affine_grid(torch.stack(rows, 1), [count, 1, SIDE, SIDE], align_corners=False)
    # Averaging two by two first keeps the 64 pixels' detail from aliasing in 25.
    smooth = functional.avg_pool2d(photographs, 2, 1)
    sampled = functional.grid_sample(smooth, grid, padding_mode="border", align_corners=False)
    return sampled.mul(255).round_().to(torch.uint8)
