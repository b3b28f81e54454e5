"""``verify``: the curvature of a probe batch against the exact Gauss-Newton matrix, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kronfac import reference
from kronfac.approximations import KFAC, Approximation, get_approximation
from kronfac.approximations.joint import require_per_layer
from kronfac.blocks import Block, DiagonalKronecker, Kronecker, ScaledKronecker
from kronfac.curvature import BlockDiagonal
from kronfac.eager import eager_root
from kronfac.estimation import estimate
from kronfac.estimator import without_coverage_warnings
from kronfac.forwards import call_model, pick_outputs
from kronfac.inspect import seeds
from kronfac.inspect.budget import Budget
from kronfac.inspect.comparison import Comparison, compare, ratio
from kronfac.inspect.factors import gradient_traces, input_ratio, matrices, output_trace, output_traces, part_of
from kronfac.inspect.sampling import Spread, measure_spreads, single
from kronfac.inspect.verified import LayerCheck, VerificationReport
from kronfac.layers import LayerAdapter, adapt_model
from kronfac.likelihoods import Likelihood
from kronfac.measuring import apart_from_training, couples_examples, frozen_buffers, refuse_inference_mode
from kronfac.processes import alone
from kronfac.sources import Empirical, ForwardOnly, Recursive, Sampled, Seed, Source, align_weights, get_source
from kronfac.tape import Tape, record


def verify(
    model: nn.Module,
    likelihood: Likelihood,
    batch: tuple[Any, Any],
    *,
    approximation: str | Approximation = "kfac",
    source: str | Source = "sampled",
    samples: int = 1,
    seed: int = 0,
    sharing: str = "expand",
    norm: str = "unitwise",
    outputs: Callable[[Any], Tensor] | None = None,
    memory_limit: int = 1 << 31,
) -> VerificationReport:
    """Estimate the curvature of a probe batch as training would, and compare it with the exact Gauss-Newton matrix.

    The exact matrix ``F = (1/D) Σ_n J_nᵀ H_n J_n`` comes from `kronfac.reference.per_example_roots`: the loss
    differentiated by `torch.func`, which knows nothing of layers and factors. No matrix over the parameters is formed,
    so that layers may be large; the time is that of one backward pass per output of each example and per group of
    layers that fits into `memory_limit`. A batch of a few examples is enough.

    The model is compared in the mode it is in. Batch norm in train mode couples the examples: ``F`` then
    differentiates through the whole batch, while the blocks treat examples as independent, and the report shows the
    difference; ``verify(model.eval(), ...)`` is without it. A model whose forward is random (dropout in train mode) is
    refused, and so are sources that estimate another matrix, and batches beyond `memory_limit`. Where the Hessian in
    the outputs depends on the label (a predicted variance), ``H_n`` is its expectation, by the likelihood's
    ``label_atoms``.

    Args:
        model: The model.
        likelihood: The loss.
        batch: ``(inputs, targets)``, inputs as for `kronfac.estimate`.
        approximation: Name or object.
        source: ``"sampled"``, ``"exact"``, ``"recursive"`` or an object.
        samples: Samples of the sampled source. Its expected error is measured by drawing 16 times more.
        seed: Seed of the sampled labels.
        sharing: ``"expand"`` or ``"reduce"``.
        norm: ``"unitwise"`` or ``"full"`` blocks of normalisation layers.
        outputs: Picks the output tensor where the model returns something else.
        memory_limit: Bytes that the exact matrix's roots may take; batches that need more are refused.

    Returns:
        The report.
    """
    model = eager_root(model)
    method, drawn = get_approximation(approximation), get_source(source, samples)
    require_per_layer(method, "verify")
    inputs, targets = _check(model, batch, drawn)
    adaptation = adapt_model(model, sharing=sharing, norm=norm)

    def curvature_from(origin: Source, number: int) -> BlockDiagonal:
        with without_coverage_warnings(), alone():
            return estimate(
                model,
                likelihood,
                [(inputs, targets)],
                approximation=method,
                source=origin,
                seed=number,
                sharing=sharing,
                norm=norm,
                outputs=outputs,
            )

    def run() -> Tensor:
        with apart_from_training():
            return pick_outputs(call_model(model, inputs), outputs)

    values = _probe(model, run)
    curvature = curvature_from(drawn, seed)
    groups = Budget(values, memory_limit).groups(curvature)
    seeds_checked = seeds.check(single(drawn), likelihood, values, targets, seed)
    given = seeds.draw(single(drawn), likelihood, values, targets, seed)
    random = not drawn.exact and not isinstance(drawn, Recursive)
    one = curvature_from(seeds.Replay(given), seed) if random else curvature
    with frozen_buffers(model), torch.enable_grad(), record(adaptation.adapters) as tape:
        graph = run()
        tape.close()
        tape.meet(graph)
        parts = {name: part_of(method, tape.adapters[name]) for name in one.blocks}
        factored = [name for name, block in one.blocks.items() if _factored(parts[name], block)]
        known = bool(factored) and not _averages(drawn, values)
        traces = output_traces(tape, graph, given, apart=not random) if known else {}
        checks = _factored_checks(one, factored, tape, traces, graph.detach(), likelihood, targets, seed)
        scaled = [name for name, block in one.blocks.items() if isinstance(block, ScaledKronecker)]
        if scaled:
            deltas = output_traces(tape, graph, given, apart=drawn.exact, inputs=scaled)
            checks |= _scale_checks(one, scaled, deltas, float(likelihood.denominator(graph.detach(), targets)))
        others = [n for n, part in parts.items() if part.keeps_trace and n not in factored + scaled]
        if others and not couples_examples(model):
            checks |= _trace_checks(one, others, graph, likelihood, targets, given)
    spreads = measure_spreads(curvature_from, drawn, seed, means=method.passes == 1) if random else {}
    rows = []
    for layers in groups:
        wanted = {name for layer in layers for name in curvature.layouts[layer].parameter_names}
        names = [name for name in adaptation.order if name in wanted]
        with torch.no_grad():
            roots = reference.per_example_roots(
                model, likelihood, inputs, targets, names, outputs=outputs, expected=True
            )
        for layer in layers:
            block, adapter = curvature.blocks[layer].to(dtype=torch.float64), curvature.layouts[layer]
            assert isinstance(adapter, LayerAdapter)
            found = compare(block, matrices(adapter, roots, names, model))
            rows.append(_row(layer, block, found, checks.get(layer, {}), spreads.get(layer)))
    settings = {"approximation": method.name, "source": drawn.name, "sharing": sharing, "norm": norm}
    if isinstance(drawn, Sampled):
        settings |= {"samples": drawn.count, "seed": seed}  # type: ignore[dict-item]
    settings |= {"examples": len(values), "roots": values.numel()}  # type: ignore[dict-item]
    other = [name for name, call in tape.calls.items() if len(call.input) != len(values)]
    notes = _notes(model, method, other, adaptation.uncovered)
    if _averages(drawn, values):
        notes += (_AVERAGED,)
    return VerificationReport(tuple(rows), settings, seeds_checked, adaptation.uncovered, notes)


def _check(model: nn.Module, batch: Any, source: Source) -> tuple[Any, Any]:
    refuse_inference_mode("kronfac.verify")
    if isinstance(source, (Empirical, ForwardOnly)):
        raise ValueError(
            f"source={source.name!r} does not estimate the Gauss-Newton matrix, with which verify compares; use "
            "source='sampled' or 'exact'."
        )
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise TypeError(
            f"batch must be a pair (inputs, targets), not {type(batch).__name__}; take one from a loader by "
            "next(iter(loader))."
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}.")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"Parameter {name!r} is {parameter.dtype}: verify needs float32 or float64, such as "
                "copy.deepcopy(model).float()."
            )
    return batch[0], batch[1]


def _probe(model: nn.Module, run: Callable[[], Tensor]) -> Tensor:
    """Outputs of the model; refuse one whose forward is random."""
    with frozen_buffers(model), torch.enable_grad():  # as in training: attention takes another path without gradients
        first, second = run().detach(), run().detach()
    if first.shape != second.shape or float((first - second).abs().max()) > 1e-3 * float(first.abs().max()):
        raise ValueError(
            "Two forward passes over the same batch give different outputs, so that there is no one matrix to compare "
            "with: dropout in train mode? Use model.eval(), or set its p to 0."
        )
    return first


def _factored(approximation: Approximation, block: Block) -> bool:
    """Whether the factors are K-FAC's own, whose definition is checked."""
    return isinstance(approximation, KFAC) and isinstance(block, (Kronecker, DiagonalKronecker))


