"""The tasks of a stream, made from one data set: permuted pixels, rotated images, classes a few at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kronfac.experiments.datasets.base import Dataset
from kronfac.experiments.errors import ExperimentError

#: Images for training and for testing, standardised.
Images = tuple[Tensor, Tensor]


def _as_they_are(images: Tensor) -> Tensor:
    return images


@dataclass(frozen=True)
class Task:
    """One task of a stream.

    Attributes:
        name: What it is, for people.
        train_inputs: float32, before ``arrange``; tasks with the same images share them.
        train_targets: int64; places in ``classes`` where these are given.
        test_inputs: As in training.
        test_targets: As in training.
        classes: The outputs of the network that the task uses; None for all.
        arrange: Makes what the network takes of images, as they are read.
        held_out: The same task with held-out training examples as its test set, to choose hyper-parameters by; None
            where nothing is held out.
    """

    name: str
    train_inputs: Tensor
    train_targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor
    classes: tuple[int, ...] | None = None
    arrange: Callable[[Tensor], Tensor] = _as_they_are
    held_out: Task | None = None

    def training(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Give training examples.

        Args:
            rows: Which ones.

        Returns:
            Inputs, as the network takes them, and targets.
        """
        return self.arrange(self.train_inputs[rows]), self.train_targets[rows]

    def tests(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Go through the test set.

        Args:
            size: Examples of a batch.

        Yields:
            Inputs, as the network takes them, and targets.
        """
        for inputs, targets in zip(self.test_inputs.split(size), self.test_targets.split(size), strict=True):
            yield self.arrange(inputs), targets

    def holding_out(self, count: int) -> Task:
        """Keep the last training examples for choosing hyper-parameters.

        Args:
            count: How many.

        Returns:
            The task, without them in its training set.

        Raises:
            ExperimentError: If the task has no more than that.
        """
        if count == 0:
            return self
        if not 0 < count < len(self.train_inputs):
            raise ExperimentError(f"{count} of the {len(self.train_inputs)} training examples cannot be held out")
        held = replace(self, test_inputs=self.train_inputs[-count:], test_targets=self.train_targets[-count:])
        return replace(
            self,
            train_inputs=self.train_inputs[:-count],
            train_targets=self.train_targets[:-count],
            held_out=held,
        )

    def outputs(self, outputs: Tensor) -> Tensor:
        """Pick the outputs that the task uses.

        Args:
            outputs: All logits, ``[N, C]``.

        Returns:
            The task's logits.
        """
        return outputs if self.classes is None else outputs[:, list(self.classes)]


def _permuted(data: Dataset, images: Images, count: int, generator: torch.Generator, flat: bool) -> list[Task]:
    """Pixels in an order of the task's own; the first task has them as they are."""
    shape = images[0].shape[1:]
    pixels, tasks = shape.numel(), []
    for index in range(count):
        order = torch.arange(pixels) if index == 0 else torch.randperm(pixels, generator=generator)
        arrange = partial(_in_order, order=order, shape=[pixels] if flat else shape)
        tasks.append(_task(f"permutation {index + 1}", data, *images, arrange))
    return tasks


def _in_order(images: Tensor, order: Tensor, shape: Sequence[int]) -> Tensor:
    return images.flatten(1)[:, order].view(-1, *shape)


def _rotated(data: Dataset, images: Images, count: int, generator: torch.Generator, flat: bool) -> list[Task]:
    """Images turned by 0 … 180 degrees, the last one excluded, in equal steps."""
    tasks = []
    for index in range(count):
        angle = 180.0 * index / count
        train, test = (rotate(part, angle).flatten(1) if flat else rotate(part, angle) for part in images)
        tasks.append(_task(f"{angle:g} degrees", data, train, test))
    return tasks


def _split(data: Dataset, images: Images, count: int, generator: torch.Generator, flat: bool) -> list[Task]:
    """A few classes at a time; each task has outputs of its own (task-incremental learning)."""
    order = torch.randperm(data.classes, generator=generator).view(count, -1)
    tasks = []
    for row in order.sort(1).values:
        parts = []
        for whole, labels in zip(images, (data.train.labels, data.test.labels), strict=True):
            chosen = torch.isin(labels, row)
            parts += [whole[chosen].flatten(1) if flat else whole[chosen], torch.searchsorted(row, labels[chosen])]
        classes = tuple(row.tolist())
        tasks.append(Task("classes " + ", ".join(map(str, classes)), parts[0], parts[1], parts[2], parts[3], classes))
    return tasks


#: How tasks of each kind are made.
MAKERS: dict[str, Callable[[Dataset, Images, int, torch.Generator, bool], list[Task]]] = {
    "permuted": _permuted,
    "rotated": _rotated,
    "split": _split,
}


def _task(
    name: str, data: Dataset, train: Tensor, test: Tensor, arrange: Callable[[Tensor], Tensor] = _as_they_are
) -> Task:
    return Task(name, train, data.train.labels, test, data.test.labels, arrange=arrange)


def rotate(images: Tensor, degrees: float) -> Tensor:
    """Turn images about their centre, counter-clockwise, with bilinear interpolation; corners get the nearest border.

    Args:
        images: ``[N, C, H, W]``.
        degrees: The angle.

    Returns:
        Images of the same size.
    """
    if degrees == 0:
        return images
    turn = math.radians(degrees)
    height, width = images.shape[-2:]
    matrix = torch.tensor(
        [
            [math.cos(turn), -math.sin(turn) * height / width, 0.0],
            [math.sin(turn) * width / height, math.cos(turn), 0.0],
        ]
    )
    grid = F.affine_grid(matrix.unsqueeze(0), [1, 1, height, width], align_corners=False)
    return F.grid_sample(images, grid.expand(len(images), -1, -1, -1), padding_mode="border", align_corners=False)
