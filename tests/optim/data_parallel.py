"""What each process of the data-parallel test does; a module of its own, so that new processes can import it."""

from __future__ import annotations

import copy
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from tests.exactness_helpers import draw
from tests.optim.hand_kfac import network
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

import kronfac as kf

#: The clip looks at a quarter of each process's own part, so that it is no longer that of one process.
RUNS: dict[str, dict[str, Any]] = {
    "exact": {"kl_clip": None},
    "clipped": {"kl_clip": 1e-4},
    "defaults": {"source": "sampled"},
    "ekfac": {"approximation": "ekfac", "kl_clip": None},
    "sub-batch": {"source": "sampled", "stats_examples": 1},
}
STEPS = 4
WORLD = 2


def batch(step: int) -> tuple[Tensor, Tensor]:
    return draw(8, 3, seed=step), torch.arange(8) % 3


def share(step: int, rank: int) -> tuple[Tensor, Tensor]:
    """Halves for the training steps, unequal parts for the statistics after them."""
    sizes = [4, 4] if step < STEPS else [6, 2]
    x, y = batch(step)
    return x.split(sizes)[rank], y.split(sizes)[rank]


def result(model: nn.Module, optimizer: kf.optim.KFAC) -> dict[str, Tensor]:
    found = {f"parameter {name}": p.detach().clone() for name, p in model.named_parameters()}
    for layer, block in optimizer.curvature().blocks.items():
        found |= {f"factor {layer}.{key}": tensor for key, tensor in block.tensors().items()}
    return found


def train(model: nn.Module, called: nn.Module, rank: int | None, **options: Any) -> dict[str, Tensor]:
    """Train the model, alone on all data or as one of several; then gather once more without a step."""
    options = {"lr": 0.1, "damping": 0.1, "source": "exact", "stats_every": 2, "burn_in": 1, "momentum": 0.5, **options}
    optimizer = kf.optim.KFAC(called, kf.Categorical(), **options)
    steps(called, optimizer, rank, 0, STEPS + 1)
    return result(model, optimizer)


def steps(called: nn.Module, optimizer: kf.optim.KFAC, rank: int | None, first: int, stop: int) -> None:
    for step in range(first, stop):
        x, y = batch(step) if rank is None else share(step, rank)
        optimizer.zero_grad()
        loss = F.cross_entropy(called(x), y)
        if step < STEPS:
            loss.backward()
            optimizer.step()


def resume(rank: int) -> dict[str, dict[str, Tensor]]:
    """Train on after a save, and train on from what the first process saved."""
    found = {}
    model = network()
    called = nn.parallel.DistributedDataParallel(model)
    optimizer = kf.optim.KFAC(called, kf.Categorical(), lr=0.1, damping=0.1, stats_every=2, burn_in=1)
    steps(called, optimizer, rank, 0, 2)
    optimizer.consolidate_state_dict()
    saved = [copy.deepcopy((model.state_dict(), optimizer.state_dict())) if rank == 0 else None]
    steps(called, optimizer, rank, 2, STEPS + 1)
    found["uninterrupted"] = result(model, optimizer)
    distributed.broadcast_object_list(saved)
    parameters, state = saved[0]
    model = network()
    model.load_state_dict(parameters)
    called = nn.parallel.DistributedDataParallel(model)
    optimizer = kf.optim.KFAC(called, kf.Categorical(), lr=0.1, damping=0.1, stats_every=2, burn_in=1)
    optimizer.load_state_dict(state)
    steps(called, optimizer, rank, 2, STEPS + 1)
    found["resumed"] = result(model, optimizer)
    return found


