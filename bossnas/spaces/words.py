"""Paths and architectures in words: what each layer does, at which resolution, and what it costs."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from bossnas.layout import Column, exact, printable, table
from bossnas.spaces.cost import CostTable, Entry
from bossnas.spaces.paths import Choices
from bossnas.spaces.space import Space, Words


def words(space: Space, block: int, layer: int, choice: int) -> Words:
    """What the space says of a candidate; of a space that says nothing, the candidate's name."""
    own = getattr(space, "words", None)
    if own is None:
        name = printable(space.candidates(block)[choice])
        return Words(name, name)
    said = own(block, layer, choice)
    return Words(printable(said.text), printable(said.row), printable(said.kind))


def path_words(space: Space, block: int, path: Choices) -> str:
    """Such as "convolution at 1/4, 2 x attention at 1/8, convolution at 1/16"."""
    return in_runs([words(space, block, layer, choice).text for layer, choice in enumerate(path)])


def in_runs(texts: Sequence[str]) -> str:
    """The texts as a list, with equal neighbours counted: "2 x attention at 1/8, convolution at 1/16"."""
    runs = [(text, len(list(same))) for text, same in itertools.groupby(texts)]
    return ", ".join(text if count == 1 else f"{count} x {text}" for text, count in runs)


def summary(space: Space, architecture: Sequence[Choices]) -> str:
    """How many layers do what: "7 attention, 9 convolution; 4 at 1/8, 12 at 1/16", or "6 of 3x3 expand 6, ..."."""
    found = [
        words(space, block, layer, choice)
        for block, path in enumerate(architecture)
        for layer, choice in enumerate(path)
    ]
    kinds = Counter(one.kind for one in found if one.kind)
    rows = Counter(one.row for one in found)
    between = "at" if kinds else "of"
    parts = [
        ", ".join(f"{kinds[name]} {name}" for name in sorted(kinds)),
        ", ".join(f"{count} {between} {name}" for name, count in rows.items()),  # in the order of the layers
    ]
    return "; ".join(part for part in parts if part)


def drawn_rows(space: Space) -> list[str]:
    """All rows of a drawing of the space, from that of candidate 0 on."""
    rows = {
        words(space, block, layer, choice).row: None
        for block in range(space.blocks)
        for layer in range(space.layers(block))
        for choice in range(len(space.candidates(block)))
    }
    return list(rows)


@dataclass(frozen=True)
class Layer:
    """A layer of an architecture, or its stem (``block`` and ``layer`` None), and its part of the network's cost."""

    block: int | None
    layer: int | None
    text: str
    channels: int
    height: int  # of the map that it gives out, pixels
    width: int
    macs: int
    params: int
    macs_share: float  # of stem and searched layers together, 0 to 1
    params_share: float


def layers(costs: CostTable, architecture: Sequence[Choices]) -> list[Layer]:
    """The stem and every layer of an architecture, with the cost of each. ``costs``: of its space."""
    total, space = costs.cost(architecture), costs.space

    def row(block: int | None, layer: int | None, text: str, entry: Entry) -> Layer:
        (macs, params), (channels, height, width) = (entry.cost.macs, entry.cost.params), entry.shape
        shares = macs / max(1, total.macs), params / max(1, total.params)
        return Layer(block, layer, text, channels, height, width, macs, params, *shares)

    entry = costs.stem
    result = [row(None, None, "stem", entry)] if entry.cost.params else []
    for block, path in enumerate(architecture):
        for layer, choice in enumerate(path):
            entry = costs.entries[block, layer, choice, entry.shape]
            result.append(row(block, layer, words(space, block, layer, choice).text, entry))
    return result


def lines(rows: Sequence[Layer], space: int) -> list[str]:
    """The layers as a table of at most ``space`` columns."""
    return table(
        "",
        [
            Column("block", ["" if row.layer else ("" if row.block is None else str(row.block)) for row in rows]),
            Column("layer", ["" if row.layer is None else str(row.layer) for row in rows]),
            Column("what it does", [row.text for row in rows], text=True),
            Column("channels", [exact(row.channels) for row in rows]),
            Column("map", [f"{row.height}x{row.width}" for row in rows]),
            Column("MACs", [f"{row.macs_share:.1%}" for row in rows]),
            Column("parameters", [f"{row.params_share:.1%}" for row in rows]),
        ],
        space,
        names=3,
    )
