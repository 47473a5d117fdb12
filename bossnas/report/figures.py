"""Pictures of what a search found, for the report page and for papers. Each function draws one figure.

Points about which the page says more have a gid such as ``tip-paths-0`` on their collection; `tips` has a text for each
of its points, in the order in which they are drawn.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from bossnas import layout
from bossnas.report.gather import BlockStory, RunStory, Story
from bossnas.report.style import BLUE, DASHES, INK, LINES, ORANGE, RULE, SKY, SOFT, WIDTH, canvas, drawn, heading
from bossnas.spaces.paths import encode
from bossnas.spaces.words import Words, drawn_rows, words

MARKS = ("o", "s", "D", "^", "v")  # of kinds, in the order in which a space names them
QUANTITIES = {
    "loss": "loss",
    "spread": "spread of the embeddings",
    "lr": "learning rate",
    "images_per_second": "images/s",
    "top1": "top-1",
    "top5": "top-5",
}
LONGEST = 34  # characters of a name
CELLS = 30  # points from which a scatter plot shows density, times 100


@drawn
def fabric(story: Story) -> Figure:
    """The found architecture on all that it could have been: its layers from left to right."""
    run = story.run
    assert run.space is not None, "a retraining has no fabric"
    rows, cells = drawn_rows(run.space), _cells(run)
    height = 1.25 + 0.21 * max(4, len(rows))
    figure, (axes,) = canvas(height, width=max(WIDTH, 0.22 * len(cells) + 1.4))
    kinds = list(dict.fromkeys(one.kind for of_layer in cells for one in of_layer))
    if story.density is not None:
        most = max(max(shares) for shares in story.density)
        for x, (of_layer, shares) in enumerate(zip(cells, story.density, strict=True)):
            summed: dict[str, float] = {}
            for one, share in zip(of_layer, shares, strict=False):
                summed[one.row] = summed.get(one.row, 0) + share
            for row, share in summed.items():
                if share > 0.005 * most:
                    box = (x - 0.46, rows.index(row) - 0.42)
                    axes.add_patch(
                        Rectangle(box, 0.92, 0.84, facecolor=SKY, alpha=0.65 * min(1, share / most), linewidth=0)
                    )
    found = [cells[x][choice] for x, choice in enumerate(c for path in run.architecture for c in path)]
    heights = [rows.index(one.row) for one in found]
    axes.plot(range(len(found)), heights, color=INK, linewidth=1, zorder=2)
    for kind, mark in zip(kinds, MARKS * 9, strict=False):
        at = [x for x, one in enumerate(found) if one.kind == kind]
        drawn_marks = axes.scatter(
            at, [heights[x] for x in at], s=34, marker=mark, color=ORANGE if mark == "o" else BLUE, zorder=3
        )
        drawn_marks.set_gid(f"tip-fabric-{kinds.index(kind)}")
    edge = -0.5
    for block in range(run.space.blocks):
        middle = edge + run.space.layers(block) / 2
        axes.text(middle, len(rows) - 0.45, f"block {block}", ha="center", va="bottom", color=SOFT, fontsize=7)
        edge += run.space.layers(block)
        if block + 1 < run.space.blocks:
            axes.axvline(edge, color=RULE, linewidth=0.8, zorder=0)
    axes.set(
        xlim=(-0.5, len(cells) - 0.5),
        ylim=(-0.6, len(rows) - 0.4),
        yticks=range(len(rows)),
        yticklabels=list(map(_short, rows)),
    )
    axes.set_xticks(range(len(cells)), [str(i) for b in range(run.space.blocks) for i in range(run.space.layers(b))])
    axes.tick_params(length=0)
    marks = dict(zip(kinds, ("circles", "squares", "diamonds", "triangles", "triangles down"), strict=False))
    named = ", ".join(f"{mark}: {_short(kind)}" for kind, mark in marks.items() if kind)
    shade = (
        f"darker: more often among the best 10 % of {story.drawn:,} architectures" if story.density is not None else ""
    )
    axes.set_xlabel("\n".join(part for part in ("layer", named, shade) if part))
    axes.set_title("What each layer does", pad=16, fontweight="bold")
    return figure


@drawn
def paths(story: Story, number: int) -> Figure:
    """All rated paths of a block, the best first: how far each lies behind the best, with that difference's error."""
    block = _rated(story, number)
    rating, sure = block.rating, block.certainty
    assert rating is not None, "_rated"
    order = path_order(block)
    figure, (axes,) = canvas(2.6)
    rank = np.arange(1, len(order) + 1)
    known = sure is not None and sure.known
    values = np.array([rating.scores[path] for path in order])
    if sure is not None and known:
        margins = np.array([sure.margins[path] for path in order])
        values, errors = margins[:, 0], margins[:, 1]
        axes.vlines(rank, values - 2 * errors, values + 2 * errors, color=RULE, linewidth=1.2, zorder=1)
    level = set(sure.level) if sure is not None else set()
    chosen = _chosen(story.run, number)
    marks = {
        "the winner": ([p == chosen for p in order], ORANGE, "D", 30),
        "within two errors of the best": ([p in level and p != chosen for p in order], BLUE, "o", 12),
        "told apart": ([p not in level and p != chosen for p in order], SOFT, "o", 7),
    }
    for i, (shown, colour, mark, size) in enumerate(marks.values()):
        at = np.flatnonzero(shown)
        if len(at):
            axes.scatter(
                rank[at], values[at], s=size, color=colour, marker=mark, zorder=3 - i * 0.3, linewidths=0
            ).set_gid(f"tip-paths-{number}-{i}")
    what = _plain(rating.score)
    axes.set(xlabel="paths, the best first", ylabel=f"behind the best, in {what}" if known else what)
    axes.yaxis.label.set_fontsize(7 if len(what) > 20 else 8)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if known or rating.better == "lower":
        axes.invert_yaxis()
    where = int(np.flatnonzero(marks["the winner"][0])[0]) if any(marks["the winner"][0]) else None
    if where is not None:
        axes.annotate(
            order[where],
            (rank[where], values[where]),
            xytext=(7, 3),
            textcoords="offset points",
            color=ORANGE,
            fontweight="bold",
            fontsize=8,
        )
    said = "no errors are kept; rate again to get them" if sure is None else sure.text()
    bars = "; lines: two standard errors of the difference" if known else ""
    heading(axes, f"Block {number}: {len(order)} paths", "\n".join(textwrap.wrap(said + bars, 58)))
    return figure


