"""A run that stops and resumes is the run that never stopped, and a state that does not fit changes nothing."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.exactness_helpers import double, draw
from tests.optim.hand_kfac import network
from tests.optim.unclipped import unclipped
from torch import Tensor, nn
from torch.nn import functional as F

import kronfac as kf


def layers() -> nn.Module:
    """Every kind of block: plain, grouped, per unit."""
    return double(
        nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1, groups=1),
            nn.Tanh(),
            nn.Conv2d(4, 4, 3, groups=2),
            nn.GroupNorm(2, 4),
            nn.Flatten(),
            nn.Linear(16, 3),
        )
    )


class Words(nn.Module):
    """An embedding, and a parameter without curvature."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head, self.scale = nn.Embedding(5, 3), nn.Linear(3, 3), nn.Parameter(torch.ones(3))
        double(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embedding(x).mean(1)) * self.scale


def wide() -> nn.Module:
    """Factors whose rows are laid out at multiples of 64 bytes."""
    return double(nn.Sequential(nn.Linear(3, 250), nn.Tanh(), nn.Linear(250, 3)), scale=0.1)


def normalised() -> nn.Module:
    """Batch norm in train mode."""
    return double(nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)))


def images(step: int) -> Tensor:
    return draw(6, 1, 4, 4, seed=step)


def vectors(step: int) -> Tensor:
    return draw(6, 3, seed=step)


def words(step: int) -> Tensor:
    return torch.randint(5, (6, 4), generator=torch.Generator().manual_seed(step))


LABELS = torch.arange(6) % 3
RUNS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor], dict[str, Any]]] = {
    "factored": (network, vectors, {}),
    "exact": (network, vectors, {"damping_rule": "exact"}),
    "diagonal": (network, vectors, {"approximation": "diagonal"}),
    "dense": (network, vectors, {"approximation": "dense"}),
    "dense, exact": (layers, images, {"approximation": "dense", "damping_rule": "exact"}),
    "ekfac": (network, vectors, {"approximation": "ekfac"}),
    "ekfac, convolutions": (layers, images, {"approximation": "ekfac", "average": 0.6}),
    "ekfac, embedding": (Words, words, {"approximation": "ekfac"}),
    "convolutions": (layers, images, {}),
    "convolutions, exact": (layers, images, {"damping_rule": "exact"}),
    "full norms": (layers, images, {"norm": "full"}),
    "everything": (network, vectors, {"kl_clip": 1e-3, "average": 0.6, "weight_decay": 0.1}),
    "no momentum": (network, vectors, {"momentum": 0.0, "decoupled_weight_decay": True, "weight_decay": 0.1}),
    "embedding": (Words, words, {"average": 0.6}),
    "embedding, exact": (Words, words, {"damping_rule": "exact"}),
    "fallback": (Words, words, {"average": 0.6, "fallback": lambda ps: torch.optim.Adam(ps, lr=0.01)}),
    "forward only": (network, vectors, {"source": "forward_only"}),
    "drift": (network, vectors, {"drift": 0.02, "stats_every": 1}),
    "even rows": (wide, vectors, {}),
    "sub-batch apart": (network, vectors, {"stats_examples": 2, "kl_clip": "auto"}),
    "sub-batch cut": (layers, images, {"stats_examples": 4}),
    "sub-batch, batch norm": (normalised, images, {"stats_examples": 2}),
}


def make(model: nn.Module, **options: Any) -> kf.optim.KFAC:
    options = {"damping": 0.1, "stats_every": 2, "invert_every": 5, "burn_in": 2, **options}
    return unclipped(model, kf.Categorical(), lr=0.05, **options)


