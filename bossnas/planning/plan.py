"""A search on paper: memory, communication and hours on a cluster that nobody has started (`bossnas plan`).

Work is counted from the code (`bossnas.planning.workload`); rates are a GPU's datasheet times a stated share, or
measured ones. Nothing here overlaps communication with work except the stream of features, because the
engines do not either.
"""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bossnas import spaces
from bossnas.config.search import Config
from bossnas.config.shared import accumulation
from bossnas.distributed import engines
from bossnas.errors import ConfigError
from bossnas.planning.gpus import (
    GIB,
    GPUS,
    HOP_SECONDS,
    HOST_SECONDS,
    LINK,
    MATRIX,
    MEMORY,
    NODE,
    Given,
    Rates,
    gpu_rates,
)
from bossnas.planning.ranks import ENGINES, RESERVED, Task, memory, split
from bossnas.planning.workload import WEIGHT, Workload
from bossnas.spaces.cost import read_architecture
from bossnas.spaces.paths import encode
from bossnas.supernet.train_block import sample_paths

SCHEDULES = ("sequential", "block_parallel")
FULL = 0.9  # share of a GPU's memory above which the allocator's gaps make it fail

# CPU milliseconds for an image (docs/results/data.md): where its views are made -> one core's time.
CORE_MS = {
    "imagenet": {"device": 1.595, "worker_crops": 3.887, "worker": 9.746},
    "cifar": {"device": 0.028, "worker_crops": 0.047, "worker": 0.048},
}
# Training and validation images; sample: the embedded one, where data.train is not set.
IMAGES = {"imagenet": (1_281_167, 50_000), "cifar": (50_000, 10_000), "sample": (2_000, 500)}


