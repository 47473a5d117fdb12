"""The one typed configuration: every knob with its unit and default, from JSON or YAML, unknown keys refused."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bossnas.errors import ConfigError


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class SpaceConfig(Section):
    name: str = Field("hytra", description="hytra | mbconv | nats | path/to/file.py:ClassName (an own space)")
    width: float = Field(1.0, gt=0, le=4, description="multiplier of all channel numbers")
    image_size: int = Field(224, ge=1, description="side of the square views, pixels")
    restricted: bool = Field(True, description="hytra: a block's first layer goes down at most one scale")
    split: Literal["cifar10", "cifar100"] = Field("cifar10", description="nats: layers per block 2-2-1 or 2-1-2")


class HeadsConfig(Section):
    hidden: int = Field(4096, ge=1, description="hidden units of the projectors and predictors")
    out: int = Field(256, ge=2, description="dimension of the embedding space")


class ReaderConfig(Section):
    train: str | list[str] | None = Field(None, description="training shards: glob, brace pattern or list of tars")
    val: str | list[str] | None = Field(None, description="validation shards, for the rating; null: see train")
    reader: Literal["auto", "index", "stream"] = Field(
        "auto", description="index: random access to local shards, any ranks and workers; stream: shards of object "
        "stores and web servers, from beginning to end; auto: stream where a URL is given")
    workers: int = Field(2, ge=0, description="loader processes per rank; 0 loads in the training process")
    shuffle_block: int | None = Field(
        None, ge=1, description="index: shuffle the shards and within blocks of n images, for storage that is slow at "
        "random access (8192 is a good start); null: all images")
    buffer: int = Field(1000, ge=0, description="stream: images in a reader's shuffle buffer")
    retries: int = Field(5, ge=0, description="stream: failures of a connection on end that are put up with")
    timeout_s: float = Field(60.0, gt=0, description="stream: seconds without a byte that count as a failure")
    allow_pipe: bool = Field(False, description="stream: let pipe:COMMAND run a shell command")
    val_images: int | None = Field(None, ge=2, description="use the first n validation images; null: all")
    max_bad: float = Field(0.001, ge=0, lt=1, description="share of unreadable images above which the run stops")


class DataConfig(ReaderConfig):
    recipe: Literal["imagenet", "cifar"] = Field("imagenet", description="augmentation of the views")
    views_on: Literal["auto", "device", "worker_crops", "worker"] = Field(
        "auto", description="where views are made: worker: in the loader processes; worker_crops: crops there, the "
        "rest on the device; device: all there, loaders only decode; auto: device on a GPU, worker elsewhere")


class TrainConfig(Section):
    objective: Literal["bootstrap", "instance", "both"] = Field(
        "bootstrap", description="bootstrap: a path predicts the ensemble target of the other view; instance: a path's "
        "two views of an image find each other among those of the micro-batch; both: the sum")
    temperature: float = Field(0.2, gt=0, description="of the instance objective")
    batch: int = Field(4096, ge=2, description="images per optimizer step, over all ranks")
    micro_batch: int = Field(64, ge=2, description="images per rank and forward pass")
    epochs: int = Field(6, ge=1, description="epochs per block")
    steps_per_epoch: int | None = Field(None, ge=1, description="optimizer steps an epoch; null: the whole set")
    lr: float = Field(4.8, gt=0, description="base learning rate, for the whole batch")
    warmup_epochs: float = Field(1.0, ge=0, description="linear warm-up at each block's start")
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(1e-6, ge=0)
    trust: float = Field(0.001, gt=0, description="LARS trust coefficient")
    ema: float = Field(0.99, ge=0, le=1, description="target network's momentum at a block's start; ends at 1")
    clip: float = Field(0.0, ge=0, description="gradient norm limit; 0: none")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="autocast precision of the networks; fp16: with a dynamic loss scale")
    sync_batch_norm: bool = Field(False, description="batch norms of the training see the images of all ranks that "
                                  "share a batch, so that any number of ranks trains alike; slower")
    activation_checkpointing: bool = Field(False, description="keep no map within a candidate, compute it again in "
                                           "the backward pass: less memory, about a third more work")
    max_bad_steps: int = Field(10, ge=0, description="steps of a block that may be skipped because their gradient is "
                               "not finite, before the run stops")
    paths: int | None = Field(None, ge=1, description="at most so many of the paths that the space samples in a step; "
                              "null: all")
    paths_per_pass: int | None = Field(None, ge=1, description="paths that share one backward; null: all")
    collapse_below: float = Field(0.05, ge=0, le=1, description="warn when the embeddings' spread is less")


class RatingConfig(Section):
    score: Literal["population_centre", "instance_discrimination", "pooled_instance_discrimination", "view_agreement",
                   "pooled_view_agreement", "effective_rank"] = Field(
        "pooled_instance_discrimination", description="which score chooses the winners; the ratings hold all. Of the "
        "projections, or (pooled) of the block's output, averaged over the map")
    temperature: float = Field(0.2, gt=0, description="of instance discrimination")
    max_gib: float | None = Field(None, gt=0, description="memory for the paths that are rated together, GiB; null: "
                                  "half of what is free on a GPU, 1/4 on a CPU")
    every_epochs: int = Field(2, ge=0, description="rate in mid-stage every n epochs; 0: only at the stage's end")
    batch: int = Field(256, ge=2, description="validation images per batch")
    calibration_images: int = Field(256, ge=2, description="training images in one calibration batch")
    calibration_batches: int = Field(1, ge=1, description="batches whose batch-norm statistics are averaged")


class WorkersConfig(Section):
    name: Literal["single", "ddp", "fsdp2", "deepspeed"] = Field(
        "single", description="single: one process; ddp: all of it on every rank; fsdp2: a share of the trained "
        "block's weights, gradients and optimizer on each; deepspeed: ZeRO 0, 1, 2")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    timeout_minutes: float = Field(30.0, gt=0, description="a rank that waits longer than this for another "
                                   "ends the run")
    deepspeed: dict[str, Any] = Field({}, description="what DeepSpeed alone knows: ZeRO, offload, communication")


class EngineConfig(WorkersConfig):
    queue: int = Field(2, ge=1, description="block_parallel: micro-batches that may be under way to the next block")
    check_paths: bool = Field(False, description="compare the sampled paths over the ranks at every step")


class CheckpointConfig(Section):
    every_steps: int = Field(100, ge=1, description="optimizer steps between checkpoints within a block")
    keep: int = Field(2, ge=1, description="checkpoints kept")
    asynchronous: bool = Field(True, description="go on training while a checkpoint is written")


class RunConfig(Section):
    """What every kind of run has; ``kind`` says in a run folder which it is."""

    kind: ClassVar[str]

    def check(self) -> None:
        """Raises ConfigError for values that do not go together."""
        raise NotImplementedError


class Config(RunConfig):
    kind: ClassVar[str] = "search"

    out: str = Field("runs/search", min_length=1, description="run folder; every result goes there")
    seed: int = Field(0, ge=0)
    kernels: Literal["auto", "triton", "reference"] = Field(
        "auto", description="auto: Triton on a GPU, plain PyTorch elsewhere")
    schedule: Literal["sequential", "block_parallel"] = Field(
        "sequential", description="sequential: one block after the other; block_parallel: all at once, each on "
        "what the block before it streams")
    space: SpaceConfig = SpaceConfig()
    heads: HeadsConfig = HeadsConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    rating: RatingConfig = RatingConfig()
    engine: EngineConfig = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    def check(self) -> None:
        """Raises ConfigError for values that do not go together."""
        if self.engine.name == "deepspeed" and self.schedule == "block_parallel":
            raise ConfigError("engine.name", "is deepspeed, which trains one block at a time, but schedule is "
                              "block_parallel", "set engine.name to ddp or fsdp2, or schedule to sequential")
        check_engine(self.engine)
        check_batch(self.train)


C = TypeVar("C", bound="RunConfig")
SECTIONS_OF = (("model", "augment", "evaluate"), ("space", "heads", "rating", "schedule"))  # a retraining's, a search's


def load(path: str | Path | None, overrides: list[str] | None = None, schema: type[C] = Config) -> C:
    """Reads a JSON or YAML config, applies ``a.b=value`` overrides (values are YAML) and validates.

    Raises ConfigError that names the field and the fix. ``path=None`` starts from the defaults. ``schema``: of a
    search, or RetrainConfig.
    """
    values = {} if path is None else _read(Path(path))
    for override in overrides or []:
        _apply(values, override)
    return validate(values, schema)


def override(config: C, overrides: Sequence[str]) -> C:
    """The config with ``a.b=value`` overrides applied and validated."""
    values = config.model_dump(mode="json")
    for text in overrides:
        _apply(values, text)
    return validate(values, type(config))


def validate(values: dict, schema: type[C] = Config) -> C:
    """Validates plain values. Raises ConfigError on the first mistake."""
    try:
        config = schema.model_validate(values)
    except ValidationError as error:
        of_other = [e["loc"][0] for e in error.errors() if e["type"] == "extra_forbidden" and len(e["loc"]) == 1
                    and e["loc"][0] in SECTIONS_OF[schema.kind != "search"]]
        if of_other:
            raise ConfigError("--config", f"has the section {of_other[0]!r}, so it is not of a {schema.kind}",
                              "search with bossnas search, train a network with bossnas retrain") from None
        raise _explain(error.errors()[0], schema) from None
    config.check()
    return config


def check_batch(train: TrainConfig | Any) -> None:
    """Raises ConfigError where a train section's numbers do not fit together."""
    if train.batch % train.micro_batch:
        raise ConfigError("train.batch", f"{train.batch} is not a multiple of train.micro_batch {train.micro_batch}",
                          "choose a multiple")
    if train.warmup_epochs > train.epochs:
        raise ConfigError("train.warmup_epochs", f"{train.warmup_epochs:g} is more than train.epochs {train.epochs}, "
                          "so the learning rate never reaches train.lr", "lower it")


