"""The result of a selection as text for a terminal."""

from __future__ import annotations

from typing import Any

from bossnas.layout import Column, exact, paragraph, table

LIMITS = {  # how a limit of a result is told
    "macs": lambda value: f"{value:,} multiply-adds",
    "params": lambda value: f"{value:,} parameters",
    "latency_ms": lambda value: f"{value:,} ms",
}


def lines(result: dict[str, Any], space: int) -> list[str]:
    """The result of `select` as text of at most ``space`` columns."""
    limits = ", ".join(f"{LIMITS[name](value)}" for name, value in result["limits"].items())
    seeds = f" of {len(result['runs'])} runs" if len(result["runs"]) > 1 else ""
    how = "" if result["combine"] == "sum" else f", {result['combine']}"
    size = f" and size x {result['size_weight']:g}" if result["size_weight"] else ""
    text = paragraph(
        f"{result['space']['name']}, {result['score']}{seeds}{how}{size} ({result['better']} is better); limits: "
        + (f"at most {limits}" if limits else "none"),
        space,
    )
    text += paragraph(
        f"the ratings cover {exact(result['rated'])} of the space's {exact(result['architectures'])} architectures",
        space,
    )
    plain, rows = result["greedy"], {str(rank): row for rank, row in enumerate(result["top"], 1)}
    title = f"Sizes are those of the run's own width, {result['space']['width']:g}, without a classifier."
    text += ["", *_table(title, {"greedy": plain, **rows} if plain else rows, space)]
    if plain is None:
        text += paragraph(
            "greedy: a block's best path by this score leads to where the next block has no ratings", space
        )
    elif plain["exceeds"]:
        text += paragraph(f"greedy exceeds {', '.join(plain['exceeds'])}", space)
    text += ["", *paragraph(f"1: {result['top'][0]['words']}", space, "   ")]
    text += ["", *paragraph(_doubt(result), space)]
    if "front" in result:
        points = result["front"]["points"]
        title = f"Pareto front of score against {result['front']['cost']}, {exact(len(points))} architectures:"
        text += ["", *_table(title, {str(number): row for number, row in enumerate(points, 1)}, space)]
    return text


def _doubt(result: dict[str, Any]) -> str:
    """Which of the best cannot be told apart, in words."""
    best, several = result["top"][0], len(result["runs"]) > 1
    if best["level_with_best"] is None:
        if result["combine"] == "ranks":
            return "How sure this is, is not known: ranks have no standard error."
        runs = " and ".join(f"bossnas rate {run}" for run in result["runs"])
        return f"How sure this is, is not known: the ratings keep no errors. To get them: {runs}"
    over = "the validation images or over the runs' seeds, whichever is larger" if several else "the validation images"
    level = sum(row["level_with_best"] for row in result["top"])
    text = (
        f"= cannot be told from the best ({level} of {len(result['top'])}, the best one counted): it lies within two "
        f"standard errors over {over}. "
    )
    if not several:
        text += "Another seed may move the scores further than these errors say. "
    cheapest = result.get("cheapest_level")
    if cheapest is None or cheapest["architecture"] == best["architecture"]:
        return text + "No cheaper architecture of the Pareto front is as good."
    return text + (
        f"The cheapest of them is {cheapest['architecture']}: {exact(cheapest['macs'])} multiply-adds "
        f"({cheapest['macs'] / best['macs']:.0%} of the best one's), {exact(cheapest['params'])} parameters."
    )


def _behind(row: dict[str, Any], error: float | None) -> str:
    if error == 0 == row["behind"]:
        return "-"
    return f"{row['behind']:.2g}" + ("" if error is None else f" +- {error:.1g}")


def _table(title: str, rows: dict[str, dict[str, Any]], space: int) -> list[str]:
    """Architectures, by a name each, with their scores and costs."""
    of = list(rows.values())
    columns = [
        Column("", list(rows), text=True),
        Column("score", [f"{row['score']:+.6f}" for row in of]),
        Column("behind the best,\nerror over images", [_behind(row, row["behind_error_images"]) for row in of]),
        Column("multiply-\nadds", [exact(row["macs"]) for row in of]),
        Column("parameters", [exact(row["params"]) for row in of]),
    ]
    if any(row["behind_error_seeds"] is not None for row in of):
        errors = ["" if (e := row["behind_error_seeds"]) is None else f"{e:.1g}" for row in of]
        columns.insert(3, Column("error over\nseeds", errors))
    if any(row["level_with_best"] for row in of):
        columns.insert(3, Column("", ["=" if row["level_with_best"] and not row["exceeds"] else "" for row in of]))
    if "latency_ms" in of[0]:
        columns.append(Column("latency", [f"{row['latency_ms']:,.3f} ms" for row in of]))
    return table(title, [*columns, Column("architecture", [row["architecture"] for row in of], text=True)], space)