def train(model: nn.Module, optimizer: kf.optim.KFAC, data: Callable[[int], Tensor], steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        F.cross_entropy(model(data(step)), LABELS).backward()
        optimizer.step()


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Every leaf of a nested state, by its path."""
    if isinstance(value, dict):
        return {k: v for key, part in value.items() for k, v in flat(part, f"{prefix}/{key}").items()}
    if isinstance(value, (list, tuple)):
        return {k: v for i, part in enumerate(value) for k, v in flat(part, f"{prefix}/{i}").items()}
    return {prefix: value}


def assert_same_state(found: Any, wanted: Any) -> None:
    found, wanted = flat(found), flat(wanted)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        if isinstance(value, Tensor):
            assert found[key].dtype == value.dtype, key
            assert torch.equal(found[key], value), key
        else:
            assert found[key] == value, key


@pytest.mark.filterwarnings("ignore::kronfac.CoverageWarning")
@pytest.mark.parametrize("case", RUNS)
@pytest.mark.parametrize("stop", [1, 4, 5])
def test_resuming_is_bit_for_bit(case: str, stop: int) -> None:
    build, data, options = RUNS[case]
    model = build()
    optimizer = make(model, **options)
    train(model, optimizer, data, range(stop))
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    assert_same_state(saved["optimizer"], optimizer.state_dict())
    train(model, optimizer, data, range(stop, stop + 7))

    resumed = build()
    other = make(resumed, **options)
    train(resumed, other, data, range(20, 23))  # whatever was there is replaced
    resumed.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    assert_same_state(other.state_dict(), saved["optimizer"])
    train(resumed, other, data, range(stop, stop + 7))
    for (name, p), q in zip(model.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert_same_state(other.state_dict(), optimizer.state_dict())
    if "average" in options:
        with optimizer.averaged(), other.averaged():
            assert all(torch.equal(p, q) for p, q in zip(model.parameters(), resumed.parameters(), strict=True))


def test_factors_of_a_bfloat16_model_stay_float32() -> None:
    """PyTorch casts ``state[param]`` to the parameter's dtype; the factors of a bfloat16 model must not be."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).bfloat16()
    optimizer = make(model)
    F.cross_entropy(model(torch.randn(6, 3, dtype=torch.bfloat16)), LABELS).backward()
    optimizer.step()
    other = make(copy.deepcopy(model))
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    for statistic, own in zip(
        other._estimator.statistics.values(), optimizer._estimator.statistics.values(), strict=True
    ):
        for key, mean in statistic.means().items():
            assert mean.total.dtype == torch.float32
            assert torch.equal(mean.total, own.means()[key].total)


def test_a_loaded_state_is_a_copy() -> None:
    model = network()
    optimizer = make(model)
    train(model, optimizer, vectors, range(3))
    state = optimizer.state_dict()
    kept = copy.deepcopy(state)
    twin = copy.deepcopy(model)
    other = make(twin)
    other.load_state_dict(state)
    train(twin, other, vectors, range(3, 9))
    assert_same_state(state["kronfac"], kept["kronfac"])


@pytest.mark.parametrize("name", ["momentum", "fallback", "kldwrm"])
def test_neither_a_kept_state_nor_the_run_that_takes_it_follows_the_first_run(name: str) -> None:
    """PyTorch hands buffers out, and takes them in, by reference."""

    def made(model: nn.Module) -> kf.optim.KFAC:
        if name == "kldwrm":
            return kf.optim.KLDWRM(model, kf.Categorical(), 20.0)
        return make(model, average=0.6, fallback=(lambda ps: torch.optim.Adam(ps)) if name == "fallback" else None)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", kf.CoverageWarning)
        model = Words()
        optimizer = made(model)
        train(model, optimizer, words, range(3))
        state, kept, beginning = optimizer.state_dict(), copy.deepcopy(optimizer.state_dict()), model.state_dict()
        beginning = copy.deepcopy(beginning)
        other = Words()
        other.load_state_dict(beginning)
        twin = made(other)
        twin.load_state_dict(state)
        for step in range(3, 6):  # by turns
            train(model, optimizer, words, range(step, step + 1))
            train(other, twin, words, range(step, step + 1))
    assert_same_state(state, kept)
    assert_same_state(other.state_dict(), model.state_dict())
    assert_same_state(twin.state_dict(), optimizer.state_dict())


def test_a_state_is_loaded_as_often_as_one_likes() -> None:
    """As where training goes back to the best state so far."""
    model = network()
    optimizer = make(model)
    train(model, optimizer, vectors, range(3))
    best, parameters = optimizer.state_dict(), copy.deepcopy(model.state_dict())
    ends = []
    for _ in range(3):
        model.load_state_dict(parameters)
        optimizer.load_state_dict(best)
        train(model, optimizer, vectors, range(3, 6))
        ends.append(copy.deepcopy(model.state_dict()))
    for end in ends[1:]:
        assert_same_state(end, ends[0])


def test_a_warm_up_goes_on_where_it_stopped() -> None:
    batches = [(vectors(step), LABELS) for step in range(40)]
    model = network()
    optimizer = make(model)
    optimizer.warm_up(batches[:25])
    state = through_a_file(optimizer.state_dict())
    optimizer.warm_up(batches[25:])
    train(model, optimizer, vectors, range(3))
    resumed = network()
    other = make(resumed)
    other.warm_up(batches[:3])  # whatever was there is replaced
    other.load_state_dict(state)
    other.warm_up(batches[25:])
    train(resumed, other, vectors, range(3))
    assert_same_state(other.state_dict(), optimizer.state_dict())
    del state["kronfac"]["warmed"]  # one of before
    other.load_state_dict(state)
    assert other._warmed == 0


def test_schedulers_resume_with_their_optimiser() -> None:
    def pieces() -> tuple[nn.Module, kf.optim.KFAC, torch.optim.lr_scheduler.LRScheduler]:
        model = network()
        optimizer = make(model)
        return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)

    model, optimizer, scheduler = pieces()
    for step in range(3):
        train(model, optimizer, vectors, range(step, step + 1))
        scheduler.step()
    states = through_a_file([part.state_dict() for part in (model, optimizer, scheduler)])
    resumed, other, later = pieces()
    for part, state in zip((resumed, other, later), states, strict=True):
        part.load_state_dict(state)
    for m, o, s in ((model, optimizer, scheduler), (resumed, other, later)):
        train(m, o, vectors, range(3, 5))
        s.step()
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] < 0.05
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), resumed.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore::kronfac.CoverageWarning")
def test_groups_stay_shared_with_the_fallback_after_loading() -> None:
    model = Words()
    optimizer = make(model, fallback=lambda ps: torch.optim.SGD(ps, lr=0.1))
    train(model, optimizer, words, range(2))
    optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    assert optimizer.param_groups[1] is optimizer._fallback.param_groups[0]
    assert [p.shape for p in optimizer.param_groups[1]["params"]] == [model.scale.shape]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = copy.deepcopy(model)
    for group in optimizer.param_groups:
        group["momentum"] = 0.0
    train(model, optimizer, words, range(2, 3))
    assert torch.equal(model.scale, before.scale)


