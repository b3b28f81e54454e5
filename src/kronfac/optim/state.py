"""Saving and loading an optimiser's curvature; kept out of ``state[param]``, whose tensors PyTorch casts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from kronfac import processes
from kronfac.approximations import Mean, Statistic
from kronfac.approximations.base import is_blank
from kronfac.optim.health import Record
from kronfac.optim.inverse_state import load_inverses, load_pending, number, save_inverses, save_pending
from kronfac.optim.options import check_group

if TYPE_CHECKING:
    from kronfac.estimator import Estimator
    from kronfac.optim.kfac import KFAC

VERSION = 1


def copied(state: Any) -> Any:
    """Copy what PyTorch hands out and takes in by reference: buffers that steps change in place.

    Args:
        state: Of an optimiser, or a part of it.

    Returns:
        The same of other tensors.
    """
    if isinstance(state, Tensor):
        return state.clone(memory_format=torch.preserve_format)
    if isinstance(state, dict):
        return {key: copied(value) for key, value in state.items()}
    return type(state)(map(copied, state)) if type(state) in (list, tuple) else state


def save_curvature_state(optimizer: KFAC) -> dict[str, Any]:
    """Describe factors, inverses, counters and the generator by plain values.

    Args:
        optimizer: The optimiser.

    Returns:
        What :func:`load_curvature_state` takes.
    """
    generator, fallback = optimizer._estimator.generator, optimizer._fallback
    assert generator is not None
    return {
        "version": VERSION,
        "steps": optimizer._steps,
        "warmed": optimizer._warmed,
        "statistics": {
            layer: {
                key: {"total": _kept(mean.total), "weight": mean.weight, "scale": mean.scale}
                for key, mean in statistic.means().items()
            }
            for layer, statistic in optimizer._estimator.statistics.items()
        },
        "constants": {
            layer: statistic.constants()
            for layer, statistic in optimizer._estimator.statistics.items()
            if statistic.constant_shapes()
        },
        "inverses": save_inverses(optimizer._inverses),
        "pending": save_pending(optimizer._pending),
        "record": optimizer._record.describe(),
        "cosines": {} if optimizer._rounded is None else dict(optimizer._rounded.cosines),
        "generator": generator.get_state(),
        "generators": optimizer._generators,
        "clip_ratio": optimizer._clip.ratio,
        "terms": optimizer._estimator.terms,
        "unreached": sorted(optimizer._gatherer.unreached),
        "fallback": None if fallback is None else copied(fallback.state_dict()),
    }


def _kept(total: Tensor) -> Tensor:
    # Later steps change it in place, but not the numbers that are saved beside it.
    return total if is_blank(total) else total.clone()


def load_curvature_state(optimizer: KFAC, state_dict: dict[str, Any]) -> Callable[[], None]:
    """Check a saved state against an optimiser.

    Args:
        optimizer: The optimiser.
        state_dict: Its ``state_dict()``.

    Returns:
        A function that puts the state in; nothing is changed before it is called, and it cannot fail.

    Raises:
        ValueError: The state does not fit.
    """
    saved = state_dict.get("kronfac") if isinstance(state_dict, dict) else None
    if not isinstance(saved, dict):
        raise ValueError("This is no state of a kronfac optimiser: it has no entry 'kronfac'.")
    if saved.get("version") != VERSION:
        raise ValueError(f"The state has version {saved.get('version')!r}; this kronfac reads version {VERSION}.")
    try:
        return _checked(optimizer, state_dict, saved)
    except (KeyError, TypeError, AttributeError, AssertionError, IndexError, RuntimeError) as error:
        raise ValueError(f"The state is damaged: {type(error).__name__}: {error}") from error


def _checked(optimizer: KFAC, state_dict: dict[str, Any], saved: dict[str, Any]) -> Callable[[], None]:
    _check_parameters(optimizer, state_dict)
    mine, theirs = optimizer._estimator.statistics, saved["statistics"]
    if list(mine) != list(theirs):
        raise ValueError(f"The state is of layers {list(theirs)}, the model has {list(mine)}.")
    means: list[tuple[Mean, Tensor, float, float]] = []
    for layer, statistic in mine.items():
        own = statistic.means()
        if set(own) != set(theirs[layer]):
            raise ValueError(f"Layer {layer!r}: the state holds {sorted(theirs[layer])}, needed are {sorted(own)}.")
        for key, mean in own.items():
            entry = theirs[layer][key]
            shape = tuple(entry["total"].shape)
            if shape != tuple(mean.total.shape):
                raise ValueError(
                    f"Layer {layer!r}: the state's {key} has shape {shape}, not {tuple(mean.total.shape)}."
                )
            weight, scale = (number(f"{what} of {layer}.{key}", entry[what]) for what in ("weight", "scale"))
            means.append((mean, _total(mean.total, entry["total"], weight), weight, scale))
    fixed = {layer: statistic for layer, statistic in mine.items() if statistic.constant_shapes()}
    constants = {layer: _constants(layer, statistic, saved["constants"][layer]) for layer, statistic in fixed.items()}
    inverses = load_inverses(optimizer, saved["inverses"])
    pending = load_pending(optimizer, saved.get("pending"))  # states of before lack it, record and cosines
    record = Record.of(saved["record"]) if "record" in saved else Record()
    cosines = {str(k): number(f"cosine of {k}", v) for k, v in saved.get("cosines", {}).items()}
    steps, warmed = int(number("steps", saved["steps"])), int(number("warmed", saved.get("warmed", 0)))
    ratio = None if saved["clip_ratio"] is None else number("clip_ratio", saved["clip_ratio"])
    terms = number("terms", saved["terms"])
    unreached = {str(layer) for layer in saved.get("unreached", ())}
    generator, fallback = optimizer._estimator.generator, optimizer._fallback
    assert generator is not None
    random_state = _own_generator(saved).to(device="cpu", dtype=torch.uint8)
    torch.Generator(generator.device).set_state(random_state)  # refuses what is no state
    if (saved["fallback"] is None) != (fallback is None):
        raise ValueError("Only one of the saved and the present optimiser has a fallback.")
    if fallback is not None:
        _check_parameters(fallback, saved["fallback"])

    def apply() -> None:
        for mean, total, weight, scale in means:
            mean.total, mean.weight, mean.scale = total, weight, scale
        for layer, statistic in fixed.items():
            statistic.restore(constants[layer])
        optimizer._inverses, optimizer._pending, optimizer._record = inverses, pending, record
        if optimizer._rounded is not None:
            optimizer._rounded.restore(inverses, cosines)
        optimizer._steps, optimizer._clip.ratio, optimizer._estimator.terms = steps, ratio, terms
        optimizer._warmed = warmed
        generator.set_state(random_state)
        if fallback is not None:
            fallback.load_state_dict(copied(saved["fallback"]))
        optimizer._gatherer.reset()
        optimizer._gatherer.unreached = unreached

    return apply


def gather_generators(estimator: Estimator) -> list[Tensor] | None:
    """Collect the states of all processes' generators.

    Args:
        estimator: Holds this process's.

    Returns:
        The states by rank, or None outside of distributed runs.
    """
    if not processes.together():
        return None
    assert estimator.generator is not None
    own = estimator.generator.get_state().to(next(estimator.model.parameters()).device)
    return [state.cpu() for state in processes.collect(own)]


def _total(like: Tensor, saved: Tensor, weight: float) -> Tensor:
    """Copy of a saved sum that lies as the present one does; of what was never needed there is still none."""
    if is_blank(like):
        return saved.to(like, copy=True) if weight > 0.0 else like
    total = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)
    return total.copy_(saved)


def _own_generator(saved: dict[str, Any]) -> Tensor:
    """State of this process's generator, where the states of as many processes were saved."""
    states = saved.get("generators")
    if states is not None and processes.together() and len(states) == processes.count():
        return states[processes.rank()]
    return saved["generator"]


