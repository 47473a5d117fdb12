"""Rank correlations as tables and scatter plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bossnas.layout import Column, brief, exact, paragraph, table
from bossnas.selection.ranking.correlation import BRIEF
from bossnas.selection.ranking.intervals import ENOUGH, FISHER, LEAST

COEFFICIENTS = ("kendall", "spearman", "pearson")
HEADINGS = ("Kendall", "Spearman", "Pearson", "±10 %\nparams", "±10 %\nMACs")  # of BRIEF


def lines(result: Mapping[str, Any], space: int) -> list[str]:
    """What `bossnas rank` found, as text of at most ``space`` columns: what was compared, then tables of figures."""
    missing = result["missing"]
    text = paragraph(
        f"{exact(result['n'])} architectures of {result['space']} (told by {result['space_from']}); "
        f"{exact(missing['without_score'])} of the accuracy table have no score, "
        f"{exact(missing['without_accuracy'])} rated ones have no accuracy",
        space,
    )
    if result["score_negated"]:
        text += paragraph(f"{result['score']}: lower is better, so it is negated", space)
    text += ["", *_figures("Rank correlation with accuracy [95 % interval]", rows(result), result["intervals"], space)]
    if "seeds" in result:
        text += ["", *_seeds(result, space)]
    elif "blocks" in result:
        blocks = {f"block {b}": row for b, row in enumerate(result["blocks"])}
        cells = [[_short(row[key]) for row in blocks.values()] for key in BRIEF]
        text += ["", *table("Of each block's score alone", _columns(list(blocks), HEADINGS, cells), space)]
    text += ["", *_regrets(result, space)]
    if "proxies" in result:
        proxies = result["proxies"]
        title = f"With zero-cost proxies, on a sample of {exact(proxies['sample'])} ({proxies['images']} images)"
        text += ["", *_figures(title, proxies["figures"], proxies["intervals"], space)]
        each = ", ".join(f"{name} {seconds:.2g}" for name, seconds in proxies["seconds_per_architecture"].items())
        text += paragraph(f"seconds per architecture: {each}", space)
    return text


def rows(result: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The figures of the rating, the rating with size, and the baselines, by name."""
    return {result["score"]: result, f"{result['score']} + size": result["with_size"], **result["baselines"]}


def _figures(title: str, rows: Mapping[str, Mapping[str, Any]], intervals: Mapping[str, Any], space: int) -> list[str]:
    """The figures of several scores, and what is to be known of their intervals."""
    headings = ("Kendall", "Spearman", "Pearson", "top 10 %", *HEADINGS[3:])
    cells = [[_with_interval(row[key]) for row in rows.values()] for key in COEFFICIENTS]
    for key in ("kendall_top10", "kendall_within_10pct_params", "kendall_within_10pct_macs"):
        cells.append([_short(row[key]) for row in rows.values()])
    text = table(title, _columns(list(rows), headings, cells), space)
    text += paragraph("top 10 %: Kendall of the most accurate tenth; ±10 %: of the pairs of nearly equal size", space)
    count, method = intervals["architectures"], intervals["method"]
    if method is None:
        return text + paragraph(f"{count} architectures are too few for intervals, which need {LEAST}", space)
    if method == FISHER:
        text += paragraph(
            f"{count} architectures are few: the intervals are by Fisher's z, as a bootstrap needs {ENOUGH}", space
        )
    if any(row[key]["value"] is not None and row[key]["low"] is None for row in rows.values() for key in COEFFICIENTS):
        text += paragraph(
            f"Where no interval stands, it would be one point: {exact(count)} architectures make no figure certain",
            space,
        )
    return text


def _seeds(result: Mapping[str, Any], space: int) -> list[str]:
    """Every seed's figures, their mean and standard deviation, and the agreement of the seeds."""
    seeds = result["seeds"]
    found: list[tuple[str, list[str]]] = []

    def deviation(name: str, of: Mapping[str, Any], agreement: Mapping[str, Any]) -> None:
        between = f"{_short(agreement['mean'])}\nleast {_short(agreement['least'])}"
        found.append((name, [*(f"{_short(of['mean'][key])}\n± {_short(of['std'][key])}" for key in BRIEF), between]))

    for source, row in zip(result["ratings"], seeds["each"], strict=True):
        found.append((source, [*(_short(row[key]) for key in BRIEF), ""]))
    deviation("mean ± deviation", seeds, seeds["agreement"]["together"])
    for block, of in enumerate(seeds.get("blocks", ())):
        deviation(f"block {block} alone", of, seeds["agreement"]["blocks"][block])
    whole = [_short(result[key]["value"] if key in COEFFICIENTS else result[key]) for key in BRIEF]
    found.append(("their sum", [*whole, ""]))
    names, cells = zip(*found, strict=True)
    columns = _columns(names, (*HEADINGS, "between\nseeds"), list(zip(*cells, strict=True)))
    return table(f"{len(seeds['each'])} seeds, each by itself", columns, space)


def _regrets(result: Mapping[str, Any], space: int) -> list[str]:
    """Regret of several scores under budgets of parameters, and what `bossnas select` would call these budgets."""
    named = rows(result)
    budgets = result["regret"]
    decimals = 2 if budgets[-1]["best_accuracy"] > 1 else 4  # per cent, or shares of 1
    names = list(named)
    cells = [
        [f"{round(row['regret'][i]['regret'], decimals) + 0.0:.{decimals}f}" for row in named.values()]
        for i in range(len(budgets))
    ]
    if "run" in result:
        names.append("budget in select")
        for column, params in zip(cells, result["run"]["budget_params"], strict=True):
            column.append(brief(params))
    headings = [f"{budget['quantile']:.0%}\n≤ {brief(budget['budget_params'])}" for budget in budgets]
    title = (
        "Regret, in the accuracy table's unit, of the best score within a budget of parameters. Budgets are quantiles "
        "of the full-width networks with their classifier; bossnas select counts the run's own width, without a "
        "classifier"
    )
    text = table(title, _columns(names, headings, cells), space)
    if "run" in result:
        text += paragraph(
            f"The last row is what select counts, at the run's width {result['run']['width']:g}, of the networks that "
            "are as large as the budget",
            space,
        )
    return text


def _columns(names: Sequence[str], headings: Sequence[str], cells: Sequence[Sequence[str]]) -> list[Column]:
    """A column of names, and one of figures for each heading."""
    return [Column("", names, text=True), *(Column(h, column) for h, column in zip(headings, cells, strict=True))]


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _with_interval(row: Mapping[str, float | None]) -> str:
    low, high = row["low"], row["high"]
    if low is None or high is None:
        return _short(row["value"])
    decimals = next((d for d in range(3, 9) if f"{low:.{d}f}" != f"{high:.{d}f}"), 9)  # no [1.000, 1.000]
    return f"{_short(row['value'])}\n[{low:.{decimals}f}, {high:.{decimals}f}]"
