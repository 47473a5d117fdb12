"""Joining and leaving the group of ranks, and how a rank's program ends."""

from __future__ import annotations

import errno
import logging
import os
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as torch_dist

from bossnas.distributed.dist import _env_int, barrier, local_rank, rank, world_size
from bossnas.errors import ConfigError, Stopped

USER_ERROR = 2  # exit code of a mistake that the user can mend
RESUMABLE = 75  # exit code (EX_TEMPFAIL) of a run that was asked to stop and has saved its state
GRACE_SECONDS = 3.0  # the other ranks leave rank 0 this long to report the mistake that all of them see


def init(timeout_minutes: float = 30) -> None:
    """Joins the process group that the environment describes: gloo for CPU tensors, nccl for CUDA tensors.

    A collective that waits longer than ``timeout_minutes`` for another rank fails. Raises ConfigError when
    the environment is incomplete.
    """
    if torch_dist.is_initialized():
        return
    _srun_environment()
    world = _env_int("WORLD_SIZE", 1)
    if world == 1:
        return
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise ConfigError(
                name, f"is not set, although WORLD_SIZE is {world}", "start with deepspeed, torchrun or srun"
            )
    os.environ.setdefault("LOCAL_RANK", "0")
    _gloo_interface()
    if "OMP_NUM_THREADS" not in os.environ and not torch.cuda.is_available():  # else the ranks fight for the cores
        ranks_here = _env_int("LOCAL_WORLD_SIZE", _env_int("LOCAL_SIZE", 1))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    timeout = timedelta(minutes=timeout_minutes)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        torch_dist.init_process_group(
            backend, timeout=timeout, store=_elastic_store(timeout), world_size=world, rank=_env_int("RANK", 0)
        )
    else:
        torch_dist.init_process_group(backend, timeout=timeout)


def _elastic_store(timeout: timedelta) -> torch_dist.Store:
    """The store of torchrun's agent, with a new prefix at every start of the ranks.

    The agent keeps its store when it starts dead ranks again, and a process group that finds the addresses of the dead
    ones there fails. The agents of several nodes count their restarts differently, so rank 0 draws the prefix and
    offers it; an offer of an earlier start stays without answer, because its rank 0 is dead, until a new one replaces
    it. The offer is withdrawn before it is confirmed: what is found confirmed was offered in this start.
    """
    store = torch_dist.TCPStore(os.environ["MASTER_ADDR"], _env_int("MASTER_PORT", 0), is_master=False, timeout=timeout)
    others, deadline = _env_int("WORLD_SIZE", 1) - 1, time.monotonic() + timeout.total_seconds()
    if _env_int("RANK", 0) == 0:
        name = uuid4().hex
        store.set("bossnas/offer", name)
        while store.add(f"bossnas/{name}/joined", 0) < others:
            _pause(deadline)
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
    assert _env_int("WORLD_SIZE", 1) == 1, "dist.init() comes first"
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK=os.environ.get("LOCAL_RANK", "0"))
    _gloo_interface()
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


def run(function: Callable[[], Any], timeout_minutes: float = 30) -> int:
    """Runs one rank's program: ``init``, ``function()``, ``shutdown``. Returns or exits with the exit code.

    0: done; 2: a mistake of the user, one line on stderr; 75: asked to stop, saved and able to go on; 130: interrupted;
    1: anything else, with traceback; a SystemExit keeps its code. With one rank the code is returned, with more the
    process ends.
    """
    try:
        init(timeout_minutes)
        function()
        code = 0
    except ConfigError as error:
        code = USER_ERROR
        if rank() > 0:
            time.sleep(GRACE_SECONDS)
        print(f"error: {error}", file=sys.stderr)
    except Stopped as stop:
        code = RESUMABLE
        if world_size() > 1:  # this process ends, and a launcher may send a signal once more
            for number in (signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number, signal.SIG_IGN)
        if rank() == 0:
            print(stop, file=sys.stderr)
        _tell_elastic_agent(stop)
    except KeyboardInterrupt:
        code = 130
    except SystemExit as request:
        code = request.code if isinstance(request.code, int) else int(request.code is not None)
        if isinstance(request.code, str):
            print(request.code, file=sys.stderr)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            code = _unexpected()
        else:
            code = USER_ERROR
            print(
                f"error: out: the disk is full ({error.filename or 'while writing'}); free some space and go on with "
                "--resume auto",
                file=sys.stderr,
            )
    except Exception:
        code = _unexpected()
    shutdown(code)
    return code


def _tell_elastic_agent(stop: Stopped) -> None:
    """torchrun with restarts takes exit code 75 for a failure and would start the ranks again; its agent stops on
    SIGTERM. Where the agent was asked first, it passed SIGTERM or SIGINT on and need not be told."""
    restarts = _env_int("TORCHELASTIC_MAX_RESTARTS", 0)
    if stop.signal == signal.SIGUSR1 and restarts > 0 and local_rank() == 0 and os.getppid() == stop.parent:
        os.kill(stop.parent, signal.SIGTERM)


def _unexpected() -> int:
    """Reports the exception at hand. With other ranks it waits: often it is their end that caused it, and then the
    launcher acts on their exit code first."""
    text = traceback.format_exc()
    if world_size() > 1:
        time.sleep(GRACE_SECONDS)
    print(f"rank {rank()} failed:\n{text}", file=sys.stderr, end="")
    return 1


def _srun_environment() -> None:
    """Writes what srun says in the words of torchrun.

    SLURM_STEP_NUM_TASKS exists only below srun. A batch script has SLURM_PROCID and SLURM_NTASKS as well,
    but is one process.
    """
    env = os.environ
    if "WORLD_SIZE" in env or "SLURM_STEP_NUM_TASKS" not in env or "SLURM_PROCID" not in env:
        return
    env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env["SLURM_STEP_NUM_TASKS"]
    env["LOCAL_RANK"] = env.get("SLURM_LOCALID", "0")
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "127.0.0.1")
    env.setdefault("MASTER_ADDR", first_host(nodes))
    job, step = _env_int("SLURM_JOB_ID", 0), _env_int("SLURM_STEP_ID", 0)
    env.setdefault("MASTER_PORT", str(20000 + (job * 13 + step) % 12000))  # equal on all ranks, unlike on other jobs


def first_host(nodelist: str) -> str:
    """The first host of a SLURM node list: ``gpu[03-05,9],cpu1`` -> ``gpu03``."""
    match = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\]([^,]*))?", nodelist)
    if match is None:
        raise ConfigError("SLURM_STEP_NODELIST", f"cannot read {nodelist!r}", "set MASTER_ADDR to the first node")
    return "".join(part or "" for part in match.groups())


def _gloo_interface() -> None:
    """Containers whose own host name does not resolve: gloo then needs to be told the loopback device."""
    if sys.platform != "linux" or "GLOO_SOCKET_IFNAME" in os.environ:
        return
    if os.environ.get("MASTER_ADDR", "localhost") in ("localhost", "127.0.0.1", socket.gethostname()):
        try:
            socket.gethostbyname(socket.gethostname())
        except OSError:
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"
