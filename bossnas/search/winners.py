"""What follows a block's rating: its winner, which freezes the block."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bossnas.distributed import dist
from bossnas.distributed.engines.protocol import autocast
from bossnas.files import write_json
from bossnas.log import logger
from bossnas.search.rating import Calibration, Scores, write
from bossnas.search.run import Run
from bossnas.spaces.paths import Choices, encode
from bossnas.supernet.rate_block import best, calibrate
from bossnas.supernet.scores import BETTER
from bossnas.supernet.units import Unit


def winner_of(run: Run, scores: Scores) -> tuple[Choices, float]:
    """The best path by the score that the config chooses, and its value."""
    values = scores[run.config.rating.score]
    winner = best(values, BETTER[run.config.rating.score])
    return winner, values[winner]


def settle(run: Run, folder: Path, scores: Scores) -> tuple[Choices, float]:
    """Writes the current block's rating and its winner, and freezes the block; the state is then at the next one.

    The block's buffers become the winner's calibrated batch-norm statistics. Returns the winner and its score.
    """
    block = run.state.block
    winner, value = winner_of(run, scores)
    write(folder, run, block, scores, f"block_{block}.json", run.state.winners)
    logger.info(
        "block %d: best of %d paths is %s with %s %+.4f",
        block,
        len(scores[run.config.rating.score]),
        encode(winner),
        run.config.rating.score,
        value,
    )
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
