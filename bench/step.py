"""Training steps of one block: seconds, memory, and how they compare with the original release's procedure.

    python bench/step.py --config configs/hytra_ds.json --block 3 --prefix '5433|3230|0010' \\
        --set data.train=null --set data.val=null --set train.batch=2 --set train.micro_batch=2
    python bench/step.py --against-official --rounds 5 --json OUT.json      # all of the table in docs/results/step.md
    python bench/step.py --against-official --only mbconv:0 nats:1          # some rows of it

The first form reports steps of a config, the first one apart: it allocates. Timings are of this machine as it is;
compare within one run only.

The second form takes steps on random images of 8 images in fp32: "ours" is the real training loop with everything in
it but the data, "official" is `bench/official.py`. Each runs in a process of its own, on one thread, and the two take
turns; time is the process's CPU time, the ratio official / ours is the median over the rounds of neighbours. Memory is
the most that the process held, less what it held before its first step; that has the momentum of the whole block.
``--project FOLDER`` adds another checkout of
this project to the comparison, "theirs".
"""

import argparse
import ctypes
import gc
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path

root = Path(os.environ.get("BENCH_PROJECT") or Path(__file__).resolve().parent.parent)
sys.path[:0] = [str(root), str(root / "kernels"), str(Path(__file__).resolve().parent)]

import numpy as np
import torch
from torch import Tensor

from bossnas.config.loading import load
from bossnas.distributed import dist, launch
from bossnas.errors import ConfigError
from bossnas.search import search, winners
from bossnas.search.run import Run
from bossnas.spaces.paths import decode

