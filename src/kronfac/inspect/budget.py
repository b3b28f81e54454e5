"""What the exact matrix's roots may take: layers in groups that fit, and batches that are too large refused."""

from __future__ import annotations

import math

from torch import Tensor

from kronfac.curvature import BlockDiagonal
from kronfac.inspect.text import size


class Budget:
    """Which layers' roots are computed together.

    Args:
        values: The model's outputs.
        limit: Bytes.
    """

    def __init__(self, values: Tensor, limit: int) -> None:
        self.examples, self.roots, self.limit = len(values), values.numel(), limit
        # The oracle holds a row in a list, stacked and rotated, and the comparison three times in float64.
        self.entry = 3 * values.element_size() + 3 * 8

    def groups(self, curvature: BlockDiagonal) -> list[list[str]]:
        """Group layers as far as memory goes.

        Args:
            curvature: The curvature.

        Returns:
            Names of layers, group by group, in order.

        Raises:
            ValueError: A single layer is too much; the text says which batch would do.
        """
        room = self.limit // self.entry
        sizes = {name: block.shape.numel() for name, block in curvature.blocks.items()}
        name, widest = max(sizes.items(), key=lambda pair: pair[1])
        # Roots over a layer's parameters, and once over the outputs themselves.
        entries = self.roots * max(widest, self.roots)
        if entries > room:
            what = f"{widest} parameters of layer {name!r}" if widest >= self.roots else f"{self.roots} outputs"
            each = self.roots / self.examples
            most = int(min(room / (each * widest), math.sqrt(room) / each))
            alone = self.entry * each * max(widest, each)
            advice = f"use a batch of at most {most} examples" if most else f"one example alone needs {size(alone)}"
            raise ValueError(
                f"The exact matrix's roots, {self.roots} outputs x {what}, need {size(entries * self.entry)} with "
                f"{self.examples} examples; memory_limit is {size(self.limit)}: {advice}, or raise memory_limit=."
            )
        groups: list[list[str]] = [[]]
        total = 0
        for name, count in sizes.items():
            if groups[-1] and (total + count) * self.roots > room:
                groups.append([])
                total = 0
            groups[-1].append(name)
            total += count
        return groups
