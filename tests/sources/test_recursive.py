"""The recursive source (KFRA): each step against its definition, what it counts, and what it refuses."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tests.exactness_helpers import double, draw, relative
from torch import Tensor, nn
from torch.autograd.functional import jacobian as jacobian_of

import kronfac as kf
from kronfac.layers import adapt
from kronfac.sources import Recursive
from kronfac.sources.chain import ELEMENTWISE, read_chain
from kronfac.sources.moments import pull_back, run
from kronfac.sources.recursive import output_hessian, position_sums
from kronfac.tape import TapeError, record

THRESHOLD = {nn.Threshold: (0.1, 2.0)}
MAPS = [
    (nn.Linear(4, 3), (4,)),
    (nn.Linear(4, 3, bias=False), (5, 4)),
    (nn.Conv1d(2, 4, 3, stride=2, padding=1, groups=2), (2, 7)),
    (nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 4, 5)),
    (nn.Conv2d(2, 3, (2, 3), dilation=(1, 2), bias=False), (2, 4, 6)),
    (nn.Conv3d(1, 2, 2, padding=1, padding_mode="circular"), (1, 3, 3, 2)),
    (nn.AvgPool1d(2), (3, 5)),
    (nn.AvgPool2d(3, 2, padding=1, ceil_mode=True), (2, 6, 5)),
    (nn.AvgPool2d(3, 2, padding=1, count_include_pad=False), (2, 4, 4)),
    (nn.AvgPool3d(2), (1, 4, 4, 2)),
    (nn.AdaptiveAvgPool2d((2, 3)), (2, 5, 4)),
    (nn.MaxPool1d(2), (3, 6)),
    (nn.MaxPool2d(2), (2, 4, 6)),
    (nn.MaxPool2d(3, 2, padding=1), (2, 5, 6)),
    (nn.MaxPool2d(3, 2, ceil_mode=True), (1, 6, 6)),
    (nn.MaxPool2d((2, 3), (1, 2), dilation=(2, 1)), (2, 5, 5)),
    (nn.MaxPool3d(2, 1), (1, 3, 3, 2)),
    # Without channels torch takes the batch for them.
    (nn.MaxPool1d(2), (6,)),
    (nn.MaxPool2d(3, 1, 1), (4, 4)),
    (nn.MaxPool3d(2, 1), (3, 3, 2)),
    (nn.AvgPool1d(2), (6,)),
    (nn.AvgPool2d(3, 1, 1), (4, 4)),
    (nn.AvgPool3d(2), (4, 2, 2)),
    (nn.AdaptiveAvgPool1d(2), (5,)),
    (nn.AdaptiveAvgPool2d((2, 3)), (5, 4)),
    (nn.Flatten(), (2, 3)),
    (nn.Unflatten(1, (2, 3)), (6,)),
    (nn.Identity(), (4,)),
    *((kind(*THRESHOLD.get(kind, ())), (5,)) for kind in ELEMENTWISE),
    (nn.ReLU(inplace=True), (3, 2)),
    (nn.GELU(approximate="tanh"), (4,)),
]


def positive(width: int, seed: int = 3) -> Tensor:
    root = draw(width, width + 1, seed=seed)
    return root @ root.T


@pytest.mark.parametrize(("module", "shape"), MAPS, ids=lambda value: str(value).replace(" ", ""))
@pytest.mark.parametrize("weighted", [False, True])
def test_a_step_is_the_mean_of_the_pulled_moments(module: nn.Module, shape: tuple[int, ...], weighted: bool) -> None:
    module = double(copy.deepcopy(module))
    batch, x = 4, draw(4, *shape, seed=1)
    before = x.clone()
    weights = torch.tensor([0.5, 0.2, 0.3, 0.0], dtype=torch.float64) if weighted else None
    out = run(module, x)
    assert torch.equal(x, before)
    assert torch.equal(out, module(x.clone()))
    moment = positive(out[0].numel())
    found = pull_back(module, x, moment, out.shape[1:], weights)
    wanted = torch.zeros_like(found)
    for n in range(batch):
        jacobian = jacobian_of(lambda one: module(one.clone().unsqueeze(0)).flatten(), x[n]).reshape(len(moment), -1)
        wanted += (1 / batch if weights is None else weights[n]) * jacobian.T @ moment @ jacobian
    assert relative(found, wanted) < 1e-12
    assert torch.equal(moment, positive(out[0].numel()))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize(
    ("module", "shape"),
    [(nn.Linear(3, 2), (4, 3)), (nn.Conv2d(2, 3, 2), (2, 4, 3)), (nn.Conv1d(2, 4, 2, groups=2), (2, 5))],
)
def test_sums_over_positions_are_the_adapters_grams(module: nn.Module, shape: tuple[int, ...], sharing: str) -> None:
    adapter = adapt(double(module), "layer", sharing)
    g = draw(6, *module(draw(1, *shape)).shape[1:])
    rows = g.flatten(1)
    found = position_sums(adapter, rows.T @ rows)
    wanted = torch.zeros_like(found)
    adapter.add_output_gram_(wanted, g)
    assert found.shape == (*adapter.stack, adapter.d_out, adapter.d_out)
    torch.testing.assert_close(found.triu(), wanted.triu())


@pytest.mark.parametrize(
    ("likelihood", "target"),
    [
        (kf.Categorical(), None),
        (kf.Categorical(weight=torch.tensor([1.0, 2.0, 0.5]).double()), torch.tensor([0, 1, 2, 2])),
        (kf.Categorical(ignore_index=1), torch.tensor([0, 1, 2, 2])),
        (kf.Bernoulli(), None),
        (kf.Gaussian(variance=0.5), None),
        (kf.Gaussian(), (None, torch.tensor([True, False, True, True]))),
    ],
)
def test_it_starts_from_the_summed_output_hessian(likelihood: kf.Likelihood, target: object) -> None:
    z = draw(4, 3)
    found = output_hessian(likelihood, z, target)
    columns = torch.stack(list(likelihood.root_columns(z, target)))
    torch.testing.assert_close(found, torch.einsum("kni,knj->ij", columns, columns))


def test_terms_of_several_outputs_fill_their_own_corner() -> None:
    likelihood, z = kf.Categorical(class_dim=1), draw(2, 3, 4)
    columns = torch.stack(list(likelihood.root_columns(z))).flatten(2)
    torch.testing.assert_close(output_hessian(likelihood, z), torch.einsum("kni,knj->ij", columns, columns))


# ---------------------------------------------------------------------------------------------------- what counts
class Concave(kf.likelihoods.ElementwiseLikelihood):
    """A loss that is not convex in its outputs."""

    def nll(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return labels * outputs.sin()

    def sample_labels(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.ones_like(outputs)

    def curvature(self, outputs: Tensor) -> Tensor:
        return -outputs.sin()


def test_a_negative_curvature_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Concave\.curvature.*negative"):
        output_hessian(Concave(), torch.ones(2, 3, dtype=torch.float64))


def net(activation: nn.Module | None = None) -> nn.Sequential:
    return double(nn.Sequential(nn.Linear(3, 4), activation or nn.Tanh(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)))


def kfra(model: nn.Module, likelihood: kf.Likelihood, batch: object, **options: object) -> Tensor:
    return kf.estimate(model, likelihood, batch, source="recursive", **options).to_dense()


def test_an_example_that_does_not_count_changes_nothing() -> None:
    model, x, y = net(), draw(6, 3), torch.arange(6) % 3
    likelihood = kf.Categorical(reduction="mean", ignore_index=9)
    ignored = torch.where(torch.arange(6) == 2, 9, y)
    rest = torch.arange(6) != 2
    found = kfra(model, likelihood, (x, ignored))
    assert relative(found, kfra(model, likelihood, (x[rest], y[rest]))) < 1e-12
    assert relative(found, kfra(model, likelihood, (x, y))) > 1e-3


def test_an_example_of_weight_two_counts_as_two() -> None:
    model, x = net(), draw(4, 3)
    weights = torch.tensor([1.0, 2.0, 1.0, 1.0]).double()
    found = kfra(model, kf.Gaussian(reduction="sum"), (x, (None, weights)))
    twice = torch.cat((x, x[1:2]))
    assert relative(found, kfra(model, kf.Gaussian(reduction="sum"), (twice, None))) < 1e-12


def test_a_batch_of_which_nothing_counts_is_zero() -> None:
    model, x = net(), draw(4, 3)
    with pytest.raises(ValueError, match="no term of this batch"):
        kfra(model, kf.Gaussian(reduction="mean"), (x, (None, torch.zeros(4))))


@pytest.mark.parametrize("reduction", ["sum", "mean", "batchmean"])
def test_the_denominator_is_the_losses(reduction: str) -> None:
    model, x = net(), draw(5, 3)
    found = kfra(model, kf.Gaussian(reduction=reduction), (x, None))
    per = {"sum": 1, "batchmean": 5, "mean": 15}[reduction]
    assert relative(found * per, kfra(model, kf.Gaussian(reduction="sum"), (x, None))) < 1e-12


def test_frozen_tied_and_leading_modules_are_walked_through() -> None:
    x = draw(1, 2, 3)
    tied = nn.Linear(4, 4)
    model = nn.Sequential(nn.LayerNorm(3, elementwise_affine=False), nn.Flatten(), nn.Linear(6, 4), nn.Tanh(), tied)
    model = double(model.extend([nn.Tanh(), tied, nn.Sigmoid(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)]))
    for parameter in model[8].parameters():
        parameter.requires_grad_(False)
    with pytest.warns(kf.CoverageWarning, match="tied"):
        found = kf.estimate(model, kf.Gaussian(), (x, None), source="recursive")
    with pytest.warns(kf.CoverageWarning, match="tied"):
        wanted = kf.estimate(model, kf.Gaussian(), (x, None), source="exact")
    assert set(found.blocks) == {"2", "10"}
    assert relative(found.to_dense(), wanted.to_dense()) < 1e-10


class Wrapped(nn.Module):
    def __init__(self, net: nn.Sequential, skip: bool = False) -> None:
        super().__init__()
        self.net, self.skip = net, skip

    def forward(self, x: Tensor) -> Tensor:
        z = self.net(x.flatten(1))
        return z + x if self.skip else z


class Own(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_module_around_one_sequential_is_read_and_held_to_it() -> None:
    model, x = net(), draw(6, 3)
    wrapped = Wrapped(model)
    found = kf.estimate(wrapped, kf.Categorical(), (x, None), source="recursive")
    assert list(found.blocks) == ["net.0", "net.2", "net.4"]
    assert torch.equal(found.to_dense(), kfra(model, kf.Categorical(), (x, None)))
    with pytest.raises(ValueError, match=r"the model's outputs is not what Linear 'net.4' gives.*skip connection"):
        kfra(Wrapped(model, skip=True), kf.Categorical(), (x, None))


def test_a_hook_that_changes_values_is_noticed() -> None:
    model, x = net(), draw(6, 3)
    handle = model[1].register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(ValueError, match="the input of Linear '2' is not what Linear '0', Tanh '1' gives"):
        kfra(model, kf.Categorical(), (x, None))
    handle.remove()
    kfra(model, kf.Categorical(), (x, None))


def test_an_in_place_activation_is_no_obstacle() -> None:
    model, x = net(nn.ELU()), draw(6, 3)
    wanted = kfra(model, kf.Categorical(), (x, None))
    assert relative(kfra(net(nn.ELU(inplace=True)), kf.Categorical(), (x, None)), wanted) < 1e-14


@pytest.mark.parametrize("dtype", [torch.bfloat16, None])
def test_reduced_precision_gives_float32_statistics(dtype: torch.dtype | None) -> None:
    model, x = net().float(), draw(6, 3).float()
    wanted = kfra(model, kf.Categorical(), (x, None))
    if dtype is not None:
        found = kfra(copy.deepcopy(model).to(dtype), kf.Categorical(), (x.to(dtype), None))
    else:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = kfra(model, kf.Categorical(), (x, None))
    assert found.dtype == torch.float32
    assert 0 < relative(found, wanted) < 0.1


@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        ((nn.Linear(4, 4), nn.MaxPool1d(2), nn.Tanh(), nn.Linear(2, 3)), (4,)),
        ((nn.Linear(4, 4), nn.MaxPool2d(3, 1, 1), nn.Flatten(), nn.Linear(16, 3)), (4, 4)),
        ((nn.Linear(4, 4), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(4, 3)), (4, 4)),
        ((nn.Linear(2, 4), nn.MaxPool3d(2, 1), nn.Flatten(), nn.Linear(6, 3)), (3, 2, 2)),
    ],
)
def test_poolings_of_inputs_without_channels_are_walked_through(
    layers: tuple[nn.Module, ...], shape: tuple[int, ...]
) -> None:
    model, likelihood = double(nn.Sequential(*layers)), kf.Categorical()
    examples = [(draw(1, *shape, seed=seed), None) for seed in range(3)]
    wanted = kf.estimate(model, likelihood, (torch.cat([x for x, _ in examples]), None), source="exact")
    assert relative(kfra(model, likelihood, examples), wanted.to_dense()) < 1e-12


class Squeezed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).squeeze(-1)


class Scored(kf.Likelihood):
    """No elementwise likelihood: its one output's curvature is by a root."""

    def nll(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return (outputs - labels).square() / 2

    def sample_labels(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return outputs + torch.randn(outputs.shape, generator=generator, dtype=outputs.dtype)

    def root_columns(self, outputs: Tensor, targets: object = None):
        yield torch.ones_like(outputs)


SCALARS = [Squeezed(), nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0), nn.Softplus())]


