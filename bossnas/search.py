"""The whole run: for each block train -> rate -> keep the winner -> next; then the architecture."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path as Folder

from torch import Tensor, nn

from bossnas import checkpoint, data, dist, log, rating, runfolder
from bossnas.config import Config
from bossnas.engines.protocol import Engine
from bossnas.log import logger
from bossnas.ops import synchronise
from bossnas.optim import LARS, parameter_groups
from bossnas.paths import Path, encode
from bossnas.run import Run, announce, build, make_engine, restore, save, write_architecture
from bossnas.train import RunState, Step, train_block


def search(config: Config, resume: bool = False) -> Folder:
    """Runs or continues the search that ``config`` describes and returns the run folder.

    Every rank calls it, after `dist.init`. Raises ConfigError for what the user can mend.
    """
    main = dist.rank() == 0
    log.setup(None, main)
    folder = Folder(config.out)
    run = dist.together(lambda: _start(config, resume))
    log.setup(folder, main)
    engine_folder = restore(run, folder)
    state = run.state
    metrics = log.Metrics(folder if main else None, lambda line: (line["block"], line["step"]) <= (
        state.block, state.step))
    announce(run, folder, "search")
    try:
        while state.block < run.space.blocks:
            _block_stage(run, folder, metrics, engine_folder)
            engine_folder = None
        if main:
            write_architecture(run, folder)
        dist.barrier()
    finally:
        metrics.close()
    return folder


def _start(config: Config, resume: bool) -> Run:
    """Checks everything that can be checked beforehand; only then does the main rank write into the run folder."""
    if dist.rank() > 0:
        return build(config)
    folder = runfolder.claim(config, resume)
    run = build(config)
    held = sum(f.stat().st_size for f in (folder / "checkpoints").rglob("*") if f.is_file())
    checkpoint.require_room(folder, max(_checkpoint_bytes(run) * (config.checkpoint.keep + 1) - held, 0))
    runfolder.prepare(folder, config)
    return run


def _block_stage(run: Run, folder: Folder, metrics: log.Metrics, engine_folder: Folder | None) -> None:
    """Trains the block that the state names, rates it, and moves the state to the next one."""
    config, state = run.config, run.state
    block, total = state.block, config.train.epochs * run.steps_per_epoch
    main = dist.rank() == 0
    engine, steps = start_block(run)
    if engine_folder is not None and state.step:
        checkpoint.load_engine(engine_folder, engine)
    with log.progress(f"block {block} train", total, state.step, main) as task:
        for step in steps:
            if step is None:
                continue
            _report(metrics, state, step, config.train.collapse_below)
            task.advance(f"loss {step.loss:+.3f}  {step.images_per_second:.0f} images/s")
            every = config.rating.every_epochs
            if step.ends_epoch and every and (step.epoch + 1) % every == 0 and state.step < total:
                _rate_midway(run, folder, metrics, step.epoch + 1)
            if state.step % config.checkpoint.every_steps == 0 or state.step == total:
                save(run, folder, engine)
    engine.close()

    scores = rating.rate(run, block, folder / "ratings" / f"block_{block}.partial")
    winner, value = rating.settle(run, folder, scores)
    metrics.write("rating", block, total, best=value, path=encode(winner))
    save(run, folder, None)


def start_block(run: Run) -> tuple[Engine, Iterator[Step | None]]:
    """The engine of the state's block and its training; nothing has run yet."""
    def inputs() -> Iterator[list[Tensor]]:
        for views in _train_batches(run):
            with engine.autocast():
                features = [run.target.features(run.state.winners, x) for x in views]
            yield features

    engine, steps = train_with(run, run.state, inputs(), run.state.winners)
    return engine, steps


