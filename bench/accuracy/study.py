"""Ratings of NATS-Bench's size space on CIFAR-10 under many settings (see PLAN.md): one JSON file per setting and seed.

    python bench/accuracy/study.py --data data/cifar10 --out runs/study --only untrained instance --seeds 0 1 2

A file that is there is not made again. Several processes may share the work: each takes settings nobody has begun.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path as Folder
from typing import Any

import torch
from torch import Tensor, nn

root = Folder(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(root), str(root / "kernels")]

from bossnas import log, rate, rating, stage  # noqa: E402
from bossnas.config import load  # noqa: E402
from bossnas.ops import Statistics  # noqa: E402
from bossnas.optim import LARS, parameter_groups  # noqa: E402
from bossnas.paths import Path, decode, encode  # noqa: E402
from bossnas.run import Run, build, make_engine  # noqa: E402
from bossnas.runfolder import write_json  # noqa: E402
from bossnas.scores import BETTER  # noqa: E402
from bossnas.supernet import Item  # noqa: E402
from bossnas.train import train_block  # noqa: E402

BASE = ["space.name=nats", "space.split=cifar10", "space.image_size=16", "heads.hidden=512", "heads.out=128",
        "data.recipe=cifar", "data.workers=0", "data.val_images=512", "train.batch=128", "train.micro_batch=128",
        "train.epochs=1", "train.steps_per_epoch=100", "train.lr=0.5", "train.warmup_epochs=0.1",
        "rating.batch=256", "rating.calibration_images=256", "rating.every_epochs=0", "engine.device=cpu"]
EMBEDDINGS = ("projection", "pooled")
OWN = "instance_discrimination pooled"  # the score that chooses the prefix


@dataclass(frozen=True)
class Setting:
    """``sets``: overrides of BASE; ``train``: False rates random weights; ``rate_at``: steps at which blocks are rated
    on the way; ``chosen_by``: the score that chooses the prefix; ``fault``: see PLAN.md."""

    sets: tuple[str, ...] = ()
    train: bool = True
    rate_at: tuple[int, ...] = ()
    chosen_by: str = OWN
    fault: str = ""


def _settings() -> dict[str, Setting]:
    objectives = {"bootstrap": "train.objective=bootstrap", "instance": "train.objective=instance"}
    found = {"untrained": Setting(train=False), "both": Setting(("train.objective=both",))}
    for name, objective in objectives.items():
        found[name] = Setting((objective,), rate_at=(25, 50))
        found[f"{name}-lr0.15"] = Setting((objective, "train.lr=0.15"))
        found[f"{name}-lr1.5"] = Setting((objective, "train.lr=1.5"))
        found[f"{name}-steps300"] = Setting((objective, "train.steps_per_epoch=300", "train.warmup_epochs=0.034"))
        found[f"{name}-paths4"] = Setting((objective, "train.paths=4"))
        found[f"{name}-paths2"] = Setting((objective, "train.paths=2"))
        found[f"{name}-batch256"] = Setting((objective, "train.batch=256", "train.micro_batch=256"))
        found[f"{name}-images32"] = Setting((objective, "space.image_size=32", "train.paths=4"))
    for temperature in ("0.1", "0.5"):
        found[f"instance-t{temperature}"] = Setting((objectives["instance"], f"train.temperature={temperature}"))
    found["bootstrap-centre"] = Setting((objectives["bootstrap"],), chosen_by="population_centre")
    for fault in ("stacked", "predictor", "adapters", "prefix"):
        found[f"fault-{fault}"] = Setting((objectives["bootstrap"],), fault=fault)
    found["untrained-images32"] = Setting(("space.image_size=32",), train=False)
    found["untrained-val2048"] = Setting(("data.val_images=2048",), train=False)
    return found


SETTINGS = _settings()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with train-*.tar and test-*.tar of CIFAR-10")
    parser.add_argument("--out", type=Folder, default=Folder("runs/study"), help="folder of the JSON files")
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
                    write_json(file, {"setting": name, "seed": seed, **run(SETTINGS[name], seed, options.data,
                                                                          options.set)})


@contextlib.contextmanager
def _claimed(file: Folder) -> Iterator[bool]:
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
    run = build(load(None, [*BASE, f"data.train={data}/train-*.tar", f"data.val={data}/test-*.tar", f"seed={seed}",
                            *setting.sets, *more]))
    if setting.fault == "adapters":
        for projector in run.online.projectors:
            projector.adapter.requires_grad_(False)
    blocks, state, began = [], run.state, time.process_time()
    trained = 0.0
    while state.block < run.space.blocks:
        block, ratings = state.block, {}
        if setting.train:
            started = time.process_time()
            for step in training(run, setting):
                if step in setting.rate_at:
                    trained += time.process_time() - started
                    ratings[str(step)] = rate_all(run, setting)
                    for network in (run.online, run.target):
                        network.part(block).train()
                    started = time.process_time()
            trained += time.process_time() - started
        ratings["end"] = rate_all(run, setting)
        values = ratings["end"][setting.chosen_by]
        best = max(values, key=values.get)
        blocks.append({"prefix": [encode(p) for p in state.winners], "winner": best, "ratings": ratings})
        rating.freeze_winner(run, decode(best))
        state.step = 0
    total = time.process_time() - began
    return {"sets": list(setting.sets), "fault": setting.fault, "chosen_by": setting.chosen_by, "blocks": blocks,
            "cpu_seconds": {"train": round(trained, 1), "rate": round(total - trained, 1)}, "torch": torch.__version__}


def training(run: Run, setting: Setting) -> Iterator[int]:
    """Trains the state's block; the number of every step that is done."""
    config, state, block = run.config, run.state, run.state.block
    own_leader: list[Path] = []  # of the fault "stacked"
    engine = make_engine(config, run.mesh)
    follows_prefix = setting.fault == "prefix" and block > 0

    def inputs() -> Iterator[list[Tensor]]:
        for views in stage.train_batches(run, block * config.train.epochs, 0):
            if follows_prefix:
                yield [_moving_features(run, x) for x in views]
            else:
                yield [run.target.features(state.winners + own_leader, x) for x in views]

    def optimizer(module: nn.Module, followers: nn.Module | None, sharded: bool) -> LARS:
        train = config.train
        return LARS(parameter_groups(module, followers), train.lr, train.momentum, train.weight_decay, train.trust)

    parts = {**run.online.part(block), "predictor": run.predictors[block]}
    if follows_prefix:
        parts["prefix"] = nn.ModuleList(run.online.part(b).requires_grad_(True) for b in range(block))
    engine.wrap(nn.ModuleDict(parts), run.target.part(block), optimizer)
    steps = train_block(run.online, run.target, run.predictors[block], run.space, engine, inputs(), state, config.train,
                        prefix=state.winners, accumulate=run.accumulate, steps_per_epoch=run.steps_per_epoch,
                        seed=config.seed, device=run.device)
    half = stage.total_steps(run) // 2
    for step in steps:
        if step is None:
            continue
        yield state.step
        if setting.fault == "stacked" and state.step == half:
            scores = rate_all(run, setting)["population_centre"]
            own_leader.append(decode(max(scores, key=scores.get)))
            rating.calibrate_path(run, block, state.winners, own_leader[0])
            run.online.part(block).train()
    engine.close()


