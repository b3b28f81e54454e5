"""What analyses share: a model held still, its gradient, and measurements along a training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from kronfac.forwards import batches_of
from kronfac.likelihoods import Likelihood
from kronfac.operators.passes import Pick, leaves, run

Row = TypeVar("Row")
Batches = list[tuple[Any, Any]]


@dataclass(frozen=True)
class Scene:
    """A model, its loss and data, as an analysis sees them.

    Attributes:
        model: The model.
        likelihood: The loss.
        batches: Pairs of inputs and targets.
        outputs: Takes the output tensor out of what the model returns.
    """

    model: nn.Module
    likelihood: Likelihood
    batches: Batches
    outputs: Pick = None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        likelihood: Likelihood,
        data: Iterable[Any] | tuple[Any, Any],
        outputs: Pick,
        dtype: torch.dtype | None,
    ) -> Scene:
        """Check and collect.

        Args:
            model: The model.
            likelihood: The loss.
            data: Pairs of inputs and targets, or one.
            outputs: Takes the output tensor out of what the model returns.
            dtype: Work on a copy of model and data in this dtype; None for the model itself.

        Returns:
            The scene.

        Raises:
            TypeError: If something is of the wrong kind.
            ValueError: If there are no data.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if not isinstance(likelihood, Likelihood):
            raise TypeError(f"likelihood must be a kronfac.Likelihood, got {type(likelihood).__name__}")
        batches = list(batches_of(data))
        if not batches:
            raise ValueError("data is empty: there is nothing to measure on")
        if dtype is not None:
            if dtype not in (torch.float32, torch.float64):
                raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
            model = copy.deepcopy(model).to(dtype)
            batches = [(_converted(x, dtype), _converted(y, dtype)) for x, y in batches]
        return cls(model, likelihood, batches, outputs)

    def gradient(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Gradient of the loss over all batches, as the likelihood's reduction defines it; ``.grad`` is left alone.

        Args:
            names: The parameters to differentiate in.

        Returns:
            By parameter name.

        Raises:
            FloatingPointError: If it is not finite.
        """
        total: list[Tensor] = []
        denominators = []
        for inputs, targets in self.batches:
            with torch.enable_grad():
                parameters = leaves(self.model, tuple(names))
                outputs = run(self.model, parameters, inputs, self.outputs)
                loss = self.likelihood.sum_loss(outputs, targets)
                part = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
            total = [t + p for t, p in zip(total, part, strict=True)] if total else list(part)
            denominators.append(self.likelihood.denominator(outputs.detach(), targets))
        summed = self.likelihood.reduction == "sum"
        scale = torch.ones_like(denominators[0]) if summed else torch.stack(denominators).sum()
        gradient = {name: t / scale.to(t) for name, t in zip(names, total, strict=True)}
        if not all(bool(torch.isfinite(g).all()) for g in gradient.values()):
            raise FloatingPointError("the gradient is not finite: the loss has diverged, or the data hold NaN")
        return gradient


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch batch norm and dropout to evaluation for a block, and every module back to its own mode.

    Args:
        model: The model.

    Yields:
        Nothing.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def along_training(
    advance: Callable[[], object], steps: int, every: int, measure: Callable[[int], list[Row]]
) -> list[Row]:
    """Measure before the first step, after every few and after the last.

    Args:
        advance: Does one step of training.
        steps: Their number.
        every: Steps between measurements.
        measure: From the number of steps done to rows.

    Returns:
        All rows.

    Raises:
        ValueError: If a number is out of range.
    """
    for name, value, low in (("steps", steps, 0), ("every", every, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ValueError(f"{name} must be a whole number of at least {low}, got {value!r}")
    rows = measure(0)
    for step in range(1, steps + 1):
        advance()
        if step % every == 0 or step == steps:
            rows += measure(step)
    return rows


def _converted(value: Any, dtype: torch.dtype) -> Any:
    """Tensors of a batch in another floating dtype, through tuples, lists and mappings."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _converted(item, dtype) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_converted(item, dtype) for item in value)
    return value
