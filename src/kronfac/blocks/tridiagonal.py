"""A chain of Kronecker products whose inverse is block tridiagonal (Martens & Grosse 2015, section 4.3).

The gradients of the layers ``1 … L`` of a chain are modelled as a Gaussian Markov chain that runs from the last layer
down: given its upper neighbour, a layer's gradient is independent of all others,

    ``vec(DW_i) | vec(DW_{i+1}) ~ N(Psi_i vec(DW_{i+1}), Sigma_i)``,    ``vec(DW_L) ~ N(0, Sigma_L)``,

with ``Psi_i = Psi^G_i x Psi^A_i`` the regression of one on the other, itself a Kronecker product, and ``Sigma_i`` a
difference of two. The precision is ``Xi^T Lambda Xi``, with ``Lambda`` the inverses of the ``Sigma_i`` and ``Xi`` the
identity with ``-Psi_i`` above its diagonal. The covariance has the given diagonal blocks and those beside them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple, Self

import torch
from torch import Tensor

from kronfac.blocks.base import Block, Inverse
from kronfac.blocks.checks import check_factor, check_pair, check_vector
from kronfac.blocks.coupled import CoupledBlocks, CoupledInverse
from kronfac.blocks.kronecker import Kronecker
from kronfac.blocks.shifts import PerFactor, Shift
from kronfac.blocks.two_term import TwoTermInverse
from kronfac.linalg.factorise import cholesky


class Link(NamedTuple):
    """A Kronecker product between a layer (rows) and its upper neighbour (columns): a cross moment, or a regression.

    Attributes:
        input: Shape ``[d_in, d_in']``.
        output: Shape ``[d_out, d_out']``.
    """

    input: Tensor
    output: Tensor

    def down(self, upper: Tensor) -> Tensor:
        """Map a ``V`` of the upper layer to the lower one.

        Args:
            upper: Shape ``[..., d_out', d_in']``.

        Returns:
            Shape ``[..., d_out, d_in]``.
        """
        return self.output @ upper @ self.input.mT

    def up(self, lower: Tensor) -> Tensor:
        """Map a ``V`` of the lower layer to the upper one, by the transpose.

        Args:
            lower: Shape ``[..., d_out, d_in]``.

        Returns:
            Shape ``[..., d_out', d_in']``.
        """
        return self.output.mT @ lower @ self.input


class Tridiagonal(CoupledBlocks):
    """The covariance of the Markov chain: Kronecker blocks, those on and beside the diagonal given.

    A block further from the diagonal is what the chain makes of the steps in between; the inverse, not the matrix, is
    block tridiagonal.

    Attributes:
        blocks: ``{layer: Kronecker}``, from the first layer of the chain to the last.
        links: The cross moments of each layer with the next, one less than there are blocks.
    """

    def __init__(self, blocks: Mapping[str, Kronecker], links: Sequence[Link]) -> None:
        """Store the moments; they are not copied.

        Args:
            blocks: The diagonal blocks by layer, in the order of the chain; without stacks, of one dtype and device.
            links: ``(A_{i,i+1}, G_{i,i+1})`` for each layer but the last. That they are moments of the same vectors as
                the blocks, so that the whole is positive semi-definite, is taken on trust.

        Raises:
            ValueError: If the shapes do not fit.
        """
        chain = list(blocks.values())
        if not chain or len(links) != len(chain) - 1:
            raise ValueError(f"a chain of {len(chain)} blocks needs {len(chain) - 1} links, got {len(links)}")
        if stacked := [name for name, block in blocks.items() if len(block.shape) != 2]:
            raise ValueError(f"the layers of a chain have no stack, unlike {stacked}")
        for name, link, (lower, upper) in zip(blocks, links, pairwise(chain), strict=False):
            check_pair(("a link", "its block"), link.input, lower.input)
            check_pair(("a link", "its block"), link.input, upper.input)
            wanted = [(below, above) for below, above in zip(lower.shape, upper.shape, strict=True)]
            if [tuple(link.output.shape), tuple(link.input.shape)] != wanted:
                raise ValueError(
                    f"the link above layer {name!r} has factors of shapes {tuple(link.output.shape)} and "
                    f"{tuple(link.input.shape)} (output, input); its blocks need {wanted[0]} and {wanted[1]}"
                )
        self.blocks: dict[str, Block] = dict(blocks)
        self.links = list(links)
        self._chain = chain

    def matmul(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Multiply by a vector: up the chain with the transposed regressions, and down again.

        Args:
            vectors: ``V`` of every layer, shapes ``[..., d_out, d_in]``.

        Returns:
            The product, of the same form.
        """
        carried = [_checked(vectors, name, block) for name, block in self.blocks.items()]
        passed: list[Tensor] = []
        for i, regression in enumerate(self.regressions):
            passed.append(regression.up(carried[i]))
            carried[i + 1] = carried[i + 1] + passed[i]
        products = [block.matmul(vector) for block, vector in zip(self._chain, carried, strict=True)]
        for i in reversed(range(len(passed))):
            # Sigma_i y = F_ii y - Psi F_{i+1,i+1} Psi^T y, and Psi times what the upper layer gives.
            products[i] = products[i] + self.regressions[i].down(products[i + 1] - self._chain[i + 1].matmul(passed[i]))
        return dict(zip(self.blocks, products, strict=True))

    @cached_property
    def regressions(self) -> list[Link]:
        """``Psi_i``, the regression of each layer on the next, without damping.

        Moments lie in the range of the blocks, so that the pseudo-inverse of a singular factor (a unit that is never
        on, the outputs of a softmax) gives the same matrix as any other solution.
        """
        found = []
        for link, upper in zip(self.links, self._chain[1:], strict=True):
            sides = ((link.input, upper.input), (link.output, upper.output))
            found.append(Link(*(_times_pseudo_inverse(cross, factor) for cross, factor in sides)))
        return found

    def frobenius_norm(self) -> Tensor:
        """Frobenius norm, from those of the Kronecker factors of all blocks.

        Returns:
            A 0-dim tensor.
        """
        squares = []
        for column, block in enumerate(self._chain):
            input, output = block.input, block.output
            squares.append(_square(input) * _square(output))
            for row in reversed(range(column)):
                input, output = self.regressions[row].input @ input, self.regressions[row].output @ output
                squares.append(2 * _square(input) * _square(output))
        return torch.stack(squares).sum().sqrt()

    def factorise(self, shifts: Mapping[str, Shift]) -> TridiagonalInverse:
        """Prepare to solve with the chain, its diagonal blocks damped factor by factor and the links as they are.

        Args:
            shifts: A `PerFactor` for each layer. What is added to a block as a whole would make the conditional
                covariances sums of three Kronecker products, which have no such inverse.

        Returns:
            The inverse.

        Raises:
            TypeError: If a shift is another.
            torch.linalg.LinAlgError: If a conditional covariance is not positive definite.
        """
        damped: list[tuple[Tensor, Tensor]] = []
        for (name, shift), block in zip(((name, shifts[name]) for name in self.blocks), self._chain, strict=True):
            if not isinstance(shift, PerFactor):
                raise TypeError(
                    f"the block-tridiagonal inverse takes damping on the two factors of each layer (PerFactor, "
                    f"rule='factored'), not {type(shift).__name__} on layer {name!r}"
                )
            damped.append((_shifted(block.input, shift.input), _shifted(block.output, shift.output)))
        names, dtype = list(self.blocks), self.dtype
        regressions: list[Link] = []
        conditionals: list[Inverse] = []
        for i, link in enumerate(self.links):
            upper = [
                _regress(cross, factor, f"the damped {side} factor of layer {names[i + 1]!r}")
                for side, cross, factor in zip(("input", "output"), link, damped[i + 1], strict=True)
            ]
            (input, explained_input), (output, explained_output) = upper
            regressions.append(Link(input.to(dtype), output.to(dtype)))
            what = f"the conditional covariance of layer {names[i]!r} given layer {names[i + 1]!r}"
            inverse = TwoTermInverse.of(damped[i], (explained_input, explained_output), -1, what)
            tensors = {key: tensor.to(dtype) for key, tensor in inverse.tensors().items()}
            conditionals.append(TwoTermInverse.from_tensors(tensors, inverse.shape))
        try:
            conditionals.append(self._chain[-1].factorise(shifts[names[-1]]))
        except torch.linalg.LinAlgError as error:
            raise torch.linalg.LinAlgError(f"layer {names[-1]!r}: {error}") from error
        return TridiagonalInverse(dict(zip(names, conditionals, strict=True)), regressions)

    def scale(self, factor: Tensor | float) -> Self:
        """Multiply by a number, which goes into the output factors.

        Args:
            factor: Not negative.

        Returns:
            New blocks.
        """
        check_factor(factor)
        blocks = {name: block.scale(factor) for name, block in zip(self.blocks, self._chain, strict=True)}
        return type(self)(blocks, [Link(link.input, link.output * factor) for link in self.links])


class TridiagonalInverse(CoupledInverse):
    """``Xi^T Lambda Xi``: one sweep over the chain, with neighbours alone.

    Attributes:
        conditionals: The blocks of ``Lambda``: the inverses of the ``Sigma_i`` by layer, in the order of the chain.
        regressions: The ``Psi_i``.
    """

    def __init__(self, conditionals: Mapping[str, Inverse], regressions: Sequence[Link]) -> None:
        """Store the parts.

        Args:
            conditionals: An inverse for each layer.
            regressions: A regression for each layer but the last.
        """
        self.conditionals = dict(conditionals)
        self.regressions = list(regressions)

    def apply(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Solve.

        Args:
            vectors: ``V`` of every layer, shapes ``[..., d_out, d_in]``.

        Returns:
            The solution, of the same form.
        """
        given = [vectors[name] for name in self.conditionals]
        residuals = [
            vector - self.regressions[i].down(given[i + 1]) if i < len(self.regressions) else vector
            for i, vector in enumerate(given)
        ]
        solved = [inverse.apply(rest) for inverse, rest in zip(self.conditionals.values(), residuals, strict=True)]
        return self._back(solved)

    def sqrt_apply(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Multiply by the root ``Xi^T Lambda^1/2``, with the roots that the conditional inverses have.

        Args:
            vectors: ``V`` of every layer, shapes ``[..., d_out, d_in]``.

        Returns:
            The product, of the same form.
        """
        return self._back([inverse.sqrt_apply(vectors[name]) for name, inverse in self.conditionals.items()])

    def logdet(self) -> Tensor:
        """Log-determinant of the damped chain: that of the conditional covariances, since ``det Xi = 1``.

        Returns:
            A 0-dim tensor.
        """
        return torch.stack([inverse.logdet() for inverse in self.conditionals.values()]).sum()

    def _back(self, parts: list[Tensor]) -> dict[str, Tensor]:
        """``Xi^T`` times a vector."""
        out = [part - self.regressions[i - 1].up(parts[i - 1]) if i else part for i, part in enumerate(parts)]
        return dict(zip(self.conditionals, out, strict=True))


def _checked(vectors: Mapping[str, Tensor], name: str, block: Block) -> Tensor:
    check_vector(vectors[name], block.shape, block.dtype)
    return vectors[name]


def _shifted(matrix: Tensor, shift: Tensor | float) -> Tensor:
    shifted = matrix.double().clone()
    shifted.diagonal().add_(shift)
    return shifted


def _regress(cross: Tensor, factor: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """``cross factor^-1`` and ``cross factor^-1 cross^T``, in float64."""
    root = cholesky(factor, name)
    half = torch.linalg.solve_triangular(root, cross.double().mT, upper=False)
    return torch.linalg.solve_triangular(root.mT, half, upper=True).mT, half.mT @ half


def _times_pseudo_inverse(cross: Tensor, factor: Tensor) -> Tensor:
    # What rounding leaves of a zero eigenvalue is judged in the precision of the moments.
    tolerance = 8 * factor.shape[-1] * torch.finfo(factor.dtype).eps
    inverse = torch.linalg.pinv(factor.double(), rtol=tolerance, hermitian=True)
    return (cross.double() @ inverse).to(cross.dtype)


def _square(matrix: Tensor) -> Tensor:
    return matrix.square().sum()
