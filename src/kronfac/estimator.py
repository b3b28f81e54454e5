"""``Estimator``: running statistics of all layers of a model, from recorded forwards."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kronfac import processes
from kronfac.approximations import Approximation, JointApproximation, JointStatistic, Statistic, get_approximation
from kronfac.approximations.joint import whole_pulls
from kronfac.curvature import BlockDiagonal
from kronfac.curvature_coupled import CoupledCurvature, coupled_curvature
from kronfac.eager import require_whole
from kronfac.layers import Adaptation, adapt_model
from kronfac.likelihoods import Likelihood
from kronfac.measuring import couples_examples
from kronfac.sources import Sample, Source, get_source
from kronfac.sources.part import Part
from kronfac.tape import Tape


class CoverageWarning(UserWarning):
    """Some trainable parameters have no curvature block; the text names them and says why."""


@contextmanager
def without_coverage_warnings() -> Iterator[None]:
    """Say nothing of layers without a block within the block: for tables that name the layers there are.

    Yields:
        Nothing.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CoverageWarning)
        yield


class Estimator:
    """Running statistics of all layers of a model.

    Args:
        model: The model; its layers are found once, now.
        likelihood: The loss.
        approximation: Name or object.
        source: Name or object.
        samples: Number of samples of the sampled source.
        sharing: Weight sharing over positions, ``"expand"`` or ``"reduce"``.
        norm: ``"unitwise"`` or ``"full"`` blocks of normalisation layers.
        generator: For everything random; the global one by default.

    Raises:
        TypeError: ``model`` or ``likelihood`` is of another type.
        ValueError: No layer has a block, processes hold parts of the parameters, or approximation and source do not
            fit.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        *,
        approximation: str | Approximation = "kfac",
        source: str | Source = "sampled",
        samples: int = 1,
        sharing: str = "expand",
        norm: str = "unitwise",
        generator: torch.Generator | None = None,
    ) -> None:
        if not isinstance(likelihood, Likelihood):
            raise TypeError(
                "likelihood must be a kronfac.Likelihood such as kronfac.Categorical(), not "
                f"{type(likelihood).__name__}; kronfac.likelihood_of(loss_module) translates PyTorch's loss modules."
            )
        self.model, self.likelihood = model, likelihood
        self.approximation, self.source = get_approximation(approximation), get_source(source, samples)
        self.approximation.check(self.source)
        self.options = {"sharing": sharing, "norm": norm}
        self.adaptation: Adaptation = adapt_model(model, sharing=sharing, norm=norm)
        require_whole(model)
        if not self.adaptation.adapters:
            raise ValueError("No layer of the model has a curvature block: " + _reasons(self.adaptation.uncovered))
        self.source = self.source.bind(model)
        self.generator = generator
        #: Terms of the loss for each unit of its denominator, as this process last saw them.
        self.terms = 1.0
        # Layers called since the last decay, and terms of the loss that passed by those that were not, till they are.
        self._called: set[str] = set()
        self._passed = 0.0
        #: Statistics layer by layer; none where the approximation couples layers.
        self.statistics: dict[str, Statistic] = {}
        #: Statistics of all layers together, where the approximation couples them.
        self.joint: JointStatistic | None = None
        if isinstance(self.approximation, JointApproximation):
            self.joint = self.approximation.start_all(self.adaptation.adapters)
        else:
            self.statistics |= {
                name: self.approximation.start(adapter) for name, adapter in self.adaptation.adapters.items()
            }

    @property
    def needs_examples(self) -> str | None:
        """What must see examples one by one, for messages; None if nothing must."""
        if self.source.exact:
            return f"source={self.source.name!r}"
        if self.approximation.needs_examples:
            return f"approximation={self.approximation.name!r}"
        if self.options["sharing"] == "reduce":
            return "sharing='reduce'"
        # The weights of an example's terms go to its rows.
        return f"The loss {self.likelihood!r}" if self.likelihood.needs_targets else None

    def warn_uncovered(self, what: str) -> None:
        """Name parameters without a block, once, as a :class:`CoverageWarning`.

        Args:
            what: What becomes of them.
        """
        if self.adaptation.uncovered:
            text = f"{what}: {_reasons(self.adaptation.uncovered)}. See kronfac.coverage(model)."
            warnings.warn(text, CoverageWarning, stacklevel=3)

    def update(
        self, tape: Tape, outputs: Tensor, targets: Any = None, *, continues: bool = False, part: Part | None = None
    ) -> None:
        """Take in a recorded forward pass; the graph is kept.

        Args:
            tape: The recorded layers.
            outputs: The model's outputs, attached to the graph.
            targets: Targets, where source or likelihood needs them.
            continues: Whether the forward belongs to the same loss as the one before it (gradient accumulation). Means
                are means over all of them either way; with ``reduction="sum"`` the curvatures are then added.
            part: The part of a batch whose statistics stand for the whole; None where all of it is wanted.
        """
        adds = continues and self.likelihood.reduction == "sum"
        self.source.check(self.model, couples_examples(self.model))
        self.approximation.begin(self.model, self.source, tape, outputs, self.statistics)
        with torch.no_grad():
            values = outputs.detach()
            cut = None if part is None else part.begin(self.likelihood, values, targets)
        denominator = 0.0
        if (needy := "stats_examples" if part is not None and part.cut else self.needs_examples) is not None:
            tape.refuse_repeated(needy, "examples")
        if self.joint is not None:
            tape.refuse_repeated(f"approximation={self.approximation.name!r}")
            self.joint.check_graph(tape.feeders(outputs))
            add = whole_pulls(list(tape.calls), self.joint.add)
        else:
            add = self._add

        def take(sample: Sample) -> None:
            nonlocal denominator
            sample = sample if cut is None else cut(sample)
            denominator = 0.0 if adds else sample.denominator
            if adds and (self.joint is not None or sample.layer.name in self._called):
                # The denominator of a sum is one, and was counted with the first of its parts that called the layer.
                sample = replace(sample, denominator=0.0)
            add(sample)

        self.source.stream(tape, self.likelihood, outputs, targets, self.generator, take)
        with torch.no_grad():  # of targets that the source has looked at
            count = self.likelihood.term_shape(values, targets).numel()
            whole = float(self.likelihood.denominator(values, targets))
            terms = count / max(whole, 1e-12)
            terms *= 1.0 if part is None or part.cut else part.weight(self.likelihood)
            self.terms = self.terms + terms if adds else terms
        if not (tape.calls or adds):  # no sample has told it
            denominator = whole
        self._count_absent(set(tape.calls), denominator, adds)

    def _count_absent(self, called: set[str], denominator: float, adds: bool) -> None:
        """Count the terms of the loss in which a layer has no part, since the forward did not call it.

        Until the next decay all forwards are of one loss; one that calls a layer in none of them says nothing of it.
        Of a loss that is one sum over all of them, the first forward that calls a layer has counted the whole.
        """
        for name, statistic in self.statistics.items():
            if name not in called and name in self._called:
                statistic.count_absence(denominator)
            elif name in called and name not in self._called and self._passed and not adds:
                statistic.count_absence(self._passed)
        self._passed += denominator
        self._called |= called

    def begin_loss(self) -> None:
        """Begin with the forwards of another loss: layers that they do not call are no part of it."""
        self._called, self._passed = set(), 0.0

    def _add(self, sample: Sample) -> None:
        self.statistics[sample.layer.name].add(sample)

    def consolidate(self) -> None:
        """Give every process of a distributed run the same share of the statistics; each must call this."""
        self.terms = processes.mean_of(self.terms, next(self.model.parameters()).device)
        means = [mean for statistic in self.statistics.values() for mean in statistic.means().values()]
        for mean in means if self.joint is None else self.joint.means().values():
            mean.consolidate()

    def decay(self, factor: float) -> None:
        """Forget: multiply all sums and weights by ``factor`` (exponential moving average)."""
        self.begin_loss()
        for statistic in self.statistics.values():
            statistic.decay(factor)
        if self.joint is not None:
            self.joint.decay(factor)

    def reset(self) -> None:
        """Forget all sums and weights without a trace, which a factor of zero leaves: a mean survives its decay."""
        self.begin_loss()
        for statistic in self.statistics.values():
            for mean in statistic.means().values():
                mean.reset()
        for mean in {} if self.joint is None else self.joint.means().values():
            mean.reset()

    def next_pass(self) -> None:
        """Go on to the next pass over the same data, where the approximation takes several; see :func:`estimate`."""
        self.begin_loss()
        for statistic in self.statistics.values():
            statistic.next_pass()

    def curvature(self) -> BlockDiagonal:
        """Return the curvature of what was gathered.

        Returns:
            The operator.

        Raises:
            RuntimeError: A layer gathered nothing; in a distributed run, in none of the processes, or in some of them
                only with terms that nobody counted. All of them raise then, for those that do not would wait for ever.
            TypeError: The approximation couples layers.
        """
        if self.joint is not None:
            raise TypeError(f"approximation={self.approximation.name!r} couples layers; call coupled_curvature().")
        layers = self.statistics.items()
        gathered = self.in_any_process([not statistic.empty for _, statistic in layers])
        uncounted = self.in_any_process(
            [statistic.empty and name not in self._called and self._passed > 0.0 for name, statistic in layers]
        )
        if partly := [n for n, some, lost in zip(self.statistics, gathered, uncounted, strict=True) if some and lost]:
            raise RuntimeError(
                f"The forward passes of some processes called layers {partly}, those of others never did: call them in "
                "each process, freeze them (requires_grad=False), or estimate in one process."
            )
        if missing := [name for name, some in zip(self.statistics, gathered, strict=True) if not some]:
            raise RuntimeError(
                f"No statistics for layers {missing}: the forward pass never called them (call them, leave them out, "
                "by kronfac.layers.without_curvature, or freeze them, requires_grad=False), or no term of the loss "
                "counted (every target ignored or masked)."
            )
        blocks = {name: statistic.block() for name, statistic in self.statistics.items()}
        return BlockDiagonal(blocks, self.adaptation.adapters, self.adaptation.order, options=self.options)

    def in_any_process(self, flags: list[bool]) -> list[bool]:
        """Tell what holds in any process of a distributed run, so that all of them decide alike; each must call this.

        Args:
            flags: What holds in this process.

        Returns:
            What holds in any of them.
        """
        if not processes.together():
            return flags
        found = torch.tensor(flags, dtype=torch.int32, device=next(self.model.parameters()).device)
        processes.largest(found)
        return [bool(flag) for flag in found.tolist()]

    def coupled_curvature(self) -> CoupledCurvature:
        """Return the curvature of what was gathered, where the approximation couples layers.

        Returns:
            The operator.

        Raises:
            RuntimeError: Nothing was gathered.
            TypeError: The approximation is one of blocks alone.
        """
        if self.joint is None:
            raise TypeError(f"approximation={self.approximation.name!r} couples no layers; call curvature().")
        if any(self.in_any_process([self.joint.empty])):
            raise RuntimeError("No statistics: no forward pass was seen, in this process or in another.")
        layouts = self.adaptation.adapters
        return coupled_curvature(self.joint.blocks(), layouts, self.adaptation.order, self.options)


def _reasons(uncovered: Mapping[str, str]) -> str:
    grouped: dict[str, list[str]] = {}
    for name, reason in uncovered.items():
        grouped.setdefault(reason, []).append(name)
    return "; ".join(f"{', '.join(names)} ({reason})" for reason, names in grouped.items())
