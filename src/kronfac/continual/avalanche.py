"""Quadratic penalties as a plugin of the Avalanche library (Lomonaco et al. 2021), which is not imported."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from kronfac.approximations import get_approximation
from kronfac.continual.base import Penalty, check_strength, live_parameters
from kronfac.continual.combine import COMBINE, Curvature, combined
from kronfac.continual.experiences import batches_of, data_of, without_unused
from kronfac.continual.growing import on_all_layers, on_old_entries
from kronfac.continual.quadratic import QuadraticPenalty
from kronfac.curvature_coupled import CoupledCurvature
from kronfac.estimation import estimate
from kronfac.likelihoods import Gaussian, Likelihood
from kronfac.vectors import listed


class AvalanchePlugin:
    """Adds a quadratic penalty to the loss of an Avalanche strategy, and takes every experience in.

    ::

        plugin = kf.continual.AvalanchePlugin(kf.Categorical(), approximation="kfac", strength=10.0)
        strategy = Naive(model=model, optimizer=optimizer, criterion=CrossEntropyLoss(), plugins=[plugin])

    Avalanche calls plugins by the names of its hooks; this one has ``before_backward``, where it adds to
    ``strategy.loss``, and ``after_training_exp``, where it estimates the curvature of ``strategy.model`` on
    ``strategy.adapted_dataset`` (or ``strategy.experience.dataset``), whose items are ``(input, target, …)``. Whatever
    mode the model is in is the mode of the curvature: train mode, as Avalanche leaves it. Data of earlier experiences
    that a strategy trains on again is not taken in a second time.

    Models may grow between experiences. Multi-task models are given task labels; heads that an experience does not
    pass through have no curvature from it. Of a layer that has become larger, as ``IncrementalClassifier``, the
    leading entries are held, and what was added is free until an experience was learned with it.

    Args:
        likelihood: The loss, as for `kronfac.estimate`.
        approximation: Name of the approximation.
        strength: Factor of each experience's curvature.
        online: Keep one anchor and the sum of all curvatures; otherwise an anchor for each experience.
        combine: How curvatures are added, see `QuadraticPenalty.update`.
        examples: Examples that a curvature is estimated on, at most.
        batch_size: Of these; the strategy's ``train_mb_size`` by default.
        seed: Of the examples chosen and the labels drawn.

    Attributes:
        penalty: What was taken in so far; None before the first experience.

    Raises:
        TypeError: If the likelihood or the approximation is none, or a number no integer.
        ValueError: If a number or ``combine`` is out of range, the approximation is unknown, or it is one whose blocks
            cannot be combined in this way.
    """

    #: Read by Avalanche: sums over processes are not taken here.
    supports_distributed = False

    def __init__(
        self,
        likelihood: Likelihood,
        *,
        approximation: str = "kfac",
        strength: float = 1.0,
        online: bool = True,
        combine: str = "nearest",
        examples: int = 2000,
        batch_size: int | None = None,
        seed: int = 0,
    ) -> None:
        if not isinstance(likelihood, Likelihood):
            raise TypeError(f"likelihood must be a kronfac likelihood, got {type(likelihood).__name__}")
        if combine not in COMBINE:
            raise ValueError(f"combine={combine!r} is unknown; choose one of {COMBINE}")
        for name, value in (("examples", examples), ("batch_size", batch_size), ("seed", seed)):
            if isinstance(value, bool) or not isinstance(value, int):
                if name == "batch_size" and value is None:
                    continue
                raise TypeError(f"{name} must be an integer, got {value!r}")
            if value < (least := 0 if name == "seed" else 1):
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not isinstance(approximation, str):
            raise TypeError(f"approximation must be a name, got {approximation!r}")
        self.likelihood, self.approximation = likelihood, approximation
        self.strength = check_strength("strength", strength)
        get_approximation(approximation)
        if online:
            _check_combines(approximation, combine)
        self.online, self.combine = online, combine
        self.examples, self.batch_size, self.seed = examples, batch_size, seed
        self.penalty: Penalty | None = None
        self._seen = 0
        self._trained: dict[str, torch.Size] = {}

    def before_training_exp(self, strategy: Any, **_: object) -> None:
        """Refuse now what could not be taken in once the experience was learned.

        Args:
            strategy: The strategy.

        Raises:
            NotImplementedError: If the model changed, and curvature that couples layers is to be added up.
        """
        penalty = self.penalty
        if not (self.online and self._trained and isinstance(penalty, QuadraticPenalty)):
            return
        known, now = self._trained, _trained(strategy.model)
        changed = [name for name in (*known, *now) if known.get(name) != now.get(name)]
        if changed and isinstance(penalty.parts[0][1], CoupledCurvature):
            raise NotImplementedError(
                f"approximation={self.approximation!r} couples layers, and cannot be used online where parameters "
                f"appear, vanish or change their shape: {listed(list(dict.fromkeys(changed)))}; pass online=False, "
                "which keeps an anchor for each experience"
            )

    def before_backward(self, strategy: Any, **_: object) -> None:
        """Add the penalty to the strategy's loss.

        Args:
            strategy: The strategy.
        """
        if self.penalty is not None:
            strategy.loss = strategy.loss + on_old_entries(self.penalty, live_parameters(strategy.model))

    def after_training_exp(self, strategy: Any, **_: object) -> None:
        """Estimate the curvature at the experience's optimum.

        Args:
            strategy: The strategy.
        """
        seed = self.seed + self._seen
        batches = list(self._batches(strategy, seed))
        self._seen += 1
        self._trained = _trained(strategy.model)
        with without_unused(strategy.model, batches):
            curvature = estimate(
                strategy.model,
                self.likelihood,
                batches,
                approximation=self.approximation,
                source="sampled",
                seed=seed,
            )
        if self.online and isinstance(self.penalty, QuadraticPenalty):
            self.penalty = self._updated(self.penalty, curvature, strategy.model)
            return
        term = QuadraticPenalty(curvature, strength=self.strength)
        self.penalty = term if self.penalty is None else self.penalty + term

    def _updated(self, penalty: QuadraticPenalty, curvature: Curvature, model: nn.Module) -> QuadraticPenalty:
        """One anchor at the parameters of now, with the sum of all curvatures over the layers of all."""
        live = live_parameters(model)
        parts, curvature = on_all_layers(penalty.parts, curvature, list(live))
        before = QuadraticPenalty.from_parts(
            parts, penalty.anchor_matrices, strength=penalty.strength, tasks=penalty.tasks, rest=penalty.rest
        )
        return before.update(curvature, live, decay=1.0, combine=self.combine)

    def _batches(self, strategy: Any, seed: int) -> Iterator[tuple[Any, Any]]:
        size = self.batch_size or strategy.train_mb_size
        return batches_of(data_of(strategy, first=self.penalty is None), strategy.model, self.examples, size, seed)


def _check_combines(approximation: str, combine: str) -> None:
    """Combine the curvatures of three tiny experiences, instead of failing once a real one was learned.

    The third meets what two became, which may be a block of another kind.

    Args:
        approximation: The approximation.
        combine: How curvatures are to be added.

    Raises:
        ValueError: If they cannot be.
    """
    double = torch.float64
    with torch.device("cpu"), torch.no_grad():  # whatever the default device is
        layer = nn.utils.skip_init(nn.Linear, 1, 1, dtype=double)  # which leaves the user's random numbers alone
        for parameter in layer.parameters():
            parameter.fill_(1.0)
        pair = torch.ones(2, 1, dtype=double), torch.zeros(2, 1, dtype=double)
        new = 1.0, estimate(layer, Gaussian(), pair, approximation=approximation, source="sampled")
    try:
        combined(combined((new,), new, combine), new, combine)
    except NotImplementedError as error:
        raise ValueError(
            f"approximation={approximation!r} cannot be used online with combine={combine!r}, which makes one block of "
            'two; pass combine="exact", which keeps both, or online=False'
        ) from error


def _trained(model: nn.Module) -> dict[str, torch.Size]:
    return {name: p.shape for name, p in live_parameters(model).items() if p.requires_grad}
