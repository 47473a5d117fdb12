"""Rating the blocks of a run: images, memory, progress and files for `bossnas.supernet.rate_block`."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from bossnas import log
from bossnas.data.batches import fixed_view_batches
from bossnas.data.order import FixedBatches
from bossnas.distributed import dist
from bossnas.distributed.alive import Guard
from bossnas.distributed.engines.protocol import autocast
from bossnas.errors import ConfigError
from bossnas.files import draft, write_json
from bossnas.log import logger
from bossnas.runs import certainty
from bossnas.runs.folder import FREE
from bossnas.search.run import Run
from bossnas.spaces.paths import Choices, encode
from bossnas.supernet.memory import Footprint
from bossnas.supernet.rate_block import Pieces, Rated, RatingOptions, Validation, rate_block
from bossnas.supernet.scores import BETTER, chance
from bossnas.supernet.units import Unit, units

CALIBRATION_VIEW = 1  # METHOD 4: view index 1 of the calibration batch
PIECES = 2  # the form of what a cut rating keeps
SAVE_SECONDS = 30  # between two writings of a rating's progress
CPU_GIB = 0.25  # larger maps than some 32 MiB come from fresh pages at every operation, which costs more than it saves
GPU_SHARE = 0.5  # of the memory that is free when the rating starts


def rate(
    run: Run,
    block: int,
    partial: Path | None = None,
    prefix: Sequence[Choices] | None = None,
    guard: Guard | None = None,
) -> Rated:
    """All scores of all paths of the block, on ``prefix``, the paths of the blocks before it (None: their winners).

    ``partial``: a file that holds the progress, from which a rating that was cut goes on; removed at the end.
    ``guard``: what may ask for a stop; then raises Stopped once the progress is in the file.
    """
    winners, settings = list(run.state.winners[:block] if prefix is None else prefix), run.config.rating
    assert len(winners) == block, "the prefix holds exactly the blocks before this one"
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

        rated = rate_block(
            run.networks(block),
            winners,
            paths,
            Calibration(run),
            validation,
            RatingOptions(
                settings.temperature, most, lambda: autocast(run.machine.device.type, run.config.train.precision)
            ),
            pieces=pieces,
            advance=advance,
        )
    progress.drop()
    if not all(math.isfinite(value) for values in rated.scores.values() for value in values.values()):
        raise ConfigError(
            "train.lr",
            f"block {block} is rated with values that are not finite: its weights are not",
            "lower it, or lengthen train.warmup_epochs; the last checkpoint is unharmed",
        )
    return rated


def certainty_of(rated: Rated, score: str) -> certainty.Certainty:
    """How sure the winner by a score is."""
    by_text = {encode(path): value for path, value in rated.scores[score].items()}
    return certainty.certainty(by_text, _parts(rated, score), BETTER[score])


def chance_of(run: Run, score: str) -> float | None:
    """The score where nothing tells the images apart; None for a score that has no such value."""
    if not score.endswith("instance_discrimination"):
        return None
    sizes = _batches(run)
    return sum(size * chance(size) for size in sizes) / sum(sizes)


def _parts(rated: Rated, score: str) -> certainty.Parts:
    means = torch.tensor(list(rated.scores[score].values()), dtype=torch.float64)
    return certainty.Parts((rated.parts[score] - means[:, None]).numpy(), np.array(rated.images, np.float64))


def write(folder: Path, run: Run, block: int, rated: Rated, name: str, prefix: Sequence[Choices]) -> None:
    """ratings/``name``: every path with the chosen score, and with all scores, on ``prefix``, and how sure they are."""
    if dist.rank() == 0:
        chosen = run.config.rating.score
        by_text = {score: {encode(p): v for p, v in values.items()} for score, values in rated.scores.items()}
        by_chance = {score: chance_of(run, score) for score in by_text}
        write_json(
            folder / "ratings" / name,
            {
                "block": block,
                "prefix": [encode(p) for p in prefix],
                "score": chosen,
                "better": BETTER,
                "candidates": run.space.candidates(block),
                "chance": {score: value for score, value in by_chance.items() if value is not None},
                "paths": by_text[chosen],
                "scores": by_text,
                **certainty.as_json(by_text, {score: _parts(rated, score) for score in by_text}, BETTER),
            },
        )


class Calibration:
    """The fixed calibration batches of training images (METHOD 4): whole batches, or one of all the images. They are
    made once and stay in the CPU's memory."""

    def __init__(self, run: Run):
        self.run = run
        if not run.calibration:
            rating = run.config.rating
            whole = min(rating.calibration_batches, len(run.images.train) // rating.calibration_images)
            count = whole * rating.calibration_images or len(run.images.train)
            chosen = fixed_view_batches(
                run.images.train,
                run.views(CALIBRATION_VIEW),
                run.config.data,
                FixedBatches(count, rating.calibration_images, run.config.seed, shuffle=True),
                device=run.machine.device,
                bad=run.bad,
            )
            run.calibration = [batch[0].cpu() for batch in chosen]

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self.run.calibration:
            yield batch.to(self.run.machine.device, memory_format=torch.channels_last)


def _validation(run: Run) -> Validation:
    """Validation batches, one A and one B view of every image."""
    batch, count = run.config.rating.batch, run.val_images

    def take(batches: Sequence[int]) -> Iterator[list[Tensor]]:
        return fixed_view_batches(
            run.images.val,
            run.views(0, run.space.view_pairs),
            run.config.data,
            FixedBatches(count, batch, run.config.seed, only=batches),
            device=run.machine.device,
            bad={},
        )

    return Validation(_batches(run), take)


def _batches(run: Run) -> list[int]:
    """Images of each validation batch."""
    batch, count = run.config.rating.batch, run.val_images
    return [min(batch, count - first) for first in range(0, count, batch)]


def _units_fit(run: Run, block: int, winners: Sequence[Choices], paths: Sequence[Choices]) -> int:
    """How many paths are computed together within rating.max_gib; equal on all ranks."""
    rating, config = run.config.rating, run.config
    images = max(
        2 * min(rating.batch, run.val_images),
        min(rating.calibration_images, len(run.images.train)),
    )
    gib = rating.max_gib
    if gib is None:
        gib = GPU_SHARE * torch.cuda.mem_get_info()[0] / 2**30 if run.machine.device.type == "cuda" else CPU_GIB
    size = config.space.image_size
    with autocast(run.machine.device.type, config.train.precision), torch.no_grad():
        x = torch.zeros(4, 3, size, size, device=run.machine.device).contiguous(memory_format=torch.channels_last)
        footprint = Footprint(run.target, block, paths, run.target.features(winners, x))
    most = min(dist.all_gather_object(footprint.most(images, int(gib * 2**30))))
    if most == 0 and rating.max_gib is not None:
        one = max(footprint.of(unit, images) for unit in units(paths, 1)) / 2**30
        raise ConfigError(
            "rating.max_gib",
            f"{gib:g} GiB is too little for one path of block {block} and {images} "
            f"images at once, which take {one:.3g} GiB",
            "raise it, or lower rating.batch and rating.calibration_images",
        )
    return max(most, 1)


def _key(run: Run, block: int, winners: Sequence[Choices], cut: Sequence[Unit], sizes: Sequence[int]) -> str:
    """Tells the ratings apart whose pieces do not fit together: weights, paths, images, units, settings."""
    modules = nn.ModuleList([*run.online.part(block).values(), *run.target.part(block).values(), run.predictors[block]])
    # sums tell two states of a training apart; the prefix does not change without the block's own weights
    weights = torch.stack([p.detach().double().sum() for p in modules.parameters()]).tolist()
    settings = run.config.model_dump(mode="json", include={"seed", "space", "data", "rating", "kernels"})
    # none of these makes other pieces: max_gib shows in `cut`, and all scores are rated whichever chooses
    for key in FREE + ("rating.score",):
        section, _, name = key.rpartition(".")
        settings.get(section, {}).pop(name, None)
    text = repr((PIECES, block, list(winners), list(cut), list(sizes), weights, settings))
    return hashlib.sha256(text.encode()).hexdigest()


class _Progress:
    """The pieces of a rating in a file, written by rank 0 every SAVE_SECONDS and read by it for all ranks."""

    def __init__(self, file: Path | None, key: str):
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
        with draft(self.file) as made:
            torch.save({"key": self.key, "pieces": pieces}, made)
        self.saved = time.monotonic()

    def drop(self) -> None:
        if self.file is not None and dist.rank() == 0:
            self.file.unlink(missing_ok=True)
