"""Makes the scores of different blocks, and of different seeds, fit to be added up. Pure functions over plain values.

The score of an architecture is the sum of its paths' scores over the blocks. Blocks differ in how far their scores lie
apart, which weighs them; here the weights are chosen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np


def combined(scores: Mapping[str, float], how: str) -> dict[str, float]:
    """A block's scores (encoded path -> value), made fit to be added to those of other blocks; which of two values is
    the better one stays as it is, and equal ones stay equal. ``how``: a name of HOW."""
    values = np.array(list(scores.values()), np.float64)
    if how == "standardised":
        values = standardised(values)
    elif how == "layers":
        values = standardised(values) * math.sqrt(len(next(iter(scores))))
    elif how == "ranks":
        below, upto = (np.searchsorted(np.sort(values), values, side) for side in ("left", "right"))
        values = (below + upto - 1) / 2 / max(len(values) - 1, 1)  # equal ones share their mean rank
    return dict(zip(scores, values.tolist(), strict=True))


def standardised(values: np.ndarray) -> np.ndarray:
    """The values minus their mean, by their standard deviation; zeros where all are equal."""
    spread = np.ptp(values)
    return (values - values.mean()) / values.std() if spread else np.zeros(len(values))


def together(
    ratings: Sequence[Sequence[Mapping[str, float]]], how: str, weights: Sequence[float] | None = None
) -> list[dict[str, float]]:
    """Several ratings of the same paths as one, their weighted mean; each rating is a list of its blocks' scores.

    The blocks of each are `combined`, and then divided by the standard deviation of their sum over all combinations of
    paths, so that every rating counts by its weight (None: alike). A rating that is alone keeps its scale.
    """
    found = [[combined(block, how) for block in rating] for rating in ratings]
    if len(found) == 1:
        return found[0]
    factors = _factors(found, weights)
    return [
        {path: sum(factor * rating[b][path] for rating, factor in zip(found, factors, strict=True)) for path in block}
        for b, block in enumerate(found[0])
    ]


def _factors(found: Sequence[Sequence[Mapping[str, float]]], weights: Sequence[float] | None) -> list[float]:
    """By what each of several ratings is multiplied in `together`; 1 for one that is alone."""
    if len(found) == 1:
        return [1.0]
    spreads = [math.sqrt(sum(np.var(list(block.values())) for block in rating)) or 1.0 for rating in found]
    weights = [1.0] * len(found) if weights is None else weights
    return [weight / spread / sum(weights) for weight, spread in zip(weights, spreads, strict=True)]


def scales(
    ratings: Sequence[Sequence[Mapping[str, float]]], how: str, weights: Sequence[float] | None = None
) -> list[list[float]] | None:
    """By what `together` multiplies each block of each rating, [ratings][blocks]; None: `how` does not multiply."""
    if how == "ranks":
        return None
    found = [[combined(block, how) for block in rating] for rating in ratings]

    def spread(values: Mapping[str, float]) -> float:
        return max(values.values()) - min(values.values())

    return [
        [
            factor * (spread(after) / spread(before) if spread(before) else 0.0)
            for before, after in zip(old, new, strict=True)
        ]
        for old, new, factor in zip(ratings, found, _factors(found, weights), strict=True)
    ]
