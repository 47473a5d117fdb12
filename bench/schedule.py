"""All blocks at once against one block after the other, on the same ranks, with equal images for every block.

    python bench/schedule.py --cifar 'cifar10/train-*.tar' --val 'cifar10/test-*.tar' --ranks 2 --json out.json

The NATS space with three blocks, on CPU ranks with one thread each. Three searches under torchrun: sequential (the
ranks share every batch), sequential with another seed (how far two runs agree that differ in nothing else), and
block_parallel (each rank trains blocks of its own). Reported of the training alone, without ratings and saves: wall
seconds for a step of all blocks, CPU seconds of all ranks for an image in all blocks (which is what a machine with
fewer cores than ranks can tell), the share of its time that each row waits; and of the last ratings of every block: the
rank correlation of the schedules. ``--trace FILE``: the spans of the pipeline, for ui.perfetto.dev.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

root = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(root), str(root / "kernels")]

import numpy as np
import torch

from bossnas.config.loading import load
from bossnas.distributed import dist, launch
from bossnas.runs.ratings import read_ratings
from bossnas.search.search import search
from bossnas.search.stage import WAITS, Trace
from bossnas.selection.ranking.correlation import coefficients

BESIDE = ("rate", "save")  # spans that are no training


class Timed(Trace):
    """Also the CPU seconds of the process by span."""

    def __init__(self):
        super().__init__(keep=True)
        self.cpu: dict[str, float] = {}

    @contextmanager
    def span(self, name):
        before = time.process_time()
        with super().span(name):
            yield
        self.cpu[name] = self.cpu.get(name, 0.0) + time.process_time() - before


def work(overrides: list[str], out: Path) -> None:
    """One rank of a search; leaves its times and its spans in ``out``."""
    trace = Timed()
    search(load(None, overrides), trace=trace)
    trace.write(out / f"trace_{dist.rank()}.json", dist.rank())
    (out / f"times_{dist.rank()}.json").write_text(json.dumps({"seconds": trace.seconds, "cpu": trace.cpu}))


def measure(schedule: str, options: argparse.Namespace, folder: Path, seed: int) -> dict:
    """Runs one search on ``options.ranks`` ranks and sums up its times."""
    out = folder / f"{schedule}_{seed}"
    out.mkdir()
    epochs = options.ratings + 1
    overrides = [
        f"out={out / 'run'}",
        f"schedule={schedule}",
        f"seed={seed}",
        "space.name=nats",
        "space.image_size=32",
        f"space.width={options.width}",
        "heads.hidden=256",
        "heads.out=64",
        f"data.train={options.cifar}",
        f"data.val={options.val}",
        "data.recipe=cifar",
        "data.workers=0",
        f"train.batch={options.batch}",
        f"train.micro_batch={options.micro_batch}",
        f"train.epochs={epochs}",
        f"train.steps_per_epoch={options.steps // epochs}",
        f"train.lr={options.lr}",
        "train.warmup_epochs=0",
        f"data.val_images={options.val_images}",
        "rating.batch=256",
        "rating.calibration_images=256",
        f"rating.every_epochs={int(schedule == 'block_parallel')}",
        "checkpoint.every_steps=1000000",
        "engine.name=ddp",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{root}:{root / 'kernels'}"}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(options.ranks),
        str(Path(__file__).resolve()),
        "--work",
        json.dumps([overrides, str(out)]),
    ]
    subprocess.run(command, check=True, env=environment, timeout=options.timeout)
    ranks = [json.loads((out / f"times_{rank}.json").read_text()) for rank in range(options.ranks)]
    training = [{name: value for name, value in rank["seconds"].items() if name not in BESIDE} for rank in ranks]
    steps = options.steps // epochs * epochs
    cpu = sum(value for rank in ranks for name, value in rank["cpu"].items() if name not in BESIDE)
    result = {
        "steps": steps,
        "step_s": max(sum(t.values()) for t in training) / steps,
        "cpu_ms_per_image": 1000 * cpu / steps / options.batch,
        "rating_s": max(rank["seconds"]["rate"] for rank in ranks),
    }
    if schedule == "block_parallel":
        result["waits"] = [sum(t[name] for name in WAITS) / sum(t.values()) for t in training]
        result["hand_over"] = [t.get("hand over", 0) / sum(t.values()) for t in training]
        if options.trace:
            events = [
                e
                for rank in range(options.ranks)
                for e in json.loads((out / f"trace_{rank}.json").read_text())["traceEvents"]
            ]
            Path(options.trace).write_text(json.dumps({"traceEvents": events}))
    return result


def correlations(folder: Path, first: str, second: str) -> list[dict]:
    """Of every block's last ratings in two runs."""
    rows = []
    for a, b in zip(*(read_ratings(folder / name / "run") for name in (first, second)), strict=True):
        x, y = (np.array([rating.scores[path] for path in a.scores]) for rating in (a, b))
        found = coefficients(x, y)
        rows.append({"paths": len(x), "spearman": found["spearman"], "kendall": found["kendall"]})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", help="training shards")
    parser.add_argument("--val", help="validation shards")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of every block")
    parser.add_argument("--ratings", type=int, default=1, help="in mid-stage, which choose the leaders")
    parser.add_argument("--batch", type=int, default=192)
    parser.add_argument("--micro-batch", type=int, default=32)
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--lr", type=float, default=0.2)
    parser.add_argument("--val-images", type=int, default=1024)
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for each search")
    parser.add_argument("--trace", help="write the pipeline's spans there")
    parser.add_argument("--json", help="write the result there")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        overrides, out = json.loads(options.work)
        work(overrides, Path(out))
        return

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result = {
            "cores": len(os.sched_getaffinity(0)),
            "torch": torch.__version__,
            **vars(options),
            "schedules": {
                "sequential": measure("sequential", options, folder, 0),
                "sequential, another seed": measure("sequential", options, folder, 1),
                "block_parallel": measure("block_parallel", options, folder, 0),
            },
        }
        result["agreement"] = {
            "block_parallel with sequential": correlations(folder, "sequential_0", "block_parallel_0"),
            "sequential with another seed": correlations(folder, "sequential_0", "sequential_1"),
        }
    print(
        "\n| schedule | ranks | s a step, all blocks | CPU ms an image, all blocks | rows wait | rows hand over | "
        "ratings, s |\n|---|---|---|---|---|---|---|"
    )
    for name, row in result["schedules"].items():
        waits, hands = (
            ", ".join(f"{100 * share:.0f} %" for share in row.get(key, [])) or "-" for key in ("waits", "hand_over")
        )
        print(
            f"| {name} | {options.ranks} | {row['step_s']:.2f} | {row['cpu_ms_per_image']:.2f} | {waits} | {hands} "
            f"| {row['rating_s']:.1f} |"
        )
    print("\n| last ratings of | block | paths | Spearman | Kendall |\n|---|---|---|---|---|")
    for name, rows in result["agreement"].items():
        for block, row in enumerate(rows):
            print(f"| {name} | {block} | {row['paths']} | {row['spearman']:.2f} | {row['kendall']:.2f} |")
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(launch.run(main))
