"""The protocol of a likelihood: a loss of terms with samples, roots and products of its output Hessian.

The curvature in the outputs is that of the *sum* loss, ``H = sum over terms of c * H_term`` with the term weights
``c``; the curvature in the parameters is ``C = (1/D) sum_n J_n^T H_n J_n``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kronfac.likelihoods import atoms
from kronfac.likelihoods.checks import (
    Targets,
    check_generator,
    check_terms,
    check_vector,
    multiply,
    split_targets,
)
from kronfac.likelihoods.randomness import rademacher
from kronfac.likelihoods.terms import TermLoss


class Likelihood(TermLoss):
    """A negative log-likelihood of targets given a model's outputs, as a loss with curvature.

    To write your own, implement `nll` and `sample_labels`; every other method then has a default, by automatic
    differentiation where need be. If the terms are single outputs, subclass `ElementwiseLikelihood` instead, where one
    more line (the curvature of a term) gives exact roots. Override what you know in closed form.

    ``targets`` may be a pair ``(targets, mask)`` everywhere, with a boolean mask, or non-negative weights, whose
    dimensions are the leading ones of the terms'. A term whose mask is 0 counts in no sum and in no denominator that
    counts terms, and its target may hold anything. ``(None, mask)`` masks where targets are not needed.

    Outputs below float32 are raised to float32, and cotangents are returned so.
    """

    @abstractmethod
    def sample_labels(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw a label for each term from the model's own prediction.

        Args:
            outputs: ``[B, ...]``, at least float32.
            generator: Source of randomness, on the outputs' device.

        Returns:
            Labels, independent between terms.
        """

    def score(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Gradient of the sum of `nll` in the outputs.

        Args:
            outputs: ``[B, ...]``, prepared.
            labels: Labels as `sample_labels` returns them.

        Returns:
            Of the outputs' shape.
        """
        return differentiate(
            lambda z, y: check_terms(self, self.nll(z, y), self.term_shape(z, y)).sum(), outputs, labels
        )

    def sample_cotangents(
        self, outputs: Tensor, targets: Targets = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Gradient of the sum loss at labels drawn from the model's prediction: ``E[v v^T] = H`` (the true Fisher).

        Args:
            outputs: ``[B, ...]``.
            targets: Targets, needed for their weights only.
            generator: Source of randomness, on the outputs' device.

        Returns:
            ``v`` of the outputs' shape.
        """
        check_generator(generator, outputs)
        outputs, labels, mask = self.prepare(outputs.detach(), targets)
        scores = self.score(outputs, self.sample_labels(outputs, generator))
        weights = multiply(self.label_weights(outputs, labels), mask)
        return scores if weights is None else scores * self.over_outputs(weights.sqrt(), outputs)

    def probe_cotangents(
        self, outputs: Tensor, targets: Targets = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Random signs through a root of ``H``: the expectation of `sample_cotangents` at lower variance.

        Args:
            outputs: ``[B, ...]``.
            targets: Targets, needed for their weights only.
            generator: Source of randomness, on the outputs' device.

        Returns:
            ``S xi`` of the outputs' shape, with ``S S^T = H`` and independent signs ``xi``.
        """
        check_generator(generator, outputs)
        outputs = outputs.detach()
        probe = torch.zeros_like(outputs, dtype=torch.promote_types(outputs.dtype, torch.float32))
        for column in self.root_columns(outputs, targets):
            signs = rademacher(outputs.shape[:1], column, generator)
            probe = probe + column * signs.reshape(-1, *(1,) * (column.ndim - 1))
        return probe

    def root_columns(self, outputs: Tensor, targets: Targets = None) -> Iterator[Tensor]:
        """Exact root of ``H``: per example, ``sum_k v_k v_k^T = H_n``. Each column touches one term of every example.

        Args:
            outputs: ``[B, ...]``.
            targets: Targets, needed for their weights only.

        Returns:
            Columns of the outputs' shape, made one at a time; by default from `label_atoms`.

        Raises:
            NotImplementedError: If the subclass knows neither a root nor its labels.
        """
        if atoms.enumerates(self, outputs):
            return atoms.root_columns(self, outputs, targets)
        raise NotImplementedError(
            f"{type(self).__name__} gives no root of its Hessian: implement root_columns or label_atoms, subclass "
            'ElementwiseLikelihood, or use source="sampled"'
        )

    def hessian_product(self, outputs: Tensor, vector: Tensor, targets: Targets = None) -> Tensor:
        """Product ``H u`` with the Hessian of the sum loss in the outputs.

        By default it is the Fisher information of the labels in `label_atoms`; where there are none, the loss is
        differentiated twice at the targets.

        Args:
            outputs: ``[B, ...]``.
            vector: ``u``, of the outputs' shape.
            targets: Targets, of which the first needs the weights only.

        Returns:
            Of the outputs' shape.

        Raises:
            ValueError: If there are no targets to differentiate at.
        """
        if atoms.enumerates(self, outputs):
            return atoms.hessian_product(self, outputs, vector, targets)
        if split_targets(targets)[0] is None:
            name = type(self).__name__
            raise ValueError(
                f"{name} gives no product with its Hessian, and differentiates its loss twice at the targets, which "
                f"are not there. Implement {name}.hessian_product or {name}.label_atoms, or subclass "
                "ElementwiseLikelihood; or give the targets (an optimiser, whose KL clip needs the product, by "
                "optimizer.capture()), or set kl_clip=None"
            )
        check_vector(outputs, vector)
        outputs, labels, mask = self._labelled(outputs.detach(), targets)
        vector = vector.detach().to(outputs)

        def slope(z: Tensor, y: Tensor, m: Tensor | None, direction: Tensor) -> Tensor:
            (gradient,) = torch.autograd.grad(self.weighted_terms(z, y, m).sum(), z, create_graph=True)
            return (gradient * direction).sum()

        return differentiate(slope, outputs, labels, mask, vector)

    def target_cotangents(self, outputs: Tensor, targets: Targets) -> Tensor:
        """Gradient of the sum loss at the given targets (the *empirical* Fisher's cotangents).

        Args:
            outputs: ``[B, ...]``.
            targets: Targets, or a pair with a mask.

        Returns:
            Of the outputs' shape.
        """
        outputs, labels, mask = self._labelled(outputs.detach(), targets)
        return differentiate(lambda z, y, m: self.weighted_terms(z, y, m).sum(), outputs, labels, mask)

    def symmetric_kl(self, outputs: Tensor, other: Tensor, targets: Targets = None) -> Tensor:
        """Mean of the two Kullback-Leibler divergences between predictions, summed and divided as the loss is.

        Args:
            outputs: ``[B, ...]``.
            other: Outputs to compare with, of the same shape.
            targets: Targets, needed for their weights only.

        Returns:
            0-dimensional, differentiable in both; ``1/2 d^T H d / D`` to second order in the difference ``d``.

        Raises:
            NotImplementedError: If the subclass does not know it.
        """
        raise NotImplementedError(f"{type(self).__name__} gives no symmetric KL divergence: implement symmetric_kl")

    def kl(self, outputs: Tensor, other: Tensor, targets: Targets = None) -> Tensor:
        """Kullback-Leibler divergence ``D(p(outputs) || p(other))``, summed and divided as the loss is.

        Args:
            outputs: ``[B, ...]``.
            other: Outputs to compare with, of the same shape.
            targets: Targets, needed for their weights only.

        Returns:
            0-dimensional, differentiable in both.

        Raises:
            NotImplementedError: If the subclass does not know it.
        """
        raise NotImplementedError(f"{type(self).__name__} gives no KL divergence: implement kl")

    def label_atoms(self, outputs: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Few labels with probabilities that have the score's exact second moment: exact roots and products follow.

        The oracle needs them, too: `kronfac.verify`, where the Hessian in the outputs depends on the label.

        Args:
            outputs: ``[B, ...]``, at least float32.

        Returns:
            Pairs of probabilities ``[B, *T]`` and labels as `nll` takes them.

        Raises:
            NotImplementedError: If the subclass cannot enumerate labels.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot enumerate its labels: implement label_atoms")


def differentiate(function: Callable[..., Tensor], outputs: Tensor, *constants: Tensor | None) -> Tensor:
    """Gradient of a scalar function of the outputs, under ``no_grad`` and ``inference_mode`` too.

    Args:
        function: From the outputs and the constants to a 0-dimensional tensor.
        outputs: Where to differentiate.
        *constants: What else the function takes.

    Returns:
        The gradient, detached.
    """
    with torch.inference_mode(False), torch.enable_grad():
        leaf = outputs.detach().clone().requires_grad_()
        # Autograd cannot save tensors of inference mode.
        usable = [c.clone() if c is not None and c.is_inference() else c for c in constants]
        (gradient,) = torch.autograd.grad(function(leaf, *usable), leaf)
    return gradient.detach()