# ---------------------------------------------------------------------------------------------------- refused
def remove(*path: Any) -> Callable[[dict[str, Any]], None]:
    def change(state: dict[str, Any]) -> None:
        for key in path[:-1]:
            state = state[key]
        del state[path[-1]]

    return change


def put(value: Any, *path: Any) -> Callable[[dict[str, Any]], None]:
    def change(state: dict[str, Any]) -> None:
        for key in path[:-1]:
            state = state[key]
        state[path[-1]] = value

    return change


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "no kronfac": (remove("kronfac"), "no state of a kronfac optimiser"),
    "version": (put(99, "kronfac", "version"), "version 99"),
    "no statistics": (remove("kronfac", "statistics"), "damaged"),
    "no layer": (remove("kronfac", "statistics", "2"), "is of layers"),
    "other layer": (put({}, "kronfac", "statistics", "7"), "is of layers"),
    "no factor": (remove("kronfac", "statistics", "2", "input"), "Layer '2'"),
    "factor of another shape": (
        put(torch.zeros(2, 2), "kronfac", "statistics", "2", "input", "total"),
        r"shape \(2, 2\)",
    ),
    "factor that is no tensor": (put("A", "kronfac", "statistics", "2", "input", "total"), "damaged"),
    "no weight": (remove("kronfac", "statistics", "2", "input", "weight"), "damaged"),
    "weight that is no number": (
        put("many", "kronfac", "statistics", "2", "input", "weight"),
        "weight of 2.input is 'many'",
    ),
    "no inverses": (remove("kronfac", "inverses"), "damaged"),
    "unknown kind of inverse": (put("magic", "kronfac", "inverses", "2", "kind"), "unknown kind 'magic'"),
    "inverse of an unknown layer": (put({}, "kronfac", "inverses", "9"), r"inverses of layers \['9'\]"),
    "inverse without tensors": (put({}, "kronfac", "inverses", "2", "tensors"), "damaged"),
    "inverse of another shape": (
        put(
            {"kind": "kronecker", "shape": [2, 2], "tensors": {"input": torch.eye(2), "output": torch.eye(2)}},
            "kronfac",
            "inverses",
            "2",
        ),
        r"Layer '2'.*inverse has shape \(2, 2\)",
    ),
    "no generator": (remove("kronfac", "generator"), "damaged"),
    "generator that is none": (put(torch.zeros(5, dtype=torch.uint8), "kronfac", "generator"), "damaged"),
    "steps": (put("three", "kronfac", "steps"), "steps is 'three'"),
    "fallback": (put({}, "kronfac", "fallback"), "Only one.*has a fallback"),
    "no groups": (remove("param_groups"), "damaged"),
    "other groups": (put([], "param_groups"), "other numbers of parameters"),
    "negative damping": (put(-1.0, "param_groups", 0, "damping"), "damping=-1"),
    "group without damping": (remove("param_groups", 0, "damping"), r"lack \['damping'\]"),
    "momentum of another shape": (put(torch.zeros(3), "state", 0, "momentum_buffer"), r"momentum_buffer.*\(3,\)"),
    "no state": (remove("state"), "damaged"),
}


