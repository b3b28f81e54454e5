"""On a GPU everything gives what it gives on the CPU, in float64 and with sources that draw nothing.

``KRONFAC_TEST_DEVICE=cpu`` runs the same tests without a GPU, against themselves.
"""

from __future__ import annotations

import copy
import io
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.exactness_helpers import double, draw, relative
from tests.layers.layer_cases import CASES
from tests.linalg.test_rounded import cosine, in_range, rows_in_range
from torch import Tensor, nn
from torch.nn import functional as F
from typer.testing import CliRunner

import kronfac as kf
from kronfac.linalg.rounded import RoundedProduct, Workspace

DEVICE = os.environ.get("KRONFAC_TEST_DEVICE", "cuda")
TOLERANCE = 1e-9
GRAPHED = (
    "kfac_tridiagonal",
    "xkfac",
    "xkfac_trace",
    "kkfac",
)  # couple layers or examples: a feed-forward net of layers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def _full_precision() -> Iterator[None]:
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, benchmark=False, allow_tf32=False):
        yield


def here(value: Any) -> Any:
    """A copy on the device."""
    if isinstance(value, nn.Module):
        return copy.deepcopy(value).to(DEVICE)
    return value.to(DEVICE) if isinstance(value, Tensor) else value


def network() -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 3, stride=2), nn.Tanh()]
    return double(nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 5), nn.Tanh(), nn.Linear(5, 3)))


def perceptron(norm: bool = False) -> nn.Module:
    middle: list[nn.Module] = [nn.BatchNorm1d(6)] if norm else []
    return double(nn.Sequential(nn.Linear(4, 6), *middle, nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)))


def images(seed: int = 0, count: int = 40) -> tuple[Tensor, Tensor]:
    return draw(count, 2, 6, 6, seed=seed), torch.randint(3, (count,), generator=torch.Generator().manual_seed(seed))


def vectors(seed: int = 0, count: int = 12) -> tuple[Tensor, Tensor]:
    return draw(count, 4, seed=seed), torch.randint(3, (count,), generator=torch.Generator().manual_seed(seed))


def both(curve: Callable[[nn.Module, Tensor, Tensor], Any], model: nn.Module, x: Tensor, y: Tensor) -> tuple[Any, Any]:
    return curve(copy.deepcopy(model), x, y), curve(here(model), here(x), here(y))


def same(found: Any, wanted: Any) -> None:
    assert found.device.type == torch.device(DEVICE).type
    assert relative(found.cpu(), wanted) <= TOLERANCE


# ------------------------------------------------------------------------------------------ curvature
@pytest.mark.parametrize("approximation", ["kfac", "diagonal", "dense"])
@pytest.mark.parametrize("case", CASES)
def test_blocks_of_every_layer(case: str, approximation: str) -> None:
    module, x = CASES[case].module(), CASES[case].input()
    y = draw(*module(x).shape, seed=5)

    def curve(model: nn.Module, x: Tensor, y: Tensor) -> kf.BlockDiagonal:
        return kf.estimate(model, kf.Gaussian(), (x, y), approximation=approximation, source="exact")

    wanted, found = both(curve, module, x, y)
    for name, block in wanted.blocks.items():
        same(found.blocks[name].to_dense(), block.to_dense())


@pytest.mark.parametrize("source", ["exact", "empirical", "forward_only", "recursive", "sampled"])
@pytest.mark.parametrize("approximation", sorted(kf.approximations.APPROXIMATIONS))
def test_every_approximation_from_every_source(approximation: str, source: str) -> None:
    """Products and traces, or the same refusal; sampled labels differ between devices, so are only looked at."""
    graphed = approximation in GRAPHED
    model, (x, y) = (perceptron("kfac" not in approximation[:4]), vectors()) if graphed else (network(), images())

    def curve(model: nn.Module, x: Tensor, y: Tensor) -> Any:
        try:
            return kf.estimate(model, kf.Categorical(), (x, y), approximation=approximation, source=source)
        except ValueError as error:
            return str(error)

    wanted, found = both(curve, model, x, y)
    if isinstance(wanted, str):
        assert found == wanted
        return
    names = dict(model.named_parameters())
    vector = {name: draw(*names[name].shape, seed=7) for name in wanted.parameter_names}
    products = found.matmul({name: here(v) for name, v in vector.items()})
    for name, product in wanted.matmul(vector).items():
        if source == "sampled":
            assert products[name].isfinite().all()
        else:
            same(products[name], product)
    if source != "sampled":
        assert float(found.trace()) == pytest.approx(float(wanted.trace()), rel=TOLERANCE)


