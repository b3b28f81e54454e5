"""Weighted sums of two curvatures over the same parameters, exactly or as one Kronecker product."""

from __future__ import annotations

import torch
from torch import Tensor

from kronfac.blocks import Block, Dense, Diagonal, DiagonalKronecker, Kronecker, KroneckerSum, ScaledKronecker
from kronfac.curvature import BlockDiagonal
from kronfac.curvature_coupled import CoupledCurvature
from kronfac.vectors import listed

Curvature = BlockDiagonal | CoupledCurvature
#: A curvature with its weight.
Part = tuple[float, Curvature]
COMBINE = ("exact", "factors", "nearest")


def combined(parts: tuple[Part, ...], new: Part, how: str) -> tuple[Part, ...]:
    """Add a curvature to a weighted sum of curvatures.

    Args:
        parts: Weights and curvatures.
        new: The curvature to add, with its weight.
        how: ``"exact"``: diagonal and dense blocks are added, others kept side by side, so that each product costs one
            more. ``"factors"`` and ``"nearest"`` keep one Kronecker product for each layer, two where XK-FAC has two.

    Returns:
        Weights and curvatures of the sum.

    Raises:
        ValueError: If the curvatures are over different parameters, or ``how`` is unknown.
        NotImplementedError: If blocks have no such approximation.
    """  # noqa: DOC502
    if how not in COMBINE:
        raise ValueError(f"combine={how!r} is unknown; choose one of {COMBINE}")
    for _, curvature in parts:
        check_same(curvature, new[1])
    if how == "exact":
        weight, last = parts[-1]
        if not _additive(last, new[1]):
            return (*parts, new)
        return (*parts[:-1], (1.0, _merged((weight, last), new, how)))
    total = parts[0]
    for part in (*parts[1:], new):
        total = (1.0, _merged(total, part, how))
    return (total,)


def check_same(first: Curvature, second: Curvature) -> None:
    """Refuse curvatures over different parameters.

    Args:
        first: A curvature.
        second: The other.

    Raises:
        ValueError: If layers, parameters or dtypes differ; the message names them.
    """
    if differing := sorted(first.blocks.keys() ^ second.blocks.keys()):
        raise ValueError(f"only one of the two curvatures has a block for {listed(differing)}")
    if first.parameter_shapes != second.parameter_shapes:
        names = [n for n, shape in first.parameter_shapes.items() if second.parameter_shapes.get(n) != shape] or list(
            second.parameter_shapes
        )
        raise ValueError(f"the two curvatures differ in the parameters {listed(names)}")
    old, new = (next(iter(curvature.blocks.values())).dtype for curvature in (first, second))
    if old != new:
        # `to` of a penalty does not take curvature that couples layers.
        convert = f"convert the penalty by penalty.to(dtype={new}), or " if isinstance(first, BlockDiagonal) else ""
        raise ValueError(f"the two curvatures are {old} and {new}: {convert}estimate the second on a model in {old}")


def _additive(first: Curvature, second: Curvature) -> bool:
    if not (isinstance(first, BlockDiagonal) and isinstance(second, BlockDiagonal)):
        return False
    pairs = [(block, second.blocks[layer]) for layer, block in first.blocks.items()]
    return all(type(a) is type(b) and isinstance(a, Diagonal | Dense) for a, b in pairs)


def _merged(first: Part, second: Part, how: str) -> BlockDiagonal:
    (u, left), (v, right) = first, second
    if not (isinstance(left, BlockDiagonal) and isinstance(right, BlockDiagonal)):
        raise NotImplementedError(f'combine={how!r} needs block-diagonal curvatures; combine="exact" takes all')
    blocks = {}
    for layer, block in left.blocks.items():
        try:
            blocks[layer] = _added(u, block, v, right.blocks[layer], how)
        except NotImplementedError as error:
            raise NotImplementedError(f"layer {layer!r}: {error}") from error
    return BlockDiagonal(blocks, left.layouts, left.parameter_names, left.options)


