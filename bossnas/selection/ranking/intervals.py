"""Intervals of Kendall's tau-b, Spearman's rho and Pearson's r: by bootstrap, of few architectures by Fisher's z.

All resamples of the bootstrap are computed at once. A resample draws n of n architectures with replacement; it is
written as how often each was drawn, W [resamples, n].
All scores see the same resamples. Up to EXACT_UP_TO architectures each coefficient of each resample is computed
exactly. Beyond, the three are ratios of sums over pairs and triples of architectures, and each such sum is replaced by
its first-order expansion in the counts, the Hajek projection of a U-statistic (van der Vaart 1998, chapters 11 and 12):
what is left out is smaller than the width of the interval by the root of n.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from statistics import NormalDist

import numpy as np

ENOUGH = 10  # architectures from which on the bootstrap covers what it should; fewer repeat themselves too often
LEAST = 5  # architectures without which Kendall's z has no standard error
BOOTSTRAP, FISHER = "bootstrap percentiles", "Fisher's z"
EXACT_UP_TO = 2000
ROUNDING = 1e-10  # a resample's variance, as a share of that of all, below which it is what differences leave
CHUNK = 4_000_000  # counts in memory at once
NAMES = ("kendall", "spearman", "pearson")


def method(architectures: int) -> str | None:
    """How intervals are found of so many architectures: BOOTSTRAP, FISHER, or None, not at all."""
    return BOOTSTRAP if architectures >= ENOUGH else FISHER if architectures >= LEAST else None


def fisher_intervals(
    values: Mapping[str, float | None], architectures: int, confidence: float = 0.95
) -> dict[str, tuple[float, float]]:
    """coefficient -> (low, high) from its value and the number of architectures; NaN where the value is None, 1 or -1.

    tanh(atanh(value) +- 1.96 se). The squared standard error is 1 / (n - 3) of Pearson's r (Fisher 1921),
    0.437 / (n - 4) of Kendall's tau (Fieller, Hartley & Pearson 1957) and (1 + rho^2 / 2) / (n - 3) of Spearman's rho
    (Bonett & Wright 2000). These are of normal pairs without ties.
    """
    quantile, n, result = NormalDist().inv_cdf((1 + confidence) / 2), architectures, {}
    for name, value in values.items():
        if value is None or abs(value) > 1 - ROUNDING:
            result[name] = (math.nan, math.nan)
            continue
        variances = {"kendall": 0.437 / (n - 4), "spearman": (1 + value**2 / 2) / (n - 3), "pearson": 1 / (n - 3)}
        middle, half = math.atanh(value), quantile * math.sqrt(variances[name])
        result[name] = (math.tanh(middle - half), math.tanh(middle + half))
    return result


def bootstrap_intervals(
    scores: Mapping[str, np.ndarray],
    accuracy: np.ndarray,
    *,
    resamples: int,
    seed: int,
    confidence: float = 0.95,
    exact_up_to: int = EXACT_UP_TO,
) -> dict[str, dict[str, tuple[float, float]]]:
    """score -> coefficient -> (low, high), percentiles of the coefficient over the resamples.

    ``scores``: arrays [n] like ``accuracy``. Resamples in which a coefficient is undefined, since all values are equal,
    are left out; NaN where none is left, and where both percentiles are the same: it is as if nothing were uncertain.
    """
    make = _exact if len(accuracy) <= exact_up_to else _first_order
    statistics = {name: make(np.asarray(x, float), np.asarray(accuracy, float)) for name, x in scores.items()}
    drawn: dict[str, list[np.ndarray]] = {name: [] for name in scores}
    for counts in _resamples(len(accuracy), resamples, seed):
        for name, statistic in statistics.items():
            drawn[name].append(statistic(counts))
    tail = (1 - confidence) / 2
    return {
        name: {
            coefficient: _percentiles(values, tail)
            for coefficient, values in zip(NAMES, np.concatenate(parts, 1), strict=True)
        }
        for name, parts in drawn.items()
    }


def _percentiles(values: np.ndarray, tail: float) -> tuple[float, float]:
    values = values[np.isfinite(values)]
    if not len(values):
        return math.nan, math.nan
    low, high = float(np.quantile(values, tail)), float(np.quantile(values, 1 - tail))
    return (low, high) if high - low > ROUNDING else (math.nan, math.nan)


def _resamples(n: int, count: int, seed: int) -> Iterator[np.ndarray]:
    """Counts [chunk, n], float64, each row adding up to n."""
    rng = np.random.default_rng(seed)
    size = max(1, CHUNK // n)
    for start in range(0, count, size):
        rows = min(size, count - start)
        drawn = rng.integers(0, n, (rows, n)) + np.arange(rows)[:, None] * n
        yield np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n).astype(float)


def _exact(x: np.ndarray, y: np.ndarray):
    """counts [R, n] -> coefficients [3, R]."""
    groups_x, groups_y = _groups(x), _groups(y)
    signs = np.sign(groups_x[:, None] - groups_x) * np.sign(groups_y[:, None] - groups_y)
    signs = signs.astype(np.float32)  # sums of up to 2000 whole numbers, exact in float32
    a, b = _standard(x), _standard(y)

    def statistic(counts: np.ndarray) -> np.ndarray:
        n = len(x)
        agree = np.einsum("rn,rn->r", counts.astype(np.float32) @ signs, counts, dtype=float)
        apart = [n * n - (_per_group(counts, groups) ** 2).sum(1) for groups in (groups_x, groups_y)]
        u, v = _midranks(counts, groups_x), _midranks(counts, groups_y)
        return np.stack([_ratio(agree, *apart), _weighted_pearson(counts, u, v), _weighted_pearson(counts, a, b)])

    return statistic


def _first_order(x: np.ndarray, y: np.ndarray):
    """counts [R, n] -> coefficients [3, R], from what each architecture adds to each sum (its column)."""
    n = len(x)
    rank_x, rank_y = _groups(x), _groups(y)
    agree = agreement(rank_x, rank_y)
    apart = [n - np.bincount(groups)[groups] for groups in (rank_x, rank_y)]
    # Spearman: sums of products of the mid-ranks u, v in [0, 1], themselves means over all architectures
    u, v = _midranks(np.ones((1, n)), rank_x)[0] / n, _midranks(np.ones((1, n)), rank_y)[0] / n
    uv = u * v + _mean_above(rank_x, v) + _mean_above(rank_y, u)
    uu, vv = u * u + 2 * _mean_above(rank_x, u), v * v + 2 * _mean_above(rank_y, v)
    a, b = _standard(x), _standard(y)
    columns = np.stack([agree, *apart, uv, uu, vv, a, b, a * b, a * a, b * b], 1)
    totals = np.array([agree.sum() / 2, *(t.sum() / 2 for t in apart), u @ v, u @ u, v @ v, 0, 0, a @ b, a @ a, b @ b])

    def statistic(counts: np.ndarray) -> np.ndarray:
        c, cx, cy, uv, uu, vv, a, b, ab, aa, bb = (totals + (counts - 1) @ columns).T
        center = n / 4  # the mean of mid-ranks is one half under any counts
        return np.stack(
            [
                _ratio(c, cx, cy),
                _ratio(uv - center, uu - center, vv - center),
                _ratio(ab - a * b / n, aa - a * a / n, bb - b * b / n, ROUNDING * n * n),
            ]
        )

    return statistic


def agreement(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """[n]: with how many of the others each item agrees in order, less with how many it disagrees. Dense ranks [n]."""
    top_x, top_y = x.max(), y.max()
    return (_below(x, y) + _below(top_x - x, top_y - y)) - (_below(x, top_y - y) + _below(top_x - x, y))


def _below(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """[n]: how many items have both a smaller x and a smaller y. Dense ranks [n]. Merges runs, O(n log^2 n)."""
    n = len(x)
    order = np.lexsort((-y, x))  # at equal x the larger y first: it then is never counted as smaller in both
    y_sorted, position = y[order].astype(np.int64), np.arange(n)
    count = np.zeros(n, np.int64)
    width = 1
    while width < n:
        run, left = position // (2 * width), position // width % 2 == 0
        merged = np.argsort((run * (2 * n) + 2 * y_sorted) + left, kind="stable")  # at equal y the right half first
        smaller = np.cumsum(left[merged]) - run[merged] * width  # runs before this one have full left halves
        right = ~left[merged]
        count[merged[right]] += smaller[right]
        width *= 2
    result = np.empty(n, np.int64)
    result[order] = count
    return result


def _standard(x: np.ndarray) -> np.ndarray:
    """Mean 0 and variance 1; zeros where all values are equal, of which rounding can make a variance."""
    if x.min() == x.max():
        return np.zeros_like(x)
    x = x / abs(x).max()  # squares of very large or small values would leave float64
    return (x - x.mean()) / x.std()


def _groups(values: np.ndarray) -> np.ndarray:
    """Dense ranks: 0 for the smallest value, equal values alike."""
    return np.unique(values, return_inverse=True)[1]


def _per_group(counts: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Counts [R, n] added up over equal dense ranks -> [R, groups]."""
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
    return np.add.reduceat(counts[:, order], starts, axis=1)


