"""Samples, probes, roots and products all stand for one Hessian: the one autograd finds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd.functional import hessian

from kronfac.likelihoods import Bernoulli, Categorical, ElementwiseLikelihood, Gaussian, Likelihood, categorical


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


class Poisson(ElementwiseLikelihood):
    """Counts with log-rates as outputs: what a user writes."""

    def nll(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return outputs.exp() - labels * outputs

    def sample_labels(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.poisson(outputs.exp(), generator=generator)

    def curvature(self, outputs: Tensor) -> Tensor:
        return outputs.exp()


class Minimal(Likelihood):
    """The least a user writes: the same Poisson, by automatic differentiation."""

    nll = Poisson.nll
    sample_labels = Poisson.sample_labels


class Rooted(Minimal):
    """The minimum and a root: probes follow."""

    def root_columns(self, outputs: Tensor, targets: object = None):
        return Poisson(self.reduction).root_columns(outputs, targets)


WEIGHT = torch.tensor([0.5, 2.0, 1.5], dtype=torch.float64)
INDICES = torch.tensor([[0, 1], [2, -100], [1, 1]])
MASK = torch.tensor([[True, True], [False, True], [True, False]])
UNIT = draw(3, 2, 3, seed=4).sigmoid()
CASES: dict[str, tuple[Likelihood, Tensor, object]] = {
    "categorical": (Categorical(), draw(3, 4), torch.tensor([0, 1, 3])),
    "categorical, all options": (
        Categorical(WEIGHT, ignore_index=-100, label_smoothing=0.2, class_dim=-1),
        draw(3, 2, 3),
        INDICES,
    ),
    "categorical, inferred, mask": (Categorical(ignore_index=-100, reduction="sum"), draw(3, 3, 2), (INDICES, MASK)),
    "categorical, probabilities": (Categorical(WEIGHT, label_smoothing=0.1, class_dim=-1), draw(3, 2, 3), UNIT),
    "bernoulli": (Bernoulli(), draw(3, 2, 3), UNIT),
    "bernoulli, weights, mask": (Bernoulli(WEIGHT, pos_weight=3 * WEIGHT), draw(3, 2, 3), (UNIT, MASK)),
    "gaussian": (Gaussian(0.3), draw(3, 2), draw(3, 2, seed=1)),
    "gaussian, mask": (Gaussian(2.0, "mean"), draw(3, 2), (draw(3, 2, seed=1), MASK)),
    "poisson": (Poisson(), draw(3, 2), torch.tensor([[0, 1], [3, 2], [0, 0]])),
    "poisson, mask": (Poisson("mean"), draw(3, 2), (torch.tensor([[0, 1], [3, 2], [0, 0]]), MASK)),
    "poisson, minimal": (Minimal(), draw(3, 2), (torch.tensor([[0, 1], [3, 2], [0, 0]]), MASK)),
    "poisson, rooted": (Rooted(), draw(3, 2), torch.tensor([[0, 1], [3, 2], [0, 0]])),
}
cases = pytest.mark.parametrize(("likelihood", "outputs", "targets"), CASES.values(), ids=CASES)
rooted = pytest.mark.parametrize(
    ("likelihood", "outputs", "targets"),
    [case for name, case in CASES.items() if name != "poisson, minimal"],
    ids=[name for name in CASES if name != "poisson, minimal"],
)


def autograd_hessian(likelihood: Likelihood, outputs: Tensor, targets: object) -> Tensor:
    return hessian(lambda z: likelihood.sum_loss(z, targets), outputs).reshape(outputs.numel(), -1)


def per_example(matrix: Tensor, batch: int) -> Tensor:
    size = len(matrix) // batch
    return torch.stack([matrix[n * size : (n + 1) * size, n * size : (n + 1) * size] for n in range(batch)])


@cases
def test_products_are_those_of_autograds_hessian(likelihood: Likelihood, outputs: Tensor, targets: object) -> None:
    expected = autograd_hessian(likelihood, outputs, targets)
    columns = [likelihood.hessian_product(outputs, e.reshape(outputs.shape), targets) for e in torch.eye(len(expected))]
    torch.testing.assert_close(torch.stack([c.flatten() for c in columns], 1), expected)


@rooted
def test_root_columns_are_an_exact_root(likelihood: Likelihood, outputs: Tensor, targets: object) -> None:
    expected = per_example(autograd_hessian(likelihood, outputs, targets), len(outputs))
    columns = torch.stack([v.flatten(1) for v in likelihood.root_columns(outputs, targets)])
    torch.testing.assert_close(torch.einsum("kni,knj->nij", columns, columns), expected)


@rooted
def test_each_root_column_touches_one_term(likelihood: Likelihood, outputs: Tensor, targets: object) -> None:
    shape = likelihood.term_shape(outputs, targets)
    columns = list(likelihood.root_columns(outputs, targets))
    assert len(columns) == outputs[0].numel()
    for column in columns:
        term = column != 0
        if term.shape != shape:
            dims = [d for d in range(1, outputs.ndim) if shape == torch.Size(outputs.sum(d).shape)]
            term = term.any(dims[0])
        assert term.reshape(len(term), -1).sum(1).le(1).all()


@cases
@pytest.mark.parametrize("method", ["sample_cotangents", "probe_cotangents"])
def test_random_cotangents_have_the_hessian_as_second_moment(
    likelihood: Likelihood, outputs: Tensor, targets: object, method: str
) -> None:
    if type(likelihood) is Minimal and method == "probe_cotangents":
        with pytest.raises(NotImplementedError, match="Minimal gives no root"):
            likelihood.probe_cotangents(outputs, targets)
        return
    expected = autograd_hessian(likelihood, outputs, targets)
    # One big batch of copies is one draw for each copy.
    copies = 40_000
    many = outputs.repeat(copies, *(1,) * (outputs.ndim - 1))
    if isinstance(targets, tuple):
        many_targets = tuple(t.repeat(copies, *(1,) * (t.ndim - 1)) for t in targets)
    else:
        many_targets = targets.repeat(copies, *(1,) * (targets.ndim - 1))
    drawn = getattr(likelihood, method)(many, many_targets, generator(7)).reshape(copies, -1)
    assert drawn.dtype == torch.float64
    moment = drawn.T @ drawn / copies
    fourth = (drawn**2).T @ drawn**2 / copies
    error = (fourth - moment**2).clamp(min=0).div(copies).sqrt()
    # Cross terms between examples and positions vanish too, which is why all pairs are looked at.
    # Where a draw does not vary at all, the sum over forty thousand copies still rounds.
    assert ((moment - expected).abs() <= 5 * error + 1e-10).all()


@pytest.mark.parametrize("likelihood", [Categorical(), Bernoulli(), Gaussian()], ids=repr)
def test_probes_vary_less_than_samples(likelihood: Likelihood) -> None:
    outputs = draw(1, 4).repeat(5000, 1)
    spread = []
    for method in (likelihood.sample_cotangents, likelihood.probe_cotangents):
        drawn = method(outputs, generator=generator(1))
        spread.append((drawn.unsqueeze(1) * drawn.unsqueeze(2)).var(0).sum())
    assert spread[1] < spread[0]


@pytest.mark.parametrize("likelihood", [Categorical(), Bernoulli(), Gaussian()], ids=repr)
def test_one_seed_one_draw(likelihood: Likelihood) -> None:
    outputs = draw(50, 4)
    for method in (likelihood.sample_cotangents, likelihood.probe_cotangents):
        first = method(outputs, generator=generator(1))
        torch.testing.assert_close(method(outputs, generator=generator(1)), first, rtol=0, atol=0)
        assert not torch.equal(method(outputs, generator=generator(2)), first)


def test_categorical_cotangents_by_hand() -> None:
    outputs = torch.tensor([[0.0, 0.0]], dtype=torch.float64)
    drawn = Categorical().sample_cotangents(outputs, generator=generator())
    assert drawn.abs().tolist() == [[0.5, 0.5]]
    assert drawn.sum() == 0


@pytest.mark.parametrize("name", ["categorical, all options", "bernoulli, weights, mask", "gaussian, mask"])
def test_symmetric_kl_has_the_hessian_as_curvature(name: str) -> None:
    likelihood, outputs, targets = CASES[name]
    scale = likelihood.denominator(outputs, targets)
    found = hessian(lambda d: likelihood.symmetric_kl(outputs, outputs + d, targets), torch.zeros_like(outputs))
    torch.testing.assert_close(
        found.reshape(outputs.numel(), -1), autograd_hessian(likelihood, outputs, targets) / scale
    )


@pytest.mark.parametrize("name", ["categorical", "bernoulli", "gaussian"])
def test_symmetric_kl_is_torchs(name: str) -> None:
    likelihood, outputs, _ = CASES[name]
    other = draw(*outputs.shape, seed=9)
    kinds = {
        "categorical": lambda z: torch.distributions.Categorical(logits=z),
        "bernoulli": lambda z: torch.distributions.Bernoulli(logits=z),
        "gaussian": lambda z: torch.distributions.Normal(z, 0.3**0.5),
    }
    first, second = kinds[name](outputs), kinds[name](other)
    kl = torch.distributions.kl_divergence
    expected = (kl(first, second) + kl(second, first)).sum() / 2 / len(outputs)
    torch.testing.assert_close(likelihood.symmetric_kl(outputs, other), expected)
    torch.testing.assert_close(likelihood.symmetric_kl(other, outputs), expected)
    torch.testing.assert_close(likelihood.kl(outputs, other), kl(first, second).sum() / len(outputs))


@pytest.mark.parametrize("name", ["categorical, all options", "bernoulli, weights, mask", "gaussian, mask"])
def test_both_divergences_together_are_the_symmetric_one(name: str) -> None:
    likelihood, outputs, targets = CASES[name]
    other = draw(*outputs.shape, seed=9)
    both = likelihood.kl(outputs, other, targets) + likelihood.kl(other, outputs, targets)
    torch.testing.assert_close(both / 2, likelihood.symmetric_kl(outputs, other, targets))


def test_pos_weight_weights_terms_but_not_rows() -> None:
    likelihood, outputs, targets = CASES["bernoulli, weights, mask"]
    kept = MASK.unsqueeze(-1) * WEIGHT.expand(3, 2, 3)
    torch.testing.assert_close(likelihood.row_weights(outputs, targets), kept)
    expected = kept * (1 + (3 * WEIGHT - 1) * UNIT)
    torch.testing.assert_close(likelihood.term_weights(outputs, targets), expected)


def test_no_weights_are_none() -> None:
    assert Categorical().term_weights(draw(3, 4)) is None
    assert Categorical(label_smoothing=0.1).term_weights(draw(3, 4), torch.tensor([0, 1, 2])) is None
    assert Bernoulli().row_weights(draw(3, 4)) is None
    assert Gaussian().term_weights(draw(3, 4), draw(3, 4)) is None


def test_a_mask_needs_no_targets() -> None:
    outputs = draw(3, 2)
    weights = Gaussian().term_weights(outputs, (None, MASK))
    assert torch.equal(weights, MASK.double())
    assert Gaussian(reduction="mean").denominator(outputs, (None, MASK)) == 4


def test_defaults_work_without_gradients() -> None:
    outputs, targets = draw(3, 2), torch.tensor([[0, 1], [3, 2], [0, 0]])
    expected = outputs.exp() - targets
    with torch.inference_mode():
        inside = outputs * 1
        found = Minimal().target_cotangents(inside, targets)
        product = Minimal().hessian_product(inside, torch.ones_like(inside), targets)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(product, outputs.exp())


def test_unknown_parts_of_a_users_likelihood_are_refused_by_name() -> None:
    outputs = draw(3, 2)
    with pytest.raises(NotImplementedError, match="Minimal gives no symmetric KL"):
        Minimal().symmetric_kl(outputs, outputs)
    with pytest.raises(NotImplementedError, match="Minimal cannot enumerate its labels"):
        Minimal().label_atoms(outputs)
    with pytest.raises(ValueError, match=r"Minimal gives no product with its Hessian.*subclass ElementwiseL"):
        Minimal().hessian_product(outputs, outputs)


# ---------------------------------------------------------------------------------------------------- confidence
def spread(probabilities: Tensor, vector: Tensor) -> Tensor:
    """``u^T H u`` without cancellation: the variance of ``u`` as a sum over pairs of classes, the last dimension."""
    pairs = probabilities.unsqueeze(-1) * probabilities.unsqueeze(-2)
    return (pairs * (vector.unsqueeze(-1) - vector.unsqueeze(-2)).square()).sum((-1, -2)) / 2


@pytest.mark.parametrize("shift", [0.0, 3.0, 1024.0])
@pytest.mark.parametrize("logit", [0.0, 8.0, 18.0, 40.0])
def test_curvature_of_a_confident_prediction_in_float32(
    logit: float, shift: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 18 the greatest probability rounds to 1; what is added to all entries of a vector must not count."""
    likelihood = Categorical()
    outputs = torch.tensor([[logit, 0.0, 0.0]])
    vector = torch.tensor([[0.0, 0.0, 0.125]]) + shift
    wanted = float(spread(outputs.double().softmax(-1), vector.double()))
    product = (vector.double() * likelihood.hessian_product(outputs, vector).double()).sum()
    assert float(product) == pytest.approx(wanted, rel=1e-6 + 2e-6 * shift)
    through = [(column.double() * vector.double()).sum() ** 2 for column in likelihood.root_columns(outputs)]
    assert float(sum(through)) == pytest.approx(wanted, rel=1e-6 + 2e-6 * shift)
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)
    monkeypatch.setattr(categorical, "rademacher", lambda *_: signs)
    probes = likelihood.probe_cotangents(outputs.expand(8, 3)).double()
    found = (probes @ vector.double()[0]).square().mean()
    assert float(found) == pytest.approx(wanted, rel=1e-6 + 2e-6 * shift)


