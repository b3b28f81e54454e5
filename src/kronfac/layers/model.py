"""``adapt_model``: adapters for all layers of a model, and a reason for every parameter without one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import nn
from torch.nn.parameter import is_lazy

from kronfac.layers.base import LEFT_OUT, REPEATS, LayerAdapter, UnsupportedLayer
from kronfac.layers.norm import NormAdapter
from kronfac.layers.registry import adapt, require_known_forward

SHARING = ("expand", "reduce")
NORMS = ("unitwise", "full")


@dataclass
class Adaptation:
    """What curvature can see of a model.

    Attributes:
        adapters: Layer name to adapter, in the order of ``model.named_modules()``.
        uncovered: Trainable parameter name to the reason why it has no block.
        frozen: Names of parameters with ``requires_grad=False``.
        order: Names of all trainable parameters, in the order of ``model.named_parameters()``.
    """

    adapters: dict[str, LayerAdapter] = field(default_factory=dict)
    uncovered: dict[str, str] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()
    order: tuple[str, ...] = ()

    @property
    def covered(self) -> tuple[str, ...]:
        """Names of parameters with a block, in the model's order."""
        return tuple(name for name in self.order if name not in self.uncovered)


def adapt_model(model: nn.Module, *, sharing: str = "expand", norm: str = "unitwise") -> Adaptation:
    """Find an adapter for every layer that has trainable parameters.

    Args:
        model: The model.
        sharing: Weight sharing over positions, ``"expand"`` or ``"reduce"`` (Eschenhagen et al. 2023).
        norm: ``"unitwise"`` (a 2×2 block per unit) or ``"full"`` (one block) for normalisation layers.

    Returns:
        Adapters, and the reason for every trainable parameter that has none.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: Unknown ``sharing`` or ``norm``, no parameter is trainable, or some have no shape yet.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}.")
    if sharing not in SHARING:
        raise ValueError(f"sharing={sharing!r} is unknown; choose one of {SHARING}.")
    if norm not in NORMS:
        raise ValueError(f"norm={norm!r} is unknown; choose one of {NORMS}.")
    every = dict(model.named_parameters(remove_duplicate=False))
    shapeless = [name for name, p in every.items() if is_lazy(p)]
    if shapeless:
        raise ValueError(f"{', '.join(shapeless)} have no shape yet (lazy modules): call the model on a batch first.")
    order = tuple(name for name, p in model.named_parameters() if p.requires_grad)
    if not order:
        raise ValueError("The model has no trainable parameter (requires_grad=True).")
    uses = Counter(id(p) for p in every.values())
    holders = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    result = Adaptation(order=order, frozen=tuple(n for n, p in model.named_parameters() if not p.requires_grad))
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        own = {prefix + key: p for key, p in module.named_parameters(recurse=False) if p.requires_grad}
        if not own:
            continue
        if getattr(module, LEFT_OUT, False):
            reason = "it was left out, by kronfac.layers.without_curvature"
            result.uncovered |= {key: reason for key in own if key in order}
            continue
        # One that is declared to be called repeatedly may also have several names.
        count = holders if getattr(module, REPEATS, False) else uses
        tied = [key for key, p in own.items() if count[id(p)] > 1]
        if tied:
            others = [n for n, p in every.items() if p is own[tied[0]] and n != tied[0]]
            reason = f"its parameter is shared (tied) with {', '.join(others)}"
            result.uncovered |= {key: reason for key in own if key in order}
            continue
        try:
            _require_ordinary(own.values())
            adapter = adapt(module, name, sharing)
            require_known_forward(module)
            _require_joint_calls(adapter)
            if isinstance(adapter, NormAdapter) and norm == "full":
                adapter = adapter.full()
            if not adapter.parameters:
                result.uncovered |= {key: _strange(module) for key in own if key in order}
                continue
            extra = [key for key in own if key not in adapter.parameters]
            result.uncovered |= {key: f"{type(module).__name__} adapters know weight and bias only" for key in extra}
            result.adapters[name] = adapter
        except UnsupportedLayer as error:
            result.uncovered |= {key: str(error) for key in own if key in order}
    return result


@contextmanager
def trained_as(model: nn.Module, layers: Mapping[str, Collection[str]]) -> Iterator[None]:
    """Let other parameters of some layers need a gradient within the block, to adapt the model as it was once.

    Args:
        model: The model.
        layers: Names of the parameters that were trained, by layer; the others of these layers were not.

    Yields:
        Nothing.
    """
    live = dict(model.named_parameters())
    before: dict[nn.Parameter, bool] = {}
    try:
        for layer, trained in layers.items():
            prefix = f"{layer}." if layer else ""
            for name, parameter in live.items():
                own = name.startswith(prefix) and "." not in name[len(prefix) :]
                if own and (parameter.is_floating_point() or parameter.is_complex()):
                    before.setdefault(parameter, parameter.requires_grad)
                    parameter.requires_grad_(name in trained)
        yield
    finally:
        for parameter, needed in before.items():
            parameter.requires_grad_(needed)


def _require_ordinary(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        if parameter.is_complex():
            raise UnsupportedLayer("its parameters are complex numbers")
        if not parameter.numel():
            raise UnsupportedLayer("it has a parameter without entries (a layer of no features)")


def _require_joint_calls(adapter: LayerAdapter) -> None:
    if adapter.repeats and adapter.join is None:
        kind = type(adapter.module).__name__
        raise UnsupportedLayer(f"it is declared to be called repeatedly, and calls of a {kind} stay apart")


def _strange(module: nn.Module) -> str:
    """Why a layer has no block whose trained parameters are neither weight nor bias."""
    return (
        f"{type(module).__name__} adapters know weight and bias only; its weight is frozen, or computed from other "
        "parameters (weight_norm, spectral_norm, prune)"
    )
