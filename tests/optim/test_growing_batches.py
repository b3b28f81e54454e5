"""Batches that grow to the whole set."""

from __future__ import annotations

import pytest
import torch

import kronfac as kf


def test_sizes_grow_as_the_paper_says_and_no_example_is_left_out() -> None:
    batches = kf.optim.GrowingBatches(100, 30, start=10, full_at=20)
    found = list(batches)
    sizes = [len(batch) for batch in found]
    assert len(found) == len(batches) == 30
    assert sizes[0] == 10
    assert sizes[18] < 100 == sizes[19] == sizes[29]
    assert sizes == sorted(sizes)
    assert sizes[9] == round(10 * (100 / 10) ** (9 / 19))
    assert all(len(set(batch)) == len(batch) for batch in found)
    seen = torch.bincount(torch.tensor([index for batch in found for index in batch]), minlength=100)
    assert int(seen.max() - seen.min()) <= 1
    early = [index for batch in found[:5] for index in batch]
    assert len(set(early)) == len(early)  # one permutation serves the first of them


def test_it_goes_on_where_it_was() -> None:
    wanted = list(kf.optim.GrowingBatches(50, 12, start=5, full_at=9, seed=3))
    first = kf.optim.GrowingBatches(50, 12, start=5, full_at=9, seed=3)
    iterator = iter(first)
    head = [next(iterator) for _ in range(5)]
    second = kf.optim.GrowingBatches(50, 12, start=5, full_at=9, seed=99)
    second.load_state_dict(first.state_dict())
    assert head + list(second) == wanted


@pytest.mark.parametrize("options", [{"size": 0}, {"steps": 0}, {"start": 0}, {"full_at": 1}])
def test_bad_numbers(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        kf.optim.GrowingBatches(**{"size": 10, "steps": 5, **options})
