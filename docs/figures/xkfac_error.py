"""Blocks of XK-FAC and K-FAC against the exact Gauss-Newton matrix through batch norm in train mode.

Prints relative Frobenius errors of every block with a weight, means and deviations over draws of weights of variance
one over the fan-in and of Gaussian inputs of mean one (and, in brackets, mean ratios of traces): for the multilayer
perceptron 6-8(BN)-7-6(BN)-4, and for three convolutions with two batch norms. ``exact`` pulls every example's loss
alone, so that no sampling error is left; a number is that of sampled labels per example.

``--real`` takes digits of 8 x 8 pixels and three classifiers of them instead, at initialisation and after 300 steps of
Adam at 0.01: a perceptron 64-12(BN)-12-12(BN)-10, three convolutions, and ResNet-8 with 2, 3 and 4 maps. Errors are
those of all diagonal blocks together, ``|diag(C) - diag(C')| / |diag(C)|``, of the first and of the last but one alone.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import kronfac as kf
from kronfac.experiments.datasets import load
from kronfac.experiments.models import ResNet
from kronfac.layers import adapt_model
from kronfac.sources import Sampled, Seed, Source

SEEDS, EXAMPLES = 100, 32


class OneByOne(Source):
    """Every column of the loss Hessian's root, for every example alone."""

    name = "one by one"

    def seeds(
        self, likelihood: kf.Likelihood, outputs: Tensor, targets: object, generator: torch.Generator | None
    ) -> Iterator[Seed]:
        """Yield them.

        Args:
            likelihood: The loss.
            outputs: Detached outputs.
            targets: Unused.
            generator: Unused.

        Yields:
            Seeds of weight one.
        """
        for column in likelihood.root_columns(outputs, None):
            for index in range(len(outputs)):
                alone = torch.zeros_like(column)
                alone[index] = column[index]
                yield Seed(alone, 1.0)


def perceptron() -> nn.Module:
    """6-8(BN)-7-6(BN)-4."""
    first, second = (nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh()), (nn.Linear(8, 7), nn.Tanh())
    return nn.Sequential(*first, *second, nn.Linear(7, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 4))


def convolutions() -> nn.Module:
    """Two channels of 5 x 5, three convolutions of which two feed batch norm, a mean over positions."""
    first, second = (nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh()), (nn.Conv2d(4, 4, 3), nn.Tanh())
    third = (nn.Conv2d(4, 5, 2), nn.BatchNorm2d(5), nn.Tanh())
    return nn.Sequential(*first, *second, *third, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4))


def draw_weights(model: nn.Module) -> nn.Module:
    """Draw weights of variance one over the fan-in, and biases of a tenth.

    Args:
        model: The model, changed in place.

    Returns:
        The model in float64.
    """
    with torch.no_grad():
        for module in model.double().modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                module.weight.normal_(0, module.weight[0].numel() ** -0.5)
                module.bias.normal_(0, 0.1)  # type: ignore[union-attr]
    return model


def frozen(model: nn.Module, x: Tensor) -> nn.Module:
    """Copy with the batch's own statistics as constants.

    Args:
        model: The model.
        x: The batch.

    Returns:
        A model in eval mode whose outputs on the batch are the same.
    """
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):

            def keep(norm: nn.modules.batchnorm._BatchNorm, inputs: tuple[Tensor, ...]) -> None:
                axes = [axis for axis in range(inputs[0].ndim) if axis != 1]
                norm.running_mean = inputs[0].detach().mean(axes)
                norm.running_var = inputs[0].detach().var(axes, correction=0)

            module.register_forward_pre_hook(keep)
    with torch.no_grad():
        twin(x)
    for module in twin.modules():
        module._forward_pre_hooks.clear()
    return twin.eval()


