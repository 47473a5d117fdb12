"""Old door: the paths of a space, now in `bossnas.spaces.paths`. Files of own spaces import them here."""

from bossnas.spaces.paths import (
    MAX_CANDIDATES,
    Choices,
    all_paths,
    decode,
    encode,
    fair_sample,
    uniform_sample,
)

Path = Choices  # what a path was called here
__all__ = ["MAX_CANDIDATES", "Choices", "Path", "all_paths", "decode", "encode", "fair_sample", "uniform_sample"]
