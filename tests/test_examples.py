"""Rows that are as many as the examples by chance are told from examples."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.exactness_helpers import double, draw
from torch import Tensor, nn

import kronfac as kf


class Positions(nn.Module):
    """As many position indices as examples."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions, self.last = nn.Embedding(7, 5), nn.Embedding(9, 5), nn.Linear(5, 3)
        double(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.last((self.words(x) + self.positions(torch.arange(x.shape[1]))).mean(1))


class TimeFirst(nn.Module):
    """Sequences with time first, as long as the batch; of the last step, or of all."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.words, self.recurrent, self.out, self.last = nn.Embedding(7, 5), nn.GRU(5, 5), nn.Linear(5, 3), last
        double(self)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.recurrent(self.words(x))[0]
        return self.out(hidden[-1] if self.last else hidden)


class Mixing(nn.Module):
    """Each output knows of all examples."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.out = nn.Embedding(7, 5), nn.Linear(5, 3)
        double(self)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.words(x).mean(1)
        return self.out(hidden - hidden.mean(0))


@pytest.mark.filterwarnings("ignore:No curvature for", "ignore:Trained without curvature")
@pytest.mark.parametrize(
    "options",
    [{"source": "exact"}, {"approximation": "ekfac"}, {"approximation": "dense"}, {"approximation": "diagonal"}],
)
@pytest.mark.parametrize(
    ("make", "text"),
    [
        (Positions, "layer 'positions''s input is [49], not the batch of 3"),
        (lambda: TimeFirst(last=True), "layer 'out''s input is [49], not the batch of 3"),
        (lambda: TimeFirst(last=False), "the outputs of the others are not what they were"),
        (Mixing, "the outputs of the others are not what they were"),
    ],
)
@pytest.mark.parametrize("size", [4, 9])
def test_rows_that_are_as_many_as_the_examples_by_chance(
    make: Callable[[], nn.Module], text: str, options: dict[str, Any], size: int
) -> None:
    model, x = make(), torch.arange(size**2).reshape(size, size) % 7
    state, mode = copy.deepcopy(model.state_dict()), model.training
    labels = torch.arange(size**2).reshape(size, size) % 3 if model(x).ndim == 3 else torch.arange(size) % 3
    likelihood = kf.Categorical(class_dim=-1)
    with pytest.raises(ValueError, match=text):
        kf.estimate(model, likelihood, (x, labels), **options)
    assert model.training == mode
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    kf.estimate(model, likelihood, (x, labels))  # K-FAC needs no examples
    optimizer = kf.optim.EKFAC(model, likelihood, lr=0.1)
    with pytest.raises(ValueError, match=text):
        model(x)
    with pytest.raises(ValueError, match=text):
        model(x)  # it is no better the second time
    del optimizer
    optimizer = kf.optim.EKFAC(model, likelihood, lr=0.1, stats_forward="own")
    with pytest.raises(ValueError, match=text):
        model(x)
    del optimizer


class Noisy(nn.Module):
    """Draws a code at random in either mode, as variational autoencoders do, from torch's generator or one of its own.

    Args:
        own: Whether it has one.
    """

    def __init__(self, own: bool) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 8), nn.Linear(4, 6)
        self.generator = torch.Generator() if own else None

    def forward(self, x: Tensor) -> Tensor:
        mean, scale = self.encoder(x).chunk(2, -1)
        return self.decoder(mean + scale.exp() * torch.randn(mean.shape, generator=self.generator))


class Detector(nn.Module):
    """Gives something else in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = self.linear(x)
        return {"logits": found} if self.training else {"classes": found.argmax(-1)}


class Squeezed(nn.Module):
    """One number for each example, without a dimension too many."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).squeeze()


