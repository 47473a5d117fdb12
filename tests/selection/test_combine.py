from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from bossnas.selection import HOW, combine

pytestmark = pytest.mark.quick


def rating(seed, scale=1.0):
    """A block of two layers and one of one, eight candidates each."""
    rng = np.random.default_rng(seed)
    return [
        {"".join(p): scale * float(rng.normal(5, 1 + block)) for p in itertools.product("01234567", repeat=layers)}
        for block, layers in enumerate((2, 1))
    ]


@pytest.mark.parametrize("block", [0, 1])
def test_a_block_keeps_its_order_and_gets_the_scale_that_is_asked_for(block):
    scores = rating(0)[block]
    values, layers = np.array(list(scores.values())), 2 - block
    found = {how: combine.combined(scores, how) for how in HOW}
    for of in found.values():
        assert list(of) == list(scores) and stats.spearmanr(list(of.values()), values)[0] == pytest.approx(1)
    assert found["sum"] == scores
    assert list(found["standardised"].values()) == pytest.approx(((values - values.mean()) / values.std()).tolist())
    assert np.std(list(found["layers"].values())) == pytest.approx(layers**0.5)
    assert list(found["ranks"].values()) == pytest.approx((values.argsort().argsort() / (len(values) - 1)).tolist())


def test_equal_scores_stay_equal():
    for how in HOW:
        found = combine.combined({"0": 0.1, "1": 0.1, "2": 0.1}, how)
        assert len(set(found.values())) == 1 and np.isfinite(list(found.values())).all()
    assert list(combine.combined({"0": 3, "1": 1, "2": 3, "3": 0}, "ranks").values()) == pytest.approx(
        [5 / 6, 1 / 3, 5 / 6, 0]
    )
    assert combine.combined({"7": 2.5}, "ranks") == {"7": 0.0}


def test_every_rating_counts_alike_whatever_its_scale():
    def totals(blocks):
        return np.array([a + b for a, b in itertools.product(*(of.values() for of in blocks))])

    one, other = rating(0), rating(1, scale=1000.0)
    both = totals(combine.together([one, other], "sum"))
    truth = (totals(one) / totals(one).std() + totals(other) / totals(other).std()) / 2
    assert both == pytest.approx(truth)
    assert combine.together([one], "sum") == one
    assert combine.together([one, one], "layers")[0] == pytest.approx(
        {path: value / 3**0.5 for path, value in combine.combined(one[0], "layers").items()}
    )
    heavy = totals(combine.together([one, other], "sum", [1, 3]))
    assert heavy == pytest.approx((totals(one) / totals(one).std() + 3 * totals(other) / totals(other).std()) / 4)
    flat = [dict.fromkeys(block, 2.0) for block in one]
    assert stats.spearmanr(totals(combine.together([one, flat], "sum")), totals(one))[0] == pytest.approx(1)
