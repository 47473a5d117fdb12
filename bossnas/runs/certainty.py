"""How sure a rating is: standard errors over the validation images, and which paths can be told from the winner.

A score is the mean of what the images add to it. Kept are the means over groups of images (``Parts``): their spread
gives the standard error of a score, and that of a difference between two paths, which saw the same images. This is the
error over images. Another seed of the training changes ratings as well, which no images tell.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

APART = 2.0  # standard errors of the difference from which on two paths are told apart
ROUNDING = 1e-6  # of the score's size: differences below it are what float32 leaves
FEWEST = 8  # groups without which no error is given
HELP = "more validation images, more training steps, another train.lr or rating.score, or the sum of several seeds"


@dataclass(frozen=True)
class Parts:
    """The means of each path over groups of images. ``values``: float64 [paths, groups], less the path's score;
    ``images``: of each group, [groups]."""

    values: np.ndarray
    images: np.ndarray

    def error(self, values: np.ndarray) -> np.ndarray:
        """The standard error of the means of ``values`` [..., groups]: [...]; NaN for fewer groups than FEWEST.

        The root of K / (K - 1) sum_k w_k^2 (x_k - x)^2, with w_k the groups' shares of the images and x the weighted
        mean: a delete-a-group jackknife to first order, and that of batch means for equal groups.
        """
        count, share = len(self.images), self.images / self.images.sum()
        if count < FEWEST:
            return np.full(values.shape[:-1], np.nan)
        off = values - (values @ share)[..., None]
        return np.sqrt(count / (count - 1) * (off**2 @ share**2))


@dataclass(frozen=True)
class Certainty:
    """What is known of a block's winner by one score."""

    winner: str
    paths: int
    error: float  # standard error of the winner's score; NaN: too few images
    margins: dict[str, tuple[float, float]]  # path -> how much worse than the winner, and that difference's error
    level: list[str]  # paths that cannot be told from the winner, the nearest first; without the winner

    @property
    def known(self) -> bool:
        return math.isfinite(self.error)

    @property
    def nothing_told_apart(self) -> bool:
        return self.known and self.paths > 1 and len(self.level) == self.paths - 1

    def text(self) -> str:
        """Such as "3 of 50 paths within two standard errors of it"."""
        if not self.known:
            return "its error is not known: too few validation images"
        if self.nothing_told_apart:
            return f"nothing is told apart: all {self.paths} paths lie within two standard errors of the best"
        count = len(self.level)
        verb = "lies" if count == 1 else "lie"
        return f"{count or 'none'} of the {self.paths - 1} other paths {verb} within two standard errors of it"


def certainty(scores: Mapping[str, float], parts: Parts, better: str) -> Certainty:
    """Compares every path with the best. ``scores``: by path, in the order of the rows of ``parts``."""
    paths, values = list(scores), np.array(list(scores.values()), np.float64)
    sign = 1 if better == "lower" else -1
    best = int(np.argmin(sign * values))
    differences = sign * (values - values[best])
    errors = parts.error(parts.values - parts.values[best])
    rounding = ROUNDING * max(1.0, float(np.abs(values).max()))
    within = differences <= np.maximum(APART * errors, rounding)
    order = [i for i in np.argsort(differences, kind="stable").tolist() if within[i] and i != best]
    return Certainty(
        paths[best],
        len(paths),
        float(parts.error(parts.values[best])),
        {path: (float(d), float(e)) for path, d, e in zip(paths, differences, errors, strict=True)},
        [paths[i] for i in order],
    )


def packed(values: np.ndarray) -> str:
    """Group means as little-endian float32, base64: JSON's digits would take ten times the room."""
    return base64.b64encode(values.astype("<f4").tobytes()).decode("ascii")


def unpacked(text: str, images: Sequence[int], paths: int) -> Parts:
    """What `packed` wrote. Raises ValueError where the size is another."""
    sizes = np.array(images, np.float64)
    values = np.frombuffer(base64.b64decode(text, validate=True), "<f4").astype(np.float64)
    if sizes.ndim != 1 or not len(sizes) or not (sizes > 0).all() or len(values) != paths * len(sizes):
        raise ValueError("its groups of images do not fit its paths")
    if not np.isfinite(values).all():
        raise ValueError("its groups of images hold values that are not finite")
    return Parts(values.reshape(paths, len(sizes)), sizes)


def as_json(scores: Mapping[str, Mapping[str, float]], parts: Mapping[str, Parts], better: Mapping[str, str]) -> dict:
    """What a rating file keeps of a block's certainty: errors and margins to read, and the groups to go on with."""
    found = {score: certainty(values, parts[score], better[score]) for score, values in scores.items()}

    def number(value: float) -> float | None:
        return value if math.isfinite(value) else None

    def errors(score: str) -> dict[str, float | None]:
        return dict(zip(scores[score], map(number, parts[score].error(parts[score].values).tolist()), strict=True))

    def margins(score: str) -> dict[str, Any]:
        return {path: [margin, number(error)] for path, (margin, error) in found[score].margins.items()}

    return {
        "errors": {score: errors(score) for score in scores},
        "behind_winner": {score: margins(score) for score in scores},
        "groups": {
            "images": [int(n) for n in next(iter(parts.values())).images],
            "means": {score: packed(one.values) for score, one in parts.items()},
        },
    }
