"""What is analysed: a copy of the model in float64, its data, and the layers asked for."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kronfac.approximations import APPROXIMATIONS, Approximation, get_approximation
from kronfac.forwards import batches_of, call_model, pick_outputs
from kronfac.layers import LayerAdapter, adapt_model
from kronfac.likelihoods import Likelihood
from kronfac.measuring import apart_from_training, couples_examples, frozen_buffers
from kronfac.operators.passes import same_random_state
from kronfac.sources import DRAWN, SOURCES, Empirical, ForwardOnly, RootProbe, Source, get_source

#: Sources that estimate another matrix than the Gauss-Newton.
_OTHER_MATRICES = (Empirical, ForwardOnly)


@dataclass(frozen=True)
class Scene:
    """A model, its loss and data, as an analysis sees them.

    Attributes:
        model: A copy of the model in float64; parameters of layers that were not asked for are frozen.
        likelihood: The loss.
        batches: Pairs of inputs and targets; floating-point tensors in float64.
        adapters: The layers asked for, by name.
        outputs: Takes the output tensor out of what the model returns.
        options: ``sharing`` and ``norm``.
        uncovered: Trainable parameters without a block, with the reason.
    """

    model: nn.Module
    likelihood: Likelihood
    batches: list[tuple[Any, Any]]
    adapters: dict[str, LayerAdapter]
    outputs: Callable[[Any], Tensor] | None
    options: dict[str, str]
    uncovered: dict[str, str]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        likelihood: Likelihood,
        data: Iterable[Any] | tuple[Any, Any],
        *,
        layers: Sequence[str] | None = None,
        sharing: str = "expand",
        norm: str = "full",
        outputs: Callable[[Any], Tensor] | None = None,
    ) -> Scene:
        """Check and copy.

        Args:
            model: The model, in a mode in which its examples are independent.
            likelihood: The loss.
            data: A pair of inputs and targets, or an iterable of pairs.
            layers: Names of the layers to look at; all by default.
            sharing: ``"expand"`` or ``"reduce"``.
            norm: ``"full"`` or ``"unitwise"``.
            outputs: Takes the output tensor out of what the model returns.

        Returns:
            The scene.

        Raises:
            TypeError: Something is of the wrong kind.
            ValueError: There are no data, no such layer, or the model couples its examples or draws random numbers.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}.")
        if not isinstance(likelihood, Likelihood):
            raise TypeError(f"likelihood must be a kronfac.Likelihood, not {type(likelihood).__name__}.")
        if couples_examples(model):
            raise ValueError(
                "Everything is compared with the exact Gauss-Newton matrix, a sum over examples, but batch norm in "
                "train mode couples the examples of a batch: call model.eval() first."
            )
        batches = [(_double(x), _double(y)) for x, y in batches_of(data)]
        if not batches:
            raise ValueError("data is empty: there is nothing to analyse.")
        twin = copy.deepcopy(model).double()
        require_one_network(twin, batches[0][0], outputs)
        adaptation = adapt_model(twin, sharing=sharing, norm=norm)
        if not adaptation.adapters:
            raise ValueError("No layer of the model has a curvature block; see kronfac.coverage(model).")
        if layers is not None:
            _check_names("layer", layers, adaptation.adapters)
            kept = {name for layer in layers for name in adaptation.adapters[layer].parameter_names}
            for name, parameter in twin.named_parameters():
                parameter.requires_grad_(name in kept)
            adaptation = adapt_model(twin, sharing=sharing, norm=norm)
        return cls(
            twin,
            likelihood,
            batches,
            adaptation.adapters,
            outputs,
            {"sharing": sharing, "norm": norm},
            adaptation.uncovered,
        )


def require_one_network(model: nn.Module, inputs: Any, pick: Callable[[Any], Tensor] | None) -> None:
    """Refuse a model that draws random numbers: what is compared would be the curvatures of several networks.

    Args:
        model: The model.
        inputs: Inputs of one batch.
        pick: Takes the output tensor out of what the model returns.

    Raises:
        ValueError: Two forward passes give different outputs.
    """
    with frozen_buffers(model), same_random_state(model), torch.no_grad(), apart_from_training():
        first, second = (pick_outputs(call_model(model, inputs), pick) for _ in range(2))
    if not (first.is_floating_point() and first.numel() and bool(first.isfinite().all())):
        return  # the likelihood will say so
    alike = torch.finfo(first.dtype).eps ** 0.5
    if first.shape != second.shape or bool((first - second).abs().max() > alike * first.abs().max()):
        raise ValueError(
            "Two forward passes over the same batch give different outputs, so that there is no one matrix to compare "
            "with: dropout in train mode? Call model.eval() first, or set its p to 0."
        )


def methods_of(approximations: Sequence[str | Approximation] | str | Approximation | None) -> list[Approximation]:
    """Look approximations up.

    Args:
        approximations: Names or objects, or one; None for every one there is.

    Returns:
        The approximations.
    """
    if approximations is None:
        approximations = list(APPROXIMATIONS)
    if isinstance(approximations, (str, Approximation)):
        approximations = [approximations]
    return [get_approximation(each) for each in approximations]


def sources_of(sources: Sequence[str | Source] | str | Source | None, samples: int) -> list[Source]:
    """Look sources up, and refuse those that do not estimate the Gauss-Newton matrix.

    Args:
        sources: Names or objects, or one; None for every one that does.
        samples: Samples of the sampled source.

    Returns:
        The sources.

    Raises:
        ValueError: One estimates another matrix.
    """
    if sources is None:
        fitting = {name: kind for name, kind in SOURCES.items() if not issubclass(kind, (*_OTHER_MATRICES, RootProbe))}
        sources = [name for _, name in sorted((not kind.exact, name) for name, kind in fitting.items())]
    if isinstance(sources, (str, Source)):
        sources = [sources]
    found = [get_source(each, samples if each in DRAWN else 1) for each in sources]
    for source in found:
        if isinstance(source, _OTHER_MATRICES):
            raise ValueError(
                f"source={source.name!r} does not estimate the Gauss-Newton matrix, with which everything is compared."
            )
    return found


def _check_names(what: str, names: Sequence[str], known: Mapping[str, object]) -> None:
    if isinstance(names, str):
        raise TypeError(f"{what}s must be a list of names, got the text {names!r}.")
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"There is no {what} {unknown[0]!r} with a curvature block; there are {', '.join(known)}.")
    if not names:
        raise ValueError(f"{what}s is empty.")


def _double(value: Any) -> Any:
    """Floating-point tensors in float64, in whatever holds them."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: _double(entry) for key, entry in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_double(entry) for entry in value)
    return value


def measure(scene: Scene) -> tuple[int, int]:
    """Count what the data and the outputs amount to.

    Args:
        scene: What is analysed.

    Returns:
        The number of examples, and that of all their outputs: as many columns has the exact root at most.
    """
    examples = roots = 0
    with torch.no_grad(), apart_from_training():
        for inputs, _ in scene.batches:
            values = pick_outputs(call_model(scene.model, inputs), scene.outputs)
            examples, roots = examples + len(values), roots + values.numel()
    return examples, roots
