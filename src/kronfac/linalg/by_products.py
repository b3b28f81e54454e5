"""Inverses from Cholesky's factor in matrix products, for devices whose products outrun their library's inverse.

The factor comes from the library. Up to `WHOLE` rows so does its inverse, since small products wait for their launch,
not for arithmetic; beyond, it is built from those of its diagonal blocks, all of one size at once::

    [A  0]⁻¹     [    A⁻¹       0  ]
    [B  C]    =  [-C⁻¹ B A⁻¹   C⁻¹ ]

and ``M⁻¹ = Rᵀ R`` of the inverse triangle R by halves, without the products with its zeros: ``4/3 n³`` operations in
all after Cholesky's ``n³/3``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kronfac.linalg.symmetric import mirror_

#: Size of the diagonal blocks that the library inverts.
BLOCK = 64
#: Up to this size a triangle is inverted by one call and multiplied by itself, zeros included, by another.
WHOLE = 1024
#: A stack is factorised in one call if it has a matrix for each so many rows, else one by one, as large ones are.
_ROWS_PER_MATRIX = 256


def invert_by_products_(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Replace positive definite matrices, of which the upper triangles are read, by their inverses.

    Args:
        matrices: Shape ``[count, n, n]``, float32 or float64.

    Returns:
        Log-determinants, shape ``[count]``, and a mask of success, shape ``[count]``. What failed is garbage.
    """
    n = matrices.shape[-1]
    factor, good = _cholesky(_filled(matrices) if n > WHOLE else matrices)
    logdets = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    with torch.autocast(matrices.device.type, enabled=False):
        invert_triangles_(factor)
        square_triangles_(factor)
    matrices.copy_(mirror_(factor[:, :n, :n]))
    return logdets, good & logdets.isfinite() & matrices.diagonal(dim1=-2, dim2=-1).sum(-1).isfinite()


def _filled(matrices: Tensor) -> Tensor:
    """Bring matrices to a multiple of `BLOCK` by an identity, which stays itself."""
    count, n = matrices.shape[:2]
    size = -(-n // BLOCK) * BLOCK
    work = matrices.new_zeros(count, size, size)
    work[:, :n, :n] = matrices
    work.diagonal(dim1=-2, dim2=-1)[:, n:] = 1.0
    return work


def _cholesky(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Lower factors, row after row, and which of them are some."""
    together = len(matrices) * _ROWS_PER_MATRIX >= matrices.shape[-1]
    parts = [torch.linalg.cholesky_ex(part.mT) for part in ([matrices] if together else matrices.split(1))]
    return torch.cat([part.L for part in parts]).contiguous(), torch.cat([part.info for part in parts]) == 0


def invert_triangles_(triangles: Tensor) -> Tensor:
    """Invert lower triangles in place.

    Args:
        triangles: Shape ``[count, n, n]``, zero above the diagonal; n is at most `WHOLE` or a multiple of `BLOCK`.

    Returns:
        ``triangles``.
    """
    n = triangles.shape[-1]
    size = BLOCK if n > WHOLE else n
    blocks = _diagonal_blocks(triangles, size)
    eye = torch.eye(size, dtype=triangles.dtype, device=triangles.device)
    blocks.copy_(torch.linalg.solve_triangular(blocks, eye.expand_as(blocks), upper=False))
    while size < n:
        whole = n // (2 * size) * (2 * size)
        pairs = _diagonal_blocks(triangles[:, :whole, :whole], 2 * size)
        for pair in (pairs, triangles[:, whole:, whole:]):
            first, below, second = pair[..., :size, :size], pair[..., size:, :size], pair[..., size:, size:]
            if below.numel():
                below.copy_((second @ (below @ first)).neg_())
        size *= 2
    return triangles


def _diagonal_blocks(matrices: Tensor, size: int) -> Tensor:
    """View of the blocks of ``[count, n, n]`` along the diagonal, ``[count, n / size, size, size]``."""
    split = matrices.unflatten(2, (-1, size)).unflatten(1, (-1, size))
    return split.diagonal(dim1=1, dim2=3).movedim(-1, 1)


def square_triangles_(triangles: Tensor) -> Tensor:
    """Replace lower triangles ``R`` by the upper triangles of ``Rᵀ R``; what lies below is garbage.

    Args:
        triangles: Shape ``[count, n, n]``, zero above the diagonal.

    Returns:
        ``triangles``.
    """
    n = triangles.shape[-1]
    if n <= WHOLE:
        return triangles.copy_(triangles.mT @ triangles)
    h = -(-n // (2 * BLOCK)) * BLOCK
    first, below, second = triangles[:, :h, :h], triangles[:, h:, :h], triangles[:, h:, h:]
    square_triangles_(first).baddbmm_(below.mT, below)
    torch.bmm(below.mT, second, out=triangles[:, :h, h:])
    square_triangles_(second)
    return triangles
