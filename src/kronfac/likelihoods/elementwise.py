"""Likelihoods whose terms are single outputs: diagonal Hessians, closed forms for everything."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from kronfac.likelihoods.base import Likelihood
from kronfac.likelihoods.checks import Targets, check_generator, check_vector, multiply
from kronfac.likelihoods.randomness import rademacher


class ElementwiseLikelihood(Likelihood):
    """A likelihood with a diagonal ``H``, as it is where each output is a term.

    A subclass implements `nll`, `sample_labels` and `curvature`; exact roots, probes and products follow:

        class Poisson(ElementwiseLikelihood):
            "Counts with log-rates as outputs."

            def nll(self, outputs, labels):
                return outputs.exp() - labels * outputs

            def sample_labels(self, outputs, generator=None):
                return torch.poisson(outputs.exp(), generator=generator)

            def curvature(self, outputs):
                return outputs.exp()
    """

    @abstractmethod
    def curvature(self, outputs: Tensor) -> Tensor:
        """Second derivative of each term in its output, in expectation over labels, without weights.

        Args:
            outputs: ``[B, ...]``, at least float32.

        Returns:
            Of the outputs' shape, not negative.
        """

    def hessian_diagonal(self, outputs: Tensor, targets: Targets = None) -> Tensor:
        """Diagonal of ``H``, weights and masks included.

        Args:
            outputs: ``[B, ...]``.
            targets: Targets, needed for their weights only.

        Returns:
            Of the outputs' shape.

        Raises:
            ValueError: If `curvature` gives another shape.
        """
        outputs, labels, mask = self.prepare(outputs.detach(), targets)
        curvature = self.curvature(outputs).to(outputs)
        if curvature.shape != outputs.shape:
            raise ValueError(
                f"{type(self).__name__}.curvature must return a number for each output, {tuple(outputs.shape)}, not a "
                f"tensor of shape {tuple(curvature.shape)}"
            )
        weights = multiply(self.label_weights(outputs, labels), mask)
        return curvature if weights is None else curvature * self.over_outputs(weights, outputs)

    def hessian_product(self, outputs: Tensor, vector: Tensor, targets: Targets = None) -> Tensor:
        """Product with the diagonal of ``H``.

        Args:
            outputs: ``[B, ...]``.
            vector: Of the outputs' shape.
            targets: Targets, needed for their weights only.

        Returns:
            Of the outputs' shape.
        """
        check_vector(outputs, vector)
        diagonal = self.hessian_diagonal(outputs, targets)
        return diagonal * vector.to(diagonal)

    def probe_cotangents(
        self, outputs: Tensor, targets: Targets = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Signs times the root of the diagonal: ``v^2`` is the diagonal itself, without any variance.

        Args:
            outputs: ``[B, ...]``.
            targets: Targets, needed for their weights only.
            generator: Source of randomness, on the outputs' device.

        Returns:
            Of the outputs' shape.
        """
        check_generator(generator, outputs)
        root = self.hessian_diagonal(outputs, targets).sqrt()
        return root * rademacher(root.shape, root, generator)

    def root_columns(self, outputs: Tensor, targets: Targets = None) -> Iterator[Tensor]:
        """One column for each output of an example.

        Args:
            outputs: ``[B, ...]``.
            targets: Targets, needed for their weights only.

        Yields:
            Columns of the outputs' shape.
        """
        root = self.hessian_diagonal(outputs, targets).sqrt()
        flat = root.reshape(len(root), -1)
        for index in range(flat.shape[1]):
            column = torch.zeros_like(flat)
            column[:, index] = flat[:, index]
            yield column.reshape(root.shape)
