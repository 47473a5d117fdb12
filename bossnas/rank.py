"""How well scores order architectures by accuracy: rank correlations with intervals, within size, and regret.

Pure functions over arrays of one value per architecture, [n]; larger scores are meant to be better.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy import stats

from bossnas.errors import ConfigError
from bossnas.intervals import bootstrap_intervals

TOLERANCE = 0.1  # sizes that differ by at most this share of the larger one count as equal
TOP = 0.1  # share of the architectures, by accuracy
BUDGETS = (0.1, 0.25, 0.5, 0.75, 1.0)  # quantiles of the parameters
MINIMUM = 2  # architectures without which there is no order

BRIEF = ("kendall", "spearman", "pearson", "kendall_within_10pct_params", "kendall_within_10pct_macs")
DEFINITIONS = {
    "sign": "every score is turned so that larger means better; a positive coefficient means that it orders rightly",
    "kendall": "Kendall's tau-b over all pairs", "spearman": "Spearman's rho (mid-ranks at ties)",
    "pearson": "Pearson's r of score and accuracy",
    "low, high": "bootstrap percentiles 2.5 % and 97.5 % over architectures, the same resamples for all scores",
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
    "null": "not defined: all values equal, or fewer than two architectures or no pair",
}


def report(scores: Mapping[str, np.ndarray], accuracy: np.ndarray, sizes: Mapping[str, np.ndarray], *, resamples: int,
           seed: int) -> dict[str, dict[str, Any]]:
    """Every figure for every score: ``{name: {kendall: {value, low, high}, ..., kendall_top10, ..., regret: [...]}}``.

    ``sizes``: "params" and "macs" of each architecture, whole numbers. Raises ConfigError for fewer than two
    architectures.
    """
    if len(accuracy) < MINIMUM:
        raise ConfigError("--accuracy", f"{len(accuracy)} architectures have both a score and an accuracy",
                          "give at least two")
    intervals = bootstrap_intervals(scores, accuracy, resamples=resamples, seed=seed)
    top = accuracy >= np.quantile(accuracy, 1 - TOP)
    near = {size: within(sizes[size], scores, accuracy) for size in ("params", "macs")}
    result = {}
    for name, score in scores.items():
        values = coefficients(score, accuracy)
        result[name] = {
            **{key: {"value": value, "low": _number(intervals[name][key][0]), "high": _number(intervals[name][key][1])}
               for key, value in values.items()},
            "kendall_top10": coefficients(score[top], accuracy[top])["kendall"],
            "kendall_within_10pct_params": near["params"][name], "kendall_within_10pct_macs": near["macs"][name],
            "regret": regret(score, accuracy, sizes["params"])}
    return result


def brief(scores: Mapping[str, np.ndarray], accuracy: np.ndarray,
          sizes: Mapping[str, np.ndarray]) -> dict[str, dict[str, float | None]]:
    """The figures of `report` that take no resamples: coefficients, and Kendall's tau within size."""
    near = {size: within(sizes[size], scores, accuracy) for size in ("params", "macs")}
    return {name: {**coefficients(score, accuracy), "kendall_within_10pct_params": near["params"][name],
                   "kendall_within_10pct_macs": near["macs"][name]} for name, score in scores.items()}


def spread(figures: Sequence[Mapping[str, float | None]]) -> dict[str, dict[str, float | None]]:
    """Mean and standard deviation (n - 1) of every figure over seeds; None where one of them is not defined."""
    columns = {key: [row[key] for row in figures] for key in figures[0]}
    whole = {key: None not in values for key, values in columns.items()}
    return {"mean": {key: float(np.mean(v)) if whole[key] else None for key, v in columns.items()},
            "std": {key: float(np.std(v, ddof=1)) if whole[key] else None for key, v in columns.items()}}


def agreement(values: np.ndarray) -> dict[str, float | None]:
    """Spearman's rho between each two of the rows [seeds, n]: their mean and the least."""
    pairs = [coefficients(values[i], values[j])["spearman"] for i in range(len(values)) for j in range(i)]
    whole = None not in pairs
    return {"mean": float(np.mean(pairs)) if whole else None, "least": min(pairs) if whole else None}


