"""Several strategies on one stream: runs, tables, pictures and report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from kronfac.experiments.continual.plans import Budget, Done, call_of, carry_out, plans_of
from kronfac.experiments.continual.report import need_for_report, write_report
from kronfac.experiments.continual.results import Failure, Origin, Results, save_results
from kronfac.experiments.continual.runner import Listener


def compare(
    stream: str,
    strategies: Sequence[str],
    *,
    out: str | Path,
    tasks: int = 5,
    seeds: Sequence[int] = (0,),
    budget: Budget | None = None,
    settings: Mapping[str, Mapping[str, object]] | None = None,
    fresh: bool = False,
    threads: int | None = None,
    listener: Listener | None = None,
    command: str | None = None,
) -> Results:
    """Learn a stream of tasks with several strategies, from the same weights and in the same order.

    Args:
        stream: Name of the stream.
        strategies: Names of the strategies.
        out: Folder for runs, ``results.jsonl``, the picture of the accuracy matrices and ``report.html``.
        tasks: Number of tasks.
        seeds: Each decides tasks, weights, batches and sampled labels of one run.
        budget: What all strategies have in common; the stream's by default.
        settings: What differs, by strategy: ``strength``, ``lr``, ``damping``, ``balance``.
        fresh: Throw away what these runs did before.
        threads: Torch threads.
        listener: Hears how it goes.
        command: How this was asked for, to be printed in the report; the Python call by default.

    Returns:
        What was found. A run that diverges, or that is refused what it asks for, is among the failures.

    Raises:
        ExperimentError: If anything given is unknown or out of range, before anything is written; or if all runs fail.
    """  # noqa: DOC502
    given = {"tasks": tasks, "seeds": list(seeds), "budget": budget, "settings": settings}
    need_for_report()
    plans = plans_of(stream, strategies, tasks, seeds, budget or Budget(), settings or {})
    origin = Origin.now(command or call_of("compare", stream, strategies, given, out), threads)

    def results_of(folder: Path, done: Done, failures: list[Failure]) -> Results:
        runs: dict[str, list[dict[str, object]]] = {name: [] for name in strategies}
        for plan, result in done:
            runs[plan.strategy].append(result)
        return Results(stream, tasks, folder, list(strategies), runs, failures, origin, len(plans))

    found = carry_out(plans, out, lambda *state: save_results(results_of(*state)), fresh, threads, listener)
    results = results_of(*found)
    write_report(results.folder)
    return results
