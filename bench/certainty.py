"""Are the standard errors of ratings right? Rates a block on many other sets of images and compares.

    python bench/certainty.py --config configs/quickstart_ds.json                 # an untrained supernet's block 0
    python bench/certainty.py --run runs/quickstart --block 3 --json certainty.json

Cuts the training images, in a random order, into sets of --images and rates the block on each set. Every rating states
an error for every score, and for the difference between every path and the path that is best on all sets together. A
stated interval is score +- t x error, with t of Student's distribution at 95 %; "covered" is the share of intervals
that hold the mean of the other sets. (That mean has an error of its own, by which intervals are widened: x sqrt(1 + 1 /
(sets - 1)).) "error / spread": the stated errors' root mean square by the standard deviation between sets; 1 is right.

    python bench/certainty.py --config configs/quickstart_ds.json --against BEFORE

BEFORE is a checkout of a version that kept no errors: CPU seconds of rating the block there and here, in turns, one
thread, and their ratio.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

root = Path(__file__).resolve().parent.parent
if "--project" in sys.argv:  # a process of `against`
    root = Path(sys.argv[sys.argv.index("--project") + 1]).resolve()
sys.path[:0] = [str(root), str(root / "kernels")]

import numpy as np
import torch
from scipy import stats

from bossnas.config.loading import load
from bossnas.config.search import Config
from bossnas.data.batches import fixed_view_batches
from bossnas.data.order import FixedBatches
from bossnas.runs.folder import read_config
from bossnas.search.rating import Calibration
from bossnas.search.run import Run, build, restore
from bossnas.spaces.ops import GroupedBatchNorm
from bossnas.supernet.rate_block import RatingOptions, Validation, rate_block

try:
    from bossnas.runs.certainty import Parts
except ImportError:  # in a version before it
    Parts = None


def made(arguments: argparse.Namespace) -> Run:
    if arguments.run:
        run = build(read_config(arguments.run), training=False)
        restore(run, arguments.run, training=False)
        return run
    run = build(load(arguments.config, arguments.set, Config), training=False)
    for network in (run.online, run.target):
        for module in network.modules():
            if isinstance(module, GroupedBatchNorm) and not module.weight.any():
                torch.nn.init.ones_(module.weight)
    return run


def validation(run: Run, number: int, images: int, batch: int) -> Validation:
    """Set ``number`` of the training images."""
    batches = images // batch

    def take(wanted):
        only = [number * batches + b for b in wanted]
        fixed = FixedBatches(len(run.images.train), batch, run.config.seed + 1, shuffle=True, only=only)
        return fixed_view_batches(
            run.images.train, run.views(0, run.space.view_pairs), run.config.data, fixed, device=run.machine.device
        )

    return Validation([batch] * batches, take)


def timed(run: Run, block: int, images: int, batch: int) -> float:
    """CPU seconds of a rating; the images are loaded and calibration is drawn beforehand."""
    winners: list = []
    while len(winners) < block:
        winners.append(run.space.paths(len(winners), winners)[0])
    calibration = list(Calibration(run))
    pairs = list(validation(run, 0, images, batch).take(range(images // batch)))
    began = time.process_time()
    rate_block(
        run.networks(block),
        winners,
        run.space.paths(block, winners),
        calibration,
        Validation.held(pairs),
        RatingOptions(run.config.rating.temperature, 16),
    )
    return time.process_time() - began


def against(before: Path, rounds: int) -> None:
    """Runs `timed` in both checkouts, in turns, each in a process of its own."""
    given = [a for a in sys.argv[1:]]
    at = given.index("--against")
    del given[at : at + 2]
    times: dict[Path, list[float]] = {before: [], root: []}
    for _ in range(rounds):
        for project in times:
            command = [sys.executable, __file__, *given, "--project", str(project)]
            found = subprocess.run(command, capture_output=True, text=True, check=True)
            times[project].append(float(found.stdout.split()[-1]))
    for project, seconds in times.items():
        print(f"{project}: " + ", ".join(f"{s:.2f}" for s in seconds) + " CPU s")
    ratios = [new / old for old, new in zip(times[before], times[root], strict=True)]
    print(f"ratio {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="of a supernet that is rated untrained")
    parser.add_argument("--run", type=Path, help="or a run folder")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="overrides of --config")
    parser.add_argument("--block", type=int, default=0)
    parser.add_argument("--images", type=int, default=256, help="images in a set (default 256)")
    parser.add_argument("--batch", type=int, default=128, help="images in a batch (default 128)")
    parser.add_argument("--sets", type=int, help="default: all that the training images make")
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--against", type=Path, metavar="BEFORE", help="compare times with this checkout")
    parser.add_argument("--rounds", type=int, default=5, help="of --against (default 5)")
    parser.add_argument("--project", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.project:
        torch.set_num_threads(1)
        print(timed(made(arguments), arguments.block, arguments.images, arguments.batch))
        return
    if arguments.against:
        against(arguments.against, arguments.rounds)
        return
    run, block = made(arguments), arguments.block
    sets = len(run.images.train) // arguments.images
    sets = min(sets, arguments.sets or sets)
    winners = run.state.winners[:block]
    while len(winners) < block:  # untrained: any path leads on
        winners.append(run.space.paths(len(winners), winners)[0])
    paths, began = run.space.paths(block, winners), time.process_time()
    found = []
    for number in range(sets):
        rated = rate_block(
            run.networks(block),
            winners,
            paths,
            Calibration(run),
            validation(run, number, arguments.images, arguments.batch),
            RatingOptions(run.config.rating.temperature, 16),
        )
        found.append(rated)
        print(f"set {number + 1} of {sets}, {time.process_time() - began:.0f} CPU s", file=sys.stderr, flush=True)
    rows = {}
    quantile = stats.t.ppf(0.975, len(found[0].images) - 1) * np.sqrt(1 + 1 / (sets - 1))
    print(f"{'':>32} {'score':>22} {'difference to the best':>30}")
    print(f"{'':>32} {'covered':>10} {'error/spread':>12} {'covered':>14} {'error/spread':>14}")
    for name in found[0].scores:
        scores = np.array([list(rated.scores[name].values()) for rated in found])  # [sets, paths]
        images = np.array(found[0].images, np.float64)
        parts = [Parts(rated.parts[name].numpy() - s[:, None], images) for rated, s in zip(found, scores, strict=True)]
        best = int(np.argmin(scores.mean(0))) if name == "population_centre" else int(np.argmax(scores.mean(0)))
        errors = np.array([part.error(part.values) for part in parts])
        paired = np.array([part.error(part.values - part.values[best]) for part in parts])
        others = np.delete(np.arange(len(paths)), best)
        row = []
        for values, error in (
            (scores, errors),
            ((scores - scores[:, best : best + 1])[:, others], paired[:, others]),
        ):
            rest = (values.sum(0) - values) / (sets - 1)
            row += [
                float((np.abs(values - rest) <= quantile * error).mean()),
                float(np.sqrt((error**2).mean() / values.var(0, ddof=1).mean())),
            ]
        rows[name] = row
        print(f"{name:>32} {row[0]:>10.1%} {row[1]:>12.3f} {row[2]:>14.1%} {row[3]:>14.3f}", flush=True)
    if arguments.json:
        about = {key: str(value) for key, value in vars(arguments).items()}
        arguments.json.write_text(json.dumps({"sets": sets, "paths": len(paths), "of": about, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
