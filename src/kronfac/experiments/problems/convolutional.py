"""The convolutional network of Grosse and Martens (2016) on CIFAR and SVHN, with and without batch normalisation.

Images have each channel shifted and scaled by the training set's mean and deviation (the paper subtracts the mean
alone); there is no augmentation, so that the training error means what it says.
"""

from __future__ import annotations

from functools import partial

from torch.nn import functional

from kronfac.experiments.datasets.base import Dataset
from kronfac.experiments.models import kfc_network
from kronfac.experiments.problems.base import Data, Hyperparameters, Problem
from kronfac.experiments.problems.losses import categorical, errors


def standardised_images(dataset: Dataset) -> Data:
    """Prepare images channel by channel for a classifier.

    Args:
        dataset: The dataset.

    Returns:
        Inputs ``[N, C, H, W]`` and class indices ``[N]``.
    """
    train, test = dataset.standardised()
    return Data(train, dataset.train.labels, test, dataset.test.labels)


_on = partial(
    Problem,
    prepare=standardised_images,
    likelihood=categorical,
    loss=functional.cross_entropy,
    measures={"error": errors},
    batch_size=128,
    steps=3900,
    evaluate_every=195,
    evaluation_examples=10_000,
    tuned_over=(
        "SGD has the learning rate that served best elsewhere; KFAC comes from eight trials of one or two epochs over "
        "lr 0.01, 0.02, 0.03, damping 0.01, 0.03, 0.1, batch 256, 512 and kl_clip none, 0.003, 0.01; Adam's values are "
        "first trials. All of it on cifar10-kfc"
    ),
)

_TUNED: dict[str, Hyperparameters] = {
    "sgd": {"lr": 0.01, "momentum": 0.9, "average": 0.995},
    "adam": {"lr": 1e-3},
    "adamw": {"lr": 1e-3},
    "kfac": {"lr": 0.01, "damping": 3e-2, "kl_clip": None, "batch_size": 256, "average": 0.98},
}

FAMILY = (
    _on(
        name="cifar10-kfc",
        description="CIFAR-10, three 5x5 convolutions with pooling and one fully-connected layer",
        dataset="cifar10",
        build=kfc_network,
        tuned=_TUNED,
    ),
    _on(
        name="cifar10-kfc-bn",
        description="CIFAR-10, the same network with batch normalisation",
        dataset="cifar10",
        build=partial(kfc_network, batch_norm=True),
        tuned=_TUNED,
    ),
    _on(
        name="cifar10-kfc-max",
        description="CIFAR-10, the same network with maximum pooling everywhere",
        dataset="cifar10",
        build=partial(kfc_network, pooling="max"),
        tuned=_TUNED,
    ),
    _on(
        name="cifar10-kfc-avg",
        description="CIFAR-10, the same network with average pooling everywhere",
        dataset="cifar10",
        build=partial(kfc_network, pooling="average"),
        tuned=_TUNED,
    ),
    _on(
        name="cifar100-kfc",
        description="CIFAR-100, the same network with a hundred classes",
        dataset="cifar100",
        build=partial(kfc_network, 100),
        tuned=_TUNED,
    ),
    _on(
        name="svhn-kfc",
        description="SVHN, the same network",
        dataset="svhn",
        build=kfc_network,
        tuned=_TUNED,
    ),
)
