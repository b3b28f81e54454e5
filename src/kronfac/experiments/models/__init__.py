"""The networks of the problems. Plain `torch.nn`; they know nothing of kronfac."""

from __future__ import annotations

from kronfac.experiments.models.autoencoder import autoencoder, logistic_autoencoder
from kronfac.experiments.models.bottleneck import resnet50
from kronfac.experiments.models.gpt import gpt2
from kronfac.experiments.models.kfc import kfc_network
from kronfac.experiments.models.physics import ASKED, PoissonResidual, TaylorPerceptron
from kronfac.experiments.models.puiu import puiu_network
from kronfac.experiments.models.resnet import ResNet
from kronfac.experiments.models.small import perceptron, plain_convolutional, small_convolutional
from kronfac.experiments.models.transformer import RowTransformer
from kronfac.experiments.models.vgg import vgg16

__all__ = [
    "ASKED",
    "PoissonResidual",
    "ResNet",
    "RowTransformer",
    "TaylorPerceptron",
    "autoencoder",
    "gpt2",
    "kfc_network",
    "logistic_autoencoder",
    "perceptron",
    "plain_convolutional",
    "puiu_network",
    "resnet50",
    "small_convolutional",
    "vgg16",
]
