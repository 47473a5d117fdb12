"""What a checkpoint costs: seconds that training stands still, seconds until it is on disk, bytes.

    python bench/checkpoints.py --json checkpoints.json
    python bench/checkpoints.py --ranks 1 2 4 --width 0.5 --folder /mnt/scratch

Starts itself under torchrun for every number of ranks, on the CPU (gloo). A HyTra supernet, its target, its predictors
and the momentum of its largest block are saved as a search with DDP saves them, a few times, with and without
`checkpoint.asynchronous`. "Work" is what one core multiplies meanwhile, compared with the same seconds without a save:
how much the thread that writes takes from the training. The first save of each kind is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

root = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(root), str(root / "kernels")]

import torch

from bossnas import spaces
from bossnas.distributed import dist, launch
from bossnas.runs import checkpoint
from bossnas.supernet.heads import predictor
from bossnas.supernet.supernet import Supernet

HIDDEN, OUT = 1024, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--width", type=float, default=0.125, help="of the HyTra supernet")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write; default: the folder for temporary files")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)  # started by this script, as one rank
    options = parser.parse_args()
    if options.rank_of is not None:
        sys.exit(launch.run(lambda: measure(options)))
    rows = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for ranks in options.ranks:
            subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "torch.distributed.run",
                    "--standalone",
                    "--nproc_per_node",
                    str(ranks),
                    __file__,
                    "--rank-of",
                    folder,
                    "--width",
                    str(options.width),
                    "--repeats",
                    str(options.repeats),
                ],
                check=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            rows += json.loads((Path(folder) / "rows.json").read_text())
    print("| ranks | asynchronous | blocked, s | on disk after, s | training's work meanwhile | MB | MB/s |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        work = "-" if row["work"] is None else f"{row['work']:.0%}"
        print(
            f"| {row['ranks']} | {'yes' if row['asynchronous'] else 'no'} | {_spread(row['blocked'])} | "
            f"{_spread(row['durable'])} | {work} | {row['bytes'] / 1e6:.0f} | "
            f"{row['bytes'] / 1e6 / statistics.median(row['durable']):.0f} |"
        )
    print(
        f"Median (least to most) of {options.repeats} saves; {row['tensors']} tensors; torch {torch.__version__}, "
        f"{len(os.sched_getaffinity(0))} cores."
    )
    if options.json is not None:
        options.json.write_text(json.dumps({"width": options.width, "rows": rows}, indent=2) + "\n")


def measure(options: argparse.Namespace) -> None:
    tensors = supernet(options.width)
    rows = [
        saves(options.rank_of / f"{dist.world_size()}-{asynchronous}", tensors, asynchronous, options.repeats)
        for asynchronous in (False, True)
    ]
    if dist.rank() == 0:
        (options.rank_of / "rows.json").write_text(json.dumps(rows))


def supernet(width: float) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    space = spaces.make("hytra", width=width, image_size=224, restricted=True, split="cifar10")
    online = Supernet(space, HIDDEN, OUT)
    tensors = {
        f"{kind}.{name}": tensor.clone()
        for kind in ("online", "target")
        for name, tensor in online.state_dict().items()
    }
    largest = max(
        (online.part(block) for block in range(space.blocks)),
        key=lambda part: sum(p.numel() for p in part.parameters()),
    )
    tensors |= {f"momentum.0.{name}": p.detach().clone() for name, p in largest.named_parameters()}
    return tensors | {
        f"predictors.{block}.{name}": tensor
        for block in range(space.blocks)
        for name, tensor in predictor(HIDDEN, OUT).state_dict().items()
    }


def saves(root: Path, tensors: dict[str, torch.Tensor], asynchronous: bool, repeats: int) -> dict:
    saver = checkpoint.Saver(root, keep=2, asynchronous=asynchronous)
    stop = time.perf_counter() + 3
    alone = rate(lambda: time.perf_counter() < stop)
    blocked, durable, work = [], [], []
    for step in range(repeats + 1):
        dist.barrier()
        began = time.perf_counter()
        saver.save(f"step{step}", tensors, {"step": step})
        blocked.append(time.perf_counter() - began)
        if asynchronous:  # as the training, until the thread has done
            work.append(rate(saver._thread.is_alive) / alone)
        saver.wait()
        durable.append(time.perf_counter() - began)
    path = checkpoint.latest(root)
    size = sum(file.stat().st_size for file in path.iterdir())
    saver.close()
    return {
        "ranks": dist.world_size(),
        "asynchronous": asynchronous,
        "blocked": blocked[1:],
        "durable": durable[1:],
        "work": statistics.median(work[1:]) if work else None,
        "bytes": size,
        "tensors": len(tensors),
    }


def rate(go_on) -> float:
    """Small matrix products a second, as long as ``go_on``."""
    a, count, began = torch.randn(256, 256), 0, time.perf_counter()
    while go_on():
        a @ a
        count += 1
    return count / (time.perf_counter() - began)


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
