"""``Joint``: several heads, whose loss and curvature are the sums of their own."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from tests.exactness_helpers import block_errors, double, draw
from torch import Tensor, nn
from torch.nn import functional as F

import kronfac as kf
from kronfac.likelihoods import ElementwiseLikelihood, Joint


class Policy(ElementwiseLikelihood):
    """Gaussians with a predicted mean and logarithm of the deviation, whose Hessian depends on the label."""

    def term_shape(self, outputs: Tensor, targets: object = None) -> torch.Size:
        return torch.Size((*outputs.shape[:-1], outputs.shape[-1] // 2))

    def over_outputs(self, terms: Tensor, outputs: Tensor) -> Tensor:
        return torch.cat([terms, terms], -1)

    def nll(self, outputs: Tensor, labels: Tensor) -> Tensor:
        mean, log = outputs.chunk(2, -1)
        return 0.5 * ((labels - mean) / log.exp()).square() + log

    def sample_labels(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        mean, log = outputs.chunk(2, -1)
        return mean + log.exp() * torch.randn(mean.shape, generator=generator, dtype=mean.dtype)

    def curvature(self, outputs: Tensor) -> Tensor:
        log = outputs.chunk(2, -1)[1]
        return torch.cat([(-2 * log).exp(), torch.full_like(log, 2.0)], -1)

    def label_atoms(self, outputs: Tensor):  # type: ignore[no-untyped-def]
        mean, log = outputs.chunk(2, -1)
        for at, probability in ((-(3**0.5), 1 / 6), (0.0, 2 / 3), (3**0.5, 1 / 6)):
            yield torch.full_like(mean, probability), mean + at * log.exp()


def two(reduction: str = "batchmean") -> Joint:
    return Joint(
        (kf.Categorical(reduction=reduction), 3),
        (kf.Gaussian(0.7, reduction=reduction), 2),
        (Policy(reduction=reduction), 4),
        weights=(1.0, 0.5, 2.0),
    )


def network(width: int = 9) -> nn.Module:
    return double(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, width)))


def labels_of(outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    shape = outputs.shape[:-1]
    return torch.arange(shape.numel()).reshape(shape) % 3, draw(*shape, 2, seed=1), draw(*shape, 2, seed=2)


def by_hand(outputs: Tensor, labels: tuple[Tensor, Tensor, Tensor], divide: Callable[[Tensor], Tensor]) -> Tensor:
    """The sum of torch's own losses, which `divide` adds up."""
    classes, values, actions = labels
    entropies = F.cross_entropy(outputs[..., :3].movedim(-1, 1), classes, reduction="none")
    squares = (outputs[..., 3:5] - values).square() / 1.4
    mean, log = outputs[..., 5:7], outputs[..., 7:]
    policy = -torch.distributions.Normal(mean, log.exp()).log_prob(actions) - 0.5 * math.log(2 * math.pi)
    return divide(entropies) + 0.5 * divide(squares) + 2.0 * divide(policy)


@pytest.mark.parametrize("shape", [(6, 9), (4, 3, 9)])
@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum"])
def test_the_loss_is_the_sum_of_the_heads(reduction: str, shape: tuple[int, ...]) -> None:
    outputs, joint = draw(*shape), two(reduction)
    labels = labels_of(outputs)
    found = joint.loss(outputs, joint.targets(*labels))
    divide = {"mean": torch.mean, "batchmean": lambda t: t.sum() / shape[0], "sum": torch.sum}[reduction]
    torch.testing.assert_close(found, by_hand(outputs, labels, divide), rtol=1e-12, atol=0)
    cotangents = joint.target_cotangents(outputs, joint.targets(*labels)) / joint.denominator(outputs)
    leaf = outputs.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(by_hand(leaf, labels, divide), leaf)
    torch.testing.assert_close(cotangents, gradient, rtol=1e-10, atol=1e-14)


def fisher_by_hand(model: nn.Module, x: Tensor) -> Tensor:
    """Sum of the heads' Fisher informations, each from its closed form and a Jacobian by autograd."""
    outputs = model(x)
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(z, list(model.parameters()), retain_graph=True)])
        for z in outputs.flatten()
    ]
    jacobian = torch.stack(rows).reshape(len(x), 9, -1)
    total = torch.zeros(jacobian.shape[-1], jacobian.shape[-1], dtype=torch.float64)
    for z, j in zip(outputs.detach(), jacobian, strict=True):
        p = z[:3].softmax(0)
        parts = [torch.diag(p) - torch.outer(p, p), 0.5 * torch.eye(2, dtype=z.dtype) / 0.7]
        parts += [torch.diag(2.0 * (-2 * z[7:]).exp()), 4.0 * torch.eye(2, dtype=z.dtype)]
        total += j.T @ torch.block_diag(*parts) @ j
    return total / len(x)


