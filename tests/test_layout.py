"""Figures and tables as text: prefixes, folding, and tables that are divided where they do not fit."""

from __future__ import annotations

import pytest

from bossnas import layout
from bossnas.layout import Column


def test_figures_have_separators_or_prefixes():
    assert layout.exact(1_234_567) == "1,234,567"
    figures = {
        0: "0",
        7: "7",
        999: "999",
        1000: "1.000 k",
        999_949: "999.9 k",
        999_950: "1.000 M",
        5_919_137_280: "5.919 G",
    }
    assert {value: layout.brief(value) for value in figures} == figures
    assert layout.brief(640, "B") == "640 B" and layout.brief(64_000_000, "B") == "64.00 MB"


def test_names_are_folded_at_their_joints():
    assert layout.fold("pooled_instance_discrimination + size", 20) == ["pooled_instance_", "discrimination +", "size"]
    assert layout.fold("runs/" + "x" * 25, 10) == ["runs/", "x" * 10, "x" * 10, "x" * 5]
    assert layout.fold("", 10) == [""] and layout.fold("0123|4567", 20) == ["0123|4567"]


@pytest.mark.parametrize("space", [40, 80, 200])
def test_a_wide_table_is_divided_and_no_figure_is_cut(space):
    columns = [
        Column("name", ["a_rather_long_name_of_a_score", "b"], text=True),
        *(Column(f"figure\n{i}", [f"{i}.123456", f"-{i}.5\n[0.1, 0.2]"]) for i in range(9)),
        Column("note", ["", "some words that may be folded where there is no room"], text=True),
    ]
    text = layout.table("A title", columns, space)
    whole = "\n".join(text)
    assert max(map(len, text)) <= space and text[0] == "A title"
    assert all(f"{i}.123456" in whole and f"-{i}.5" in whole for i in range(9)) and whole.count("[0.1, 0.2]") == 9
    tables = sum(line.startswith("name ") for line in text)
    assert tables == text.count("") + 1 and (tables == 1) == (space == 200), "each begins with the names"


def test_rows_without_figures_are_left_out_of_further_tables():
    columns = [
        Column("name", ["runs", "cannot"], text=True),
        Column("note", ["", "a reason"], text=True),
        Column("wide", ["1" * 30, ""]),
    ]
    text = layout.table("", columns, 40)
    assert sum("cannot" in line for line in text) == 1 and sum("runs" in line for line in text) == 1
