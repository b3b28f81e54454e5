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

from kronfac.reference.matrices import _output_hessians
from kronfac.reference.protocol import OutputLoss


def preactivation_hessians(
    model: nn.Sequential, likelihood: OutputLoss, x: Tensor, y: Any = None, *, gauss_newton: bool = False
) -> dict[str, Tensor]:
    """Hessian of each example's summed loss in the outputs of every linear layer.

    Args:
        model: An ``nn.Sequential`` of ``nn.Linear`` and of activations: modules that act on each number by itself.
        likelihood: The likelihood; ``H_L`` is the automatic Hessian of its sum loss, not divided by the denominator.
        x: Inputs ``[B, d]``.
        y: Targets; None is enough for the Gauss-Newton matrices of losses whose Hessian does not depend on them.
        gauss_newton: Leave out ``D_λ``.

    Returns:
        ``[B, d_out, d_out]`` by the layer's name, from the first layer to the last.

    Raises:
        TypeError: A module is of another kind.
        ValueError: Targets are missing, without which ``D`` is not known.
    """
    if y is None and not gauss_newton:
        raise ValueError("The Hessian depends on the targets: pass y, or gauss_newton=True for the part that does not.")
    inputs, values = [], x
    for name, module in model.named_children():
        if not isinstance(module, nn.Linear) and list(module.parameters()):
            raise TypeError(f"{type(module).__name__} {name!r} is neither nn.Linear nor an activation.")
        inputs.append(values)
        values = module(values.clone()).detach()
        if not isinstance(module, nn.Linear) and not torch.equal(module(inputs[-1][:, :1].clone()), values[:, :1]):
            raise TypeError(f"{type(module).__name__} {name!r} mixes numbers; an activation acts on each by itself.")
    hessian = _output_hessians(likelihood, values, y)
    slope = torch.zeros_like(values) if y is None else grad(likelihood.sum_loss)(values, y)
    found: dict[str, Tensor] = {}
    for (name, module), h in reversed(list(zip(model.named_children(), inputs, strict=True))):
        if isinstance(module, nn.Linear):
            found[name] = hessian
            weight = module.weight.detach()
            hessian, slope = weight.T @ hessian @ weight, slope @ weight
            continue
        first, second = _derivatives(module, h)
        hessian = first.unsqueeze(2) * hessian * first.unsqueeze(1)
        if not gauss_newton:
            hessian = hessian + torch.diag_embed(second * slope)
        slope = first * slope
    return dict(reversed(found.items()))


def _derivatives(activation: nn.Module, h: Tensor) -> tuple[Tensor, Tensor]:
    """``f′(h)`` and ``f″(h)``."""

    def first(z: Tensor) -> Tensor:
        return grad(lambda u: activation(u.clone()).sum())(z)

    return first(h), grad(lambda z: first(z).sum())(h)
