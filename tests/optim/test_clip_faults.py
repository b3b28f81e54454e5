"""The clip where a quarter of the batch is none, nothing moves, inputs change or have 16 bits; odd gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.exactness_helpers import double, draw
from tests.optim.hand_kfac import network
from tests.optim.loops import batch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import kronfac as kf
from kronfac.optim import clipping
from kronfac.optim.last_batch import last_batch


class Pooled(nn.Module):
    """Sums over positions, which are the second dimension or the first; what else it takes multiplies."""

    def __init__(self, positions: int = 1, *, scaled: bool = False) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(3, 4), nn.Linear(4, 3)
        self.positions, self.scaled = positions, scaled
        double(self)

    def forward(self, x: Tensor, *others: Any, **more: Any) -> Tensor:
        hidden = self.inner(x).tanh()
        for other in (*others, *more.values()):
            found = other["scale"][0] if isinstance(other, dict) else other
            hidden = hidden * found.sum() if self.scaled else hidden + found
        return self.head(hidden if x.ndim == 2 else hidden.sum(self.positions))


def measured(
    model: nn.Module, *arguments: Any, y: Tensor | None = None, lr: float = 0.1, kl_clip: float = 1e-3, **keywords: Any
) -> tuple[kf.optim.KFAC, float]:
    """Take a clipped step, and return vᵀFv of the whole batch for it."""
    optimizer = kf.optim.KFAC(model, kf.Categorical(), lr=lr, momentum=0.0, kl_clip=kl_clip)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    z = model(*arguments, **keywords)
    F.cross_entropy(z, torch.arange(len(z)) % 3 if y is None else y).backward()
    optimizer.step()
    step = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    model.load_state_dict(before)
    operator = kf.GaussNewtonOperator(model, kf.Categorical(), [((arguments, keywords), None)])
    return optimizer, float(operator.quadratic_form(step))


def parts(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """How many examples each product was formed on, None for all."""
    seen: list[int | None] = []

    def watched(*args: Any, **kwargs: Any) -> Any:
        found = last_batch(*args, **kwargs)
        seen.append(found.examples)
        return found

    monkeypatch.setattr(clipping, "last_batch", watched)
    return seen


# ---------------------------------------------------------------- where the examples are
@pytest.mark.parametrize("length", [8, 16, 64], ids=["other", "as many", "four times as many"])
def test_time_first_takes_the_whole_batch(length: int) -> None:
    """Of 16 sequences of equal length; a quarter of 64 positions is as many as there are outputs."""
    _, exact = measured(Pooled(0), draw(length, 16, 3))
    assert exact == pytest.approx(1e-3, rel=1e-9)


def test_batch_first_takes_a_quarter(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = parts(monkeypatch)
    measured(Pooled(1), draw(16, 8, 3))
    measured(Pooled(1), draw(16, 8, 3), bias=draw(4))
    assert seen == [4, 4]


ARGUMENTS: dict[str, tuple[bool, Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]]] = {
    "table as long as the batch": (True, lambda: ((draw(8, 3), torch.ones(8, dtype=torch.float64)), {})),
    "by keyword": (True, lambda: ((draw(8, 3),), {"scale": torch.ones(8, dtype=torch.float64)})),
    "nested": (True, lambda: ((draw(8, 3), {"scale": [torch.ones(8, dtype=torch.float64)]}), {})),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_an_argument_that_happens_to_be_as_long_is_not_cut(case: str) -> None:
    scaled, make = ARGUMENTS[case]
    arguments, keywords = make()
    _, exact = measured(Pooled(scaled=scaled), *arguments, **keywords)
    assert exact == pytest.approx(1e-3, rel=1e-9)


class Mixing(nn.Module):
    """Mixes hidden units by a matrix, which comes first."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(3, 8), nn.Linear(8, 3)
        double(self)

    def forward(self, mixing: Tensor, x: Tensor) -> Tensor:
        return self.head(self.inner(x) @ mixing)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("count", "part"), [(8, None), (9, 3)])
