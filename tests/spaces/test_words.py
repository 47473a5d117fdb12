from __future__ import annotations

import pytest

from bossnas import spaces
from bossnas.spaces import words
from bossnas.spaces.cost import CostTable, read_architecture


def described(name, text, size=32, width=0.125):
    space = spaces.make(name, width=width, image_size=size)
    return space, read_architecture(space, text), CostTable.of(space, size)


@pytest.mark.quick
def test_hytra_in_words():
    space, architecture, table = described("hytra", "5433|3230|0010|0000")
    assert words.path_words(space, 0, architecture[0]) == (
        "convolution at 1/4, convolution at 1/8, 2 x convolution at 1/16"
    )
    assert words.summary(space, architecture) == (
        "9 attention, 7 convolution; 1 at 1/4, 1 at 1/8, 5 at 1/16, 9 at 1/32"
    )
    assert words.drawn_rows(space) == ["1/32", "1/16", "1/8", "1/4"]
    rows = words.layers(table, architecture)
    assert [row.text for row in rows[:2]] == ["stem", "convolution at 1/4"] and len(rows) == 17
    assert [(row.height, row.channels) for row in rows[1:5]] == [(8, 32), (4, 64), (2, 128), (2, 128)]
    assert sum(row.macs for row in rows) == table.cost(architecture).macs
    assert sum(row.macs_share for row in rows) == pytest.approx(1) == sum(row.params_share for row in rows)
    assert max(map(len, words.lines(rows, 80))) <= 80


def test_the_other_spaces_in_words():
    space, architecture, table = described("mbconv", "01|0123|0000|3333|2100")
    assert words.path_words(space, 0, architecture[0]) == "3x3 expand 6, 5x5 expand 6"
    assert words.summary(space, architecture) == (
        "8 of 3x3 expand 6, 3 of 5x5 expand 6, 2 of 3x3 expand 3, 5 of 5x5 expand 3"
    )
    assert max(map(len, words.lines(words.layers(table, architecture), 80))) <= 80
    space, architecture, table = described("nats", "07|12|7", width=1.0)
    assert words.summary(space, architecture) == "1 of 8 channels, 2 of 64 channels, 1 of 16 channels, 1 of 24 channels"
    rows = words.layers(table, architecture)
    assert [row.channels for row in rows] == [8, 64, 16, 24, 64]
    assert not any(row.text == "stem" for row in rows)  # its stem belongs to the first layer


def test_a_space_that_says_nothing_of_itself():
    class Plain:
        blocks = 2

        def layers(self, block):
            return 2

        def candidates(self, block):
            return ["thin", "thick"]

    assert words.words(Plain(), 0, 1, 1) == spaces.Words("thick", "thick")
    assert words.path_words(Plain(), 0, (1, 1)) == "2 x thick"
    assert words.summary(Plain(), [(0, 1), (1, 1)]) == "1 of thin, 3 of thick"
    assert words.drawn_rows(Plain()) == ["thin", "thick"]