def _added(u: float, first: Block, v: float, second: Block, how: str) -> Block:
    if isinstance(first, Diagonal) and isinstance(second, Diagonal):
        return Diagonal(u * first.values + v * second.values)
    if isinstance(first, Dense) and isinstance(second, Dense):
        return Dense(u * first.matrix + v * second.matrix, first.shape)
    if isinstance(first, KroneckerSum) and isinstance(second, KroneckerSum):
        # Term by term, each of a kind: two products stay two, and both stay semi-definite.
        head, tail = (_added(u, left, v, right, how) for left, right in zip(_terms(first), _terms(second), strict=True))
        assert isinstance(head, Kronecker)
        assert isinstance(tail, Kronecker)
        return KroneckerSum(head.input, head.output, tail.input, tail.output)
    kinds = Kronecker | DiagonalKronecker if how == "factors" else Kronecker | DiagonalKronecker | ScaledKronecker
    # A scaled product may meet a plain one: the nearest to two scaled ones is plain. Diagonal factors differ in shape.
    if not (isinstance(first, kinds) and isinstance(second, kinds)) or _shapes(first) != _shapes(second):
        raise NotImplementedError(
            f"combine={how!r} cannot make one block of {type(first).__name__} and {type(second).__name__}; "
            'combine="exact" keeps both'
        )
    a, g, b, h = first.input, _output(first), second.input, _output(second)
    product = DiagonalKronecker if a.ndim == g.ndim - 1 else Kronecker
    if how == "factors":
        # Nothing is no product of any factors: averaged with its own, the other's would be smaller.
        u, v = (weight * bool(output.any()) for weight, output in ((u, g), (v, h)))
        return product(u * a + v * b, g) if u + v == 0 else product((u * a + v * b) / (u + v), u * g + v * h)
    stack = g.ndim - 2
    input, output = nearest_sum((a.flatten(stack), b.flatten(stack)), (g.flatten(stack), h.flatten(stack)), (u, v))
    return product(input.view_as(a), output.view_as(g))


def _terms(block: KroneckerSum) -> tuple[Kronecker, Kronecker]:
    return Kronecker(block.input, block.output), Kronecker(block.second_input, block.second_output)


def _shapes(block: Kronecker | DiagonalKronecker | ScaledKronecker) -> tuple[torch.Size, torch.Size]:
    return block.input.shape, block.output.shape


def _output(block: Kronecker | DiagonalKronecker | ScaledKronecker) -> Tensor:
    return block.delta[..., None, None] * block.output if isinstance(block, ScaledKronecker) else block.output


def nearest_sum(
    inputs: tuple[Tensor, Tensor], outputs: tuple[Tensor, Tensor], weights: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Find the Kronecker product nearest to ``Σ_i w_i G_i x A_i`` in the Frobenius norm, from inner products alone.

    The rearranged sum has rank two (Van Loan & Pitsianis 1993), so that its dominant pair is that of a 2 x 2 matrix
    ``W K_A W K_G`` of inner products. Its entries are not negative for semi-definite factors; hence the coefficients of
    the dominant pair (Perron & Frobenius) are not either, and the factors found are semi-definite.

    Args:
        inputs: ``A_i``, flattened: ``[*stack, n]``.
        outputs: ``G_i``, flattened: ``[*stack, m]``.
        weights: ``w_i``, not negative.

    Returns:
        Input and output factor, flattened.
    """
    a, g = torch.stack(inputs, -2), torch.stack(outputs, -2)
    w = torch.tensor(weights, dtype=torch.float64, device=a.device)
    gram_a, gram_g = (x.double() @ x.double().mT for x in (a, g))
    weighted = w.unsqueeze(-1) * gram_a * w
    values, vectors = torch.linalg.eigh(gram_g)
    root = (vectors * values.clamp(min=0).sqrt().unsqueeze(-2)) @ vectors.mT
    top = torch.linalg.eigh(root @ weighted @ root).eigenvectors[..., -1:]
    c = (weighted @ root @ top).squeeze(-1)
    c = (c * torch.where(c.sum(-1, keepdim=True) < 0, -1.0, 1.0)).clamp(min=0)
    c = c / torch.linalg.vector_norm(c, dim=-1, keepdim=True).clamp(min=1e-300)
    # The input factor that goes with the output factor G = Σ c_i G_i: Σ_i w_i <G_i, G> A_i / <G, G>.
    inner = (gram_g @ c.unsqueeze(-1)).squeeze(-1)
    norm = (c * inner).sum(-1, keepdim=True)
    d = torch.where(norm > 0, w * inner / norm.clamp(min=1e-300), 0.0)
    input = (d.to(a.dtype).unsqueeze(-1) * a).sum(-2)
    return input, (c.to(g.dtype).unsqueeze(-1) * g).sum(-2)
