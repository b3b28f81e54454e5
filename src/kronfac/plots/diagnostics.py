"""What a self-tuning optimiser saw and chose, step by step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from kronfac.plots.style import COLOURS, dress

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Panels: title, whether logarithmic, and the entries of a step's report with their labels.
PANELS: tuple[tuple[str, bool, dict[str, str]], ...] = (
    ("loss of the mini-batch", True, {"loss": "loss"}),
    ("damping", True, {"lam": "λ", "gamma": "γ"}),
    ("reduction ratio ρ", False, {"rho": "ρ"}),
    ("coefficients", False, {"alpha": "step size α", "mu": "momentum μ"}),
    ("decrease of the objective", True, {"predicted": "predicted", "actual": "measured"}),
    ("size of the step", True, {"norm": "‖δ‖", "kl": "½ δᵀFδ"}),
)


def step_reports(records: Sequence[Mapping[str, float | None]], *, prefix: str = "") -> list[Axes]:
    """Draw the reports of a run as small panels over a common axis of steps.

    Args:
        records: One mapping for each step, as :meth:`kronfac.optim.StepReport.to_dict` gives; entries may be missing or
            None where nothing was measured.
        prefix: What stands before the entries' names, such as ``"step_"``.

    Returns:
        One pair of axes for each panel, all in one figure.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If no record holds a report.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("kronfac.plots needs matplotlib: pip install 'kronfac[experiments]'") from error
    if not any(f"{prefix}lam" in record for record in records):
        raise ValueError("no record holds a step's report; only self-tuning optimisers write them.")
    figure = Figure(figsize=(10.5, 6.0), dpi=150, layout="constrained")
    panels = list(figure.subplots(2, 3, sharex=True).flat)
    for axes, (title, logarithmic, entries) in zip(panels, PANELS, strict=True):
        for colour, (entry, label) in zip(COLOURS, entries.items(), strict=False):
            sign = -1.0 if title.startswith("decrease") else 1.0
            found = [(i, sign * v) for i, r in enumerate(records) if (v := r.get(prefix + entry)) is not None]
            kept = [(i, v) for i, v in found if not logarithmic or v > 0]
            style = {"marker": ".", "markersize": 3} if len(kept) < len(records) / 2 else {}
            axes.plot([i for i, _ in kept], [v for _, v in kept], color=colour, label=label, linewidth=1.2, **style)
        if logarithmic:
            axes.set_yscale("log")
        if title.startswith("reduction"):
            axes.axhspan(0.25, 0.75, color="#dddddd", zorder=0)
            axes.set_ylim(-0.5, 2.0)
        if len(entries) > 1:
            axes.legend(frameon=False, fontsize="small")
        dress(axes, title, "steps" if axes in panels[3:] else "", "")
    return panels
