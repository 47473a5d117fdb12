"""What the ratings of study.py are worth against accuracies: tables in Markdown, all figures in JSON (see PLAN.md).

    python bench/accuracy/report.py --ratings runs/study --accuracy nats_ss_cifar10.csv --json study.json

First the choice: every setting, moment and score, by its Spearman's correlation on the choosing part. Then the tables:
on the reporting part, block scores put together as the chosen one's are.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

root = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(root), str(root / "kernels")]

from bossnas import spaces
from bossnas.selection import HOW, combine
from bossnas.selection.ranking import correlation, tables
from bossnas.selection.sizes import size_baselines
from bossnas.spaces.cost import CostTable

SPLIT_SEED, CHOOSING = 0, 0.2
LAYERS = (2, 2, 1)
STEPS = 100  # of a block, where a setting is rated on the way, too
WEIGHTS = (1, 2, 3, 5, 10)  # of size beside a rating
LAST = (1, 0.9, 0.8, 0.7, 0.6, 0.5)  # how much the last layer's channels count
SEEDS = (0, 1, 2)  # that every row of the tables is of, where a setting has them
Rating = Sequence[Mapping[str, float]]  # of every block: path -> score, larger is better
CENTRE, INSTANCE, POOLED = "population_centre", "instance_discrimination", "pooled_instance_discrimination"
AGREEMENT, POOLED_AGREEMENT, RANK = "view_agreement", "pooled_view_agreement", "effective_rank"
FAULTS = ("stacked", "prefix", "norms", "adapters", "predictor", "all")
MAIN = ("untrained", "bootstrap", "instance at 25", "instance", "both")
VARIED = ("lr0.15", "lr1.5", "paths2", "paths8", "batch256", "parallel", "images32", "steps300")
TABLES: dict[str, list[tuple[str, str]]] = {
    "The scores": [
        (setting, score)
        for setting in ("untrained", "bootstrap", "instance", "both")
        for score in (CENTRE, INSTANCE, POOLED, AGREEMENT, POOLED_AGREEMENT, RANK)
    ],
    "The repairs": [
        (setting, score)
        for setting in ("bootstrap", *(f"fault-{fault}" for fault in FAULTS))
        for score in (CENTRE, POOLED)
    ],
    "Training": [("untrained", POOLED)]
    + [
        (f"{setting}{moment}", score)
        for setting, score in (("bootstrap", CENTRE), ("bootstrap", POOLED), ("instance", POOLED))
        for moment in (" at 25", " at 50", "", "-steps300")
    ],
    "Variations of the training": [
        (f"{setting}-{varied}", score)
        for setting, scores in (("bootstrap", (CENTRE, POOLED)), ("instance", (POOLED,)))
        for varied in VARIED
        for score in scores
    ],
    "Variations of the rating": [
        (setting, POOLED)
        for setting in (
            "untrained",
            "untrained-t0.1",
            "untrained-t0.5",
            "untrained-t1",
            "untrained-val2048",
            "untrained-images32",
            "bootstrap-centre",
            "bootstrap-score-t0.5",
            "instance-t0.1",
            "instance-t0.5",
        )
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratings", type=Path, required=True, help="folder of study.py's files")
    parser.add_argument("--accuracy", type=Path, required=True, help="NATS-Bench's size space on CIFAR-10, CSV")
    parser.add_argument("--json", type=Path, help="write every figure there")
    options = parser.parse_args()
    truth, rows = Truth.read(options.accuracy), read(options.ratings)
    if not rows:
        parser.error(f"--ratings: {options.ratings} holds no files of study.py")
    choice = ranked(truth, rows)
    chosen = decided(choice)
    best, how = rows[chosen["setting"], chosen["score"]], chosen["combine"]
    result = {"choice": choice, "chosen": chosen, "sizes": truth.figures(truth.sizes)}
    result["tables"] = {
        title: [compared(truth, rows[key], how) for key in keys if key in rows] for title, keys in TABLES.items()
    }
    result["tables"]["How blocks are put together"] = [compared(truth, best, how) for how in HOW]
    result["many"] = {
        f"{setting}, {score}": many(truth, row, how)
        for (setting, score), row in rows.items()
        if len(row.ratings) >= 3 * len(SEEDS) and score in (INSTANCE, POOLED)
    }
    result["blocks"] = {
        f"{setting}, {score}": blocks(truth, rows[setting, score])
        for setting in MAIN
        for score in (CENTRE, POOLED)
        if (setting, score) in rows
    }
    result["size"] = beside_size(
        truth, {key: rows[key] for key in itertools.product(MAIN, (INSTANCE, POOLED)) if key in rows}, how
    )
    print("\n".join(markdown(result)))
    if options.json is not None:
        options.json.write_text(json.dumps(result) + "\n", encoding="utf-8")


@dataclass
class Row:
    """A setting (with the step, where it was rated on the way) and a score: the ratings of all its seeds."""

    setting: str
    score: str
    ratings: dict[int, Rating]
    seconds: dict[int, float]  # of CPU: up to there, and one rating

    @property
    def of_seeds(self) -> list[Rating]:
        """Those of the tables' seeds."""
        return [self.ratings[seed] for seed in SEEDS if seed in self.ratings]

    @property
    def cpu_seconds(self) -> float:
        """Mean over the tables' seeds."""
        return float(np.mean([self.seconds[seed] for seed in SEEDS if seed in self.seconds]))


