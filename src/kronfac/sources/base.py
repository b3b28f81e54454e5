"""What a source must say, and how its pulls become samples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kronfac.layers import LayerAdapter
from kronfac.likelihoods import Likelihood
from kronfac.linalg.symmetric import all_finite
from kronfac.sources.checked import Checked, held_on
from kronfac.sources.sample import Sample, not_finite
from kronfac.tape import Tape


@dataclass
class Seed:
    """A cotangent of the outputs to pull back, with its weight; None stands for no pull at all."""

    cotangent: Tensor | None
    weight: float


class Source(ABC):
    """Which cotangents are pulled back.

    Attributes:
        name: The name in the public face.
        paired: Whether its samples pair each input with its cotangent.
        exact: Whether its curvature holds no sampling error.
        needs_targets: Whether it reads the training targets.
    """

    name: str
    paired: bool = True
    exact: bool = False
    needs_targets: bool = False

    @abstractmethod
    def seeds(
        self, likelihood: Likelihood, outputs: Tensor, targets: object, generator: torch.Generator | None
    ) -> Iterator[Seed]:
        """Yield the outputs' cotangents of the *sum* loss.

        Args:
            likelihood: The loss.
            outputs: Detached outputs, float32 at least.
            targets: Targets, or None.
            generator: For everything random.
        """

    def check(self, model: nn.Module, couples: bool) -> None:  # noqa: B027  (most sources have nothing to refuse)
        """Refuse a model for which this source would be wrong.

        Args:
            model: The model.
            couples: Whether examples interact (batch norm in train mode).
        """

    def bind(self, model: nn.Module) -> Source:
        """Return this source for a model; called once, before the first pass.

        Args:
            model: The model.

        Returns:
            The source itself, unless it must know the model.
        """
        return self

    def samples(
        self,
        tape: Tape,
        likelihood: Likelihood,
        outputs: Tensor,
        targets: object = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[list[Sample]]:
        """Pull every seed back and yield the samples of all recorded layers, one list per pull.

        Args:
            tape: A recorded forward pass.
            likelihood: The loss.
            outputs: The model's outputs, attached to the graph.
            targets: Targets, where source or likelihood needs them.
            generator: For everything random.

        Yields:
            Samples of one pull.
        """
        for seed, sample, _ in self._pulls(tape, likelihood, outputs, targets, generator):
            pulled = {} if seed.cotangent is None else tape.pull(outputs, seed.cotangent)
            yield [sample(name, pulled.get(name)) for name in tape.calls]

    def stream(
        self,
        tape: Tape,
        likelihood: Likelihood,
        outputs: Tensor,
        targets: object,
        generator: torch.Generator | None,
        take: Callable[[Sample], None],
    ) -> None:
        """Do as :meth:`samples` does, but hand out each sample as soon as its cotangent is complete, and keep none.

        Args:
            tape: A recorded forward pass.
            likelihood: The loss.
            outputs: The model's outputs, attached to the graph.
            targets: Targets, or None.
            generator: For everything random.
            take: Called with every sample; layers that a pull does not reach come last, with zero cotangents.
        """
        for seed, sample, spent in self._pulls(tape, likelihood, outputs, targets, generator):
            met: set[str] = set()
            checked = Checked(take, held_on(outputs.device))

            def receive(
                name: str,
                cotangent: Tensor,
                sample: _MakeSample = sample,
                met: set[str] = met,
                checked: Checked = checked,
                spent: bool = spent,
            ) -> None:
                met.add(name)
                checked(sample(name, cotangent))
                if spent:
                    tape.forget_input(name)

            if seed.cotangent is not None:
                tape.stream(outputs, seed.cotangent, receive, retain_graph=not spent)
            checked.flush()
            for name, call in tape.calls.items():
                if name not in met:
                    zero = None if seed.cotangent is None else outputs.detach().new_zeros(call.output_shape)
                    take(sample(name, zero))

    def _pulls(
        self,
        tape: Tape,
        likelihood: Likelihood,
        outputs: Tensor,
        targets: object,
        generator: torch.Generator | None,
    ) -> Iterator[tuple[Seed, _MakeSample, bool]]:
        """Yield each seed, what makes a layer's sample of its cotangent, and whether the graph is spent then."""
        tape.meet(outputs)
        with torch.no_grad(), torch.autocast(outputs.device.type, enabled=False):
            values = outputs.detach()
            values = values if values.dtype in (torch.float32, torch.float64) else values.float()
            if not all_finite(values):
                raise FloatingPointError(_first_not_finite(tape))
            _check_inputs(tape)
            likelihood.validate(values, targets)  # type: ignore[arg-type]
            denominator = float(likelihood.denominator(values, targets))  # type: ignore[arg-type]
            weights = likelihood.row_weights(values, targets)  # type: ignore[arg-type]
            for call in tape.calls.values():
                call.adapter.require_batch(call.input)
                if self.exact:
                    require_examples(call.adapter, call.input, len(values), f"source={self.name!r}")
                elif call.adapter.sharing == "reduce":
                    # What it averages over must be the positions of one example; expanded rows need no such order.
                    require_examples(call.adapter, call.input, len(values), "sharing='reduce'", "sharing='expand'")
            rows = {name: _counted(c.adapter, c.input, weights) for name, c in tape.calls.items()}
            seeds = self.seeds(likelihood, values, targets, generator)
            marked = _with_last(seeds) if tape.disposable else ((seed, False) for seed in seeds)
            for index, (seed, last) in enumerate(marked):

                def sample(name: str, cotangent: Tensor | None, seed: Seed = seed, first: bool = index == 0) -> Sample:
                    call = tape.calls[name]
                    return Sample(
                        call.adapter, call.input, cotangent, seed.weight, denominator, len(values), first, rows[name]
                    )

                yield seed, sample, last


