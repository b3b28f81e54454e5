"""The classification problem of Puiu (2022), on MNIST and, to try it without a download, on the embedded digits."""

from __future__ import annotations

from functools import partial

from torch import Tensor
from torch.nn import functional

from kronfac.experiments.datasets.base import Dataset
from kronfac.experiments.models import puiu_network
from kronfac.experiments.problems.base import Data, Problem
from kronfac.experiments.problems.convolutional import standardised_images
from kronfac.experiments.problems.losses import categorical, errors

_SIDE = 28


def _enlarged(dataset: Dataset) -> Data:
    def enlarge(images: Tensor) -> Tensor:
        return functional.interpolate(images, (_SIDE, _SIDE), mode="bilinear", align_corners=False)

    train, test = dataset.standardised()
    return Data(enlarge(train), dataset.train.labels, enlarge(test), dataset.test.labels)


_on = partial(
    Problem,
    build=puiu_network,
    likelihood=categorical,
    loss=functional.cross_entropy,
    measures={"error": errors},
    metric="test_loss",
    batch_size=512,
    evaluation_examples=10_000,
    tuned_over="not tuned: the settings of Puiu (2022) are in kronfac reproduce kld-wrm",
)

FAMILY = (
    _on(
        name="mnist-puiu",
        description="MNIST, two 5x5 convolutions and two fully-connected layers, 4712 parameters (Puiu 2022)",
        dataset="mnist",
        prepare=standardised_images,
        steps=5850,
        evaluate_every=117,
    ),
    _on(
        name="digits-puiu",
        description="8x8 digits enlarged to 28x28, the same network",
        dataset="digits",
        prepare=_enlarged,
        steps=100,
        evaluate_every=2,
    ),
)
