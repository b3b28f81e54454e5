"""The texts that the page on trust includes are those its script prints."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "docs" / "figures"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("trust_examples", FOLDER / "trust_examples.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["resnet20-coverage", "encoder-coverage", "unsupported-coverage"])
def test_coverage_is_as_printed(script: ModuleType, name: str) -> None:
    assert script.EXAMPLES[name]() + "\n" == (FOLDER / f"{name}.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["encoder-verify", "unsupported-verify"])
def test_verification_is_as_printed(script: ModuleType, name: str) -> None:
    # Errors that are rounding differ between machines.
    texts = [script.EXAMPLES[name]() + "\n", (FOLDER / f"{name}.txt").read_text(encoding="utf-8")]
    found, printed = (re.sub(r"\d\.?\d*e-\d+", "rounding", text).split() for text in texts)
    assert found == printed


def test_every_text_has_an_example_and_is_included(script: ModuleType) -> None:
    page = (FOLDER.parent / "trust.md").read_text(encoding="utf-8")
    for name in script.EXAMPLES:
        assert (FOLDER / f"{name}.txt").is_file()
        assert f"docs/figures/{name}.txt" in page
