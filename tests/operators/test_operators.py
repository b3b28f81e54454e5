"""Matrix-free operators against the dense oracle."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from kronfac import reference
from kronfac.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from kronfac.operators import GaussNewtonOperator, HessianOperator, ParameterOperator, ggn_quadratic_form, passes


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seeded(model: nn.Module) -> nn.Module:
    model = model.double()
    for seed, p in enumerate(model.parameters()):
        p.data = draw(*p.shape, seed=seed) * 0.7
    return model


def vector_of(model: nn.Module, seed: int = 50) -> dict[str, Tensor]:
    return {
        name: draw(*p.shape, seed=seed + i) for i, (name, p) in enumerate(model.named_parameters()) if p.requires_grad
    }


def flat(vector: dict[str, Tensor]) -> Tensor:
    return parameters_to_vector(vector.values())


class Doubled(torch.autograd.Function):
    """An operation with a backward pass and no forward derivative."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return 2 * gradient


class Opaque(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Doubled.apply(x)


class LastState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 2, batch_first=True)
        self.head = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


X, Y = draw(6, 3, seed=9), torch.tensor([0, 2, 1, 1, 2, 0])
WEIGHT = torch.tensor([0.5, 2.0, 1.5], dtype=torch.float64)
MODELS: dict[str, nn.Module] = {
    "mlp": seeded(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))),
    "batch norm": seeded(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))),
    "convolution": seeded(
        nn.Sequential(nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(4, 3))
    ),
    "no forward derivative": seeded(nn.Sequential(nn.Linear(3, 4), Opaque(), nn.Tanh(), nn.Linear(4, 3))),
}
LIKELIHOODS: dict[str, tuple[Likelihood, object]] = {
    "categorical": (Categorical(), Y),
    "class weights": (Categorical(WEIGHT, label_smoothing=0.1), Y),
    "bernoulli": (Bernoulli(pos_weight=WEIGHT, reduction="sum"), draw(6, 3).sigmoid()),
    "gaussian": (Gaussian(0.5, "mean"), draw(6, 3, seed=1)),
}
everywhere = pytest.mark.parametrize("name", MODELS)
losses = pytest.mark.parametrize(("likelihood", "y"), LIKELIHOODS.values(), ids=LIKELIHOODS)


@everywhere
@losses
@pytest.mark.parametrize("kind", [GaussNewtonOperator, HessianOperator])
def test_operators_are_the_dense_matrices(
    name: str, likelihood: Likelihood, y: object, kind: type[ParameterOperator]
) -> None:
    model = copy.deepcopy(MODELS[name])
    before = copy.deepcopy(model.state_dict())
    dense = {GaussNewtonOperator: reference.ggn, HessianOperator: reference.hessian}[kind]
    # The oracle's torch.func needs the plain twin of what has no functorch rules.
    plain = nn.Sequential(*(Twice() if isinstance(m, Opaque) else m for m in model))
    expected = dense(plain, likelihood, X, y)
    operator = kind(model, likelihood, (X, y))
    vector = vector_of(model)
    torch.testing.assert_close(flat(operator.matmul(vector)), expected @ flat(vector), rtol=1e-9, atol=1e-11)
    form = flat(vector) @ expected @ flat(vector)
    torch.testing.assert_close(operator.quadratic_form(vector), form, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(operator.to_dense(), expected, rtol=1e-9, atol=1e-11)
    if kind is GaussNewtonOperator:
        torch.testing.assert_close(ggn_quadratic_form(model, likelihood, X, vector, y), form, rtol=1e-9, atol=1e-11)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)
    assert all(p.grad is None for p in model.parameters())


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@pytest.mark.parametrize("kind", [GaussNewtonOperator, HessianOperator])
@losses
def test_batches_add_up_to_the_whole(kind: type[ParameterOperator], likelihood: Likelihood, y: Tensor) -> None:
    """Uneven batches, and denominators that differ: never an average of averages."""
    model = MODELS["mlp"]
    batches = [(X[:1], y[:1]), (X[1:4], y[1:4]), (X[4:], y[4:])]
    vector = vector_of(model)
    whole, parts = kind(model, likelihood, (X, y)), kind(model, likelihood, batches)
    torch.testing.assert_close(parts.matmul(vector), whole.matmul(vector))
    torch.testing.assert_close(parts.quadratic_form(vector), whole.quadratic_form(vector))


