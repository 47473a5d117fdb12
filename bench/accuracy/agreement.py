"""Does a rating merely count? Each block's scores against multiply-adds and parameters, and between seeds; no labels.

    for seed in 0 1 2; do bossnas rate --untrained --config FILE --set seed=$seed --set out=runs/seed$seed; done
    python bench/accuracy/agreement.py runs/seed0 runs/seed1 runs/seed2

Spearman's rho, over the paths of a block that all runs have rated. Figures near 1 or -1 against a size mean that the
rating counts it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

root = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(root), str(root / "kernels")]

from bossnas import spaces
from bossnas.errors import ConfigError
from bossnas.files import write_json
from bossnas.runs.folder import read_config
from bossnas.runs.ratings import (
    BlockRating,
    read_ratings,
)
from bossnas.selection.ranking import correlation
from bossnas.spaces.cost import CostTable
from bossnas.spaces.paths import decode

SIZES = ("macs", "params")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="rated runs that differ in their seed")
    parser.add_argument("--scores", nargs="+", help="scores of the rating files (default: the first run's own)")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args(arguments)
    try:
        space, *others = [read_config(run).space for run in options.runs]
        if any(other != space for other in others):
            parser.error("the runs are of different spaces: name runs that differ in their seed alone")
        table = CostTable.of(spaces.make(**space.model_dump()), space.image_size)
        found = {}
        for score in options.scores or [read_ratings(options.runs[0])[0].score]:
            runs = [read_ratings(run, score) for run in options.runs]
            if len({len(run) for run in runs}) > 1:
                parser.error("the runs have ratings of different numbers of blocks: finish all of them first")
            found[score] = [agreement(table, of_runs) for of_runs in zip(*runs, strict=True)]
    except ConfigError as error:
        parser.error(str(error))
    print("| score | block | paths | against MACs | against parameters | between seeds |")
    print("|---|---|---|---|---|---|")
    for score, rows in found.items():
        for block, row in enumerate(rows):
            print(
                f"| {score} | {block} | {row['paths']} | "
                + " | ".join(_cell(row[key]) for key in (*SIZES, "between_seeds"))
                + " |"
            )
    if options.json is not None:
        write_json(options.json, {"runs": [str(run) for run in options.runs], "scores": found})


def agreement(table: CostTable, runs: Sequence[BlockRating]) -> dict[str, Any]:
    """Of one block: ``runs`` holds its rating by each seed. Figures of each seed, or of each pair."""
    common = [path for path in runs[0].scores if all(path in run.scores for run in runs)]
    sign = 1 if runs[0].better == "higher" else -1
    values = sign * np.array([[run.scores[path] for path in common] for run in runs])
    result: dict[str, Any] = {"paths": len(common)}
    for size in SIZES:
        result[size] = []
        for run, scores in zip(runs, values, strict=True):
            prefix = [decode(path) for path in run.prefix]
            of_paths = [getattr(table.cost([*prefix, decode(path)]), size) for path in common]
            result[size].append(_spearman(scores, np.array(of_paths)))
    result["between_seeds"] = [_spearman(values[i], values[j]) for i in range(len(runs)) for j in range(i)]
    return result


def _spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    return correlation.coefficients(a, b)["spearman"]


def _cell(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    return f"{np.mean(known):.2f}" + (f" ({min(known):.2f} to {max(known):.2f})" if len(known) > 1 else "")


if __name__ == "__main__":
    main()
