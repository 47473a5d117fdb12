from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from collections import namedtuple

import pytest
import torch
from ranks import HANG, ROOT, environment, free_port
from tiny_search import TINY

from bossnas import cli, log
from bossnas.config.loading import load
from bossnas.errors import ConfigError
from bossnas.runs import checkpoint
from bossnas.runs.folder import claim_folder, prepare_folder
from bossnas.runs.resume import check_data
from bossnas.search import rating, rerate, search
from bossnas.search.stage import warn
from bossnas.spaces import cost
from bossnas.spaces.paths import decode
from bossnas.supernet import train_block
from bossnas.supernet.train_block import RunState, Step


def config(out, *more):
    return load(None, [*TINY, f"out={out}", *more])


def arguments(out, *more, file=None):
    sets = [f"--set={o}" for o in [*TINY, f"out={out}", *more]]
    return [*(["--config", str(file)] if file else []), *sets]


def ratings(folder):
    return {f.name: json.loads(f.read_text()) for f in sorted((folder / "ratings").glob("*.json"))}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One undisturbed run, which several tests look at."""
    folder = tmp_path_factory.mktemp("runs") / "a"
    search.search(config(folder))
    assert "DEMONSTRATION" in (folder / "log.txt").read_text()
    return folder


def test_the_run_folder_holds_everything(finished):
    architecture = json.loads((finished / "architecture.json").read_text())
    winners = json.loads((finished / "winners.json").read_text())["winners"]
    assert architecture["paths"] == winners and architecture["architecture"] == "|".join(winners)
    assert len(winners) == 4 and sum(len(s) for s in architecture["retraining_encoding"]) == 16
    run = search.build(load(finished / "config.json"))
    run.online.eval()
    x = torch.zeros(1, 3, 32, 32)
    paths = [decode(w) for w in winners]
    price = cost.count([run.online.stem, run.online.blocks], lambda: run.online.features(paths, x))
    assert (architecture["macs"], architecture["params"]) == (price["macs"], price["params"])
    for block in range(4):
        rated = ratings(finished)[f"block_{block}.json"]
        paths = run.space.paths(block, [decode(w) for w in winners[:block]])
        assert [decode(p) for p in rated["paths"]] == paths and rated["prefix"] == winners[:block]
        assert rated["score"] == "pooled_instance_discrimination" and max(rated["paths"].values()) <= 0
        assert max(rated["paths"], key=rated["paths"].get) == winners[block]
        assert all(-4 <= s <= 4 for s in rated["scores"]["population_centre"].values())
        assert rated["scores"].keys() == rated["better"].keys() and rated["scores"][rated["score"]] == rated["paths"]
        assert all(values.keys() == rated["paths"].keys() for values in rated["scores"].values())
        assert f"block_{block}_epoch_1.json" in ratings(finished)
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    trained = [(line["block"], line["step"]) for line in lines if line["kind"] == "train"]
    assert trained == [(b, s) for b in range(4) for s in range(1, 5)]
    assert {"loss", "spread", "lr", "images", "images_per_second"} <= lines[0].keys()
    versions = json.loads((finished / "versions.json").read_text())
    assert versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert load(finished / "config.json") == config(finished)
    assert len(list((finished / "checkpoints").glob("block*"))) == 2


def test_one_seed_gives_one_result_and_another_seed_another(finished, tmp_path):
    search.search(config(tmp_path / "b"))
    assert ratings(tmp_path / "b") == ratings(finished)
    search.search(config(tmp_path / "c", "seed=1"))
    assert ratings(tmp_path / "c") != ratings(finished)


def test_rating_again_from_the_last_checkpoint_gives_the_same(finished):
    before = {f: f.read_bytes() for f in (finished / "ratings").glob("block_?.json")}
    for file in before:
        file.write_text("{}")
    assert rerate.rerate(finished) == [0, 1, 2, 3]
    assert {f: f.read_bytes() for f in before} == before
    with pytest.raises(ConfigError, match="^blocks: "):
        rerate.rerate(finished, [4])


def test_another_temperature_rates_anew_and_other_keys_are_refused(finished, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    before = ratings(folder)["block_1.json"]
    assert rerate.rerate(folder, [1], ["rating.temperature=1.0", "rating.score=view_agreement"]) == [1]
    after = ratings(folder)["block_1.json"]
    assert after["paths"] == before["scores"]["view_agreement"] and after["score"] == "view_agreement"
    assert after["scores"]["population_centre"] == before["scores"]["population_centre"]
    assert after["scores"]["instance_discrimination"] != before["scores"]["instance_discrimination"]
    with pytest.raises(ConfigError, match="overrides: 'seed=4' would rate another run"):
        rerate.rerate(folder, [1], ["seed=4"])


def test_a_rating_that_was_cut_goes_on(finished, tmp_path, monkeypatch):
    """Cut after some parts, called again: the same file, and only the rest is computed."""
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    before = (folder / "ratings/block_1.json").read_bytes()
    monkeypatch.setattr(rating, "SAVE_SECONDS", 0)
    monkeypatch.setattr(rating, "CPU_GIB", 1e-3)
    paths = len(json.loads(before)["paths"])
    counts, limit = [], [3 * paths]  # of 5: calibrated, and two batches by two networks

    def advance(self, info="", count=1):
        counts.append(count)
        if sum(counts) > limit[0]:
            raise KeyboardInterrupt

    monkeypatch.setattr(log.Task, "advance", advance)
    with pytest.raises(KeyboardInterrupt):
        rerate.rerate(folder, [1])
    partial = folder / "ratings/block_1.partial"
    assert partial.exists() and (folder / "ratings/block_1.json").read_bytes() == before
    limit[0], first = 10**9, sum(counts[:-1])
    counts.clear()
    rerate.rerate(folder, [1])
    assert not partial.exists() and sum(counts) <= paths * (1 + 2 * 2) - first + paths  # calibrated once more
    again = ratings(folder)["block_1.json"]
    monkeypatch.undo()
    monkeypatch.setattr(rating, "CPU_GIB", 1e-3)
    rerate.rerate(folder, [1])
    assert ratings(folder)["block_1.json"] == again
    # progress of other weights, and a damaged file, are not taken
    for content in ({"key": "another", "pieces": {("online", 0, 0): torch.zeros(1, 1)}}, None):
        torch.save(content, partial) if content else partial.write_bytes(b"cut off")
        rerate.rerate(folder, [1])
        assert ratings(folder)["block_1.json"] == again and not partial.exists()


def test_memory_changes_the_parts_not_the_scores(finished, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    truth = ratings(folder)["block_0.json"]
    rerate.rerate(folder, [0], ["rating.max_gib=0.002"])
    assert "parts of at most" in (folder / "log.txt").read_text()
    found = ratings(folder)["block_0.json"]
    for name, values in truth["scores"].items():
        assert found["scores"][name] == pytest.approx(values, abs=1e-4 if name == "effective_rank" else 1e-5)
    before = (folder / "ratings/block_0.json").read_bytes()
    with pytest.raises(ConfigError, match=r"rating.max_gib: 1e-06 GiB is too little .* which take 0\.0"):
        rerate.rerate(folder, [0], ["rating.max_gib=1e-6"])
    assert (folder / "ratings/block_0.json").read_bytes() == before


def test_a_rating_that_is_not_finite_chooses_nothing(finished):
    run = search.build(config(finished))
    with torch.no_grad():
        for network in (run.online, run.target):
            network.blocks[0][0].candidates[4].body[2].weight.fill_(torch.nan)
    with pytest.raises(ConfigError, match="train.lr: block 0 is rated with values that are not finite"):
        rating.rate(run, 0)


@pytest.mark.parametrize("space", ["hytra", "nats"])
def test_an_untrained_supernet_is_rated(tmp_path, space):
    folder = tmp_path / "untrained"
    changes = (f"space.name={space}", "space.width=0.125", "rating.score=instance_discrimination")
    with pytest.raises(SystemExit) as caught:
        cli.main(["rate", "--untrained", *arguments(folder, *changes, file=ROOT / "configs/quickstart_ds.json")])
    assert caught.value.code == 0
    winners = json.loads((folder / "winners.json").read_text())["winners"]
    for block, winner in enumerate(winners):
        rated = ratings(folder)[f"block_{block}.json"]
        assert max(rated["paths"], key=rated["paths"].get) == winner and rated["score"] == "instance_discrimination"
        assert len(set(rated["paths"].values())) == len(rated["paths"]), "no candidate is dead"
        assert rated["prefix"] == winners[:block]
    assert json.loads((folder / "architecture.json").read_text())["paths"] == winners
    with pytest.raises(ConfigError, match="holds a rating without training"):
        search.search(load(folder / "config.json"), resume="auto")
    with pytest.raises(ConfigError, match="another run|holds a rating|already"):
        rerate.rate_untrained(load(folder / "config.json"))


@pytest.mark.quick
@pytest.mark.parametrize(
    "words, message",
    [
        ([], "RUN: is missing"),
        (["--untrained"], "--untrained: needs --config"),
        (["runs/x", "--untrained"], "RUN: and --untrained exclude"),
        (["runs/x", "--config", "a.json"], "--config: a run has its own config"),
        (["no/such/run"], "RUN: no/such/run holds no config.json"),
        (["--untrained", "--config", "a.json"], "--config: cannot read a.json"),
    ],
)
def test_mistakes_of_rate_end_with_one_line(words, message, capfd):
    with pytest.raises(SystemExit) as caught:
        cli.main(["rate", *words])
    errors = capfd.readouterr().err.splitlines()
    assert caught.value.code == 2 and len(errors) == 1 and message in errors[0], errors


KILLED_MIDWAY = """
import os, runpy, signal, sys
from bossnas.distributed.alive import Guard

