"""Training steps of one block: seconds, images/s, peak memory and parameters.

    python bench/step.py --config configs/hytra_ds.json --block 3 --prefix '5433|3230|0010' \\
        --set data.train=null --set data.val=null --set train.batch=2 --set train.micro_batch=2

The first step is reported apart: it allocates. Timings are of this machine as it is; compare within one run only.
"""

import argparse
import json
import resource
import statistics
import sys
import time
from pathlib import Path

root = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(root), str(root / "kernels")]

import torch

from bossnas.config.loading import load
from bossnas.distributed import launch
from bossnas.errors import ConfigError
from bossnas.search import search, winners
from bossnas.spaces.paths import decode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--set", action="append", dest="overrides", default=[], metavar="A.B=VALUE")
    parser.add_argument("--block", type=int, default=0)
    parser.add_argument("--prefix", default="", help="winners of the blocks before, as 5433|3230; default: the first")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--json", help="write the result there")
    options = parser.parse_args()

    run = search.build(load(options.config, options.overrides))
    if not 0 <= options.block < run.space.blocks:
        raise ConfigError("--block", f"there is no block {options.block}", f"choose 0 to {run.space.blocks - 1}")
    try:
        prefix = [decode(text) for text in options.prefix.split("|") if text]
    except ValueError:
        raise ConfigError("--prefix", f"{options.prefix!r} is not a list of paths", "write 5433|3230") from None
    stage = run.config.train.epochs * run.steps_per_epoch
    if not 1 <= options.steps <= stage:
        raise ConfigError("--steps", f"{options.steps} is not within the stage of {stage} steps", "change it")
    for block in range(options.block):
        paths = run.space.paths(block, run.state.winners)
        winner = prefix[block] if block < len(prefix) else paths[0]
        if winner not in paths:
            raise ConfigError("--prefix", f"block {block} has no such path", "see docs/method.md")
        winners.freeze_winner(run, winner)
    engine, steps = search.start_block(run)
    seconds = []
    for _ in range(options.steps):
        started = time.perf_counter()
        step = next(step for step in steps if step is not None)  # None after each micro-batch but an update's last
        seconds.append(time.perf_counter() - started)
    gib = (
        torch.cuda.max_memory_allocated()
        if run.machine.device.type == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    ) / 2**30
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
        "peak_gib": round(gib, 2),
    }
    print(json.dumps(result, indent=2))
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(launch.run(main))
