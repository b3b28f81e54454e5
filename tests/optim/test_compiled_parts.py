"""Statistics of models of which `torch.compile` made a part, or in which it meets the optimiser's hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tests.exactness_helpers import double, draw
from tests.optim.gathering_helpers import LABELS, make
from tests.optim.hand_kfac import network
from torch import Tensor, nn
from torch.nn import functional as F

import kronfac as kf

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning", "ignore::ResourceWarning"
)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x.tanh()).tanh()
        return out


def blocks() -> nn.Sequential:
    return double(nn.Sequential(nn.Linear(3, 4), Block(nn.Linear(4, 5)), nn.Linear(5, 3)))  # type: ignore[return-value]


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def train(call: Callable[[Tensor], Tensor], optimizer: kf.optim.KFAC, steps: int = 3) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(call(draw(8, 3, seed=step)), LABELS).backward()
        optimizer.step()


def as_the_eager_one(model: nn.Module, twin: nn.Module) -> None:
    train(twin, make(twin))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("how", ["in place", "in place, run before", "in place, afterwards", "wrapped, run before"])
def test_a_compiled_block_stays_one_graph_and_is_heard(how: str) -> None:
    model, x = blocks(), draw(8, 3)
    if how.startswith("wrapped"):
        model[1] = torch.compile(model[1], backend="eager", fullgraph=True)
    elif "afterwards" not in how:
        model[1].compile(backend="eager", fullgraph=True)
    if "run before" in how:
        model(x)
    optimizer = make(model)
    if "afterwards" in how:
        model[1].compile(backend="eager", fullgraph=True)
    train(model, optimizer)
    assert graphs() == 1
    as_the_eager_one(model, blocks())


@pytest.mark.parametrize("how", ["in place", "afterwards", "function"])
def test_hooks_in_a_compiled_region_end_a_graph_and_are_not_compiled(how: str) -> None:
    model = network()
    if how == "in place":
        model.compile(backend="eager")
    optimizer = make(model)
    call: Any = model
    if how != "in place":
        inner = model if how == "afterwards" else lambda x: model(x)
        call = torch.compile(inner, backend="eager")  # type: ignore[call-overload]
    train(call, optimizer)
    assert graphs() == 1
    as_the_eager_one(model, network())


def test_a_compiled_training_step_ends_a_graph_at_the_optimisers() -> None:
    model = network()
    optimizer = make(model)

    def step(x: Tensor) -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), LABELS).backward()
        optimizer.step()

    compiled = torch.compile(step, backend="eager")
    for index in range(3):
        compiled(draw(8, 3, seed=index))
    assert graphs() <= 3
    as_the_eager_one(model, network())


def test_one_graph_of_everything_is_refused_in_training_and_goes_in_eval_mode() -> None:
    model, x = network(), draw(8, 3)
    optimizer = make(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"give the optimiser what torch\.compile"):
        compiled(x)
    torch._dynamo.reset()
    model.eval()
    assert torch.equal(compiled(x), model(x))
    assert graphs() == 1
    assert optimizer._gatherer.gathered == 0


@pytest.mark.parametrize("compiles", ["the model", "a block"])
def test_outputs_of_compiled_models_are_captured(compiles: str) -> None:
    model, twin = blocks(), blocks()
    call: Any = model
    if compiles == "the model":
        call = torch.compile(model, backend="eager")
    else:
        model[1].compile(backend="eager")
    call(draw(8, 3))
    for module, optimizer in ((call, make(call, source="empirical")), (twin, make(twin, source="empirical"))):
        with optimizer.capture() as capture:
            outputs = module(draw(8, 3))
            capture(outputs, LABELS)
        F.cross_entropy(outputs, LABELS).backward()
        optimizer.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_estimates_and_products_run_compiled_blocks_as_they_are_written() -> None:
    model, twin, batch = blocks(), blocks(), (draw(8, 3), LABELS)
    model[1].compile(backend="eager", fullgraph=True)
    model(batch[0])
    found, wanted = (kf.estimate(m, kf.Categorical(), batch, source="exact") for m in (model, twin))
    torch.testing.assert_close(found.to_dense(), wanted.to_dense(), rtol=1e-12, atol=1e-12)
    vector = {name: torch.ones_like(p) for name, p in twin.named_parameters()}
    forms = [kf.GaussNewtonOperator(m, kf.Categorical(), batch).quadratic_form(vector) for m in (model, twin)]
    torch.testing.assert_close(*forms, rtol=1e-12, atol=1e-12)
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_what_writes_a_model_down_gathers_nothing() -> None:
    model, x = network(), draw(8, 3)
    optimizer = make(model)
    traced = torch.jit.trace(model, x)
    exported = torch.export.export(model, (x,)).module()
    assert optimizer._gatherer.gathered == 0
    for written in (traced, exported):
        torch.testing.assert_close(written(x), model(x))


def test_a_layer_whose_weight_is_used_without_its_call_is_refused_after_others_were_heard() -> None:
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last, self.calls = nn.Linear(3, 4), nn.Linear(4, 3), True
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x) if self.calls else F.linear(x, self.first.weight, self.first.bias)
            out: Tensor = self.last(hidden.tanh())
            return out

    model = Changing()
    optimizer = make(model)
    train(model, optimizer, steps=1)
    model.calls = False
    with pytest.raises(kf.TapeError, match=r"parameters of layers \['first'\] in another way"):
        model(draw(8, 3))
