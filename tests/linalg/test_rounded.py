"""Products of inverses in bfloat16: the direction is kept where plain rounding turns it."""

from __future__ import annotations

import platform

import pytest
import torch
from torch import Tensor

from kronfac.linalg import rounded
from kronfac.linalg.rounded import RoundedProduct, Workspace, pays_on


def inverse(width: int, rank: int, seed: int, damping: float) -> tuple[Tensor, Tensor]:
    """Root of a factor of deficient rank with a mean, and the inverse of the damped factor, float64."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(rank, width, generator=generator, dtype=torch.float64) + 1.0
    factor = root.mT @ root / rank
    return root, torch.linalg.inv(factor + damping * torch.eye(width, dtype=torch.float64))


def in_range(rows: int, columns: int, decay: float) -> tuple[Tensor, Tensor, Tensor]:
    """A gradient in the range of both factors, whose spectrum decays or does not, and the inverses."""
    (left, output), (right, input) = inverse(rows, 60, 0, 0.1), inverse(columns, 70, 1, 0.1)
    mix = torch.randn(60, 70, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    u, values, vt = torch.linalg.svd(mix, full_matrices=False)
    numbers = torch.arange(60, dtype=torch.float64)
    falling = values * ((1 + numbers) * torch.exp(numbers / 3)) ** -decay
    return left.mT @ (u * falling) @ vt @ right, output, input


def cosine(left: Tensor, right: Tensor) -> float:
    left, right = left.double().flatten(), right.double().flatten()
    return float(left @ right / (left.norm() * right.norm()))


@pytest.mark.parametrize(("rows", "columns", "bias"), [(300, 261, True), (257, 300, False), (200, 240, True)])
def test_the_direction_is_kept_where_rounding_turns_it(rows: int, columns: int, bias: bool) -> None:
    gradient, output, input = in_range(rows, columns, decay=1.0)
    wanted = output @ gradient @ input
    g, o, i = gradient.float(), output.float(), input.float()
    plain = (o.bfloat16() @ g.bfloat16() @ i.bfloat16()).float()
    assert cosine(plain, wanted) < 0.7
    product, work = RoundedProduct(o, i), Workspace()
    last = g[:, -1].contiguous() if bias else None
    weight, column = product(o, i, g[:, :-1].contiguous() if bias else g, last, work)
    assert (column is None) == (not bias)
    found = weight if column is None else torch.cat([weight, column.unsqueeze(1)], dim=1)
    assert found.shape == wanted.shape
    assert found.dtype == torch.float32
    assert cosine(found, wanted) > 0.995
    if column is not None:
        assert cosine(column, wanted[:, -1]) > 0.99


def rows_in_range(count: int, d_out: int, d_in: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows with a mean, of cotangents and of inputs with their ones, and the inverses of their own damped factors."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for width, scale in ((d_out, 0.1), (d_in - 1, 1.0)):
        mean = 100 * scale * torch.rand(width, generator=generator, dtype=torch.float64)
        found.append(mean + scale * torch.randn(count, width, generator=generator, dtype=torch.float64))
    rows = found[0], torch.cat([found[1], found[1].new_ones(count, 1)], 1)
    output, input = (
        torch.linalg.inv(r.mT @ r / count + 0.3 * torch.eye(r.shape[1], dtype=torch.float64)) for r in rows
    )
    return *rows, output, input


@pytest.mark.parametrize(("count", "d_out", "d_in"), [(100, 300, 261), (70, 150, 200)])
def test_directions_of_rows_are_kept_where_rounding_turns_them(count: int, d_out: int, d_in: int) -> None:
    g, a, output, input = rows_in_range(count, d_out, d_in)
    wanted = output @ (g.mT @ a) @ input
    half = [tensor.bfloat16() for tensor in (g, output, a, input)]
    plain = ((half[0] @ half[1]).mT @ (half[2] @ half[3])).float()
    assert cosine(plain, wanted) < 0.9
    o, i = output.float(), input.float()
    product, work = RoundedProduct(o, i), Workspace()
    for _ in range(2):  # the second time in memory that was used
        weight, bias = product.by_rows(o, i, g.float(), a[:, :-1].float().contiguous(), work)
        assert weight.dtype == bias.dtype == torch.float32
        assert cosine(weight, wanted[:, :-1]) > 0.999
        assert cosine(bias, wanted[:, -1]) > 0.999


def test_rows_that_are_all_alike_lose_nothing() -> None:
    """Their gradient is the product of the means."""
    *_, output, input = rows_in_range(80, 150, 140)
    g, a = torch.rand(150, dtype=torch.float64), torch.rand(139, dtype=torch.float64)
    wanted = 40 * torch.outer(output @ g, input @ torch.cat([a, a.new_ones(1)]))
    o, i = output.float(), input.float()
    found = RoundedProduct(o, i).by_rows(o, i, g.float().expand(40, -1), a.float().expand(40, -1), Workspace())
    assert torch.allclose(found[0].double(), wanted[:, :-1], rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
    assert torch.allclose(found[1].double(), wanted[:, -1], rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


def test_a_matrix_of_low_rank_loses_nothing() -> None:
    (_, output), (_, input) = inverse(200, 60, 0, 1e-2), inverse(150, 70, 1, 1e-2)
    low = torch.randn(200, 5, dtype=torch.float64) @ torch.randn(5, 150, dtype=torch.float64)
    pair = output.float(), input.float()
    weight, _ = RoundedProduct(*pair)(*pair, low.float(), None, Workspace())
    wanted = output @ low @ input
    assert torch.linalg.norm(weight - wanted) < 1e-4 * torch.linalg.norm(wanted)


def test_memory_is_used_again_without_a_trace() -> None:
    shapes, work = [(200, 150), (300, 260), (160, 140), (200, 150)], Workspace()
    for number, (rows, columns) in enumerate(shapes):
        pair = torch.eye(rows) * 2.0, torch.eye(columns) * 3.0
        product = RoundedProduct(*pair)
        gradient = torch.randn(rows, columns, generator=torch.Generator().manual_seed(number))
        fresh, used = (product(*pair, gradient, None, memory)[0] for memory in (Workspace(), work))
        assert torch.equal(fresh, used)
        assert torch.linalg.norm(used - 6.0 * gradient) < 0.005 * torch.linalg.norm(6.0 * gradient)


def test_the_basis_is_a_function_of_the_width_alone() -> None:
    state = torch.get_rng_state()
    first = rounded._mixing(97, torch.device("cpu"))
    rounded._mixing.cache_clear()
    assert torch.equal(first, rounded._mixing(97, torch.device("cpu")))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("instructions", "pays"), [((False, False), False), ((True, False), True), ((False, True), True)]
)
def test_they_pay_on_processors_with_instructions_for_them(
    monkeypatch: pytest.MonkeyPatch, instructions: tuple[bool, bool], pays: bool
) -> None:
    for name, has in zip(("avx512_bf16", "amx_tile"), instructions, strict=True):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda has=has: has)
    for machine, wanted in (("x86_64", pays), ("AMD64", pays), ("aarch64", True)):
        monkeypatch.setattr(platform, "machine", lambda machine=machine: machine)
        assert pays_on(torch.device("cpu")) == wanted
        assert pays_on(torch.device("cuda"))
