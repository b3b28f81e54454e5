"""What the training loop, its model and other optimisers see of statistics of a part of the batch: nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.exactness_helpers import double, draw
from tests.optim.gathering_helpers import LABELS, hooks, make, same
from tests.optim.hand_kfac import network
from tests.optim.sub_batch_helpers import APART, CUT, normalised, tensors
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import kronfac as kf


@pytest.mark.parametrize("m", [APART, CUT])
def test_training_sees_neither_the_second_forward_nor_its_random_numbers(m: int) -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 3)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizer, x, seen = make(models[0], source="sampled", stats_examples=m, kl_clip=1e-3), torch.randn(8, 3), []
    for model in models:
        torch.manual_seed(1)
        z = model(x)
        F.cross_entropy(z, LABELS).backward()
        seen.append((z, torch.rand(3), [p.grad for p in model.parameters()]))
    assert torch.equal(seen[0][0], seen[1][0])
    assert torch.equal(seen[0][1], seen[1][1])
    assert all(torch.equal(a, b) for a, b in zip(seen[0][2], seen[1][2], strict=True))
    assert optimizer._gatherer.forwards == optimizer._gatherer.gathered == 1
    assert hooks(models[0]) == 2
    optimizer.step()


def test_buffers_that_the_backward_needs_are_not_touched() -> None:
    """Batch norm in eval mode saves its running statistics: another value put back in place would be refused."""
    model = normalised()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    x = draw(8, 1, 4, 4)
    optimizer = make(model, source="sampled", stats_examples=APART)
    F.cross_entropy(model(x), LABELS).backward()
    found = tensors(optimizer.curvature().blocks)
    wanted = tensors(kf.estimate(model, kf.Categorical(), (x[:APART], None), seed=0).blocks)
    same(found, wanted, 1e-10)
    optimizer.step()


def test_a_model_that_changes_its_input_is_refused() -> None:
    model = nn.Sequential(nn.ReLU(inplace=True), *network())
    optimizer = make(model, stats_examples=APART)
    with pytest.raises(kf.TapeError, match="changes its input in place"):
        model(draw(8, 3))
    assert optimizer._gatherer.gathered == 0


def test_outputs_that_are_not_batch_first_are_refused() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = double(nn.Linear(3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).transpose(0, 1)

    model, likelihood = Turned(), kf.Categorical(class_dim=-1)
    optimizer = make(model, likelihood=likelihood, stats_examples=1)
    with pytest.raises(kf.TapeError, match=r"of 1 out of 8, gave 4 rows of outputs, and the training forward 4"):
        model(draw(8, 4, 3))
    assert optimizer._gatherer.gathered == 0
    optimizer = make(Turned(), likelihood=likelihood, stats_examples=6)
    with pytest.raises(ValueError, match="first dimension, 4, is no multiple of the batch of 8"):
        optimizer._gatherer.root(draw(8, 4, 3))


def test_arguments_that_are_no_tensors() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = network()

        def forward(self, x: Any, scale: float = 1.0) -> Tensor:
            return self.layers(x["x"] if isinstance(x, dict) else x) * scale

    x = draw(8, 3)
    wanted = {}
    for scale in (1.0, 2.0):
        first = {"x": x[:APART], "scale": scale}
        wanted[scale] = tensors(kf.estimate(Nested(), kf.Categorical(), (first, None), source="exact").blocks)
    for scale in (1.0, 2.0):
        model = Nested()
        optimizer = make(model, stats_examples=APART)
        model(x, scale=scale)
        same(tensors(optimizer.curvature().blocks), wanted[scale], 1e-10)
    model = Nested()
    optimizer = make(model, stats_examples=APART)
    model({"x": x})  # the batch is that of the outputs, and they are cut
    same(tensors(optimizer.curvature().blocks), wanted[1.0], 1e-10)


def test_outputs_of_several_rows_for_each_example() -> None:
    """Examples are counted in what the model takes, not in what it returns."""

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(2, 4), nn.Linear(4, 3)
            double(self)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(x).tanh().flatten(0, 1))

    x = draw(8, 5, 2)
    options: dict[str, Any] = {"source": "sampled"}
    for m, kept in ((1, 1), (CUT, CUT), (8, 8), (20, 8)):
        model = Tokens()
        optimizer = make(model, stats_examples=m, **options)
        model(x)
        for statistic in optimizer._estimator.statistics.values():
            assert {mean.weight for mean in statistic.means().values()} == {kept * 5.0}
        if kept != CUT:  # whose labels are drawn for all
            wanted = kf.estimate(model, kf.Categorical(), (x[:kept], None), seed=0).blocks
            same(tensors(optimizer.curvature().blocks), tensors(wanted), 1e-10)


def test_layers_compiled_before_are_told_of_in_a_second_forward() -> None:
    model = double(nn.Sequential(nn.Tanh(), nn.Linear(3, 3)))
    optimizer = make(model, stats_examples=APART)
    optimizer._estimator.adaptation.adapters["1"].module = nn.Linear(3, 3)  # hooks go elsewhere
    with pytest.raises(kf.TapeError, match="No layer hook fired"):
        model(draw(8, 3))


@pytest.mark.parametrize("m", [APART, CUT])
def test_two_optimisers_with_parts_share_a_model(m: int) -> None:
    model, x = network(), draw(8, 3)
    optimizers = [make(model, stats_examples=m), make(model), make(model, stats_examples=m)]
    F.cross_entropy(model(x), LABELS).backward()
    assert [o._gatherer.gathered for o in optimizers] == [1, 1, 1]
    first = tensors(kf.estimate(model, kf.Categorical(), (x[:m], None), source="exact").blocks)
    same(tensors(optimizers[0].curvature().blocks), first, 1e-10)
    same(tensors(optimizers[2].curvature().blocks), first, 1e-10)
    whole = kf.estimate(model, kf.Categorical(), (x, None), source="exact").blocks
    same(tensors(optimizers[1].curvature().blocks), tensors(whole), 1e-10)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("m", [APART, CUT])
def test_compiled_models_are_replayed_on_the_part(m: int) -> None:
    torch._dynamo.reset()
    model, x = network(), draw(8, 3)
    compiled = torch.compile(model, backend="eager")
    optimizer = make(compiled, stats_examples=m)
    F.cross_entropy(compiled(x), LABELS).backward()
    wanted = tensors(kf.estimate(model, kf.Categorical(), (x[:m], None), source="exact").blocks)
    same(tensors(optimizer.curvature().blocks), wanted, 1e-10)


def test_a_part_saves_the_work_of_the_others() -> None:
    """Half of the multiplications are the pull's: its forward comes on top of an eighth, or it stays whole."""
    x, y = torch.randn(64, 32), torch.arange(64) % 32
    counted = {}
    for m in (0, 8, 63, None):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 32, bias=False), nn.Tanh(), nn.Linear(32, 32, bias=False))
        optimizer = make(model, source="sampled", stats_examples=m or None)
        with FlopCounterMode(display=False) as counter:
            if m == 0:
                with optimizer.paused():
                    F.cross_entropy(model(x), y)
            else:
                F.cross_entropy(model(x), y)
        counted[m] = counter.get_total_flops()
    forward = counted[0]
    alone = counted[8] - forward
    pull = forward // 2  # to the output of the first layer alone; moments are made by BLAS, of which torch sees nothing
    assert alone == (forward + pull) // 8
    assert counted[63] - forward == counted[None] - forward == pull


