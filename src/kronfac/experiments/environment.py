"""On what a comparison was run: times mean nothing without it."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path

import torch

import kronfac

_LOAD = "load at the start"


def environment() -> dict[str, object]:
    """Describe the machine and the versions in use.

    Returns:
        Short texts and numbers by name.
    """
    found: dict[str, object] = {
        "kronfac": kronfac.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": usable_cores(),
    }
    if hasattr(os, "getloadavg"):  # other work on the machine is in every figure of seconds
        found[_LOAD] = round(os.getloadavg()[0], 1)
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def warning(found: Mapping[str, object]) -> str:
    """Say whether figures of seconds can be trusted.

    Args:
        found: What `environment` gave, then or now.

    Returns:
        A sentence if the machine was busier at the start than it has cores, else nothing.
    """
    load, cores = found.get(_LOAD), found.get("cores")
    if isinstance(load, int | float) and isinstance(cores, int) and load > cores:
        return f"the machine was busy at the start (load {load} on {cores} cores): seconds are distorted by other work"
    return ""


def usable_cores() -> int:
    """Count the cores this process may use.

    Returns:
        Their number, at least one.
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def free_memory(device: str = "cpu") -> int | None:
    """Say how much memory there is to be had now.

    Args:
        device: Where.

    Returns:
        Bytes; None where the system does not say.
    """
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    try:
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    return None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"
