"""What must be right to rounding in any right implementation, whatever the model: checks that locate a mistake.

The product ``G ⊗ A`` differs from the exact block by what K-FAC assumes; its factors have definitions that assume
nothing. So a wrong scale, a transposed kernel or a misread dilation shows here, and shows in which factor it is. Where
cotangents are sampled, what is expected is computed for the very cotangents that were drawn: no sampling error is left.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from kronfac.approximations import Approximation, Limited
from kronfac.blocks import Block, DiagonalKronecker, Kronecker
from kronfac.inspect.comparison import ratio
from kronfac.inspect.verified import VerificationError
from kronfac.layers import LayerAdapter
from kronfac.measuring import frozen_buffers
from kronfac.sources import Seed
from kronfac.tape import Call, Tape

#: Random directions in which an input factor is looked at.
DIRECTIONS = 4


def part_of(approximation: Approximation, layer: LayerAdapter) -> Approximation:
    """Return the approximation that a layer gets.

    Args:
        approximation: The approximation of the model, which may share the layers out.
        layer: The layer's adapter.

    Returns:
        One that treats all of its layers alike.
    """
    while isinstance(approximation, Limited):
        approximation = approximation.wide if approximation.is_wide(layer) else approximation.base
    return approximation


def input_ratio(block: Block, call: Call, weights: Tensor | None, generator: torch.Generator) -> float:
    """Compare ``wᵀ A w`` with the mean over rows of ``(āᵀw)²``, which the layer itself gives.

    A layer's output is linear in its parameters: their derivative in the direction ``V = c wᵀ`` is ``c (āᵀw)`` at every
    row. It is taken by autodiff (the derivative of a pullback in its cotangent), so that neither rows nor second
    moments of the adapter are used. Its layouts of parameters and outputs are, and are checked with it.

    Args:
        block: The layer's block.
        call: What the layer was called with.
        weights: Weights of the rows, ``[B, S]``, or None.
        generator: For the directions ``w`` and ``c``, on the CPU.

    Returns:
        The ratio, of all directions and groups the one farthest from 1.
    """
    assert isinstance(block, (Kronecker, DiagonalKronecker))
    adapter = call.adapter
    with torch.enable_grad(), frozen_buffers(adapter.module):
        output, cotangent, pulled = _pullback(adapter, call.input)
        found = []
        for _ in range(DIRECTIONS):
            w, c = (
                torch.randn(*adapter.stack, width, generator=generator, dtype=torch.float64).to(block.device)
                for width in (adapter.d_in, adapter.d_out)
            )
            direction = adapter.unpack((c.unsqueeze(-1) * w.unsqueeze(-2)).to(output.dtype))
            inner = torch.stack([(pulled[name] * tangent).sum() for name, tangent in direction.items()]).sum()
            (tangent,) = torch.autograd.grad(inner, cotangent, retain_graph=True)
            rows = adapter.expand_cotangents(tangent).double()
            products = (rows * c).sum(-1) / c.square().sum(-1)
            products = products.mean(1, keepdim=True) if adapter.sharing == "reduce" else products
            found += _ratios(_form(block, w), _mean(products.square(), weights))
    return max(found, key=lambda value: abs(value - 1))


def output_traces(
    tape: Tape, outputs: Tensor, seeds: Sequence[Seed], *, apart: bool, inputs: Collection[str] = ()
) -> dict[str, float]:
    """Compute what ``D tr G`` must be for given cotangents of the outputs.

    Args:
        tape: A recorded forward pass.
        outputs: Its outputs.
        seeds: The cotangents, with their weights.
        apart: Pull each example's cotangent back by itself. Sampled ones are independent, and may be pulled together;
            an exact root's may not if anything in the model mixes examples.
        inputs: Layers whose rows are weighed by the squared norms of their input rows: what TKFAC's ``D δ`` must be.

    Returns:
        ``Σ_seeds weight Σ_rows |g|²`` for each layer, where ``g`` is the seed pulled back to the layer's output.
    """
    totals = dict.fromkeys(tape.calls, 0.0)
    for seed in seeds:
        assert seed.cotangent is not None
        for root in _alone(seed.cotangent) if apart else [seed.cotangent]:
            for name, cotangent in tape.pull(outputs, root).items():
                call = tape.calls[name]
                rows = _shared(call.adapter, cotangent).double().square()
                if name in inputs:
                    rows = call.adapter.output_rows(cotangent).double().square().sum(-1) * norms(call)
                totals[name] += seed.weight * float(rows.sum())
    return totals


def norms(call: Call) -> Tensor:
    """Squared norm of each input row, from the rows themselves where they can be formed: ``[B, S, *stack]``."""
    adapter = call.adapter
    if adapter.diagonal_input:  # one-hot rows as wide as the vocabulary
        return adapter.input_norms(call.input).double()
    return adapter.rows(call.input).double().square().sum(-1)


def gradient_traces(parameters: Mapping[str, Tensor], outputs: Tensor, seeds: Sequence[Seed]) -> dict[str, float]:
    """Sum the squares of the gradients of each example alone, by plain autodiff.

    Args:
        parameters: The parameters by name.
        outputs: Outputs attached to the graph, examples first.
        seeds: Cotangents of the outputs, with their weights.

    Returns:
        ``Σ_seeds weight Σ_n |J_nᵀ v_n|²`` for each parameter: ``D`` times the trace of its block for these cotangents.
    """
    totals = dict.fromkeys(parameters, 0.0)
    for seed in seeds:
        assert seed.cotangent is not None
        for alone in _alone(seed.cotangent.to(outputs.dtype)):
            pulled = torch.autograd.grad(
                outputs, list(parameters.values()), alone, retain_graph=True, materialize_grads=True, allow_unused=True
            )
            for name, gradient in zip(parameters, pulled, strict=True):
                totals[name] += seed.weight * float(gradient.double().square().sum())
    return totals


def output_trace(block: Block) -> float:
    """Trace of the output factor, summed over groups.

    Args:
        block: A Kronecker block.

    Returns:
        ``tr G``.
    """
    assert isinstance(block, (Kronecker, DiagonalKronecker))
    return float(block.output.diagonal(dim1=-2, dim2=-1).double().sum())


def _alone(cotangents: Tensor) -> Iterator[Tensor]:
    """Cotangents of one example each, zero for the others."""
    for index in range(len(cotangents)):
        alone = torch.zeros_like(cotangents)
        alone[index] = cotangents[index]
        yield alone


def _pullback(adapter: LayerAdapter, x: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Output, a cotangent of it, and the parameters' gradients as functions of that cotangent."""
    prefix = f"{adapter.name}." if adapter.name else ""
    leaves = {name: p.detach().clone().requires_grad_() for name, p in adapter.parameters.items()}
    local = {name.removeprefix(prefix): leaf for name, leaf in leaves.items()}
    # Its forward alone: hooks of the user's act before the input that was recorded, and after the output.
    output = functional_call(_Bare(adapter.module), {f"layer.{name}": leaf for name, leaf in local.items()}, (x,))
    cotangent = torch.zeros_like(output, requires_grad=True)
    gradients = torch.autograd.grad(output, list(leaves.values()), cotangent, create_graph=True)
    return output, cotangent, dict(zip(leaves, gradients, strict=True))


