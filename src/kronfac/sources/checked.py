"""Cotangents are looked at before statistics take them, on an accelerator several of them at a time.

To know whether a tensor is finite the host waits for the device.  Where it does so after each layer, the device idles
while the host launches the next one's kernels; so samples wait for each other there, and are all looked at with one
read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from kronfac.linalg.symmetric import all_finite
from kronfac.sources.sample import Sample, not_finite

#: Bytes of cotangents that wait for each other on an accelerator. On a CPU each is read while the cache holds it.
HELD = 1 << 28


class Checked:
    """Hands samples on once their cotangents are known to be finite.

    Args:
        take: Called with every sample, in their order.
        held: Bytes of cotangents that wait for each other, as :func:`held_on` says. With 0 samples are handed on as
            they come, and whoever takes them must look.
    """

    def __init__(self, take: Callable[[Sample], None], held: int) -> None:
        self._take, self._held = take, held
        self._waiting: list[Sample] = []
        self._bytes = 0

    def __call__(self, sample: Sample) -> None:
        """Take one in.

        Args:
            sample: The sample.
        """
        if not self._held:
            self._take(sample)
            return
        self._waiting.append(sample)
        self._bytes += 0 if sample.cotangents is None else sample.cotangents.nbytes
        if self._bytes >= self._held:
            self.flush()

    def flush(self) -> None:
        """Look at those that wait, and hand them on.

        Raises:
            FloatingPointError: The cotangent of a layer is not finite; none of those that waited were handed on.
        """
        waiting, self._waiting, self._bytes = self._waiting, [], 0
        if not all_finite(*(sample.cotangents for sample in waiting if sample.cotangents is not None)):
            broken = next(s for s in waiting if s.cotangents is not None and not all_finite(s.cotangents))
            raise FloatingPointError(not_finite("cotangent", broken.layer.name))
        for sample in waiting:
            self._take(replace(sample, checked=True))


def held_on(device: torch.device) -> int:
    """Bytes of cotangents that wait for each other.

    Args:
        device: Where they are.

    Returns:
        0 on a CPU.
    """
    return 0 if device.type == "cpu" else HELD
