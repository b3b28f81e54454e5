"""The losses are torch's, for every option, and their gradients are autograd's."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kronfac.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood, likelihood_of

CLASSES = 4
SHAPES = {"plain": (6, CLASSES), "sequence": (5, CLASSES, 3), "image": (2, CLASSES, 3, 2)}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def rand(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(*shape, generator=generator(seed), dtype=torch.float64)


def check_gradient(likelihood: Likelihood, outputs: Tensor, targets: object) -> None:
    leaf = outputs.clone().requires_grad_()
    (expected,) = torch.autograd.grad(likelihood.sum_loss(leaf, targets), leaf)
    torch.testing.assert_close(likelihood.target_cotangents(outputs, targets), expected)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("last", [False, True], ids=["classes second", "classes last"])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_categorical_is_cross_entropy(shape: tuple[int, ...], last: bool, kind: str) -> None:
    outputs = randn(*shape)
    terms = outputs.select(1, 0).shape
    for weighted, ignored, smoothing, reduction in itertools.product(
        (False, True), (None, -100, 2), (0.0, 0.3, 1.0), ("mean", "sum")
    ):
        weight = rand(CLASSES) if weighted else None
        if kind == "indices":
            targets = torch.randint(0, CLASSES, terms, generator=generator(3))
            if ignored is not None:
                targets[0] = ignored
        elif ignored == 2:
            continue
        else:
            targets = rand(*shape)
        options = {"weight": weight, "label_smoothing": smoothing, "reduction": reduction}
        expected = F.cross_entropy(outputs, targets, ignore_index=-100 if ignored is None else ignored, **options)
        moved = outputs.movedim(1, -1) if last else outputs
        moved_targets = targets.movedim(1, -1) if last and kind == "probabilities" else targets
        likelihood = Categorical(ignore_index=ignored, class_dim=-1 if last else 1, **options)
        likelihood.validate(moved, moved_targets)
        torch.testing.assert_close(likelihood.loss(moved, moved_targets), expected, rtol=1e-13, atol=1e-13)
        check_gradient(likelihood, moved, moved_targets)
        if kind == "indices":
            inferred = Categorical(ignore_index=ignored, **options)
            torch.testing.assert_close(inferred.loss(moved, targets), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("weight_shape", [None, (3,), (4, 1), (4, 3)])
@pytest.mark.parametrize("positive_shape", [None, (3,), (1,)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_bernoulli_is_binary_cross_entropy(weight_shape: object, positive_shape: object, reduction: str) -> None:
    outputs = 10 * randn(4, 3)
    targets = rand(4, 3)
    options = {
        "weight": None if weight_shape is None else rand(*weight_shape, seed=2),
        "pos_weight": None if positive_shape is None else 3 * rand(*positive_shape, seed=4),
        "reduction": reduction,
    }
    expected = F.binary_cross_entropy_with_logits(outputs, targets, **options)
    likelihood = Bernoulli(**options)
    likelihood.validate(outputs, targets)
    torch.testing.assert_close(likelihood.loss(outputs, targets), expected, rtol=1e-14, atol=1e-14)
    check_gradient(likelihood, outputs, targets)


def test_bernoulli_keeps_its_digits_far_out() -> None:
    outputs = torch.tensor([[-40.0, 40.0]], dtype=torch.float64)
    expected = torch.full_like(outputs, 40.0).neg().exp()
    torch.testing.assert_close(Bernoulli().curvature(outputs), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(Bernoulli().nll(outputs, (outputs > 0).double()), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("shape", [(7,), (4, 3), (2, 3, 2)])
def test_gaussian_is_squared_error(shape: tuple[int, ...], reduction: str) -> None:
    outputs, targets = randn(*shape), randn(*shape, seed=5)
    likelihood = Gaussian(variance=0.5, reduction=reduction)
    expected = F.mse_loss(outputs, targets, reduction=reduction)
    torch.testing.assert_close(likelihood.loss(outputs, targets), expected, rtol=1e-14, atol=1e-14)
    check_gradient(likelihood, outputs, targets)
    torch.testing.assert_close(Gaussian(variance=2.0, reduction=reduction).loss(outputs, targets), expected / 4)


@pytest.mark.parametrize("likelihood", [Categorical, Bernoulli, Gaussian])
def test_batchmean_divides_by_the_batch_alone(likelihood: type[Likelihood]) -> None:
    outputs = randn(4, 3, 2)
    targets = torch.randint(0, 2, (4, 2), generator=generator(3)) if likelihood is Categorical else rand(4, 3, 2)
    batchmean, total = likelihood(reduction="batchmean"), likelihood(reduction="sum")
    torch.testing.assert_close(batchmean.loss(outputs, targets), total.loss(outputs, targets) / 4)
    assert batchmean.denominator(outputs, targets) == 4
    assert total.denominator(outputs, targets) == 1


@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum"])
@pytest.mark.parametrize("kind", ["boolean", "weights", "per example"])
def test_masked_terms_count_nowhere(reduction: str, kind: str) -> None:
    """A mask is the same as leaving the terms out, whatever stands in their targets."""
    outputs = randn(5, 3, CLASSES)
    mask = rand(5, 3, seed=8) > 0.4
    weights = mask.double()
    if kind == "weights":
        weights = weights * rand(5, 3, seed=9)
    elif kind == "per example":
        mask, weights = mask[:, 0], mask[:, :1].double().expand(5, 3)
    given = weights if kind == "weights" else mask
    kept = weights != 0
    for likelihood, labels, garbage in (
        (Categorical(weight=rand(CLASSES), label_smoothing=0.1, class_dim=-1, reduction=reduction), None, -7),
        (Categorical(class_dim=-1, reduction=reduction), rand(5, 3, CLASSES), torch.nan),
        (Bernoulli(pos_weight=rand(1), reduction=reduction), rand(5, 3, CLASSES), torch.nan),
        (Gaussian(reduction=reduction), randn(5, 3, CLASSES), torch.inf),
    ):
        targets = torch.randint(0, CLASSES, (5, 3), generator=generator(3)) if labels is None else labels
        targets = targets.clone()
        terms = torch.stack(
            [
                type(likelihood).sum_loss(
                    likelihood, outputs[n, t].reshape(1, 1, -1), targets[n, t].reshape(1, 1, *targets.shape[2:])
                )
                for n in range(5)
                for t in range(3)
            ]
        ).reshape(5, 3)
        targets[~kept] = garbage
        likelihood.validate(outputs, (targets, given))
        total = (terms * weights).sum()
        torch.testing.assert_close(likelihood.sum_loss(outputs, (targets, given)), total)
        if reduction == "mean":
            elements = 1 if isinstance(likelihood, Categorical) else CLASSES
            per_term = weights * elements
            if isinstance(likelihood, Categorical) and likelihood.weight is not None:
                per_term = weights * likelihood.weight[targets.clamp(min=0)]
            total = total / per_term.sum()
        elif reduction == "batchmean":
            total = total / 5
        torch.testing.assert_close(likelihood.loss(outputs, [targets, given]), total)
        check_gradient(likelihood, outputs, (targets, given))
        vector = randn(*outputs.shape, seed=11)
        assert not likelihood.hessian_product(outputs, vector, (targets, given))[~kept].any()
        assert not likelihood.sample_cotangents(outputs, (targets, given), generator())[~kept].any()


def test_half_precision_is_raised() -> None:
    outputs = randn(4, 3).bfloat16()
    likelihood = Categorical()
    targets = torch.tensor([0, 1, 2, 0])
    assert likelihood.loss(outputs, targets).dtype == torch.float32
    assert likelihood.sample_cotangents(outputs, generator=generator()).dtype == torch.float32
    assert likelihood.hessian_product(outputs, outputs).dtype == torch.float32
    assert Bernoulli().probe_cotangents(outputs.half(), generator=generator()).dtype == torch.float32
    torch.testing.assert_close(likelihood.loss(outputs, targets), F.cross_entropy(outputs.float(), targets))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_likelihood_of_a_loss_module(reduction: str) -> None:
    weight, outputs = rand(CLASSES), randn(6, CLASSES)
    classes = torch.randint(0, CLASSES, (6,), generator=generator(1))
    dense = rand(6, CLASSES)
    for module, targets in (
        (nn.CrossEntropyLoss(weight, label_smoothing=0.1, reduction=reduction), classes),
        (nn.CrossEntropyLoss(ignore_index=2, reduction=reduction), classes),
        (nn.BCEWithLogitsLoss(weight, pos_weight=2 * weight, reduction=reduction), dense),
        (nn.MSELoss(reduction=reduction), dense),
    ):
        torch.testing.assert_close(likelihood_of(module).loss(outputs, targets), module(outputs, targets))


def test_likelihood_of_drops_only_torchs_default_index() -> None:
    assert likelihood_of(nn.CrossEntropyLoss()).ignore_index is None
    assert likelihood_of(nn.CrossEntropyLoss(ignore_index=3)).ignore_index == 3
    assert likelihood_of(nn.CrossEntropyLoss()).class_dim == 1


def test_likelihood_of_refuses_what_it_does_not_know() -> None:
    class Focal(nn.CrossEntropyLoss):
        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            return super().forward(input, target) ** 2

    class Renamed(nn.CrossEntropyLoss):
        pass

    assert isinstance(likelihood_of(Renamed()), Categorical)
    for module in (Focal(), nn.L1Loss()):
        with pytest.raises(TypeError, match=f"{type(module).__name__} is not a loss.*CrossEntropyLoss"):
            likelihood_of(module)
    with pytest.raises(ValueError, match="'none'"):
        likelihood_of(nn.MSELoss(reduction="none"))


def test_likelihood_of_refuses_a_module_whose_forward_was_replaced() -> None:
    module = nn.MSELoss()
    module.forward = lambda outputs, targets: 2 * (outputs - targets).square().mean()
    with pytest.raises(TypeError, match="MSELoss is not a loss whose likelihood is known"):
        likelihood_of(module)
