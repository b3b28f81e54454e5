"""Parts of the cost measurements that no command is needed for: counts by hand, floors, means of steps, peaks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kronfac as kf
from kronfac.approximations import Limited
from kronfac.experiments.bench.ceilings import Ceilings, ceilings
from kronfac.experiments.bench.parts import PARTS, chosen, measure
from kronfac.experiments.bench.peaks import peaks
from kronfac.experiments.bench.profile import SHOWN, operators, profiles
from kronfac.experiments.bench.roofline import Cost, costs, floors
from kronfac.experiments.bench.steps import combine
from kronfac.experiments.bench.timing import Spread, clock_of
from kronfac.experiments.bench.workloads import Workload, make
from kronfac.experiments.errors import ExperimentError


def two_layers() -> Workload:
    """Rows of 3 -> 4 -> 2 units for 5 examples."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2, bias=False))
    x, y = torch.randn(5, 3), torch.randint(2, (5,))
    return Workload("two layers", model, kf.Categorical(), F.cross_entropy, x, y)


PULL = 2 * 5 * 4 * 2  # through the second layer
FACTORS = 4**2 + 4**2 + 4**2 + 2**2


def test_what_the_parts_must_do_counted_by_hand() -> None:
    found = costs(two_layers())
    # The column of ones is summed, not multiplied.
    assert found["statistics"].flops == {torch.float32: PULL + 2 * 5 * (3**2 + 4**2 + 4**2 + 2**2)}
    assert found["statistics"].direct == PULL + 2 * 5 * FACTORS
    assert found["statistics"].bytes == 4 * (5 * (3 + 4) + 2 * 5 * (4 + 2) + 2 * FACTORS)
    assert found["inverse"].flops == {torch.float32: 3 * 4**3 + 2**3}
    assert found["inverse"].bytes == 4 * 2 * FACTORS
    products = 2 * 4 * 4 * (4 + 4) + 2 * 4 * 2 * (4 + 2)
    assert found["precondition"].flops == {torch.float32: products}
    assert found["precondition"].bytes == 4 * (FACTORS + 2 * (4 * 4 + 4 * 2))


def test_wide_layers_and_embeddings_have_no_product_of_their_own() -> None:
    work = two_layers()
    work.approximation = Limited(3)
    diagonal = costs(work)
    assert diagonal["inverse"].flops == {torch.float32: 0}
    assert diagonal["precondition"].flops == {torch.float32: 0}
    assert diagonal["statistics"].direct == PULL + 2 * 5 * (4 * 4 + 4 * 2)
    text = costs(make("gpt2-small"))
    assert 0 < text["precondition"].direct < text["statistics"].direct


def test_products_of_an_autocast_pass_are_counted_apart() -> None:
    found = costs(make("gpt2-small", precision="bfloat16"))["statistics"].flops
    assert found[torch.bfloat16] > 0
    assert found[torch.float32] > 0


def test_convolutions_take_less_than_the_plain_product() -> None:
    found = costs(make("resnet50-small"))["statistics"]
    assert 0 < sum(found.flops.values()) < found.direct


def test_a_floor_is_the_greater_of_both() -> None:
    cost = Cost(Counter({torch.float32: 2000, torch.bfloat16: 8000}), 5000.0, 300.0)
    limits = Ceilings({torch.float32: 1e6, torch.bfloat16: 4e6}, 1e5)
    rows = {"forward+backward, ms": Spread(2.0, 2.0, 2.0)} | dict.fromkeys(
        ("statistics", "inverse", "precondition"), Spread(6.0, 6.0, 6.0)
    )
    floor = floors(dict.fromkeys(("statistics", "inverse", "precondition"), cost), limits, rows)["inverse"]
    assert floor.flop_floor == pytest.approx(4.0)
    assert floor.byte_floor == pytest.approx(3.0)
    assert floor.measured == pytest.approx(12.0)
    assert floor.ratio == pytest.approx(3.0)
    assert floor.as_dict()["ratio"] == floor.ratio


