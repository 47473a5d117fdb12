"""What is done to pictures to make views of them: the table that every implementation of `augment_views` reads."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

# Columns of Looks.ints and of Looks.floats.
DOWN, RIGHT, FLIP, GREY, SOLARISE = 4, 5, 6, 11, 12
BOX, ORDER, SIGMA = slice(0, 4), slice(7, 11), 4
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # as the order names them, and the columns of their factors


class Looks(NamedTuple):
    """What is done to N pictures to make V views of each.

    ints: int32 [V, N, 13]. 0 top, 1 left, 2 height, 3 width of the crop, in pixels of the picture; 4 down, 5 right:
    shift of the view over the resized crop, black outside; 6 flip; 7..10 the colour operations in their order
    (0 brightness, 1 contrast, 2 saturation, 3 hue, -1 none); 11 grey; 12 solarise.
    floats: float32 [V, N, 5]. 0..2 factors of brightness, contrast, saturation; 3 hue in turns, -0.5..0.5; 4 sigma of
    the blur in pixels of the view, 0 for none.
    """

    ints: Tensor
    floats: Tensor
