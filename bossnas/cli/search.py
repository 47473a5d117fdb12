"""The commands of a search: search, rate, export-weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bossnas.cli.flags import Command
from bossnas.cli.options import ConfigFile, LocalRank, Overrides, Resume, check_writable, load
from bossnas.errors import ConfigError

app = typer.Typer()


@app.command(
    cls=Command, name="search", epilog="Example: bossnas search --config configs/quickstart_ds.json --set out=runs/a"
)
def search_command(
    config: ConfigFile, overrides: Overrides = None, resume: Resume = "never", local_rank: LocalRank = 0
) -> None:
    """Search an architecture: train, rate and select block by block. Results go to the config's `out` folder."""
    settings = load(config, overrides)  # before torch: a mistake in it is told at once
    from bossnas.search.search import search

    search(settings, None if resume == "never" else resume)


@app.command(
    cls=Command.knowing({"blocks": "block"}),
    epilog="Example: bossnas rate runs/quickstart --block 0 --set rating.temperature=0.1   or, without a run: "
    "bossnas rate --untrained --config configs/quickstart_ds.json --set out=runs/untrained",
)
def rate(
    run: Annotated[Path | None, typer.Argument(metavar="RUN", help="Run folder.")] = None,
    block: Annotated[list[int] | None, typer.Option(help="Block to rate, from 0; default: all finished.")] = None,
    untrained: Annotated[bool, typer.Option("--untrained", help="Rate a supernet with random weights.")] = False,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="Config file, with --untrained.")] = None,
    overrides: Overrides = None,
) -> None:
    """Rate the finished blocks of a run again and rewrite their rating files, or rate a supernet without training."""
    if untrained == (run is not None):
        raise ConfigError(
            "RUN",
            "is missing" if run is None else "and --untrained exclude each other",
            "name a run folder, or give --untrained --config FILE",
        )
    if untrained and (config is None or block is not None):
        raise ConfigError("--untrained", "needs --config and rates all blocks", "see bossnas rate --help")
    if run is not None and config is not None:
        raise ConfigError("--config", "a run has its own config", "leave it out; --set rating.KEY=VALUE overrides it")
    settings = None if config is None else load(config, overrides)
    from bossnas.distributed import dist
    from bossnas.search import rerate

    if run is None:
        assert settings is not None, "without a run there is a config"
        written = [rerate.rate_untrained(settings) / "ratings"]
    else:
        written = [run / "ratings" / f"block_{done}.json" for done in rerate.rerate(run, block, overrides or [])]
    if dist.rank() == 0:
        typer.echo("\n".join(map(str, written)))


@app.command(
    cls=Command,
    name="export-weights",
    epilog="Example: bossnas export-weights runs/quickstart quickstart.safetensors --force",
)
def export_weights(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
    out: Annotated[Path, typer.Argument(metavar="OUT.safetensors", help="File to write.")],
    checkpoint: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of RUN/checkpoints; default: the last one.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write the result to this file.")] = None,
) -> None:
    """Write the weights of a run's online and target network and predictors to one safetensors file."""
    from bossnas import layout
    from bossnas.files import write_json
    from bossnas.runs import weights

    check_writable(json)
    about = weights.export(run, out, checkpoint, force)
    size = out.stat().st_size
    typer.echo(
        f"{out}: {about['space']} after {len(about['winners'])} finished blocks, from checkpoint "
        f"{about['checkpoint']}, {layout.brief(size, 'B')}"
    )
    if json is not None:
        write_json(json, {"file": str(out), "bytes": size, **about})
