"""The commands that show what runs found: report, plot."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from bossnas.cli.flags import Command
from bossnas.cli.options import check_writable
from bossnas.errors import ConfigError

app = typer.Typer()
Runs = Annotated[
    list[Path],
    typer.Argument(metavar="RUN", help="Folder of a run; several that differ in their seed are told together."),
]
Score = Annotated[str | None, typer.Option(help="Score of the rating files; default: the run's own.")]
Accuracy = Annotated[Path | None, typer.Option(help="True accuracies, as for bossnas rank.")]


class What(str, Enum):
    """What a picture shows."""

    fabric = "fabric"
    paths = "paths"
    pareto = "pareto"
    effects = "effects"
    curves = "curves"
    seeds = "seeds"
    scores = "scores"
    accuracy = "accuracy"


@app.command(cls=Command, epilog="Example: bossnas report runs/quickstart   or: bossnas report runs/seed0 runs/seed1")
def report(
    run: Runs,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The page; default: report.html in the first run's folder.")
    ] = None,
    score: Score = None,
    accuracy: Accuracy = None,
) -> None:
    """Make one page of what a run found, how sure that is and how it went. It opens from disk, without a network."""
    page = output if output is not None else run[0] / "report.html"
    if output is not None:
        check_writable(page, "--output")
    _require_matplotlib()
    from bossnas.files import write_text
    from bossnas.report.gather import gather
    from bossnas.report.page import command_of, page as made

    rest = [*(["--score", score] if score else []), *(["--accuracy", str(accuracy)] if accuracy else [])]
    text = made(gather(run, accuracy, score), command_of(run, rest))
    try:
        write_text(page, text)
    except OSError as error:
        raise ConfigError("--output", f"cannot write {page} ({error.strerror})", "name a file elsewhere") from None
    typer.echo(f"{page}: {page.stat().st_size / 1e6:.1f} MB; open it in a browser")


@app.command(cls=Command, epilog="Example: bossnas plot runs/quickstart --what pareto -o front.pdf")
def plot(
    run: Runs,
    what: Annotated[What, typer.Option(help="What the picture shows.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A .svg, .pdf or .png file.")],
    block: Annotated[int, typer.Option(min=0, help="Of paths, effects and scores.")] = 0,
    score: Score = None,
    accuracy: Accuracy = None,
) -> None:
    """Draw one picture of a run, for a paper or a talk."""
    check_picture(output)
    check_writable(output, "--output")
    if (what is What.accuracy) != (accuracy is not None):
        raise ConfigError("--accuracy", "goes with --what accuracy", "give both or neither")
    from bossnas.report.draw import save
    from bossnas.report.gather import gather

    save(gather(run, accuracy, score), what.value, output, block)
    typer.echo(str(output))


def check_picture(file: Path, field: str = "--output") -> None:
    """Raises ConfigError unless matplotlib is there and can write such a file."""
    _require_matplotlib()
    from matplotlib.backend_bases import FigureCanvasBase

    if file.suffix[1:] not in FigureCanvasBase.get_supported_filetypes():
        raise ConfigError(field, f"cannot draw {file}", "name a .png, .pdf or .svg file")


def _require_matplotlib() -> None:
    try:
        import matplotlib.backend_bases  # noqa: F401
    except ImportError:
        raise ConfigError("matplotlib", "is not installed, and pictures need it", "pip install matplotlib") from None
