"""Rank correlations as tables and scatter plots."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from bossnas.errors import ConfigError
from bossnas.files import draft
from bossnas.selection.ranking.correlation import BRIEF


def show(result: Mapping[str, Any], console: Console) -> None:
    """Prints what `bossnas rank` found: what was compared, then tables of figures."""
    missing = result["missing"]
    console.print(
        f"{result['n']} architectures of {result['space']} (told by {result['space_from']}); "
        f"{missing['without_score']} of the accuracy table have no score, {missing['without_accuracy']} "
        "rated ones have no accuracy",
        highlight=False,
    )
    if result["score_negated"]:
        console.print(f"{result['score']}: lower is better, so it is negated", highlight=False)
    console.print(figures_table("rank correlation with accuracy [95 % interval]", rows(result)))
    if "seeds" in result:
        console.print(seeds_table(result))
    elif "blocks" in result:
        console.print(
            brief_table("of each block's score alone", {f"block {b}": row for b, row in enumerate(result["blocks"])})
        )
    console.print(regret_table(rows(result)))
    if "proxies" in result:
        proxies = result["proxies"]
        title = f"with zero-cost proxies, on a sample of {proxies['sample']} ({proxies['images']} images)"
        console.print(figures_table(title, proxies["figures"]))
        console.print(
            "seconds per architecture: "
            + ", ".join(f"{name} {seconds:.2g}" for name, seconds in proxies["seconds_per_architecture"].items()),
            highlight=False,
        )


def rows(result: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The figures of the rating, the rating with size, and the baselines, by name."""
    return {result["score"]: result, f"{result['score']} + size": result["with_size"], **result["baselines"]}


def seeds_table(result: Mapping[str, Any]) -> Table:
    """Every seed's figures, their mean ± standard deviation, and the agreement of the seeds, for the console."""
    seeds = result["seeds"]
    table = _brief(f"{len(seeds['each'])} seeds, each by itself")
    table.add_column("between seeds", justify="right")

    def deviation(of: Mapping[str, Any], agreement: Mapping[str, Any]) -> list[str]:
        return [
            *(f"{_short(of['mean'][key])} ± {_short(of['std'][key])}" for key in BRIEF),
            f"{_short(agreement['mean'])} (least {_short(agreement['least'])})",
        ]

    for source, row in zip(result["ratings"], seeds["each"], strict=True):
        table.add_row(source, *(_short(row[key]) for key in BRIEF))
    table.add_row("mean ± deviation", *deviation(seeds, seeds["agreement"]["together"]))
    for block, of in enumerate(seeds.get("blocks", ())):
        table.add_row(f"block {block} alone", *deviation(of, seeds["agreement"]["blocks"][block]))
    table.add_row(
        "their sum",
        *(
            _short(result[key] if key not in ("kendall", "spearman", "pearson") else result[key]["value"])
            for key in BRIEF
        ),
    )
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
        table.add_row(
            name,
            *(_with_interval(row[key]) for key in ("kendall", "spearman", "pearson")),
            *(
                _short(row[key])
                for key in ("kendall_top10", "kendall_within_10pct_params", "kendall_within_10pct_macs")
            ),
        )
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
        raise ConfigError("plot", "needs matplotlib", "pip install 'bossnas[report]'") from None
    if out.suffix[1:] not in FigureCanvasBase.get_supported_filetypes():
        raise ConfigError("plot", f"cannot draw {out}", "name a .png, .pdf or .svg file")


def draw(
    scores: Mapping[str, np.ndarray], accuracy: np.ndarray, rows: Mapping[str, Mapping[str, Any]], out: Path
) -> None:
    """Scatter plots, accuracy against each score, into one picture."""
    from matplotlib.figure import Figure  # optional: see check_picture

    columns = min(3, len(scores))
    lines = math.ceil(len(scores) / columns)
    figure = Figure(figsize=(4 * columns, 3.4 * lines), layout="constrained")
    for axes, (name, score) in zip(figure.subplots(lines, columns, squeeze=False).flat, scores.items(), strict=False):
        axes.scatter(score, accuracy, s=max(1, min(20, 20_000 / len(score))), alpha=0.4, linewidths=0, rasterized=True)
        axes.locator_params(axis="x", nbins=5)
        axes.set(title=f"{name}: Kendall {_short(rows[name]['kendall']['value'])}", xlabel=name, ylabel="accuracy")
    for axes in figure.axes[len(scores) :]:
        axes.remove()
    with draft(out) as made:
        figure.savefig(made, format=out.suffix[1:], dpi=120)


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _with_interval(row: Mapping[str, float | None]) -> str:
    return _short(row["value"]) + ("" if row["low"] is None else f" [{row['low']:.3f}, {row['high']:.3f}]")
