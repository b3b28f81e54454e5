"""Factorisations beside each other give what they give one after the other."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.exactness_helpers import draw
from torch import Tensor

from kronfac.linalg.inverse import invert
from kronfac.linalg.side_by_side import divided, end_team, side_by_side


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def positive(n: int, seed: int) -> Tensor:
    rows = draw(n, n, seed=seed)
    return rows @ rows.mT / n


@pytest.mark.parametrize(
    ("costs", "threads", "wanted"),
    [
        ([], 2, ([], [])),
        ([1, 3, 2], 1, ([1, 2, 0], [])),
        ([1, 3, 2], 2, ([], [1, 2, 0])),
        ([1, 1, 1], 4, ([], [0, 1, 2])),
        ([8, 1, 2, 1], 2, ([], [0, 2, 1, 3])),
        ([9, 1, 1, 1], 2, ([0], [1, 2, 3])),
        ([80, 70, 1, 1, 1], 4, ([0, 1], [2, 3, 4])),
        ([5], 8, ([0], [])),
    ],
)
def test_what_takes_much_longer_than_all_the_rest_has_all_threads(
    costs: list[float], threads: int, wanted: tuple[list[int], list[int]]
) -> None:
    assert divided(costs, threads) == wanted


def test_results_are_in_order_and_each_has_a_core(threads: int) -> None:
    def look(item: int) -> tuple[int, str, int, bool]:
        return item, threading.current_thread().name, torch.get_num_threads(), torch.is_grad_enabled()

    found = side_by_side(look, list(range(6)), [1.0] * 6)
    assert [item for item, *_ in found] == list(range(6))
    for _, name, seen, graded in found:
        if threads == 1:
            assert name == threading.current_thread().name
        elif name != threading.current_thread().name:
            assert name.startswith("kronfac-linalg")
            assert (seen, graded) == (1, False)
    assert torch.get_num_threads() == threads


def test_a_failure_is_raised(threads: int) -> None:
    def fail(item: int) -> int:
        if item == 2:
            raise ValueError("the third")
        return item

    with pytest.raises(ValueError, match="the third"):
        side_by_side(fail, [0, 1, 2, 3], [1.0] * 4)
    assert side_by_side(abs, [-1, -2], [1.0, 1.0]) == [1, 2]


def test_inverses_are_right_and_the_same_again(threads: int) -> None:
    matrices = [positive(n, seed) for seed, n in enumerate([140, 300, 20, 20, 141, 200, 260])]
    shifts = [0.1 * (i + 1) for i in range(len(matrices))]
    runs = [invert(matrices, shifts) for _ in range(2)]
    for matrix, shift, first, again in zip(matrices, shifts, *runs, strict=True):
        damped = matrix + shift * torch.eye(len(matrix), dtype=torch.float64)
        torch.testing.assert_close(first.inverse, torch.linalg.inv(damped), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(first.logdet, torch.logdet(damped))
        assert torch.equal(first.inverse, again.inverse)


def test_those_that_fail_are_repaired_and_named(threads: int) -> None:
    singular = positive(150, 0).float()
    singular[:, 0] = singular[:, 1]
    singular[0] = singular[1]
    singular[0, 0] = singular[1, 0] = singular[0, 1] = singular[1, 1]
    others = [positive(200, seed).float() for seed in (1, 2)]
    with pytest.raises(torch.linalg.LinAlgError, match=r"second .* is not positive definite"):
        invert([others[0], singular - torch.eye(150), others[1]], [1e-3] * 3, ["first", "second", "third"])


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "omp_pause_resource"), reason="OpenMP 5.0 cannot be told"
)
@pytest.mark.parametrize("threads", [3], indirect=True)
def test_threads_of_loops_end_and_come_back(threads: int) -> None:
    x = draw(1000, 1000)

    def running() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    def loop() -> float:
        return float(x.square().sum())

    before, with_team = loop(), running()
    end_team()
    assert running() == with_team - (threads - 1)
    assert loop() == before
    assert running() == with_team
