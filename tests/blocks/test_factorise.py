"""Inverses and eigendecompositions that succeed or say why not."""

from __future__ import annotations

import math

import pytest
import torch
from tests.blocks.block_cases import cholesky_inverses, close, random_psd

from kronfac.blocks import Diagonal, DiagonalKronecker, EigenKronecker, Kronecker, PerFactor, Uniform
from kronfac.linalg.factorise import cholesky, eigh, eighs
from kronfac.linalg.inverse import invert


def damped(matrix: torch.Tensor, shift: float) -> torch.Tensor:
    return matrix + shift * torch.eye(matrix.shape[-1], dtype=matrix.dtype)


def test_lists_of_equal_and_different_shapes() -> None:
    shapes = [(3, 3), (40, 40), (3, 3), (2, 3, 3), (40, 40), (2, 3, 3), (5, 5), (2, 2, 150, 150)]
    matrices = [random_psd(*shape, seed=i) for i, shape in enumerate(shapes)]
    before = [matrix.clone() for matrix in matrices]
    shifts = [0.1 * (i + 1) for i in range(len(shapes))]
    for matrix, old, shift, result in zip(matrices, before, shifts, invert(matrices, shifts), strict=True):
        assert torch.equal(matrix, old)
        assert torch.equal(result.inverse, result.inverse.mT)
        close(result.inverse, torch.linalg.inv(damped(matrix, shift)))
        close(result.logdet, torch.linalg.slogdet(damped(matrix, shift)).logabsdet)
    for matrix, result in zip(matrices, eighs(matrices), strict=True):
        close(result.vectors * result.values.unsqueeze(-2) @ result.vectors.mT, matrix)


def test_shift_per_stack_element() -> None:
    matrix = random_psd(3, 4, 4, seed=0)
    shift = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)
    (inverse,) = cholesky_inverses([matrix], [shift])
    for i in range(3):
        close(inverse[i], torch.linalg.inv(damped(matrix[i], shift[i].item())))
    with pytest.raises(ValueError, match="does not fit its stack"):
        cholesky_inverses([matrix], [torch.ones(2)])


def test_transposed_and_gradient_carrying_input() -> None:
    matrix = random_psd(4, 4, seed=0).mT.requires_grad_()
    (inverse,) = cholesky_inverses([matrix], [0.5])
    assert not inverse.requires_grad
    close(inverse, torch.linalg.inv(damped(matrix.detach(), 0.5)))


def hard_for_float32(n: int = 4) -> torch.Tensor:
    """Positive definite, but its Cholesky factorisation fails in float32 and succeeds in float64.

    The last entry of ``[[a, b], [b, c]]`` is the float32 number next above ``b^2 / a``; which ``a, b`` make the pivot
    round to zero depends on the machine, so they are looked for.
    """
    matrix = torch.eye(n)
    for a in range(3, 20):
        for b in range(2, 40):
            c = torch.tensor(b * b / a, dtype=torch.float32)
            while c.double() <= b * b / a:
                c = torch.nextafter(c, torch.tensor(math.inf))
            matrix[-2:, -2:] = torch.tensor([[a, b], [b, c]])
            if torch.linalg.cholesky_ex(matrix).info and not torch.linalg.cholesky_ex(matrix.double()).info:
                return matrix
    raise AssertionError("no case found")


