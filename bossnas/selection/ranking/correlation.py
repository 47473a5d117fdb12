"""How well scores order architectures by accuracy: rank correlations with intervals, within size, and regret.

Pure functions over arrays of one value per architecture, [n]; larger scores are meant to be better.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from bossnas.errors import ConfigError
from bossnas.selection.ranking.intervals import BOOTSTRAP, bootstrap_intervals, fisher_intervals, method

TOLERANCE = 0.1  # sizes that differ by at most this share of the larger one count as equal
TOP = 0.1  # share of the architectures, by accuracy
BUDGETS = (0.1, 0.25, 0.5, 0.75, 1.0)  # quantiles of the parameters
MINIMUM = 2  # architectures without which there is no order

BRIEF = ("kendall", "spearman", "pearson", "kendall_within_10pct_params", "kendall_within_10pct_macs")
DEFINITIONS = {
    "sign": "every score is turned so that larger means better; a positive coefficient means that it orders rightly",
    "kendall": "Kendall's tau-b over all pairs",
    "spearman": "Spearman's rho (mid-ranks at ties)",
    "pearson": "Pearson's r of score and accuracy",
    "low, high": "95 % interval over architectures. From 10 architectures on: bootstrap percentiles 2.5 % and 97.5 %, "
    "the same resamples for all scores. From 5 to 9: Fisher's z, tanh(atanh(value) +- 1.96 se); the square of se is "
    "1 / (n - 3) of Pearson's r, 0.437 / (n - 4) of Kendall's tau (Fieller, Hartley & Pearson 1957) and "
    "(1 + rho^2 / 2) / (n - 3) of Spearman's rho (Bonett & Wright 2000). null: fewer than 5 architectures, or the "
    "interval would be one point, as it is where the coefficient is 1 or -1",
    "intervals": "architectures: how many the intervals are over; method: which of these rules made them, or null",
    "kendall_top10": "tau-b among the architectures whose accuracy is at least its 90 % quantile",
    "kendall_within_10pct_params": "(concordant - discordant) / pairs, over all pairs whose parameters differ by at "
    "most 10 % of the larger number; a tie in score or accuracy counts as 0",
    "kendall_within_10pct_macs": "the same over pairs whose multiply-adds differ by at most 10 % of the larger number",
    "regret": "best accuracy among the architectures of at most `budget_params` parameters, minus the accuracy of the "
    "one with the best score there (mean accuracy of those that share the best score); budgets are the 10, "
    "25, 50, 75 and 100 % quantiles of the parameters",
    "with_size": "the score plus size_weight times the sum of log channels, each minus its mean by its standard "
    "deviation",
    "blocks": "of each block's score alone",
    "seeds": "each: of each rating by itself; mean, std: of these, with n - 1; agreement: Spearman's rho between the "
    "ratings of two seeds, of architectures (together) and of a block's paths, over all pairs of seeds",
    "run": "of a run folder: its width, and `budget_params`, what the budgets of `regret` are in the count of `bossnas "
    "select`, which is of the run's width and has no classifier: of the networks of exactly so many parameters, the "
    "largest",
    "null": "not defined: all values equal, or fewer than two architectures or no pair",
}


def report(
    scores: Mapping[str, np.ndarray],
    accuracy: np.ndarray,
    sizes: Mapping[str, np.ndarray],
    *,
    resamples: int,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """Every figure for every score: ``{name: {kendall: {value, low, high}, ..., kendall_top10, ..., regret: [...]}}``.

    ``sizes``: "params" and "macs" of each architecture, whole numbers. Raises ConfigError for fewer than two
    architectures.
    """
    if len(accuracy) < MINIMUM:
        raise ConfigError(
            "accuracy", f"{len(accuracy)} architectures have both a score and an accuracy", "give at least two"
        )
    how, plain = method(len(accuracy)), {name: coefficients(score, accuracy) for name, score in scores.items()}
    intervals: dict[str, dict[str, tuple[float, float]]] = {}
    if how == BOOTSTRAP:
        intervals = bootstrap_intervals(scores, accuracy, resamples=resamples, seed=seed)
    elif how is not None:
        intervals = {name: fisher_intervals(values, len(accuracy)) for name, values in plain.items()}
    none = dict.fromkeys(("kendall", "spearman", "pearson"), (math.nan, math.nan))
    top = accuracy >= np.quantile(accuracy, 1 - TOP)
    near = {size: within(sizes[size], scores, accuracy) for size in ("params", "macs")}
    result = {}
    for name, score in scores.items():
        found = intervals.get(name, none)
        result[name] = {
            **{
                key: {"value": value, "low": _number(found[key][0]), "high": _number(found[key][1])}
                for key, value in plain[name].items()
            },
            "kendall_top10": coefficients(score[top], accuracy[top])["kendall"],
            "kendall_within_10pct_params": near["params"][name],
            "kendall_within_10pct_macs": near["macs"][name],
            "regret": regret(score, accuracy, sizes["params"]),
        }
    return result


def brief(
    scores: Mapping[str, np.ndarray], accuracy: np.ndarray, sizes: Mapping[str, np.ndarray]
) -> dict[str, dict[str, float | None]]:
    """The figures of `report` that take no resamples: coefficients, and Kendall's tau within size."""
    near = {size: within(sizes[size], scores, accuracy) for size in ("params", "macs")}
    return {
        name: {
            **coefficients(score, accuracy),
            "kendall_within_10pct_params": near["params"][name],
            "kendall_within_10pct_macs": near["macs"][name],
        }
        for name, score in scores.items()
    }


