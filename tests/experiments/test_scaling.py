"""Scaling of the parts: families, counts by hand, budgets, and points that an earlier call has measured."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from kronfac.experiments.bench import FAMILIES, Limits, Point, Spread, get_family, of_parts, planned, scale
from kronfac.experiments.bench.parts import in_turn
from kronfac.experiments.bench.scaling_files import merged, read_points, rows_of, view, write_points
from kronfac.experiments.errors import ExperimentError

PARTS = ("statistics", "inverse", "precondition")
SMALL = {"width": 5, "depth": 2, "batch": 3, "image": 4, "kernel": 1}


def test_every_family_is_measured() -> None:
    plan = planned(list(FAMILIES), {axis: [size] for axis, size in SMALL.items()})
    notes: list[str] = []
    points = list(scale(plan, 2, advance=notes.append))
    assert {point.axis: point.size for point in points} == SMALL
    for point in points:
        assert list(point.rows) == ["forward+backward, ms", *PARTS]
        assert point.rows["forward+backward, ms"].low > 0
        assert point.rows["inverse"].low > 0
        assert (point.rounds, point.skipped) == (2, "")
        assert Point.from_dict(point.as_dict()) == point
    assert notes == [f"{axis} {size}" for axis, size in SMALL.items() for _ in range(3)]


@pytest.mark.parametrize("axis", FAMILIES)
def test_one_thing_alone_grows(axis: str) -> None:
    family = get_family(axis)
    one, other = (family.shape(size) for size in (3, 5))
    assert (one.batch == other.batch) == (axis != "batch")
    assert (one.example == other.example) == (axis not in {"width", "image"})
    weights = [sum(p.numel() for p in shape.model().parameters()) for shape in (one, other)]
    assert (weights[0] == weights[1]) == (axis in {"batch", "image"})
    work = family.make(3)
    assert work.forward().isfinite()
    assert torch.equal(work.inputs, family.make(3).inputs)


def test_what_a_size_must_do_counted_by_hand() -> None:
    found = get_family("depth").demand(2).flops  # 257 x 256 and 257 x 10 on 128 rows
    first, second = 2 * 128 * 257 * 256, 2 * 128 * 257 * 10
    assert found["forward+backward"] == 2 * first + 3 * second
    assert found["statistics"] == second + 2 * 128 * (2 * 257**2 + 256**2 + 10**2)
    assert found["inverse"] == 2 * 257**3 + 256**3 + 10**3
    assert found["precondition"] == 2 * 257 * 256 * 513 + 2 * 257 * 10 * 267
    convolution = get_family("kernel").demand(3).flops["inverse"]
    assert convolution == 28**3 + 289**3 + 577**3 + 65**3 + 32**3 + 2 * 64**3 + 10**3


def test_points_beyond_the_limits_are_listed_and_not_begun() -> None:
    plan = planned(["width"], {"width": [4, 1 << 20]})
    small, large = scale(plan, 2, limits=Limits(60.0))
    assert small.rows
    assert not large.rows
    assert "s reckoned, budget 60 s" in large.skipped
    assert large.counted["inverse"] > small.counted["inverse"]
    [heavy] = scale({"width": [512]}, 2, limits=Limits(1e9, 1e6))
    assert "GiB reckoned, limit 0.00093 GiB" in heavy.skipped


def test_a_budget_ends_the_rounds_but_leaves_the_fewest() -> None:
    [point] = scale({"depth": [1]}, 500, limits=Limits(0.5), only=["inverse"])
    assert 3 <= point.rounds < 500
    assert list(point.rows) == ["forward+backward, ms", "inverse"]


def test_rounds_run_in_turn() -> None:
    calls: list[str] = []
    functions = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    times = in_turn(functions, 9, iter(range(100)).__next__, warm_up=1, go_on=lambda counted: counted < 2)
    assert calls == list("ababab")
    assert times == {"a": [1, 1], "b": [1, 1]}


def test_measured_points_are_not_measured_again_and_skipped_ones_are(tmp_path: Path) -> None:
    plan = planned(["depth"], {"depth": [1, 2]})
    known = [*scale({"depth": [1]}, 2), Point("depth", 2, skipped="0 s"), Point("width", 8, skipped="0 s")]
    write_points(tmp_path, merged(known, []), {"rounds": 2}, {})
    assert read_points(tmp_path, {"rounds": 2}) == merged(known, [])
    notes: list[str] = []
    again = list(scale(plan, 2, known=read_points(tmp_path, {"rounds": 2}), advance=notes.append))
    assert again[0] == known[0]
    assert set(notes) == {"depth 2"}
    both = merged(again, known)
    assert [(point.axis, point.size) for point in both] == [("width", 8), ("depth", 1), ("depth", 2)]
    assert both[2].rows
    with pytest.raises(ExperimentError, match="measured with rounds 2, not 3; choose another --out, or --fresh"):
        read_points(tmp_path, {"rounds": 3})


@pytest.mark.parametrize("content", ["[]", "{}", '{"setting": {}, "points": [{"axis": "width"}]}'])
def test_a_damaged_file_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "scaling.json").write_text(content)
    with pytest.raises(ExperimentError, match=r"scaling\.json.*delete it"):
        read_points(tmp_path, {})


def points() -> list[Point]:
    """Three points of an inverse that grows as the size and one that was skipped."""
    measured = [
        Point(
            "width",
            size,
            {"forward+backward, ms": Spread(2.0, 1.0, 3.0), "inverse": Spread(size / 8, size / 9, size / 7)},
            {"statistics": 1.0, "inverse": size**2, "precondition": 1.0},
            5,
        )
        for size in (2, 4, 8)
    ]
    last = Point("width", 16, {}, {"statistics": 1.0, "inverse": 256.0, "precondition": 1.0}, 0, "9 s reckoned")
    return [*measured, last]


def test_tables_have_growth_and_what_was_skipped() -> None:
    table = view(points(), "width", ["inverse"])
    assert table.columns == ["width", "forward+backward, ms", "inverse", "rounds"]
    assert table.rows[2] == ["8", "2 (1 to 3)", "1 (0.889 to 1.14) [64]", "5"]
    assert table.rows[3] == ["16", "–", "– [256]", "skipped: 9 s reckoned"]
    assert table.rows[4] == ["growth", "0.00", "1.00 [2.00]", ""]
    rows = rows_of(points(), ["inverse"])
    assert [row["part"] for row in rows] == ["forward+backward, ms", "inverse"] * 4
    assert math.isnan(float(str(rows[-1]["median"])))
    assert view(points()[3:], "width").rows[-1][1:3] == ["–", "– [–]"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_points_on_a_gpu(precision: str) -> None:
    plan = {"width": [16, 1 << 20], "kernel": [3]}
    small, large, convolution = scale(plan, 2, device="cuda", precision=precision, limits=Limits(60.0))
    assert small.rows["inverse"].low > 0
    assert convolution.rows["inverse"].low > 0
    assert large.skipped


def test_bad_plans_are_refused() -> None:
    with pytest.raises(ExperimentError, match="unknown axis of scaling 'height'; known: width, depth"):
        planned(["height"])
    with pytest.raises(ExperimentError, match="kernel must be an odd whole number above 0, got 2"):
        planned(["kernel"], {"kernel": [1, 2]})
    with pytest.raises(ExperimentError, match="sizes are given for 'depth'"):
        planned(["width"], {"depth": [1]})
    with pytest.raises(ExperimentError, match="not of 'tkfac'"):
        of_parts(["tkfac"])
    assert planned(["kernel"]) == {"kernel": (1, 3, 5, 7)}
    assert planned(["width"], {"width": [8, 4, 8]}) == {"width": (4, 8)}
