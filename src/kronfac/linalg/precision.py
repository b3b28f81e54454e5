"""In which format CUDA multiplies float32 matrices."""

from __future__ import annotations

import torch


def tf32_allowed() -> bool:
    """Whether CUDA may round the operands of float32 products to TF32.

    Returns:
        What PyTorch's newer setting says, in which its older one shows too; the older one cannot be read where the
        newer one alone was changed.
    """
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")
