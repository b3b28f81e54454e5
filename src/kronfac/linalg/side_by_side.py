"""Independent factorisations beside each other on a CPU, each on a core of its own.

LAPACK's inverse from Cholesky's factor gains little from a second core, since much of it is no product of matrices; two
matrices beside each other gain all of it.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import torch

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

#: ``omp_pause_soft`` of OpenMP 5.0: what was set stays.
_SOFT = 1
_lock, _numbers = threading.Lock(), threading.Lock()
_pools: dict[str, ThreadPoolExecutor] = {}


def side_by_side(function: Callable[[_Item], _Result], items: Sequence[_Item], costs: Sequence[float]) -> list[_Result]:
    """Apply a function to items on as many threads as PyTorch uses, this one among them, without gradients.

    An item that would keep one thread busy for twice as long as the others take for all the rest has all cores, before
    them.

    Args:
        function: Computes on the CPU; what it raises is raised here.
        items: What it is applied to.
        costs: Of each item, in any unit.

    Returns:
        What it gave, in the order of the items.
    """
    threads = torch.get_num_threads()
    alone, shared = divided(costs, threads)
    results: dict[int, _Result] = {index: function(items[index]) for index in alone}
    left = deque(shared)

    @torch.no_grad()
    def work() -> None:
        while left:
            try:
                index = left.popleft()
            except IndexError:  # another thread was faster
                return
            results[index] = function(items[index])

    if shared:
        end_team()
        numbers = _own_numbers()
        # This thread works too, where it can be kept on one core: asleep, it would leave its core to whoever wakes up.
        pool, others = workers(f"kronfac-linalg-{threads}", threads), min(threads, len(shared)) - (numbers is not None)
        futures = [pool.submit(work) for _ in range(others)]
        try:
            if numbers is not None:
                with _one_core(numbers, threads):
                    work()
        except BaseException:  # an interruption among them
            left.clear()
            raise
        finally:
            wait(futures)
        for future in futures:
            future.result()
    return [results[index] for index in range(len(items))]


def divided(costs: Sequence[float], threads: int) -> tuple[list[int], list[int]]:
    """Say which items have all threads, one after the other, and which have one each.

    Args:
        costs: Of each item.
        threads: How many there are.

    Returns:
        Indices of the ones and of the others, the dearest first.
    """
    order = sorted(range(len(costs)), key=lambda index: -costs[index])
    if threads == 1:
        return order, []
    rest, alone = sum(costs), 0
    while alone < len(order):
        rest -= costs[order[alone]]
        if (threads - 1) * costs[order[alone]] <= 2 * rest:
            break
        alone += 1
    return order[:alone], order[alone:]


def end_team() -> None:
    """End the threads that run this thread's parallel loops, where OpenMP can be told so; the next loop has new ones.

    After a loop they go on spinning for some milliseconds, on the very cores that other work is about to begin on.
    """
    try:
        library = ctypes.CDLL(None)
        pause, device = library.omp_pause_resource, library.omp_get_initial_device()
    except (AttributeError, OSError, TypeError):  # another library, or another system
        return
    pause(_SOFT, device)  # refused within a parallel loop, where there is nothing to end


def on_one_core() -> None:
    """Keep this thread's linear algebra on one core: two teams of threads on the same cores wait for each other.

    Where the libraries can be told so for one thread, they are. `torch.set_num_threads` sets MKL's number for all
    threads, after which torch 2.13's `torch.linalg.inv` of several matrices hangs. Elsewhere it keeps a number for each
    thread, and the last one set as the default of threads to come, which a thread of its own puts back.
    """
    numbers = _own_numbers()
    if numbers is None:
        with _numbers:
            before = torch.get_num_threads()  # this thread is set up by the question, and would be set up anew later
            torch.set_num_threads(1)
            restore = threading.Thread(target=torch.set_num_threads, args=(before,))
            restore.start()
            restore.join()
        return
    torch.get_num_threads()
    for number in numbers:
        number(1)


@lru_cache(maxsize=1)
def _own_numbers() -> tuple[Callable[[int], int], Callable[[int], int]] | None:
    """What sets OpenMP's and MKL's number of threads for one thread alone; None with other libraries or systems."""
    try:
        libraries = ctypes.CDLL(None), ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return libraries[0].omp_set_num_threads, libraries[1].MKL_Set_Num_Threads_Local
    except (AttributeError, OSError, TypeError):
        return None


@contextmanager
def _one_core(numbers: tuple[Callable[[int], int], Callable[[int], int]], threads: int) -> Iterator[None]:
    """Keep this thread's linear algebra on one core within the block."""
    openmp, mkl = numbers
    openmp(1)
    before = mkl(1)
    try:
        yield
    finally:
        openmp(threads)
        mkl(before)


def workers(name: str, threads: int) -> ThreadPoolExecutor:
    """Threads of this process that keep their linear algebra on a core each, made when they are first asked for.

    Args:
        name: Theirs.
        threads: How many; the same for each name.

    Returns:
        The pool.
    """
    with _lock:
        if name not in _pools:
            _pools[name] = ThreadPoolExecutor(threads, name, on_one_core)
        return _pools[name]


def forget_workers() -> None:
    """Make all pools anew when they are next asked for."""
    _pools.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=forget_workers)  # threads do not follow into a forked process
