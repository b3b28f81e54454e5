"""Real images and networks so small that approximations can be compared with the exact curvature.

MNIST is brought to 14 by 14 pixels by averaging 2 by 2 of them, as in Gao et al. (2020), figures 1 and 2.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor
from torch.nn import functional

from kronfac.experiments.datasets.base import Dataset
from kronfac.experiments.models import ResNet, RowTransformer, perceptron, small_convolutional
from kronfac.experiments.problems.base import Data, Problem
from kronfac.experiments.problems.convolutional import standardised_images
from kronfac.experiments.problems.losses import categorical, errors


def _pooled(dataset: Dataset) -> tuple[Tensor, Tensor]:
    train, test = (functional.avg_pool2d(dataset.pixels(split), 2) for split in (dataset.train, dataset.test))
    return train, test


def _rows(dataset: Dataset) -> Data:
    train, test = _pooled(dataset)
    return Data(train.flatten(1), dataset.train.labels, test.flatten(1), dataset.test.labels)


def _maps(dataset: Dataset) -> Data:
    train, test = _pooled(dataset)
    mean, deviation = train.double().mean().item(), train.double().std().item()
    train, test = ((images - mean) / deviation for images in (train, test))
    return Data(train, dataset.train.labels, test, dataset.test.labels)


_on = partial(
    Problem,
    likelihood=categorical,
    loss=functional.cross_entropy,
    measures={"error": errors},
    batch_size=128,
    steps=1000,
    evaluate_every=100,
    evaluation_examples=10_000,
    tuned={"sgd": {"lr": 0.03}, "adam": {"lr": 3e-3}, "adamw": {"lr": 3e-3}, "kfac": {"lr": 0.03, "damping": 0.03}},
    tuned_over="not tuned: first guesses, good enough to train networks for kronfac analyse",
)

FAMILY = (
    _on(
        name="mnist14-mlp",
        description="MNIST of 14x14 pixels, fully-connected classifier 196-20-20-20-20-10 (Gao et al. 2020)",
        dataset="mnist",
        prepare=_rows,
        build=partial(perceptron, (196, 20, 20, 20, 20, 10)),
    ),
    _on(
        name="mnist14-cnn",
        description="MNIST of 14x14 pixels, two 3x3 convolutions (8 and 12 maps) and one fully-connected layer",
        dataset="mnist",
        prepare=_maps,
        build=partial(small_convolutional, (8, 12), size=14),
    ),
    _on(
        name="mnist14-transformer",
        description="MNIST of 14x14 pixels read row by row, two transformer encoder layers of width 16",
        dataset="mnist",
        prepare=_maps,
        build=partial(RowTransformer, 14),
    ),
    _on(
        name="cifar10-resnet8",
        description="CIFAR-10, ResNet-8 with batch normalisation and few maps (4, 8 and 16)",
        dataset="cifar10",
        prepare=standardised_images,
        build=partial(ResNet, 1, 10, (4, 8, 16)),
    ),
)