_MakeSample = Callable[[str, Tensor | None], Sample]


def _check_inputs(tape: Tape) -> None:
    """Look at all inputs before the first statistic is touched: activations that saturate hide an infinity."""
    inputs = {n: c.input for n, c in tape.calls.items() if c.input.is_floating_point()}
    if not all_finite(*(x for n, x in inputs.items() if not tape.calls[n].adapter.spreads)):
        broken = next(n for n, x in inputs.items() if not all_finite(x))
        raise FloatingPointError(not_finite("input", broken))


def require_examples(
    adapter: LayerAdapter,
    x: Tensor,
    batch: int,
    what: str,
    instead: str | None = "approximation='kfac' with source='sampled'",
) -> None:
    """Refuse a layer whose first dimension is not the batch, where examples must be kept apart.

    Args:
        adapter: The layer.
        x: Its input.
        batch: Number of examples.
        what: What needs the examples apart.
        instead: What does not; None if nothing does.

    Raises:
        ValueError: The layer's first dimension differs.
    """
    first = adapter.positions(x)[0]
    if first != batch:
        other = "" if instead is None else f" use {instead}, or"
        raise ValueError(
            f"{what} needs the examples one by one, but the first dimension of layer {adapter.name!r}'s input is "
            f"{first}, not the batch of {batch}: examples are summed or interleaved there. Keep the batch first "
            f"(expand position indices to [batch, positions]), or{other} leave the layer out, by "
            "kronfac.layers.without_curvature(layer)."
        )


def _with_last(seeds: Iterable[Seed]) -> Iterator[tuple[Seed, bool]]:
    """Say of each seed whether it is the last, for which the next one is drawn before."""
    following = iter(seeds)
    seed = next(following, None)
    while seed is not None:
        after = next(following, None)
        yield seed, after is None
        seed = after


def _counted(adapter: LayerAdapter, x: Tensor, weights: Tensor | None) -> Tensor | None:
    """Weights of a layer's rows in the unit of rows without weights, which count one each; None for ones."""
    rows = align_weights(adapter, x, weights)
    if rows is None or weights is None:
        return None
    terms = align_weights(adapter, x, weights.new_ones(()).expand_as(weights))
    assert terms is not None
    # A row of several terms counts their mean: a mask of ones is no mask, beside batches without one as well.
    rows = rows if weights.numel() == rows.numel() else rows / terms
    return None if bool((rows == 1).all()) else rows  # unweighted forms are cheaper


def _first_not_finite(tape: Tape) -> str:
    """Say where NaN or Inf entered the forward pass."""
    names = list(tape.calls)
    inputs = [call.input for call in tape.calls.values()]
    broken = [n for n, x in zip(names, inputs, strict=True) if x.is_floating_point() and not all_finite(x)]
    if not broken:
        where = f"every layer's input is finite, up to that of layer {names[-1]!r}" if names else "no layer was called"
    elif broken[0] == names[0]:
        where = f"they are in the input of the first layer, {broken[0]!r}"
    else:
        where = (
            f"they first appear in the input of layer {broken[0]!r}, after layer {names[names.index(broken[0]) - 1]!r}"
        )
    return (
        f"NaN or Inf in the model's outputs; {where}. No statistics were updated and no parameter was changed. Look "
        "for invalid inputs or a diverged loss; lower lr or raise damping."
    )


def align_weights(adapter: LayerAdapter, x: Tensor, weights: Tensor | None) -> Tensor | None:
    """Bring the weights of the loss's terms to a layer's rows.

    A layer whose rows are the terms' positions (a token-wise layer under a token-wise loss) gives each row its term's
    weight, or the sum over its terms, so that ignored and masked positions do not count; otherwise all rows of an
    example carry the sum of its terms' weights.

    Args:
        adapter: The layer.
        x: Its input.
        weights: ``[B, *terms]`` or None.

    Returns:
        ``[B, S]`` for the layer, or None.

    Raises:
        ValueError: Neither reading fits, since the layer's batch is not the loss's.
    """
    if weights is None:
        return None
    positions = adapter.positions(x)
    size = torch.Size(positions).numel()
    if adapter.sharing == "reduce":
        positions, size = positions[:1], positions[0]
    # One term for each output of a position: the position carries their sum.
    by_position = weights.movedim(adapter.channel_dim, -1) if weights.ndim == len(positions) + 1 else weights
    if by_position.shape[:-1] == positions:
        return by_position.sum(-1).reshape(positions[0], -1)
    # Rows flattened by the model, [B·T, …], or terms flattened by the loss, in the same order.
    if size == weights.numel() and (len(positions) == 1 or positions[0] == weights.shape[0]):
        return weights.reshape(positions[0], -1)
    if positions[0] != weights.shape[0]:
        raise ValueError(
            f"Layer {adapter.name!r}: its rows {positions} match neither the loss's terms {tuple(weights.shape)} nor "
            "its batch, so that weights, masks or ignored targets cannot be brought to them. Keep the batch first."
        )
    per_example = weights.reshape(weights.shape[0], -1).sum(1, keepdim=True)
    return per_example.expand(-1, size // positions[0])
