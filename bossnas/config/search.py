"""The one typed configuration: every knob with its unit and default, from JSON or YAML, unknown keys refused."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from bossnas.config.shared import (
    CheckpointConfig,
    ReaderConfig,
    RunConfig,
    Section,
    SpaceConfig,
    WorkersConfig,
    check_batch,
    check_engine,
)
from bossnas.errors import ConfigError


class HeadsConfig(Section):
    hidden: int = Field(4096, ge=1, description="hidden units of the projectors and predictors")
    out: int = Field(256, ge=2, description="dimension of the embedding space")


class DataConfig(ReaderConfig):
    recipe: Literal["imagenet", "cifar"] = Field("imagenet", description="augmentation of the views")
    views_on: Literal["auto", "device", "worker_crops", "worker"] = Field(
        "auto",
        description="where views are made: worker: in the loader processes; worker_crops: crops there, the "
        "rest on the device; device: all there, loaders only decode; auto: device on a GPU, worker elsewhere",
    )


class TrainConfig(Section):
    objective: Literal["bootstrap", "instance", "both"] = Field(
        "bootstrap",
        description="bootstrap: a path predicts the ensemble target of the other view; instance: a path's "
        "two views of an image find each other among those of the micro-batch; both: the sum",
    )
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
        "fp32", description="autocast precision of the networks; fp16: with a dynamic loss scale"
    )
    sync_batch_norm: bool = Field(
        False,
        description="batch norms of the training see the images of all ranks that "
        "share a batch, so that any number of ranks trains alike; slower",
    )
    activation_checkpointing: bool = Field(
        False,
        description="keep no map within a candidate, compute it again in "
        "the backward pass: less memory, about a third more work",
    )
    max_bad_steps: int = Field(
        10,
        ge=0,
        description="steps of a block that may be skipped because their gradient is not finite, before the run stops",
    )
    paths: int | None = Field(
        None, ge=1, description="at most so many of the paths that the space samples in a step; null: all"
    )
    paths_per_pass: int | None = Field(
        None,
        ge=1,
        description="paths that share one forward and backward pass; null: all; on a CPU without sharding as "
        "many as need at most 512 MiB for the backward pass",
    )
    collapse_below: float = Field(0.05, ge=0, le=1, description="warn when the embeddings' spread is less")


class RatingConfig(Section):
    score: Literal[
        "population_centre",
        "instance_discrimination",
        "pooled_instance_discrimination",
        "view_agreement",
        "pooled_view_agreement",
        "effective_rank",
    ] = Field(
        "pooled_instance_discrimination",
        description="which score chooses the winners; the ratings hold all. Of the "
        "projections, or (pooled) of the block's output, averaged over the map",
    )
    temperature: float = Field(0.2, gt=0, description="of instance discrimination")
    max_gib: float | None = Field(
        None,
        gt=0,
        description="memory for the paths that are rated together, GiB; null: "
        "half of what is free on a GPU, 1/4 on a CPU",
    )
    every_epochs: int = Field(2, ge=0, description="rate in mid-stage every n epochs; 0: only at the stage's end")
    batch: int = Field(256, ge=2, description="validation images per batch")
    calibration_images: int = Field(256, ge=2, description="training images in one calibration batch")
    calibration_batches: int = Field(1, ge=1, description="batches whose batch-norm statistics are averaged")


class EngineConfig(WorkersConfig):
    queue: int = Field(2, ge=1, description="block_parallel: micro-batches that may be under way to the next block")
    check_paths: bool = Field(False, description="compare the sampled paths over the ranks at every step")


class Config(RunConfig):
    kind: ClassVar[str] = "search"

    out: str = Field("runs/search", min_length=1, description="run folder; every result goes there")
    seed: int = Field(0, ge=0)
    kernels: Literal["auto", "triton", "reference"] = Field(
        "auto", description="auto: Triton on a GPU, plain PyTorch elsewhere"
    )
    schedule: Literal["sequential", "block_parallel"] = Field(
        "sequential",
        description="sequential: one block after the other; block_parallel: all at once, each on "
        "what the block before it streams",
    )
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
            raise ConfigError(
                "engine.name",
                "is deepspeed, which trains one block at a time, but schedule is block_parallel",
                "set engine.name to ddp or fsdp2, or schedule to sequential",
            )
        check_engine(self.engine)
        check_batch(self.train)
