"""Decode a parquet file of encoded images into tensors, believing nothing about the file."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import Tensor

from kronfac.experiments.datasets.base import Split
from kronfac.experiments.errors import DatasetError, need


def decode(path: Path, image: str, label: str, shape: tuple[int, int, int], classes: int) -> Split:
    """Read one split.

    Args:
        path: The parquet file.
        image: Name of its image column: structs with encoded ``bytes``.
        label: Name of its label column.
        shape: Channels, height and width that every image must have.
        classes: Labels must be below this.

    Returns:
        The images and labels in the file's order.

    Raises:
        DatasetError: If the file is truncated, no parquet, lacks a column, or holds something else in it.
    """
    arrow = need("pyarrow", "data")
    parquet = need("pyarrow.parquet", "data")
    try:
        present = parquet.read_schema(path).names
        missing = [column for column in (image, label) if column not in present]
        if missing:
            raise DatasetError(
                f"{path} is not the expected dataset: it has no column {missing[0]!r} (columns: {', '.join(present)}); "
                "replace the file"
            )
        table = parquet.read_table(path, columns=[image, label])
    except (arrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DatasetError(
            f"{path} cannot be read as parquet ({reason}); it is truncated or another kind of file: fetch it again"
        ) from error
    if table.num_rows == 0:
        raise DatasetError(f"{path} holds no rows: fetch it again")
    labels = _labels(path, table.column(label).to_pylist(), classes)
    images = torch.stack([_image(path, row, cell, shape) for row, cell in enumerate(table.column(image).to_pylist())])
    return Split(images, labels)


def _labels(path: Path, values: list[object], classes: int) -> Tensor:
    for row, value in enumerate(values):
        if not isinstance(value, int) or not 0 <= value < classes:
            raise DatasetError(
                f"{path}, row {row}: label {value!r} is not one of 0..{classes - 1}; the file is foreign: replace it"
            )
    return torch.tensor(values, dtype=torch.int64)


def _image(path: Path, row: int, cell: object, shape: tuple[int, int, int]) -> Tensor:
    numpy, pillow = need("numpy", "data"), need("PIL.Image", "data")
    try:
        with pillow.open(io.BytesIO(cell["bytes"])) as picture:  # type: ignore[index]
            pixels = numpy.array(picture)
    except (TypeError, KeyError, OSError, SyntaxError, ValueError) as error:  # PIL raises SyntaxError on broken PNGs
        raise DatasetError(f"{path}, row {row}: the image cannot be decoded; fetch the file again") from error
    tensor = torch.from_numpy(pixels)
    tensor = tensor.unsqueeze(0) if tensor.dim() == 2 else tensor.movedim(-1, 0)
    if tuple(tensor.shape) != shape or tensor.dtype != torch.uint8:
        raise DatasetError(
            f"{path}, row {row}: an image of shape {tuple(tensor.shape)} and type {tensor.dtype} where {shape} and "
            "torch.uint8 were expected; the file is foreign: replace it"
        )
    return tensor
