"""Ranks and collectives: the only raw torch.distributed outside the engines.

Started by ``deepspeed``, ``torchrun`` (RANK, WORLD_SIZE, LOCAL_RANK), ``srun`` (SLURM_*) or nobody at all.
One process makes no process group, and every function here then is the trivial one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as torch_dist
from torch import Tensor

from bossnas.distributed.environment import env_int, keep_freed_memory
from bossnas.errors import ConfigError

T = TypeVar("T")


def rank(group: Any = None) -> int:
    return torch_dist.get_rank(group) if torch_dist.is_initialized() else 0


def world_size(group: Any = None) -> int:
    return torch_dist.get_world_size(group) if torch_dist.is_initialized() else 1


def local_rank() -> int:
    """This rank's number on its node."""
    return env_int("LOCAL_RANK", 0)


def device(name: str = "auto") -> torch.device:
    """This rank's device, made ready for a run: a GPU becomes the current one, and on a CPU the process keeps the
    memory that it frees. ``name``: auto | cpu | cuda. Raises ConfigError when there is none."""
    if name == "cpu" or name == "auto" and not torch.cuda.is_available():
        keep_freed_memory()
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
        raise ConfigError(
            "schedule",
            f"is block_parallel, but {world} ranks cannot be divided evenly over {blocks} blocks",
            f"start {fits[0]} or {fits[1]} ranks, or set it to sequential",
        )
    shards = world // rows
    parts = [range(blocks * r // rows, blocks * (r + 1) // rows) for r in range(rows)]
    return Mesh(parts, me // shards, shards, me % shards)


def connected(mesh: Mesh, timeout_minutes: float = 30) -> Mesh:
    """The mesh with the groups of its rows, which all ranks make together. ``timeout_minutes``: see `init`."""
    if len(mesh.blocks) == 1 or world_size() == 1:
        return mesh
    rows = [range(r * mesh.shards, (r + 1) * mesh.shards) for r in range(len(mesh.blocks))]
    timeout = timedelta(minutes=timeout_minutes)
    # new_group is a collective of all ranks: each makes the groups of all rows, in one order, and keeps its own
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
    found: list[Any] = all_gather_object(together(lambda: function() if rank() == 0 else None))
    return found[0]


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
    results, mine = [], None
    try:
        results.append(function())
    except ConfigError as error:
        mine = (error.field, error.problem, error.fix)
    # also after an error: a rank that left now would leave the others waiting here
    for parts in all_gather_object(mine):
        if parts is not None:
            raise ConfigError(*parts)
    return results[0]


def shuffle(x: Tensor, index: Tensor, group: Any = None) -> Tensor:
    """Rows ``index[rank*n : (rank+1)*n]`` of the ``x`` [n, ...] of all ranks of ``group``, put together (METHOD 3.3).

    ``index`` [ranks * n] int64 in CPU memory, equal on all ranks. Undone by ``shuffle(y, index.argsort())``. Each rank
    receives only its own rows. Maps come back channels_last. No gradient.
    """
    n, me, world = len(x), rank(group), world_size(group)
    if len(index) != n * world:
        raise ValueError(f"shuffle: index has {len(index)} entries, expected {n} rows x {world} ranks")
    wanted, owner = index.view(world, n) % n, index.view(world, n) // n  # by the rank that gets them
    if world == 1:
        return x.detach()[send(wanted[0], x.device)]
    leaving = [wanted[r][owner[r] == me] for r in range(world)]
    order = owner[me].argsort(stable=True)  # rows arrive rank by rank
    rows = x.detach()[send(torch.cat(leaving), x.device)]
    rows = (rows.movedim(1, -1) if x.ndim == 4 else rows).contiguous()
    arrived, counts = torch.empty_like(rows), torch.bincount(owner[me], minlength=world).tolist()
    torch_dist.all_to_all_single(arrived, rows, counts, [len(part) for part in leaving], group=group)
    # the inverse of `order`: from the order of arrival, by owner, back to that of `index`
    arrived = arrived[send(order.argsort(), x.device)]
    return arrived.movedim(-1, 1) if x.ndim == 4 else arrived


def send(values: Tensor, device: torch.device) -> Tensor:
    """Copies values in CPU memory to the device, without waiting for it: a GPU reads pinned memory when it gets there,
    and the allocator keeps it until then."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def any_rank(flag: bool) -> bool:
    """True on all ranks if ``flag`` is true on one: how they stop, or fail, together."""
    if world_size() == 1:
        return flag
    return bool(all_reduce_max(torch.tensor([int(flag)])).item())
