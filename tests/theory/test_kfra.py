"""What Botev, Ritter & Barber (2017) state of KFLR, KFRA and pre-activation Hessians, checked in float64."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from tests.exactness_helpers import block_errors, double, draw, positions, relative
from torch import Tensor, nn
from torch.func import grad, jacrev

import kronfac as kf
from kronfac.blocks import Kronecker
from kronfac.layers import adapt_model
from kronfac.reference import preactivation_hessians
from kronfac.sources.chain import ELEMENTWISE
from kronfac.sources.recursive import output_hessian

LIKELIHOODS = [kf.Categorical(), kf.Bernoulli(), kf.Gaussian()]


def mlp(activation: type[nn.Module] = nn.Tanh, widths: tuple[int, ...] = (4, 5, 4, 3), seed: int = 0) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), activation()]
    return double(nn.Sequential(*layers[:-1]), seed)  # type: ignore[return-value]


def convolutional() -> nn.Sequential:
    return double(
        nn.Sequential(
            nn.Conv2d(1, 2, 3, padding=1),
            nn.SiLU(),
            nn.MaxPool2d(3, 2, padding=1),
            nn.Sequential(nn.Conv2d(2, 4, 2, groups=2), nn.LeakyReLU(0.2), nn.AvgPool2d(2, 1)),
            nn.Flatten(),
            nn.Linear(4, 3),
        )
    )


def one_dimensional() -> nn.Sequential:
    layers = (nn.Conv1d(2, 3, 3, stride=2), nn.Softplus(), nn.MaxPool1d(2), nn.Linear(2, 2), nn.ELU(), nn.Flatten())
    return double(nn.Sequential(*layers, nn.Linear(6, 3)))


def three_dimensional() -> nn.Sequential:
    layers = (nn.Conv3d(1, 2, 2), nn.GELU(), nn.AdaptiveAvgPool3d((2, 1, 2)), nn.Flatten(), nn.Linear(8, 3))
    return double(nn.Sequential(*layers))


IDS = ["tanh", "relu", "sigmoid", "2d", "1d", "3d"]
NETS = [
    (mlp(nn.Tanh), (4,)),
    (mlp(nn.ReLU), (4,)),
    (mlp(nn.Sigmoid), (4,)),
    (convolutional(), (1, 5, 5)),
    (one_dimensional(), (2, 9)),
    (three_dimensional(), (1, 4, 3, 4)),
]


def kfra(model: nn.Module, likelihood: kf.Likelihood, x: Tensor, **options: object) -> kf.BlockDiagonal:
    return kf.estimate(model, likelihood, (x, None), source="recursive", **options)


def kflr(model: nn.Module, likelihood: kf.Likelihood, x: Tensor, **options: object) -> kf.BlockDiagonal:
    return kf.estimate(model, likelihood, (x, None), source="exact", **options)


# ---------------------------------------------------------------------------------------------------- KFRA and KFLR
@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=repr)
@pytest.mark.parametrize(("model", "shape"), NETS, ids=IDS)
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_for_one_example_kfra_is_kflr(
    model: nn.Module, shape: tuple[int, ...], likelihood: kf.Likelihood, sharing: str
) -> None:
    x = draw(1, *shape, seed=5)
    found, wanted = kfra(model, likelihood, x, sharing=sharing), kflr(model, likelihood, x, sharing=sharing)
    for name, block in wanted.blocks.items():
        assert relative(found.blocks[name].to_dense(), block.to_dense()) < 1e-10, name


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=repr)
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU, nn.Sigmoid, nn.SiLU])
def test_for_one_example_kfra_is_the_exact_gauss_newton_block(
    activation: type[nn.Module], likelihood: kf.Likelihood
) -> None:
    model, x = mlp(activation), draw(1, 4, seed=5)
    errors = block_errors(kfra(model, likelihood, x), model, kf.reference.ggn(model, likelihood, x))
    assert max(errors.values()) < 1e-8, errors


@pytest.mark.parametrize("batch", [1, 2, 9])
def test_for_deep_linear_networks_kfra_is_kflr_and_exact(batch: int) -> None:
    model, x, likelihood = mlp(nn.Identity), draw(batch, 4, seed=5), kf.Gaussian()
    found = kfra(model, likelihood, x)
    assert relative(found.to_dense(), kflr(model, likelihood, x).to_dense()) < 1e-10
    errors = block_errors(found, model, kf.reference.ggn(model, likelihood, x))
    assert max(errors.values()) < 1e-8, errors


def test_for_linear_convolutional_networks_kfra_is_kflr() -> None:
    convolutions = (nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.AvgPool2d(2), nn.Conv2d(3, 2, 2))
    model, x = double(nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(2, 3))), draw(6, 2, 7, 8)
    for likelihood in (kf.Gaussian(), kf.Categorical()):
        assert relative(kfra(model, likelihood, x).to_dense(), kflr(model, likelihood, x).to_dense()) < 1e-10


@pytest.mark.parametrize(("model", "shape"), NETS, ids=IDS)
def test_in_general_they_differ_behind_the_last_layer(model: nn.Module, shape: tuple[int, ...]) -> None:
    x = draw(8, *shape, seed=5)
    found, wanted = kfra(model, kf.Categorical(), x), kflr(model, kf.Categorical(), x)
    *early, last = wanted.blocks
    assert relative(found.blocks[last].to_dense(), wanted.blocks[last].to_dense()) < 1e-10
    for name in early:
        assert 1e-5 < relative(found.blocks[name].to_dense(), wanted.blocks[name].to_dense()) < 3


def test_over_batches_of_one_example_kfra_is_kflr_of_all_data() -> None:
    model, x, likelihood = mlp(), draw(7, 4, seed=5), kf.Categorical()
    one_by_one = [(x[n : n + 1], None) for n in range(7)]
    found = kf.estimate(model, likelihood, one_by_one, source="recursive")
    assert relative(found.to_dense(), kflr(model, likelihood, x).to_dense()) < 1e-10


def test_algorithm_g_by_hand() -> None:
    """``G_{λ-1} = (W_λᵀ G_λ W_λ) ⊙ (1/N) A Aᵀ``, ``Q_λ = (1/N) a aᵀ``."""
    model, x, likelihood = mlp(nn.Sigmoid), draw(6, 4, seed=5), kf.Bernoulli()
    first, second, third = model[0], model[2], model[4]
    h1 = first(x)
    h2 = second(h1.sigmoid())
    p = third(h2.sigmoid()).sigmoid()
    slope1, slope2 = (h.sigmoid() * (1 - h.sigmoid()) for h in (h1, h2))
    g3 = (p * (1 - p)).mean(0).diag()
    g2 = (third.weight.T @ g3 @ third.weight) * (slope2.T @ slope2 / 6)
    g1 = (second.weight.T @ g2 @ second.weight) * (slope1.T @ slope1 / 6)
    found = kfra(model, likelihood, x).blocks
    for name, g, a in (("0", g1, x), ("2", g2, h1.sigmoid()), ("4", g3, h2.sigmoid())):
        rows = torch.cat((a, torch.ones(6, 1).double()), 1)
        block = found[name]
        assert isinstance(block, Kronecker)
        assert relative(block.output, g.detach()) < 1e-12
        assert relative(block.input, (rows.T @ rows / 6).detach()) < 1e-12


# ---------------------------------------------------------------------------------------------------- output Hessians
def test_output_hessians() -> None:
    z = draw(1, 4, seed=2)
    coins, classes = z[0].sigmoid(), z[0].softmax(0)
    assert relative(output_hessian(kf.Bernoulli(), z), (coins * (1 - coins)).diag()) < 1e-12
    assert relative(output_hessian(kf.Categorical(), z), classes.diag() - classes.outer(classes)) < 1e-12
    assert relative(output_hessian(kf.Gaussian(), z), torch.eye(4).double()) < 1e-12


# ---------------------------------------------------------------------------------------------------- (8) and (29)
def targets_for(likelihood: kf.Likelihood, batch: int) -> Tensor:
    if isinstance(likelihood, kf.Categorical):
        return torch.arange(batch) % 3
    return draw(batch, 3, seed=9).sigmoid()


def shifted_hessian(model: nn.Sequential, layer: str, likelihood: kf.Likelihood, x: Tensor, y: Tensor) -> Tensor:
    """Hessian of one example's loss in a shift of one layer's output, by torch.func."""

    def loss(shift: Tensor) -> Tensor:
        value = x
        for name, module in model.named_children():
            value = module(value)
            value = value + shift if name == layer else value
        return likelihood.sum_loss(value, y)

    return jacrev(grad(loss))(torch.zeros(model.get_submodule(layer).out_features, dtype=torch.float64))


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=repr)
@pytest.mark.parametrize("activation", [nn.Tanh, nn.Sigmoid, nn.SiLU, nn.ReLU])
def test_the_recursion_gives_the_hessians_of_torch_func(activation: type[nn.Module], likelihood: kf.Likelihood) -> None:
    model, x, y = mlp(activation), draw(3, 4, seed=5), targets_for(likelihood, 3)
    found = preactivation_hessians(model, likelihood, x, y)
    assert list(found) == ["0", "2", "4"]
    for name, blocks in found.items():
        for n in range(3):
            wanted = shifted_hessian(model, name, likelihood, x[n : n + 1], y[n : n + 1])
            torch.testing.assert_close(blocks[n], wanted, rtol=1e-9, atol=1e-12)
        assert float(blocks.abs().max()) > 1e-3


def test_its_gauss_newton_part_is_what_kflr_sums_and_kfra_has_for_one_example() -> None:
    model, x, likelihood = mlp(), draw(5, 4, seed=5), kf.Categorical()
    parts = preactivation_hessians(model, likelihood, x, gauss_newton=True)
    exact, alone = kflr(model, likelihood, x), kfra(model, likelihood, x[:1])
    for name, blocks in parts.items():
        assert relative(exact.blocks[name].output, blocks.mean(0)) < 1e-10
        assert relative(alone.blocks[name].output, blocks[0]) < 1e-10
    whole = preactivation_hessians(model, likelihood, x, torch.arange(5) % 3)
    assert relative(whole["0"], parts["0"]) > 1e-3


def test_an_activation_may_come_twice() -> None:
    activation = nn.Sigmoid()
    model = double(nn.Sequential(nn.Linear(4, 5), activation, nn.Linear(5, 4), activation, nn.Linear(4, 3)))
    x, y = draw(3, 4, seed=5), torch.arange(3)
    for options in ({}, {"gauss_newton": True}):
        found = preactivation_hessians(model, kf.Categorical(), x, y, **options)
        wanted = preactivation_hessians(mlp(nn.Sigmoid), kf.Categorical(), x, y, **options)
        assert list(found) == list(wanted) == ["0", "2", "4"]
        for name, blocks in wanted.items():
            assert torch.equal(found[name], blocks)


@pytest.mark.parametrize("kind", [kind for kind in ELEMENTWISE if kind is not nn.Threshold])
def test_every_activation_is_one_at_every_size_of_the_batch(kind: type[nn.Module]) -> None:
    """Of some, values differ by a unit in the last place with the number of values that are evaluated at once."""
    for batch in (1, 2, 3, 4, 5, 7, 8, 9, 16, 17):
        model, x = mlp(kind), draw(batch, 4, seed=batch)
        assert len(preactivation_hessians(model, kf.Categorical(), x, gauss_newton=True)) == 3


class Own(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class OwnChain(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


TWICE = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("model", "error", "text"),
    [
        (nn.Sequential(TWICE, nn.Tanh(), TWICE), ValueError, "Linear '0' is used again as '2'"),
        (nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)), ValueError, "dropout '1' is in train mode"),
        (nn.Sequential(nn.Linear(2, 2), nn.RReLU()), ValueError, "RReLU '1' is in train mode"),
        (nn.Sequential(nn.Linear(2, 2), nn.Flatten(0)), TypeError, r"Flatten '1' takes \(3, 2\) to \(6,\)"),
        (
            nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, affine=False, track_running_stats=False)),
            TypeError,
            "BatchNorm1d '1' mixes",
        ),
        (nn.Sequential(Own(2, 2)), TypeError, "Own '0' is neither"),
        (OwnChain(nn.Linear(2, 2)), TypeError, "OwnChain is no nn.Sequential, or has a forward of its own"),
    ],
)
def test_the_recursion_refuses_what_would_be_wrong(model: nn.Module, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        preactivation_hessians(double(model), kf.Gaussian(), draw(3, 2), draw(3, 2, seed=1))


def test_what_draws_no_number_is_an_activation() -> None:
    x = draw(3, 4)
    still = nn.Sequential(*mlp()[:2], nn.Dropout(0.5), nn.RReLU(), *mlp()[2:]).eval()
    gains = nn.LeakyReLU((1 / 8 + 1 / 3) / 2)
    wanted = preactivation_hessians(nn.Sequential(*mlp()[:2], gains, *mlp()[2:]), kf.Gaussian(), x, draw(3, 3))
    found = preactivation_hessians(still, kf.Gaussian(), x, draw(3, 3))
    for blocks, expected in zip(found.values(), wanted.values(), strict=True):
        torch.testing.assert_close(blocks, expected, rtol=1e-12, atol=1e-14)


def test_the_recursion_refuses_what_it_does_not_know() -> None:
    x = draw(1, 2)
    with pytest.raises(TypeError, match="LayerNorm '1' is neither"):
        preactivation_hessians(double(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))), kf.Gaussian(), x, x)
    with pytest.raises(TypeError, match="Softmax '1' mixes"):
        preactivation_hessians(double(nn.Sequential(nn.Linear(2, 2), nn.Softmax(1))), kf.Gaussian(), x, x)
    with pytest.raises(ValueError, match=r"takes inputs \[B, d\], not \(1, 1, 2\)"):
        preactivation_hessians(double(nn.Sequential(nn.Linear(2, 2))), kf.Gaussian(), x[None], x[None])
    with pytest.raises(ValueError, match="pass y, or gauss_newton=True"):
        preactivation_hessians(mlp(), kf.Gaussian(), draw(1, 4))


# ---------------------------------------------------------------------------------------------------- (36)-(38)
@pytest.mark.parametrize("damping", [1e-4, 0.3])
def test_factored_damping_is_the_approximate_inverse(damping: float) -> None:
    """``(Q + ω √k I) ⊗ (G + √k/ω I)``, ``ω = √(tr Q dim G / (tr G dim Q))``, ``k`` the damping: ω is K-FAC's π."""
    model, x = mlp(), draw(6, 4, seed=5)
    curvature = kfra(model, kf.Categorical(), x)
    inverse = curvature.factorise(damping, rule="factored")
    gradient = {name: draw(*shape, seed=3) for name, shape in curvature.parameter_shapes.items()}
    found = inverse.apply(gradient)
    for name, block in curvature.blocks.items():
        assert isinstance(block, Kronecker)
        q, g = block.input, block.output
        omega = math.sqrt(q.trace() * len(g) / (g.trace() * len(q)))
        left = g + math.sqrt(damping) / omega * torch.eye(len(g)).double()
        right = q + math.sqrt(damping) * omega * torch.eye(len(q)).double()
        v = torch.cat((gradient[f"{name}.weight"], gradient[f"{name}.bias"].unsqueeze(1)), 1)
        wanted = torch.linalg.solve(left, v) @ torch.linalg.inv(right)
        step = torch.cat((found[f"{name}.weight"], found[f"{name}.bias"].unsqueeze(1)), 1)
        assert relative(step, wanted) < 1e-9


