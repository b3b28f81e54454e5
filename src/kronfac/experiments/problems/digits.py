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


_CLASSIFIERS = (
    "by the training loss after 300 steps with seed 0: SGD lr 0.01, 0.03, 0.1, 0.3, on digits-mlp also 1 (momentum "
    "0.9); Adam lr 0.001, 0.003, 0.01, 0.03; KFAC all combinations of lr 0.03, 0.1, 0.3, damping 0.003, 0.01, 0.03, "
    "kl_clip 0.003, 0.01, 0.03, then lr 0.01 at the best: 28 points against 4 or 5. AdamW has Adam's values, unsearched"
)

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
        steps=1000,
        evaluate_every=10,
        tuned={
            "sgd": {"lr": 0.006, "momentum": 0.98},
            "adam": {"lr": 0.006, "beta1": 0.8, "beta2": 0.97},
            "adamw": {"lr": 0.006, "beta1": 0.8, "beta2": 0.97},
            "kfac": {"lr": 0.3, "momentum": 0.8, "damping": 0.01, "kl_clip": 0.1, "invert_every": 20},
        },
        tuned_over=(
            "by the training loss after 1000 steps with seed 0, all combinations of: SGD lr 0.003, 0.006, 0.01, 0.015, "
            "momentum 0.9, 0.95, 0.98, 0.99 (16); Adam lr 0.003, 0.006, 0.01, beta1 0.8, 0.9, 0.95, beta2 0.97, 0.99, "
            "0.999 (27); KFAC with lr 0.3, momentum 0.8, 0.9, damping 0.01, 0.03, 0.1, kl_clip 0.1, 0.3 (12; the best "
            "is at the edge of all three). The grids were placed by shorter trials of 200 to 600 steps: 18 of SGD, 21 "
            "of Adam, 77 of KFAC. AdamW has Adam's values, unsearched"
        ),
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
        tuned={
            "sgd": {"lr": 0.3},
            "adam": {"lr": 0.01},
            "adamw": {"lr": 0.01},
            "kfac": {"lr": 0.03, "damping": 0.01, "kl_clip": 0.01, "invert_every": 20},
        },
        tuned_over=_CLASSIFIERS,
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
        tuned={
            "sgd": {"lr": 0.1},
            "adam": {"lr": 0.01},
            "adamw": {"lr": 0.01},
            "kfac": {"lr": 0.03, "damping": 0.003, "kl_clip": 0.03, "invert_every": 20},
        },
        tuned_over=_CLASSIFIERS,
    ),
)