def read_gpus(text: str) -> list[int]:
    """ "1,8,64" -> [1, 8, 64]. Raises ConfigError for anything but positive whole numbers."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and 0 < int(part) <= 10**6 for part in parts):
        raise ConfigError("gpus", f"{text!r} is not a list of positive whole numbers", "write 8 or 1,8,64")
    return sorted({int(part) for part in parts})


def plan(
    config: Config,
    gpus: Sequence[int],
    gpu: str,
    *,
    architecture: str | None = None,
    images: tuple[int | None, int | None] = (None, None),
    measured: Sequence[Path] = (),
    given: Given | None = None,
) -> dict[str, Any]:
    """{"rows": one for each number of GPUs, schedule and engine, "blocks", "assumptions", "limits"}, plain values.

    ``architecture``: the winners to assume; ``images``: of the training and the validation set, None: as many as in
    ImageNet, CIFAR or the sample; ``measured``: JSON files of ``bench/step.py`` from one such GPU;
    ``given``: what is known better than the GPU's datasheet. Raises ConfigError for what the user can mend.
    """
    given = given or Given()
    rates = gpu_rates(gpu, given)
    engines.make(
        config.engine.name,
        accumulate=accumulation(config, 1),
        micro_batch=config.train.micro_batch,
        precision=config.train.precision,
        section=config.engine.deepspeed,
    )  # refuses what cannot work
    if config.train.precision == "bf16" and gpu == "v100":
        raise ConfigError("train.precision", "v100 has no bfloat16", "set it to fp16")
    space = spaces.make(**config.space.model_dump())
    winners = None if architecture is None else read_architecture(space, architecture)
    defaults = IMAGES[config.data.recipe if config.data.train else "sample"]
    images = (images[0] or defaults[0], images[1] or defaults[1])
    if config.data.val_images:
        images = (images[0], min(images[1], config.data.val_images))
    if images[0] < config.train.batch * (config.train.steps_per_epoch or 1):
        raise ConfigError("train_images", f"{images[0]} are fewer than an epoch takes", "lower train.batch")
    steps = [_read_step(file, config, space.blocks) for file in measured]
    kinds = [
        (n, s, e)
        for n in gpus
        for s in SCHEDULES
        for e in ENGINES
        if s == "sequential" or not e.startswith("deepspeed")
    ]
    with _uncollected():
        search = _Search(config, Workload(config, space, winners), rates, *images)
        search.measure(steps)
        rows = [search.row(*kind) for kind in kinds]
        blocks = search.blocks(gpu)
    _scaling(rows)
    return {
        "config": {
            "space": config.space.name,
            "engine": search.engine,
            "batch": config.train.batch,
            "micro_batch": config.train.micro_batch,
            "precision": config.train.precision,
        },
        "gpu": gpu,
        "rows": rows,
        "blocks": blocks,
        "assumptions": search.assumptions(gpu, given),
        "limits": search.limits(rows),
    }


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without garbage collection, which would go over all of PyTorch again and again: a sixth of the time."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


class _Search:
    """A config's search on GPUs of given rates."""

    def __init__(self, config: Config, counts: Workload, given: Rates, train_images: int, val_images: int):
        self.config, self.counts, self.rates, self.space = config, counts, given, counts.space
        self.train_images, self.val_images = train_images, val_images
        train, stage = config.train, config.engine.deepspeed.get("zero_optimization", {})
        size = stage.get("reduce_bucket_size")
        self.bucket = WEIGHT * (size if isinstance(size, int | float) else 5 * 10**8)  # DeepSpeed's default
        self.engine = {"single": "ddp", "deepspeed": f"deepspeed {stage.get('stage', 0)}"}.get(
            config.engine.name, config.engine.name
        )
        self.steps = train.epochs * (train.steps_per_epoch or train_images // train.batch)
        every = config.rating.every_epochs
        self.midway = (train.epochs - 1) // every if every else 0  # ratings before the stage's end
        self.all_blocks = [counts.block(block) for block in range(self.space.blocks)]

    def measure(self, steps: Sequence[dict[str, Any]]) -> None:
        """Takes measured steps (see `_read_step`) for their blocks: their seconds over those that the rates give."""
        factors = {}
        for step in steps:
            images = step["micro_batch"]
            predicted = step["batch"] / images * self.work_seconds(step["block"], images, "sequential")
            factors[step["block"]] = step["median_step_s"] / predicted
        self.rates = replace(self.rates, factors=factors)

    def work_seconds(self, block: int, images: int, schedule: str) -> float:
        """A rank's work on a micro-batch: the block's, and what it gets its features by, or makes the next one's by."""
        phases = self.counts.typical(block, images).phases
        parts = [phases["target"], phases["online"], phases["backward"]]
        if schedule == "sequential":
            return self.rates.seconds(np.concatenate([phases["prefix"], *parts]), block)
        seconds = self.rates.seconds(np.concatenate(parts), block)
        if block + 1 < self.space.blocks:  # the next block's prefix is this one's and the forward pass that feeds it
            following = self.counts.typical(block + 1, images).phases["prefix"]
            seconds += self.rates.seconds(following, block) - self.rates.seconds(phases["prefix"], block)
        return seconds

    def row(self, gpus: int, schedule: str, engine: str) -> dict[str, Any]:
        """A line of the plan."""
        head = {"gpus": gpus, "schedule": schedule, "engine": engine}
        cut = split(self.config, self.space.blocks, gpus, schedule, engine)
        if "reason" in cut:
            return {**head, "runs": False, "reason": cut["reason"]}
        tasks = [self.task(block, engine, cut) for block in range(self.space.blocks)]
        work = [
            self.work_seconds(block, cut["micro_batch"], schedule) * cut["accumulate"]
            for block in range(self.space.blocks)
        ]
        parts = [
            {
                "work": seconds,
                "shuffle": self.rates.exchange(*task.shuffle(), cut["shards"]),
                "gradients": self.rates.exchange(*task.gradients(), cut["shards"]),
                "update": task.update_bytes() / self.rates.memory,
            }
            for task, seconds in zip(tasks, work, strict=True)
        ]
        together = cut["rows"] if schedule == "block_parallel" else [[block] for block in range(self.space.blocks)]
        largest = max(
            (self.memory([tasks[b] for b in row], schedule) for row in together), key=lambda pieces: pieces["total"]
        )
        hours, idle = self.hours(gpus, schedule, cut, parts)
        received = [task.shuffle()[0] + task.gradients()[0] for task in tasks]
        total, step = sum(hours.values()), self.step_seconds(schedule, cut, parts)
        loading = cut["micro_batch"] * cut["accumulate"] / step  # images a second of each rank that reads images
        return {
            **head,
            "runs": True,
            "change": cut["change"],
            "shards": cut["shards"],
            "micro_batch": cut["micro_batch"],
            "accumulate": cut["accumulate"],
            "memory_gib": {name: size / GIB for name, size in largest.items()},
            "fits": largest["total"] <= FULL * self.rates.capacity,
            "received_gb": max(received) / 1e9,
            "step_s": step,
            "hours": {**hours, "total": total},
            "idle": idle,
            "images_per_s": loading * cut["shards"],
            "cores_per_gpu": loading * self.core_ms() / 1e3,
        }

    def task(self, block: int, engine: str, cut: dict[str, Any]) -> Task:
        paths = len(sample_paths(self.space, block, self.counts.winners[:block], 0, 0, self.config.train.paths))
        return Task(
            engine,
            cut["shards"],
            cut["accumulate"],
            cut["micro_batch"],
            2 * self.space.view_pairs,
            paths,
            self.space.layers(block),
            self.config.heads.out,
            self.all_blocks[block],
            self.counts.typical(block, cut["micro_batch"]),
        )

    def memory(self, tasks: Sequence[Task], schedule: str) -> dict[str, float]:
        recompute = self.config.train.activation_checkpointing
        peaks = [self.counts.largest(task.block.number, task.images, recompute).peak for task in tasks]
        queue = self.config.engine.queue if schedule == "block_parallel" else 0
        return memory(tasks, peaks, self.counts.weights, 3 * self.config.space.image_size**2 * 4, queue, self.bucket)

    def step_seconds(self, schedule: str, cut: dict[str, Any], parts: Sequence[dict[str, float]]) -> float:
        """Of an update: the mean over the blocks, or of the slowest row."""
        blocks = [sum(part.values()) for part in parts]
        if schedule == "sequential":
            return sum(blocks) / len(blocks)
        return max(max(sum(blocks[b] for b in row), self.stream_seconds(row, cut)) for row in cut["rows"])

    def stream_seconds(self, row: Sequence[int], cut: dict[str, Any]) -> float:
        """An update's features from a row to the next one, which travel while both work."""
        if row[-1] + 1 == self.space.blocks:
            return 0.0
        size = 2 * self.space.view_pairs * cut["micro_batch"] * self.all_blocks[row[-1] + 1].input_bytes
        ranks = cut["shards"] * len(cut["rows"])
        return cut["accumulate"] * size / (self.rates.link if ranks <= NODE else self.rates.network)

    def hours(
        self,
        gpus: int,
        schedule: str,
        cut: dict[str, Any],
        parts: Sequence[dict[str, float]],
    ) -> tuple[dict[str, float], float]:
        """Hours by what they go into, and the share of the training in which ranks wait for the slowest row."""
        step, blocks = self.step_seconds(schedule, cut, parts), [sum(part.values()) for part in parts]
        if schedule == "sequential":
            spent = {name: self.steps * sum(part[name] for part in parts) for name in parts[0]}
            idle = 0.0
        else:
            rows = [sum(blocks[b] for b in row) for row in cut["rows"]]
            slowest = cut["rows"][int(np.argmax(rows))]
            spent = {name: self.steps * sum(parts[b][name] for b in slowest) for name in parts[0]}
            pauses = self.steps // self.config.checkpoint.every_steps + self.midway + 1
            fill = pauses * (len(rows) - 1) * step / cut["accumulate"]
            spent["waiting"] = self.steps * (step - max(rows)) + fill
            idle = 1 - self.steps * sum(rows) / len(rows) / (self.steps * step + fill)
        spent["rating"] = (self.midway + 1) * sum(self.rating_seconds(b, gpus) for b in range(self.space.blocks))
        if schedule == "block_parallel":  # before each rating everyone gets all weights
            spent["rating"] += (self.midway + 1) * self.rates.exchange(WEIGHT * self.counts.weights, 1, gpus)
        return {name: seconds / 3600 for name, seconds in spent.items()}, idle

    def rating_seconds(self, block: int, ranks: int) -> float:
        """One rating of a block: every rank calibrates all paths; validation batches are divided over the ranks."""
        train, rating = self.config.train, self.config.rating
        micro = self.counts.typical(block, train.micro_batch)
        forward = micro.phases["target"] if len(micro.phases["target"]) else micro.phases["online"]
        per_mac = self.rates.seconds(forward, block) / (forward[:, :2].sum() / 2)
        prefix = self.rates.seconds(micro.phases["prefix"], block) / (2 * self.space.view_pairs * train.micro_batch)
        view = sum(self.all_blocks[block].rated_macs) * per_mac + prefix  # of one image
        calibration = min(rating.calibration_batches * rating.calibration_images, self.train_images)
        waves = math.ceil(math.ceil(self.val_images / rating.batch) / ranks)
        return view * (calibration + waves * 2 * min(rating.batch, self.val_images))

    def core_ms(self) -> float:
        data = self.config.data
        return CORE_MS[data.recipe]["device" if data.views_on == "auto" else data.views_on]

    def blocks(self, gpu: str) -> list[dict[str, Any]]:
        """What was counted of each block, for a micro-batch of the config."""
        sheet = GPUS[gpu]
        peak = 1e12 * (sheet.tf32 if self.config.train.precision == "fp32" else sheet.half)
        result = []
        for number, block in enumerate(self.all_blocks):
            micro = self.counts.typical(number, self.config.train.micro_batch)
            seconds = self.work_seconds(number, self.config.train.micro_batch, "sequential")
            largest = {
                name: self.counts.largest(number, self.config.train.micro_batch, on).peak / GIB
                for name, on in (("activations_gib", False), ("checkpointing_gib", True))
            }
            result.append(
                {
                    "winner": encode(self.counts.winners[number]),
                    "paths": block.paths,
                    "input": list(block.input_shape),
                    "parameters": block.parameters,
                    "predictor": block.predictor,
                    "followers": block.followers,
                    "used": micro.used,
                    "tflop": {name: float(rows[:, :2].sum()) / 1e12 for name, rows in micro.phases.items()},
                    "gb": {name: float(rows[:, 2].sum()) / 1e9 for name, rows in micro.phases.items()},
                    "seconds": seconds,
                    "of_peak": sum(float(rows[:, :2].sum()) for rows in micro.phases.values()) / seconds / peak,
                    "rated_macs": sum(block.rated_macs),
                    **largest,
                }
            )
        return result

    def assumptions(self, gpu: str, given: Given) -> list[str]:
        """What the figures rest on, a sentence each."""
        sheet, rates = GPUS[gpu], self.rates
        winners = "|".join(encode(path) for path in self.counts.winners)
        known = ", ".join(f"{block} (x {factor:.2f})" for block, factor in sorted(rates.factors.items()))
        source = (
            f"work: measured steps of blocks {known} of what follows, other blocks the mean"
            if known
            else "work: nothing is measured"
        )
        size = f"{given.memory:g} GB (given)" if given.memory else f"{sheet.memory_gb:g} GB"
        return [
            f"{gpu}: {sheet.source}; {sheet.half:g} TFLOP/s in 16 bits, {sheet.tf32:g} in fp32 (TF32), "
            f"{size} at {sheet.memory:g} GB/s, {sheet.link:g} GB/s to {NODE} GPUs of a node, "
            f"{sheet.network:g} GB/s from node to node",
            source,
            "every operation takes what its products take at "
            + (f"{given.tflops:g} TFLOP/s (given)" if given.tflops else f"{MATRIX:.0%} of that")
            + " or its bytes at "
            + (f"{given.gbps:g} GB/s (given)" if given.gbps else f"{MEMORY:.0%}")
            + f", whichever is longer; a micro-batch at least {HOST_SECONDS * 1e6:g} us of the host for each",
            f"collectives reach {LINK:.0%} of links and network, with {HOP_SECONDS * 1e6:g} us x "
            "log2(ranks) of latency each; only the stream of features overlaps with work",
            f"winners: {winners}; memory: the largest of what blocks may hand over and of the paths drawn",
            f"{self.train_images:,} training images, {self.val_images:,} for the rating; {self.steps:,} optimizer "
            f"steps of {self.config.train.batch} images per block, {self.midway + 1} ratings of each block",
            f"{RESERVED / GIB:g} GiB per rank for CUDA, NCCL and workspaces; memory fits up to {FULL:.0%} of the GPU's",
            f"an image takes {self.core_ms():g} ms of a CPU core to load; views on the device, checkpoints and the "
            "start are not counted",
        ]

    def limits(self, rows: Sequence[dict[str, Any]]) -> list[str]:
        """How far the config goes, and where and why each schedule of its engine stops scaling."""
        train, blocks = self.config.train, self.space.blocks
        most = train.batch // train.micro_batch
        found = [
            f"train.batch {train.batch} and train.micro_batch {train.micro_batch} go up to {most} ranks "
            f"(block_parallel: {most * blocks}); with fewer images per rank and batch norm, down to 2, up to "
            f"{train.batch // 2} ({train.batch // 2 * blocks})"
        ]
        for schedule in SCHEDULES:
            own = [row for row in shown(rows, self.engine) if row["schedule"] == schedule and row["runs"]]
            slow = next((row for row in own if row["scaling"] < 0.5), None)
            if slow is None:
                continue
            total = slow["hours"]["total"]
            shares = sorted(
                ((hours / total, name) for name, hours in slow["hours"].items() if name != "total"), reverse=True
            )[:3]
            found.append(
                f"{schedule}, {slow['engine']}: at {slow['gpus']} GPUs each does {slow['scaling']:.0%} of "
                f"what one of {own[0]['gpus']} does; hours go into "
                + ", ".join(f"{name} {share:.0%}" for share, name in shares)
            )
        return found


def shown(rows: Sequence[dict[str, Any]], engine: str) -> list[dict[str, Any]]:
    """The rows of one engine; in block_parallel, which DeepSpeed cannot do, those of ddp instead."""
    parallel = engine if engine in ("ddp", "fsdp2") else "ddp"
    return [row for row in rows if row["engine"] == (engine if row["schedule"] == "sequential" else parallel)]


def _scaling(rows: Sequence[dict[str, Any]]) -> None:
    """Adds "scaling": what a GPU does, relative to one of the fewest that run this schedule and engine."""
    first: dict[tuple[str, str], float] = {}
    for row in rows:
        if row["runs"]:
            spent = row["gpus"] * row["hours"]["total"]
            row["scaling"] = first.setdefault((row["schedule"], row["engine"]), spent) / spent


def _read_step(file: Path, config: Config, blocks: int) -> dict[str, Any]:
    """A result of ``bench/step.py --json``, if it is of this config."""
    fix = "write it with python bench/step.py --config … --steps 5 --json FILE on one such GPU"
    try:
        step = json.loads(file.read_text(encoding="utf-8"))
        same = {
            "space": config.space.name,
            "width": config.space.width,
            "image_size": config.space.image_size,
            "precision": config.train.precision,
        }
        differ = [f"{key} {step[key]!r}" for key, value in same.items() if step[key] != value]
        valid = (
            step["block"] in range(blocks) and step["median_step_s"] > 0 and step["batch"] >= step["micro_batch"] > 1
        )
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError("measured", f"{file} holds no measured step", fix) from None
    if differ or not valid:
        problem = f"is of another search ({', '.join(differ)})" if differ else "has a value that cannot be"
        raise ConfigError("measured", f"{file} {problem}", fix)
    return step
