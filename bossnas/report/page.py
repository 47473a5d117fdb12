"""The report: one HTML page that needs nothing beside it. `page.html` has its structure; here is what it says."""

from __future__ import annotations

import base64
import hashlib
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure

from bossnas import __version__
from bossnas.layout import brief, exact, printable
from bossnas.report import figures, tables
from bossnas.report.gather import Story
from bossnas.report.svg import inline
from bossnas.report.tables import Cell, Head, Row, Table
from bossnas.runs.certainty import HELP
from bossnas.selection.ranking.report import rows
from bossnas.spaces.paths import encode

HERE = Path(__file__).parent
KINDS = {"search": "A search", "retraining": "A retraining"}
NOTES = (
    "The errors are over the validation images: how far a score would move with other images. Another seed of the "
    "training moves scores as well, often further.",
    "Two paths saw the same images, so a difference is often known better than either score. A path within two "
    "standard errors of the best cannot be told from it.",
)


@dataclass(frozen=True)
class Picture:
    svg: Markup
    title: str
    points: bool = False


@dataclass(frozen=True)
class Found:
    lines: list[tuple[str, str]]
    picture: Picture | None = None
    layers: Table | None = None


@dataclass(frozen=True)
class Sure:
    lines: list[tuple[str, str]]
    table: Table | None
    top: Table | None
    notes: Sequence[str] = field(default_factory=list)


def page(story: Story, command: str) -> str:
    """The whole page as text. ``command``: that which makes it."""
    run = story.run
    search = run.kind != "retraining"
    name = run.folder.resolve().name
    draw = _Drawing(story)
    script = (HERE / "page.js").read_text(encoding="utf-8")
    values: dict[str, Any] = {
        "version": __version__,
        "title": f"What {name} {'found' if search else 'trained'}",
        "about": _about(story),
        "command": command,
        "found": _found(story, draw) if search else _trained(story),
        "sure": _sure(story) if search else None,
        "state": _state(story),
        "changed": tables.changed(story),
        "settings": [(key, tables.shown(value)) for key, value in run.config.items()],
        "curves": _curves(story, draw),
        "blocks": _blocks(story, draw),
        "cost": _cost(story, draw),
        "agreement": _agreement(story, draw),
        "seeds": bool(story.seeds),
        "accuracy": _accuracy(story, draw),
        "machine": _machine(story),
        "warnings": tables.warnings(story),
        "css": Markup((HERE / "page.css").read_text(encoding="utf-8")),  # noqa: S704  (our own)
        "js": Markup(script),  # noqa: S704  (our own)
        "script_hash": "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }
    names = {
        "found": "What was found",
        "sure": "How sure",
        "settings": "Settings",
        "curves": "Training",
        "blocks": "Paths",
        "cost": "Cost",
        "agreement": "Agreement",
        "accuracy": "Accuracies",
        "machine": "Machine",
    }
    ids = {"blocks": "paths"}
    values["sections"] = [(ids.get(key, key), text) for key, text in names.items() if values[key]]
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, finalize=_harmless
    )
    template = environment.from_string((HERE / "page.html").read_text(encoding="utf-8"))
    return template.render(**values) + "\n"


class _Drawing:
    """Makes pictures of figures, each with a name of its own."""

    def __init__(self, story: Story):
        self.tips, self.count = figures.tips(story), 0

    def __call__(self, figure: Figure, title: str, description: str) -> Picture:
        self.count += 1
        svg = inline(figure, f"f{self.count}", title, description, self.tips)
        return Picture(svg, title, "data-tip" in svg)


def _about(story: Story) -> str:
    run = story.run
    text = (
        f"{KINDS.get(run.kind, run.kind.capitalize())}, {'finished' if run.finished else 'unfinished: ' + run.position}"
    )
    if run.space is not None:
        text += f"; space {run.config['space.name']}, {run.config['space.image_size']} pixels"
    if len(story.runs) > 1:
        others = ", ".join(str(other.folder) for other in story.runs[1:])
        text += f"; told together with {others}"
    return text + "."


