"""Checkpoints: one file per run, written atomically and read without running code from it."""

from __future__ import annotations

from pathlib import Path

import torch

from kronfac.experiments.errors import CheckpointError
from kronfac.experiments.files import replace_atomically

_FORMAT = "kronfac-run-1"


def save_checkpoint(path: Path, run: str, state: dict[str, object]) -> None:
    """Write a checkpoint over the last one.

    Args:
        path: The file.
        run: What run this is, see `RunSettings.folder_name`.
        state: Tensors, numbers, texts, lists and mappings of such.
    """
    with replace_atomically(path) as stream:
        torch.save({"format": _FORMAT, "run": run, "state": state}, stream)


def load_checkpoint(path: Path, run: str) -> dict[str, object] | None:
    """Read a checkpoint.

    Args:
        path: The file.
        run: The run it must belong to.

    Returns:
        The state given to `save_checkpoint`, or None where there is no file.

    Raises:
        CheckpointError: If the file is damaged, no checkpoint, or another run's.
    """
    advice = "delete it to start this run anew"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        return None
    except Exception as error:  # what the unpickler raises on rubbish is anything from EOFError to IndexError
        raise CheckpointError(f"checkpoint {path} cannot be read; {advice}") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT or not isinstance(content.get("state"), dict):
        raise CheckpointError(f"{path} is not a checkpoint of a kronfac run; {advice}")
    if content.get("run") != run:
        raise CheckpointError(f"checkpoint {path} belongs to the run {content.get('run')!r}, not to {run!r}; {advice}")
    return content["state"]