class _Bare(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer.forward(x)
        return output


def _shared(adapter: LayerAdapter, cotangent: Tensor) -> Tensor:
    """Sum over positions where weights are shared by *reduce*; otherwise rows need no order."""
    if adapter.sharing != "reduce":
        return cotangent
    return adapter.expand_cotangents(cotangent).sum(1)


def _form(block: Kronecker | DiagonalKronecker, w: Tensor) -> Tensor:
    """``wᵀ A w`` for each stack element."""
    factor = block.input.double()
    if isinstance(block, DiagonalKronecker):
        return (factor * w.square()).sum(-1)
    return torch.einsum("...i,...ij,...j->...", w, factor, w)


def _mean(squares: Tensor, weights: Tensor | None) -> Tensor:
    """Weighted mean over ``[B, S]`` of ``[B, S, *stack]``."""
    if weights is None:
        return squares.mean((0, 1))
    weights = weights.to(squares).reshape(*weights.shape, *(1,) * (squares.ndim - 2)).expand_as(squares)
    return (squares * weights).sum((0, 1)) / weights.sum((0, 1))


def _ratios(found: Tensor, wanted: Tensor) -> list[float]:
    pairs = zip(found.flatten().tolist(), wanted.flatten().tolist(), strict=True)
    return [ratio(left, right) for left, right in pairs]


def matrices(adapter: LayerAdapter, roots: Tensor, names: list[str], model: nn.Module) -> Tensor:
    """Take the columns of roots that belong to a layer.

    Args:
        adapter: The layer's adapter.
        roots: Rows over all parameters, ``[K, P]``.
        names: The parameters in the order of the columns.
        model: The model.

    Returns:
        Shape ``[K, *stack, d_out, d_in]``, float64.

    Raises:
        VerificationError: If the adapter's ``unpack`` does not invert its ``pack``.
    """
    start, places = 0, {}
    for name in names:
        parameter = model.get_parameter(name)
        places[name] = torch.arange(start, start + parameter.numel(), device=roots.device).view(parameter.shape)
        start += parameter.numel()
    own = {name: places[name] for name in adapter.parameter_names}
    matrix = adapter.pack(own)
    if any(not torch.equal(part, own[name]) for name, part in adapter.unpack(matrix).items()):
        raise VerificationError(f"Layer {adapter.name!r}: its adapter's unpack does not invert its pack.")
    return roots[:, matrix.flatten()].reshape(len(roots), *matrix.shape).double()