def at(guard, place):
    if place == "block 1 step 3":
        os.kill(os.getpid(), signal.SIGKILL)
    real(guard, place)

real, Guard.at = Guard.at, at
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("engine", ["single", "deepspeed"])
def test_kill_9_in_mid_block_then_resume_is_bit_identical(finished, tmp_path, engine, project_root):
    folder = tmp_path / "killed"
    command = [
        sys.executable,
        str(project_root / "launch/train.py"),
        *arguments(folder, f"engine.name={engine}", file=finished / "config.json"),
    ]
    # deepspeed in one process trains alike, but not to the bit, so it is compared with itself
    truth = finished
    if engine == "deepspeed":
        truth = tmp_path / "undisturbed"
        subprocess.run(
            [c.replace(str(folder), str(truth)) for c in command],
            check=True,
            env=environment(),
            capture_output=True,
            timeout=HANG,
        )
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_MIDWAY, *command[1:]], env=environment(), capture_output=True, timeout=HANG
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert '"block": 1, "step": 3' in (folder / "metrics.jsonl").read_text().splitlines()[-1]
    assert not (folder / "architecture.json").exists()
    refused = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=HANG)
    assert refused.returncode == 2 and "--resume auto" in refused.stderr
    subprocess.run([*command, "--resume", "auto"], check=True, env=environment(), capture_output=True, timeout=HANG)
    assert ratings(folder) == ratings(truth)
    ours, theirs = (
        checkpoint.read(checkpoint.latest(f / "checkpoints"), ("online", "target", "predictors"))
        for f in (folder, truth)
    )
    assert ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    trained = [(line["block"], line["step"]) for line in lines if line["kind"] == "train"]
    assert trained == [(b, s) for b in range(4) for s in range(1, 5)], "no step missing, none twice"


