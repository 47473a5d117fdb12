"""Run folders that look as a search's do, written in an instant."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from bossnas import spaces
from bossnas.config.loading import dump, load
from bossnas.files import write_json, write_text
from bossnas.runs.certainty import Parts, as_json
from bossnas.spaces.paths import encode

ROOT = Path(__file__).resolve().parents[2]
NATS = ("space.name=nats", "space.image_size=32", "space.width=0.25", "data.recipe=cifar")
# markup and what else may harm a page
EVIL = (
    '<script>window.pwned=1</script>"><img src=x onerror=window.pwned=2>{{7*7}}</script></style>'
    "javascript:window.pwned=3 \u202e $\\alpha$ \x0b &amp; 'x'"
)
SCORES = {"population_centre": "lower", "pooled_instance_discrimination": "higher"}


def make(folder: Path, settings=NATS, seed=0, steps=(10.0, 0.0), scores=SCORES, blocks=None, errors=True) -> Path:
    """A finished search whose winners are each block's first path. ``steps``: how far apart neighbouring paths of
    block 0, and of the other blocks, are in errors of about 0.3; ``blocks``: so many are rated (None: all)."""
    folder.mkdir(parents=True)
    rng, winners = np.random.default_rng(seed), []
    config = load(ROOT / "configs/quickstart_ds.json", [*settings, "rating.score=population_centre"])
    write_text(folder / "config.json", dump(config))
    write_json(folder / "versions.json", {"kind": "search", "bossnas": "0.1.0", "torch": "2.14.1", "apex": None})
    (folder / "ratings").mkdir()
    space, metrics = spaces.make(**config.space.model_dump()), []
    for block in range(space.blocks):
        metrics += [
            {"kind": "train", "block": block, "step": i + 1, "loss": 1 / (i + 1), "spread": 0.9, "lr": 0.1,
             "images_per_second": 100.0 + i, "outcome": "applied"}
            for i in range(12)
        ]  # fmt: skip
        if blocks is not None and block >= blocks:
            break
        paths = [encode(path) for path in space.paths(block, winners)]
        off = rng.normal(0, 1, (len(paths), 64))
        off -= off.mean(1, keepdims=True)
        values = {}
        for name, better in scores.items():
            noise = rng.normal(0, 1e-3, len(paths)).tolist()
            sign = 1 if better == "lower" else -1
            values[name] = {p: sign * (steps[min(block, 1)] * i + noise[i] * (i > 0)) for i, p in enumerate(paths)}
        parts = {name: Parts(off, np.full(64, 4.0)) for name in scores}
        write_json(
            folder / f"ratings/block_{block}.json",
            {
                "block": block,
                "prefix": [encode(path) for path in winners],
                "score": "population_centre",
                "better": dict(scores),
                "candidates": space.candidates(block),
                "paths": values["population_centre"],
                "scores": values,
                **({"chance": {"pooled_instance_discrimination": -5.5}} if errors else {}),
                **(as_json(values, parts, scores) if errors else {}),
            },
        )
        winners.append(space.paths(block, winners)[0])
    if winners:
        write_json(folder / "winners.json", {"winners": [encode(path) for path in winners]})
    write_text(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in metrics))
    write_text(folder / "log.txt", "2026-12-01 10:00:00,123 WARNING block 0 step 3: something is odd\n")
    if blocks is None:
        write_json(folder / "done", {"steps": 12})
    return folder
