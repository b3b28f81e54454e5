"""The affine part of BatchNorm, LayerNorm, GroupNorm, InstanceNorm and RMSNorm.

``y_c = γ_c x̂_c + β_c``: each unit has two parameters, and the exact 2×2 block of every unit is kept (the *unit-wise*
block of Osawa et al. 2019).  ``norm="full"`` keeps the exact block of all of them together.

In train mode batch norm couples the examples of a batch; like KFAC itself these blocks then treat the examples as
independent given the normalised activations.  In eval mode, and for all other norms, they are exact.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from kronfac.layers.base import LayerAdapter, UnsupportedLayer, require_float
from kronfac.layers.registry import adapt
from kronfac.linalg.symmetric import summed_in_float32
from kronfac.measuring import couples_examples

#: Entries of an input that are centred at once: they stay in the cache.
CENTRED = 1 << 19
#: The same for an accelerator: 512 MB.
CENTRED_ACCELERATOR = 1 << 27


class NormAdapter(LayerAdapter):
    """Units of any normalisation layer; a subclass gives ``normalise`` and ``_units_last``."""

    unit_wise = True

    def __init__(self, module: nn.Module, name: str, sharing: str = "expand") -> None:
        super().__init__(module, name, "expand")
        units = module.weight if self.has_weight else getattr(module, "bias", None)
        self._units = units.numel() if isinstance(units, Tensor) else 0  # without either, adapt_model leaves it out
        self.stack = (self._units,)
        self.d_out, self.d_in = 1, int(self.has_weight) + int(self.has_bias)

    def full(self) -> LayerAdapter:
        """Return the adapter whose single block couples all units."""
        return FullNormAdapter(self)

    def normalise(self, x: Tensor) -> Tensor:
        """Return the input normalised, without affine part, in float32 at least."""
        raise NotImplementedError

    def _units_last(self, tensor: Tensor) -> Tensor:
        """Return ``[B, S, units]``."""
        return tensor.reshape(tensor.shape[0], -1, self._units)

    def _weight_to_matrix(self, weight: Tensor) -> Tensor:
        return weight.reshape(self._units, 1, 1)

    def expand(self, x: Tensor) -> Tensor:
        """Return ``[B, S, units, d_in]`` with rows ``(x̂, 1)``."""
        parts = []
        if self.has_weight:
            parts.append(self._units_last(self.normalise(require_float(x))))
        if self.has_bias:
            parts.append(torch.ones_like(parts[0] if parts else self._units_last(require_float(x))))
        return torch.stack(parts, dim=-1)

    def expand_cotangents(self, g: Tensor) -> Tensor:
        """Return ``[B, S, units, 1]``."""
        return self._units_last(require_float(g)).unsqueeze(-1)

    def per_example_gradients(self, x: Tensor, g: Tensor) -> Tensor:
        """Gradient of each example's loss, shape ``[B, units, 1, d_in]``, by sums over the positions."""
        cotangents = self._units_last(require_float(g))
        parts = []
        if self.has_weight:
            parts.append((self._units_last(self.normalise(require_float(x))) * cotangents).sum(1))
        if self.has_bias:
            parts.append(cotangents.sum(1))
        return torch.stack(parts, dim=-1).unsqueeze(-2)


class LastDimNorm(NormAdapter):
    """LayerNorm and RMSNorm: units are the trailing dimensions."""

    join = "positions"

    def __init__(self, module: nn.Module, name: str, sharing: str = "expand") -> None:
        super().__init__(module, name, sharing)
        normalised = len(module.normalized_shape)  # type: ignore[arg-type]
        self.features = (normalised, normalised)

    def lacks_batch(self, x: Tensor) -> bool:
        """True of what is normalised as a whole."""
        return x.ndim <= len(self.module.normalized_shape)  # type: ignore[arg-type]

    def positions(self, x: Tensor) -> tuple[int, ...]:
        """All dimensions but the normalised ones."""
        self.require_batch(x)
        return tuple(x.shape[: x.ndim - len(self.module.normalized_shape)])  # type: ignore[arg-type]

    def normalise(self, x: Tensor) -> Tensor:
        """Normalise over the trailing dimensions."""
        module = self.module
        if isinstance(module, nn.LayerNorm):
            return F.layer_norm(x, module.normalized_shape, eps=module.eps)
        assert isinstance(module, nn.RMSNorm)
        return F.rms_norm(x, list(module.normalized_shape), eps=module.eps)


