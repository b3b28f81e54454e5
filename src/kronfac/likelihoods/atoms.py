"""Roots of and products with the Fisher information in the outputs, from few labels with their probabilities."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kronfac.likelihoods.checks import Targets, check_terms, check_vector, multiply

if TYPE_CHECKING:
    from kronfac.likelihoods.base import Likelihood


def enumerates(likelihood: Likelihood, outputs: Tensor) -> bool:
    """Tell whether a likelihood gives labels with their probabilities.

    Args:
        likelihood: The likelihood.
        outputs: ``[B, ...]``.

    Returns:
        Whether ``label_atoms`` is implemented.
    """
    try:
        few = outputs.detach()[:1]
        next(iter(likelihood.label_atoms(few.to(torch.promote_types(few.dtype, torch.float32)))), None)
    except NotImplementedError:
        return False
    return True


def root_columns(likelihood: Likelihood, outputs: Tensor, targets: Targets) -> Iterator[Tensor]:
    """Columns ``√(c p_k) ∇nll(k)``, one for each term of an example and each label ``k``.

    Args:
        likelihood: The likelihood.
        outputs: ``[B, ...]``.
        targets: Targets, needed for their weights only.

    Yields:
        Columns of the outputs' shape.
    """
    for value, label, scale in _atoms(likelihood, outputs, targets):
        roots = scale.sqrt().reshape(len(value), -1)
        nll = _terms(likelihood, label)
        for index in range(roots.shape[1]):
            with torch.inference_mode(False), torch.enable_grad():
                z = value.clone().requires_grad_()
                terms = nll(z).reshape(len(z), -1)
                (column,) = torch.autograd.grad(terms[:, index], z, roots[:, index].clone())
            yield column


def hessian_product(likelihood: Likelihood, outputs: Tensor, vector: Tensor, targets: Targets) -> Tensor:
    """Product with the Fisher information, ``Σ_k c p_k ∇nll(k) ⟨∇nll(k), u⟩`` for each term.

    Args:
        likelihood: The likelihood.
        outputs: ``[B, ...]``.
        vector: ``u``, of the outputs' shape.
        targets: Targets, needed for their weights only.

    Returns:
        Of the outputs' shape.
    """
    check_vector(outputs, vector)
    total = torch.zeros_like(outputs, dtype=torch.promote_types(outputs.dtype, torch.float32))
    vector = vector.detach().to(total)
    for value, label, scale in _atoms(likelihood, outputs, targets):
        with torch.inference_mode(False), torch.enable_grad():
            z, direction = value.clone().requires_grad_(), vector.clone()
            terms = _terms(likelihood, label)(z)
            # The terms' slopes along u, by the derivative of a gradient in what it is weighted by.
            ones = torch.ones_like(terms, requires_grad=True)
            (gradient,) = torch.autograd.grad(terms, z, ones, create_graph=True)
            (slopes,) = torch.autograd.grad((gradient * direction).sum(), ones, retain_graph=True)
            (product,) = torch.autograd.grad(terms, z, slopes * scale.clone())
        total = total + product
    return total


def _atoms(likelihood: Likelihood, outputs: Tensor, targets: Targets) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Outputs, a label and its probabilities, weights and mask included."""
    value, labels, mask = likelihood.prepare(outputs.detach(), targets)
    weights = multiply(likelihood.label_weights(value, labels), mask)
    for probabilities, label in likelihood.label_atoms(value):
        yield value, label, probabilities if weights is None else probabilities * weights


def _terms(likelihood: Likelihood, label: Tensor) -> Callable[[Tensor], Tensor]:
    def nll(outputs: Tensor) -> Tensor:
        known = label.clone() if label.is_inference() else label
        return check_terms(likelihood, likelihood.nll(outputs, known), likelihood.term_shape(outputs, known))

    return nll
