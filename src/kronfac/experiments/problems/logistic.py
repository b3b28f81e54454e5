"""The autoencoders of Martens and Grosse (2015): logistic units, sparse initialisation, weight decay of 1e-5."""

from __future__ import annotations

from functools import partial

from kronfac.experiments.datasets.base import Dataset
from kronfac.experiments.models import logistic_autoencoder
from kronfac.experiments.problems.autoencoders import images
from kronfac.experiments.problems.base import Data, Problem
from kronfac.experiments.problems.losses import (
    bernoulli,
    gaussian,
    half_squared_error,
    pixel_loss,
    real_squared_errors,
    squared_errors,
)


def centred_images(dataset: Dataset) -> Data:
    """Make an autoencoder's data: each pixel's mean is taken off, and one scale makes the mean variance 1.

    Args:
        dataset: The dataset.

    Returns:
        The tensors; inputs are their own targets.
    """
    train, test = dataset.pixels(dataset.train).flatten(1), dataset.pixels(dataset.test).flatten(1)
    mean = train.double().mean(0).float()
    scale = float((train - mean).double().square().mean().sqrt())
    train, test = (train - mean) / scale, (test - mean) / scale
    return Data(train, train, test, test)


_on = partial(
    Problem,
    prepare=images,
    likelihood=bernoulli,
    loss=pixel_loss,
    measures={"squared_error": squared_errors},
    metric="train_squared_error",
    batch_size=1000,
    steps=500,
    evaluate_every=10,
)

_DECAY = {name: {"weight_decay": 1e-5} for name in ("adaptive_kfac", "kflr", "kfra", "hessian_free")}

FAMILY = (
    _on(
        name="mnist-logistic",
        description="MNIST through a code of 30 numbers: 784-1000-500-250-30 mirrored, logistic units, sparse start",
        dataset="mnist",
        build=partial(logistic_autoencoder, (784, 1000, 500, 250, 30)),
        tuned=_DECAY,
    ),
    _on(
        name="curves-logistic",
        description="Drawn curves through a code of 6 numbers: 784-400-200-100-50-25-6 mirrored, logistic units",
        dataset="curves",
        build=partial(logistic_autoencoder, (784, 400, 200, 100, 50, 25, 6)),
        tuned=_DECAY,
    ),
    _on(
        name="faces-logistic",
        description="Turned and scaled faces through a code of 30: 625-2000-1000-500-30 mirrored, squared error",
        dataset="faces",
        build=partial(logistic_autoencoder, (625, 2000, 1000, 500, 30)),
        prepare=centred_images,
        likelihood=gaussian,
        loss=half_squared_error,
        measures={"squared_error": real_squared_errors},
        tuned=_DECAY,
    ),
)
