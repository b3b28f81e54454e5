"""``G⁻¹ V A⁻¹`` by products in bfloat16 that keep the direction: what is large in ``V`` is multiplied in float32.

A gradient lies in the range of its factors, where the inverses are small.  Rounding it to bfloat16 puts noise of 2⁻⁹
of its entries everywhere, and outside of that range the inverses multiply it by one over the damping: on factors of
deficient rank the direction turns by degrees.  But what is large in a gradient is mostly of low rank, and an
orthonormal basis ``Q`` of :data:`RANK` random combinations of its columns finds it (Halko, Martinsson & Tropp 2011,
algorithm 4.1):

    G⁻¹ V A⁻¹  =  (G⁻¹ Q) (Qᵀ V A⁻¹)  +  G⁻¹ (V − Q Qᵀ V) A⁻¹

The first term takes thin products in float32; the rest, which is small and so is its noise, is rounded.

Of the rows ``g`` and ``ā`` that a gradient is made of, the means ``ḡ`` and ``ā̄`` are what is large.  With ``g̃`` and
``ã`` what is left of the rows without them, of which each column sums to zero,

    G⁻¹ gᵀ ā A⁻¹  =  (g̃ G⁻¹)ᵀ (ã A⁻¹)  +  R (G⁻¹ ḡ) (A⁻¹ ā̄)ᵀ

where the first term is rounded, last product included, which no inverse follows.
"""

from __future__ import annotations

import platform
from functools import lru_cache

import torch
from torch import Tensor

from kronfac.linalg.products import matmul
from kronfac.linalg.symmetric import row_step

#: Columns of the basis; `benchmarks/reduced_precision.py` measures what they keep.
RANK = 8
#: Least side of a matrix whose products are worth rounding.
LEAST = 128


def pays_on(device: torch.device) -> bool:
    """Whether a device has instructions for products in bfloat16; without, they take some fifty times float32's time.

    Args:
        device: The device.

    Returns:
        False for x86 processors with neither AVX-512 BF16 nor AMX.
    """
    if device.type != "cpu" or platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    # Not documented, and so perhaps gone one day: then it is for the caller to know.
    known = [getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile")]
    return any(check is None or check() for check in known)


class Workspace:
    """Memory for intermediate results in bfloat16 that is used again: fresh pages cost as much as the rounding."""

    def __init__(self) -> None:
        self._flat: dict[int, Tensor] = {}

    def take(self, slot: int, rows: int, columns: int, device: torch.device) -> Tensor:
        """Give a matrix whose contents are whatever they are.

        Args:
            slot: Matrices of different slots do not overlap.
            rows: Its height.
            columns: Its width.
            device: Where.

        Returns:
            Shape ``[rows, columns]``, bfloat16, until the slot is taken again.
        """
        step = row_step(columns, torch.bfloat16)
        flat = self._flat.get(slot)
        if flat is None or flat.numel() < rows * step or flat.device != device:
            flat = self._flat[slot] = torch.empty(rows * step, dtype=torch.bfloat16, device=device)
        return flat[: rows * step].view(rows, step)[:, :columns]


class RoundedProduct:
    """Multiplies by two inverses in bfloat16; it keeps their rounded copies alone.

    Args:
        output: ``G⁻¹``, shape ``[d_out, d_out]``, float32.
        input: ``A⁻¹``, shape ``[d_in, d_in]``, float32.
    """

    def __init__(self, output: Tensor, input: Tensor) -> None:
        self._halves = _rounded(output), _rounded(input)

    def __call__(
        self, output: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, work: Workspace
    ) -> tuple[Tensor, Tensor | None]:
        """Multiply ``V``, which is a weight's part and a bias's column beside it.

        Args:
            output: ``G⁻¹`` itself, for the thin products.
            input: ``A⁻¹`` itself.
            weight: Shape ``[d_out, d_in]``, or one column less with a bias; float32.
            bias: Shape ``[d_out]``, or None.
            work: Memory for intermediate results.

        Returns:
            The two parts of the product, float32.
        """
        (rows, columns), wide = weight.shape, input.shape[0]
        mixing = _mixing(wide, weight.device)
        combined = matmul(weight, mixing[:columns])
        if bias is not None:
            combined.addr_(bias, mixing[columns])
        basis = torch.linalg.qr(combined).Q
        main = weight.new_empty(RANK, wide)
        main[:, :columns] = matmul(basis.mT, weight)
        out = torch.addmm(weight, basis, main[:, :columns], alpha=-1)
        rest, left = (work.take(slot, rows, wide, weight.device) for slot in (0, 1))
        rest[:, :columns] = out
        if bias is not None:
            main[:, columns] = basis.mT @ bias
            rest[:, columns] = torch.addmv(bias, basis, main[:, columns], alpha=-1)
        torch.mm(self._halves[0], rest, out=left)
        solved = torch.mm(left, self._halves[1], out=rest)
        low, high = matmul(output, basis), matmul(main, input)
        out.copy_(solved[:, :columns]).addmm_(low, high[:, :columns])
        if bias is None:
            return out, None
        return out, solved[:, columns].float().addmv_(low, high[:, columns])

    def by_rows(
        self, output: Tensor, input: Tensor, cotangents: Tensor, inputs: Tensor, work: Workspace
    ) -> tuple[Tensor, Tensor]:
        """Multiply ``V = gᵀ ā`` that is never formed.

        Args:
            output: ``G⁻¹`` itself, for the products with the means.
            input: ``A⁻¹`` itself.
            cotangents: ``g``, shape ``[R, d_out]``, float32.
            inputs: ``ā`` without its column of ones, shape ``[R, d_in - 1]``.
            work: Memory for intermediate results.

        Returns:
            The weight's and the bias's part of the product, float32.
        """
        (count, columns), height = inputs.shape, len(output)
        mean = inputs.mean(0)
        total = cotangents.sum(0)
        low, high = output @ total, input[columns] + mean @ input[:columns]
        left = self._solved(torch.sub(cotangents, total / count), self._halves[0], work, 0)
        right = self._solved(torch.sub(inputs, mean), self._halves[1][:columns], work, 1)
        moved = torch.mm(left.mT, right, out=work.take(2, height, columns + 1, inputs.device))
        weight = moved[:, :columns].float().addr_(low, high[:columns])
        return weight, moved[:, columns] + low * high[columns]

    def _solved(self, rows: Tensor, half: Tensor, work: Workspace, slot: int) -> Tensor:
        """Round rows and multiply them by a rounded inverse; the product lies in a slot of its own."""
        rest = work.take(2, len(rows), rows.shape[1], rows.device).copy_(rows)
        return torch.mm(rest, half, out=work.take(slot, len(rows), half.shape[1], rows.device))


def _rounded(matrix: Tensor) -> Tensor:
    columns = matrix.shape[1]
    half = matrix.new_empty(columns, row_step(columns, torch.bfloat16), dtype=torch.bfloat16)
    return half[:, :columns].copy_(matrix)


@lru_cache(maxsize=64)
def _mixing(columns: int, device: torch.device) -> Tensor:
    """The same random combinations for all matrices of a width, in every run."""
    return torch.randn(columns, RANK, generator=torch.Generator().manual_seed(columns)).to(device)
