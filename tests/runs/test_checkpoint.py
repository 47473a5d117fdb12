"""A checkpoint is there entirely or not at all: kills, damage, a full disk, the thread, one rank and two."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import subprocess
import threading

import pytest
import torch
from checkpoint_worker import go, trained
from ranks import HANG, start

from bossnas.errors import ConfigError
from bossnas.runs import checkpoint, tensorfiles

BOTH = pytest.mark.parametrize("asynchronous", [False, True])


def tensors(step):
    return {
        "online.w": torch.full((3, 2), float(step)),
        "online.n": torch.tensor(step),
        "target.e": torch.zeros(0, 2),
        "target.last": torch.arange(24.0).view(1, 2, 3, 4).contiguous(memory_format=torch.channels_last) + step,
        "target.half": torch.full((5,), step, dtype=torch.bfloat16),
    }


def save(root, name, step, keep=2, asynchronous=True):
    saver = checkpoint.Saver(root, keep, asynchronous)
    saver.save(name, tensors(step), {"step": step, "winners": ["12", "3"], "data": {"readers": None}})
    saver.wait()
    saver.close()
    return root / name


def step_of(path):
    """The step of the state, if the tensors are those of that step."""
    state, found = checkpoint.read_state(path), checkpoint.read(path, ["online", "target"])
    assert state == {"format": 2, "step": state["step"], "winners": ["12", "3"], "data": {"readers": None}}
    truth = tensors(state["step"])
    assert found.keys() == truth.keys()
    assert all(torch.equal(found[k], truth[k]) and found[k].dtype == truth[k].dtype for k in truth)
    return state["step"]


@pytest.mark.quick
@BOTH
def test_round_trip_and_the_last_are_kept(tmp_path, asynchronous):
    assert checkpoint.latest(tmp_path / "none") is None
    for step in range(4):
        path = save(tmp_path, f"step-{step}", step, asynchronous=asynchronous)
        assert checkpoint.latest(tmp_path) == path and step_of(path) == step
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-2", "step-3"]
    save(tmp_path, "a", 9, keep=1)  # age goes by order of writing, not by name
    assert sorted(os.listdir(tmp_path)) == ["a", "latest"]
    into = {"online.w": torch.zeros(3, 2), "target.last": torch.zeros(1, 2, 3, 4)}
    checkpoint.load(tmp_path / "a", into)
    assert all(torch.equal(into[name], tensors(9)[name]) for name in into)


def test_same_name_again_replaces(tmp_path):
    for name, step in (("a", 1), ("b", 2), ("a", 3)):
        save(tmp_path, name, step)
    assert step_of(checkpoint.latest(tmp_path)) == 3
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "latest"]


def test_a_kill_while_the_same_name_is_replaced(tmp_path):
    save(tmp_path, "a", 1)
    (tmp_path / "a").rename(tmp_path / "a.old")
    (tmp_path / "a.tmp").mkdir()
    assert step_of(checkpoint.latest(tmp_path)) == 1
    save(tmp_path, "b", 2)
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "latest"] and step_of(tmp_path / "a") == 1


def test_training_goes_on_while_the_thread_writes(tmp_path, monkeypatch):
    """What is written is what `save` was given, and the next save waits for it."""
    go_on, real, written = threading.Event(), tensorfiles.write, []

    def slow(folder, *args):
        go_on.wait(HANG)
        real(folder, *args)
        written.append(folder.name)

    monkeypatch.setattr(tensorfiles, "write", slow)
    saver, values, state = (
        checkpoint.Saver(tmp_path, 2),
        tensors(1),
        {"step": 1, "winners": ["12", "3"], "data": {"readers": None}},
    )
    saver.save("a", values, state)
    values["online.w"].zero_()
    state["winners"].append("4")
    assert not written
    threading.Timer(0.1, go_on.set).start()
    saver.save("b", tensors(2), {})
    assert written[0] == "a.tmp" and step_of(tmp_path / "a") == 1
    saver.close()
    assert written == ["a.tmp", "b.tmp"] and checkpoint.latest(tmp_path) == tmp_path / "b"


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "cut": lambda path: (path / "__0_0.distcp").write_bytes((path / "__0_0.distcp").read_bytes()[:-100]),
    "a bit of the tensors": lambda path: flip(path / "__0_0.distcp"),
    "a bit of the index": lambda path: flip(path / ".metadata"),
    "a bit of the state": lambda path: flip(path / "state.json"),
    "no tensors": lambda path: (path / "__0_0.distcp").unlink(),
    "no state": lambda path: (path / "state.json").unlink(),
    "no manifest": lambda path: (path / "manifest.json").unlink(),
    "bad manifest": lambda path: (path / "manifest.json").write_text('{"order": 2, "files": {"state.json": 3}}'),
    "half a manifest": lambda path: (path / "manifest.json").write_text("{"),
    "gone": shutil.rmtree,
    "of an earlier version": lambda path: (path / "state.pt").write_bytes(b"old"),
}


@pytest.mark.quick
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_never_loaded(tmp_path, damage, caplog):
    save(tmp_path, "a", 1)
    path = save(tmp_path, "b", 2)
    DAMAGE[damage](path)
    assert checkpoint.find_damage(path)
    assert checkpoint.latest(tmp_path) == tmp_path / "a" and "b is passed over" in caplog.text
    if (path / "manifest.json").exists():
        with pytest.raises(ConfigError, match="out: checkpoint .*b is unusable: "):
            checkpoint.whole(path)
    DAMAGE["cut"](tmp_path / "a")
    with pytest.raises(ConfigError, match="out: checkpoint .* is unusable: "):  # never: begin again, silently
        checkpoint.latest(tmp_path)


def test_a_damaged_one_is_not_counted_among_those_kept(tmp_path):
    save(tmp_path, "a", 1)
    flip(save(tmp_path, "b", 2) / "__0_0.distcp")
    save(tmp_path, "c", 3)
    assert sorted(os.listdir(tmp_path)) == ["a", "c", "latest"]


def test_a_lost_latest_and_a_folder_of_a_run(tmp_path):
    save(tmp_path / "checkpoints", "a", 1)
    save(tmp_path / "checkpoints", "b", 2)
    (tmp_path / "checkpoints/latest").unlink()
    assert checkpoint.whole(tmp_path) == tmp_path / "checkpoints/b"
    assert checkpoint.whole(tmp_path / "checkpoints/a") == tmp_path / "checkpoints/a"
    assert checkpoint.whole(tmp_path / "nothing") is None


@pytest.mark.quick
def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    path = save(tmp_path, "a", 1)
    (path / ".metadata").write_bytes(pickle.dumps(Evil()))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][".metadata"] = checkpoint._fingerprint(path / ".metadata")
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert checkpoint.latest(tmp_path) == path
    for read in (lambda: checkpoint.load(path, tensors(0)), lambda: checkpoint.read(path, ["online"])):
        with pytest.raises(ConfigError, match="its index holds posix.mkdir"):
            read()
    assert not (tmp_path / "ran").exists()


@pytest.mark.quick
@BOTH
@pytest.mark.parametrize(
    "number, words",
    [(errno.ENOSPC, "no room on the disk"), (errno.EDQUOT, "no room"), (errno.EACCES, "cannot write to")],
)
def test_write_errors_keep_the_older_one(tmp_path, monkeypatch, asynchronous, number, words):
    save(tmp_path, "a", 1)
    saver = checkpoint.Saver(tmp_path, 1, asynchronous)

    def full(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "fsync", full)
        with pytest.raises(ConfigError, match=f"out: {words}"):
            saver.save("b", tensors(2), {})
            saver.wait()
    assert sorted(os.listdir(tmp_path)) == ["a", "latest"] and step_of(checkpoint.latest(tmp_path)) == 1
    saver.save("b", tensors(2), {})  # the error has been told once
    saver.close()
    assert sorted(os.listdir(tmp_path)) == ["b", "latest"]


@BOTH
def test_a_really_full_disk(tmp_path, asynchronous):
    mounted = (
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], capture_output=True)
        if shutil.which("mount") and os.geteuid() == 0
        else None
    )
    if mounted is None or mounted.returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        save(tmp_path, "a", 1)
        saver = checkpoint.Saver(tmp_path, 1, asynchronous)
        with pytest.raises(ConfigError, match="out: no room on the disk"):
            saver.save("b", {"x": torch.zeros(1_000_000)}, {})
            saver.wait()
        assert sorted(os.listdir(tmp_path)) == ["a", "latest"] and step_of(checkpoint.latest(tmp_path)) == 1
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_require_room(tmp_path, monkeypatch):
    checkpoint.require_room(tmp_path / "not" / "there", 1000)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 8, 2**29))
    with pytest.raises(ConfigError, match="out: no room .*0.50 GiB are free, the run needs 1.00 GiB"):
        checkpoint.require_room(tmp_path, 2**30)


def test_another_model_is_refused(tmp_path):
    path = save(tmp_path, "a", 1)
    for wrong in ({"online.w": torch.zeros(2, 3)}, {"online.v": torch.zeros(3, 2)}):
        with pytest.raises(ConfigError, match="out: checkpoint .* does not fit this run"):
            checkpoint.load(path, wrong)
    with pytest.raises(ConfigError, match="of block 0's optimizer it has 0 tensors, 4 are needed"):
        checkpoint.load_engine(path, 0, trained("single")[2])


@pytest.mark.quick
def test_going_on_with_an_engine_equals_not_stopping(tmp_path):
    module, _, engine = trained("single")
    saver = checkpoint.Saver(tmp_path, 1)
    saver.save("a", {**module.state_dict(), **checkpoint.momentum(2, engine)}, {})
    go(module, engine, [2, 3])
    saver.close()
    resumed, _, other = trained("single", steps=0)
    checkpoint.load(tmp_path / "a", resumed.state_dict())
    checkpoint.load_engine(tmp_path / "a", 2, other)
    go(resumed, other, [2, 3])
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_kill_9_at_any_moment_leaves_a_whole_one(tmp_path):
    code, output = start("python", 1, "checkpoint_worker.py", "kills", str(tmp_path))
    assert code == 0, output
    outcome = json.loads((tmp_path / "outcome.json").read_text())
    assert len(outcome) == 10
    for moment, seen in outcome.items():
        old = 2 if moment == "older ones" else 1  # it is published by then
        assert seen == {"killed": True, "left": [old, old], "after": ["c", "latest"], "next": 3}, moment


def test_the_end_of_a_process_does_not_wait_for_a_thread_that_hangs(tmp_path):
    code, output = start("python", 1, "checkpoint_worker.py", "hang", str(tmp_path))
    assert code == 0 and not output, output


def test_two_ranks_with_shares_and_one_rank_without(tmp_path):
    module, _, engine = trained("single", steps=3)
    saver = checkpoint.Saver(tmp_path / "single", 1)
    saver.save("a", {**module.state_dict(), **checkpoint.momentum(0, engine)}, {})
    saver.close()
    code, output = start("torchrun", 2, "checkpoint_worker.py", "ranks", str(tmp_path))
    assert code == 0, output

    path = tmp_path / "plain/a"
    assert checkpoint.find_damage(path) is None and checkpoint.read_state(path) == {"format": 2, "from": 0}
    found = checkpoint.read(path, [*(f"w{i}" for i in range(20)), "own0", "own1"])
    assert len(found) == 22 and all((found[f"w{i}"] == i).all() for i in range(20)) and (found["own1"] == 1).all()
    sizes = {name: size for name, (size, _) in json.loads((path / "manifest.json").read_text())["files"].items()}
    assert sizes.keys() == {"__0_0.distcp", "__1_0.distcp", ".metadata", "state.json"}
    shares = [sizes["__0_0.distcp"], sizes["__1_0.distcp"]]  # what both hold is written once, half by each
    assert 80_000 < sum(shares) < 140_000 and min(shares) > 40_000

    alone, _, other = trained("single", steps=0)  # what two ranks of FSDP2 wrote, in one process
    checkpoint.load(tmp_path / "sharded/a", alone.state_dict())
    checkpoint.load_engine(tmp_path / "sharded/a", 0, other)
    truth, _, reference = trained("single")
    for name, tensor in {**truth.state_dict(), **checkpoint.momentum(0, reference)}.items():
        got = {**alone.state_dict(), **checkpoint.momentum(0, other)}[name]
        torch.testing.assert_close(got, tensor, rtol=1e-6, atol=1e-7)  # sums over ranks round differently


def test_going_back_passes_over_a_neighbour_whose_manifest_is_damaged(tmp_path):
    for step in range(4):
        save(tmp_path, f"step-{step}", step, keep=9)
    (tmp_path / "step-2/manifest.json").write_text("{")
    assert checkpoint.rewind(tmp_path / "step-1") == ["step-3"]
    assert checkpoint.latest(tmp_path) == tmp_path / "step-1"
    assert step_of(save(tmp_path, "step-4", 4, keep=9)) == 4
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-0", "step-1", "step-4"]