@pytest.mark.parametrize("likelihood", [kf.Bernoulli(), kf.Gaussian(), Scored()], ids=repr)
@pytest.mark.parametrize("model", SCALARS, ids=["squeezed", "flattened"])
def test_one_number_an_example_may_come_without_a_dimension(model: nn.Module, likelihood: kf.Likelihood) -> None:
    model = double(copy.deepcopy(model))
    examples = [(draw(1, 3, seed=seed), None) for seed in range(3)]
    x = torch.cat([one for one, _ in examples])
    assert model(x).shape == (3,)
    wanted = kf.estimate(model, likelihood, (x, None), source="exact").to_dense()
    assert relative(kfra(model, likelihood, examples), wanted) < 1e-12
    assert kfra(model, likelihood, (x, None)).isfinite().all()
    report = kf.verify(model, likelihood, examples[0], source="recursive")
    report.raise_if(scale=1e-9, trace=1e-9, error=1e-9)
    kf.verify(model, likelihood, (x, None), source="recursive").raise_if(scale=1e-9)


# ---------------------------------------------------------------------------------------------------- refused
class Cut(nn.Module):
    """Calls the entries of its one child by hand, and lets no derivative through one of the places between them."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.net, self.place = net(), place

    def forward(self, x: Tensor) -> Tensor:
        for index, module in enumerate(self.net):
            x = module(x.detach() if index == self.place else x)
        return x


@pytest.mark.parametrize(
    ("place", "text"),
    [(1, "the input of Linear 'net.2' is not differentiated through Linear 'net.0' alone"), (4, "'net.4'.*'net.2'")],
)
def test_a_detached_layer_is_noticed_though_its_values_are_the_chains(place: int, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        kfra(Cut(place), kf.Categorical(), (draw(6, 3), None))
    # Before the first layer nothing is lost.
    whole = Cut(0)
    assert torch.equal(
        kfra(whole, kf.Categorical(), (draw(6, 3), None)), kfra(whole.net, kf.Categorical(), (draw(6, 3), None))
    )


class Doubled(nn.Module):
    """Values are the chain's; derivatives take a second path around the middle layer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        first = self.net[0](x)
        return self.net[2](self.net[1](first) + (first - first.detach()))


