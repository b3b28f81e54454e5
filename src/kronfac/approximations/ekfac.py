"""EKFAC: second moments of per-example gradients, re-estimated in a Kronecker eigenbasis."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from kronfac import processes
from kronfac.approximations.base import Approximation, Mean, Statistic, require_finite, zeros
from kronfac.approximations.joint import JointApproximation
from kronfac.approximations.kfac import KFAC
from kronfac.approximations.xkfac import XKFAC
from kronfac.blocks import Block, Eigenbasis, EigenKronecker
from kronfac.blocks.eigen_kronecker import change_basis
from kronfac.layers import LayerAdapter
from kronfac.layers.base import stack_first
from kronfac.linalg.symmetric import add_product_, all_finite
from kronfac.sources import Sample, Source, require_examples

#: Entries of rows and per-example gradients held at once.
CHUNK = 1 << 24


class EKFACStatistic(Statistic):
    """Running ``S = (1/D) Σ_n (Q_Gᵀ ∇_n Q_A)²`` in the eigenbasis of other statistics, with ``∇_n`` exact per example.

    The basis is that of the base's factors at the last :meth:`rebase`; until the first one only the factors gather.
    What becomes of ``S`` when the basis changes: at the first time it starts from the eigenvalues of the base's block,
    counted like the data they were gathered from; later it is carried over by
    :func:`kronfac.blocks.eigen_kronecker.change_basis`, which is the diagonal of the present block in the new basis.
    Its trace, the mean of ``|∇_n|²``, is the same in every basis and is kept.

    Args:
        base: Empty statistics whose block has an eigenbasis of two factors.
        name: Name of the approximation, for messages.
    """

    keeps_basis = True

    def __init__(self, base: Statistic, name: str) -> None:
        super().__init__(base.layer)
        self.base, self._name, self.by_rows = base, name, base.by_rows
        self.moments = Mean(zeros(self.layer, *self.layer.shape))
        self.basis: Eigenbasis | None = None
        self._final = False

    def means(self) -> dict[str, Mean]:
        """The base's means, and the second moments."""
        return {**self.base.means(), "moments": self.moments}

    @property
    def empty(self) -> bool:
        """Whether nothing was gathered."""
        return self.base.empty or (self._final and self.moments.weight == 0.0)

    def add(self, sample: Sample) -> None:
        """Add one pull to the factors and, once there is a basis, to the second moments in it."""
        if sample.cotangents is None:
            raise ValueError(f"approximation={self._name!r} needs cotangents.")
        require_examples(self.layer, sample.inputs, sample.batch, f"approximation={self._name!r}")
        if self._final:
            require_finite(sample)
        else:
            self.base.add(sample)
        if sample.first:
            self.moments.weight += sample.denominator
        if self.basis is not None:
            scale = sample.weight * self.moments.alpha
            add_squares_(self.moments.total, self.layer, self.basis, sample.inputs, sample.cotangents, scale)

    def rebase(self) -> None:
        """Make the eigenbasis of the factors as they are now the present one.

        Raises:
            torch.linalg.LinAlgError: The eigendecomposition failed.
        """
        try:
            found = self.base.block().eigh()
        except torch.linalg.LinAlgError as error:
            raise torch.linalg.LinAlgError(f"layer {self.layer.name!r}: {error}") from error
        new, old = self._checked(found), self.basis
        if old is None:
            self.moments.total = new.values * (self.moments.weight * self.moments.alpha)
        else:
            self.moments.total = change_basis(self.moments.total, new, old).contiguous()
        self.basis = new

    def _checked(self, found: Eigenbasis) -> Eigenbasis:
        """The bases in one layout, and the same ones in all processes of a distributed run."""
        fits = found.output is not None and (found.input is None) == self.layer.diagonal_input
        if found.joint is not None or not fits:
            raise TypeError(
                f"approximation={self._name!r} needs the eigenvectors of an input and an output factor, which "
                f"{type(self.base).__name__} does not give for layer {self.layer.name!r}."
            )
        assert found.output is not None
        input = None if found.input is None else _agreed(found.input)
        return Eigenbasis(found.values, _agreed(found.output), input)

    def next_pass(self) -> None:
        """Fix the basis for good, and start the second moments anew."""
        self._final = True
        if not self.base.empty:
            self.rebase()
            self.moments = Mean(torch.zeros_like(self.moments.total))

    def constants(self) -> dict[str, Tensor]:
        """The bases.

        Returns:
            ``{"output": Q_G, "input": Q_A}``, without the input basis where it is the identity; nothing before the
            first :meth:`rebase`.
        """
        if self.basis is None:
            return {}
        bases = {"output": self.basis.output, "input": self.basis.input}
        return {key: basis for key, basis in bases.items() if basis is not None}

    def constant_shapes(self) -> dict[str, torch.Size]:
        """Shapes of the bases."""
        layer = self.layer
        widths = {"output": layer.d_out} if layer.diagonal_input else {"output": layer.d_out, "input": layer.d_in}
        return {key: torch.Size((*layer.stack, width, width)) for key, width in widths.items()}

    def restore(self, constants: Mapping[str, Tensor]) -> None:
        """Take back the bases.

        Args:
            constants: From :meth:`constants`.
        """
        values = self.moments.total
        bases = Eigenbasis(values, constants.get("output"), constants.get("input"))
        self.basis = bases if constants else None

    def block(self) -> Block:
        """Return the block; before the first :meth:`rebase` it is the base's, in its own eigenbasis.

        Returns:
            The block.

        Raises:
            FloatingPointError: The second moments overflowed.
        """
        if self.basis is None:
            found = self._checked(self.base.block().eigh())
            basis, values = found, found.values
        else:
            basis, values = self.basis, self.moments.value()
        if not all_finite(values):
            raise FloatingPointError(f"The second moments of layer {self.layer.name!r} overflowed to NaN or Inf.")
        assert basis.output is not None
        return EigenKronecker(values, basis.output, basis.input)


