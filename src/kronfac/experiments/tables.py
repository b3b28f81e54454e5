"""Tables of a comparison, as pandas frames: one job each, no drawing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from kronfac.experiments.errors import need
from kronfac.experiments.optimizers import get_optimizer
from kronfac.experiments.problems import get_problem
from kronfac.experiments.results import Results, RunResult, best_point

if TYPE_CHECKING:
    import pandas as pd

#: How far a run has come: columns of tables, and what an evaluation calls them.
EXTENT = {"steps": "step", "epochs": "epoch", "seconds": "seconds"}


def in_percent(metric: str) -> bool:
    """Tell which figures of an evaluation are percentages: errors that are counted, not measured.

    Args:
        metric: The name of a metric.

    Returns:
        Whether it is one.
    """
    return metric.endswith("_error") and not metric.endswith("squared_error")


def curves(results: Results) -> pd.DataFrame:
    """List every evaluation of every final run.

    Args:
        results: The comparison.

    Returns:
        A row per evaluation: ``optimizer`` (its title), ``seed``, ``step``, ``epoch``, ``seconds`` and the metrics.
    """
    rows = [
        {"optimizer": get_optimizer(run.settings.optimizer).title, "seed": run.settings.seed, **record}
        for run in results.runs
        for record in run.evaluations
    ]
    columns = [
        "optimizer",
        "seed",
        "step",
        "epoch",
        "seconds",
        "batch_loss",
        *get_problem(results.plan.problem).metrics,
    ]
    return need("pandas", "experiments").DataFrame(rows, columns=columns)


def summary(results: Results) -> pd.DataFrame:
    """Summarise each optimiser by the means over its seeds.

    Args:
        results: The comparison.

    Returns:
        A row per optimiser: ``optimizer``, ``status``, the final value of every metric, the compared metric's standard
        deviation over seeds (``spread``) and its value when the fastest optimiser had finished (``at_equal_seconds``),
        ``equal_seconds``, ``steps``, ``epochs``, ``seconds`` and ``ms_per_step``. Diverged runs enter no mean.
    """
    metric, rows = results.plan.metric, []
    shared = _shared_seconds(results)
    for name in results.plan.optimizers:
        runs = [run for run in results.of(name) if run.evaluations and run.status != "diverged"]
        last = [run.evaluations[-1] for run in runs]
        values = [record[metric] for record in last]
        row: dict[str, object] = {"optimizer": get_optimizer(name).title, "status": _status(results, name)}
        row |= {key: mean([record[key] for record in last]) for key in get_problem(results.plan.problem).metrics}
        row["spread"] = _deviation(values)
        at_shared = [_value_at(run, metric, shared[run.settings.seed]) for run in runs]
        row["at_equal_seconds"] = mean(at_shared)
        row["equal_seconds"] = mean([shared[run.settings.seed] for run in runs])
        row |= {key: mean([record[source] for record in last]) for key, source in EXTENT.items()}
        steps, seconds = row["steps"], row["seconds"]
        row["ms_per_step"] = 1000 * seconds / steps if steps else math.nan  # type: ignore[operator]
        rows.append(row)
    return need("pandas", "experiments").DataFrame(rows)


def reaches(results: Results) -> pd.DataFrame:
    """Say when each optimiser reaches what each other one has in the end.

    The target is the other's final value of the compared metric, seed by seed, once it is done. Ratios are to the
    steps and seconds at which the other *first* had that value itself, which may be before its end; so noise in the
    last evaluation does not flatter anybody. Times are those of the first evaluation at or below the target, without
    interpolation.

    Args:
        results: The comparison.

    Returns:
        A row per ordered pair: ``optimizer``, ``target_of``, ``target``, ``reached`` and ``seeds`` (how many runs of
        how many), and the means over seeds of ``steps``, ``seconds``, ``epochs`` and of their ratios ``steps_ratio``,
        ``seconds_ratio``, ``epochs_ratio``; these are NaN unless every seed reached the target.
    """
    rows = []
    for name in results.plan.optimizers:
        for other in results.plan.optimizers:
            pairs = _pairs(results, name, other)
            if name == other or not pairs:
                continue
            rows.append(
                {"optimizer": get_optimizer(name).title, "target_of": get_optimizer(other).title}
                | _reach(pairs, results.plan.metric)
            )
    return need("pandas", "experiments").DataFrame(rows, columns=_REACH_COLUMNS)


_RATIOS = [f"{key}_ratio" for key in EXTENT]
_REACH_COLUMNS = ["optimizer", "target_of", "target", "reached", "seeds", *EXTENT, *_RATIOS]


def grid_table(results: Results, optimizer: str) -> pd.DataFrame:
    """List the grid of an optimiser.

    Args:
        results: The comparison.
        optimizer: The optimiser's name.

    Returns:
        A row per point: the varied hyper-parameters, ``final`` (the compared metric; NaN if diverged), ``status`` and
        ``chosen``.
    """
    points, metric = results.grids[optimizer], results.plan.metric
    best = best_point(points, metric)
    rows = [
        {
            **point.varied,
            "final": value if math.isfinite(value := point.result.final(metric)) else math.nan,
            "status": point.result.status,
            "chosen": point is best,
        }
        for point in points
    ]
    return need("pandas", "experiments").DataFrame(rows)


def headlines(results: Results) -> list[str]:
    """Put the comparison into sentences about the optimiser with the best final metric.

    Args:
        results: The comparison.

    Returns:
        One sentence per other optimiser, none before two optimisers have finished; and one if runs are the work of
        other numbers of threads, whose numbers another run would not repeat to the last digit.
    """
    return [*_sentences(results), *_threads(results)]


def _threads(results: Results) -> list[str]:
    runs = {run.settings.folder_name: run for run in results.runs}
    runs |= {point.result.settings.folder_name: point.result for points in results.grids.values() for point in points}
    wanted = results.plan.threads
    others = [run for run in runs.values() if set(run.threads) - {wanted}]
    if not others:
        return []
    numbers = ", ".join(str(number) for number in sorted({n for run in others for n in run.threads} - {wanted}))
    return [
        f"{len(others)} of {len(runs)} runs were trained, in whole or in part, with another number of threads than "
        f"{wanted} ({numbers}): their last digits may be others than those of one number of threads"
    ]


def _sentences(results: Results) -> list[str]:
    table = summary(results).dropna(subset=[results.plan.metric])
    table = table[~table["status"].str.contains("unfinished")]
    if len(table) < 2:
        return []
    best = table.sort_values(results.plan.metric).iloc[0]["optimizer"]
    what = results.plan.metric.replace("_", " ").replace("train", "training")
    unit = " %" if in_percent(results.plan.metric) else ""
    sentences = []
    for row in reaches(results).to_dict("records"):
        if row["optimizer"] != best or row["target_of"] not in set(table["optimizer"]):
            continue
        reached = f"{best} reaches {row['target_of']}'s final {what}"
        if row["reached"] < row["seeds"]:
            sentences.append(f"{reached} for {row['reached']} of {row['seeds']} seeds")
        elif math.isnan(row["steps_ratio"]):
            sentences.append(
                f"{reached} ({row['target']:.4g}{unit}), which {row['target_of']} had before its first step"
            )
        else:
            sentences.append(
                f"{reached} ({row['target']:.4g}{unit}) in {row['steps_ratio']:.2f} of its steps and "
                f"{row['seconds_ratio']:.2f} of its seconds"
            )
    return sentences


def _pairs(results: Results, name: str, other: str) -> list[tuple[RunResult, RunResult]]:
    ended = [run for run in results.of(other) if run.status == "done"]
    targets = {run.settings.seed: run for run in ended if math.isfinite(run.final(results.plan.metric))}
    return [
        (run, targets[run.settings.seed])
        for run in results.of(name)
        if run.evaluations and run.settings.seed in targets
    ]


def _reach(pairs: Sequence[tuple[RunResult, RunResult]], metric: str) -> dict[str, object]:
    targets = [other.final(metric) for _, other in pairs]
    own = [first_at(run, metric, target) for (run, _), target in zip(pairs, targets, strict=True)]
    others = [first_at(other, metric, target) for (_, other), target in zip(pairs, targets, strict=True)]
    reached = [(a, b) for a, b in zip(own, others, strict=True) if a is not None and b is not None]
    row: dict[str, object] = {"target": mean(targets), "reached": len(reached), "seeds": len(pairs)}
    for key, source in EXTENT.items():
        complete = reached if len(reached) == len(pairs) else []
        row[key] = mean([a[source] for a, _ in complete])
        row[f"{key}_ratio"] = mean([a[source] / b[source] if b[source] else math.nan for a, b in complete])
    return row


def first_at(run: RunResult, metric: str, target: float) -> Mapping[str, float] | None:
    """Find the first evaluation at or below a value.

    Args:
        run: The run.
        metric: The metric.
        target: The value.

    Returns:
        The evaluation, or None.
    """
    return next((record for record in run.evaluations if record[metric] <= target), None)


def _shared_seconds(results: Results) -> dict[int, float]:
    """For each seed, the seconds after which the first of the optimisers had finished."""
    shared: dict[int, float] = {}
    for run in results.runs:
        if run.evaluations and run.status != "diverged":
            seconds = run.evaluations[-1]["seconds"]
            shared[run.settings.seed] = min(seconds, shared.get(run.settings.seed, math.inf))
    return shared


def _value_at(run: RunResult, metric: str, seconds: float) -> float:
    return [record[metric] for record in run.evaluations if record["seconds"] <= seconds][-1]


def _status(results: Results, name: str) -> str:
    if name not in results.chosen:
        return "untuned"
    states = [run.status for run in results.of(name)]
    if len(set(states)) == 1:
        return states[0]
    return ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states)))


def mean(values: Sequence[float]) -> float:
    """Return the mean of the values; NaN if there are none."""
    return sum(values) / len(values) if values else math.nan


def _deviation(values: Sequence[float]) -> float:
    if len(values) < 2:
        return math.nan
    middle = mean(values)
    return math.sqrt(sum((value - middle) ** 2 for value in values) / (len(values) - 1))
