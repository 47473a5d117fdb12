"""The rating study under bench/accuracy: its runs, its faults of the original release, its report."""

from __future__ import annotations

import importlib.util
import io
import itertools
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from bossnas.supernet.scores import BETTER

TINY = [
    "space.width=0.125",
    "heads.hidden=16",
    "heads.out=8",
    "data.val_images=12",
    "train.batch=8",
    "train.micro_batch=8",
    "train.steps_per_epoch=2",
    "train.warmup_epochs=0",
    "rating.batch=12",
    "rating.calibration_images=16",
    "space.image_size=8",
]


def load(name):
    path = list(sys.path)
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[2] / f"bench/accuracy/{name}.py")
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    sys.path[:] = path
    return sys.modules[name]


study, report, counts = load("study"), load("report"), load("agreement")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of shards with 40 images to train and 12 to validate."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name, count in (("train-0", 40), ("test-0", 12)):
        with tarfile.open(folder / f"{name}.tar", "w") as tar:
            for i in range(count):
                file = io.BytesIO()
                pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
                Image.fromarray(pixels).resize((32, 32), Image.Resampling.BILINEAR).save(file, "JPEG")
                member = tarfile.TarInfo(f"{name}-{i}.jpg")
                member.size = file.tell()
                tar.addfile(member, io.BytesIO(file.getvalue()))
    return str(folder)


@pytest.fixture(scope="module")
def plain(images):
    return study.run(study.Setting(("train.objective=bootstrap",)), 0, images, TINY)


def values(run, block, score, moment="end"):
    return list(run["blocks"][block]["ratings"][moment][score].values())


def test_a_setting_is_rated_on_its_way_and_at_its_end(plain, images):
    assert [len(values(plain, block, "effective_rank")) for block in range(3)] == [64, 64, 8]
    for block in plain["blocks"]:
        assert set(block["ratings"]["end"]) == set(BETTER)
        assert block["winner"] == max(block["ratings"]["end"][study.OWN], key=block["ratings"]["end"][study.OWN].get)
    assert plain["blocks"][2]["prefix"] == [block["winner"] for block in plain["blocks"][:2]]
    assert 0 < plain["cpu_seconds"]["train"] < plain["cpu_seconds"]["all"] and plain["sets"][-len(TINY) :] == TINY
    midway = study.run(study.Setting(("train.objective=bootstrap",), rate_at=(2,)), 0, images, TINY)
    assert midway["blocks"][0]["ratings"]["2"] != midway["blocks"][0]["ratings"]["end"]
    for ours, theirs in zip(midway["blocks"], plain["blocks"], strict=True):  # a rating on the way changes nothing
        assert ours["ratings"]["end"] == theirs["ratings"]["end"]
    untrained = study.run(study.SETTINGS["untrained"], 0, images, TINY)
    assert untrained["cpu_seconds"]["train"] == 0 and values(untrained, 0, "effective_rank") != values(
        plain, 0, "effective_rank"
    )


@pytest.mark.parametrize(
    "fault, first_block, scores",
    [
        ("stacked", 0, set(BETTER)),
        ("prefix", 1, set(BETTER)),
        ("norms", 0, set(BETTER)),
        ("adapters", 0, set(BETTER)),
        ("predictor", 0, {"population_centre"}),
        ("all", 0, set(BETTER)),
    ],
)
def test_a_fault_changes_what_it_says_and_nothing_before(plain, images, fault, first_block, scores):
    """``first_block``: the first whose ratings change; ``scores``: those that do there."""
    faulty = study.run(study.SETTINGS[f"fault-{fault}"], 0, images, TINY)
    for block in range(first_block):
        assert faulty["blocks"][block]["ratings"] == plain["blocks"][block]["ratings"]
    changed = {score for score in BETTER if values(faulty, first_block, score) != values(plain, first_block, score)}
    assert changed == scores


