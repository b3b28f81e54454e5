"""What a row of the comparison is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from kronfac.experiments.bench import Workload

#: Columns of the table.
PARTS = ("statistics", "inverse", "precondition", "step")
#: Name under which the forward and backward of the plain model is timed.
BASE = "forward+backward"


@dataclass(frozen=True)
class Part:
    """One call to time.

    Attributes:
        function: The call.
        less: What it does besides, and is taken off again: :data:`BASE` or another part of the row.
        before: Called first, without being timed.
        note: What is being called, where the column's title does not say it all.
    """

    function: Callable[[], object]
    less: str | None = None
    before: Callable[[], object] | None = None
    note: str = ""


@dataclass(frozen=True)
class Steps:
    """Whole training steps of each kind, whose mean over a period follows from their shares.

    Attributes:
        kinds: Call and share in a period of each kind, made in this order in every round.
        note: The period.
    """

    kinds: dict[str, tuple[Callable[[], object], float]]
    note: str = ""


@dataclass(frozen=True)
class Gap:
    """A cell that is not filled.

    Attributes:
        reason: Why.
    """

    reason: str


Cells = dict[str, Part | Steps | Gap]
Rows = dict[str, Callable[[Workload], Cells]]
#: What a row is run for to see its memory: everything it does, once.
Everything = dict[str, Callable[[Workload], Callable[[], object]]]


def failure(error: BaseException) -> str:
    """Word an error in one line."""
    lines = str(error).strip().splitlines() or [""]
    text = lines[0] if len(lines[0]) <= 140 else lines[0][:137] + "..."
    return f"{type(error).__name__}: {text}".rstrip(": ")


def training_step(work: Workload, optimizer: Any) -> Callable[[], None]:
    """Make a function that takes one ordinary step."""

    def one() -> None:
        optimizer.zero_grad()
        work.loss(work.model(work.inputs), work.targets).backward()
        optimizer.step()

    return one


def in_turn(build: Callable[[Workload], Cells], work: Workload) -> Callable[[], None]:
    """Make a function that calls every part of a row once."""
    parts = [cell for cell in build(work).values() if isinstance(cell, Part)]

    def one() -> None:
        for part in parts:
            if part.before is not None:
                part.before()
            part.function()

    return one


def alternating(one: Callable[[], object], first: str, period: int, note: str) -> Steps:
    """Describe an optimiser that is set to refresh at every second step, from which longer periods are reckoned.

    Args:
        one: Takes a step.
        first: The kind of its first step, ``"refresh"`` or ``"plain"``.
        period: The period to reckon.
        note: What to say of it.

    Returns:
        Both kinds with their shares.
    """
    shares = {"refresh": 1 / period, "plain": 1 - 1 / period}
    order = (first, *(kind for kind in shares if kind != first))
    return Steps({kind: (one, shares[kind]) for kind in order}, note)


def matrices(model: nn.Module) -> list[nn.Module]:
    """Return the linear and convolutional layers, which are all that most peers treat."""
    return [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]


def loss_module(work: Workload) -> nn.Module:
    """Return the loss as a module; over pixels it is a mean instead of a sum, which costs the same."""
    return nn.BCEWithLogitsLoss() if work.name in ("autoencoder", "small") else nn.CrossEntropyLoss()


def gradients(work: Workload) -> dict[nn.Parameter, Tensor]:
    """Compute one gradient of every parameter."""
    work.forward_backward()
    return {p: p.grad.clone() for p in work.model.parameters() if p.grad is not None}


class Whole(Dataset):
    """A data set that hands out its one batch without stacking the examples anew."""

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        """Return everything, for it is asked for all at once."""
        return self.tensors


def one_batch(*tensors: Tensor) -> DataLoader:
    """Make a loader of one batch."""
    return DataLoader(Whole(*tensors), batch_size=len(tensors[0]), collate_fn=lambda batch: batch)
