"""Block-tridiagonal K-FAC (Martens & Grosse 2015, section 4.3) against matrices put together from its formulas."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from tests.exactness_helpers import double, draw, positions, relative
from torch import Tensor, nn

import kronfac as kf
from kronfac.layers import LayerAdapter

DAMPING = 0.03
WIDTHS = [3, 4, 2, 3]


def mlp(widths: list[int], activation: type[nn.Module] | None = nn.Tanh, bare: int | None = 1) -> nn.Sequential:
    modules: list[nn.Module] = []
    for index, (below, above) in enumerate(pairwise(widths)):
        modules += [activation()] if index and activation is not None else []
        modules += [nn.Linear(below, above, bias=index != bare)]
    model = double(nn.Sequential(*modules))
    assert isinstance(model, nn.Sequential)
    return model


def estimated(model: nn.Module, x: Tensor, likelihood: kf.Likelihood | None = None, **options: Any) -> Any:
    options = {"source": "exact", "approximation": "kfac_tridiagonal"} | options
    return kf.estimate(model, likelihood or kf.Categorical(), (x, None), **options)


class Oracle:
    """All moments by hand: inputs and cotangents of every layer for every example and column of the loss's root."""

    def __init__(self, model: nn.Sequential, likelihood: kf.Likelihood, x: Tensor) -> None:
        linear = [module for module in model if isinstance(module, nn.Linear)]
        inputs: list[Tensor] = []
        outputs: list[Tensor] = []
        value = x
        for module in model:
            if isinstance(module, nn.Linear):
                inputs.append(value.detach())
                value = module(value)
                value.retain_grad()
                outputs.append(value)
            else:
                value = module(value)
        n = len(x)
        ones = torch.ones(n, 1, dtype=torch.float64)
        rows = [torch.cat((a, ones), 1) if m.bias is not None else a for a, m in zip(inputs, linear, strict=True)]
        self.scale = 1 / float(likelihood.denominator(value.detach(), None))
        hessian = self.output_hessian(likelihood, value.detach())
        values, vectors = torch.linalg.eigh(hessian)
        roots = vectors * values.clamp_min(0).sqrt().unsqueeze(-2)
        cotangents: list[list[Tensor]] = [[] for _ in linear]
        for column in range(roots.shape[-1]):
            pulled = torch.autograd.grad(value, outputs, roots[..., column], retain_graph=True)
            for kept, g in zip(cotangents, pulled, strict=True):
                kept.append(g)
        stacked = [torch.cat(parts) for parts in cotangents]
        count = range(len(linear))
        self.input = {(i, j): rows[i].T @ rows[j] / n for i in count for j in count}
        self.output = {(i, j): stacked[i].T @ stacked[j] * self.scale for i in count for j in count}
        self.layers = len(linear)

    @staticmethod
    def output_hessian(likelihood: kf.Likelihood, z: Tensor) -> Tensor:
        if isinstance(likelihood, kf.Categorical):
            p = z.softmax(-1)
            return torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
        return torch.eye(z.shape[-1], dtype=z.dtype).expand(len(z), -1, -1) / likelihood.variance  # type: ignore[attr-defined]

    def damp(self, damping: float) -> None:
        """Factored damping of the diagonal blocks' factors, and of nothing else."""
        for i in range(self.layers):
            a, g = self.input[i, i], self.output[i, i]
            pi = math.sqrt((float(a.trace()) / len(a)) / (float(g.trace()) / len(g)))
            self.input[i, i] = a + pi * math.sqrt(damping) * torch.eye(len(a), dtype=a.dtype)
            self.output[i, i] = g + math.sqrt(damping) / pi * torch.eye(len(g), dtype=g.dtype)

    def block(self, i: int, j: int) -> Tensor:
        return torch.kron(self.output[i, j], self.input[i, j])

    def khatri_rao(self) -> Tensor:
        """``F̃``: every block a Kronecker product."""
        count = range(self.layers)
        return torch.cat([torch.cat([self.block(i, j) for j in count], 1) for i in count])

    def sizes(self) -> list[int]:
        return [len(self.block(i, i)) for i in range(self.layers)]

    def precision(self) -> Tensor:
        """``Ξᵀ Λ Ξ`` from dense blocks."""
        sizes = self.sizes()
        xi, conditionals = torch.eye(sum(sizes), dtype=torch.float64), []
        starts = [sum(sizes[:i]) for i in range(self.layers + 1)]
        for i in range(self.layers):
            sigma = self.block(i, i)
            if i + 1 < self.layers:
                psi_input = self.input[i, i + 1] @ torch.linalg.inv(self.input[i + 1, i + 1])
                psi_output = self.output[i, i + 1] @ torch.linalg.inv(self.output[i + 1, i + 1])
                psi = torch.kron(psi_output, psi_input)
                xi[starts[i] : starts[i + 1], starts[i + 1] : starts[i + 2]] = -psi
                sigma = sigma - psi @ self.block(i + 1, i + 1) @ psi.T
            conditionals.append(torch.linalg.inv(sigma))
        return xi.T @ torch.block_diag(*conditionals) @ xi


