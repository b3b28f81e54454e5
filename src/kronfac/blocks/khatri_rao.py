"""Khatri-Rao products over the partition into layers: the matrix of KK-FAC, blocks between all layers included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor

from kronfac.blocks.base import Block, Inverse
from kronfac.blocks.checks import check_factor
from kronfac.blocks.coupled import CoupledBlocks, CoupledInverse
from kronfac.blocks.dense import Dense
from kronfac.blocks.inverses import DenseInverse
from kronfac.blocks.kronecker import Kronecker
from kronfac.blocks.kronecker_sum import DENSE_LIMIT, KroneckerSum
from kronfac.blocks.shifts import PerFactor, Shift, Uniform

Shapes = Mapping[str, tuple[int, int]]
Term = tuple[Tensor, Tensor]


class KhatriRao(CoupledBlocks):
    """``C_ij = G_ij x A_ij + G'_ij x A'_ij`` between layers ``i`` and ``j``, from parts of two pairs of matrices.

    Khatri-Rao products of positive semi-definite matrices are positive semi-definite. Further blocks, of layers that
    are coupled to none, stand beside them.

    Args:
        shapes: ``(d_out, d_in)`` of every coupled layer, in the order in which they share the matrices.
        first: ``A`` and ``G``, over the inputs and the outputs of all coupled layers, of widths ``sum d_in`` and
            ``sum d_out``.
        second: ``A'`` and ``G'``, of the same shapes.
        alone: Blocks of the other layers.

    Attributes:
        blocks: The diagonal blocks: a `KroneckerSum` for each coupled layer, and the others.
    """

    def __init__(self, shapes: Shapes, first: Term, second: Term, alone: Mapping[str, Block]) -> None:
        self._shapes, self._terms, self._alone = dict(shapes), (first, second), dict(alone)
        self._rows = _slices([shape[0] for shape in shapes.values()])
        self._columns = _slices([shape[1] for shape in shapes.values()])
        widths = (self._columns[-1].stop, self._rows[-1].stop)
        for matrices in self._terms:
            if tuple(tuple(matrix.shape) for matrix in matrices) != tuple((n, n) for n in widths):
                given = [tuple(matrix.shape) for matrix in matrices]
                raise ValueError(f"the layers need square matrices of widths {widths}, got shapes {given}")
        self.blocks: dict[str, Block] = {}
        for name, o, i in zip(shapes, self._rows, self._columns, strict=True):
            parts = [part for a, g in self._terms for part in (a[i, i].contiguous(), g[o, o].contiguous())]
            self.blocks[name] = KroneckerSum(*parts)
        self.blocks |= self._alone

    @property
    def coupled_layers(self) -> tuple[str, ...]:
        """The layers that are coupled, in the order in which they share the matrices."""
        return tuple(self._shapes)

    def tensors(self) -> dict[str, Tensor]:
        """Give the matrices over the coupled layers, as for `KroneckerSum`.

        Returns:
            ``input``, ``output``, ``second_input`` and ``second_output``.
        """
        (a, g), (b, h) = self._terms
        return {"input": a, "output": g, "second_input": b, "second_output": h}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], shapes: Shapes, alone: Mapping[str, Block]) -> Self:
        """Rebuild from what `tensors` gave.

        Args:
            tensors: The matrices.
            shapes: As in the constructor.
            alone: As in the constructor.

        Returns:
            The matrix.
        """
        first, second = (tensors["input"], tensors["output"]), (tensors["second_input"], tensors["second_output"])
        return cls(shapes, first, second, alone)

    def matmul(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Multiply by a vector: the diagonal blocks of ``G diag(V) A + G' diag(V) A'``.

        Args:
            vectors: ``V`` of every layer, shapes ``[..., d_out, d_in]``.

        Returns:
            The product, of the same form.
        """
        (a, g), some = self._terms[0], vectors[next(iter(self._shapes))]
        placed = some.new_zeros(*some.shape[:-2], len(g), len(a))
        for name, o, i in zip(self._shapes, self._rows, self._columns, strict=True):
            placed[..., o, i] = vectors[name]
        product = sum(right @ placed @ left for left, right in self._terms)
        assert isinstance(product, Tensor)
        found = {name: product[..., o, i] for name, o, i in zip(self._shapes, self._rows, self._columns, strict=True)}
        return found | {name: block.matmul(vectors[name]) for name, block in self._alone.items()}

    def frobenius_norm(self) -> Tensor:
        """Frobenius norm, blocks between layers included.

        Returns:
            A 0-dim tensor.
        """
        total = self._terms[0][0].new_zeros(())
        for a, g in self._terms:
            for b, h in self._terms:
                total = total + (_sums(a * b, self._columns) * _sums(g * h, self._rows)).sum()
        return (total + sum(block.frobenius_norm() ** 2 for block in self._alone.values())).sqrt()

    def dense(self) -> Tensor:
        """Dense matrix over the coupled layers, each ``V`` row-major.

        Returns:
            ``[n, n]``.

        Raises:
            ValueError: It would be too large.
        """
        sizes = [d_out * d_in for d_out, d_in in self._shapes.values()]
        if sum(sizes) > DENSE_LIMIT:
            raise ValueError(
                f"The layers {list(self._shapes)} together have {sum(sizes)} parameters; a matrix that couples them "
                f"has no inverse in closed form, and dense ones end at {DENSE_LIMIT}: use approximation='xkfac'."
            )
        rows = []
        for k in range(len(sizes)):
            parts = []
            for m in range(len(sizes)):
                o, p, i, j = self._rows[k], self._rows[m], self._columns[k], self._columns[m]
                parts.append(sum(torch.kron(g[o, p].contiguous(), a[i, j].contiguous()) for a, g in self._terms))
            rows.append(torch.cat(parts, 1))  # type: ignore[arg-type]
        return torch.cat(rows)

    def factorise(self, shifts: Mapping[str, Shift]) -> KhatriRaoInverse:
        """Prepare to solve with the matrix after its diagonal blocks were shifted; densely.

        Args:
            shifts: For each coupled layer `Uniform`, or `PerFactor`, which is added to the factors of its first
                term as for `KroneckerSum`; for the others, what their blocks support.

        Returns:
            The inverse.
        """
        dense, start = self.dense(), 0
        for name, (d_out, d_in) in self._shapes.items():
            part = slice(start, start + d_out * d_in)
            dense[part, part] += _added(self.blocks[name], shifts[name])
            start = part.stop
        inverse = Dense(dense, (1, len(dense))).factorise(Uniform(0.0))
        assert isinstance(inverse, DenseInverse)
        others = {name: block.factorise(shifts[name]) for name, block in self._alone.items()}
        return KhatriRaoInverse(self._shapes, inverse, others)

    def scale(self, factor: Tensor | float) -> Self:
        """Multiply by a number.

        Args:
            factor: Not negative.

        Returns:
            New blocks.
        """
        check_factor(factor)
        first, second = ((a, g * factor) for a, g in self._terms)
        alone = {name: block.scale(factor) for name, block in self._alone.items()}
        return type(self)(self._shapes, first, second, alone)


