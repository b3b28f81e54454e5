"""What block-tridiagonal K-FAC gathers, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.exactness_helpers import double, draw, relative
from torch import Tensor, nn

import kronfac as kf
from kronfac.approximations import KFACTridiagonal, get_approximation
from kronfac.blocks import Kronecker, Link, Tridiagonal
from kronfac.curvature_coupled import CoupledCurvature
from kronfac.estimator import Estimator
from kronfac.tape import record

NAME = "kfac_tridiagonal"


def net(*middle: nn.Module) -> nn.Module:
    return double(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), *middle, nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)))


def estimated(model: nn.Module, data: Any, likelihood: kf.Likelihood | None = None, **options: Any) -> Any:
    return kf.estimate(model, likelihood or kf.Categorical(), data, approximation=NAME, **{"source": "exact"} | options)


# ---------------------------------------------------------------------------------------------------- statistics
def test_the_operator_and_its_diagonal_blocks() -> None:
    model, x = net(), draw(8, 3)
    chain = estimated(model, (x, None))
    assert isinstance(chain, kf.BlockTridiagonal)
    assert repr(chain) == "BlockTridiagonal(3 layers, 6 parameters)"
    blocks = kf.estimate(model, kf.Categorical(), (x, None), approximation="kfac", source="exact").blocks
    assert list(chain.blocks) == list(blocks)
    for name, block in blocks.items():
        for key, tensor in block.tensors().items():
            torch.testing.assert_close(chain.blocks[name].tensors()[key], tensor, rtol=1e-14, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean"])
def test_batches_add_up(reduction: str) -> None:
    model, x = net(), draw(12, 3)
    likelihood = kf.Categorical(reduction=reduction)
    whole = estimated(model, (x, None), likelihood).to_dense()
    parts = estimated(model, [(part, None) for part in x.split([3, 5, 4])], likelihood).to_dense()
    assert relative(parts, whole) < 1e-10


def test_weights_of_examples_enter_all_moments_alike() -> None:
    """An example of weight two counts as if it were there twice; one that is ignored, not at all."""
    model, x = net(), draw(6, 3)
    y = torch.tensor([0, 1, 2, 1, -100, 2])
    weighted = estimated(
        model, (x, y), kf.Categorical(weight=torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64), ignore_index=-100)
    )
    kept = torch.tensor([0, 1, 1, 2, 3, 3, 5])
    repeated = estimated(model, (x[kept], y[kept]))
    assert relative(weighted.to_dense(), repeated.to_dense()) < 1e-10


def test_samples_have_the_exact_ones_as_their_mean() -> None:
    """Root mean square error of many means of draws, against what a single draw's error predicts."""
    model, x = net(), draw(6, 3)
    wanted = estimated(model, (x, None)).coupled.links
    errors = {}
    for samples in (1, 64):
        apart = []
        for seed in range(24):
            found = estimated(model, (x, None), source="sampled", samples=samples, seed=seed).coupled.links
            apart.append(sum(float((f.output - w.output).square().sum()) for f, w in zip(found, wanted, strict=True)))
        errors[samples] = (sum(apart) / len(apart)) ** 0.5
    assert 0.6 < errors[64] / (errors[1] / 8) < 1.6


def test_running_averages_forget_all_moments_alike() -> None:
    model, first, second = net(), draw(5, 3), draw(7, 3, seed=1)
    estimator = Estimator(model, kf.Categorical(), approximation=KFACTridiagonal(), source="exact")

    def gather(x: Tensor) -> None:
        with torch.enable_grad(), record(estimator.adaptation.adapters) as tape:
            out = model(x)
        estimator.update(tape, out)

    gather(first)
    estimator.decay(0.0)
    gather(second)
    alone = estimated(model, (second, None))
    assert relative(estimator.coupled_curvature().to_dense(), alone.to_dense()) < 1e-10
    assert estimator.joint is not None
    weights = {key: mean.weight for key, mean in estimator.joint.means().items()}
    assert weights["0.input"] == weights["0.input_next"] == weights["0.output_next"] == 7.0


def test_parts_of_one_summed_loss_add_up() -> None:
    """As gradient accumulation gives them: denominators of a sum are one, for all parts together."""
    model, x = net(), draw(9, 3)
    likelihood = kf.Categorical(reduction="sum")
    estimator = Estimator(model, likelihood, approximation=NAME, source="exact")
    for index, part in enumerate(x.split([4, 5])):
        with torch.enable_grad(), record(estimator.adaptation.adapters) as tape:
            out = model(part)
        estimator.update(tape, out, continues=index > 0)
    estimator.consolidate()  # one process alone: nothing changes
    wanted = estimated(model, (x, None), likelihood)
    assert relative(estimator.coupled_curvature().to_dense(), wanted.to_dense()) < 1e-10


