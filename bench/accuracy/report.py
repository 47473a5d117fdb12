"""What the ratings of study.py are worth against accuracies: tables in Markdown, all figures in JSON (see PLAN.md).

    python bench/accuracy/report.py --ratings runs/study --accuracy nats_ss_cifar10.csv --json study.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

root = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(root), str(root / "kernels")]

from bossnas import baselines, combine, rank, spaces, tables  # noqa: E402
from bossnas.cost import CostTable  # noqa: E402

SPLIT_SEED, CHOOSING = 0, 0.2
LAYERS = (2, 2, 1)
SUMMED = 3  # seeds
Rating = list[dict[str, float]]  # of every block: path -> score, larger is better
Figures = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratings", type=Path, required=True, help="folder of study.py's files")
    parser.add_argument("--accuracy", type=Path, required=True, help="NATS-Bench's size space on CIFAR-10, CSV")
    parser.add_argument("--json", type=Path, help="write every figure there")
    options = parser.parse_args()
    truth = Truth.read(options.accuracy)
    files = sorted(options.ratings.glob("*.json"))
    found = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    result = {"baselines": {name: truth.figures(values) for name, values in truth.sizes.items()},
              "settings": settings(truth, found), "files": len(files)}
    print("\n".join(markdown(result)))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


class Truth:
    """All architectures of the table: their paths' places in a block's list, accuracies, sizes, and the split."""

    def __init__(self, texts: list[str], accuracy: np.ndarray):
        space = spaces.make("nats", width=1.0, image_size=32, restricted=True, split="cifar10")
        choices = [tuple(space.widths.index(int(part)) for part in text.split(":")) for text in texts]
        paths = [[], [], []]
        for choice in choices:
            start = 0
            for block, layers in enumerate(LAYERS):
                paths[block].append("".join(map(str, choice[start:start + layers])))
                start += layers
        self.accuracy, self.names, self.places = accuracy, [], []
        for of_block in paths:
            names, places = np.unique(of_block, return_inverse=True)
            self.names.append(names.tolist())
            self.places.append(places)
        architectures = [tuple(tuple(map(int, path)) for path in of) for of in zip(*paths, strict=True)]
        self.sizes = baselines.size_baselines(CostTable.of(space, 32), architectures, 10)
        order = np.random.default_rng(SPLIT_SEED).permutation(len(texts))
        cut = int(CHOOSING * len(texts))
        self.parts = {"choosing": np.sort(order[:cut]), "reporting": np.sort(order[cut:])}

    @classmethod
    def read(cls, file: Path) -> Truth:
        table = tables.read_accuracies(file)
        return cls(list(table), np.array(list(table.values())))

    def total(self, rating: Rating, how: str = "sum", blocks: Iterable[int] = (0, 1, 2)) -> np.ndarray:
        """The score of every architecture: the sum over the blocks, put together as combine.HOW says."""
        result = np.zeros(len(self.accuracy))
        for block in blocks:
            scores = combine.combined(rating[block], how)
            result += np.array([scores[name] for name in self.names[block]])[self.places[block]]
        return result

    def with_size(self, score: np.ndarray) -> np.ndarray:
        """The score and the sum of log channels, both standardised, half each."""
        return combine.standardised(score) + combine.standardised(self.sizes["sum_log_channels"])

    def with_size_ranks(self, score: np.ndarray) -> np.ndarray:
        """The ranks of both, half each."""
        return stats.rankdata(score) + stats.rankdata(self.sizes["sum_log_channels"])

    def figures(self, score: np.ndarray) -> dict[str, Figures]:
        """Spearman, Kendall, and Kendall within 10 % of parameters, on both parts."""
        result = {}
        for part, rows in self.parts.items():
            s, a = score[rows], self.accuracy[rows]
            result[part] = {"spearman": float(stats.spearmanr(s, a).statistic),
                            "kendall": float(stats.kendalltau(s, a).statistic),
                            "within": rank.within(self.sizes["params"][rows], {"score": s}, a)["score"]}
        return result


def settings(truth: Truth, found: list[dict[str, Any]]) -> dict[str, Any]:
    """Of every setting, moment and score: figures of each seed, of the seeds' ranks summed, alone and with size."""
    by_setting: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for run in found:
        by_setting[run["setting"]].append(run)
    result = {}
    for name, runs in by_setting.items():
        moments = runs[0]["blocks"][0]["ratings"]
        result[name] = {
            "seeds": [run["seed"] for run in runs], "cpu_seconds": [run["cpu_seconds"] for run in runs],
            "winners": [[block["winner"] for block in run["blocks"]] for run in runs],
            "ratings": {f"{score} at {moment}" if moment != "end" else score: compared(truth, runs, moment, score)
                        for moment in moments for score in moments[moment]}}
    return result


