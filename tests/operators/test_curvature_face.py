"""What estimated curvature gives is the caller's own, at the curvature's precision; damaged files are told so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kronfac as kf


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def estimated(approximation: str) -> Any:
    return kf.estimate(network(), kf.Categorical(), (draw(9, 5), None), approximation=approximation)


_ACTS: dict[str, Callable[[Any, dict[str, Tensor]], Any]] = {
    "matmul": lambda c, v: c.matmul(v),
    "quadratic_form": lambda c, v: {"": c.quadratic_form(v)},
    "to_dense": lambda c, v: {"": c.to_dense()},
    "diagonal": lambda c, v: c.diagonal(),
    "frobenius_norm": lambda c, v: {"": c.frobenius_norm()},
    "apply": lambda c, v: c.factorise(0.1).apply(v),
    "sqrt_apply": lambda c, v: c.factorise(0.1).sqrt_apply(v),
    "logdet": lambda c, v: {"": c.factorise(0.1).logdet()},
}


@pytest.mark.parametrize("approximation", ["kfac", "ekfac", "tkfac", "kkfac", "kfac_tridiagonal", "dense", "diagonal"])
def test_autocast_changes_no_product(approximation: str) -> None:
    """It would round factors and vectors to 16 bits, and give products of another dtype or none at all."""
    curvature = estimated(approximation)
    vector = {name: draw(*shape, seed=1) for name, shape in curvature.parameter_shapes.items()}
    for what, act in _ACTS.items():
        if approximation in ("ekfac", "dense", "diagonal") and what in ("apply", "sqrt_apply", "logdet"):
            continue  # they know exact damping alone, which is tried below
        wanted = act(curvature, vector)
        with torch.autocast("cpu", torch.bfloat16):
            found = act(curvature, vector)
        for name, tensor in wanted.items():
            assert found[name].dtype == tensor.dtype, what
            assert torch.equal(found[name], tensor), what


@pytest.mark.parametrize("approximation", ["kfac", "ekfac", "dense", "diagonal"])
def test_autocast_changes_no_exactly_damped_product(approximation: str) -> None:
    curvature = estimated(approximation)
    vector = {name: draw(*shape, seed=1) for name, shape in curvature.parameter_shapes.items()}
    inverse = curvature.factorise(0.1, "exact")
    with torch.autocast("cpu", torch.bfloat16):
        found = inverse.apply(vector)
    assert all(torch.equal(found[name], tensor) for name, tensor in inverse.apply(vector).items())


@pytest.mark.parametrize("approximation", ["diagonal", "dense", "kfac"])
def test_a_diagonal_may_be_changed(approximation: str) -> None:
    """A layer without a bias has its values' own memory as diagonal, and the curvature must not change with it."""
    model = nn.Sequential(nn.Linear(5, 3, bias=False))
    curvature = kf.estimate(model, kf.Categorical(), (draw(9, 5), None), approximation=approximation)
    before = curvature.to_dense()
    for tensor in curvature.diagonal().values():
        tensor.add_(1.0)
    assert torch.equal(curvature.to_dense(), before)


@pytest.mark.parametrize("kind", [["dense"], {"a": 1}, [], None])
def test_a_kind_that_is_no_text_is_damage(kind: object, tmp_path: Path) -> None:
    safetensors, path, model = pytest.importorskip("safetensors"), tmp_path / "curvature", network()
    save_file = pytest.importorskip("safetensors.torch").save_file
    kf.save(kf.estimate(model, kf.Categorical(), (draw(9, 5), None)), path)
    with safetensors.safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    content = json.loads(metadata["content"])
    content["layers"][0]["kind"] = kind
    save_file(tensors, path, metadata | {"content": json.dumps(content)})
    with pytest.raises(kf.storage.StorageError, match="unknown kind"):
        kf.load(path, model)