def test_omega_minimises_the_bound_on_the_residual() -> None:
    """(37), trace norm: ``√k (tr Q dim G / ω + ω tr G dim Q)`` is least at (38)."""
    block = kfra(mlp(), kf.Categorical(), draw(6, 4, seed=5)).blocks["2"]
    assert isinstance(block, Kronecker)
    q, g = block.input, block.output
    one, two = float(q.trace()) * len(g), float(g.trace()) * len(q)
    omega = math.sqrt(one / two)

    def bound(at: float) -> float:
        return one / at + at * two

    assert all(bound(omega) < bound(omega * factor) for factor in (0.5, 0.99, 1.01, 2))


# ---------------------------------------------------------------------------------------------------- Lemmas 1 and 2
PIECEWISE_LINEAR = [nn.ReLU, nn.LeakyReLU, nn.Hardtanh]


def least_relative_eigenvalue(matrix: Tensor) -> float:
    """Of ``[..., d, d]``, over the largest in size."""
    values = torch.linalg.eigvalsh(matrix)
    return float((values[..., 0] / values.abs().amax(-1).clamp(min=1e-300)).min())


def diagonal_blocks(model: nn.Module, matrix: Tensor) -> list[Tensor]:
    places = [positions(model, adapter).flatten() for adapter in adapt_model(model).adapters.values()]
    return [matrix[place][:, place] for place in places]


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=repr)
@pytest.mark.parametrize("activation", PIECEWISE_LINEAR)
def test_lemma_1_for_pre_activations(activation: type[nn.Module], likelihood: kf.Likelihood) -> None:
    """(66)-(69): ``D`` vanishes, and each pre-activation Hessian is positive semi-definite."""
    for seed in range(5):
        model, x, y = mlp(activation, seed=seed), draw(4, 4, seed=seed), targets_for(likelihood, 4)
        found = preactivation_hessians(model, likelihood, x, y)
        gauss_newton = preactivation_hessians(model, likelihood, x, gauss_newton=True)
        for name, blocks in found.items():
            torch.testing.assert_close(blocks, gauss_newton[name], rtol=1e-12, atol=1e-14)
            assert least_relative_eigenvalue(blocks) > -1e-10


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=repr)
@pytest.mark.parametrize("activation", PIECEWISE_LINEAR)
def test_lemmas_1_and_2_for_parameters(activation: type[nn.Module], likelihood: kf.Likelihood) -> None:
    """(70): each layer's block of the Hessian is positive semi-definite; (71): so its trace is not negative."""
    indefinite = 0
    for seed in range(5):
        model, x, y = mlp(activation, seed=seed), draw(4, 4, seed=seed), targets_for(likelihood, 4)
        dense = kf.reference.hessian(model, likelihood, x, y)
        blocks = diagonal_blocks(model, dense)
        assert sum(len(block) for block in blocks) == len(dense)
        for block in blocks:
            assert least_relative_eigenvalue(block) > -1e-10
        traces = [float(block.trace()) for block in blocks]
        assert min(traces) >= 0
        assert float(dense.trace()) == pytest.approx(sum(traces))
        assert torch.linalg.eigvalsh(dense)[-1] > 0  # not all negative: no strict maximum
        indefinite += least_relative_eigenvalue(dense) < -1e-6
    assert indefinite, "the whole Hessian is not positive semi-definite, or the lemmas would say nothing"


