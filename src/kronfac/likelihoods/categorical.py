"""Categorical likelihood: samples, roots and products of the Hessian of cross-entropy."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kronfac.likelihoods.checks import Targets, check_generator, check_vector, multiply
from kronfac.likelihoods.cross_entropy import CrossEntropy
from kronfac.likelihoods.randomness import rademacher


class Categorical(CrossEntropy):
    """Outputs are logits of classes; targets are class indices or probabilities of classes.

    With ``reduction="mean"`` or ``"sum"`` the loss is exactly `torch.nn.functional.cross_entropy`, whatever the
    options. With ``t`` the weighted and smoothed target vector of a term, the loss is ``-sum_k t_k log p_k`` and the
    Hessian

        ``H = c (diag p - p p^T)``,    ``c = sum_k t_k``:

    1 without class weights, 0 for an ignored target. Labels are drawn from ``p``, never from the weighted distribution.
    """

    def sample_labels(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw classes from the prediction.

        Args:
            outputs: Logits; with more than two dimensions ``class_dim`` must be known.
            generator: Source of randomness, on the outputs' device.

        Returns:
            Class indices, ``[B, *T]``.
        """
        probabilities = outputs.softmax(self._dim(outputs, None)).movedim(self._dim(outputs, None), -1)
        return _draw(probabilities, generator)

    def sample_cotangents(
        self, outputs: Tensor, targets: Targets = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """``sqrt(c) (p - onehot(y))`` with ``y`` drawn from ``p``.

        Args:
            outputs: Logits.
            targets: Targets, needed for their weights and, perhaps, the place of the classes.
            generator: Source of randomness, on the outputs' device.

        Returns:
            Of the outputs' shape.
        """
        check_generator(generator, outputs)
        probabilities, scale, dim = self._root_parts(outputs, targets)
        labels = _draw(probabilities, generator).unsqueeze(-1)
        return _scaled(_balanced(probabilities, labels), scale).movedim(-1, dim)

    def probe_cotangents(
        self, outputs: Tensor, targets: Targets = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """``sqrt(c) (sqrt(p) xi - p (sqrt(p)^T xi))`` with random signs ``xi``.

        Args:
            outputs: Logits.
            targets: Targets, needed for their weights and, perhaps, the place of the classes.
            generator: Source of randomness, on the outputs' device.

        Returns:
            Of the outputs' shape.
        """
        check_generator(generator, outputs)
        probabilities, scale, dim = self._root_parts(outputs, targets)
        signed = probabilities.sqrt() * rademacher(probabilities.shape, probabilities, generator)
        probe = signed - probabilities * signed.sum(-1, keepdim=True)
        return _scaled(_balanced(probe, probabilities.argmax(-1, keepdim=True)), scale).movedim(-1, dim)

    def root_columns(self, outputs: Tensor, targets: Targets = None) -> Iterator[Tensor]:
        """Columns ``sqrt(c p_k) (e_k - p)``, one for each term and class ``k``.

        Args:
            outputs: Logits.
            targets: Targets, needed for their weights and, perhaps, the place of the classes.

        Yields:
            Columns of the outputs' shape.
        """
        probabilities, scale, dim = self._root_parts(outputs, targets)
        batch, classes = len(probabilities), probabilities.shape[-1]
        flat = probabilities.reshape(batch, -1, classes)
        scales = None if scale is None else scale.reshape(batch, -1)
        for term in range(flat.shape[1]):
            here = flat[:, term]
            for index in range(classes):
                root = here[:, index].sqrt()
                root = root if scales is None else root * scales[:, term]
                column = torch.zeros_like(flat)
                at = torch.full_like(here[:, :1], index, dtype=torch.int64)
                column[:, term] = _balanced(-here * root.unsqueeze(-1), at)
                yield column.reshape(probabilities.shape).movedim(-1, dim)

    def hessian_product(self, outputs: Tensor, vector: Tensor, targets: Targets = None) -> Tensor:
        """``c (p u - p (p^T u))`` for each term, with ``u`` shifted to 0 at the likeliest class, which changes nothing.

        Args:
            outputs: Logits.
            vector: ``u``, of the outputs' shape.
            targets: Targets, needed for their weights and, perhaps, the place of the classes.

        Returns:
            Of the outputs' shape.
        """
        check_vector(outputs, vector)
        outputs, labels, mask = self.prepare(outputs.detach(), targets)
        dim = self._dim(outputs, labels)
        probabilities, vector = outputs.softmax(dim), vector.to(outputs)
        # Where p rounds to 1, a shift of u would not cancel, and u^T H u could be negative.
        vector = vector - vector.gather(dim, outputs.argmax(dim, keepdim=True))
        product = probabilities * (vector - (probabilities * vector).sum(dim, keepdim=True))
        weights = multiply(self.label_weights(outputs, labels), mask)
        return product if weights is None else product * weights.unsqueeze(dim)

    def symmetric_kl(self, outputs: Tensor, other: Tensor, targets: Targets = None) -> Tensor:
        """Mean of both divergences, ``sum_k (p_k - q_k) (log p_k - log q_k) / 2`` for each term.

        Args:
            outputs: Logits.
            other: Logits to compare with.
            targets: Targets, needed for their weights and, perhaps, the place of the classes.

        Returns:
            0-dimensional, divided as the loss is.
        """
        check_vector(outputs, other)
        raised, labels, _ = self.prepare(outputs, targets)
        dim = self._dim(raised, labels)
        first, second = raised.log_softmax(dim), other.to(raised).log_softmax(dim)
        terms = ((first.exp() - second.exp()) * (first - second)).sum(dim) / 2
        return self.average(terms, outputs, targets)

    def kl(self, outputs: Tensor, other: Tensor, targets: Targets = None) -> Tensor:
        """``sum_k p_k (log p_k - log q_k) - p_k + q_k`` for each term; the last two add up to 0.

        Args:
            outputs: Logits.
            other: Logits to compare with.
            targets: Targets, needed for their weights and, perhaps, the place of the classes.

        Returns:
            0-dimensional, divided as the loss is.
        """
        check_vector(outputs, other)
        raised, labels, _ = self.prepare(outputs, targets)
        dim = self._dim(raised, labels)
        first, second = raised.log_softmax(dim), other.to(raised).log_softmax(dim)
        probabilities = first.exp()
        # Where p and q round to 1, log p - log q rounds to 0, but is minus what the other classes differ by.
        terms = (probabilities * (first - second) - (probabilities - second.exp())).sum(dim)
        return self.average(terms, outputs, targets)

    def label_atoms(self, outputs: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Every class with its probability.

        Args:
            outputs: Logits; with more than two dimensions ``class_dim`` must be known.

        Yields:
            Probabilities and class indices, ``[B, *T]``.
        """
        dim = self._dim(outputs, None)
        for index, probability in enumerate(outputs.softmax(dim).unbind(dim)):
            yield probability, torch.full_like(probability, index, dtype=torch.int64)

    def _root_parts(self, outputs: Tensor, targets: Targets) -> tuple[Tensor, Tensor | None, int]:
        """Probabilities with the classes last, root of the term weights, place of the classes."""
        outputs, labels, mask = self.prepare(outputs.detach(), targets)
        dim = self._dim(outputs, labels)
        weights = multiply(self.label_weights(outputs, labels), mask)
        return outputs.softmax(dim).movedim(dim, -1), None if weights is None else weights.sqrt(), dim


def _draw(probabilities: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw one index along the last dimension."""
    flat = probabilities.reshape(-1, probabilities.shape[-1])
    return torch.multinomial(flat, 1, replacement=True, generator=generator).reshape(probabilities.shape[:-1])


def _balanced(cotangents: Tensor, at: Tensor) -> Tensor:
    """Set one class of each term to minus the sum of the others, since ``1 - p`` loses the digits of a ``p`` near 1."""
    others = cotangents.scatter(-1, at, 0.0)
    return others.scatter(-1, at, -others.sum(-1, keepdim=True))


def _scaled(cotangents: Tensor, scale: Tensor | None) -> Tensor:
    """Scale each term's cotangents, classes last."""
    return cotangents if scale is None else cotangents * scale.unsqueeze(-1)