def test_the_order_is_that_of_the_calls() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.first = nn.Linear(4, 2), nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x).tanh())

    curvature = estimated(double(Backwards()), (draw(6, 3), None))
    assert list(curvature.blocks) == ["first", "last"]
    assert curvature.parameter_names == ("last.weight", "last.bias", "first.weight", "first.bias")


def test_float32_statistics_agree_with_float64() -> None:
    model, x = net(), draw(32, 3)
    exact = estimated(model, (x, None)).factorise(1e-2).to_dense()
    single = estimated(model.float(), (x.float(), None)).factorise(1e-2)
    assert single.to_dense().dtype == torch.float32
    assert relative(single.to_dense().double(), exact) < 1e-4


def test_frozen_parameters_and_frozen_layers_around_the_chain() -> None:
    model, x = net(), draw(6, 3)
    model[0].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    curvature = estimated(model, (x, None))
    assert curvature.parameter_names == ("2.weight", "4.weight", "4.bias")
    wanted = kf.reference.ggn(model, kf.Categorical(), x)
    assert curvature.to_dense().shape == wanted.shape


# ---------------------------------------------------------------------------------------------------- refused
@pytest.mark.parametrize(
    ("module", "text"),
    [
        (nn.BatchNorm1d(4), "it does not take BatchNorm1d '2'"),
        (nn.LayerNorm(4), "it does not take LayerNorm '2'"),
        (nn.Sequential(nn.Unflatten(1, (4, 1)), nn.Conv1d(4, 4, 1), nn.Flatten()), "Conv1d '2.1'"),
        (nn.Sequential(nn.Unflatten(1, (4, 1)), nn.Conv1d(4, 4, 1, groups=2), nn.Flatten()), "Conv1d '2.1'"),
    ],
)
def test_other_layers_are_refused_by_name(module: nn.Module, text: str) -> None:
    with pytest.raises(ValueError, match=r"for chains of nn\.Linear layers; ") as caught:
        estimated(net(module).eval(), (draw(6, 3), None))
    assert text in str(caught.value)


def test_an_embedding_is_refused() -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2))
    with pytest.raises(ValueError, match="it does not take Embedding '0'"):
        estimated(model, (torch.tensor([0, 1]), None))