@pytest.mark.parametrize("kind", [GaussNewtonOperator, HessianOperator])
def test_trace_and_diagonal_estimates(kind: type[ParameterOperator]) -> None:
    operator = kind(MODELS["mlp"], Categorical(), (X, Y))
    dense, samples = operator.to_dense(), 500
    off = dense - dense.diag().diag()
    generator = torch.Generator().manual_seed(0)
    error = math.sqrt(2 * float(off.square().sum()) / samples)
    assert abs(operator.trace(samples, generator) - dense.trace()) < 4 * error
    diagonal = operator.diagonal(samples, generator)
    assert {n: d.shape for n, d in diagonal.items()} == operator.parameter_shapes
    errors = (off.square().sum(1) / samples).sqrt()
    assert ((flat(diagonal) - dense.diag()).abs() < 5 * errors + 1e-12).all()
    again = operator.trace(3, torch.Generator().manual_seed(1))
    assert again == operator.trace(3, torch.Generator().manual_seed(1))


def test_attention_and_recurrent_networks() -> None:
    encoder = seeded(nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True))
    x, vector = draw(2, 3, 4), vector_of(encoder)
    for model in (encoder.train(), encoder.eval()):
        roots = reference.per_example_roots(model, Gaussian(), x)
        expected = (roots @ flat(vector)).square().sum()
        torch.testing.assert_close(ggn_quadratic_form(model, Gaussian(), x, vector), expected)
        product = GaussNewtonOperator(model, Gaussian(), (x, None)).matmul(vector)
        torch.testing.assert_close(flat(product), roots.T @ (roots @ flat(vector)))
    lstm, x = seeded(LastState()), draw(2, 4, 3)
    vector = vector_of(lstm)
    rows = [
        parameters_to_vector(torch.autograd.grad(z, list(lstm.parameters()), retain_graph=True))
        for z in lstm(x).flatten()
    ]
    expected = (torch.stack(rows) @ flat(vector)).square().sum() / 2
    torch.testing.assert_close(ggn_quadratic_form(lstm.float(), Gaussian(), x.float(), vector), expected.float())
    enabled = torch.backends.mkldnn.enabled
    product = HessianOperator(lstm, Gaussian(), (x.float(), torch.zeros(2, 3))).matmul(vector)
    assert all(p.isfinite().all() for p in product.values())
    assert torch.backends.mkldnn.enabled is enabled
    assert torch.backends.mha.get_fastpath_enabled()


def test_fallback_is_used_only_where_forward_derivatives_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    slow = passes._push_twice_backward
    monkeypatch.setattr(passes, "_push_twice_backward", lambda *args: calls.append(1) or slow(*args))
    for name, expected in (("mlp", 0), ("batch norm", 0), ("convolution", 0), ("no forward derivative", 1)):
        calls.clear()
        ggn_quadratic_form(MODELS[name], Categorical(), X, vector_of(MODELS[name]))
        assert len(calls) == expected, name


def test_dropout_keeps_its_mask_and_the_random_state() -> None:
    model = seeded(nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 3)))
    vector = vector_of(model)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    found = ggn_quadratic_form(model, Gaussian(), X, vector)
    assert torch.equal(torch.get_rng_state(), state)
    # The next forward draws the same masks.
    outputs = model(X)
    jacobian = torch.stack(
        [
            parameters_to_vector(torch.autograd.grad(z, list(model.parameters()), retain_graph=True))
            for z in outputs.flatten()
        ]
    )
    torch.testing.assert_close(found, (jacobian @ flat(vector)).square().sum() / 6)
    operator = GaussNewtonOperator(model, Gaussian(), (X, None))
    first = operator.to_dense()
    torch.rand(5)
    torch.testing.assert_close(operator.to_dense(), first, rtol=0, atol=0)
    torch.testing.assert_close(first, first.T)


