"""What the machine does at best: a large product and a large copy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from kronfac.experiments.bench.timing import clock_of, timed

_REPEATS = 5


@dataclass(frozen=True)
class Ceilings:
    """What the machine does at best.

    Attributes:
        flops: FLOPs a second of a large product, by dtype.
        bytes: Bytes a second, read and written, of a large copy.
    """

    flops: dict[torch.dtype, float]
    bytes: float

    def as_dict(self) -> dict[str, float]:
        """Return TFLOP/s and GB/s by name."""
        rates = {f"TFLOP/s, {str(dtype).removeprefix('torch.')}": rate / 1e12 for dtype, rate in self.flops.items()}
        return rates | {"GB/s": self.bytes / 1e9}


def ceilings(device: str, precision: str, width: int | None = None, entries: int | None = None) -> Ceilings:
    """Measure the machine; the best of a few tries.

    Args:
        device: Where to compute.
        precision: The number format; bfloat16 is measured where it is used.
        width: Of the square matrices to multiply.
        entries: Numbers to copy.

    Returns:
        The rates.
    """
    large, clock = device == "cuda", clock_of(device)
    width, entries = width or (8192 if large else 1024), entries or (1 << 28 if large else 1 << 22)

    def best(function: Callable[[], object]) -> float:
        function()
        return min(timed(function, clock) for _ in range(_REPEATS))

    flops = {}
    for dtype in (torch.float32, *([torch.bfloat16] if precision == "bfloat16" else [])):
        left, right = (torch.randn(width, width, device=device, dtype=dtype) for _ in range(2))
        out = torch.empty_like(left)
        flops[dtype] = 2 * width**3 / best(partial(torch.mm, left, right, out=out))
    source = torch.zeros(entries, device=device)
    target = torch.empty_like(source)
    return Ceilings(flops, 2 * 4 * entries / best(lambda: target.copy_(source)))
