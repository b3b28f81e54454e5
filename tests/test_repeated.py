"""Layers that a forward calls several times: what of a model that stacks their inputs as positions, to rounding."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import kronfac as kf
from kronfac.layers import called_repeatedly
from kronfac.sources import Sampled


class Siamese(nn.Module):
    """A trunk on three parts of each example, one after the other, or on all of them as positions."""

    def __init__(self, stacked: bool) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3, bias=False))
        self.head = nn.Linear(3, 3)
        self.stacked = stacked
        if not stacked:
            called_repeatedly(self.trunk)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.trunk(x).unbind(1) if self.stacked else [self.trunk(part) for part in x.unbind(1)]
        return self.head((parts[0] * parts[1]).tanh() - parts[2])


def twins() -> tuple[Siamese, Siamese, Tensor, Tensor]:
    torch.manual_seed(0)
    one, other = Siamese(False).double(), Siamese(True).double()
    other.load_state_dict(one.state_dict())
    return one, other, torch.randn(6, 3, 4, dtype=torch.float64), torch.randint(3, (6,))


def same(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("source", ["sampled", "exact", "empirical", "forward_only"])
@pytest.mark.parametrize("approximation", ["kfac", "tkfac", "ekfac", "tekfac", "diagonal", "dense"])
def test_calls_are_positions(approximation: str, source: str) -> None:
    one, other, x, y = twins()
    if source == "forward_only" and approximation != "kfac":
        pytest.skip("it has no cotangents")
    found, wanted = (
        kf.estimate(m, kf.Categorical(), [(x[:4], y[:4]), (x[4:], y[4:])], approximation=approximation, source=source)
        for m in (one, other)
    )
    same(found.to_dense(), wanted.to_dense())


@pytest.mark.parametrize("approximation", ["kfac", "tkfac"])
def test_calls_are_positions_that_are_reduced(approximation: str) -> None:
    one, other, x, y = twins()
    found, wanted = (
        kf.estimate(m, kf.Categorical(), (x, y), approximation=approximation, sharing="reduce") for m in (one, other)
    )
    same(found.to_dense(), wanted.to_dense())


def test_dense_blocks_are_those_of_the_exact_matrix() -> None:
    model, _, x, y = twins()
    exact = kf.reference.ggn(model, kf.Categorical(), x)
    found = kf.estimate(model, kf.Categorical(), (x, y), approximation="dense", source="exact", norm="full")
    blocks = found.to_dense()
    same(blocks, torch.where(blocks != 0, exact, 0.0))
    assert (blocks != 0).sum() > 500


class Recurrent(nn.Module):
    """A recurrent network over tokens, whose embedding and cell are called at each of them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = called_repeatedly(nn.Embedding(7, 4))
        self.cell = called_repeatedly(nn.Linear(9, 5))
        self.out = nn.Linear(5, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        state, states = self.embed.weight.new_zeros(len(tokens), 5), []
        for token in tokens.unbind(1):
            state = torch.tanh(self.cell(torch.cat((self.embed(token), state), dim=1)))
            states.append(state)
        return self.out(torch.stack(states, dim=1))


def test_a_recurrent_cell_has_the_exact_diagonal_and_its_factors_by_hand() -> None:
    torch.manual_seed(1)
    model, tokens = Recurrent().double(), torch.randint(7, (3, 4))
    likelihood, targets = kf.Categorical(class_dim=-1), torch.randint(7, (3, 4))
    exact = kf.reference.ggn(model, likelihood, tokens)
    diagonal = kf.estimate(model, likelihood, (tokens, targets), approximation="diagonal", source="exact")
    same(diagonal.to_dense().diagonal(), exact.diagonal())

    inputs: list[Tensor] = []
    handle = model.cell.register_forward_hook(lambda module, args, output: inputs.append(args[0].detach()))
    model(tokens)
    handle.remove()
    rows = torch.cat([torch.cat((x, torch.ones_like(x[:, :1])), dim=1) for x in inputs])
    block = kf.estimate(model, likelihood, (tokens, targets), source="exact").blocks["cell"]
    same(block.input, rows.T @ rows / len(rows))  # type: ignore[attr-defined]
    same(block.output.trace(), _output_trace(model, tokens))  # type: ignore[attr-defined]


def _output_trace(model: Recurrent, tokens: Tensor) -> Tensor:
    """``(1/D) Σ |g|²`` over columns of the root, examples and calls, by autograd on the cell's outputs."""
    outputs: list[Tensor] = []
    handle = model.cell.register_forward_hook(lambda module, args, output: outputs.append(output))
    logits = model(tokens)
    handle.remove()
    total = logits.new_zeros(())
    for column in kf.Categorical(class_dim=-1).root_columns(logits.detach()):
        for example in range(len(tokens)):
            for term in range(tokens.shape[1]):
                seed = torch.zeros_like(logits)
                seed[example, term] = column[example, term]
                if seed.any():
                    pulled = torch.autograd.grad(
                        logits, outputs, seed, retain_graph=True, allow_unused=True, materialize_grads=True
                    )
                    total = total + sum(p.square().sum() for p in pulled)
    return total / tokens.numel()


@pytest.mark.parametrize("optimizer", [kf.optim.KFAC, kf.optim.TKFAC, kf.optim.EKFAC])
def test_training_takes_the_steps_of_stacked_inputs(optimizer: Callable[..., torch.optim.Optimizer]) -> None:
    one, other, x, y = twins()
    ends = []
    for model in (one, other):
        steps = optimizer(
            model, kf.Categorical(), lr=0.1, damping=0.1, stats_every=2, generator=torch.Generator().manual_seed(3)
        )
        for _ in range(5):
            steps.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            steps.step()
        ends.append(torch.nn.utils.parameters_to_vector(model.parameters()).detach())
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-8, atol=1e-10)


