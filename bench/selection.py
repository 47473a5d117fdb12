"""Selection from the ratings of every path of HyTra and MBConv, under two limits; and how latencies add up.

    python bench/selection.py --json select.json                      # seconds and peak memory, one process per space
    python bench/selection.py --latency configs/quickstart_ds.json --networks 20 --json latency.json

The ratings are made up: "random" scores, and scores that "follow size" as real ratings do, which makes limits bind.
Costs are real, at 224 px. In HyTra the result is compared with an enumeration of all 1,615,872 architectures.
--latency: the sum of a network's layers in a measured table, against the same network timed from end to end.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import sys
import time
from pathlib import Path

root = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(root), str(root / "kernels")]

import numpy as np
import torch

from bossnas import spaces
from bossnas.config.loading import load
from bossnas.distributed import dist, launch
from bossnas.files import write_json
from bossnas.runs.ratings import BlockRating
from bossnas.selection import latency, select
from bossnas.selection.graph import Graph
from bossnas.selection.pareto import nondominated
from bossnas.spaces.cost import COSTS, CostTable, call_stem
from bossnas.spaces.paths import encode

TOP = 10
ROUNDS = 5  # of --latency


def made_up_ratings(table: CostTable, kind: str, seed: int) -> list[BlockRating]:
    """Every path of every block, at all the scales from which it can start."""
    rng, ratings = np.random.default_rng(seed), []
    for block, starts in enumerate(table.starts):
        macs = {path: table.path(block, path, start.shape)[0].macs for start in starts for path in start.paths}
        size = np.array([macs[path] for path in sorted(macs)], float)
        values = rng.uniform(-4, 4, len(size))
        if kind == "follow size":
            values = -(size - size.mean()) / size.std() + values / 40
        scores = {encode(path): float(value) for path, value in zip(sorted(macs), values, strict=True)}
        ratings.append(BlockRating(block, [], "made up", "lower", scores, table.space.candidates(block)))
    return ratings


def enumerated(graph: Graph) -> np.ndarray:
    """[architectures, 4]: score and costs of everything, one block's options after the other."""
    tables = {0: np.zeros((1, 1 + len(COSTS)), np.int64)}
    for starts in graph.blocks:
        after: dict[int, list[np.ndarray]] = {}
        for start, rows in tables.items():
            options = starts[start]
            own = np.column_stack([options.scores, options.costs])
            for following in np.unique(options.following):
                chosen = own[options.following == following]
                after.setdefault(int(following), []).append((rows[:, None] + chosen).reshape(-1, own.shape[1]))
        tables = {start: np.concatenate(parts) for start, parts in after.items()}
    return tables[0]


def selection(name: str) -> list[dict]:
    """Times of one space, in this process; peak memory before anything is enumerated."""
    torch.set_num_threads(1)
    begin = time.perf_counter()
    table = CostTable.of(spaces.make(name, width=1.0, image_size=224, restricted=True, split="cifar10"), 224)
    table_s = time.perf_counter() - begin
    rows, checks = [], []
    for kind in ("random", "follow size"):
        ratings = made_up_ratings(table, kind, seed=0)
        begin = time.perf_counter()
        graph = Graph(table, ratings)
        least, most = graph.least[-1][0], select.best(graph, {}, 1)[0].cost
        limits = {cost: int(least[i] + 0.5 * (getattr(most, cost) - least[i])) for i, cost in enumerate(COSTS[:2])}
        graph_s = time.perf_counter() - begin
        begin = time.perf_counter()
        found = select.best(graph, limits, TOP)
        best_s = time.perf_counter() - begin
        begin = time.perf_counter()
        front = select.front(graph, limits, "macs")
        front_s = time.perf_counter() - begin
        rows.append(
            {
                "space": name,
                "ratings": kind,
                "architectures": graph.size(),
                "limits": limits,
                "top": len(found),
                "front_points": len(front),
                "table_s": round(table_s, 2),
                "graph_s": round(graph_s, 3),
                "best_s": round(best_s, 3),
                "front_s": round(front_s, 3),
                "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
            }
        )
        checks.append((graph, limits, found, front))
    for row, (graph, limits, found, front) in zip(rows, checks, strict=True):
        row["equals_enumeration"] = equal_to_enumeration(graph, limits, found, front) if name == "hytra" else None
    return rows


