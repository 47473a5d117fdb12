"""Rating the finished blocks of a run again, or a supernet without training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from bossnas import layout, log
from bossnas.config.loading import override
from bossnas.config.search import Config
from bossnas.distributed import dist
from bossnas.errors import ConfigError
from bossnas.runs.folder import claim_folder, prepare_folder, read_config
from bossnas.runs.show import lines, show_run
from bossnas.search.rating import rate, write
from bossnas.search.run import Run, announce, build, restore, write_architecture
from bossnas.search.winners import settle
from bossnas.spaces.ops import GroupedBatchNorm


def rerate(folder: Path, blocks: list[int] | None = None, overrides: Sequence[str] = ()) -> list[int]:
    """Rates finished blocks again from the run's last checkpoint and rewrites their ratings; returns the blocks.

    ``overrides``: ``rating.key=value``, for this rating alone. Any number of ranks; no engine is needed.
    """
    wrong = [o for o in overrides if not o.startswith("rating.")]
    if wrong:
        raise ConfigError(
            "overrides", f"{wrong[0]!r} would rate another run", "override keys of the section rating alone"
        )
    config = override(read_config(folder), overrides)
    run = dist.together(lambda: build(config, training=False))
    log.setup(folder, dist.rank() == 0)
    restore(run, folder, training=False)
    done = list(range(run.state.block))
    if not done:
        raise ConfigError("run", f"{folder} has finished no block", "wait, or go on with its search")
    chosen = done if blocks is None else blocks
    if not set(chosen) <= set(done):
        raise ConfigError("blocks", f"of {chosen} the run has finished only {done}", "name finished blocks")
    for block in chosen:
        rated = rate(run, block, folder / "ratings" / f"block_{block}.partial")
        write(folder, run, block, rated, f"block_{block}.json", run.state.winners[:block])
    return chosen


def rate_untrained(config: Config) -> Path:
    """Rates block after block of a supernet with random weights, each on the winners before; returns the folder.

    Last batch-norm weights that start at zero (HyTra) are set to one: otherwise all candidates of a scale would be
    the same function.
    """
    main, folder = dist.rank() == 0, Path(config.out)

    def start() -> Run:
        if not main:
            return build(config, training=False)
        claim_folder(config, resume=False)
        run = build(config, training=False)
        prepare_folder(folder, config, "rating without training")
        return run

    log.setup(None, main)
    run = dist.together(start)
    log.setup(folder, main)
    announce(run, folder, "rating without training")
    for network in (run.online, run.target):
        for module in network.modules():
            if isinstance(module, GroupedBatchNorm) and not module.weight.any():
                nn.init.ones_(module.weight)
    while run.state.block < run.space.blocks:
        settle(run, folder, rate(run, run.state.block))
    if main:
        write_architecture(run, folder)
        log.say("\n".join(["", *lines(show_run(folder), layout.width())]))
    dist.barrier()
    return folder
