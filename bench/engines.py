"""Every engine on one and two CPU ranks against one process: weights after three updates a block, ratings of a search.

    python bench/engines.py --json out.json

For each space a tiny search of all blocks through launch/train.py on the embedded images: 16 images an update, whatever
the number of ranks, three updates a block at the paper's learning rate for such a batch, rated at the block's end. With
synchronised batch norms, since otherwise two ranks with 8 images each compute something else than one rank with 16. The
reference is `engine.name: single`. Reported: the largest difference of a parameter, online, target or predictor, of the
first block, after its three updates, and of all blocks, which train on what the blocks before give; the largest
difference of a path's rating, and relative to the spread of its block's ratings; and whether the winners are equal.
``moved``: how far the reference's parameters came.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

root = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(root), str(root / "kernels")]

import torch

from bossnas.config.loading import load
from bossnas.runs import checkpoint
from bossnas.search.run import build

WIDTHS = {"nats": 0.25, "hytra": 0.0625}
RATES = {"nats": 0.48, "hytra": 4.8}  # the paper's, for a batch of 4096
ENGINES = {"ddp": None, "fsdp2": None, "deepspeed ZeRO-0": 0, "deepspeed ZeRO-1": 1, "deepspeed ZeRO-2": 2}
BATCH, STEPS = 16, 3
FIRST = re.compile(r"(online|target)\.(stem|blocks\.0|projectors\.0)\.|predictors\.0\.")


def launch(space: str, engine: str, stage: int | None, ranks: int, out: Path) -> None:
    values = {
        "out": str(out),
        "kernels": "reference",
        "space": {"name": space, "width": WIDTHS[space], "image_size": 32},
        "heads": {"hidden": 64, "out": 32},
        "data": {"workers": 0, "val_images": 48, "recipe": "cifar" if space == "nats" else "imagenet"},
        "train": {
            "batch": BATCH,
            "micro_batch": BATCH // ranks,
            "epochs": 1,
            "steps_per_epoch": STEPS,
            "warmup_epochs": 0,
            "lr": RATES[space] * BATCH / 4096,
            "sync_batch_norm": True,
        },
        "rating": {"batch": 16, "calibration_images": 32, "every_epochs": 0},
        "engine": {"name": engine, "device": "cpu"},
    }
    if stage is not None:
        values["engine"]["deepspeed"] = {"zero_optimization": {"stage": stage}}
    config = out.with_suffix(".json")
    config.write_text(json.dumps(values))
    front = [sys.executable]
    if stage is not None:
        front += ["-m", "deepspeed.launcher.runner", "--num_accelerators", str(ranks), "--master_port", "29517"]
    elif ranks > 1:
        front += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [*front, str(root / "launch/train.py"), "--config", str(config)]
    done = subprocess.run(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}")


def result(out: Path) -> tuple[dict, list[dict], list[str]]:
    """Tensors of the last checkpoint, scores of the paths of every block, winners."""
    tensors = checkpoint.read(checkpoint.latest(out / "checkpoints"), ("online", "target", "predictors"))
    files = sorted((out / "ratings").glob("block_*.json"))
    scores = [json.loads(file.read_text())["scores"]["population_centre"] for file in files]
    return tensors, scores, json.loads((out / "architecture.json").read_text())["paths"]


def compare(ours: tuple, theirs: tuple) -> dict:
    tensors, scores, winners = ours
    assert tensors.keys() == theirs[0].keys()
    off = {name: (t - theirs[0][name]).abs().max().item() for name, t in tensors.items() if t.is_floating_point()}
    ratings, relative = 0.0, 0.0
    for mine, other in zip(scores, theirs[1], strict=True):
        apart = max(abs(mine[path] - other[path]) for path in other) if mine.keys() == other.keys() else float("nan")
        ratings = max(ratings, apart)
        relative = max(relative, apart / (max(other.values()) - min(other.values())))
    return {
        "first_block": max(value for name, value in off.items() if FIRST.match(name)),
        "all_blocks": max(off.values()),
        "ratings": ratings,
        "relative": relative,
        "winners_equal": winners == theirs[2],
    }


def start(config: Path) -> dict[str, torch.Tensor]:
    """The weights before training."""
    run = build(load(config))
    networks = {"online": run.online, "target": run.target, "predictors": run.predictors}
    return {f"{part}.{name}": t for part, network in networks.items() for name, t in network.named_parameters()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spaces", nargs="+", choices=WIDTHS, default=list(WIDTHS))
    parser.add_argument("--ranks", nargs="+", type=int, choices=(1, 2, 4, 8), default=[1, 2])
    parser.add_argument("--json", help="write the results there")
    options = parser.parse_args()
    rows = []
    folder = Path(tempfile.mkdtemp(prefix="engines-"))
    print("| space | engine | ranks | block 0 | all blocks | ratings | ratings / spread | winners |")
    print("|-|-|-|-|-|-|-|-|")
    for space in options.spaces:
        launch(space, "single", None, 1, folder / space)
        truth = result(folder / space)
        began = start(folder / f"{space}.json")
        moved = max((t - truth[0][name]).abs().max().item() for name, t in began.items() if FIRST.match(name))
        print(f"| {space} | single, moved | 1 | {moved:.1e} | | | | |", flush=True)
        for name, stage in ENGINES.items():
            for ranks in options.ranks:
                out = folder / f"{space}-{len(rows)}"
                launch(space, name.split()[0], stage, ranks, out)
                row = {"space": space, "engine": name, "ranks": ranks, "moved": moved, **compare(result(out), truth)}
                rows.append(row)
                shutil.rmtree(out)
                print(
                    f"| {space} | {name} | {ranks} | {row['first_block']:.1e} | {row['all_blocks']:.1e} | "
                    f"{row['ratings']:.1e} | {row['relative']:.1e} | "
                    f"{'equal' if row['winners_equal'] else 'differ'} |",
                    flush=True,
                )
    shutil.rmtree(folder)
    if options.json:
        Path(options.json).write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
