"""Ratings of NATS-Bench's size space on CIFAR-10 under many settings (see PLAN.md): one JSON file per setting and seed.

    python bench/accuracy/study.py --data data/cifar10 --out runs/study --only untrained instance --seeds 0 1 2

A file that is there is not made again. Several processes may share the work: each takes settings nobody has begun.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

root = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(root), str(root / "kernels")]

from bossnas import log
from bossnas.config.loading import load, override
from bossnas.config.search import Config
from bossnas.errors import ConfigError
from bossnas.files import write_json
from bossnas.optim.groups import parameter_groups
from bossnas.optim.lars import LARS
from bossnas.search import rating, winners
from bossnas.search.run import Run, build, make_engine
from bossnas.search.search import search
from bossnas.search.stage import train_batches
from bossnas.spaces.ops import Statistics
from bossnas.spaces.paths import Choices, decode, encode
from bossnas.supernet import rate_block
from bossnas.supernet.scores import BETTER
from bossnas.supernet.supernet import Item, Networks, Supernet
from bossnas.supernet.train_block import (
    Training,
    train_block,
)

BASE = [
    "space.name=nats",
    "space.split=cifar10",
    "space.image_size=16",
    "heads.hidden=512",
    "heads.out=128",
    "data.recipe=cifar",
    "data.workers=0",
    "data.val_images=512",
    "train.batch=128",
    "train.micro_batch=128",
    "train.epochs=2",
    "train.steps_per_epoch=50",
    "train.lr=0.5",
    "train.warmup_epochs=0.2",
    "train.paths=4",
    "rating.batch=256",
    "rating.calibration_images=256",
    "rating.every_epochs=0",
    "engine.device=cpu",
]
FAULTS = ("stacked", "prefix", "norms", "adapters", "predictor")
OWN = "pooled_instance_discrimination"  # the score that chooses the prefix


@dataclass(frozen=True)
class Setting:
    """``sets``: overrides of BASE; ``train``: False rates random weights; ``rate_at``: steps at which blocks are rated
    on the way; ``chosen_by``: the score that chooses the prefix; ``faults``: see PLAN.md."""

    sets: tuple[str, ...] = ()
    train: bool = True
    rate_at: tuple[int, ...] = ()
    chosen_by: str = OWN
    faults: tuple[str, ...] = ()


def _settings() -> dict[str, Setting]:
    bootstrap, instance = "train.objective=bootstrap", "train.objective=instance"
    found = {
        "untrained": Setting(train=False),
        "instance": Setting((instance,), rate_at=(25, 50)),
        "bootstrap": Setting((bootstrap,), rate_at=(25, 50)),
        "both": Setting(("train.objective=both",)),
    }
    for fault in FAULTS:
        found[f"fault-{fault}"] = Setting((bootstrap,), faults=(fault,))
    found["fault-all"] = Setting((bootstrap,), faults=FAULTS)
    found["bootstrap-centre"] = Setting((bootstrap,), chosen_by="population_centre")
    for name, objective in (("instance", instance), ("bootstrap", bootstrap)):
        found[f"{name}-lr0.15"] = Setting((objective, "train.lr=0.15"))
        found[f"{name}-lr1.5"] = Setting((objective, "train.lr=1.5"))
        found[f"{name}-paths8"] = Setting((objective, "train.paths=8"))
        found[f"{name}-paths2"] = Setting((objective, "train.paths=2"))
        found[f"{name}-batch256"] = Setting((objective, "train.batch=256", "train.micro_batch=256"))
        found[f"{name}-steps300"] = Setting((objective, "train.steps_per_epoch=150", "train.warmup_epochs=0.067"))
        found[f"{name}-parallel"] = Setting((objective, "schedule=block_parallel", "rating.every_epochs=1"))
        found[f"{name}-images32"] = Setting((objective, "space.image_size=32"))
    for temperature in ("0.1", "0.5"):
        found[f"instance-t{temperature}"] = Setting((instance, f"train.temperature={temperature}"))
        found[f"untrained-t{temperature}"] = Setting((f"rating.temperature={temperature}",), train=False)
    found["untrained-t1"] = Setting(("rating.temperature=1",), train=False)
    found["bootstrap-score-t0.5"] = Setting((bootstrap, "rating.temperature=0.5"))
    found["untrained-images32"] = Setting(("space.image_size=32",), train=False)
    found["untrained-val2048"] = Setting(("data.val_images=2048",), train=False)
    return found


SETTINGS = _settings()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with train-*.tar and test-*.tar of CIFAR-10")
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="folder of the JSON files")
    parser.add_argument("--only", nargs="+", choices=list(SETTINGS), help="settings (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--set", nargs="+", default=[], metavar="A.B=VALUE", help="for all of them: for trying it out")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    log.setup(None)
    torch.set_num_threads(1)
    for seed in options.seeds:
        for name in options.only or SETTINGS:
            file = options.out / f"{name}-seed{seed}.json"
            with _claimed(file) as mine:
                if mine:
                    print(f"{name}, seed {seed}", flush=True)
                    try:
                        found = run(SETTINGS[name], seed, options.data, options.set)
                    except ConfigError as error:
                        parser.error(str(error))
                    write_json(file, {"setting": name, "seed": seed, **found})
                elif not file.exists():
                    print(
                        f"{name}, seed {seed}: begun by another process (if there is none, remove "
                        f"{file.with_suffix('.begun')})",
                        flush=True,
                    )


@contextlib.contextmanager
def _claimed(file: Path) -> Iterator[bool]:
    """Whether nobody has made the file, nor is making it."""
    mark = file.with_suffix(".begun")
    if file.exists():
        yield False
        return
    try:
        os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        yield False
        return
    try:
        yield True
    finally:
        mark.unlink()


def run(setting: Setting, seed: int, data: str, more: list[str]) -> dict[str, Any]:
    """The ratings of all blocks: ``blocks[k]["ratings"][step or "end"][score][path]``, larger is better."""
    config = load(
        None,
        [
            *BASE,
            f"data.train={data}/train-*.tar",
            f"data.val={data}/test-*.tar",
            f"seed={seed}",
            f"rating.score={setting.chosen_by}",
            *setting.sets,
            *more,
        ],
    )
    began = time.process_time()
    if config.schedule == "block_parallel":
        blocks, trained = _all_at_once(config), None
    else:
        blocks, trained = _one_by_one(config, setting)
    total = time.process_time() - began
    return {
        "sets": [*setting.sets, *more],
        "faults": list(setting.faults),
        "chosen_by": setting.chosen_by,
        "blocks": blocks,
        "torch": torch.__version__,
        "cpu_seconds": {"all": round(total, 1), "train": None if trained is None else round(trained, 1)},
    }


def _all_at_once(config: Config) -> list[dict[str, Any]]:
    """A whole search of the schedule block_parallel, on one process."""
    with tempfile.TemporaryDirectory() as folder:
        out = search(override(config, [f"out={folder}/run", f"checkpoint.every_steps={config.train.steps_per_epoch}"]))
        files = [json.loads((out / "ratings" / f"block_{b}.json").read_text(encoding="utf-8")) for b in range(3)]
    return [
        {
            "prefix": of["prefix"],
            "winner": _best(_signed(of["scores"]), of["score"]),
            "ratings": {"end": _signed(of["scores"])},
        }
        for of in files
    ]


def _one_by_one(config: Config, setting: Setting) -> tuple[list[dict[str, Any]], float]:
    run = build(config)
    blocks, state, trained = [], run.state, 0.0
    while state.block < run.space.blocks:
        ratings = {}
        if setting.train:
            started = time.process_time()
            for step in training(run, setting):
                if step in setting.rate_at:
                    trained += time.process_time() - started
                    ratings[str(step)] = rate_all(run, setting)
                    started = time.process_time()
            trained += time.process_time() - started
        ratings["end"] = rate_all(run, setting)
        best = _best(ratings["end"], setting.chosen_by)
        blocks.append({"prefix": [encode(p) for p in state.winners], "winner": best, "ratings": ratings})
        winners.freeze_winner(run, decode(best))
        state.step = 0
    return blocks, trained


def _best(ratings: dict[str, dict[str, float]], score: str) -> str:
    return max(ratings[score], key=ratings[score].__getitem__)


def _signed(scores: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Larger is better."""
    return {
        score: {path: value if BETTER[score] == "higher" else -value for path, value in values.items()}
        for score, values in scores.items()
    }


