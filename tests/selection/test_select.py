from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from torch import nn

from bossnas import cli, spaces
from bossnas.config.loading import dump, load
from bossnas.errors import ConfigError
from bossnas.files import write_json, write_text
from bossnas.runs.ratings import BlockRating, read_ratings
from bossnas.selection import combine, select
from bossnas.selection.graph import Graph, greedy, size
from bossnas.selection.pareto import dominated, nondominated
from bossnas.selection.text import lines as told
from bossnas.spaces import cost, hytra
from bossnas.spaces.cost import COSTS, CostTable
from bossnas.spaces.ops import NoAdapter, conv, conv_norm
from bossnas.spaces.paths import decode, encode

NAMES = ["macs", "params", "latency_ns"]


class Layer(nn.Module):
    """Three candidates; the last two halve the map, and cost alike."""

    def __init__(self, c_in):
        super().__init__()
        self.candidates = nn.ModuleList([conv_norm(c_in, 4, 3), conv_norm(c_in, 4, 3, 2), conv(c_in, 4, 3, 2)])

    def forward(self, x, choice, groups=1, stats=None):
        candidate = self.candidates[choice]
        return candidate(x) if choice == 2 else candidate(x, groups, stats)


class Tiny:
    """Three blocks of two layers. At most two layers of a block halve the map; after two, the next block has none."""

    blocks, view_pairs, stride = 3, 1, 8

    def layers(self, block):
        return 2

    def candidates(self, block):
        return ["keep", "halve", "halve_bare"]

    def stem(self):
        return nn.Identity()

    def layer(self, block, layer):
        return Layer(3 if block == layer == 0 else 4)

    def adapter(self, block):
        return NoAdapter()

    def neck_width(self, block):
        return 4

    def paths(self, block, winners):
        before = sum(c > 0 for c in winners[block - 1]) if block else 0
        return [(0, 0)] if before == 2 else list(itertools.product(range(3), repeat=2))

    def sample(self, block, winners, rng):
        return [(0, 0)]

    def describe(self, architecture):
        return {"halved": [sum(c > 0 for c in path) for path in architecture]}


def walk(table, ratings):
    """Every architecture that can be put together from rated paths, and its score, by brute force."""
    space, result = table.space, []

    def extend(winners, score):
        block = len(winners)
        if block == space.blocks:
            result.append((tuple(winners), score))
            return
        paths, prefix = space.paths(block, winners), [decode(text) for text in ratings[block].prefix]
        if prefix and paths != space.paths(block, prefix):
            return  # rated elsewhere
        for path in paths:
            value = ratings[block].scores.get(encode(path))
            if value is not None:
                extend([*winners, path], score + value)

    extend([], 0.0)
    return result


def random_ratings(table, seed=0, share=1.0, better="lower", values=None, low=-4.0):
    rng, ratings = np.random.default_rng(seed), []
    for block, starts in enumerate(table.starts):
        paths = sorted({path for start in starts for path in start.paths})
        draw = (lambda n: rng.choice(values, n)) if values else (lambda n: rng.uniform(low, low + 8, n))
        scores = {encode(p): float(v) for p, v in zip(paths, draw(len(paths)), strict=True) if rng.random() <= share}
        ratings.append(BlockRating(block, [], "x", better, scores, table.space.candidates(block)))
    return ratings


def with_random_latency(table, seed=1):
    rng = np.random.default_rng(seed)
    return table.with_latency(1000, {key: int(rng.integers(1, 10**7)) for key in table.entries})


@pytest.fixture(scope="module")
def tables():
    made = {"tiny": CostTable.of(Tiny(), 16)}
    for name, width, pixels in (("nats", 1.0, 32), ("hytra", 0.125, 32), ("mbconv", 1.0, 64)):
        space = spaces.make(name, width=width, image_size=pixels, restricted=True, split="cifar10")
        made[name] = CostTable.of(space, pixels)
    return {name: with_random_latency(table) for name, table in made.items()}


