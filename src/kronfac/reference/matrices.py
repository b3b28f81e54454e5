"""Dense Fisher, Gauss-Newton, empirical Fisher and Hessian, each by its definition.

All are those of the loss as the likelihood's reduction defines it: sums over terms divided by ``D``, the likelihood's
denominator. Rows and columns are in the order of `torch.nn.utils.parameters_to_vector` over the parameters that require
gradients, and in the model's dtype. Models whose examples interact (batch norm in train mode) are differentiated
through the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad

from kronfac.reference.function import ModelFunction, pullback, symmetrised
from kronfac.reference.protocol import OutputLoss

Pick = Callable[[Any], Tensor] | None


def fisher(model: nn.Module, likelihood: OutputLoss, x: Any, y: Any = None, *, outputs: Pick = None) -> Tensor:
    """Fisher information: the exact expectation, over labels from the model, of the scores' outer products.

    ``F = (1/D) sum_n sum_t c_nt sum_k p_k g_ntk g_ntk^T`` with ``g_ntk`` the gradient of ``-log p(k)`` of term ``t`` of
    example ``n`` and ``c`` the term weights. Labels of different terms are independent, so that cross terms vanish.

    Args:
        model: The model.
        likelihood: The likelihood; it must enumerate its labels (``label_atoms``).
        x: Inputs: a tensor, a tuple of positional or a mapping of keyword arguments.
        y: Targets, needed for their weights or masks only.
        outputs: Takes the tensor out of what the model returns.

    Returns:
        ``[P, P]``.
    """
    function = ModelFunction(model, x, outputs=outputs)
    function.check_dense()
    z, jacobian = function.jacobian()
    likelihood.validate(z, y)
    weights = likelihood.term_weights(z, y)
    matrix = jacobian.new_zeros(jacobian.shape[-1], jacobian.shape[-1])
    for probabilities, labels in likelihood.label_atoms(z):
        scale = probabilities if weights is None else probabilities * weights
        for term in range(probabilities[0].numel()):
            scores = grad(lambda out, k=labels, t=term: likelihood.nll(out, k).reshape(len(out), -1)[:, t].sum())(z)
            gradients = torch.einsum("bo,bop->bp", scores.reshape(len(z), -1), jacobian)
            matrix += gradients.T @ (gradients * scale.reshape(len(z), -1)[:, term, None])
    return symmetrised(matrix / likelihood.denominator(z, y))


def ggn(model: nn.Module, likelihood: OutputLoss, x: Any, y: Any = None, *, outputs: Pick = None) -> Tensor:
    """Generalised Gauss-Newton matrix ``(1/D) sum_n J_n^T H_n J_n`` (Schraudolph 2002).

    ``H_n`` is the automatic Hessian of the sum loss in example ``n``'s outputs.

    Args:
        model: The model.
        likelihood: The likelihood.
        x: Inputs: a tensor, a tuple of positional or a mapping of keyword arguments.
        y: Targets. Without them it is the expectation of the Hessian over the model's own labels: any label serves
            where the Hessian does not depend on it, as for exponential families in their natural parameters, and
            elsewhere the likelihood must enumerate its labels (``label_atoms``).
        outputs: Takes the tensor out of what the model returns.

    Returns:
        ``[P, P]``.
    """
    function = ModelFunction(model, x, outputs=outputs)
    function.check_dense()
    z, jacobian = function.jacobian()
    hessians = _output_hessians(likelihood, z, y)
    matrix = torch.einsum("bip,bij,bjq->pq", jacobian, hessians, jacobian)
    return symmetrised(matrix / likelihood.denominator(z, y))


def per_example_roots(
    model: nn.Module,
    likelihood: OutputLoss,
    x: Any,
    y: Any = None,
    names: Sequence[str] | None = None,
    *,
    outputs: Pick = None,
    expected: bool = False,
) -> Tensor:
    """Rows ``u`` with ``sum u u^T`` the exact `ggn`, for checks of layers too large for a dense matrix.

    Args:
        model: The model.
        likelihood: The likelihood.
        x: Inputs: a tensor, a tuple of positional or a mapping of keyword arguments.
        y: Targets, as for `ggn`.
        names: Parameters to restrict to; None for all.
        outputs: Takes the tensor out of what the model returns.
        expected: Whether the Hessian in the outputs is its expectation over the model's own labels, as the Fisher
            information has it, wherever it depends on the label; targets then give their weights and mask alone.

    Returns:
        ``[K, P]``, a row for each output of each example; columns in the order of ``model.parameters()``.
    """
    z, jacobian = ModelFunction(model, x, names, outputs).jacobian()
    values, vectors = torch.linalg.eigh(_output_hessians(likelihood, z, y, expected))
    roots = vectors * values.clamp(min=0).sqrt().unsqueeze(1)
    rows = torch.einsum("bok,bop->bkp", roots, jacobian).flatten(0, 1)
    return (rows / likelihood.denominator(z, y).sqrt()).detach()


def empirical_fisher(model: nn.Module, likelihood: OutputLoss, x: Any, y: Any, *, outputs: Pick = None) -> Tensor:
    """Second moment of the examples' gradients at the training targets, ``(1/D) sum_n g_n g_n^T``.

    It is not the Fisher information (Kunstner, Hennig & Balles 2019). ``g_n`` is the gradient of example ``n``'s summed
    terms, weights included.

    Args:
        model: The model.
        likelihood: The likelihood.
        x: Inputs: a tensor, a tuple of positional or a mapping of keyword arguments.
        y: Targets.
        outputs: Takes the tensor out of what the model returns.

    Returns:
        ``[P, P]``.
    """
    function = ModelFunction(model, x, outputs=outputs)
    function.check_dense()
    z = function(function.theta).detach()
    likelihood.validate(z, y)
    gradients = function.pull_examples(grad(likelihood.sum_loss)(z, y))
    return symmetrised(gradients.T @ gradients / likelihood.denominator(z, y))


def hessian(model: nn.Module, likelihood: OutputLoss, x: Any, y: Any, *, outputs: Pick = None) -> Tensor:
    """Hessian of the loss in the parameters.

    Args:
        model: The model.
        likelihood: The likelihood.
        x: Inputs: a tensor, a tuple of positional or a mapping of keyword arguments.
        y: Targets.
        outputs: Takes the tensor out of what the model returns.

    Returns:
        ``[P, P]``.
    """
    function = ModelFunction(model, x, outputs=outputs)
    function.check_dense()
    z = function(function.theta).detach()
    likelihood.validate(z, y)
    _, pull = pullback(grad(lambda theta: likelihood.sum_loss(function(theta), y)), function.theta)
    rows = []
    for index in range(len(function.theta)):
        unit = torch.zeros_like(function.theta)
        unit[index] = 1
        rows.append(pull(unit))
    return symmetrised(torch.stack(rows) / likelihood.denominator(z, y))


def _output_hessians(likelihood: OutputLoss, z: Tensor, y: Any, expected: bool = False) -> Tensor:
    """Hessian of the sum loss in each example's outputs, ``[B, O, O]``, at the targets, or expected over labels."""
    likelihood.validate(z, y)
    labels, mask = (y[0], y[1]) if isinstance(y, tuple | list) else (y, None)
    if labels is not None and (likelihood.needs_targets or not expected):
        return _hessians(lambda out: likelihood.sum_loss(out, y), z)

    def at(label: Tensor) -> Tensor:
        return _hessians(lambda out: likelihood.sum_loss(out, label if mask is None else (label, mask)), z)

    try:
        first, second = (at(likelihood.sample_labels(z, torch.Generator(z.device).manual_seed(n))) for n in (0, 1))
    except (NotImplementedError, ValueError):
        if labels is None:
            raise
        return at(labels)  # such as logits whose classes are found by the targets' shape
    if float((first - second).abs().max()) <= torch.finfo(z.dtype).eps ** 0.5 * float(first.abs().max()):
        return first if labels is None else at(labels)  # any label serves
    return _expected_hessians(likelihood, z, y)


