"""What launchers say in the environment (RANK, WORLD_SIZE, LOCAL_RANK of torchrun and deepspeed, SLURM_* of srun), and
what a process asks of the system that it runs on."""

from __future__ import annotations

import ctypes
import functools
import os
import re
import socket
import sys

from bossnas.errors import ConfigError


def env_int(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise ConfigError(name, f"is {text!r} in the environment", "set a whole number or unset it") from None


def read_srun() -> None:
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
    job, step = env_int("SLURM_JOB_ID", 0), env_int("SLURM_STEP_ID", 0)
    env.setdefault("MASTER_PORT", str(20000 + (job * 13 + step) % 12000))  # equal on all ranks, unlike on other jobs


def first_host(nodelist: str) -> str:
    """The first host of a SLURM node list: ``gpu[03-05,9],cpu1`` -> ``gpu03``."""
    match = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\]([^,]*))?", nodelist)
    if match is None:
        raise ConfigError("SLURM_STEP_NODELIST", f"cannot read {nodelist!r}", "set MASTER_ADDR to the first node")
    return "".join(part or "" for part in match.groups())


def name_loopback() -> None:
    """Containers whose own host name does not resolve: gloo then needs to be told the loopback device."""
    if sys.platform != "linux" or "GLOO_SOCKET_IFNAME" in os.environ:
        return
    if os.environ.get("MASTER_ADDR", "localhost") in ("localhost", "127.0.0.1", socket.gethostname()):
        try:
            socket.gethostbyname(socket.gethostname())
        except OSError:
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"


@functools.cache
def keep_freed_memory() -> bool:
    """Has this process keep the memory that it frees, for its next tensors; whether the C library can.

    glibc gives blocks of more than 32 MiB back to the system at once and gets them as zeroed pages again: in the first
    blocks of a search a third of a step went there. What a process has held at most then stays its own until it ends.
    MALLOC_MMAP_THRESHOLD_ or MALLOC_TRIM_THRESHOLD_ in the environment say what the user wants, and are left alone.
    """
    if sys.platform != "linux" or {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"} & os.environ.keys():
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    trim_threshold, mmap_threshold, largest = -1, -3, 2**31 - 1
    return mallopt is not None and bool(mallopt(mmap_threshold, 2**30) and mallopt(trim_threshold, largest))
