"""The commands about a run's ratings and a space's costs: select, cost, rank."""

from __future__ import annotations

import shlex
from decimal import Decimal
from pathlib import Path
from typing import Annotated

import typer

from bossnas.cli.flags import Command
from bossnas.cli.options import Combine, ConfigFile, Overrides, check_together, check_writable, load
from bossnas.cli.report import check_picture
from bossnas.errors import ConfigError

app = typer.Typer()


@app.command(
    cls=Command.knowing(
        {"latencies": "latency", "macs": "max_macs", "params": "max_params", "latency_ns": "max_latency_ms"}
    ),
    epilog="Example: bossnas select runs/quickstart --max-macs 5M --max-params 1M --top 3 --front macs",
)
def select(
    run: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN",
            help="Folder of a finished run; several, that differ in their seed: the sum of their ratings.",
        ),
    ],
    score: Annotated[str | None, typer.Option(help="Score of the rating files; default: the run's own.")] = None,
    combine: Combine = "sum",
    size_weight: Annotated[
        float, typer.Option(help="How much the log of the layers' channels counts beside the rating; 1: as much.")
    ] = 0.0,
    max_macs: Annotated[str | None, typer.Option(help="Most multiply-adds of an image, such as 600M.")] = None,
    max_params: Annotated[str | None, typer.Option(help="Most parameters, such as 5M.")] = None,
    max_latency_ms: Annotated[str | None, typer.Option(help="Most milliseconds; needs --latency.")] = None,
    latency: Annotated[Path | None, typer.Option(help="Table of bossnas cost --measure --json.")] = None,
    top: Annotated[int, typer.Option(min=1, max=1000, help="How many architectures, the best first.")] = 5,
    front: Annotated[str | None, typer.Option(help="Pareto front against macs, params or latency_ms.")] = None,
    write_config: Annotated[
        Path | None, typer.Option(help="Write the config of the first one's retraining to this .yaml file.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the result to this file.")] = None,
) -> None:
    """Select the best architectures of a run's ratings under limits. The run folder stays as it is."""
    from bossnas import layout
    from bossnas.files import write_json
    from bossnas.selection import select as selection, text

    check_together(combine, size_weight)
    costs = {name: cost for cost, name in selection.NAMES.items()}
    if front is not None and front not in costs:
        raise ConfigError("--front", f"there is no cost {front!r}", f"choose {', '.join(costs)}")
    given = {
        "macs": ("--max-macs", max_macs, 1),
        "params": ("--max-params", max_params, 1),
        "latency_ns": ("--max-latency-ms", max_latency_ms, 10**6),
    }
    limits = {cost: _amount(flag, text, scale) for cost, (flag, text, scale) in given.items() if text is not None}
    check_writable(json)
    check_writable(write_config, "--write-config")
    if write_config is not None and (write_config.suffix not in (".yaml", ".yml") or write_config.exists()):
        problem = "exists" if write_config.exists() else "is no .yaml file"
        raise ConfigError("--write-config", f"{write_config} {problem}", "name a new .yaml file")
    result = selection.select(
        run,
        score=score,
        how=combine,
        size_weight=size_weight,
        limits=limits,
        top=top,
        latencies=latency,
        front_cost=None if front is None else costs[front],
    )
    typer.echo("\n".join(text.lines(result, layout.width())))
    if write_config is not None:
        from bossnas.runs.folder import read_config
        from bossnas.selection import retraining

        retraining.write_config(write_config, read_config(run[0]), result)
        typer.echo(f"\nnext: bossnas retrain --config {shlex.quote(str(write_config))}")
    if json is not None:
        write_json(json, result)


