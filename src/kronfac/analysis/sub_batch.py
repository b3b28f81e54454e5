"""How far the statistics of a batch's first examples are from those of the whole batch, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kronfac.analysis.error import NETWORK
from kronfac.approximations import Approximation
from kronfac.estimator import Estimator
from kronfac.forwards import call_model, pick_outputs
from kronfac.likelihoods import Likelihood
from kronfac.measuring import frozen_buffers
from kronfac.operators.passes import RandomStream
from kronfac.processes import alone
from kronfac.sources import Source
from kronfac.sources.part import Part
from kronfac.tape import record

Row = dict[str, Any]


def sub_batch_error(
    model: nn.Module,
    likelihood: Likelihood,
    batch: tuple[Any, Any],
    *,
    examples: Sequence[int] | int,
    approximation: str | Approximation = "kfac",
    source: str | Source = "sampled",
    samples: int = 1,
    sharing: str = "expand",
    norm: str = "unitwise",
    seed: int = 0,
    outputs: Callable[[Any], Tensor] | None = None,
) -> list[Row]:
    """Compare the factors of a batch's first examples, as ``stats_examples=`` takes them, with those of all of it.

    One forward pass is recorded in the model's present mode, and the same labels are pulled back for every part, so
    that the difference is the examples'. Of examples drawn independently, it falls as ``√(1/m − 1/N)``. Running
    statistics are put back.

    Args:
        model: The model.
        likelihood: The loss.
        batch: Inputs and targets (None where nothing needs them).
        examples: Sizes ``m`` of the parts, from 1 to the batch's ``N``, the first dimension of the outputs.
        approximation: Name or object; ``"kfac"`` has the factors ``input`` (A) and ``output`` (G).
        source: Name or object.
        samples: Samples of the sampled source.
        sharing: ``"expand"`` or ``"reduce"``.
        norm: ``"unitwise"`` or ``"full"`` blocks of normalisation layers.
        seed: Seed of the sampled labels, and of dropout's masks in train mode.
        outputs: Picks the output tensor where the model returns something else.

    Returns:
        A row for each size, layer and tensor of the layer's block: ``examples``, ``layer``, ``factor`` (its name) and
        ``error``, ``‖X_m − X_N‖ / ‖X_N‖`` in the Frobenius norm (0 where both are zero); and one for each size and
        factor with the mean over layers, of which ``layer`` is ``"*"``. Batch norm in train mode keeps all examples:
        its own errors are 0.

    Raises:
        ValueError: A size is out of range, or the approximation is one that parts of a batch, or the entries of its
            tensors, say nothing about.
    """

    def fresh() -> Estimator:
        generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
        options: dict[str, Any] = {"approximation": approximation, "source": source, "samples": samples}
        return Estimator(model, likelihood, sharing=sharing, norm=norm, generator=generator, **options)

    whole = fresh()
    kind = whole.approximation
    if kind.whole_batches or whole.joint is not None or any(s.keeps_basis for s in whole.statistics.values()):
        raise ValueError(
            f"approximation={kind.name!r} has no entries to compare: it couples layers, needs all pairs of examples, "
            "or lives in an eigenbasis of its own. Use 'kfac'."
        )
    inputs, targets = batch
    rows: list[Row] = []
    with frozen_buffers(model):
        with RandomStream(model, seed)(), torch.enable_grad(), record(whole.adaptation.adapters) as tape:
            found = pick_outputs(call_model(model, inputs), outputs)
        sizes = _check_sizes([examples] if isinstance(examples, int) else list(examples), len(found))
        whole.update(tape, found, targets)
        wanted = _tensors(whole)
        for size in sizes:
            estimator = fresh()
            part = Part(size, len(found), cut=True) if size < len(found) else None
            estimator.update(tape, found, targets, part=part)
            rows += _compare(_tensors(estimator), wanted, size)
    return rows


def _check_sizes(sizes: list[int], most: int) -> list[int]:
    for size in sizes:
        if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= most:
            raise ValueError(f"examples: {size!r} is no integer from 1 to the {most} examples given.")
    return sizes


@alone()
def _tensors(estimator: Estimator) -> dict[tuple[str, str], Tensor]:
    blocks = estimator.curvature().blocks
    return {(name, key): tensor for name, block in blocks.items() for key, tensor in block.tensors().items()}


def _compare(found: dict[tuple[str, str], Tensor], wanted: dict[tuple[str, str], Tensor], size: int) -> list[Row]:
    rows: list[Row] = []
    errors: dict[str, list[float]] = {}
    for (layer, factor), tensor in wanted.items():
        error = _relative(found[layer, factor], tensor)
        errors.setdefault(factor, []).append(error)
        rows.append({"examples": size, "layer": layer, "factor": factor, "error": error})
    means = {factor: sum(each) / len(each) for factor, each in errors.items()}
    return rows + [{"examples": size, "layer": NETWORK, "factor": factor, "error": e} for factor, e in means.items()]


def _relative(found: Tensor, wanted: Tensor) -> float:
    """``‖X_m − X_N‖ / ‖X_N‖``; 0 if both are zero, as for a unit that is never on."""
    distance, norm = float((found - wanted).norm()), float(wanted.norm())
    return distance / norm if norm else (math.inf if distance else 0.0)
