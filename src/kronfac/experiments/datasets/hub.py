"""Datasets that live on the Hugging Face hub, or in a local folder of the same layout."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from kronfac.experiments.datasets import cache
from kronfac.experiments.datasets.base import Dataset, Split
from kronfac.experiments.datasets.parquet import decode
from kronfac.experiments.errors import DatasetError, need, reason_of

_log = logging.getLogger("kronfac")


@dataclass(frozen=True)
class HubDataset:
    """Where a dataset is found and what is in it.

    Attributes:
        id: The dataset's id on the hub.
        config: The folder of the configuration inside the repository.
        image: Name of the image column.
        label: Name of the label column.
        shape: Channels, height and width of every image.
        classes: Number of classes.
    """

    id: str
    config: str
    image: str
    label: str
    shape: tuple[int, int, int]
    classes: int

    def file(self, split: str) -> str:
        """Name the file of a split inside the dataset's repository.

        Args:
            split: ``"train"`` or ``"test"``.

        Returns:
            The relative path.
        """
        return f"{self.config}/{split}-00000-of-00001.parquet"


#: Adding a dataset is one line here.
HUB = {
    "mnist": HubDataset("ylecun/mnist", "mnist", "image", "label", (1, 28, 28), 10),
    "fashion_mnist": HubDataset("zalando-datasets/fashion_mnist", "fashion_mnist", "image", "label", (1, 28, 28), 10),
    "cifar10": HubDataset("uoft-cs/cifar10", "plain_text", "img", "label", (3, 32, 32), 10),
    "cifar100": HubDataset("uoft-cs/cifar100", "cifar100", "img", "fine_label", (3, 32, 32), 100),
    "svhn": HubDataset("ufldl-stanford/svhn", "cropped_digits", "image", "label", (3, 32, 32), 10),
}


def load_hub(name: str) -> Dataset:
    """Load a dataset of `HUB`, from the cache of decoded images where it is there.

    Args:
        name: A key of `HUB`.

    Returns:
        The dataset.
    """
    entry = HUB[name]
    return Dataset(name=name, train=_split(name, "train"), test=_split(name, "test"), classes=entry.classes)


def locate(name: str, split: str) -> Path:
    """Find the parquet file of a split: under ``KRONFAC_DATA`` if that is set, else on the hub.

    Args:
        name: A key of `HUB`.
        split: ``"train"`` or ``"test"``.

    Returns:
        A path to an existing file.

    Raises:
        DatasetError: If it is not under ``KRONFAC_DATA``, or the hub cannot be reached.
    """
    entry = HUB[name]
    root = os.environ.get("KRONFAC_DATA")
    if root:
        path = Path(root).expanduser() / entry.id / entry.file(split)
        if not path.is_file():
            raise DatasetError(
                f"dataset {name!r}: no file {path}; KRONFAC_DATA={root} must hold the files of the Hugging Face hub "
                f"dataset {entry.id!r}, or be unset so that they are downloaded"
            )
        return path
    hub = need("huggingface_hub", "data")
    try:
        return Path(hub.hf_hub_download(entry.id, entry.file(split), repo_type="dataset"))
    except Exception as error:  # the client raises a dozen unrelated types for "no network", "no such file", "no space"
        raise DatasetError(
            f"dataset {name!r} could not be downloaded from the Hugging Face hub ({entry.id!r}: {reason_of(error)}); "
            f"set KRONFAC_DATA to a folder that holds {entry.id}/{entry.file(split)}"
        ) from error


def _split(name: str, split: str) -> Split:
    entry = HUB[name]
    path = locate(name, split)
    found = cache.read(path, name, split)
    if found is None:
        _log.info("decoding %s (once; the decoded images are cached)", path)
        found = decode(path, entry.image, entry.label, entry.shape, entry.classes)
        cache.write(path, name, split, found)
    return found
