"""Old door: the paths of a space, now in `bossnas.spaces.paths`. Files of own spaces import them here."""

from bossnas.spaces.paths import (
    MAX_CANDIDATES as MAX_CANDIDATES,
    Path as Path,
    all_paths as all_paths,
    decode as decode,
    encode as encode,
    fair_sample as fair_sample,
    uniform_sample as uniform_sample,
)
