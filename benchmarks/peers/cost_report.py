"""Tables, files and the picture of `cost.py`.

Run alone, `python benchmarks/peers/cost_report.py FOLDER PICTURE` joins every cost.json under a folder, rows of later
folders over those of earlier ones.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

from cost_peers.base import PARTS

from kronfac.plots import COLOURS
from kronfac.plots.style import dress

TITLES = {
    "statistics": "statistics",
    "inverse": "inverse of all factors",
    "precondition": "preconditioning one gradient",
    "step": "whole optimiser step",
}
HEADS = {"autoencoder": "autoencoder", "kfc": "KFC network", "resnet20": "ResNet-20"}


def show(results: dict, versions: dict[str, str]) -> None:
    """Print a table for each part, and beneath it what its cells mean or why they are empty.

    Args:
        results: What ``cost.measure`` returned, by workload.
        versions: Of the libraries.
    """
    print(", ".join(f"{name} {version}" for name, version in versions.items() if version))
    middles = (f"{HEADS.get(w, w)} {spread(r['milliseconds'], 1)}" for w, r in results.items())
    print(f"forward+backward, ms: {', '.join(middles)}")
    for part, title in TITLES.items():
        print(f"\n| {title}, extra | {' | '.join(HEADS.get(w, w) for w in results)} |")
        print("| --- |" + " --- |" * len(results))
        for row in rows_with(results, part):
            cells = [results[w]["rows"].get(row, {}).get(part, {}) for w in results]
            print(f"| {row} | {' | '.join(spread(c['spread']) if 'spread' in c else '–' for c in cells)} |")
        for line in remarks(results, part):
            print(f"- {line}")
    for library, reason in {k: v for r in results.values() for k, v in r["skipped"].items()}.items():
        print(f"skipped: {library}: {reason}")


def spread(numbers: dict[str, float], digits: int = 2) -> str:
    """Write a median with its quartiles."""
    middle, low, high = (rounded(numbers[key], digits) for key in ("median", "low", "high"))
    return f"{middle} ({low} to {high})"


def rounded(number: float, digits: int = 2) -> str:
    """Write a number without a minus before zero."""
    return f"{round(number, digits) + 0.0:.{digits}f}"


def rows_with(results: dict, part: str) -> list[str]:
    """Return the rows that fill a part on some workload."""
    titles = dict.fromkeys(title for r in results.values() for title in r["rows"])
    return [t for t in titles if any("spread" in r["rows"].get(t, {}).get(part, {}) for r in results.values())]


def remarks(results: dict, part: str) -> list[str]:
    """Return notes and reasons of a part, each once, with the workloads it holds for where these are not all."""
    found: dict[str, list[str]] = {}
    for workload, result in results.items():
        for title, cells in result["rows"].items():
            cell = cells.get(part, {})
            text = f"does not fill this cell: {cell['reason']}" if "reason" in cell else cell.get("note", "")
            if text:
                found.setdefault(f"{title}: {text}", []).append(HEADS.get(workload, workload))
    return [t if len(w) == len(results) else f"{t} ({', '.join(w)})" for t, w in found.items()]


def write(folder: Path, results: dict, versions: dict[str, str], rounds: int) -> None:
    """Write ``cost.csv``, ``cost.json`` and ``cost.png``.

    Args:
        folder: Made if it is not there.
        results: What ``cost.measure`` returned, by workload.
        versions: Of the libraries.
        rounds: How many rounds counted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    whole = {"rounds": rounds, "versions": versions, "workloads": results}
    (folder / "cost.json").write_text(json.dumps(whole, indent=2), encoding="utf-8")
    with open(folder / "cost.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["workload", "row", "part", "median", "low", "high", "note"])
        for workload, result in results.items():
            table.writerow([workload, "", "forward+backward, ms", *result["milliseconds"].values(), ""])
            for title, cells in result["rows"].items():
                for part, cell in cells.items():
                    numbers = cell.get("spread", dict.fromkeys(("median", "low", "high"), ""))
                    note = cell.get("reason") or cell.get("note")
                    table.writerow([workload, title, part, *numbers.values(), note])
    draw(results, folder / "cost.png")


def draw(results: dict, path: Path) -> None:
    """Draw a panel of bars for each part and workload.

    Args:
        results: What ``cost.measure`` returned, by workload.
        path: Of the picture.
    """
    from matplotlib.figure import Figure

    rows = {part: rows_with(results, part) for part in PARTS}
    rows = {part: titles for part, titles in rows.items() if titles}
    heights = [len(titles) + 1.5 for titles in rows.values()]
    figure = Figure(figsize=(2.2 + 3.1 * len(results), 0.27 * sum(heights) + 0.6), dpi=150, layout="constrained")
    panels = figure.subplots(len(rows), len(results), squeeze=False, height_ratios=heights)
    for line, (part, titles) in zip(panels, rows.items(), strict=True):
        for axes, (workload, result) in zip(line, results.items(), strict=True):
            for place, title in enumerate(titles):
                cell = result["rows"].get(title, {}).get(part, {})
                colour = COLOURS[0] if title.startswith("kronfac") else "#999999"
                bar(axes, place, cell.get("spread"), colour)
            dress(axes, None, "", "")
            axes.set_title(f"{TITLES[part]}, {HEADS.get(workload, workload)}", loc="left", fontsize="small")
            axes.set_xscale("symlog", linthresh=0.1, linscale=0.5)
            highest = max((c["spread"]["high"] for c in parts_of(results, part)), default=1.0)
            axes.set_xlim(0, 4 * highest)
            axes.set_ylim(len(titles) - 0.4, -0.6)
            axes.set_yticks(range(len(titles)), titles if axes is line[0] else [""] * len(titles), fontsize="small")
            axes.tick_params(axis="x", labelsize="small")
            axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
            axes.grid(False, axis="y")
    for axes in panels[-1]:
        axes.set_xlabel("extra over one forward+backward")
    figure.savefig(path)


def bar(axes, place: int, numbers: dict[str, float] | None, colour: str) -> None:
    """Draw one bar with quartiles and its number, or a dash."""
    if numbers is None:
        axes.text(0.01, place, "–", va="center", color="#666666")
        return
    middle = max(numbers["median"], 0.0)
    low, high = (abs(max(numbers[key], 0.0) - middle) for key in ("low", "high"))
    axes.barh(place, middle, 0.7, color=colour, xerr=[[low], [high]], error_kw={"elinewidth": 0.9, "ecolor": "#333333"})
    axes.annotate(
        rounded(numbers["median"]),
        (max(numbers["high"], 0.0), place),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        fontsize="x-small",
    )


def parts_of(results: dict, part: str) -> list[dict]:
    """Return all cells of a part that are filled."""
    cells = (cells.get(part, {}) for r in results.values() for cells in r["rows"].values())
    return [cell for cell in cells if "spread" in cell]


if __name__ == "__main__":
    kept = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(Path(sys.argv[1]).rglob("cost.json"))]
    joined: dict[str, dict] = {}
    for run in kept:
        for workload, result in run["workloads"].items():
            joined.setdefault(workload, result)["rows"].update(result["rows"])
    ordered = {workload: joined[workload] for workload in HEADS if workload in joined}
    show(ordered, kept[0]["versions"])
    draw(ordered, Path(sys.argv[2]))