def training(run: Run, setting: Setting) -> Iterator[int]:
    """Trains the state's block; the number of every step that is done."""
    config, state, block = run.config, run.state, run.state.block
    own_leader: list[Choices] = []  # of the fault "stacked"
    engine = make_engine(config, run.machine.mesh)
    before = range(block) if "prefix" in setting.faults else range(0)  # blocks that go on training
    target = _BehindOwnPrefix(run.target) if before else run.target

    def inputs() -> Iterator[list[Tensor]]:
        for views in train_batches(run, block * config.train.epochs, 0):
            prefix = state.winners + own_leader
            if before:
                features = [_with_gradient(run.online, prefix, x) for x in views]
                target.remember(features, views, prefix)
            else:
                features = [run.target.features(prefix, x) for x in views]
            yield features

    def optimizer(module: nn.Module, followers: nn.Module | None, sharded: bool) -> LARS:
        train, groups = config.train, parameter_groups(module, followers)
        for group in groups:
            adapter, of_heads = ".adapter." in group["name"], group["name"].startswith(("projector.mlp", "predictor"))
            if adapter and "adapters" in setting.faults:
                group["target"] = None
            if not of_heads and "norms" in setting.faults:
                group["excluded"] = group["name"].endswith("bias")
        return LARS(groups, train.lr, train.momentum, train.weight_decay, train.trust)

    def parts(network: Supernet) -> nn.ModuleDict:
        return nn.ModuleDict({**network.part(block), **{f"before{b}": network.part(b) for b in before}})

    trained, followers = nn.ModuleDict({**parts(run.online), "predictor": run.predictors[block]}), parts(run.target)
    for part in (trained, followers):
        part.train()
    for b in before:
        run.online.part(b).requires_grad_(True)
    engine.wrap(trained, followers, optimizer)
    steps = train_block(
        Networks(run.online, target, run.predictors[block]),
        run.space,
        engine,
        inputs(),
        state,
        Training(config.train, run.steps_per_epoch, run.accumulate, config.seed),
        state.winners,
    )
    half = run.total_steps // 2
    for step in steps:
        if step is None:
            continue
        yield state.step
        for part in (trained, followers):  # a rating may have come between
            part.train()
        if "stacked" in setting.faults and state.step == half:
            scores = rate_all(run, setting)["population_centre"]
            own_leader.append(decode(max(scores, key=scores.get)))
            for network in (run.online, run.target):
                if block == 0:
                    _take_features_too(network.blocks[0][0])
            for part in (trained, followers):
                part.train()
    engine.close()