@pytest.mark.parametrize("activation", PIECEWISE_LINEAR)
def test_lemma_1_makes_the_loss_convex_in_each_layer(activation: type[nn.Module]) -> None:
    """Between points of one linear piece the loss of one layer's weights, the others fixed, lies below its chords."""
    model, likelihood = mlp(activation), kf.Categorical()
    x, y = draw(4, 4, seed=5), torch.arange(4) % 3

    def loss() -> float:
        with torch.no_grad():
            return float(likelihood.loss(model(x), y))

    for index, name in enumerate(("0.weight", "2.weight", "4.weight")):
        parameter = model.get_parameter(name)
        start, direction = parameter.detach().clone(), 1e-3 * draw(*parameter.shape, seed=index)
        values = []
        for step in (-1.0, 0.0, 1.0):
            parameter.data.copy_(start + step * direction)
            values.append(loss())
        parameter.data.copy_(start)
        assert values[0] + values[2] - 2 * values[1] >= -1e-15


def test_smooth_activations_break_both_lemmas() -> None:
    """So the tests above can fail."""
    found = []
    for seed in range(20):
        model, x, y = mlp(nn.Tanh, seed=seed), draw(2, 4, seed=seed), 10 * draw(2, 3, seed=seed + 1)
        dense = kf.reference.hessian(model, kf.Gaussian(), x, y)
        least = min(least_relative_eigenvalue(block) for block in diagonal_blocks(model, dense))
        found.append((least, float(dense.trace())))
    assert min(least for least, _ in found) < -0.1
    assert min(trace for _, trace in found) < 0
