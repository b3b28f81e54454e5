"""Likelihoods as users write them: terms of several outputs, labels of several numbers, Hessians of the labels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tests.exactness_helpers import block_errors, double, draw
from torch import Tensor, nn

import kronfac as kf
from kronfac.likelihoods import ElementwiseLikelihood, Likelihood


class Policy(Likelihood):
    """One term for each example: Gaussian actions whose mean and logarithm of the deviation are predicted."""

    def term_shape(self, outputs: Tensor, targets: object = None) -> torch.Size:
        return outputs.shape[:-1]

    def nll(self, outputs: Tensor, labels: Tensor) -> Tensor:
        mean, log = outputs.chunk(2, -1)
        return (0.5 * ((labels - mean) * (-log).exp()).square() + log).sum(-1)

    def sample_labels(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        mean, log = outputs.chunk(2, -1)
        return mean + log.exp() * torch.randn(mean.shape, generator=generator, dtype=mean.dtype)


class Enumerated(Policy):
    """The same of one action, with three labels that have the Gaussian's moments up to the fifth."""

    def label_atoms(self, outputs: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        mean, log = outputs.chunk(2, -1)
        for at, probability in ((-(3**0.5), 1 / 6), (0.0, 2 / 3), (3**0.5, 1 / 6)):
            yield torch.full_like(mean[..., 0], probability), mean + at * log.exp()


class Diagonal(ElementwiseLikelihood):
    """The same, action by action: the Fisher information is diagonal."""

    def term_shape(self, outputs: Tensor, targets: object = None) -> torch.Size:
        return torch.Size((*outputs.shape[:-1], outputs.shape[-1] // 2))

    def nll(self, outputs: Tensor, labels: Tensor) -> Tensor:
        mean, log = outputs.chunk(2, -1)
        return 0.5 * ((labels - mean) * (-log).exp()).square() + log

    sample_labels = Policy.sample_labels

    def curvature(self, outputs: Tensor) -> Tensor:
        log = outputs.chunk(2, -1)[1]
        return torch.cat([(-2 * log).exp(), torch.full_like(log, 2.0)], -1)


class Masked(Diagonal):
    """With a place of its terms among the outputs."""

    def over_outputs(self, terms: Tensor, outputs: Tensor) -> Tensor:
        return torch.cat([terms, terms], -1)


def network(outputs: int = 2) -> nn.Module:
    return double(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs)))


def fisher_by_hand(model: nn.Module, x: Tensor, weights: Tensor | None = None) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for index, example in enumerate(x):
        z = model(example)
        rows = [torch.autograd.grad(value, list(model.parameters()), retain_graph=True) for value in z]
        jacobian = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
        log = z.detach().chunk(2)[1]
        diagonal = torch.cat([(-2 * log).exp(), torch.full_like(log, 2.0)])
        scale = 1.0 if weights is None else weights[index].repeat(2)
        total = total + jacobian.T @ ((diagonal * scale).unsqueeze(1) * jacobian)
    return total / len(x)


def test_labels_of_a_term_may_be_several_numbers() -> None:
    outputs, labels, mask = draw(5, 4), draw(5, 2, seed=1), torch.tensor([True, False, True, True, False])
    policy = Policy()
    mean, log = outputs.chunk(2, -1)
    terms = (
        -torch.distributions.Normal(mean, log.exp()).log_prob(labels).sum(-1)
        - torch.tensor(torch.pi * 2).log().double()
    )
    torch.testing.assert_close(policy.loss(outputs, labels), terms.mean(), rtol=1e-6, atol=0)
    labels[~mask] = torch.nan
    policy.validate(outputs, (labels, mask))
    torch.testing.assert_close(policy.loss(outputs, (labels, mask)), terms[mask].sum() / 5, rtol=1e-6, atol=0)
    for wrong in (draw(4, 2), draw(2, 5), draw(1, 5)):
        with pytest.raises(ValueError, match="do not fit outputs"):
            policy.loss(outputs, wrong)
    with pytest.raises(ValueError, match="do not fit outputs"):  # one number for each output, and no more
        kf.Gaussian().loss(outputs, draw(5, 4, 1))


@pytest.mark.parametrize("likelihood", [Enumerated(), Diagonal()])
def test_all_that_is_exact_is_the_fisher_information(likelihood: Likelihood) -> None:
    model, x, y = network(), draw(6, 3), draw(6, 1, seed=1)
    wanted = fisher_by_hand(model, x)
    for targets in (None, y):
        operator = kf.GaussNewtonOperator(model, likelihood, (x, targets))
        assert float((operator.to_dense() - wanted).abs().max()) < 1e-13
    dense = kf.estimate(model, likelihood, (x, y), approximation="dense", source="exact")
    assert max(block_errors(dense, model, wanted).values()) < 1e-12


def test_the_oracle_takes_the_expectation_over_labels() -> None:
    model, x, y = network(), draw(6, 3), draw(6, 1, seed=1)
    wanted = fisher_by_hand(model, x)
    assert float((kf.reference.ggn(model, Enumerated(), x) - wanted).abs().max()) < 1e-13
    assert float((kf.reference.fisher(model, Enumerated(), x) - wanted).abs().max()) < 1e-13
    at_targets = kf.reference.ggn(model, Enumerated(), x, y)  # is of these targets
    assert float((at_targets - wanted).abs().max()) > 1e-2
    with pytest.raises(ValueError, match=r"implement Policy\.label_atoms"):
        kf.reference.ggn(model, Policy(), x)


def test_verify_compares_with_the_expectation() -> None:
    model, x, y = network(), draw(6, 3), draw(6, 1, seed=1)
    kf.verify(model, Enumerated(), (x, y), source="exact").raise_if(scale=1e-9)
    kf.verify(model, Enumerated(), (x, y)).raise_if(scale=0.01)
    with pytest.raises(ValueError, match=r"implement Policy\.label_atoms"):
        kf.verify(model, Policy(), (x, y))

    class Wrong(Enumerated):
        def sample_labels(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
            return outputs[..., :1] + 2 * (super().sample_labels(outputs, generator) - outputs[..., :1])

    with pytest.raises(kf.VerificationError, match="cotangents of the outputs"):
        kf.verify(model, Wrong(), (x, y)).raise_if(scale=0.01)


def test_masks_reach_the_outputs_of_a_term() -> None:
    model, x = network(4), draw(6, 3)
    mask = torch.rand(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = kf.GaussNewtonOperator(model, Masked(), [(x, (None, mask))]).to_dense()
    assert float((found - fisher_by_hand(model, x, mask)).abs().max()) < 1e-13
    for source in ("sampled", "exact"):
        with pytest.raises(ValueError, match=r"implement Diagonal\.over_outputs"):
            kf.estimate(model, Diagonal(), [(x, (None, mask))], source=source)


def test_a_clip_needs_no_targets_where_labels_are_enumerated() -> None:
    model, x, y = network(), draw(6, 3), draw(6, 1, seed=1)
    # The exact product is of the first quarter of the batch, of two examples at least.
    matrix = fisher_by_hand(model, x[:2])
    optimizer = kf.optim.KFAC(model, Enumerated(), lr=0.1, damping=1e-2, kl_clip=1e-4)
    Enumerated().loss(model(x), y).backward()
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    optimizer.step()
    step = nn.utils.parameters_to_vector(model.parameters()).detach() - before
    assert float(step @ matrix @ step) == pytest.approx(1e-4, rel=1e-8)


def test_weights_that_depend_on_the_label_count_in_products() -> None:
    class Weighted(Enumerated):
        needs_targets = True  # type: ignore[assignment]

        def label_weights(self, outputs: Tensor, labels: Tensor | None) -> Tensor | None:
            return None if labels is None else 1.0 + (labels[..., 0] > 0).to(outputs.dtype)

    outputs, labels, vector = draw(6, 2), draw(6, 1, seed=1), draw(6, 2, seed=2)
    weights = 1.0 + (labels > 0).double()
    diagonal = torch.stack([(-2 * outputs[:, 1]).exp(), torch.full((6,), 2.0, dtype=torch.float64)], 1)
    found = Weighted().hessian_product(outputs, vector, labels)
    torch.testing.assert_close(found, weights * diagonal * vector, rtol=1e-12, atol=1e-14)
    columns = list(Weighted().root_columns(outputs, labels))
    product = sum(c * (c * vector).sum(1, keepdim=True) for c in columns)
    torch.testing.assert_close(product, found, rtol=1e-12, atol=1e-14)
