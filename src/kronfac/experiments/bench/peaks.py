"""Peak memory of training steps on a CUDA device, beside the bytes of all Kronecker factors."""

from __future__ import annotations

from collections.abc import Callable

import torch

from kronfac.experiments.bench.roofline import factor_bytes
from kronfac.experiments.bench.steps import make_kfac, step
from kronfac.experiments.bench.workloads import Workload, free

#: Steps before the one that counts: buffers are there after them, and each library has chosen its algorithms.
_WARM_UP = 2

Peak = Callable[[Callable[[], object]], int]


def cuda_peak(function: Callable[[], object]) -> int:
    """Read the allocator's peak over one call.

    Args:
        function: What to call.

    Returns:
        Bytes of tensors, those that were there before included.
    """
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def peaks(work: Workload, peak: Peak = cuda_peak) -> dict[str, float]:
    """Measure a forward and backward, a step of SGD with momentum, and one of KFAC with statistics and a refresh.

    Args:
        work: The workload.
        peak: Gives the peak of a call.

    Returns:
        Bytes by name, and what KFAC has above SGD over the bytes of the factors.
    """

    def settled(function: Callable[[], object]) -> float:
        for _ in range(_WARM_UP):
            function()
        return float(peak(function))

    def first_order() -> float:
        sgd = torch.optim.SGD(work.model.parameters(), lr=0.0, momentum=0.9)
        return settled(lambda: step(work, sgd))

    found = {"forward+backward": settled(work.forward_backward), "step, sgd": first_order()}
    free(work.device.type)  # of the momentum, before KFAC's is made
    kfac = make_kfac(work, stats_every=1, invert_every=1)
    found["step, kfac with refresh"] = settled(lambda: step(work, kfac))
    factors = factor_bytes(kfac)
    above = (found["step, kfac with refresh"] - found["step, sgd"]) / factors
    return {"factors": factors, **found, "kfac above sgd, over factors": above}
