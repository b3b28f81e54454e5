"""Exact pre-activation Hessians of a fully-connected network, by the recursion of Botev et al. (2017), equation 29.

    ``H_λ = B_λ W_{λ+1}ᵀ H_{λ+1} W_{λ+1} B_λ + D_λ``,  ``B = diag f′(h)``,  ``D = diag(f″(h) ∂E/∂a)``

for each example by itself. Without ``D`` it is the recursion of the pre-activation Gauss-Newton matrices, which KFRA
averages over the batch at every layer. Nothing is averaged here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad

from kronfac.reference.function import pullback, refuse_random
from kronfac.reference.matrices import _output_hessians
from kronfac.reference.protocol import OutputLoss


def preactivation_hessians(
    model: nn.Sequential, likelihood: OutputLoss, x: Tensor, y: Any = None, *, gauss_newton: bool = False
) -> dict[str, Tensor]:
    """Hessian of each example's summed loss in the outputs of every linear layer.

    Raises `TypeError` for a module of another kind, and `ValueError` for a layer that is used twice or a module that
    draws random numbers, by name.

    Args:
        model: An ``nn.Sequential`` of ``nn.Linear`` and of activations: modules that act on each number by itself.
        likelihood: The likelihood; ``H_L`` is the automatic Hessian of its sum loss, not divided by the denominator.
        x: Inputs ``[B, d]``.
        y: Targets; None is enough for the Gauss-Newton matrices of losses whose Hessian does not depend on them.
        gauss_newton: Leave out ``D_λ``.

    Returns:
        ``[B, d_out, d_out]`` by the layer's name, from the first layer to the last.

    Raises:
        ValueError: Targets are missing, without which ``D`` is not known, or the inputs are of another shape.
    """
    if y is None and not gauss_newton:
        raise ValueError("The Hessian depends on the targets: pass y, or gauss_newton=True for the part that does not.")
    if x.ndim != 2:
        raise ValueError(f"The recursion takes inputs [B, d], not {tuple(x.shape)}.")
    modules = _modules(model)
    inputs, values = [], x
    for name, module in modules:
        inputs.append(values)
        values = module(values.clone()).detach()
        if not isinstance(module, nn.Linear):
            _require_activation(name, module, inputs[-1])
    hessian = _output_hessians(likelihood, values, y)
    slope = torch.zeros_like(values) if y is None else grad(likelihood.sum_loss)(values, y)
    found: dict[str, Tensor] = {}
    for (name, module), h in reversed(list(zip(modules, inputs, strict=True))):
        if isinstance(module, nn.Linear):
            found[name] = hessian
            weight = module.weight.detach()
            hessian, slope = weight.T @ hessian @ weight, slope @ weight
            continue
        first = _derivative(module, h)
        hessian = first.unsqueeze(2) * hessian * first.unsqueeze(1)
        if not gauss_newton:
            second = grad(lambda z, activation=module: _derivative(activation, z).sum())(h)
            hessian = hessian + torch.diag_embed(second * slope)
        slope = first * slope
    return dict(reversed(found.items()))


def _modules(model: nn.Sequential) -> list[tuple[str, nn.Module]]:
    """What the model calls one after the other; an activation may come twice."""
    if not _runs_as(model, nn.Sequential):
        raise TypeError(f"{type(model).__name__} is no nn.Sequential, or has a forward of its own.")
    refuse_random(model)
    found: list[tuple[str, nn.Module]] = []
    for name, module in model._modules.items():  # named_children leaves out what occurs a second time
        assert module is not None
        linear = _runs_as(module, nn.Linear)
        if not linear and (isinstance(module, nn.Linear) or list(module.parameters())):
            raise TypeError(f"{type(module).__name__} {name!r} is neither nn.Linear nor an activation.")
        first = next((known for known, other in found if other is module), name)
        if linear and first != name:
            raise ValueError(f"Linear {first!r} is used again as {name!r}: its block of the Hessian is no product.")
        found.append((name, module))
    return found


def _runs_as(module: nn.Module, kind: type[nn.Module]) -> bool:
    return isinstance(module, kind) and type(module).forward is kind.forward


def _require_activation(name: str, module: nn.Module, h: Tensor) -> None:
    """Refuse a module whose Jacobian is not diagonal: numbers must not depend on their neighbours in the batch."""
    values, pull = pullback(lambda u: module(u.clone()), h)
    if values.shape != h.shape:
        raise TypeError(f"{type(module).__name__} {name!r} takes {tuple(h.shape)} to {tuple(values.shape)}.")
    for colour in (0, 1):
        # A chequered cotangent: the derivative of each number in its neighbours is on the fields of the other colour.
        here = torch.arange(len(h)).unsqueeze(1).add(torch.arange(h.shape[1])).remainder(2).to(h.device) == colour
        if pull(here.to(h))[~here].any():
            raise TypeError(f"{type(module).__name__} {name!r} mixes numbers; an activation acts on each by itself.")


def _derivative(activation: nn.Module, h: Tensor) -> Tensor:
    """``f′(h)``."""
    return grad(lambda u: activation(u.clone()).sum())(h)
