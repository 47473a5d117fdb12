"""The whole run: for each block train -> rate -> keep the winner -> next; then the architecture."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path as Folder

import torch
from torch import Tensor, nn

from bossnas import checkpoint, cost, data, dist, engines, heads, log, ops, runfolder, shards, spaces, views
from bossnas.config import Config, accumulation
from bossnas.engines.protocol import Engine, autocast
from bossnas.errors import ConfigError
from bossnas.log import logger
from bossnas.optim import LARS, parameter_groups
from bossnas.paths import Path, decode, encode
from bossnas.rate import best, calibrate, rate_block
from bossnas.spaces import Space
from bossnas.supernet import Supernet
from bossnas.train import RunState, Step, train_block

CALIBRATION_VIEW = 1  # METHOD 4: view index 1 of the calibration batch


@dataclass
class Run:
    """Everything a search holds: networks, space, data and where it is."""

    config: Config
    space: Space
    online: Supernet
    target: Supernet
    predictors: nn.ModuleList
    train_set: shards.ShardIndex
    val_set: shards.ShardIndex
    recipe: views.Recipe
    device: torch.device
    kernels: str  # which run: triton | reference
    accumulate: int
    steps_per_epoch: int
    state: RunState
    bad: dict[int, str]  # unreadable training images met so far

    @property
    def view_ids(self) -> list[int]:
        return list(range(2 * self.space.view_pairs))


def search(config: Config, resume: bool = False) -> Folder:
    """Runs or continues the search that ``config`` describes and returns the run folder.

    Every rank calls it, after `dist.init`. Raises ConfigError for what the user can mend.
    """
    main = dist.rank() == 0
    log.setup(None, main)
    folder = Folder(config.out)
    run = dist.together(lambda: _start(config, resume))
    log.setup(folder, main)
    engine_folder = _restore(run, folder)
    state = run.state
    metrics = log.Metrics(folder if main else None, lambda line: (line["block"], line["step"]) <= (
        state.block, state.step))
    _announce(run, folder)
    try:
        while state.block < run.space.blocks:
            _block_stage(run, folder, metrics, engine_folder)
            engine_folder = None
        if main:
            _write_architecture(run, folder)
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


def rerate(folder: Folder, blocks: list[int] | None = None) -> list[int]:
    """Rates finished blocks again from the run's last checkpoint and rewrites their ratings; returns the blocks."""
    config = runfolder.read_config(folder)
    log.setup(folder, dist.rank() == 0)
    run = dist.together(lambda: build(config))
    _restore(run, folder)
    done = list(range(run.state.block))
    if not done:
        raise ConfigError("--run", f"{folder} has finished no block", "wait, or go on with its search")
    chosen = done if blocks is None else blocks
    if not set(chosen) <= set(done):
        raise ConfigError("--block", f"of {chosen} the run has finished only {done}", "name finished blocks")
    for block in chosen:
        _write_rating(folder, run, block, _rate(run, block), f"block_{block}.json")
    return chosen


