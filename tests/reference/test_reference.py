"""The oracle against formulas worked out by hand, finite differences, and itself."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.checkpoint import checkpoint

from kronfac import reference, verify
from kronfac.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seeded(model: nn.Module, seed: int = 0) -> nn.Module:
    model = model.double()
    for p in model.parameters():
        p.data = draw(*p.shape, seed=seed) * 0.7
        seed += 1
    return model


class Sequence(nn.Module):
    """Outputs [B, T, 3] of a token-wise network."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 2)
        self.head = nn.Linear(2, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(tokens)))


MLP = seeded(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)))
CONV = seeded(nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)))
NORM = seeded(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)))
TOKENS = seeded(Sequence())
X, IMAGES = draw(4, 3, seed=9), draw(4, 1, 3, 3, seed=9)
Y = torch.tensor([0, 2, 1, 1])
WEIGHT = torch.tensor([0.5, 2.0, 1.5], dtype=torch.float64)
IDS = torch.tensor([[0, 1], [2, 4], [3, 3]])
LABELS = torch.tensor([[0, -100], [2, 1], [1, 1]])

CASES: dict[str, tuple[nn.Module, Likelihood, Tensor, object]] = {
    "mlp, categorical": (MLP, Categorical(), X, Y),
    "mlp, class weights": (MLP, Categorical(WEIGHT, ignore_index=1, label_smoothing=0.1), X, Y),
    "mlp, soft labels, mask": (MLP, Categorical(), X, (draw(4, 3).sigmoid(), torch.tensor([True, True, False, True]))),
    "mlp, bernoulli": (MLP, Bernoulli(pos_weight=WEIGHT), X, draw(4, 3).sigmoid()),
    "mlp, gaussian": (MLP, Gaussian(0.3, "mean"), X, draw(4, 3, seed=2)),
    "conv, categorical": (CONV, Categorical(reduction="sum"), IMAGES, Y),
    "conv, bernoulli": (CONV, Bernoulli(weight=WEIGHT), IMAGES, draw(4, 3).sigmoid()),
    "batch norm, categorical": (NORM, Categorical(), X, Y),
    "batch norm, gaussian": (NORM, Gaussian(), X, draw(4, 3, seed=2)),
    "sequence, categorical": (TOKENS, Categorical(ignore_index=-100, class_dim=-1), IDS, LABELS),
    "sequence, gaussian, mask": (TOKENS, Gaussian(), IDS, (draw(3, 2, 3), LABELS >= 0)),
}
cases = pytest.mark.parametrize(("model", "likelihood", "x", "y"), CASES.values(), ids=CASES)


def loss_at(model: nn.Module, likelihood: Likelihood, x: Tensor, y: object, theta: Tensor) -> Tensor:
    moved = copy.deepcopy(model)
    vector_to_parameters(theta, moved.parameters())
    return likelihood.loss(moved(x), y)


@cases
def test_fisher_is_the_gauss_newton_matrix(model: nn.Module, likelihood: Likelihood, x: Tensor, y: object) -> None:
    fisher, ggn = reference.fisher(model, likelihood, x, y), reference.ggn(model, likelihood, x, y)
    assert fisher.shape == (parameters_to_vector(model.parameters()).numel(),) * 2
    assert fisher.dtype == torch.float64
    torch.testing.assert_close(fisher, ggn, rtol=1e-10, atol=1e-12)
    assert ggn.norm() > 0.01


@cases
def test_roots_make_the_gauss_newton_matrix(model: nn.Module, likelihood: Likelihood, x: Tensor, y: object) -> None:
    ggn = reference.ggn(model, likelihood, x, y)
    rows = reference.per_example_roots(model, likelihood, x, y)
    torch.testing.assert_close(rows.T @ rows, ggn, rtol=1e-10, atol=1e-12)
    name, parameter = next(iter(model.named_parameters()))
    part = reference.per_example_roots(model, likelihood, x, y, [name])
    size = parameter.numel()
    torch.testing.assert_close(part.T @ part, ggn[:size, :size], rtol=1e-10, atol=1e-12)


@cases
def test_hessian_is_that_of_finite_differences(model: nn.Module, likelihood: Likelihood, x: Tensor, y: object) -> None:
    theta = parameters_to_vector(model.parameters()).detach()
    found, step = reference.hessian(model, likelihood, x, y), 1e-4
    gradients = []
    for unit in torch.eye(len(theta), dtype=theta.dtype):
        sides = []
        for sign in (1, -1):
            point = (theta + sign * step * unit).requires_grad_()
            moved = copy.deepcopy(model)
            parts = point.split([p.numel() for p in moved.parameters()])
            named = {n: t.reshape(p.shape) for (n, p), t in zip(moved.named_parameters(), parts, strict=True)}
            loss = likelihood.loss(torch.func.functional_call(moved, named, (x,)), y)
            sides.append(torch.autograd.grad(loss, point)[0])
        gradients.append((sides[0] - sides[1]) / (2 * step))
    torch.testing.assert_close(found, torch.stack(gradients), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["mlp, class weights", "conv, bernoulli", "mlp, gaussian"])