@pytest.mark.parametrize("method", ["sample_cotangents", "probe_cotangents"])
@pytest.mark.parametrize("logit", [0.0, 18.0, 40.0])
def test_cotangents_of_a_confident_prediction_add_up_to_nothing(logit: float, method: str) -> None:
    outputs = torch.tensor([logit, 0.0, 1.0]).expand(50, 3)
    drawn = getattr(Categorical(), method)(outputs, generator=generator())
    assert (drawn.double().sum(-1).abs() <= 2e-7 * drawn.double().norm(dim=-1)).all()
    assert (drawn != 0).all()


@pytest.mark.parametrize(
    ("likelihood", "dim", "targets"),
    [
        (Categorical(class_dim=-1), -1, None),
        (Categorical(class_dim=1), 1, None),
        (Categorical(WEIGHT, ignore_index=-100, label_smoothing=0.2, class_dim=-1), -1, (INDICES, MASK)),
        (Categorical(WEIGHT, ignore_index=-100, label_smoothing=0.2, class_dim=1), 1, (INDICES, MASK)),
    ],
    ids=repr,
)
def test_products_of_confident_predictions_with_all_options(likelihood: Categorical, dim: int, targets: object) -> None:
    places = torch.tensor([[0, 1], [2, 0], [1, 2]])
    outputs = (torch.nn.functional.one_hot(places, 3) * 20.0).movedim(-1, dim)
    vector = (3 + 0.125 * draw(3, 2, 3, seed=3).round().float()).movedim(-1, dim)
    weights = likelihood.term_weights(outputs, targets)
    wanted = spread(outputs.double().movedim(dim, -1).softmax(-1), vector.double().movedim(dim, -1))
    wanted = wanted if weights is None else wanted * weights
    found = (vector.double() * likelihood.hessian_product(outputs, vector, targets).double()).sum(dim)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-15)
    assert (wanted > 0).any()


