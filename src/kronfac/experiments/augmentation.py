"""Random crops and mirror images of a batch, as is usual for small photographs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from kronfac.experiments.errors import ExperimentError


def augmented(images: Tensor, padding: int, mirror: bool, generator: torch.Generator) -> Tensor:
    """Crop each image at random out of itself with zeros around, and mirror half of them left to right.

    Zeros are the mean colour where pixels are standardised.

    Args:
        images: ``[N, C, H, W]``.
        padding: Zeros on each side; 0 for no crops.
        mirror: Whether each image is mirrored with probability one half.
        generator: A generator on the CPU.

    Returns:
        As many images of the same size.

    Raises:
        ExperimentError: If the inputs are no images.
    """
    if images.dim() != 4:
        raise ExperimentError(
            f"crops and mirroring are for images [N, C, H, W], got inputs of shape {list(images.shape)}: "
            "leave crop_padding and mirror out"
        )
    count, _, height, width = images.shape
    top, left = torch.randint(0, 2 * padding + 1, (2, count, 1), generator=generator)
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    if mirror:
        columns = torch.where(torch.rand(count, 1, generator=generator) < 0.5, columns.flip(1), columns)
    rows, columns = rows.to(images.device), columns.to(images.device)
    padded = functional.pad(images, (padding,) * 4)
    # Indices on both sides of a slice come first: [N, H, W, C].
    picked = padded[torch.arange(count, device=images.device)[:, None, None], :, rows[:, :, None], columns[:, None]]
    return picked.permute(0, 3, 1, 2).contiguous()
