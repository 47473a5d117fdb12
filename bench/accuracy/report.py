"""What the ratings of study.py are worth against accuracies: tables in Markdown, all figures in JSON (see PLAN.md).

    python bench/accuracy/report.py --ratings runs/study --accuracy nats_ss_cifar10.csv --json study.json

First the choice: every setting, moment and score, by its Spearman's correlation on the choosing part. Then the tables:
on the reporting part, block scores put together as the best of the choice is.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
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
SEEDS = (0, 1, 2)  # that every row of the tables is of, where a setting has them
Rating = Sequence[Mapping[str, float]]  # of every block: path -> score, larger is better
CENTRE, INSTANCE, POOLED = "population_centre", "instance_discrimination", "pooled_instance_discrimination"
AGREEMENT, POOLED_AGREEMENT, RANK = "view_agreement", "pooled_view_agreement", "effective_rank"
FAULTS = ("stacked", "prefix", "norms", "adapters", "predictor", "all")
VARIED = ("lr0.15", "lr1.5", "paths2", "paths8", "batch256", "parallel", "images32", "steps300")
TABLES: dict[str, list[tuple[str, str]]] = {
    "The scores": [(setting, score) for setting in ("untrained", "bootstrap", "instance", "both")
                   for score in (CENTRE, INSTANCE, POOLED, AGREEMENT, POOLED_AGREEMENT, RANK)],
    "The repairs": [(setting, score) for setting in ("bootstrap", *(f"fault-{fault}" for fault in FAULTS))
                    for score in (CENTRE, POOLED)],
    "Training": [("untrained", POOLED)] + [
        (f"{setting}{moment}", score) for setting, score in (
            ("bootstrap", CENTRE), ("bootstrap", POOLED), ("instance", POOLED))
        for moment in (" at 25", " at 50", "", "-steps300")],
    "Variations of the training": [(f"{setting}-{varied}", score) for setting, scores in (
        ("bootstrap", (CENTRE, POOLED)), ("instance", (POOLED,))) for varied in VARIED for score in scores],
    "Variations of the rating": [(setting, POOLED) for setting in (
        "untrained", "untrained-t0.1", "untrained-t0.5", "untrained-t1", "untrained-val2048", "untrained-images32",
        "bootstrap-centre", "bootstrap-score-t0.5", "instance-t0.1", "instance-t0.5")]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratings", type=Path, required=True, help="folder of study.py's files")
    parser.add_argument("--accuracy", type=Path, required=True, help="NATS-Bench's size space on CIFAR-10, CSV")
    parser.add_argument("--json", type=Path, help="write every figure there")
    options = parser.parse_args()
    truth, rows = Truth.read(options.accuracy), read(options.ratings)
    if not rows:
        parser.error(f"--ratings: {options.ratings} holds no files of study.py")
    choice = chosen(truth, rows)
    how = choice[0]["combine"]
    result = {"choice": choice, "combine": how, "sizes": truth.figures(truth.sizes)}
    result["tables"] = {title: [compared(truth, rows[key], how) for key in keys if key in rows]
                        for title, keys in TABLES.items()}
    best = rows[choice[0]["setting"], choice[0]["score"]]
    result["best"] = {"how": {how: compared(truth, best, how) for how in combine.HOW},
                      "details": details(truth, best, how)}
    print("\n".join(markdown(result)))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


@dataclass
class Row:
    """A setting (with the step, where it was rated on the way) and a score: the ratings of all its seeds."""

    setting: str
    score: str
    ratings: dict[int, Rating]
    cpu_seconds: list[float]

    @property
    def of_seeds(self) -> list[Rating]:
        """Those of the tables' seeds."""
        return [self.ratings[seed] for seed in SEEDS if seed in self.ratings]