def _expected_hessians(likelihood: OutputLoss, z: Tensor, y: Any) -> Tensor:
    """The same in expectation over the model's labels."""
    weights = likelihood.term_weights(z, y)
    total = z.new_zeros(len(z), z[0].numel(), z[0].numel())
    try:
        for probabilities, label in likelihood.label_atoms(z):
            scale = probabilities if weights is None else probabilities * weights
            total += _hessians(partial(_weighted, likelihood, label, scale), z)
    except NotImplementedError as error:
        name = type(likelihood).__name__
        raise ValueError(
            f"the Hessian of {name} in the outputs depends on the label, so that the exact matrix is its expectation, "
            f"which needs the labels with their probabilities: implement {name}.label_atoms (for a Gaussian of mean m "
            "and deviation s: m with 2/3, m - √3 s and m + √3 s with 1/6 each)"
        ) from error
    return total


def _weighted(likelihood: OutputLoss, label: Tensor, scale: Tensor, z: Tensor) -> Tensor:
    return (scale * likelihood.nll(z, label)).sum()


def _hessians(loss: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """Hessian of a loss that never mixes examples, ``[B, O, O]``."""
    _, pull = pullback(grad(loss), z)
    columns = []
    for index in range(z[0].numel()):
        unit = torch.zeros_like(z).reshape(len(z), -1)
        unit[:, index] = 1
        columns.append(pull(unit.reshape(z.shape)).reshape(len(z), -1))
    return torch.stack(columns, -1)
