"""The one style of all pictures: colours, sizes, and the canvas. Colours are Okabe and Ito's (2008), which people with
any colour vision can tell apart; a page replaces them by its own variables."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, SOFT, RULE = "#1b1f24", "#68717c", "#d3d8de"
BLUE, ORANGE, GREEN, PURPLE, SKY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9"
LINES = (BLUE, ORANGE, GREEN, PURPLE, SKY, SOFT)
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
WIDTH = 4.1  # inches: readable on a phone, and in a column of a paper
RC: Any = {
    "text.parse_math": False,  # a name with dollars is a name
    "axes.formatter.useoffset": False,
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "sans-serif"],
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.labelsize": 8,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "grid.color": RULE,
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.2,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "white",
}


def drawn(make: Callable[..., Figure]) -> Callable[..., Figure]:
    """Has a function draw in this style."""

    @functools.wraps(make)
    def styled(*args: Any, **kwargs: Any) -> Figure:
        with matplotlib.rc_context(RC):
            return make(*args, **kwargs)

    return styled


def canvas(height: float, rows: int = 1, columns: int = 1, width: float = WIDTH) -> tuple[Figure, list[Axes]]:
    """A figure of so many inches with its panels, row by row."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def heading(axes: Axes, title: str, below: str = "") -> None:
    """A title, and a line of explanation in a softer colour below it."""
    axes.set_title(title, pad=8 + 10 * below.count("\n") + 10 if below else 6, fontweight="bold")
    if below:
        axes.annotate(below, (0, 1), xytext=(0, 4), xycoords="axes fraction", textcoords="offset points", va="bottom",
                      color=SOFT, fontsize=7.5)  # fmt: skip
