"""The deep autoencoder on MNIST and Fashion-MNIST, the problem of Martens and Grosse (2015)."""

from __future__ import annotations

from functools import partial

from kronfac.experiments.datasets.base import Dataset
from kronfac.experiments.models import autoencoder
from kronfac.experiments.problems.base import Data, Problem
from kronfac.experiments.problems.losses import bernoulli, pixel_loss, squared_errors


def images(dataset: Dataset) -> Data:
    """Make an autoencoder's data: flat images that are their own targets.

    Args:
        dataset: The dataset.

    Returns:
        The tensors.
    """
    train, test = dataset.pixels(dataset.train).flatten(1), dataset.pixels(dataset.test).flatten(1)
    return Data(train, train, test, test)


_on = partial(
    Problem,
    build=partial(autoencoder, (784, 1000, 500, 250, 30)),
    prepare=images,
    likelihood=bernoulli,
    loss=pixel_loss,
    measures={"squared_error": squared_errors},
    metric="train_squared_error",
    batch_size=500,
    steps=2400,
    evaluate_every=60,
    tuned_over=(
        "on MNIST, by the squared training error after 480 steps with seed 0: SGD and AdamW over lr 0.0005, 0.001, "
        "0.002, 0.003 (SGD diverges from 0.003 on), KFAC over lr 0.03, 0.05, 0.08 at damping 0.3, kl_clip 10 and "
        "inverses every 20 steps, which came from nine shorter trials; Adam has AdamW's values"
    ),
)

_TUNED = {
    "sgd": {"lr": 1e-3, "momentum": 0.9},
    "adam": {"lr": 1e-3},
    "adamw": {"lr": 1e-3},
    "kfac": {"lr": 0.05, "damping": 0.3, "kl_clip": 10.0, "stats_every": 10, "invert_every": 20},
}

FAMILY = (
    _on(
        name="mnist-autoencoder",
        description="MNIST through a code of 30 numbers: 784-1000-500-250-30 mirrored, Bernoulli loss",
        dataset="mnist",
        tuned=_TUNED,
    ),
    _on(
        name="fashion-autoencoder",
        description="Fashion-MNIST through the same autoencoder",
        dataset="fashion_mnist",
        tuned=_TUNED,
    ),
)