@pytest.mark.parametrize("stack", [(), (3,)])
@pytest.mark.parametrize("n", [4, 40, 150])
def test_float32_is_retried_in_float64(stack: tuple[int, ...], n: int) -> None:
    hard = hard_for_float32(n)
    matrix = torch.eye(n).expand(*stack, n, n).clone() * 2
    matrix[(-1,) if stack else ()] = hard
    easy = random_psd(n, n, seed=1).float()
    first, second = invert([easy, matrix], [1.0, 0.0])
    assert second.inverse.dtype == second.logdet.dtype == torch.float32
    exact = torch.linalg.inv(matrix.double())
    assert torch.linalg.norm(second.inverse.double() - exact) < 1e-5 * torch.linalg.norm(exact)
    torch.testing.assert_close(second.logdet, torch.linalg.slogdet(matrix.double()).logabsdet.float())
    torch.testing.assert_close(first.inverse, torch.linalg.inv(damped(easy, 1.0)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [4, 40, 200])
def test_failure_names_the_matrix_its_size_and_the_way_out(n: int, dtype: torch.dtype) -> None:
    good = torch.eye(n, dtype=dtype)
    bad = good.clone()
    bad[1, 1] = -0.75
    with pytest.raises(torch.linalg.LinAlgError, match=rf"matrix 1 \({n} x {n}\).*-0.65.*larger damping"):
        cholesky_inverses([good, bad, good], [0.1, 0.1, 0.1])
    with pytest.raises(torch.linalg.LinAlgError, match="the input factor"):
        cholesky_inverses([bad], [0.0], ["the input factor"])
    with pytest.raises(torch.linalg.LinAlgError, match=r"matrix 0, stack element \[2\]"):
        cholesky_inverses([torch.stack([good, good, bad])], [0.0])
    with pytest.raises(torch.linalg.LinAlgError, match=r"matrix.*larger damping"):
        cholesky(bad)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", [(0, 0), (3, 1), (39, 39), (39, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nan_and_inf_never_pass(value: float, place: tuple[int, int], dtype: torch.dtype) -> None:
    bad = random_psd(40, 40, seed=0).to(dtype)
    bad[place] = bad[place[::-1]] = value
    for call in (lambda: cholesky_inverses([bad], [0.1]), lambda: cholesky(bad), lambda: eigh(bad)):
        with pytest.raises(torch.linalg.LinAlgError, match="contains NaN or Inf"):
            call()


def test_cholesky_is_retried_in_float64() -> None:
    hard = hard_for_float32()
    factor = cholesky(hard)
    assert factor.dtype == torch.float32
    torch.testing.assert_close(factor @ factor.T, hard)


def test_eigh_is_retried_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = random_psd(4, 4, seed=0).float()
    plain = torch.linalg.eigh

    def stubborn(given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if given.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return plain(given)

    monkeypatch.setattr(torch.linalg, "eigh", stubborn)
    values, vectors = eigh(matrix)
    assert values.dtype == torch.float32
    torch.testing.assert_close(vectors * values @ vectors.mT, matrix)

    def hopeless(given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", hopeless)
    with pytest.raises(torch.linalg.LinAlgError, match=r"the factor \(4 x 4.*float64 too"):
        eigh(matrix, "the factor")


def test_eigenvalues_are_never_negative() -> None:
    assert eigh(random_psd(20, 20, seed=0, rank=2)).values.min() >= 0


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match="float16"):
        cholesky_inverses([torch.eye(2).half()], [0.1])
    with pytest.raises(ValueError, match="as many shifts"):
        cholesky_inverses([torch.eye(2)], [])
    with pytest.raises(ValueError, match="as many names"):
        eighs([torch.eye(2)], [])
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        eighs([torch.ones(2, 3)])
    assert cholesky_inverses([], []) == []


@pytest.mark.parametrize("shift", [1e-46, 1e-40])
def test_damping_that_is_lost_in_float32_is_refused(shift: float) -> None:
    """The reciprocal of what is left of it is infinite, and so would be every step."""
    values = torch.tensor([0.0, 1.0])
    eigen = EigenKronecker(values.view(1, 2), torch.eye(1), torch.eye(2))
    for block in (Diagonal(values.view(1, 2)), eigen, Kronecker(torch.diag(values), torch.eye(1))):
        with pytest.raises(torch.linalg.LinAlgError, match="larger damping"):
            block.factorise(Uniform(shift))
    with pytest.raises(torch.linalg.LinAlgError, match="larger damping"):
        DiagonalKronecker(values, torch.eye(1)).factorise(PerFactor(shift, 0.0))
    assert Diagonal(values.view(1, 2)).factorise(Uniform(1e-38)).logdet().isfinite()


@pytest.mark.parametrize("n", [2, 5, 40, 150])
def test_singular_matrices_never_pass(n: int) -> None:
    """Rounding makes the last pivot positive for about one in four, whose inverses were noise."""
    for seed in range(24):
        matrix = random_psd(n, n, seed=seed, rank=max(1, n - 1 - seed % 3))
        with pytest.raises(torch.linalg.LinAlgError, match=r"matrix 0 .* singular to rounding.*larger damping"):
            invert([matrix], [0.0])
    scales = torch.logspace(-9, 9, n, dtype=torch.float64)  # which is no loss of digits
    matrix = damped(random_psd(n, n, seed=0), 1.0)
    (found,) = invert([matrix * scales * scales[:, None]], [0.0])
    close(found.inverse * scales * scales[:, None], torch.linalg.inv(matrix))


def test_float32_is_retried_where_no_digit_of_the_inverse_is_right() -> None:
    """Errors were up to 37 times the inverse."""
    for seed in range(40):
        basis = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).Q
        for smallest in (3e-7, 1e-7, 3e-8):
            matrix = (basis * torch.logspace(0, math.log10(smallest), 8, dtype=torch.float64) @ basis.mT).float()
            matrix = (matrix + matrix.mT) / 2
            if torch.linalg.eigvalsh(matrix.double())[0] <= 1e-9:
                continue
            (found,) = invert([matrix], [0.0])
            exact = torch.linalg.inv(matrix.double())
            assert torch.linalg.norm(found.inverse.double() - exact) < 0.3 * torch.linalg.norm(exact)