def test_a_first_argument_that_is_not_the_batch(count: int, part: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = parts(monkeypatch)
    _, exact = measured(Mixing(), torch.eye(8, dtype=torch.float64), draw(count, 3))
    assert seen == [part]
    if part is None:
        assert exact == pytest.approx(1e-3, rel=1e-9)


class Contrast(nn.Module):
    """Compares each example with all others."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = double(nn.Linear(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inner(x)
        return hidden - hidden.square().mean(0)  # type: ignore[no-any-return]


def test_examples_that_are_compared_take_the_whole_batch() -> None:
    _, exact = measured(Contrast(), draw(16, 3))
    assert exact == pytest.approx(1e-3, rel=1e-9)


class Late(nn.Module):
    """Begins to return other outputs once it was tried."""

    def __init__(self, *, fails: bool) -> None:
        super().__init__()
        self.inner, self.fails, self.changed = double(nn.Linear(3, 3)), fails, False

    def forward(self, x: Tensor) -> Tensor:
        if self.changed and self.fails and len(x) < 16:
            raise RuntimeError("shapes do not fit")
        return self.inner(x)[:1].expand(16, 3) if self.changed else self.inner(x)


@pytest.mark.parametrize("fails", [False, True])
def test_a_product_that_turns_out_to_be_of_no_part_is_formed_on_the_whole(
    fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = Late(fails=fails), parts(monkeypatch)
    optimizer = kf.optim.KFAC(model, kf.Categorical(), lr=0.1, source="exact")
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(draw(16, 3)), torch.arange(16) % 3).backward()
        optimizer.step()
        model.changed = True
    assert seen == [4, 4, None]


def test_the_trial_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in modes, nor in buffers, nor in random numbers; and it is made once for batches of all sizes."""
    model = double(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3)))
    model[1].eval()
    optimizer = kf.optim.KFAC(model, kf.Categorical(), lr=0.1)
    calls, seen = [], parts(monkeypatch)
    model[0].register_forward_hook(lambda module, args, out: calls.append((len(out), module.training)))
    for size in (16, 24):
        F.cross_entropy(model(draw(size, 3)), torch.arange(size) % 3).backward()
        calls.clear()
        state, buffers = torch.get_rng_state(), [b.clone() for b in model.buffers()]
        optimizer.step()
        assert torch.equal(torch.get_rng_state(), state)
        assert all(map(torch.equal, model.buffers(), buffers))
        assert [m.training for m in model] == [True, False, True, True]
        assert calls == [*([(16, False), (4, False)] if size == 16 else []), (size // 4, True)]
    assert seen == [4, 6]


def test_outputs_that_say_nothing_are_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that starts at zero has the same outputs whatever was cut."""
    model, seen = Pooled(scaled=True), parts(monkeypatch)
    nn.init.zeros_(model.head.weight)
    optimizer = kf.optim.KFAC(model, kf.Categorical(), lr=0.1, source="exact")
    scale = torch.ones(8, dtype=torch.float64)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(draw(8, 3), scale), torch.arange(8) % 3).backward()
        optimizer.step()
    assert seen == [None, None]


# ---------------------------------------------------------------- small batches with batch norm
@pytest.mark.parametrize("count", [2, 3, 4, 8])
def test_batch_norm_has_enough_examples(count: int) -> None:
    """Two would leave no derivative; below 32 it is the whole batch."""
    model = double(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)))
    optimizer = kf.optim.KFAC(model, kf.Categorical(), lr=0.1, momentum=0.0, kl_clip=1e-6)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    x = draw(count, 3)
    F.cross_entropy(model(x), torch.arange(count) % 3).backward()
    optimizer.step()
    step = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(before[name])
    exact = kf.GaussNewtonOperator(model, kf.Categorical(), (x, None)).quadratic_form(step)
    assert float(exact) == pytest.approx(1e-6, rel=1e-6)


@pytest.mark.parametrize(("count", "part"), [(2, None), (4, 2), (5, 2), (9, 3)])
def test_a_part_has_two_examples_at_least(count: int, part: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = parts(monkeypatch)
    measured(network(), draw(count, 3))
    assert seen == [part]


# ---------------------------------------------------------------- steps that move nothing
def test_a_rate_of_zero_does_not_hide_the_ratio() -> None:
    ratios = []
    for first in (0.0, 1e-3):
        model = network()
        optimizer = kf.optim.KFAC(model, kf.Categorical(), lr=first, momentum=0.0, source="exact", damping=1e-5)
        x, y = batch(0, 16)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        assert (optimizer._clip.last > 0.0) == (first > 0.0)
        ratios.append(optimizer._clip.ratio)
    assert ratios[0] == pytest.approx(ratios[1], rel=1e-9)
    assert ratios[0] != pytest.approx(1.0, rel=1e-3)


def test_a_gradient_of_zero_leaves_the_last_ratio() -> None:
    model = network()
    optimizer = kf.optim.KFAC(model, kf.Categorical(), lr=0.1, momentum=0.0, source="exact")
    ratios = []
    for factor in (0.0, 1.0, 0.0):
        x, y = batch(0, 16)
        optimizer.zero_grad()
        (factor * F.cross_entropy(model(x), y)).backward()
        optimizer.step()
        ratios.append(optimizer._clip.ratio)
    assert ratios[0] is None
    assert ratios[1] == ratios[2] != 1.0


# ---------------------------------------------------------------- inputs
@pytest.mark.parametrize("nested", [False, True])
def test_inputs_that_were_changed_before_the_step_are_refused(nested: bool) -> None:
    model = Pooled(scaled=True)
    optimizer = kf.optim.KFAC(model, kf.Categorical(), lr=0.1)
    x, scale = draw(16, 3), torch.ones(2, dtype=torch.float64)
    F.cross_entropy(model(x, {"scale": [scale]}), torch.arange(16) % 3).backward()
    before = [p.detach().clone() for p in model.parameters()]
    (scale if nested else x).zero_()
    with pytest.raises(RuntimeError, match=r"changed in place.*leave it alone until after optimizer\.step"):
        optimizer.step()
    assert all(map(torch.equal, model.parameters(), before))


def test_a_buffer_may_be_filled_again_after_the_step() -> None:
    model = network()
    optimizer = kf.optim.KFAC(model, kf.Categorical(), lr=0.1, stats_every=2, burn_in=0)
    x = torch.empty(16, 3, dtype=torch.float64)
    for step in range(4):
        found, y = batch(step, 16)
        x.copy_(found)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    with optimizer.capture() as capture:
        x.zero_()
        capture(model(x))
    optimizer.step()


@pytest.mark.parametrize("make", [kf.optim.KFAC, kf.optim.EKFAC, kf.optim.KLDWRM])
def test_inputs_of_16_bits_under_autocast(make: Callable[..., kf.optim.KFAC]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    optimizer = make(model, kf.Categorical(), 1.0, momentum=0.0, kl_clip=1e-4)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    x = draw(8, 3).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = F.cross_entropy(model(x), torch.arange(8) % 3)
    loss.backward()
    optimizer.step()
    step = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    model.load_state_dict(before)
    exact = kf.GaussNewtonOperator(model, kf.Categorical(), (x[:2].float(), None)).quadratic_form(step)
    assert float(exact) == pytest.approx(1e-4, rel=1e-2)


# ---------------------------------------------------------------- groups
@pytest.mark.parametrize("other", [None, "auto", 0.5])
def test_groups_must_agree_on_the_bound(other: float | str | None) -> None:
    model = network()
    groups = [{"params": model[0].parameters(), "kl_clip": other}, {"params": model[2].parameters()}]
    optimizer = kf.optim.KFAC(model, kf.Categorical(), lr=0.1, kl_clip=1e-3, param_groups=groups)
    before = [p.detach().clone() for p in model.parameters()]
    x, y = batch(0)
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(ValueError, match="kl_clip bounds the step of all parameters together"):
        optimizer.step()
    assert all(map(torch.equal, model.parameters(), before))


# ---------------------------------------------------------------- sparse gradients
class Sparse(nn.Module):
    def __init__(self, *, sparse: bool) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(6, 4, sparse=sparse), nn.Linear(4, 3)
        double(self)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layer(self.table(tokens))  # type: ignore[no-any-return]


TOKENS = torch.tensor([0, 1, 1, 2, 3, 3, 3, 5])


@pytest.mark.filterwarnings("ignore::kronfac.CoverageWarning")
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("kl_clip", [None, 1e-3])
def test_a_sparse_gradient_takes_the_plain_step(kl_clip: float | None, decay: float, momentum: float) -> None:
    """As the same gradient written out does, of a layer that has no block either."""
    runs = []
    for dense in (False, True):
        model = Sparse(sparse=True)
        optimizer = kf.optim.KFAC(
            model,
            kf.Categorical(),
            lr=0.1,
            momentum=momentum,
            weight_decay=decay,
            kl_clip=kl_clip,
            burn_in=0,
            stats_every=2,
        )
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(TOKENS), TOKENS % 3).backward()
            assert model.table.weight.grad.is_sparse
            if dense:
                model.table.weight.grad = model.table.weight.grad.to_dense()
            optimizer.step()
        runs.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-9, atol=1e-12)
    assert not torch.equal(runs[0][0], Sparse(sparse=True).table.weight)


@pytest.mark.filterwarnings("ignore::kronfac.CoverageWarning")
def test_a_sparse_gradient_goes_to_the_fallback() -> None:
    model = Sparse(sparse=True)
    optimizer = kf.optim.KFAC(model, kf.Categorical(), lr=0.1, fallback=lambda ps: torch.optim.SparseAdam(ps, lr=0.1))
    before = model.table.weight.detach().clone()
    F.cross_entropy(model(TOKENS), TOKENS % 3).backward()
    optimizer.step()
    assert torch.equal((model.table.weight - before).abs().sum(1) > 0, torch.bincount(TOKENS, minlength=6) > 0)


@pytest.mark.filterwarnings("ignore::kronfac.CoverageWarning")
def test_a_sparse_gradient_that_is_not_finite_is_named() -> None:
    model = Sparse(sparse=True)
    optimizer = kf.optim.KFAC(model, kf.Categorical(), lr=0.1)
    F.cross_entropy(model(TOKENS), TOKENS % 3).backward()
    model.table.weight.grad._values()[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"gradient of table\.weight"):
        optimizer.step()


# ---------------------------------------------------------------- rows
class Wide(nn.Module):
    def __init__(self, *, repeats: bool) -> None:
        super().__init__()
        self.inner, self.head, self.repeats = nn.Sequential(nn.Linear(70, 80), nn.Tanh()), nn.Linear(80, 3), repeats
        double(self, scale=0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.inner, x, use_reentrant=False) if self.repeats else self.inner(x))


def wide_run(change: Callable[[Wide], object] | None = None, repeats: bool = False, **options: Any) -> list[Tensor]:
    model = Wide(repeats=repeats)
    optimizer = kf.optim.KFAC(
        model, kf.Categorical(), lr=0.1, damping=0.1, kl_clip=None, source="exact", stats_every=2, burn_in=1, **options
    )
    for step in range(4):
        if step == 2 and change is not None:
            change(model)
        optimizer.zero_grad()
        F.cross_entropy(model(draw(12, 70, seed=step)), torch.arange(12) % 3).backward()
        if options.get("gradients") == "rows":
            assert model.inner[0].weight.grad is None
        optimizer.step()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("options", [{"stats_forward": "own"}, {"stats_forward": "shared"}, {"stats_examples": 4}])
def test_rows_of_layers_that_are_checkpointed(options: dict[str, Any]) -> None:
    found = wide_run(repeats=True, gradients="rows", **options)
    torch.testing.assert_close(found, wide_run(**options), rtol=1e-8, atol=1e-10)


def test_rows_with_a_weight_that_was_frozen_later() -> None:
    def freeze(model: Wide) -> None:
        model.inner[0].weight.requires_grad_(False)

    torch.testing.assert_close(wide_run(freeze, gradients="rows"), wide_run(freeze), rtol=1e-8, atol=1e-10)


def test_rows_with_a_bias_that_was_frozen_later() -> None:
    """What is done to the weight's gradient would show nowhere: it is formed."""
    results = []
    for gradients in ("rows", "dense"):
        model = Wide(repeats=False)
        optimizer = kf.optim.KFAC(
            model, kf.Categorical(), lr=0.1, damping=0.1, kl_clip=None, source="exact", gradients=gradients
        )
        for step in range(3):
            model.inner[0].bias.requires_grad_(step == 0)
            optimizer.zero_grad()
            F.cross_entropy(model(draw(12, 70, seed=step)), torch.arange(12) % 3).backward()
            assert (model.inner[0].weight.grad is None) == (gradients == "rows" and step == 0)
            optimizer.step()
        results.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(results[0], results[1], rtol=1e-8, atol=1e-10)


def test_rows_of_a_layer_in_no_group_are_refused_for_that() -> None:
    model = Wide(repeats=False)
    optimizer = kf.optim.KFAC(
        model,
        kf.Categorical(),
        lr=0.1,
        kl_clip=None,
        gradients="rows",
        param_groups=[{"params": model.head.parameters()}],
    )
    F.cross_entropy(model(draw(12, 70)), torch.arange(12) % 3).backward()
    with pytest.raises(RuntimeError, match=r"layer 'inner\.0' is kept as rows.*in no parameter group"):
        optimizer.step()
