"""How sure it is that one architecture is better than another: errors over the validation images, and over seeds.

The score of an architecture is a sum over blocks, and the blocks of a run are rated on the same images: the error of a
difference between two architectures comes from the same groups of images in all blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from bossnas.runs.certainty import APART, ROUNDING, Parts
from bossnas.runs.ratings import BlockRating
from bossnas.spaces.paths import Choices, encode

Architecture = Sequence[Choices]


class Doubt:
    """Of one run or several. ``scales[r][b]``: by what the scores of block b of run r were multiplied before they were
    added up (`combine.scales`); None: they were not multiplied by numbers, and no error is known."""

    def __init__(self, runs: Sequence[Sequence[BlockRating]], scales: Sequence[Sequence[float]] | None):
        self.runs, self.scales = runs, scales
        self._rows = [[{path: i for i, path in enumerate(rating.scores)} for rating in ratings] for ratings in runs]
        self._scores = [[np.array(list(rating.scores.values())) for rating in ratings] for ratings in runs]

    @property
    def known(self) -> bool:
        """Whether all ratings keep what groups of images say."""
        return self.scales is not None and all(rating.parts for ratings in self.runs for rating in ratings)

    def over_images(self, one: Architecture, other: Architecture) -> float | None:
        """Standard error, over the validation images, of the difference between two architectures' scores."""
        if not self.known or self.scales is None:
            return None
        variance = 0.0
        for run, (ratings, scales) in enumerate(zip(self.runs, self.scales, strict=True)):
            found = [
                (rating.parts, scale * self._off(run, block, one[block], other[block]))
                for block, (rating, scale) in enumerate(zip(ratings, scales, strict=True))
                if rating.parts is not None
            ]
            same = all(np.array_equal(parts.images, found[0][0].images) for parts, _ in found)
            pieces: list[tuple[Parts, np.ndarray]] = [(found[0][0], sum(off for _, off in found))] if same else found  # type: ignore[list-item]
            # blocks that were rated on other groups of images, and other runs, count as independent
            variance += sum(float(parts.error(off)) ** 2 for parts, off in pieces)
        return math.sqrt(variance) if math.isfinite(variance) else None

    def over_seeds(self, one: Architecture, other: Architecture) -> float | None:
        """Standard error, over the runs, of the difference between two architectures' scores; None for one run."""
        if self.scales is None or len(self.runs) < 2:
            return None
        found = []
        for run, scales in enumerate(self.scales):
            values = (
                scale * (scores[rows[encode(a)]] - scores[rows[encode(b)]])
                for scale, scores, rows, a, b in zip(
                    scales, self._scores[run], self._rows[run], one, other, strict=True
                )
            )
            found.append(sum(values) * len(self.runs))  # of a mean, each run holds its share
        return float(np.std(found, ddof=1) / math.sqrt(len(found)))

    def level(self, behind: float, best: float, errors: Sequence[float | None]) -> bool | None:
        """Whether an architecture that is ``behind`` the best one's score cannot be told from it; None: not known."""
        known = [error for error in errors if error is not None]
        return behind <= max(APART * max(known), ROUNDING * max(1.0, abs(best))) if known else None

    def _off(self, run: int, block: int, one: Choices, other: Choices) -> np.ndarray:
        parts, rows = self.runs[run][block].parts, self._rows[run][block]
        assert parts is not None, "asked for only where it is known"
        return parts.values[rows[encode(one)]] - parts.values[rows[encode(other)]]
