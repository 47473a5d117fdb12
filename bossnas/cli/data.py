"""The commands for images: pack."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bossnas import layout
from bossnas.cli.flags import Command
from bossnas.cli.options import check_writable
from bossnas.errors import ConfigError

app = typer.Typer()


@app.command(
    cls=Command, epilog="Example: bossnas pack ~/pictures shards/pictures   or: bossnas pack --verify shards/pictures"
)
def pack(
    folder: Annotated[
        Path | None, typer.Argument(metavar="FOLDER", help="Images: a folder, ImageNet, or CIFAR's download.")
    ] = None,
    out: Annotated[Path | None, typer.Argument(metavar="OUT", help="Folder for the shards.")] = None,
    kind: Annotated[str, typer.Option(help="auto | folder | imagenet | cifar10 | cifar100.")] = "auto",
    val_labels: Annotated[
        Path | None,
        typer.Option(
            help="Labels of ImageNet's val images without class folders; default: looked for in the usual places."
        ),
    ] = None,
    shard_mb: Annotated[int, typer.Option(min=1, help="Size of a shard, MB.")] = 64,
    workers: Annotated[int | None, typer.Option(min=1, help="Shards at a time; default: one per core.")] = None,
    verify: Annotated[
        bool, typer.Option("--verify", metavar="OUT", help="Check the shards in OUT instead of packing.")
    ] = False,
    json: Annotated[Path | None, typer.Option(help="Write the result to this file.")] = None,
) -> None:
    """Pack images into WebDataset shards, or verify such. An interrupted packing continues when called again."""
    from bossnas import log
    from bossnas.data.packing.pack import pack as pack_folder
    from bossnas.data.packing.verify import verify as verify_shards
    from bossnas.files import write_json

    check_writable(json)
    log.setup(None)
    if verify:
        if folder is None or out is not None or kind != "auto" or val_labels is not None:
            raise ConfigError(
                "--verify",
                "takes one folder of shards and no options but --workers and --json",
                "see bossnas pack --help",
            )
        found = verify_shards(folder, workers)
        if json is not None:
            write_json(json, {"out": str(folder), **found})
        for entry in found["problems"]:
            typer.echo(f"{entry['shard']}: {entry['problem']}; {entry['fix']}")
        if found["problems"]:
            raise ConfigError(
                "--verify", f"{len(found['problems'])} problems with the shards in {folder}", "mend them as said above"
            )
        typer.echo(
            f"{found['samples']:,} images in {found['shards']:,} shards are whole"
            + ("" if found["checksums"] else ", as far as can be told without pack.json and its checksums")
        )
        return
    if folder is None or out is None:
        raise ConfigError("FOLDER" if folder is None else "OUT", "is missing", "see bossnas pack --help")
    result = pack_folder(folder, out, shard_mb, kind=kind, val_labels=val_labels, workers=workers)
    for split, size in result["splits"].items():
        typer.echo(
            f"{split}: {size['samples']:,} images in {size['shards']:,} shards, {layout.brief(size['bytes'], 'B')}, "
            f"as {out / split}-*.tar"
        )
    typer.echo(
        f"{len(result['classes']):,} classes, {len(result['bad']):,} unreadable images left out, "
        f"{result['kept']:,} shards kept from an earlier run"
    )
    if json is not None:
        write_json(json, {"out": str(out), **result})
