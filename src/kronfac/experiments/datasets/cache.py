"""Decoded images on disk: decoding fifty thousand PNGs takes longer than reading their pixels back.

A cached file's name carries the size and time stamp of the file it was decoded from, so a replaced source is decoded
anew. The cache is only ever an accelerator: a damaged file is decoded again, a folder that cannot be written is
done without.
"""

from __future__ import annotations

import hashlib
import logging
import os
import zipfile
from pathlib import Path

import torch

from kronfac.experiments.datasets.base import Split
from kronfac.experiments.errors import need
from kronfac.experiments.files import replace_atomically

_log = logging.getLogger("kronfac")


def folder() -> Path:
    """Name the cache's folder, by the XDG convention.

    Returns:
        ``$XDG_CACHE_HOME/kronfac/datasets``, with ``~/.cache`` where the variable is unset.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "kronfac" / "datasets"


def read(source: Path, name: str, split: str) -> Split | None:
    """Read the decoded copy of a source file.

    Args:
        source: The parquet file.
        name: The dataset.
        split: ``"train"`` or ``"test"``.

    Returns:
        The split, or None where there is no usable copy.
    """
    numpy = need("numpy", "data")
    path = _path(source, name, split)
    try:
        with open(path, "rb") as stream, numpy.load(stream, allow_pickle=False) as archive:
            images, labels = torch.from_numpy(archive["images"]), torch.from_numpy(archive["labels"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        _log.warning("the cached file %s is damaged; decoding %s again", path, source)
        return None
    return Split(images, labels)


def write(source: Path, name: str, split: str, data: Split) -> None:
    """Keep a decoded split.

    Args:
        source: The parquet file it was decoded from.
        name: The dataset.
        split: ``"train"`` or ``"test"``.
        data: The decoded split.
    """
    numpy = need("numpy", "data")
    path = _path(source, name, split)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_atomically(path) as stream:
            numpy.savez(stream, images=data.images.numpy(), labels=data.labels.numpy())
    except OSError as error:
        _log.warning("decoded images are not cached: %s", error)


def _path(source: Path, name: str, split: str) -> Path:
    status = source.stat()
    key = f"{source.resolve()}:{status.st_size}:{status.st_mtime_ns}"
    return folder() / f"{name}-{split}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.npz"