def read(folder: Path) -> dict[tuple[str, str], Row]:
    rows: dict[tuple[str, str], Row] = {}
    for file in sorted(folder.glob("*-seed*.json")):
        run = json.loads(file.read_text(encoding="utf-8"))
        for moment, scores in run["blocks"][0]["ratings"].items():
            name = run["setting"] + ("" if moment == "end" else f" at {moment}")
            for score in scores:
                row = rows.setdefault((name, score), Row(name, score, {}, []))
                row.ratings[run["seed"]] = [block["ratings"][moment][score] for block in run["blocks"]]
                row.cpu_seconds.append(sum(run["cpu_seconds"].values()))
    return rows


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
        self.choosing, self.reporting = np.sort(order[:cut]), np.sort(order[cut:])

    @classmethod
    def read(cls, file: Path) -> Truth:
        table = tables.read_accuracies(file)
        return cls(list(table), np.array(list(table.values())))

    def total(self, rating: Rating, how: str, blocks: Iterable[int] = (0, 1, 2)) -> np.ndarray:
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

    def spearman(self, score: np.ndarray, part: np.ndarray) -> float:
        return float(stats.spearmanr(score[part], self.accuracy[part]).statistic)

    def figures(self, scores: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
        """Of each score Spearman and Kendall, and Kendall within 10 % of parameters, on the reporting part."""
        part = self.reporting
        of_part, accuracy = {name: score[part] for name, score in scores.items()}, self.accuracy[part]
        within = rank.within(self.sizes["params"][part], of_part, accuracy)
        top = accuracy >= np.quantile(accuracy, 1 - rank.TOP)
        return {name: {"spearman": self.spearman(scores[name], part),
                       "kendall": float(stats.kendalltau(score, accuracy).statistic), "within": within[name],
                       "top": float(stats.kendalltau(score[top], accuracy[top]).statistic)}
                for name, score in of_part.items()}


def chosen(truth: Truth, rows: Mapping[Any, Row]) -> list[dict[str, Any]]:
    """Every setting, score and way to put blocks together, the best first: Spearman on the choosing part."""
    found = []
    for row in rows.values():
        for how in combine.HOW:
            values = [truth.spearman(truth.total(r, how), truth.choosing) for r in row.of_seeds]
            if values:
                found.append({"setting": row.setting, "score": row.score, "combine": how, "seeds": len(values),
                              "spearman": float(np.mean(values)), "std": deviation(values),
                              "cpu_seconds": float(np.mean(row.cpu_seconds))})
    # a setting of one seed is no candidate: chance would choose it
    return sorted(found, key=lambda r: (r["seeds"] == len(SEEDS), r["spearman"]), reverse=True)


def deviation(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def compared(truth: Truth, row: Row, how: str) -> dict[str, Any]:
    """Figures of the seeds 0 to 2, each alone and with size, and of their sum; how far they agree."""
    totals = [combine.standardised(truth.total(rating, how)) for rating in row.of_seeds]
    scores = {}
    for i, total in enumerate(totals):
        scores |= {f"alone {i}": total, f"with size {i}": truth.with_size(total)}
    summed = sum(totals)
    scores |= {"summed": summed, "summed with size": truth.with_size(summed)}
    found = truth.figures(scores)
    result: dict[str, Any] = {"setting": row.setting, "score": row.score, "combine": how, "seeds": len(totals),
                              "cpu_seconds": float(np.mean(row.cpu_seconds))}
    for kind in ("alone", "with size"):
        of_seeds = [found[f"{kind} {i}"] for i in range(len(totals))]
        columns = {key: [figures[key] for figures in of_seeds] for key in of_seeds[0]}
        result[kind] = {"each": of_seeds, "mean": {key: float(np.mean(values)) for key, values in columns.items()},
                        "std": {key: deviation(values) for key, values in columns.items()}}
    if len(totals) > 1:
        result |= {"summed": found["summed"], "summed with size": found["summed with size"]}
        result["between_seeds"] = float(np.mean([stats.spearmanr(totals[i], totals[j]).statistic
                                                 for i in range(len(totals)) for j in range(i)]))
    return result


def details(truth: Truth, row: Row, how: str) -> dict[str, Any]:
    """Of the best row: each block alone, blocks left out, ranks summed with size, and all of its seeds summed."""
    part, ratings = truth.reporting, row.of_seeds
    blocks = [[truth.spearman(truth.total(r, how, [b]), part) for r in ratings] for b in range(len(LAYERS))]
    # the best that any score of the block alone could do: its paths' mean accuracies
    ceiling = [truth.spearman(_means(truth, b), part) for b in range(len(LAYERS))]
    scores = {"blocks 0, 1": sum(combine.standardised(truth.total(r, how, [0, 1])) for r in ratings)}
    summed = sum(combine.standardised(truth.total(r, how)) for r in ratings)
    scores["with size, by ranks"] = truth.with_size_ranks(summed)
    everyone = [combine.standardised(truth.total(r, how)) for r in row.ratings.values()]
    scores |= {f"{len(everyone)} seeds": sum(everyone),
               f"{len(everyone)} seeds with size": truth.with_size(sum(everyone))}
    return {"blocks": blocks, "ceiling": ceiling, "figures": truth.figures(scores)}


def _means(truth: Truth, block: int) -> np.ndarray:
    places = truth.places[block]
    return (np.bincount(places, truth.accuracy) / np.bincount(places))[places]


# ---- Markdown


def markdown(result: Mapping[str, Any]) -> list[str]:
    keys = ("spearman", "kendall", "within", "top")
    lines = ["| size | Spearman | Kendall | within 10 % | top 10 % |", "|---|---|---|---|---|"]
    lines += [_line(name, *(f"{figures[key]:.3f}" for key in keys)) for name, figures in result["sizes"].items()]
    lines += ["", "### The choice", "", "| setting | score | blocks | seeds | Spearman, choosing part | CPU s |",
              "|---|---|---|---|---|---|"]
    for row in result["choice"][:12]:
        lines.append(_line(row["setting"], row["score"], row["combine"], row["seeds"],
                           f"{row['spearman']:.3f}" + _plus(row["std"]), f"{row['cpu_seconds']:.0f}"))
    for title, rows in {**result["tables"], "How blocks are put together": result["best"]["how"].values()}.items():
        lines += ["", f"### {title}", "", "| setting | score | blocks | Spearman | within 10 % | with size: Spearman | "
                  "within 10 % | seeds summed: Spearman | within 10 % | with size: Spearman | within 10 % | "
                  "between seeds | CPU s |", "|---" * 13 + "|"]
        for row in rows:
            cells = [f"{row[kind]['mean'][key]:.3f}" + _plus(row[kind]["std"][key])
                     for kind in ("alone", "with size") for key in ("spearman", "within")]
            cells += [f"{row[kind][key]:.3f}" if kind in row else "" for kind in ("summed", "summed with size")
                      for key in ("spearman", "within")]
            cells += [f"{row['between_seeds']:.2f}" if "between_seeds" in row else "", f"{row['cpu_seconds']:.0f}"]
            lines.append(_line(row["setting"], row["score"], row["combine"], *cells))
    best = result["best"]["details"]
    lines += ["", "### The best of the choice, further", "", "| | Spearman | Kendall | within 10 % | top 10 % |",
              "|---|---|---|---|---|"]
    for block, (values, ceiling) in enumerate(zip(best["blocks"], best["ceiling"], strict=True)):
        lines.append(_line(f"block {block} alone (at most {ceiling:.3f})",
                           f"{np.mean(values):.3f}" + _plus(deviation(values)), "", "", ""))
    lines += [_line(name, *(f"{figures[key]:.3f}" for key in keys)) for name, figures in best["figures"].items()]
    return lines


def _line(*cells: Any) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _plus(std: float | None) -> str:
    return "" if std is None else f" ± {std:.3f}"


if __name__ == "__main__":
    main()