def check_against_brute_force(table, ratings, limits, count=5):
    """`best` and `front`, against all architectures enumerated; returns how many are feasible."""
    graph = Graph(table, ratings)
    sign = 1 if ratings[0].better == "lower" else -1
    everything = walk(table, ratings)
    costs = [table.cost(a) for a, _ in everything]
    feasible = [
        (sign * round(score, 9), a, c)
        for (a, score), c in zip(everything, costs, strict=True)
        if all(getattr(c, n) <= limit for n, limit in limits.items())
    ]
    assert graph.size() == len(everything)
    if not feasible:
        with pytest.raises(ConfigError):
            select.best(graph, limits, count)
        return 0
    feasible.sort(key=lambda one: one[:2])  # equal scores: by the text, as paths sort alike
    found = select.best(graph, limits, count)
    assert [tuple(s.architecture) for s in found] == [a for _, a, _ in feasible[:count]]
    assert [sign * s.score for s in found] == pytest.approx([score for score, _, _ in feasible[:count]], abs=1e-8)
    assert [s.cost for s in found] == [c for _, _, c in feasible[:count]]
    for name in NAMES:
        points = sorted({(getattr(c, name), score) for score, _, c in feasible})
        lowest = np.minimum.accumulate([score for _, score in points])
        wanted = [points[0]] + [p for p, before in zip(points[1:], lowest, strict=False) if p[1] < before]
        got = select.front(graph, limits, name)
        assert [(getattr(s.cost, name), sign * round(s.score, 9)) for s in got] == wanted
        for s in got:
            assert (sign * round(s.score, 9), tuple(s.architecture), s.cost) in feasible
    return len(feasible)


def quantile_limits(table, ratings, names, quantile):
    costs = [table.cost(a) for a, _ in walk(table, ratings)]
    return {name: int(np.quantile([getattr(c, name) for c in costs], quantile)) for name in names}


@pytest.mark.parametrize("names", [[], ["macs"], ["params"], ["latency_ns"], ["macs", "params"], NAMES])
@pytest.mark.parametrize("better", ["lower", "higher"])
def test_a_space_of_ones_own_against_brute_force(tables, names, better):
    for seed in range(4):
        ratings = random_ratings(tables["tiny"], seed, better=better, share=1.0 if seed % 2 else 0.7)
        for quantile in (0.02, 0.3, 0.7):
            check_against_brute_force(
                tables["tiny"], ratings, quantile_limits(tables["tiny"], ratings, names, quantile)
            )


@pytest.mark.parametrize("values", [[0.0], [1.0, 2.0], [-1.0, 0.0, 0.5]])
def test_ties_go_to_the_first_text(tables, values):
    for seed, names in enumerate(([], ["macs"], ["macs", "params"])):
        ratings = random_ratings(tables["tiny"], seed, values=values)
        limits = quantile_limits(tables["tiny"], ratings, names, 0.5)
        assert check_against_brute_force(tables["tiny"], ratings, limits, count=20) > 20


def test_all_of_nats_against_enumeration(tables):
    table = tables["nats"]
    assert size(table) == 8**5
    # a sum that favours large networks, as ratings do, so that limits bind
    ratings = random_ratings(table, 3, better="higher", low=0.0)
    for rating in ratings:
        for text in rating.scores:
            rating.scores[text] += sum(decode(text))
    for names in ([], ["macs", "params"], NAMES):
        assert check_against_brute_force(table, ratings, quantile_limits(table, ratings, names, 0.4), count=10) > 1000


def test_hytra_where_blocks_hand_over_scales(tables):
    table = tables["hytra"]
    assert size(table) == 1_615_872
    ratings = random_ratings(table, 4, share=0.25, low=-8.0)
    for names in ([], ["macs"], ["macs", "params"], NAMES):
        limits = quantile_limits(table, ratings, names, 0.3)
        assert check_against_brute_force(table, ratings, limits, count=10) > 20


def test_hytra_ratings_of_one_run_cover_what_starts_where_the_winners_ended(tables):
    """A run rates a block only from the scale at which the winner before it ended."""
    table = tables["hytra"]
    rng, winners, ratings = np.random.default_rng(0), [], []
    for block in range(4):
        paths = table.space.paths(block, winners)
        scores = {encode(p): float(rng.normal()) for p in paths}
        ratings.append(BlockRating(block, [encode(p) for p in winners], "x", "lower", scores, []))
        winners.append(decode(min(scores, key=scores.get)))
    graph = Graph(table, ratings)
    assert greedy(graph).architecture == winners
    ends = [hytra.SCALES[path[-1]] for path in winners]
    wanted = len(table.space.paths(3, winners[:3]))
    for block in range(3):
        wanted *= sum(hytra.SCALES[path[-1]] == ends[block] for path in table.space.paths(block, winners[:block]))
    assert graph.size() == wanted < size(table)
    assert check_against_brute_force(table, ratings, {}) == graph.size()