def test_positions_are_refused() -> None:
    model = double(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    with pytest.raises(ValueError, match=r"layer '0' was called with an input of shape \(6, 5, 3\)"):
        estimated(model, (draw(6, 5, 3), None), kf.Gaussian())


class Graph(nn.Module):
    """Three layers in some other form than a chain."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.a, self.b, self.c, self.form = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3), form

    def forward(self, x: Tensor) -> Tensor:
        match self.form:
            case "residual":
                hidden = self.a(x).tanh()
                return self.c((hidden + self.b(hidden)).tanh())
            case "branches":
                return self.c((self.a(x) + self.b(x)).tanh())
            case "skip to the outputs":
                hidden = self.b(self.a(x).tanh())
                return hidden + self.c(hidden.tanh())
            case "detached":
                return self.c(self.b(self.a(x).tanh()).detach())
            case "twice":
                return self.c(self.b(self.b(self.a(x).tanh()).tanh()))
            case _:
                return self.c(self.a(x).tanh())


@pytest.mark.parametrize(
    ("form", "error", "text"),
    [
        ("residual", ValueError, "layer 'c' takes its input from 'a' and 'b' instead of 'b'; use 'kfac'"),
        ("branches", ValueError, "layer 'b' takes its input from no other layer instead of 'a'"),
        ("skip to the outputs", ValueError, "the outputs take their values from 'b' and 'c' instead of 'c'"),
        ("detached", ValueError, "layer 'c' takes its input from no other layer instead of 'b'"),
        ("twice", kf.TapeError, "Layer 'b' is used more than once"),
        ("left out", ValueError, r"every layer to be called exactly once.*it never called \['b'\]"),
    ],
)
def test_what_is_no_chain_is_refused(form: str, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        estimated(double(Graph(form)), (draw(6, 3), None))


def test_a_refused_pull_changes_nothing() -> None:
    model = double(Graph("chain"))
    model.b.requires_grad_(False)
    estimator = Estimator(model, kf.Categorical(), approximation=NAME, source="exact")
    with torch.enable_grad(), record(estimator.adaptation.adapters) as tape:
        out = model(draw(6, 3))
    tape.calls["c"].input = tape.calls["c"].input[:3]
    with pytest.raises(ValueError, match="needs the examples one by one"):
        estimator.update(tape, out)
    assert estimator.joint is not None
    assert all(mean.weight == 0 and not mean.total.any() for mean in estimator.joint.means().values())
    with pytest.raises(RuntimeError, match="No statistics"):
        estimator.coupled_curvature()
    assert torch.is_grad_enabled()


def test_an_order_that_changes_is_refused() -> None:
    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.turned = nn.Linear(3, 3), nn.Linear(3, 3), False

        def forward(self, x: Tensor) -> Tensor:
            first, second = (self.b, self.a) if self.turned else (self.a, self.b)
            self.turned = True
            return second(first(x).tanh())

    with pytest.raises(ValueError, match=r"in the order \['b', 'a'\], before in the order \['a', 'b'\]"):
        estimated(double(Either()), [(draw(6, 3), None)] * 2)


def test_sources_damping_rules_and_consumers_that_do_not_fit(tmp_path: Path) -> None:
    model, data = net(), (draw(6, 3), None)
    with pytest.raises(ValueError, match=f"'{NAME}' needs the cotangents of all layers together.*'forward_only'"):
        estimated(model, data, source="forward_only")
    curvature = estimated(model, data)
    with pytest.raises(TypeError, match=r"rule='factored'.*not Uniform on layer '0'"):
        curvature.factorise(1e-2, rule="exact")
    dead = estimated(model, (data[0] * torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64), None))
    with pytest.raises(torch.linalg.LinAlgError, match=r"damping 0: the input side of .* covariance of layer '0'"):
        dead.factorise(0.0)
    with pytest.raises(
        TypeError, match="only block-diagonal curvature, or KK-FAC's, can be saved, got BlockTridiagonal"
    ):
        kf.save(curvature, tmp_path / "curvature.safetensors")
    with pytest.raises(ValueError, match=r"KFAC takes layers one by one.*'kfac_tridiagonal' couples them"):
        kf.optim.KFAC(model, kf.Categorical(), lr=0.1, approximation=NAME)
    with pytest.raises(ValueError, match="verify takes layers one by one"):
        kf.verify(model, kf.Categorical(), data, approximation=NAME)
    with pytest.raises(ValueError, match="coverage takes layers one by one"):
        kf.coverage(model, approximation=NAME)
    estimator = Estimator(model, kf.Categorical(), approximation=NAME)
    with pytest.raises(TypeError, match=r"couples layers; call coupled_curvature\(\)"):
        estimator.curvature()
    with pytest.raises(TypeError, match=r"couples no layers; call curvature\(\)"):
        Estimator(model, kf.Categorical()).coupled_curvature()
    with pytest.raises(ValueError, match="couples layers and has no statistics of layer '0' alone"):
        get_approximation(NAME).start(estimator.adaptation.adapters["0"])


def test_vectors_that_do_not_fit() -> None:
    curvature = estimated(net(), (draw(6, 3), None))
    with pytest.raises(ValueError, match="it lacks"):
        curvature.matmul({})
    with pytest.raises(ValueError, match="there is no curvature for 'x'"):
        curvature.factorise(0.1).apply(
            {name: torch.zeros(s) for name, s in curvature.parameter_shapes.items()} | {"x": torch.zeros(1)}
        )


def test_links_that_do_not_fit() -> None:
    eye = torch.eye(2)
    block = Kronecker(eye, eye)
    with pytest.raises(ValueError, match="a chain of 2 blocks needs 1 links, got 0"):
        Tridiagonal({"a": block, "b": block}, [])
    with pytest.raises(ValueError, match=r"above layer 'a' has factors of shapes \(2, 2\) and \(3, 3\)"):
        Tridiagonal({"a": block, "b": block}, [Link(torch.eye(3), eye)])
    stacked = Kronecker(eye.expand(3, 2, 2), eye.expand(3, 2, 2))
    with pytest.raises(ValueError, match=r"no stack, unlike \['a'\]"):
        Tridiagonal({"a": stacked}, [])


def test_a_scaled_curvature() -> None:
    curvature = estimated(net(), (draw(6, 3), None))
    scaled = curvature.scale(2.5)
    assert isinstance(scaled, CoupledCurvature)
    assert relative(scaled.to_dense(), 2.5 * curvature.to_dense()) < 1e-14
