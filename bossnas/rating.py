"""Rating the blocks of a run: images, memory and progress for `bossnas.rate`, and the files that it leaves."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path as Folder

import torch
from torch import Tensor, nn

from bossnas import data, dist, log, runfolder
from bossnas.alive import Guard
from bossnas.config import Config, override
from bossnas.engines.protocol import autocast
from bossnas.errors import ConfigError
from bossnas.log import logger
from bossnas.ops import GroupedBatchNorm
from bossnas.paths import Path, encode
from bossnas.rate import Pieces, Validation, best, calibrate, rate_block
from bossnas.run import Run, announce, build, restore, write_architecture
from bossnas.scores import BETTER
from bossnas.units import Footprint, Unit, units

CALIBRATION_VIEW = 1  # METHOD 4: view index 1 of the calibration batch
SAVE_SECONDS = 30  # between two writings of a rating's progress
CPU_GIB = 0.25  # larger maps than some 32 MiB come from fresh pages at every operation, which costs more than it saves
GPU_SHARE = 0.5  # of the memory that is free when the rating starts

Scores = dict[str, dict[Path, float]]


def rate(run: Run, block: int, partial: Folder | None = None, prefix: Sequence[Path] | None = None,
         guard: Guard | None = None) -> Scores:
    """All scores of all paths of the block, on ``prefix``, the paths of the blocks before it (None: their winners).

    ``partial``: a file that holds the progress, from which a rating that was cut goes on; removed at the end.
    ``guard``: what may ask for a stop; then raises Stopped once the progress is in the file.
    """
    winners, settings = list(run.state.winners[:block] if prefix is None else prefix), run.config.rating
    paths = run.space.paths(block, winners)
    validation = _validation(run)
    most = _units_fit(run, block, winners, paths)
    cut = units(paths, most)
    progress = _Progress(partial, _key(run, block, winners, cut, validation.sizes))
    pieces = progress.load()
    done = sum(len(value) for (kind, *_), value in pieces.items() if kind != "sum")
    total = len(paths) * (1 + 2 * len(validation.sizes))
    if done:
        logger.info("block %d: its rating goes on at %d of %d", block, done, total)
    place = f"block {block}" if partial is None else partial.stem.replace("_", " ")
    if len(cut) > 1:
        logger.info("block %d: %d paths are rated in %d parts of at most %d", block, len(paths), len(cut), most)
    with log.progress(f"block {block} rate", total, done, show=dist.rank() == 0) as task:
        def advance(pieces: Pieces, count: int) -> None:
            task.advance(count=count)
            stop = guard is not None and guard.should_stop()
            progress.save(pieces, at_once=stop)
            if guard is not None:
                guard.at(f"the rating of {place}")
            if stop:
                raise guard.stopped()

        scores = rate_block(
            run.online, run.target, run.predictors[block], block, winners, paths, _Calibration(run), validation,
            temperature=settings.temperature, most=most,
            autocast=lambda: autocast(run.device.type, run.config.train.precision), pieces=pieces, advance=advance)
    progress.drop()
    if not all(math.isfinite(value) for values in scores.values() for value in values.values()):
        raise ConfigError("train.lr", f"block {block} is rated with values that are not finite: its weights are not",
                          "lower it, or lengthen train.warmup_epochs; the last checkpoint is unharmed")
    return scores


def winner_of(run: Run, scores: Scores) -> tuple[Path, float]:
    """The best path by the score that the config chooses, and its value."""
    values = scores[run.config.rating.score]
    winner = best(values, BETTER[run.config.rating.score])
    return winner, values[winner]


def write(folder: Folder, run: Run, block: int, scores: Scores, name: str, prefix: Sequence[Path]) -> None:
    """ratings/``name``: every path with the chosen score, and with all scores, on ``prefix``."""
    if dist.rank() == 0:
        chosen = run.config.rating.score
        by_text = {score: {encode(p): v for p, v in values.items()} for score, values in scores.items()}
        runfolder.write_json(folder / "ratings" / name, {
            "block": block, "prefix": [encode(p) for p in prefix], "score": chosen, "better": BETTER,
            "candidates": run.space.candidates(block), "paths": by_text[chosen], "scores": by_text})


def settle(run: Run, folder: Folder, scores: Scores) -> tuple[Path, float]:
    """Writes the current block's rating and its winner, and freezes the block; the state is then at the next one.

    The block's buffers become the winner's calibrated batch-norm statistics. Returns the winner and its score.
    """
    block = run.state.block
    winner, value = winner_of(run, scores)
    write(folder, run, block, scores, f"block_{block}.json", run.state.winners)
    logger.info("block %d: best of %d paths is %s with %s %+.4f", block, len(scores[run.config.rating.score]),
                encode(winner), run.config.rating.score, value)
    freeze_winner(run, winner)
    if dist.rank() == 0:
        runfolder.write_json(folder / "winners.json", {"winners": [encode(p) for p in run.state.winners]})
    return winner, value


def freeze_winner(run: Run, winner: Path) -> None:
    """Freezes the current block with the winner's calibrated statistics, and moves the state on to the next block."""
    block, state = run.state.block, run.state
    calibrate_path(run, block, state.winners, winner)
    run.online.freeze(block)
    run.target.freeze(block)
    state.winners.append(winner)
    state.block = block + 1


