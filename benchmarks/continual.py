"""Cost of XK-FAC's estimation over KFAC's, and of a quadratic penalty over forward+backward.

    python benchmarks/continual.py [--models mlp,resnet20] [--rounds 15] [--json FILE]
    python benchmarks/continual.py --large [--maps 64]

The first measures parts in turn, in one process with one thread and by processor time, for machines that are shared;
medians of ratios with their quartiles. ``--large`` makes one estimate of ResNet-18 for 32 x 32 images (He et al. 2016:
a first convolution of 3 x 3 without pooling, 11 million parameters) and prints seconds and memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kronfac as kf
from kronfac.experiments.models import ResNet, perceptron

BATCH = 128


def model_of(name: str) -> tuple[nn.Module, Tensor]:
    """A network with batch norm and a batch of made-up inputs."""
    torch.manual_seed(0)
    if name == "mlp":
        return perceptron([784, 100, 100, 10], norm=True), torch.randn(BATCH, 784)
    return ResNet(), torch.randn(BATCH, 3, 32, 32)


def parts(name: str) -> dict[str, Callable[[], object]]:
    """The parts to time, by name."""
    model, x = model_of(name)
    y = torch.randint(10, (BATCH,))
    model.train()(x)

    def estimate(approximation: str) -> kf.BlockDiagonal:
        found = kf.estimate(model, kf.Categorical(), (x, y), approximation=approximation, source="sampled", seed=0)
        assert isinstance(found, kf.BlockDiagonal)
        return found

    merged = kf.continual.merge_batchnorm(model)
    folded = kf.estimate(merged.folded(), kf.Categorical(), (x, y), source="sampled", seed=0)
    penalties = {
        "KFAC penalty": (kf.continual.QuadraticPenalty(estimate("kfac")), lambda: model),
        "XK-FAC penalty": (kf.continual.QuadraticPenalty(estimate("xkfac")), lambda: model),
        "KFAC penalty, merged": (kf.continual.QuadraticPenalty(folded), merged.parameters),
        "EWC penalty": (kf.continual.QuadraticPenalty(estimate("diagonal")), lambda: model),
    }

    def forward_backward() -> None:
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()

    def penalty(kind: str) -> Callable[[], None]:
        value, live = penalties[kind]

        def run() -> None:
            model.zero_grad()
            value(live()).backward()

        return run

    return {
        "forward+backward": forward_backward,
        "estimation, KFAC": lambda: estimate("kfac"),
        "estimation, XK-FAC": lambda: estimate("xkfac"),
        **{kind: penalty(kind) for kind in penalties},
    }


def measure(name: str, rounds: int) -> dict[str, list[float]]:
    """Medians and quartiles of the ratios of one model."""
    functions = parts(name)
    times: dict[str, list[float]] = {part: [] for part in functions}
    for round_ in range(rounds + 2):
        for part, function in functions.items():
            start = time.process_time()
            function()
            if round_ >= 2:
                times[part].append(time.process_time() - start)
    base = statistics.median(times["forward+backward"])
    found = {"forward+backward, ms": summary([1e3 * t for t in times["forward+backward"]])}
    pairs = zip(times["estimation, XK-FAC"], times["estimation, KFAC"], strict=True)
    found["estimation, XK-FAC over KFAC"] = summary([a / b for a, b in pairs])
    for part, values in times.items():
        if part != "forward+backward":
            found[f"{part}, over forward+backward"] = summary([t / base for t in values])
    return found


def summary(values: list[float]) -> list[float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return [round(value, 4) for value in (middle, low, high)]


class Block(nn.Module):
    """The basic block of ResNet-18, with a 1 x 1 convolution in the shortcut where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


def resnet18(maps: int = 64) -> nn.Sequential:
    """ResNet-18 for 32 x 32 images."""
    layers: list[nn.Module] = [nn.Conv2d(3, maps, 3, 1, 1, bias=False), nn.BatchNorm2d(maps), nn.ReLU()]
    inputs = maps
    for stage in range(4):
        for index in range(2):
            layers.append(Block(inputs, maps << stage, 2 if stage and not index else 1))
            inputs = maps << stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))


def large(maps: int) -> None:
    """One estimate of ResNet-18: what the planner says, and what it took."""
    torch.manual_seed(0)
    model, x = resnet18(maps), torch.randn(BATCH, 3, 32, 32)
    y = torch.randint(10, (BATCH,))
    count = sum(p.numel() for p in model.parameters())
    start = time.process_time()
    F.cross_entropy(model(x), y).backward()
    print(f"ResNet-18, {maps} maps, {count / 1e6:.1f} million parameters, batch of {BATCH} 32 x 32 images")
    print(f"forward+backward      {time.process_time() - start:7.1f} s")
    print(f"before an estimate    {memory():7.2f} GB")
    for approximation in ("kfac", "xkfac"):
        start = time.process_time()
        found = kf.estimate(model, kf.Categorical(), (x, y), approximation=approximation, source="sampled", seed=0)
        seconds = time.process_time() - start
        size = sum(t.numel() * t.element_size() for b in found.blocks.values() for t in b.tensors().values())
        print(
            f"estimate, {approximation:<12}{seconds:7.1f} s, factors of {size / 1e9:.2f} GB, "
            f"peak so far {memory():.2f} GB"
        )
        start = time.process_time()
        model.zero_grad()
        kf.continual.QuadraticPenalty(found)(model).backward()
        print(f"penalty, {approximation:<13}{time.process_time() - start:7.1f} s for a value and its gradient")
        del found


def memory() -> float:
    """Largest resident memory so far in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="mlp,resnet20")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--large", action="store_true", help="ResNet-18 instead")
    parser.add_argument("--maps", type=int, default=64, help="maps of ResNet-18's first stage")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.large:
        large(options.maps)
        return
    found = {name: measure(name, options.rounds) for name in options.models.split(",")}
    for name, rows in found.items():
        print(name)
        for part, (middle, low, high) in rows.items():
            print(f"  {part:<48}{middle:9.3f}  ({low:.3f} to {high:.3f})")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
