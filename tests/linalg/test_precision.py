"""Whether CUDA may multiply in TF32 is known whichever of PyTorch's settings says so."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from tests.exactness_helpers import draw

from kronfac.linalg.newton_schulz import renew
from kronfac.linalg.precision import tf32_allowed

SETTINGS = torch.backends.cuda.matmul


def newer(precision: str) -> None:
    SETTINGS.fp32_precision = precision


def older(allowed: bool) -> None:
    SETTINGS.allow_tf32 = allowed


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    mkldnn = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before, other = SETTINGS.fp32_precision, mkldnn.fp32_precision
    yield
    torch.set_float32_matmul_precision("highest")
    SETTINGS.fp32_precision, mkldnn.fp32_precision = before, other


@pytest.mark.parametrize(
    ("setup", "allowed"),
    [
        (lambda: None, False),
        (lambda: older(True), True),
        (lambda: older(False), False),
        (lambda: torch.set_float32_matmul_precision("high"), True),
        (lambda: torch.set_float32_matmul_precision("highest"), False),
        (lambda: newer("tf32"), True),
        (lambda: newer("ieee"), False),
    ],
)
def test_either_setting_is_seen(setup: Callable[[], None], allowed: bool) -> None:
    setup()
    assert tf32_allowed() == allowed
    matrix = draw(5, 5)
    (found,) = renew([matrix @ matrix.mT], [1.0], [None])  # on a CPU it makes no difference, and no error
    torch.testing.assert_close(found.inverse, torch.linalg.inv(matrix @ matrix.mT + torch.eye(5)))
