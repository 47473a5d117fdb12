"""The `bossnas` command. `launch/train.py` shares its search command."""

from __future__ import annotations

import sys
from decimal import Decimal
from pathlib import Path
from typing import Annotated

import typer

from bossnas import __version__, cli_networks, dist
from bossnas.cli_options import Combine, ConfigFile, LocalRank, Overrides, Resume, check_together, check_writable
from bossnas.config import load
from bossnas.errors import ConfigError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
                  context_settings={"help_option_names": ["-h", "--help"]},
                  help="Block-wise self-supervised neural architecture search for hybrid CNN-transformers.")

@app.command(name="search", epilog="Example: bossnas search --config configs/quickstart_ds.json --set out=runs/a")
def search_command(config: ConfigFile, overrides: Overrides = None, resume: Resume = "never",
                   local_rank: LocalRank = 0) -> None:
    """Search an architecture: train, rate and select block by block. Results go to the config's `out` folder."""
    from bossnas.search import search

    search(load(config, overrides), None if resume == "never" else resume)


@app.command(epilog="Example: bossnas rate runs/quickstart --block 0 --set rating.temperature=0.1   or, without a run: "
                    "bossnas rate --untrained --config configs/quickstart_ds.json --set out=runs/untrained")
def rate(run: Annotated[Path | None, typer.Argument(help="Run folder.")] = None,
         block: Annotated[list[int] | None, typer.Option(help="Block to rate, from 0; default: all finished.")] = None,
         untrained: Annotated[bool, typer.Option("--untrained", help="Rate a supernet with random weights.")] = False,
         config: Annotated[Path | None, typer.Option("--config", "-c", help="Config file, with --untrained.")] = None,
         overrides: Overrides = None) -> None:
    """Rate the finished blocks of a run again and rewrite their rating files, or rate a supernet without training."""
    from bossnas import rating

    if untrained == (run is not None):
        raise ConfigError("RUN", "is missing" if run is None else "and --untrained exclude each other",
                          "name a run folder, or give --untrained --config FILE")
    if untrained and (config is None or block is not None):
        raise ConfigError("--untrained", "needs --config and rates all blocks", "see bossnas rate --help")
    if run is not None and config is not None:
        raise ConfigError("--config", "a run has its own config", "leave it out; --set rating.KEY=VALUE overrides it")
    if untrained:
        written = [rating.rate_untrained(load(config, overrides)) / "ratings"]
    else:
        written = [run / "ratings" / f"block_{done}.json" for done in rating.rerate(run, block, overrides or [])]
    if dist.rank() == 0:
        typer.echo("\n".join(map(str, written)))


@app.command(epilog="Example: bossnas select runs/quickstart --max-macs 5M --max-params 1M --top 3 --front macs")
def select(run: Annotated[list[Path], typer.Argument(help="Folder of a finished run; several, that differ in their "
                                                          "seed: the sum of their ratings.")],
           score: Annotated[str | None, typer.Option(help="Score of the rating files; default: the run's own.")] = None,
           combine: Combine = "sum",
           size_weight: Annotated[float, typer.Option(help="How much the log of the layers' channels counts beside the "
                                                      "rating; 1: as much.")] = 0.0,
           max_macs: Annotated[str | None, typer.Option(help="Most multiply-adds of an image, such as 600M.")] = None,
           max_params: Annotated[str | None, typer.Option(help="Most parameters, such as 5M.")] = None,
           max_latency_ms: Annotated[str | None, typer.Option(help="Most milliseconds; needs --latency.")] = None,
           latency: Annotated[Path | None, typer.Option(help="Table of bossnas cost --measure --json.")] = None,
           top: Annotated[int, typer.Option(min=1, max=1000, help="How many architectures, the best first.")] = 5,
           front: Annotated[str | None, typer.Option(help="Pareto front against macs, params or latency_ms.")] = None,
           json: Annotated[Path | None, typer.Option(help="Write the result to this file.")] = None) -> None:
    """Select the best architectures of a run's ratings under limits. The run folder stays as it is."""
    from bossnas import select as selection
    from bossnas.runfolder import write_json

    check_together(combine, size_weight)
    costs = {name: cost for cost, name in selection.NAMES.items()}
    if front is not None and front not in costs:
        raise ConfigError("--front", f"there is no cost {front!r}", f"choose {', '.join(costs)}")
    given = {"macs": ("--max-macs", max_macs, 1), "params": ("--max-params", max_params, 1),
             "latency_ns": ("--max-latency-ms", max_latency_ms, 10 ** 6)}
    limits = {cost: _amount(*value) for cost, value in given.items() if value[1] is not None}
    check_writable(json)
    result = selection.select(run, score=score, how=combine, size_weight=size_weight, limits=limits, top=top,
                              latencies=latency, front_cost=None if front is None else costs[front])
    typer.echo("\n".join(selection.lines(result)))
    if json is not None:
        write_json(json, result)