def build(config: Config) -> Run:
    """Networks, space and data of a config, all checked against each other; weights as drawn from the seed."""
    device = dist.device(config.engine.device)
    space = spaces.make(config.space.name, width=config.space.width, image_size=config.space.image_size,
                        restricted=config.space.restricted, split=config.space.split)
    kernels = ops.use_kernels(config.kernels, device)
    accumulate = accumulation(config, dist.world_size())
    _make_engine(config, accumulate).check(device.type)
    images = data.open_data(config.data.train, config.data.val)
    train_set, val_set = images.train, images.val
    needed = config.train.batch * (config.train.steps_per_epoch or 1)
    if len(train_set) < needed:
        raise ConfigError("train.steps_per_epoch" if config.train.steps_per_epoch else "train.batch",
                          f"an epoch takes {needed} images, but data.train has {len(train_set)}", "lower it")
    torch.manual_seed(config.seed)
    online = Supernet(space, config.heads.hidden, config.heads.out)
    predictors = nn.ModuleList(heads.predictor(config.heads.hidden, config.heads.out) for _ in range(space.blocks))
    target = copy.deepcopy(online).requires_grad_(False)
    return Run(config, space, online.to(device), target.to(device), predictors.to(device), train_set, val_set,
               views.recipe(config.data.recipe, config.space.image_size), device, kernels, accumulate,
               config.train.steps_per_epoch or len(train_set) // config.train.batch, RunState(), {})


def _block_stage(run: Run, folder: Folder, metrics: log.Metrics, engine_folder: Folder | None) -> None:
    """Trains the block that the state names, rates it, and moves the state to the next one."""
    config, state = run.config, run.state
    block, total = state.block, config.train.epochs * run.steps_per_epoch
    main = dist.rank() == 0
    engine, steps = start_block(run)
    if engine_folder is not None and state.step:
        engine.load(engine_folder)
    with log.progress(f"block {block} train", total, state.step, main) as task:
        for step in steps:
            _report(metrics, state, step, config.train.collapse_below)
            task.advance(f"loss {step.loss:+.3f}  {step.images_per_second:.0f} images/s")
            every = config.rating.every_epochs
            if step.ends_epoch and every and (step.epoch + 1) % every == 0 and state.step < total:
                _rate_midway(run, folder, metrics, step.epoch + 1)
            if state.step % config.checkpoint.every_steps == 0 or state.step == total:
                _save(run, folder, engine)
    engine.close()

    scores = _rate(run, block)
    winner = best(scores)
    _write_rating(folder, run, block, scores, f"block_{block}.json")
    logger.info("block %d: best of %d paths is %s with score %+.4f", block, len(scores), encode(winner), scores[winner])
    metrics.write("rating", block, state.step, best=scores[winner], path=encode(winner))
    freeze_winner(run, winner)
    if main:
        runfolder.write_json(folder / "winners.json", {"winners": [encode(p) for p in state.winners]})
    _save(run, folder, None)


def freeze_winner(run: Run, winner: Path) -> None:
    """Ends the current block's stage: its weights freeze, with the winner's calibrated statistics as their buffers,
    and the state moves on to the next block."""
    block, state = run.state.block, run.state
    with autocast(run.device.type, run.config.train.precision):  # as when the winner was rated
        features = [run.target.features(state.winners, x) for x in _calibration(run)]
        of_target, _ = calibrate(run.online, run.target, run.predictors[block], block, winner, features)
    of_target.write()
    run.online.freeze(block)
    run.target.freeze(block)
    state.winners.append(winner)
    state.block, state.step = block + 1, 0


def start_block(run: Run) -> tuple[Engine, Iterator[Step]]:
    """The engine of the state's block and its training, one optimizer step per item; nothing has run yet."""
    config, block, train = run.config, run.state.block, run.config.train
    trained = nn.ModuleDict({**run.online.part(block), "predictor": run.predictors[block]})
    followers = run.target.part(block)
    engine = _make_engine(config, run.accumulate)
    engine.wrap(trained, lambda sharded: LARS(parameter_groups(trained, followers), train.lr, train.momentum,
                                              train.weight_decay, train.trust, sharded=sharded))
    return engine, train_block(
        run.online, run.target, run.predictors[block], run.space, engine, _train_batches(run), run.state, train,
        accumulate=run.accumulate, steps_per_epoch=run.steps_per_epoch, seed=config.seed, device=run.device)


def _make_engine(config: Config, accumulate: int) -> Engine:
    return engines.make(config.engine.name, accumulate=accumulate, micro_batch=config.train.micro_batch,
                        precision=config.train.precision, clip=config.train.clip, section=config.engine.deepspeed)


def _train_batches(run: Run) -> Iterator[list[Tensor]]:
    """The micro-batches of the block's stage from the state's position on. The order differs in every epoch."""
    config, state = run.config, run.state
    per_epoch = run.steps_per_epoch * run.accumulate
    first, start = divmod(state.step, run.steps_per_epoch)
    for epoch in range(first, config.train.epochs):
        yield from data.batches(
            run.train_set, run.recipe, run.view_ids, run.space.view_pairs, seed=config.seed,
            epoch=state.block * config.train.epochs + epoch, start=start * run.accumulate, steps=per_epoch,
            batch=config.train.micro_batch, rank=dist.rank(), world=dist.world_size(), workers=config.data.workers,
            max_bad=config.data.max_bad, bad=run.bad)
        start = 0


def _calibration(run: Run) -> list[Tensor]:
    """The fixed calibration batches of training images (METHOD 4): whole batches, or one of all the images."""
    rating = run.config.rating
    whole = min(rating.calibration_batches, len(run.train_set) // rating.calibration_images)
    count = whole * rating.calibration_images or len(run.train_set)
    chosen = data.fixed_batches(run.train_set, run.recipe, [CALIBRATION_VIEW], run.space.view_pairs, shuffle=True,
                                seed=run.config.seed, count=count, batch=rating.calibration_images,
                                workers=run.config.data.workers,
                                max_bad=run.config.data.max_bad, bad=run.bad)
    return [batch[0].to(run.device, memory_format=torch.channels_last) for batch in chosen]


def _validation(run: Run) -> Iterator[list[Tensor]]:
    """Validation batches, one A and one B view of every image."""
    for batch in data.fixed_batches(run.val_set, run.recipe, [0, run.space.view_pairs], run.space.view_pairs,
                                    shuffle=False, seed=run.config.seed, count=_val_images(run),
                                    batch=run.config.rating.batch,
                                    workers=run.config.data.workers, max_bad=run.config.data.max_bad, bad={}):
        yield [x.to(run.device, memory_format=torch.channels_last) for x in batch]


def _val_images(run: Run) -> int:
    return min(run.config.data.val_images or len(run.val_set), len(run.val_set))


def _rate(run: Run, block: int) -> dict[Path, float]:
    """Rates the block on the winners of the blocks before it."""
    winners = run.state.winners[:block]
    paths = run.space.paths(block, winners)
    batches = -(-_val_images(run) // run.config.rating.batch)
    mine = len(paths[dist.rank()::dist.world_size()])
    with log.progress(f"block {block} rate", mine * (1 + batches), show=dist.rank() == 0) as task:
        return rate_block(run.online, run.target, run.predictors[block], block, winners, paths, _calibration(run),
                          _validation(run), autocast=lambda: autocast(run.device.type, run.config.train.precision),
                          advance=task.advance)


def _rate_midway(run: Run, folder: Folder, metrics: log.Metrics, epochs: int) -> None:
    """A rating while the block still trains. It informs; it never enters the block's own prefix."""
    block, state = run.state.block, run.state
    scores = _rate(run, block)
    leader = best(scores)
    logger.info("block %d after %d epochs: leader %s with score %+.4f", block, epochs, encode(leader), scores[leader])
    metrics.write("rating", block, state.step, best=scores[leader], path=encode(leader))
    _write_rating(folder, run, block, scores, f"block_{block}_epoch_{epochs}.json")


def _report(metrics: log.Metrics, state: RunState, step: Step, collapse_below: float) -> None:
    metrics.write("train", state.block, state.step, epoch=step.epoch, loss=step.loss, spread=step.spread, lr=step.lr,
                  ema_momentum=step.ema_momentum, images=state.images_seen,
                  images_per_second=round(step.images_per_second, 2))
    if step.spread < collapse_below:
        logger.warning("block %d step %d: the embeddings are collapsing (spread %.3f < train.collapse_below %.3f); "
                       "lower train.lr", state.block, state.step, step.spread, collapse_below)


def _write_rating(folder: Folder, run: Run, block: int, scores: dict[Path, float], name: str) -> None:
    if dist.rank() == 0:
        runfolder.write_json(folder / "ratings" / name, {
            "block": block, "prefix": [encode(p) for p in run.state.winners[:block]], "score": "population_centre",
            "candidates": run.space.candidates(block), "paths": {encode(p): s for p, s in scores.items()}})


def _write_architecture(run: Run, folder: Folder) -> None:
    """architecture.json: the winners put together (greedy), with their cost."""
    winners, size = run.state.winners, run.config.space.image_size
    x = torch.zeros(1, 3, size, size, device=run.device)
    networks: list[nn.Module] = [run.target.stem, run.target.blocks]
    price = cost.count(networks, lambda: run.target.features(winners, x))
    text = "|".join(encode(p) for p in winners)
    runfolder.write_json(folder / "architecture.json", {
        "space": run.config.space.name, "width": run.config.space.width, "image_size": size, "architecture": text,
        "paths": [encode(p) for p in winners], **run.space.describe(winners), **price})
    logger.info("architecture %s: %.2f M multiply-adds, %.2f M parameters", text, price["macs"] / 1e6,
                price["params"] / 1e6)
    logger.info("everything lies in %s", folder)


def _announce(run: Run, folder: Folder) -> None:
    if run.config.data.train is None and dist.rank() == 0:
        logger.warning("DEMONSTRATION: no data.train is set, so this run uses the embedded sample of Fashion-MNIST "
                       "(%d training, %d validation images of 28x28 pixels). Its result says nothing about your data.",
                       len(run.train_set), len(run.val_set))
    parameters = sum(p.numel() for p in run.online.parameters())
    logger.info("%s search on %d %s rank(s), %s kernels: %d blocks, %.1f M supernet parameters, %d training images, "
                "%d steps a block of %d images", run.config.space.name, dist.world_size(), run.device.type, run.kernels,
                run.space.blocks, parameters / 1e6, len(run.train_set), run.config.train.epochs * run.steps_per_epoch,
                run.config.train.batch)
    if run.state.block or run.state.step:
        done = run.state.block == run.space.blocks
        where = "this run is finished" if done else f"going on in block {run.state.block} at step {run.state.step}"
        logger.info("%s: %s", folder, where)


def _save(run: Run, folder: Folder, engine: Engine | None) -> None:
    state = run.state
    values = {"block": state.block, "step": state.step, "images_seen": state.images_seen,
              "winners": [encode(p) for p in state.winners], "online": run.online.state_dict(),
              "target": run.target.state_dict(), "predictors": run.predictors.state_dict()}
    checkpoint.save(folder / "checkpoints", f"block{state.block}-step{state.step:06d}", values, engine,
                    run.config.checkpoint.keep)


def _restore(run: Run, folder: Folder) -> Folder | None:
    """Loads the last checkpoint if there is one; returns its folder, where the engine's state lies."""
    last = checkpoint.latest(folder / "checkpoints")
    if last is None:
        return None
    values = checkpoint.load(last)
    run.online.load_state_dict(values["online"])
    run.target.load_state_dict(values["target"])
    run.predictors.load_state_dict(values["predictors"])
    state = run.state
    state.block, state.step, state.images_seen = values["block"], values["step"], values["images_seen"]
    state.winners[:] = [decode(text) for text in values["winners"]]
    for block in range(state.block):
        run.online.freeze(block)
        run.target.freeze(block)
    return last


def _checkpoint_bytes(run: Run) -> int:
    """An upper bound: both networks, the predictors, and one momentum per parameter of the largest block."""
    def size(module: nn.Module) -> int:
        return sum(t.numel() * t.element_size() for t in [*module.parameters(), *module.buffers()])

    largest = max(size(run.online.part(b)) + size(run.predictors[b]) for b in range(run.space.blocks))
    return size(run.online) + size(run.target) + size(run.predictors) + largest