def coefficients(score: np.ndarray, accuracy: np.ndarray) -> dict[str, float | None]:
    """Kendall's tau-b, Spearman's rho and Pearson's r; None where all values of a side are equal."""
    if len(score) < MINIMUM or np.ptp(score) == 0 or np.ptp(accuracy) == 0:
        return {"kendall": None, "spearman": None, "pearson": None}
    return {"kendall": _number(stats.kendalltau(score, accuracy).statistic),
            "spearman": _number(stats.spearmanr(score, accuracy).statistic),
            "pearson": _number(stats.pearsonr(score, accuracy).statistic)}


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
        near = end[:n - k] - position[:n - k] > k
        up, down = near & (y[k:] > y[:-k]), near & (y[k:] < y[:-k])
        rises, falls = x[:, k:] > x[:, :-k], x[:, k:] < x[:, :-k]
        balance += np.count_nonzero(rises & up | falls & down, 1) - np.count_nonzero(rises & down | falls & up, 1)
    return {name: float(value) / pairs if pairs and np.ptp(scores[name]) else None
            for name, value in zip(scores, balance, strict=True)}


def regret(score: np.ndarray, accuracy: np.ndarray, params: np.ndarray) -> list[dict[str, float]]:
    """What choosing by score costs in accuracy under budgets of parameters (see DEFINITIONS), one row per budget."""
    rows = []
    for quantile in BUDGETS:
        budget = np.quantile(params, quantile, method="lower")
        inside = params <= budget
        best = float(accuracy[inside].max())
        picked = float(accuracy[inside & (score == score[inside].max())].mean())
        rows.append({"quantile": quantile, "budget_params": int(budget), "architectures": int(inside.sum()),
                     "best_accuracy": best, "picked_accuracy": picked, "regret": best - picked})
    return rows


def show(result: Mapping[str, Any], console: Console) -> None:
    """Prints what `bossnas rank` found: what was compared, then tables of figures."""
    missing = result["missing"]
    console.print(f"{result['n']} architectures of {result['space']} (told by {result['space_from']}); "
                  f"{missing['without_score']} of the accuracy table have no score, {missing['without_accuracy']} "
                  "rated ones have no accuracy", highlight=False)
    if result["score_negated"]:
        console.print(f"{result['score']}: lower is better, so it is negated", highlight=False)
    console.print(figures_table("rank correlation with accuracy [95 % interval]", rows(result)))
    if "seeds" in result:
        console.print(seeds_table(result))
    elif "blocks" in result:
        console.print(brief_table("of each block's score alone", {f"block {b}": row for b, row in
                                                                  enumerate(result["blocks"])}))
    console.print(regret_table(rows(result)))
    if "proxies" in result:
        proxies = result["proxies"]
        title = f"with zero-cost proxies, on a sample of {proxies['sample']} ({proxies['images']} images)"
        console.print(figures_table(title, proxies["figures"]))
        console.print("seconds per architecture: " + ", ".join(
            f"{name} {seconds:.2g}" for name, seconds in proxies["seconds_per_architecture"].items()), highlight=False)