@pytest.mark.parametrize(
    ("make", "batch", "likelihood"),
    [
        (lambda: Noisy(own=False), 5, kf.Bernoulli()),
        (lambda: Noisy(own=True), 5, kf.Bernoulli()),
        (Detector, 5, kf.Categorical()),
        (Squeezed, 2, kf.Bernoulli()),
    ],
)
def test_models_of_which_leaving_one_out_tells_nothing(
    make: Callable[[], nn.Module], batch: int, likelihood: kf.Likelihood
) -> None:
    model = make()
    pick = (lambda found: found["logits"]) if isinstance(model, Detector) else None
    optimizer = kf.optim.EKFAC(model, likelihood, lr=0.1, outputs=pick)
    x = torch.rand(batch, 6)
    found = model(x)
    (found if pick is None else pick(found)).square().mean().backward()
    optimizer.step()


def test_rounding_that_depends_on_the_size_of_the_batch_is_no_coupling() -> None:
    class Rounded(nn.Module):
        """Products in half precision, whose order a device chooses by the size of the batch."""

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            found = self.linear(x)
            return (found * (1.0 + (len(x) == 4) * torch.finfo(torch.bfloat16).eps)).float()

    model = Rounded()
    optimizer = kf.optim.EKFAC(model, kf.Categorical(), lr=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.rand(5, 6))
    with pytest.raises(ValueError, match="the outputs of the others"):
        kf.estimate(model, kf.Categorical(), (torch.rand(5, 6), None), approximation="ekfac")
    del optimizer


def test_no_graph_lies_beside_the_training_graph_while_one_is_left_out() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
    optimizer = kf.optim.EKFAC(model, kf.Categorical(), lr=0.1)
    graphs: list[bool] = []
    model[1].register_forward_hook(lambda module, args, output: graphs.append(output.requires_grad))
    model(torch.rand(5, 6))
    assert graphs[0]
    assert len(graphs) > 1
    assert not any(graphs[1:])
    del optimizer