def calibrate_path(run: Run, block: int, prefix: Sequence[Path], path: Path) -> None:
    """Writes the path's calibrated batch-norm statistics into the target block's buffers. The blocks before it are in
    evaluation mode with those of ``prefix``."""
    with autocast(run.device.type, run.config.train.precision):  # as when the path was rated
        features = [run.target.features(prefix, x) for x in _Calibration(run)]
        of_target, _ = calibrate(run.online, run.target, run.predictors[block], block, [path], [Unit((), (0,))],
                                 features)
    of_target.write()


def rerate(folder: Folder, blocks: list[int] | None = None, overrides: Sequence[str] = ()) -> list[int]:
    """Rates finished blocks again from the run's last checkpoint and rewrites their ratings; returns the blocks.

    ``overrides``: ``rating.key=value``, for this rating alone. Any number of ranks; no engine is needed.
    """
    wrong = [o for o in overrides if not o.startswith("rating.")]
    if wrong:
        raise ConfigError("--set", f"{wrong[0]!r} would rate another run", "override keys of the section rating alone")
    config = override(runfolder.read_config(folder), overrides)
    run = dist.together(lambda: build(config, training=False))
    log.setup(folder, dist.rank() == 0)
    restore(run, folder, training=False)
    done = list(range(run.state.block))
    if not done:
        raise ConfigError("--run", f"{folder} has finished no block", "wait, or go on with its search")
    chosen = done if blocks is None else blocks
    if not set(chosen) <= set(done):
        raise ConfigError("--block", f"of {chosen} the run has finished only {done}", "name finished blocks")
    for block in chosen:
        scores = rate(run, block, folder / "ratings" / f"block_{block}.partial")
        write(folder, run, block, scores, f"block_{block}.json", run.state.winners[:block])
    return chosen


def rate_untrained(config: Config) -> Folder:
    """Rates block after block of a supernet with random weights, each on the winners before; returns the folder.

    Last batch-norm weights that start at zero (HyTra) are set to one: otherwise all candidates of a scale would be
    the same function.
    """
    main, folder = dist.rank() == 0, Folder(config.out)

    def start() -> Run:
        if not main:
            return build(config, training=False)
        runfolder.claim(config, resume=False)
        run = build(config, training=False)
        runfolder.prepare(folder, config, "rating without training")
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
    dist.barrier()
    return folder


