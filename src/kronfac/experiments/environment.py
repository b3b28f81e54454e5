"""On what a comparison was run: times mean nothing without it."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

import kronfac


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
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def usable_cores() -> int:
    """Count the cores this process may use.

    Returns:
        Their number, at least one.
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"
