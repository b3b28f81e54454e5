"""Conjugate gradients for a symmetric positive definite matrix that is known by its products alone.

Hestenes & Stiefel (1952), preconditioned. The recursion's own residual drifts away from ``b - A x`` in floating point;
here it is checked by one more product before anything is called converged, and put right where it has drifted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

#: A vector: one tensor, a list of tensors, or tensors by name. What the caller gives is what the operator gets.
V = TypeVar("V")


class Iteration(NamedTuple):
    """One line of the record.

    Attributes:
        number: Iterations done; 0 for the start.
        residual: ``|b - A x| / |b|``, by the recursion.
        objective: ``1/2 x^T A x - b^T x``, which falls from one iteration to the next.
    """

    number: int
    residual: float
    objective: float


@dataclass(frozen=True)
class CGResult(Generic[V]):
    """What `conjugate_gradient` found.

    Attributes:
        solution: ``x``, in the form of ``b``.
        residual: ``|b - A x| / |b|``, by a product of its own; 0 for ``b = 0``.
        converged: Whether that is within the tolerance.
        reason: Why it ended: ``"tolerance"``, ``"progress"``, ``"iterations"``, or ``"precision"`` where rounding
            keeps the residual above the tolerance.
        iterations: Iterations done.
        products: Products with the matrix, those for the start and for checks included.
        record: A line for the start and one for each iteration.
    """

    solution: V
    residual: float
    converged: bool
    reason: str
    iterations: int
    products: int
    record: tuple[Iteration, ...]


@torch.no_grad()
def conjugate_gradient(
    operator: Callable[[V], V],
    b: V,
    *,
    tolerance: float = 1e-6,
    max_iterations: int = 250,
    preconditioner: Callable[[V], V] | None = None,
    start: V | None = None,
    progress: float | None = None,
    observe: Callable[[int, V], None] | None = None,
) -> CGResult[V]:
    """Solve ``A x = b``.

    In exact arithmetic it ends after as many iterations as there are distinct eigenvalues of the preconditioned
    matrix; after one if the preconditioner is the inverse.

    Args:
        operator: Product with ``A``, symmetric positive definite. It takes and returns vectors in the form of ``b``
            and must not change what it is given.
        b: A tensor, a sequence of tensors, or tensors by name; of one dtype, on one device.
        tolerance: Converged once ``|b - A x| <= tolerance |b|``; between the dtype's rounding unit and 1.
        max_iterations: End after so many iterations in any case.
        preconditioner: Product with an approximation of the inverse of ``A``, symmetric positive definite.
        start: Where to begin (a warm start); zero by default.
        progress: Martens' (2010, section 4.4) rule with this ``epsilon`` (he takes 5e-4): end at iteration ``i`` if the
            objective ``q`` is negative and ``(q_i - q_(i-k)) / q_i < k epsilon`` with ``k = max(10, i / 10)``.
        observe: Called after each iteration with its number and the iterate, which it must copy to keep.

    Returns:
        Solution, residual and record. Not converged is no error: look at ``converged``.

    Raises:
        ValueError: If an argument is out of range, or what the operator returns does not fit.
        FloatingPointError: If a product is NaN or infinite, or the squares of ``b`` are, or vanish.
        torch.linalg.LinAlgError: If the matrix or the preconditioner turns out not to be positive definite.
    """  # noqa: DOC501, DOC502 - helpers raise them
    form = _Form(b)
    rhs = form.flatten(b, "b")
    _check(tolerance, max_iterations, progress, rhs)
    scale = _norm(rhs)
    if not math.isfinite(scale) or (scale == 0.0 and bool(rhs.any())):
        raise _without_norm(rhs)
    if scale == 0.0:
        return CGResult(form.restore(torch.zeros_like(rhs)), 0.0, True, "tolerance", 0, 0, (Iteration(0, 0.0, 0.0),))
    apply = _Counted(form, operator)
    x = torch.zeros_like(rhs) if start is None else form.flatten(start, "start").clone()
    residual = rhs.clone() if start is None else rhs - apply(x, "the product with the start")
    record = [_line(0, x, residual, rhs, scale)]
    direction, previous, checked = torch.zeros_like(rhs), math.inf, math.inf
    iterations, reason = 0, "tolerance" if record[0].residual <= tolerance else "iterations"
    while reason == "iterations" and iterations < max_iterations:
        solved = (
            residual
            if preconditioner is None
            else form.flatten(preconditioner(form.restore(residual)), "the preconditioned residual")
        )
        slope = _dot(residual, solved)
        if not slope > 0.0:
            raise _not_positive("the preconditioner", "r^T P r", slope, iterations)
        direction = solved + (slope / previous) * direction
        previous = slope
        product = apply(direction, f"the product of iteration {iterations + 1}")
        curvature = _dot(direction, product)
        if not curvature > 0.0:
            raise _not_positive("the matrix", "p^T A p", curvature, iterations)
        x = x + (slope / curvature) * direction
        residual = residual - (slope / curvature) * product
        iterations += 1
        record.append(_line(iterations, x, residual, rhs, scale))
        if observe is not None:
            observe(iterations, form.restore(x))
        if record[-1].residual <= tolerance:
            residual = rhs - apply(x, "the product of the check")
            found = _norm(residual) / scale
            if found <= tolerance:
                reason = "tolerance"
            elif found > checked / 2:
                reason = "precision"
            # Otherwise the recursion had drifted: go on from the true residual, along the steepest descent at first.
            checked, previous = found, math.inf
        elif progress is not None and _stalled([line.objective for line in record], progress):
            reason = "progress"
    if reason in ("iterations", "progress") and iterations:
        residual = rhs - apply(x, "the product of the check")
    final = _norm(residual) / scale
    return CGResult(form.restore(x), final, final <= tolerance, reason, iterations, apply.count, tuple(record))


class _Form:
    """The form of a vector: how its tensors become one, and come back."""

    def __init__(self, like: object) -> None:
        self.names = tuple(like) if isinstance(like, Mapping) else None
        self.single = isinstance(like, Tensor)
        parts = self._parts(like, "b")
        self.shapes = [part.shape for part in parts]
        kinds = {(part.dtype, part.device) for part in parts}
        if len(kinds) != 1 or not parts[0].dtype.is_floating_point:
            raise ValueError(f"b must be of one floating dtype on one device, got {sorted(map(str, kinds))}")

    def _parts(self, vector: Any, what: str) -> list[Tensor]:
        if self.single:
            parts = [vector]
        elif self.names is not None:
            if not isinstance(vector, Mapping) or set(vector) != set(self.names):
                raise ValueError(f"{what} must have the names of b, {self.names}")
            parts = [vector[name] for name in self.names]
        else:
            parts = list(vector) if isinstance(vector, Sequence) else [vector]
        if not parts or not all(isinstance(part, Tensor) for part in parts):
            raise ValueError(f"{what} must be a tensor, a sequence of tensors or tensors by name")
        return parts

    def flatten(self, vector: Any, what: str) -> Tensor:
        parts = self._parts(vector, what)
        if [part.shape for part in parts] != self.shapes:
            raise ValueError(
                f"{what} has shapes {[tuple(p.shape) for p in parts]}, b has {[tuple(s) for s in self.shapes]}"
            )
        return parts[0].reshape(-1) if len(parts) == 1 else torch.cat([part.reshape(-1) for part in parts])

    def restore(self, flat: Tensor) -> Any:
        pieces = flat.split([shape.numel() for shape in self.shapes])
        parts = [piece.view(shape) for piece, shape in zip(pieces, self.shapes, strict=True)]
        if self.single:
            return parts[0]
        return parts if self.names is None else dict(zip(self.names, parts, strict=True))


class _Counted:
    """Products with flat vectors, counted and checked."""

    def __init__(self, form: _Form, operator: Callable[[Any], Any]) -> None:
        self.form, self.operator, self.count = form, operator, 0

    def __call__(self, x: Tensor, what: str) -> Tensor:
        self.count += 1
        product = self.form.flatten(self.operator(self.form.restore(x)), "the operator's product")
        if not bool(torch.isfinite(product).all()):
            raise FloatingPointError(f"{what} is not finite: look for NaN or infinity in the data or the parameters")
        return product


def _check(tolerance: float, max_iterations: int, progress: float | None, rhs: Tensor) -> None:
    unit = torch.finfo(rhs.dtype).eps
    if not unit <= tolerance < 1.0:
        raise ValueError(f"tolerance must be at least {unit:.1e} ({rhs.dtype}) and below 1, got {tolerance}")
    if isinstance(max_iterations, bool) or not isinstance(max_iterations, int) or max_iterations < 1:
        raise ValueError(f"max_iterations must be a positive integer, got {max_iterations!r}")
    if progress is not None and not 0.0 < progress < 1.0:
        raise ValueError(f"progress must lie between 0 and 1, or be None, got {progress}")


def _line(number: int, x: Tensor, residual: Tensor, rhs: Tensor, scale: float) -> Iteration:
    # With r = b - A x, the objective 1/2 x^T A x - b^T x needs no product.
    return Iteration(number, _norm(residual) / scale, -0.5 * _dot(x, rhs + residual))


def _without_norm(rhs: Tensor) -> Exception:
    if not bool(rhs.isfinite().all()):
        return FloatingPointError("b is not finite")
    return FloatingPointError(
        f"the squares of b, whose largest entry is {float(rhs.abs().max()):.3g}, are beyond {rhs.dtype}: scale b"
    )


def _stalled(objectives: list[float], epsilon: float) -> bool:
    done = len(objectives) - 1
    span = max(10, math.ceil(0.1 * done))
    if done <= span or objectives[-1] >= 0.0:
        return False
    return (objectives[-1] - objectives[-1 - span]) / objectives[-1] < span * epsilon


def _not_positive(what: str, form: str, value: float, iterations: int) -> Exception:
    if math.isnan(value):
        return FloatingPointError(f"{form} is NaN in iteration {iterations + 1}")
    return torch.linalg.LinAlgError(
        f"{what} is not positive definite: {form} = {value:.3g} in iteration {iterations + 1} of conjugate gradients; "
        "use a larger damping, or a curvature that is positive semi-definite"
    )


def _dot(left: Tensor, right: Tensor) -> float:
    return float(torch.dot(left, right))


def _norm(vector: Tensor) -> float:
    return float(torch.linalg.vector_norm(vector))
