from __future__ import annotations

import math
import re

import made_run
import numpy as np
import pytest

from bossnas import cli
from bossnas.runs.certainty import Parts
from bossnas.runs.ratings import BlockRating
from bossnas.selection import combine
from bossnas.selection.doubt import Doubt
from bossnas.selection.select import select
from bossnas.spaces.paths import encode

PATHS = [(0, 0), (0, 1), (1, 0), (1, 1)]
ONE, OTHER = [(0, 1), (1, 1)], [(1, 0), (0, 0)]


def run(seed, images=(20.0,) * 32, scale=1.0):
    """Two blocks whose images' parts go together."""
    rng, blocks = np.random.default_rng(seed), []
    common = rng.normal(0, 1, (4, len(images)))
    for block in range(2):
        values = common + 0.1 * rng.normal(0, 1, common.shape)
        scores = {encode(path): scale * float(v) for path, v in zip(PATHS, rng.normal(0, 1, 4), strict=True)}
        blocks.append(BlockRating(block, [], "x", "lower", scores, [], Parts(scale * values, np.array(images))))
    return blocks


def doubt(runs, how="sum"):
    return Doubt(runs, combine.scales([[rating.scores for rating in ratings] for ratings in runs], how))


def test_blocks_saw_the_same_images():
    blocks = run(0)
    off = sum(
        r.parts.values[PATHS.index(a)] - r.parts.values[PATHS.index(b)]
        for r, a, b in zip(blocks, ONE, OTHER, strict=True)
    )
    assert doubt([blocks]).over_images(ONE, OTHER) == pytest.approx(off.std(ddof=1) / math.sqrt(32))
    assert doubt([blocks]).over_images(ONE, ONE) == 0 and doubt([blocks]).over_seeds(ONE, OTHER) is None
    # a block that was rated again on other groups of images is independent of the others
    other = [blocks[0], run(5, images=(10.0,) * 16)[1]]
    parts = [
        r.parts.error(r.parts.values[PATHS.index(a)] - r.parts.values[PATHS.index(b)])
        for r, a, b in zip(other, ONE, OTHER, strict=True)
    ]
    assert doubt([other]).over_images(ONE, OTHER) == pytest.approx(math.hypot(*parts))


@pytest.mark.parametrize("how", ["sum", "standardised", "layers"])
@pytest.mark.parametrize("seeds", [1, 3])
def test_errors_are_in_the_units_of_the_combined_score(how, seeds):
    """Scores and parts of other units give the same combined scores, so also the same errors."""
    plain, large = ([run(seed, scale=scale) for seed in range(seeds)] for scale in (1.0, 1000.0))
    both = [doubt(runs, how).over_images(ONE, OTHER) for runs in (plain, large)]
    assert both[1] == pytest.approx(both[0] * (1000 if how == "sum" and seeds == 1 else 1))


def test_several_seeds():
    runs = [run(seed) for seed in range(4)]
    scores = [[rating.scores for rating in ratings] for ratings in runs]
    scales = combine.scales(scores, "standardised")
    together = combine.together(scores, "standardised")
    each = [
        sum(
            scale * (rating.scores[encode(a)] - rating.scores[encode(b)])
            for scale, rating, a, b in zip(of_run, ratings, ONE, OTHER, strict=True)
        )
        for of_run, ratings in zip(scales, runs, strict=True)
    ]
    difference = sum(block[encode(a)] - block[encode(b)] for block, a, b in zip(together, ONE, OTHER, strict=True))
    assert sum(each) == pytest.approx(difference)
    assert doubt(runs, "standardised").over_seeds(ONE, OTHER) == pytest.approx(np.std(each, ddof=1) * 4 / 2)


def test_where_no_error_is_known():
    assert doubt([run(0)], "ranks").over_images(ONE, OTHER) is None
    old = [BlockRating(b, [], "x", "lower", r.scores, []) for b, r in enumerate(run(0))]
    assert not doubt([old]).known and doubt([old]).over_images(ONE, OTHER) is None
    assert doubt([old]).level(0.5, 1.0, (None, None)) is None
    assert doubt([run(0, images=(9.0,) * 4)]).over_images(ONE, OTHER) is None  # too few groups
    sure = doubt([run(0)])
    assert sure.level(0.19, 1.0, (0.1, None)) and not sure.level(0.21, 1.0, (0.1, None))
    assert sure.level(0.3, 1.0, (0.1, 0.2))  # the larger error counts


def selected(*folders, **more):
    return select(list(folders), top=20, front_cost="macs", **more)


def test_a_selection_marks_what_cannot_be_told_apart(tmp_path):
    """Block 0 tells its paths apart, the others do not: architectures are level if they begin alike."""
    result = selected(made_run.make(tmp_path / "a"))
    best = result["top"][0]
    assert best["architecture"].startswith("00|") and best["level_with_best"] and best["behind"] == 0
    assert all(row["level_with_best"] == row["architecture"].startswith("00|") for row in result["top"])
    assert all(row["behind_error_images"] > 0 and row["behind_error_seeds"] is None for row in result["top"][1:])
    level = [row for row in result["front"]["points"] if row["level_with_best"]]
    assert result["cheapest_level"] == min(level, key=lambda row: row["macs"])
    assert "_" not in result["cheapest_level"]["words"]


def test_the_spread_over_seeds_stands_beside_it(tmp_path, capsys):
    folders = [made_run.make(tmp_path / str(seed), seed=seed) for seed in range(3)]
    result = selected(*folders)
    assert all(row["behind_error_seeds"] is not None for row in result["top"])
    with pytest.raises(SystemExit) as ended:
        cli.main(["select", *map(str, folders), "--top", "3"])
    printed = capsys.readouterr().out
    assert ended.value.code == 0 and "seeds" in printed and max(map(len, printed.splitlines())) <= 80


def test_ratings_without_errors_say_so(tmp_path, capsys):
    folder = made_run.make(tmp_path / "old", errors=False)
    result = selected(folder)
    assert "cheapest_level" not in result and result["top"][0]["level_with_best"] is None
    with pytest.raises(SystemExit):
        cli.main(["select", str(folder)])
    assert f"bossnas rate {folder}" in " ".join(capsys.readouterr().out.split())


def test_the_config_of_a_retraining_is_written_once(tmp_path, capsys):
    folder, file = made_run.make(tmp_path / "a"), tmp_path / "again.yaml"
    for code, words in (
        (0, f"bossnas retrain --config {file}"),
        (2, "--write-config: .*exists; name a new .yaml file"),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main(["select", str(folder), "--write-config", str(file)])
        said = capsys.readouterr()
        assert ended.value.code == code and re.search(words, said.out + said.err)
    with pytest.raises(SystemExit) as ended:
        cli.main(["select", str(folder), "--write-config", str(tmp_path / "a.json")])
    assert ended.value.code == 2 and "is no .yaml file" in capsys.readouterr().err
