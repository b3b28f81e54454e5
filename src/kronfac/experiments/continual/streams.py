"""Streams of tasks: which data set, which kind of tasks, and the network that learns them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from kronfac.experiments.continual.tasks import MAKERS, Images, Task
from kronfac.experiments.datasets import load
from kronfac.experiments.datasets.base import Dataset
from kronfac.experiments.environment import free_memory
from kronfac.experiments.errors import ExperimentError, look_up
from kronfac.experiments.models.initialise import initialise, mark_linear
from kronfac.experiments.models.resnet import ResNet
from kronfac.experiments.models.small import perceptron, small_convolutional

#: The stream's own random numbers are far from those of training.
_SEED = 7_919

#: Where zero lies among pixels, and what one is, by name.
PIXELS: dict[str, Callable[[Dataset], Images]] = {
    "standardised": Dataset.standardised,
    "plain": lambda data: (data.pixels(data.train), data.pixels(data.test)),
    "inverted": lambda data: (1.0 - data.pixels(data.train), 1.0 - data.pixels(data.test)),
}


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
        pixels: What pixels are, a name of `PIXELS`.
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
    pixels: str = "standardised"

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
            ExperimentError: If there cannot be that many, or not in the memory that is free.
        """
        self.check(count)
        data = load(self.dataset)
        generator = torch.Generator().manual_seed(_SEED * (seed + 1))
        train, test = (F.avg_pool2d(part, self.pool) for part in PIXELS[self.pixels](data))
        needed, free = count * (train.nbytes + test.nbytes), free_memory()
        if self.kind == "rotated" and free is not None and needed > free:
            raise ExperimentError(
                f"{count} tasks of {self.name} take {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free: "
                "take fewer tasks, or run fewer at once"
            )
        return [
            task.holding_out(held_out) for task in MAKERS[self.kind](data, (train, test), count, generator, self.flat)
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
_PIXEL_WORDS = {
    "standardised": "",
    "plain": ", pixels from 0 to 1",
    "inverted": ", pixels from 0 to 1, dark on bright",
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
    # Data set, units of a perceptron (none for ResNet-8), pixels to average over, what pixels are.
    normed: dict[str, tuple[str, list[int], int, str]] = {
        "permuted-digits-bn": ("digits", [64, 100, 100, 10], 1, "standardised"),
        "permuted-digits-inverted-bn": ("digits", [64, 100, 100, 10], 1, "inverted"),
        "permuted-mnist-bn": ("mnist", [784, 100, 100, 10], 1, "standardised"),
        "permuted-mnist-plain-bn": ("mnist", [784, 100, 100, 10], 1, "plain"),
        "permuted-mnist-inverted-bn": ("mnist", [784, 100, 100, 10], 1, "inverted"),
        "permuted-mnist14-bn": ("mnist", [196, 100, 100, 10], 2, "standardised"),
        "split-cifar10-resnet8": ("cifar10", [], 1, "standardised"),
    }
    for name, (dataset, widths, pool, pixels) in normed.items():
        kind = name.partition("-")[0]
        epochs, batch = (30, 50) if dataset == "digits" else (1 if widths else 5, 100)
        network = f"MLP {'-'.join(map(str, widths))}" if widths else "ResNet-8"
        build = partial(perceptron, widths, norm=True) if widths else partial(ResNet, 1)
        size = ", 2x2 pixels averaged" if pool > 1 else ""
        description = f"{_WORDS[kind]}; {network} with batch norm{size}{_PIXEL_WORDS[pixels]}, {epochs} epochs a task"
        found[name] = Stream(
            name, description, dataset, kind, build, bool(widths), epochs, batch_size=batch, pool=pool, pixels=pixels
        )
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
    """  # noqa: DOC502
    return look_up("stream", name, STREAMS)