@drawn
def pareto(story: Story) -> Figure:
    """Score against multiply-adds: the Pareto front and the selection."""
    selected = story.selected
    assert selected is not None, "there is a selection"
    points, best = selected["front"]["points"], selected["top"][0]
    figure, (axes,) = canvas(2.8)
    macs, score = (np.array([point[key] for point in points], float) for key in ("macs", "score"))
    axes.step(macs, score, where="post", color=RULE, zorder=1)
    level = np.array([bool(point["level_with_best"]) for point in points])
    for i, (shown, colour, size) in enumerate(((~level, SOFT, 10), (level, BLUE, 16))):
        if shown.any():
            axes.scatter(macs[shown], score[shown], s=size, color=colour, zorder=2, linewidths=0).set_gid(
                f"tip-pareto-{i}"
            )
    axes.scatter([best["macs"]], [best["score"]], s=44, marker="D", color=ORANGE, zorder=4).set_gid("tip-pareto-2")
    _label(axes, best["macs"], best["score"], "best score", ORANGE)
    cheapest = selected.get("cheapest_level")
    if cheapest is not None and cheapest["architecture"] != best["architecture"]:
        axes.scatter(
            [cheapest["macs"]], [cheapest["score"]], s=44, facecolor="none", edgecolor=BLUE, linewidths=1.4, zorder=4
        ).set_gid("tip-pareto-3")
        _label(axes, cheapest["macs"], cheapest["score"], "cheapest not told apart", BLUE)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: layout.brief(value)))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set(xlabel="multiply-adds of an image", ylabel=_plain(selected["score"]))
    if selected["better"] == "lower":
        axes.invert_yaxis()
    axes.margins(x=0.12, y=0.12)
    said = f"{level.sum()} of its {len(points)} points cannot be told from the best" if level.any() else ""
    if len(points) == 1:
        said = "it has one point: the best architecture is the cheapest, too"
    heading(axes, "Score against cost: the Pareto front", said)
    return figure