class _Calibration(Sequence):
    """The fixed calibration batches of training images (METHOD 4): whole batches, or one of all the images. They are
    made once and stay in the CPU's memory."""

    def __init__(self, run: Run):
        self.run = run
        if not run.calibration:
            rating = run.config.rating
            whole = min(rating.calibration_batches, len(run.train_set) // rating.calibration_images)
            count = whole * rating.calibration_images or len(run.train_set)
            chosen = data.fixed_batches(
                run.train_set, run.recipe, [CALIBRATION_VIEW], run.space.view_pairs, run.config.data, shuffle=True,
                seed=run.config.seed, count=count, batch=rating.calibration_images, device=run.device, bad=run.bad)
            run.calibration = [batch[0].cpu() for batch in chosen]

    def __len__(self) -> int:
        return len(self.run.calibration)

    def __getitem__(self, i: int) -> Tensor:
        return self.run.calibration[i].to(self.run.device, memory_format=torch.channels_last)


def _validation(run: Run) -> Validation:
    """Validation batches, one A and one B view of every image."""
    batch = run.config.rating.batch
    count = min(run.config.data.val_images or len(run.val_set), len(run.val_set))

    def take(batches: Sequence[int]) -> Iterator[list[Tensor]]:
        return data.fixed_batches(run.val_set, run.recipe, [0, run.space.view_pairs], run.space.view_pairs,
                                  run.config.data, shuffle=False, seed=run.config.seed, count=count, batch=batch,
                                  only=batches, device=run.device, bad={})

    return Validation([min(batch, count - first) for first in range(0, count, batch)], take)


def _units_fit(run: Run, block: int, winners: Sequence[Path], paths: Sequence[Path]) -> int:
    """How many paths are computed together within rating.max_gib; equal on all ranks."""
    rating, config = run.config.rating, run.config
    images = max(2 * min(rating.batch, config.data.val_images or len(run.val_set), len(run.val_set)),
                 min(rating.calibration_images, len(run.train_set)))
    gib = rating.max_gib
    if gib is None:
        gib = GPU_SHARE * torch.cuda.mem_get_info()[0] / 2**30 if run.device.type == "cuda" else CPU_GIB
    size = config.space.image_size
    with autocast(run.device.type, config.train.precision), torch.no_grad():
        x = torch.zeros(4, 3, size, size, device=run.device).contiguous(memory_format=torch.channels_last)
        footprint = Footprint(run.target, block, paths, run.target.features(winners, x))
    most = min(dist.all_gather_object(footprint.most(images, int(gib * 2**30))))
    if most == 0 and rating.max_gib is not None:
        one = max(footprint.of(unit, images) for unit in units(paths, 1)) / 2**30
        raise ConfigError("rating.max_gib", f"{gib:g} GiB is too little for one path of block {block} and {images} "
                          f"images at once, which take {one:.3g} GiB", "raise it, or lower rating.batch and "
                          "rating.calibration_images")
    return max(most, 1)


def _key(run: Run, block: int, winners: Sequence[Path], cut: Sequence[Unit], sizes: Sequence[int]) -> str:
    """Tells the ratings apart whose pieces do not fit together: weights, paths, images, units, settings."""
    modules = nn.ModuleList([*run.online.part(block).values(), *run.target.part(block).values(), run.predictors[block]])
    weights = torch.stack([p.detach().double().sum() for p in modules.parameters()]).tolist()
    settings = run.config.model_dump(mode="json", include={"seed", "space", "data", "rating", "kernels"})
    for key in runfolder.FREE + ("rating.score",):
        section, _, name = key.rpartition(".")
        settings.get(section, {}).pop(name, None)
    text = repr((block, list(winners), list(cut), list(sizes), weights, settings))
    return hashlib.sha256(text.encode()).hexdigest()


class _Progress:
    """The pieces of a rating in a file, written by rank 0 every SAVE_SECONDS and read by it for all ranks."""

    def __init__(self, file: Folder | None, key: str):
        self.file, self.key, self.saved = file, key, time.monotonic()

    def load(self) -> Pieces:
        def read() -> Pieces:
            if self.file is None or not self.file.exists():
                return {}
            try:
                values = torch.load(self.file, weights_only=True)
                return values["pieces"] if values["key"] == self.key else {}
            except Exception:  # damaged: nothing is lost but time
                logger.warning("%s is damaged; the rating starts again", self.file)
                return {}

        return dist.from_main(read)

    def save(self, pieces: Pieces, at_once: bool) -> None:
        due = at_once or time.monotonic() - self.saved >= SAVE_SECONDS
        if self.file is None or dist.rank() > 0 or not due:
            return
        draft = self.file.with_name(self.file.name + ".tmp")
        torch.save({"key": self.key, "pieces": pieces}, draft)
        draft.replace(self.file)
        self.saved = time.monotonic()

    def drop(self) -> None:
        if self.file is not None and dist.rank() == 0:
            self.file.unlink(missing_ok=True)
