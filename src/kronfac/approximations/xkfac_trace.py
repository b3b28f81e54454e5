"""XK-FAC with every block's trace put right."""

from __future__ import annotations

import torch
from torch import Tensor

from kronfac.approximations.base import Mean, Statistic, require_finite, zeros
from kronfac.approximations.xkfac import XKFAC, XKFACStatistic
from kronfac.blocks import Block, Kronecker, KroneckerSum
from kronfac.coupling import Coupling
from kronfac.layers import LayerAdapter
from kronfac.layers.base import require_float, stack_first
from kronfac.sources import Sample

#: A block is noise whose root trace is that many roundings of the numbers it was summed from; a few are usual.
_ROUNDINGS = 16.0


class TraceMatchedStatistic(XKFACStatistic):
    """XK-FAC's moments, and the trace of the layer's exact block.

    A pull whose examples have independent signs has the gradient ``∇ = Σ_m v_m ā_mᵀ`` of the layer's weights, and
    ``E[|∇|²]`` is the sum over examples of the traces of their exact blocks, whatever batch norm couples: an unbiased
    trace from what is pulled anyway.

    XK-FAC's own block may be zero where the exact one is not: behind instance norm, cotangents summed over positions
    are. Its trace is then what rounding left, and no ratio of the two means anything; ``noise`` says how much that is.

    Args:
        layer: The layer's adapter.
    """

    def __init__(self, layer: LayerAdapter) -> None:
        super().__init__(layer)
        self.trace, self.noise = (Mean(zeros(layer, *layer.stack)) for _ in range(2))

    def means(self) -> dict[str, Mean]:
        """XK-FAC's moments, the trace, and the trace that rounding may leave."""
        return {**super().means(), "trace": self.trace, "noise": self.noise}

    def add(self, sample: Sample) -> None:
        """Add the moments of one pull and the squared norm of its gradient."""
        super().add(sample)
        if self.coupling is Coupling.NONE:
            return
        require_finite(sample)
        assert sample.cotangents is not None
        if sample.first:
            self.trace.weight += sample.denominator
            self.noise.weight += sample.denominator
        layer, depth = self.layer, len(self.layer.stack)
        rows = stack_first(layer.expand(require_float(sample.inputs)), depth)
        cotangents = stack_first(layer.expand_cotangents(require_float(sample.cotangents)), depth)
        norm = (cotangents.mT @ rows).square().sum((-2, -1))
        self.trace.total.add_(norm.to(self.trace.total), alpha=sample.weight * self.trace.alpha)
        # The trace without the sums over positions in which things may cancel.
        norm = rows.square().sum((-2, -1)) / rows.shape[-2] * cotangents.square().sum((-2, -1))
        relative = (_ROUNDINGS * torch.finfo(sample.cotangents.dtype).eps) ** 2
        self.noise.total.add_(norm.to(self.noise.total), alpha=relative * sample.weight * self.noise.alpha)

    def block(self) -> Block:
        """Return XK-FAC's block times the ratio of the traces, or as it is where nothing but rounding is left of it."""
        block = super().block()
        if self.coupling in (None, Coupling.NONE):
            return block
        assert isinstance(block, Kronecker | KroneckerSum)
        own = _trace(block)
        ratio = torch.where(own > self.noise.value(), self.trace.value() / own, 1.0)
        tensors = block.tensors()
        scaled = {name: t * ratio[..., None, None] if name.endswith("output") else t for name, t in tensors.items()}
        return type(block)(**scaled)


class TraceMatchedXKFAC(XKFAC):
    """``xkfac`` with each block multiplied by the ratio of the exact block's trace to its own.

    XK-FAC overestimates traces, above all where inputs and derivatives of an example are not independent. The exact
    trace is estimated without bias from the pulls' own gradients, at the cost of one more product for each. A block of
    zeros, but for rounding, stays one.
    """

    name = "xkfac_trace"

    def start(self, layer: LayerAdapter) -> Statistic:
        """Return empty statistics for a layer.

        Args:
            layer: The layer's adapter.

        Returns:
            The statistic.
        """
        kind = super().start(layer)
        return TraceMatchedStatistic(layer) if isinstance(kind, XKFACStatistic) else kind


def _trace(block: Kronecker | KroneckerSum) -> Tensor:
    """The trace of each element of the stack."""
    tensors = block.tensors()
    traces = {name: t.diagonal(dim1=-2, dim2=-1).sum(-1) for name, t in tensors.items()}
    found = traces["input"] * traces["output"]
    return found + traces["second_input"] * traces["second_output"] if "second_input" in traces else found