def test_mbconv_full_size_is_exact_where_blocks_add_up(tables):
    """6.9e10 architectures: without limits the best is the best of every block, and the second changes one block."""
    table = tables["mbconv"]
    assert size(table) == 4**18
    ratings = random_ratings(table, 5)
    first, second = select.best(Graph(table, ratings), {}, 2)
    ranked = [sorted(r.scores.values()) for r in ratings]
    assert first.score == pytest.approx(sum(values[0] for values in ranked), abs=1e-12)
    assert second.score - first.score == pytest.approx(min(values[1] - values[0] for values in ranked), abs=1e-12)


def test_mbconv_limits_against_an_independent_knapsack(tables):
    """A dynamic programme over the whole budget in coarse units of latency, written another way."""
    table, unit = tables["mbconv"], 10**6
    rng = np.random.default_rng(0)
    table = table.with_latency(0, {key: int(rng.integers(1, 9)) * unit for key in table.entries})
    ratings = random_ratings(table, 6)
    budget = 60
    least = np.zeros(budget + 1)
    for block, rating in enumerate(ratings):
        start = next(iter(table.starts[block]))
        after = np.full(budget + 1, np.inf)
        for text, value in rating.scores.items():
            units = table.path(block, decode(text), start.shape)[0].latency_ns // unit
            if units <= budget:
                after[units:] = np.minimum(after[units:], least[: budget + 1 - units] + value)
        least = after
    graph = Graph(table, ratings)
    for limit in range(budget + 1):
        if np.isfinite(least[limit]):
            assert select.best(graph, {"latency_ns": limit * unit}, 1)[0].score == pytest.approx(least[limit], abs=1e-9)
        else:
            with pytest.raises(ConfigError, match="^latency_ns: "):
                select.best(graph, {"latency_ns": limit * unit}, 1)


def test_top_architectures_are_distinct_and_ordered(tables):
    graph = Graph(tables["mbconv"], random_ratings(tables["mbconv"], 7))
    limits = {"macs": int(select.best(graph, {}, 1)[0].cost.macs * 0.9)}
    found = select.best(graph, limits, 50)
    assert len({tuple(s.architecture) for s in found}) == 50
    assert all(a.score <= b.score for a, b in itertools.pairwise(found))
    assert all(s.cost.macs <= limits["macs"] for s in found)


def test_scores_keep_their_precision(tables):
    """Scores that differ by 1e-14 of the largest are told apart, whatever the scale."""
    for scale in (1e-300, 1.0, 1e300):
        ratings = random_ratings(tables["tiny"], values=[1.0])
        ratings[1] = replace(ratings[1], scores={"00": 1.0, "01": 1.0 - 1e-14, "11": 1.0})
        ratings = [replace(r, scores={k: v * scale for k, v in r.scores.items()}) for r in ratings]
        graph = Graph(tables["tiny"], ratings)
        best = select.best(graph, {}, 1)[0]
        assert encode(best.architecture[1]) == "01" and best.score == pytest.approx(3 * scale, rel=1e-13)


def test_infeasible_limits_name_what_can_be_reached(tables):
    table = tables["tiny"]
    ratings = random_ratings(table)
    graph = Graph(table, ratings)
    costs = [table.cost(a) for a, _ in walk(table, ratings)]
    for name in NAMES:
        least = min(getattr(c, name) for c in costs)
        with pytest.raises(ConfigError) as caught:
            select.best(graph, {name: least - 1}, 1)
        assert caught.value.field == name and select.show(name, least) in caught.value.fix
        assert getattr(select.best(graph, {name: least}, 1)[0].cost, name) == least
    low = {name: min(getattr(c, name) for c in costs) for name in ("macs", "latency_ns")}
    assert not any(c.macs == low["macs"] and c.latency_ns == low["latency_ns"] for c in costs), "else choose a seed"
    for call in (lambda: select.best(graph, low, 1), lambda: select.front(graph, low, "params")):
        with pytest.raises(ConfigError) as caught:
            call()
        within = min(c.latency_ns for c in costs if c.macs <= low["macs"])
        assert f"`latency_ns` of {select.show('latency_ns', within)}" in str(caught.value)


