"""What a rank holds, receives and computes in a search, for every engine and schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bossnas.config.search import Config
from bossnas.planning.gpus import GIB
from bossnas.planning.workload import WEIGHT, Block, Micro

ENGINES = ("ddp", "fsdp2", "deepspeed 0", "deepspeed 1", "deepspeed 2")
RESERVED = 1.5 * GIB  # CUDA context, NCCL's buffers, workspaces of convolutions
UPDATE_PASSES = 10  # over a float32 value per parameter: finite? norms, LARS, momentum, moving average


def split(config: Config, blocks: int, gpus: int, schedule: str, engine: str) -> dict[str, Any]:
    """How ranks divide a run: {"rows": blocks of each, "shards", "micro_batch", "accumulate", "change": what to set for
    that, or None}, or {"reason": why it cannot run}."""
    if schedule == "block_parallel" and engine.startswith("deepspeed"):
        return {"reason": "deepspeed trains one block at a time on all ranks"}
    count = 1 if schedule == "sequential" else min(gpus, blocks)
    if gpus % count:
        return {
            "reason": f"{gpus} ranks cannot be divided over {blocks} blocks; start {gpus // blocks * blocks} or "
            f"{(gpus // blocks + 1) * blocks}"
        }
    shards, batch, micro = gpus // count, config.train.batch, config.train.micro_batch
    if batch % shards:
        return {"reason": f"{batch} images cannot be divided over {shards} ranks"}
    fits = next((m for m in range(min(micro, batch // shards), 1, -1) if batch // shards % m == 0), None)
    if fits is None:
        return {"reason": f"{batch} images over {shards} ranks leave {batch // shards} a rank; batch norm needs two"}
    rows = [range(blocks * r // count, blocks * (r + 1) // count) for r in range(count)]
    return {
        "rows": rows,
        "shards": shards,
        "micro_batch": fits,
        "accumulate": batch // shards // fits,
        "change": None if fits == micro else f"train.micro_batch={fits}",
    }


@dataclass(frozen=True)
class Task:
    """One block's training on ``shards`` ranks of an engine."""

    engine: str
    shards: int
    accumulate: int
    images: int
    views: int
    paths: int
    layers: int
    out: int
    block: Block
    micro: Micro

    @property
    def trained(self) -> int:
        return self.block.parameters + self.block.predictor

    @property
    def used(self) -> float:
        """Parameters that get a gradient in an update, if its micro-batches draw their paths independently."""
        return self.trained * (1 - (1 - self.micro.used / self.trained) ** self.accumulate)

    def shuffle(self) -> tuple[float, int]:
        """Bytes that a rank receives in an update, and collectives, to shuffle target batches: inputs and projections,
        of which a rank gets its own rows, most of them from others. None where no target network runs."""
        if self.shards == 1 or not len(self.micro.phases["target"]):
            return 0.0, 0
        others, items = (self.shards - 1) / self.shards * self.images * self.accumulate, 2 * self.paths
        projection = self.out * (self.block.input_bytes // math.prod(self.block.input_shape))
        return others * (self.views * self.block.input_bytes + items * projection), self.accumulate * (
            self.views + items
        )

    def gradients(self) -> tuple[float, int]:
        """The same for gradients and weights, and for the batch norms if they are synchronised."""
        share = (self.shards - 1) / self.shards
        whole, used, once = (WEIGHT * n for n in (self.trained, self.used, self.micro.used))
        size, messages = {
            "ddp": (2 * used, 2),
            "fsdp2": (
                used + 3 * self.accumulate * once,  # weights: online forward and backward, target forward
                (3 * self.accumulate + 1) * (self.paths * self.layers + 3),
            ),
            "deepspeed 0": (2 * whole, 1),
            "deepspeed 1": (2 * whole, 2),
            "deepspeed 2": ((self.accumulate + 1) * whole, self.accumulate + 1),
        }[self.engine]
        calls, averaged = self.micro.averages
        return share * (size + 2 * self.accumulate * averaged), messages + self.accumulate * calls

    def update_bytes(self) -> float:
        owned = self.trained if self.engine in ("ddp", "deepspeed 0") else self.trained / self.shards
        return UPDATE_PASSES * WEIGHT * owned


def memory(
    tasks: Sequence[Task], peaks: Sequence[int], weights: int, image_bytes: int, queue: int, bucket: float
) -> dict[str, float]:
    """Bytes on a rank that trains ``tasks`` side by side: {"weights", "gradients", "optimizer", "inputs",
    "activations", "reserved", "total"}.

    ``peaks``: of the tasks' micro-batches; ``weights``: parameters of both networks and all predictors, which every
    rank holds; ``image_bytes``: of an image's view; ``queue``: micro-batches of features under way, 0 without a stream;
    ``bucket``: bytes in which DeepSpeed gathers gradients.
    """
    engine, shards, first = tasks[0].engine, tasks[0].shards, tasks[0]
    trained, followers = (WEIGHT * sum(n) for n in zip(*((t.trained, t.block.followers) for t in tasks), strict=True))
    whole = {
        "ddp": trained,
        "deepspeed 0": trained,
        "deepspeed 1": trained + trained / shards,
        "deepspeed 2": trained / shards,
        "fsdp2": sum(WEIGHT * t.used for t in tasks) if first.accumulate > 1 else trained / shards,
    }
    extra = {"fsdp2": (trained + followers) / shards, "deepspeed 1": trained / shards, "deepspeed 2": trained / shards}
    pieces = {
        "weights": WEIGHT * weights + extra.get(engine, 0.0),
        "gradients": whole[engine],
        "optimizer": trained if engine in ("ddp", "deepspeed 0") else trained / shards,
    }
    maps = [t.views * t.images * t.block.largest_input_bytes for t in tasks]
    images = 2 * first.views * first.images * image_bytes  # this micro-batch and the next
    pieces["inputs"] = images + sum(size * ((shards > 1) + 1) for size in maps) + queue * (maps[0] + maps[-1])
    flat = trained if engine == "ddp" and shards > 1 else min(trained, bucket) if engine == "deepspeed 0" else 0
    work = max(peaks) + (bucket if engine in ("deepspeed 1", "deepspeed 2") else 0)
    pieces["activations"] = max(work, flat)
    pieces["reserved"] = RESERVED
    return {**pieces, "total": sum(pieces.values())}
