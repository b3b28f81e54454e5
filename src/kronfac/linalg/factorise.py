"""Inverses by Cholesky and eigendecompositions that either succeed or say why they did not.

Every function takes symmetric positive semi-definite matrices of shape ``[*stack, n, n]`` in float32 or float64, and
retries in float64 what failed in float32. What still fails raises `torch.linalg.LinAlgError` with the size, the
smallest diagonal entry and the advice to raise the damping.

The work is done in place on one copy that becomes the result, so nothing but the results is allocated. Measured on a
CPU (float32, one thread): small matrices gain from one batched call (64 matrices of size 10: 0.08 ms against 0.66 ms in
a loop), large ones do not (size 128: equal), and the batched call of `torch.cholesky_inverse` that is *not* in place is
slower than the loop by 3-5 times. Hence the two thresholds below; on an accelerator equal shapes always share a call.
On a GPU inverting the triangle and one product of it with itself takes half the time of `torch.cholesky_inverse`
(benchmarks/gpu_forms.py), unless products are made in TF32. On a CPU, the triangle inverted by halves and multiplied
by itself in panels, all in matrix products, is no faster than LAPACK's routine: 25.5 ms against 21.8 at size 1001
(Cholesky included).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

from kronfac.linalg.symmetric import is_wide, mirror_, row_step

#: Up to this size a stack on the CPU goes to LAPACK in one batched call, beyond it one by one.
_BATCH_UP_TO = 128
#: Up to this size separate matrices on the CPU are copied together for the sake of one batched call.
_GROUP_UP_TO = 32
#: Entries that are inverted at once on a GPU, with twice as many beside them: 512 MB in float32.
_ENTRIES_GPU = 1 << 27


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


def _note_retry(name: str) -> None:
    found = _RETRIED.get()
    if found is not None:
        found.append(name)


class Inverted(NamedTuple):
    """An inverse with the log-determinant of what was inverted.

    Attributes:
        inverse: ``(M + s I)^-1``, shape ``[*stack, n, n]``, symmetric to the last bit.
        logdet: ``log det (M + s I)``, shape ``[*stack]``.
    """

    inverse: Tensor
    logdet: Tensor


class Eigendecomposition(NamedTuple):
    """Eigenvalues and eigenvectors of symmetric matrices.

    Attributes:
        values: Eigenvalues in ascending order, shape ``[*stack, n]``; negative ones, which are rounding, are set to
            zero.
        vectors: Orthonormal eigenvectors in the columns, shape ``[*stack, n, n]``.
    """

    values: Tensor
    vectors: Tensor


def cholesky_inverses(
    matrices: Sequence[Tensor], shifts: Sequence[Tensor | float], names: Sequence[str] | None = None
) -> list[Tensor]:
    """Invert ``M_i + s_i I`` for a list of symmetric positive semi-definite matrices.

    Args:
        matrices: Matrices of shape ``[*stack, n, n]``, float32 or float64; sizes and stacks may differ.
        shifts: What is added to each diagonal: a number, or a tensor that broadcasts to the stack.
        names: What to call each matrix in an error; ``"matrix <index>"`` by default.

    Returns:
        The inverses, in the order, shapes and dtypes of ``matrices``. Each is symmetric to the last bit.
    """
    return [result.inverse for result in invert(matrices, shifts, names)]


@torch.no_grad()
def invert(
    matrices: Sequence[Tensor], shifts: Sequence[Tensor | float], names: Sequence[str] | None = None
) -> list[Inverted]:
    """Invert ``M_i + s_i I`` as `cholesky_inverses` does, and keep the log-determinants.

    Args:
        matrices: Matrices of shape ``[*stack, n, n]``, float32 or float64; sizes and stacks may differ.
        shifts: What is added to each diagonal: a number, or a tensor that broadcasts to the stack.
        names: What to call each matrix in an error; ``"matrix <index>"`` by default.

    Returns:
        One `Inverted` per matrix, in order.

    Raises:
        ValueError: If the sequences differ in length, or a shift does not broadcast to its stack.
    """
    labels = check_matrices(matrices, names)
    if len(shifts) != len(matrices):
        raise ValueError(f"{len(matrices)} matrices need as many shifts, got {len(shifts)}")
    results: list[Inverted | None] = [None] * len(matrices)
    for group in groups_of(matrices):
        single = len(group) == 1
        work, parts = _workspace([matrices[i] for i in group])
        for part, i in zip(parts, group, strict=True):
            add_shift_(part, shifts[i], labels[i])
        logdets, good = _invert_in_place(work)
        all_good = bool(good.all())
        for position, (part, i) in enumerate(zip(parts, group, strict=True)):
            result = Inverted(part if single else own(part), logdets if single else logdets[position])
            if not all_good:
                _repair(result, good if single else good[position], matrices[i], shifts[i], labels[i])
            results[i] = result
    return [result for result in results if result is not None]


def _workspace(matrices: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Copy matrices of equal shape to where they are inverted in place.

    A wide one lies within a larger one, whose rows begin at multiples of 64 bytes: 0.86 of the time at 1001. What is
    added is an identity, which stays itself and adds nothing to the log-determinant.

    Returns:
        What is to be inverted, and each matrix's part of it.
    """
    first = matrices[0]
    if len(matrices) > 1:
        work = torch.stack(list(matrices))
        return work, list(work)
    if not is_wide(first):
        work = first.clone(memory_format=torch.contiguous_format)
        return work, [work]
    n, step = first.shape[-1], row_step(first.shape[-1], first.dtype)
    work = first.new_empty(step, step)
    work[:n, :n] = first
    work[n:] = 0.0
    work[:n, n:] = 0.0
    work.diagonal()[n:] = 1.0
    return work, [work[:n, :n]]


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
    _note_retry(name)
    factor, info = torch.linalg.cholesky_ex(matrix.double())
    good = (info == 0) & factor.diagonal(dim1=-2, dim2=-1).isfinite().all(-1)
    if not bool(good.all()):
        _fail(matrix, good, name)
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