def test_a_space_whose_paths_depend_on_more_than_the_last_winner_is_refused():
    class Forgetful(Tiny):
        def paths(self, block, winners):
            return [(0, 1)] if block == 2 and winners[0] == (0, 2) else super().paths(block, winners)

    table = CostTable.of(Forgetful(), 16)
    ratings = random_ratings(table)
    ratings[0].scores["02"] = ratings[2].scores["00"] = -9.0
    with pytest.raises(ConfigError, match="own_space.md"):
        select.best(Graph(table, ratings), {}, 1)


def test_greedy_that_leads_nowhere_is_none(tables):
    ratings = random_ratings(tables["tiny"])
    ratings[0].scores.update({"11": -9.0})  # halves twice, so that block 1 can only take 00
    del ratings[1].scores["00"]
    graph = Graph(tables["tiny"], ratings)
    assert greedy(graph) is None
    assert select.best(graph, {}, 1)[0].architecture[0] != (1, 1)


@pytest.mark.quick
def test_nondominated_rows_against_all_pairs():
    rng = np.random.default_rng(0)
    for _ in range(150):
        rows = rng.integers(0, rng.integers(2, 60), (rng.integers(1, 500), rng.integers(1, 6)))
        at_most, equal = (rows[:, None] <= rows).all(2), (rows[:, None] == rows).all(2)
        beaten = (at_most & ~equal).any(0) | np.triu(equal, 1).any(0)
        assert sorted(nondominated(rows)) == np.flatnonzero(~beaten).tolist()
        other = rng.integers(0, 60, (rng.integers(0, 300), rows.shape[1]))
        assert dominated(other, rows).tolist() == (rows[:, None] <= other).all(2).any(0).tolist()


# The command


@pytest.fixture
def run(tmp_path, tables):
    """A finished NATS run's files."""
    folder = tmp_path / "run"
    (folder / "ratings").mkdir(parents=True)
    config = load(None, ["space.name=nats", "space.image_size=32", f"out={folder}"])
    write_text(folder / "config.json", dump(config))
    both = random_ratings(tables["nats"], 0), random_ratings(tables["nats"], 1)
    for lower, higher in zip(*both, strict=True):
        write_json(
            folder / f"ratings/block_{lower.block}.json",
            {
                "block": lower.block,
                "prefix": [],
                "score": "population_centre",
                "paths": lower.scores,
                "better": {"population_centre": "lower", "view_agreement": "higher"},
                "candidates": lower.candidates,
                "scores": {"population_centre": lower.scores, "view_agreement": higher.scores},
            },
        )
    return folder


def select_json(run, *options):
    with pytest.raises(SystemExit) as caught:
        cli.main(["select", str(run), "--json", str(run / "selected.json"), *options])
    assert caught.value.code == 0
    return json.loads((run / "selected.json").read_text())


def test_the_command_selects(run, tables, capsys):
    result = select_json(run, "--max-macs", "30M", "--max-params", "60k", "--top", "3", "--front", "params")
    text = capsys.readouterr().out
    ratings = read_ratings(run)
    graph = Graph(tables["nats"], ratings)
    wanted = select.best(graph, {"macs": 30_000_000, "params": 60_000}, 3)
    assert [row["architecture"] for row in result["top"]] == ["|".join(map(encode, s.architecture)) for s in wanted]
    assert [row["score"] for row in result["top"]] == [s.score for s in wanted]
    assert all(row["macs"] <= 30e6 and row["params"] <= 60e3 and not row["exceeds"] for row in result["top"])
    assert result["limits"] == {"macs": 30_000_000, "params": 60_000}
    assert result["architectures"] == result["rated"] == 32768
    assert result["top"][0]["describe"] == tables["nats"].space.describe(wanted[0].architecture)
    winners = [min(r.scores, key=r.scores.get) for r in ratings]
    plain = tables["nats"].cost([decode(text) for text in winners])
    assert plain.params > 60_000, "else a limit that the winners exceed is not shown"
    exceeds = ["--max-macs"] * (plain.macs > 30_000_000) + ["--max-params"]
    assert result["greedy"]["paths"] == winners and result["greedy"]["exceeds"] == exceeds
    assert len(result["front"]["points"]) == len(select.front(graph, {"macs": 30_000_000, "params": 60_000}, "params"))
    assert all(row["architecture"] in text for row in [*result["top"], *result["front"]["points"]])
    assert all(f" {row['macs']:,} " in text and f" {row['params']:,} " in text for row in result["top"]), "to the unit"
    assert "at most 30,000,000 multiply-adds, 60,000 parameters" in " ".join(text.split())
    assert "the run's own width, 1, without a classifier" in text and max(map(len, text.splitlines())) <= 80
    assert sorted(f.name for f in run.iterdir()) == ["config.json", "ratings", "selected.json"]


