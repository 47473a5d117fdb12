"""Joining and leaving the group of ranks."""

from __future__ import annotations

import logging
import os
import sys
import time
from datetime import timedelta
from uuid import uuid4

import torch
import torch.distributed as torch_dist

from bossnas.distributed.dist import barrier, world_size
from bossnas.distributed.environment import env_int, name_loopback, read_srun
from bossnas.errors import RESUMABLE, ConfigError

SMALL_WORK = 5 * 10**8


def init(timeout_minutes: float = 30) -> None:
    """Joins the process group that the environment describes: gloo for CPU tensors, nccl for CUDA tensors.

    A collective that waits longer than ``timeout_minutes`` for another rank fails. Raises ConfigError when
    the environment is incomplete.
    """
    if torch_dist.is_initialized():
        return
    read_srun()
    world = env_int("WORLD_SIZE", 1)
    if world == 1:
        return
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise ConfigError(
                name, f"is not set, although WORLD_SIZE is {world}", "start with deepspeed, torchrun or srun"
            )
    os.environ.setdefault("LOCAL_RANK", "0")
    name_loopback()
    if "OMP_NUM_THREADS" not in os.environ and not torch.cuda.is_available():  # else the ranks fight for the cores
        ranks_here = env_int("LOCAL_WORLD_SIZE", env_int("LOCAL_SIZE", 1))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    timeout = timedelta(minutes=timeout_minutes)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        torch_dist.init_process_group(
            backend, timeout=timeout, store=_elastic_store(timeout), world_size=world, rank=env_int("RANK", 0)
        )
    else:
        torch_dist.init_process_group(backend, timeout=timeout)


def spare_threads(work: int) -> None:
    """Gives a process on a CPU one thread where more would only wait for each other. OMP_NUM_THREADS in the environment
    says what the user wants, and is left alone.

    ``work``: multiply-adds of a forward pass of a micro-batch. Below SMALL_WORK an operation takes some ten
    microseconds, as long as it takes to share it out (measured: docs/results/step.md).
    """
    if work < SMALL_WORK and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def _elastic_store(timeout: timedelta) -> torch_dist.Store:
    """The store of torchrun's agent, with a new prefix at every start of the ranks.

    The agent keeps its store when it starts dead ranks again, and a process group that finds the addresses of the dead
    ones there fails. The agents of several nodes count their restarts differently, so rank 0 draws the prefix and
    offers it; an offer of an earlier start stays without answer, because its rank 0 is dead, until a new one replaces
    it. The offer is withdrawn before it is confirmed: what is found confirmed was offered in this start.
    """
    store = torch_dist.TCPStore(os.environ["MASTER_ADDR"], env_int("MASTER_PORT", 0), is_master=False, timeout=timeout)
    others, deadline = env_int("WORLD_SIZE", 1) - 1, time.monotonic() + timeout.total_seconds()
    if env_int("RANK", 0) == 0:
        name = uuid4().hex
        store.set("bossnas/offer", name)
        while store.add(f"bossnas/{name}/joined", 0) < others:
            _pause(deadline)
        # in this order: if rank 0 died between the two, an offer that is open and confirmed would lead the ranks of the
        # next start to the dead ones
        store.set("bossnas/offer", "-")
        store.set(f"bossnas/{name}/go", "")
        return torch_dist.PrefixStore(name, store)
    joined = ""
    while True:
        name = store.get("bossnas/offer").decode()
        if name not in ("-", joined):
            store.add(f"bossnas/{name}/joined", 1)
            joined = name
        if joined and store.check([f"bossnas/{joined}/go"]):
            return torch_dist.PrefixStore(joined, store)
        _pause(deadline)


def _pause(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise RuntimeError("the ranks that torchrun starts did not all come up in time")
    time.sleep(0.02)


def ensure_group() -> None:
    """Makes a process group of one for libraries that cannot do without (DeepSpeed). It needs no port."""
    if torch_dist.is_initialized():
        return
    assert env_int("WORLD_SIZE", 1) == 1, "group.init() comes first"
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK=os.environ.get("LOCAL_RANK", "0"))
    name_loopback()
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    torch_dist.init_process_group(backend, store=torch_dist.HashStore(), rank=0, world_size=1)


def shutdown(code: int = 0) -> None:
    """Leaves the process group. With more than one rank it ends the process and does not return.

    ``code`` 0 and RESUMABLE: after a barrier. Others: at once, so that the launcher sees it and ends the other ranks.
    gloo's teardown at interpreter exit aborts now and then, therefore nothing is torn down: the output is
    flushed and the process ends with ``code``.
    """
    if world_size() == 1:
        if torch_dist.is_initialized():
            torch_dist.destroy_process_group()
        return
    if code in (0, RESUMABLE):
        barrier()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
