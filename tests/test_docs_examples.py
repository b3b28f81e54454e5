"""The Python of the README and of the documentation runs as printed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import kronfac as kf

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^```python\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
PAGES = ["README.md", *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md")))]


#: Tutorials, whose blocks build on each other. Elsewhere each block stands for itself.
TUTORIALS = {"docs/quickstart.md", "docs/reinforcement.md"}


def blocks(page: str) -> list[tuple[int, str]]:
    """Line number and text of each Python block of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [(text.count("\n", 0, match.start()) + 2, match.group(1)) for match in FENCE.finditer(text)]


def given() -> dict[str, Any]:
    """What the short examples leave to the reader: a model, its data, and a vector over its parameters."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    loader = [(torch.randn(32, 6), torch.randint(3, (32,))) for _ in range(2)]
    vector = {name: torch.randn_like(parameter) for name, parameter in model.named_parameters()}
    return {
        "kf": kf,
        "torch": torch,
        "nn": nn,
        "model": model,
        "loader": loader,
        "batch": loader[0],
        "vector": vector,
        "gradient": vector,
    }


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_page_runs(page: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    namespace = given()
    for line, code in blocks(page):
        if page not in TUTORIALS:
            namespace = given()
        # Padded to its place, so that a failure names the line of the page.
        exec(compile("\n" * (line - 1) + code, str(ROOT / page), "exec"), namespace)


def test_pages_with_examples_are_found() -> None:
    assert len(blocks("README.md")) >= 3
    assert len(blocks("docs/quickstart.md")) >= 6
