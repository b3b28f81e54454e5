"""The networks for a GPU: their published sizes, and tiny ones of the same kind that KFAC covers and trains."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import kronfac as kf
from kronfac.approximations.diagonal import DiagonalStatistic
from kronfac.experiments.bench.workloads import make, prepared
from kronfac.experiments.errors import ExperimentError
from kronfac.experiments.models import ResNet, gpt2, resnet50, vgg16
from kronfac.optim import KFAC


def test_published_numbers_of_parameters() -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in resnet50().parameters()) == 25_557_032
        network = gpt2()
    assert sum(p.numel() for p in network.parameters()) == 163_037_184
    assert network.head.weight.numel() == 38_597_376
    with torch.device("meta"):
        assert sum(p.numel() for p in vgg16().parameters()) == 14_719_818
        assert sum(p.numel() for p in vgg16(batch_norm=True).parameters()) == 14_724_042
        assert sum(p.numel() for p in ResNet(5).parameters()) == 464_154


def test_resnet50_has_its_strides_on_the_three_by_three() -> None:
    network = resnet50(10, (1, 2, 1, 1), 4)
    strided = [n for n, m in network.named_modules() if isinstance(m, torch.nn.Conv2d) and m.stride == (2, 2)]
    assert strided == ["conv", *(f"stages.{i}.{n}" for i in (1, 3, 4) for n in ("conv2", "shortcut.0"))]
    assert network(torch.randn(2, 3, 64, 64)).shape == (2, 10)


def test_gpt_does_not_look_ahead() -> None:
    torch.manual_seed(0)
    network = gpt2(20, 8, 8, 2, 2)
    text = torch.randint(20, (2, 8))
    changed = text.clone()
    changed[:, 5:] = (text[:, 5:] + 1) % 20
    before, after = network(text), network(changed)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["resnet50-small", "gpt2-small"])
def test_every_parameter_is_covered_and_trained(name: str, precision: str) -> None:
    work = make(name, precision=precision)
    report = kf.coverage(work.model, approximation=work.approximation)
    assert all(row.state != "none" for row in report.rows)
    optimizer = KFAC(work.model, work.likelihood, lr=0.1, damping=1.0, approximation=work.approximation, burn_in=0)
    before = work.forward()
    assert before.dtype == torch.float32
    work.forward_backward()
    optimizer.step()
    assert work.forward() < before
    wide = [n for n, s in optimizer._estimator.statistics.items() if isinstance(s, DiagonalStatistic)]
    assert wide == (["head"] if name == "gpt2-small" else [])


def test_tokens_are_predicted_at_every_position() -> None:
    work = make("gpt2-small")
    assert (work.inputs[:, 1:] == work.targets[:, :-1]).all()
    outputs = work.model(work.inputs)
    torch.testing.assert_close(work.loss(outputs, work.targets), F.cross_entropy(outputs.movedim(-1, 1), work.targets))
    torch.testing.assert_close(work.loss(outputs, work.targets), work.likelihood.loss(outputs, work.targets))


def test_tf32_is_set_within_the_block_alone() -> None:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    for precision, allowed in (("tf32", True), ("float32", False), ("bfloat16", False)):
        with prepared("cpu", precision):
            assert (matmul.allow_tf32, cudnn.allow_tf32) == (allowed, allowed)
        assert (matmul.allow_tf32, cudnn.allow_tf32) == before


@pytest.mark.parametrize(
    ("name", "device", "precision", "message"),
    [
        ("vgg", "cpu", "float32", "no workload 'vgg'"),
        ("small", "tpu", "float32", "no device 'tpu'"),
        ("small", "cpu", "float16", "no precision 'float16'"),
        ("small", "cpu", "tf32", "tf32 is a format of CUDA devices"),
    ],
)
def test_what_is_not_there_is_refused(name: str, device: str, precision: str, message: str) -> None:
    with pytest.raises(ExperimentError, match=message):
        make(name, device=device, precision=precision)
