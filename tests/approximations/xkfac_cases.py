"""Brute force through batch norm in train mode, and sources of cotangents without sampling error."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator

import torch
from tests.exactness_helpers import double, draw
from torch import Tensor, nn

from kronfac.likelihoods import Likelihood
from kronfac.sources import Seed, Source


class OneByOne(Source):
    """Every root column of every example, pulled alone: the exact sum over examples, batch norm included."""

    name = "one by one"

    def seeds(
        self, likelihood: Likelihood, outputs: Tensor, targets: object, generator: torch.Generator | None
    ) -> Iterator[Seed]:
        for column in likelihood.root_columns(outputs, targets):  # type: ignore[arg-type]
            for index in range(len(outputs)):
                alone = torch.zeros_like(column)
                alone[index] = column[index]
                yield Seed(alone, 1.0)


class Signed(Source):
    """Root columns times signs of the examples: the given patterns, each with the same weight, of sum one."""

    name = "signed"

    def __init__(self, patterns: Tensor) -> None:
        self.patterns = patterns

    def seeds(
        self, likelihood: Likelihood, outputs: Tensor, targets: object, generator: torch.Generator | None
    ) -> Iterator[Seed]:
        for column in likelihood.root_columns(outputs, targets):  # type: ignore[arg-type]
            for signs in self.patterns:
                shape = (-1,) + (1,) * (column.ndim - 1)
                yield Seed(signs.to(column).view(shape) * column, 1.0 / len(self.patterns))


def hadamard(count: int) -> Tensor:
    """Orthogonal rows of signs; the count is a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < count:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    assert len(matrix) == count
    return matrix


def all_signs(count: int) -> Tensor:
    """Every pattern of signs."""
    return torch.tensor(list(itertools.product((1.0, -1.0), repeat=count)), dtype=torch.float64)


def perceptron(eps: float = 1e-5) -> nn.Sequential:
    """6-8(BN)-7-6(BN)-4."""
    model = nn.Sequential(
        nn.Linear(6, 8),
        nn.BatchNorm1d(8, eps=eps),
        nn.Tanh(),
        nn.Linear(8, 7),
        nn.Tanh(),
        nn.Linear(7, 6),
        nn.BatchNorm1d(6, eps=eps),
        nn.Tanh(),
        nn.Linear(6, 4),
    )
    return double(model)  # type: ignore[return-value]


def inputs(count: int, seed: int = 1) -> Tensor:
    """Inputs whose mean is not zero."""
    return draw(count, 6, seed=seed) + 0.5


def activations(model: nn.Sequential, layer: int, x: Tensor) -> tuple[Tensor, nn.Sequential]:
    """Rows ``ā`` of a linear layer, and what follows the layer, batch norm in train mode by batch statistics alone."""
    head, tail = copy.deepcopy(model[:layer]), copy.deepcopy(model[layer + 1 :])
    for module in (*head, *tail):
        if isinstance(module, nn.BatchNorm1d):
            module.track_running_stats = False
    with torch.no_grad():
        rows = head(x)
    return torch.cat((rows, rows.new_ones(len(rows), 1)), 1), tail


def cross_gradients(model: nn.Sequential, likelihood: Likelihood, layer: int, x: Tensor) -> Tensor:
    """``g[c, n, m]``: derivative of root column ``c`` of example ``n``'s loss in example ``m``'s pre-activation.

    Shape ``[C, N, N, d_out]``, from the Jacobian of the whole batch.
    """
    rows, tail = activations(model, layer, x)
    linear = model[layer]
    assert isinstance(linear, nn.Linear)
    with torch.no_grad():
        h = linear(rows[:, :-1])
        jacobian = torch.func.jacrev(tail)(h)  # [N, C, N, d_out]
        columns = torch.stack(list(likelihood.root_columns(tail(h), None)))
        return torch.einsum("cno,nomd->cnmd", columns, jacobian)


def primes(g: Tensor) -> tuple[Tensor, Tensor]:
    """``H'`` and ``H''`` of equations (68) and (69), by their sums over examples."""
    count = g.shape[1]
    first = torch.einsum("cnmi,cnmj->ij", g, g) / count
    total = g.sum(2)
    return first, torch.einsum("cni,cnj->ij", total, total) / count


def equation_59(rows: Tensor, g: Tensor) -> Tensor:
    """``Ā ⊗ H' + (N Ā' - Ā) ⊗ (H'' - H') / (N - 1)`` over row-major ``vec(W̄)``."""
    count = len(rows)
    a, mean = rows.T @ rows / count, rows.mean(0)
    (first, second), outer = primes(g), torch.outer(mean, mean)
    return torch.kron(first, a) + torch.kron(second - first, count * outer - a) / (count - 1)


def over_permutations(rows: Tensor, g: Tensor) -> Tensor:
    """The exact block, averaged over all ways to pair activations with gradients."""
    count, blocks = len(rows), []
    for order in itertools.permutations(range(count)):
        gradients = torch.einsum("cnmi,mj->cnij", g, rows[list(order)]).flatten(2).flatten(0, 1)
        blocks.append(gradients.T @ gradients / count)
    return torch.stack(blocks).mean(0)
