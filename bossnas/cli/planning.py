"""The commands before a run: plan."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from bossnas.cli.flags import Command
from bossnas.cli.options import ConfigFile, Overrides, check_writable, load

app = typer.Typer()
GPUS = "v100 | a100-40 | a100 | h100 | h200 | b200 | rtx3090 | rtx4090 | a10 | l4 | mi300x"


@app.command(
    cls=Command.knowing({"measured": "kernel_rates"}),
    name="plan",
    epilog="Example: bossnas plan --config configs/hytra_ds.json --gpus 8,64,256 --gpu h100 "
    "--set data.views_on=device --json plan.json",
)
def plan_command(
    config: ConfigFile,
    overrides: Overrides = None,
    gpus: Annotated[str, typer.Option(help="Numbers of GPUs, such as 8 or 8,64.")] = "1,8,64,256,1024",
    gpu: Annotated[str, typer.Option(help=GPUS)] = "h100",
    architecture: Annotated[str | None, typer.Option(help="Winners to assume; default: average.")] = None,
    train_images: Annotated[
        int | None, typer.Option(min=1, help="Training images; default: of ImageNet, CIFAR or the sample.")
    ] = None,
    val_images: Annotated[int | None, typer.Option(min=1, help="Validation images; default: as above.")] = None,
    kernel_rates: Annotated[
        list[Path] | None, typer.Option(help="JSON of bench/step.py on one such GPU; may be repeated, a block each.")
    ] = None,
    tflops: Annotated[float | None, typer.Option(help="TFLOP/s that matrix products sustain.")] = None,
    gbps: Annotated[float | None, typer.Option(help="GB/s that the GPU's memory sustains.")] = None,
    memory: Annotated[float | None, typer.Option(help="GB of the GPU's memory; default: of --gpu.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the plan to this file.")] = None,
) -> None:
    """Memory, communication and hours of a search on a number of GPUs, on paper: nothing is trained. Takes seconds."""
    with _leaves_on_interrupt():
        check_writable(json)
        settings = load(config, overrides)
        from bossnas import layout, log
        from bossnas.files import write_json
        from bossnas.planning import plan, tables
        from bossnas.planning.gpus import Given

        log.setup(None)
        result = plan.plan(
            settings,
            plan.read_gpus(gpus),
            gpu,
            architecture=architecture,
            images=(train_images, val_images),
            measured=kernel_rates or [],
            given=Given(tflops, gbps, memory),
        )
        typer.echo("\n".join(tables.lines(result, layout.width())))
        if json is not None:
            write_json(json, result)
    gc.freeze()  # else the process looks through all of PyTorch once more before it ends


@contextmanager
def _leaves_on_interrupt() -> Iterator[None]:
    """Ctrl-C ends the process at once with 130 and one line. An exception would get lost where it is raised while a
    tensor is freed."""

    def leave(number: int, frame: object) -> None:
        os.write(2, b"\nplan: interrupted; nothing is written\n")
        os._exit(130)

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:  # as a shell has it for jobs in the background
        signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