def spread(figures: Sequence[Mapping[str, float | None]]) -> dict[str, dict[str, float | None]]:
    """Mean and standard deviation (n - 1) of every figure over seeds; None where one of them is not defined."""
    columns = {key: _defined([row[key] for row in figures]) for key in figures[0]}
    return {
        "mean": {key: None if v is None else float(np.mean(v)) for key, v in columns.items()},
        "std": {key: None if v is None else float(np.std(v, ddof=1)) for key, v in columns.items()},
    }


def agreement(values: np.ndarray) -> dict[str, float | None]:
    """Spearman's rho between each two of the rows [seeds, n]: their mean and the least."""
    pairs = _defined([coefficients(values[i], values[j])["spearman"] for i in range(len(values)) for j in range(i)])
    if pairs is None:
        return {"mean": None, "least": None}
    return {"mean": float(np.mean(pairs)), "least": min(pairs)}


def _defined(values: Sequence[float | None]) -> list[float] | None:
    """The values; None where one of them is not defined."""
    known = [value for value in values if value is not None]
    return known if len(known) == len(values) else None


def coefficients(score: np.ndarray, accuracy: np.ndarray) -> dict[str, float | None]:
    """Kendall's tau-b, Spearman's rho and Pearson's r; None where all values of a side are equal."""
    if len(score) < MINIMUM or np.ptp(score) == 0 or np.ptp(accuracy) == 0:
        return {"kendall": None, "spearman": None, "pearson": None}
    return {
        "kendall": _number(stats.kendalltau(score, accuracy).statistic),
        "spearman": _number(stats.spearmanr(score, accuracy).statistic),
        "pearson": _number(stats.pearsonr(score, accuracy).statistic),
    }


def within(size: np.ndarray, scores: Mapping[str, np.ndarray], accuracy: np.ndarray) -> dict[str, float | None]:
    """(concordant - discordant) / pairs over the pairs of nearly equal size: difference at most 10 % of the larger.

    Exact, by comparing the architectures, sorted by size, with those k places further on, for every k.
    """
    order = np.argsort(size, kind="stable")
    size = size[order]
    # size_j - size_i <= size_j / 10 for the larger j, in whole numbers: 9 size_j <= 10 size_i
    end = np.searchsorted(9 * size, 10 * size, side="right")
    x, y = np.stack([_dense(score[order]) for score in scores.values()]), _dense(accuracy[order])
    position, n = np.arange(len(size)), len(size)
    balance, pairs = np.zeros(len(x), np.int64), int((end - position - 1).sum())
    for k in range(1, int((end - position).max())):
        near = end[: n - k] - position[: n - k] > k
        up, down = near & (y[k:] > y[:-k]), near & (y[k:] < y[:-k])
        rises, falls = x[:, k:] > x[:, :-k], x[:, k:] < x[:, :-k]
        balance += np.count_nonzero(rises & up | falls & down, 1) - np.count_nonzero(rises & down | falls & up, 1)
    return {
        name: float(value) / pairs if pairs and np.ptp(scores[name]) else None
        for name, value in zip(scores, balance, strict=True)
    }


def regret(score: np.ndarray, accuracy: np.ndarray, params: np.ndarray) -> list[dict[str, float]]:
    """What choosing by score costs in accuracy under budgets of parameters (see DEFINITIONS), one row per budget."""
    rows = []
    for quantile in BUDGETS:
        budget = np.quantile(params, quantile, method="lower")
        inside = params <= budget
        best = float(accuracy[inside].max())
        picked = float(accuracy[inside & (score == score[inside].max())].mean())
        rows.append(
            {
                "quantile": quantile,
                "budget_params": int(budget),
                "architectures": int(inside.sum()),
                "best_accuracy": best,
                "picked_accuracy": picked,
                "regret": best - picked,
            }
        )
    return rows


def _dense(values: np.ndarray) -> np.ndarray:
    """Ranks from 0, equal values alike, in the narrowest type: comparisons of int16 are the fastest."""
    ranks = np.unique(values, return_inverse=True)[1]
    return ranks.astype(np.int16 if ranks.max() < 2**15 else np.int32)


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
