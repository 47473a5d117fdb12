"""The config of a retraining: every knob with its unit and default. The defaults are BossNet-T0's recipe (METHOD 6)."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

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


class ModelConfig(Section):
    name: str | None = Field(None, description="a network that timm knows, such as bossnet_t0 or resnet50")
    run: str | None = Field(None, description="folder of a finished search: the network of its architecture")
    architecture: str | None = Field(None, description="paths such as 5433|3230|0010|0000, of `model.space`")
    space: SpaceConfig | None = Field(None, description="with `model.architecture`")
    inherit: bool = Field(False, description="with `model.run`: begin with the supernet's weights where they fit")
    options: dict[str, Any] = Field({}, description="further arguments of the network, such as {se: false}")
    classes: int | None = Field(None, ge=2, description="null: as many as the training images have")
    image_size: int | None = Field(None, ge=1, description="side of the images, pixels; null: the run's, or 224")
    drop_path: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="stochastic depth of the last block, 0 at the first; null: 0.1, in networks of own spaces 0",
    )
    drop: float = Field(0.0, ge=0, lt=1, description="dropout before the classifier")
    checkpoint: str | None = Field(None, description="weights to begin with: .pth, .pt or .safetensors")


class AugmentConfig(Section):
    crop: Literal["random_resized", "pad"] = Field(
        "random_resized", description="pad: resize to the image's size, then crop from it with a border of an eighth"
    )
    scale: tuple[float, float] = Field((0.08, 1.0), description="random_resized: area of the crop")
    ratio: tuple[float, float] = Field((0.75, 4 / 3), description="random_resized: width by height of the crop")
    flip: float = Field(0.5, ge=0, le=1, description="probability of a horizontal flip")
    jitter: float = Field(0.4, ge=0, le=1, description="colour jitter; RandAugment and its like replace it")
    auto: str | None = Field("rand-m9-mstd0.5-inc1", description="timm's RandAugment or AutoAugment; null: none")
    interpolation: Literal["bicubic", "bilinear", "nearest"] = "bicubic"
    repeats: int = Field(3, ge=1, description="times that an image comes in an epoch, which has as many fewer")
    erasing: float = Field(0.25, ge=0, le=1, description="probability of random erasing")
    erasing_mode: Literal["pixel", "rand", "const"] = "pixel"
    mixup: float = Field(0.8, ge=0, description="alpha; 0: none")
    cutmix: float = Field(1.0, ge=0, description="alpha; 0: none")
    mix_probability: float = Field(1.0, ge=0, le=1, description="of mixup or cutmix in a batch")
    smoothing: float = Field(0.1, ge=0, lt=1, description="label smoothing")
    normalise: Literal["imagenet", "cifar"] = Field("imagenet", description="whose mean and deviation")


class RetrainTrain(Section):
    batch: int = Field(1024, ge=1, description="images per optimizer step, over all ranks")
    micro_batch: int = Field(128, ge=1, description="images per rank and forward pass")
    epochs: int = Field(300, ge=1)
    steps_per_epoch: int | None = Field(None, ge=1, description="optimizer steps an epoch; null: the whole set")
    optimizer: Literal["adamw", "lamb", "sgd"] = Field("adamw", description="sgd: with Nesterov momentum")
    fused: Literal["auto", "apex", "torch", "none"] = Field(
        "auto", description="implementation of the optimizer; auto: apex where installed on a GPU, else torch's fused"
    )
    lr: float = Field(1e-3, gt=0, description="peak learning rate, for the whole batch")
    min_lr: float = Field(1e-5, ge=0, description="at the end of the cosine")
    warmup_epochs: float = Field(5.0, ge=0)
    warmup_lr: float = Field(1e-6, ge=0, description="at the start of the warm-up")
    weight_decay: float = Field(0.05, ge=0, description="not of biases and norms")
    momentum: float = Field(0.9, ge=0, lt=1, description="sgd's momentum, adamw's and lamb's first beta")
    beta2: float = Field(0.999, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    clip: float = Field(0.0, ge=0, description="gradient norm limit; 0: none")
    ema: float = Field(0.99996, ge=0, lt=1, description="moving average of the weights; 0: none")
    ema_warmup: bool = Field(False, description="let the average begin short: (1 + step) / (10 + step), at most `ema`")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="autocast precision of the network; fp16: with a dynamic loss scale"
    )
    channels_last: bool = Field(True, description="memory format of the images and maps")
    compile: bool = Field(False, description="torch.compile the network")
    activation_checkpointing: bool = Field(False, description="keep no map within a block: less memory, more work")
    sync_batch_norm: bool = Field(False, description="batch norms see the images of all ranks")
    max_bad_steps: int = Field(
        10, ge=0, description="steps that may be skipped for a gradient that is not finite, before the run stops"
    )


class EvaluateConfig(Section):
    every_epochs: int = Field(1, ge=0, description="0: only at the end")
    batch: int = Field(256, ge=1, description="images per rank and batch")
    crop: float = Field(0.875, gt=0, le=1, description="share of the resized picture's side in the central crop")


class RetrainConfig(RunConfig):
    kind: ClassVar[str] = "retraining"

    out: str = Field("runs/retrain", min_length=1, description="run folder; every result goes there")
    seed: int = Field(0, ge=0)
    kernels: Literal["auto", "triton", "reference", "off"] = Field(
        "off", description="batch norm and attention by bossnas_kernels, where the network allows; off: PyTorch's"
    )
    model: ModelConfig = ModelConfig()
    data: ReaderConfig = ReaderConfig()
    augment: AugmentConfig = AugmentConfig()
    train: RetrainTrain = RetrainTrain()
    evaluate: EvaluateConfig = EvaluateConfig()
    engine: WorkersConfig = WorkersConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @field_validator("kernels", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML reads the word as false

    def check(self) -> None:
        """Raises ConfigError for values that do not go together."""
        model = self.model
        named = [key for key in ("name", "run", "architecture") if getattr(model, key) is not None]
        if len(named) != 1:
            given = f"{' and '.join(named)} are set" if named else "name, run and architecture are all unset"
            raise ConfigError(
                "model",
                given,
                "set one of model.name, model.run (a search's folder) and model.architecture (with model.space)",
            )
        if (model.space is None) == (model.architecture is not None):
            raise ConfigError("model.space", "goes with model.architecture", "set both or neither")
        if model.inherit and (model.run is None or model.checkpoint is not None):
            raise ConfigError(
                "model.inherit",
                "takes the weights of model.run and nothing else",
                "set model.run and unset model.checkpoint, or unset model.inherit",
            )
        for name, (low, high), most in (("scale", self.augment.scale, 1), ("ratio", self.augment.ratio, math.inf)):
            if not 0 < low <= high <= most:
                raise ConfigError(
                    f"augment.{name}",
                    f"is from {low:g} to {high:g}",
                    f"set two numbers above 0{' and at most 1' if name == 'scale' else ''}, the smaller one first",
                )
        check_engine(self.engine)
        check_batch(self.train)
        if self.train.sync_batch_norm and self.kernels != "off":
            raise ConfigError("kernels", "have no synchronised batch norm here", "set it to off")
