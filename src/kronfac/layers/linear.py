"""``nn.Linear`` and its subclasses; inputs of any leading shape."""

from __future__ import annotations

from torch import Tensor, nn

from kronfac.layers.base import LayerAdapter, UnsupportedLayer, require_float, with_ones
from kronfac.layers.registry import adapt
from kronfac.linalg.symmetric import add_gram_, summed_in_float32


class LinearAdapter(LayerAdapter):
    """``y = x Wᵀ + b`` with ``x`` of shape ``[B, *positions, in_features]`` (Martens & Grosse 2015, section 3)."""

    autocast = True
    join = "positions"

    def __init__(self, module: nn.Module, name: str, sharing: str = "expand") -> None:
        super().__init__(module, name, sharing)
        self.d_out, self._features = _sizes(module)
        self.d_in = self._features * self.has_weight + self.has_bias

    def matrix_view(self, weight: Tensor) -> Tensor | None:
        """Return the weight itself."""
        return weight

    def lacks_batch(self, x: Tensor) -> bool:
        """True of a single vector."""
        return x.ndim < 2

    def expand(self, x: Tensor) -> Tensor:
        """Return ``[B, S, d_in]``."""
        self.require_batch(x)
        x = require_float(x)
        return with_ones(x.reshape(x.shape[0], -1, self._features), self.has_weight, self.has_bias)

    def expand_cotangents(self, g: Tensor) -> Tensor:
        """Return ``[B, S, d_out]``."""
        self.require_batch(g)
        g = require_float(g)
        return g.reshape(g.shape[0], -1, self.d_out)

    def add_input_gram_(
        self, total: Tensor, x: Tensor, weights: Tensor | None = None, alpha: float = 1.0
    ) -> float | Tensor:
        """Add the rows' second moment without copying the input to append its ones."""
        if self.sharing == "reduce" or not (self.has_weight and self.has_bias):
            return super().add_input_gram_(total, x, weights, alpha)
        rows = (x if weights is None and summed_in_float32(x) else require_float(x)).reshape(-1, self._features)
        flat = None if weights is None else weights.reshape(-1).to(rows.dtype)
        count = float(rows.shape[0]) if flat is None else flat.sum()
        add_gram_(total[:-1, :-1], rows, weights=flat, alpha=alpha)
        total[:-1, -1].add_(rows.sum(0, dtype=total.dtype) if flat is None else flat @ rows, alpha=alpha)
        total[-1, -1] += alpha * count
        return count

    def add_output_gram_(self, total: Tensor, g: Tensor, scale: float = 1.0, weights: Tensor | None = None) -> None:
        """Add the cotangents' second moment."""
        if self.sharing == "reduce" or weights is not None or not summed_in_float32(g):
            super().add_output_gram_(total, g, scale, weights)
        else:
            add_gram_(total, g.reshape(-1, self.d_out), alpha=scale)

    def input_norms(self, x: Tensor) -> Tensor:
        """Return ``|ā|²`` as ``[B, S]``, without copying the input to append its ones."""
        if self.sharing == "reduce" or not (self.has_weight and self.has_bias):
            return super().input_norms(x)
        self.require_batch(x)
        x = require_float(x)
        return x.reshape(x.shape[0], -1, self._features).square().sum(-1).add_(1.0)


def _sizes(module: nn.Module) -> tuple[int, int]:
    """Features of the output and of the input."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    # Layers of the same kind that are none of torch's have other names. A weight that is computed is not asked for:
    # some change with each look.
    weight = module._parameters.get("weight")
    if weight is None or weight.ndim != 2:
        raise UnsupportedLayer("its weight is computed from other parameters (weight_norm, spectral_norm, prune)")
    return weight.shape[0], weight.shape[1]


@adapt.register
def _(module: nn.Linear, name: str, sharing: str = "expand") -> LayerAdapter:
    # nn.MultiheadAttention reads out_proj's weight without calling it, so that no hook ever fires.
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        raise UnsupportedLayer("nn.MultiheadAttention uses this projection without calling it")
    return LinearAdapter(module, name, sharing)
