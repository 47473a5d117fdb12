"""Options that several commands share, and checks of what they are given."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from bossnas.errors import ConfigError
from bossnas.selection import HOW

ConfigFile = Annotated[Path, typer.Option("--config", "-c", help="JSON or YAML config file.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=VALUE", help="Override a key of the config; may be repeated.")
]
Resume = Annotated[
    str,
    typer.Option(
        metavar="auto|never|PATH",
        help="never: begin; auto: begin, or go on with the run that the folder holds; PATH: "
        "go on from that run, or from its RUN/checkpoints/NAME.",
    ),
]
Combine = Annotated[
    str, typer.Option("--combine", help="How the scores of blocks are put together: " + " | ".join(HOW) + ".")
]
LocalRank = Annotated[int, typer.Option("--local_rank", hidden=True)]  # DeepSpeed's launcher gives it


def load(config: Path, overrides: list[str] | None = None, kind: Literal["search", "retraining"] = "search") -> Any:
    """The config of a command, read and validated. Importing all keys takes a tenth of a second, which --help needs
    not wait for."""
    from bossnas import config as configs

    return configs.load(config, overrides, configs.RetrainConfig if kind == "retraining" else configs.Config)


def check_together(how: str, size_weight: float) -> None:
    """Of --combine and --size-weight."""
    if how not in HOW:
        raise ConfigError("--combine", f"{how!r} is not known", f"use {', '.join(HOW)}")
    if not 0 <= size_weight < math.inf:
        raise ConfigError("--size-weight", f"{size_weight:g} is no weight", "use a finite number, 0 or more")


def check_writable(file: Path | None, field: str = "--json") -> None:
    """Before the work, not after it."""
    if file is not None and (file.is_dir() or not os.access(file.absolute().parent, os.W_OK)):
        raise ConfigError(field, f"cannot write {file}", "name a file in a folder that exists and can be written")