@pytest.mark.parametrize(("change", "text"), BROKEN.values(), ids=BROKEN)
def test_a_damaged_state_changes_nothing(change: Callable[[dict[str, Any]], None], text: str) -> None:
    source = network()
    donor = make(source, average=0.9)
    train(source, donor, vectors, range(4))
    state = through_a_file(donor.state_dict())
    change(state)
    model = network(seed=3)
    optimizer = make(model, average=0.9)
    train(model, optimizer, vectors, range(2))
    before, groups = copy.deepcopy(optimizer.state_dict()), optimizer.param_groups
    with pytest.raises(ValueError, match=text):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups is groups
    assert_same_state(optimizer.state_dict(), before)
    train(model, optimizer, vectors, range(2, 4))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (remove("kronfac", "constants"), "damaged"),
        (remove("kronfac", "constants", "2"), "damaged"),
        (remove("kronfac", "constants", "2", "input"), r"Layer '2'.*\['output'\], needed are \['input', 'output'\]"),
        (
            put(torch.eye(2), "kronfac", "constants", "2", "output"),
            r"Layer '2'.*output has shape \(2, 2\), not \(5, 5\)",
        ),
        (put("Q", "kronfac", "constants", "2", "output"), "damaged"),
        (remove("kronfac", "statistics", "2", "moments"), "Layer '2'"),
    ],
)
def test_a_damaged_eigenbasis_changes_nothing(change: Callable[[dict[str, Any]], None], text: str) -> None:
    models = [network(), network(seed=3)]
    donor, optimizer = (make(model, approximation="ekfac") for model in models)
    train(models[0], donor, vectors, range(4))
    train(models[1], optimizer, vectors, range(2))
    state, before = through_a_file(donor.state_dict()), copy.deepcopy(optimizer.state_dict())
    change(state)
    with pytest.raises(ValueError, match=text):
        optimizer.load_state_dict(state)
    assert_same_state(optimizer.state_dict(), before)


def test_states_of_other_optimisers_and_models_are_foreign() -> None:
    model = network()
    optimizer = make(model)
    train(model, optimizer, vectors, range(2))
    before = copy.deepcopy(optimizer.state_dict())
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    wider = double(nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)))
    other = make(wider)
    train(wider, other, vectors, range(2))
    diagonal = make(network(), approximation="diagonal")
    words_model = network()
    shorter = make(nn.Sequential(*list(words_model)[:3]))
    foreign = [sgd.state_dict(), other.state_dict(), diagonal.state_dict(), shorter.state_dict(), {}, None]
    for state in foreign:
        with pytest.raises(ValueError, match=r"no state of a kronfac|shape|needed are|other numbers"):
            optimizer.load_state_dict(state)  # type: ignore[arg-type]
        assert_same_state(optimizer.state_dict(), before)


@pytest.mark.filterwarnings("ignore::kronfac.CoverageWarning")
def test_a_damaged_state_of_the_fallback_changes_nothing() -> None:
    model = Words()
    optimizer = make(model, fallback=lambda ps: torch.optim.Adam(ps, lr=0.1))
    train(model, optimizer, words, range(2))
    before = copy.deepcopy(optimizer.state_dict())
    for change in (
        put([], "kronfac", "fallback", "param_groups"),
        remove("kronfac", "fallback", "state"),
        put(torch.zeros(7), "kronfac", "fallback", "state", 0, "exp_avg"),
        put(None, "kronfac", "fallback"),
    ):
        state = copy.deepcopy(before)
        change(state)
        with pytest.raises(ValueError, match=r"numbers of parameters|damaged|exp_avg|fallback"):
            optimizer.load_state_dict(state)
        assert_same_state(optimizer.state_dict(), before)


@pytest.mark.parametrize(
    ("key", "value"),
    [("lam", "high"), ("lam", float("nan")), ("gamma", -1.0), ("streak", None), ("ceiling", None), ("calibrates", 0.5)],
)
def test_damaged_choices_of_an_adaptive_optimiser_change_nothing(key: str, value: object) -> None:
    model = network()
    optimizer = kf.optim.AdaptiveKFAC(model, kf.Categorical())
    for step in range(2):
        optimizer.step(lambda step=step: F.cross_entropy(model(vectors(step)), LABELS))
    damaged = copy.deepcopy(optimizer.state_dict())
    damaged["adaptive"][key] = value
    other = kf.optim.AdaptiveKFAC(network(), kf.Categorical())
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=key):
        other.load_state_dict(damaged)
    assert_same_state(other.state_dict(), before)
