"""What follows a block's rating: its winner, which freezes the block."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bossnas.distributed import dist
from bossnas.distributed.engines.protocol import autocast
from bossnas.files import write_json
from bossnas.log import logger
from bossnas.runs.certainty import HELP, Certainty
from bossnas.search.rating import Calibration, certainty_of, chance_of, write
from bossnas.search.run import Run
from bossnas.spaces.paths import Choices, encode
from bossnas.spaces.words import path_words
from bossnas.supernet.rate_block import Rated, best, calibrate
from bossnas.supernet.scores import BETTER
from bossnas.supernet.units import Unit


def winner_of(run: Run, rated: Rated) -> tuple[Choices, float, Certainty]:
    """The best path by the score that the config chooses, its value, and how sure it is."""
    score = run.config.rating.score
    winner = best(rated.scores[score], BETTER[score])
    return winner, rated.scores[score][winner], certainty_of(rated, score)


def score_text(run: Run, value: float, sure: Certainty) -> str:
    """A score with its standard error over the validation images, and what chance would give."""
    by_chance = chance_of(run, run.config.rating.score)
    error = f" +- {sure.error:.4f}" if sure.known else ""
    beside = "" if by_chance is None else f" (chance gives {by_chance:+.4f})"
    return f"{run.config.rating.score} {value:+.4f}{error}{beside}"


def settle(run: Run, folder: Path, rated: Rated) -> tuple[Choices, float]:
    """Writes the current block's rating and its winner, and freezes the block; the state is then at the next one.

    The block's buffers become the winner's calibrated batch-norm statistics. Returns the winner and its score.
    """
    block = run.state.block
    winner, value, sure = winner_of(run, rated)
    write(folder, run, block, rated, f"block_{block}.json", run.state.winners)
    logger.info("block %d: winner %s: %s", block, encode(winner), path_words(run.space, block, winner))
    logger.info("block %d: %s; %s", block, score_text(run, value, sure), sure.text())
    if sure.nothing_told_apart:
        logger.warning("block %d: another path would do as well as its winner; what helps: %s", block, HELP)
    freeze_winner(run, winner)
    if dist.rank() == 0:
        write_json(folder / "winners.json", {"winners": [encode(p) for p in run.state.winners]})
    return winner, value


def freeze_winner(run: Run, winner: Choices) -> None:
    """Freezes the current block with the winner's calibrated statistics, and moves the state on to the next block."""
    block, state = run.state.block, run.state
    calibrate_path(run, block, state.winners, winner)
    run.online.freeze(block)
    run.target.freeze(block)
    state.winners.append(winner)
    state.block = block + 1


def calibrate_path(run: Run, block: int, prefix: Sequence[Choices], path: Choices) -> None:
    """Writes the path's calibrated batch-norm statistics into the target block's buffers. The blocks before it are in
    evaluation mode with those of ``prefix``."""
    with autocast(run.machine.device.type, run.config.train.precision):  # as when the path was rated
        features = [run.target.features(prefix, x) for x in Calibration(run)]
        of_target, _ = calibrate(run.networks(block), block, [path], [Unit((), (0,))], features)
    of_target.write()
