"""Which kernels or operators the parts spend their time in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from kronfac.experiments.bench.parts import inverse, started
from kronfac.experiments.bench.steps import KINDS, directions_of, gradients_of
from kronfac.experiments.bench.workloads import Workload

#: How many are shown.
SHOWN = 12


@dataclass(frozen=True)
class Operator:
    """One kernel or operator.

    Attributes:
        name: Its name.
        calls: How often it was called.
        ms: Milliseconds in it, without what it calls.
    """

    name: str
    calls: int
    ms: float

    def as_dict(self) -> dict[str, str | int | float]:
        """Return the numbers by name."""
        return asdict(self)


def operators(function: Callable[[], object], device: str, shown: int = SHOWN) -> list[Operator]:
    """Profile one call, after one that warms up.

    Args:
        function: What to call.
        device: Where it computes: on a GPU its kernels are listed, else PyTorch's operators.
        shown: How many to keep.

    Returns:
        The sum of all, which is less than the time that passes where a GPU waits, and those with most time, first.
    """
    function()
    gpu = device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        function()
        if gpu:
            torch.cuda.synchronize()
    kind = DeviceType.CUDA if gpu else DeviceType.CPU
    events = [event for event in profile.key_averages() if event.device_type == kind]
    found = [
        Operator(e.key, e.count, 1e-3 * (e.self_device_time_total if gpu else e.self_cpu_time_total)) for e in events
    ]
    whole = Operator("all", sum(o.calls for o in found), sum(o.ms for o in found))
    return [whole, *sorted(found, key=lambda operator: -operator.ms)[:shown]]


def profiles(work: Workload) -> dict[str, list[Operator]]:
    """Profile a forward with statistics (and without, to be taken off it), the inverse and the preconditioning.

    Args:
        work: The workload.

    Returns:
        Operators by part.
    """
    optimizer = started(work)
    gradients = gradients_of(work)
    device = work.device.type

    def plain() -> None:
        with optimizer.paused():
            work.forward()

    def gathering() -> None:
        optimizer._steps = KINDS["kfac with statistics"][0]
        work.forward()
        optimizer._gatherer.reset()

    return {
        "forward": operators(plain, device),
        "forward with statistics": operators(gathering, device),
        "inverse": operators(lambda: inverse(optimizer), device),
        "precondition": operators(lambda: directions_of(optimizer, gradients), device),
    }