@drawn
def effects(story: Story, number: int) -> Figure:
    """How much better than the block's mean the paths are that have a candidate in a layer."""
    block = _rated(story, number)
    rating = block.rating
    assert rating is not None, "_rated"
    sign = -1 if rating.better == "lower" else 1
    count = sum(len(layer) for layer in block.effects)
    figure, (axes,) = canvas(0.8 + 0.145 * (count + len(block.effects)))
    y, names, ticks = 0.0, [], []
    for number_of_layer, layer in enumerate(block.effects):
        for effect in layer:
            value = sign * effect.difference
            axes.plot([0, value], [y, y], color=SKY, linewidth=3.2, solid_capstyle="butt", zorder=1)
            if effect.error is not None:
                axes.plot([value - 2 * effect.error, value + 2 * effect.error], [y, y], color=INK, linewidth=0.9)
            axes.scatter([value], [y], s=10, color=BLUE, zorder=3)
            names.append(_short(effect.words))
            ticks.append(y)
            y += 1
        axes.annotate(
            f"layer {number_of_layer}",
            (0, ticks[-len(layer)] - 0.95),
            xycoords=axes.get_yaxis_transform(),
            xytext=(-4, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            color=SOFT,
            fontsize=7,
        )
        y += 1
    axes.axvline(0, color=SOFT, linewidth=0.6)
    axes.set_yticks(ticks, names)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(max(ticks) + 0.7, -1.5)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel(f"better than the mean by, in {_plain(rating.score)}")
    heading(axes, f"Block {number}: what a candidate changes", "bars: means of its paths; lines: two standard errors")
    return figure


@drawn
def curves(story: Story, names: Sequence[str] = ("loss", "spread", "lr", "images_per_second")) -> Figure:
    """Quantities of the training by step, a line for each block."""
    run = story.run
    lines = {f"block {block.number}": block.curves for block in run.blocks} if run.blocks else {"": run.curves}
    shown = [name for name in names if any(name in of for of in lines.values())]
    figure, panels = canvas(0.3 + 1.7 * len(shown), rows=len(shown))
    for axes, name in zip(panels, shown, strict=True):
        ends = []
        for i, (label, of) in enumerate(lines.items()):
            if name not in of:
                continue
            colour = LINES[i % len(LINES)]
            axes.plot(of["step"], of[name], color=colour, linestyle=DASHES[i % len(DASHES)])
            known = [(x, v) for x, v in zip(of["step"], of[name], strict=True) if not math.isnan(v)]
            if label and known:
                ends.append((known[-1][1], known[-1][0], label, colour))
        _end_labels(axes, ends)
        axes.grid(axis="y")
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        heading(axes, QUANTITIES[name])
    panels[-1].set_xlabel("optimizer steps" + (" of a block" if run.blocks else ""))
    return figure


@drawn
def evaluations(story: Story) -> Figure:
    """Accuracy on the validation images, of a retraining."""
    of = story.run.evaluations
    figure, (axes,) = canvas(2)
    ends = []
    for i, name in enumerate(name for name in ("top1", "top5") if name in of):
        axes.plot(of["step"], of[name], color=LINES[i], linestyle=DASHES[i], marker="o", markersize=3)
        ends.append((of[name][-1], of["step"][-1], QUANTITIES[name], LINES[i]))
    _end_labels(axes, ends)
    axes.grid(axis="y")
    axes.set(xlabel="optimizer steps", ylabel="share of the validation images")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    heading(axes, "Accuracy")
    return figure


@drawn
def agreement(story: Story, number: int) -> Figure:
    """Spearman's correlation between the six scores of a block's paths."""
    block = _rated(story, number)
    names = [_plain(name) for name in block.score_names]
    figure, (axes,) = canvas(2.6)
    _matrix(axes, block.score_agreement, names)
    heading(axes, f"Block {number}: do the scores agree?", "Spearman's correlation")
    return figure


@drawn
def seeds(story: Story) -> Figure:
    """Spearman's correlation between the runs, by block."""
    assert story.seeds, "several runs rated the same paths"
    names = [_short(run.folder.resolve().name) for run in story.runs]
    figure, panels = canvas(0.5 + (0.9 + 0.2 * len(names)) * len(story.seeds), rows=len(story.seeds))
    for number, (axes, matrix) in enumerate(zip(panels, story.seeds, strict=True)):
        _matrix(axes, matrix, names)
        heading(axes, f"Block {number}: do the seeds agree?")
    return figure


@drawn
def scatter(
    scores: Mapping[str, np.ndarray], accuracy: np.ndarray, rows: Mapping[str, Mapping[str, Any]], columns: int = 3
) -> Figure:
    """Accuracy against each score, a panel for each: density where there are many points, and the best score's choice.

    ``rows``: the figures of each score, of `ranking.correlation.report`.
    """
    columns = min(columns, len(scores))
    lines = math.ceil(len(scores) / columns)
    figure, panels = canvas(2.5 * lines, lines, columns, width=WIDTH if columns == 1 else 3.1 * columns)
    for axes, (name, score) in zip(panels, scores.items(), strict=False):
        if len(score) > 100 * CELLS:
            axes.hexbin(score, accuracy, gridsize=CELLS, cmap="Blues", mincnt=1, bins="log", linewidths=0.1)
        else:
            axes.scatter(score, accuracy, s=9, alpha=0.5, color=BLUE, linewidths=0)
        best = int(np.argmax(score))
        axes.scatter([score[best]], [accuracy[best]], s=40, marker="D", color=ORANGE, zorder=4)
        _label(axes, score[best], accuracy[best], f"{accuracy[best]:.2f}", ORANGE)
        row = rows[name]["kendall"]
        value = "not defined" if row["value"] is None else f"{row['value']:.2f}"
        interval = "" if row["low"] is None else f" [{row['low']:.2f}, {row['high']:.2f}]"
        axes.set(xlabel={"params": "parameters", "macs": "multiply-adds"}.get(name, _plain(name)), ylabel="accuracy, %")
        axes.xaxis.set_major_locator(MaxNLocator(4))
        if np.abs(score).max() > 1e4:
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: layout.brief(value)))
        heading(axes, f"Kendall {value}{interval}")
    for axes in panels[len(scores) :]:
        axes.remove()
    return figure


