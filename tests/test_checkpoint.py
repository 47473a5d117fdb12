"""A checkpoint is there entirely or not at all: kills, torn files, a full disk, clean-up, two ranks."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess

import pytest
import torch
from torch import nn

from bossnas import checkpoint
from bossnas.engines import make
from bossnas.errors import ConfigError
from bossnas.optim import LARS, parameter_groups


def state(step):
    return {
        "step": step,
        "name": "block 1",
        "winners": [[1, 2], [3]],
        "rng": torch.get_rng_state(),
        "online": {"w": torch.full((3, 2), float(step)), "n": torch.tensor(step)},
        "none": None,
        "lr": 0.1,
    }


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b and type(a) is type(b)


def test_round_trip_and_the_last_are_kept(tmp_path):
    assert checkpoint.latest(tmp_path / "none") is None
    for step in range(5):
        path = checkpoint.save(tmp_path, f"step-{step}", state(step), None, keep=2)
        assert checkpoint.latest(tmp_path) == path
        assert same(checkpoint.load(path), state(step))
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-3", "step-4"]
    checkpoint.save(tmp_path, "a", state(9), None, keep=1)  # age goes by order of writing, not by name
    assert sorted(os.listdir(tmp_path)) == ["a", "latest"]


def test_same_name_again_replaces(tmp_path):
    checkpoint.save(tmp_path, "a", state(1), None, keep=2)
    checkpoint.save(tmp_path, "b", state(2), None, keep=2)
    checkpoint.save(tmp_path, "a", state(3), None, keep=2)
    assert checkpoint.load(checkpoint.latest(tmp_path))["step"] == 3
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "latest"]


@pytest.mark.parametrize("moment", ["state.pt", "rename", "latest"])
def test_kill_at_any_moment_leaves_the_older_one(tmp_path, monkeypatch, moment):
    class Killed(BaseException):
        pass

    def die(*args, **kwargs):
        raise Killed

    checkpoint.save(tmp_path, "a", state(1), None, keep=2)
    with monkeypatch.context() as patch:
        if moment == "state.pt":
            patch.setattr(checkpoint.json, "dumps", die)
        elif moment == "rename":
            patch.setattr(checkpoint.Path, "rename", die)
        else:
            patch.setattr(checkpoint.os, "replace", die)
        with pytest.raises(Killed):
            checkpoint.save(tmp_path, "b", state(2), None, keep=2)
    assert checkpoint.latest(tmp_path) == tmp_path / "a"
    assert checkpoint.load(tmp_path / "a")["step"] == 1
    checkpoint.save(tmp_path, "c", state(3), None, keep=1)
    assert sorted(os.listdir(tmp_path)) == ["c", "latest"]


def test_kill_while_the_same_name_is_replaced(tmp_path):
    checkpoint.save(tmp_path, "a", state(1), None, keep=1)
    (tmp_path / "a").rename(tmp_path / "a.old")
    (tmp_path / "a.tmp").mkdir()
    assert checkpoint.load(checkpoint.latest(tmp_path))["step"] == 1
    checkpoint.save(tmp_path, "b", state(2), None, keep=2)
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "latest"]


@pytest.mark.parametrize("damage", ["truncated", "no state", "no manifest", "bad manifest", "flipped"])
def test_torn_checkpoint_is_refused(tmp_path, damage, caplog):
    checkpoint.save(tmp_path, "a", state(1), None, keep=2)
    path = checkpoint.save(tmp_path, "b", {"x": torch.arange(5000)}, None, keep=2)
    file = path / "state.pt"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "no state":
        file.unlink()
    elif damage == "no manifest":
        (path / "manifest.json").unlink()
    elif damage == "bad manifest":
        (path / "manifest.json").write_text("{")
    else:
        content = bytearray(file.read_bytes())
        content[-200:] = b"x" * 200
        file.write_bytes(content)
    with pytest.raises(ConfigError, match="out: checkpoint .*b is unusable: .*; remove that folder"):
        checkpoint.load(path)
    if damage != "flipped":  # the size is right: load alone finds it
        assert checkpoint.latest(tmp_path) == tmp_path / "a"
        assert "passed over" in caplog.text


def test_missing_checkpoint_and_lost_latest(tmp_path):
    with pytest.raises(ConfigError, match="no such folder"):
        checkpoint.load(tmp_path / "none")
    checkpoint.save(tmp_path, "a", state(1), None, keep=2)
    checkpoint.save(tmp_path, "b", state(2), None, keep=2)
    (tmp_path / "latest").unlink()
    assert checkpoint.latest(tmp_path) == tmp_path / "b"


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    checkpoint.save(tmp_path, "a", {"x": Evil()}, None, keep=1)
    with pytest.raises(ConfigError, match="cannot be read"):
        checkpoint.load(tmp_path / "a")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "number, words",
    [(errno.ENOSPC, "no room on the disk"), (errno.EDQUOT, "no room"), (errno.EACCES, "cannot write to")],
)
def test_write_errors_keep_the_older_one(tmp_path, monkeypatch, number, words):
    checkpoint.save(tmp_path, "a", state(1), None, keep=1)

    def full(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "fsync", full)
        with pytest.raises(ConfigError, match=f"out: {words}"):
            checkpoint.save(tmp_path, "b", state(2), None, keep=1)
    assert sorted(os.listdir(tmp_path)) == ["a", "latest"]
    assert checkpoint.load(checkpoint.latest(tmp_path))["step"] == 1


def test_a_really_full_disk(tmp_path):
    mounted = (
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], capture_output=True)
        if shutil.which("mount") and os.geteuid() == 0
        else None
    )
    if mounted is None or mounted.returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        checkpoint.save(tmp_path, "a", state(1), None, keep=1)
        with pytest.raises(ConfigError, match="out: no room on the disk"):
            checkpoint.save(tmp_path, "b", {"x": torch.zeros(1_000_000)}, None, keep=1)
        assert sorted(os.listdir(tmp_path)) == ["a", "latest"]
        assert checkpoint.load(checkpoint.latest(tmp_path))["step"] == 1
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_require_room(tmp_path, monkeypatch):
    checkpoint.require_room(tmp_path / "not" / "there", 1000)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 8, 2**29))
    with pytest.raises(ConfigError, match="out: no room .*0.50 GiB are free, the run needs 1.00 GiB"):
        checkpoint.require_room(tmp_path, 2**30)


def test_engine_state_is_part_of_it(tmp_path):
    def trained():
        torch.manual_seed(0)
        module = nn.Linear(4, 4)
        engine = make("single", accumulate=1, micro_batch=2)
        engine.wrap(module, None, lambda module, followers, sharded: LARS(parameter_groups(module), lr=1.0))
        return module, engine

    def go(module, engine, steps):
        for step in steps:
            engine.micro(module(torch.full((2, 4), 1.0 + step)).square().mean(), last=True)
            engine.step(0.5)

    module, engine = trained()
    go(module, engine, range(2))
    path = checkpoint.save(tmp_path, "a", {"module": module.state_dict()}, engine, keep=1)
    assert set(json.loads((path / "manifest.json").read_text())["files"]) == {"state.pt", "optimizer.pt"}
    go(module, engine, range(2, 4))

    resumed, other = trained()
    resumed.load_state_dict(checkpoint.load(path)["module"])
    checkpoint.load_engine(path, other)
    go(resumed, other, range(2, 4))
    assert torch.equal(module.weight, resumed.weight) and torch.equal(module.bias, resumed.bias)
