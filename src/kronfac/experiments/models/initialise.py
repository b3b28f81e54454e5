"""One initialisation for every network, so that no optimiser is compared from a start that hampers it."""

from __future__ import annotations

from torch import nn


def initialise(model: nn.Module) -> nn.Module:
    """Draw weights from He's normal distribution where a ReLU follows, LeCun's where none does, and zero the biases.

    A layer is linear (LeCun: variance 1 / fan-in) if its attribute ``linear_output`` is set, see `mark_linear`;
    otherwise it gets variance 2 / fan-in (He et al. 2015, eq. 10).

    Args:
        model: The network, changed in place.

    Returns:
        The same network.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            linear = getattr(module, "linear_output", False)
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear" if linear else "relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


def initialise_sparsely(model: nn.Module, connections: int = 15) -> nn.Module:
    """Give each unit a few incoming weights from the standard normal distribution, and zero the rest (Martens 2010).

    Args:
        model: The network, changed in place.
        connections: Incoming weights of a unit.

    Returns:
        The same network.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            fan_in = module.in_features
            nn.init.sparse_(module.weight.T, sparsity=max(0.0, 1 - connections / fan_in), std=1.0)
            nn.init.zeros_(module.bias)
    return model


def mark_linear(layer: nn.Linear) -> nn.Linear:
    """Say that no ReLU follows a layer.

    Args:
        layer: The layer, changed in place.

    Returns:
        The same layer.
    """
    layer.linear_output = True  # type: ignore[assignment]
    return layer