def test_part_of_the_parameters_and_frozen_ones() -> None:
    model = copy.deepcopy(MODELS["mlp"])
    model[0].bias.requires_grad_(False)
    operator = GaussNewtonOperator(model, Categorical(), (X, Y))
    assert operator.parameter_names == ("0.weight", "2.weight", "2.bias")
    torch.testing.assert_close(operator.to_dense(), reference.ggn(model, Categorical(), X))
    part = {"2.weight": draw(3, 4)}
    whole = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in operator.parameter_shapes.items()} | part
    torch.testing.assert_close(
        ggn_quadratic_form(model, Categorical(), X, part), operator.quadratic_form(whole), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("kind", [GaussNewtonOperator, HessianOperator])
@pytest.mark.parametrize("name", ["batch norm", "no forward derivative"])
@pytest.mark.parametrize("layer", ["0", "3"])
def test_principal_submatrices(kind: type[ParameterOperator], name: str, layer: str) -> None:
    model = MODELS[name]
    names = (f"{layer}.bias", f"{layer}.weight")  # in any order
    whole, part = kind(model, Categorical(), (X, Y)), kind(model, Categorical(), (X, Y), parameters=names)
    assert part.parameter_names == (f"{layer}.weight", f"{layer}.bias")
    place, start = [], 0
    for key, shape in whole.parameter_shapes.items():
        place += list(range(start, start + shape.numel())) if key in names else []
        start += shape.numel()
    torch.testing.assert_close(part.to_dense(), whole.to_dense()[place][:, place], rtol=1e-10, atol=1e-13)
    vector = {key: draw(*part.parameter_shapes[key], seed=3) for key in names}
    form = torch.cat([vector[key].flatten() for key in part.parameter_names])
    torch.testing.assert_close(part.quadratic_form(vector), form @ part.to_dense() @ form, rtol=1e-10, atol=1e-13)


def test_shared_parameters() -> None:
    model = seeded(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)))
    model[2].weight = model[0].weight
    vector = vector_of(model)
    expected = reference.ggn(model, Categorical(), X)
    operator = GaussNewtonOperator(model, Categorical(), (X, Y))
    torch.testing.assert_close(flat(operator.matmul(vector)), expected @ flat(vector))
    torch.testing.assert_close(
        ggn_quadratic_form(model, Categorical(), X, vector), flat(vector) @ expected @ flat(vector)
    )


def test_parameters_outside_of_the_graph_have_no_curvature() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(3, 3), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model = seeded(Spare())
    vector = vector_of(model)
    for kind in (GaussNewtonOperator, HessianOperator):
        product = kind(model, Categorical(), (X, Y)).matmul(vector)
        assert not product["unused.weight"].any()
        assert product["used.weight"].any()
    only = {"unused.bias": torch.ones(2, dtype=torch.float64)}
    assert ggn_quadratic_form(model, Categorical(), X, only) == 0


def test_inputs_and_outputs_in_other_shapes() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = MODELS["mlp"]

        def forward(self, x: Tensor, shift: Tensor) -> dict[str, Tensor]:
            return {"logits": self.inner(x + shift)}

    model, shift = Wrapped(), torch.ones((), dtype=torch.float64)
    vector = vector_of(model)
    expected = flat(vector) @ reference.ggn(MODELS["mlp"], Categorical(), X + 1) @ flat(vector)
    for inputs in ((X, shift), [X, shift], {"x": X, "shift": shift}, ((X,), {"shift": shift})):
        found = ggn_quadratic_form(model, Categorical(), inputs, vector, outputs=lambda out: out["logits"])
        torch.testing.assert_close(found, expected)
    with pytest.raises(TypeError, match=r"dict, not a tensor.*outputs=lambda"):
        ggn_quadratic_form(model, Categorical(), (X, shift), vector)