def test_two_deepspeed_ranks_run_the_users_line(tmp_path, project_root):
    out = tmp_path / "two"
    command = [
        "deepspeed",
        "--num_accelerators",
        "2",
        f"--master_port={free_port()}",  # two suites may run at a time
        "launch/train.py",
        "--config",
        "configs/hytra_ds.json",
        *arguments(
            out,
            "data.train=null",
            "data.val=null",
            "train.warmup_epochs=0",
            "train.epochs=1",
            "train.precision=fp32",
            "rating.calibration_batches=2",
            "space.width=0.05",
            "data.workers=1",
        ),
    ]
    path = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
    done = subprocess.run(
        command,
        env={**environment(), "PATH": path},
        capture_output=True,
        text=True,
        timeout=HANG,
        cwd=project_root,
        start_new_session=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert len(json.loads((out / "architecture.json").read_text())["paths"]) == 4
    # the ranks shared one batch: as many steps as one rank takes
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert sum(line["kind"] == "train" for line in lines) == 8 and lines[-2]["images"] == 4 * 2 * 16
    before = {name: r for name, r in ratings(out).items() if "epoch" not in name}
    assert rerate.rerate(out) == [0, 1, 2, 3]
    after = {name: r for name, r in ratings(out).items() if "epoch" not in name}
    assert after == before, "paths are split over the ranks, not images: one rank must rate as two do"


def test_a_finished_run_resumes_to_nothing(finished):
    before = (finished / "metrics.jsonl").read_text()
    search.search(config(finished), resume="auto")
    assert (finished / "metrics.jsonl").read_text() == before


def test_nats_trains_on_cifar_shards(shared, tmp_path, project_root):
    cifar = shared / "data/cifar10"
    search.search(
        load(
            project_root / "configs/nats_cifar10.yaml",
            [
                f"data.train={cifar}/train-*.tar",
                f"data.val={cifar}/test-*.tar",
                f"out={tmp_path / 'nats'}",
                "space.width=0.125",
                "train.batch=16",
                "train.micro_batch=16",
                "train.epochs=1",
                "train.steps_per_epoch=2",
                "train.warmup_epochs=0",
                "data.val_images=32",
                "rating.calibration_images=32",
                "rating.calibration_batches=1",
                "heads.hidden=32",
                "heads.out=16",
                "data.workers=0",
            ],
        )
    )
    before = ratings(tmp_path / "nats")
    assert [len(before[f"block_{b}.json"]["paths"]) for b in range(3)] == [64, 64, 8]
    rerate.rerate(tmp_path / "nats")
    assert ratings(tmp_path / "nats") == before


def _empty_tar(path):
    tarfile.open(path, "w").close()
    return path


@pytest.mark.quick
@pytest.mark.parametrize(
    "change, words",
    [
        (["data.train=nowhere/*.tar", "data.val=nowhere/*.tar"], "data.train"),
        (["data.train={tmp}/empty.tar", "data.val={tmp}/empty.tar"], "data.train"),
        (["train.epoch=3"], "did you mean 'epochs'"),
        (["train.epochs=few"], "train.epochs"),
        (["train.batch=4096"], "an epoch takes 8192 images, but data.train has 2000"),
        (["space.image_size=16"], "space.image_size: 16 px leaves no pixel"),
        (["space.name=resnet"], "space.name: there is no space 'resnet'"),
        (["engine.device=cuda"], "engine.device"),
        (["engine.device=cpu", "kernels=triton"], "kernels: is 'triton', but "),
        (["engine.name=deepspeed", "engine.deepspeed={train_batch_size: 3}"], "engine.deepspeed.train_batch_size"),
        (["engine.name=deepspeed", "engine.deepspeed={zero_optimization: {stage: 3}}"], "stage"),
    ],
)
def test_mistakes_end_with_one_line_and_leave_nothing(tmp_path, capfd, change, words):
    if words == "engine.device" and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    _empty_tar(tmp_path / "empty.tar")
    (tmp_path / "c.json").write_text("{}")
    out = tmp_path / "run"
    change = [c.replace("{tmp}", str(tmp_path)) for c in change]
    with pytest.raises(SystemExit) as caught:
        cli.main(["search", *arguments(out, *change, file=tmp_path / "c.json")])
    assert caught.value.code == 2
    errors = capfd.readouterr().err.splitlines()
    assert len(errors) == 1 and errors[0].startswith("error: ") and words in errors[0], errors
    assert not out.exists()


def test_a_mistake_that_one_rank_sees_ends_both_with_one_line(finished, project_root):
    command = [
        "deepspeed",
        "--num_accelerators",
        "2",
        f"--master_port={free_port()}",  # two suites may run at a time
        "launch/train.py",
        *arguments(finished, file=finished / "config.json"),
    ]
    path = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
    done = subprocess.run(
        [*command, "--set=seed=7"],
        env={**environment(), "PATH": path},
        capture_output=True,
        text=True,
        timeout=HANG,
        cwd=project_root,
        start_new_session=True,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 2 and "Traceback" not in output, output
    assert output.count("error: out: ") == 1 and "holds another run (seed differ)" in output


@pytest.mark.quick
def test_the_documented_space_of_ones_own_is_searched(tmp_path, project_root):
    code = re.search(r"```python\n(.*?)```", (project_root / "docs/own_space.md").read_text(), re.S).group(1)
    (tmp_path / "my_space.py").write_text(code)
    search.search(config(tmp_path / "run", f"space.name={tmp_path / 'my_space.py'}:TinyRes", "space.width=0.25"))
    architecture = json.loads((tmp_path / "run/architecture.json").read_text())
    assert len(architecture["kernels"]) == 2 and architecture["macs"] > 0
    assert len(ratings(tmp_path / "run")["block_1.json"]["paths"]) == 16


def test_room_of_older_checkpoints_counts_on_resume(finished, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda place: usage(10**9, 10**9, 4 * 10**7))
    with pytest.raises(ConfigError, match="no room"):
        search.search(config(finished.parent / "new"))
    search.search(config(finished), resume="auto")


def test_reports_that_come_a_step_late_are_the_same(finished, tmp_path, monkeypatch):
    """As on a GPU, where the loop goes on before it reads a loss."""
    read = []
    settle = train_block.Report.settle

    def noted(report):
        read.append((report._state.step, report.number))
        return settle(report)

    monkeypatch.setattr(train_block, "waits_for", lambda device: True)
    monkeypatch.setattr(train_block.Report, "settle", noted)
    search.search(config(tmp_path / "b"))
    late = [now - number for now, number in read]
    assert set(late) == {0, 1} and late.count(1) > 0, "no step was read late"

    def lines(folder):
        found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in line.items() if k not in ("images_per_second", "time")} for line in found]

    assert lines(tmp_path / "b") == lines(finished)
    assert (tmp_path / "b/winners.json").read_text() == (finished / "winners.json").read_text()


