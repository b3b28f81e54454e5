"""The approximation error while a network is trained, beside theory's bounds (Gao et al. 2020, Figure 2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from kronfac.analysis.error import NETWORK, Row, approximation_error
from kronfac.analysis.exact import gather
from kronfac.analysis.measurement import along_training
from kronfac.analysis.scene import Scene, methods_of, sources_of
from kronfac.approximations import Approximation
from kronfac.approximations.bounds import kfac_error_bound, tkfac_error_bound
from kronfac.likelihoods import Likelihood
from kronfac.sources import Source

#: Bounds on the errors of the approximations that have one.
_BOUNDS = {"kfac": kfac_error_bound, "tkfac": tkfac_error_bound}


def error_during_training(
    model: nn.Module,
    likelihood: Likelihood,
    data: Iterable[Any] | tuple[Any, Any],
    advance: Callable[[], object],
    *,
    steps: int,
    every: int,
    approximations: Sequence[str | Approximation] | str | Approximation | None = None,
    source: str | Source = "exact",
    samples: int = 1,
    layers: Sequence[str] | None = None,
    bounds: bool = True,
    seed: int = 0,
    outputs: Callable[[Any], Tensor] | None = None,
    memory_limit: int = 1 << 31,
    record: Callable[[int, list[Row]], object] | None = None,
) -> list[Row]:
    """Measure the Frobenius error of every layer's block before training, after every few steps, and at the end.

    The curvature is that of `data`, the same at all times, with the model in eval mode.

    Args:
        model: The model that `advance` trains; its mode is restored.
        likelihood: The loss.
        data: A pair of inputs and targets, or a list of pairs.
        advance: Does one step of training.
        steps: Steps of training.
        every: Steps between measurements.
        approximations: Names or objects; None for every one that is registered.
        source: Name or object; ``"exact"`` as in the paper leaves the error of the approximation alone.
        samples: Samples of the sampled source.
        layers: Names of the layers to look at; all by default.
        bounds: Whether to compute the bounds on the error of K-FAC and TKFAC too.
        seed: Seed of sampled labels.
        outputs: Takes the output tensor out of what the model returns.
        memory_limit: Bytes that the exact analysis may take.
        record: Called with the step and its rows after each measurement.

    Returns:
        Rows as those of `approximation_error`, without updates, with two more columns: ``step``, and ``bound`` on
        ``distance`` for approximations that have one (equation of Theorem 4.4, corrected, and its counterpart for
        K-FAC), over pairs of rows and cotangents of the exact source; None for layers with several positions. The
        network's row adds the layers' errors (``distance_sum``, what the paper draws) and bounds.

    Raises:
        ValueError: ``steps`` or ``every`` is out of range, or `approximation_error` refuses.
    """  # noqa: DOC502 - helpers raise it
    methods, (origin,) = methods_of(approximations), sources_of([source], samples)
    batches = data if isinstance(data, tuple) else list(data)

    def measure(step: int) -> list[Row]:
        with _evaluating(model):
            found = approximation_error(
                model,
                likelihood,
                batches,
                approximations=methods,
                sources=[origin],
                layers=layers,
                seed=seed,
                outputs=outputs,
                updates=False,
                memory_limit=memory_limit,
            )
            known = _bounds(model, likelihood, batches, layers, outputs, memory_limit) if bounds else {}
        found = [{"step": step, **row} | {"bound": None, "distance_sum": None} for row in found]
        _add_bounds(found, known)
        if record is not None:
            record(step, found)
        return found

    return along_training(advance, steps, every, measure)


def _add_bounds(rows: list[Row], known: dict[str, dict[str, float]]) -> None:
    for method in dict.fromkeys(row["approximation"] for row in rows):
        own = [row for row in rows if row["approximation"] == method]
        layers = [row for row in own if row["layer"] != NETWORK]
        for row in layers:
            row["bound"] = known.get(method, {}).get(row["layer"])
        for row in own:
            if row["layer"] == NETWORK and row["refused"] is None:
                row["distance_sum"] = sum(each["distance"] for each in layers)
                if all(each["bound"] is not None for each in layers):
                    row["bound"] = sum(each["bound"] for each in layers)


def _bounds(
    model: nn.Module,
    likelihood: Likelihood,
    data: Any,
    layers: Sequence[str] | None,
    outputs: Callable[[Any], Tensor] | None,
    memory_limit: int,
) -> dict[str, dict[str, float]]:
    """``{approximation: {layer: bound}}``."""
    scene = Scene.of(model, likelihood, data, layers=layers, outputs=outputs)
    pairs = gather(scene, memory_limit, keep_pairs=True).pairs
    return {
        method: {layer: float(function(a, u)) for layer, (a, u) in pairs.items()}
        for method, function in _BOUNDS.items()
    }


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
