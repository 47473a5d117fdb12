"""`bossnas retrain`, `evaluate`, `export` as a user calls them: what they print and write; one line for mistakes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import HANG
from safetensors.torch import load_file

from bossnas import cli
from bossnas.networks.bossnet import BossNet
from bossnas.networks.spec import Spec, build_network

NETWORK = {"width": 8, "encoding": [[1], [1], [0], [1]]}
TINY = [
    f"model.options={json.dumps(NETWORK)}",
    "model.name=bossnet",
    "model.image_size=32",
    "data.workers=0",
    "data.val_images=64",
    "train.batch=32",
    "train.micro_batch=32",
    "train.epochs=1",
    "train.steps_per_epoch=2",
    "train.warmup_epochs=0",
    "train.ema=0",
    "augment.repeats=1",
    "evaluate.batch=32",
]

SHARDS = Path(cli.__file__).parents[1] / "data/sample/val-*.tar.gz"


def call(*arguments):
    """Exit code of the command; what it prints is in capfd."""
    try:
        cli.main([str(argument) for argument in arguments])
    except SystemExit as end:
        return end.code
    return 0


def refused(capfd, *arguments):
    """The one line with which a command refuses its input."""
    capfd.readouterr()
    assert call(*arguments) == 2
    out, err = capfd.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith(("retraining", "single"))]
    assert len(lines) == 1 and lines[0].startswith("error: "), (out, err)
    return lines[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    config = folder.parent / "tiny.yaml"
    config.write_text("seed: 1\n", encoding="utf-8")
    sets = [part for text in [*TINY, f"out={folder}"] for part in ("--set", text)]
    assert call("retrain", "--config", config, *sets) in (0, None)
    return folder, config, sets


@pytest.mark.quick
def test_retrain_evaluate_export(trained, tmp_path, capfd):
    folder, config, sets = trained
    found = json.loads((folder / "result.json").read_text())
    assert call("evaluate", folder, "--workers", 0, "--json", tmp_path / "e.json") in (0, None)
    assert "on 64 images" in capfd.readouterr().out
    evaluated = json.loads((tmp_path / "e.json").read_text())
    assert evaluated["top1"] == found["best"]["top1"] and evaluated["ranks"] == 1 and evaluated["images"] == 64
    assert call(
        "evaluate",
        folder / "last.safetensors",
        "--val",
        SHARDS,
        "--images",
        64,
        "--workers",
        0,
        "--fuse-bn",
        "--json",
        tmp_path / "f.json",
    ) in (0, None)
    fused = json.loads((tmp_path / "f.json").read_text())
    assert fused["loss"] == pytest.approx(evaluated["loss"], rel=1e-5)
    options = ("--formats", "safetensors,standalone", "--json", tmp_path / "x.json")
    assert call("export", folder, tmp_path / "exported", *options) in (0, None)
    assert "safetensors" in capfd.readouterr().out
    card = json.loads((tmp_path / "exported/card.json").read_text())
    assert json.loads((tmp_path / "x.json").read_text()) == card
    assert card["about"]["top1"] == found["best"]["top1"] and {f["format"] for f in card["files"]} == {
        "safetensors",
        "standalone",
    }
    again = refused(capfd, "retrain", "--config", config, *sets)
    assert "already holds this run" in again and "--resume auto" in again


def test_another_training_begins_with_the_weights(trained, tmp_path):
    folder, config, sets = trained
    start = tmp_path / "a: b #1.safetensors"  # no YAML
    shutil.copy(folder / "last.safetensors", start)
    assert call(
        "retrain",
        "--config",
        config,
        *sets,
        "--set",
        f"out={tmp_path / 'b'}",
        "--set",
        "train.lr=1e-12",
        "--set",
        "train.min_lr=0",
        "--checkpoint",
        start,
    ) in (0, None)
    before, after = load_file(folder / "last.safetensors"), load_file(tmp_path / "b/last.safetensors")
    assert all(
        torch.allclose(before[name], after[name], atol=1e-6)
        for name in before
        if "running" not in name and "num_batches" not in name
    )


def test_two_ranks_evaluate_alike(trained, tmp_path, project_root):
    """By the command that the docs name; 64 images in batches of 20 leave the ranks uneven numbers."""
    folder, _, _ = trained
    environment = {**os.environ, "PYTHONPATH": f"{project_root}:{project_root / 'kernels'}", "OMP_NUM_THREADS": "1"}
    common = ["-m", "bossnas.cli", "evaluate", str(folder), "--workers", "0", "--batch", "20", "--device", "cpu"]
    front = {
        1: [sys.executable],
        2: [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    }
    found = {}
    for ranks, start in front.items():
        file = tmp_path / f"{ranks}.json"
        done = subprocess.run(
            [*start, *common, "--json", str(file)], env=environment, capture_output=True, text=True, timeout=HANG
        )
        assert done.returncode == 0, done.stderr
        found[ranks] = json.loads(file.read_text())
    assert found[2]["ranks"] == 2 and all(found[1][key] == found[2][key] for key in ("images", "top1", "top5"))
    assert found[1]["loss"] == pytest.approx(found[2]["loss"], rel=1e-12)


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_bad_checkpoints_are_refused_in_one_line(tmp_path, capfd, trained):
    shards = str(SHARDS)
    options = ["--model", "bossnet", "--options", json.dumps(NETWORK), "--val", shards, "--workers", 0, "--classes", 10]
    net = BossNet(**NETWORK, num_classes=10)
    state, marker = net.state_dict(), tmp_path / "ran"

    torch.save({"model": state, "trick": Evil(marker)}, tmp_path / "evil.pth")
    assert "posix.system" in refused(capfd, "evaluate", tmp_path / "evil.pth", *options) and not marker.exists()
    torch.save(state, tmp_path / "good.pth")
    data = (tmp_path / "good.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(data[: len(data) // 2])
    assert "damaged" in refused(capfd, "evaluate", tmp_path / "cut.pth", *options)
    torch.save(BossNet([[1], [1], [1], [1]], 8, num_classes=10).state_dict(), tmp_path / "foreign.pth")
    assert "layer3.0.shortcut" in refused(
        capfd, "export", tmp_path / "foreign.pth", tmp_path / "x", *options[:4], "--classes", 10
    )
    assert not (tmp_path / "x").exists()
    assert "has 10 classes, the network 7" in refused(capfd, "evaluate", tmp_path / "good.pth", *options[:-1], 7)
    assert "--model" in refused(capfd, "evaluate", tmp_path / "good.pth", "--val", shards)
    assert "No such file" in refused(capfd, "evaluate", tmp_path / "none.pth", *options)
    assert "--val" in refused(capfd, "evaluate", tmp_path / "good.pth", *options[:4])
    assert "timm knows no" in refused(capfd, "evaluate", tmp_path / "good.pth", "--model", "bosnet", "--val", shards)


@pytest.mark.quick
def test_other_mistakes_are_refused_in_one_line(tmp_path, capfd, trained):
    folder, config, sets = trained
    assert "model" in refused(capfd, "retrain", "--config", config, "--set", f"out={tmp_path / 'a'}")
    assert "did you mean" in refused(capfd, "retrain", "--config", config, "--set", "train.epoch=3")
    assert "holds no config.json" in refused(capfd, "retrain", "--config", config, "--from-run", tmp_path)
    odd = "it's 1: #2"  # no YAML
    assert f"{odd} holds no config.json" in refused(capfd, "retrain", "--config", config, "--from-run", odd)
    assert call("evaluate", folder, "--images", 1) == 2
    assert "retraining" in refused(capfd, "select", folder)
    assert "--formats" in refused(capfd, "export", folder, tmp_path / "b", "--formats", "onx")
    assert "--precision" in refused(capfd, "evaluate", folder, "--precision", "fp8")
    assert "--options" in refused(capfd, "evaluate", folder, "--options", "[1")
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


def test_a_description_fetches_nothing(tmp_path):
    """A file from elsewhere may not name files for timm to read, or have it download."""
    from bossnas.errors import ConfigError

    for trick in ({"checkpoint_path": "/tmp/x.pth"}, {"pretrained": True}):
        with pytest.raises(ConfigError, match="model.options"):
            build_network(Spec("resnet18", trick, 10))