def test_the_curvature_is_the_fisher_information_of_all_heads() -> None:
    model, x, joint = network(), draw(5, 3), two()
    wanted = fisher_by_hand(model, x)
    assert float((kf.reference.fisher(model, joint, x) - wanted).abs().max()) < 1e-13
    assert float((kf.reference.ggn(model, joint, x) - wanted).abs().max()) < 1e-13
    assert float((kf.GaussNewtonOperator(model, joint, (x, None)).to_dense() - wanted).abs().max()) < 1e-13
    dense = kf.estimate(model, joint, (x, None), approximation="dense", source="exact")
    assert max(block_errors(dense, model, wanted).values()) < 1e-12
    alone = kf.estimate(model, joint, (x[:1], None), source="exact")  # K-FAC is exact for a single datum
    assert max(block_errors(alone, model, fisher_by_hand(model, x[:1])).values()) < 1e-12


@pytest.mark.parametrize("source", ["sampled", "root"])
def test_cotangents_have_the_second_moment_of_the_loss(source: str) -> None:
    outputs, joint = draw(400, 3, 9) * 0 + draw(9), two()
    generator = torch.Generator().manual_seed(0)
    pull = joint.sample_cotangents if source == "sampled" else joint.probe_cotangents
    found = pull(outputs, None, generator).reshape(-1, 9)
    exact = sum(torch.einsum("bi,bj->ij", c[:1, 0], c[:1, 0]) for c in joint.root_columns(outputs))
    assert isinstance(exact, Tensor)
    assert float((found.T @ found / len(found) - exact).norm() / exact.norm()) < 0.1
    unit = torch.eye(9, dtype=torch.float64)
    products = torch.stack([joint.hessian_product(outputs[:1, :1], u.reshape(1, 1, 9)).flatten() for u in unit])
    torch.testing.assert_close(products, exact, rtol=1e-10, atol=1e-12)


def test_positions_have_columns_of_their_own() -> None:
    outputs, joint = draw(2, 3, 9), two("mean")
    columns = list(joint.root_columns(outputs))
    matrix = sum(torch.einsum("bi,bj->bij", c.flatten(1), c.flatten(1)) for c in columns)
    assert isinstance(matrix, Tensor)
    for unit in torch.eye(27, dtype=torch.float64):
        product = joint.hessian_product(outputs, unit.reshape(1, 3, 9).expand(2, 3, 9))
        torch.testing.assert_close(product.flatten(1), matrix @ unit, rtol=1e-10, atol=1e-12)


def test_masked_terms_count_nowhere() -> None:
    model, x, joint = network(), draw(6, 3), two()
    labels = labels_of(model(x))
    mask = torch.ones(6, 5)
    mask[2:, 1:3] = 0
    labels[1][2:] = torch.nan
    targets = (joint.targets(*labels), mask)
    outputs = model(x).detach()
    entropies = F.cross_entropy(outputs[:, :3], labels[0], reduction="sum")
    squares = (outputs[:2, 3:5] - labels[1][:2]).square().sum() / 1.4
    policy = Policy("sum").loss(outputs[:, 5:], labels[2])
    torch.testing.assert_close(joint.loss(outputs, targets), (entropies + 0.5 * squares + 2 * policy) / 6)
    matrix = kf.reference.fisher(model, joint, x, targets)
    assert float((kf.GaussNewtonOperator(model, joint, [(x, targets)]).to_dense() - matrix).abs().max()) < 1e-13
    joint.validate(outputs, targets)
    with pytest.raises(ValueError, match="NaN"):
        joint.validate(outputs, targets[0])
    with pytest.raises(ValueError, match="batchmean"):
        two("mean").validate(outputs, targets)


