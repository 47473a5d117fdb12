"""Figures as SVG for a page: without what files need, with colours that the page sets, and texts for points."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

from bossnas.layout import printable
from bossnas.report import style

SVG, LINK = "http://www.w3.org/2000/svg", "{http://www.w3.org/1999/xlink}href"
COLOURS = {
    style.INK: "ink",
    style.SOFT: "soft",
    style.RULE: "rule",
    style.BLUE: "blue",
    style.ORANGE: "orange",
    style.GREEN: "green",
    style.PURPLE: "purple",
    style.SKY: "sky",
}
REFERENCE = re.compile(r"url\(#([^)]+)\)")
HEX = re.compile(r"#[0-9a-f]{6}")


def inline(
    figure: Figure, name: str, title: str, description: str, tips: Mapping[str, Sequence[str]] | None = None
) -> Markup:
    """The figure as an <svg> element. ``name``: distinct on the page; ``title``, ``description``: what it says to those
    who do not see it; ``tips``: by gid, the texts of a collection's points (`figures.tips`)."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({**style.RC, "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", facecolor="none", metadata={"Date": None, "Creator": None})
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in root.iter():
        for child in [child for child in parent if child.tag in (f"{{{SVG}}}metadata", f"{{{SVG}}}style")]:
            parent.remove(child)
    for element in root.iter():
        if "id" in element.attrib:
            element.set("id", f"{name}-{element.get('id')}")
        if LINK in element.attrib:
            element.set("href", f"#{name}-{element.attrib.pop(LINK)[1:]}")
        for key, value in list(element.attrib.items()):
            if "url(#" in value:
                value = REFERENCE.sub(rf"url(#{name}-\1)", value)
            if key == "style":
                value = HEX.sub(lambda found: f"var(--{COLOURS[found[0]]})" if found[0] in COLOURS else found[0], value)
            element.set(key, value)
    for gid, texts in (tips or {}).items():
        group = next((element for element in root.iter() if element.get("id") == f"{name}-{gid}"), None)
        points = [] if group is None else _points(group)
        if len(points) == len(texts):
            for point, text in zip(points, texts, strict=True):
                point.set("data-tip", printable(text))
    width, height = (float(str(root.get(side)).removesuffix("pt")) for side in ("width", "height"))
    for side in ("width", "height"):
        root.attrib.pop(side, None)
    root.set("viewBox", f"0 0 {width:g} {height:g}")
    root.set("style", f"max-width:{width * 4 / 3 * 1.15:.0f}px")
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-title {name}-description")
    for tag, text in (("desc", description), ("title", title)):
        element = ElementTree.Element(
            f"{{{SVG}}}{tag}", {"id": f"{name}-{'title' if tag == 'title' else 'description'}"}
        )
        element.text = printable(text)
        root.insert(0, element)
    ElementTree.register_namespace("", SVG)
    return Markup(ElementTree.tostring(root, encoding="unicode"))  # noqa: S704  (ElementTree has escaped every text)


def _points(group: ElementTree.Element) -> list[ElementTree.Element]:
    """The marks of a scatter plot's group, in order: few are paths, many are uses of one."""
    defined = {id(child) for defs in group.iter(f"{{{SVG}}}defs") for child in defs.iter()}
    marks = [e for e in group.iter() if e.tag in (f"{{{SVG}}}use", f"{{{SVG}}}path") and id(e) not in defined]
    return marks