def test_other_optimisers_take_it() -> None:
    x = draw(8, 3)
    for name, options in {"EKFAC": {"lr": 0.1}, "TKFAC": {"lr": 0.1}, "KLDWRM": {}, "AdaptiveKFAC": {}}.items():
        model = network()
        optimizer = getattr(kf.optim, name)(model, kf.Categorical(), stats_examples=APART, **options)
        weights = []

        def closure(model: nn.Module = model, backward: bool = name != "AdaptiveKFAC") -> Tensor:
            loss = F.cross_entropy(model(x), LABELS)
            if backward:
                loss.backward()
            return loss

        for _ in range(3):
            optimizer.zero_grad()
            optimizer.step(closure)
            weights.append(optimizer._estimator.statistics["0"].means()["input"].weight)
        assert all(p.isfinite().all() for p in model.parameters())
        assert weights[0] == APART


def test_pairs_of_examples_need_the_whole_batch() -> None:
    for approximation in ("xkfac", kf.approximations.Limited(3, base=kf.approximations.XKFAC())):
        with pytest.raises(ValueError, match=r"stats_examples=3 does not fit approximation='(xkfac|limited)'"):
            make(network(), approximation=approximation, source="sampled", stats_examples=3)


def test_the_second_forward_runs_in_the_precision_of_the_first() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(8, 3)
    optimizer = make(model, source="sampled", stats_examples=APART)
    with torch.autocast("cpu", torch.bfloat16):
        z = model(x)
        wanted = kf.estimate(model, kf.Categorical(), (x[:APART], None), seed=0).blocks
    assert z.dtype == torch.bfloat16
    found = tensors(optimizer.curvature().blocks)
    same(found, tensors(wanted), 1e-7)
    exact = kf.estimate(model, kf.Categorical(), (x[:APART], None), seed=0).blocks
    assert not torch.equal(found["2"], exact["2"].to_dense())
    F.cross_entropy(z.float(), LABELS).backward()
    optimizer.step()