def test_a_second_path_of_derivatives_is_noticed() -> None:
    with pytest.raises(ValueError, match=r"the input of Linear 'net.2' is not .* through Linear 'net.1'"):
        kfra(double(Doubled()), kf.Gaussian(), (draw(6, 3), None))


@pytest.mark.parametrize(
    ("between", "shape"),
    [((nn.Conv1d(4, 4, 1),), (3,)), ((nn.Conv2d(4, 4, 1),), (2, 3)), ((nn.Flatten(0), nn.Linear(4, 4)), ())],
)
def test_a_layer_that_mixes_the_rows_of_a_batch_is_refused(
    between: tuple[nn.Module, ...], shape: tuple[int, ...]
) -> None:
    """Frozen: where its own statistics are gathered it is refused as well, but not by the recursion."""
    model = double(nn.Sequential(nn.Linear(3, math.prod(shape[-1:])), *between))
    between[-1].requires_grad_(False)
    x = draw(4, *shape[:-1], 3)
    assert model(x).shape[0] == 4
    with pytest.raises(ValueError, match=rf"{type(between[-1]).__name__} '{len(between)}' takes \(4,.*keep the batch"):
        kfra(model, kf.Gaussian(), (x, None))


class Skip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x)


class Twice(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (nn.Sequential(nn.Linear(3, 3), Skip(), nn.Linear(3, 3)), "cannot read what Skip '1' does.*source='exact'"),
        (Skip(), "cannot read what Skip does with its submodules"),
        (Own(nn.Linear(3, 3)), "cannot read what Own does"),
        (nn.Sequential(nn.Linear(3, 3), Twice()), "no recursion for Twice '1'.*source='exact'"),
        (nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Softmax(1))), "no recursion for Softmax '1.0'"),
        (nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)), "no recursion for LayerNorm '1'"),
        (nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), "no recursion for batch norm: BatchNorm1d '1'"),
        (nn.Sequential(nn.Linear(3, 3), nn.PReLU()), "no recursion for PReLU '1'"),
        (
            nn.Sequential(nn.Conv1d(3, 3, 1), nn.MaxPool1d(1, return_indices=True)),
            "MaxPool1d '1', which returns",
        ),
        (nn.Embedding(3, 3), "no recursion for Embedding"),
    ],
)
def test_what_it_cannot_walk_is_refused_at_construction(model: nn.Module, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        kf.Estimator(model, kf.Categorical(), source="recursive")
    with pytest.raises(ValueError, match=text):
        kf.optim.KFAC(model, kf.Categorical(), lr=0.1, source="recursive")


@pytest.mark.parametrize("approximation", ["dense", "diagonal"])
def test_approximations_of_pairs_are_refused(approximation: str) -> None:
    with pytest.raises(ValueError, match=f"'{approximation}' needs paired statistics.*source='recursive'"):
        kf.estimate(net(), kf.Categorical(), (draw(4, 3), None), source="recursive", approximation=approximation)


def test_a_frozen_batch_norm_in_front_is_refused_where_it_couples_the_examples() -> None:
    model = double(nn.Sequential(nn.BatchNorm1d(3, affine=False), nn.Linear(3, 2)))
    with pytest.raises(ValueError, match=r"batch norm in train mode makes untrue: call model.eval\(\)"):
        kfra(model, kf.Gaussian(), (draw(4, 3), None))
    kfra(model.eval(), kf.Gaussian(), (draw(4, 3), None))


def test_dropout_is_refused_while_it_drops() -> None:
    model = net()
    model.insert(2, nn.Dropout(0.5))
    with pytest.raises(ValueError, match="Dropout '2' drops in train mode"):
        kfra(model, kf.Gaussian(), (draw(4, 3), None))
    assert torch.equal(
        kfra(model.eval(), kf.Gaussian(), (draw(4, 3), None)), kfra(net(), kf.Gaussian(), (draw(4, 3), None))
    )


def test_a_layer_beyond_the_limit_is_refused_with_its_size() -> None:
    model = double(nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Flatten(), nn.Linear(32, 2)))
    x = draw(2, 1, 4, 4)
    with pytest.raises(ValueError, match=r"layer '0'.*32×32 entries \(0.0 GiB\), beyond limit=31.*'exact'"):
        kf.estimate(model, kf.Gaussian(), (x, None), source=Recursive(limit=31))
    kf.estimate(model, kf.Gaussian(), (x, None), source=Recursive(limit=32))


