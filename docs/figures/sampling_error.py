"""Error of the sampled Fisher against the number of samples, as the documentation's page on concepts shows it.

Writes ``docs/assets/sampling_error.png``: a small classifier once it is confident and once it is not, with sampled
labels and with root probes, over three decades; the line is ``1/√samples`` through the mean at one sample.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

import kronfac as kf
from kronfac.plots import COLOURS, new_axes
from kronfac.sources import Sampled
from kronfac.tape import record

TARGET = Path(__file__).parent.parent / "assets" / "sampling_error.png"
COUNTS = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]
SEEDS = 10


def network(scale: float) -> nn.Module:
    """A classifier of ten classes in float64.

    Args:
        scale: Factor of the last layer's weights: large makes predictions confident.

    Returns:
        The model.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 10)).double()
    with torch.no_grad():
        model[2].weight.mul_(scale)
    return model


def relative_error(found: kf.BlockDiagonal, exact: kf.BlockDiagonal) -> float:
    """Frobenius norm of the difference over that of the exact one.

    Args:
        found: Sampled curvature.
        exact: Exact curvature of the same layers.

    Returns:
        The error.
    """
    squares = found.inner(found) - 2 * found.inner(exact) + exact.inner(exact)
    return float((squares.clamp_min(0) / exact.inner(exact)).sqrt())


def errors(model: nn.Module, x: Tensor, probe: str, seed: int) -> list[float]:
    """Errors of one growing sample.

    Args:
        model: The model.
        x: Inputs.
        probe: ``"labels"`` or ``"root"``.
        seed: Seed of the draws.

    Returns:
        The error at each of `COUNTS`.
    """
    exact = kf.estimate(model, kf.Categorical(), (x, None), source="exact")
    generator = torch.Generator().manual_seed(seed)
    sampled = kf.Estimator(model, kf.Categorical(), source=Sampled(1, probe), generator=generator)
    with record(sampled.adaptation.adapters) as tape:
        outputs = model(x)
    found = []
    for count in range(1, COUNTS[-1] + 1):
        sampled.update(tape, outputs)
        if count in COUNTS:
            found.append(relative_error(sampled.curvature(), exact))
    return found


def main() -> None:
    """Draw."""
    axes = new_axes(6.4, 4.0)
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    counts = torch.tensor(COUNTS, dtype=torch.float64)
    for (name, scale), marker in zip({"uncertain": 1.0, "confident": 25.0}.items(), "os", strict=True):
        for (probe, label), colour in zip({"labels": "labels", "root": "root probes"}.items(), COLOURS, strict=False):
            runs = torch.tensor([errors(network(scale), x, probe, seed) for seed in range(SEEDS)], dtype=torch.float64)
            mean = runs.square().mean(0).sqrt()
            slope = torch.linalg.lstsq(torch.stack((counts.log(), torch.ones_like(counts)), 1), mean.log()[:, None])
            print(f"{name}, {label}: {mean[0]:.3f} at 1, {mean[-1]:.4f} at 1000, slope {slope.solution[0].item():.3f}")
            style = {"color": colour, "marker": marker, "markersize": 4, "linewidth": 0}
            axes.loglog(counts, mean, label=f"{label}, {name} model", **style)
            axes.loglog(counts, mean[0] / counts.sqrt(), color=colour, linewidth=0.8, alpha=0.7)
    axes.set_xlabel("samples per example")
    axes.set_ylabel("relative error of the Kronecker blocks")
    axes.set_title("lines: 1/√samples through the first point", loc="left", fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.legend(frameon=False)
    TARGET.parent.mkdir(exist_ok=True)
    axes.figure.savefig(TARGET)


if __name__ == "__main__":
    main()
