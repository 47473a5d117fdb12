"""What the configs of every kind of run share: sections, and checks of what fits together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

from bossnas.errors import ConfigError


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class SpaceConfig(Section):
    name: str = Field("hytra", description="hytra | mbconv | nats | path/to/file.py:ClassName (an own space)")
    width: float = Field(1.0, gt=0, le=4, description="multiplier of all channel numbers")
    image_size: int = Field(224, ge=1, description="side of the square views, pixels")
    restricted: bool = Field(True, description="hytra: a block's first layer goes down at most one scale")
    split: Literal["cifar10", "cifar100"] = Field("cifar10", description="nats: layers per block 2-2-1 or 2-1-2")


class ReaderConfig(Section):
    train: str | list[str] | None = Field(None, description="training shards: glob, brace pattern or list of tars")
    val: str | list[str] | None = Field(None, description="validation shards, for the rating; null: see train")
    reader: Literal["auto", "index", "stream"] = Field(
        "auto",
        description="index: random access to local shards, any ranks and workers; stream: shards of object "
        "stores and web servers, from beginning to end; auto: stream where a URL is given",
    )
    workers: int = Field(2, ge=0, description="loader processes per rank; 0 loads in the training process")
    shuffle_block: int | None = Field(
        None,
        ge=1,
        description="index: shuffle the shards and within blocks of n images, for storage that is slow at "
        "random access (8192 is a good start); null: all images",
    )
    buffer: int = Field(1000, ge=0, description="stream: images in a reader's shuffle buffer")
    retries: int = Field(5, ge=0, description="stream: failures of a connection on end that are put up with")
    timeout_s: float = Field(60.0, gt=0, description="stream: seconds without a byte that count as a failure")
    allow_pipe: bool = Field(False, description="stream: let pipe:COMMAND run a shell command")
    val_images: int | None = Field(None, ge=2, description="use the first n validation images; null: all")
    max_bad: float = Field(0.001, ge=0, lt=1, description="share of unreadable images above which the run stops")


class WorkersConfig(Section):
    name: Literal["single", "ddp", "fsdp2", "deepspeed"] = Field(
        "single",
        description="single: one process; ddp: all of it on every rank; fsdp2: a share of the trained "
        "block's weights, gradients and optimizer on each; deepspeed: ZeRO 0, 1, 2",
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    timeout_minutes: float = Field(
        30.0, gt=0, description="a rank that waits longer than this for another ends the run"
    )
    deepspeed: dict[str, Any] = Field({}, description="what DeepSpeed alone knows: ZeRO, offload, communication")


class CheckpointConfig(Section):
    every_steps: int = Field(100, ge=1, description="optimizer steps between checkpoints within a block")
    keep: int = Field(2, ge=1, description="checkpoints kept")
    asynchronous: bool = Field(True, description="go on training while a checkpoint is written")


class Steps(Protocol):
    """What the train section of every kind of run has."""

    @property
    def batch(self) -> int: ...

    @property
    def micro_batch(self) -> int: ...

    @property
    def epochs(self) -> int: ...

    @property
    def steps_per_epoch(self) -> int | None: ...

    @property
    def warmup_epochs(self) -> float: ...


class RunConfig(Section):
    """What every kind of run has; ``kind`` says in a run folder which it is."""

    kind: ClassVar[str]

    if TYPE_CHECKING:  # each kind has its own defaults and its own order of fields, in which they are written
        out: str
        seed: int
        kernels: str
        data: ReaderConfig
        train: Steps
        engine: WorkersConfig
        checkpoint: CheckpointConfig

    def check(self) -> None:
        """Raises ConfigError for values that do not go together."""
        raise NotImplementedError


def check_batch(train: Steps) -> None:
    """Raises ConfigError where a train section's numbers do not fit together."""
    if train.batch % train.micro_batch:
        raise ConfigError(
            "train.batch",
            f"{train.batch} is not a multiple of train.micro_batch {train.micro_batch}",
            "choose a multiple",
        )
    if train.warmup_epochs > train.epochs:
        raise ConfigError(
            "train.warmup_epochs",
            f"{train.warmup_epochs:g} is more than train.epochs {train.epochs}, "
            "so the learning rate never reaches train.lr",
            "lower it",
        )


def check_engine(engine: WorkersConfig) -> None:
    """Raises ConfigError for an engine's section that its engine does not read."""
    if engine.name != "deepspeed" and engine.deepspeed:
        raise ConfigError(
            "engine.deepspeed",
            f"is set, but engine.name is {engine.name!r}",
            "set engine.name to deepspeed or remove the section",
        )


def accumulation(config: RunConfig, world_size: int) -> int:
    """Micro-batches per optimizer step on each rank, so that the batch is the same on any number of ranks."""
    per_pass = config.train.micro_batch * world_size
    if config.train.batch % per_pass:
        per_rank = config.train.batch // world_size
        hint = (
            f"set train.micro_batch to a divisor of {per_rank}"
            if config.train.batch % world_size == 0
            else f"use a number of ranks that divides {config.train.batch}"
        )
        raise ConfigError(
            "train.batch",
            f"{config.train.batch} images cannot be divided over {world_size} ranks x "
            f"micro-batches of {config.train.micro_batch}",
            hint,
        )
    return config.train.batch // per_pass


MEAN = {"imagenet": (0.485, 0.456, 0.406), "cifar": (0.4914, 0.4822, 0.4465)}  # by channel, of pixels in 0..1
STD = {"imagenet": (0.229, 0.224, 0.225), "cifar": (0.2023, 0.1994, 0.201)}