def test_the_prefix_goes_on_training_and_the_target_follows_with_its_own(images, monkeypatch):
    config = study.load(None, [*study.BASE, f"data.train={images}/train-*.tar", f"data.val={images}/test-*.tar", *TINY])
    run = study.build(config)
    study.winners.freeze_winner(run, (3, 5))
    before = {
        name: [p.clone() for p in network.part(0)["block"].parameters()]
        for name, network in (("online", run.online), ("target", run.target))
    }
    seen, remember = [], study._BehindOwnPrefix.remember

    def watch(self, features, views, prefix):
        remember(self, features, views, prefix)
        seen.extend([features[0], self.own[id(features[0])]])

    monkeypatch.setattr(study._BehindOwnPrefix, "remember", watch)
    setting = study.Setting(faults=("prefix",))
    assert list(study.training(run, setting)) == [1, 2, 3, 4]
    moved = {
        name: sum(
            not torch.equal(p, q) for p, q in zip(before[name], network.part(0)["block"].parameters(), strict=True)
        )
        for name, network in (("online", run.online), ("target", run.target))
    }
    assert moved["online"] == moved["target"] > 0
    ours, theirs = seen[-2:]
    assert ours.requires_grad and not theirs.requires_grad and not torch.equal(ours, theirs)
    assert 0.5 < ours.std() / theirs.std() < 2, "both have the statistics of the batch"
    study.rate_all(run, setting)
    (x,) = study.rating.Calibration(run)
    calibrated = run.target.features([(3, 5)], x)
    run.target.part(0).train()
    assert torch.allclose(run.target.features([(3, 5)], x), calibrated, atol=0.05), "it is calibrated where it is now"


def test_blocks_in_parallel_are_rated_too(images):
    found = study.run(study.SETTINGS["instance-parallel"], 0, images, TINY)
    assert [len(values(found, block, study.OWN)) for block in range(3)] == [64, 64, 8]


def test_runs_are_shared_and_never_made_twice(images, tmp_path, capsys):
    arguments = ["--data", images, "--out", str(tmp_path), "--only", "untrained", "--seeds", "0", "1", "--set", *TINY]
    (tmp_path / "untrained-seed1.begun").touch()  # another process is at it
    study.main(arguments)
    busy = f"untrained, seed 1: begun by another process (if there is none, remove {tmp_path}/untrained-seed1.begun)\n"
    assert capsys.readouterr().out == "untrained, seed 0\n" + busy
    assert sorted(f.name for f in tmp_path.iterdir()) == ["untrained-seed0.json", "untrained-seed1.begun"]
    study.main(arguments)
    assert capsys.readouterr().out == busy
    with pytest.raises(SystemExit) as end:
        study.main(["--data", "nowhere", "--out", str(tmp_path / "other"), "--only", "untrained"])
    assert end.value.code == 2 and "no file matches 'nowhere/train-*.tar'" in capsys.readouterr().err
    assert not list((tmp_path / "other").iterdir())


# ---- the report


CHANNELS = list(itertools.product(range(8, 65, 8), repeat=5))[::7]  # 7 is prime to 8: every path is there


@pytest.fixture(scope="module")
def accuracy():
    """It grows with the channels of every layer, in the first block as far as the third width only."""
    c = np.array(CHANNELS) / 8
    return np.minimum(c[:, :2], 3).sum(1) + np.log(c[:, 2:]).sum(1)


def ratings(seed, noise, first=lambda ids: np.minimum(ids, 2).sum()):
    rng = np.random.default_rng(seed)
    blocks = [list(itertools.product(range(8), repeat=layers)) for layers in (2, 2, 1)]
    return [
        {
            "".join(map(str, ids)): float(
                (first(np.array(ids)) if b == 0 else np.log1p(ids).sum()) + noise * rng.normal()
            )
            for ids in paths
        }
        for b, paths in enumerate(blocks)
    ]


def write_runs(folder, setting, seeds, noise):
    for seed in seeds:
        blocks = [
            {"ratings": {"end": {"effective_rank": scores}}, "prefix": [], "winner": ""}
            for scores in ratings(seed, noise)
        ]
        (folder / f"{setting}-seed{seed}.json").write_text(
            json.dumps({"setting": setting, "seed": seed, "blocks": blocks, "cpu_seconds": {"all": 3.0, "train": 1.0}})
        )


