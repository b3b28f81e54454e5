"""What ``gradients="rows"`` does not go with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from kronfac.eager import has_compiled_parts
from kronfac.layers import LayerAdapter
from kronfac.optim.options import several_processes
from kronfac.optim.rows import LEAST, fits


def check_rows(model: nn.Module, layers: Mapping[str, LayerAdapter]) -> None:
    """Refuse what does not go with rows at all.

    Args:
        model: The module that the training loop calls.
        layers: Adapters by layer.

    Raises:
        ValueError: No layer fits, the model was compiled, or there are several processes.
    """
    if not any(map(fits, layers.values())):
        raise ValueError(
            f"gradients='rows' is for linear layers with a bias and at least {LEAST} inputs and outputs, and the "
            "model has none: leave gradients out."
        )
    _refuse({"a model that was compiled": has_compiled_parts(model), "several processes": several_processes()})


def check_groups(groups: Iterable[Mapping[str, Any]]) -> None:
    """Refuse settings that need the gradients themselves.

    Args:
        groups: The optimiser's parameter groups; a ``ValueError`` says which setting does.
    """
    for group in groups:
        coupled = bool(group["weight_decay"]) and not group["decoupled_weight_decay"]
        _refuse(
            {
                "kl_clip, which multiplies directions by gradients: set kl_clip=None": group["kl_clip"] is not None,
                "weight decay in the gradient: set decoupled_weight_decay=True": coupled,
            }
        )


def _refuse(reasons: Mapping[str, bool]) -> None:
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f"gradients='rows' does not go with {reason}.")
