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


class TraceMatchedStatistic(XKFACStatistic):
    """XK-FAC's moments, and the trace of the layer's exact block.

    A pull whose examples have independent signs has the gradient ``∇ = Σ_m v_m ā_mᵀ`` of the layer's weights, and
    ``E[|∇|²]`` is the sum over examples of the traces of their exact blocks, whatever batch norm couples: an unbiased
    trace from what is pulled anyway.

    Args:
        layer: The layer's adapter.
    """

    def __init__(self, layer: LayerAdapter) -> None:
        super().__init__(layer)
        self.trace = Mean(zeros(layer, *layer.stack))

    def means(self) -> dict[str, Mean]:
        """XK-FAC's moments and the trace."""
        return {**super().means(), "trace": self.trace}

    def add(self, sample: Sample) -> None:
        """Add the moments of one pull and the squared norm of its gradient."""
        super().add(sample)
        if self.coupling is Coupling.NONE:
            return
        require_finite(sample)
        assert sample.cotangents is not None
        if sample.first:
            self.trace.weight += sample.denominator
        layer, depth = self.layer, len(self.layer.stack)
        rows = stack_first(layer.expand(require_float(sample.inputs)), depth)
        gradient = stack_first(layer.expand_cotangents(require_float(sample.cotangents)), depth).mT @ rows
        norm = gradient.square().sum((-2, -1))
        self.trace.total.add_(norm.to(self.trace.total), alpha=sample.weight * self.trace.alpha)

    def block(self) -> Block:
        """Return XK-FAC's block times the ratio of the traces."""
        block = super().block()
        if self.coupling in (None, Coupling.NONE):
            return block
        assert isinstance(block, Kronecker | KroneckerSum)
        ratio = self.trace.value() / _trace(block).clamp(min=torch.finfo(self.trace.total.dtype).tiny)
        tensors = block.tensors()
        scaled = {name: t * ratio[..., None, None] if name.endswith("output") else t for name, t in tensors.items()}
        return type(block)(**scaled)


class TraceMatchedXKFAC(XKFAC):
    """``xkfac`` with each block multiplied by the ratio of the exact block's trace to its own.

    XK-FAC overestimates traces, above all where inputs and derivatives of an example are not independent. The exact
    trace is estimated without bias from the pulls' own gradients, at the cost of one more product for each.
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