def _factored_checks(
    curvature: BlockDiagonal,
    layers: list[str],
    tape: Tape,
    traces: Mapping[str, float],
    values: Tensor,
    likelihood: Likelihood,
    targets: Any,
    seed: int,
) -> dict[str, dict[str, float]]:
    """Both factors of the layers over their exact values."""
    denominator, weights = float(likelihood.denominator(values, targets)), likelihood.row_weights(values, targets)
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name in layers:
        block, call = curvature.blocks[name], tape.calls[name]
        # Weights are those of examples: without a dimension of examples in front there is nothing to compare with.
        known = weights is None or len(call.input) == len(values)
        rows = align_weights(call.adapter, call.input, weights) if known else None
        found[name] = {"input_factor": input_ratio(block, call, rows, generator) if known else math.nan}
        if name in traces:
            found[name]["output_factor"] = ratio(output_trace(block), traces[name] / denominator)
    return found


def _scale_checks(
    curvature: BlockDiagonal, scaled: list[str], deltas: Mapping[str, float], denominator: float
) -> dict[str, dict[str, float]]:
    """Traces of TKFAC's blocks over what they are defined to be, positions taken as uncorrelated."""
    traces = {name: float(curvature.blocks[name].trace()) for name in scaled}
    return {name: {"trace_factor": ratio(trace, deltas[name] / denominator)} for name, trace in traces.items()}


