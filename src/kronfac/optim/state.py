"""Saving and loading an optimiser's curvature; kept out of ``state[param]``, whose tensors PyTorch casts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kronfac.optim.preconditioning import load_inverses, save_inverses

if TYPE_CHECKING:
    from kronfac.optim.kfac import KFAC

VERSION = 1


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
        "statistics": {
            layer: {
                key: {"total": mean.total, "weight": mean.weight, "scale": mean.scale}
                for key, mean in statistic.means().items()
            }
            for layer, statistic in optimizer._estimator.statistics.items()
        },
        "inverses": save_inverses(optimizer._inverses),
        "generator": generator.get_state(),
        "clip_ratio": optimizer._clip.ratio,
        "fallback": None if fallback is None else fallback.state_dict(),
    }


def load_curvature_state(optimizer: KFAC, state_dict: dict[str, Any]) -> Callable[[], None]:
    """Check a saved state against an optimiser.

    Args:
        optimizer: The optimiser.
        state_dict: Its ``state_dict()``.

    Returns:
        A function that puts the state in; nothing is changed before it is called.

    Raises:
        ValueError: The state does not fit.
    """
    saved = state_dict.get("kronfac") if isinstance(state_dict, dict) else None
    if not isinstance(saved, dict):
        raise ValueError("This is no state of a kronfac optimiser: it has no entry 'kronfac'.")
    if saved.get("version") != VERSION:
        raise ValueError(f"The state has version {saved.get('version')!r}; this kronfac reads version {VERSION}.")
    mine = optimizer._estimator.statistics
    theirs = saved["statistics"]
    if list(mine) != list(theirs):
        raise ValueError(f"The state is of layers {list(theirs)}, the model has {list(mine)}.")
    for layer, statistic in mine.items():
        means = statistic.means()
        if set(means) != set(theirs[layer]):
            raise ValueError(f"Layer {layer!r}: the state holds {sorted(theirs[layer])}, needed are {sorted(means)}.")
        for key, mean in means.items():
            shape = tuple(theirs[layer][key]["total"].shape)
            if shape != tuple(mean.total.shape):
                raise ValueError(
                    f"Layer {layer!r}: the state's {key} has shape {shape}, not {tuple(mean.total.shape)}."
                )
    if (saved["fallback"] is None) != (optimizer._fallback is None):
        raise ValueError("Only one of the saved and the present optimiser has a fallback.")

    def move_like(reference: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda tensor: tensor.to(reference.device).clone()

    anchor = next(iter(next(iter(mine.values())).means().values())).total
    inverses = load_inverses(saved["inverses"], move_like(anchor))

    def apply() -> None:
        for layer, statistic in mine.items():
            for key, mean in statistic.means().items():
                mean.total.copy_(theirs[layer][key]["total"])
                mean.weight = float(theirs[layer][key]["weight"])
                mean.scale = float(theirs[layer][key]["scale"])
        optimizer._inverses = inverses
        optimizer._steps = int(saved["steps"])
        optimizer._clip.ratio = saved["clip_ratio"]
        generator = optimizer._estimator.generator
        assert generator is not None
        generator.set_state(saved["generator"].to(device="cpu", dtype=torch.uint8))
        if optimizer._fallback is not None:
            optimizer._fallback.load_state_dict(saved["fallback"])
        optimizer._gatherer.reset()

    return apply
