"""What the tape reads, and what it refuses instead of being silently wrong."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from tests.exactness_helpers import double, draw
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import kronfac as kf
from kronfac.layers import adapt, adapt_model
from kronfac.measuring import couples_examples, frozen_buffers
from kronfac.tape import Tape, TapeError, record


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


def outputs_of(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Outputs of the layers, by hooks of our own; nothing may change them in place."""
    seen: dict[str, Tensor] = {}
    handles = [
        layer.register_forward_hook(lambda m, args, out, name=name: seen.setdefault(name, out))
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
    ]
    model(x)
    for handle in handles:
        handle.remove()
    return seen


def network(activation: nn.Module) -> nn.Module:
    return double(nn.Sequential(nn.Linear(3, 4), activation, nn.Linear(4, 4), activation, nn.Linear(4, 2)))


def test_inputs_and_cotangents_of_every_layer() -> None:
    model, x, v = network(nn.Tanh()), draw(5, 3), draw(5, 2, seed=1)
    with record(adapt_model(model).adapters) as tape:
        out = model(x)
    pulled = tape.pull(out, v)
    assert list(tape.calls) == list(pulled) == ["0", "2", "4"]
    seen = outputs_of(model, x)
    final = seen["4"]
    wanted = torch.autograd.grad(final, list(seen.values()), v)
    for (name, cotangent), gradient in zip(pulled.items(), wanted, strict=True):
        torch.testing.assert_close(cotangent, gradient)
        assert not cotangent.requires_grad
        assert tape.calls[name].output_shape == gradient.shape
    assert torch.equal(tape.calls["0"].input, x)
    torch.testing.assert_close(tape.calls["2"].input, seen["0"].tanh().detach())
    assert not tape.calls["2"].input.requires_grad


def test_pulls_are_linear_and_repeatable_and_leave_the_loss_its_graph() -> None:
    model, x, v, w = network(nn.Tanh()), draw(5, 3), draw(5, 2, seed=1), draw(5, 2, seed=2)
    with record(adapt_model(model).adapters) as tape:
        out = model(x)
    first, second, both = tape.pull(out, v), tape.pull(out, w), tape.pull(out, v + w)
    for name in both:
        torch.testing.assert_close(both[name], first[name] + second[name])
    assert all(p.grad is None for p in model.parameters())
    out.square().sum().backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x).square().sum().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), found, strict=True))


def test_gradients_are_untouched() -> None:
    model = network(nn.Tanh())
    for i, p in enumerate(model.parameters()):
        p.grad = draw(*p.shape, seed=i)
    before = [p.grad for p in model.parameters()]
    copies = [g.clone() for g in before]
    kf.estimate(model, kf.Gaussian(), (draw(4, 3), draw(4, 2)), source="exact")
    assert all(p.grad is g for p, g in zip(model.parameters(), before, strict=True))
    assert all(torch.equal(g, copy) for g, copy in zip(before, copies, strict=True))