def _invert_in_place(work: Tensor) -> tuple[Tensor, Tensor]:
    """Replace matrices by their inverses; give log-determinants and a mask of success. What failed is garbage."""
    n = work.shape[-1]
    flat = work.view(-1, n, n)
    if work.device.type == "cuda" and not torch.backends.cuda.matmul.allow_tf32:
        parts = [_invert_by_triangle(part) for part in flat.split(max(1, _ENTRIES_GPU // (n * n)))]
        logdet, success = (torch.cat(found).view(work.shape[:-2]) for found in zip(*parts, strict=True))
        return logdet, success
    one_by_one = work.device.type == "cpu" and n > _BATCH_UP_TO
    logdets, goods = [], []
    for piece in flat.split(1 if one_by_one else max(len(flat), 1)):
        # LAPACK is column-major and the matrix symmetric: its transpose is the same matrix in the layout that needs
        # no copy.
        factor = piece.mT
        info = torch.empty(factor.shape[:-2], dtype=torch.int32, device=factor.device)
        torch.linalg.cholesky_ex(factor, out=(factor, info))
        diagonal = factor.diagonal(dim1=-2, dim2=-1)
        logdet = 2 * diagonal.log().sum(-1)
        good = (info == 0) & logdet.isfinite()
        if not bool(good.all()):
            factor[~good] = torch.eye(n, dtype=work.dtype, device=work.device)
        logdets.append(logdet)
        torch.cholesky_inverse(factor, out=factor)
        goods.append(good & diagonal.sum(-1).isfinite())
    stack = work.shape[:-2]
    return torch.cat(logdets).view(stack), torch.cat(goods).view(stack)


def _invert_by_triangle(work: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`_invert_in_place`, for ``[count, n, n]``."""
    factor, info = torch.linalg.cholesky_ex(work)
    logdets = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    good = (info == 0) & logdets.isfinite()
    eye = torch.eye(work.shape[-1], dtype=work.dtype, device=work.device)
    if not bool(good.all()):
        factor[~good] = eye
    root = torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=False)
    with torch.autocast(work.device.type, enabled=False):
        torch.bmm(root.mT, root, out=work)
    mirror_(work)
    return logdets, good & work.diagonal(dim1=-2, dim2=-1).sum(-1).isfinite()


def _repair(result: Inverted, good: Tensor, matrix: Tensor, shift: Tensor | float, name: str) -> None:
    """Redo in float64, in place of the failed results."""
    bad = ~good
    if not bool(bad.any()):
        return
    work = matrix.to(torch.float64, memory_format=torch.contiguous_format, copy=True)
    add_shift_(work, shift, name)
    if matrix.dtype == torch.float64:
        _fail(work, good, name)
    _note_retry(name)
    shifted = work.clone()
    logdets, good_now = _invert_in_place(work)
    converted = work.to(matrix.dtype)
    good_now &= converted.diagonal(dim1=-2, dim2=-1).isfinite().all(-1)
    if not bool((good_now | good).all()):
        _fail(shifted, good_now | good, name)
    result.inverse[bad] = converted[bad]
    result.logdet[bad] = logdets[bad].to(matrix.dtype)


def _fail(matrix: Tensor, good: Tensor, name: str) -> None:
    """Raise for the first matrix of the stack that failed."""
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
        f"{where} ({size}) is not positive definite, in float64 too: the Cholesky factorisation failed; its smallest "
        f"diagonal entry with the damping added is {smallest:.3g}. Use a larger damping"
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
    _note_retry(name)
    try:
        values, vectors = torch.linalg.eigh(matrix.double())
    except torch.linalg.LinAlgError as error:
        smallest = matrix.diagonal(dim1=-2, dim2=-1).min().item()
        raise torch.linalg.LinAlgError(
            f"the eigendecomposition of {name} ({matrix.shape[-1]} x {matrix.shape[-1]}, smallest diagonal entry "
            f"{smallest:.3g}) failed in float64 too. Use a larger damping, or a rule that needs no eigenvectors"
        ) from error
    return values.to(matrix.dtype), vectors.to(matrix.dtype)
