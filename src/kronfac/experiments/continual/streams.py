"""Streams of tasks made from one data set: permuted pixels, rotated images, classes a few at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kronfac.experiments.datasets import load
from kronfac.experiments.datasets.base import Dataset
from kronfac.experiments.errors import ExperimentError, UnknownNameError
from kronfac.experiments.models.initialise import initialise, mark_linear
from kronfac.experiments.models.resnet import ResNet
from kronfac.experiments.models.small import perceptron, small_convolutional

#: Images for training and for testing, standardised.
Images = tuple[Tensor, Tensor]
#: The stream's own random numbers are far from those of training.
_SEED = 7_919


@dataclass(frozen=True)
class Task:
    """One task of a stream.

    Attributes:
        name: What it is, for people.
        train_inputs: float32, as the network takes them.
        train_targets: int64; places in ``classes`` where these are given.
        test_inputs: As in training.
        test_targets: As in training.
        classes: The outputs of the network that the task uses; None for all.
        held_out: The same task with held-out training examples as its test set, to choose hyper-parameters by; None
            where nothing is held out.
    """

    name: str
    train_inputs: Tensor
    train_targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor
    classes: tuple[int, ...] | None = None
    held_out: Task | None = None

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


@dataclass(frozen=True)
class Stream:
    """A family of task sequences.

    Attributes:
        name: What it is asked for by.
        description: One line for people.
        dataset: Name of the data set.
        kind: ``"permuted"``, ``"rotated"`` or ``"split"``.
        build: Makes the network, drawing its weights from torch's global generator.
        flat: Whether inputs are vectors rather than images.
        epochs: Passes through a task's data, unless others are asked for.
        lr: Learning rate of Adam.
        batch_size: Examples of a batch.
        pool: Pixels on each side of the squares that images are averaged over first.
    """

    name: str
    description: str
    dataset: str
    kind: str
    build: Callable[[], nn.Module]
    flat: bool
    epochs: int
    lr: float = 1e-3
    batch_size: int = 100
    pool: int = 1

    def check(self, count: int) -> None:
        """Refuse a number of tasks that there cannot be.

        Args:
            count: How many.

        Raises:
            ExperimentError: If there cannot be that many.
        """
        if count < 1:
            raise ExperimentError(f"tasks must be at least 1, got {count}")
        if self.kind != "split":
            return
        classes = load(self.dataset).classes
        fitting = [n for n in range(1, classes // 2 + 1) if classes % n == 0]
        if count not in fitting:
            raise ExperimentError(
                f"{self.name} shares {classes} classes out among its tasks, two at least: tasks must be one of "
                f"{fitting}, got {count}"
            )

    def tasks(self, count: int, seed: int, held_out: int = 0) -> list[Task]:
        """Make the tasks.

        Args:
            count: How many.
            seed: Decides permutations and which classes come first.
            held_out: Training examples of each task to hold out.

        Returns:
            The tasks in order.

        Raises:
            ExperimentError: If there cannot be that many.
        """  # noqa: DOC502
        self.check(count)
        data = load(self.dataset)
        generator = torch.Generator().manual_seed(_SEED * (seed + 1))
        train, test = (F.avg_pool2d(part, self.pool) for part in data.standardised())
        return [
            task.holding_out(held_out) for task in _MAKERS[self.kind](data, (train, test), count, generator, self.flat)
        ]

    def model(self, seed: int) -> nn.Module:
        """Make the network.

        Args:
            seed: Decides its weights.

        Returns:
            The network.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.build()


def _permuted(data: Dataset, images: Images, count: int, generator: torch.Generator, flat: bool) -> list[Task]:
    """Pixels in an order of the task's own; the first task has them as they are."""
    shape, tasks = images[0].shape[1:], []
    for index in range(count):
        pixels = shape.numel()
        order = torch.arange(pixels) if index == 0 else torch.randperm(pixels, generator=generator)
        parts = [part.flatten(1)[:, order] for part in images]
        tasks.append(_task(f"permutation {index + 1}", data, *(p if flat else p.view(-1, *shape) for p in parts)))
    return tasks