def test_another_score_for_which_higher_is_better(run, tables):
    result = select_json(run, "--score", "view_agreement")
    best = sum(max(r.scores.values()) for r in read_ratings(run, "view_agreement"))
    assert result["better"] == "higher" and result["top"][0]["score"] == pytest.approx(best)
    assert result["top"][0]["score"] >= result["top"][-1]["score"]


def other_seed(run, seed):
    """The files of another run of the same search; its scores are a thousand times as large."""
    folder = run.with_name(f"seed{seed}")
    shutil.copytree(run, folder)
    for file in (folder / "ratings").glob("*.json"):
        values, rng = json.loads(file.read_text()), np.random.default_rng(seed)
        for scores in (values["paths"], *values["scores"].values()):
            scores.update({path: 1000 * rng.uniform() for path in scores})
        values["scores"][values["score"]] = values["paths"]
        write_json(file, values)
    return folder


def totals(ratings, how="sum"):
    """Of all combinations of the blocks' paths; blocks put together as one says; [8^5]."""
    blocks = [np.array(list(combine.combined(scores, how).values())) for scores in ratings]
    return np.add.outer(np.add.outer(blocks[0], blocks[1]), blocks[2]).ravel()


@pytest.mark.parametrize("how", ["sum", "standardised"])
@pytest.mark.parametrize("weight", [0.0, 1.0, 2.5])
def test_several_seeds_count_alike_and_size_by_its_weight(run, tables, capsys, how, weight):
    """The best of all architectures by a sum of standardised totals, which looks at every one of them."""
    runs = [run, other_seed(run, 5), other_seed(run, 6)]
    result = select_json(run, str(runs[1]), str(runs[2]), "--combine", how, "--top", "3", "--size-weight", str(weight))
    found = [[rating.scores for rating in read_ratings(r)] for r in runs]
    values = -sum(combine.standardised(totals(ratings, how)) for ratings in found)
    logs = np.log([8 * (i + 1) for i in range(8)])
    channels = [np.add.outer(logs, logs).ravel(), np.add.outer(logs, logs).ravel(), logs]
    values = combine.standardised(values) + weight * combine.standardised(
        np.add.outer(np.add.outer(channels[0], channels[1]), channels[2]).ravel()
    )
    names = ["|".join(parts) for parts in itertools.product(*(of.keys() for of in found[0]))]
    assert [row["architecture"] for row in result["top"]] == [names[i] for i in np.argsort(-values)[:3]]
    assert result["runs"] == [str(r) for r in runs] and (result["combine"], result["size_weight"]) == (how, weight)
    text = capsys.readouterr().out
    assert "of 3 runs" in text and (f"and size x {weight:g}" in text) == (weight > 0)
    assert (f", {how}" in text) == (how != "sum")


def test_size_does_not_count_where_all_have_the_same_channels(tmp_path, capfd, tables):
    folder = tmp_path / "run"
    (folder / "ratings").mkdir(parents=True)
    config = load(None, ["space.name=mbconv", "space.image_size=64", f"out={folder}"])
    write_text(folder / "config.json", dump(config))
    for rating in random_ratings(tables["mbconv"], 0):
        write_json(
            folder / f"ratings/block_{rating.block}.json",
            {
                "block": rating.block,
                "prefix": [],
                "score": "population_centre",
                "paths": rating.scores,
                "candidates": rating.candidates,
            },
        )
    with pytest.raises(SystemExit):
        cli.main(["select", str(folder), "--size-weight", "1"])
    assert "--size-weight: all rated architectures have the same numbers of channels" in capfd.readouterr().err


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda run, other: [shutil.rmtree(other), other.symlink_to(run)], "RUN: the same run is named twice"),
        (
            lambda run, other: write_text(other / "config.json", dump(load(None, ["space.name=nats"]))),
            "searched in another space",
        ),
        (
            lambda run, other: [damage(file, "score", "view_agreement") for file in (other / "ratings").glob("*.json")],
            "--score: ",
        ),
        (
            lambda run, other: damage(other / "ratings/block_1.json", "scores", {"population_centre": {"00": 1.0}}),
            "block 1 was rated with other paths in",
        ),
        (lambda run, other: (other / "ratings/block_2.json").unlink(), "has ratings of 2"),
        (lambda run, other: (other / "config.json").unlink(), "config.json"),
    ],
)
def test_runs_that_cannot_be_summed_are_refused(run, capfd, change, words):
    other = other_seed(run, 5)
    change(run, other)
    with pytest.raises(SystemExit) as caught:
        cli.main(["select", str(run), str(other)])
    errors = capfd.readouterr().err.splitlines()
    assert caught.value.code == 2 and len(errors) == 1 and words in errors[0], errors