@app.command(epilog="Example: bossnas cost --config configs/hytra_ds.json --architecture '5433|3230|0010|0000'")
def cost(config: ConfigFile, overrides: Overrides = None,
         architecture: Annotated[str | None, typer.Option(help="Cost of this one; default: the whole table.")] = None,
         measure: Annotated[bool, typer.Option("--measure", help="Measure latencies on this device, too.")] = False,
         batch: Annotated[int, typer.Option(min=1, help="Images in a measured batch.")] = 1,
         repeats: Annotated[int, typer.Option(min=3, help="Times that each latency is measured.")] = 30,
         threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of the measurement.")] = None,
         json: Annotated[Path | None, typer.Option(help="Write the result to this file.")] = None) -> None:
    """Multiply-adds and parameters of one architecture, or of every candidate on every input that can occur."""
    from bossnas import latency
    from bossnas.runfolder import write_json

    if measure and (architecture is not None or json is None):
        raise ConfigError("--measure", "makes a table of the whole space for bossnas select",
                          "leave out --architecture and name a file with --json")
    check_writable(json)
    result = latency.report(load(config, overrides).space, architecture, measured=measure, batch=batch,
                            repeats=repeats, threads=threads)
    typer.echo("\n".join(latency.lines(result)))
    if json is not None:
        write_json(json, result)


@app.command(name="export-weights",
             epilog="Example: bossnas export-weights runs/quickstart quickstart.safetensors --force")
def export_weights(run: Annotated[Path, typer.Argument(help="Run folder.")],
                   out: Annotated[Path, typer.Argument(metavar="OUT.safetensors", help="File to write.")],
                   checkpoint: Annotated[str | None, typer.Option(metavar="NAME", help="Of RUN/checkpoints; default: "
                                                                  "the last one.")] = None,
                   force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False) -> None:
    """Write the weights of a run's online and target network and predictors to one safetensors file."""
    from bossnas import weights

    about = weights.export(run, out, checkpoint, force)
    typer.echo(f"{out}: {about['space']} after {len(about['winners'])} finished blocks, from checkpoint "
               f"{about['checkpoint']}, {out.stat().st_size / 1e6:.1f} MB")


def _amount(field: str, text: str, scale: int) -> int:
    """"1.5M" -> 1500000, times ``scale``; K, M and G are thousands, millions and thousands of millions."""
    factor = {"K": 10 ** 3, "M": 10 ** 6, "G": 10 ** 9}.get(text[-1:].upper(), 1)
    try:
        value = Decimal(text if factor == 1 else text[:-1]) * factor * scale
        if not 0 < value < 10 ** 18:
            raise ValueError
    except (ArithmeticError, ValueError):
        raise ConfigError(field, f"{text!r} is no amount", "write a number above 0, such as 600M, 1.5G or 20") from None
    return int(value)


