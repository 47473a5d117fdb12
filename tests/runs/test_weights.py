"""One safetensors file of a run's weights, and where `--resume PATH` lets a run begin."""

from __future__ import annotations

import json
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny_search import TINY

from bossnas import cli
from bossnas.config.loading import load
from bossnas.errors import ConfigError
from bossnas.files import write_json
from bossnas.runs import checkpoint, resume, weights
from bossnas.runs.folder import prepare_folder
from bossnas.search import search
from bossnas.search.run import build, restore

NATS = [
    *TINY,
    "space.name=nats",
    "space.image_size=16",
    "data.val_images=8",
    "checkpoint.keep=20",
    "checkpoint.every_steps=1",
]


def config(out, *more):
    return load(None, [*NATS, f"out={out}", *more])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "a"
    search.search(config(folder))
    return folder


def results(folder):
    """What a run leaves behind that must not depend on where it was resumed."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("images_per_second", None)
    texts = {file.name: file.read_text() for file in sorted((folder / "ratings").iterdir())}
    where = checkpoint.latest(folder / "checkpoints")
    return lines, texts, (folder / "winners.json").read_text(), checkpoint.read(where, weights.KINDS)


def same(a, b):
    assert a[:3] == b[:3] and a[3].keys() == b[3].keys()
    assert all(torch.equal(a[3][name], b[3][name]) for name in a[3])


def test_a_run_begins_at_a_checkpoint_of_another(finished, tmp_path):
    before = {file: file.read_bytes() for file in finished.rglob("*") if file.is_file()}
    cli_words = [
        "search",
        *(f"--set={o}" for o in [*NATS, f"out={tmp_path / 'b'}"]),
        "--resume",
        str(finished / "checkpoints/block1-step000003"),
    ]
    (tmp_path / "empty.json").write_text("{}")
    with pytest.raises(SystemExit) as caught:
        cli.main([*cli_words, "--config", str(tmp_path / "empty.json")])
    assert caught.value.code == 0
    same(results(tmp_path / "b"), results(finished))
    assert {file: file.read_bytes() for file in before} == before
    log = (tmp_path / "b/log.txt").read_text()
    assert "going on in block 1 at step 3" in log and "block 0 train" not in log


def test_a_run_goes_back_to_one_of_its_own(finished, tmp_path):
    folder = tmp_path / "a"
    shutil.copytree(finished, folder)
    moved = config(folder)
    write_json(folder / "done", {})
    where = resume.claim(moved, str(folder / "checkpoints/block1-step000003"))
    assert (folder / "done").exists(), "the claim changes nothing"
    resume.begin_at(moved, where)
    names = sorted(os.listdir(folder / "checkpoints"))
    assert names[-1] == "latest" and names[-2] == "block1-step000003" and "block2-step000001" not in names
    assert not (folder / "done").exists() and not (folder / "architecture.json").exists()
    kept = sorted(file.name for file in (folder / "ratings").iterdir())
    assert kept == ["block_0.json", "block_0_epoch_1.json", "block_1_epoch_1.json"]
    assert len(json.loads((folder / "winners.json").read_text())["winners"]) == 1
    search.search(moved, "auto")
    same(results(folder), results(finished))


def test_a_run_folder_means_its_last_checkpoint(finished, tmp_path):
    assert resume.claim(config(tmp_path / "b"), str(finished)) == checkpoint.latest(finished / "checkpoints")
    assert not (tmp_path / "b").exists()


def test_places_where_no_run_can_begin(finished, tmp_path):
    new, one = config(tmp_path / "new"), finished / "checkpoints/block1-step000003"
    for path in (tmp_path / "nothing", tmp_path, finished / "ratings", finished / "checkpoints/block9-step000001"):
        with pytest.raises(ConfigError, match=r"^resume: .*give auto, .*|^resume: .* there is no such folder"):
            resume.claim(new, str(path))
    with pytest.raises(ConfigError, match=r"^resume: .*a holds another run \(seed, train.lr differ\)"):
        resume.claim(config(tmp_path / "new", "seed=3", "train.lr=0.1"), str(one))
    with pytest.raises(ConfigError, match="schedule: is block_parallel, but the run in .* began with sequential"):
        resume.claim(config(tmp_path / "new", "schedule=block_parallel"), str(one))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("mine")
    with pytest.raises(ConfigError, match="out: .*full is not empty, but a run is to begin there"):
        resume.claim(config(tmp_path / "full"), str(one))
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    file = copy / "checkpoints/block1-step000003/__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ConfigError, match="^resume: checkpoint .* is unusable: __0_0.distcp has"):
        resume.claim(new, str(file.parent))
    assert not (tmp_path / "new").exists()
    # what does not change the result may be another
    assert resume.claim(
        config(
            tmp_path / "new",
            "engine.name=ddp",
            "engine.queue=3",
            "checkpoint.keep=3",
            "checkpoint.asynchronous=false",
            "train.activation_checkpointing=true",
        ),
        str(one),
    )


def test_export(finished, tmp_path, capsys):
    out = tmp_path / "w.safetensors"
    command = ["export-weights", str(finished), str(out)]
    with_json = [*command, "--json", str(tmp_path / "w.json")]
    with pytest.raises(SystemExit) as caught:
        cli.main(with_json)
    assert caught.value.code == 0 and "nats after 3 finished blocks" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path)) == ["w.json", "w.safetensors"]
    said = json.loads((tmp_path / "w.json").read_text())
    assert (
        said["bytes"] == out.stat().st_size
        and said == {"file": str(out), "bytes": said["bytes"]} | weights.load(out).about
    )
    (tmp_path / "w.json").unlink()
    run = build(load(finished / "config.json"))
    restore(run, finished, training=False)
    found = weights.load(out)
    for kind, module in (("online", run.online), ("target", run.target), ("predictors", run.predictors)):
        truth = module.state_dict()
        assert found.of(kind).keys() == truth.keys()
        assert all(torch.equal(found.of(kind)[name], truth[name]) for name in truth)
        module.load_state_dict(found.of(kind))
    assert load_file(out).keys() == found.tensors.keys()
    about = found.about
    assert (about["space"], about["width"], about["image_size"], about["step"]) == ("nats", 0.0625, 16, 0)
    assert about["winners"] == json.loads((finished / "winners.json").read_text())["winners"]
    assert about["versions"]["torch"] == torch.__version__ and about["split"] == "cifar10"

    for more, message in (([], "exists; .* --force"), (["--checkpoint", "block7"], "exists; ")):
        with pytest.raises(SystemExit) as caught:
            cli.main([*command, *more])
        error = capsys.readouterr().err.splitlines()
        assert caught.value.code == 2 and len(error) == 1
        assert re.match(f"error: OUT.safetensors: .* {message}", error[0]), error
    weights.export(finished, out, "block1-step000003", force=True)
    assert weights.load(out).about["step"] == 3 and len(weights.load(out).about["winners"]) == 1


def test_mistakes_of_export(finished, tmp_path, monkeypatch):
    out = tmp_path / "w.safetensors"
    with pytest.raises(ConfigError, match="^checkpoint: .*block9 is unusable: there is no such folder"):
        weights.export(finished, out, "block9")
    with pytest.raises(ConfigError, match="^run: .* holds no config.json"):
        weights.export(tmp_path, out)
    with pytest.raises(ConfigError, match="^out: cannot write"):
        weights.export(finished, tmp_path / "no/where.safetensors")
    prepare_folder(tmp_path / "young", config(tmp_path / "young"))
    with pytest.raises(ConfigError, match="^run: .*young has no checkpoint yet"):
        weights.export(tmp_path / "young", out)
    out.write_bytes(b"the old one")

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(weights.os, "fsync", full)
        with pytest.raises(ConfigError, match=r"^out: cannot write .* \(No space left on device\)"):
            weights.export(finished, out, force=True)
    assert out.read_bytes() == b"the old one" and sorted(os.listdir(tmp_path)) == ["w.safetensors", "young"]
    with pytest.raises(ConfigError, match="weights: cannot read"):
        weights.load(out)
    with pytest.raises(ConfigError, match="weights: cannot read .*"):
        weights.load(tmp_path / "none")
    weights.save_file({"x": torch.zeros(1)}, out)
    with pytest.raises(ConfigError, match="weights: .* was not written by bossnas export-weights"):
        weights.load(out)
    weights.export(finished, out, force=True)
    out.write_bytes(out.read_bytes()[:-1])
    with pytest.raises(ConfigError, match="weights: cannot read"):
        weights.load(out)
