"""KFRA: the output factors by one recursion over batch means, without a single pull (Botev et al. 2017)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from kronfac.layers import LayerAdapter
from kronfac.layers.base import require_float
from kronfac.likelihoods import Likelihood
from kronfac.likelihoods.elementwise import ElementwiseLikelihood
from kronfac.linalg.symmetric import all_finite
from kronfac.sources.base import Seed, Source
from kronfac.sources.chain import Link, read_chain, require_still, require_unbroken, takes_one_example
from kronfac.sources.moments import example_means, pull_back, run
from kronfac.sources.sample import Sample, not_finite
from kronfac.tape import Call, Tape, TapeError

#: Largest layer, in numbers per example: its matrix takes 1 GiB in float32, and the step back from it twice as much.
LIMIT = 16_384


class Recursive(Source):
    """Pre-activation Gauss-Newton matrices, averaged over the batch at every layer (KFRA).

    The recursion starts from the loss's Hessian in the outputs, summed over the examples with their weights, and
    pulls it back module by module, ``G_{λ-1} = (W_λᵀ G_λ W_λ) ⊙ E_n[f′ f′ᵀ]``: at each module the mean over examples of
    ``J_nᵀ G J_n`` with ``G`` taken as independent of ``J_n``. Exact for a batch of one example and for linear networks.
    The means are over one batch; where terms of the loss have weights, so have the examples in them.

    It is no function of one layer's inputs and cotangents, and needs to know the network: `bind` it to a model that
    is a chain of known modules (`kronfac.sources.chain`). Nothing is differentiated but activations: each layer's
    outputs are computed once more from its recorded inputs.

    Args:
        limit: Largest number of outputs of a layer (channels times positions) for which a square matrix is formed.

    Raises:
        ValueError: ``limit`` is no positive integer.
    """

    name = "recursive"
    paired = False

    def __init__(self, limit: int = LIMIT) -> None:
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise ValueError(f"limit={limit!r} must be a positive integer.")
        self.limit = limit
        self._model: nn.Module | None = None

    def bind(self, model: nn.Module) -> Recursive:
        """Return this source for a model.

        Args:
            model: The model.

        Returns:
            A new source.
        """
        read_chain(model)
        bound = Recursive(self.limit)
        bound._model = model
        return bound

    def check(self, model: nn.Module, couples: bool) -> None:
        """Refuse batch norm and dropout in train mode, and models that are no chain.

        Args:
            model: The model.
            couples: Whether examples interact.

        Raises:
            ValueError: The recursion would be wrong.
        """
        links = read_chain(model)
        if couples:
            raise ValueError(
                "source='recursive' treats examples as independent, which batch norm in train mode makes untrue: call "
                "model.eval() first, or use source='sampled'."
            )
        require_still(links)

    def seeds(
        self, likelihood: Likelihood, outputs: Tensor, targets: object, generator: torch.Generator | None
    ) -> Iterator[Seed]:
        """Yield one empty seed: nothing is pulled through the graph.

        Args:
            likelihood: Unused.
            outputs: Unused.
            targets: Unused.
            generator: Unused.

        Yields:
            One seed without cotangent.
        """
        yield Seed(None, 1.0)

    def samples(
        self,
        tape: Tape,
        likelihood: Likelihood,
        outputs: Tensor,
        targets: object = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[list[Sample]]:
        """Yield one list: a sample for each recorded layer, with its output moment.

        Args:
            tape: A recorded forward pass.
            likelihood: The loss.
            outputs: The model's outputs.
            targets: Targets, where the likelihood needs them.
            generator: Unused.

        Yields:
            The samples.
        """
        found: list[Sample] = []
        self.stream(tape, likelihood, outputs, targets, generator, found.append)
        yield found

    def stream(
        self,
        tape: Tape,
        likelihood: Likelihood,
        outputs: Tensor,
        targets: object,
        generator: torch.Generator | None,
        take: Callable[[Sample], None],
    ) -> None:
        """Hand out a sample for each recorded layer, once all of them are known.

        Args:
            tape: A recorded forward pass.
            likelihood: The loss.
            outputs: The model's outputs.
            targets: Targets, where the likelihood needs them.
            generator: Unused.
            take: Called with every sample.

        Raises:
            ValueError: The source is bound to no model, or a layer is too large.
        """
        if self._model is None:
            raise ValueError("source='recursive' walks through the model: bind it first, Recursive().bind(model).")
        links = read_chain(self._model)
        require_still(links)
        tape.refuse_repeated("source='recursive'")
        _require_size(tape, self.limit)
        tolerance = _tolerance(tape, outputs)
        ((_, sample, _),) = self._pulls(tape, likelihood, outputs, targets, generator)
        with torch.no_grad(), torch.autocast(outputs.device.type, enabled=False):
            values = require_float(outputs.detach())
            weights = example_means(likelihood.row_weights(values, targets), len(values))  # type: ignore[arg-type]
            moment = output_hessian(likelihood, values, targets)
            found = _walk(tape, links, values, moment, weights, tolerance)
            require_unbroken(links, tape.feeders(outputs))
            for name in tape.calls:
                take(replace(sample(name, None), output_moment=found[name]))


def output_hessian(likelihood: Likelihood, outputs: Tensor, targets: object = None) -> Tensor:
    """Sum over examples of the sum loss's Hessian in the outputs, from the columns of its roots.

    Args:
        likelihood: The loss; its weights and masks count, its denominator does not.
        outputs: ``[B, *out]``, float32 at least.
        targets: Targets, where the likelihood needs them.

    Returns:
        ``[d, d]`` with ``d`` the number of outputs of an example.

    Raises:
        ValueError: The Hessian is not positive semi-definite.
    """
    if isinstance(likelihood, ElementwiseLikelihood):
        diagonal = likelihood.hessian_diagonal(outputs, targets)  # type: ignore[arg-type]
        if not bool((diagonal >= 0).all()):
            raise ValueError(
                f"{type(likelihood).__name__}.curvature, times its weights, is negative somewhere: a Gauss-Newton "
                "matrix needs a loss that is convex in the outputs."
            )
        return diagonal.reshape(len(outputs), -1).sum(0).diag()
    size = outputs[0].numel()
    total = outputs.new_zeros(size, size)
    for column in likelihood.root_columns(outputs, targets):  # type: ignore[arg-type]
        flat = column.reshape(len(column), -1)
        # A column is zero but for the outputs of one term.
        (term,) = flat.any(0).nonzero(as_tuple=True)
        here = flat[:, term]
        total[term.unsqueeze(1), term] += here.T @ here
    return total


def position_sums(adapter: LayerAdapter, moment: Tensor) -> Tensor:
    """Sum a moment over all numbers of a layer's output to one over its output units.

    Args:
        adapter: The layer.
        moment: ``[d, d]`` over units and positions.

    Returns:
        ``[*stack, d_out, d_out]``: the sum of the blocks on the diagonal of positions, as KFC has it; with
        ``sharing="reduce"`` the sum over all pairs of positions.
    """
    groups, units = adapter.stack[0] if adapter.stack else 1, adapter.d_out
    places = len(moment) // (groups * units)
    other = "s" if adapter.sharing == "reduce" else "t"
    if adapter.channel_dim == 1:
        blocks = moment.reshape(groups, units, places, groups, units, places)
        summed = torch.einsum(f"gctgd{other}->gcd", blocks)
    else:
        summed = torch.einsum(f"tcg{other}dg->gcd", moment.reshape(places, units, groups, places, units, groups))
    return summed if adapter.stack else summed.squeeze(0)


def _walk(
    tape: Tape, links: list[Link], outputs: Tensor, moment: Tensor, weights: Tensor | None, tolerance: float
) -> dict[str, Tensor]:
    """Walk back from the outputs, a stretch from one recorded layer to the next at a time."""
    recorded = [index for index, link in enumerate(links) if link.name in tape.calls]
    if len(recorded) != len(tape.calls):
        missing = sorted(set(tape.calls) - {link.name for link in links})
        raise TapeError(f"Layers {missing} were called, but are not in the chain of modules that was read.")
    found: dict[str, Tensor] = {}
    wanted, what = outputs, "the model's outputs"
    ends = [*recorded[1:], len(links)]
    for start, end in zip(reversed(recorded), reversed(ends), strict=True):
        stretch = links[start:end]
        call = tape.calls[links[start].name]
        call.check()
        values = _replay(stretch, call, len(outputs))
        _compare(values[-1], wanted, stretch, what, tolerance)
        for index in range(len(stretch) - 1, 0, -1):
            shape = values.pop().shape[1:]
            moment = pull_back(stretch[index].module, values[index], moment, shape, weights)
        if not all_finite(moment):
            raise FloatingPointError(not_finite("output moment", links[start].name))
        found[links[start].name] = position_sums(call.adapter, moment)
        if start != recorded[0]:
            moment = pull_back(stretch[0].module, values[0], moment, call.output_shape[1:], weights)
        wanted, what = require_float(call.input), f"the input of {links[start]}"
    return found


def _replay(stretch: list[Link], call: Call, batch: int) -> list[Tensor]:
    """Input of each module of a stretch, and its output, from the recorded input of its first layer."""
    values = [require_float(call.input)]
    for link in stretch:
        values.append(run(link.module, values[-1]))
        mixed = takes_one_example(link.module, values[-2].ndim)
        if mixed or values[-2].shape[0] != batch or values[-1].shape[0] != batch:
            raise ValueError(
                f"source='recursive' needs the examples apart, but {link} takes {tuple(values[-2].shape)} to "
                f"{tuple(values[-1].shape)} in a batch of {batch}: keep the batch first, or use source='sampled'."
            )
    return values


def _compare(found: Tensor, wanted: Tensor, stretch: list[Link], what: str, tolerance: float) -> None:
    """Refuse a forward pass that did something else than the chain says."""
    same = found.shape[0] == wanted.shape[0] and found[0].numel() == wanted[0].numel()
    if same:
        difference = float((found.reshape(wanted.shape) - wanted).abs().max())
        same = difference <= tolerance * float(wanted.abs().max()) + 1e-30
    if not same:
        raise ValueError(
            f"source='recursive' read a chain of modules, but {what} is not what {', '.join(map(str, stretch))} gives: "
            "the forward pass does something else as well (a skip connection, a function, a hook). Use source='exact' "
            "or 'sampled'."
        )


def _tolerance(tape: Tape, outputs: Tensor) -> float:
    """How far replayed values may be from those of the forward pass, relative to the largest."""
    seen = [outputs.dtype, *(call.input.dtype for call in tape.calls.values())]
    reduced = any(dtype not in (torch.float32, torch.float64) for dtype in seen)
    return 5e-2 if reduced or torch.is_autocast_enabled(outputs.device.type) else 1e-3


def _require_size(tape: Tape, limit: int) -> None:
    for name, call in tape.calls.items():
        width = call.output_shape[1:].numel()
        if width > limit:
            size = 8 if call.input.dtype == torch.float64 else 4
            raise ValueError(
                f"source='recursive' keeps a matrix over all outputs of a layer: for layer {name!r}, with outputs "
                f"{tuple(call.output_shape[1:])} of an example, {width}×{width} entries "
                f"({width * width * size / 2**30:.1f} GiB), beyond limit={limit}. Use source='sampled' or 'exact', or "
                "kronfac.sources.Recursive(limit=...) where there is memory for three of them."
            )
