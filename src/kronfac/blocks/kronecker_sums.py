"""The Kronecker product that running sums stand for, without a copy of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property

import torch
from torch import Size, Tensor

from kronfac.blocks.base import Block
from kronfac.blocks.checks import check_factor
from kronfac.blocks.kronecker import Kronecker, diagonal, product_shape
from kronfac.linalg.symmetric import mirror_


class KroneckerSums(Kronecker):
    """``G x A`` from the upper triangles of two sums and what each is multiplied by.

    What a refresh reads, traces and upper triangles, is read where it lies; whoever asks for a factor itself gets a
    completed copy. The sums must not change as long as the block is used.
    """

    def __init__(self, input: Tensor, output: Tensor, input_scale: float = 1.0, output_scale: float = 1.0) -> None:
        """Store the sums.

        Args:
            input: Upper triangle of ``A`` over ``input_scale``, shape ``[*stack, d_in, d_in]``.
            output: Upper triangle of ``G`` over ``output_scale``, shape ``[*stack, d_out, d_out]``.
            input_scale: Positive.
            output_scale: Positive.
        """
        check_factor(input_scale)
        check_factor(output_scale)
        self.shape = product_shape(input, output)
        self._means: tuple[Tensor, Tensor] | None = None
        self._sums = {"input": (input, input_scale), "output": (output, output_scale)}

    @cached_property
    def input(self) -> Tensor:  # type: ignore[override]
        """``A``, a copy."""
        return self._completed("input")

    @cached_property
    def output(self) -> Tensor:  # type: ignore[override]
        """``G``, a copy."""
        return self._completed("output")

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], shape: Size) -> Kronecker:  # type: ignore[override]
        """Rebuild a block from what `tensors` gave.

        Args:
            tensors: Both factors.
            shape: The block's shape.

        Returns:
            A block that holds its factors.
        """
        return Kronecker.from_tensors(tensors, shape)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the sums."""
        return self._sums["input"][0].dtype

    @property
    def device(self) -> torch.device:
        """Device of the sums."""
        return self._sums["input"][0].device

    def sums(self) -> dict[str, tuple[Tensor, float]]:
        """What was stored.

        Returns:
            By factor the sum, valid in its upper triangle, and what it is multiplied by.
        """
        return self._sums

    def factor_means(self) -> tuple[Tensor, Tensor]:
        """Mean eigenvalues of the two factors, from the diagonals of the sums.

        Returns:
            As :meth:`Kronecker.factor_means`.
        """
        if self._means is not None:
            return self._means
        # In the order of a block that holds its factors, so that both give the same to the last bit.
        diagonals = [diagonal(total) * scale for total, scale in self._sums.values()]
        input, output = (each.sum(-1) / each.shape[-1] for each in diagonals)
        self._means = input, output
        return self._means

    def scale(self, factor: Tensor | float) -> Kronecker:  # type: ignore[override]
        """Multiply by a number, which goes into the output factor.

        Args:
            factor: Not negative.

        Returns:
            A new block, which holds its factors.
        """
        return Kronecker(self.input, self.output).scale(factor)

    def _completed(self, side: str) -> Tensor:
        total, scale = self._sums[side]
        return mirror_(total * scale)


def read_together(blocks: Iterable[Block]) -> None:
    """Bring the mean eigenvalues of many blocks from an accelerator to the host, which is waited for once.

    Numbers on the host go with tensors anywhere, so that what is made of them takes no kernel.

    Args:
        blocks: Those of one matrix for each factor take part, if they are sums.
    """
    waiting: dict[tuple[torch.dtype, torch.device], list[KroneckerSums]] = {}
    for block in blocks:
        if isinstance(block, KroneckerSums) and block.device.type != "cpu" and len(block.shape) == 2:
            waiting.setdefault((block.dtype, block.device), []).append(block)
    for each in waiting.values():
        means = torch.stack([mean for block in each for mean in block.factor_means()]).cpu().view(-1, 2)
        for block, (input, output) in zip(each, means, strict=True):
            block._means = input, output
