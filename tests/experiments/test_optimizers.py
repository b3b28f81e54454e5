from __future__ import annotations

import pytest
import torch

from kronfac.experiments.augmentation import augmented
from kronfac.experiments.averaging import IterateAverage
from kronfac.experiments.batches import Batches
from kronfac.experiments.errors import ExperimentError
from kronfac.experiments.optimizers import OPTIMIZERS, get_optimizer
from kronfac.experiments.problems import Data, get_problem
from kronfac.experiments.schedules import Schedule
from kronfac.optim.averaging import update_average


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
        ("kldwrm_so", {"kl_product": "none"}, "kldwrm_so.kl_product must be one of exact, approximate"),
        ("kldwrm_qe", {"model_approximation": "ekfac"}, "kldwrm_qe.model_approximation must be one of kfac, diagonal"),
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


def test_every_choice_of_kldwrm_is_a_hyperparameter() -> None:
    """The bound's product for all variants, and the model's blocks where there is a model."""
    problem, steps = get_problem("digits-mlp"), {"stats_every": "1", "solve": "iterative"}
    for name, given in (("so", {}), ("q", steps), ("qe", steps)):
        spec = get_optimizer(f"kldwrm_{name}")
        own = {"kl_product": "approximate"} | ({"model_approximation": "diagonal"} if given else {})
        optimizer = spec.build(problem.model(0), problem, spec.resolve(given, own), torch.Generator())
        assert optimizer._kl_product == "approximate"  # type: ignore[attr-defined]
        second = optimizer._second  # type: ignore[attr-defined]
        assert second.approximation.name == "diagonal" if given else second is None
    spec = get_optimizer("kldwrm_q")
    assert spec.resolve({"model_approximation": "none"})["model_approximation"] is None
    with pytest.raises(ExperimentError, match=r"kldwrm_q on digits-mlp: .*set solve='iterative'"):
        spec.build(problem.model(0), problem, spec.resolve({"model_approximation": "dense"}), torch.Generator())
    with pytest.raises(ExperimentError, match="kldwrm_so has no hyper-parameter 'model_approximation'"):
        get_optimizer("kldwrm_so").resolve({"model_approximation": "dense"})


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


def falling(kind: str, final: float = 0.1) -> Schedule:
    return Schedule.of(get_optimizer("sgd").resolve({"schedule": kind, "final_lr": final, "lr_drop_epochs": 3}))


@pytest.mark.parametrize("schedule", ["cosine", "exponential"])
def test_schedules_fall_from_one_to_the_final_factor(schedule: str) -> None:
    values = [falling(schedule).factor(step / 10, 0.0) for step in range(11)]
    assert values[0] == pytest.approx(1.0)
    assert values[-1] == pytest.approx(0.1)
    assert values == sorted(values, reverse=True)
    assert falling("exponential", 0.01).factor(0.5, 0.0) == pytest.approx(0.1)
    assert falling("constant").factor(0.5, 9.0) == 1.0


def test_steps_of_the_learning_rate_come_at_their_epochs_whatever_the_budget() -> None:
    assert [falling("step").factor(1.0, epoch) for epoch in (0, 2.99, 3, 5.9, 6)] == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01]
    )


def test_crops_and_mirror_images_are_pieces_of_the_padded_image_and_repeat() -> None:
    images = torch.arange(1.0, 2 * 3 * 4 * 5 + 1).reshape(2, 3, 4, 5)
    generator = torch.Generator()
    found = set()
    for seed in range(60):
        first = augmented(images, 1, True, generator.manual_seed(seed))
        assert torch.equal(first, augmented(images, 1, True, generator.manual_seed(seed)))
        padded = torch.nn.functional.pad(images, (1,) * 4)
        for index, image in enumerate(first):
            pieces = {
                (top, left, turned): piece.flip(-1) if turned else piece
                for top in range(3)
                for left in range(3)
                for turned in (False, True)
                for piece in [padded[index, :, top : top + 4, left : left + 5]]
            }
            found |= {key for key, piece in pieces.items() if torch.equal(piece, image)}
    assert len(found) == 18  # every crop, both ways round


def test_augmented_batches_depend_on_seed_and_step_alone_and_leave_labels() -> None:
    images, labels = torch.randn(10, 1, 6, 6), torch.arange(10)
    data = Data(images, labels, images, labels)
    plain, cropped = Batches(data, 5, 3), Batches(data, 5, 3, crop_padding=2, mirror=True)
    later = Batches(data, 5, 3, crop_padding=2, mirror=True).at(4)
    for step in range(5):
        inputs, targets = cropped.at(step)
        assert torch.equal(targets, plain.at(step)[1])
        assert not torch.equal(inputs, plain.at(step)[0])
    assert torch.equal(inputs, later[0])


def test_only_images_are_cropped() -> None:
    rows = torch.zeros(10, 4)
    with pytest.raises(ExperimentError, match=r"crops and mirroring are for images .* \[5, 4\]: leave crop_padding"):
        Batches(Data(rows, rows, rows, rows), 5, 0, mirror=True).at(0)


def test_the_average_of_iterates_is_the_optimisers_own_and_is_swapped_out_again() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    average = IterateAverage(model, 0.5)
    for value in (1.0, 2.0, 4.0):
        with torch.no_grad():
            model.weight.fill_(value)
        average.update()
    with average.applied():
        assert model.weight.item() == pytest.approx((1.5 + 4.0) / 2)  # the mean of two, then halves
    assert model.weight.item() == 4.0
    restored = IterateAverage(model, 0.5)
    restored.load_state_dict(average.state_dict())
    with restored.applied():
        assert model.weight.item() == pytest.approx(2.75)
    parameter = torch.nn.Parameter(torch.ones(1))
    state: dict[torch.Tensor, dict[str, torch.Tensor]] = {parameter: {}}
    for steps, value in enumerate((1.0, 2.0, 4.0)):
        parameter.data.fill_(value)
        update_average([parameter], state, 0.5, steps)
    assert state[parameter]["average"].item() == pytest.approx(2.75)
    with pytest.raises(ValueError, match="another network"):
        IterateAverage(torch.nn.Linear(2, 2), 0.5).load_state_dict(average.state_dict())


def test_without_decay_nothing_is_averaged() -> None:
    model = torch.nn.Linear(1, 1)
    average = IterateAverage(model, 0.0)
    average.update()
    before = model.weight.clone()
    with average.applied():
        assert torch.equal(model.weight, before)


def test_what_has_no_effect_beside_the_others_is_told() -> None:
    falls = {"lr_drop": "schedule", "lr_drop_epochs": "schedule"}
    spec = get_optimizer("tkfac")
    assert spec.without_effect(spec.resolve()) == {"final_lr": "schedule", "nu": "scheme", **falls}
    assert spec.without_effect(spec.resolve({"schedule": "cosine", "scheme": "trace_restricted"})) == falls
    assert spec.without_effect(spec.resolve({"schedule": "step"})) == {"final_lr": "schedule", "nu": "scheme"}