def _constants(layer: str, statistic: Statistic, saved: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of a layer's constants, all or none."""
    shapes = statistic.constant_shapes()
    if saved and set(saved) != set(shapes):
        raise ValueError(f"Layer {layer!r}: the state holds {sorted(saved)}, needed are {sorted(shapes)}.")
    like = next(iter(statistic.means().values())).total
    for key, tensor in saved.items():
        if tensor.shape != shapes[key]:
            raise ValueError(
                f"Layer {layer!r}: the state's {key} has shape {tuple(tensor.shape)}, not {tuple(shapes[key])}."
            )
    return {key: tensor.to(like.device, like.dtype, copy=True) for key, tensor in saved.items()}


def _check_parameters(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Refuse groups of other parameters and buffers of other shapes, which PyTorch would take."""
    groups, present = state_dict["param_groups"], optimizer.param_groups
    if [len(group["params"]) for group in groups] != [len(group["params"]) for group in present]:
        raise ValueError("The state's param_groups hold other numbers of parameters than the optimiser's.")
    for theirs, mine in zip(groups, present, strict=True):
        if "kl_clip" in mine:  # one of ours, not of the fallback's
            # PyTorch adds a default of its own whenever a state is loaded.
            if missing := sorted(optimizer.defaults.keys() - theirs.keys() - {"differentiable"}):
                raise ValueError(f"The state's param_groups lack {missing}.")
            check_group(theirs)
        for index, parameter in zip(theirs["params"], mine["params"], strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor) and value.ndim and value.shape != parameter.shape:
                    shapes = f"{tuple(value.shape)}, not {tuple(parameter.shape)}"
                    raise ValueError(f"The state's {key} of parameter {index} has shape {shapes}.")
