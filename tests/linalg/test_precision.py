"""The format of CUDA's products is set within a block alone, however it was set before."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from kronfac.linalg.precision import full_products, tf32_products

SETTINGS = torch.backends.cuda.matmul


def newer(precision: str) -> None:
    SETTINGS.fp32_precision = precision


def older(allowed: bool) -> None:
    SETTINGS.allow_tf32 = allowed


def both() -> None:
    torch.set_float32_matmul_precision("high")
    newer("ieee")


SETUPS: dict[str, Callable[[], None]] = {
    "nothing": lambda: None,
    "older, on": lambda: older(True),
    "older, off": lambda: older(False),
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "newer, tf32": lambda: newer("tf32"),
    "newer, ieee": lambda: newer("ieee"),
    "both, at odds": both,
}


def state() -> list[object]:
    """What each setting says, or that it refuses to."""
    found: list[object] = [SETTINGS.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision]  # type: ignore[attr-defined]
    for read in (lambda: SETTINGS.allow_tf32, torch.get_float32_matmul_precision):
        try:
            found.append(read())
        except RuntimeError:
            found.append("refused")
    return found


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    mkldnn = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before, other = SETTINGS.fp32_precision, mkldnn.fp32_precision
    yield
    torch.set_float32_matmul_precision("highest")
    SETTINGS.fp32_precision, mkldnn.fp32_precision = before, other


@pytest.mark.parametrize("allowed", [True, False])
@pytest.mark.parametrize("setup", SETUPS)
def test_within_the_block_both_settings_agree_and_after_it_they_are_as_before(setup: str, allowed: bool) -> None:
    SETUPS[setup]()
    before = state()
    with tf32_products(allowed):
        assert SETTINGS.fp32_precision == ("tf32" if allowed else "ieee")
        assert SETTINGS.allow_tf32 == allowed
    assert state() == before
    with pytest.raises(KeyError), tf32_products(allowed):
        raise KeyError
    assert state() == before


def test_nothing_is_touched_for_a_cpu() -> None:
    newer("tf32")
    with full_products(torch.device("cpu")):
        assert SETTINGS.fp32_precision == "tf32"
    with full_products(torch.device("cuda")):
        assert SETTINGS.fp32_precision == "ieee"