@pytest.mark.parametrize(
    ("approximation", "rule"),
    [
        *itertools.product(["kfac", "tkfac", "ekfac", "diagonal", "dense"], ["factored", "exact", "normal"]),
        ("tkfac", "trace_restricted"),
    ],
)
def test_inverses(approximation: str, rule: str) -> None:
    model, (x, y) = network(), images()

    def curve(model: nn.Module, x: Tensor, y: Tensor) -> Any:
        return kf.estimate(model, kf.Categorical(), (x, y), approximation=approximation, source="exact")

    wanted, found = both(curve, model, x, y)
    vector = {name: draw(*p.shape, seed=7) for name, p in model.named_parameters()}
    solved = found.factorise(0.1, rule).apply({name: here(v) for name, v in vector.items()})
    for name, tensor in wanted.factorise(0.1, rule).apply(vector).items():
        same(solved[name], tensor)


@pytest.mark.parametrize(
    "likelihood", [kf.Categorical(), kf.Bernoulli(), kf.Gaussian()], ids=lambda it: it.__class__.__name__
)
def test_operators_and_reference(likelihood: kf.Likelihood) -> None:
    model, (x, y) = perceptron(), vectors()
    targets = y if isinstance(likelihood, kf.Categorical) else F.one_hot(y, 3).double()
    vector = {name: draw(*p.shape, seed=7) for name, p in model.named_parameters()}
    moved = {name: here(v) for name, v in vector.items()}
    for operator in (kf.GaussNewtonOperator, kf.HessianOperator):
        wanted = operator(copy.deepcopy(model), likelihood, (x, targets)).matmul(vector)
        found = operator(here(model), likelihood, (here(x), here(targets))).matmul(moved)
        for name in wanted:
            same(found[name], wanted[name])
    same(
        kf.reference.ggn(here(model), likelihood, here(x), here(targets)),
        kf.reference.ggn(model, likelihood, x, targets),
    )


# ------------------------------------------------------------------------------------------ training
def _kldwrm(variant: str) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: kf.optim.KLDWRM(
        model, kf.Categorical(), 10.0, variant=variant, rho=0.3, n_cap=2, source="exact", damping=0.1, stats_every=1
    )


def _kfac(**options: Any) -> Callable[[nn.Module], torch.optim.Optimizer]:
    options = {"lr": 0.1, "damping": 0.1, "source": "exact", "stats_every": 1, "invert_every": 4, **options}
    return lambda model: kf.optim.KFAC(model, kf.Categorical(), **options)


def _other(name: str, **options: Any) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: getattr(kf.optim, name)(model, kf.Categorical(), **options)


OPTIMISERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "kfac": _kfac(),
    "kfac, average and decay": _kfac(average=0.9, weight_decay=0.01),
    "kfac, exact damping": _kfac(damping_rule="exact"),
    "kfac, asynchronous": _kfac(asynchronous=2),
    "kfac, a forward for the statistics": _kfac(stats_forward="own"),
    "kfac, inverses from those of before": _kfac(inverse="newton_schulz"),
    "kfac, asynchronous inverses from those of before": _kfac(inverse="newton_schulz", asynchronous=2),
    "kfac, dense": _kfac(approximation="dense"),
    "kfac, diagonal": _kfac(approximation="diagonal"),
    "ekfac": _other("EKFAC", lr=0.1, damping=0.1, source="exact", stats_every=1, invert_every=2),
    "tkfac": _other("TKFAC", lr=0.1, damping=0.1, source="exact", stats_every=1, invert_every=2),
    "so": _kldwrm("so"),
    "q": _kldwrm("q"),
    "qe": _kldwrm("qe"),
    "adaptive": _other("AdaptiveKFAC", source="exact"),
    "kfra": _other("KFRA"),
    "kflr": _other("KFLR"),
    "hessian free": _other("HessianFree", damping=0.1, tolerance=1e-12, progress=1e-15),
}


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: Callable[[int], tuple[Tensor, Tensor]], steps: range
) -> None:
    closed = type(optimizer).__name__ in ("AdaptiveKFAC", "KFRA", "KFLR", "HessianFree") or "qe" in str(
        getattr(optimizer, "_variant", "")
    )
    for step in steps:
        x, y = (here(t) if next(model.parameters()).is_cuda else t for t in data(step))

        def loss(x: Tensor = x, y: Tensor = y) -> Tensor:
            return F.cross_entropy(model(x), y)

        if closed:
            optimizer.step(loss)
            continue
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMISERS)
def test_every_optimiser_trains_as_on_the_cpu(name: str) -> None:
    plain = name in ("kfra", "kflr", "hessian free")
    start, data = (perceptron(), vectors) if plain else (network(), images)
    models = [copy.deepcopy(start), here(start)]
    for model in models:
        train(model, OPTIMISERS[name](model), data, range(6))
    moved = 0.0
    for (key, wanted), found, first in zip(
        models[0].named_parameters(), models[1].parameters(), start.parameters(), strict=True
    ):
        torch.testing.assert_close(
            found.cpu(), wanted, rtol=1e-6, atol=1e-8, msg=lambda text, key=key: f"{key}: {text}"
        )
        moved += float((wanted - first).detach().abs().sum())
    assert moved > 1e-3


def test_rounded_products_keep_the_direction() -> None:
    gradient, output, input = (tensor.float() for tensor in in_range(300, 261, decay=1.0))
    pair = here(output), here(input)
    parts = here(gradient[:, :-1].contiguous()), here(gradient[:, -1].contiguous())
    weight, bias = RoundedProduct(*pair)(*pair, *parts, Workspace())
    assert bias is not None
    wanted, found = output @ gradient @ input, torch.cat([weight, bias.unsqueeze(1)], dim=1).cpu()
    assert cosine(found, wanted) > 0.995


def test_rounded_products_keep_the_direction_of_rows() -> None:
    g, a, output, input = rows_in_range(100, 300, 261)
    cotangents, inputs, *pair = (here(t.float().contiguous()) for t in (g, a[:, :-1], output, input))
    weight, bias = RoundedProduct(*pair).by_rows(*pair, cotangents, inputs, Workspace())
    found = torch.cat([weight, bias.unsqueeze(1)], dim=1).cpu()
    assert cosine(found, output @ (g.mT @ a) @ input) > 0.999


@pytest.mark.parametrize("name", [name for name in OPTIMISERS if name != "kfra"])  # which refuses dropout
def test_a_resumed_run_is_the_uninterrupted_one(name: str) -> None:
    """Bit for bit, with dropout and sampled labels, through a file."""
    start = double(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3)))

    def begin() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = here(start)
        return model, OPTIMISERS[name](model)

    torch.manual_seed(0)
    model, optimizer = begin()
    train(model, optimizer, vectors, range(3))
    stream = io.BytesIO()
    random = torch.cuda.get_rng_state() if DEVICE == "cuda" else torch.get_rng_state()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "random": random}, stream)
    train(model, optimizer, vectors, range(3, 7))
    stream.seek(0)
    saved = torch.load(stream, weights_only=True, map_location="cpu")
    again, resumed = begin()
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    (torch.cuda.set_rng_state if DEVICE == "cuda" else torch.set_rng_state)(saved["random"])
    train(again, resumed, vectors, range(3, 7))
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    model, (x, y) = here(network().float()), images(count=64)
    x, y = here(x.float()), here(y)
    optimizer = kf.optim.KFAC(model, kf.Categorical(), lr=0.05, damping=0.1, stats_every=1, invert_every=2)
    scaler = torch.amp.GradScaler(DEVICE, enabled=dtype == torch.float16)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        with torch.autocast(DEVICE, dtype):
            loss = F.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(block.to_dense().dtype == torch.float32 for block in optimizer.curvature().blocks.values())