class Wrapped(Mixing):
    """Gives its outputs with something beside them.

    Args:
        kind: Type of what it returns.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        z = super().forward(x)
        return {
            "tensor": z,
            "tuple": (x, z),
            "dict": {"loss": z.sum(), "logits": z},
            "object": SimpleNamespace(loss=z.sum(), logits=z),
        }[self.kind]


@pytest.mark.parametrize("kind", ["tensor", "tuple", "dict", "object"])
def test_outputs_that_are_captured_as_the_model_gave_them_are_tried(kind: str) -> None:
    model, x = Wrapped(kind), torch.arange(12).reshape(4, 3) % 7
    optimizer = kf.optim.EKFAC(model, kf.Categorical(), lr=0.1)
    with optimizer.capture() as capture:
        found = model(x)
        z = {"tensor": lambda v: v, "tuple": lambda v: v[1], "dict": lambda v: v["logits"]}.get(
            kind, lambda v: v.logits
        )(found)
        with pytest.raises(ValueError, match="the outputs of the others are not what they were"):
            capture(z)
    with optimizer.capture() as capture:
        capture(model.out(model.words(x).mean(1)))  # of parts that are called apart nothing can be known


def test_batches_of_a_warm_up_are_tried() -> None:
    model, x = Mixing(), torch.arange(12).reshape(4, 3) % 7
    optimizer = kf.optim.EKFAC(model, kf.Categorical(), lr=0.1)
    with pytest.raises(ValueError, match="the outputs of the others are not what they were"):
        optimizer.warm_up([(x, torch.arange(4) % 3)])
    assert optimizer._warmed == 0


class InPlace(nn.Module):
    """Standardises its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = double(nn.Linear(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.sub_(1.0).mul_(0.5))


def test_a_model_that_changes_its_input_changes_it_once() -> None:
    model, x = InPlace(), torch.ones(5, 3, dtype=torch.float64) * 4.0
    optimizer = kf.optim.KFAC(model, kf.Gaussian(), lr=0.1, source="exact")
    model(x)
    assert torch.equal(x, torch.full_like(x, 1.5))
    del optimizer


class Remembering(nn.Module):
    """Compares with a memory of its own under no_grad, by the layer that it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.out = double(nn.Linear(6, 4)), double(nn.Linear(4, 3))
        self.memory: Tensor
        self.register_buffer("memory", torch.ones(7, 6, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            known = self.encoder(self.memory).mean(0)
        return self.out(self.encoder(x).tanh() - known)


def test_rows_of_calls_under_no_grad_are_no_examples() -> None:
    model, x = Remembering(), torch.arange(30, dtype=torch.float64).reshape(5, 6) / 30
    optimizer = kf.optim.EKFAC(model, kf.Categorical(), lr=0.1)
    torch.nn.functional.cross_entropy(model(x), torch.arange(5) % 3).backward()
    optimizer.step()


class MeanOverTime(nn.Module):
    """The mean over a sequence, with time first on the way or not: the same function."""

    def __init__(self, time_first: bool) -> None:
        super().__init__()
        self.first, self.last, self.dim = nn.Linear(4, 5), nn.Linear(5, 3), 0 if time_first else 1
        double(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x if self.dim else x.transpose(0, 1)).tanh().mean(self.dim))


def test_weights_of_the_loss_need_rows_that_are_examples() -> None:
    likelihood = kf.Categorical(weight=torch.tensor([1.0, 5.0, 0.1], dtype=torch.float64))
    x, y = torch.randn(6, 6, 4, dtype=torch.float64), torch.arange(6) % 3
    kf.estimate(MeanOverTime(False), likelihood, (x, y))
    with pytest.raises(ValueError, match=r"The loss Categorical.*layer 'first'.*a loss without weights"):
        kf.estimate(MeanOverTime(True), likelihood, (x, y))
    kf.estimate(MeanOverTime(True), kf.Categorical(), (x, y))


class Neighbours(nn.Module):
    """Nodes of a graph, which does not fit a part of them."""

    def __init__(self, neighbours: Tensor) -> None:
        super().__init__()
        self.first, self.last, self.neighbours = nn.Linear(4, 5), nn.Linear(5, 3), neighbours
        double(self)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.neighbours @ self.last(torch.tanh(self.neighbours @ self.first(x)))
        return out


CHAIN = (torch.eye(9) + torch.diag(torch.ones(8), 1)).double()
NODES, CLASSES = draw(9, 4), torch.arange(9) % 3


@pytest.mark.parametrize(
    ("likelihood", "targets", "options", "text"),
    [
        (kf.Categorical(), CLASSES, {"source": "exact"}, "source='exact'"),
        (kf.Categorical(), CLASSES, {"approximation": "ekfac"}, "approximation='ekfac'"),
        (kf.Categorical(), CLASSES, {"approximation": "diagonal"}, "approximation='diagonal'"),
        (kf.Categorical(ignore_index=2), CLASSES, {}, "The loss Categorical.*a loss without weights"),
        (kf.Categorical(), (CLASSES, CLASSES < 2), {}, "A mask.*a loss without weights"),
    ],
)
def test_nodes_of_a_graph_are_no_examples(
    likelihood: kf.Likelihood, targets: Any, options: dict[str, Any], text: str
) -> None:
    """A part of them cannot be tried; the derivatives of outputs in the rows of other nodes tell."""
    with pytest.raises(ValueError, match=f"{text.split('.*')[0]}.*depend on the rows of others in layer 'first'"):
        kf.estimate(Neighbours(CHAIN), likelihood, [(NODES, targets)], **options)
    apart = Neighbours(torch.eye(9).double())
    kf.estimate(apart, likelihood, [(NODES, targets)], **options)


def test_nodes_that_are_masked_are_refused_in_training_too() -> None:
    model, mask = Neighbours(CHAIN), CLASSES < 2
    optimizer = kf.optim.KFAC(model, kf.Categorical(), lr=0.1)
    with pytest.raises(ValueError, match="A mask needs the examples one by one"), optimizer.capture() as capture:
        capture(model(NODES), (CLASSES, mask))
    picked = kf.optim.KFAC(model, kf.Categorical(), lr=0.1, outputs=lambda out: out[mask])
    torch.nn.functional.cross_entropy(model(NODES)[mask], CLASSES[mask]).backward()
    picked.step()  # which says the same without a mask