class Turned(nn.Linear):
    """A linear layer whose output is a view with other strides."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).T.contiguous().T


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: nn.Linear(4, 5), (6, 2, 4)),  # a view of the product of all rows
        (lambda: nn.Linear(4, 5), (6, 3, 2, 4)),
        (lambda: nn.Linear(4, 5, bias=False), (6, 2, 4)),
        (lambda: nn.InstanceNorm1d(4, affine=True), (6, 4, 5)),  # a view of one example's batch norm
        (lambda: nn.InstanceNorm2d(4, affine=True), (6, 4, 5, 2)),
        (lambda: nn.Conv1d(4, 5, 3), (6, 4, 7)),
        (lambda: nn.GroupNorm(2, 4), (6, 4, 5)),
        (lambda: nn.LayerNorm(5), (6, 4, 5)),
        (lambda: nn.Embedding(7, 5), (6, 3)),
    ],
)
@pytest.mark.parametrize("source", ["exact", "sampled"])
def test_outputs_that_are_views_may_be_changed_in_place(
    layer: Callable[[], nn.Module], shape: tuple[int, ...], source: str
) -> None:
    first = layer()
    x = torch.randint(7, shape) if isinstance(first, nn.Embedding) else draw(*shape)
    found = []
    for inplace in (False, True):
        body = nn.Sequential(first, nn.ReLU(inplace=inplace), nn.Flatten())
        model = double(nn.Sequential(body, nn.Linear(body.to(torch.float64)(x).shape[1], 3)))
        blocks = kf.estimate(model, kf.Gaussian(), (x, draw(6, 3)), source=source).blocks
        found.append({name: block.to_dense() for name, block in blocks.items()})
        assert float(blocks["0.0"].trace()) > 0
    for name, block in found[0].items():
        assert torch.equal(block, found[1][name])


def test_a_view_of_another_order_that_is_changed_in_place_is_refused() -> None:
    for inplace in (False, True):
        model = double(nn.Sequential(Turned(4, 5), nn.ReLU(inplace=inplace), nn.Linear(5, 3)))
        batch = (draw(6, 4), draw(6, 3))
        if inplace:
            with pytest.raises(TapeError, match=r"output of layer '0', a view.*inplace=False"):
                kf.estimate(model, kf.Gaussian(), batch)
        else:
            assert float(kf.estimate(model, kf.Gaussian(), batch).blocks["0"].trace()) > 0


@pytest.mark.parametrize(("inplace", "plain"), [(nn.ReLU(inplace=True), nn.ReLU()), (nn.ELU(inplace=True), nn.ELU())])
def test_activations_in_place_after_a_layer_are_fine(inplace: nn.Module, plain: nn.Module) -> None:
    x, y = draw(6, 3), draw(6, 2)
    found, wanted = (
        kf.estimate(network(activation), kf.Gaussian(), (x, y), source="exact") for activation in (inplace, plain)
    )
    torch.testing.assert_close(found.to_dense(), wanted.to_dense(), rtol=1e-13, atol=1e-13)


class Calls(nn.Module):
    """A linear layer and a head, called as the test likes."""

    def __init__(self, call: Callable[[Calls, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.head, self.call = nn.Linear(3, 3), nn.Linear(3, 2), call
        double(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, x)


def changed_in_place(model: Calls, x: Tensor) -> Tensor:
    hidden = x * 1.0
    out = model.layer(hidden)
    hidden.detach().add_(1.0)  # detached, or autograd would see it too
    return model.head(out)


def twice(model: Calls, x: Tensor) -> Tensor:
    return model.head(model.layer(model.layer(x)))


def held_constant(model: Calls, x: Tensor) -> Tensor:
    with torch.no_grad():
        hidden = model.layer(2 * x)
    return model.head(hidden + model.layer(x).tanh())


def detached_by_hand(model: Calls, x: Tensor) -> Tensor:
    hidden = torch.nn.functional.linear(2 * x, model.layer.weight.detach(), model.layer.bias.detach())
    return model.head(hidden + model.layer(x).tanh())


def reentrant(model: Calls, x: Tensor) -> Tensor:
    return model.head(checkpoint(model.layer, x.clone().requires_grad_(), use_reentrant=True))


def detached(model: Calls, x: Tensor) -> Tensor:
    return model.head(model.layer(x)).detach()


def tied_by_hand(model: Calls, x: Tensor) -> Tensor:
    return (model.layer(x) @ model.layer.weight)[:, :2]


def used_before_its_call(model: Calls, x: Tensor) -> Tensor:
    return model.head(model.layer(x @ model.layer.weight.T @ model.layer.weight))


def bias_alone(model: Calls, x: Tensor) -> Tensor:
    return model.head(model.layer(x) + model.layer.bias)


def of_a_layer_without_use(model: Calls, x: Tensor) -> Tensor:
    model.layer(x)
    return x @ model.layer.weight[:2].T


def with_another_weight(change: Callable[[Tensor], Tensor]) -> Callable[[Calls, Tensor], Tensor]:
    def way(model: Calls, x: Tensor) -> Tensor:
        own = {"weight": change(model.layer.weight), "bias": model.layer.bias}
        return model.head(torch.func.functional_call(model.layer, own, (x,)))

    return way


def derivative(model: Calls, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model.head(torch.tanh(model.layer(x))).sum(), x, create_graph=True)
    return slope[:, :2]


class TwoInputs(nn.Linear):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(x) * scale


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = double(TwoInputs(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, scale=2.0)


class Pair(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(x), x


class Unpacked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = double(Pair(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


for _kind in (Turned, TwoInputs, Pair):  # their rows and cotangents are a linear layer's, where it can be read
    adapt.register(_kind, adapt.dispatch(nn.Linear))


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "input changed in place": (lambda: Calls(changed_in_place), "'layer' was changed in place"),
    "used twice": (lambda: Calls(twice), "'layer' is used more than once"),
    "re-entrant checkpoint": (lambda: Calls(reentrant), "'layer' carries no gradient.*use_reentrant=False"),
    "detached outputs": (lambda: Calls(detached), "outputs carry no gradient"),
    "tied by hand": (lambda: Calls(tied_by_hand), r"parameters of layers \['layer'\] in another way"),
    "used before its call": (lambda: Calls(used_before_its_call), r"parameters of layers \['layer'\] in another way"),
    "bias used": (lambda: Calls(bias_alone), r"parameters of layers \['layer'\] in another way"),
    "call without use": (lambda: Calls(of_a_layer_without_use), r"parameters of layers \['layer'\] in another way"),
    **{
        f"weight {name}": (
            lambda c=change: Calls(with_another_weight(c)),
            r"parameters of layers \['layer'\] in another",
        )
        for name, change in {
            "scaled": lambda w: 2 * w,
            "adapted": lambda w: w - 0.1 * torch.ones_like(w),
            "scaled and transposed": lambda w: (2 * w.T).T,
            "squashed": torch.tanh,
            "clamped": lambda w: w.clamp(-0.1, 0.1),
        }.items()
    },
    "derivatives": (lambda: Calls(derivative), r"parameters of layers \['layer', 'head'\] in another way"),
    "two arguments": (Scaled, "'layer' must be called with one tensor"),
    "two outputs": (Unpacked, "'layer' returned a tuple"),
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(("make", "text"), REFUSED.values(), ids=REFUSED)
def test_what_would_be_silently_wrong_is_refused(make: Callable[[], nn.Module], text: str) -> None:
    model = make()
    with pytest.raises(TapeError, match=text):
        kf.estimate(model, kf.Gaussian(), (draw(4, 3), draw(4, 2)))
    assert hooks(model) == 0


@pytest.mark.parametrize("approximation", ["kfac", "ekfac", "dense"])
def test_what_a_layer_gives_under_no_grad_is_a_constant(approximation: str) -> None:
    batch, likelihood = (draw(4, 3), draw(4, 2)), kf.Gaussian()
    found, wanted = (
        kf.estimate(Calls(way), likelihood, batch, approximation=approximation, source="exact")
        for way in (held_constant, detached_by_hand)
    )
    torch.testing.assert_close(found.to_dense(), wanted.to_dense())
    if approximation == "dense":
        model = Calls(held_constant)
        blocks = kf.reference.ggn(model, likelihood, batch[0])
        torch.testing.assert_close(found.to_dense().diagonal(), blocks.diagonal())


def test_a_layer_that_is_called_under_no_grad_alone_has_no_statistics() -> None:
    def frozen_features(model: Calls, x: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = model.layer(x)
        return model.head(hidden)

    model, x = Calls(frozen_features), draw(4, 3)
    with record(adapt_model(model).adapters) as tape:
        model(x)
    assert list(tape.calls) == ["head"]
    assert tape.constants == {"layer"}
    with pytest.raises(RuntimeError, match=r"No statistics for layers \['layer'\]"):
        kf.estimate(model, kf.Gaussian(), (x, draw(4, 2)))


def test_forward_derivatives_stop_at_no_grad() -> None:
    """Dual numbers do not: their tangents go on through what a model holds constant."""
    x, y = draw(4, 3), draw(4, 2)
    products = []
    for way in (held_constant, detached_by_hand):
        model = Calls(way)
        vector = {name: torch.ones_like(p) for name, p in model.named_parameters()}
        operator = kf.GaussNewtonOperator(model, kf.Gaussian(), (x, y))
        products.append([*operator.matmul(vector).values(), operator.quadratic_form(vector)])
    for found, wanted in zip(*products, strict=True):
        torch.testing.assert_close(found, wanted)


def test_a_checkpoint_that_is_not_reentrant_is_read() -> None:
    x, y = draw(4, 3), draw(4, 2)
    model = Calls(lambda m, v: m.head(checkpoint(m.layer, v, use_reentrant=False)))
    plain = Calls(lambda m, v: m.head(m.layer(v)))
    found, wanted = (kf.estimate(m, kf.Gaussian(), (x, y), source="exact") for m in (model, plain))
    assert torch.equal(found.to_dense(), wanted.to_dense())


def test_keyword_arguments_are_read() -> None:
    x, y = draw(4, 3), draw(4, 2)
    model = Calls(lambda m, v: m.head(input=m.layer(input=v)))
    plain = Calls(lambda m, v: m.head(m.layer(v)))
    found, wanted = (kf.estimate(m, kf.Gaussian(), (x, y), source="exact") for m in (model, plain))
    assert torch.equal(found.to_dense(), wanted.to_dense())


def test_a_layer_the_outputs_do_not_depend_on_has_zero_cotangents() -> None:
    def unused(model: Calls, x: Tensor) -> Tensor:
        model.layer(x)
        return model.head(x)

    model = Calls(unused)
    with record(adapt_model(model).adapters) as tape:
        out = model(draw(4, 3))
    pulled = tape.pull(out, draw(4, 2))
    assert not pulled["layer"].any()
    assert pulled["head"].any()


def test_a_layer_that_is_never_called_is_named() -> None:
    model = Calls(lambda m, x: m.head(x))
    with pytest.raises(RuntimeError, match=r"No statistics for layers \['layer'\]"):
        kf.estimate(model, kf.Gaussian(), (draw(4, 3), draw(4, 2)))


def test_multihead_attention_is_uncovered_by_name() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.attention(x, x, x, need_weights=False)[0])

    model = double(Model())
    with pytest.warns(kf.CoverageWarning, match=r"attention\.in_proj_weight.*attention\.out_proj\.weight.*Attention"):
        curvature = kf.estimate(model, kf.Gaussian(), (draw(3, 5, 4), draw(3, 5, 2)))
    assert curvature.parameter_names == ("head.weight", "head.bias")


def test_hooks_are_removed_when_the_forward_raises() -> None:
    def broken(model: Calls, x: Tensor) -> Tensor:
        model.layer(x)
        raise KeyError("the user's own")

    model = Calls(broken)
    with pytest.raises(KeyError, match="the user's own"):
        kf.estimate(model, kf.Gaussian(), (draw(4, 3), draw(4, 2)))
    assert hooks(model) == 0


def test_hooks_are_in_place_only_while_the_tape_is_open() -> None:
    model = network(nn.Tanh())
    tape = Tape(adapt_model(model).adapters)
    assert (tape.is_open, hooks(model)) == (False, 0)
    tape.open()
    assert (tape.is_open, hooks(model)) == (True, 3)
    model(draw(2, 3))
    tape.open()  # forgets, and does not stack hooks up
    assert (tape.calls, hooks(model)) == ({}, 3)
    tape.close()
    assert (tape.is_open, hooks(model)) == (False, 0)


def test_a_tape_may_be_closed_while_a_layers_hooks_run() -> None:
    """As the collector does with that of an optimiser that nobody holds any more."""
    model = nn.Sequential(nn.Linear(3, 2))
    tape = Tape(adapt_model(model).adapters)
    tape.open()
    handle = model[0].register_forward_hook(lambda *_: tape.close(), prepend=True)
    assert model(torch.ones(1, 3)).shape == (1, 2)
    assert not tape.calls
    handle.remove()
    assert hooks(model) == 0


def test_hooks_of_the_user_that_change_an_output_come_after() -> None:
    model, x, y = network(nn.Tanh()), draw(5, 3), draw(5, 2)

    class Doubled(nn.Module):
        def forward(self, v: Tensor) -> Tensor:
            return 2 * v

    layers = list(network(nn.Tanh()))
    plain = nn.Sequential(layers[0], Doubled(), *layers[1:])
    model[0].register_forward_hook(lambda module, args, output: 2 * output)
    found, wanted = (kf.estimate(m, kf.Gaussian(), (x, y), source="exact").blocks["0"] for m in (model, plain))
    assert torch.equal(found.to_dense(), wanted.to_dense())


def test_a_model_that_is_a_layer() -> None:
    layer = double(nn.Linear(3, 2))
    curvature = kf.estimate(layer, kf.Gaussian(), (draw(5, 3), draw(5, 2)))
    assert list(curvature.blocks) == [""]
    assert curvature.parameter_names == ("weight", "bias")


def test_buffers_are_put_back_whatever_happens() -> None:
    model = nn.BatchNorm1d(3).double()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}

    def run_and_fail() -> None:
        with frozen_buffers(model):
            model(draw(4, 3))
            assert not torch.equal(model.running_mean, before["running_mean"])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_and_fail()
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_a_buffer_that_gets_its_size_in_the_forward_is_put_back() -> None:
    """Observers of quantisation-aware training do so."""
    model = nn.Sequential(nn.Linear(3, 2)).double()
    model.register_buffer("least", torch.empty(0, dtype=torch.float64))
    model.register_buffer("last", draw(2, 3).mT)
    least, last, before = model.least, model.last, model.last.clone()

    def observe(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        module.least.resize_(2).copy_(output.detach().amin(0))
        module.last.resize_(4).fill_(7)

    model.register_forward_hook(observe)
    kf.estimate(model, kf.Gaussian(), (draw(4, 3), None))
    assert model.least is least
    assert least.shape == (0,)
    assert model.last is last
    assert last.stride() == before.stride() == (1, 3)
    assert torch.equal(last, before)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), True),
        (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval(), False),
        (nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False)).eval(), True),
        (nn.Sequential(nn.LayerNorm(2), nn.GroupNorm(1, 2)), False),
    ],
)
def test_batch_norm_in_train_mode_couples_examples(model: nn.Module, expected: bool) -> None:
    assert couples_examples(model) is expected


@pytest.mark.parametrize("approximation", ["kfac", "dense", "diagonal"])
def test_autocast_statistics_are_float32(approximation: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 2, groups=2), nn.Flatten(2), nn.Linear(9, 4), nn.LayerNorm(4)
    )
    model.append(nn.Flatten()).append(nn.Linear(16, 4))
    x, y = torch.randn(5, 1, 6, 6), torch.arange(5) % 4

    def estimate() -> kf.BlockDiagonal:
        return kf.estimate(model, kf.Categorical(), (x, y), source="exact", approximation=approximation)

    wanted = estimate()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model[:5](x).dtype == torch.bfloat16
        found = estimate()
    for block in found.blocks.values():
        for tensor in block.tensors().values():
            assert tensor.dtype == torch.float32
            # Sums in bfloat16 would leave eight bits; the numbers themselves were rounded once.
            assert not torch.equal(tensor, tensor.bfloat16().float())
    assert float((found.to_dense() - wanted.to_dense()).norm() / wanted.to_dense().norm()) < 0.03


def test_under_autocast_inputs_are_those_that_layers_multiply() -> None:
    """Rounded where autocast rounds them: for products, and neither for norms nor outside autocast."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3))
    adapters, x = adapt_model(model).adapters, torch.randn(6, 4)
    with record(adapters) as plain:
        model(x)
    with record(adapters) as tape, torch.autocast("cpu", dtype=torch.bfloat16):
        model(x)
    normed = model[0](x).detach()
    assert torch.equal(plain.calls["1"].input, normed)
    assert torch.equal(tape.calls["1"].input, normed.bfloat16())
    assert torch.equal(tape.calls["0"].input, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_of_low_precision_have_float32_statistics(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).to(dtype)
    curvature = kf.estimate(model, kf.Categorical(), (torch.randn(6, 4, dtype=dtype), torch.arange(6) % 3))
    assert curvature.to_dense().dtype == torch.float32


@pytest.mark.parametrize("detached", [False, True])
def test_a_state_carried_from_an_earlier_forward_must_be_detached(detached: bool) -> None:
    layer = double(nn.Linear(3, 3))
    first = layer(draw(4, 3)).tanh()
    with record(adapt_model(layer).adapters) as tape:
        out = layer(draw(4, 3, seed=1) + (first.detach() if detached else first))
    if detached:
        assert list(tape.pull(out, torch.ones_like(out))) == [""]
        return
    with pytest.raises(TapeError, match=r"a state that an earlier forward left without detach\(\)"):
        tape.pull(out, torch.ones_like(out))


@pytest.mark.parametrize("approximation", ["kfac", "xkfac"])
def test_a_pull_leaves_no_cycle_that_keeps_the_graph(approximation: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()
    seen: list[weakref.ref[Tensor]] = []
    model[3].register_forward_hook(lambda module, args, output: seen.append(weakref.ref(args[0])))
    gc.collect()
    gc.disable()
    try:
        kf.estimate(model, kf.Gaussian(), (draw(4, 3), draw(4, 2)), approximation=approximation)
        assert seen
        assert all(ref() is None for ref in seen)
    finally:
        gc.enable()