def _with_gradient(network: Supernet, prefix: list[Choices], x: Tensor) -> Tensor:
    """What `Supernet.features` gives without."""
    for block, path in enumerate(prefix):
        x = network(block, [Item(path, x)])[0]
    return x


class _BehindOwnPrefix:
    """The target network on the features of its own prefix, which moves: of the fault "prefix"."""

    def __init__(self, target: Supernet):
        self.target, self.own = target, {}

    def part(self, block: int) -> nn.ModuleDict:
        return self.target.part(block)

    def remember(self, features: list[Tensor], views: list[Tensor], prefix: list[Choices]) -> None:
        """Of which images the online network's features are."""
        self.own = {id(x): self.target.features(prefix, view) for x, view in zip(features, views, strict=True)}

    def embed(self, block: int, items: list[Item]) -> list[Tensor]:
        return self.target.embed(block, [item._replace(x=self.own[id(item.x)]) for item in items])


def _take_features_too(first: nn.Module) -> None:
    """Lets the first layer of all take a block's output, which skips the stem."""
    whole = first.forward
    first.forward = lambda x, *rest: whole(x, *rest) if x.shape[1] == 3 else first.cell(x, *rest)


def rate_all(run: Run, setting: Setting) -> dict[str, dict[str, float]]:
    """Every score of every path of the state's block; larger is better."""
    if "prefix" in setting.faults:  # it has moved: calibrated statistics again
        for block, winner in enumerate(run.state.winners):
            run.target.part(block).eval()
            winners.calibrate_path(run, block, run.state.winners[:block], winner)
    with _uncalibrated() if "predictor" in setting.faults else contextlib.nullcontext():
        scores = rating.rate(run, run.state.block).scores
    return _signed({score: {encode(path): value for path, value in values.items()} for score, values in scores.items()})


@contextlib.contextmanager
def _uncalibrated() -> Iterator[None]:
    """The predictor's batch norm keeps mean 0 and variance 1 in ratings, as in the original release."""
    whole = rate_block.calibrate

    def calibrate(networks, *rest):
        of_target, of_online = whole(networks, *rest)
        for part in _parts(of_online):
            for norm, (mean, var) in part.table.items():
                if norm in set(networks.predictor.modules()):
                    part.table[norm] = (torch.zeros_like(mean), torch.ones_like(var))
        return of_target, of_online

    rate_block.calibrate = calibrate
    try:
        yield
    finally:
        rate_block.calibrate = whole


def _parts(statistics: Statistics) -> Iterator[Statistics]:
    yield statistics
    for part in statistics.parts.values():
        yield from _parts(part)


if __name__ == "__main__":
    main()