def test_bfloat16_statistics_are_near_those_of_float32() -> None:
    model, (x, y) = here(network().float()), images(count=256)
    x, y = here(x.float()), here(y)
    plain = kf.estimate(model, kf.Categorical(), (x, y), source="exact")
    optimizer = kf.optim.KFAC(model, kf.Categorical(), lr=0.05, source="exact", stats_every=1)
    with torch.autocast(DEVICE, torch.bfloat16):
        F.cross_entropy(model(x), y).backward()
    for name, block in optimizer.curvature().blocks.items():
        assert relative(block.to_dense(), plain.blocks[name].to_dense()) < 0.03


@pytest.mark.skipif(DEVICE != "cuda", reason="a CPU multiplies what has 16 bits as float32")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [case for case in CASES if "linear" in case or "conv" in case])
def test_moments_of_16_bits_are_those_of_the_same_numbers(case: str, dtype: torch.dtype) -> None:
    layer = kf.layers.adapt_model(nn.Sequential(here(CASES[case].module().float()))).adapters["0"]
    x = here(CASES[case].input().float()).to(dtype)
    g = torch.randn_like(layer.module(x.float())).to(dtype)
    for add, shape, values in (("input", layer.d_in, x), ("output", layer.d_out, g)):
        totals = [torch.zeros(*layer.stack, shape, shape, device=DEVICE) for _ in range(2)]
        for total, tensor in zip(totals, (values, values.float()), strict=True):
            getattr(layer, f"add_{add}_gram_")(total, tensor)
        assert relative(totals[0].triu().cpu(), totals[1].triu().cpu()) < 1e-5


@pytest.mark.skipif(DEVICE != "cuda", reason="a CPU multiplies what has 16 bits as float32")
@pytest.mark.parametrize(("dtype", "mean"), [(torch.bfloat16, 2.0), (torch.bfloat16, 30.0), (torch.float16, 300.0)])
def test_batch_norm_of_16_bits_has_the_gradients_of_the_same_numbers(dtype: torch.dtype, mean: float) -> None:
    norm = nn.BatchNorm2d(5).to(DEVICE)
    layer = kf.layers.adapt_model(nn.Sequential(norm)).adapters["0"]
    x, g = (torch.randn(6, 5, 7, 3, device=DEVICE).add(offset).to(dtype) for offset in (mean, 0.1))
    found, wanted = layer.per_example_gradients(x, g), layer.per_example_gradients(x.float(), g.float())
    assert found.dtype == torch.float32
    assert relative(found.cpu(), wanted.cpu()) < 1e-4


# ------------------------------------------------------------------------------------------ the rest
def test_continual_learning(tmp_path: Path) -> None:
    model, (x, y) = perceptron(norm=True).eval(), vectors(count=40)

    def value(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        merged = kf.continual.merge_batchnorm(model)
        curvature = kf.estimate(merged.folded(), kf.Categorical(), (x, y), source="exact")
        penalty = kf.continual.QuadraticPenalty(curvature, strength=10.0)
        penalty.update(curvature, combine="nearest")
        kf.continual.save(penalty, tmp_path / "penalty.safetensors")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
        return kf.continual.load(tmp_path / "penalty.safetensors", merged.folded())(merged.parameters()).detach()

    wanted, found = both(value, model, x, y)
    same(found, wanted)


def test_storage(tmp_path: Path) -> None:
    model, (x, y) = here(network()), images()
    curvature = kf.estimate(model, kf.Categorical(), (here(x), here(y)))
    kf.save(curvature, tmp_path / "curvature.safetensors")
    loaded = kf.load(tmp_path / "curvature.safetensors", model)
    for name, block in curvature.blocks.items():
        same(loaded.blocks[name].to_dense().to(DEVICE), block.to_dense().cpu())


def test_coverage_and_verification() -> None:
    model, (x, y) = here(network()), images()
    assert "conv" in str(kf.coverage(model)).lower()
    kf.verify(model, kf.Categorical(), (here(x), here(y)))


def test_command_line(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    from kronfac.cli.app import app

    command = ["train", "digits-autoencoder", "--optimizer", "kfac", "--steps", "8", "--device", DEVICE, "--json"]
    result = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
