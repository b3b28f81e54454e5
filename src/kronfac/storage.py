"""Curvature on disk: a safetensors file, which holds numbers and text and never code.

The file's metadata says what the tensors are: the format's version, the kind and shape of each layer's block, the
layers' parameters with their shapes, the kinds of their adapters and the options with which these were built. Loading
checks all of it against the model.
"""

from __future__ import annotations

import importlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kronfac.blocks import KINDS, Block
from kronfac.blocks.khatri_rao import KhatriRao
from kronfac.curvature import BlockDiagonal
from kronfac.curvature_coupled import CoupledCurvature
from kronfac.eager import eager_root
from kronfac.vectors import listed

if TYPE_CHECKING:
    from kronfac.layers.base import LayerAdapter

Curvature = BlockDiagonal | CoupledCurvature
_FORMAT, _VERSION, _COUPLED = "kronfac.curvature", 1, "coupled"


class StorageError(ValueError):
    """A file that is no saved curvature, is damaged, or does not fit the model."""


def save(curvature: Curvature, path: str | os.PathLike[str]) -> None:
    """Save a curvature, block-diagonal or KK-FAC's.

    The file appears whole or not at all: it is written beside its place and moved there. What was there before is
    replaced.

    Args:
        curvature: The curvature.
        path: Where to; ``.safetensors`` is the customary ending.

    Raises:
        TypeError: If it is neither.
    """  # noqa: DOC502
    write_file(path, *take_apart(curvature), _FORMAT)


def take_apart(curvature: Curvature) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Give a curvature as tensors and a description of them; `put_together` is the inverse.

    Args:
        curvature: The curvature.

    Returns:
        Tensors by name, and what JSON can hold.

    Raises:
        TypeError: If it is neither block-diagonal nor KK-FAC's.
    """
    coupled: KhatriRao | None = None
    if isinstance(curvature, CoupledCurvature) and isinstance(curvature.coupled, KhatriRao):
        coupled = curvature.coupled
    elif not isinstance(curvature, BlockDiagonal):
        raise TypeError(f"only block-diagonal curvature, or KK-FAC's, can be saved, got {type(curvature).__name__}")
    names = () if coupled is None else coupled.coupled_layers
    tensors = {
        f"{i}.{name}": tensor
        for i, (layer, block) in enumerate(curvature.blocks.items())
        if layer not in names
        for name, tensor in block.tensors().items()
    }
    content: dict[str, Any] = {
        "options": curvature.options,
        "layers": [_described(curvature, layer) for layer in curvature.blocks],
    }
    if coupled is not None:
        tensors |= {f"{_COUPLED}.{name}": tensor for name, tensor in coupled.tensors().items()}
        content[_COUPLED] = list(names)
    return tensors, content


def write_file(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], content: Mapping[str, Any], kind: str
) -> None:
    """Write tensors and their description, whole or not at all.

    Args:
        path: Where to; what was there before is replaced.
        tensors: Tensors by name.
        content: What JSON can hold.
        kind: What kind of file it is; `read_file` refuses any other.
    """
    safetensors = _safetensors()
    path = Path(path)
    # Cloned, because factors may share memory, which the format refuses.
    tensors = {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    metadata = {"format": kind, "version": str(_VERSION), "content": json.dumps(content)}
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    try:
        safetensors.save_file(tensors, temporary, metadata)
        _publish(Path(temporary), path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load(path: str | os.PathLike[str], model: nn.Module) -> Curvature:
    """Load a curvature for a model with the layers it was saved from.

    Blocks come to the device of their layer's parameters, in the dtype they were saved in.

    Args:
        path: The file.
        model: The model; only the names, kinds and shapes of its layers matter, and not what of it is trained.

    Returns:
        The curvature.

    Raises:
        StorageError: If the file is no saved curvature, is damaged or of another version, or does not fit the model.
    """  # noqa: DOC502
    return put_together(path, *read_file(Path(path), _FORMAT, "curvature"), model)


def put_together(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], content: Mapping[str, Any], model: nn.Module
) -> Curvature:
    """Rebuild a curvature from what `take_apart` gave, after checking it against a model.

    Args:
        path: The file it comes from, for messages.
        tensors: Tensors by name.
        content: Their description.
        model: The model.

    Returns:
        The curvature.

    Raises:
        StorageError: If the description is damaged or does not fit the model.
    """
    from kronfac.layers.model import adapt_model, trained_as  # imported here: it imports every adapter

    model = eager_root(model)
    parameters = dict(model.named_parameters())
    try:
        options = {str(key): str(value) for key, value in content["options"].items()}
        layers = [(str(entry["name"]), entry) for entry in content["layers"]]
        coupled = [str(name) for name in content.get(_COUPLED, ())]
    except (KeyError, TypeError, AttributeError) as error:
        raise StorageError(f"{path}: the description of the curvature is damaged ({error!r})") from error
    if len(dict(layers)) < len(layers):
        raise StorageError(f"{path}: the description of the curvature is damaged (a layer is in it twice)")
    if unknown := sorted(options.keys() - {"sharing", "norm"}):
        raise StorageError(f"{path}: the curvature was saved with the unknown options {unknown}")
    trained = {n: e["parameters"] if isinstance(e.get("parameters"), Mapping) else () for n, e in layers}
    try:
        with trained_as(model, trained):
            adapters: Mapping[str, LayerAdapter] = adapt_model(model, **options).adapters
    except ValueError as error:
        raise StorageError(f"{path}: the model cannot be adapted as it was for saving: {error}") from error
    blocks: dict[str, Block] = {}

    def parts(prefix: str, layer: str) -> dict[str, Tensor]:
        device = parameters[adapters[layer].parameter_names[0]].device
        return {key.removeprefix(prefix): tensors[key].to(device) for key in tensors if key.startswith(prefix)}

    for i, (layer, entry) in enumerate(layers):
        _check_layer(path, layer, entry, adapters, parameters)
        if layer in coupled:
            continue
        try:
            blocks[layer] = KINDS[entry["kind"]].from_tensors(parts(f"{i}.", layer), torch.Size(entry["shape"]))
        except (KeyError, TypeError, ValueError) as error:
            raise StorageError(f"{path}: the block of layer {layer!r} is damaged ({error})") from error
    owners = {_COUPLED if layer in coupled else str(i) for i, (layer, _) in enumerate(layers)}
    if foreign := sorted(key for key in tensors if key.partition(".")[0] not in owners):
        raise StorageError(f"{path} holds tensors that are no layer's: {listed(foreign)}. It is damaged")
    layouts = {layer: adapters[layer] for layer, _ in layers}
    try:
        if not coupled:
            return BlockDiagonal(blocks, layouts, list(parameters), options)
        widths = {layer: (adapters[layer].d_out, adapters[layer].d_in) for layer in coupled}
        matrices = KhatriRao.from_tensors(parts(f"{_COUPLED}.", coupled[0]), widths, blocks)
        return CoupledCurvature(matrices, layouts, list(parameters), options)
    except (KeyError, TypeError, ValueError) as error:
        raise StorageError(f"{path}: the curvature does not fit the model: {error}") from error


def _safetensors() -> Any:
    try:
        return importlib.import_module("safetensors.torch")
    except ImportError as error:
        raise ImportError("saving and loading curvature needs safetensors: pip install 'kronfac[io]'") from error


def _described(curvature: Curvature, layer: str) -> dict[str, Any]:
    block, names = curvature.blocks[layer], curvature.layouts[layer].parameter_names
    return {
        "name": layer,
        "kind": block.kind,
        "adapter": type(curvature.layouts[layer]).__name__,
        "shape": list(block.shape),
        "parameters": {name: list(curvature.parameter_shapes[name]) for name in names},
    }


def _publish(temporary: Path, path: Path) -> None:
    """Move a complete file to its place, surviving a crash on either side of the move."""
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    umask = os.umask(0)
    os.umask(umask)
    temporary.chmod(0o666 & ~umask)  # mkstemp made it private
    temporary.replace(path)


def read_file(path: Path, kind: str, what: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and the description of a file, its format and version checked.

    Args:
        path: The file.
        kind: What kind of file it must be.
        what: What it holds, in words.

    Returns:
        Tensors by name, and their description.

    Raises:
        StorageError: If it is damaged, of another kind or of another version.
        FileNotFoundError: If there is none.
    """
    _safetensors()
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != kind:
                raise StorageError(f"{path} is no {what} saved by kronfac")
            if metadata.get("version") != str(_VERSION):
                raise StorageError(
                    f"{path} has version {metadata.get('version')!r} of the format, this kronfac reads version "
                    f"{_VERSION}: use the kronfac that wrote it, or make the {what} again"
                )
            # Copied to where tensors begin in memory: from other addresses products differ in their last bits.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise StorageError(f"{path} is damaged, or no {what} saved by kronfac ({error})") from error
    try:
        content = json.loads(metadata["content"])
    except (KeyError, json.JSONDecodeError) as error:
        raise StorageError(f"{path}: the description of the {what} is damaged ({error!r})") from error
    return tensors, content


