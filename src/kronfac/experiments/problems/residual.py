"""Residual networks and VGG-16 on CIFAR-10 and CIFAR-100; crops and mirror images are hyper-parameters."""

from __future__ import annotations

from functools import partial

from torch.nn import functional

from kronfac.experiments.models import ResNet, vgg16
from kronfac.experiments.problems.base import Problem
from kronfac.experiments.problems.convolutional import standardised_images
from kronfac.experiments.problems.losses import categorical, errors

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
)

FAMILY = (
    _on(name="cifar10-resnet20", description="CIFAR-10, ResNet-20", dataset="cifar10", build=partial(ResNet, 3, 10)),
    _on(
        name="cifar100-resnet20", description="CIFAR-100, ResNet-20", dataset="cifar100", build=partial(ResNet, 3, 100)
    ),
    _on(name="cifar10-resnet32", description="CIFAR-10, ResNet-32", dataset="cifar10", build=partial(ResNet, 5, 10)),
    _on(name="cifar10-vgg16", description="CIFAR-10, VGG-16", dataset="cifar10", build=vgg16),
    _on(
        name="cifar10-vgg16-bn",
        description="CIFAR-10, VGG-16 with batch normalisation",
        dataset="cifar10",
        build=partial(vgg16, 10, True),
    ),
    _on(name="cifar100-vgg16", description="CIFAR-100, VGG-16", dataset="cifar100", build=partial(vgg16, 100)),
)
