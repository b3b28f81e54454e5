from __future__ import annotations

import pytest
import torch
from tests.experiments.test_problems import small_dataset
from torch import nn

from kronfac.experiments import ExperimentError, get_problem
from kronfac.experiments.problems.base import Data
from kronfac.experiments.subject import settle_batch_norm, train_subject, training_settings


def test_batch_norm_gets_the_statistics_of_the_examples() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1))
    x = 5 + 2 * torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    settle_batch_norm(model, x)
    norm = model[0]
    torch.testing.assert_close(norm.running_mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, x.var((0, 2, 3)))
    assert norm.momentum == 0.1
    assert model.training


def test_the_subject_is_in_evaluation_mode_after_as_many_steps_as_asked_for() -> None:
    problem = get_problem("digits-mlp")
    data, heard = problem.data(), []
    settings = training_settings(problem, "sgd", {}, 3, seed=1)
    state = torch.get_rng_state()
    subject = train_subject(problem, settings, data, 3, 5, lambda step, loss: heard.append(step))
    assert heard == [1, 2, 3]
    assert torch.equal(torch.get_rng_state(), state)
    assert not subject.model.training
    assert torch.equal(subject.batch[0], data.train_inputs[:5])
    again = train_subject(problem, settings, data, 3, 5)
    for one, other in zip(subject.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_residual_network_is_analysed_with_settled_statistics() -> None:
    problem = get_problem("cifar10-resnet8")
    data: Data = problem.prepare(small_dataset("cifar10"))
    settings = training_settings(problem, "adam", {"batch_size": 2}, 0, 0)
    subject = train_subject(problem, settings, data, 0, 4)
    assert float(subject.model.norm.running_mean.abs().max()) > 0  # type: ignore[union-attr]
    with pytest.raises(ExperimentError, match="examples must be from 1 to the 6"):
        train_subject(problem, settings, data, 0, 7)


def test_divergence_is_named() -> None:
    problem = get_problem("digits-mlp")
    settings = training_settings(problem, "sgd", {"lr": 1e9}, 30, seed=0)
    with pytest.raises(ExperimentError, match=r"sgd diverged at step .* of digits-mlp"):
        train_subject(problem, settings, problem.data(), 30, 5)
