"""The commands for single networks: retrain, evaluate, export."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from bossnas import layout, log
from bossnas.cli.flags import Command
from bossnas.cli.options import ConfigFile, LocalRank, Overrides, Resume, check_writable, load
from bossnas.errors import ConfigError

app = typer.Typer()

NetworkFile = Annotated[
    Path,
    typer.Argument(
        metavar="NETWORK",
        help="Folder of a retraining, a file or hub folder that "
        "bossnas retrain or export wrote, or, with --model, any checkpoint (.pth, "
        ".pt, .safetensors).",
    ),
]
Model = Annotated[
    str | None, typer.Option(help="Of a checkpoint that does not say it: bossnet_t0, or another name that timm knows.")
]
Options = Annotated[
    str | None, typer.Option(metavar="YAML", help="Further arguments of --model, such as '{act: relu, se: false}'.")
]
Classes = Annotated[int | None, typer.Option(min=1, help="Of --model; default: as many as the checkpoint has.")]
ImageSize = Annotated[int | None, typer.Option(min=1, help="Side of the images, pixels; default: the network's.")]
OF_NETWORK = {  # what the library calls the parameters above, see Command.knowing
    "run": "network",
    "checkpoint": "network",
    "model.checkpoint": "network",
    "model.name": "model",
    "model.options": "options",
    "model.classes": "classes",
    "model.image_size": "image_size",
}


@app.command(
    cls=Command.knowing(
        {
            "model.run": "from_run",
            "model.checkpoint": "checkpoint",
            "checkpoint": "checkpoint",  # also a section of the config
        }
    ),
    epilog="Example: bossnas retrain --config configs/bossnet_cifar10.yaml --from-run runs/quickstart   or, "
    "on 8 GPUs: torchrun --nproc-per-node 8 launch/retrain.py --config "
    "configs/bossnet_t0_imagenet.yaml",
)
def retrain(
    config: ConfigFile,
    overrides: Overrides = None,
    resume: Resume = "never",
    from_run: Annotated[
        Path | None,
        typer.Option(
            help="Train the network that this search found, beginning with its supernet's weights where they fit."
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Begin with these weights (.pth, .pt or .safetensors) of the same network.")
    ] = None,
    local_rank: LocalRank = 0,
) -> None:
    """Train a network on labelled images: a search's result, BossNet-T, or any of timm's."""
    given = list(overrides or [])
    if from_run is not None:
        given += [
            f"model.run={_quoted(from_run)}",
            "model.inherit=true",
            "model.name=null",
            "model.architecture=null",
            "model.space=null",
        ]
    if checkpoint is not None:
        given.append(f"model.checkpoint={_quoted(checkpoint)}")
    settings = load(config, given, "retraining")  # before torch: a mistake in it is told at once
    from bossnas.retrain.train import retrain as run

    run(settings, None if resume == "never" else resume)


@app.command(
    cls=Command.knowing(
        {
            **OF_NETWORK,
            "data.val": "val",
            "data.val_images": "images",
            "data.workers": "workers",
            "train.precision": "precision",
            "engine.device": "device",
        }
    ),
    epilog="Example: bossnas evaluate runs/bossnet_cifar10   or: bossnas evaluate BossNet-T0-80_8.pth --model "
    "bossnet_t0 --val 'data/imagenet/val-*.tar'",
)
def evaluate(
    network: NetworkFile,
    model: Model = None,
    options: Options = None,
    classes: Classes = None,
    image_size: ImageSize = None,
    val: Annotated[
        str | None,
        typer.Option(
            metavar="SHARDS",
            help="Labelled images: glob, brace pattern or URL; default: with a retraining's folder, its own.",
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images per rank and batch.")] = 256,
    images: Annotated[int | None, typer.Option(min=2, help="Only the first n images.")] = None,
    workers: Annotated[int, typer.Option(min=0, help="Loader processes per rank.")] = 2,
    precision: Annotated[str, typer.Option(help="fp32 | bf16 | fp16 (autocast).")] = "fp32",
    device: Annotated[str, typer.Option(help="auto | cpu | cuda.")] = "auto",
    kernels: Annotated[str, typer.Option(help="auto | triton | reference | off.")] = "off",
    fuse_bn: Annotated[bool, typer.Option("--fuse-bn", help="Fold batch norms into convolutions.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write the result to this file.")] = None,
) -> None:
    """Top-1 and top-5 accuracy of a network, every image counted once on any number of ranks."""
    from bossnas.distributed import dist
    from bossnas.files import write_json
    from bossnas.retrain import evaluate as evaluation

    _one_of("--precision", precision, ("fp32", "bf16", "fp16"))
    _one_of("--device", device, ("auto", "cpu", "cuda"))
    _one_of("--kernels", kernels, ("auto", "triton", "reference", "off"))
    check_writable(json)
    log.setup(None, dist.rank() == 0)
    opened, settings = dist.together(lambda: _open(network, model, options, classes, image_size, val, workers, images))
    result = evaluation.evaluate_network(
        opened,
        settings,
        batch=batch,
        precision=precision,
        device=device,
        kernels=kernels,
        fuse=fuse_bn,
        source=str(network),
    )
    if dist.rank() == 0:
        typer.echo(evaluation.line(result))
        if json is not None:
            write_json(
                json,
                {
                    "network": str(network),
                    "spec": opened.spec.to_json(),
                    "val": settings.val,
                    "ranks": dist.world_size(),
                    **result.to_json(),
                },
            )


@app.command(
    cls=Command.knowing(OF_NETWORK),
    epilog="Example: bossnas export runs/bossnet_cifar10 exported --formats safetensors,onnx,standalone   or: "
    "bossnas export BossNet-T0-80_8.pth bossnet_t0 --model bossnet_t0 --formats hub",
)
def export(
    network: NetworkFile,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    model: Model = None,
    options: Options = None,
    classes: Classes = None,
    image_size: ImageSize = None,
    formats: Annotated[
        str,
        typer.Option(
            help="Of safetensors, onnx, torchscript, torch_export, standalone, "
            "hub, separated by commas; or all. standalone: not for timm's networks "
            "and own spaces."
        ),
    ] = "safetensors,torch_export",
    fuse_bn: Annotated[
        bool, typer.Option("--fuse-bn", help="Fold batch norms into convolutions (onnx, torchscript, torch_export).")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Write into a folder that is not empty.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write the result to this file.")] = None,
) -> None:
    """Export a network for use elsewhere. Every file is compared with the network before the command succeeds."""
    from bossnas.distributed import dist
    from bossnas.files import write_json
    from bossnas.networks.export import export as exporting

    if dist.world_size() > 1:
        raise ConfigError("export", f"was started {dist.world_size()} times", "run it as one process, without torchrun")
    check_writable(json)
    log.setup(None)
    result = exporting.export(
        network,
        out,
        exporting.chosen(formats),
        model=model,
        options=_mapping(options),
        classes=classes,
        image_size=image_size,
        fuse=fuse_bn,
        force=force,
    )
    typer.echo("\n".join(exporting.lines(result, layout.width())))
    if json is not None:
        write_json(json, result)


def _open(
    source: Path,
    model: str | None,
    options: str | None,
    classes: int | None,
    image_size: int | None,
    val: str | None,
    workers: int,
    images: int | None,
) -> tuple[Any, Any]:
    """The network, and how its images are read: those of its retraining unless --val names others."""
    from bossnas.config.retrain import RetrainConfig
    from bossnas.config.shared import ReaderConfig
    from bossnas.networks import pretrained
    from bossnas.runs.folder import read_config

    opened = pretrained.open_network(
        source, model=model, options=_mapping(options), classes=classes, image_size=image_size
    )
    if val is None and source.is_dir():
        data = read_config(source, RetrainConfig).data
        return opened, data.model_copy(update={"workers": workers, "val_images": images or data.val_images})
    if val is None:
        raise ConfigError("--val", "is missing", "name labelled shards, such as 'data/imagenet/val-*.tar'")
    return opened, ReaderConfig(val=val, workers=workers, val_images=images)


def _mapping(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError:
        values = None
    if not isinstance(values, dict):
        raise ConfigError("--options", f"{text!r} is no mapping", "write for example '{act: relu, se: false}'")
    return values


def _quoted(path: Path) -> str:
    """As a value of YAML, which would read 007, "a #1" or "a: b" otherwise."""
    return yaml.safe_dump(str(path), default_style="'", width=math.inf, allow_unicode=True).strip()


def _one_of(field: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(field, f"{value!r} is not known", f"choose {', '.join(known)}")