def by_layers(curvature: Any, model: nn.Module, dense: Tensor) -> Tensor:
    """Rows and columns from the order of the parameters to that of the layers' ``vec(V)``."""
    places = []
    for name in curvature.blocks:
        adapter = curvature.layouts[name]
        assert isinstance(adapter, LayerAdapter)
        places.append(positions(model, adapter).flatten())
    order = torch.cat(places)
    return dense[order][:, order]


def near_diagonal(sizes: list[int]) -> Tensor:
    """Mask of the blocks on and beside the diagonal."""
    layer = torch.cat([torch.full((size,), i) for i, size in enumerate(sizes)])
    return (layer.unsqueeze(0) - layer.unsqueeze(1)).abs() <= 1


@pytest.mark.parametrize("widths", [[3, 2], [3, 4, 2], WIDTHS, [2, 3, 2, 2, 3]])
def test_the_inverse_is_that_of_the_formulas(widths: list[int]) -> None:
    model, x = mlp(widths), draw(9, widths[0])
    curvature = estimated(model, x)
    oracle = Oracle(model, kf.Categorical(), x)
    oracle.damp(DAMPING)
    wanted = oracle.precision()
    inverse = curvature.factorise(DAMPING)
    assert inverse.parameter_names == curvature.parameter_names == tuple(n for n, _ in model.named_parameters())
    assert relative(by_layers(curvature, model, inverse.to_dense()), wanted) < 1e-9
    vector = {name: draw(*p.shape, seed=i) for i, (name, p) in enumerate(model.named_parameters())}
    flat = nn.utils.parameters_to_vector(list(vector.values()))
    solved = nn.utils.parameters_to_vector(list(inverse.apply(vector).values()))
    assert relative(solved, inverse.to_dense() @ flat) < 1e-12
    assert abs(float(inverse.logdet()) + float(torch.linalg.slogdet(wanted).logabsdet)) < 1e-9
    columns = [nn.utils.parameters_to_vector(list(inverse.sqrt_apply(unit).values())) for unit in units(vector)]
    root = torch.stack(columns, 1)
    assert relative(root @ root.T, inverse.to_dense()) < 1e-10


