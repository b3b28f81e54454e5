"""Inverses by Cholesky that either succeed or say why not.

Every function takes symmetric positive semi-definite matrices of shape ``[*stack, n, n]`` in float32 or float64, and
retries in float64 what failed in float32. What still fails raises `torch.linalg.LinAlgError` with the size, the
smallest diagonal entry and the advice to raise the damping.

The work is done in place on one copy that becomes the result, so nothing but the results is allocated. Measured on a
CPU (float32, one thread): small matrices gain from one batched call (64 matrices of size 10: 0.08 ms against 0.66 ms in
a loop), large ones do not (size 128: equal), and the batched call of `torch.cholesky_inverse` that is *not* in place is
slower than the loop by 3-5 times. Hence the two thresholds; on an accelerator equal shapes always share a call.
On a GPU matrix products make the inverse of Cholesky's factor (`kronfac.linalg.by_products`; times of the forms by
``benchmarks/gpu_forms.py``), unless products are made in TF32. On a CPU they are no faster than LAPACK.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kronfac.linalg.by_products import invert_by_products_
from kronfac.linalg.factorise import add_shift_, check_matrices, groups_of, is_singular, note_retry, own, refuse
from kronfac.linalg.precision import tf32_allowed
from kronfac.linalg.side_by_side import side_by_side
from kronfac.linalg.symmetric import is_wide, row_step

#: Up to this size a stack on the CPU goes to LAPACK in one batched call, beyond it one by one.
_BATCH_UP_TO = 128
#: Entries that are inverted at once on a GPU, with twice as many beside them: 512 MB in float32.
_ENTRIES_GPU = 1 << 27


class Inverted(NamedTuple):
    """An inverse with the log-determinant of what was inverted.

    Attributes:
        inverse: ``(M + s I)^-1``, shape ``[*stack, n, n]``, symmetric to the last bit.
        logdet: ``log det (M + s I)``, shape ``[*stack]``.
    """

    inverse: Tensor
    logdet: Tensor


@torch.no_grad()
def invert(
    matrices: Sequence[Tensor],
    shifts: Sequence[Tensor | float],
    names: Sequence[str] | None = None,
    scales: Sequence[float] | None = None,
) -> list[Inverted]:
    """Invert ``c_i M_i + s_i I`` for a list of symmetric positive semi-definite matrices, from their upper triangles.

    Args:
        matrices: Matrices of shape ``[*stack, n, n]``, float32 or float64; sizes and stacks may differ.
        shifts: What is added to each diagonal: a number, or a tensor that broadcasts to the stack.
        names: What to call each matrix in an error; ``"matrix <index>"`` by default.
        scales: ``c_i``; ones by default.

    Returns:
        One `Inverted` per matrix, in the order, shapes and dtypes of ``matrices``.

    Raises:
        ValueError: If the sequences differ in length, or a shift does not broadcast to its stack.
    """
    labels = check_matrices(matrices, names)
    factors = [1.0] * len(matrices) if scales is None else scales
    for what, given in (("shifts", shifts), ("scales", factors)):
        if len(given) != len(matrices):
            raise ValueError(f"{len(matrices)} matrices need as many {what}, got {len(given)}")
    results: dict[int, Inverted] = {}
    groups = groups_of(matrices)

    def work_on(group: list[int]) -> Tensor:
        single = len(group) == 1
        work, parts = _workspace([matrices[i] for i in group], [factors[i] for i in group])
        for part, i in zip(parts, group, strict=True):
            add_shift_(part, shifts[i], labels[i])
        logdets, good = _invert_in_place(work)
        for position, (part, i) in enumerate(zip(parts, group, strict=True)):
            results[i] = Inverted(part if single else own(part), logdets if single else logdets[position])
        return good

    # With a wide one on the CPU there are threads of one core each, and small ones are faster there than on two.
    on_cpu = [g for g in groups if matrices[g[0]].device.type == "cpu"]
    apart = on_cpu if any(matrices[g[0]].shape[-1] > _BATCH_UP_TO for g in on_cpu) else []
    goods = side_by_side(
        work_on, apart, [float(len(g) * matrices[g[0]].numel() * matrices[g[0]].shape[-1]) for g in apart]
    )
    others = [group for group in groups if group not in apart]
    goods += [work_on(group) for group in others]
    # Looked at when all are on their way, so that a GPU is not waited for in between.
    for group, good in zip(apart + others, goods, strict=True):
        if bool(good.all()):
            continue
        for position, i in enumerate(group):
            mask = good if len(group) == 1 else good[position]
            _repair(results[i], mask, matrices[i], factors[i], shifts[i], labels[i])
    return [results[i] for i in range(len(matrices))]


def _workspace(matrices: Sequence[Tensor], scales: Sequence[float]) -> tuple[Tensor, list[Tensor]]:
    """Multiply matrices of equal shape into where they are inverted in place.

    A wide one lies within a larger one, whose rows begin at multiples of 64 bytes: 0.86 of the time at 1001. What is
    added is an identity, which stays itself and adds nothing to the log-determinant.

    Returns:
        What is to be inverted, and each matrix's part of it.
    """
    first = matrices[0]
    if len(matrices) > 1:
        work = torch.stack(list(matrices))
        if any(scale != 1.0 for scale in scales):
            work *= work.new_tensor(scales).view(-1, *(1 for _ in first.shape))
        return work, list(work)
    if not is_wide(first):
        work = torch.mul(first, scales[0], out=first.new_empty(first.shape))
        return work, [work]
    n, step = first.shape[-1], row_step(first.shape[-1], first.dtype)
    work = first.new_empty(step, step)
    torch.mul(first, scales[0], out=work[:n, :n])
    work[n:] = 0.0
    work[:n, n:] = 0.0
    work.diagonal()[n:] = 1.0
    return work, [work[:n, :n]]


def _invert_in_place(work: Tensor) -> tuple[Tensor, Tensor]:
    """Replace matrices by their inverses; give log-determinants and a mask of success. What failed is garbage."""
    diagonal = work.diagonal(dim1=-2, dim2=-1)
    before = diagonal.clone()
    logdets, good = _invert_by_cholesky_(work)
    return logdets, good & ~is_singular(before, diagonal)


def _invert_by_cholesky_(work: Tensor) -> tuple[Tensor, Tensor]:
    n = work.shape[-1]
    flat = work.view(-1, n, n)
    if work.device.type == "cuda" and not tf32_allowed():
        parts = [invert_by_products_(part) for part in flat.split(max(1, _ENTRIES_GPU // (n * n)))]
        logdet, success = (torch.cat(found).view(work.shape[:-2]) for found in zip(*parts, strict=True))
        return logdet, success
    one_by_one = work.device.type == "cpu" and n > _BATCH_UP_TO
    logdets, goods = [], []
    for piece in flat.split(1 if one_by_one else max(len(flat), 1)):
        # LAPACK is column-major: the transpose of a symmetric matrix is the same one in the layout that needs no copy,
        # and its lower triangle is the upper one here.
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


def _repair(result: Inverted, good: Tensor, matrix: Tensor, scale: float, shift: Tensor | float, name: str) -> None:
    """Redo in float64, in place of the failed results."""
    bad = ~good
    if not bool(bad.any()):
        return
    work = matrix.to(torch.float64, memory_format=torch.contiguous_format, copy=True).mul_(scale)
    add_shift_(work, shift, name)
    if matrix.dtype == torch.float64:
        refuse(work, good, name)
    note_retry(name)
    shifted = work.clone()
    logdets, good_now = _invert_in_place(work)
    converted = work.to(matrix.dtype)
    good_now &= converted.diagonal(dim1=-2, dim2=-1).isfinite().all(-1)
    if not bool((good_now | good).all()):
        refuse(shifted, good_now | good, name)
    result.inverse[bad] = converted[bad]
    result.logdet[bad] = logdets[bad].to(matrix.dtype)
