"""The tables of ``kronfac bench``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from kronfac.experiments.bench import Found
from kronfac.experiments.present import Table, number


def over_base(results: Mapping[str, Found]) -> Table:
    """Show the parts over forward+backward.

    Args:
        results: By workload and precision.

    Returns:
        A row for each part; a dash where a workload has none.
    """
    timed = {name: found for name, found in results.items() if found.rows}
    parts = dict.fromkeys(part for found in timed.values() for part in found.rows)
    rows = [[part, *(str(found.rows.get(part, "–")) for found in timed.values())] for part in parts]
    return Table(["over forward+backward", *timed], rows)


def extra_tables(results: Mapping[str, Found]) -> Iterator[tuple[Table, str]]:
    """Show what was asked for beside times.

    Args:
        results: By workload and precision.

    Yields:
        Tables and their headings.
    """
    for name, found in results.items():
        if found.ceilings is not None:
            limits = ", ".join(f"{number(value)} {what}" for what, value in found.ceilings.as_dict().items())
            yield _roofline(found), f"{name}: floors at the measured {limits}"
        if found.memory:
            yield _memory(found.memory), f"{name}: peak memory"
        for part, operators in found.profile.items():
            rows = [[o.name[:90], str(o.calls), number(o.ms)] for o in operators]
            yield Table(["name", "calls", "ms"], rows), f"{name}: profile of {part}"


def _roofline(found: Found) -> Table:
    columns = ["part", "GFLOP", "plain GFLOP", "GB", "FLOP floor, ms", "byte floor, ms", "measured, ms", "ratio"]
    rows = [
        [
            part,
            *map(
                number, (f.flops / 1e9, f.direct / 1e9, f.bytes / 1e9, f.flop_floor, f.byte_floor, f.measured, f.ratio)
            ),
        ]
        for part, f in found.roofline.items()
    ]
    return Table(columns, rows)


def _memory(memory: Mapping[str, float]) -> Table:
    factors = memory["factors"]
    rows = [
        [what, number(value / 1e6, ".1f"), f"{value / factors:.2f}"]
        for what, value in memory.items()
        if not what.startswith("kfac above")
    ]
    rows.append(["kfac above sgd", "", f"{memory['kfac above sgd, over factors']:.2f}"])
    return Table(["", "MB", "over factors"], rows)
