"""What a run's metrics.jsonl, log.txt and JSON files hold, read without trusting a line to be whole."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from bossnas.spaces import Space

POINTS = 300  # of a curve; longer ones are means over neighbours
SAID = re.compile(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),\d+ (WARNING|ERROR|CRITICAL) (.*)$")


def metrics(file: Path) -> list[dict[str, Any]]:
    return [line for line in map(_object, _lines(file)) if line]


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # the process was killed while it wrote the line
        return {}
    return value if isinstance(value, dict) else {}


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def read_object(file: Path) -> dict[str, Any]:
    return _object("".join(_lines(file)))


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_block(line: dict[str, Any], space: Space) -> bool:
    block = line.get("block")
    return isinstance(block, int) and not isinstance(block, bool) and 0 <= block < space.blocks


def curves(lines: list[dict[str, Any]], names: Iterable[str]) -> dict[str, list[float]]:
    """Columns of the lines that have a step, in at most POINTS rows."""
    lines = [line for line in lines if is_number(line.get("step"))]
    present = [name for name in names if any(is_number(line.get(name)) for line in lines)]
    parts = [part for part in np.array_split(np.arange(len(lines)), min(POINTS, len(lines)) or 1) if len(part)]
    result: dict[str, list[float]] = {"step": [float(lines[part[-1]]["step"]) for part in parts]} if present else {}
    for name in present:
        column = [float(line[name]) if is_number(line.get(name)) else math.nan for line in lines]
        means = []
        for part in parts:
            known = [column[i] for i in part if not math.isnan(column[i])]
            means.append(sum(known) / len(known) if known else math.nan)
        result[name] = means
    return result


def warnings(file: Path) -> list[tuple[str, str, str]]:
    found = (SAID.match(line) for line in _lines(file))
    return [(match[1], match[2], match[3]) for match in found if match]


def faults(lines: list[dict[str, Any]], warnings: list[tuple[str, str, str]], folder: Path) -> dict[str, int]:
    said = Counter(
        kind
        for _, _, text in warnings
        for kind, words in (("images replaced", "cannot be read"), ("images replaced", "unreadable"))
        if words in text
    )
    going_on = sum(": going on " in line for line in _lines(folder / "log.txt"))
    return {
        "steps skipped": sum(line.get("outcome") == "bad" for line in lines),
        "warnings": len(warnings),
        "images replaced": said["images replaced"],
        "continued": going_on,
    }


def position(lines: list[dict[str, Any]]) -> str:
    train = [line for line in lines if line.get("kind") == "train" and is_number(line.get("step"))]
    if not train:
        return "no step is done yet"
    last = train[-1]
    return (f"block {last['block']}, " if is_number(last.get("block")) else "") + f"step {last['step']:,}"


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            found.update(flat(value, f"{prefix}{key}."))
        else:
            found[prefix + key] = value
    return found
