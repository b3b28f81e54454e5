"""Error against iterations and seconds beside other optimisers, as the page on measurements shows it.

    python docs/figures/peers.py FOLDER NAME

Reads FOLDER/start.npz and the FOLDER/*.jsonl that ``benchmarks/peers/`` wrote, writes
``docs/assets/peers-NAME.png`` and prints a table.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from kronfac.plots import COLOURS
from kronfac.plots.style import dress, plain_logarithms

ASSETS = Path(__file__).parent.parent / "assets"
TITLES = {
    "adaptive_kfac": "AdaptiveKFAC, nothing set",
    "kfac_jax": "kfac-jax, its own settings",
    "kfac_jax_low": "kfac-jax, damping from 1",
    "sgd": "SGD with Nesterov momentum, tuned",
    "adamw": "AdamW, tuned",
}
#: Those that take the same batches, and so can be compared by iterations.
SECOND_ORDER = ("adaptive_kfac", "kfac_jax", "kfac_jax_low")
MARKS = (20, 60, 100, 140)
LABELS = {"train_squared_error": "squared error per image, training set", "train_error": "training error, %"}


def main() -> None:
    """Draw and print."""
    from matplotlib.figure import Figure

    folder, name = Path(sys.argv[1]), sys.argv[2]
    measure = (
        "train_error" if str(np.load(folder / "start.npz")["likelihood"]) == "Categorical" else "train_squared_error"
    )
    figure = Figure(figsize=(9.6, 3.8), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    print(
        f"| | after {', '.join(map(str, MARKS))} iterations | at the end | seconds | ms per iteration, median | mean |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for colour, (key, title) in zip(COLOURS, TITLES.items(), strict=False):
        path = folder / f"{key}.jsonl"
        if not path.exists():
            continue
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        seconds = np.cumsum([row["seconds"] for row in rows])
        marks = [(row["step"], at, row[measure]) for row, at in zip(rows, seconds, strict=True) if measure in row]
        steps, times, values = zip(*marks, strict=True)
        if key in SECOND_ORDER:
            left.plot(steps, values, color=colour, marker=".", label=title)
        right.plot(times, values, color=colour, marker=".", label=title)
        print(f"| {title} | {line(key, rows, dict(zip(steps, values, strict=True)), values[-1], seconds[-1])} |")
    for axes, x in ((left, "iterations"), (right, "seconds of training, compilation included")):
        axes.set_yscale("log")
        plain_logarithms(axes)
        dress(axes, None, x, LABELS[measure])
    right.legend(frameon=False, fontsize=8)
    figure.savefig(ASSETS / f"peers-{name}.png")


def line(key: str, rows: list[dict[str, float]], values: dict[int, float], last: float, seconds: float) -> str:
    """A row of the table."""
    later = sorted(row["seconds"] for row in rows[10:])  # without compilation, calibration and the first inverses
    marks = ", ".join(f"{values[step]:.2f}" if key in SECOND_ORDER and step in values else "–" for step in MARKS)
    cells = [marks, f"{last:.2f}", f"{seconds:.0f}", f"{1e3 * later[len(later) // 2]:.0f}"]
    return " | ".join([*cells, f"{1e3 * sum(later) / len(later):.0f}"])


if __name__ == "__main__":
    main()
