"""Ranks and collectives: the only raw torch.distributed outside the engines.

Started by ``deepspeed``, ``torchrun`` (RANK, WORLD_SIZE, LOCAL_RANK), ``srun`` (SLURM_*) or nobody at all.
One process makes no process group, and every function here then is the trivial one.
"""

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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar
from uuid import uuid4

import torch
import torch.distributed as torch_dist
from torch import Tensor

from bossnas.errors import ConfigError, Stopped

T = TypeVar("T")
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
        torch_dist.init_process_group(backend, timeout=timeout, store=_elastic_store(timeout), world_size=world,
                                      rank=_env_int("RANK", 0))
    else:
        torch_dist.init_process_group(backend, timeout=timeout)


def _elastic_store(timeout: timedelta) -> torch_dist.Store:
    """The store of torchrun's agent, with a new prefix at every start of the ranks.

    The agent keeps its store when it starts dead ranks again, and a process group that finds the addresses of the dead
    ones there fails. The agents of several nodes count their restarts differently, so rank 0 draws the prefix and
    offers it; an offer of an earlier start stays without answer, because its rank 0 is dead, until a new one replaces
    it. The offer is withdrawn before it is confirmed: what is found confirmed was offered in this start.
    """
    store = torch_dist.TCPStore(os.environ["MASTER_ADDR"], _env_int("MASTER_PORT", 0), is_master=False,
                                timeout=timeout)
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


def rank(group: Any = None) -> int:
    return torch_dist.get_rank(group) if torch_dist.is_initialized() else 0


def world_size(group: Any = None) -> int:
    return torch_dist.get_world_size(group) if torch_dist.is_initialized() else 1


def local_rank() -> int:
    """This rank's number on its node."""
    return _env_int("LOCAL_RANK", 0)