@app.command(name="rank", epilog="Example: bossnas rank runs/nats --accuracy nats_cifar10.csv --json rank.json "
                                 "--plot rank.png --proxies synflow,naswot")
def rank_command(ratings: Annotated[list[Path], typer.Argument(
                     help="Run folder, CSV (architecture,score), or the original release's path_rank_*.yml.")],
                 accuracy: Annotated[Path, typer.Option(help="CSV, YAML or NATS-Bench file: architecture, accuracy.")],
                 space: Annotated[str | None, typer.Option(help="nats | mbconv | hytra | file.py:ClassName; default: "
                                                                "the run's, or told from the texts.")] = None,
                 score: Annotated[str | None, typer.Option(help="Score of the run, or column of the CSV.")] = None,
                 better: Annotated[str, typer.Option(help="Of scores in a CSV: higher | lower.")] = "higher",
                 combine: Combine = "sum",
                 seeds: Annotated[bool, typer.Option("--seeds", help="RATINGS are of several seeds: mean, deviation "
                                                     "and agreement, and figures of their sum.")] = False,
                 size_weight: Annotated[float, typer.Option(help="How much the log of the layers' channels counts in "
                                                            "the row of rating and size.")] = 1.0,
                 column: Annotated[str | None, typer.Option(help="Column of --accuracy; NATS-Bench: data set.")] = None,
                 image_size: Annotated[int | None, typer.Option(min=1, help="Of the networks, pixels.")] = None,
                 proxies: Annotated[str | None, typer.Option(help="Of synflow, naswot, gradnorm, zico.")] = None,
                 sample: Annotated[int, typer.Option(min=2, help="Architectures the proxies are computed of.")] = 200,
                 bootstrap: Annotated[int, typer.Option(min=10, max=100_000, help="Resamples.")] = 1000,
                 seed: Annotated[int, typer.Option(min=0, help="Of resamples, sample, proxies.")] = 0,
                 json: Annotated[Path | None, typer.Option(help="Write the figures to this file.")] = None,
                 plot: Annotated[Path | None, typer.Option(help="Draw scatter plots into this .png.")] = None) -> None:
    """Rank correlations of ratings with true accuracies, always beside what counting parameters would give."""
    from rich.console import Console

    from bossnas import log, rank
    from bossnas.compare import compare
    from bossnas.proxies import chosen
    from bossnas.runfolder import write_json

    if better not in ("higher", "lower"):
        raise ConfigError("--better", f"{better!r} is not known", "use higher or lower")
    check_together(combine, size_weight)
    names = [] if proxies is None else chosen(proxies)
    check_writable(json)
    check_writable(plot, "--plot")
    if plot is not None:
        rank.check_picture(plot)
    log.setup(None)
    found = compare(ratings, accuracy, space=space, score=score, better=better, how=combine, seeds=seeds,
                    size_weight=size_weight, column=column, image_size=image_size, seed=seed, resamples=bootstrap,
                    proxy_names=names, sample=sample)
    rank.show(found.result, Console(width=None if sys.stdout.isatty() else 150))
    if json is not None:
        write_json(json, found.result)
    if plot is not None:
        rank.draw(found.scores, found.accuracy, rank.rows(found.result), plot)


