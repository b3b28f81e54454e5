"""Cholesky factors and eigendecompositions that either succeed or say why they did not, and what all of them share.

Every function takes symmetric positive semi-definite matrices of shape ``[*stack, n, n]`` in float32 or float64, and
retries in float64 what failed in float32. What still fails raises `torch.linalg.LinAlgError` with the size, the
smallest diagonal entry and the advice to raise the damping.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

#: Up to this size separate matrices on the CPU are copied together for the sake of one batched call.
_GROUP_UP_TO = 32
#: Share of a full loss of digits at which an inverse counts as lost; see `is_singular`.
_EXPLAINED = 0.3
#: Where the names of matrices go that took float64.
_RETRIED: ContextVar[list[str] | None] = ContextVar("kronfac_retried", default=None)


@contextmanager
def retries() -> Iterator[list[str]]:
    """Collect the names of matrices that are factorised again in float64 within the block, in this thread.

    Yields:
        The list, which grows.
    """
    found: list[str] = []
    token = _RETRIED.set(found)
    try:
        yield found
    finally:
        _RETRIED.reset(token)


def note_retry(name: str) -> None:
    """Tell `retries` that a matrix took float64.

    Args:
        name: The matrix.
    """
    found = _RETRIED.get()
    if found is not None:
        found.append(name)


class Eigendecomposition(NamedTuple):
    """Eigenvalues and eigenvectors of symmetric matrices.

    Attributes:
        values: Eigenvalues in ascending order, shape ``[*stack, n]``; negative ones, which are rounding, are set to
            zero.
        vectors: Orthonormal eigenvectors in the columns, shape ``[*stack, n, n]``.
    """

    values: Tensor
    vectors: Tensor


def cholesky(matrix: Tensor, name: str = "matrix") -> Tensor:
    """Lower Cholesky factor, retried in float64.

    Args:
        matrix: Symmetric positive definite, shape ``[*stack, n, n]``, float32 or float64.
        name: What to call the matrix in an error.

    Returns:
        ``L`` with ``L L^T = matrix``, in the dtype of ``matrix``.
    """
    check_matrices([matrix], [name])
    factor, info = torch.linalg.cholesky_ex(matrix)
    if bool((info == 0).all() & factor.diagonal(dim1=-2, dim2=-1).isfinite().all()):
        return factor
    note_retry(name)
    factor, info = torch.linalg.cholesky_ex(matrix.double())
    good = (info == 0) & factor.diagonal(dim1=-2, dim2=-1).isfinite().all(-1)
    if not bool(good.all()):
        refuse(matrix, good, name)
    return factor.to(matrix.dtype)


@torch.no_grad()
def eighs(matrices: Sequence[Tensor], names: Sequence[str] | None = None) -> list[Eigendecomposition]:
    """Eigendecompositions of a list of symmetric positive semi-definite matrices.

    Args:
        matrices: Matrices of shape ``[*stack, n, n]``, float32 or float64; sizes and stacks may differ.
        names: What to call each matrix in an error; ``"matrix <index>"`` by default.

    Returns:
        One `Eigendecomposition` per matrix, in order.
    """
    labels = check_matrices(matrices, names)
    results: list[Eigendecomposition | None] = [None] * len(matrices)
    for group in groups_of(matrices):
        if len(group) == 1:
            results[group[0]] = _eigh(matrices[group[0]], labels[group[0]])
            continue
        values, vectors = _eigh(torch.stack([matrices[i] for i in group]), ", ".join(labels[i] for i in group))
        for position, i in enumerate(group):
            results[i] = Eigendecomposition(own(values[position]), own(vectors[position]))
    return [result for result in results if result is not None]


def eigh(matrix: Tensor, name: str = "matrix") -> Eigendecomposition:
    """Eigendecomposition of symmetric positive semi-definite matrices.

    Args:
        matrix: Shape ``[*stack, n, n]``, float32 or float64.
        name: What to call the matrix in an error.

    Returns:
        Eigenvalues, clipped at zero from below, and eigenvectors.
    """
    return eighs([matrix], [name])[0]


def check_matrices(matrices: Sequence[Tensor], names: Sequence[str] | None) -> Sequence[str]:
    """Refuse what cannot be inverted here.

    Args:
        matrices: The matrices.
        names: What to call each in an error, or None.

    Returns:
        A name for each matrix.

    Raises:
        TypeError: One is neither float32 nor float64.
        ValueError: One is not square, or there are more or fewer names.
    """
    labels = names if names is not None else [f"matrix {i}" for i in range(len(matrices))]
    if len(labels) != len(matrices):
        raise ValueError(f"{len(matrices)} matrices need as many names, got {len(labels)}")
    for matrix, label in zip(matrices, labels, strict=True):
        if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2]:
            raise ValueError(f"{label} must have shape [*stack, n, n], got {tuple(matrix.shape)}")
        if matrix.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{label} must be float32 or float64, got {matrix.dtype}: convert it first")
    return labels


def groups_of(matrices: Sequence[Tensor]) -> list[list[int]]:
    """Sort out which matrices share one call.

    Args:
        matrices: The matrices.

    Returns:
        Indices, in groups of equal shapes.
    """
    groups: dict[object, list[int]] = {}
    for i, matrix in enumerate(matrices):
        alone = matrix.device.type == "cpu" and matrix.shape[-1] > _GROUP_UP_TO
        key: object = i if alone else (matrix.shape, matrix.dtype, matrix.device)
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def own(part: Tensor) -> Tensor:
    """Copy a part of a stack on the CPU: products at odd addresses may round unlike those of the loaded inverse.

    Args:
        part: The part.

    Returns:
        A copy; on other devices the part itself.
    """
    return part.clone() if part.device.type == "cpu" else part


def add_shift_(work: Tensor, shift: Tensor | float, name: str) -> None:
    """Add a shift to the diagonal, in place.

    Args:
        work: Matrices of shape ``[*stack, n, n]``.
        shift: A number, or a tensor that broadcasts to the stack.
        name: What to call the matrix in an error.

    Raises:
        ValueError: The shift does not broadcast.
    """
    if isinstance(shift, Tensor) and shift.ndim:
        try:
            shift = shift.to(work).expand(work.shape[:-2]).unsqueeze(-1)
        except RuntimeError as error:
            raise ValueError(
                f"the shift of {name} has shape {tuple(shift.shape)}, which does not fit "
                f"its stack {tuple(work.shape[:-2])}"
            ) from error
    work.diagonal(dim1=-2, dim2=-1).add_(shift)


def is_singular(diagonal: Tensor, inverse: Tensor) -> Tensor:
    """Whether symmetric matrices are singular as far as their inverses tell, of which then no digit is right.

    Rounding makes the last pivot of a singular matrix as often positive as not, so that Cholesky's factorisation may
    well go through. ``M_ii (M^-1)_ii`` is how much of entry ``i`` the others explain, whatever its scale; in tries with
    3 to 400 rows it was at least ``0.38 / (ε √n)`` for what passed.

    Args:
        diagonal: Diagonals, shape ``[*stack, n]``.
        inverse: Those of the inverses.

    Returns:
        Shape ``[*stack]``.
    """
    least = _EXPLAINED / (torch.finfo(diagonal.dtype).eps * math.sqrt(diagonal.shape[-1]))
    return (diagonal * inverse).amax(-1) > least


def refuse(matrix: Tensor, good: Tensor, name: str) -> NoReturn:
    """Say what failed, for the first matrix of the stack that did.

    Args:
        matrix: Matrices of shape ``[*stack, n, n]``, with the damping added.
        good: Which of them did not fail, shape ``[*stack]``.
        name: What to call the matrix.

    Raises:
        torch.linalg.LinAlgError: Always.
    """
    element = tuple(int(i) for i in (~good).nonzero()[0])
    where = f"{name}, stack element {list(element)}," if element else name
    broken = matrix[element]
    size = f"{broken.shape[-1]} x {broken.shape[-1]}"
    if not bool(broken.isfinite().all()):
        raise torch.linalg.LinAlgError(
            f"{where} ({size}) contains NaN or Inf: the statistics it was made of were not finite"
        )
    smallest = broken.diagonal().min().item()
    raise torch.linalg.LinAlgError(
        f"{where} ({size}) is not positive definite, or singular to rounding, in float64 too; its smallest diagonal "
        f"entry with the damping added is {smallest:.3g}. Use a larger damping"
    )


def _eigh(matrix: Tensor, name: str) -> Eigendecomposition:
    finite = matrix.isfinite().all(-1).all(-1)
    if not bool(finite.all()):
        raise torch.linalg.LinAlgError(
            f"{name} ({matrix.shape[-1]} x {matrix.shape[-1]}) contains NaN or Inf: its statistics were not finite"
        )
    values, vectors = _eigh_with_retry(matrix, name)
    return Eigendecomposition(values.clamp_min(0), vectors)


def _eigh_with_retry(matrix: Tensor, name: str) -> tuple[Tensor, Tensor]:
    try:
        values, vectors = torch.linalg.eigh(matrix)
        if bool(values.isfinite().all()):
            return values, vectors
    except torch.linalg.LinAlgError:
        pass
    note_retry(name)
    try:
        values, vectors = torch.linalg.eigh(matrix.double())
    except torch.linalg.LinAlgError as error:
        smallest = matrix.diagonal(dim1=-2, dim2=-1).min().item()
        raise torch.linalg.LinAlgError(
            f"the eigendecomposition of {name} ({matrix.shape[-1]} x {matrix.shape[-1]}, smallest diagonal entry "
            f"{smallest:.3g}) failed in float64 too. Use a larger damping, or a rule that needs no eigenvectors"
        ) from error
    return values.to(matrix.dtype), vectors.to(matrix.dtype)