def test_half_precision_weights() -> None:
    model = copy.deepcopy(MODELS["mlp"]).bfloat16()
    vector = vector_of(model)
    found = ggn_quadratic_form(model, Gaussian(), X.bfloat16(), vector)
    assert found.dtype == torch.float32
    expected = ggn_quadratic_form(MODELS["mlp"], Gaussian(), X, vector)
    torch.testing.assert_close(found.double(), expected, rtol=0.1, atol=0)


def test_refusals() -> None:
    model, likelihood = MODELS["mlp"], Categorical()
    vector = vector_of(model)
    with pytest.raises(TypeError, match=r"iterable again and again.*generator"):
        GaussNewtonOperator(model, likelihood, ((X, Y) for _ in range(2)))
    with pytest.raises(TypeError, match=r"likelihood must be a kronfac.Likelihood, got CrossEntropyLoss"):
        HessianOperator(model, nn.CrossEntropyLoss(), (X, Y))
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got function"):
        HessianOperator(flat, likelihood, (X, Y))
    with pytest.raises(ValueError, match=r"no parameter that requires gradients"):
        GaussNewtonOperator(nn.Linear(3, 3).requires_grad_(False), likelihood, (X, Y))
    with pytest.raises(ValueError, match=r"must name parameters of the model that require gradients.*\['5.bias'\]"):
        GaussNewtonOperator(model, likelihood, (X, Y), parameters=["2.bias", "5.bias"])
    with pytest.raises(ValueError, match=r"parameters=\[\] must name"):
        HessianOperator(model, likelihood, (X, Y), parameters=[])
    with pytest.raises(ValueError, match=r"loader is empty"):
        GaussNewtonOperator(model, likelihood, []).quadratic_form(vector)
    with pytest.raises(TypeError, match=r"pairs.*not Tensor"):
        GaussNewtonOperator(model, likelihood, [X]).matmul(vector)
    operator = GaussNewtonOperator(model, likelihood, (X, Y))
    with pytest.raises(ValueError, match=r"missing \['2.bias'\], unknown \['3.bias'\]"):
        operator.matmul({("3.bias" if n == "2.bias" else n): v for n, v in vector.items()})
    with pytest.raises(ValueError, match=r"'2.bias' has shape \(4,\), the parameter \(3,\)"):
        ggn_quadratic_form(model, likelihood, X, {"2.bias": draw(4)})
    with pytest.raises(TypeError, match=r"a vector is a mapping.*Tensor"):
        operator.quadratic_form(flat(vector))
    with pytest.raises(TypeError, match=r"'2.bias' must be a tensor, got list"):
        ggn_quadratic_form(model, likelihood, X, {"2.bias": [1.0, 2.0, 3.0]})
    with pytest.raises(ValueError, match=r"samples must be a positive integer, got 0"):
        operator.trace(0)
    with pytest.raises(ValueError, match=r"20100 parameters make a dense matrix of 1.6 GB"):
        GaussNewtonOperator(nn.Linear(200, 100), likelihood, (X, Y)).to_dense()
    with pytest.raises(ValueError, match=r"class indices from 0 to 2"):
        GaussNewtonOperator(model, likelihood, (X, Y + 1)).matmul(vector)
    with pytest.raises(ValueError, match=r"depends on the targets"):
        ggn_quadratic_form(model, Categorical(WEIGHT), X, vector)


@pytest.mark.parametrize("kind", [GaussNewtonOperator, HessianOperator])
def test_vectors_of_integers_are_refused(kind: type[ParameterOperator]) -> None:
    """The product has the vector's dtype, and of whole numbers little or nothing would be left."""
    model = seeded(nn.Linear(3, 3))
    operator = kind(model, Categorical(), (X, torch.arange(6) % 3))
    for act in (operator.matmul, operator.quadratic_form):
        with pytest.raises(TypeError, match=r"entry 'weight' is torch.int64: it must be of real floating point"):
            act({name: torch.ones(p.shape, dtype=torch.long) for name, p in model.named_parameters()})