def check_engine(engine: WorkersConfig) -> None:
    """Raises ConfigError for an engine's section that its engine does not read."""
    if engine.name != "deepspeed" and engine.deepspeed:
        raise ConfigError("engine.deepspeed", f"is set, but engine.name is {engine.name!r}",
                          "set engine.name to deepspeed or remove the section")


def accumulation(config: Any, world_size: int) -> int:
    """Micro-batches per optimizer step on each rank, so that the batch is the same on any number of ranks."""
    per_pass = config.train.micro_batch * world_size
    if config.train.batch % per_pass:
        per_rank = config.train.batch // world_size
        hint = (f"set train.micro_batch to a divisor of {per_rank}" if config.train.batch % world_size == 0
                else f"use a number of ranks that divides {config.train.batch}")
        raise ConfigError("train.batch", f"{config.train.batch} images cannot be divided over {world_size} ranks x "
                          f"micro-batches of {config.train.micro_batch}", hint)
    return config.train.batch // per_pass


def dump(config: RunConfig) -> str:
    """The resolved config as JSON, every default written out."""
    return json.dumps(config.model_dump(mode="json"), indent=2) + "\n"


def _read(path: Path) -> dict:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("--config", f"cannot read {path} ({getattr(error, 'strerror', None) or error})",
                          "name a .json or .yaml file") from None
    try:
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError, RecursionError) as error:
        where = str(error).replace("\n", " ")
        raise ConfigError("--config", f"{path} is not valid {path.suffix[1:]} ({where})", "mend the file") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError("--config", f"{path} holds no mapping of keys", "write sections such as space, data, train")
    values.pop("_comment", None)
    return values


def _apply(values: dict, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError("--set", f"{override!r} is not of the form a.b=value", "write for example train.epochs=2")
    *sections, last = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(key, f"{section} is a value, not a section", "see `bossnas search --help`")
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(key, f"cannot read the value {text!r}", "quote it as YAML") from None


def _explain(error: dict, schema: type[RunConfig]) -> ConfigError:
    where = ".".join(str(part) for part in error["loc"] if part not in ("str", "list[str]"))
    if error["type"] == "extra_forbidden":
        section: Any = schema
        for part in error["loc"][:-1]:
            kind = section.model_fields[part].annotation
            section = next((of for of in get_args(kind) if of is not type(None)), kind)  # of one that may be null
        names = list(section.model_fields)
        near = difflib.get_close_matches(str(error["loc"][-1]), names, n=1)
        return ConfigError(where, "unknown key", f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}")
    message = error["msg"][0].lower() + error["msg"][1:]
    return ConfigError(where, f"{message}, got {error['input']!r}", "change the value")
