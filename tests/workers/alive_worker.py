"""One rank of distributed/test_alive.py: counts steps under a guard until what the test asks for happens.

alive_worker.py HOW
alive_worker.py served|streamed killed|stopped      (a loader process and how the run leaves it)

The watchdog's limit is long, as the machine may be busy. It gets short on the rank that is to speak, and only when what
it is to speak of has happened.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress

import torch
from ranks import HANG, until
from torch.utils.data import Dataset, IterableDataset

from bossnas.data import loader
from bossnas.distributed import alive, dist, launch
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


LAST, HIT = 100, 5  # steps, where nothing else ends them; the one at which rank 1 meets its fate
SHORT = 1.5  # seconds: the limit of a watchdog that is to speak
FROZEN = {"freeze": 1, "frozen store": 0}


def meet(how: str, rank: int, guard: Guard, processes: list[int]) -> None:
    if how == "usr1" and rank == 1:
        os.kill(os.getpid(), signal.SIGUSR1)
    if how == "agent" and rank == 1:
        os.kill(os.getppid(), signal.SIGTERM)
    if how == "orphan" and rank == 1:
        os.kill(os.getppid(), signal.SIGKILL)
    if how in FROZEN:
        if rank == FROZEN[how]:
            time.sleep(HANG)  # the other rank freezes this one, here or on its way
        os.kill(processes[1 - rank], signal.SIGSTOP)
        watch(guard)
    if how == "stuck" and rank == 0:
        until(lambda: f'"{guard.place}"' in guard._store.get("1").decode(), "a sign of life that names rank 1's place")
        watch(guard)
    if how == "stuck" and rank == 1:
        until(lambda: has_ended(processes[0]), "the end of rank 0")
        watch(guard)
        time.sleep(HANG)
    if how == "error" and rank == 1:
        raise RuntimeError("broken on purpose")


def watch(guard: Guard) -> None:
    guard.at(guard.place)
    guard.timeout = SHORT


def has_ended(process: int) -> bool:
    """Whether the test has taken note of its end."""
    with suppress(ProcessLookupError):
        os.kill(process, 0)
        return False
    return True


def count(how: str) -> None:
    rank, lag, step = dist.rank(), 2, -1
    alive.BEAT_SECONDS = 0.1  # so that a rank which gives no sign of life is soon known ...
    if how == "stuck":
        alive.SILENT_BEATS = 10**6  # ... and here one whose signs of life are late on a busy machine is not meant
    processes = dist.all_gather_object(os.getpid())
    with Guard(HANG / 60) as guard:
        while how != "uneven" or step < LAST:
            step += 1
            guard.at(f"step {step}")
            if step == HIT:
                meet(how, rank, guard, processes)
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
    if sys.argv[-1] == "survive":
        sys.exit(launch.run(survive, timeout_minutes=HANG / 60))
    sys.exit(launch.run(lambda: count(sys.argv[-1]), timeout_minutes=HANG / 60))