def test_empirical_fisher_is_of_single_examples(name: str) -> None:
    model, likelihood, x, y = CASES[name]
    total = torch.zeros((), dtype=torch.float64)
    for n in range(len(x)):
        model.zero_grad()
        likelihood.sum_loss(model(x[n : n + 1]), y[n : n + 1]).backward()
        gradient = parameters_to_vector([p.grad for p in model.parameters()])
        total = total + gradient.outer(gradient)
    model.zero_grad()
    expected = total / likelihood.denominator(model(x), y)
    torch.testing.assert_close(reference.empirical_fisher(model, likelihood, x, y), expected)


@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum"])
def test_linear_regression_by_hand(reduction: str) -> None:
    """W of a linear layer with squared error: I x (sum a a^T) / (variance D)."""
    model = seeded(nn.Linear(3, 2, bias=False))
    expected = torch.kron(torch.eye(2, dtype=torch.float64), X.T @ X) / 0.5
    expected = expected / {"mean": 8, "batchmean": 4, "sum": 1}[reduction]
    likelihood = Gaussian(0.5, reduction)
    torch.testing.assert_close(reference.fisher(model, likelihood, X), expected)
    torch.testing.assert_close(reference.ggn(model, likelihood, X), expected)
    torch.testing.assert_close(reference.hessian(model, likelihood, X, draw(4, 2)), expected)


def test_logistic_regression_by_hand() -> None:
    model = seeded(nn.Linear(3, 1))
    a = torch.cat([X, torch.ones(4, 1, dtype=torch.float64)], 1)
    p = model(X).detach().sigmoid()
    expected = a.T @ (a * p * (1 - p)) / 4
    torch.testing.assert_close(reference.fisher(model, Bernoulli(), X), expected)
    y = torch.tensor([[0.0], [1.0], [1.0], [0.0]], dtype=torch.float64)
    rows = a * (p - y)
    torch.testing.assert_close(reference.empirical_fisher(model, Bernoulli(), X, y), rows.T @ rows / 4)


def test_softmax_regression_by_hand() -> None:
    model = seeded(nn.Linear(3, 3, bias=False))
    p = model(X).detach().softmax(1)
    blocks = torch.diag_embed(p) - p.unsqueeze(1) * p.unsqueeze(2)
    expected = sum(torch.kron(h, a.outer(a)) for h, a in zip(blocks, X, strict=True)) / 4
    torch.testing.assert_close(reference.ggn(model, Categorical(), X), expected)
    torch.testing.assert_close(reference.fisher(model, Categorical(), X), expected)


def test_hessian_of_piecewise_linear_networks_with_one_trained_layer_is_the_gauss_newton_matrix() -> None:
    """For each layer alone the outputs are piecewise linear in its weights, so that blocks agree, and others do not."""
    model = seeded(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)))
    hessian, ggn = reference.hessian(model, Categorical(), X, Y), reference.ggn(model, Categorical(), X)
    start = 0
    for layer in (model[0], model[2], model[4]):
        size = sum(p.numel() for p in layer.parameters())
        # Bias and weight of one layer enter linearly too.
        block = slice(start, start + size)
        torch.testing.assert_close(hessian[block, block], ggn[block, block], rtol=1e-10, atol=1e-12)
        start += size
    assert not torch.allclose(hessian, ggn)


def test_batch_norm_is_differentiated_through_the_batch() -> None:
    """J_n by plain autograd through the whole batch; in eval mode another matrix comes out."""
    model = copy.deepcopy(NORM)
    outputs = model(X)
    rows = [
        parameters_to_vector(torch.autograd.grad(z, list(model.parameters()), retain_graph=True))
        for z in outputs.flatten()
    ]
    jacobian = torch.stack(rows)
    model.load_state_dict(NORM.state_dict())
    torch.testing.assert_close(reference.ggn(model, Gaussian(), X), jacobian.T @ jacobian / 4)
    evaluated = reference.ggn(model.eval(), Gaussian(), X)
    assert not torch.allclose(evaluated, jacobian.T @ jacobian / 4, rtol=0.1)


@pytest.mark.parametrize("matrix", [reference.fisher, reference.ggn, reference.empirical_fisher, reference.hessian])
def test_the_model_is_left_as_it_was(matrix: object) -> None:
    model = copy.deepcopy(NORM)
    before = copy.deepcopy(model.state_dict())
    matrix(model, Categorical(), X, Y)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert model.training
    assert model[1].track_running_stats
    assert all(p.grad is None for p in model.parameters())