@app.command(epilog="Example: bossnas pack ~/pictures shards/pictures   or: bossnas pack --verify shards/pictures")
def pack(folder: Annotated[Path | None, typer.Argument(help="Images: a folder, ImageNet, or CIFAR's download.")] = None,
         out: Annotated[Path | None, typer.Argument(help="Folder for the shards.")] = None,
         kind: Annotated[str, typer.Option(help="auto | folder | imagenet | cifar10 | cifar100.")] = "auto",
         val_labels: Annotated[Path | None, typer.Option(help="Labels of ImageNet's val images without class folders; "
                                                              "default: looked for in the usual places.")] = None,
         shard_mb: Annotated[int, typer.Option(min=1, help="Size of a shard, MB.")] = 64,
         workers: Annotated[int | None, typer.Option(min=1, help="Shards at a time; default: one per core.")] = None,
         verify: Annotated[bool, typer.Option("--verify", metavar="OUT",
                                              help="Check the shards in OUT instead of packing.")] = False) -> None:
    """Pack images into WebDataset shards, or verify such. An interrupted packing continues when called again."""
    from bossnas import log
    from bossnas.pack import pack as pack_folder
    from bossnas.verify import verify as verify_shards

    log.setup(None)
    if verify:
        if folder is None or out is not None or kind != "auto" or val_labels is not None:
            raise ConfigError("--verify", "takes one folder of shards and no options but --workers",
                              "see bossnas pack --help")
        found = verify_shards(folder, workers)
        for entry in found["problems"]:
            typer.echo(f"{entry['shard']}: {entry['problem']}; {entry['fix']}")
        if found["problems"]:
            raise ConfigError("--verify", f"{len(found['problems'])} problems with the shards in {folder}",
                              "mend them as said above")
        typer.echo(f"{found['samples']} images in {found['shards']} shards are whole"
                   + ("" if found["checksums"] else ", as far as can be told without pack.json and its checksums"))
        return
    if folder is None or out is None:
        raise ConfigError("FOLDER" if folder is None else "OUT", "is missing", "see bossnas pack --help")
    result = pack_folder(folder, out, shard_mb, kind=kind, val_labels=val_labels, workers=workers)
    for split, size in result["splits"].items():
        typer.echo(f"{split}: {size['samples']} images in {size['shards']} shards, {size['bytes'] / 1e6:.1f} MB, "
                   f"as {out / split}-*.tar")
    typer.echo(f"{len(result['classes'])} classes, {len(result['bad'])} unreadable images left out, "
               f"{result['kept']} shards kept from an earlier run")


@app.command(name="plan", epilog="Example: bossnas plan --config configs/hytra_ds.json --gpus 8,64,256 --gpu h100 "
                                 "--set data.views_on=device --json plan.json")
def plan_command(config: ConfigFile, overrides: Overrides = None,
                 gpus: Annotated[str, typer.Option(help="Numbers of GPUs, such as 8 or 8,64.")] = "1,8,64,256,1024",
                 gpu: Annotated[str, typer.Option(help="v100 | a100-40 | a100 | h100 | h200 | b200 | mi300x")] = "h100",
                 architecture: Annotated[str | None, typer.Option(help="Winners to assume; default: average.")] = None,
                 train_images: Annotated[int | None, typer.Option(
                     min=1, help="Training images; default: of ImageNet, CIFAR or the sample.")] = None,
                 val_images: Annotated[int | None, typer.Option(
                     min=1, help="Validation images; default: as above.")] = None,
                 kernel_rates: Annotated[list[Path] | None, typer.Option(
                     help="JSON of bench/step.py on one such GPU; may be repeated, a block each.")] = None,
                 tflops: Annotated[float | None, typer.Option(help="TFLOP/s that matrix products sustain.")] = None,
                 gbps: Annotated[float | None, typer.Option(help="GB/s that the GPU's memory sustains.")] = None,
                 json: Annotated[Path | None, typer.Option(help="Write the plan to this file.")] = None) -> None:
    """Memory, communication and hours of a search on a number of GPUs, on paper: nothing is trained."""
    from rich.console import Console

    from bossnas import log, plan, plan_tables
    from bossnas.runfolder import write_json

    check_writable(json)
    log.setup(None)
    result = plan.plan(load(config, overrides), plan.read_gpus(gpus), gpu, architecture=architecture,
                       train_images=train_images, val_images=val_images, measured=kernel_rates or [], tflops=tflops,
                       gbps=gbps)
    plan_tables.show(result, Console(width=None if sys.stdout.isatty() else 175))
    if json is not None:
        write_json(json, result)


app.add_typer(cli_networks.app)  # retrain, evaluate, export


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
