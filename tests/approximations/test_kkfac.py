"""KK-FAC: the whole matrix against brute force, its inverse against the dense one, and what it refuses."""

from __future__ import annotations

import itertools

import pytest
import torch
from tests.approximations.xkfac_cases import OneByOne, activations, cross_gradients, inputs, perceptron
from tests.exactness_helpers import double, draw, relative
from torch import Tensor, nn

import kronfac as kf
from kronfac.blocks import Dense, KroneckerSum, PerFactor, Uniform
from kronfac.curvature_coupled import CoupledCurvature
from kronfac.damping import RULES
from kronfac.estimator import Estimator

LAYERS = (0, 3, 5, 8)


def estimated(model: nn.Module, x: Tensor, **options: object) -> CoupledCurvature:
    options.setdefault("source", OneByOne())
    found = kf.estimate(model, kf.Categorical(), (x, None), approximation="kkfac", **options)  # type: ignore[call-overload]
    assert type(found) is CoupledCurvature
    return found


def over_permutations(model: nn.Sequential, x: Tensor) -> Tensor:
    """The exact matrix over the linear layers, averaged over all ways to pair activations with gradients."""
    parts = [(activations(model, k, x)[0], cross_gradients(model, kf.Categorical(), k, x)) for k in LAYERS]
    found = []
    for order in itertools.permutations(range(len(x))):
        rows = [torch.einsum("cnmi,mj->cnij", g, a[list(order)]).flatten(2).flatten(0, 1) for a, g in parts]
        joined = torch.cat(rows, 1)
        found.append(joined.T @ joined / len(x))
    return torch.stack(found).mean(0)


def linear_part(curvature: CoupledCurvature) -> Tensor:
    """The dense matrix over the linear layers, each ``[W b]`` row-major, from products with unit vectors."""
    shapes = {name: block.shape for name, block in curvature.blocks.items() if isinstance(block, KroneckerSum)}
    sizes = [shape.numel() for shape in shapes.values()]
    units = torch.eye(sum(sizes), dtype=torch.float64).split(sizes, 1)
    vectors = {name: unit.reshape(-1, *shapes[name]) for name, unit in zip(shapes, units, strict=True)}
    others = {
        n: torch.zeros(sum(sizes), *b.shape, dtype=torch.float64)
        for n, b in curvature.blocks.items()
        if n not in shapes
    }
    product = curvature.coupled.matmul(vectors | others)
    return torch.cat([product[name].flatten(1) for name in shapes], 1)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_it_is_the_exact_matrix_averaged_over_pairings(count: int) -> None:
    model, x = perceptron(eps=0.5), inputs(count)
    assert relative(linear_part(estimated(model, x)), over_permutations(model, x)) < 1e-12


def test_diagonal_blocks_are_those_of_xkfac_and_norms_stand_alone() -> None:
    model, x = perceptron(), inputs(6)
    mine = estimated(model, x)
    alone = kf.estimate(model, kf.Categorical(), (x, None), approximation="xkfac", source=OneByOne())
    for name in ("0", "1", "3", "5"):
        assert relative(mine.blocks[name].to_dense(), alone.blocks[name].to_dense()) < 1e-12
    assert isinstance(mine.blocks["1"], Dense)
    dense = mine.to_dense()
    assert relative(dense, dense.T) < 1e-12
    assert relative(mine.frobenius_norm()[None], torch.linalg.matrix_norm(dense)[None]) < 1e-12
    assert relative(mine.trace()[None], dense.trace()[None]) < 1e-12
    assert relative(mine.scale(2.0).to_dense(), 2 * dense) < 1e-12


@pytest.mark.parametrize("samples", [1, 3])
def test_it_is_positive_semi_definite(samples: int) -> None:
    dense = estimated(perceptron(), inputs(6), source="sampled", samples=samples).to_dense()
    values = torch.linalg.eigvalsh(dense)
    assert float(values[0]) > -1e-13 * float(values[-1])