def tips(story: Story) -> dict[str, list[str]]:
    """gid -> the text of each of its points, in the order in which they are drawn."""
    result: dict[str, list[str]] = {}
    run = story.run
    if run.space is not None and run.architecture:
        cells = _cells(run)
        kinds = list(dict.fromkeys(one.kind for of_layer in cells for one in of_layer))
        of_layers = [layer for layer in run.layers if layer.block is not None]
        flat = [choice for path in run.architecture for choice in path]
        for x, (choice, layer) in enumerate(zip(flat, of_layers, strict=True)):
            text = (
                f"block {layer.block}, layer {layer.layer}: {layer.text}; {layer.channels:,} channels, "
                f"{layer.height}x{layer.width}; {layer.macs_share:.1%} of the multiply-adds"
            )
            result.setdefault(f"tip-fabric-{kinds.index(cells[x][choice].kind)}", []).append(text)
    for block in run.blocks:
        if block.rating is None:
            continue
        chosen, sure = _chosen(run, block.number), block.certainty
        for path in path_order(block):
            level = sure is not None and path in sure.level
            i = 0 if path == chosen else (1 if level else 2)
            behind = ""
            if sure is not None and path != sure.winner:
                margin, error = sure.margins[path]
                behind = f"; behind the best by {margin:.2g}" + (f" ± {error:.1g}" if math.isfinite(error) else "")
            text = f"{path}: {block.words[path]}; {block.rating.score} {block.rating.scores[path]:+.4f}{behind}"
            result.setdefault(f"tip-paths-{block.number}-{i}", []).append(text)
    if story.selected is not None:
        shown = [("tip-pareto-2", story.selected["top"][0])]
        if story.selected.get("cheapest_level") is not None:
            shown.append(("tip-pareto-3", story.selected["cheapest_level"]))
        shown += [(f"tip-pareto-{int(bool(p['level_with_best']))}", p) for p in story.selected["front"]["points"]]
        for gid, point in shown:
            error = point["behind_error_images"]
            behind = f"; behind the best by {point['behind']:.2g}" + ("" if error is None else f" ± {error:.1g}")
            text = (
                f"{point['architecture']}: {layout.brief(point['macs'])} multiply-adds, "
                f"{layout.brief(point['params'])} parameters; score {point['score']:+.4f}{behind}"
            )
            result.setdefault(gid, []).append(text)
    return result