class KhatriRaoInverse(CoupledInverse):
    """A dense inverse over the coupled layers, and those of the others.

    Args:
        shapes: ``(d_out, d_in)`` of every coupled layer.
        coupled: Inverse over their parameters, of shape ``[1, n]``.
        alone: Inverses of the other layers.
    """

    def __init__(self, shapes: Shapes, coupled: DenseInverse, alone: Mapping[str, Inverse]) -> None:
        self._shapes, self._coupled, self._alone = dict(shapes), coupled, dict(alone)

    def apply(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Solve.

        Args:
            vectors: ``V`` of every layer, shapes ``[..., d_out, d_in]``.

        Returns:
            The solution, of the same form.
        """
        found = self._split(self._coupled.apply(self._joined(vectors)))
        return found | {name: inverse.apply(vectors[name]) for name, inverse in self._alone.items()}

    def sqrt_apply(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Multiply by the lower-triangular Cholesky factor of the inverse.

        Args:
            vectors: ``V`` of every layer, shapes ``[..., d_out, d_in]``.

        Returns:
            The product, of the same form.
        """
        found = self._split(self._coupled.sqrt_apply(self._joined(vectors)))
        return found | {name: inverse.sqrt_apply(vectors[name]) for name, inverse in self._alone.items()}

    def logdet(self) -> Tensor:
        """Log-determinant of the shifted matrix (not of its inverse).

        Returns:
            A 0-dim tensor.
        """
        return self._coupled.logdet() + sum(inverse.logdet() for inverse in self._alone.values())

    def _joined(self, vectors: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([vectors[name].flatten(-2) for name in self._shapes], -1).unsqueeze(-2)

    def _split(self, joined: Tensor) -> dict[str, Tensor]:
        sizes = [d_out * d_in for d_out, d_in in self._shapes.values()]
        parts = joined.squeeze(-2).split(sizes, -1)
        return {name: part.unflatten(-1, self._shapes[name]) for name, part in zip(self._shapes, parts, strict=True)}


def _slices(widths: Sequence[int]) -> list[slice]:
    ends = torch.tensor(widths).cumsum(0).tolist()
    return [slice(end - width, end) for width, end in zip(widths, ends, strict=True)]


def _sums(matrix: Tensor, parts: Sequence[slice]) -> Tensor:
    """Sums over the parts of a matrix, ``[layers, layers]``."""
    rows = torch.stack([matrix[part].sum(0) for part in parts])
    return torch.stack([rows[:, part].sum(1) for part in parts], 1)


def _added(block: Block, shift: Shift) -> Tensor:
    """What a shift adds to a layer's diagonal block, dense."""
    assert isinstance(block, KroneckerSum)
    first = block.terms()[0]
    match shift:
        case Uniform():
            return shift.value * torch.eye(block.shape.numel(), dtype=block.dtype, device=block.device)
        case PerFactor():
            eyes = [torch.eye(n, dtype=block.dtype, device=block.device) for n in (block.shape[-1], block.shape[-2])]
            damped = Kronecker(first.input + shift.input * eyes[0], first.output + shift.output * eyes[1])
            return damped.matrices() - first.matrices()
        case _:
            kind = type(shift).__name__
            raise TypeError(f"a KhatriRao matrix cannot be factorised with the shift {kind}; it accepts {block.shifts}")