@pytest.mark.parametrize("limit", [0, -1, 2.0, True])
def test_the_limit_is_validated(limit: object) -> None:
    with pytest.raises(ValueError, match="limit="):
        Recursive(limit)  # type: ignore[arg-type]


def test_unbound_it_says_so() -> None:
    model = net()
    estimator = kf.Estimator(model, kf.Gaussian())
    with record(estimator.adaptation.adapters) as tape:
        out = model(draw(2, 3))
    with pytest.raises(ValueError, match=r"bind it first, Recursive\(\).bind\(model\)"):
        list(Recursive().samples(tape, kf.Gaussian(), out))
    (samples,) = Recursive().bind(model).samples(tape, kf.Gaussian(), out)
    assert [sample.layer.name for sample in samples] == ["0", "2", "4"]
    assert all(sample.cotangents is None and sample.output_moment is not None for sample in samples)


def test_flattening_the_batch_is_refused() -> None:
    model = double(nn.Sequential(nn.Linear(3, 3), nn.Flatten(0), nn.Unflatten(0, (8, 3)), nn.Linear(3, 2)))
    with pytest.raises(ValueError, match=r"Flatten '1' takes \(8, 3\) to \(24,\) in a batch of 8: keep"):
        kfra(model, kf.Gaussian(), (draw(8, 3), None))


