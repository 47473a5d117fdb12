"""The tables of the report: what stands in them, as text, and by what a column is sorted."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from bossnas.layout import exact
from bossnas.report import figures
from bossnas.report.gather import BlockStory, Story
from bossnas.spaces.paths import encode


@dataclass(frozen=True)
class Cell:
    text: str
    value: float | None = None  # by which a column is sorted
    kind: str = ""


@dataclass(frozen=True)
class Head:
    name: str
    text: bool = False


@dataclass(frozen=True)
class Row:
    cells: list[Cell]
    kind: str = ""


@dataclass(frozen=True)
class Table:
    id: str
    caption: str
    heads: list[Head]
    rows: list[Row]
    sortable: bool = False
    filter: bool = False


def top(story: Story) -> Table | None:
    if story.selected is None:
        return None
    several = len(story.runs) > 1
    heads = [Head("architecture", True), Head("in words", True), Head("score"), Head("behind the best"),
             Head("± over images")] + [Head("± over seeds")] * several + [Head("multiply-adds"),
             Head("parameters")]  # fmt: skip
    rows = [
        Row(
            [
                Cell(row["architecture"], kind="code text"),
                Cell(row["words"], kind="text"),
                Cell(f"{row['score']:+.5f}"),
                Cell("–" if i == 0 else f"{row['behind']:.2g}"),
                Cell("–" if i == 0 or (e := row["behind_error_images"]) is None else f"{e:.1g}"),
                *([Cell("–" if (e := row["behind_error_seeds"]) is None else f"{e:.1g}")] if several else []),
                Cell(exact(row["macs"])),
                Cell(exact(row["params"])),
            ],
            "winner" if i == 0 else ("level" if row["level_with_best"] else ""),
        )
        for i, row in enumerate(story.selected["top"])
    ]
    over = " The error over seeds is that of the mean of the runs." if several else ""
    caption = "The best architectures; a blue edge marks those that cannot be told from the first." + over
    return Table("top", caption, heads, rows)


def changed(story: Story) -> Table:
    rows = [
        Row([Cell(key, kind="code text"), Cell(shown(value), kind="text"), Cell(shown(default), kind="text")])
        for key, value, default in story.run.changed
    ]
    heads = [Head("key", True), Head("value", True), Head("default", True)]
    return Table("changed", "What the config sets otherwise", heads, rows)


def paths(story: Story, block: BlockStory) -> Table:
    rating, sure = block.rating, block.certainty
    assert rating is not None, "a rated block"
    run = story.run
    chosen = encode(run.architecture[block.number]) if block.number < len(run.architecture) else ""
    names = [rating.score, *(name for name in block.scores if name != rating.score)]
    errors = None if rating.parts is None else rating.parts.error(rating.parts.values).tolist()
    of_path = dict(zip(rating.scores, errors, strict=True)) if errors is not None else {}
    level = set(sure.level) if sure is not None else set()
    heads = [Head("path", True), Head("in words", True), Head(plain(names[0])), Head("± over images"),
             Head("behind the best"), Head("± of that"), *(Head(plain(name)) for name in names[1:]),
             Head("multiply-adds"), Head("parameters")]  # fmt: skip
    rows = []
    for path in figures.path_order(block):
        margin, error = (math.nan, math.nan) if sure is None else sure.margins[path]
        rows.append(
            Row(
                [
                    Cell(path, kind="code text"),
                    Cell(block.words[path], kind="text"),
                    figure_cell(rating.scores[path], "+.4f"),
                    figure_cell(of_path.get(path, math.nan), ".4f"),
                    figure_cell(margin, ".4f"),
                    figure_cell(error, ".4f"),
                    *(figure_cell(block.scores[name][path], "+.4f") for name in names[1:] if name in block.scores),
                    Cell(exact(block.costs[path].macs), block.costs[path].macs),
                    Cell(exact(block.costs[path].params), block.costs[path].params),
                ],
                "winner" if path == chosen else ("level" if path in level else ""),
            )
        )
    caption = f"All {len(rows)} paths of block {block.number} as a table"
    return Table(f"block-{block.number}-paths", caption, heads, rows, sortable=True, filter=True)


def warnings(story: Story) -> Table:
    lines = story.run.warnings
    heads = [Head("time"), Head("level", True), Head("what the log says", True)]
    rows = [Row([Cell(when), Cell(level, kind="text"), Cell(text, kind="text")]) for when, level, text in lines]
    return Table("warnings", f"{len(rows)} warnings and errors of the log", heads, rows)


def figure_cell(value: float, form: str) -> Cell:
    return Cell("–", -1e308) if math.isnan(value) else Cell(format(value, form), float(value))


def shown(value: Any) -> str:
    if value is None:
        return "none"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 400 else text[:397] + "…"


def plain(name: str) -> str:
    return name.replace("_", " ")