def test_ceilings_are_those_of_the_formats_in_use() -> None:
    assert set(ceilings("cpu", "float32", 32, 1000).flops) == {torch.float32}
    both = ceilings("cpu", "bfloat16", 32, 1000)
    assert set(both.flops) == {torch.float32, torch.bfloat16}
    assert all(rate > 0 for rate in both.as_dict().values())


def test_a_mean_step_weighs_its_kinds_by_their_number_in_a_period() -> None:
    times = {
        "kfac": [1.0, 2.0],
        "kfac with statistics": [2.0, 2.0],
        "kfac with refresh": [12.0, 2.0],
        "sgd": [9.0, 9.0],
    }
    assert combine(times) == pytest.approx([(90 + 18 + 12) / 100, 2.0])


@pytest.mark.parametrize("name", ["resnet50-small", "gpt2-small"])
def test_large_networks_are_measured_without_twin_and_period(name: str) -> None:
    rows = measure(name, 2)
    assert list(rows) == [
        "forward+backward, ms",
        "statistics",
        "inverse",
        "precondition",
        "step, sgd",
        "step, adamw",
        "step, kfac",
        "step, kfac with statistics",
        "step, kfac with refresh",
        "whole step, kfac, from its steps",
    ]
    assert rows["step, kfac"].low > 0


def test_parts_by_default_and_by_name() -> None:
    parts = ("statistics", "own", "tkfac", "inverse", "asynchronous", "precondition", "wide", "whole")
    assert chosen("small") == parts
    assert chosen("gpt2") == chosen("gpt2-small") == ("statistics", "inverse", "precondition", "step")
    on_gpu = ("statistics", "inverse", "precondition", "step", "roofline", "memory")
    assert chosen("kfc", "cuda") == chosen("resnet50", "cuda") == on_gpu
    assert chosen("small", only=["roofline"]) == ("statistics", "inverse", "precondition", "roofline")
    assert set(chosen("small", "cuda", PARTS)) == set(PARTS)
    for parts, message in ((["speed"], "no part 'speed'"), (["memory"], "benchmarks/memory.py")):
        with pytest.raises(ExperimentError, match=message):
            chosen("small", only=parts)


def test_peaks_are_taken_of_settled_steps() -> None:
    work, calls = make("gpt2-small"), []

    def peak(function: Callable[[], object]) -> int:
        function()
        calls.append([p.grad is not None for p in work.model.parameters()])
        return (1000, 5000, 5000 + 3 * 27_520)[len(calls) - 1]

    found = peaks(work, peak)
    assert found["factors"] == 27_520
    assert (found["forward+backward"], found["step, sgd"]) == (1000, 5000)
    assert found["kfac above sgd, over factors"] == 3
    assert all(all(call) for call in calls)


def test_profiles_name_what_takes_the_time() -> None:
    found = profiles(make("small"))
    assert list(found) == ["forward", "forward with statistics", "inverse", "precondition"]
    assert all(1 < len(rows) <= 1 + SHOWN for rows in found.values())
    assert any("cholesky" in operator.name for operator in found["inverse"])
    rows = operators(lambda: torch.ones(3).exp(), "cpu", 2)
    assert [row.ms for row in rows] == sorted((row.ms for row in rows), reverse=True)
    assert len(rows) == 3
    assert rows[0].name == "all"


def test_clocks_run_forward() -> None:
    for clock in (clock_of("cpu"), clock_of("cpu", processor_time=True)):
        assert clock() <= clock()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_everything_on_a_gpu(precision: str) -> None:
    from kronfac.experiments.bench import run

    for name in ("small", "resnet50-small", "gpt2-small"):
        found = run(name, 2, only=PARTS, device="cuda", precision=precision)
        assert found.memory["step, kfac with refresh"] > found.memory["forward+backward"] > 0
        assert all(floor.ratio > 0 for floor in found.roofline.values())
        assert all(found.profile.values())