@pytest.mark.parametrize("rule", ["exact", "factored"])
def test_solving_is_solving_with_the_dense_damped_matrix(rule: str) -> None:
    curvature = estimated(perceptron(), inputs(6))
    dense, damped = curvature.to_dense(), curvature.factorise(0.1, rule)
    names, size = curvature.parameter_names, len(dense := curvature.to_dense())
    places, start = {}, 0
    for name in names:
        shape = curvature.parameter_shapes[name]
        places[name] = torch.arange(start, start + shape.numel()).view(shape)
        start += shape.numel()
    for layer, block in curvature.blocks.items():
        own = curvature.layouts[layer].pack({n: places[n] for n in curvature.layouts[layer].parameter_names})
        shift = RULES[rule](block, 0.1)
        if isinstance(shift, Uniform):
            dense[own.flatten(), own.flatten()] += shift.value
            continue
        assert isinstance(shift, PerFactor)
        assert isinstance(block, KroneckerSum)
        first = block.terms()[0]
        a = first.input + shift.input * torch.eye(block.shape[1], dtype=torch.float64)
        g = first.output + shift.output * torch.eye(block.shape[0], dtype=torch.float64)
        dense[own.flatten()[:, None], own.flatten()] += torch.kron(g, a) - torch.kron(first.output, first.input)
    inverse = torch.linalg.inv(dense)
    assert relative(damped.to_dense(), inverse) < 1e-9
    assert float(damped.logdet()) == pytest.approx(float(torch.linalg.slogdet(dense).logabsdet), rel=1e-10)
    units = {n: torch.eye(size, dtype=torch.float64)[places[n]].movedim(-1, 0) for n in names}
    columns = [damped.sqrt_apply({n: units[n][k] for n in names}) for k in range(size)]
    root = torch.stack([torch.cat([column[n].flatten() for n in names]) for column in columns], 1)
    assert relative(root @ root.T, inverse) < 1e-9


def test_several_batches_are_pooled_as_in_xkfac() -> None:
    model, batches = perceptron(), [(inputs(4, 1), None), (inputs(7, 2), None)]
    mine, alone = (
        kf.estimate(model, kf.Categorical(), batches, approximation=name, source=OneByOne())
        for name in ("kkfac", "xkfac")
    )
    assert relative(mine.blocks["3"].to_dense(), alone.blocks["3"].to_dense()) < 1e-12


# ------------------------------------------------------------------------------------------------ refused
@pytest.mark.parametrize("source", ["exact", "empirical", "recursive", "forward_only"])
def test_sources_without_independent_signs_are_refused_by_name(source: str) -> None:
    with pytest.raises(ValueError, match=f"source='{source}'"):
        Estimator(perceptron(), kf.Categorical(), approximation="kkfac", source=source)


def test_other_layers_positions_and_batches_of_one_are_refused_by_name() -> None:
    convolution = double(nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(27, 3)))
    with pytest.raises(ValueError, match="does not take Conv2d '0'"):
        estimated(convolution, draw(3, 2, 4, 4))
    with pytest.raises(ValueError, match="there is none"):
        estimated(double(nn.Sequential(nn.BatchNorm1d(6))), inputs(3))
    positions = double(nn.Sequential(nn.Linear(6, 4), nn.Flatten(), nn.Linear(8, 3)))
    with pytest.raises(ValueError, match="'0' was called with an input of shape"):
        estimated(positions, draw(3, 2, 6))
    with pytest.raises(ValueError, match="batch of one"):
        estimated(double(nn.Sequential(nn.Linear(6, 4))), inputs(1))
    with pytest.raises(ValueError, match="layers one by one, but approximation='kkfac' couples them"):
        kf.optim.KFAC(perceptron(), kf.Categorical(), lr=0.1, approximation="kkfac")


def test_too_many_parameters_are_refused_when_factorised(monkeypatch: pytest.MonkeyPatch) -> None:
    curvature = estimated(perceptron(), inputs(4))
    monkeypatch.setattr("kronfac.blocks.khatri_rao.DENSE_LIMIT", 100)
    with pytest.raises(ValueError, match="use approximation='xkfac'"):
        curvature.factorise(0.1)