def read(folder: Path) -> dict[tuple[str, str], Row]:
    """All rows that have one of the tables' seeds."""
    rows: dict[tuple[str, str], Row] = {}
    for file in sorted(folder.glob("*-seed*.json")):
        run = json.loads(file.read_text(encoding="utf-8"))
        moments = run["blocks"][0]["ratings"]
        for moment, scores in moments.items():
            name = run["setting"] + ("" if moment == "end" else f" at {moment}")
            for score in scores:
                row = rows.setdefault((name, score), Row(name, score, {}, {}))
                row.ratings[run["seed"]] = [block["ratings"][moment][score] for block in run["blocks"]]
                row.seconds[run["seed"]] = _seconds(run["cpu_seconds"], moment, len(moments))
    return {key: row for key, row in rows.items() if row.of_seeds}


def _seconds(of: Mapping[str, float | None], moment: str, ratings: int) -> float:
    """The training as far as that moment, and one of the ratings."""
    if of["train"] is None:
        return of["all"]
    share = 1 if moment == "end" else int(moment) / STEPS
    return of["train"] * share + (of["all"] - of["train"]) / ratings


class Truth:
    """All architectures of the table: their paths' places in a block's list, accuracies, sizes, and the split."""

    def __init__(self, texts: list[str], accuracy: np.ndarray):
        space = spaces.make("nats", width=1.0, image_size=32, restricted=True, split="cifar10")
        choices = [tuple(space.widths.index(int(part)) for part in text.split(":")) for text in texts]
        paths = [[], [], []]
        for choice in choices:
            start = 0
            for block, layers in enumerate(LAYERS):
                paths[block].append("".join(map(str, choice[start : start + layers])))
                start += layers
        self.accuracy, self.names, self.places = accuracy, [], []
        for of_block in paths:
            names, places = np.unique(of_block, return_inverse=True)
            self.names.append(names.tolist())
            self.places.append(places)
        architectures = [tuple(tuple(map(int, path)) for path in of) for of in zip(*paths, strict=True)]
        self.last_channels = np.array([space.widths[choice[-1]] for choice in choices])
        self.sizes = size_baselines(CostTable.of(space, 32), architectures, 10)
        order = np.random.default_rng(SPLIT_SEED).permutation(len(texts))
        cut = int(CHOOSING * len(texts))
        self.choosing, self.reporting = np.sort(order[:cut]), np.sort(order[cut:])

    @classmethod
    def read(cls, file: Path) -> Truth:
        table = tables.read_accuracies(file)
        return cls(list(table), np.array(list(table.values())))

    def total(self, rating: Rating, how: str, blocks: Iterable[int] = (0, 1, 2)) -> np.ndarray:
        """The score of every architecture: the sum over the blocks, put together as HOW says."""
        result = np.zeros(len(self.accuracy))
        for block in blocks:
            scores = combine.combined(rating[block], how)
            result += np.array([scores[name] for name in self.names[block]])[self.places[block]]
        return result

    def summed(self, ratings: Iterable[Rating], how: str, blocks: Sequence[int] = (0, 1, 2)) -> np.ndarray:
        """Of several seeds, each standardised."""
        return combine.standardised(sum(combine.standardised(self.total(r, how, blocks)) for r in ratings))

    def with_size(self, score: np.ndarray, weight: float = 1) -> np.ndarray:
        """The score and the sum of log channels, both standardised."""
        return combine.standardised(score) + weight * combine.standardised(self.sizes["sum_log_channels"])

    def log_channels(self, last: float) -> np.ndarray:
        """The sum of log channels, in which the last layer counts ``last``."""
        return (self.sizes["sum_log_channels"] - (1 - last) * np.log(self.last_channels)).round(9)  # ties stay ties

    def spearman(self, score: np.ndarray, part: np.ndarray) -> float:
        return float(stats.spearmanr(score[part], self.accuracy[part]).statistic)

    def figures(self, scores: Mapping[Any, np.ndarray], part: np.ndarray | None = None) -> dict[Any, dict[str, float]]:
        """Of each score Spearman, Kendall, Kendall within 10 % of parameters and among the best tenth, on a part (None:
        the reporting part)."""
        part = self.reporting if part is None else part
        of_part, accuracy = {name: score[part] for name, score in scores.items()}, self.accuracy[part]
        within = correlation.within(self.sizes["params"][part], of_part, accuracy)
        top = accuracy >= np.quantile(accuracy, 1 - correlation.TOP)
        return {
            name: {
                "spearman": self.spearman(scores[name], part),
                "within": within[name],
                "kendall": float(stats.kendalltau(score, accuracy).statistic),
                "top": float(stats.kendalltau(score[top], accuracy[top]).statistic),
            }
            for name, score in of_part.items()
        }