def _midranks(counts: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """How many drawn items lie below each item, equal ones counted half. [R, n]"""
    size = _per_group(counts, groups)
    return (np.cumsum(size, 1) - size / 2)[:, groups]


def _mean_above(groups: np.ndarray, values: np.ndarray) -> np.ndarray:
    """[n]: the sum of ``values`` over the items above each one, equal ones counted half, divided by n."""
    size = np.bincount(groups, weights=values)
    return ((size.sum() - np.cumsum(size)) + size / 2)[groups] / len(groups)


def _weighted_pearson(counts: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Pearson's r of u and v ([n] or [R, n]) with the counts [R, n] as weights. -> [R]"""
    total = counts.sum(1, keepdims=True)
    u = u - (counts * u).sum(1, keepdims=True) / total
    v = v - (counts * v).sum(1, keepdims=True) / total
    return _ratio((counts * u * v).sum(1), (counts * u * u).sum(1), (counts * v * v).sum(1))


def _ratio(product: np.ndarray, first: np.ndarray, second: np.ndarray, least: float = 1e-18) -> np.ndarray:
    """product / sqrt(first * second), NaN where that is not defined: the root's square is not above ``least``."""
    square = first * second
    return np.where(square > least, product / np.sqrt(np.where(square > least, square, 1)), np.nan)
