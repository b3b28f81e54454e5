"""A limit on the width of factors: who gets what, and that each part is what it is alone."""

from __future__ import annotations

import pytest
import torch
from tests.exactness_helpers import double, draw
from torch import nn
from torch.nn import functional as F

import kronfac as kf
from kronfac.approximations import Limited

LABELS = torch.arange(20) % 9


class Words(nn.Module):
    """A language model in small: many tokens in, many tokens out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 3)
        self.norm = nn.LayerNorm(3)
        self.middle = nn.Linear(3, 4)
        self.head = nn.Linear(4, 9)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.middle(self.norm(self.embedding(tokens)))))  # type: ignore[no-any-return]


def test_each_layer_has_the_block_that_its_own_approximation_gives() -> None:
    model, tokens = double(Words()), torch.arange(20) % 9
    found = kf.estimate(model, kf.Categorical(), (tokens, LABELS), approximation=Limited(8), source="exact")
    kinds = {name: block.kind for name, block in found.blocks.items()}
    assert kinds["embedding"] == "diagonal_kronecker"  # nine tokens, but a diagonal
    assert kinds["head"] == "diagonal"
    for name, alone in (("kfac", "middle"), ("kfac", "norm"), ("diagonal", "head")):
        other = kf.estimate(model, kf.Categorical(), (tokens, LABELS), approximation=name, source="exact")
        torch.testing.assert_close(found.blocks[alone].to_dense(), other.blocks[alone].to_dense(), rtol=1e-12, atol=0)


def test_the_limit_is_the_widest_factor_that_is_kept() -> None:
    model = Words()
    report = kf.coverage(model, approximation=Limited(9))
    assert not any(row.block == "diagonal" for row in report.rows)
    report = kf.coverage(model, approximation=Limited(8))
    assert {row.parameter for row in report.rows if row.block == "diagonal"} == {"head.weight", "head.bias"}
    head = nn.Linear(8, 50_000, device="meta")
    assert kf.coverage(head, approximation="kfac").rows[0].factor_bytes > 9e9
    assert kf.coverage(head, approximation=Limited(8192)).rows[0].factor_bytes < 2e6


def test_it_trains_and_resumes() -> None:
    torch.manual_seed(0)
    model, tokens = Words(), torch.arange(20) % 9
    optimizer = kf.optim.KFAC(
        model, kf.Categorical(), lr=0.3, approximation=Limited(8), stats_every=1, invert_every=2, damping=1e-2
    )
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(tokens), LABELS)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    again = kf.optim.KFAC(
        Words(), kf.Categorical(), lr=0.3, approximation=Limited(8), stats_every=1, invert_every=2, damping=1e-2
    )
    again.load_state_dict(optimizer.state_dict())
    one, two = (o.curvature().blocks["head"].to_dense() for o in (optimizer, again))
    assert torch.equal(one, two)


def test_parts_may_be_others_and_bring_what_they_need() -> None:
    model, x = double(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 9))), draw(20, 3)
    both = Limited(8, base=kf.approximations.EKFAC(), wide=kf.approximations.KFAC())
    assert both.passes == kf.approximations.EKFAC().passes
    found = kf.estimate(model, kf.Categorical(), [(x, LABELS)], approximation=both, source="exact")
    assert found.blocks["0"].kind == "eigen_kronecker"
    assert found.blocks["2"].kind == "kronecker"
    with pytest.raises(ValueError, match="needs paired statistics"):
        kf.estimate(model, kf.Categorical(), [(x, LABELS)], approximation=Limited(8), source="recursive")


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        ((0,), ValueError, "width=0"),
        ((True,), ValueError, "width=True"),
        ((8.0,), ValueError, "width=8.0"),
        ((8, "kfac"), TypeError, "base must be"),
        ((8, None, kf.approximations.KKFAC()), TypeError, "wide must be"),
    ],
)
def test_arguments_that_are_refused(arguments: tuple[object, ...], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        Limited(*arguments)  # type: ignore[arg-type]