class Experts(nn.Module):
    """Each process calls one expert at each step, the other one at the next."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(3, 5), nn.Linear(5, 3)
        self.experts = nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5)])
        self.double()

    def forward(self, x: Tensor, expert: int) -> Tensor:
        return self.last(self.experts[expert](self.first(x).tanh()).tanh())


def train_experts(model: nn.Module, called: nn.Module, rank: int | None, optimizer: Any, **options: Any) -> Tensor:
    """Train experts, alone by one forward after the other, or as one of several processes."""
    optimizer = optimizer(called, kf.Categorical(), lr=0.1, source="exact", kl_clip=None, **options)
    for step in range(3):
        optimizer.zero_grad()
        for part in range(WORLD) if rank is None else [rank]:
            x, y = share(step, part)
            loss = F.cross_entropy(called(x, (step + part) % 2), y)
            (loss / WORLD if rank is None else loss).backward()
        optimizer.step()
    return nn.utils.parameters_to_vector(model.parameters()).detach()


#: How experts are trained.
EXPERTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "experts": (kf.optim.KFAC, {"stats_every": 2, "burn_in": 1}),
    "experts, traces": (kf.optim.TKFAC, {"scheme": "trace_restricted"}),
    "experts, asynchronously": (kf.optim.KFAC, {"asynchronous": 1, "invert_every": 2}),
}


def experts(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, (optimizer, options) in EXPERTS.items():
        model = Experts()
        called = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        found[name] = train_experts(model, called, rank, optimizer, **options)
    called = nn.parallel.DistributedDataParallel(Experts(), find_unused_parameters=True)
    try:
        train_experts(called.module, called, rank, kf.optim.EKFAC)
    except RuntimeError as error:
        found["refused"] = str(error)
    return found


def wrapped_otherwise(rank: int) -> dict[str, dict[str, Tensor]]:
    """Train under other settings of the wrapper, which are the same training."""
    found, exact = {}, RUNS["exact"]
    model = network()
    found["static graph"] = train(model, nn.parallel.DistributedDataParallel(model, static_graph=True), rank, **exact)
    model = network()
    called = nn.parallel.DistributedDataParallel(model, static_graph=True)
    optimizer = kf.optim.KFAC(called, kf.Categorical(), lr=0.1, damping=0.1, source="exact", momentum=0.5, **exact)
    for step in range(STEPS):
        x, y = share(step, rank)
        optimizer.zero_grad()
        with optimizer.capture() as capture:
            outputs = called(x)
            capture(outputs, y)
        F.cross_entropy(outputs, y).backward()
        optimizer.step()
    found["static graph, captured"] = result(model, optimizer)
    return found


def apart(rank: int) -> dict[str, Tensor]:
    """Train a network of its own in each process, which is a group by itself; one takes more steps than the other."""
    groups = [distributed.new_group([other]) for other in range(WORLD)]
    model = network(seed=rank)
    called = nn.parallel.DistributedDataParallel(model, process_group=groups[rank])
    return train_apart(model, called, rank)


def train_apart(model: nn.Module, called: nn.Module, rank: int) -> dict[str, Tensor]:
    optimizer = kf.optim.EKFAC(called, kf.Categorical(), lr=0.1, damping=0.1, source="exact", kl_clip=1e-4)
    for step in range(2 + rank):
        x, y = share(step, rank)
        optimizer.zero_grad()
        F.cross_entropy(called(x), y).backward()
        optimizer.step()
    optimizer.consolidate_state_dict()
    optimizer.load_state_dict(optimizer.state_dict())
    return result(model, optimizer)


def estimates(rank: int | None) -> dict[str, Tensor]:
    """Estimate from three batches, of which the second process has one, and then none."""
    batches, found = [batch(step) for step in range(3)], {}
    for name, first in (("one", 2), ("none", 3)):
        mine = batches if rank is None else (batches[:first], batches[first:])[rank]
        for reduction in ("mean", "sum"):
            curvature = kf.estimate(network(), kf.Categorical(reduction=reduction), mine, source="exact")
            found[f"{name}, {reduction}"] = curvature.to_dense()
    return found


def refused(rank: int) -> dict[str, str]:
    """Ask for what no process may begin."""
    found = {}
    model = network()
    called = nn.parallel.DistributedDataParallel(model)
    optimizer = kf.optim.KFAC(called, kf.Categorical(), lr=0.1)
    with called.join():
        F.cross_entropy(called(batch(0)[0]), batch(0)[1]).backward()
        try:
            optimizer.step()
        except RuntimeError as error:
            found["join"] = str(error)
    try:
        kf.estimate(network(), kf.Categorical(), [batch(0)][rank:], approximation="ekfac", source="exact")
    except RuntimeError as error:
        found["basis"] = str(error)
    sharded = fully_shard(network())
    makers = {
        "optimiser": lambda: kf.optim.KFAC(sharded, kf.Categorical(), lr=0.1),
        "estimate": lambda: kf.estimate(sharded, kf.Categorical(), batch(0)),
        "operator": lambda: kf.GaussNewtonOperator(sharded, kf.Categorical(), batch(0)),
    }
    for name, make in makers.items():
        try:
            make()
        except ValueError as error:
            found[name] = str(error)
    return found


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", f"file://{folder}/meeting", rank=rank, world_size=WORLD, timeout=timedelta(seconds=60)
    )
    try:
        found = {}
        for name, options in RUNS.items():
            model = network()
            found[name] = train(model, nn.parallel.DistributedDataParallel(model), rank, **options)
        found |= resume(rank)
        found["experts"] = experts(rank)
        found |= wrapped_otherwise(rank)
        found |= {"apart": apart(rank), "estimates": estimates(rank), "refused": refused(rank)}
        if rank == 0:  # by itself, of its own batch
            kf.verify(network(), kf.Categorical(), share(0, rank)).raise_if(scale=1e-6)
        torch.save(found, Path(folder) / f"{rank}.pt")
        distributed.barrier()  # who leaves first closes connections that the other one may still be at
    finally:
        distributed.destroy_process_group()