def _found(story: Story, draw: _Drawing) -> Found | None:
    run = story.run
    if not run.architecture:
        return Found([("Nothing yet: the first block is not rated.", "lead")])
    text, whole = "|".join(map(encode, run.architecture)), story.run.space
    assert whole is not None, "of a search"
    part = (
        "" if len(run.architecture) == whole.blocks else f" ({len(run.architecture)} of {whole.blocks} blocks so far)"
    )
    lines = [
        (text + part, "found code strong"),
        (f"{run.summary}.", "lead"),
        (
            f"{brief(run.cost.macs)} multiply-adds for an image and {brief(run.cost.params)} parameters, of stem and "
            "searched layers.",
            "",
        ),
    ]
    said = f"The architecture {text}: {run.summary}."
    table = Table(
        "layers",
        "What each layer does, and its share of the cost",
        [
            Head("block"),
            Head("layer"),
            Head("what it does", True),
            Head("channels"),
            Head("map"),
            Head("MACs"),
            Head("parameters"),
        ],  # fmt: skip
        [
            Row(
                [
                    Cell("" if layer.block is None else str(layer.block)),
                    Cell("" if layer.layer is None else str(layer.layer)),
                    Cell(layer.text, kind="text"),
                    Cell(exact(layer.channels)),
                    Cell(f"{layer.height}×{layer.width}"),
                    Cell(f"{layer.macs_share:.1%}"),
                    Cell(f"{layer.params_share:.1%}"),
                ]
            )
            for layer in run.layers
        ],
    )
    return Found(lines, draw(figures.fabric(story), "What each layer does", said), table)


def _trained(story: Story) -> Found | None:
    result, of = story.run.result, story.run.evaluations
    lines: list[tuple[str, str]] = []
    best = result.get("best")
    if isinstance(best, dict) and _number(best.get("top1")) and isinstance(result.get("val_images"), int):
        share, images = float(best["top1"]), max(1, int(result["val_images"]))
        error = math.sqrt(share * (1 - share) / images)
        lines.append(
            (f"{share:.2%} ± {error:.2%} top-1 at best, on {exact(images)} validation images.", "found strong")
        )
        lines.append(("The error is the standard error of a share of so many images.", "soft"))
        for key, name in (("macs", "multiply-adds for an image"), ("params", "parameters")):
            if _number(result.get(key)):
                lines.append((f"{brief(result[key])} {name}.", ""))
    elif "top1" in of:
        lines.append((f"{max(of['top1']):.2%} top-1 at best so far.", "found strong"))
    else:
        lines.append(("No evaluation is done yet.", "lead"))
    return Found(lines)


def _sure(story: Story) -> Sure | None:
    run, rated = story.run, [block for block in story.run.blocks if block.rating is not None]
    if not rated:
        return None
    lines: list[tuple[str, str]] = []
    known = [block for block in rated if block.certainty is not None]
    undecided = [block.number for block in known if block.certainty is not None and block.certainty.nothing_told_apart]
    if not known:
        lines.append(
            (f"These ratings keep no errors. To get them: bossnas rate {shlex.quote(str(run.folder))}", "note")
        )
    if undecided:
        which = ", ".join(map(str, undecided))
        plural = "s" if len(undecided) > 1 else ""
        lines.append((f"Nothing is told apart in block{plural} {which}: any path would do as well. What helps: {HELP}.",
                      "note"))  # fmt: skip
    rows = []
    for block in rated:
        rating, sure = block.rating, block.certainty
        assert rating is not None, "rated"
        path = encode(run.architecture[block.number]) if block.number < len(run.architecture) else ""
        shown = path or figures.path_order(block)[0]
        value = rating.scores.get(shown)
        rows.append(
            Row(
                [
                    Cell(str(block.number)),
                    Cell(shown, kind="code text"),
                    Cell(block.words.get(shown, ""), kind="text"),
                    Cell("–" if value is None else f"{value:+.4f}"),
                    Cell("–" if (error := rating.error(shown)) is None else f"{error:.4f}"),
                    Cell("–" if rating.chance is None else f"{rating.chance:+.4f}"),
                    Cell("–" if sure is None or not sure.known else f"{len(sure.level)} of {len(rating.scores) - 1}"),
                ]
            )
        )
    score = rated[0].rating
    assert score is not None, "rated"
    heads = [Head("block"), Head("winner", True), Head("in words", True), Head(tables.plain(score.score)),
             Head("± over images"), Head("chance gives"), Head("others not told apart")]  # fmt: skip
    table = Table("sure-table", f"Winners by {tables.plain(score.score)} ({score.better} is better)", heads, rows)
    return Sure(lines + _selection(story), table, tables.top(story), NOTES if known else ())


