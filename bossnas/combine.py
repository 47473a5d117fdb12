"""Makes the scores of different blocks, and of different seeds, fit to be added up. Pure functions over plain values.

The score of an architecture is the sum of its paths' scores over the blocks. Blocks differ in how far their scores lie
apart, which weighs them; here the weights are chosen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

HOW = {
    "sum": "the scores as they are, as in the paper",
    "standardised": "every block counts alike: its scores minus their mean, by their standard deviation",
    "layers": "every layer counts alike: as standardised, times the root of the block's number of layers",
    "ranks": "every block counts alike: the ranks of its paths, from 0 to 1",
}


def combined(scores: Mapping[str, float], how: str) -> dict[str, float]:
    """A block's scores (encoded path -> value), made fit to be added to those of other blocks; which of two values is
    the better one stays as it is. ``how``: a name of HOW. Equal scores become zeros."""
    values = np.array(list(scores.values()), np.float64)
    if how == "standardised":
        values = standardised(values)
    elif how == "layers":
        values = standardised(values) * math.sqrt(len(next(iter(scores))))
    elif how == "ranks":
        values = (stats.rankdata(values) - 1) / max(len(values) - 1, 1)
    return dict(zip(scores, values.tolist(), strict=True))


def standardised(values: np.ndarray) -> np.ndarray:
    """The values minus their mean, by their standard deviation; zeros where all are equal."""
    spread = np.ptp(values)
    return (values - values.mean()) / values.std() if spread else np.zeros(len(values))


def summed(of_seeds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of several ratings of the same paths."""
    return {path: sum(scores[path] for scores in of_seeds) / len(of_seeds) for path in of_seeds[0]}
