"""Products by oneDNN: those of MKL to rounding, whatever the strides, and only where they are asked for."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kronfac.linalg import products, symmetric
from kronfac.linalg.products import add_triangle_, matmul, outruns_mkl, pays
from kronfac.linalg.symmetric import add_gram_, add_product_, is_wide


@pytest.fixture
def _outruns(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a processor where oneDNN is the faster one."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("needs oneDNN")
    for module in (products, symmetric):
        monkeypatch.setattr(module, "outruns_mkl", lambda: True)
    with torch.no_grad():
        yield


@pytest.fixture
def _asked_anew() -> Iterator[None]:
    outruns_mkl.cache_clear()
    yield
    outruns_mkl.cache_clear()


def arrangements(matrix: Tensor) -> dict[str, Tensor]:
    """The same matrix with other strides."""
    rows, columns = matrix.shape
    gaps = matrix.new_zeros(rows, columns + 9)
    across = matrix.new_zeros(columns, rows + 5)
    return {
        "dense": matrix,
        "gaps": gaps[:, :columns].copy_(matrix),
        "shifted": gaps.clone()[:, 9:].copy_(matrix),
        "transposed": matrix.mT.contiguous().mT,
        "transposed with gaps": across[:, :rows].copy_(matrix.mT).mT,
    }


def close(found: Tensor, wanted: Tensor) -> bool:
    return bool((found.double() - wanted).norm() < 1e-6 * wanted.norm())


@pytest.mark.usefixtures("_outruns")
def test_products_are_those_in_float64_for_all_strides() -> None:
    left, right = torch.randn(150, 260), torch.randn(260, 170)
    wanted = left.double() @ right.double()
    for a in arrangements(left).values():
        for b in arrangements(right).values():
            assert pays(a, b)
            found = matmul(a, b)
            assert found.shape == wanted.shape
            assert close(found, wanted)


@pytest.mark.usefixtures("_outruns")
def test_where_gradients_are_wanted_they_are_to_be_had() -> None:
    left, right = torch.randn(150, 260), torch.randn(260, 170, requires_grad=True)
    with torch.enable_grad():
        assert not pays(left, right)
        (gradient,) = torch.autograd.grad(matmul(left, right).sum(), right)
        total = add_product_(torch.zeros(260, 260), left, left @ right @ right.mT, symmetric=True)
        assert total.requires_grad
    assert close(gradient, left.double().sum(0).unsqueeze(1).expand(-1, 170))


@pytest.mark.usefixtures("_outruns")
def test_what_does_not_pay_is_left_to_mkl() -> None:
    big = torch.randn(300, 300)
    for left, right in (
        (big[:7], big),
        (torch.randn(70, 70), torch.randn(70, 70)),
        (big.double(), big.double()),
        (big.bfloat16(), big.bfloat16()),
        (torch.randn(2, 300, 300), big),
        (torch.randn(64, 5000), torch.randn(5000, 64)),
    ):
        assert not pays(left, right)
        assert torch.equal(matmul(left, right), left @ right)
    assert not is_wide(big)
    assert is_wide(big.double())


@pytest.mark.usefixtures("_outruns")
@pytest.mark.parametrize(("rows", "width"), [(70, 200), (500, 401), (4500, 250)])
def test_second_moments_fill_the_upper_triangle(rows: int, width: int) -> None:
    x, weights = torch.randn(rows, width), torch.rand(rows)
    for given in (None, weights):
        total = torch.randn(width + 1, width + 1)
        start = total.double()
        scaled = x.double() if given is None else x.double() * given.double().unsqueeze(1)
        wanted = start[:-1, :-1] + 0.3 * scaled.mT @ x.double()
        add_gram_(total[:-1, :-1], x, weights=given, alpha=0.3)
        assert close(total[:-1, :-1].triu(), wanted.triu())
        assert torch.equal(total[:, -1].double(), start[:, -1])  # the parts beside it stay
        assert torch.equal(total[-1].double(), start[-1])


@pytest.mark.usefixtures("_outruns")
def test_triangles_that_do_not_pay_are_left_alone() -> None:
    for total, rows in (
        (torch.zeros(100, 100), torch.randn(500, 100)),
        (torch.zeros(300, 300), torch.randn(10, 300)),
        (torch.zeros(300, 300, dtype=torch.float64), torch.randn(500, 300).double()),
    ):
        assert not add_triangle_(total, rows, rows, 1.0)
        assert not total.any()


@pytest.mark.usefixtures("_outruns")
def test_products_that_are_not_symmetric_are_whole() -> None:
    left, right, total = torch.randn(300, 200), torch.randn(300, 250), torch.randn(200, 250)
    wanted = total.double() - 2 * left.double().mT @ right.double()
    assert close(add_product_(total, left, right, alpha=-2.0), wanted)


@pytest.mark.usefixtures("_asked_anew")
@pytest.mark.parametrize(
    ("maker", "capability", "mkl", "wanted"),
    [
        ("AuthenticAMD", "AVX512", True, True),
        ("AuthenticAMD", "AVX2", True, False),
        ("AuthenticAMD", "AVX512", False, False),
        ("GenuineIntel", "AVX512", True, False),
    ],
)
def test_it_is_for_processors_that_mkl_does_not_know(
    monkeypatch: pytest.MonkeyPatch, maker: str, capability: str, mkl: bool, wanted: bool
) -> None:
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(Path, "read_text", lambda self: f"vendor_id\t: {maker}\n")
    assert outruns_mkl() == wanted


@pytest.mark.usefixtures("_asked_anew")
def test_the_maker_is_asked_for_where_there_is_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_file(self: Path) -> str:
        raise FileNotFoundError(self)

    monkeypatch.setattr(Path, "read_text", no_file)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(platform, "processor", lambda: "AMD64 Family 26 Model 2 Stepping 1, AuthenticAMD")
    assert outruns_mkl()