def trained(model: nn.Module, x: Tensor, y: Tensor, **options: object) -> Tensor:
    """Parameters after three steps."""
    generator = torch.Generator().manual_seed(3)
    steps = kf.optim.KFAC(model, kf.Categorical(), lr=0.1, damping=0.1, generator=generator, **options)  # type: ignore[arg-type]
    for _ in range(3):
        steps.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        steps.step()
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach()


@pytest.mark.parametrize("options", [{"stats_forward": "own"}, {"stats_examples": 3}, {"invert_every": 2}])
def test_forms_of_gathering(options: dict[str, object]) -> None:
    one, other, x, y = twins()
    ends = [trained(model, x, y, **options) for model in (one, other)]
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-8, atol=1e-10)


def test_rows_in_place_of_gradients() -> None:
    class Iterated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 64), nn.Linear(64, 3)
            self.cell = called_repeatedly(nn.Linear(64, 64))

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            for _ in range(3):
                h = torch.tanh(self.cell(h))
            return self.last(h)

    torch.manual_seed(0)
    model = Iterated().double()
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randint(3, (6,))
    wanted = trained(copy.deepcopy(model), x, y, kl_clip=None)
    torch.testing.assert_close(trained(model, x, y, kl_clip=None, gradients="rows"), wanted, rtol=1e-8, atol=1e-10)


def test_verify_and_a_probe_find_them_right() -> None:
    model, _, x, y = twins()
    kf.verify(model, kf.Categorical(), (x, y), source="exact").raise_if(scale=1e-8)
    kf.verify(model, kf.Categorical(), (x, y), source=Sampled(8)).raise_if(scale=0.5)


def test_a_call_that_the_outputs_do_not_depend_on_has_zero_cotangents() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = called_repeatedly(nn.Linear(3, 3))

        def forward(self, x: Tensor) -> Tensor:
            kept = self.layer(x)
            self.layer(2 * x)
            return kept

    model, x = Two().double(), torch.randn(4, 3, dtype=torch.float64)
    block = kf.estimate(model, kf.Gaussian(), (x, x), source="exact").blocks["layer"]
    both = torch.cat((x, 2 * x))
    rows = torch.cat((both, torch.ones_like(both[:, :1])), dim=1)
    same(block.input, rows.T @ rows / 8)  # type: ignore[attr-defined]


def test_weights_used_besides_the_calls_are_refused() -> None:
    class Besides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = called_repeatedly(nn.Linear(3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x)) + nn.functional.linear(x, self.layer.weight)

    x = torch.randn(4, 3)
    with pytest.raises(kf.TapeError, match="in another way than through their calls"):
        kf.estimate(Besides(), kf.Gaussian(), (x, x))


def test_what_cannot_be_declared_is_named() -> None:
    with pytest.raises(TypeError, match="BatchNorm1d has no layer whose calls"):
        called_repeatedly(nn.BatchNorm1d(3))
    with pytest.raises(TypeError, match="not int"):
        called_repeatedly(3)  # type: ignore[type-var]


