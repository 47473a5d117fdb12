"""An architecture in words and as a table: one that is named, or what a run has found so far and how sure it is."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bossnas import layout, spaces
from bossnas.errors import ConfigError
from bossnas.runs.folder import kind_of, read_config
from bossnas.runs.ratings import BlockRating, read_ratings, read_winners
from bossnas.spaces import Space, words
from bossnas.spaces.cost import CostTable, read_architecture
from bossnas.spaces.paths import Choices, decode, encode
from bossnas.spaces.words import Layer


def show_run(folder: Path, score: str | None = None) -> dict[str, Any]:
    """What the search in ``folder`` has found so far, as plain values. ``score``: another than the run chose by; the
    architecture stays the run's. Raises ConfigError where nothing is found yet."""
    config = read_config(folder).space
    space = spaces.make(**config.model_dump())
    ratings = read_ratings(folder, score)
    architecture = winners(folder, space, len(ratings))
    result = _described(space, config.image_size, architecture)
    return {
        "run": str(folder),
        "kind": kind_of(folder),
        "finished": len(architecture) == space.blocks,
        "space": config.model_dump(mode="json"),
        **result,
        "blocks": [_block(space, rating, path) for rating, path in zip(ratings, architecture, strict=False)],
        "next": _next(folder, result["macs"]) if len(architecture) == space.blocks else [],
    }


def show_architecture(
    text: str, name: str | None = None, width: float = 1.0, image_size: int | None = None
) -> dict[str, Any]:
    """The architecture ``text`` of the space ``name`` (None: told by its number of layers) as plain values."""
    options: dict[str, Any] = {}
    if name is None:
        known = spaces.recognise([len(part) for part in text.split("|")])
        if known is None:
            raise ConfigError(
                "target",
                f"{text!r} is no run folder, and no built-in space has its numbers of layers",
                "name a run folder, or an architecture such as '5433|3230|0010|0000' with its `space`",
            )
        name, options = known
    size = image_size or spaces.traits(spaces.known().get(name, object)).image_size
    if size is None:
        raise ConfigError("image_size", f"is not known for {name}", "give the side of its images, in pixels")
    space = spaces.make(name, width=width, image_size=size, **options)
    architecture = read_architecture(space, text)
    return {
        "space": {"name": name, "width": width, "image_size": size, **options},
        **_described(space, size, architecture),
        "next": [],
    }


def winners(folder: Path, space: Space, rated: int) -> list[Choices]:
    """The winners that a search froze, of ``rated`` blocks at most. Raises ConfigError for those that are not of the
    space."""
    found: list[Choices] = []
    for block, text in enumerate(read_winners(folder)):
        path = decode(text)
        if block >= min(space.blocks, rated) or path not in space.paths(block, found):
            raise ConfigError(
                "run",
                f"{folder}/winners.json has a path {text} in block {block}, which was not rated or is not of its space",
                "restore the file",
            )
        found.append(path)
    return found


def _described(space: Space, size: int, architecture: list[Choices]) -> dict[str, Any]:
    table = CostTable.along(space, size, architecture)
    cost = table.cost(architecture)
    return {
        "architecture": "|".join(map(encode, architecture)),
        "paths": [encode(path) for path in architecture],
        "words": words.summary(space, architecture),
        "macs": cost.macs,
        "params": cost.params,
        "layers": [asdict(layer) for layer in words.layers(table, architecture)],
    }


def _block(space: Space, rating: BlockRating, path: Choices) -> dict[str, Any]:
    text, sure = encode(path), rating.certainty
    known = sure is not None and sure.known
    return {
        "path": text,
        "words": words.path_words(space, rating.block, path),
        "score": rating.score,
        "better": rating.better,
        "value": rating.scores.get(text),
        "error": rating.error(text),
        "chance": rating.chance,
        "paths": len(rating.scores),
        "level": sure.level if sure is not None and known else None,
        "best": sure.winner if sure is not None else None,
        "nothing_told_apart": sure.nothing_told_apart if sure is not None and known else None,
        "how_sure": "its rating keeps no errors; rate it again" if sure is None else sure.text(),
    }


def _next(folder: Path, macs: int) -> list[list[str]]:
    """Commands to type, each with what it does."""
    name, less = shlex.quote(str(folder)), 0.8 * macs
    factor, letter = next(((10**n, c) for n, c in ((9, "G"), (6, "M"), (3, "K")) if less >= 10**n), (1, ""))
    return [
        [f"bossnas report {name}", "the result as a page to look at"],
        [
            f"bossnas select {name} --max-macs {less / factor:.3g}{letter} --write-config retrain.yaml",
            "the best one at a smaller cost, and the config of its training with labels",
        ],
    ]


def lines(result: dict[str, Any], columns: int) -> list[str]:
    """The result as text of at most so many columns, but for long names."""
    space = result["space"]
    where = f"{result['run']}: " if "run" in result else ""
    state = "" if result.get("finished", True) else f", {len(result['paths'])} blocks so far"
    text = [
        f"{where}{space['name']}, width {space['width']:g}, {space['image_size']} pixels{state}",
        *layout.paragraph(f"{result['architecture']}: {result['words']}", columns, "  "),
        "",
        *words.lines([Layer(**layer) for layer in result["layers"]], columns),
        "",
        f"{layout.brief(result['macs'])} multiply-adds, {layout.brief(result['params'])} parameters (stem and searched "
        "layers)",
    ]
    for block, row in enumerate(result.get("blocks", ())):
        value = "no score" if row["value"] is None else f"{row['value']:+.4f}"
        error = "" if row["error"] is None else f" +- {row['error']:.4f}"
        chance = "" if row["chance"] is None else f" (chance gives {row['chance']:+.4f})"
        other = "" if row["best"] in (None, row["path"]) else f" the best by this score is {row['best']};"
        text += [""] if block == 0 else []
        found = f"block {block}: {row['path']} with {row['score']} {value}{error}{chance};{other} {row['how_sure']}"
        text += layout.paragraph(found, columns, "  ")
    if result["next"]:
        text += ["", "next:"]
        text += [part for command, what in result["next"] for part in (f"  {command}", f"      {what}")]
    return text
