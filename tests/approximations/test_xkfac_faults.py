"""XK-FAC where batch norm's channels are not the units, its layout is not the usual one, or a block is zero."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.approximations.xkfac_cases import OneByOne, inputs, perceptron
from tests.exactness_helpers import double, draw, relative
from torch import Tensor, nn

import kronfac as kf
from kronfac.blocks import Kronecker
from kronfac.coupling import Coupling, couplings
from kronfac.layers.model import adapt_model
from kronfac.tape import record


class OverPositions(nn.Module):
    """A linear layer on ``[N, L, d]`` or ``[N, L, H, d]``, and batch norm over ``L`` right behind it."""

    def __init__(self, norm: nn.Module, bias: bool) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(5, 4, bias=bias), norm, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = torch.tanh(self.norm(self.first(x)))
        return self.last(h.flatten(1, -2).mean(1))  # type: ignore[no-any-return]


def equation_75(model: OverPositions, x: Tensor, sharing: str) -> Tensor:
    """The first layer's block by sums over pairs of examples and positions, from a Jacobian of the whole batch."""
    h = model.first(x).detach()
    jacobian = torch.func.jacrev(lambda h: model.last(torch.tanh(model.norm(h)).flatten(1, -2).mean(1)))(h)
    rows, g = x.flatten(1, -2), jacobian.detach().flatten(0, 1).flatten(2, -2)  # [N, S, d_in], [N C, N, S, d_out]
    if model.first.bias is not None:
        rows = torch.cat((rows, rows.new_ones(*rows.shape[:2], 1)), 2)
    if sharing == "reduce":
        rows, g = rows.mean(1, keepdim=True), g.sum(2, keepdim=True)
    count, positions = rows.shape[:2]
    a, mean = torch.einsum("nsi,nsj->ij", rows, rows) / count, rows.mean(0)
    first = torch.einsum("cmsi,cmsj->ij", g, g) / (count * positions)
    total = g.sum(1)
    second = torch.einsum("csi,csj->ij", total, total) / (count * positions)
    return torch.kron(first, a) + torch.kron(second - first, count * mean.T @ mean - a) / (count - 1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("shape", [(4, 6, 5), (4, 4, 5), (4, 1, 5), (4, 2, 3, 5)])
def test_batch_norm_over_positions_leaves_the_sum_of_derivatives(
    shape: tuple[int, ...], sharing: str, bias: bool
) -> None:
    kind = nn.BatchNorm1d if len(shape) == 3 else nn.BatchNorm2d
    model, x = double(OverPositions(kind(shape[1], track_running_stats=False), bias)), draw(*shape) + 0.5
    assert isinstance(model, OverPositions)
    options = {"approximation": "xkfac", "source": OneByOne(), "sharing": sharing}
    curvature = kf.estimate(model, kf.Gaussian(), (x, draw(4, 3)), **options)
    assert relative(curvature.blocks["first"].to_dense(), equation_75(model, x, sharing)) < 1e-12


class AcrossExamples(nn.Module):
    """Batch norm over the examples, as ``[1, C, N]`` or ``[N, C]``."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 3)
        self.layout = layout

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.first(x)
        if self.layout == "[N, C]":
            h = self.norm(h)
        elif self.layout == "unsqueezed":
            h = self.norm(h.t()[None])[0].t()
        elif self.layout == "viewed":
            h = self.norm(h.t().view(1, 4, -1)).view(4, -1).t()
        else:
            h = F.batch_norm(h.t()[None].view(1, 4, -1), None, None, training=True)[0].t()
        return self.last(torch.tanh(h))  # type: ignore[no-any-return]


@pytest.mark.parametrize("layout", ["unsqueezed", "viewed", "functional"])
def test_batch_norm_over_examples_is_seen_in_another_layout(layout: str) -> None:
    x, blocks = inputs(6), []
    for each in ("[N, C]", layout):
        model = double(AcrossExamples(each))
        blocks.append(kf.estimate(model, kf.Categorical(), (x, None), approximation="xkfac", source=OneByOne()))
    usual, other = (curvature.blocks["first"].to_dense() for curvature in blocks)
    assert relative(other, usual) < 1e-12
    kfac = kf.estimate(double(AcrossExamples(layout)), kf.Categorical(), (x, None), source=OneByOne())
    assert relative(other, kfac.blocks["first"].to_dense()) > 0.1


class Frames(nn.Module):
    """Instance norm of frames that were moved into the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(1, 2, 2), nn.InstanceNorm2d(2), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.norm(self.first(x.flatten(0, 1).unsqueeze(1)))
        return self.last(h.square().tanh().mean((2, 3)).unflatten(0, x.shape[:2]).mean(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("count", [1, 3])
def test_instance_norm_couples_nothing_with_one_example_or_with_positions_in_the_batch(count: int) -> None:
    one = nn.Sequential(nn.Conv1d(2, 3, 2), nn.InstanceNorm1d(3, affine=True), nn.Tanh(), nn.Flatten(), nn.Linear(9, 3))
    for model, x in ((double(one), draw(count, 2, 4)), (double(Frames()), draw(count, 5, 3, 3))):
        with record(adapt_model(model).adapters) as tape:
            out = model(x)
        assert set(couplings(tape, out).values()) == {Coupling.NONE}


# ------------------------------------------------------------------------------------------------ matched traces
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_block_that_is_zero_but_for_rounding_is_not_scaled_up(dtype: torch.dtype) -> None:
    """Behind instance norm, derivatives add up to zero over the positions of each example."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.InstanceNorm2d(4), nn.Tanh(), nn.Conv2d(4, 3, 2), nn.BatchNorm2d(3))
    model = model.append(nn.Flatten()).append(nn.Linear(75, 3)).to(dtype)
    data = (torch.randn(4, 2, 8, 8, dtype=dtype), torch.zeros(4, dtype=torch.long))
    options = {"samples": 4, "seed": 0, "sharing": "reduce"}
    matched, plain = (
        kf.estimate(model, kf.Categorical(), data, approximation=name, **options).blocks
        for name in ("xkfac_trace", "xkfac")
    )
    assert 0.0 < float(matched["0"].trace()) < (100 * torch.finfo(dtype).eps) ** 2
    assert torch.equal(matched["0"].to_dense(), plain["0"].to_dense())
    assert float(matched["3"].trace()) > 1e-3
    assert relative(matched["3"].to_dense(), plain["3"].to_dense()) > 0.1


# ------------------------------------------------------------------------------------------------ messages
def test_a_batch_of_one_is_refused_where_the_graph_alone_shows_the_coupling() -> None:
    class Functional(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[1](F.batch_norm(self[0](x), None, None, training=True).flatten(1))  # type: ignore[no-any-return]

    model, x = double(Functional(nn.Conv1d(2, 3, 2), nn.Linear(9, 3))), draw(1, 2, 4)
    with pytest.raises(ValueError, match=r"two examples at least.*batch of one: it estimates a covariance.*'kfac'"):
        kf.estimate(model, kf.Categorical(), (x, None), approximation="xkfac", source="sampled")
    with pytest.raises(ValueError, match=r"batch of one: it estimates a covariance.*with or without batch norm"):
        kf.estimate(perceptron()[-1:], kf.Categorical(), (draw(1, 6), None), approximation="kkfac", source="sampled")


def test_a_coupling_that_changes_with_the_inputs_is_not_blamed_on_the_mode_alone() -> None:
    class Path(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            h: Tensor = self.first(x)
            return self.last(self.norm(h) if len(x) > 4 else h)  # type: ignore[no-any-return]

    batches = [(inputs(5), None), (inputs(4), None)]
    with pytest.raises(ValueError, match=r"Layer 'first'.*changed its mode.*Or the forward takes another path"):
        kf.estimate(double(Path()), kf.Categorical(), batches, approximation="xkfac", source="sampled")


def test_a_convolution_that_feeds_batch_norm_still_has_one_product() -> None:
    model = double(nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 3)))
    options = {"approximation": "xkfac", "source": "sampled", "sharing": "reduce"}
    curvature = kf.estimate(model, kf.Categorical(), (draw(4, 2, 3, 3), None), **options)
    assert isinstance(curvature.blocks["0"], Kronecker)