def _selection(story: Story) -> list[tuple[str, str]]:
    selected = story.selected
    if selected is None:
        return [(f"No whole architectures are compared: {story.unselected}.", "")] if story.unselected else []
    best, cheapest = selected["top"][0], selected.get("cheapest_level")
    lines = [
        (
            f"The ratings cover {exact(selected['rated'])} of the space's {exact(selected['architectures'])} "
            f"architectures. The best score has {best['architecture']}.",
            "",
        )
    ]
    if cheapest is None:
        lines.append(("Which of them cannot be told apart is not known, since the ratings keep no errors.", ""))
    elif cheapest["architecture"] == best["architecture"]:
        lines.append(("No cheaper architecture of the Pareto front is as good within two standard errors.", ""))
    else:
        lines.append(
            (
                f"The cheapest that cannot be told from it is {cheapest['architecture']}, with "
                f"{brief(cheapest['macs'])} multiply-adds ({cheapest['macs'] / best['macs']:.0%}) and "
                f"{brief(cheapest['params'])} parameters.",
                "",
            )
        )
    return lines


def _state(story: Story) -> list[tuple[str, str]]:
    run = story.run
    rows = [
        ("run folder", str(run.folder)),
        ("kind", run.kind),
        ("state", "finished" if run.finished else f"unfinished, {run.position}"),
    ]
    rows += [(name, exact(count)) for name, count in run.faults.items() if count]
    if len(story.runs) > 1:
        rows.append(("other runs", ", ".join(str(other.folder) for other in story.runs[1:])))
    return rows


def _curves(story: Story, draw: _Drawing) -> list[Picture]:
    run, result = story.run, []
    of = [block.curves for block in run.blocks] or [run.curves]
    for name, title in (
        ("loss", "Loss"),
        ("spread", "Spread"),
        ("lr", "Learning rate"),
        ("images_per_second", "Speed"),
    ):
        if any(name in curves for curves in of):
            last = ", ".join(
                f"block {i}: {curves[name][-1]:.4g}" if run.blocks else f"{curves[name][-1]:.4g}"
                for i, curves in enumerate(of)
                if name in curves
            )
            result.append(draw(figures.curves(story, (name,)), f"{title} by step", f"At the end {last}."))
    if "top1" in run.evaluations:
        said = f"The last top-1 accuracy is {run.evaluations['top1'][-1]:.2%}."
        result.append(draw(figures.evaluations(story), "Accuracy by step", said))
    return result


def _blocks(story: Story, draw: _Drawing) -> list[dict[str, Any]]:
    result = []
    for block in story.run.blocks:
        if block.rating is None:
            continue
        best = figures.path_order(block)[0]
        said = f"{len(block.rating.scores)} paths. The best is {best}: {block.words[best]}."
        if block.certainty is not None:
            said += f" {block.certainty.text().capitalize()}."
        strongest = max(
            ((abs(e.difference), e.words, i) for i, layer in enumerate(block.effects) for e in layer),
            default=(0, "", 0),
        )
        changes = f"The largest change of the mean score comes from {strongest[1]} in layer {strongest[2]}."
        result.append(
            {
                "number": block.number,
                "picture": draw(figures.paths(story, block.number), f"Block {block.number}: all paths", said),
                "effects": draw(figures.effects(story, block.number), f"Block {block.number}: candidates", changes)
                if any(len(layer) > 1 for layer in block.effects)
                else None,
                "table": tables.paths(story, block),
            }
        )
    return result


