"""Pictures in files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from bossnas.errors import ConfigError
from bossnas.files import draft
from bossnas.report import figures, style
from bossnas.report.gather import Story
from bossnas.selection.ranking.compare import Comparison
from bossnas.selection.ranking.report import rows

DOTS = 200  # per inch, of pictures made of dots


def save(story: Story, what: str, file: Path, block: int = 0) -> None:
    """Draws ``what`` (fabric | paths | pareto | effects | curves | seeds | scores | accuracy) into the file. Raises
    ConfigError where the runs do not hold it."""
    write(_figure(story, what, block), file)


def write(figure: Figure, file: Path) -> None:
    """Writes a figure in the format that the file's name tells."""
    with draft(file) as made, matplotlib.rc_context(style.RC):
        figure.savefig(made, format=file.suffix[1:], dpi=DOTS, facecolor="white")


def _figure(story: Story, what: str, block: int) -> Figure:
    run, compared = story.run, story.accuracy
    if run.kind == "retraining" and what != "curves":
        raise ConfigError("what", f"{run.folder} is a retraining, which has curves alone", "draw curves")
    rated = [of.number for of in run.blocks if of.rating is not None]
    if what in ("paths", "effects", "scores") and block not in rated:
        raise ConfigError("block", f"{block} is not rated in {run.folder}", f"name one of {rated}" if rated else "wait")
    makes: dict[str, tuple[bool, str, Callable[[], Figure]]] = {
        "fabric": (bool(run.architecture), "has finished no block", lambda: figures.fabric(story)),
        "paths": (True, "", lambda: figures.paths(story, block)),
        "pareto": (story.selected is not None, story.unselected, lambda: figures.pareto(story)),
        "effects": (True, "", lambda: figures.effects(story, block)),
        "curves": (
            bool(run.curves) or any(of.curves for of in run.blocks),
            "holds no steps of a training",
            lambda: figures.curves(story),
        ),
        "seeds": (bool(story.seeds), "is one run; this needs several of the same search", lambda: figures.seeds(story)),
        "scores": (True, "", lambda: figures.agreement(story, block)),
        "accuracy": (compared is not None, "has no accuracies", lambda: _scatter(compared)),
    }
    there, why, make = makes[what]
    if not there:
        raise ConfigError("run", f"{run.folder}: {why}", "draw something else, or go on with its search")
    return make()


def _scatter(compared: Comparison | None) -> Figure:
    assert compared is not None, "asked for only where there is one"
    return figures.scatter(compared.scores, compared.accuracy, rows(compared.result))