def test_nothing_is_gathered_when_a_layer_overflows() -> None:
    model = net()
    with torch.no_grad():
        model[4].weight.fill_(1e200)
    estimator = kf.Estimator(model, kf.Gaussian(), source="recursive")
    with record(estimator.adaptation.adapters) as tape:
        out = model(draw(2, 3))
    with pytest.raises(FloatingPointError, match="output moment of layer '2'"):
        estimator.update(tape, out)
    assert all(statistic.empty for statistic in estimator.statistics.values())
    assert torch.is_grad_enabled()


def test_a_chain_is_read_in_order_with_names() -> None:
    links = read_chain(nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(2, 2), nn.Tanh()), nn.Linear(2, 2)))
    assert [str(link) for link in links] == ["Linear '1.0'", "Tanh '1.1'", "Linear '2'"]
    with pytest.raises(TypeError, match="not int"):
        read_chain(3)  # type: ignore[arg-type]


def test_layers_outside_of_the_chain_are_refused() -> None:
    model, other = net(), double(nn.Sequential(nn.Linear(3, 3)))
    estimator = kf.Estimator(Wrapped(model), kf.Gaussian())
    with record(estimator.adaptation.adapters) as tape:
        out = model(draw(2, 3))
    with pytest.raises(TapeError, match=r"Layers \['net.0', 'net.2', 'net.4'\] were called, but are not in the chain"):
        list(Recursive().bind(other).samples(tape, kf.Gaussian(), out))