class Views(nn.Module):
    """A convolutional trunk on two views of each example, one after the other, or on all of them as one batch."""

    def __init__(self, stacked: bool) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Tanh(), nn.Conv2d(3, 2, 2))
        self.trunk[1].requires_grad_(False)
        self.trunk.eval()
        self.head = nn.Linear(2, 3)
        self.stacked = stacked
        if not stacked:
            called_repeatedly(self.trunk)

    def forward(self, x: Tensor) -> Tensor:
        if self.stacked:
            first, second = self.trunk(x.transpose(0, 1).flatten(0, 1)).unflatten(0, (2, -1))
        else:
            first, second = (self.trunk(view) for view in x.unbind(1))
        return self.head((first * second).mean((2, 3)))


@pytest.mark.parametrize("approximation", ["kfac", "tkfac"])
def test_calls_of_convolutions_are_further_examples(approximation: str) -> None:
    torch.manual_seed(0)
    one, other = Views(False).double(), Views(True).double()
    other.load_state_dict(one.state_dict())
    x, y = torch.randn(5, 2, 2, 4, 4, dtype=torch.float64), torch.randint(3, (5,))
    found, wanted = (kf.estimate(m, kf.Categorical(), (x, y), approximation=approximation) for m in (one, other))
    same(found.to_dense(), wanted.to_dense())
    for options in ({"approximation": "ekfac"}, {"source": "exact"}, {"sharing": "reduce"}):
        with pytest.raises(kf.TapeError, match=r"several times, here \['trunk.0', 'trunk.3'\]"):
            kf.estimate(one, kf.Categorical(), (x, y), **options)  # type: ignore[arg-type]
    steps = kf.optim.KFAC(one, kf.Categorical(), lr=0.1, stats_examples=3)
    with pytest.raises(kf.TapeError, match=r"stats_examples does not take .*several times"):
        one(x)
    del steps
    with pytest.raises(kf.TapeError, match="equally large"):
        kf.estimate(Unequal(), kf.Gaussian(), (x[:, 0], x[:, 0]))


class Unequal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = called_repeatedly(nn.Conv2d(2, 2, 1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.layer(x[..., :1])


def test_norms_over_the_batch_are_left_out_by_name() -> None:
    model = called_repeatedly(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    x = torch.randn(4, 3)
    with pytest.warns(kf.CoverageWarning, match="1.weight, 1.bias .*calls of a BatchNorm1d stay apart"):
        found = kf.estimate(model, kf.Gaussian(), (x, x))
    assert list(found.blocks) == ["0"]


@pytest.mark.parametrize("approximation", ["xkfac", "kkfac", "kfac_tridiagonal"])
def test_approximations_that_read_the_graph_refuse_them(approximation: str) -> None:
    layer, x = called_repeatedly(nn.Linear(3, 3)), torch.randn(4, 3)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    if approximation != "kfac_tridiagonal":
        model.append(nn.BatchNorm1d(3))
    with pytest.raises((kf.TapeError, ValueError), match=f"{approximation}.*several times|more than once|tied"):
        kf.estimate(model, kf.Gaussian(), (x, x), approximation=approximation)


def test_the_recursion_refuses_them() -> None:
    layer, x = called_repeatedly(nn.Linear(3, 3)), torch.randn(4, 3)
    with pytest.raises((kf.TapeError, ValueError)):
        kf.estimate(nn.Sequential(layer, nn.Tanh(), layer), kf.Gaussian(), (x, x), source="recursive")


def test_batches_of_calls_must_be_the_same() -> None:
    class Unlike(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = called_repeatedly(nn.Linear(3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + self.layer(x[:2]).mean(0)

    x = torch.randn(4, 3)
    with pytest.raises(kf.TapeError, match="batches of 4 and 2"):
        kf.estimate(Unlike(), kf.Gaussian(), (x, x))


def test_undeclared_ones_are_told_how() -> None:
    model, _, x, y = twins()
    for part in model.trunk:
        part.__dict__.pop("_kronfac_called_repeatedly", None)
    with pytest.raises(kf.TapeError, match=r"used more than once.*called_repeatedly"):
        kf.estimate(model, kf.Categorical(), (x, y))


def test_copies_are_declared_too() -> None:
    cell = called_repeatedly(nn.Linear(3, 3))
    x = torch.randn(4, 3)
    for other in (copy.deepcopy(cell), pickle.loads(pickle.dumps(cell))):
        kf.estimate(nn.Sequential(other, nn.Tanh(), other), kf.Gaussian(), (x, x))
