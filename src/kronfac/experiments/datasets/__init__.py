"""Datasets by name, as tensors in memory.

``digits`` is embedded in scikit-learn, ``curves`` is drawn, and neither needs a network. ``faces`` is made from
photographs that scikit-learn downloads. The others are read from the Hugging Face hub by their public ids, or from
files of the same layout under the folder that the environment variable ``KRONFAC_DATA`` names.
"""

from __future__ import annotations

from kronfac.experiments.datasets.base import Dataset
from kronfac.experiments.datasets.curves import load_curves
from kronfac.experiments.datasets.digits import load_digits
from kronfac.experiments.datasets.faces import load_faces
from kronfac.experiments.datasets.hub import HUB, load_hub
from kronfac.experiments.errors import UnknownNameError

__all__ = ["Dataset", "load", "names"]

_MADE = {"digits": load_digits, "curves": load_curves, "faces": load_faces}


def names() -> list[str]:
    """List the datasets that can be asked for.

    Returns:
        The names that `load` accepts.
    """
    return [*_MADE, *HUB]


def load(name: str) -> Dataset:
    """Load a dataset, decoding it only if no decoded copy is in the cache.

    Args:
        name: One of `names`.

    Returns:
        Training and test images (uint8, ``[N, C, H, W]``) with their labels (int64, ``[N]``).

    Raises:
        UnknownNameError: If there is none of that name.
        DatasetError: If its files are absent, damaged or foreign.
    """  # noqa: DOC502
    if name in _MADE:
        return _MADE[name]()
    if name in HUB:
        return load_hub(name)
    raise UnknownNameError("dataset", name, names())