def rows(result: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The figures of the rating, the rating with size, and the baselines, by name."""
    return {result["score"]: result, f"{result['score']} + size": result["with_size"], **result["baselines"]}


def seeds_table(result: Mapping[str, Any]) -> Table:
    """Every seed's figures, their mean ± standard deviation, and the agreement of the seeds, for the console."""
    seeds = result["seeds"]
    table = _brief(f"{len(seeds['each'])} seeds, each by itself")
    table.add_column("between seeds", justify="right")

    def deviation(of: Mapping[str, Any], agreement: Mapping[str, Any]) -> list[str]:
        return [*(f"{_short(of['mean'][key])} ± {_short(of['std'][key])}" for key in BRIEF),
                f"{_short(agreement['mean'])} (least {_short(agreement['least'])})"]

    for source, row in zip(result["ratings"], seeds["each"], strict=True):
        table.add_row(source, *(_short(row[key]) for key in BRIEF))
    table.add_row("mean ± deviation", *deviation(seeds, seeds["agreement"]["together"]))
    for block, of in enumerate(seeds.get("blocks", ())):
        table.add_row(f"block {block} alone", *deviation(of, seeds["agreement"]["blocks"][block]))
    table.add_row("their sum", *(_short(result[key] if key not in ("kendall", "spearman", "pearson")
                                        else result[key]["value"]) for key in BRIEF))
    return table


def brief_table(title: str, rows: Mapping[str, Mapping[str, float | None]]) -> Table:
    """Figures of `brief` for the console."""
    table = _brief(title)
    for name, row in rows.items():
        table.add_row(name, *(_short(row[key]) for key in BRIEF))
    return table


def _brief(title: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    for heading in ("Kendall", "Spearman", "Pearson", "±10 % params", "±10 % MACs"):
        table.add_column(heading, justify="right")
    return table


def figures_table(title: str, rows: Mapping[str, Mapping[str, Any]]) -> Table:
    """The figures of several scores for the console."""
    table = Table(title=title, title_justify="left")
    table.add_column("score", no_wrap=True)
    for heading in ("Kendall", "Spearman", "Pearson", "top 10 %", "±10 % params", "±10 % MACs"):
        table.add_column(heading, justify="right")
    for name, row in rows.items():
        table.add_row(name, *(_with_interval(row[key]) for key in ("kendall", "spearman", "pearson")),
                      *(_short(row[key]) for key in ("kendall_top10", "kendall_within_10pct_params",
                                                     "kendall_within_10pct_macs")))
    return table


def regret_table(rows: Mapping[str, Mapping[str, Any]]) -> Table:
    """Regret of several scores under budgets of parameters, for the console."""
    table = Table(title="regret in accuracy of the best score within a budget of parameters", title_justify="left")
    table.add_column("score", no_wrap=True)
    first = next(iter(rows.values()))["regret"]
    for budget in first:
        table.add_column(f"≤ {budget['budget_params'] / 1e6:.3g} M ({budget['quantile']:.0%})", justify="right")
    for name, row in rows.items():
        table.add_row(name, *(f"{budget['regret']:.2f}" for budget in row["regret"]))
    return table


def check_picture(out: Path) -> None:
    """Raises ConfigError unless matplotlib is there and can write such a file."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise ConfigError("--plot", "needs matplotlib", "pip install 'bossnas[report]'") from None
    if out.suffix[1:] not in FigureCanvasBase.get_supported_filetypes():
        raise ConfigError("--plot", f"cannot draw {out}", "name a .png, .pdf or .svg file")


def draw(scores: Mapping[str, np.ndarray], accuracy: np.ndarray, rows: Mapping[str, Mapping[str, Any]],
         out: Path) -> None:
    """Scatter plots, accuracy against each score, into one picture."""
    from matplotlib.figure import Figure  # optional: see check_picture

    columns = min(3, len(scores))
    lines = math.ceil(len(scores) / columns)
    figure = Figure(figsize=(4 * columns, 3.4 * lines), layout="constrained")
    for axes, (name, score) in zip(figure.subplots(lines, columns, squeeze=False).flat, scores.items(), strict=False):
        axes.scatter(score, accuracy, s=max(1, min(20, 20_000 / len(score))), alpha=0.4, linewidths=0, rasterized=True)
        axes.locator_params(axis="x", nbins=5)
        axes.set(title=f"{name}: Kendall {_short(rows[name]['kendall']['value'])}", xlabel=name, ylabel="accuracy")
    for axes in figure.axes[len(scores):]:
        axes.remove()
    draft = out.with_name(out.name + ".tmp")
    figure.savefig(draft, format=out.suffix[1:], dpi=120)
    os.replace(draft, out)


def _dense(values: np.ndarray) -> np.ndarray:
    """Ranks from 0, equal values alike, in the narrowest type: comparisons of int16 are the fastest."""
    ranks = np.unique(values, return_inverse=True)[1]
    return ranks.astype(np.int16 if ranks.max() < 2 ** 15 else np.int32)


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _with_interval(row: Mapping[str, float | None]) -> str:
    return _short(row["value"]) + ("" if row["low"] is None else f" [{row['low']:.3f}, {row['high']:.3f}]")
