"""When statistics are gathered, when not, and what the hooks leave behind."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from typing import Any

import pytest
import torch
from tests.exactness_helpers import double, draw
from tests.optim.hand_kfac import network
from tests.optim.unclipped import unclipped
from torch import Tensor, nn
from torch.nn import functional as F

import kronfac as kf


def make(model: nn.Module, **options: Any) -> kf.optim.KFAC:
    options = {"source": "exact", "damping": 0.1, **options}
    likelihood = options.pop("likelihood", kf.Categorical())
    return unclipped(model, likelihood, lr=0.1, **options)


def factors(optimizer: kf.optim.KFAC) -> dict[str, Tensor]:
    blocks = optimizer.curvature().blocks
    return {f"{name}.{key}": t for name, block in blocks.items() for key, t in block.tensors().items()}


def same(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=tolerance, atol=tolerance)


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def estimated(
    model: nn.Module, *pairs: tuple[Tensor, Any], likelihood: kf.Likelihood | None = None
) -> dict[str, Tensor]:
    curvature = kf.estimate(model, likelihood or kf.Categorical(), list(pairs), source="exact")
    return {f"{name}.{key}": t for name, block in curvature.blocks.items() for key, t in block.tensors().items()}


LABELS = torch.arange(8) % 3


# ---------------------------------------------------------------------------------------------------- when
def test_every_micro_batch_of_a_step_is_gathered() -> None:
    """Of unequal sizes, weighted by them; the next step forgets once, not once for each."""
    model = network()
    optimizer = make(model, ema=0.5)
    x = draw(12, 3)
    for part in x.split([7, 3, 2]):
        F.cross_entropy(model(part), LABELS[: len(part)]).backward()
    same(factors(optimizer), estimated(model, (x, None)))
    first = estimated(model, (x, None))
    optimizer.step()
    later = draw(12, 3, seed=1)
    for part in later.split([4, 8]):
        model(part)
    second = estimated(model, (later, None))
    same(factors(optimizer), {name: (0.5 * first[name] + second[name]) / 1.5 for name in first})


@pytest.mark.parametrize("where", ["no_grad", "inference_mode", "eval", "paused"])
def test_forwards_that_gather_nothing(where: str) -> None:
    model, x = network(), draw(8, 3)
    optimizer = make(model)
    model(x)
    before = factors(optimizer)
    other = draw(8, 3, seed=1)
    if where == "no_grad":
        with torch.no_grad():
            model(other)
    elif where == "inference_mode":
        with torch.inference_mode():
            model(other)
    elif where == "eval":
        model.eval()(other)
        model.train()
    else:
        with optimizer.paused():
            model(other)
            with optimizer.paused():
                model(other)
            model(other)
    same(factors(optimizer), before, 0.0)
    model(other)
    assert optimizer._gatherer.gathered == 2


def test_pausing_ends_with_the_block_whatever_happens() -> None:
    optimizer = make(network())

    def fail() -> None:
        with optimizer.paused():
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert optimizer._gatherer.enabled


def test_nothing_is_hooked_or_pulled_between_due_steps() -> None:
    model, x = network(), draw(8, 3)
    optimizer = make(model, stats_every=3, burn_in=0)
    gathered = []
    for _ in range(7):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), LABELS)
        gathered.append(optimizer._gatherer.gathered)
        assert hooks(model) == 2
        loss.backward()
        optimizer.step()
    assert gathered == [1, 0, 0, 1, 0, 0, 1]


def test_dropout_and_batch_norm_see_one_forward_only() -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizer = make(models[0], source="sampled", kl_clip=1e-3)
    x, outputs = torch.randn(8, 3), []
    for model in models:
        torch.manual_seed(1)
        outputs.append(model(x))
        if model is models[0]:
            F.cross_entropy(outputs[0], LABELS).backward()
            optimizer.step()
        outputs.append(torch.rand(3))
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[3])
    for name, buffer in models[1].named_buffers():
        assert torch.equal(models[0].get_buffer(name), buffer)


def measure_estimate(model: nn.Module, x: Tensor) -> None:
    kf.estimate(model, kf.Categorical(), (x, LABELS))


def measure_verify(model: nn.Module, x: Tensor) -> None:
    kf.verify(model, kf.Categorical(), (x, LABELS))


def measure_reference(model: nn.Module, x: Tensor) -> None:
    kf.reference.ggn(model, kf.Categorical(), x)


def measure_operators(model: nn.Module, x: Tensor) -> None:
    vector = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    for operator in (kf.GaussNewtonOperator, kf.HessianOperator):
        operator(model, kf.Categorical(), [(x, LABELS)]).matmul(vector)


def measure_transform(model: nn.Module, x: Tensor) -> None:
    parameters = dict(model.named_parameters())
    torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).square().sum())(parameters)


@pytest.mark.parametrize(
    "measure", [measure_estimate, measure_verify, measure_reference, measure_operators, measure_transform]
)
def test_measurements_in_the_middle_of_training_are_no_training(measure: Any) -> None:
    model, x = network(), draw(8, 3)
    optimizer = make(model)
    model(x)
    before, random_state = factors(optimizer), optimizer._estimator.generator.get_state()
    measure(model, draw(8, 3, seed=1))
    same(factors(optimizer), before, 0.0)
    assert torch.equal(optimizer._estimator.generator.get_state(), random_state)
    model(x)
    assert optimizer._gatherer.gathered == optimizer._gatherer.forwards == 2


# ---------------------------------------------------------------------------------------------------- by hand
def test_capture_gathers_what_the_hook_would() -> None:
    model, twin, x = network(), network(), draw(8, 3)
    optimizer, other = make(model), make(twin)
    with optimizer.capture() as capture:
        capture(model(x))
    twin(x)
    same(factors(optimizer), factors(other), 0.0)
    assert optimizer._gatherer.gathered == 1


def test_capture_reads_parts_that_are_called_apart() -> None:
    model = nn.ModuleDict({"encoder": double(nn.Linear(3, 4)), "decoder": double(nn.Linear(4, 3))})
    optimizer = make(model)
    x = draw(8, 3)
    with optimizer.capture() as capture:
        z = model["decoder"](model["encoder"](x).tanh())
        capture(z)
    F.cross_entropy(z, LABELS).backward()
    before = copy.deepcopy(model)
    optimizer.step()
    assert not torch.equal(model["encoder"].weight, before["encoder"].weight)
    joined = nn.Sequential(before["encoder"], nn.Tanh(), before["decoder"])
    wanted = list(estimated(joined, (x, None)).values())
    for found, tensor in zip(factors(optimizer).values(), wanted, strict=True):
        torch.testing.assert_close(found, tensor)


@pytest.mark.parametrize("source", ["exact", "empirical", "sampled"])
def test_capture_takes_the_targets(source: str) -> None:
    """Where the forward hook cannot know them: ignored targets, class weights, the empirical Fisher."""
    likelihood = kf.Categorical(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), ignore_index=-100)
    model, x = network(), draw(8, 3)
    y = torch.tensor([0, -100, 1, 2, -100, 2, 1, 0])
    optimizer = make(model, likelihood=likelihood, source=source)
    with pytest.raises(kf.TapeError, match=r"needs the targets[\s\S]*optimizer\.capture\(\)[\s\S]*capture\(z, y\)"):
        model(x)
    assert hooks(model) == 2
    with optimizer.capture() as capture:
        z = model(x)
        capture(z, y)
    F.cross_entropy(z, y, likelihood.weight).backward()
    found = factors(optimizer)
    options = {} if source != "sampled" else {"seed": 0}
    wanted = kf.estimate(model, likelihood, (x, y), source=source, **options).blocks
    for name, block in wanted.items():
        for key, tensor in block.tensors().items():
            torch.testing.assert_close(found[f"{name}.{key}"], tensor)
    garbage = x.clone()
    garbage[y == -100] = 1e3
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    other = make(network(), likelihood=likelihood)
    with other.capture() as capture:
        capture(other._gatherer.root(garbage), y)
    same(factors(other), estimated(network(), (x, y), likelihood=likelihood))


def test_capture_between_due_steps_does_nothing() -> None:
    model, x = network(), draw(8, 3)
    optimizer = make(model, stats_every=5, burn_in=0)
    for _ in range(2):
        optimizer.zero_grad()
        with optimizer.capture() as capture:
            z = model(x)
            capture(z)
        F.cross_entropy(z, LABELS).backward()
        optimizer.step()
    before = factors(optimizer)
    with optimizer.capture() as capture:
        capture(model(draw(8, 3, seed=3)))
    same(factors(optimizer), before, 0.0)


def test_capture_of_several_micro_batches() -> None:
    model, x = network(), draw(8, 3)
    optimizer = make(model, ema=0.5)
    for part in x.split(4):
        with optimizer.capture() as capture:
            capture(model(part))
    same(factors(optimizer), estimated(model, (x, None)))


def test_outputs_that_are_no_tensor() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = network()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.layers(x)}

    model, x = Wrapped(), draw(8, 3)
    optimizer = make(model)
    with pytest.raises(TypeError, match=r"of type dict.*outputs=lambda out: out\.logits"):
        model(x)
    del optimizer
    gc.collect()
    optimizer = make(model, outputs=lambda out: out["logits"], kl_clip=1e-4)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(x)["logits"], LABELS).backward()
        optimizer.step()


# ---------------------------------------------------------------------------------------------------- warm-up
def test_warm_up_is_a_plain_mean_that_the_first_step_forgets_once() -> None:
    model, x = network(), draw(12, 3)
    optimizer = make(model, ema=0.25)
    parts = [(part, None) for part in x.split([5, 4, 3])]
    optimizer.warm_up(parts)
    whole = estimated(model, (x, None))
    same(factors(optimizer), whole)
    later = draw(6, 3, seed=1)
    F.cross_entropy(model(later), LABELS[:6]).backward()
    new = estimated(model, (later, None))
    share = {"input": (0.25 * 12, 6), "output": (0.25 * 12, 6)}
    wanted = {}
    for name in whole:
        old, fresh = share[name.rsplit(".", 1)[1]]
        wanted[name] = (old * whole[name] + fresh * new[name]) / (old + fresh)
    same(factors(optimizer), wanted)
    optimizer.step()
    with pytest.raises(RuntimeError, match="before the first step"):
        optimizer.warm_up(parts)


def test_warm_up_takes_targets_counts_batches_and_leaves_the_model() -> None:
    model = double(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)))
    likelihood = kf.Categorical(ignore_index=-100)
    optimizer = make(model, likelihood=likelihood, source="sampled")
    state = copy.deepcopy(model.state_dict())
    seen = []

    def loader() -> Any:
        for index in range(5):
            seen.append(index)
            yield draw(8, 3, seed=index), LABELS

    optimizer.warm_up(loader(), batches=2)
    assert len(seen) <= 3
    assert optimizer._estimator.statistics["0"].means()["input"].weight == 16.0
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_step_after_warm_up_needs_no_statistics_of_its_own() -> None:
    model, x = network(), draw(8, 3)
    optimizer = make(model)
    optimizer.warm_up((x, LABELS))
    with optimizer.paused():
        F.cross_entropy(model(x), LABELS).backward()
    optimizer.step()


# ---------------------------------------------------------------------------------------------------- no forward
def never(model: nn.Module, optimizer: kf.optim.KFAC, x: Tensor) -> Tensor:
    value = x
    for layer in model:
        value = layer(value)
    return value


def evaluated(model: nn.Module, optimizer: kf.optim.KFAC, x: Tensor) -> Tensor:
    return model.eval()(x)


def paused(model: nn.Module, optimizer: kf.optim.KFAC, x: Tensor) -> Tensor:
    with optimizer.paused():
        return model(x)


def functional(model: nn.Module, optimizer: kf.optim.KFAC, x: Tensor) -> Tensor:
    return model.forward(x)


@pytest.mark.parametrize("call", [never, evaluated, paused, functional])
def test_a_loop_that_never_calls_the_model_is_told(call: Any) -> None:
    model, x = network(), draw(8, 3)
    optimizer = make(model)
    before = copy.deepcopy(model)
    F.cross_entropy(call(model, optimizer, x), LABELS).backward()
    with pytest.raises(RuntimeError, match=r"no forward of the model passed to KFAC was seen[\s\S]*capture\(z\)"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True))


def test_a_layer_that_is_never_called_is_named() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = double(nn.Linear(3, 3)), double(nn.Linear(3, 3))

        def forward(self, x: Tensor, both: bool = False) -> Tensor:
            return self.used(x) + (self.idle(x) if both else 0.0)

    model, x = Model(), draw(8, 3)
    optimizer = make(model, stats_every=100, burn_in=0)
    F.cross_entropy(model(x), LABELS).backward()
    optimizer.step()  # without gradient it just stays
    before = copy.deepcopy(model)
    F.cross_entropy(model(x, both=True), LABELS).backward()
    with pytest.raises(RuntimeError, match="Layer 'idle' has a gradient but no inverse"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True))


def test_a_forward_that_calls_no_layer_is_told() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = double(nn.Linear(3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.layer.weight, self.layer.bias)

    model = Bare()
    optimizer = make(model)
    with pytest.raises(kf.TapeError, match="No layer hook fired"):
        model(draw(8, 3))
    assert hooks(model) == 2
    assert optimizer._gatherer.gathered == 0


# ---------------------------------------------------------------------------------------------------- hooks
def test_an_error_in_the_forward_leaves_no_layer_hooks() -> None:
    model, x = network(), draw(8, 3)
    optimizer = make(model)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(draw(8, 4))
    assert hooks(model) == 2
    F.cross_entropy(model(x), LABELS).backward()
    optimizer.step()


def test_layers_that_are_called_twice_are_refused_and_forgotten() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = double(nn.Linear(3, 3))

        def forward(self, x: Tensor, times: int = 1) -> Tensor:
            for _ in range(times):
                x = self.layer(x)
            return x

    model, x = Twice(), draw(8, 3)
    optimizer = make(model)
    with pytest.raises(kf.TapeError, match="'layer' is used more than once"):
        model(x, times=2)
    assert hooks(model) == 2
    F.cross_entropy(model(x), LABELS).backward()
    optimizer.step()


def test_hooks_go_with_the_optimiser() -> None:
    model = network()
    optimizer = make(model)
    assert hooks(model) == 2
    del optimizer
    gc.collect()
    assert hooks(model) == 0


def test_two_optimisers_share_a_model() -> None:
    model, x = network(), draw(8, 3)
    first, second = make(model), make(model, approximation="diagonal")
    F.cross_entropy(model(x), LABELS).backward()
    assert first._gatherer.gathered == second._gatherer.gathered == 1
    first.step()


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_a_model_do_not_feed_the_optimiser(how: str) -> None:
    model, x = network(), draw(8, 3)
    optimizer = make(model)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert torch.equal(twin(x), network()(x))
    assert optimizer._gatherer.gathered == optimizer._gatherer.forwards == 0
    model(x)
    assert optimizer._gatherer.gathered == 1
    other = make(twin)
    twin(x)
    assert optimizer._gatherer.gathered == 1
    assert other._gatherer.gathered == 1


def replace_layer(model: nn.Sequential) -> None:
    model[2] = double(nn.Linear(4, 5))


def add_layer(model: nn.Sequential) -> None:
    model.append(double(nn.Linear(3, 3)))


def replace_parameter(model: nn.Sequential) -> None:
    model[2].weight = nn.Parameter(torch.zeros(5, 4, dtype=torch.float64))


@pytest.mark.parametrize("change", [replace_layer, add_layer, replace_parameter])
def test_a_model_that_changes_is_refused(change: Any) -> None:
    model, x = network(), draw(8, 3)
    optimizer = make(model, stats_every=100, burn_in=0)
    F.cross_entropy(model(x), LABELS).backward()
    optimizer.step()
    change(model)
    before = copy.deepcopy(model)
    F.cross_entropy(model(x), LABELS).backward()  # no statistics are due
    with pytest.raises(kf.TapeError, match=r"layers or parameters were replaced.*construct a new one"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True))
    fresh = make(network())
    fresh._gatherer.root.append(nn.ReLU())
    with pytest.raises(kf.TapeError, match="layers or parameters were replaced"):
        fresh._gatherer.root(x)


# ---------------------------------------------------------------------------------------------------- compiled
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_compiled_models_are_replayed_eagerly(backend: str) -> None:
    torch._dynamo.reset()
    plain, model = network(), network()
    compiled = torch.compile(model, backend=backend)
    optimizer, other = make(compiled, kl_clip=1e-3, source="sampled"), make(plain, kl_clip=1e-3, source="sampled")
    assert optimizer.curvature is not None
    for step in range(3):
        x = draw(8, 3, seed=step)
        for m, o in ((compiled, optimizer), (plain, other)):
            o.zero_grad()
            F.cross_entropy(m(x), LABELS).backward()
            assert o._gatherer.gathered == 1
            o.step()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_module_compiled_before_and_not_passed_is_told() -> None:
    torch._dynamo.reset()
    model, x = network(), draw(8, 3)
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    optimizer = make(model)
    F.cross_entropy(compiled(x), LABELS).backward()
    with pytest.raises(RuntimeError, match="no forward of the model passed to KFAC was seen"):
        optimizer.step()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_replaying_changes_neither_buffers_nor_random_numbers() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3))
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="eager")
    optimizer = make(compiled, source="sampled")
    x, after = torch.randn(8, 3), []
    for m in (compiled, twin):
        torch.manual_seed(1)
        m(x)
        after.append(torch.rand(3))
    assert torch.equal(*after)
    assert optimizer._gatherer.gathered == 1
    for name, buffer in twin.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer)