def test_calibration_uses_whole_batches(tmp_path):
    for images, batches, sizes in ((1999, 2, [1999]), (900, 2, [900, 900]), (3000, 1, [2000])):
        run = search.build(
            config(
                tmp_path,
                f"rating.calibration_images={images}",
                f"rating.calibration_batches={batches}",
                "data.recipe=cifar",
                "space.name=nats",
            )
        )
        assert [len(x) for x in rating.Calibration(run)] == sizes


@pytest.mark.quick
def test_a_collapse_is_reported(caplog):
    state, step = RunState(block=1, step=7), Step(0, False, -3.9, 0.04, 1.0, 0.99, 10.0)
    with caplog.at_level(logging.WARNING):
        log.setup(None)
        log.logger.propagate = True
        warn(state, step, collapse_below=0.03)
        assert not caplog.records
        warn(state, step, collapse_below=0.05)
    assert "block 1 step 7: the embeddings are collapsing (spread 0.040" in caplog.text


def test_batch_that_the_ranks_cannot_share(tmp_path, monkeypatch):
    monkeypatch.setattr(search.dist, "world_size", lambda group=None: 3)
    with pytest.raises(ConfigError, match="train.batch: 16 images cannot be divided over 3 ranks"):
        search.build(config(tmp_path / "a"))