def blocks(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Exact diagonal blocks of the layers with Kronecker factors.

    Args:
        model: The model.
        x: The batch.

    Returns:
        Dense blocks by layer name.
    """
    exact, start, places = kf.reference.ggn(model, kf.Categorical(), x), 0, {}
    for name, parameter in model.named_parameters():
        places[name] = torch.arange(start, start + parameter.numel()).view(parameter.shape)
        start += parameter.numel()
    found = {}
    for name, adapter in adapt_model(model).adapters.items():
        if not adapter.unit_wise:
            own = adapter.pack({key: places[key] for key in adapter.parameter_names}).flatten()
            found[name] = exact[own][:, own]
    return found


def errors(model: nn.Module, x: Tensor, exact: dict[str, Tensor], name: str, source: Source, sharing: str) -> Tensor:
    """Relative error and ratio of traces of every block.

    Args:
        model: The model.
        x: The batch.
        exact: The exact blocks.
        name: The approximation.
        source: Whence the cotangents come.
        sharing: How positions are shared.

    Returns:
        ``[layers, 2]``.
    """
    found = kf.estimate(model, kf.Categorical(), (x, None), approximation=name, source=source, sharing=sharing).blocks
    rows = []
    for layer, wanted in exact.items():
        mine = found[layer].to_dense()
        rows.append(torch.stack(((mine - wanted).norm() / wanted.norm(), mine.trace() / wanted.trace())))
    return torch.stack(rows)


def table(
    title: str, make: Callable[[], nn.Module], shape: tuple[int, ...], rows: list[tuple[str, str, str]], mean: float = 1
) -> None:
    """Print one model's table.

    Args:
        title: Its heading.
        make: Makes the model.
        shape: Of one example's input.
        rows: Approximation, source and sharing of each row.
        mean: Of the inputs.
    """
    found = torch.zeros(SEEDS, len(rows), 4, 2, dtype=torch.float64)
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        model, x = draw_weights(make()), torch.randn(EXAMPLES, *shape, dtype=torch.float64) + mean
        exact = blocks(model, x)
        for index, (name, source, sharing) in enumerate(rows):
            subject = frozen(model, x) if name == "kfac, frozen" else model
            origin = OneByOne() if source == "exact" else Sampled(int(source))
            found[seed, index] = errors(subject, x, exact, name.split(",")[0], origin, sharing)
    print(
        f"{title}\n{'approximation':<14}{'source':<8}{'sharing':<9}"
        + "".join(f"{f'layer {i}':>21}" for i in range(1, 5))
    )
    means, deviations = found.mean(0), found[..., 0].std(0)
    for (name, source, sharing), values, spread in zip(rows, means.tolist(), deviations.tolist(), strict=True):
        layers = zip(values, spread, strict=True)
        cells = "".join(f"{f'{error:.2f} ± {apart:.2f} ({trace:.2f})':>21}" for (error, trace), apart in layers)
        print(f"{name:<14}{source:<8}{sharing:<9}{cells}")


def real_perceptron() -> nn.Module:
    """64-12(BN)-12-12(BN)-10."""
    first, second = (nn.Linear(64, 12), nn.BatchNorm1d(12), nn.ReLU()), (nn.Linear(12, 12), nn.ReLU())
    third = (nn.Linear(12, 12), nn.BatchNorm1d(12), nn.ReLU())
    return nn.Sequential(nn.Flatten(), *first, *second, *third, nn.Linear(12, 10))


def real_convolutions() -> nn.Module:
    """Three convolutions with batch norm behind the first and the third."""
    first, second = (nn.Conv2d(1, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU()), (nn.Conv2d(4, 6, 3, 1, 1), nn.ReLU())
    third = (nn.Conv2d(6, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU())
    return nn.Sequential(*first, *second, *third, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


def real_resnet() -> nn.Module:
    """ResNet-8 of one channel."""
    model = ResNet(1, maps=(2, 3, 4))
    model.conv = nn.Conv2d(1, 2, 3, padding=1, bias=False)
    return model


def trained(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> nn.Module:
    """Train in float64, batches of 100.

    Args:
        model: The model, changed in place.
        x: Inputs.
        y: Classes.
        steps: Number of steps.

    Returns:
        The model in train mode.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(steps):
        rows = torch.randint(len(x), (100,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return model


def real(seeds: int = 3, steps: int = 300) -> None:
    """Print the tables of trained networks.

    Args:
        seeds: Draws of weights, batches and training.
        steps: Of training.
    """
    data = load("digits")
    train, _ = data.standardised()
    x, y = train.double(), data.train.labels
    rows = [("xkfac", "expand"), ("xkfac_trace", "expand"), ("kfac", "expand"), ("kfac, frozen", "expand")]
    for title, make in (("MLP", real_perceptron), ("convolutions", real_convolutions), ("ResNet-8", real_resnet)):
        wanted = rows if make is real_perceptron else [*rows, ("xkfac", "reduce"), ("kfac", "reduce")]
        found = torch.zeros(len(wanted), 2, 3, dtype=torch.float64)
        for seed in range(seeds):
            torch.manual_seed(seed)
            model = make().double().train()
            for state in range(2):
                if state:
                    trained(model, x, y, steps)
                batch = x[torch.randperm(len(x))[:EXAMPLES]]
                exact = blocks(model, batch)
                for index, (name, sharing) in enumerate(wanted):
                    subject = frozen(model, batch) if name == "kfac, frozen" else model
                    found[index, state] += together(subject, batch, exact, name.split(",")[0], sharing) / seeds
        print(f"{title} on digits, N = {EXAMPLES}, means over {seeds} draws")
        columns = ("all", "first", "last but one")
        heads = "".join(f"{f'{c}, {s}':>23}" for s in ("start", "trained") for c in columns)
        print(f"{'approximation':<14}{'sharing':<9}{heads}")
        for (name, sharing), values in zip(wanted, found.flatten(1).tolist(), strict=True):
            print(f"{name:<14}{sharing:<9}" + "".join(f"{value:>23.2f}" for value in values))
        print()


def together(model: nn.Module, x: Tensor, exact: dict[str, Tensor], name: str, sharing: str) -> Tensor:
    """Relative error of all blocks as one matrix, of the first and of the last but one.

    Args:
        model: The model.
        x: The batch.
        exact: The exact blocks.
        name: The approximation.
        sharing: How positions are shared.

    Returns:
        Three errors.
    """
    options = {"approximation": name, "source": OneByOne(), "sharing": sharing}
    found = kf.estimate(model, kf.Categorical(), (x, None), **options).blocks  # type: ignore[call-overload]
    errors_of = {layer: (found[layer].to_dense() - wanted).norm() for layer, wanted in exact.items()}
    norms = {layer: wanted.norm() for layer, wanted in exact.items()}
    layers = list(exact)
    every = torch.stack(list(errors_of.values())).norm() / torch.stack(list(norms.values())).norm()
    return torch.stack([every, *(errors_of[layer] / norms[layer] for layer in (layers[0], layers[-2]))])


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", action="store_true", help="trained classifiers of digits")
    if parser.parse_args().real:
        real()
        return
    names = [("xkfac", "exact"), ("xkfac_trace", "exact"), ("xkfac", "16"), ("xkfac", "1")]
    names += [("kfac", "exact"), ("kfac, frozen", "exact")]
    table(f"6-8(BN)-7-6(BN)-4, N = {EXAMPLES}", perceptron, (6,), [(*pair, "expand") for pair in names])
    exact = [("xkfac", "exact", "expand"), ("xkfac_trace", "exact", "expand"), ("kfac", "exact", "expand")]
    table("\nthe same with inputs of mean zero", perceptron, (6,), exact, mean=0)
    pairs = [(name, sharing) for sharing in ("expand", "reduce") for name in ("xkfac", "xkfac_trace", "kfac")]
    table(
        f"\nconvolutions, N = {EXAMPLES}",
        convolutions,
        (2, 5, 5),
        [(name, "exact", sharing) for name, sharing in pairs],
    )


if __name__ == "__main__":
    main()
