from __future__ import annotations

import pytest
import torch

from kronfac.continual import GradientNorms, RunningMeans, balance


def test_both_losses_get_one_magnitude_and_no_gradient_flows_through_the_factors() -> None:
    task, old = torch.tensor(2.0, requires_grad=True), torch.tensor(0.05, requires_grad=True)
    result = balance(task, old, 3)
    assert (result.lambda_task, result.lambda_penalty) == (0.25, 0.75)
    torch.testing.assert_close(result.alpha_penalty * old.detach(), result.alpha_task * task.detach())
    assert result.alpha_task.item() == 1.0
    torch.testing.assert_close(result.loss.item(), 0.25 * 2.0 + 0.75 * 2.0)
    result.loss.backward()
    assert task.grad.item() == 0.25
    torch.testing.assert_close(old.grad.item(), 40.0 * 0.75)


def test_the_larger_one_may_be_the_penalty() -> None:
    result = balance(torch.tensor(0.1), torch.tensor(4.0), 1)
    torch.testing.assert_close(result.alpha_task.item(), 40.0)
    assert result.alpha_penalty.item() == 1.0


def test_a_penalty_of_zero_is_limited() -> None:
    result = balance(torch.tensor(2.0), torch.tensor(0.0, requires_grad=True), 1, limit=10.0)
    assert result.alpha_penalty.item() == 10.0
    assert torch.isfinite(result.loss)
    plain = balance(torch.tensor(2.0), torch.tensor(0.5), 1, adaptive=False)
    assert plain.loss.item() == 1.25


def test_a_loss_below_zero_has_the_magnitude_of_its_size() -> None:
    """Such as that of a density; the factor of a loss below zero was always the limit."""
    below, above = (balance(torch.tensor(loss), torch.tensor(0.5), 1) for loss in (-2.0, 2.0))
    assert below.alpha_task.item() == above.alpha_task.item() == 1.0
    assert below.alpha_penalty.item() == above.alpha_penalty.item() == 4.0
    assert below.loss.item() == 0.5 * -2.0 + 0.5 * 4.0 * 0.5


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((1.0, torch.tensor(1.0), 1), TypeError, "task_loss must be a tensor"),
        ((torch.tensor(1.0), torch.ones(2), 1), ValueError, "penalty must be a scalar"),
        ((torch.tensor(1.0), torch.tensor(1.0), 0), ValueError, "tasks must be at least 1"),
        ((torch.tensor(1.0), torch.tensor(1.0), 1.5), TypeError, "tasks must be an integer"),
        ((torch.tensor(1), torch.tensor(1.0), 1), TypeError, "task_loss must be of floating point"),
    ],
)
def test_bad_input(arguments: tuple[object, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        balance(*arguments)


def test_bad_limit() -> None:
    with pytest.raises(ValueError, match="limit must be at least 1"):
        balance(torch.tensor(1.0), torch.tensor(1.0), 1, limit=0.5)


def test_running_means_do_not_follow_single_steps() -> None:
    means = RunningMeans(0.5)
    task = torch.tensor(2.0, requires_grad=True)
    first = balance(task, torch.tensor(0.5), 1, magnitudes=means)
    assert first.alpha_penalty.item() == 4.0  # of one step: as without means
    second = balance(task, torch.tensor(2.0), 1, magnitudes=means)
    torch.testing.assert_close(second.alpha_penalty.item(), 2.0 / ((0.5 * 0.5 + 2.0) / 1.5))
    assert not second.alpha_penalty.requires_grad
    for bad in (1.0, -0.1):
        with pytest.raises(ValueError, match="decay must be"):
            RunningMeans(bad)


def test_gradient_norms_make_both_pull_alike() -> None:
    w, free = torch.tensor([3.0, 4.0], requires_grad=True), torch.tensor(1.0, requires_grad=True)
    task, penalty = (w * w).sum() + free, 0.05 * w.sum()
    result = balance(task, penalty, 1, magnitudes=GradientNorms([w, free, torch.ones(2)]))
    norms = [torch.tensor(x).norm().item() for x in ([6.0, 8.0, 1.0], [0.05, 0.05])]
    torch.testing.assert_close(result.alpha_penalty.item(), min(100.0, norms[0] / norms[1]))
    half = balance(task, 10 * penalty, 1, magnitudes=GradientNorms([w, free]))
    torch.testing.assert_close(half.alpha_penalty.item(), norms[0] / (10 * norms[1]))
    half.loss.backward()
    torch.testing.assert_close(w.grad, 0.5 * torch.tensor([6.0, 8.0]) + 0.5 * half.alpha_penalty * 0.5)
    with pytest.raises(ValueError, match="requires a gradient"):
        GradientNorms([torch.ones(2)])


def test_a_penalty_without_gradient_is_limited() -> None:
    w = torch.tensor([3.0, 4.0], requires_grad=True)
    result = balance(w.sum(), 0.0 * (w * w).sum(), 1, magnitudes=GradientNorms([w]), limit=10.0)
    assert result.alpha_penalty.item() == 10.0