def ranked(truth: Truth, rows: Mapping[Any, Row]) -> list[dict[str, Any]]:
    """Every setting, score and way to put blocks together, the best first: Spearman on the choosing part; beside it
    that on the reporting part, by which nothing is chosen."""
    found = []
    for row in rows.values():
        for how in HOW:
            totals = [truth.total(rating, how) for rating in row.of_seeds]
            found.append(
                {
                    "setting": row.setting,
                    "score": row.score,
                    "combine": how,
                    "seeds": len(totals),
                    **_spread([truth.spearman(total, truth.choosing) for total in totals]),
                    "reporting": _spread([truth.spearman(total, truth.reporting) for total in totals]),
                    "cpu_seconds": row.cpu_seconds,
                }
            )
    # a setting of one seed is no candidate: chance would choose it
    return sorted(found, key=lambda r: (r["seeds"] == len(SEEDS), r["mean"]), reverse=True)


def decided(choice: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The cheapest of those that are as good as the best within its seeds' deviation; costs of the same power of two
    count as equal, and then the better one is taken."""
    choice = [row for row in choice if not row["setting"].startswith("fault-")]  # which nobody would choose
    best = choice[0]
    ties = [row for row in choice if row["seeds"] == best["seeds"] and row["mean"] >= best["mean"] - (best["std"] or 0)]
    return min(ties, key=lambda row: (round(math.log2(row["cpu_seconds"])), -row["mean"]))


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    return {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1)) if len(values) > 1 else None}


def _spreads(figures: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Mean and deviation of every figure over ratings."""
    return {key: _spread([row[key] for row in figures]) for key in figures[0]}


def compared(truth: Truth, row: Row, how: str) -> dict[str, Any]:
    """Figures of the seeds 0 to 2, each alone and with size, and of their sum; how far they agree."""
    totals = [truth.summed([rating], how) for rating in row.of_seeds]
    scores = {}
    for i, total in enumerate(totals):
        scores |= {f"alone {i}": total, f"with size {i}": truth.with_size(total)}
    scores |= {"summed": sum(totals), "summed with size": truth.with_size(sum(totals))}
    found = truth.figures(scores)
    result: dict[str, Any] = {
        "setting": row.setting,
        "score": row.score,
        "combine": how,
        "seeds": len(totals),
        "cpu_seconds": row.cpu_seconds,
    }
    for kind in ("alone", "with size"):
        result[kind] = _spreads([found[f"{kind} {i}"] for i in range(len(totals))])
    if len(totals) > 1:
        result |= {"summed": found["summed"], "summed with size": found["summed with size"]}
        result["between_seeds"] = float(
            np.mean([stats.spearmanr(totals[i], totals[j]).statistic for i in range(len(totals)) for j in range(i)])
        )
    return result


def many(truth: Truth, row: Row, how: str) -> dict[str, Any]:
    """Of nine seeds: each, sums of three, and all of them."""
    ratings, result = [row.ratings[seed] for seed in sorted(row.ratings)][: 3 * len(SEEDS)], {}
    for name, count in (("one", 1), ("three", len(SEEDS)), ("nine", len(ratings))):
        sums = [truth.summed(ratings[i : i + count], how) for i in range(0, len(ratings), count)]
        for kind, scores in ((name, sums), (f"{name} with size", map(truth.with_size, sums))):
            result[kind] = _spreads(list(truth.figures({str(i): s for i, s in enumerate(scores)}).values()))
    return result


def blocks(truth: Truth, row: Row) -> list[dict[str, Any]]:
    """Spearman of each block alone, and of its paths' mean accuracies, about the best that a block's score can do."""
    result = []
    for block, places in enumerate(truth.places):
        means = (np.bincount(places, truth.accuracy) / np.bincount(places))[places]
        values = [truth.spearman(truth.total(rating, "sum", [block]), truth.reporting) for rating in row.of_seeds]
        result.append({**_spread(values), "ceiling": truth.spearman(means, truth.reporting)})
    return result


def beside_size(truth: Truth, rows: Mapping[tuple[str, str], Row], how: str) -> list[dict[str, Any]]:
    """What the seeds' sums add to size, of all blocks and without the last one, by how much size counts (None: ranks
    added up); and, as a control, size alone in which the last layer counts less. On both parts."""
    scores: dict[tuple[str, float | None], np.ndarray] = {
        ("size, last layer x", last): truth.log_channels(last) for last in LAST
    }
    for (setting, score), row in rows.items():
        for of, name in (((0, 1, 2), f"{setting}, {score}"), ((0, 1), f"{setting}, {score} of blocks 0, 1")):
            total = truth.summed(row.of_seeds, how, of)
            scores |= {(f"{name} + size x", weight): truth.with_size(total, weight) for weight in WEIGHTS}
            scores[f"{name} + size", None] = stats.rankdata(total) + stats.rankdata(truth.sizes["sum_log_channels"])
    both = truth.figures(scores, truth.choosing), truth.figures(scores, truth.reporting)
    return [{"name": key[0], "weight": key[1], "choosing": both[0][key], "reporting": both[1][key]} for key in scores]


# ---- Markdown


def markdown(result: Mapping[str, Any]) -> list[str]:
    chosen = result["chosen"]
    lines = [
        "### The choice",
        "",
        "| setting | score | blocks | choosing part | reporting part | CPU s |",
        "|---" * 6 + "|",
    ]
    lines += [
        _line(
            row["setting"],
            row["score"],
            row["combine"],
            _mean(row),
            _mean(row["reporting"]),
            f"{row['cpu_seconds']:.0f}",
        )
        for row in result["choice"][:12]
    ]
    lines += [
        "",
        f"Chosen: {chosen['setting']}, {chosen['score']}, {chosen['combine']}.",
        "",
        "### Size",
        "",
        "| size | Spearman | within 10 % | Kendall | top 10 % |",
        "|---" * 5 + "|",
    ]
    lines += [_line(name, *(f"{value:.3f}" for value in figures.values())) for name, figures in result["sizes"].items()]
    for title, rows in result["tables"].items():
        lines += [
            "",
            f"### {title}",
            "",
            "| setting | score | blocks | one seed | with size | sum of three | with size | between seeds | CPU s |",
            "|---" * 9 + "|",
        ]
        for row in rows:
            name = row["setting"] + ("" if row["seeds"] == len(SEEDS) else f" ({row['seeds']} seed(s))")
            lines.append(
                _line(
                    name,
                    row["score"],
                    row["combine"],
                    *(_two(row.get(kind)) for kind in ("alone", "with size", "summed", "summed with size")),
                    f"{row['between_seeds']:.2f}" if "between_seeds" in row else "",
                    f"{row['cpu_seconds']:.0f}",
                )
            )
    lines += [
        "",
        "### Nine seeds",
        "",
        "| rating | one | sum of three | with size | sum of nine | with size |",
        "|---" * 6 + "|",
    ]
    for name, row in result["many"].items():
        lines.append(
            _line(name, *(_two(row[kind]) for kind in ("one", "three", "three with size", "nine", "nine with size")))
        )
    lines += ["", "### Blocks alone", "", "| rating | block 0 | block 1 | block 2 |", "|---" * 4 + "|"]
    lines += [
        _line(name, *(f"{_mean(block)} of {block['ceiling']:.3f}" for block in of))
        for name, of in result["blocks"].items()
    ]
    lines += [
        "",
        "### Beside size: half each, and the best weight by the choosing part",
        "",
        "| score | choosing part | reporting part |",
        "|---" * 3 + "|",
    ]
    for name, rows in itertools.groupby(result["size"], key=lambda row: row["name"]):
        rows = list(rows)
        best = max(rows, key=lambda row: row["choosing"]["spearman"])
        for row in rows[:1] + [best] * (best is not rows[0]):
            text = name if row["weight"] is None else f"{name} {row['weight']}"
            lines.append(_line(text, _two(row["choosing"]), _two(row["reporting"])))
    return lines


def _line(*cells: Any) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _mean(of: Mapping[str, float | None]) -> str:
    return f"{of['mean']:.3f}" + ("" if of["std"] is None else f" ± {of['std']:.3f}")


def _two(figures: Mapping[str, Any] | None) -> str:
    """Spearman / Kendall within 10 % of parameters."""
    if figures is None:
        return ""
    values = [figures[key] for key in ("spearman", "within")]
    return " / ".join(_mean(v) if isinstance(v, Mapping) else f"{v:.3f}" for v in values)


if __name__ == "__main__":
    main()
