from __future__ import annotations

import json
import math

import numpy as np
import pytest

from bossnas.errors import ConfigError
from bossnas.files import write_json
from bossnas.runs.certainty import Parts, as_json, certainty, packed, unpacked
from bossnas.runs.ratings import read_ratings


def of_images(values, groups=64):
    """Scores and parts of values [paths, images]."""
    cut = np.array_split(values, groups, axis=1)
    images = np.array([part.shape[1] for part in cut], float)
    means = np.stack([part.mean(1) for part in cut], 1)
    scores = means @ images / images.sum()
    return dict(zip("abcdefgh", scores.tolist(), strict=False)), Parts(means - scores[:, None], images)


def test_the_error_is_that_of_a_mean_over_images():
    rng = np.random.default_rng(0)
    values = rng.normal(0, [[1.0], [3.0]], (2, 20_000))
    _, parts = of_images(values)
    assert parts.error(parts.values) == pytest.approx(values.std(1) / math.sqrt(20_000), rel=0.25)
    equal = Parts(rng.normal(size=(3, 16)), np.full(16, 5.0))
    assert equal.error(equal.values) == pytest.approx(equal.values.std(1, ddof=1) / 4)
    # a group that is empty but for one image counts by its share
    uneven = Parts(np.concatenate([equal.values, np.full((3, 1), 100.0)], 1), np.array([5e9] * 16 + [1.0]))
    assert uneven.error(uneven.values) == pytest.approx(equal.error(equal.values), rel=0.01)


@pytest.mark.parametrize("better", ["lower", "higher"])
def test_a_difference_is_sharper_than_its_scores_since_both_saw_the_same_images(better):
    rng = np.random.default_rng(1)
    sign = 1 if better == "lower" else -1
    images = rng.normal(0, 1, 4000)
    offsets = np.array([0.0, 0.1, 0.001, 0.5])
    values = images + sign * offsets[:, None] + rng.normal(0, 0.05, (4, 4000))
    found = certainty(*of_images(values), better)
    assert found.winner in "ac" and found.paths == 4 and found.error == pytest.approx(1 / math.sqrt(4000), rel=0.3)
    assert found.level == [({"a", "c"} - {found.winner}).pop()] and not found.nothing_told_apart
    margin, error = found.margins["b"]
    assert margin == pytest.approx(0.1, abs=0.01) and error < 0.1 * found.error
    assert found.margins[found.winner] == (0, 0)
    assert found.text() == "1 of the 3 other paths lies within two standard errors of it"


@pytest.mark.quick
def test_nothing_is_told_apart():
    rng = np.random.default_rng(2)
    found = certainty(*of_images(rng.normal(0, 1, (5, 640))), "lower")
    assert found.nothing_told_apart and "nothing is told apart: all 5 paths" in found.text()
    same = certainty(*of_images(np.ones((3, 640)) * 7), "lower")  # within rounding
    assert same.nothing_told_apart
    one = certainty(*of_images(rng.normal(0, 1, (1, 640))), "lower")
    assert not one.nothing_told_apart and "none of the 0 other" in one.text()
    few = certainty(*of_images(rng.normal(0, 1, (5, 6)), groups=6), "lower")
    assert not few.known and not few.nothing_told_apart and "too few validation images" in few.text()


def rating(folder, change=lambda values: None):
    scores, parts = of_images(np.random.default_rng(3).normal(0, 1, (4, 640)))
    named = {"x": scores}
    values = {
        "block": 0,
        "prefix": [],
        "score": "x",
        "better": {"x": "lower"},
        "candidates": [],
        "paths": scores,
        "scores": named,
        "chance": {"x": -2.5},
        **as_json(named, {"x": parts}, {"x": "lower"}),
    }
    change(values)
    (folder / "ratings").mkdir(exist_ok=True)
    write_json(folder / "ratings/block_0.json", json.loads(json.dumps(values)))
    return scores, parts


def test_a_file_keeps_it(tmp_path):
    scores, parts = rating(tmp_path)
    (found,) = read_ratings(tmp_path)
    assert found.chance == -2.5 and found.certainty is not None
    assert found.certainty.winner == certainty(scores, parts, "lower").winner
    assert np.allclose(found.parts.values, parts.values, atol=1e-6)
    kept = json.loads((tmp_path / "ratings/block_0.json").read_text())
    assert list(kept["errors"]["x"]) == list(scores) and kept["behind_winner"]["x"][found.certainty.winner] == [0, 0]
    assert unpacked(packed(parts.values), [10] * 64, 4).values.shape == (4, 64)


def test_files_of_before_still_read(tmp_path):
    rating(tmp_path, lambda values: [values.pop(key) for key in ("errors", "behind_winner", "groups", "chance")])
    (found,) = read_ratings(tmp_path)
    assert found.certainty is None and found.chance is None


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v["groups"]["images"].pop(),
        lambda v: v["groups"].update(images=[0] * 64),
        lambda v: v["groups"].update(images="many"),
        lambda v: v["groups"]["means"].update(x="?"),
        lambda v: v["groups"]["means"].update(x=packed(np.full((4, 64), np.nan))),
        lambda v: v["groups"]["means"].pop("x"),
        lambda v: v.update(groups=[1]),
        lambda v: v.update(chance={"x": "low"}),
        lambda v: v.update(chance=3),
    ],
)
def test_damage_costs_one_line(tmp_path, change):
    rating(tmp_path, change)
    with pytest.raises(ConfigError, match="block_0.json is damaged"):
        read_ratings(tmp_path)