def compared(truth: Truth, runs: list[dict[str, Any]], moment: str, score: str) -> dict[str, Any]:
    """``how`` -> figures of each seed alone, with size, of the sums of seeds; then each block alone."""
    ratings = [[block["ratings"][moment][score] for block in run["blocks"]] for run in runs]
    result: dict[str, Any] = {}
    for how in combine.HOW:
        totals = [combine.standardised(truth.total(rating, how)) for rating in ratings]
        threes = [sum(totals[i:i + SUMMED]) for i in range(0, len(totals) - SUMMED + 1, SUMMED)]
        result[how] = {
            "alone": [truth.figures(total) for total in totals],
            "with_size": [truth.figures(truth.with_size(total)) for total in totals],
            "with_size_ranks": [truth.figures(truth.with_size_ranks(total)) for total in totals],
            "summed": [truth.figures(total) for total in threes],
            "summed_with_size": [truth.figures(truth.with_size(total)) for total in threes],
            "between_seeds": [float(stats.spearmanr(totals[i], totals[j]).statistic)
                              for i in range(len(totals)) for j in range(i)]}
        if len(totals) > SUMMED:
            result[how]["all_summed"] = truth.figures(sum(totals))
            result[how]["all_summed_with_size"] = truth.figures(truth.with_size(sum(totals)))
    result["blocks"] = [[_part_figures(truth, truth.total(rating, "sum", [b])) for b in range(3)] for rating in ratings]
    result["blocks_0_1"] = [truth.figures(truth.total(rating, "layers", [0, 1])) for rating in ratings]
    return result


def _part_figures(truth: Truth, score: np.ndarray) -> Figures:
    return {part: float(stats.spearmanr(score[rows], truth.accuracy[rows]).statistic)
            for part, rows in truth.parts.items()}


def markdown(result: dict[str, Any], part: str = "reporting") -> list[str]:
    """The tables: sizes, then every setting's scores, mean and deviation over seeds."""
    lines = [f"Figures of the {part} part.", "", "| size | Spearman | Kendall | within 10 % |", "|---|---|---|---|"]
    for name, figures in result["baselines"].items():
        lines.append(f"| {name} | " + " | ".join(f"{figures[part][key]:.3f}" for key in figures[part]) + " |")
    heads = ("Spearman", "Kendall", "within 10 %", "with size: Spearman", "within 10 %", "seeds summed: Spearman",
             "within 10 %", "and with size", "within 10 %", "between seeds")
    for name, setting in result["settings"].items():
        cpu = [sum(seconds.values()) for seconds in setting["cpu_seconds"]]
        lines += ["", f"### {name}: {len(setting['seeds'])} seeds, {np.mean(cpu):.0f} s of CPU each", "",
                  f"| score | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
        for score, row in setting["ratings"].items():
            cells = [_spread(row["standardised"], part, key) for key in ("spearman", "kendall", "within")]
            cells += [_spread(row["with_size"], part, key) for key in ("spearman", "within")]
            for kind in ("seeds_summed", "seeds_summed_with_size"):
                cells += [f"{row[kind][part][key]:.3f}" for key in ("spearman", "within")]
            cells.append(f"{np.mean(row['between_seeds']):.2f}" if row["between_seeds"] else "")
            lines.append(f"| {score} | {' | '.join(cells)} |")
    return lines


def _spread(of_seeds: list[dict[str, Figures]], part: str, key: str) -> str:
    values = [figures[part][key] for figures in of_seeds]
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else f"{values[0]:.3f}"


if __name__ == "__main__":
    main()
