from __future__ import annotations

import pytest
import torch
from torch import nn

from kronfac.experiments.datasets.base import Dataset, Split
from kronfac.experiments.models import ResNet, autoencoder, kfc_network
from kronfac.experiments.optimizers import get_optimizer
from kronfac.experiments.problems import PROBLEMS, get_problem

SHAPES = {
    "digits": (1, 8, 8),
    "curves": (1, 28, 28),
    "faces": (1, 25, 25),
    "mnist": (1, 28, 28),
    "fashion_mnist": (1, 28, 28),
}


def small_dataset(name: str) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    shape, classes = SHAPES.get(name, (3, 32, 32)), 100 if name == "cifar100" else 10
    levels = 16 if name == "digits" else 255
    images = torch.randint(0, levels + 1, (6, *shape), dtype=torch.uint8, generator=generator)
    split = Split(images, torch.randint(0, classes, (6,), generator=generator))
    return Dataset(name, split, split, classes, levels)


@pytest.mark.parametrize("name", PROBLEMS)
def test_problem_fits_together(name: str) -> None:
    problem = get_problem(name)
    data = problem.data() if problem.dataset is None else problem.prepare(small_dataset(problem.dataset))  # type: ignore[call-arg, arg-type]
    model = problem.model(seed=0)
    metrics = problem.evaluate(model, data)
    assert list(metrics) == problem.metrics
    assert problem.metric in metrics
    loss = problem.loss(model(data.train_inputs), data.train_targets)
    likelihood = problem.likelihood()
    outputs = model.eval()(data.train_inputs)
    torch.testing.assert_close(
        likelihood.loss(outputs, data.train_targets), problem.loss(outputs, data.train_targets), rtol=1e-5, atol=1e-5
    )
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", PROBLEMS)
def test_tuned_hyperparameters_are_valid(name: str) -> None:
    for optimizer, values in PROBLEMS[name].tuned.items():
        get_optimizer(optimizer).resolve(values)


def test_models_depend_on_the_seed_alone() -> None:
    problem = get_problem("digits-mlp")
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = problem.model(5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    two, other = problem.model(5), problem.model(6)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(next(one.parameters()), next(other.parameters()))


def test_evaluation_averages_over_examples_and_restores_the_mode() -> None:
    problem = get_problem("digits-cnn")
    data = problem.data()
    model = problem.model(0)
    metrics = problem.evaluate(model, data)
    assert model.training
    with torch.no_grad():
        outputs = model.eval()(data.test_inputs)
    assert metrics["test_loss"] == pytest.approx(problem.loss(outputs, data.test_targets).item(), rel=1e-5)
    wrong = (outputs.argmax(1) != data.test_targets).float().mean().item()
    assert metrics["test_error"] == pytest.approx(100 * wrong)


def test_the_autoencoder_is_mirrored_with_a_linear_code() -> None:
    model = autoencoder((784, 1000, 500, 250, 30))
    widths = [layer.out_features for layer in model if isinstance(layer, nn.Linear)]
    assert widths == [1000, 500, 250, 30, 250, 500, 1000, 784]
    kinds = [type(layer).__name__ for layer in model]
    assert kinds.count("ReLU") == 6
    assert kinds[6:8] == ["Linear", "Linear"]  # no ReLU after the code
    assert kinds[-1] == "Linear"


def test_the_kfc_network_has_maps_of_16_8_and_4() -> None:
    sizes = []
    x = torch.zeros(1, 3, 32, 32)
    for layer in kfc_network():
        x = layer(x)
        if isinstance(layer, nn.MaxPool2d | nn.AvgPool2d):
            sizes.append(tuple(x.shape[1:]))
    assert sizes == [(32, 16, 16), (32, 8, 8), (64, 4, 4)]
    assert x.shape == (1, 10)


def test_resnet20_has_the_published_number_of_parameters() -> None:
    # He et al. state 0.27 M; option A's shortcuts have none.
    assert sum(p.numel() for p in ResNet(3).parameters()) == 269_722


def test_pooling_of_one_kind() -> None:
    x = torch.zeros(1, 3, 32, 32)
    for pooling, kinds in {"published": "MAA", "max": "MMM", "average": "AAA"}.items():
        net = kfc_network(pooling=pooling)
        assert "".join(type(layer).__name__[0] for layer in net if "Pool" in type(layer).__name__) == kinds
        assert net(x).shape == (1, 10)
    with pytest.raises(ValueError, match="pooling='min' is unknown"):
        kfc_network(pooling="min")
