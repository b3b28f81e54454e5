"""The workloads of the cost measurements: model, likelihood, loss and a batch of made-up data."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kronfac as kf
from kronfac.approximations import Approximation, Limited
from kronfac.experiments.errors import ExperimentError
from kronfac.experiments.models import ResNet, autoencoder, gpt2, kfc_network, resnet50

#: The workloads of the figures in the documentation.
NAMES = ("autoencoder", "kfc", "resnet20")
#: Workloads for a GPU.
LARGE = ("resnet50", "gpt2")
#: Workloads of the same kind for a quick look.
SMALL = ("small", "resnet50-small", "gpt2-small")
#: Number formats of the training step: float32, float32 with products in TF32, and autocast to bfloat16.
PRECISIONS = ("float32", "tf32", "bfloat16")


@dataclass
class Workload:
    """One model with data.

    Attributes:
        name: Its name.
        model: The network.
        likelihood: The loss for kronfac.
        loss: The same loss for training, a mean over the batch.
        inputs: One batch.
        targets: Its targets.
        precision: One of :data:`PRECISIONS`.
        approximation: What KFAC keeps for each layer.
    """

    name: str
    model: nn.Module
    likelihood: kf.Likelihood
    loss: Callable[[Tensor, Tensor], Tensor]
    inputs: Tensor
    targets: Tensor
    precision: str = "float32"
    approximation: str | Approximation = field(default="kfac")

    @property
    def device(self) -> torch.device:
        """Where model and data are."""
        return self.inputs.device

    def forward(self) -> Tensor:
        """Loss of one batch."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            return self.loss(self.model(self.inputs), self.targets)

    def forward_backward(self) -> None:
        """Gradients of one batch, without optimiser."""
        self.model.zero_grad()
        self.forward().backward()

    def to(self, device: str) -> Workload:
        """Move model and data.

        Args:
            device: Where to.

        Returns:
            The same workload.
        """
        self.model = self.model.to(device)
        # An autoencoder's targets are its inputs; they stay one tensor.
        same = self.targets is self.inputs
        self.inputs = self.inputs.to(device)
        self.targets = self.inputs if same else self.targets.to(device)
        return self


@contextmanager
def prepared(device: str, precision: str) -> Iterator[None]:
    """Let float32 products run as the precision says within the block, and free the device's memory at its end.

    Args:
        device: Where the block computes.
        precision: One of :data:`PRECISIONS`.

    Yields:
        Nothing.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
        free(device)


def free(device: str) -> None:
    """Give back what nothing refers to any longer.

    Args:
        device: Whose memory.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def check(device: str, precision: str) -> None:
    """Refuse a device that is not there and a precision that it does not have.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        precision: One of :data:`PRECISIONS`.

    Raises:
        ExperimentError: They do not fit.
    """
    if device not in ("cpu", "cuda"):
        raise ExperimentError(f"there is no device {device!r}; known are cpu, cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ExperimentError("torch sees no CUDA device here")
    if precision not in PRECISIONS:
        raise ExperimentError(f"there is no precision {precision!r}; known are {', '.join(PRECISIONS)}")
    if precision == "tf32" and device != "cuda":
        raise ExperimentError("tf32 is a format of CUDA devices")


def make(name: str, seed: int = 0, device: str = "cpu", precision: str = "float32") -> Workload:
    """Build a workload; weights and data are drawn on the CPU, so that they are the same on each device.

    Args:
        name: One of :data:`NAMES`, :data:`LARGE` or :data:`SMALL`.
        seed: Of weights and data.
        device: ``"cpu"`` or ``"cuda"``.
        precision: One of :data:`PRECISIONS`.

    Returns:
        The workload.
    """
    check_name(name)
    check(device, precision)
    torch.manual_seed(seed)
    work = _MAKERS[name](name)
    work.precision = precision
    return work.to(device)


def check_name(name: str) -> None:
    """Refuse the name of no workload.

    Args:
        name: The name.

    Raises:
        ExperimentError: There is no such workload.
    """
    if name not in _MAKERS:
        raise ExperimentError(f"there is no workload {name!r}; known are {', '.join((*NAMES, *LARGE, *SMALL))}")


def _summed_bce(z: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(z, y, reduction="sum") / len(z)


def _token_cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, 1), y.flatten())


def _images(widths: tuple[int, ...]) -> Callable[[str], Workload]:
    def build(name: str) -> Workload:
        x = torch.rand(500, widths[0])
        return Workload(name, autoencoder(widths), kf.Bernoulli(), _summed_bce, x, x)

    return build


def _classes(model: Callable[[], nn.Module], batch: int, size: int, classes: int) -> Callable[[str], Workload]:
    def build(name: str) -> Workload:
        x, y = torch.randn(batch, 3, size, size), torch.randint(classes, (batch,))
        return Workload(name, model(), kf.Categorical(), F.cross_entropy, x, y)

    return build


def _text(
    batch: int, vocabulary: int, context: int, width: int, layers: int, heads: int, limit: int
) -> Callable[[str], Workload]:
    # GPT-2's head is beyond the limit: its output factor would take 10 GB, 41 TFLOP a batch and 127 for its inverse.
    # Its exact diagonal takes 154 MB and, one example's gradient at a time, the 0.6 TFLOP of its weight gradient.
    def build(name: str) -> Workload:
        text = torch.randint(vocabulary, (batch, context + 1))
        model = gpt2(vocabulary, context, width, layers, heads)
        likelihood = kf.Categorical(class_dim=-1)
        inputs, targets = text[:, :-1].contiguous(), text[:, 1:].contiguous()
        return Workload(name, model, likelihood, _token_cross_entropy, inputs, targets, approximation=Limited(limit))

    return build


_MAKERS: dict[str, Callable[[str], Workload]] = {
    "autoencoder": _images((784, 1000, 500, 250, 30)),
    "small": _images((64, 48, 16)),
    "kfc": _classes(kfc_network, 128, 32, 10),
    "resnet20": _classes(ResNet, 128, 32, 10),
    "resnet50": _classes(resnet50, 256, 224, 1000),
    "resnet50-small": _classes(lambda: resnet50(10, (1, 1, 1, 1), 4), 8, 32, 10),
    "gpt2": _text(8, 50257, 1024, 768, 12, 12, 4096),
    "gpt2-small": _text(2, 100, 16, 8, 2, 2, 64),
}