def equal_to_enumeration(graph: Graph, limits: dict, found: list, front: list) -> bool:
    everything = enumerated(graph)
    feasible = everything[(everything[:, 1:3] <= list(limits.values())).all(1)]
    best = [graph.score(score) for score in np.sort(feasible[:, 0])[:TOP]]
    points = {(graph.score(score), int(macs)) for score, macs in feasible[nondominated(feasible[:, :2])][:, :2]}
    return (
        len(everything) == graph.size()
        and best == [one.score for one in found]
        and points == {(one.score, one.cost.macs) for one in front}
        and len(points) == len(front)
    )


def additivity(config_file: str, overrides: list[str], networks: int, batch: int, repeats: int) -> dict:
    """Random networks from end to end and as sums of their layers, in several rounds."""
    of = load(config_file, overrides).space
    space, device = spaces.make(**of.model_dump()), dist.device()
    table = CostTable.of(space, of.image_size)
    stem = space.stem().eval().to(device)
    blocks = [
        [space.layer(b, layer).eval().to(device) for layer in range(space.layers(b))] for b in range(space.blocks)
    ]
    rng, calls = np.random.default_rng(0), {}
    x = torch.randn(batch, *table.image, device=device).contiguous(memory_format=torch.channels_last)
    for _ in range(networks):
        architecture = []
        for block in range(space.blocks):
            paths = space.paths(block, architecture)
            architecture.append(paths[rng.integers(len(paths))])
        calls[tuple(architecture)] = lambda a=tuple(architecture): end_to_end(stem, blocks, a, x)
    rounds = []
    for _ in range(ROUNDS):  # the table and the networks take turns, since a machine's speed drifts
        rows = latency.measure(table, batch=batch, repeats=repeats, device=device)
        timed = table.with_latency(*split(rows, table))
        with torch.no_grad():
            times = latency.interleaved(calls, repeats, device)
        sums = np.array([timed.cost(architecture).latency_ms for architecture in times])
        whole = np.array([statistics.median(ns) / 1e6 for ns in times.values()])
        off = sums / whole - 1
        rounds.append(
            {
                "median_ms": float(np.median(whole)),
                "median_signed_error": float(np.median(off)),
                "median_absolute_error": float(np.median(abs(off))),
                "largest_absolute_error": float(abs(off).max()),
                "spearman": float(np.corrcoef(whole.argsort().argsort(), sums.argsort().argsort())[0, 1]),
            }
        )
    median = {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
    return {
        "space": of.model_dump(mode="json"),
        "device": latency.machine(device),
        "batch": batch,
        "repeats": repeats,
        "threads": torch.get_num_threads(),
        "networks": len(calls),
        "median_of_rounds": median,
        "rounds": rounds,
    }


def split(rows: list[dict], table: CostTable) -> tuple[int, dict]:
    nanoseconds = [round(row["latency_ms"] * 1e6) for row in rows]
    return nanoseconds[0], dict(zip(table.entries, nanoseconds[1:], strict=True))


def end_to_end(stem, blocks, architecture, x):
    x = call_stem(stem, x)
    for layers, path in zip(blocks, architecture, strict=True):
        for layer, choice in zip(layers, path, strict=True):
            x = layer(x, choice, 1, None)
    return x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", nargs="+", default=["hytra", "mbconv"], choices=["hytra", "mbconv"])
    parser.add_argument("--latency", metavar="CONFIG", help="measure how latencies add up, instead")
    parser.add_argument("--set", action="append", dest="overrides", default=[], metavar="A.B=VALUE")
    parser.add_argument("--networks", type=int, default=20)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the result there")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.latency:
        result: object = additivity(
            options.latency, options.overrides, options.networks, options.batch, options.repeats
        )
        print(result)
    else:
        result = []
        for name in options.space:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                for row in pool.apply(selection, (name,)):
                    print(row)
                    result.append(row)
    if options.json:
        write_json(options.json, result)


if __name__ == "__main__":
    sys.exit(launch.run(main))
