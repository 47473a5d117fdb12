"""What a space must say about itself (`Space`), and what else may be known of it (`Traits`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from torch import nn

from bossnas.spaces.paths import Choices


@dataclass(frozen=True)
class Words:
    """A candidate in words. ``text``: what it does, such as "attention at 1/8"; ``row``: where a drawing shows it, such
    as "1/8"; ``kind``: what a drawing marks it by, such as "attention" (none: "")."""

    text: str
    row: str
    kind: str = ""


class Space(Protocol):
    """What the search asks of a space. Blocks and layers count from 0; a path is one candidate id per layer.

    A space may also have ``words(block, layer, choice) -> Words``; without it a candidate's name stands for it.

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

    A built-in space also has ``network(architecture)``: the name of its network in timm's registry, and the arguments
    (`networks.registry`). The network of a user's own space is cut out of the supernet's layers.
    """

    options: dict[str, Any] = field(default_factory=dict)
    variants: tuple[dict[str, Any], ...] = ({},)
    image_size: int | None = None
    classes: int = 1000
    recipe: Literal["imagenet", "cifar"] = "imagenet"
    as_searched: dict[str, Any] = field(default_factory=dict)
    channel_texts: bool = False
    norm_before_head: bool = False


def traits(space: Space | type) -> Traits:
    """What is known of a space."""
    found = getattr(space, "traits", None)
    return found if isinstance(found, Traits) else Traits()
