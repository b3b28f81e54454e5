"""Penalties on disk: a safetensors file, which holds numbers and text and never code."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from kronfac.continual.base import Penalty, PenaltySum
from kronfac.continual.combine import Part, check_same
from kronfac.continual.decay import RecentredDecay
from kronfac.continual.quadratic import QuadraticPenalty
from kronfac.eager import eager_root
from kronfac.storage import StorageError, put_together, read_file, take_apart, write_file

_FORMAT = "kronfac.penalty"


def save(penalty: Penalty, path: str | os.PathLike[str]) -> None:
    """Save a penalty with its anchors.

    The file appears whole or not at all, and replaces what was there.

    Args:
        penalty: A quadratic penalty, a re-centred decay, or a sum of such.
        path: Where to; ``.safetensors`` is the customary ending.

    Raises:
        TypeError: If it is another penalty, or its curvature couples layers and is not KK-FAC's.
    """
    tensors: dict[str, Tensor] = {}
    entries = []
    for t, term in enumerate(penalty.terms if isinstance(penalty, PenaltySum) else (penalty,)):
        if isinstance(term, QuadraticPenalty):
            parts, entry = _quadratic(term)
        elif isinstance(term, RecentredDecay):
            parts, entry = _decay(term)
        else:
            raise TypeError(f"only quadratic penalties and re-centred decay can be saved, got {type(term).__name__}")
        tensors |= {f"{t}.{name}": tensor for name, tensor in parts.items()}
        entries.append(entry)
    write_file(path, tensors, {"terms": entries}, _FORMAT)


def load(path: str | os.PathLike[str], model: nn.Module) -> Penalty:
    """Load a penalty for a model with the layers it was saved with.

    Tensors come to the device of the model's parameters, in the dtype they were saved in. The anchors are those saved,
    not the model's parameters.

    Args:
        path: The file.
        model: The model; only names, kinds and shapes of its layers matter, and not what of it is trained.

    Returns:
        The penalty; a `PenaltySum` where several terms were saved.

    Raises:
        StorageError: If the file is no saved penalty, is damaged or of another version, or does not fit the model.
        TypeError: If the model is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    model = eager_root(model)
    tensors, content = read_file(Path(path), _FORMAT, "penalty")
    terms: list[Penalty] = []
    try:
        for t, entry in enumerate(content["terms"]):
            own = _below(tensors, f"{t}.")
            if entry["kind"] == "quadratic":
                terms.append(_load_quadratic(path, own, entry, model))
            elif entry["kind"] == "decay":
                terms.append(_load_decay(path, own, entry, model))
            else:
                raise StorageError(f"{path}: a term of the penalty is of the unknown kind {entry['kind']!r}")
        return terms[0] if len(terms) == 1 else PenaltySum(terms)
    except StorageError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise StorageError(f"{path}: the description of the penalty is damaged ({error!r})") from error


def _quadratic(penalty: QuadraticPenalty) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    parts = []
    for p, (weight, curvature) in enumerate(penalty.parts):
        try:
            blocks, content = take_apart(curvature)
        except TypeError as error:
            raise TypeError(f"a penalty with a {type(curvature).__name__} cannot be saved: {error}") from error
        tensors |= {f"part.{p}.{name}": tensor for name, tensor in blocks.items()}
        parts.append({"weight": weight, "curvature": content})
    # Loading reads them in the order of the first part's layers; `update` keeps them in that of the newest curvature.
    anchors = penalty.anchor_matrices
    tensors |= {f"anchor.{i}": anchors[layer] for i, layer in enumerate(penalty.parts[0][1].blocks)}
    entry: dict[str, Any] = {"kind": "quadratic", "strength": penalty.strength, "tasks": penalty.tasks, "parts": parts}
    if penalty.rest is not None:
        rest, entry["rest"] = _decay(penalty.rest)
        tensors |= {f"rest.{name}": tensor for name, tensor in rest.items()}
    return tensors, entry


def _decay(penalty: RecentredDecay) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {str(i): tensor for i, tensor in enumerate(penalty.anchor.values())}
    return tensors, {"kind": "decay", "strength": penalty.strength, "names": list(penalty.anchor)}


def _load_quadratic(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], entry: Mapping[str, Any], model: nn.Module
) -> QuadraticPenalty:
    parts: list[Part] = []
    for p, part in enumerate(entry["parts"]):
        curvature = put_together(path, _below(tensors, f"part.{p}."), part["curvature"], model)
        parts.append((float(part["weight"]), curvature))
        check_same(parts[0][1], parts[-1][1])
    if not parts:
        raise StorageError(f"{path}: a term of the penalty has no curvature")
    anchor = {}
    for i, (layer, block) in enumerate(parts[0][1].blocks.items()):
        matrix = tensors[f"anchor.{i}"]
        if matrix.shape != block.shape or matrix.dtype != block.dtype:
            raise StorageError(f"{path}: the anchor of layer {layer!r} does not fit its block")
        anchor[layer] = matrix.to(block.device)
    rest = _load_decay(path, _below(tensors, "rest."), entry["rest"], model) if "rest" in entry else None
    tasks = int(entry["tasks"])
    return QuadraticPenalty.from_parts(tuple(parts), anchor, strength=entry["strength"], tasks=tasks, rest=rest)


def _load_decay(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], entry: Mapping[str, Any], model: nn.Module
) -> RecentredDecay:
    live = dict(model.named_parameters())
    anchor = {}
    for i, name in enumerate(entry["names"]):
        if name not in live or live[name].shape != tensors[str(i)].shape:
            has = tuple(live[name].shape) if name in live else "no such parameter"
            raise StorageError(
                f"{path} was saved with the parameter {name!r} of shape {tuple(tensors[str(i)].shape)}, "
                f"the model has {has}"
            )
        anchor[name] = tensors[str(i)].to(live[name].device)
    return RecentredDecay(anchor, entry["strength"])


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