def path_order(block: BlockStory) -> list[str]:
    """The block's paths, the best first."""
    rating = block.rating
    assert rating is not None, "asked for only where there is one"
    return sorted(rating.scores, key=rating.scores.__getitem__, reverse=rating.better == "higher")


def _rated(story: Story, number: int) -> BlockStory:
    return next(block for block in story.run.blocks if block.number == number and block.rating is not None)


def _chosen(run: RunStory, number: int) -> str:
    """The path that the search froze, or else the best."""
    if number < len(run.architecture):
        return encode(run.architecture[number])
    block = next(block for block in run.blocks if block.number == number)
    return path_order(block)[0]


def _cells(run: RunStory) -> list[list[Words]]:
    """Of each layer of the network, its candidates in words."""
    space = run.space
    assert space is not None, "a search has one"
    return [
        [words(space, block, layer, choice) for choice in range(len(space.candidates(block)))]
        for block in range(space.blocks)
        for layer in range(space.layers(block))
    ]


def _plain(name: str) -> str:
    return _short(name.replace("_", " "))


def _short(text: str) -> str:
    """A name that a figure has room for."""
    text = layout.printable(text)
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def _label(axes: Axes, x: float, y: float, text: str, colour: str) -> None:
    low, high = axes.get_xlim()
    right = x > (low + high) / 2
    axes.annotate(
        text,
        (x, y),
        xytext=(-8 if right else 8, 5),
        textcoords="offset points",
        ha="right" if right else "left",
        color=colour,
        fontsize=7.5,
        zorder=5,
    )


def _end_labels(axes: Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """Names at the lines' ends, moved apart where they would lie on each other."""
    if not ends:
        return
    low, high = axes.get_ylim()
    least = (high - low) * 0.11
    places: list[float] = []
    for value, *_ in sorted(ends):
        places.append(max(value, places[-1] + least) if places else value)
    down = max(0.0, places[-1] - high)
    for (value, x, text, colour), y in zip(sorted(ends), places, strict=True):
        axes.annotate(
            text,
            (x, value),
            xytext=(1.02, y - down),
            textcoords=axes.get_yaxis_transform(),
            color=colour,
            va="center",
            fontsize=7.5,
        )


def _matrix(axes: Axes, values: np.ndarray, names: Sequence[str]) -> None:
    """Correlations as figures on shades: blue for agreement, orange for the contrary."""
    n = len(names)
    for i in range(n):
        for j in range(n):
            value = values[i, j]
            if not math.isnan(value):
                axes.add_patch(
                    Rectangle(
                        (j - 0.5, i - 0.5),
                        1,
                        1,
                        facecolor=BLUE if value > 0 else ORANGE,
                        alpha=0.55 * abs(value),
                        linewidth=0,
                    )
                )
            axes.text(j, i, "–" if math.isnan(value) else f"{value:.2f}", ha="center", va="center", fontsize=7)
    axes.set(xlim=(-0.5, n - 0.5), ylim=(n - 0.5, -0.5))
    axes.set_yticks(range(n))
    axes.set_xticks(range(n), [str(i + 1) for i in range(n)])
    axes.set_yticklabels([f"{name}  {i + 1}" for i, name in enumerate(names)])
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
