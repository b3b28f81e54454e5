"""Quadratic penalties: a curvature around an anchor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor

from kronfac.continual.base import Parameters, Penalty, check_live, check_strength, live_parameters
from kronfac.continual.combine import Curvature, Part, combined
from kronfac.continual.decay import RecentredDecay, snapshot
from kronfac.curvature import BlockDiagonal
from kronfac.curvature_coupled import CoupledCurvature
from kronfac.measuring import is_transformed
from kronfac.vectors import listed


class QuadraticPenalty(Penalty):
    """``½ strength (θ - θ*)ᵀ C (θ - θ*)``: what a task's loss rises by around its optimum, to second order.

    With diagonal curvature this is elastic weight consolidation (Kirkpatrick et al. 2017), with Kronecker-factored
    curvature the penalty of Ritter et al. (2018). ``C`` is the curvature of the task's loss as its likelihood's
    ``reduction`` defines it: for a mean loss, ``strength`` is the number of examples in the Bayesian reading.

    An evaluation costs one product with the curvature, whatever the amount of data, and its gradient reuses it.
    Parameters without curvature are free, unless ``rest`` holds them.

    Args:
        curvature: The curvature, of any approximation.
        model: Where the anchor is taken from: a model, or parameters by name. By default the model that the curvature
            was estimated on. In either case it is a copy of the parameters at this moment.
        strength: The factor, not negative.
        rest: Strength of ``½ rest |θ - θ*|²`` on the trainable parameters without curvature, multiplied by ``strength``
            too; needs ``model``.

    Attributes:
        parts: The curvature as weighted curvatures to be added; one, unless `update` kept several.
        strength: The factor.
        tasks: How many tasks were taken in.
        rest: The penalty on parameters without curvature, or None.

    Raises:
        TypeError: If the curvature is none.
        ValueError: If model and curvature do not fit, or a factor is out of range.
    """

    def __init__(
        self, curvature: Curvature, model: Parameters | None = None, *, strength: float = 1.0, rest: float = 0.0
    ) -> None:
        _check_curvature(curvature)
        self.parts: tuple[Part, ...] = ((1.0, curvature),)
        self.strength = check_strength("strength", strength)
        self.tasks = 1
        self._anchor = _anchored(curvature, model)
        self.rest = _rest(curvature, model, check_strength("rest", rest))

    @classmethod
    def from_parts(
        cls,
        parts: tuple[Part, ...],
        anchor: Mapping[str, Tensor],
        *,
        strength: float = 1.0,
        tasks: int = 1,
        rest: RecentredDecay | None = None,
    ) -> Self:
        """Put a penalty together, as loading does.

        Args:
            parts: Weighted curvatures over the same parameters.
            anchor: The anchor as the matrix ``V`` of each layer.
            strength: The factor.
            tasks: How many tasks were taken in.
            rest: The penalty on parameters without curvature.

        Returns:
            The penalty; nothing is copied.
        """
        penalty = cls.__new__(cls)
        penalty.parts, penalty._anchor = parts, dict(anchor)
        penalty.strength, penalty.tasks, penalty.rest = check_strength("strength", strength), tasks, rest
        return penalty

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """The parameters that have curvature."""
        return self.parts[0][1].parameter_names

    @property
    def anchor(self) -> dict[str, Tensor]:
        """``θ*`` by parameter name, of the parameters that have curvature: copies."""
        curvature = self.parts[0][1]
        found: dict[str, Tensor] = {}
        for layer, matrix in self._anchor.items():
            found |= curvature.layouts[layer].unpack(matrix)
        return {name: found[name].clone() for name in curvature.parameter_names}

    @property
    def anchor_matrices(self) -> dict[str, Tensor]:
        """``θ*`` as the matrix ``V`` of each layer."""
        return dict(self._anchor)

    def __call__(self, model: Parameters) -> Tensor:
        """Evaluate, differentiably in the live parameters.

        Args:
            model: A model with parameters of the anchor's names and shapes, or ``{parameter name: tensor}``. Further
                parameters are left free.

        Returns:
            A 0-dim tensor in the curvature's dtype.
        """
        live = live_parameters(model)
        curvature = self.parts[0][1]
        first = next(iter(self._anchor.values()))
        check_live(live, curvature.parameter_shapes, first.device)
        # Autocast would compute the products in half precision, where small differences vanish.
        with torch.autocast(first.device.type, enabled=False):
            deltas = {}
            for layer, start in self._anchor.items():
                layout = curvature.layouts[layer]
                packed = layout.pack({name: live[name].to(start.dtype) for name in layout.parameter_names})
                deltas[layer] = packed - start
            value = _half_forms(self.parts, deltas) * self.strength
        if self.rest is not None:
            value = value + self.rest(live).to(value.dtype) * self.strength
        return value

    def update(
        self,
        curvature: Curvature,
        model: Parameters | None = None,
        *,
        decay: float | None = None,
        combine: str = "exact",
    ) -> QuadraticPenalty:
        """Take a further task in: one anchor, the newest optimum, and a mean or sum of all curvatures.

        Args:
            curvature: Curvature of the new task's loss, at its optimum.
            model: Where the new anchor is taken from; as in the constructor.
            decay: None for the running mean ``(T C_old + C_new) / (T + 1)`` over T tasks so far; a number γ in [0, 1]
                for ``γ C_old + C_new``, online elastic weight consolidation (Schwarz et al. 2018, equation 9).
            combine: ``"exact"`` adds diagonal and dense blocks and keeps others side by side, so that every further
                task costs one more product. ``"factors"`` averages input factors and adds output factors (what is
                usually done; exact only where one of the two is the same), and ``"nearest"`` is the Kronecker product
                nearest to the sum in the Frobenius norm: both stay at one product.

        Returns:
            A new penalty; this one is left as it is.

        Raises:
            ValueError: If the curvatures do not fit, or ``decay`` or ``combine`` is out of range.
        """
        _check_curvature(curvature)
        if decay is not None and check_strength("decay", decay) > 1:
            raise ValueError(f"decay must be in [0, 1] or None, got {decay!r}")
        if self.rest is not None and model is None:
            raise ValueError("a penalty with rest= needs model= for its new anchor")
        old, new = (self.tasks / (self.tasks + 1), 1 / (self.tasks + 1)) if decay is None else (float(decay), 1.0)
        parts = combined(tuple((weight * old, part) for weight, part in self.parts), (new, curvature), combine)
        rest = None if self.rest is None else _rest(curvature, model, self.rest.strength)
        anchor = _anchored(curvature, model)
        return type(self).from_parts(parts, anchor, strength=self.strength, tasks=self.tasks + 1, rest=rest)

    def scaled(self, factor: float) -> QuadraticPenalty:
        """Multiply by a number.

        Args:
            factor: Finite, not negative.

        Returns:
            A new penalty; tensors are shared.
        """
        strength = self.strength * check_strength("factor", factor)
        return type(self).from_parts(self.parts, self._anchor, strength=strength, tasks=self.tasks, rest=self.rest)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Copy to another device or dtype.

        Args:
            device: The device; the present one by default.
            dtype: float32 or float64; the present one by default.

        Returns:
            A new penalty, sharing the tensors that need no conversion.

        Raises:
            NotImplementedError: If the curvature couples layers.
        """
        parts: list[Part] = []
        for weight, curvature in self.parts:
            if not isinstance(curvature, BlockDiagonal):
                raise NotImplementedError(f"a penalty with a {type(curvature).__name__} cannot be moved or converted")
            blocks = {layer: block.to(device, dtype) for layer, block in curvature.blocks.items()}
            parts.append(
                (weight, BlockDiagonal(blocks, curvature.layouts, curvature.parameter_names, curvature.options))
            )
        return self.from_parts(
            tuple(parts),
            {layer: matrix.to(device=device, dtype=dtype) for layer, matrix in self._anchor.items()},
            strength=self.strength,
            tasks=self.tasks,
            rest=None if self.rest is None else self.rest.to(device, dtype),
        )

    def __repr__(self) -> str:
        return (
            f"QuadraticPenalty({len(self._anchor)} layers, {len(self.parameter_names)} parameters, "
            f"strength={self.strength:g}, tasks={self.tasks})"
        )