def test_a_folder_with_another_run_is_refused_and_unharmed(finished, tmp_path):
    before = {f: f.read_bytes() for f in finished.rglob("*") if f.is_file()}
    for resume in (None, "auto"):
        with pytest.raises(ConfigError, match=r"out: .* holds another run \(seed, train.lr differ\)"):
            search.search(config(finished, "seed=5", "train.lr=0.25"), resume)
    with pytest.raises(ConfigError, match="`resume` auto"):
        search.search(config(finished))
    assert {f: f.read_bytes() for f in before} == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full/a.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        search.search(config(tmp_path / "full"))
    with pytest.raises(ConfigError, match="^run: "):
        rerate.rerate(tmp_path)


def test_a_disk_without_room_is_found_before_the_start(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda place: usage(10**9, 10**9, 10**6))
    with pytest.raises(ConfigError, match="out"):
        search.search(config(tmp_path / "a"))
    assert not (tmp_path / "a").exists()


def test_workers_and_keep_may_change_on_resume(tmp_path):
    prepare_folder(tmp_path, config(tmp_path))
    assert claim_folder(config(tmp_path, "data.workers=3", "checkpoint.keep=5"), resume=True) == tmp_path


@pytest.mark.parametrize("command", ["search", "rate", "select", "cost", "rank", "pack"])
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0 and f"Example: bossnas {command}" in text
    assert all((ROOT / word).exists() for word in text.split() if word.startswith("configs/"))


def test_a_run_goes_on_only_with_the_images_it_began_with():
    began = {"images": 100, "readers": 4}
    check_data(began, dict(began), within_block=True)
    check_data(began, {"images": 100, "readers": 2}, within_block=False)  # each block deals the shards anew
    for saved, now, words in (
        (began, {"images": 99, "readers": 4}, "data.train: has 99 images, but .* began with 100"),
        (began, {"images": 100, "readers": 2}, "data.workers: .* 2 readers .* stopped with 4"),
    ):
        with pytest.raises(ConfigError, match=words):
            check_data(saved, now, within_block=True)