def test_products_are_differentiable_in_the_vector() -> None:
    likelihood, outputs, targets = CASES["categorical, all options"]
    vector, other = draw(*outputs.shape, seed=5).requires_grad_(), draw(*outputs.shape, seed=6)
    (found,) = torch.autograd.grad((likelihood.hessian_product(outputs, vector, targets) * other).sum(), vector)
    torch.testing.assert_close(found, likelihood.hessian_product(outputs, other, targets))


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("logit", [0.0, 8.0, 18.0, 30.0])
def test_divergence_of_confident_predictions_in_float32(logit: float, sign: float) -> None:
    first = sign * torch.tensor([[logit, 0.0]])
    second = first + torch.tensor([[0.5, 0.0]])
    # By the less likely class, with logarithms of 1 - p.
    side = -1.0 if logit * sign > 0 else 1.0
    one, two = side * first[0, 0].double(), side * second[0, 0].double()
    wanted = float(one.sigmoid() * (one - two) + (-one.sigmoid()).log1p() - (-two.sigmoid()).log1p())
    assert float(Categorical().kl(first, second)) == pytest.approx(wanted, rel=1e-3)
    assert float(Bernoulli().kl(first[:, :1], second[:, :1])) == pytest.approx(wanted, rel=1e-5)
    back = float(two.sigmoid() * (two - one) + (-two.sigmoid()).log1p() - (-one.sigmoid()).log1p())
    both = Bernoulli().symmetric_kl(first[:, :1], second[:, :1])
    assert float(both) == pytest.approx((wanted + back) / 2, rel=1e-5)
