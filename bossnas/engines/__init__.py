"""Engines: how the training of a block runs on one or many devices."""

from __future__ import annotations

from bossnas import dist
from bossnas.engines.protocol import Engine
from bossnas.errors import ConfigError


def make(
    name: str,
    *,
    accumulate: int,
    micro_batch: int,
    precision: str = "fp32",
    clip: float = 0.0,
    section: dict | None = None,
) -> Engine:
    """A fresh engine for one block.

    ``name``: single | deepspeed; ``accumulate``: micro-batches per update; ``micro_batch``: images per rank
    and micro-batch; ``precision``: fp32 | bf16; ``clip``: gradient norm limit, 0 none; ``section``: the
    config's ``engine.deepspeed``. Raises ConfigError on an impossible combination.
    """
    if name == "single":
        from bossnas.engines.single import SingleEngine

        if dist.world_size() > 1:
            raise ConfigError(
                "engine.name",
                f"single runs one process, but {dist.world_size()} were started",
                "set it to deepspeed or start one process",
            )
        return SingleEngine(accumulate, precision, clip)
    if name == "deepspeed":
        from bossnas.engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(accumulate, micro_batch, precision, clip, section or {})
    raise ConfigError("engine.name", f"there is no engine {name!r}", "choose single or deepspeed")
