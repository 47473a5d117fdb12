"""Engines: how the training of a block or a network runs on one or many devices."""

from __future__ import annotations

from typing import Any

from bossnas.distributed import dist
from bossnas.distributed.engines.protocol import Engine
from bossnas.errors import ConfigError


def make(
    name: str,
    *,
    accumulate: int,
    micro_batch: int,
    precision: str = "fp32",
    section: dict | None = None,
    group: Any = None,
    optimizer: str = "lars",
) -> Engine:
    """A fresh engine for one block, or for one network.

    ``name``: single | ddp | fsdp2 | deepspeed; ``accumulate``: micro-batches per update; ``micro_batch``: images per
    rank and micro-batch; ``precision``: fp32 | bf16 | fp16; ``section``: the config's ``engine.deepspeed``; ``group``:
    the ranks that share a batch (None: all); ``optimizer``: its kind, which ``section`` may repeat. Raises ConfigError
    on an impossible combination.
    """
    if name == "single" and dist.world_size() > 1:
        raise ConfigError(
            "engine.name",
            f"single runs one process, but {dist.world_size()} were started",
            "set it to ddp, fsdp2 or deepspeed, or start one process",
        )
    if name in ("single", "ddp"):
        from bossnas.distributed.engines.ddp import DDPEngine

        return DDPEngine(accumulate, precision, group)
    if name == "fsdp2":
        from bossnas.distributed.engines.fsdp2 import FSDP2Engine

        return FSDP2Engine(accumulate, precision, group)
    if name == "deepspeed":
        from bossnas.distributed.engines.deepspeed import DeepSpeedEngine

        if group is not None:
            raise ConfigError(
                "engine.name",
                "is deepspeed, which trains one block at a time on all ranks, but schedule is block_parallel",
                "set engine.name to ddp or fsdp2, or schedule to sequential",
            )
        return DeepSpeedEngine(accumulate, micro_batch, precision, section or {}, optimizer)
    raise ConfigError("engine.name", f"there is no engine {name!r}", "choose single, ddp, fsdp2 or deepspeed")