@app.command(
    cls=Command, epilog="Example: bossnas cost --config configs/hytra_ds.json --architecture '5433|3230|0010|0000'"
)
def cost(
    config: ConfigFile,
    overrides: Overrides = None,
    architecture: Annotated[str | None, typer.Option(help="Cost of this one; default: the whole table.")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Measure latencies on this device, too.")] = False,
    batch: Annotated[int, typer.Option(min=1, help="Images in a measured batch.")] = 1,
    repeats: Annotated[int, typer.Option(min=3, help="Times that each latency is measured.")] = 30,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of the measurement.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the result to this file.")] = None,
) -> None:
    """Multiply-adds and parameters of one architecture, or of every candidate on every input that can occur."""
    if measure and (architecture is not None or json is None):
        raise ConfigError(
            "--measure",
            "makes a table of the whole space for bossnas select",
            "leave out --architecture and name a file with --json",
        )
    check_writable(json)
    settings = load(config, overrides).space
    from bossnas import layout
    from bossnas.files import write_json
    from bossnas.selection import latency

    result = latency.report(settings, architecture, measured=measure, batch=batch, repeats=repeats, threads=threads)
    typer.echo("\n".join(latency.lines(result, layout.width())))
    if json is not None:
        write_json(json, result)


@app.command(
    cls=Command.knowing({"run": "ratings", "how": "combine"}),
    name="rank",
    epilog="Example: bossnas rank runs/nats --accuracy nats_cifar10.csv --json rank.json "
    "--plot rank.png --proxies synflow,naswot",
)
def rank_command(
    ratings: Annotated[
        list[Path],
        typer.Argument(
            metavar="RATINGS", help="Run folder, CSV (architecture,score), or the original release's path_rank_*.yml."
        ),
    ],
    accuracy: Annotated[Path, typer.Option(help="CSV, YAML or NATS-Bench file: architecture, accuracy.")],
    space: Annotated[
        str | None,
        typer.Option(help="nats | mbconv | hytra | file.py:ClassName; default: the run's, or told from the texts."),
    ] = None,
    score: Annotated[str | None, typer.Option(help="Score of the run, or column of the CSV.")] = None,
    better: Annotated[str, typer.Option(help="Of scores in a CSV: higher | lower.")] = "higher",
    combine: Combine = "sum",
    seeds: Annotated[
        bool,
        typer.Option(
            "--seeds", help="RATINGS are of several seeds: mean, deviation and agreement, and figures of their sum."
        ),
    ] = False,
    size_weight: Annotated[
        float, typer.Option(help="How much the log of the layers' channels counts in the row of rating and size.")
    ] = 1.0,
    column: Annotated[str | None, typer.Option(help="Column of --accuracy; NATS-Bench: data set.")] = None,
    image_size: Annotated[int | None, typer.Option(min=1, help="Of the networks, pixels.")] = None,
    proxies: Annotated[str | None, typer.Option(help="Of synflow, naswot, gradnorm, zico.")] = None,
    sample: Annotated[int, typer.Option(min=2, help="Architectures the proxies are computed of.")] = 200,
    bootstrap: Annotated[int, typer.Option(min=10, max=100_000, help="Resamples.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Of resamples, sample, proxies.")] = 0,
    json: Annotated[Path | None, typer.Option(help="Write the figures to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw scatter plots into this .png.")] = None,
) -> None:
    """Rank correlations of ratings with true accuracies, always beside what counting parameters would give."""
    from bossnas import layout, log
    from bossnas.files import write_json
    from bossnas.selection.ranking import report
    from bossnas.selection.ranking.compare import Rated, Sampling, compare
    from bossnas.selection.ranking.proxies import chosen

    if better not in ("higher", "lower"):
        raise ConfigError("--better", f"{better!r} is not known", "use higher or lower")
    check_together(combine, size_weight)
    names = [] if proxies is None else chosen(proxies)
    check_writable(json)
    check_writable(plot, "--plot")
    if plot is not None:
        check_picture(plot, "--plot")
    log.setup(None)
    found = compare(
        Rated(ratings, score, better, combine, seeds, size_weight),
        accuracy,
        column=column,
        space=space,
        image_size=image_size,
        sampling=Sampling(bootstrap, names, sample, seed),
    )
    typer.echo("\n".join(report.lines(found.result, layout.width())))
    if json is not None:
        write_json(json, found.result)
    if plot is not None:
        from bossnas.report import draw, figures

        draw.write(figures.scatter(found.scores, found.accuracy, report.rows(found.result)), plot)


def _amount(field: str, text: str, scale: int) -> int:
    """ "1.5M" -> 1500000, times ``scale``; K, M and G are thousands, millions and thousands of millions."""
    factor = {"K": 10**3, "M": 10**6, "G": 10**9}.get(text[-1:].upper(), 1)
    try:
        value = Decimal(text if factor == 1 else text[:-1]) * factor * scale
        if not 0 < value < 10**18:
            raise ValueError
    except (ArithmeticError, ValueError):
        raise ConfigError(field, f"{text!r} is no amount", "write a number above 0, such as 600M, 1.5G or 20") from None
    return int(value)


@app.command(
    cls=Command.knowing({"architecture": "target", "run": "target"}),
    epilog="Example: bossnas show runs/quickstart   or: bossnas show '5433|3230|0010|0000' --space hytra",
)
def show(
    target: Annotated[
        str, typer.Argument(metavar="RUN|ARCHITECTURE", help="Folder of a search, or an architecture's paths.")
    ],
    space: Annotated[
        str | None,
        typer.Option(help="Of ARCHITECTURE: nats | mbconv | hytra | file.py:ClassName; default: told by its layers."),
    ] = None,
    width: Annotated[float, typer.Option(help="Of ARCHITECTURE: multiplier of all channel numbers.")] = 1.0,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Of ARCHITECTURE, pixels; default: as published.")
    ] = None,
    score: Annotated[str | None, typer.Option(help="Score of the rating files; default: the run's own.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the result to this file.")] = None,
) -> None:
    """Show an architecture in words: what each layer does and costs; of a run, also how sure its choice is."""
    from bossnas import layout
    from bossnas.files import write_json
    from bossnas.runs import show as showing

    check_writable(json)
    folder = Path(target)
    if folder.is_dir():
        if space is not None or image_size is not None or width != 1:
            raise ConfigError(
                "RUN", "says its space itself", "leave out --space, --width and --image-size, or name an architecture"
            )
        result = showing.show_run(folder, score)
    else:
        if score is not None:
            raise ConfigError("--score", "needs a run", "leave it out, or name a run folder")
        if not 0 < width <= 4:
            raise ConfigError("--width", f"{width:g} is no width", "use a number above 0, at most 4")
        result = showing.show_architecture(target, space, width, image_size)
    typer.echo("\n".join(showing.lines(result, layout.width())))
    if json is not None:
        write_json(json, result)