class EKFAC(Approximation):
    """``F_ℓ ≈ (Q_G ⊗ Q_A) diag(S) (Q_G ⊗ Q_A)ᵀ`` with ``S`` the exact diagonal in that basis (George et al. 2018).

    Of all matrices with the eigenvectors of K-FAC's block it is the nearest one to the exact block in Frobenius norm,
    and so never farther from it than K-FAC's; ``S`` sums over positions *before* squaring, so that this holds for
    convolutions and shared weights too.  Blocks of normalisation layers are those of K-FAC, which are exact.

    Args:
        base: The approximation whose factors give the basis; K-FAC by default.

    Raises:
        TypeError: ``base`` is no approximation, or one that looks at the whole graph.
    """

    name = "ekfac"
    needs_pairs = True
    needs_examples = True
    passes = 2

    def __init__(self, base: Approximation | None = None) -> None:
        base = KFAC() if base is None else base
        if not isinstance(base, Approximation):
            raise TypeError(f"base must be a kronfac.approximations.Approximation, not {type(base).__name__}.")
        if not takes_layers_alone(base):
            raise TypeError(
                f"base must take layers one by one, such as KFAC() or TKFAC(): approximation={base.name!r} reads what "
                "lies between layers from the whole graph."
            )
        self.base = base

    def start(self, layer: LayerAdapter) -> Statistic:
        """Return empty factors and second moments.

        Args:
            layer: The layer's adapter.

        Returns:
            The statistic.
        """
        base = self.base.start(layer)
        return base if layer.unit_wise else EKFACStatistic(base, self.name)

    def check(self, source: Source) -> None:
        """Refuse a source that does not offer what this approximation or its base needs.

        Args:
            source: The source.
        """
        super().check(source)
        self.base.check(source)


def takes_layers_alone(approximation: Approximation) -> bool:
    """Whether a layer's statistics can be kept apart from other layers', as those who compose approximations do.

    Args:
        approximation: What is to be a part of another approximation.

    Returns:
        False of those that couple layers, or read from the graph of all of them what batch norm couples.
    """
    return not isinstance(approximation, (JointApproximation, XKFAC))


def add_squares_(
    total: Tensor, layer: LayerAdapter, basis: Eigenbasis, x: Tensor, g: Tensor, alpha: float = 1.0
) -> None:
    """Add ``alpha Σ_n (Q_Gᵀ ∇_n Q_A)²`` of one pull, a bounded number of examples at a time.

    Args:
        total: Running sum in the layer's shape, changed in place.
        layer: The layer.
        basis: ``Q_G`` and ``Q_A``.
        x: The layer's input.
        g: The cotangent of its output.
        alpha: Factor of what is added.
    """
    output, input = basis.output, basis.input
    assert output is not None
    if input is None:
        index, columns = layer.gradient_columns(x, g)
        squares = (columns.to(total.dtype) @ output).square_()
        total.index_add_(1, index, squares.mT, alpha=alpha)
        return
    positions, stack = math.prod(layer.positions(x)[1:]), math.prod(layer.stack)
    rows, gradient = positions * (layer.d_in + layer.d_out), layer.d_out * layer.d_in if positions > 1 else 0
    per_chunk = max(1, CHUNK // max(1, 2 * stack * (rows + gradient)))
    depth = len(layer.stack)
    for inputs, cotangents in zip(x.split(per_chunk), g.split(per_chunk), strict=True):
        a, c = layer.expand(inputs).to(total.dtype), layer.expand_cotangents(cotangents).to(total.dtype)
        if positions == 1:
            # ∇_n is one outer product: the square of its projection is the product of two squares.
            left, right = stack_first(c, depth) @ output, stack_first(a, depth) @ input
            add_product_(total, left.square_(), right.square_(), alpha=alpha)
            continue
        total.add_(_projected(a, c, output, input, depth).square_().sum(0), alpha=alpha)


def _projected(a: Tensor, c: Tensor, output: Tensor, input: Tensor, depth: int) -> Tensor:
    """``Q_Gᵀ (Σ_s c_s a_sᵀ) Q_A`` of each example, ``[B, *stack, d_out, d_in]``."""
    if depth:
        a, c = a.movedim(1, -2), c.movedim(1, -2)
    # Each side is projected where it is cheaper: before the sum over positions if these are fewer than the other width.
    positions, d_in, d_out = a.shape[-2], a.shape[-1], c.shape[-1]
    left = c @ output if positions < d_in else c
    right = a @ input if positions < d_out else a
    gradients = left.mT @ right
    if positions >= d_in:
        gradients = output.mT @ gradients
    return gradients if positions < d_out else gradients @ input


def _agreed(basis: Tensor) -> Tensor:
    """The first process's basis: eigenvectors of the same matrix may differ in sign and within degenerate spaces."""
    basis = basis.contiguous()
    if processes.together():
        processes.agree_on(basis)
    return basis
