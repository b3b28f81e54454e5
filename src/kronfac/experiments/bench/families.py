"""Families of networks of which one thing alone grows: a workload for each size, and what its parts must do.

FLOPs are the plain ones of ``roofline``, from the sizes of the layers: for a layer of ``R`` rows ``2 R d_in d_out`` in
each of forward, gradient of the weights and gradient of the inputs (which the first layer lacks); statistics pull
cotangents back once more and take ``2 R (d_in² + d_out²)``; the inverse ``d_in³ + d_out³``; preconditioning
``2 d_in d_out (d_in + d_out)``. The rows of a convolution are its positions, and its ``d_in`` the entries of a patch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional as F

import kronfac as kf
from kronfac.experiments.bench.workloads import Workload
from kronfac.experiments.errors import ExperimentError, look_up
from kronfac.experiments.models import perceptron, plain_convolutional

_CLASSES = 10
_NUMBER = 4  # bytes


@dataclass(frozen=True)
class Shape:
    """One network with the shape of its batch.

    Attributes:
        model: Makes the network, from images or vectors to ten classes.
        batch: Examples.
        example: Shape of one of them.
    """

    model: Callable[[], nn.Module]
    batch: int
    example: tuple[int, ...]


@dataclass(frozen=True)
class Demand:
    """What one round of the parts must do.

    Attributes:
        flops: By part, forward and backward among them.
        bytes: Memory, generously: factors, inverses old and new and room to make them; weights, gradients and
            directions; inputs and outputs of all layers with their derivatives, of convolutions in patches.
    """

    flops: dict[str, float]
    bytes: float

    def over_base(self) -> dict[str, float]:
        """Return the FLOPs of the parts over those of forward and backward."""
        return {part: count / self.flops[BASE] for part, count in self.flops.items() if part != BASE}


#: The name of what the others are put over.
BASE = "forward+backward"


@dataclass(frozen=True)
class Family:
    """Networks of which one thing alone grows.

    Attributes:
        axis: What grows.
        about: What stays, for people.
        sizes: Sizes measured by default.
        shape: The network of a size.
        odd: Whether sizes must be odd numbers.
    """

    axis: str
    about: str
    sizes: tuple[int, ...]
    shape: Callable[[int], Shape]
    odd: bool = False

    def check(self, size: int) -> None:
        """Refuse a size there is no network of.

        Args:
            size: The size.

        Raises:
            ExperimentError: It is no positive number, or not an odd one where it must be.
        """
        if size < 1 or (self.odd and size % 2 == 0):
            kind = "an odd whole number" if self.odd else "a whole number"
            raise ExperimentError(f"{self.axis} must be {kind} above 0, got {size}")

    def make(self, size: int, seed: int = 0, device: str = "cpu", precision: str = "float32") -> Workload:
        """Build the workload of a size; weights and data are drawn on the CPU.

        Args:
            size: The size.
            seed: Of weights and data.
            device: ``"cpu"`` or ``"cuda"``.
            precision: One of `workloads.PRECISIONS`.

        Returns:
            The workload.
        """
        shape = self.shape(size)
        torch.manual_seed(seed)
        x, y = torch.randn(shape.batch, *shape.example), torch.randint(_CLASSES, (shape.batch,))
        work = Workload(f"{self.axis} {size}", shape.model(), kf.Categorical(), F.cross_entropy, x, y)
        return replace(work, precision=precision).to(device)

    def demand(self, size: int) -> Demand:
        """Count what a size must do, without making it.

        Args:
            size: The size.

        Returns:
            FLOPs and bytes.
        """
        return _demand(self.shape(size))


def _demand(shape: Shape) -> Demand:
    with torch.device("meta"):
        layers = [module for module in shape.model().modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    positions = shape.batch
    for extent in shape.example[1:]:
        positions *= extent
    flops = dict.fromkeys((BASE, "statistics", "inverse", "precondition"), 0.0)
    factors = weights = activations = 0.0
    for index, layer in enumerate(layers):
        rows = positions if isinstance(layer, nn.Conv2d) else shape.batch
        d_out, d_in = layer.weight.flatten(1).shape
        d_in += layer.bias is not None
        product = 2.0 * rows * d_in * d_out
        pulls = index > 0
        flops[BASE] += product * (2 + pulls)
        flops["statistics"] += product * pulls + 2.0 * rows * (d_in**2 + d_out**2)
        flops["inverse"] += float(d_in**3 + d_out**3)
        flops["precondition"] += 2.0 * d_in * d_out * (d_in + d_out)
        factors += d_in**2 + d_out**2
        weights += d_in * d_out
        activations += rows * (d_in + d_out)
    return Demand(flops, _NUMBER * (4 * factors + 4 * weights + 3 * activations))


def _perceptron(width: int, layers: int, batch: int) -> Shape:
    return Shape(lambda: perceptron((*(width,) * layers, _CLASSES)), batch, (width,))


def _convolutional(kernel: int, image: int, batch: int) -> Shape:
    return Shape(lambda: plain_convolutional(kernel), batch, (3, image, image))


#: Every family, by what grows.
FAMILIES = {
    family.axis: family
    for family in (
        Family(
            "width",
            "perceptron of 3 layers, batch 128",
            (256, 512, 1024, 2048, 4096, 8192),
            lambda width: _perceptron(width, 3, 128),
        ),
        Family(
            "depth",
            "perceptron of width 256, batch 128",
            (2, 4, 8, 16, 32),
            lambda depth: _perceptron(256, depth, 128),
        ),
        Family(
            "batch",
            "perceptron of 3 layers of width 512",
            (16, 32, 64, 128, 256, 512, 1024, 2048),
            lambda batch: _perceptron(512, 3, batch),
        ),
        Family(
            "image",
            "3 convolutions of 3×3 with 32, 64, 64 maps, batch 32",
            (8, 16, 32, 64),
            lambda image: _convolutional(3, image, 32),
        ),
        Family(
            "kernel",
            "3 convolutions with 32, 64, 64 maps on 16×16 pixels, batch 32",
            (1, 3, 5, 7),
            lambda kernel: _convolutional(kernel, 16, 32),
            odd=True,
        ),
    )
}


def get_family(axis: str) -> Family:
    """Look a family up.

    Args:
        axis: A key of `FAMILIES`.

    Returns:
        The family.

    Raises:
        UnknownNameError: There is none of that name.
    """  # noqa: DOC502
    return look_up("axis of scaling", axis, FAMILIES)
