"""Search spaces: what a space must say about itself, and how one is chosen by name."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

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


@dataclass(frozen=True)
class Traits:
    """What is known of a space beside what the search needs. A space has them as the class attribute ``traits``; one of
    a user's own may leave them out, and then has these defaults.

    ``options``: keys of the config's section that its class takes beside ``width``, with their defaults.
    ``variants``: values of the options that change how many layers it has, the usual one first.
    ``image_size`` (pixels), ``classes``, ``recipe`` (whose mean and deviation): of its published networks.
    ``as_searched``: arguments with which its network computes what the supernet did, where its definition differs.
    ``channel_texts``: accuracy tables also write its architectures as channel numbers, such as 8:64:32:8:24.
    ``norm_before_head``: its networks normalise and rectify the last map before the classifier.

    A space whose networks have a definition of their own also has ``network(architecture)``: their name in timm's
    registry, and its arguments (`networks.registry`). The networks of others are cut out of the supernet's layers.
    """

    options: dict[str, Any] = field(default_factory=dict)
    variants: tuple[dict[str, Any], ...] = ({},)
    image_size: int | None = None
    classes: int = 1000
    recipe: Literal["imagenet", "cifar"] = "imagenet"
    as_searched: dict[str, Any] = field(default_factory=dict)
    channel_texts: bool = False
    norm_before_head: bool = False


def known() -> dict[str, type]:
    """The classes of the built-in spaces by name."""
    from bossnas.spaces import hytra, mbconv, nats

    return {"hytra": hytra.HyTra, "mbconv": mbconv.MBConv, "nats": nats.Nats}


def traits(space: Space | type) -> Traits:
    """What is known of a space."""
    return getattr(space, "traits", None) or Traits()


def recognise(lengths: Sequence[int]) -> tuple[str, dict[str, Any]] | None:
    """Name and options of the built-in space whose blocks have these numbers of layers; None if there is none."""
    for name, kind in known().items():
        for options in traits(kind).variants:
            space = kind(**options)
            if [space.layers(block) for block in range(space.blocks)] == list(lengths):
                return name, options
    return None


def make(name: str, *, width: float = 1.0, image_size: int, **options: Any) -> Space:
    """Builds a space from the values of the config's section. ``path/to/file.py:Class`` loads a space of one's own,
    built with ``width``. ``options``: the section's other keys, of which a space takes its own; the others must have
    their default.

    Raises ConfigError for an unknown name or an image too small for the space's scales.
    """
    kind = known().get(name)
    if kind is None and ".py:" not in name:
        raise ConfigError(
            "space.name", f"there is no space {name!r}", f"choose {', '.join(known())} or path/to/file.py:ClassName"
        )
    takes = traits(kind).options if kind is not None else {}
    defaults = {key: value for other in known().values() for key, value in traits(other).options.items()}
    for key, value in options.items():
        if key not in takes and value != defaults[key]:
            raise ConfigError(f"space.{key}", f"does nothing for {name}", "leave it out")
    if kind is None:
        space = _own(name, width)
    else:
        space = kind(width, **{key: options[key] for key in takes if key in options})
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
    if spec is None or spec.loader is None:
        raise ConfigError("space.name", f"{file} is no Python file", "name one as path/to/file.py:ClassName")
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
