"""Inverses of matrices that moved a little, from the inverses of before, by products alone.

The iteration of Newton and Schulz (Schulz 1933; Ben-Israel & Cohen 1966; Higham 2008, *Functions of Matrices*) takes
``X`` to ``X (I + R)`` with ``R = I - M X``, whose own residual is ``R^2``; with ``p - 1`` powers of ``R`` it is
``R^p``. It converges if and only if the eigenvalues of ``R`` lie within the unit circle. Those of ``M X`` are real and
positive where ``M`` and ``X`` are positive definite, so that a factor ``c`` takes ``I - c M X`` there from any start; a
poor one takes many iterations, though.

* `closeness.reach` gives ``c``, and whether the start is close enough, for twelve products with a vector.
* An iteration is one full product, ``M X``, and ``p - 1`` symmetric ones, ``Y <- X + Y R``, which on the CPU take about
  0.7 of a full one each. For its time order 3 converges fastest (``3^(1/2.4)`` against ``2^(1/1.7)`` and
  ``4^(1/3.1)``); an order up to 5 is taken where it is the last, which spares the full product of one more.
* Where rounding would leave too much (`closeness.rounding`; in float32 from a condition number of some hundred on),
  ``M X`` is multiplied in float64: the inverse is then more accurate than Cholesky's in float32.
* What is accepted was measured (`closeness.rms_residual`) after all rounding. What was started too far away, stagnates,
  is not there after `MAX_ITERATIONS` or is not finite is inverted by `factorise.invert`, with its retry in float64 and
  its errors.

Beside a matrix and its start five more of their size are held at a time, and nine with ``M X`` in float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from kronfac.linalg.closeness import reach, rms_residual, rounding
from kronfac.linalg.factorise import add_shift_, check_matrices, groups_of, own
from kronfac.linalg.inverse import invert
from kronfac.linalg.precision import tf32_allowed
from kronfac.linalg.products import matmul, pays
from kronfac.linalg.symmetric import add_product_, mirror_, with_even_rows

#: Root mean square of ``I - M X`` that an accepted inverse has at most, by dtype.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}
#: Iterations after which a matrix goes to Cholesky.
MAX_ITERATIONS = 4
#: Powers of the residual in an iteration that is not the last, and at most in the last.
_ORDER, _LAST_ORDER = 3, 5
#: Entries that are iterated at once on a GPU: 512 MB in float32.
_ENTRIES = 1 << 27


class Renewed(NamedTuple):
    """An inverse, and how it came about.

    Attributes:
        inverse: ``(M + s I)^-1``, shape ``[*stack, n, n]``, symmetric to the last bit.
        iterations: Iterations taken, the most over the stack; those of a fallback included.
        fallback: Whether there was a start, and Cholesky was needed nevertheless.
    """

    inverse: Tensor
    iterations: int
    fallback: bool


@torch.no_grad()
def renew(
    matrices: Sequence[Tensor],
    shifts: Sequence[Tensor | float],
    starts: Sequence[Tensor | None],
    names: Sequence[str] | None = None,
    *,
    tolerance: float | None = None,
    max_iterations: int = MAX_ITERATIONS,
) -> list[Renewed]:
    """Invert ``M_i + s_i I`` for a list of symmetric positive semi-definite matrices, from approximate inverses.

    What fails in float64 too raises `torch.linalg.LinAlgError` with the matrix's name, as `factorise.invert` does.

    Args:
        matrices: Matrices of shape ``[*stack, n, n]``, float32 or float64; sizes and stacks may differ.
        shifts: What is added to each diagonal: a number, or a tensor that broadcasts to the stack.
        starts: Symmetric positive definite approximations of the inverses; None for a matrix that has none.
        names: What to call each matrix in an error; ``"matrix <index>"`` by default.
        tolerance: What takes the place of `TOLERANCE`.
        max_iterations: What takes the place of `MAX_ITERATIONS`.

    Returns:
        One `Renewed` per matrix, in order. If an element of a stack needs Cholesky, all of the stack get it.

    Raises:
        ValueError: If the sequences differ in length, a start has another shape than its matrix, a shift does not
            broadcast to its stack, or float32 is multiplied in TF32.
    """
    labels = check_matrices(matrices, names)
    if not len(shifts) == len(starts) == len(matrices):
        raise ValueError(f"{len(matrices)} matrices need as many shifts and starts: {len(shifts)}, {len(starts)}")
    for matrix, start, label in zip(matrices, starts, labels, strict=True):
        if start is not None and start.shape != matrix.shape:
            raise ValueError(f"the start of {label} has shape {tuple(start.shape)}, not {tuple(matrix.shape)}")
    _refuse_tf32(matrices)
    results: list[Renewed | None] = [None] * len(matrices)
    taken = [0] * len(matrices)
    begun = {i: start for i, start in enumerate(starts) if start is not None and start.numel()}
    indices = list(begun)
    for group in _portions(groups_of([matrices[i] for i in indices]), [matrices[i].numel() for i in indices]):
        chosen = [indices[position] for position in group]
        damped = _together([_damped(matrices[i], shifts[i], labels[i]) for i in chosen])
        near = _together([begun[i].to(damped) for i in chosen])
        bound = TOLERANCE[damped.dtype] if tolerance is None else tolerance
        inverses, courses = _iterate(damped, near, bound, max_iterations)
        each = len(courses) // len(chosen)
        for position, i in enumerate(chosen):
            part = slice(position * each, (position + 1) * each)
            taken[i] = max(course.iterations for course in courses[part])
            if all(course.good for course in courses[part]):
                found = inverses[part] if matrices[i].ndim > 2 else inverses[position]
                found = found.unflatten(0, matrices[i].shape[:-2]) if matrices[i].ndim > 2 else found
                results[i] = Renewed(found if len(chosen) == 1 else own(found), taken[i], False)
    rest = [i for i, result in enumerate(results) if result is None]
    inverted = invert([matrices[i] for i in rest], [shifts[i] for i in rest], [labels[i] for i in rest])
    for i, result in zip(rest, inverted, strict=True):
        results[i] = Renewed(result.inverse, taken[i], starts[i] is not None)
    return [result for result in results if result is not None]


def _portions(groups: list[list[int]], entries: list[int]) -> Iterator[list[int]]:
    """Cut groups, whose members have equally many entries, to what is iterated at once."""
    for group in groups:
        most = max(1, _ENTRIES // entries[group[0]])
        for first in range(0, len(group), most):
            yield group[first : first + most]


def _refuse_tf32(matrices: Sequence[Tensor]) -> None:
    if tf32_allowed() and any(m.is_cuda and m.dtype == torch.float32 for m in matrices):
        raise ValueError(
            "inverse='newton_schulz' needs products of full precision, but CUDA may multiply in TF32, which leaves "
            "three digits: set torch.backends.cuda.matmul.fp32_precision = 'ieee', or use inverse='cholesky'."
        )


def _damped(matrix: Tensor, shift: Tensor | float, name: str) -> Tensor:
    work = matrix.clone(memory_format=torch.contiguous_format)
    add_shift_(work, shift, name)
    return work


def _together(matrices: Sequence[Tensor]) -> Tensor:
    """One ``[count, n, n]``; a wide matrix that is alone has even rows."""
    if len(matrices) > 1:
        return torch.stack(list(matrices)).flatten(0, -3)
    return with_even_rows(matrices[0]).unsqueeze(0).flatten(0, -3)


@dataclass
class _Course:
    """How the iteration of one matrix goes.

    Attributes:
        radius: Spectral radius of the next residual, as foretold.
        size: Root mean square of the next residual, as far as it is known.
        last: The same of the last residual.
        iterations: How many were taken.
        good: Whether it has arrived.
    """

    radius: float
    size: float
    last: float = inf
    iterations: int = 0
    good: bool = False

    def order(self, tolerance: float) -> int:
        """Order of the next iteration: the least that is foretold to end it, if that is small enough."""
        for order in range(2, _LAST_ORDER + 1):
            if self.size * self.radius ** (order - 1) <= 0.5 * tolerance:
                return order
        return _ORDER

    def advance(self, order: int, size: float, tolerance: float) -> None:
        """Note an iteration, and the size of the residual that it left."""
        self.iterations += 1
        self.good = size <= tolerance
        self.last, self.size, self.radius = self.size, size, self.radius**order


def _iterate(matrix: Tensor, start: Tensor, tolerance: float, max_iterations: int) -> tuple[Tensor, list[_Course]]:
    """Iterate on ``[count, n, n]``: the inverses, and how it went; matrices that did not arrive have garbage."""
    with torch.autocast(matrix.device.type, enabled=False):
        known = reach(matrix, start)
        courses = [_Course(radius, radius) for _, radius in known]
        noise = rounding(matrix, start)
        best = 1 if matrix.dtype == torch.float32 else 0  # float64 has nothing wider
        on = [
            i
            for i, course in enumerate(courses)
            if course.radius ** (_ORDER**max_iterations) <= tolerance and noise[i][best] <= tolerance
        ]
        out = start if len(courses) == 1 else _like(start)
        m, x = matrix, _like(start).copy_(start)
        m, x = _take(m, on, len(courses)), _take(x, on, len(courses))
        x.mul_(torch.tensor([known[i].scale for i in on], dtype=x.dtype).to(x.device)[:, None, None])
        for _ in range(max_iterations if on else 0):
            order = max(courses[i].order(tolerance) for i in on)
            expected = max(courses[i].size * courses[i].radius ** (order - 1) for i in on)
            twice = best == 1 and max(noise[i][0] for i in on) > max(0.5 * tolerance, expected)
            residual = _residual(m, x, twice)
            sizes = (torch.linalg.vector_norm(residual, dim=(-2, -1)) / m.shape[-1] ** 0.5).tolist()
            for i, size in zip(on, sizes, strict=True):
                courses[i].size = size
            keep = [k for k, i in enumerate(on) if courses[i].size < courses[i].last]  # false for NaN, too
            m, x, residual = (_take(part, keep, len(on)) for part in (m, x, residual))
            on = [on[k] for k in keep]
            if not on:
                break
            order = max(courses[i].order(tolerance) for i in on)
            x = _powers(x, residual, order)
            keep = []
            for k, (i, size) in enumerate(zip(on, rms_residual(m, x, twice=twice), strict=True)):
                course = courses[i]
                course.advance(order, size, tolerance)
                if course.good and len(courses) == 1:
                    out = x
                elif course.good:
                    out[i] = x[k]
                elif course.size < course.last:
                    keep.append(k)
            m, x, on = _take(m, keep, len(on)), _take(x, keep, len(on)), [on[k] for k in keep]
            if not on:
                break
    return out, courses


def _like(matrix: Tensor) -> Tensor:
    """Room for another one with the same rows, even ones included."""
    return matrix.new_empty_strided(matrix.shape, matrix.stride())


def _take(stack: Tensor, keep: list[int], count: int) -> Tensor:
    return stack if len(keep) == count else stack[keep]


def _residual(matrix: Tensor, x: Tensor, twice: bool) -> Tensor:
    """``I - M X`` by one full product, in float64 where that is asked for."""
    out = _like(x)
    if twice:
        product = matrix.double() @ x.double()
        product.neg_().diagonal(dim1=-2, dim2=-1).add_(1.0)
        return out.copy_(product)
    if len(x) == 1 and pays(matrix[0], x[0]):
        out[0] = matmul(matrix[0], x[0])
    elif len(x) == 1:
        torch.mm(matrix[0], x[0], out=out[0])
    else:
        torch.bmm(matrix, x, out=out)
    out.neg_().diagonal(dim1=-2, dim2=-1).add_(1.0)
    return out


def _powers(x: Tensor, residual: Tensor, order: int) -> Tensor:
    """``X (I + R + ... + R^(order - 1))``, symmetric to the last bit."""
    y = x
    for _ in range(order - 1):
        total = _like(x).copy_(x)
        if len(x) == 1:
            add_product_(total[0], y[0], residual[0], symmetric=True)
        else:
            total.baddbmm_(y, residual)
        y = mirror_(total)
    return y
