"""Products with the Hessian of the loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kronfac._typing import NamedTensors
from kronfac.operators.operator import ParameterOperator
from kronfac.operators.passes import leaves, plain_kernels, run, same_random_state


class HessianOperator(ParameterOperator):
    """Hessian of the loss in the parameters; symmetric, but indefinite in general.

    A product differentiates the gradient's inner product with the vector (Pearlmutter 1994).
    """

    def _product(self, inputs: Any, targets: Any, vector: NamedTensors) -> tuple[list[Tensor], Tensor]:
        with same_random_state(self.model, self._random_state), torch.enable_grad(), plain_kernels(self.model):
            parameters = leaves(self.model, self.parameter_names)
            tensors = list(parameters.values())
            outputs = run(self.model, parameters, inputs, self._pick)
            self.likelihood.validate(outputs.detach(), targets)
            loss = self.likelihood.sum_loss(outputs, targets)
            gradient = torch.autograd.grad(loss, tensors, create_graph=True, materialize_grads=True)
            slope = torch.stack([(g * v.to(g)).sum() for g, v in zip(gradient, vector.values(), strict=True)]).sum()
            product = torch.autograd.grad(slope, tensors, materialize_grads=True)
        return list(product), self.likelihood.denominator(outputs.detach(), targets)

    def _form(self, inputs: Any, targets: Any, vector: NamedTensors) -> tuple[Tensor, Tensor]:
        product, denominator = self._product(inputs, targets, vector)
        terms = [(g * v.to(g)).sum() for g, v in zip(product, vector.values(), strict=True)]
        return torch.stack(terms).sum(), denominator
