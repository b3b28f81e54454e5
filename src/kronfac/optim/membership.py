"""Which parameters take an optimiser's step, in which groups, and which are left to another optimiser."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kronfac.estimator import CoverageWarning, Estimator
from kronfac.layers import LayerAdapter
from kronfac.optim.closure import is_left_out
from kronfac.optim.gathering import Gatherer
from kronfac.optim.options import KFACOptions, check_group
from kronfac.optim.rows import RowGradients


class Membership(Optimizer):
    """Parameter groups, and the optimiser of parameters without curvature; the part of KFAC that has no curvature.

    Its attributes are set by the class that takes steps.
    """

    _options: KFACOptions
    _estimator: Estimator
    _names: dict[int, str]
    _fallback: Optimizer | None
    _rows: RowGradients | None
    _gatherer: Gatherer
    _itself: Callable[[], Any]  # the optimiser, also through what wraps it
    _frozen: dict[str, nn.Parameter]  # those that no group was made for
    _warned: bool = False  # of layers that the likelihood's outputs do not depend on

    def _make_fallback(
        self, root: nn.Module, fallback: Callable[[list[nn.Parameter]], Optimizer] | None
    ) -> Optimizer | None:
        plain = self._estimator.adaptation.uncovered
        if not plain:
            return None
        self._estimator.warn_uncovered("Trained without curvature" if fallback is None else "Trained by fallback")
        if fallback is None:
            return None
        optimizer = fallback([root.get_parameter(name) for name in plain])
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"fallback must return a torch.optim.Optimizer, not {type(optimizer).__name__}.")
        closure = inspect.signature(optimizer.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise TypeError(f"fallback must step without a closure, which {type(optimizer).__name__} needs.")
        return optimizer

    def _groups(self, root: nn.Module) -> Iterable[dict[str, Any]]:
        elsewhere = set(self._estimator.adaptation.uncovered) if self._fallback is not None else set()
        given = self._options["param_groups"]
        self._frozen = {}
        if given is None:
            self._frozen = {name: p for name, p in root.named_parameters() if not p.requires_grad}
            kept = [p for name, p in root.named_parameters() if p.requires_grad and name not in elsewhere]
            return [{"params": kept}]
        groups = [dict(group) for group in given]
        for group in groups:
            params = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
            group["params"] = [p for p in params if self._names.get(id(_unnamed(p))) not in elsewhere]
        return groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of the model's parameters, as PyTorch's optimisers do; called at construction too.

        Args:
            param_group: ``params`` and hyper-parameters of its own.

        Raises:
            ValueError: A hyper-parameter is out of range, or a tensor is no parameter of the model.
        """
        super().add_param_group(param_group)
        try:
            check_group(self.param_groups[-1], self._names)
        except ValueError:
            self.param_groups.pop()
            raise
        known = {name for adapter in self._estimator.adaptation.adapters.values() for name in adapter.parameter_names}
        known |= set(self._estimator.adaptation.uncovered)
        added = [self._names[id(p)] for p in self.param_groups[-1]["params"] if p.requires_grad]
        if late := [name for name in added if name not in known]:
            warnings.warn(
                f"Trained without curvature: {', '.join(late)} (frozen when the optimiser was constructed). Construct "
                "a new one after unfreezing parameters.",
                CoverageWarning,
                stacklevel=2,
            )

    @property
    def _own_groups(self) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if "kl_clip" in group]

    @property
    def _clips(self) -> bool:
        return any(group["kl_clip"] is not None for group in self._own_groups)

    def _members(self) -> Iterator[tuple[nn.Parameter, dict[str, Any]]]:
        for group in self._own_groups:
            for parameter in group["params"]:
                yield parameter, group

    def _free(self) -> list[Tensor]:
        """The parameters that are not frozen now, of which there must be some."""
        params: list[Tensor] = [p for p, _ in self._members() if p.requires_grad]
        if not params:
            raise RuntimeError("All parameters are frozen (requires_grad=False): there is nothing to step in.")
        return params

    def _check_members(self) -> None:
        """Refuse a model that is no longer what was taken into the groups."""
        self._gatherer.check_layers()
        held = {id(p) for group in self.param_groups for p in group["params"]}
        late = [name for name, p in self._frozen.items() if p.requires_grad and id(p) not in held]
        if late:
            raise RuntimeError(
                f"{', '.join(late)} were frozen when the optimiser was constructed, and are not now: no group holds "
                "them, so that they would never move. Construct a new optimiser, or add them without curvature by "
                "add_param_group."
            )

    def _evaluate(self, closure: Callable[[], Any]) -> Any:
        with torch.enable_grad():
            loss = closure()
        if not self._any_gradient and not is_left_out(loss):
            raise RuntimeError(
                "The closure left no gradients: it must call zero_grad(), evaluate the loss, call backward() and "
                "return the loss."
            )
        return loss

    def _leave_out(self) -> None:
        """Take no step, and let the next one count what it gathers for itself."""
        warnings.warn(
            "The closure left no gradients and returned no loss that has any: the step was left out.",
            RuntimeWarning,
            stacklevel=4,
        )
        self._gatherer.reset()

    def _with_curvature(self) -> dict[str, LayerAdapter]:
        """The layers but for those that the likelihood's outputs do not depend on; one warning names these."""
        adapters, missed = self._estimator.adaptation.adapters, self._gatherer.unreached
        if not missed:
            return adapters
        names = [name for layer in adapters if layer in missed for name in adapters[layer].parameter_names]
        if self._rows is not None and any(map(self._rows.hold, names)):
            raise RuntimeError(
                f"The outputs that the likelihood is of do not depend on {', '.join(names)}, whose curvature is zero: "
                "they take the plain gradient, which gradients='rows' does not keep. Use gradients='dense'."
            )
        if not self._warned:
            warnings.warn(
                f"Trained without curvature: {', '.join(names)} (the outputs that the likelihood is of do not depend "
                "on them). They take the plain gradient.",
                CoverageWarning,
                stacklevel=4,
            )
            self._warned = True
        return {name: adapter for name, adapter in adapters.items() if name not in missed}

    def _damping(self, layer: str) -> float:
        """That of the group of the layer's first parameter, which is its weight if it has one: a block has but one."""
        for parameter in self._estimator.adaptation.adapters[layer].parameters.values():
            if (group := next((group for member, group in self._members() if member is parameter), None)) is not None:
                return float(group["damping"]) + (0.0 if group["decoupled_weight_decay"] else group["weight_decay"])
        return float(self.defaults["damping"])

    def _has_gradient(self, parameter: Tensor) -> bool:
        return parameter.grad is not None or (self._rows is not None and self._rows.hold(self._names[id(parameter)]))

    @property
    def _any_gradient(self) -> bool:
        return any(self._has_gradient(p) for group in self.param_groups for p in group["params"])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients, those kept as rows too.

        Args:
            set_to_none: As for PyTorch's optimisers.
        """
        super().zero_grad(set_to_none)
        if self._rows is not None:
            self._rows.clear()

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            f"A {type(self).__name__} watches its model and can be neither copied nor pickled. Construct one on the "
            "copied model and give it this one's state: other.load_state_dict(optimizer.state_dict())."
        )

    def _buffer(self, parameter: Tensor, key: str) -> Tensor:
        state = self.state[parameter]
        if key not in state:
            state[key] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        found = state[key]
        assert isinstance(found, Tensor)
        return found


def _unnamed(parameter: Tensor | tuple[str, Tensor]) -> Tensor:
    return parameter[1] if isinstance(parameter, tuple) else parameter
