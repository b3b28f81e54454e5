from __future__ import annotations

import pytest
import torch

from kronfac.experiments.averaging import IterateAverage
from kronfac.experiments.batches import Batches
from kronfac.experiments.errors import ExperimentError
from kronfac.experiments.optimizers import OPTIMIZERS, get_optimizer
from kronfac.experiments.problems import Data, get_problem
from kronfac.experiments.schedules import factor


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("sgd", {"lr": -1}, "sgd.lr must be a number above 0, got -1"),
        ("sgd", {"lr": "fast"}, "sgd.lr must be a number above 0, got 'fast'"),
        ("sgd", {"lr": float("nan")}, "sgd.lr"),
        ("sgd", {"lr": True}, "sgd.lr"),
        ("sgd", {"damping": 1}, "sgd has no hyper-parameter 'damping'; it has: lr, momentum"),
        ("adam", {"beta1": 1.0}, "adam.beta1 must be a number of at least 0 and below 1"),
        ("kfac", {"damping": -0.1}, "kfac.damping must be a number of at least 0, got -0.1"),
        ("kfac", {"stats_every": 2.5}, "kfac.stats_every must be a whole number of at least 1"),
        ("kfac", {"kl_clip": 0}, "kfac.kl_clip must be a number above 0, or auto, or none, got 0"),
        ("kfac", {"source": "guess"}, "kfac.source must be one of sampled, exact"),
        ("kfac", {"decoupled_weight_decay": "maybe"}, "must be true or false"),
        ("adamw", {"schedule": "linear"}, "adamw.schedule must be one of constant, cosine, exponential"),
        ("adamw", {"batch_size": 0}, "adamw.batch_size must be a whole number of at least 1, or none"),
    ],
)
def test_bad_hyperparameters_are_named(name: str, values: dict[str, object], message: str) -> None:
    with pytest.raises(ExperimentError, match=message):
        get_optimizer(name).resolve(values)


def test_texts_become_values_and_later_layers_win() -> None:
    values = get_optimizer("kfac").resolve(
        {"lr": 0.1, "damping": 1.0}, {"lr": "0.3", "kl_clip": "none", "stats_every": "5"}
    )
    assert values["lr"] == 0.3
    assert values["damping"] == 1.0
    assert values["kl_clip"] is None
    assert values["stats_every"] == 5
    assert values["batch_size"] is None


def test_an_unknown_optimiser_is_refused() -> None:
    with pytest.raises(ExperimentError, match="unknown optimiser 'sdg'; known: sgd, adam, adamw, kfac"):
        get_optimizer("sdg")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimiser_is_built_with_its_values(name: str) -> None:
    if OPTIMIZERS[name].library is not None:
        pytest.importorskip(OPTIMIZERS[name].library[0])
    problem = get_problem("digits-mlp")
    key = "weight_decay" if OPTIMIZERS[name].closure else "lr"  # those that take a closure have no learning rate
    values = OPTIMIZERS[name].resolve({key: 0.125})
    optimizer = OPTIMIZERS[name].build(problem.model(0), problem, values, torch.Generator())
    assert [group[key] for group in optimizer.param_groups] == [0.125]


def test_batches_cover_each_epoch_once_and_depend_on_seed_and_step_alone() -> None:
    rows = torch.arange(10).float()
    data = Data(rows, rows, rows, rows)
    batches, again, other = Batches(data, 5, 0), Batches(data, 5, 0), Batches(data, 5, 1)
    epochs = [torch.cat([batches.at(2 * e)[0], batches.at(2 * e + 1)[0]]) for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch.tolist()) == rows.tolist()
    assert not torch.equal(epochs[0], epochs[1])
    assert torch.equal(again.at(4)[0], batches.at(4)[0])
    assert not torch.equal(other.at(0)[0], batches.at(0)[0])


def test_a_batch_larger_than_the_data_is_refused() -> None:
    rows = torch.zeros(10)
    with pytest.raises(ExperimentError, match="batch_size must be at most the 10 training examples, got 11"):
        Batches(Data(rows, rows, rows, rows), 11, 0)


@pytest.mark.parametrize("schedule", ["cosine", "exponential"])
def test_schedules_fall_from_one_to_the_final_factor(schedule: str) -> None:
    values = [factor(schedule, step / 10, 0.1) for step in range(11)]
    assert values[0] == pytest.approx(1.0)
    assert values[-1] == pytest.approx(0.1)
    assert values == sorted(values, reverse=True)
    assert factor("exponential", 0.5, 0.01) == pytest.approx(0.1)
    assert factor("constant", 0.5, 0.01) == 1.0


def test_the_average_of_iterates_is_bias_corrected_and_swapped_out_again() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    average = IterateAverage(model, 0.5)
    for value in (1.0, 2.0, 4.0):
        with torch.no_grad():
            model.weight.fill_(value)
        average.update()
    with average.applied():
        # (1/8 * 1 + 1/4 * 2 + 1/2 * 4) / (7/8)
        assert model.weight.item() == pytest.approx((0.125 + 0.5 + 2.0) / 0.875)
    assert model.weight.item() == 4.0
    restored = IterateAverage(model, 0.5)
    restored.load_state_dict(average.state_dict())
    with restored.applied():
        assert model.weight.item() == pytest.approx(3.0)
    with pytest.raises(ValueError, match="another network"):
        IterateAverage(torch.nn.Linear(2, 2), 0.5).load_state_dict(average.state_dict())


def test_without_decay_nothing_is_averaged() -> None:
    model = torch.nn.Linear(1, 1)
    average = IterateAverage(model, 0.0)
    average.update()
    before = model.weight.clone()
    with average.applied():
        assert torch.equal(model.weight, before)