def test_divergences_are_half_the_form_to_second_order() -> None:
    joint = Joint((kf.Categorical(), 3), (kf.Gaussian(0.7), 2), weights=(1.0, 0.5))
    outputs, step = draw(4, 3, 5), 1e-4 * draw(4, 3, 5, seed=1)
    form = (step * joint.hessian_product(outputs, step)).sum() / joint.denominator(outputs)
    for divergence in (joint.kl, joint.symmetric_kl):
        torch.testing.assert_close(divergence(outputs, outputs + step), 0.5 * form, rtol=1e-3, atol=0)


def test_verify_holds_it_to_the_oracle() -> None:
    model, x, joint = network(), draw(5, 3), two()
    targets = joint.targets(*labels_of(model(x)))
    kf.verify(model, joint, (x, targets), source="exact").raise_if(scale=1e-9)
    kf.verify(model, joint, (x, targets)).raise_if(scale=0.01)


def test_weighted_classes_are_a_head_too() -> None:
    weight = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    joint = Joint((kf.Categorical(weight, reduction="batchmean"), 3), (kf.Gaussian(), 1))
    model, x = network(4), draw(6, 3)
    targets = joint.targets(torch.arange(6) % 3, draw(6, 1, seed=1))
    wanted = kf.reference.ggn(model, joint, x, targets)
    found = kf.GaussNewtonOperator(model, joint, (x, targets)).to_dense()
    assert float((found - wanted).abs().max()) < 1e-13
    with pytest.raises(ValueError, match="batchmean"):
        Joint((kf.Categorical(weight), 3), (kf.Gaussian(), 1))


def test_an_actor_and_a_critic_train() -> None:
    class ActorCritic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.actor, self.critic = nn.Linear(3, 8), nn.Linear(8, 3), nn.Linear(8, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            hidden = torch.tanh(self.trunk(x))
            return self.actor(hidden), self.critic(hidden)

    model, x, joint = double(ActorCritic()), draw(32, 3), Joint((kf.Categorical(), 3), (kf.Gaussian(), 1))
    targets = joint.targets(torch.arange(32) % 3, draw(32, 1, seed=1))
    optimizer = kf.optim.KFAC(model, joint, lr=0.1, damping=1e-2, outputs=lambda out: torch.cat(out, -1))
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = joint.loss(torch.cat(model(x), -1), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_what_does_not_fit_is_refused_by_name() -> None:
    joint = two()
    with pytest.raises(ValueError, match="takes 9 outputs"):
        joint.validate(draw(4, 8))
    with pytest.raises(ValueError, match=r"targets\(\)"):
        joint.validate(draw(4, 9), draw(4, 4))
    with pytest.raises(ValueError, match="whole numbers"):
        joint.validate(draw(4, 9), torch.full((4, 5), 0.5))
    with pytest.raises(ValueError, match="class indices from 0 to 2"):
        joint.validate(draw(4, 9), torch.full((4, 5), 3.0))
    with pytest.raises(ValueError, match="3 heads, got 1"):
        joint.targets(draw(4))
    with pytest.raises(ValueError, match="last dimensions"):
        joint.targets(torch.zeros(4), draw(4, 3), draw(4, 2))
    with pytest.raises(ValueError, match="same examples"):
        joint.targets(torch.zeros(5), draw(4, 2), draw(4, 2))
    with pytest.raises(ValueError, match='reduction="sum"'):
        Joint((kf.Categorical(reduction="sum"), 3), (kf.Gaussian(), 1))
    with pytest.raises(ValueError, match="weights"):
        Joint((kf.Categorical(), 3), weights=(1.0, 2.0))
    with pytest.raises(TypeError, match="pair of a likelihood"):
        Joint(kf.Categorical(), kf.Gaussian())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs heads"):
        Joint()


def test_many_classes_survive_outputs_in_bfloat16() -> None:
    likelihood = Joint((kf.Categorical(), 1000), (kf.Gaussian(), 1))
    outputs = draw(64, 1001).bfloat16()
    drawn = likelihood.sample_labels(outputs, torch.Generator().manual_seed(0))[:, 0]
    assert (drawn % 4 != 0).any()  # beyond 512, bfloat16 has multiples of four alone
    classes = torch.arange(936, 1000)
    targets = likelihood.targets(classes, torch.zeros(64, 1, dtype=torch.bfloat16))
    assert torch.equal(targets[:, 0].long(), classes)
    value = likelihood.loss(outputs.float(), targets)
    wanted = F.cross_entropy(outputs[:, :-1].float(), classes) + 0.5 * outputs[:, -1].float().square().mean()
    torch.testing.assert_close(value, wanted)
