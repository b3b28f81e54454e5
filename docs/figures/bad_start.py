"""Training with a damping that starts a million times too small or too large, as the page on adaptive methods shows it.

Writes ``docs/assets/bad_start.png``: the digits autoencoder with `AdaptiveKFAC`, whose ``λ`` starts where calibration
puts it, and a factor of a million off either way; loss of the mini-batches and ``λ`` against steps.
"""

from __future__ import annotations

from pathlib import Path

import torch

import kronfac as kf
from kronfac.experiments.problems import get_problem
from kronfac.plots import COLOURS
from kronfac.plots.style import dress, plain_logarithms

TARGET = Path(__file__).parent.parent / "assets" / "bad_start.png"
STEPS, BATCH = 200, 500


def train(damping: float | str) -> list[kf.optim.StepReport]:
    """Train once.

    Args:
        damping: Initial ``λ``, or ``"auto"``.

    Returns:
        The reports of all steps.
    """
    problem = get_problem("digits-autoencoder")
    data, model = problem.data(), problem.model(0)
    optimizer = kf.optim.AdaptiveKFAC(model, problem.likelihood(), damping=damping)
    generator, reports = torch.Generator().manual_seed(0), []
    for _ in range(STEPS):
        rows = torch.randperm(len(data.train_inputs), generator=generator)[:BATCH]
        x, y = data.train_inputs[rows], data.train_targets[rows]
        optimizer.step(lambda x=x, y=y: problem.loss(model(x), y))
        assert optimizer.report is not None
        reports.append(optimizer.report)
    return reports


def main() -> None:
    """Train three times and draw."""
    from matplotlib.figure import Figure

    runs = {"calibrated": train("auto")}
    start = runs["calibrated"][0].lam
    runs["a million times too small"] = train(start * 1e-6)
    runs["a million times too large"] = train(start * 1e6)
    figure = Figure(figsize=(9.6, 3.8), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    for colour, (name, reports) in zip(COLOURS, runs.items(), strict=False):
        left.plot([r.loss for r in reports], color=colour, label=name, linewidth=1.4)
        right.plot([r.lam for r in reports], color=colour, label=name, linewidth=1.4)
        first, last = reports[0], reports[-1]
        print(f"{name}: λ from {first.lam:.3g}; loss {first.loss:.2f}, after {STEPS} steps {last.loss:.3f}")
    for axes in (left, right):
        axes.set_yscale("log")
    plain_logarithms(left)
    left.legend(frameon=False)
    dress(left, "digits autoencoder", "steps", "loss of the mini-batch")
    dress(right, "damping", "steps", "λ")
    figure.savefig(TARGET)


if __name__ == "__main__":
    main()
