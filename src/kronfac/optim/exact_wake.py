"""The subproblem of QE-KLD-WRM: exact divergences from the networks before, by gradient descent within the step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from kronfac.forwards import pick_outputs
from kronfac.likelihoods import Likelihood
from kronfac.operators.passes import run, same_random_state
from kronfac.optim.gathering import Gatherer
from kronfac.optim.last_batch import last_batch
from kronfac.optim.root import kept_statistics, swapped

#: A network by its parameters, with the weight of its divergence.
Weighted = tuple[float, Mapping[str, Tensor]]


class Networks:
    """The iterates before, as copies of their parameters, newest last.

    Args:
        rho: ``ρ``.
        cap: How many networks a step looks at, the present one included; older ones are dropped.
    """

    def __init__(self, rho: float, cap: int) -> None:
        self._rho, self._cap = rho, cap
        self.kept: list[tuple[float, dict[str, Tensor]]] = []

    def kappa(self, first: bool) -> float:
        """``κ``: 1 for the first iterate, else ``1 − ρ``."""
        return 1.0 if first else 1.0 - self._rho

    def push(self, parameters: Mapping[str, Tensor], *, first: bool) -> None:
        """Keep a copy of a network.

        Args:
            parameters: Its parameters by name.
            first: Whether it is the first iterate.
        """
        if self._cap > 1:
            copies = {name: tensor.detach().clone() for name, tensor in parameters.items()}
            self.kept = [*self.kept, (self.kappa(first), copies)][1 - self._cap :]

    def weighted(self, present: Mapping[str, Tensor], *, first: bool, zeta: float) -> list[Weighted]:
        """The wake: networks with their weights ``ζ(i) ρ^{k−i}``.

        Args:
            present: Parameters of the present network.
            first: Whether it is the first iterate.
            zeta: Factor of all weights, ``ζ(i) = zeta · κ(i)``.

        Returns:
            Weights and parameters, the present network first.
        """
        networks: list[Weighted] = [(self.kappa(first), present), *reversed(self.kept)]
        return [(zeta * kappa * self._rho**age, network) for age, (kappa, network) in enumerate(networks)]


class ExactWake:
    """Objective (31) over ``λ`` in the step: ``(gᵀs + ½ sᵀBs)/λ + Σ_i ζ(i) ρ^{k−i} D(θ_i, θ_k + s)``.

    ``D`` is the likelihood's exact symmetric divergence on the mini-batch of the last forward, divided as the loss is.
    All networks see the same random numbers (dropout masks) as that forward; buffers are left alone.

    Args:
        gatherer: Holds the forward's arguments.
        likelihood: The loss.
        pick: Picks the output tensor.
        parameters: ``θ_k`` by name.
        networks: The ``θ_i`` with their weights.
        gradients: ``g`` by name.
        product: Multiplies by ``B``.
        rate: ``1/λ``.
        xi: ``ξ``: weight of ``D(θ_i ‖ θ_k + s)`` against that of ``D(θ_k + s ‖ θ_i)``.
    """

    def __init__(
        self,
        gatherer: Gatherer,
        likelihood: Likelihood,
        pick: Callable[[Any], Tensor] | None,
        parameters: Mapping[str, Tensor],
        networks: list[Weighted],
        gradients: Mapping[str, Tensor],
        product: Callable[[dict[str, Tensor]], dict[str, Tensor]],
        rate: float,
        xi: float = 0.5,
    ) -> None:
        self._gatherer, self._likelihood, self._pick = gatherer, likelihood, pick
        self._parameters, self._gradients, self._product, self._rate = parameters, gradients, product, rate
        self._xi, self._inputs = xi, last_batch(gatherer, "variant='qe'").inputs
        with torch.no_grad():
            self._references = [(weight, self._outputs(network)) for weight, network in networks if weight]
            self._terms = self._count(self._references[0][1])  # the present network's

    def _outputs(self, parameters: Mapping[str, Tensor]) -> Tensor:
        root = self._gatherer.root
        with same_random_state(root, self._gatherer.last_random):
            return run(root, parameters, self._inputs, lambda out: pick_outputs(out, self._pick))

    def _count(self, outputs: Tensor) -> float:
        """Terms of the loss for each unit of its denominator: 1 for the mean over them."""
        mean, targets = copy.copy(self._likelihood), self._gatherer.last_targets
        mean.reduction = "mean"
        return float(mean.denominator(outputs, targets) / self._likelihood.denominator(outputs, targets)) or 1.0

    def _divergence(self, old: Tensor, new: Tensor) -> Tensor:
        likelihood, targets, xi = self._likelihood, self._gatherer.last_targets, self._xi
        if xi == 0.5:
            return likelihood.symmetric_kl(old, new, targets)
        return xi * likelihood.kl(old, new, targets) + (1.0 - xi) * likelihood.kl(new, old, targets)

    def at(self, steps: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Value and gradient.

        Args:
            steps: ``s`` by name.

        Returns:
            The objective, 0-dimensional, and its gradient by name.
        """
        root = self._gatherer.root
        moved = {name: (p.detach() + steps[name]).requires_grad_() for name, p in self._parameters.items()}
        with torch.enable_grad(), swapped(root, moved), kept_statistics(root):
            outputs = self._outputs(moved)
            wake = outputs.new_zeros((), dtype=torch.promote_types(outputs.dtype, torch.float32))
            for weight, reference in self._references:
                wake = wake + weight * self._divergence(reference, outputs)
            slopes = torch.autograd.grad(wake, list(moved.values()), materialize_grads=True)
        curved = self._product(dict(steps))
        value, gradient = wake.detach(), {}
        for (name, step), slope in zip(steps.items(), slopes, strict=True):
            linear = self._gradients[name]
            value = value + self._rate * (step * (linear + 0.5 * curved[name])).sum()
            gradient[name] = self._rate * (linear + curved[name]) + slope  # which may be sparse
        return value, gradient

    def descend(
        self, start: Mapping[str, Tensor], omega: float, iterations: int
    ) -> tuple[dict[str, Tensor], list[float]]:
        """Gradient descent with the learning rate ``ω/λ`` on the objective, that is ``ω`` on what `at` gives.

        A loss that is a sum has as many times the curvature as it has terms, and takes a rate as many times smaller:
        the steps are those of the mean over all terms, whatever the reduction.

        Args:
            start: Where to start: the Q step.
            omega: ``ω``.
            iterations: ``N_IS``.

        Returns:
            The last iterate, and the value at each one before it.
        """
        steps, values, rate = dict(start), [], omega / self._terms
        for _ in range(iterations):
            value, gradient = self.at(steps)
            values.append(value)
            steps = {name: step - rate * gradient[name] for name, step in steps.items()}
        return steps, torch.stack(values).tolist() if values else []
