"""One rank of distributed/test_alive.py: counts steps under a guard until what the test asks for happens.

alive_worker.py HOW TIMEOUT_MINUTES
alive_worker.py served|streamed killed|stopped      (a loader process and how the run leaves it)
"""

from __future__ import annotations

import os
import signal
import sys
import time

import torch
from torch.utils.data import Dataset, IterableDataset

from bossnas.data import loader
from bossnas.distributed import dist, launch
from bossnas.distributed.alive import Guard


class Served(Dataset):
    """Its loader process is forked by the run; the other's by a server."""

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, i: int) -> int:
        return i


class Streamed(IterableDataset):
    def __iter__(self):
        return iter(range(1000))


LAST, HIT = 400, 5  # steps; the one at which rank 1 meets its fate


def meet(how: str, rank: int) -> None:
    if how == "usr1" and rank == 1:
        os.kill(os.getpid(), signal.SIGUSR1)
    if how == "agent" and rank == 1:
        os.kill(os.getppid(), signal.SIGTERM)
    if how == "orphan" and rank == 1:
        os.kill(os.getppid(), signal.SIGKILL)
    if how == "freeze" and rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "frozen store" and rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "stuck" and rank == 1:
        time.sleep(60)
    if how == "error" and rank == 1:
        raise RuntimeError("broken on purpose")


def count(how: str, timeout_minutes: float) -> None:
    rank, lag = dist.rank(), 2
    with Guard(timeout_minutes) as guard:
        for step in range(LAST):
            guard.at(f"step {step}")
            if step == HIT:
                meet(how, rank)
            if how == "uneven" and rank == 0 or how == "orphan":
                time.sleep(0.01)
            if guard.should_stop(lag):
                raise guard.stopped()
            if how != "uneven":
                dist.barrier()
    print(f"rank {rank} ended\n", end="", flush=True)


def survive() -> None:
    """Dies in the first starts, in different places, and gets through in a later one."""
    start, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), dist.rank()
    if start == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()
    assert dist.all_gather_object(rank) == list(range(dist.world_size()))
    print(f"rank {rank} got through in start {start}\n", end="", flush=True)


def load(dataset: Dataset, end: str) -> None:
    """Ends while a loader process is at work and its generator is part of a cycle that nobody clears up."""
    held: list = [loader._from_workers(dataset, 1, torch.device("cpu"))]
    held.append(held)
    next(held[0])
    print("loading", flush=True)
    if end == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise SystemExit(75)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[-2] in ("served", "streamed"):
        load(Served() if sys.argv[-2] == "served" else Streamed(), sys.argv[-1])
    if sys.argv[-2] == "survive":
        sys.exit(launch.run(survive, timeout_minutes=1))
    sys.exit(launch.run(lambda: count(sys.argv[-2], float(sys.argv[-1])), timeout_minutes=1))