def _trace_checks(
    curvature: BlockDiagonal,
    layers: list[str],
    outputs: Tensor,
    likelihood: Likelihood,
    targets: Any,
    given: list[Seed],
) -> dict[str, dict[str, float]]:
    """Traces of the blocks that are no Kronecker products over their exact values."""
    denominator = float(likelihood.denominator(outputs.detach(), targets))
    adapters = {name: curvature.layouts[name] for name in layers}
    # PyTorch 2.13 dies of group norm's derivative for channels last where only those of scale and shift are asked for.
    fragile = any(
        isinstance(layout, LayerAdapter) and isinstance(layout.module, nn.GroupNorm) for layout in adapters.values()
    )
    parameters: dict[str, Tensor] = {}
    for adapter in (curvature.layouts if fragile else adapters).values():
        assert isinstance(adapter, LayerAdapter)
        parameters |= adapter.parameters
    traces = gradient_traces(parameters, outputs, given)
    exact = {name: sum(traces[key] for key in adapter.parameter_names) for name, adapter in adapters.items()}
    return {
        name: {"trace_factor": ratio(float(curvature.blocks[name].trace()), value / denominator)}
        for name, value in exact.items()
    }


_AVERAGED = (
    "source='recursive' averages over the examples at every layer: output factors are exact for one example only, and "
    "are not checked by themselves here; verify a batch of one example to check the recursion"
)


def _averages(source: Source, values: Tensor) -> bool:
    """Whether output factors are approximations by themselves."""
    return isinstance(source, Recursive) and len(values) > 1


def _row(layer: str, block: Block, found: Comparison, checks: Mapping[str, float], spread: Spread | None) -> LayerCheck:
    spread = spread or Spread()
    return LayerCheck(
        layer=layer,
        block=block.kind,
        parameters=block.shape.numel(),
        cosine=found.cosine,
        scale=found.scale,
        error=found.error,
        scale_sampling=spread.trace / found.trace if found.trace else 0.0,
        error_sampling=spread.norm / found.norm if found.norm else 0.0,
        left_out=found.left_out,
        input_factor=checks.get("input_factor"),
        output_factor=checks.get("output_factor"),
        trace_factor=checks.get("trace_factor"),
        norm_ratio=ratio(found.block_norm, found.norm),
    )


def _notes(model: nn.Module, method: Approximation, other: list[str], uncovered: Mapping[str, str]) -> tuple[str, ...]:
    notes = []
    if couples_examples(model):
        notes.append(
            "batch norm in train mode couples the examples: F differentiates through the whole batch, "
            + ("and so do the blocks" if method.couples_examples else "while the blocks treat examples as independent")
        )
    if other:
        notes.append(
            f"not called with examples in front: {', '.join(other)}; for these rows of different examples are mixed, "
            "which only sampled cotangents, K-FAC's blocks with sharing='expand' and a loss without weights allow"
        )
    if uncovered:
        notes.append(f"not compared, without a block: {', '.join(uncovered)} (see kronfac.coverage)")
    return tuple(notes)