def device(name: str = "auto") -> torch.device:
    """This rank's device. ``name``: auto | cpu | cuda. Raises ConfigError when there is none."""
    if name == "cpu" or name == "auto" and not torch.cuda.is_available():
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            "engine.device",
            "cuda was asked for, but PyTorch sees no CUDA device",
            "set it to auto or cpu, or mend the driver",
        )
    count = torch.cuda.device_count()
    index = 0 if count == 1 else local_rank()  # srun --gpus-per-task=1 shows each rank one device
    if index >= count:
        raise ConfigError(
            "engine.device",
            f"local rank {index} has no device, this node shows {count}",
            "start as many ranks per node as it has devices",
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


@dataclass(frozen=True)
class Mesh:
    """How the ranks divide a run. A row trains some of the blocks; the ranks of a row share every batch.

    ``blocks``: of every row, in order; ``group``: the ranks of this row (None: all ranks, or not made yet).
    """

    blocks: Sequence[range]
    row: int = 0
    shards: int = 1
    shard: int = 0
    group: Any = None

    @property
    def own(self) -> range:
        """The blocks that this rank trains."""
        return self.blocks[self.row]


def mesh(schedule: str, blocks: int) -> Mesh:
    """The mesh of a schedule (sequential | block_parallel) on the ranks at hand, without its groups (`connected`).

    block_parallel: rank r is shard r % shards of row r // shards. Fewer ranks than blocks: every rank is a row, with
    neighbouring blocks. Raises ConfigError for a number of ranks that the blocks do not divide.
    """
    world, me = world_size(), rank()
    if schedule == "sequential":
        return Mesh([range(blocks)], 0, world, me)
    rows = min(world, blocks)
    if world % rows:
        fits = [world // blocks * blocks, (world // blocks + 1) * blocks]
        raise ConfigError("schedule", f"is block_parallel, but {world} ranks cannot be divided evenly over {blocks} "
                          "blocks", f"start {fits[0]} or {fits[1]} ranks, or set it to sequential")
    shards = world // rows
    parts = [range(blocks * r // rows, blocks * (r + 1) // rows) for r in range(rows)]
    return Mesh(parts, me // shards, shards, me % shards)


def connected(mesh: Mesh, timeout_minutes: float = 30) -> Mesh:
    """The mesh with the groups of its rows, which all ranks make together. ``timeout_minutes``: see `init`."""
    if len(mesh.blocks) == 1 or world_size() == 1:
        return mesh
    rows = [range(r * mesh.shards, (r + 1) * mesh.shards) for r in range(len(mesh.blocks))]
    timeout = timedelta(minutes=timeout_minutes)
    groups = [torch_dist.new_group(list(ranks), timeout=timeout) for ranks in rows]
    return replace(mesh, group=groups[mesh.row])


def host_group(timeout_minutes: float) -> Any:
    """A new group of all ranks for small CPU tensors beside everything else; all of them call it. One process: None."""
    if not torch_dist.is_initialized():
        return None
    return torch_dist.new_group(backend="gloo", timeout=timedelta(minutes=timeout_minutes))


def set_timeout(minutes: float) -> None:
    """How long collectives wait for another rank from now on, in all groups."""
    change = getattr(torch_dist, "set_timeout", None) or torch_dist.distributed_c10d._set_pg_timeout
    for group in list(torch_dist.distributed_c10d._world.pg_map):
        change(timedelta(minutes=minutes), group)


def barrier() -> None:
    if world_size() > 1:
        any_rank(False)


def all_gather(x: Tensor, group: Any = None) -> list[Tensor]:
    """``x`` of every rank of ``group``, in rank order; the same shape and dtype on all of them."""
    if world_size(group) == 1:
        return [x]
    x = x.detach().contiguous()
    parts = [torch.empty_like(x) for _ in range(world_size(group))]
    torch_dist.all_gather(parts, x, group=group)
    return parts


def all_gather_object(value: T) -> list[T]:
    """``value`` of every rank, in rank order: anything that pickles, tensors in CPU memory. For small things."""
    values = [value] * world_size()
    if world_size() > 1:
        torch_dist.all_gather_object(values, value)
    return values


def from_main(function: Callable[[], T]) -> T:
    """What ``function`` gives on rank 0, on every rank; a ConfigError of it is raised on all of them."""
    return all_gather_object(together(lambda: function() if rank() == 0 else None))[0]


@torch.no_grad()
def broadcast(tensors: Sequence[Tensor], source: int) -> None:
    """Gives all ranks rank ``source``'s ``tensors``, in place, in one message for each dtype."""
    if world_size() == 1:
        return
    for dtype in sorted({t.dtype for t in tensors}, key=str):
        chosen = [t for t in tensors if t.dtype == dtype]
        flat = torch.cat([t.flatten() for t in chosen])
        torch_dist.broadcast(flat, source)
        for t, piece in zip(chosen, flat.split([t.numel() for t in chosen]), strict=True):
            t.copy_(piece.view_as(t))


def all_reduce_sum(x: Tensor, group: Any = None) -> Tensor:
    """Adds ``x`` up over the ranks of ``group``, in place."""
    if world_size(group) > 1:
        torch_dist.all_reduce(x, group=group)
    return x


def all_reduce_max(x: Tensor, group: Any = None) -> Tensor:
    """The largest ``x`` of the ranks of ``group``, in place."""
    if world_size(group) > 1:
        torch_dist.all_reduce(x, op=torch_dist.ReduceOp.MAX, group=group)
    return x


def average(x: Tensor, group: Any = None) -> Tensor:
    """The mean of ``x`` over the ranks of ``group``. Differentiable: for a loss that is the mean over the ranks, each
    rank's gradient is the whole one, as in synchronised batch norm."""
    return _Average.apply(x, group) if world_size(group) > 1 else x


class _Average(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return all_reduce_sum(x.contiguous().clone(), group).div_(world_size(group))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return all_reduce_sum(gradient.contiguous().clone(), ctx.group).div_(world_size(ctx.group)), None


def together(function: Callable[[], T]) -> T:
    """Runs ``function`` (no collectives inside) on every rank. A ConfigError of one is raised on all of them."""
    result, mine = None, None
    try:
        result = function()
    except ConfigError as error:
        mine = (error.field, error.problem, error.fix)
    for parts in all_gather_object(mine):
        if parts is not None:
            raise ConfigError(*parts)
    return result


def shuffle(x: Tensor, index: Tensor, group: Any = None) -> Tensor:
    """Rows ``index[rank*n : (rank+1)*n]`` of the ``x`` [n, ...] of all ranks of ``group``, put together (METHOD 3.3).

    ``index`` [ranks * n] int64 in CPU memory, equal on all ranks. Undone by ``shuffle(y, index.argsort())``. Each rank
    receives only its own rows. Maps come back channels_last. No gradient.
    """
    n, me, world = len(x), rank(group), world_size(group)
    if len(index) != n * world:
        raise ValueError(f"shuffle: index has {len(index)} entries, expected {n} rows x {world} ranks")
    wanted, owner = index.view(world, n) % n, index.view(world, n) // n  # by the rank that gets them
    leaving = [wanted[r][owner[r] == me] for r in range(world)]
    order = owner[me].argsort(stable=True)  # rows arrive rank by rank
    if world == 1:
        return x.detach()[wanted[0].to(x.device)]
    rows = x.detach()[torch.cat(leaving).to(x.device)]
    rows = (rows.movedim(1, -1) if x.ndim == 4 else rows).contiguous()
    arrived, counts = torch.empty_like(rows), torch.bincount(owner[me], minlength=world).tolist()
    torch_dist.all_to_all_single(arrived, rows, counts, [len(part) for part in leaving], group=group)
    arrived = arrived[order.argsort().to(x.device)]
    return arrived.movedim(-1, 1) if x.ndim == 4 else arrived


def any_rank(flag: bool) -> bool:
    """True on all ranks if ``flag`` is true on one: how they stop, or fail, together."""
    if world_size() == 1:
        return flag
    return bool(all_reduce_max(torch.tensor([int(flag)])).item())


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
            print(f"error: out: the disk is full ({error.filename or 'while writing'}); free some space and go on with "
                  "--resume auto", file=sys.stderr)
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


def _env_int(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise ConfigError(name, f"is {text!r} in the environment", "set a whole number or unset it") from None


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
    env.setdefault(
        "MASTER_PORT", str(20000 + (job * 13 + step) % 12000)
    )  # equal on all ranks, unlike on other jobs


def first_host(nodelist: str) -> str:
    """The first host of a SLURM node list: ``gpu[03-05,9],cpu1`` -> ``gpu03``."""
    match = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\]([^,]*))?", nodelist)
    if match is None:
        raise ConfigError(
            "SLURM_STEP_NODELIST", f"cannot read {nodelist!r}", "set MASTER_ADDR to the first node"
        )
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