class _HalfForm(torch.autograd.Function):
    """``½ vec(V)ᵀ C vec(V)`` for a symmetric ``C``: the product of the value is kept, since it is the gradient."""

    @staticmethod
    def forward(delta: Tensor, matmul: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        product = matmul(delta)
        return 0.5 * (product * delta).sum(), product

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        delta, ctx.matmul = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(delta, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None]:
        delta, product = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: the gradient is to be differentiated in its turn
            product = ctx.matmul(delta)
        return grad * product, None


def _half_forms(parts: tuple[Part, ...], deltas: Mapping[str, Tensor]) -> Tensor:
    """``½ Σ w ΔᵀCΔ`` of all parts."""
    values = []
    plain = [(weight, curvature) for weight, curvature in parts if isinstance(curvature, BlockDiagonal)]
    for layer, delta in deltas.items() if plain else ():
        blocks = [(weight, curvature.blocks[layer]) for weight, curvature in plain]

        def matmul(vector: Tensor, blocks: Any = blocks) -> Tensor:
            weight, block = blocks[0]
            product = block.matmul(vector) * weight
            for weight, block in blocks[1:]:
                product = torch.add(product, block.matmul(vector), alpha=weight)
            return product

        # Transforms of torch.func, and dual numbers, go through plain operations alone.
        values.append(0.5 * (matmul(delta) * delta).sum() if is_transformed() else _HalfForm.apply(delta, matmul)[0])
    for weight, curvature in parts:
        if isinstance(curvature, CoupledCurvature):
            products = curvature.coupled.matmul(deltas)
            values += [(products[layer] * delta).sum() * (0.5 * weight) for layer, delta in deltas.items()]
    return torch.stack(values).sum()


def _check_curvature(curvature: object) -> None:
    if not isinstance(curvature, BlockDiagonal | CoupledCurvature):
        kinds = "what kronfac.estimate or kronfac.load gives, a BlockDiagonal or a CoupledCurvature"
        raise TypeError(f"curvature must be {kinds}, not {type(curvature).__name__}")


def _anchored(curvature: Curvature, model: Parameters | None) -> dict[str, Tensor]:
    """Copy the parameters of this moment, as the matrix of each layer."""
    if model is None:
        live: dict[str, Tensor] = {}
        for layer, layout in curvature.layouts.items():
            own = getattr(layout, "parameters", None)
            if not isinstance(own, Mapping):
                raise ValueError(f"the curvature does not know its model (layer {layer!r}): pass model=")
            live |= own
    else:
        live = live_parameters(model)
    first = next(iter(curvature.blocks.values()))
    check_live(live, curvature.parameter_shapes, first.device)
    with torch.no_grad():
        return {
            # Cloned: packing gives a view of the weights where it can.
            layer: layout.pack(
                {n: live[n].detach().to(curvature.blocks[layer].dtype) for n in layout.parameter_names}
            ).clone(memory_format=torch.contiguous_format)
            for layer, layout in curvature.layouts.items()
        }


def _rest(curvature: Curvature, model: Parameters | None, strength: float) -> RecentredDecay | None:
    if strength == 0:
        return None
    if model is None:
        raise ValueError("rest= is about parameters without curvature: pass model=, since the curvature knows none")
    live = live_parameters(model)
    names = [name for name, p in live.items() if p.requires_grad and name not in curvature.parameter_shapes]
    if not names:
        raise ValueError(f"rest={strength!r}: every trainable parameter has curvature ({listed(list(live))})")
    return RecentredDecay(snapshot({name: live[name] for name in names}), strength)