def _cost(story: Story, draw: _Drawing) -> dict[str, Any] | None:
    if story.selected is None:
        return None
    points = story.selected["front"]["points"]
    first, last = points[0], points[-1]
    said = (
        f"{len(points)} points, from {first['architecture']} with {brief(first['macs'])} multiply-adds to "
        f"{last['architecture']} with {brief(last['macs'])}."
    )
    heads = [Head("architecture", True), Head("in words", True), Head("score"), Head("behind the best"),
             Head("± over images"), Head("multiply-adds"), Head("parameters")]  # fmt: skip
    rows = [
        Row(
            [
                Cell(point["architecture"], kind="code text"),
                Cell(point["words"], kind="text"),
                tables.figure_cell(point["score"], "+.5f"),
                tables.figure_cell(point["behind"], ".2g"),
                tables.figure_cell(math.nan if (e := point["behind_error_images"]) is None else e, ".1g"),
                Cell(exact(point["macs"]), point["macs"]),
                Cell(exact(point["params"]), point["params"]),
            ],
            "level" if point["level_with_best"] else "",
        )
        for point in points
    ]
    table = Table("front", f"The {len(rows)} architectures of the front as a table", heads, rows, sortable=True)
    return {"picture": draw(figures.pareto(story), "Score against multiply-adds", said), "table": table}


def _agreement(story: Story, draw: _Drawing) -> list[Picture]:
    result = []
    for block in story.run.blocks:
        if len(block.score_names) > 1:
            said = "Spearman's correlation between the scores of the block's paths, as figures in a square."
            title = f"Block {block.number}: agreement of the scores"
            result.append(draw(figures.agreement(story, block.number), title, said))
    if story.seeds:
        said = "Spearman's correlation between the runs' scores of each block's paths, as figures in squares."
        result.append(draw(figures.seeds(story), "Agreement of the seeds", said))
    return result


def _accuracy(story: Story, draw: _Drawing) -> dict[str, Any] | None:
    if story.accuracy is None:
        return None
    result = story.accuracy.result
    found = rows(result)

    def interval(row: Mapping[str, Any]) -> str:
        if row["value"] is None:
            return "–"
        return f"{row['value']:.3f}" + ("" if row["low"] is None else f" [{row['low']:.3f}, {row['high']:.3f}]")

    names = ("kendall", "spearman", "pearson")
    table = Table(
        "correlations",
        "Rank correlation with accuracy and its 95 % interval, beside what counting gives",
        [Head("score", True), *(Head(name.capitalize()) for name in names)],
        [
            Row([Cell(tables.plain(name), kind="text"), *(Cell(interval(row[key])) for key in names)])
            for name, row in found.items()
        ],
    )
    shown = {name: values for name, values in story.accuracy.scores.items() if name in found}
    figure = figures.scatter(shown, story.accuracy.accuracy, found, columns=2)
    said = f"Accuracy against {len(shown)} scores of {result['n']} architectures."
    line = f"{exact(result['n'])} architectures with a score and an accuracy, of {result['accuracy']}."
    return {"lines": [line], "picture": draw(figure, "Accuracy against scores", said), "table": table}


def _machine(story: Story) -> list[tuple[str, str]]:
    versions = [(str(key), tables.shown(value)) for key, value in story.run.versions.items() if value is not None]
    return [(key, value) for key, value in versions] + [
        (name, exact(count)) for name, count in story.run.faults.items()
    ]


def _harmless(value: Any) -> Any:
    """Every text that the template shows passes here; it is then escaped."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def command_of(folders: Iterable[Path], rest: Sequence[str] = ()) -> str:
    """The command that makes a report, as it is typed."""
    return shlex.join(["bossnas", "report", *map(str, folders), *rest])
