"""One process of runs/test_checkpoint.py: `ranks FOLDER` of two under torchrun, `kills FOLDER`, `hang FOLDER`."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
from ranks import HANG
from torch import nn

from bossnas.distributed import dist, launch
from bossnas.distributed.engines import make
from bossnas.errors import ConfigError
from bossnas.optim.groups import parameter_groups
from bossnas.optim.lars import LARS
from bossnas.runs import checkpoint, tensorfiles


def trained(name: str, steps: int = 2):
    """A small network and its engine after some steps. A row count that two ranks cannot halve, and a single row."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1))
    engine = make(name, accumulate=1, micro_batch=2)
    run, _ = engine.wrap(module, None, lambda module, followers, sharded: LARS(parameter_groups(module), lr=1.0))
    go(run, engine, range(steps))
    engine.gather()
    return module, run, engine


def go(module, engine, steps):
    for step in steps:
        engine.micro(module(torch.full((2, 4), 1.0 + step)).square().mean(), last=True)
        engine.step(0.5)


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def ranks(folder: Path) -> None:
    me = dist.rank()
    saver = checkpoint.Saver(folder / "plain", keep=2)
    same = {f"w{i}": torch.full((1000,), float(i)) for i in range(20)}
    own = {f"own{me}": torch.full((3,), float(me))}  # as of rows that train different blocks
    saver.save("a", {**same, **own}, {"from": me})
    for tensor in same.values():
        tensor.fill_(-1)  # goes on while the thread writes
    dist.barrier()  # messages of the training, between those of the thread
    saver.wait()

    # an error of one rank comes up on both, in the next save or wait, and the run can go on
    for number, words in ((errno.ENOSPC, "no room on the disk"), (errno.EACCES, "cannot write to")):
        real = tensorfiles.FileSystemWriter.write_data

        def fail(*args, number=number):
            raise RuntimeError("torch.save") from OSError(number, os.strerror(number))

        if me == 1:
            tensorfiles.FileSystemWriter.write_data = fail
        saver.save("b", same, {})
        try:
            saver.wait()
        except ConfigError as error:
            assert words in str(error), error
        else:
            raise AssertionError("nobody heard of it")
        tensorfiles.FileSystemWriter.write_data = real
        dist.barrier()
        assert sorted(os.listdir(folder / "plain")) == ["a", "latest"]
        dist.barrier()
    if me == 1:  # a bug of one rank
        tensorfiles.FileSystemWriter.write_data = lambda *args: 1 / 0
    saver.save("b", same, {})
    try:
        saver.save("c", same, {})
    except RuntimeError as error:
        assert "ZeroDivisionError" in str(error), error
    else:
        raise AssertionError("nobody heard of it")
    tensorfiles.FileSystemWriter.write_data = real
    saver.close()

    _, run, engine = trained("fsdp2")
    before = {name: whole(tensor).clone() for name, tensor in checkpoint.momentum(0, engine).items()}
    saver = checkpoint.Saver(folder / "sharded", keep=1, asynchronous=True)
    saver.save("a", {**run.state_dict(), **checkpoint.momentum(0, engine)}, {})
    go(run, engine, [7])
    saver.wait()
    saver.close()
    # back into shares, of what two ranks wrote and of what one rank with another engine wrote
    for source in ("sharded", "single"):
        truth = before if source == "sharded" else checkpoint.read(folder / "single/a", ["momentum"])
        checkpoint.load_engine(folder / source / "a", 0, engine)
        for name, tensor in checkpoint.momentum(0, engine).items():
            assert torch.equal(whole(tensor), truth[name]), (source, name)


def kills(folder: Path) -> None:
    """Has a child process die at each moment of a save that follows another; then another child saves once more."""
    moments = {  # the call at which SIGKILL comes; calls before it, in the save
        "begin": (checkpoint, "_clean", 0),
        "state": (checkpoint, "_write", 0),
        "tensors": (torch, "save", 2),
        "index": (tensorfiles.pickle, "dump", 0),
        "checksums": (checkpoint, "_fingerprint", 1),
        "manifest": (checkpoint, "_write", 1),
        "rename": (Path, "rename", 1),
        "renamed": (checkpoint, "_point", 0),
        "latest": (os, "replace", 0),
        "older ones": (checkpoint, "_remove", 1),
    }
    outcome = {}
    for moment, (place, name, calls) in moments.items():
        root = folder / moment
        child(lambda root=root: save(root, "a", 1))
        status = child(lambda root=root, at=(place, name, calls): save(root, "b", 2, at))
        found = checkpoint.latest(root)
        left = checkpoint.read_state(found)["step"], checkpoint.read(found, ["w"])["w.x"][0].item()
        child(lambda root=root: save(root, "c", 3))
        outcome[moment] = {
            "killed": status == -signal.SIGKILL,
            "left": left,
            "after": sorted(os.listdir(root)),
            "next": checkpoint.read_state(checkpoint.latest(root))["step"],
        }
    (folder / "outcome.json").write_text(json.dumps(outcome))


def child(function) -> int:
    process = os.fork()
    if process == 0:
        try:
            function()
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def save(root: Path, name: str, step: int, kill_at=None) -> None:
    saver = checkpoint.Saver(root, keep=1)
    if kill_at is not None:
        place, call, left = kill_at
        real = getattr(place, call)

        def counted(*args, **kwargs):
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(10)
            left -= 1
            return real(*args, **kwargs)

        setattr(place, call, counted)
    saver.save(name, {f"w.{letter}": torch.full((100,), float(step)) for letter in "xyz"}, {"step": step})
    saver.wait()
    saver.close()


def hang(root: Path) -> None:
    """Ends while the thread of a save does not come back."""
    tensorfiles.write = lambda *args: time.sleep(2 * HANG)
    checkpoint.Saver(root, keep=1).save("a", {}, {})


if __name__ == "__main__":
    if sys.argv[1] == "ranks":
        launch.run(lambda: ranks(Path(sys.argv[2])))
    else:
        {"kills": kills, "hang": hang}[sys.argv[1]](Path(sys.argv[2]))
