"""Problems on the embedded digits: small enough for a demonstration and for tests, and in need of no network."""

from __future__ import annotations

from functools import partial

from torch.nn import functional

from kronfac.experiments.datasets.base import Dataset
from kronfac.experiments.models import autoencoder, perceptron, small_convolutional
from kronfac.experiments.problems.base import Data, Problem
from kronfac.experiments.problems.losses import bernoulli, categorical, errors, pixel_loss, squared_errors


def _images(dataset: Dataset) -> Data:
    train, test = dataset.pixels(dataset.train).flatten(1), dataset.pixels(dataset.test).flatten(1)
    return Data(train, train, test, test)


def _rows(dataset: Dataset) -> Data:
    train, test = dataset.pixels(dataset.train).flatten(1), dataset.pixels(dataset.test).flatten(1)
    return Data(train, dataset.train.labels, test, dataset.test.labels)


def _maps(dataset: Dataset) -> Data:
    train, test = dataset.standardised()
    return Data(train, dataset.train.labels, test, dataset.test.labels)


FAMILY = (
    Problem(
        name="digits-autoencoder",
        description="8x8 digits through a code of 8 numbers: 64-256-128-64-8 mirrored, Bernoulli loss",
        dataset="digits",
        build=partial(autoencoder, (64, 256, 128, 64, 8)),
        prepare=_images,
        likelihood=bernoulli,
        loss=pixel_loss,
        measures={"squared_error": squared_errors},
        batch_size=250,
        steps=600,
        evaluate_every=10,
        tuned={
            "sgd": {"lr": 0.01, "momentum": 0.9},
            "adam": {"lr": 0.003},
            "adamw": {"lr": 0.003},
            "kfac": {"lr": 0.2, "damping": 1.0, "kl_clip": 0.3},
        },
    ),
    Problem(
        name="digits-mlp",
        description="8x8 digits, fully-connected classifier 64-64-32-10",
        dataset="digits",
        build=partial(perceptron, (64, 64, 32, 10)),
        prepare=_rows,
        likelihood=categorical,
        loss=functional.cross_entropy,
        measures={"error": errors},
        batch_size=100,
        steps=300,
    ),
    Problem(
        name="digits-cnn",
        description="8x8 digits, two 3x3 convolutions and one fully-connected layer",
        dataset="digits",
        build=small_convolutional,
        prepare=_maps,
        likelihood=categorical,
        loss=functional.cross_entropy,
        measures={"error": errors},
        batch_size=100,
        steps=300,
    ),
)
