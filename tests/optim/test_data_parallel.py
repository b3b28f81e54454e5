"""Two processes with half of the data each have the factors, and take the steps, of one with all of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.optim import data_parallel
from tests.optim.hand_kfac import network
from tests.optim.unclipped import unclipped

import kronfac as kf


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_two_processes_are_as_good_as_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(data_parallel.work, (str(tmp_path),), nprocs=data_parallel.WORLD)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(data_parallel.WORLD)]
    model = network()
    wanted = data_parallel.train(model, model, None, **data_parallel.RUNS["exact"])
    assert found[0]["exact"].keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(
            found[0]["exact"][name], tensor, rtol=1e-10, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}"
        )
    for run in data_parallel.RUNS:
        for name, tensor in found[0][run].items():
            assert torch.equal(found[1][run][name], tensor), f"{run}: the processes parted at {name}"
    for name, tensor in found[0]["uninterrupted"].items():
        assert torch.equal(found[0]["resumed"][name], tensor), f"a resumed run differs in {name}"
        assert torch.equal(found[1]["resumed"][name], tensor), f"resumed processes parted at {name}"
    # Signs of eigenvectors are arbitrary; the steps are not, and all of them went through the eigenbasis.
    alone = data_parallel.train(model := network(), model, None, **data_parallel.RUNS["ekfac"])
    for name in (name for name in alone if name.startswith("parameter")):
        torch.testing.assert_close(found[0]["ekfac"][name], alone[name], rtol=1e-8, atol=1e-10)
    # Layers that one process calls and the other does not.
    for run, (optimizer, options) in data_parallel.EXPERTS.items():
        alone = data_parallel.train_experts(model := data_parallel.Experts(), model, None, optimizer, **options)
        for part in found:
            torch.testing.assert_close(part["experts"][run], alone, rtol=1e-9, atol=1e-12)
    for part in found:
        assert "Layers ['experts.0', 'experts.1'] were called in some processes" in part["experts"]["refused"]
    # The wrapper in another mode; processes that have nothing to do with each other; one with fewer batches, or none.
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[0]["static graph"][name], tensor, rtol=1e-10, atol=1e-12)
    for run in ("static graph", "static graph, captured"):
        for name, tensor in found[0][run].items():
            assert torch.equal(found[1][run][name], tensor), f"{run}: the processes parted at {name}"
    for rank, part in enumerate(found):
        alone = data_parallel.train_apart(model := network(seed=rank), model, rank)
        for name in (name for name in alone if name.startswith("parameter")):
            torch.testing.assert_close(part["apart"][name], alone[name], rtol=1e-9, atol=1e-12)
        for name, curvature in data_parallel.estimates(None).items():
            torch.testing.assert_close(part["estimates"][name], curvature, rtol=1e-10, atol=1e-12)
        assert "join(throw_on_early_termination=True)" in part["refused"]["join"]
        assert "approximation='ekfac' cannot do with" in part["refused"]["basis"]
        for name in ("optimiser", "estimate", "operator"):
            assert "are distributed over processes (fully_shard" in part["refused"][name]
    assert not torch.equal(found[0]["clipped"]["parameter 0.weight"], found[0]["exact"]["parameter 0.weight"])


def test_processes_draw_labels_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    states = []
    for rank in range(2):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        states.append(unclipped(network(), kf.Categorical(), lr=0.1)._estimator.generator.get_state())
    assert not torch.equal(*states)
