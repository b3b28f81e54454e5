"""What `verify` found: a row per layer, and the tolerances one can hold it to."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from kronfac.inspect.seeds import SeedCheck
from kronfac.inspect.text import frame, plain, table

#: Tolerances are widened by this many standard deviations of the sampling error.
SIGMAS = 4.0


class VerificationError(RuntimeError):
    """The curvature of a layer is further from the exact one than it may be; the text names the layers."""


@dataclass(frozen=True)
class LayerCheck:
    """One layer's block ``C`` against the exact Gauss-Newton block ``F`` of the probe batch.

    ``F`` is restricted to what the block keeps (each group, each unit, the diagonal); `left_out` says what that omits.

    Attributes:
        layer: Name of the layer.
        block: Kind of block.
        parameters: Number of its trained parameters.
        cosine: ``⟨C, F⟩ / (|C| |F|)``, Frobenius.
        scale: ``tr C / tr F``.
        error: ``|C - F| / |F|``, Frobenius; resolved to rounding up to 2048 parameters and to about 1e-7 beyond.
        scale_sampling: Standard deviation of `scale` at this number of samples; 0 for the exact source.
        error_sampling: Root mean square of ``|C - E C| / |F|`` at this number of samples; 0 for the exact source.
        left_out: Share of ``|F|²`` of the whole layer that is between groups or units or off the diagonal.
        input_factor: K-FAC's input factor: ``wᵀAw`` over its exact value, of several random directions the one
            farthest from 1. None for other blocks.
        output_factor: K-FAC's output factor: ``tr G`` over its exact value for the same cotangents of the outputs. None
            for other blocks, and for the recursive source with more than one example.
        trace_factor: Other blocks: ``tr C`` over its exact value for the same cotangents (TKFAC's: with positions taken
            as uncorrelated). None for K-FAC's, and where batch norm in train mode couples the examples.
        norm_ratio: ``|C| / |F|``.
    """

    layer: str
    block: str
    parameters: int
    cosine: float
    scale: float
    error: float
    scale_sampling: float
    error_sampling: float
    left_out: float
    input_factor: float | None
    output_factor: float | None
    trace_factor: float | None
    norm_ratio: float

    def scale_faults(self, tolerance: float) -> Iterator[str]:
        """Say what is wrong with the scales that must be right to rounding.

        Args:
            tolerance: Largest deviation from 1.

        Yields:
            A text per fault.
        """
        factors = {"input factor": self.input_factor, "output factor": self.output_factor, "tr C": self.trace_factor}
        for what, found in factors.items():
            if found is not None:
                yield from ratio_faults(what, found, tolerance, 0.0)

    def trace_faults(self, tolerance: float) -> Iterator[str]:
        """Say whether the trace is wrong.

        Args:
            tolerance: Largest deviation of `scale` from 1.

        Yields:
            A text if it is.
        """
        yield from ratio_faults("tr C", self.scale, tolerance, self.scale_sampling)

    def error_faults(self, tolerance: float) -> Iterator[str]:
        """Say whether the error is too large; by the triangle inequality sampling adds at most its own norm.

        Args:
            tolerance: Largest `error`.

        Yields:
            A text if it is.
        """
        if not self.error <= tolerance + SIGMAS * self.error_sampling:
            yield f"error {self.error:.4g}{_allowed(tolerance, self.error_sampling)}"

    def cosine_faults(self, tolerance: float) -> Iterator[str]:
        """Say whether the cosine is too small; sampling turns ``C`` by at most the angle whose sine is its norm.

        Args:
            tolerance: Smallest `cosine`.

        Yields:
            A text if it is.
        """
        noise = SIGMAS * self.error_sampling
        turned = math.asin(min(1.0, noise / self.norm_ratio)) if noise and self.norm_ratio else 0.0
        least = math.cos(min(math.pi, math.acos(tolerance) + turned))
        if not self.cosine >= least:
            sampled = f", {least:.4g} with sampling" if turned else ""
            yield f"cosine {self.cosine:.4g} (tolerance {tolerance:g}{sampled})"


class VerificationReport:
    """What `verify` found; ``print(report)`` gives a table.

    Args:
        rows: A row for each layer with a block.
        settings: What was asked for, by name.
        seeds: The source's cotangents of the outputs against the loss.
        uncovered: Parameters without a block, and why; they were not compared.
        notes: What a reader must know of this comparison.

    Attributes:
        rows: A `LayerCheck` for each layer with a block, in the model's order.
        settings: What was asked for.
        seeds: The source's cotangents of the outputs against the loss.
        uncovered: Parameters without a block, and why.
        notes: What a reader must know of this comparison.
    """

    def __init__(
        self,
        rows: tuple[LayerCheck, ...],
        settings: Mapping[str, Any],
        seeds: SeedCheck,
        uncovered: Mapping[str, str],
        notes: tuple[str, ...],
    ) -> None:
        self.rows = rows
        self.settings = dict(settings)
        self.seeds = seeds
        self.uncovered = dict(uncovered)
        self.notes = notes

    @property
    def table(self) -> Any:
        """The rows as a ``pandas.DataFrame``; needs pandas."""
        return frame([asdict(row) for row in self.rows])

    def to_dict(self) -> dict[str, Any]:
        """Give everything as plain data.

        Returns:
            Lists, texts and numbers, fit for ``json.dumps``; None for what is not finite.
        """
        rows = [asdict(row) for row in self.rows]
        told = {"settings": self.settings, "seeds": asdict(self.seeds)}
        return plain(told | {"rows": rows, "uncovered": self.uncovered, "notes": self.notes})

    def raise_if(
        self,
        *,
        scale: float | None = None,
        cosine: float | None = None,
        error: float | None = None,
        trace: float | None = None,
    ) -> None:
        """Raise if a layer is beyond a tolerance, net of the sampling error that is expected.

        ``scale`` asks for what every right implementation fulfils, whatever the model: K-FAC's two factors and the
        traces of other blocks equal their definitions, evaluated by autodiff for the very cotangents that were drawn,
        so that no sampling error is in them; and the cotangents have the second moment of the loss. The other three ask
        how good the approximation itself is here, against the exact ``F``: ``tr C`` and ``tr F`` of a Kronecker block
        differ as far as inputs and cotangents depend on each other.

        There sampling may account for four of its standard deviations on top of each tolerance: they are added to
        ``trace`` and ``error``, and for ``cosine`` their arc sine (relative to ``|C|``) to the angle. They are measured
        from a few draws: labels so rare that none of these holds one are not expected. Where a model is confident, use
        ``source="exact"``.

        Args:
            scale: Largest deviation from 1 of `input_factor`, `output_factor` and `trace_factor` of a layer, and of the
                seeds' ratio.
            cosine: Smallest `cosine`.
            error: Largest `error`.
            trace: Largest deviation of `scale`, ``tr C / tr F``, from 1.

        Raises:
            VerificationError: A layer is beyond a tolerance; the text names all of them.
            ValueError: No tolerance is given, or one is out of range.
        """
        asked = {"scale": scale, "cosine": cosine, "error": error, "trace": trace}
        asked = {name: value for name, value in asked.items() if value is not None}
        if not asked:
            raise ValueError("raise_if needs a tolerance: scale=, cosine=, error= or trace=.")
        for name, value in asked.items():
            if not (0 <= float(value) <= (1 if name == "cosine" else math.inf)):  # type: ignore[arg-type]
                accepted = "between 0 and 1" if name == "cosine" else "0 or more"
                raise ValueError(f"{name}={value!r} must be {accepted}.")
        faults = {row.layer: [text for name in asked for text in _faults_of(row, name, asked)] for row in self.rows}
        failing = {layer or "(the model)": texts for layer, texts in faults.items() if texts}
        text = f"{len(failing)} of {len(self.rows)} layers are beyond tolerance:"
        wrong = [] if scale is None else list(ratio_faults("|v|²", self.seeds.ratio, scale, self.seeds.sampling))
        if wrong:
            failing["cotangents of the outputs"] = wrong
        if failing:
            listed = [f"  {place}: {'; '.join(texts)}" for place, texts in failing.items()]
            raise VerificationError("\n".join([text, *listed, *self.notes]))

    def __str__(self) -> str:
        headings = ["layer", "block", "parameters", "cosine", "scale", "error"]
        extra = {
            "left out": [f"{row.left_out:.1%}" if row.left_out else "" for row in self.rows],
            "input": [_ratio(row.input_factor) for row in self.rows],
            "output": [_ratio(row.output_factor) for row in self.rows],
            "trace": [_ratio(row.trace_factor) for row in self.rows],
        }
        extra = {name: cells for name, cells in extra.items() if any(cells)}
        cells = [
            [
                row.layer or "(the model)",
                row.block.replace("_", " "),
                f"{row.parameters:,}",
                f"{row.cosine:.4f}",
                _ratio(row.scale, row.scale_sampling),
                f"{row.error:.3g}" + (f" ± {row.error_sampling:.2g}" if row.error_sampling else ""),
                *(column[index] for column in extra.values()),
            ]
            for index, row in enumerate(self.rows)
        ]
        told = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        body = table([*headings, *extra], cells, numbers=["parameters"])
        return "\n".join([told, "", body, "", *self._legend(extra), *self.notes])

    def _legend(self, shown: Collection[str]) -> list[str]:
        lines = ["cosine <C,F>/|C||F|, scale tr C/tr F, error |C-F|/|F| of the block C and the exact Gauss-Newton F"]
        if any(row.error_sampling for row in self.rows):
            lines.append("±: standard deviation expected from sampling alone at this number of samples")
        if "left out" in shown:
            lines.append("left out: share of |F|² where the block keeps nothing; the columns before are without it")
        if checks := [name for name in ("input", "output", "trace") if name in shown]:
            lines.append(f"{', '.join(checks)}: over the exact value for the same cotangents, by autodiff; must be 1")
        told = _ratio(self.seeds.ratio, self.seeds.sampling)
        lines.append(f"cotangents of the outputs: {told} of the loss's second moment, by autodiff; must be 1")
        return lines

    def __repr__(self) -> str:
        worst = min((row.cosine for row in self.rows), default=math.nan)
        return f"VerificationReport({len(self.rows)} layers, smallest cosine {worst:.4g})"


def _faults_of(row: LayerCheck, name: str, asked: Mapping[str, Any]) -> Iterator[str]:
    check = {
        "scale": row.scale_faults,
        "trace": row.trace_faults,
        "error": row.error_faults,
        "cosine": row.cosine_faults,
    }[name]
    yield from check(float(asked[name]))


def ratio_faults(what: str, found: float, tolerance: float, sampling: float) -> Iterator[str]:
    """Say whether a ratio is too far from 1.

    Args:
        what: Name of the numerator.
        found: The ratio.
        tolerance: Largest deviation.
        sampling: Standard deviation of the ratio.

    Yields:
        A text if it is.
    """
    if not abs(found - 1) <= tolerance + SIGMAS * sampling:
        yield f"{what} {found:.5g} times the exact one{_allowed(tolerance, sampling)}"


def _allowed(tolerance: float, sampling: float) -> str:
    return f" (tolerance {tolerance:g}" + (f" + {SIGMAS:g} x {sampling:.2g} of sampling)" if sampling else ")")


def _ratio(value: float | None, sampling: float = 0.0) -> str:
    if value is None:
        return ""
    return f"{value:.3f} ± {sampling:.2g}" if sampling else f"{value:.4f}"