class ChannelNorm(NormAdapter):
    """BatchNorm, GroupNorm and InstanceNorm: units are dimension 1."""

    channel_dim = 1

    @property
    def spreads(self) -> bool:
        """True of batch norm over the batch."""
        return couples_examples(self.module)

    def lacks_batch(self, x: Tensor) -> bool:
        """True of a single map, which instance norm takes too."""
        return isinstance(self.module, _InstanceNorm) and x.ndim == self.module._get_no_batch_dim()

    def positions(self, x: Tensor) -> tuple[int, ...]:
        """Batch and spatial dimensions."""
        self.require_batch(x)
        return (x.shape[0], *x.shape[2:])

    def _units_last(self, tensor: Tensor) -> Tensor:
        return tensor.movedim(1, -1).reshape(tensor.shape[0], -1, self._units)

    def per_example_gradients(self, x: Tensor, g: Tensor) -> Tensor:
        """As for all norms; for batch norm over the batch by sums of products, without the normalised input."""
        if not self.spreads:
            return super().per_example_gradients(x, g)
        x, g = (each.reshape(*each.shape[:2], -1) for each in (x, g))
        if x.dtype == g.dtype == torch.bfloat16 and summed_in_float32(x):
            return self._gradients_by_sums(x, g)
        x, g = require_float(x), require_float(g)
        parts = []
        if self.has_weight:
            count = x.shape[0] * x.shape[2]
            mean = (x.sum(2).sum(0) / count).unsqueeze(1)
            entries = CENTRED if x.device.type == "cpu" else CENTRED_ACCELERATOR
            at_once = max(1, entries // x[0].numel())
            products, variance = [], torch.zeros_like(mean[:, 0])
            room = x.new_empty(min(at_once, len(x)), *x.shape[1:])  # fresh pages cost as much as the arithmetic
            for part, cotangents in zip(x.split(at_once), g.split(at_once), strict=True):
                centred = torch.sub(part, mean, out=room[: len(part)])
                variance += torch.linalg.vector_norm(centred, dim=2).square_().sum(0)
                products.append(centred.mul_(cotangents).sum(2))
            variance /= count
            parts.append(torch.cat(products) * (variance + self.module.eps).rsqrt())  # type: ignore[operator]
        if self.has_bias:
            parts.append(g.sum(2))
        return torch.stack(parts, dim=-1).unsqueeze(-2)

    def _gradients_by_sums(self, x: Tensor, g: Tensor) -> Tensor:
        """The same of bfloat16, read where it lies: ``Σ g x̂ = (Σ g x - μ Σ g) / σ``."""
        # Of an input whose mean is so large that these differences lose much in float32, eight bits have kept less.
        parts, sums = [], g.sum(2, dtype=torch.float32)
        if self.has_weight:
            count = x.shape[0] * x.shape[2]
            mean = x.sum(2, dtype=torch.float32).sum(0) / count
            variance = _dots(x, x).sum(0) / count - mean.square()
            scale = (variance.clamp_min(0) + self.module.eps).rsqrt()  # type: ignore[operator]
            parts.append((_dots(x, g) - mean * sums) * scale)
        if self.has_bias:
            parts.append(sums)
        return torch.stack(parts, dim=-1).unsqueeze(-2)

    def normalise(self, x: Tensor) -> Tensor:
        """Normalise as the forward did, without touching running statistics."""
        module = self.module
        if isinstance(module, nn.GroupNorm):
            return F.group_norm(x, module.num_groups, eps=module.eps)
        if isinstance(module, _InstanceNorm):
            if module.track_running_stats and not module.training:
                mean, variance = _running(module, x)
                return F.instance_norm(x, mean, variance, use_input_stats=False, eps=module.eps)
            return F.instance_norm(x, eps=module.eps)
        assert isinstance(module, _BatchNorm)
        if self.spreads:
            return F.batch_norm(x, None, None, training=True, eps=module.eps)
        mean, variance = _running(module, x)
        return F.batch_norm(x, mean, variance, training=False, eps=module.eps)


def _running(module: _BatchNorm | _InstanceNorm, x: Tensor) -> tuple[Tensor, Tensor]:
    """Running statistics in the dtype of an input that may have been raised."""
    assert module.running_mean is not None
    assert module.running_var is not None
    return module.running_mean.to(x.dtype), module.running_var.to(x.dtype)


def _dots(a: Tensor, b: Tensor) -> Tensor:
    """Dot products over the last of three dimensions, in float32 at least; 16 bits without copies on a GPU."""
    if not summed_in_float32(a):
        return torch.linalg.vecdot(require_float(a), require_float(b))
    left, right = a.flatten(0, 1).unsqueeze(1), b.flatten(0, 1).unsqueeze(2)
    return torch.bmm(left, right, out_dtype=torch.float32).view(a.shape[:2])


class FullNormAdapter(NormAdapter):
    """One exact block over all units of a norm layer: ``stack`` empty, ``d_out = units``, kept densely.

    The parameter matrix is ``[units, d_in]``; positions and cotangents are those of the unit-wise adapter.
    """

    def __init__(self, inner: NormAdapter) -> None:
        super().__init__(inner.module, inner.name)
        self._inner = inner
        self.stack, self.d_out, self.channel_dim = (), self._units, inner.channel_dim
        self.join, self.features = inner.join, inner.features

    def _weight_to_matrix(self, weight: Tensor) -> Tensor:
        return weight.reshape(self._units, 1)

    def lacks_batch(self, x: Tensor) -> bool:
        """As the unit-wise adapter."""
        return self._inner.lacks_batch(x)

    def positions(self, x: Tensor) -> tuple[int, ...]:
        """As the unit-wise adapter."""
        return self._inner.positions(x)

    def per_example_gradients(self, x: Tensor, g: Tensor) -> Tensor:
        """Gradient of each example's loss, shape ``[B, units, d_in]``."""
        return self._inner.per_example_gradients(x, g).squeeze(-2)


def _adapt_channel(module: nn.Module, name: str, sharing: str = "expand") -> LayerAdapter:
    if not getattr(module, "affine", True):
        raise UnsupportedLayer("affine=False: it has no parameters")
    if isinstance(module, nn.SyncBatchNorm):
        raise UnsupportedLayer("nn.SyncBatchNorm normalises over processes; its local statistics are not the layer's")
    return ChannelNorm(module, name, sharing)


def _adapt_last(module: nn.Module, name: str, sharing: str = "expand") -> LayerAdapter:
    return LastDimNorm(module, name, sharing)


_CHANNEL: tuple[type[nn.Module], ...] = (_BatchNorm, _InstanceNorm, nn.GroupNorm)
_LAST: tuple[type[nn.Module], ...] = (nn.LayerNorm, nn.RMSNorm)
for _kind in _CHANNEL:
    adapt.register(_kind)(_adapt_channel)
for _kind in _LAST:
    adapt.register(_kind)(_adapt_last)
