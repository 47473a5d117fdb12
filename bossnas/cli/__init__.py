"""The `bossnas` command, one file for each work. `launch/train.py` and `launch/retrain.py` share it."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from bossnas import __version__
from bossnas.cli import data, networks, planning, report, search, selection
from bossnas.distributed import launch

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Block-wise self-supervised neural architecture search for hybrid CNN-transformers.",
)
for work in (search, selection, report, data, planning, networks):
    app.add_typer(work.app)


def _version(show: bool) -> None:
    if show:
        typer.echo(__version__)
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line. Exit code 2 and one line for what the user can mend."""
    command = typer.main.get_command(app)
    sys.exit(launch.run(lambda: command(args=arguments, standalone_mode=True)))