def test_the_choice_sees_a_fifth_and_needs_all_seeds(accuracy, tmp_path):
    texts = [":".join(map(str, c)) for c in CHANNELS]
    truth = report.Truth(texts, accuracy)
    parts = set(truth.choosing), set(truth.reporting)
    assert not parts[0] & parts[1] and len(parts[0]) == int(len(texts) * 0.2) and len(parts[0] | parts[1]) == len(texts)
    for setting, seeds, noise in (("untrained", range(4), 1.0), ("both", range(3), 3.0), ("instance", [0], 0.0)):
        write_runs(tmp_path, setting, seeds, noise)
    rows = report.read(tmp_path)
    choice = report.ranked(truth, rows)
    assert [row["setting"] for row in choice[::4]] == ["untrained", "both", "instance"]
    assert choice[-1]["mean"] > choice[0]["mean"] and choice[0]["cpu_seconds"] == 3
    other = accuracy.copy()
    other[truth.reporting] = np.random.default_rng(0).normal(size=len(truth.reporting))
    again = report.ranked(report.Truth(texts, other), rows)
    assert [{**row, "reporting": None} for row in again] == [{**row, "reporting": None} for row in choice] != again
    other[truth.choosing] = np.random.default_rng(0).normal(size=len(truth.choosing))
    assert [row["mean"] for row in report.ranked(report.Truth(texts, other), rows)] != [row["mean"] for row in choice]


@pytest.mark.quick
def test_a_tie_goes_to_the_cheaper():
    def row(name, mean, std, seconds, seeds=3):
        return {"setting": name, "mean": mean, "std": std, "cpu_seconds": seconds, "seeds": seeds}

    best = row("best", 0.9, 0.05, 100)
    assert report.decided([best, row("cheap", 0.86, 0.2, 20), row("poor", 0.84, 0.2, 1)])["setting"] == "cheap"
    assert report.decided([best, row("as dear", 0.89, 0.05, 99), row("one", 0.9, None, 1, 1)])["setting"] == "best"


def test_figures_are_of_the_other_four_fifths(accuracy, tmp_path):
    texts = [":".join(map(str, c)) for c in CHANNELS]
    truth = report.Truth(texts, accuracy)
    write_runs(tmp_path, "untrained", range(4), 1.0)
    row = report.read(tmp_path)["untrained", "effective_rank"]
    found = report.compared(truth, row, "sum")
    ids = ["".join(str(c // 8 - 1) for c in row) for row in CHANNELS]
    totals = [
        np.array([sum(blocks[b][i[a:z]] for b, (a, z) in enumerate(((0, 2), (2, 4), (4, 5)))) for i in ids])
        for blocks in (ratings(seed, 1.0) for seed in range(4))
    ]
    part = truth.reporting
    alone = [stats.spearmanr(total[part], accuracy[part])[0] for total in totals]
    assert found["alone"]["spearman"] == pytest.approx({"mean": np.mean(alone[:3]), "std": np.std(alone[:3], ddof=1)})
    normal = [(total - total.mean()) / total.std() for total in totals]
    assert found["summed"]["spearman"] == pytest.approx(stats.spearmanr(sum(normal[:3])[part], accuracy[part])[0])
    size = np.log(CHANNELS).sum(1)
    size = (size - size.mean()) / size.std()
    three = sum(normal[:3]) / sum(normal[:3]).std()
    key = "untrained", "effective_rank"
    beside = {(found["name"], found["weight"]): found for found in report.beside_size(truth, {key: row}, "sum")}
    for name, score in (
        (("untrained, effective_rank + size x", 3), three + 3 * size),
        (("size, last layer x", 0.8), np.log(CHANNELS) @ [1, 1, 1, 1, 0.8]),
    ):
        for of, rows in (("reporting", part), ("choosing", truth.choosing)):
            assert beside[name][of]["spearman"] == pytest.approx(
                stats.spearmanr(score[rows].round(9), accuracy[rows])[0], abs=1e-6
            )
    assert all(0 < block["mean"] < block["ceiling"] for block in report.blocks(truth, row))


def test_sums_of_seeds_of_nine(accuracy, tmp_path):
    truth = report.Truth([":".join(map(str, c)) for c in CHANNELS], accuracy)
    write_runs(tmp_path, "untrained", range(9), 2.0)
    row = report.read(tmp_path)["untrained", "effective_rank"]
    found = report.many(truth, row, "sum")
    assert found["one"]["spearman"]["mean"] < found["three"]["spearman"]["mean"] < found["nine"]["spearman"]["mean"]
    assert found["nine"]["spearman"]["std"] is None and found["three"]["spearman"]["std"] > 0
    row.ratings = dict(list(row.ratings.items())[:3])
    assert report.compared(truth, row, "sum")["summed"]["spearman"] == pytest.approx(
        report.many(truth, row, "sum")["nine"]["spearman"]["mean"]
    )


def test_the_report_is_printed_and_written(accuracy, tmp_path, monkeypatch, capsys):
    (tmp_path / "accuracy.csv").write_text(
        "channels,accuracy\n"
        + "".join(f"{':'.join(map(str, c))},{a}\n" for c, a in zip(CHANNELS, accuracy, strict=True))
    )
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "report.py",
            "--ratings",
            str(tmp_path / "runs"),
            "--accuracy",
            str(tmp_path / "accuracy.csv"),
            "--json",
            str(tmp_path / "out.json"),
        ],
    )
    (tmp_path / "runs").mkdir()
    with pytest.raises(SystemExit):
        report.main()
    assert "holds no files of study.py" in capsys.readouterr().err and not (tmp_path / "out.json").exists()
    write_runs(tmp_path / "runs", "untrained", range(3), 1.0)
    write_runs(tmp_path / "runs", "instance-lr1.5", [0], 1.0)
    report.main()
    said, found = capsys.readouterr().out, json.loads((tmp_path / "out.json").read_text())
    assert found["chosen"]["setting"] == "untrained" and "instance-lr1.5" in said
    assert [row["combine"] for row in found["tables"]["How blocks are put together"]] == list(report.HOW)
    assert "| untrained | effective_rank | sum |" in said and "| size, last layer x 1 |" in said


# ---- what a rating counts


def rated_run(folder, seed, score="effective_rank", image_size=32):
    (folder / "ratings").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"space": {"name": "nats", "image_size": image_size}}))
    for block, scores in enumerate(ratings(seed, 0.3)):
        lower = {path: -value for path, value in scores.items()}
        (folder / f"ratings/block_{block}.json").write_text(
            json.dumps(
                {
                    "block": block,
                    "prefix": ["34", "50"][:block],
                    "score": score,
                    "paths": scores,
                    "candidates": [],
                    "scores": {"effective_rank": scores, "population_centre": lower},
                    "better": {"effective_rank": "higher", "population_centre": "lower"},
                }
            )
        )
    return str(folder)