def test_frozen_and_shared_parameters() -> None:
    model = seeded(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)))
    model[2].weight = model[0].weight
    model[0].bias.requires_grad_(False)
    size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert reference.ggn(model, Categorical(), X).shape == (size, size) == (12, 12)
    fisher = reference.fisher(model, Categorical(), X)
    torch.testing.assert_close(fisher, reference.ggn(model, Categorical(), X))


def test_inputs_and_outputs_in_other_shapes() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = MLP

        def forward(self, x: Tensor, shift: Tensor) -> dict[str, Tensor]:
            return {"logits": self.inner(x + shift)}

    expected = reference.ggn(MLP, Categorical(), X + 1)
    shift = torch.ones((), dtype=torch.float64)
    for inputs in ((X, shift), {"x": X, "shift": shift}):
        found = reference.ggn(Wrapped(), Categorical(), inputs, outputs=lambda out: out["logits"])
        torch.testing.assert_close(found, expected)
    with pytest.raises(TypeError, match="the model returns dict: say which tensor by outputs="):
        reference.ggn(Wrapped(), Categorical(), (X, shift))


def test_attention_in_eval_mode() -> None:
    layer = seeded(nn.TransformerEncoderLayer(4, 2, 6, batch_first=True)).eval()
    likelihood, x = Gaussian(), draw(2, 3, 4)
    rows = reference.per_example_roots(layer, likelihood, x, names=["linear1.bias"])
    outputs = layer(x)
    jacobian = torch.stack(
        [torch.autograd.grad(z, layer.linear1.bias, retain_graph=True)[0] for z in outputs.flatten()]
    )
    torch.testing.assert_close(rows.T @ rows, jacobian.T @ jacobian / 2)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"20100 parameters.*3\.2 GB.*GaussNewtonOperator"):
        reference.ggn(nn.Linear(200, 100).double(), Gaussian(), draw(1, 200))
    with pytest.raises(ValueError, match=r"no parameters \['2.bias'\].*'0.bias'"):
        reference.per_example_roots(nn.Sequential(nn.Linear(3, 3)), Gaussian(), X.float(), names=["2.bias"])
    with pytest.raises(ValueError, match="dropout '1' is in train mode"):
        reference.hessian(nn.Sequential(nn.Linear(3, 3), nn.Dropout()), Gaussian(), X.float(), X.float())
    with pytest.raises(ValueError, match="RReLU '1' is in train mode"):
        reference.hessian(nn.Sequential(nn.Linear(3, 3), nn.RReLU()), Gaussian(), X.float(), X.float())
    with pytest.raises(ValueError, match="no parameter that requires gradients"):
        reference.fisher(nn.Linear(3, 3).requires_grad_(False), Gaussian(), X.float())
    with pytest.raises(ValueError, match="hold 3 NaN or Inf"):
        reference.ggn(nn.Linear(3, 3), Gaussian(), torch.full((1, 3), torch.nan))
    with pytest.raises(ValueError, match=r"Embedding '0' has max_norm=1\.0"):
        reference.ggn(nn.Sequential(nn.Embedding(3, 2, max_norm=1.0)), Gaussian(), torch.arange(3))
    mixed = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3).double())
    with pytest.raises(ValueError, match="one dtype"):
        reference.ggn(mixed, Gaussian(), X)


def test_a_list_of_arguments_is_one_as_for_estimates() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2).double()

        def forward(self, first: Tensor, second: Tensor) -> Tensor:
            return self.layer(first + second)

    model, pair = Sum(), [draw(4, 3), draw(4, 3, seed=1)]
    found = reference.ggn(model, Categorical(), pair)
    assert torch.equal(found, reference.ggn(model, Categorical(), tuple(pair)))
    report = verify(model, Categorical(), (pair, None), approximation="dense", source="exact")
    assert report.rows[0].error < 1e-12


class Recomputed(nn.Module):
    """Activations of the middle part are thrown away, or moved, between forward and backward."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        self.middle = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        if self.how == "checkpoint":
            hidden = checkpoint(self.middle, hidden, use_reentrant=False)
        elif self.how == "offload":
            with save_on_cpu():
                hidden = self.middle(hidden)
        else:
            hidden = self.middle(hidden)
        return self.last(hidden)


@pytest.mark.parametrize("how", ["checkpoint", "offload"])
def test_hooks_on_saved_tensors_change_nothing(how: str) -> None:
    plain, model = Recomputed("plain").double(), Recomputed(how).double()
    model.load_state_dict(plain.state_dict())
    x, y = draw(5, 3), torch.arange(5) % 2
    likelihood = Categorical()
    assert torch.equal(reference.ggn(model, likelihood, x), reference.ggn(plain, likelihood, x))
    assert torch.equal(reference.hessian(model, likelihood, x, y), reference.hessian(plain, likelihood, x, y))
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), plain.buffers(), strict=True))
    verify(model.eval(), likelihood, (x, y)).raise_if(scale=1e-8)
