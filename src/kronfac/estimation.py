"""``estimate``: the curvature of the loss over a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from kronfac import processes
from kronfac.approximations import Approximation, JointApproximation
from kronfac.curvature import BlockDiagonal
from kronfac.curvature_coupled import CoupledCurvature
from kronfac.eager import eager_root
from kronfac.estimator import Estimator
from kronfac.examples import check_examples
from kronfac.forwards import batches_of, call_model, pick_outputs, with_progress
from kronfac.likelihoods import Likelihood
from kronfac.measuring import frozen_buffers, refuse_inference_mode
from kronfac.operators.passes import RandomStream
from kronfac.sources import Source
from kronfac.tape import record


@overload
def estimate(  # type: ignore[overload-overlap]  # the name is a str as well
    model: nn.Module,
    likelihood: Likelihood,
    loader: Iterable[Any] | tuple[Any, Any],
    *,
    approximation: Literal["kfac_tridiagonal", "kkfac"] | JointApproximation,
    source: str | Source = "sampled",
    samples: int = 1,
    sharing: str = "expand",
    norm: str = "unitwise",
    seed: int = 0,
    outputs: Callable[[Any], Tensor] | None = None,
    progress: bool = False,
) -> CoupledCurvature: ...


@overload
def estimate(
    model: nn.Module,
    likelihood: Likelihood,
    loader: Iterable[Any] | tuple[Any, Any],
    *,
    approximation: str | Approximation = "kfac",
    source: str | Source = "sampled",
    samples: int = 1,
    sharing: str = "expand",
    norm: str = "unitwise",
    seed: int = 0,
    outputs: Callable[[Any], Tensor] | None = None,
    progress: bool = False,
) -> BlockDiagonal: ...


def estimate(
    model: nn.Module,
    likelihood: Likelihood,
    loader: Iterable[Any] | tuple[Any, Any],
    *,
    approximation: str | Approximation = "kfac",
    source: str | Source = "sampled",
    samples: int = 1,
    sharing: str = "expand",
    norm: str = "unitwise",
    seed: int = 0,
    outputs: Callable[[Any], Tensor] | None = None,
    progress: bool = False,
) -> BlockDiagonal | CoupledCurvature:
    """Estimate the curvature of the loss over a data set.

    The loss is what the likelihood's ``reduction`` says over all data given: sums over batches are divided by the sum
    of denominators, never averages averaged.  The model's mode is left as it is, running statistics are put back, and
    torch's random state is not touched.

    In a distributed run every process must call it, with its own data: sums are over all of them.

    Approximations of several passes (EKFAC: factors, then the values in their eigenbasis) read the loader that often,
    and draw new labels each time.

    Args:
        model: The model; of one that was compiled, or wrapped for parallel runs, it is the module inside.
        likelihood: The loss.
        loader: Iterable of ``(inputs, targets)``, or a single pair. Inputs may be a tensor, a tuple of arguments or
            a mapping of keyword arguments. A pair of a tuple of arguments and a tuple ``(targets, mask)`` looks like
            two batches and must be in a list.
        approximation: A name of ``kronfac.approximations.APPROXIMATIONS``, such as ``"kfac"``, ``"tkfac"``,
            ``"ekfac"``, ``"diagonal"`` or ``"dense"``, or an object.
        source: ``"sampled"`` (Fisher), ``"root"`` (the same by random signs), ``"exact"`` (Gauss-Newton),
            ``"empirical"``, ``"forward_only"``, ``"recursive"`` (KFRA) or an object.
        samples: Samples per example of the sampled source.
        sharing: ``"expand"`` or ``"reduce"`` (Eschenhagen et al. 2023).
        norm: ``"unitwise"`` or ``"full"`` blocks of normalisation layers.
        seed: Seed of the sampled labels, and of dropout's masks where it is in train mode.
        outputs: Picks the output tensor where the model returns something else.
        progress: Show a progress bar.

    Returns:
        The curvature as an operator on the parameters; a `kronfac.BlockTridiagonal` for ``"kfac_tridiagonal"`` and a
        `kronfac.curvature_coupled.CoupledCurvature` for ``"kkfac"``, which couple layers.

    Raises:
        TypeError: ``seed`` is no integer.
        ValueError: The loader is empty, or cannot be read as often as needed, or anything does not fit.
    """
    refuse_inference_mode("kronfac.estimate")
    first = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    device = torch.device("cpu") if first is None else first.device
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed={seed!r} must be an integer.")
    model = eager_root(model)  # in which the hooks of layers are heard
    estimator = Estimator(
        model,
        likelihood,
        approximation=approximation,
        source=source,
        samples=samples,
        sharing=sharing,
        norm=norm,
    )
    estimator.warn_uncovered("No curvature for")
    passes = estimator.approximation.passes
    if passes > 1 and isinstance(loader, Iterator):
        raise ValueError(_readable(estimator.approximation, f"is a {type(loader).__name__}, which can be read once"))
    batches = 0
    called: set[str] = set()
    for index in range(passes):
        if index:
            _require_in_all(estimator)
            estimator.next_pass()
        # Labels of their own in every pass: values are unbiased if they are independent of their eigenbasis.
        estimator.generator = torch.Generator(device).manual_seed(_seed_of_pass(seed, index))
        draws = RandomStream(model, _seed_of_pass(seed, index))
        count = _read(estimator, loader, outputs, progress, called, draws)
        if index and count != batches:
            raise ValueError(_readable(estimator.approximation, f"gave {batches} batches first and {count} afterwards"))
        if count == 0 and not processes.several():  # others would wait for one that has left, and may have some
            raise ValueError("loader is empty: no batch to estimate curvature from.")
        batches = count
    _require_terms(estimator, called)
    # Each batch's sum counts with weight one; the loss is the sum over all of them.
    whole = processes.sum_of(float(batches), device) if likelihood.reduction == "sum" else 1.0
    if estimator.joint is not None:
        coupled = estimator.coupled_curvature()
        return coupled.scale(whole) if likelihood.reduction == "sum" else coupled
    curvature = estimator.curvature()
    if likelihood.reduction == "sum":
        scaled = {name: block.scale(whole) for name, block in curvature.blocks.items()}
        curvature = BlockDiagonal(
            scaled, estimator.adaptation.adapters, estimator.adaptation.order, options=estimator.options
        )
    return curvature


def _read(
    estimator: Estimator,
    loader: Any,
    outputs: Callable[[Any], Tensor] | None,
    progress: bool,
    called: set[str],
    draws: RandomStream,
) -> int:
    """Take in all of a loader once, note the layers that are called, and return its number of batches."""
    count = 0
    with frozen_buffers(estimator.model):
        for inputs, targets in with_progress(batches_of(loader), loader, progress):
            with draws(), torch.enable_grad(), record(estimator.adaptation.adapters) as tape:
                out = pick_outputs(call_model(estimator.model, inputs), outputs)
            tape.meet(out)
            if not called:
                check_examples(estimator, tape, inputs, out, outputs, targets)
            tape.disposable = True
            estimator.update(tape, out, targets)
            called.update(tape.calls)
            count += 1
    return count


def _require_in_all(estimator: Estimator) -> None:
    """Refuse layers that only some processes have statistics of, before all of them agree on a basis."""
    layers = estimator.statistics
    some = estimator.in_any_process([not statistic.empty for statistic in layers.values()])
    none = estimator.in_any_process([statistic.empty for statistic in layers.values()])
    if partly := [name for name, has, lacks in zip(layers, some, none, strict=True) if has and lacks]:
        raise RuntimeError(
            f"The forward passes of some processes called layers {partly}, those of others never did, which "
            f"approximation={estimator.approximation.name!r} cannot do with: call them in each process, freeze them "
            "(requires_grad=False), or estimate in one process."
        )


def _require_terms(estimator: Estimator, called: set[str]) -> None:
    """Refuse a mean over no rows at all, which a layer that was called has where no term of the loss counts."""
    layers, joint = list(estimator.adaptation.adapters), estimator.joint
    if joint is not None:
        flags = [joint.empty and called >= set(layers)] * len(layers)
    else:
        flags = [name in called and estimator.statistics[name].empty for name in layers]
    if empty := [name for name, flag in zip(layers, estimator.in_any_process(flags), strict=True) if flag]:
        raise ValueError(
            f"No statistics for layers {empty}: every target is ignored, or masked, or has weight 0, so that none of "
            "their inputs counts. Leave such data out, or check ignore_index, mask and class weights."
        )


def _readable(approximation: Approximation, fault: str) -> str:
    return (
        f"approximation={approximation.name!r} reads the data {approximation.passes} times, but the loader {fault}; "
        "pass a list of pairs or a DataLoader."
    )


def _seed_of_pass(seed: int, index: int) -> int:
    # Far from the seeds that a caller who counts upwards would use.
    return seed if index == 0 else (seed + index * 0x9E3779B97F4A7C15) % 2**63
