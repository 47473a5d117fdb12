"""The weights of a run in one safetensors file, which anything can read that reads safetensors."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import bossnas
from bossnas.errors import ConfigError
from bossnas.files import draft, open_to_others
from bossnas.runs import checkpoint
from bossnas.runs.folder import read_config

KINDS = ("online", "target", "predictors")
FORMAT = "bossnas-1"


@dataclass(frozen=True)
class Weights:
    """What `export` wrote. ``tensors``: on the CPU, by the names of a checkpoint, such as target.blocks.0.1.….
    ``about``: space, width, image_size, heads, restricted, split, winners (encoded paths), block, step, checkpoint,
    versions."""

    tensors: dict[str, Tensor]
    about: dict

    def of(self, kind: str) -> dict[str, Tensor]:
        """State dict of the ``online`` or ``target`` Supernet, or of the list of ``predictors``."""
        return {
            name.removeprefix(f"{kind}."): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(f"{kind}.")
        }


def export(run: Path, out: Path, name: str | None = None, force: bool = False) -> dict:
    """Writes ``out`` from checkpoint ``name`` (None: the last whole one) of the run in folder ``run``; returns what
    `Weights.about` will say. One process.

    Raises ConfigError when there is no such checkpoint, it is damaged, ``out`` cannot be written, or exists without
    ``force``. The file is there whole or not at all.
    """
    config = read_config(run)
    _check_out(out, force)
    where = checkpoint.latest(run / "checkpoints") if name is None else run / "checkpoints" / name
    if where is None:
        raise ConfigError("run", f"{run} has no checkpoint yet", "wait for its first one, or name another run")
    if name is not None and (damage := checkpoint.find_damage(where)) is not None:
        raise ConfigError("checkpoint", f"{where} is unusable: {damage}", "name another one, or leave it out")
    state = checkpoint.read_state(where)
    space = config.space.model_dump(mode="json")
    about = {
        "space": space.pop("name"),
        **space,
        "heads": config.heads.model_dump(mode="json"),
        "winners": state["winners"],
        "block": state["block"],
        "step": state["step"],
        "checkpoint": where.name,
        "versions": {"bossnas": bossnas.__version__, "torch": torch.__version__},
    }
    metadata = {"format": FORMAT} | {
        key: value if isinstance(value, str) else json.dumps(value) for key, value in about.items()
    }
    try:
        with draft(out) as made:
            save_file(checkpoint.read(where, KINDS), made, metadata)
            open_to_others(made)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            "out",
            f"cannot write {out} ({getattr(error, 'strerror', None) or error})",
            "make room, or name a file in a folder that can be written",
        ) from None
    return about


def load(path: str | Path) -> Weights:
    """Reads a file of `export`. Raises ConfigError when it is missing, damaged or none of those."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.pop("format", None) != FORMAT:
                raise ConfigError(
                    "weights",
                    f"{path} was not written by bossnas export-weights",
                    "name a file of bossnas export-weights",
                )
            texts = ("space", "split", "checkpoint")
            about = {key: value if key in texts else json.loads(value) for key, value in metadata.items()}
            return Weights({name: file.get_tensor(name) for name in file.keys()}, about)
    except (OSError, SafetensorError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            "weights",
            f"cannot read {path} ({getattr(error, 'strerror', None) or error})",
            "export it again with bossnas export-weights",
        ) from None


def _check_out(out: Path, force: bool) -> None:
    """Before the work, not after it."""
    if out.is_dir() or not os.access(out.absolute().parent, os.W_OK):
        raise ConfigError("out", f"cannot write {out}", "name a file in a folder that exists and can be written")
    if out.exists() and not force:
        raise ConfigError("out", f"{out} exists", "choose another name, or replace it with `force`")
