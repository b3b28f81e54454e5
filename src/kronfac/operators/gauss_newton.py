"""Products with the generalised Gauss-Newton matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kronfac._typing import NamedTensors
from kronfac.likelihoods import Likelihood
from kronfac.operators.operator import ParameterOperator, check_vector
from kronfac.operators.passes import Pick, leaves, push_forward, push_forward_each, run, same_random_state


class GaussNewtonOperator(ParameterOperator):
    """Generalised Gauss-Newton matrix ``C = (1/D) sum_n J_n^T H_n J_n`` (Schraudolph 2002).

    For the likelihoods of this package it is the Fisher information (Martens 2014). A product pushes the vector
    forward, multiplies by the Hessian of the loss in the outputs and pulls back; a quadratic form needs no pull.
    Targets are looked at only where the likelihood needs them.

    Parts of a model that run under their own ``no_grad`` are differentiated by the forward pass nevertheless.
    """

    def _product(self, inputs: Any, targets: Any, vector: NamedTensors) -> tuple[list[Tensor], Tensor]:
        with same_random_state(self.model, self._random_state):
            _, tangent = push_forward(self.model, inputs, vector, self._pick)
        with same_random_state(self.model, self._random_state), torch.enable_grad():
            parameters = leaves(self.model, self.parameter_names)
            outputs = run(self.model, parameters, inputs, self._pick)
            value = outputs.detach()
            self.likelihood.validate(value, targets)
            cotangent = self.likelihood.hessian_product(value, tangent, targets).to(outputs.dtype)
            pulled = torch.autograd.grad(outputs, list(parameters.values()), cotangent, materialize_grads=True)
        return list(pulled), self.likelihood.denominator(value, targets)

    def _form(self, inputs: Any, targets: Any, vector: NamedTensors) -> tuple[Tensor, Tensor]:
        with same_random_state(self.model, self._random_state):
            value, tangent = push_forward(self.model, inputs, vector, self._pick)
        self.likelihood.validate(value, targets)
        return _form(self.likelihood, value, tangent, targets), self.likelihood.denominator(value, targets)


def ggn_quadratic_form(
    model: nn.Module,
    likelihood: Likelihood,
    inputs: Any,
    vector: NamedTensors,
    targets: Any = None,
    *,
    outputs: Pick = None,
) -> Tensor:
    """``v^T C v`` with the exact Gauss-Newton matrix of a batch, by one forward pass (for KL clips and line searches).

    Cheap enough for every step: no backward pass, no copy of a weight, no wait for the device. The model's mode counts:
    batch norm in train mode normalises with the batch and is differentiated through it, its running statistics stay as
    they are. Dropout in train mode draws the masks that the next forward will draw too: the random state is put back.
    Values are not validated; NaN in the outputs gives NaN.

    Args:
        model: The model.
        likelihood: The loss.
        inputs: A tensor, a tuple or list of positional arguments, a mapping of keyword arguments, or a pair
            ``(tuple, dict)`` of both.
        vector: ``v`` by parameter name; parameters that are left out count as zero.
        targets: Targets, where the likelihood needs them.
        outputs: Takes the output tensor out of what the model returns.

    Returns:
        0-dimensional, in the outputs' dtype but float32 at least.
    """
    check_vector({name: p.shape for name, p in model.named_parameters()}, vector, complete=False)
    value, tangent = push_forward(model, inputs, vector, outputs)
    return _form(likelihood, value, tangent, targets) / likelihood.denominator(value, targets)


def ggn_gram(
    model: nn.Module,
    likelihood: Likelihood,
    inputs: Any,
    vectors: Sequence[NamedTensors],
    targets: Any = None,
    *,
    outputs: Pick = None,
) -> Tensor:
    """``vᵢ^T C vⱼ`` for several vectors with the exact Gauss-Newton matrix of a batch, by one forward pass.

    As :func:`ggn_quadratic_form`, of which it is the case of many vectors.

    Args:
        model: The model.
        likelihood: The loss.
        inputs: As for :func:`ggn_quadratic_form`.
        vectors: ``v₁ … v_R`` by parameter name, all over the same parameters; those left out count as zero.
        targets: Targets, where the likelihood needs them.
        outputs: Takes the output tensor out of what the model returns.

    Returns:
        Shape ``[R, R]``, symmetric, in the outputs' dtype but float32 at least.
    """
    shapes = {name: p.shape for name, p in model.named_parameters()}
    for vector in vectors:
        check_vector(shapes, vector, complete=False)
    value, tangents = push_forward_each(model, inputs, vectors, outputs)
    products = [likelihood.hessian_product(value, tangent, targets) for tangent in tangents]
    rows = [torch.stack([(p * t.to(p)).sum() for t in tangents]) for p in products]
    gram = torch.stack(rows) / likelihood.denominator(value, targets)
    return (gram + gram.mT) / 2


def _form(likelihood: Likelihood, value: Tensor, tangent: Tensor, targets: Any) -> Tensor:
    """``t^T H t`` over a batch."""
    product = likelihood.hessian_product(value, tangent, targets)
    return (product * tangent.to(product)).sum()
