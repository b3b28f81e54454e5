"""Error against iterations and seconds beside kfac-jax, as the page on measurements shows it.

    python docs/figures/peers.py FOLDER

Reads FOLDER/kronfac.jsonl and FOLDER/kfac_jax*.jsonl, as written by ``benchmarks/peers/``, writes
``docs/assets/kfac-jax.png`` and prints a table.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from kronfac.plots import COLOURS
from kronfac.plots.style import dress, plain_logarithms

TARGET = Path(__file__).parent.parent / "assets" / "kfac-jax.png"
TITLES = {
    "kronfac": "kronfac, nothing set",
    "kfac_jax": "kfac-jax, its own settings",
    "kfac_jax_low": "kfac-jax, damping from 1",
}


def main() -> None:
    """Draw and print."""
    from matplotlib.figure import Figure

    folder = Path(sys.argv[1])
    figure = Figure(figsize=(9.6, 3.8), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    print("| | squared error after 20 | 60 | 100 | 140 iterations | ms per iteration, median | mean |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for colour, (name, title) in zip(COLOURS, TITLES.items(), strict=False):
        path = folder / f"{name}.jsonl"
        if not path.exists():
            continue
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        later = sorted(row["seconds"] for row in rows[10:])  # without compilation, calibration and the first inverses
        total, seconds = 0.0, []
        for row in rows:
            total += row["seconds"]
            seconds.append(total)
        marks = [
            (row["step"] + 1, at, row["squared_error"])
            for row, at in zip(rows, seconds, strict=True)
            if "squared_error" in row
        ]
        left.plot([m[0] for m in marks], [m[2] for m in marks], color=colour, marker=".", label=title)
        right.plot([m[1] for m in marks], [m[2] for m in marks], color=colour, marker=".", label=title)
        errors = {step: error for step, _, error in marks}
        cells = [f"{errors[step]:.2f}" if step in errors else "–" for step in (20, 60, 100, 140)]
        middle, mean = later[len(later) // 2], sum(later) / len(later)
        print(f"| {title} | {' | '.join(cells)} | {1e3 * middle:.0f} | {1e3 * mean:.0f} |")
    for axes, x in ((left, "iterations"), (right, "seconds, compilation included")):
        axes.set_yscale("log")
        plain_logarithms(axes)
        dress(axes, None, x, "squared error per image, training set")
    left.legend(frameon=False)
    figure.savefig(TARGET)


if __name__ == "__main__":
    main()
