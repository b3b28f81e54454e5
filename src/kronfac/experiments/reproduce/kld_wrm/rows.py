"""Solvers and settings of Puiu (2022), with the figures of Table 1, supplement 7."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kronfac.experiments.errors import ExperimentError, UnknownNameError

#: Columns of the table; percentages are in percent.
COLUMNS = (
    "acc ≥ 98 %",
    "acc > 98 %",
    "acc ≥ 98.5 %",
    "loss ≤ 0.25",
    "loss ≤ 0.2",
    "μ acc",
    "σ acc",
    "μ loss",
    "σ loss",
)

#: Supplement 7.1, for every solver. "0.01 to the Kronecker factor's eigenvalues": to their products, to which the
#: weight decay adds, as the code does that the paper built on. On each factor it is a hundred times less, see `_each`.
_SHARED = {
    "damping": 0.01,
    "damping_rule": "exact",
    "weight_decay": 1e-3,
    "stats_every": 30,
    "burn_in": 0,
    "momentum": 0.0,
    "lr": 0.01,
}
_LIBRARY_CLIP = {"kl_clip": 0.1}
#: τ = 2 bounds a layer's direction, before the learning rate, as that code's clip does. Sums of two curvatures with
#: such a damping have no closed inverse.
_GROUP_CLIP = {"kl_clip": None, "rms_clip": 2.0 * 0.01, "solve": "iterative"}


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        key: What it is asked for by.
        solver: Heading of its figure.
        label: Its settings.
        optimizer: Name of the optimiser.
        values: Hyper-parameters that differ from the optimiser's defaults.
        paper: The paper's figures in the order of `COLUMNS`, as printed; empty for a row of our own.
        best: Whether the paper's main text shows it.
    """

    key: str
    solver: str
    label: str
    optimizer: str
    values: Mapping[str, object]
    paper: tuple[str, ...] = ()
    best: bool = False

    @property
    def title(self) -> str:
        """Solver and settings."""
        return f"{self.solver}, {self.label}"


def _kfac(rho: float, *paper: str) -> Row:
    values = {**_SHARED, **_LIBRARY_CLIP, "ema": rho, "invert_every": 30}
    return Row(f"kfac-{rho:g}", "K-FAC", f"ρ = {rho:g}", "kfac", values, paper, rho == 0.95)


def _so(rho: float, *paper: str) -> Row:
    values = {**_SHARED, **_LIBRARY_CLIP, "rho": rho}
    return Row(f"so-{rho:g}", "SO-KLD-WRM", f"ρ = {rho:g}", "kldwrm_so", values, paper, rho == 0.33)


def _q(rho: float, *paper: str) -> Row:
    values = {**_SHARED, **_GROUP_CLIP, "rho": rho}
    return Row(f"q-{rho:g}", "Q-KLD-WRM", f"ρ = {rho:g}", "kldwrm_q", values, paper, rho == 0.5)


def _qe(omega: float, inner: int, *paper: str, rho: float = 0.5, cap: int = 4) -> Row:
    own = {"rho": rho, "omega": omega, "n_inner": inner, "n_cap": cap, "zeta": 1 / 330}
    values = {**_SHARED, **_GROUP_CLIP, **own}
    del values["momentum"]  # which it does not have
    key, label = f"qe-{omega:g}", f"ρ = {rho:g}, ω = {omega:g}, N_IS = {inner}"
    if rho != 0.5:  # ω = 0.04 is in the table with both
        key, label = f"{key}-rho-{rho:g}", f"{label}, N_cap = {cap}"
    return Row(key, "QE-KLD-WRM", label, "kldwrm_qe", values, paper, omega == 0.07)


def _each(row: Row) -> Row:
    """The same with 0.01 on the eigenvalues of each factor, the literal reading of 7.1."""
    values = {key: value for key, value in row.values.items() if not key.startswith("damping")}
    values["factor_damping"] = 0.01
    return Row(f"{row.key}-each", row.solver, f"{row.label}, 0.01 on each factor", row.optimizer, values)


#: Every row. Those without the paper's figures are no part of the table.
ROWS: dict[str, Row] = {
    row.key: row
    for row in (
        _kfac(0.33, "3", "1", "1", "6", "1", "95.42", "3.73", "0.28", "0.09"),
        _kfac(0.5, "3", "2", "1", "5", "2", "95.69", "2.85", "0.27", "0.08"),
        _kfac(0.7, "4", "2", "1", "5", "2", "96.13", "2.58", "0.26", "0.07"),
        _kfac(0.95, "3", "3", "1", "5", "2", "96.19", "3.2", "0.26", "0.1"),
        _so(0.33, "4", "2", "0", "7", "0", "97.60", "0.85", "0.25", "0.04"),
        _so(0.5, "7/8", "4/5", "0", "3", "0", "97.79", "0.41", "0.26", "0.02"),
        _so(0.7, "6", "5", "0", "0", "0", "97.94", "0.5", "0.30", "0.02"),
        _so(0.8, "5", "3", "0", "0", "0", "97.93", "0.37", "0.34", "0.02"),
        _q(0.33, "3", "1", "0", "7", "0", "97.47", "0.69", "0.24", "0.02"),
        _q(0.5, "5", "4", "0", "4", "0", "97.69", "0.69", "0.26", "0.04"),
        _q(0.7, "6/7", "4", "0", "0", "0", "98.03", "0.27", "0.29", "0.01"),
        _q(0.8, "4", "1", "0", "0", "0", "97.88", "0.27", "0.35", "0.02"),
        _qe(0.04, 10, "8", "4/5", "1", "8/9", "0", "97.67", "1.21", "0.25", "0.05"),
        _qe(0.07, 10, "6/7", "4", "1", "7/8/9", "0", "97.73", "0.63", "0.24", "0.03"),
        _qe(0.1, 7, "6", "3", "1", "7", "0", "97.55", "0.98", "0.25", "0.04"),
        _qe(0.04, 7, "8", "6", "0", "0", "0", "97.85", "0.60", "0.29", "0.03", rho=0.7, cap=8),
        Row("kfac-ours", "K-FAC", "kronfac's defaults", "kfac", {"weight_decay": 1e-3}),
        _each(_kfac(0.95)),
        _each(_so(0.33)),
    )
}

_CHOICES = {
    "all": tuple(key for key, row in ROWS.items() if row.paper or key == "kfac-ours"),
    "best": tuple(key for key, row in ROWS.items() if row.best or key == "kfac-ours"),
}


def choose(names: Sequence[str]) -> list[Row]:
    """Find rows.

    Args:
        names: Keys of `ROWS`, solvers' prefixes such as ``"so"``, ``"best"`` or ``"all"``.

    Returns:
        The rows, each once, in the order of the table.

    Raises:
        UnknownNameError: A name is none of these.
        ExperimentError: There is no name.
    """
    if not names:
        raise ExperimentError("no row is named")
    chosen: set[str] = set()
    for name in names:
        keys = _CHOICES.get(name) or tuple(key for key in ROWS if key == name)
        keys = keys or tuple(key for key in _CHOICES["all"] if key.split("-")[0] == name)
        if not keys:
            raise UnknownNameError("row", name, ["all", "best", "kfac", "so", "q", "qe", *ROWS])
        chosen.update(keys)
    return [row for key, row in ROWS.items() if key in chosen]
