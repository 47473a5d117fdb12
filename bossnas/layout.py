"""Figures, tables and sentences as text that fits a terminal of a given width, or a pipe."""

from __future__ import annotations

import re
import shutil
import textwrap
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len, chop_cells

UNSEEN = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")  # Unicode's categories of what a terminal or a page obeys
PIPE = 80  # columns where no terminal says how many it has
GAPS = (2, 1)  # spaces between two columns: one where that spares a second table
LEAST_NAME = 16  # columns that a name gets, however narrow the terminal
NOTE = (20, 34)  # columns that a text which is no name gets at least, and at most
PREFIXES = ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k"))
PIECE = re.compile(r"[^ _/|,]*[ _/|,]?")  # a text may be folded after one of these


@dataclass(frozen=True)
class Column:
    """A heading and the cells below it, any of them of several lines. ``text``: a name or a note, which stands left
    and is folded where it is long. A figure stands right and is never folded or cut."""

    heading: str
    cells: Sequence[str]
    text: bool = False


def printable(text: str) -> str:
    """A line of text from elsewhere. What is not to be seen, such as control characters and marks that turn the
    direction of writing, becomes a replacement character."""
    return "".join("\ufffd" if unicodedata.category(c) in UNSEEN else c for c in text)


def width() -> int:
    """Columns of the output: those that COLUMNS says, or else the terminal's; of a pipe 80."""
    return shutil.get_terminal_size((PIPE, 24)).columns or PIPE


def exact(value: int) -> str:
    """1234567 -> "1,234,567"."""
    return f"{value:,}"


def brief(value: float, unit: str = "") -> str:
    """Four digits, a prefix and the unit: 1234567 B -> "1.235 MB"; whole numbers below a thousand as they are."""
    for factor, prefix in PREFIXES:
        if value >= factor * 0.99995:
            return f"{value / factor:#.4g}".rstrip(".") + f" {prefix}{unit}"
    return f"{value:.4g} {unit}".rstrip()


def both(value: int) -> str:
    """To type and to read: "1,234,567 (1.235 M)"; small ones alone."""
    return exact(value) if value < 10_000 else f"{exact(value)} ({brief(value)})"


def paragraph(text: str, columns: int, indent: str = "") -> list[str]:
    """The lines of a text; those after the first begin with ``indent``. Words, such as paths, stay whole."""
    return textwrap.wrap(text, columns, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def fold(text: str, columns: int) -> list[str]:
    """The lines of a name, folded after spaces, underscores, slashes, bars and commas, else anywhere."""
    lines = [""]
    for piece in PIECE.findall(text):
        if lines[-1] and cell_len(lines[-1]) + cell_len(piece.rstrip()) > columns:
            lines.append("")
        first, *more = chop_cells(lines[-1] + piece, columns) if cell_len(piece) > columns else [lines[-1] + piece]
        lines[-1:] = [first, *more]
    return [line.rstrip() for line in lines]


def table(title: str, columns: Sequence[Column], space: int, names: int = 1) -> list[str]:
    """The lines of a table of at most ``space`` columns of characters.

    Columns that do not fit become a further table below, which repeats the first ``names`` columns, without the rows
    that are empty there. A name takes a quarter of the space at most.
    """
    limits = [max(LEAST_NAME, space // 4) if i < names else NOTE[1] for i in range(len(columns))]
    made = [_Made.of(column, limit) for column, limit in zip(columns, limits, strict=True)]
    lines, next_one = paragraph(title, space), names
    gap = next((gap for gap in GAPS if _width(made, gap) <= space), GAPS[0])
    while True:
        shown = made[:names]
        for i in range(next_one, len(made)):
            left = space - _width(shown, gap) - gap
            fits = made[i].width <= left
            if i > next_one and not fits and not (made[i].text and left >= NOTE[0]):
                break
            shown.append(made[i] if fits or not made[i].text else _Made.of(columns[i], max(left, NOTE[0])))
        lines += _lines(shown, gap, names)
        next_one += len(shown) - names
        if next_one >= len(made):
            return lines
        lines.append("")


@dataclass(frozen=True)
class _Made:
    """A column whose heading and cells are in lines."""

    heading: list[str]
    cells: list[list[str]]
    width: int
    text: bool

    @classmethod
    def of(cls, column: Column, limit: int) -> _Made:
        heading = column.heading.split("\n")
        cells = [
            [part for line in cell.split("\n") for part in (fold(line, limit) if column.text else [line])]
            for cell in column.cells
        ]
        return cls(heading, cells, max(cell_len(line) for lines in (heading, *cells) for line in lines), column.text)

    def pad(self, line: str) -> str:
        missing = " " * (self.width - cell_len(line))
        return line + missing if self.text else missing + line


def _width(columns: Sequence[_Made], gap: int) -> int:
    return sum(column.width + gap for column in columns) - gap


def _lines(columns: Sequence[_Made], gap: int, names: int) -> list[str]:
    """A table; its headings stand on the rule, its cells begin in the first line of their row."""

    def row(parts: Sequence[list[str]], above: bool = False) -> list[str]:
        height = max(map(len, parts))
        filled = [[""] * (height - len(p)) + p if above else p + [""] * (height - len(p)) for p in parts]
        return [
            (" " * gap).join(c.pad(line) for c, line in zip(columns, at, strict=True)).rstrip()
            for at in zip(*filled, strict=True)
        ]

    lines = row([column.heading for column in columns], above=True)
    lines.append("─" * _width(columns, gap))
    for cells in zip(*(column.cells for column in columns), strict=True):
        if any(cell != [""] for cell in cells[names:]):
            lines += row(cells)
    return lines