def test_older_files_hold_one_score(run):
    for file in (run / "ratings").glob("*.json"):
        values = json.loads(file.read_text())
        file.write_text(json.dumps({k: v for k, v in values.items() if k not in ("better", "scores")}))
    assert [(r.score, r.better) for r in read_ratings(run)] == [("population_centre", "lower")] * 3
    with pytest.raises(ConfigError, match="has no score 'effective_rank'.*population_centre"):
        read_ratings(run, "effective_rank")


def latency_file(run, tables, change=lambda rows: rows):
    rows = tables["nats"].rows()
    for row, entry in zip(rows, [tables["nats"].stem, *tables["nats"].entries.values()], strict=True):
        row["latency_ms"] = entry.cost.latency_ms
    (run / "latency.json").write_text(json.dumps({"rows": change(rows)}))
    return str(run / "latency.json")


def test_latency_limits_by_a_table(run, tables):
    file = latency_file(run, tables)
    result = select_json(run, "--latency", file, "--max-latency-ms", "15.5", "--front", "latency_ms")
    wanted = select.best(Graph(tables["nats"], read_ratings(run)), {"latency_ns": 15_500_000}, 5)
    assert [row["latency_ms"] for row in result["top"]] == [s.cost.latency_ms for s in wanted]
    assert max(row["latency_ms"] for row in result["front"]["points"]) <= 15.5
    mbconv = {"macs": 5_919_137_280, "params": 57_294_464, "latency_ms": 1234.5678, "architecture": "0123|" * 4 + "01"}
    for row in (result["top"][0], result["greedy"]):
        row.update(mbconv)
    lines = told(result, 80)
    assert max(map(len, lines)) <= 80 and sum("5,919,137,280" in line and "1,234.568 ms" in line for line in lines) == 2


def damage(file, key, value):
    values = json.loads(file.read_text())
    if value is None:
        del values[key]
    else:
        values[key] = value
    file.write_text(json.dumps(values))


