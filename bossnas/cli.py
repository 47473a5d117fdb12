"""The `bossnas` command. `launch/train.py` shares its search command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from bossnas import __version__, dist
from bossnas.config import load
from bossnas.errors import ConfigError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
                  context_settings={"help_option_names": ["-h", "--help"]},
                  help="Block-wise self-supervised neural architecture search for hybrid CNN-transformers.")

ConfigFile = Annotated[Path, typer.Option("--config", "-c", help="JSON or YAML config file.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=VALUE",
                                                     help="Override a key of the config; may be repeated.")]
Resume = Annotated[str, typer.Option(help="auto: continue the run that the folder holds; never: refuse.")]


@app.command(name="search", epilog="Example: bossnas search --config configs/quickstart_ds.json --set out=runs/a")
def search_command(config: ConfigFile, overrides: Overrides = None, resume: Resume = "never",
                   local_rank: Annotated[int, typer.Option("--local_rank", hidden=True)] = 0) -> None:
    """Search an architecture: train, rate and select block by block. Results go to the config's `out` folder."""
    from bossnas.search import search

    if resume not in ("auto", "never"):
        raise ConfigError("--resume", f"{resume!r} is not known", "use auto or never")
    search(load(config, overrides), resume == "auto")


@app.command(epilog="Example: bossnas rate runs/quickstart --block 0 --block 1")
def rate(run: Annotated[Path, typer.Argument(help="Run folder.")],
         block: Annotated[list[int] | None, typer.Option(help="Block to rate, from 0; default: all finished.")] = None
         ) -> None:
    """Rate the finished blocks of a run again from its last checkpoint and rewrite their rating files."""
    from bossnas.search import rerate

    for done in rerate(run, block):
        typer.echo(run / "ratings" / f"block_{done}.json")


@app.command(epilog="Example: bossnas pack ~/pictures shards/pictures")
def pack(folder: Annotated[Path, typer.Argument(help="Image folder; train/ and val/ become splits.")],
         out: Annotated[Path, typer.Argument(help="Folder for the shards.")],
         shard_mb: Annotated[int, typer.Option(min=1, help="Size of a shard, MB.")] = 64) -> None:
    """Pack an image folder into WebDataset shards. An interrupted packing continues when called again."""
    from bossnas.pack import pack as pack_folder

    result = pack_folder(folder, out, shard_mb=shard_mb)
    for split, size in result["splits"].items():
        typer.echo(f"{split}: {size['samples']} images in {size['shards']} shards, {size['bytes'] / 1e6:.1f} MB, "
                   f"as {out / split}-*.tar")
    typer.echo(f"{len(result['classes'])} classes, {len(result['bad'])} unreadable images left out, "
               f"{result['kept']} shards kept from an earlier run")


def _version(show: bool) -> None:
    if show:
        typer.echo(__version__)
        raise typer.Exit()


@app.callback()
def _options(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True,
                                                   help="Print the version.")] = False) -> None:
    pass


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line. Exit code 2 and one line for what the user can mend."""
    command = typer.main.get_command(app)
    sys.exit(dist.run(lambda: command(args=arguments, standalone_mode=True)))


if __name__ == "__main__":
    main()