def test_agreement_is_with_sizes_behind_the_prefix_and_between_seeds(tmp_path, capsys):
    runs = [rated_run(tmp_path / f"seed{seed}", seed) for seed in range(3)]
    counts.main([*runs, "--scores", "effective_rank", "population_centre", "--json", str(tmp_path / "out.json")])
    found = json.loads((tmp_path / "out.json").read_text())["scores"]
    assert found["effective_rank"] == found["population_centre"], "a score for which lower is better is turned"
    assert [row["paths"] for row in found["effective_rank"]] == [64, 64, 8]
    space = counts.spaces.make("nats", width=1.0, image_size=32, restricted=True, split="cifar10")
    table = counts.CostTable.of(space, 32)
    scores = [ratings(seed, 0.3)[1] for seed in range(3)]
    params = [table.cost([(3, 4), tuple(map(int, path))]).params for path in scores[0]]
    assert found["effective_rank"][1]["params"] == pytest.approx(
        [stats.spearmanr(list(s.values()), params)[0] for s in scores]
    )
    values = [list(s.values()) for s in scores]
    assert found["effective_rank"][1]["between_seeds"] == pytest.approx(
        [stats.spearmanr(values[i], values[j])[0] for i, j in ((1, 0), (2, 0), (2, 1))]
    )
    assert "| effective_rank | 1 | 64 |" in capsys.readouterr().out


def test_runs_of_different_spaces_are_not_compared(tmp_path, capsys):
    runs = [rated_run(tmp_path / "a", 0), rated_run(tmp_path / "b", 1, image_size=16)]
    for arguments, words in (
        (runs, "different spaces"),
        ([str(tmp_path / "none")], "holds no config.json"),
        ([runs[0], "--scores", "beauty"], "has no score 'beauty'"),
    ):
        with pytest.raises(SystemExit) as end:
            counts.main(arguments)
        assert end.value.code == 2 and words in capsys.readouterr().err
