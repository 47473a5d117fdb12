"""Search spaces: what a space must say about itself, and how one is chosen by name."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import nn

from bossnas.errors import ConfigError
from bossnas.spaces.paths import MAX_CANDIDATES, Choices


class Space(Protocol):
    """What the search asks of a space. Blocks and layers count from 0; a path is one candidate id per layer.

    Modules returned by `layer` and `adapter` are called with ``(x, choice, groups, stats)`` (see `bossnas.spaces.ops`),
    the stem with ``(x, groups, stats)``, unless it is an nn.Identity. Each call returns fresh weights, and a layer's
    weights serve all its candidates.
    """

    blocks: int
    view_pairs: int  # pairs of views made of each image; path j of a step sees pair j modulo view_pairs
    stride: int  # image sizes below it have no pixel left at the last scale

    def layers(self, block: int) -> int:
        """Layers of the block."""
        ...

    def candidates(self, block: int) -> list[str]:
        """Names of the block's candidates; the position is the candidate id."""
        ...

    def stem(self) -> nn.Module:
        """[N, 3, S, S] -> the first layer's input, the same for every path. Trained with block 0."""
        ...

    def layer(self, block: int, layer: int) -> nn.Module:
        """The weights of all candidates of one layer."""
        ...

    def adapter(self, block: int) -> nn.Module:
        """Brings every possible output of the block to ``neck_width(block)`` channels."""
        ...

    def neck_width(self, block: int) -> int:
        """Channels that the block's projector takes."""
        ...

    def paths(self, block: int, winners: list[Choices]) -> list[Choices]:
        """Every path of the block that can follow the winners of the blocks before it, in a fixed order."""
        ...

    def sample(self, block: int, winners: list[Choices], rng: np.random.Generator) -> list[Choices]:
        """The paths of one micro-batch."""
        ...

    def describe(self, architecture: list[Choices]) -> dict[str, Any]:
        """What architecture.json says beyond the paths, such as scales or widths."""
        ...


def make(name: str, *, width: float, image_size: int, restricted: bool, split: str) -> Space:
    """Builds a space from the config's values. ``path/to/file.py:Class`` loads an own space, built with ``width``.

    Raises ConfigError for an unknown name or an image too small for the space's scales.
    """
    from bossnas.spaces import hytra, mbconv, nats

    if name == "hytra":
        space: Space = hytra.HyTra(width, restricted)
    elif name == "mbconv":
        space = mbconv.MBConv(width)
    elif name == "nats":
        space = nats.Nats(width, split)
    elif ".py:" in name:
        space = _own(name, width)
    else:
        raise ConfigError(
            "space.name", f"there is no space {name!r}", "choose hytra, mbconv, nats or path/to/file.py:ClassName"
        )
    if split != "cifar10" and name != "nats":
        raise ConfigError("space.split", f"does nothing for {name}", "leave it out")
    if not restricted and name != "hytra":
        raise ConfigError("space.restricted", f"does nothing for {name}", "leave it out")
    most = max(len(space.candidates(block)) for block in range(space.blocks))
    if most > MAX_CANDIDATES:
        raise ConfigError("space.name", f"{name} has {most} candidates in a layer", f"use at most {MAX_CANDIDATES}")
    if image_size < space.stride:
        raise ConfigError(
            "space.image_size",
            f"{image_size} px leaves no pixel at the last scale of {name}",
            f"use at least {space.stride}",
        )
    return space


def _own(name: str, width: float) -> Space:
    file, _, attribute = name.rpartition(":")
    if not Path(file).is_file():
        raise ConfigError("space.name", f"there is no file {file}", "name a Python file as path/to/file.py:ClassName")
    spec = importlib.util.spec_from_file_location(f"bossnas_own_space_{Path(file).stem}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    cls = getattr(module, attribute, None)
    if cls is None:
        raise ConfigError("space.name", f"{file} defines no {attribute}", "name a class of that file")
    space = cls(width=width)
    wanted = [m for m, _ in inspect.getmembers(Space, inspect.isfunction) if not m.startswith("_")]
    missing = [m for m in [*wanted, "blocks", "view_pairs", "stride"] if not hasattr(space, m)]
    if missing:
        raise ConfigError("space.name", f"{attribute} lacks {', '.join(missing)}", "see docs/own_space.md")
    return space
