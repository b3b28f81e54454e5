"""Settings of the process that blocks in several threads share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from kronfac.operators.kernels import plain_kernels
from kronfac.threads import ForAllThreads


def test_the_last_block_puts_a_setting_back_whatever_their_order() -> None:
    values = ["before"]

    @contextmanager
    def setting() -> Iterator[None]:
        found, values[0] = values[0], "within"
        yield
        values[0] = found

    shared = ForAllThreads(setting)
    first, second = shared(), shared()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert values == ["within"]
    second.__exit__(None, None, None)
    assert values == ["before"]


def test_a_setting_that_fails_leaves_no_block_open() -> None:
    fails = [True]

    @contextmanager
    def setting() -> Iterator[None]:
        if fails[0]:
            raise ValueError("no")
        yield

    shared = ForAllThreads(setting)
    with pytest.raises(ValueError, match="no"), shared():
        pass
    fails[0] = False
    with shared():
        pass


def test_blocks_that_overlap_leave_the_fast_kernels_on() -> None:
    """Two models trained in two threads."""
    first, second = plain_kernels(nn.LSTM(2, 2)), plain_kernels(nn.LSTM(2, 2))
    before = torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled
    first.__enter__()
    second.__enter__()
    assert not torch.backends.mha.get_fastpath_enabled()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert (torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled) == before