def train_with(run: Run, position: RunState, inputs: Iterator[list[Tensor]], prefix: list[Path],
               ) -> tuple[Engine, Iterator[Step | None]]:
    """A fresh engine for block ``position.block`` and the block's training on ``inputs`` (see `train_block`)."""
    config, block, train = run.config, position.block, run.config.train
    engine = make_engine(config, run.mesh)

    def optimizer(module: nn.Module, followers: nn.Module | None, sharded: bool) -> LARS:
        return LARS(parameter_groups(module, followers), train.lr, train.momentum, train.weight_decay, train.trust,
                    sharded=sharded, clip=train.clip)

    trained = nn.ModuleDict({**run.online.part(block), "predictor": run.predictors[block]})
    followers = run.target.part(block)
    if train.sync_batch_norm:
        synchronise(trained, followers, average=partial(dist.average, group=run.mesh.group))
    trained, followers = engine.wrap(trained, followers, optimizer)
    online, target = run.online.replaced(block, trained), run.target.replaced(block, followers)
    return engine, train_block(
        online, target, trained["predictor"], run.space, engine, inputs, position, train, prefix=prefix,
        accumulate=run.accumulate, steps_per_epoch=run.steps_per_epoch, seed=config.seed, device=run.device,
        group=run.mesh.group, check_paths=config.engine.check_paths)


def _train_batches(run: Run) -> Iterator[list[Tensor]]:
    """The micro-batches of the block's stage from the state's position on. The order differs in every epoch."""
    config, state, mesh = run.config, run.state, run.mesh
    per_epoch = run.steps_per_epoch * run.accumulate
    first, start = divmod(state.step, run.steps_per_epoch)
    for epoch in range(first, config.train.epochs):
        yield from data.batches(
            run.train_set, run.recipe, run.view_ids, run.space.view_pairs, config.data, seed=config.seed,
            epoch=state.block * config.train.epochs + epoch, start=start * run.accumulate, steps=per_epoch,
            batch=config.train.micro_batch, rank=mesh.shard, world=mesh.shards, device=run.device, bad=run.bad)
        start = 0


def _rate_midway(run: Run, folder: Folder, metrics: log.Metrics, epochs: int) -> None:
    """A rating while the block still trains. It informs; it never enters the block's own prefix."""
    block, state = run.state.block, run.state
    name = f"block_{block}_epoch_{epochs}"
    scores = rating.rate(run, block, folder / "ratings" / f"{name}.partial")
    leader, value = rating.winner_of(run, scores)
    logger.info("block %d after %d epochs: leader %s with %s %+.4f", block, epochs, encode(leader),
                run.config.rating.score, value)
    metrics.write("rating", block, state.step, best=value, path=encode(leader))
    rating.write(folder, run, block, scores, f"{name}.json")


def _report(metrics: log.Metrics, state: RunState, step: Step, collapse_below: float) -> None:
    metrics.write("train", state.block, state.step, epoch=step.epoch, loss=step.loss, spread=step.spread, lr=step.lr,
                  ema_momentum=step.ema_momentum, images=state.images_seen,
                  images_per_second=round(step.images_per_second, 2), outcome=step.outcome,
                  loss_scale=step.loss_scale)
    if step.outcome == "bad":
        logger.warning("block %d step %d: its gradient is not finite, so it is skipped (%d so far)", state.block,
                       state.step, state.bad_steps)
    if step.spread < collapse_below:
        logger.warning("block %d step %d: the embeddings are collapsing (spread %.3f < train.collapse_below %.3f); "
                       "lower train.lr", state.block, state.step, step.spread, collapse_below)


def _checkpoint_bytes(run: Run) -> int:
    """An upper bound: both networks, the predictors, and one momentum per parameter of the largest block."""
    def size(module: nn.Module) -> int:
        return sum(t.numel() * t.element_size() for t in [*module.parameters(), *module.buffers()])

    largest = max(size(run.online.part(b)) + size(run.predictors[b]) for b in range(run.space.blocks))
    return size(run.online) + size(run.target) + size(run.predictors) + largest