# ---------------------------------------------------------------------------------------------------- consumers
def test_the_optimiser_gathers_it_in_the_models_own_forward() -> None:
    model, x, y = net(), draw(16, 3), torch.arange(16) % 3
    wanted = kf.estimate(model, kf.Categorical(), (x, y), source="recursive")
    optimizer = kf.optim.KFAC(model, kf.Categorical(), lr=0.1, source="recursive", stats_every=1, invert_every=1)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        if not losses:
            factors = optimizer.curvature()
            assert relative(factors.to_dense(), wanted.to_dense()) < 1e-12
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("batch", [1, 4])
def test_verify_checks_the_recursion_on_one_example_and_the_rest_on_more(batch: int) -> None:
    model = double(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3)))
    report = kf.verify(model, kf.Categorical(), (draw(batch, 1, 6, 6), None), source="recursive")
    report.raise_if(scale=1e-8)
    for row in report.rows:
        assert row.input_factor == pytest.approx(1, abs=1e-9)
        assert row.error_sampling == 0
        if batch == 1:
            assert row.output_factor == pytest.approx(1, abs=1e-9)
        else:
            assert row.output_factor is None
    assert ("averages over the examples" in str(report)) == (batch > 1)


def test_saved_and_loaded_it_is_the_same(tmp_path) -> None:
    model = net()
    found = kf.estimate(model, kf.Categorical(), (draw(5, 3), None), source="recursive")
    kf.save(found, tmp_path / "kfra.safetensors")
    assert torch.equal(kf.load(tmp_path / "kfra.safetensors", model).to_dense(), found.to_dense())


def test_no_random_number_is_drawn() -> None:
    model, x = net(), draw(5, 3)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = kfra(model, kf.Categorical(), (x, None), seed=1)
    assert torch.equal(first, kfra(model, kf.Categorical(), (x, None), seed=2))
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("approximation", ["sua", "prong"])
def test_other_kronecker_products_take_the_recursion_s_output_factor(approximation: str) -> None:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)).double()
    x = torch.randn(5, 2, 3, 3, generator=generator, dtype=torch.float64)
    y = torch.zeros(5, dtype=torch.int64)
    found, kfac = (
        kf.estimate(model, kf.Categorical(), (x, y), approximation=name, source="recursive").blocks
        for name in (approximation, "kfac")
    )
    for layer, block in kfac.items():
        output = block.output
        if approximation == "prong":
            output = output.trace() / len(output) * torch.eye(len(output), dtype=output.dtype)
        torch.testing.assert_close(found[layer].output, output)
