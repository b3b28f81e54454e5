from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def metrics_of() -> Callable[[Path], list[dict[str, float]]]:
    """Reads all lines of all runs below a folder, without what the clock decides."""

    def read(folder: Path) -> list[dict[str, float]]:
        lines = []
        for path in sorted(folder.glob("runs/*/metrics.jsonl")):
            for line in path.read_text().splitlines():
                record = json.loads(line)
                del record["seconds"]
                lines.append({"run": path.parent.name, **record})
        return lines

    return read