@pytest.mark.parametrize(
    "options, prepare, words",
    [
        (["--max-macs", "much"], None, "--max-macs: 'much' is no amount"),
        (["--max-macs", "nan"], None, "--max-macs: 'nan' is no amount"),
        (["--max-params", "-5M"], None, "--max-params: '-5M' is no amount"),
        (["--max-macs", "1K"], None, "--max-macs: no rated architecture has at most 1000 MACs, the smallest has"),
        (["--front", "time"], None, "--front: there is no cost 'time'"),
        (["--max-latency-ms", "3"], None, "--latency: is needed"),
        (["--front", "latency_ms"], None, "--latency: is needed"),
        (["--latency", "nowhere.json"], None, "--latency: cannot read nowhere.json"),
        (["--score", "beauty"], None, "--score: "),
        (["--size-weight", "-1"], None, "--size-weight: -1 is no weight"),
        (["--combine", "best"], None, "--combine: 'best' is not known"),
        (["--json", "/nowhere/a.json"], None, "--json: cannot write"),
        ([], lambda run: (run / "ratings/block_1.json").unlink(), "block_1.json"),
        ([], lambda run: (run / "ratings/block_2.json").unlink(), "RUN: has ratings of 2 of 3 blocks"),
        ([], lambda run: (run / "ratings/block_1.json").write_text("{"), "block_1.json is damaged"),
        ([], lambda run: (run / "ratings/block_1.json").write_text("[]"), "block_1.json is damaged"),
        ([], lambda run: (run / "ratings/block_1.json").write_bytes(b"\xff\xfe"), "block_1.json is damaged"),
        (
            [],
            lambda run: damage(run / "ratings/block_1.json", "scores", {"population_centre": {"00": float("nan")}}),
            "block_1.json is damaged (ValueError: path '00' has the score nan)",
        ),
        ([], lambda run: damage(run / "ratings/block_1.json", "scores", {"population_centre": {"0é": 1}}), "'0é'"),
        (
            [],
            lambda run: damage(run / "ratings/block_1.json", "scores", {"population_centre": {"099": 1}}),
            "block 1 has ratings of paths such as 099, which the space does not have",
        ),
        (
            ["--size-weight", "1"],
            lambda run: damage(run / "ratings/block_1.json", "scores", {"population_centre": {"099": 1}}),
            "block 1 has ratings of paths such as 099, which the space does not have",
        ),
        ([], lambda run: damage(run / "ratings/block_1.json", "block", 2), "block_1.json is damaged"),
        ([], lambda run: damage(run / "ratings/block_1.json", "prefix", ["00", "00"]), "its prefix is ['00', '00']"),
        ([], lambda run: damage(run / "ratings/block_1.json", "prefix", ["09"]), "block 1 was rated on 09, which"),
        ([], lambda run: damage(run / "ratings/block_1.json", "candidates", None), "block_1.json is damaged"),
        ([], lambda run: damage(run / "ratings/block_1.json", "score", "view_agreement"), "--score: the blocks of"),
        (
            [],
            lambda run: damage(run / "ratings/block_1.json", "scores", {"population_centre": {"00": 10**400}}),
            "path '00' has the score 1000",
        ),
        (
            [],
            lambda run: damage(run / "ratings/block_1.json", "scores", {"population_centre": {"00": -1e308}}),
            "path '00' has the score -1e+308",
        ),
        (
            [],
            lambda run: damage(run / "ratings/block_1.json", "better", {"population_centre": "higher"}),
            "RUN: the blocks of",
        ),
        ([], lambda run: (run / "ratings/block_1.json").write_text("[" * 100_000), "block_1.json is damaged"),
        ([], lambda run: (run / "config.json").unlink(), "config.json"),
        ([], lambda run: (run / "config.json").write_text("[" * 100_000), "config.json is damaged"),
        ([], lambda run: (run / "config.json").write_bytes(b"\xff\xfe"), "config.json is damaged"),
    ],
)
def test_mistakes_end_with_one_line_and_write_nothing(run, capfd, options, prepare, words):
    if prepare:
        prepare(run)
    before = sorted(run.rglob("*"))
    with pytest.raises(SystemExit) as caught:
        cli.main(["select", str(run), "--json", str(run / "selected.json"), *options])
    errors = capfd.readouterr().err.splitlines()
    assert caught.value.code == 2 and len(errors) == 1, errors
    assert errors[0].startswith("error: ") and words in errors[0]
    assert sorted(run.rglob("*")) == before


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda rows: rows[:100] + rows[101:], "has no latency for block"),
        (lambda rows: rows[1:], "the stem on 3x32x32"),
        (lambda rows: [{**row, "macs": row["macs"] // 2} for row in rows], "block 0 layer 0 candidate 0 (width8, "),
        (lambda rows: [{**row, "latency_ms": None} for row in rows], "the stem on 3x32x32"),
        (lambda rows: [{**row, "latency_ms": float("inf")} for row in rows], "the stem on 3x32x32"),
        (lambda rows: [{**row, "latency_ms": 10**400} for row in rows], "the stem on 3x32x32"),
        (lambda rows: [{**row, "latency_ms": 1e14} for row in rows], "the stem on 3x32x32"),
        (lambda rows: "none", "is not a table of latencies"),
    ],
)
def test_a_missing_latency_is_refused_and_never_guessed(run, tables, capfd, change, words):
    file = latency_file(run, tables, change)
    with pytest.raises(SystemExit) as caught:
        cli.main(["select", str(run), "--latency", file])
    errors = capfd.readouterr().err.splitlines()
    assert caught.value.code == 2 and len(errors) == 1 and words in errors[0], errors
    assert f"bossnas cost --config {run}/config.json --measure --json" in errors[0]


def test_costs_are_named_once():
    assert tuple(NAMES) == COSTS and set(select.FLAGS) == set(select.NAMES) == set(COSTS)
    assert cost.Cost(1, 2, 3) + cost.Cost(10, 20, 30) == cost.Cost(11, 22, 33)