def _moving_features(run: Run, x: Tensor) -> Tensor:
    """Of the online network's own prefix, which gets gradients."""
    for block, path in enumerate(run.state.winners):
        x = run.online.forward(block, [Item(path, x)])[0]
    return x


def rate_all(run: Run, setting: Setting) -> dict[str, dict[str, float]]:
    """Every score with every embedding, of every path of the state's block."""
    config, found = run.config, {}
    for embedding in EMBEDDINGS:
        run.config = config.model_copy(update={"rating": config.rating.model_copy(update={"embedding": embedding})})
        with _uncalibrated() if setting.fault == "predictor" else contextlib.nullcontext():
            scores = rating.rate(run, run.state.block)
        for score, values in scores.items():
            sign = 1 if BETTER[score] == "higher" else -1
            name = score if score == "population_centre" else f"{score} {embedding}"
            found[name] = {encode(path): sign * value for path, value in values.items()}
    run.config = config
    return found


@contextlib.contextmanager
def _uncalibrated() -> Iterator[None]:
    """The predictor's batch norm keeps mean 0 and variance 1 in ratings, as in the original release."""
    whole = rate.calibrate

    def calibrate(online, target, predictor, *rest):
        of_target, of_online = whole(online, target, predictor, *rest)
        for part in _parts(of_online):
            for norm, (mean, var) in part.table.items():
                if norm in set(predictor.modules()):
                    part.table[norm] = (torch.zeros_like(mean), torch.ones_like(var))
        return of_target, of_online

    rate.calibrate = calibrate
    try:
        yield
    finally:
        rate.calibrate = whole


def _parts(statistics: Statistics) -> Iterator[Statistics]:
    yield statistics
    for part in statistics.parts.values():
        yield from _parts(part)


if __name__ == "__main__":
    main()