def _rotated(data: Dataset, images: Images, count: int, generator: torch.Generator, flat: bool) -> list[Task]:
    """Images turned by 0 … 180 degrees, the last one excluded, in equal steps."""
    tasks = []
    for index in range(count):
        angle = 180.0 * index / count
        parts = [rotate(part, angle) for part in images]
        tasks.append(_task(f"{angle:g} degrees", data, *(p.flatten(1) if flat else p for p in parts)))
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


_MAKERS: dict[str, Callable[[Dataset, Images, int, torch.Generator, bool], list[Task]]] = {
    "permuted": _permuted,
    "rotated": _rotated,
    "split": _split,
}


def _task(name: str, data: Dataset, train: Tensor, test: Tensor) -> Task:
    return Task(name, train, data.train.labels, test, data.test.labels)


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


def colour_convolutional(maps: tuple[int, int, int] = (32, 32, 64), classes: int = 10, size: int = 32) -> nn.Sequential:
    """Build a classifier of colour images: three 3x3 convolutions with pooling, and one fully-connected layer.

    Args:
        maps: Maps of the convolutions.
        classes: Number of outputs.
        size: Height and width of the images.

    Returns:
        A network from ``[N, 3, size, size]`` to logits ``[N, classes]``.
    """
    layers: list[nn.Module] = []
    for inputs, outputs in zip((3, *maps), maps, strict=False):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Flatten(), mark_linear(nn.Linear(maps[-1] * (size // 8) ** 2, classes))]
    return initialise(nn.Sequential(*layers))  # type: ignore[return-value]


_WORDS = {
    "permuted": "pixels in another order for each task",
    "rotated": "images turned by 180/T degrees more for each task",
    "split": "10/T classes for each task, with outputs of their own",
}


def _streams() -> dict[str, Stream]:
    networks: dict[str, tuple[str, Callable[[], nn.Module], bool, int, str]] = {
        "digits": ("digits", lambda: perceptron([64, 100, 10]), True, 30, "MLP 64-100-10"),
        "mnist": ("mnist", lambda: perceptron([784, 100, 100, 10]), True, 3, "MLP 784-100-100-10"),
        "cifar10": ("cifar10", colour_convolutional, False, 5, "3 convolutions"),
    }
    found = {}
    for key, (dataset, build, flat, epochs, network) in networks.items():
        for kind, words in _WORDS.items():
            name = f"{kind}-{key}"
            batch = 50 if key == "digits" else 100
            description = f"{words}; {network}, {epochs} epochs a task"
            found[name] = Stream(name, description, dataset, kind, build, flat, epochs, batch_size=batch)
    # Data set, units of a perceptron (none for ResNet-8), pixels to average over.
    normed: dict[str, tuple[str, list[int], int]] = {
        "permuted-digits-bn": ("digits", [64, 100, 100, 10], 1),
        "permuted-mnist-bn": ("mnist", [784, 100, 100, 10], 1),
        "permuted-mnist14-bn": ("mnist", [196, 100, 100, 10], 2),
        "split-cifar10-resnet8": ("cifar10", [], 1),
    }
    for name, (dataset, widths, pool) in normed.items():
        kind = name.partition("-")[0]
        epochs, batch = (30, 50) if dataset == "digits" else (1 if widths else 5, 100)
        network = f"MLP {'-'.join(map(str, widths))}" if widths else "ResNet-8"
        build = partial(perceptron, widths, norm=True) if widths else partial(ResNet, 1)
        size = ", 2x2 pixels averaged" if pool > 1 else ""
        description = f"{_WORDS[kind]}; {network} with batch norm{size}, {epochs} epochs a task"
        found[name] = Stream(name, description, dataset, kind, build, bool(widths), epochs, batch_size=batch, pool=pool)
    found["split-digits-cnn"] = Stream(
        "split-digits-cnn",
        f"{_WORDS['split']}; 2 convolutions, 20 epochs a task",
        "digits",
        "split",
        small_convolutional,
        False,
        20,
        batch_size=50,
    )
    return found


#: Streams by name.
STREAMS: dict[str, Stream] = _streams()


def get_stream(name: str) -> Stream:
    """Find a stream.

    Args:
        name: Its name.

    Returns:
        The stream.

    Raises:
        UnknownNameError: If there is none of that name.
    """
    if name not in STREAMS:
        raise UnknownNameError("stream", name, STREAMS)
    return STREAMS[name]