def units(vector: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    size = sum(part.numel() for part in vector.values())
    found = []
    for row in torch.eye(size, dtype=torch.float64):
        parts = row.split([part.numel() for part in vector.values()])
        found.append({name: p.reshape(v.shape) for p, (name, v) in zip(parts, vector.items(), strict=True)})
    return found


def test_two_layers_are_the_exact_inverse_of_all_blocks() -> None:
    model, x = mlp([3, 4, 2]), draw(9, 3)
    curvature = estimated(model, x)
    oracle = Oracle(model, kf.Categorical(), x)
    oracle.damp(DAMPING)
    found = by_layers(curvature, model, curvature.factorise(DAMPING).to_dense())
    assert relative(found, torch.linalg.inv(oracle.khatri_rao())) < 1e-8


def test_the_matrix_agrees_with_all_given_blocks_and_its_inverse_has_no_others() -> None:
    model, x = mlp([2, 3, 2, 2, 3]), draw(9, 2)
    curvature = estimated(model, x)
    oracle = Oracle(model, kf.Categorical(), x)
    oracle.damp(DAMPING)
    precision = by_layers(curvature, model, curvature.factorise(DAMPING).to_dense())
    near = near_diagonal(oracle.sizes())
    assert float(precision[~near].abs().max()) == 0
    matrix, full = torch.linalg.inv(precision), oracle.khatri_rao()
    assert relative(matrix[near], full[near]) < 1e-8
    assert float((matrix - full)[~near].norm()) > 1e-3 * float(full.norm())  # a chain is an assumption after all


def test_the_undamped_matrix_agrees_with_all_given_blocks() -> None:
    """Its output factors are singular: the outputs of a softmax sum to zero."""
    model, x = mlp([2, 3, 2, 2, 3]), draw(9, 2)
    curvature = estimated(model, x)
    oracle = Oracle(model, kf.Categorical(), x)
    assert float(torch.linalg.eigvalsh(oracle.output[3, 3])[0]) < 1e-14
    near, dense = near_diagonal(oracle.sizes()), curvature.to_dense()
    matrix = by_layers(curvature, model, dense)
    assert relative(matrix[near], oracle.khatri_rao()[near]) < 1e-10
    assert float(torch.linalg.eigvalsh(dense)[0]) > -1e-12 * float(dense.norm())
    vector = {name: draw(*p.shape, seed=i) for i, (name, p) in enumerate(model.named_parameters())}
    flat = nn.utils.parameters_to_vector(list(vector.values()))
    product = nn.utils.parameters_to_vector(list(curvature.matmul(vector).values()))
    assert relative(product, dense @ flat) < 1e-12
    torch.testing.assert_close(curvature.quadratic_form(vector), flat @ dense @ flat, rtol=1e-12, atol=0)
    torch.testing.assert_close(curvature.trace(), dense.trace(), rtol=1e-12, atol=0)
    torch.testing.assert_close(curvature.frobenius_norm(), dense.norm(), rtol=1e-12, atol=0)
    diagonal = nn.utils.parameters_to_vector(list(curvature.diagonal().values()))
    torch.testing.assert_close(diagonal, dense.diagonal(), rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("widths", [[3, 2, 2], [3, 2, 4, 2], [2, 5, 4, 3, 2]])
def test_deep_linear_networks_are_exact_between_layers_too(widths: list[int], biases: bool) -> None:
    """Wide hidden layers have singular output factors, narrow ones singular inputs above them.

    Cotangents do not depend on the data, and each layer's inputs and cotangents are functions of its neighbours': the
    chain holds exactly, and with it every block, not only those beside the diagonal.
    """
    model, x, likelihood = mlp(widths, activation=None, bare=None), draw(11, widths[0]), kf.Gaussian(variance=0.5)
    if not biases:
        for module in model:
            module.bias = None
    curvature = estimated(model, x, likelihood)
    wanted = kf.reference.ggn(model, likelihood, x)
    assert relative(curvature.to_dense(), wanted) < 1e-8
    blocks_alone = kf.estimate(model, likelihood, (x, None), approximation="kfac", source="exact").to_dense()
    assert relative(blocks_alone, wanted) > 0.1


def test_one_layer_is_kfac() -> None:
    model, x = mlp([3, 4]), draw(9, 3)
    chain, blocks = estimated(model, x), estimated(model, x, approximation="kfac")
    torch.testing.assert_close(chain.to_dense(), blocks.to_dense(), rtol=1e-14, atol=0)
    vector = {name: draw(*p.shape, seed=i) for i, (name, p) in enumerate(model.named_parameters())}
    inverses = [curvature.factorise(DAMPING) for curvature in (chain, blocks)]
    for name in vector:
        torch.testing.assert_close(*(inverse.apply(vector)[name] for inverse in inverses), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(*(inverse.logdet() for inverse in inverses), rtol=1e-12, atol=0)


def test_large_damping_forgets_what_is_between_layers() -> None:
    model, x = mlp(WIDTHS), draw(9, 3)
    chain, blocks = estimated(model, x), estimated(model, x, approximation="kfac")
    vector = {name: draw(*p.shape, seed=i) for i, (name, p) in enumerate(model.named_parameters())}
    apart = []
    for damping in (1e-2, 1e4):
        found = [c.factorise(damping).apply(vector) for c in (chain, blocks)]
        flat = [nn.utils.parameters_to_vector(list(solution.values())) for solution in found]
        apart.append(relative(*flat))
    assert apart[0] > 0.01
    assert apart[1] < 1e-3


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("scale", "nearer"), [(3**-0.5, 5), (1.0, 2)])
def test_nearer_to_the_whole_matrix_than_blocks_alone_and_a_better_step(scale: float, nearer: float, seed: int) -> None:
    """On tanh networks with weights of PyTorch's initial scale, and with larger ones: less linear, less near.

    The gain of a step along ``d`` from gradient ``v``, at its best length, is ``½ (vᵀd)² / dᵀ(F + λI)d``.
    """
    model, x = mlp([8, 10, 8, 6, 4], bare=None), draw(64, 8, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            width = parameter.shape[-1] if name.endswith("weight") else 10
            parameter.copy_(
                torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale / math.sqrt(width)
            )
    exact = kf.reference.ggn(model, kf.Categorical(), x)
    damped = exact + 1e-3 * torch.eye(len(exact), dtype=torch.float64)
    root = torch.linalg.cholesky(exact + 1e-9 * torch.eye(len(exact), dtype=torch.float64))
    gradients = root @ torch.randn(len(exact), 20, generator=generator, dtype=torch.float64)
    best = (gradients * torch.linalg.solve(damped, gradients)).sum(0)
    errors, gains = [], []
    for name in ("kfac_tridiagonal", "kfac"):
        curvature = estimated(model, x, approximation=name)
        errors.append(relative(curvature.to_dense(), exact))
        inverse, steps = curvature.factorise(1e-3), []
        for gradient in gradients.T:
            sizes = [shape.numel() for shape in curvature.parameter_shapes.values()]
            parts = zip(curvature.parameter_shapes.items(), gradient.split(sizes), strict=True)
            solved = inverse.apply({key: part.reshape(shape) for (key, shape), part in parts})
            steps.append(nn.utils.parameters_to_vector(list(solved.values())))
        step = torch.stack(steps, 1)
        gains.append((gradients * step).sum(0) ** 2 / (step * (damped @ step)).sum(0) / best)
    shown = [*errors, *(float(gain.mean()) for gain in gains)]
    print("error and gain, chain and blocks alone:", *(f"{value:.2f}" for value in shown))  # for the documentation
    assert errors[0] < errors[1] / nearer
    assert bool((gains[0] > gains[1]).all())
    assert float(gains[0].max()) < 1 + 1e-9