HYTRA, MBCONV, NATS = "configs/hytra_ds.json", "configs/mbconv_imagenet.yaml", "configs/nats_cifar10.yaml"
PUBLISHED = "5433|3230|0010"  # BossNet-T0
# name: config, block, size of the images, winners before it
ROWS = {
    "mbconv:0": (MBCONV, 0, 224, ""),
    "mbconv:1": (MBCONV, 1, 224, "03"),
    "mbconv:3": (MBCONV, 3, 224, "03|0123|3210"),
    "nats:0": (NATS, 0, 32, ""),
    "nats:1": (NATS, 1, 32, "44"),
    "hytra:0": (HYTRA, 0, 128, ""),
    "hytra:1": (HYTRA, 1, 128, PUBLISHED),
    "hytra:2": (HYTRA, 2, 128, PUBLISHED),
    "hytra:3": (HYTRA, 3, 128, PUBLISHED),
    "hytra:3@224": (HYTRA, 3, 224, PUBLISHED),
}
IMAGES, STEPS = 8, 64  # of a batch; of a stage, more than are taken
GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="steps of this config")
    parser.add_argument("--set", action="append", dest="overrides", default=[], metavar="A.B=VALUE")
    parser.add_argument("--block", type=int, default=0)
    parser.add_argument("--prefix", default="", help="winners of the blocks before, as 5433|3230; default: the first")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--json", help="write the result there")
    parser.add_argument("--against-official", action="store_true", help="compare with the release's procedure")
    parser.add_argument("--only", nargs="+", choices=ROWS, metavar="ROW", default=list(ROWS), help=", ".join(ROWS))
    parser.add_argument("--rounds", type=int, default=5, help="steps of each, after a first one (default 5)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a process (default 1)")
    parser.add_argument("--project", type=Path, help="another checkout to compare with, too")
    parser.add_argument("--turns", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.turns:
        take_turns(*options.turns, options.threads)
    elif options.against_official:
        compare(options)
    elif options.config:
        steps_of(options)
    else:
        parser.error("say --config FILE or --against-official")


def steps_of(options: argparse.Namespace) -> None:
    """Steps of a config, with its own data."""
    run = search.build(load(options.config, options.overrides))
    if not 0 <= options.block < run.space.blocks:
        raise ConfigError("--block", f"there is no block {options.block}", f"choose 0 to {run.space.blocks - 1}")
    stage = run.config.train.epochs * run.steps_per_epoch
    if not 1 <= options.steps <= stage:
        raise ConfigError("--steps", f"{options.steps} is not within the stage of {stage} steps", "change it")
    freeze(run, options.block, options.prefix)
    _, steps = search.start_block(run)
    seconds = []
    for _ in range(options.steps):
        started = time.perf_counter()
        step = next(step for step in steps if step is not None)  # None after each micro-batch but an update's last
        seconds.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() if run.machine.device.type == "cuda" else most_held()
    result = {
        "device": (
            torch.cuda.get_device_name()
            if run.machine.device.type == "cuda"
            else f"cpu, {torch.get_num_threads()} threads"
        ),
        "torch": torch.__version__,
        "space": run.config.space.name,
        "width": run.config.space.width,
        "image_size": run.config.space.image_size,
        "block": options.block,
        "batch": run.config.train.batch,
        "micro_batch": run.config.train.micro_batch,
        "precision": run.config.train.precision,
        "supernet_parameters": sum(p.numel() for p in run.online.parameters()),
        "block_parameters": sum(p.numel() for p in run.online.part(options.block).parameters()),
        "predictor_parameters": sum(p.numel() for p in run.predictors.parameters()),
        "loss": step.loss,
        "first_step_s": round(seconds[0], 3),
        "median_step_s": round(statistics.median(seconds[1:]), 3) if seconds[1:] else None,
        "peak_gib": round(peak / GIB, 2),
    }
    print(json.dumps(result, indent=2))
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n")


def freeze(run: Run, block: int, text: str) -> None:
    """Freezes the blocks before ``block`` along the paths of ``text``, or the first ones."""
    try:
        prefix = [decode(part) for part in text.split("|") if part]
    except ValueError:
        raise ConfigError("--prefix", f"{text!r} is not a list of paths", "write 5433|3230") from None
    for b in range(block):
        paths = run.space.paths(b, run.state.winners)
        winner = prefix[b] if b < len(prefix) else paths[0]
        if winner not in paths:
            raise ConfigError("--prefix", f"block {b} has no such path", "see docs/method.md")
        winners.freeze_winner(run, winner)


def compare(options: argparse.Namespace) -> None:
    """Prints and writes the table of ``--against-official``."""
    report = {"torch": torch.__version__, "threads": options.threads, "images": IMAGES, "rounds": options.rounds}
    report["rows"] = {}
    names = ["ours", "official", *(["theirs"] if options.project else [])]
    print(f"{'row':<12} {'official / ours':>16} {'s ours':>8} {'s official':>10} {'GiB ours':>9} {'GiB official':>12}")
    for row in options.only:
        children = {name: start(name, row, options) for name in names}
        measured: dict[str, list[dict]] = {name: [] for name in names}
        for _ in range(options.rounds + 1):  # the first steps allocate
            for name, child in children.items():
                measured[name].append(ask(child))
        for child in children.values():
            child.stdin.close()
            child.wait()
        found: dict = {}
        for name, steps in measured.items():
            found[name] = {
                "cpu_s": statistics.median(step["cpu"] for step in steps[1:]),
                "wall_s": statistics.median(step["wall"] for step in steps[1:]),
                "peak_gib": steps[-1]["peak"] / GIB,
                "first_loss": steps[0]["loss"],
            }
            if name != "ours":
                pairs = zip(steps[1:], measured["ours"][1:], strict=True)
                found[name]["ratio"] = statistics.median(a["cpu"] / b["cpu"] for a, b in pairs)
        report["rows"][row] = found
        ours, official = found["ours"], found["official"]
        print(
            f"{row:<12} {official['ratio']:>16.2f} {ours['cpu_s']:>8.2f} {official['cpu_s']:>10.2f} "
            f"{ours['peak_gib']:>9.2f} {official['peak_gib']:>12.2f}"
            + (f"  theirs / ours {found['theirs']['ratio']:.2f}" if options.project else ""),
            flush=True,
        )
        if options.json:
            Path(options.json).write_text(json.dumps(report, indent=1) + "\n")


def start(name: str, row: str, options: argparse.Namespace) -> subprocess.Popen:
    command = [sys.executable, __file__, "--turns", name, row, "--threads", str(options.threads)]
    environment = dict(os.environ)
    if name == "theirs":
        environment["BENCH_PROJECT"] = str(options.project.resolve())
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n", f"{name} of {row} did not start"
    return child


def ask(child: subprocess.Popen) -> dict:
    assert child.stdin is not None and child.stdout is not None
    child.stdin.write("step\n")
    child.stdin.flush()
    return json.loads(child.stdout.readline())


def take_turns(name: str, row: str, threads: int) -> None:
    """Takes a step whenever the standard input says so, and says what it cost."""
    torch.set_num_threads(threads)
    channel, sys.stdout = sys.stdout, sys.stderr
    if name == "official":  # the release leaves memory to the C library
        dist.keep_freed_memory = lambda: False
    run, views = prepared(row)
    steps = official(run, views) if name == "official" else ours(run, views)
    del run
    held = forget_peak()
    print("ready", file=channel, flush=True)
    for _ in sys.stdin:
        cpu, wall = time.process_time(), time.perf_counter()
        loss = next(steps)
        cost = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
        print(json.dumps({**cost, "loss": loss, "peak": peak() - held}), file=channel, flush=True)


def prepared(row: str) -> tuple[Run, list[Tensor]]:
    """A run whose blocks before the row's are frozen, and the views of random images."""
    config, block, size, prefix = ROWS[row]
    settings = {
        "data": {"train": None, "val": None, "workers": 0},
        "space.image_size": size,
        "train": {"batch": IMAGES, "micro_batch": IMAGES, "precision": "fp32", "epochs": 1, "warmup_epochs": 0},
        "train.steps_per_epoch": STEPS,
        "rating": {"calibration_images": 2, "calibration_batches": 1},
        "engine": {"deepspeed": {}, "name": "single", "device": "cpu"},
    }
    overrides = [
        f"{section}.{key}={json.dumps(value)}" if key else f"{section}={json.dumps(value)}"
        for section, values in settings.items()
        for key, value in (values.items() if isinstance(values, dict) else [("", values)])
    ]
    run = search.build(load(str(root / config), overrides))
    freeze(run, block, prefix)
    for network in (run.online, run.target):  # two networks of full size in two processes need 14 GiB
        del network.blocks[block + 1 :], network.projectors[block + 1 :]
    generator = torch.Generator().manual_seed(0)
    views = [torch.randn(IMAGES, 3, size, size, generator=generator) for _ in range(2 * run.space.view_pairs)]
    return run, views


def ours(run: Run, views: list[Tensor]) -> Iterator[float]:
    shown = [x.contiguous(memory_format=torch.channels_last) for x in views]
    _, steps = search.start_block(run, repeat(shown))  # the optimizer's state exists from here on
    return (step.loss for step in steps if step is not None)


def official(run: Run, views: list[Tensor]) -> Iterator[float]:
    from official import OfficialStep

    from bossnas.optim.cosine import ema_momentum
    from bossnas.supernet.train_block import sample_paths

    train, block = run.config.train, run.state.block
    assert train.lr and np.isfinite(train.lr)
    settings = {key: getattr(train, key) for key in ("lr", "momentum", "weight_decay", "trust")}
    one = OfficialStep(run.online, run.target, run.predictors[block], run.state.winners, settings)

    def taken(step: int) -> float:
        paths = sample_paths(run.space, block, run.state.winners, run.config.seed, step, train.paths)
        return one.step(paths, views, ema_momentum(step, STEPS, train.ema))

    return map(taken, range(STEPS))


def forget_peak() -> int:
    """Bytes that the process holds; `peak` counts from now on."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed while the networks were built goes back first
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    """The most bytes that the process has held since `forget_peak`."""
    text = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", text)[1]) * 1024  # type: ignore[index]


def most_held() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    sys.exit(launch.run(main))