def _check_layer(
    path: str | os.PathLike[str],
    layer: str,
    entry: Mapping[str, Any],
    adapters: Mapping[str, LayerAdapter],
    parameters: Mapping[str, nn.Parameter],
) -> None:
    """Refuse a layer that is not the one that was saved."""
    if layer not in adapters:
        raise StorageError(f"{path} has a block for the layer {layer!r}, which the model lacks or which has no adapter")
    try:
        saved = {str(name): tuple(shape) for name, shape in entry["parameters"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise StorageError(f"{path}: the description of layer {layer!r} is damaged ({error!r})") from error
    present = {name: tuple(parameters[name].shape) for name in adapters[layer].parameter_names}
    if saved != present:
        raise StorageError(f"{path} was saved with the parameters {saved} of layer {layer!r}, the model has {present}")
    # Files from before adapters were named in them are held to their shapes alone.
    kind, shape = type(adapters[layer]).__name__, tuple(adapters[layer].shape)
    if entry.get("adapter", kind) != kind:
        raise StorageError(
            f"{path} was saved with a layer {layer!r} of another kind: its adapter was {entry['adapter']}, that of the "
            f"model's {type(adapters[layer].module).__name__} is {kind}"
        )
    if (saved_shape := entry.get("shape")) != list(shape):
        raise StorageError(
            f"{path} was saved with a block of shape {saved_shape} for layer {layer!r}, the model's layer has "
            f"{list(shape)}: are its groups others?"
        )
    if str(entry.get("kind")) not in KINDS:
        raise StorageError(f"{path}: the block of layer {layer!r} is of the unknown kind {entry.get('kind')!r}")
