"""Input factors on CIFAR-10 against the second moment of patches, as the page on KFC's assumptions shows them.

Prints a row for each convolution of KFC's network at its initial weights, fed with training images: the relative error
(Frobenius norm) of Theorem 1's factor from estimated autocovariances, of the same with the boundary counts dropped, of
SUA's and of PRONG's factor, and the least over the greatest eigenvalue of the first.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kronfac.analysis.theorem1 import autocovariance, mean_activation, theorem1_gap, theorem1_input_factor
from kronfac.approximations import KFAC, PRONG, SUA, Approximation
from kronfac.experiments.problems import get_problem
from kronfac.layers import adapt
from kronfac.sources import Sample

EXAMPLES = 500


def factor(approximation: Approximation, layer: nn.Module, x: Tensor) -> Tensor:
    """Input factor of an approximation.

    Args:
        approximation: The approximation.
        layer: The layer.
        x: Its inputs.

    Returns:
        ``A``.
    """
    adapter = adapt(layer, "layer")
    statistic = approximation.start(adapter)
    statistic.add(Sample(adapter, x, None, 1.0, float(len(x)), len(x), True))
    return statistic.block().tensors()["input"]


def without_boundaries(x: Tensor) -> Tensor:
    """Theorem 1's factor with ``β = |T|``: a map so wide that counts do not matter has the same autocovariance.

    Args:
        x: Inputs ``[N, J, H, W]`` of a 5x5 convolution.

    Returns:
        ``A``.
    """
    covariance, mean = autocovariance(x, (4, 4)), mean_activation(x).repeat_interleave(25)
    offsets = torch.cartesian_prod(torch.arange(5), torch.arange(5))
    lag = offsets[None, :] - offsets[:, None] + 4
    weight = covariance[:, :, lag[..., 0], lag[..., 1]].transpose(1, 2).reshape(len(mean), len(mean))
    corner = torch.cat((mean, mean.new_ones(1)))
    return torch.cat((torch.cat((weight, mean[None])), corner[:, None]), 1)


def main() -> None:
    """Print the table."""
    task = get_problem("cifar10-kfc")
    model, x = task.model(seed=0).double(), task.data().train_inputs[:EXAMPLES].double()
    print(f"{'map':>8} {'Theorem 1':>10} {'no counts':>10} {'SUA':>8} {'PRONG':>8} {'eigenvalue':>12}")
    with torch.no_grad():
        for layer in model:
            if isinstance(layer, nn.Conv2d):
                exact = factor(KFAC(), layer, x)
                gap = theorem1_gap(layer, x)
                others = (without_boundaries(x), factor(SUA(), layer, x), factor(PRONG(), layer, x))
                errors = [float((other - exact).norm() / exact.norm()) for other in others]
                check = float((theorem1_input_factor(x, (2, 2)) - exact).norm() / exact.norm())
                if abs(check - gap.error) > 1e-9:
                    raise AssertionError("theorem1_gap and K-FAC's own factor disagree")
                size = f"{x.shape[2]}x{x.shape[3]}"
                print(
                    f"{size:>8} {gap.error:>10.3f} {errors[0]:>10.3f} {errors[1]:>8.3f} {errors[2]:>8.3f} "
                    f"{gap.least:>12.1e}"
                )
            x = layer(x)


if __name__ == "__main__":
    main()
