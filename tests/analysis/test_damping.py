"""What damping rules add, against the dense damped blocks."""

from __future__ import annotations

import math

import pytest
import torch
from tests.exactness_helpers import double, draw
from torch import Tensor, nn

import kronfac as kf
from kronfac.analysis import LayerDamping, damping_during_training, damping_of


def network() -> nn.Module:
    return double(
        nn.Sequential(
            nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)
        )
    )


def data(count: int = 10) -> tuple[Tensor, Tensor]:
    return draw(count, 4, 3, 3, seed=1), torch.arange(count) % 3


def by_key(rows: list[LayerDamping]) -> dict[tuple[str, str], LayerDamping]:
    return {(row.rule, row.layer): row for row in rows}


@pytest.mark.parametrize("damping", [1e-3, 2.0])
def test_figures_against_dense_damped_blocks(damping: float) -> None:
    curvature = kf.estimate(network().eval(), kf.Categorical(), data(), source="exact")
    rows = by_key(damping_of(curvature, damping, ["factored", "exact"]))
    for layer, block in curvature.blocks.items():
        dense, size = block.to_dense(), block.shape.numel()
        for rule in ("factored", "exact"):
            row = rows[rule, layer]
            assert row.trace == pytest.approx(float(dense.trace()), rel=1e-10)
            assert row.mean == pytest.approx(row.trace / size, rel=1e-10)
            assert row.printed_input == pytest.approx(math.sqrt(damping) / (row.trace / block.shape[-1]), rel=1e-10)
            assert row.printed_output == pytest.approx(math.sqrt(damping) / (row.trace / block.shape[-2]), rel=1e-10)
            # The inverse that training uses, inverted back.
            inverse = block.factorise(kf.damping.get_rule(rule)(block, damping))
            basis = torch.eye(size, dtype=torch.float64).view(size, *block.shape)
            damped = torch.linalg.inv(inverse.apply(basis).reshape(size, size))
            assert row.inflation == pytest.approx(float(damped.trace() / dense.trace()) - 1, rel=1e-7)
    conv, head, norm = rows["factored", "0"], rows["factored", "4"], rows["factored", "1"]
    assert head.input_added * head.output_added == pytest.approx(damping, rel=1e-10)
    assert conv.input_ratio == pytest.approx(conv.output_ratio, rel=1e-10)
    assert head.input_ratio == pytest.approx(head.output_ratio, rel=1e-10)  # what pi is for
    assert head.input_ratio == pytest.approx(math.sqrt(damping / head.mean), rel=1e-10)
    assert head.pi == pytest.approx(math.sqrt(head.input_mean / head.output_mean), rel=1e-10)
    assert math.isnan(norm.pi)
    assert math.isnan(norm.input_mean)
    assert rows["exact", "4"].inflation == pytest.approx(damping / head.mean, rel=1e-10)
    assert math.isnan(rows["exact", "4"].input_ratio)


@pytest.mark.parametrize("rule", sorted(kf.damping.RULES))
def test_every_registered_rule_can_be_looked_at(rule: str) -> None:
    # This rule is that of one approximation.
    approximation = "tkfac" if rule == "trace_restricted" else "kfac"
    curvature = kf.estimate(network().eval(), kf.Categorical(), data(), approximation=approximation, source="exact")
    small, large = (damping_of(curvature, damping, [rule]) for damping in (1e-4, 1e-2))
    assert [row.layer for row in small] == list(curvature.blocks)
    assert all(row.inflation >= 0 for row in small)
    assert all(b.inflation >= a.inflation for a, b in zip(small, large, strict=True))


def test_rules_of_your_own() -> None:
    curvature = kf.estimate(network().eval(), kf.Categorical(), data(), source="exact")

    def tenth(block: kf.blocks.Block, damping: float) -> kf.damping.Shift:
        return kf.damping.Uniform(0.1 * float(block.trace()) / block.shape.numel())

    assert {(row.rule, round(row.inflation, 9)) for row in damping_of(curvature, 1.0, [tenth])} == {("tenth", 0.1)}

    class Restricted(kf.damping.Shift):
        scale, input, output = torch.tensor(4.0), torch.tensor(0.5), 0.25

    (_, _, row) = damping_of(curvature, 1.0, [lambda block, damping: Restricted()])
    height, width = curvature.blocks["4"].shape
    assert row.input_mean == pytest.approx(2.0 / width)
    assert row.output_ratio == pytest.approx(0.25 / (2.0 / height))
    damped = torch.kron(
        torch.eye(height) * (2.0 / height + 0.25), torch.eye(width) * (2.0 / width + 0.5)
    )  # any balanced factors of that trace
    assert row.inflation == pytest.approx(float(damped.trace()) / row.trace - 1.0, rel=1e-6)

    class Strange(kf.damping.Shift):
        pass

    with pytest.raises(TypeError, match="gave a Strange for layer '0'"):
        damping_of(curvature, 1.0, [lambda block, damping: Strange()])


def test_a_block_of_zeros_is_all_damping() -> None:
    model = double(nn.Sequential(nn.Linear(3, 2)))
    curvature = kf.estimate(model, kf.Gaussian(), (draw(4, 3), draw(4, 2)), source="exact").scale(0.0)
    (row,) = damping_of(curvature, 0.1, ["exact"])
    assert row.inflation == row.printed_input == math.inf


def test_along_a_training_that_it_does_not_disturb() -> None:
    def train(measured: bool) -> tuple[nn.Module, list[LayerDamping]]:
        model = network().float()
        model.insert(3, nn.Dropout(0.5))  # type: ignore[union-attr]
        inputs, targets = data()[0].float(), data()[1]
        torch.manual_seed(3)
        optimizer = kf.optim.KFAC(
            model, kf.Categorical(), lr=0.1, damping=0.1, stats_every=2, invert_every=2,
            generator=torch.Generator().manual_seed(1),
        )  # fmt: skip

        def advance() -> None:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()

        if not measured:
            for _ in range(4):
                advance()
            return model, []
        rows = damping_during_training(
            model, kf.Categorical(), (inputs, targets), advance, steps=4, every=3, damping=0.1, rules=["factored"]
        )
        return model, rows

    with torch.random.fork_rng(devices=[]):
        (alone, _), (followed, rows) = train(False), train(True)
    assert all(
        torch.equal(a, b) for a, b in zip(alone.state_dict().values(), followed.state_dict().values(), strict=True)
    )
    assert list(dict.fromkeys(row.step for row in rows)) == [0, 3, 4]
    assert followed.training


def test_bad_arguments_are_named_before_training() -> None:
    steps: list[int] = []
    for options, message in (
        ({"damping": -1.0}, "damping must be finite and not negative"),
        ({"rules": ["nope"]}, "unknown damping rule 'nope'"),
        ({"every": 0}, "every must be"),
        ({"steps": -1}, "steps must be"),
    ):
        with pytest.raises(ValueError, match=message):
            damping_during_training(
                network(), kf.Categorical(), data(), lambda: steps.append(1), **{"steps": 2, **options}
            )
    assert not steps
