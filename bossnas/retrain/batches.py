"""Labelled batches, for training and evaluating a network: augmented by timm, in the order of `bossnas.data.batches`.

A loader process makes each picture's look, 8 bits deep; the device normalises, erases and mixes the batch. timm draws
from Python's, NumPy's and torch's global generators: they are seeded for every picture by (seed, epoch, sample, copy),
for every micro-batch by (seed, epoch, micro-batch, rank), and put back afterwards. So a picture's look has nothing to
do with workers, ranks or the place where an epoch was taken up.
"""

from __future__ import annotations

import random
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup, create_transform
from timm.data.auto_augment import posterize
from timm.data.mixup import mixup_target
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision.transforms import Compose

from bossnas.config.retrain import AugmentConfig
from bossnas.config.shared import MEAN, STD, ReaderConfig
from bossnas.data.batches import CPU, ShardSet, epoch_batches, same_batches
from bossnas.data.order import FIXED_EPOCH, EpochSlice, FixedBatches
from bossnas.data.streams import ShardStream, shown
from bossnas.errors import ConfigError

BORDER = 8  # augment.crop=pad: the image's side by the border's width


@dataclass(frozen=True)
class TrainTransform:
    """Pictures to training images, by `train_transform`. May be pickled. ``colours``: what follows crop and flip."""

    is_random: ClassVar[bool] = True

    augment: AugmentConfig
    image_size: int
    colours: Compose

    @property
    def mean(self) -> tuple[float, float, float]:
        return MEAN[self.augment.normalise]

    @property
    def std(self) -> tuple[float, float, float]:
        return STD[self.augment.normalise]

    def __call__(self, picture: np.ndarray) -> np.ndarray:
        """uint8 [H, W, 3] -> uint8 [S, S, 3], drawn from the global generators."""
        size, augment = self.image_size, self.augment
        if augment.crop == "random_resized":
            top, left, high, wide = RandomResizedCropAndInterpolation.get_params(
                torch.from_numpy(picture).permute(2, 0, 1), augment.scale, augment.ratio
            )
            picture = self._resized(picture[top : top + high, left : left + wide])
        else:
            picture, border = self._resized(picture), size // BORDER
            top, left = random.randint(-border, border), random.randint(-border, border)
            seen = picture[max(top, 0) : size + top, max(left, 0) : size + left]
            picture = np.zeros_like(picture)
            picture[max(-top, 0) :, max(-left, 0) :][: seen.shape[0], : seen.shape[1]] = seen
        if random.random() < augment.flip:
            picture = picture[:, ::-1]
        if self.colours.transforms:
            picture = np.asarray(self.colours(Image.fromarray(picture)))
        return picture

    def _resized(self, picture: np.ndarray) -> np.ndarray:
        side = (self.image_size, self.image_size)
        if picture.shape[:2] == side:
            return picture
        return np.asarray(Image.fromarray(picture).resize(side, Image.Resampling[self.augment.interpolation.upper()]))


def train_transform(augment: AugmentConfig, image_size: int) -> TrainTransform:
    """The transform of a training. Raises ConfigError (augment.auto) for a policy that timm does not know."""
    try:
        _, colours, _ = create_transform(
            image_size,
            is_training=True,
            separate=True,
            use_prefetcher=True,
            color_jitter=augment.jitter or None,  # type: ignore[arg-type]  # timm takes None for none
            auto_augment=augment.auto,
            interpolation=augment.interpolation,
            mean=MEAN[augment.normalise],
        )
    except (AssertionError, ValueError, KeyError) as error:
        raise ConfigError(
            "augment.auto",
            f"timm does not know {augment.auto!r} ({error})",
            "write for example rand-m9-mstd0.5-inc1, or null for none",
        ) from None
    for policy in colours.transforms:
        for op in getattr(policy, "ops", []) + sum(getattr(policy, "policy", []), []):
            if op.name.startswith("Posterize"):
                op.aug_fn = _posterize
    return TrainTransform(augment, image_size, colours)


def _posterize(image: Image.Image, bits: int, **options: Any) -> Image.Image:
    """timm asks for no bits at the highest level: a black picture, which Pillow has refused since release 13."""
    return posterize(image, max(bits, 1), **options)


@dataclass(frozen=True)
class EvalTransform:
    """Pictures to the images of an evaluation, by `eval_transform`. May be pickled."""

    is_random: ClassVar[bool] = False

    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resize: Compose

    def __call__(self, picture: np.ndarray) -> np.ndarray:
        """uint8 [H, W, 3] -> uint8 [S, S, 3]: the shorter side becomes int(S / crop), then the central crop."""
        size = self.image_size
        if picture.shape[:2] == (size, size) and self.resize.transforms[0].size == size:
            return picture  # as it is; the resizing would copy it twice
        return self.resize(Image.fromarray(picture)).permute(1, 2, 0).numpy()


def eval_transform(spec: Any) -> EvalTransform:
    """The transform of a network's evaluation. ``spec``: a `bossnas.networks.spec.Spec`."""
    resize = create_transform(
        spec.image_size, is_training=False, use_prefetcher=True, crop_pct=spec.crop, interpolation=spec.interpolation
    )
    return EvalTransform(spec.image_size, spec.mean, spec.std, resize)


def check_labels(source: ShardSet, classes: int) -> None:
    """Raises ConfigError for a sample without a label and for labels that are no class. A stream is not read: its
    batches raise the same when such a sample comes."""
    if isinstance(source, ShardStream):
        return
    labels = source.labels
    if labels.min() < 0:
        first = int(np.argmax(labels < 0))
        raise _no_label(source.field, f"{source.name(first)}, of {(labels < 0).sum()} such,")
    if labels.max() >= classes:
        raise _no_class(source.field, int(labels.max()), classes)


def count_classes(source: ShardSet) -> int:
    """The largest label + 1. Raises ConfigError for a stream, for samples without a label and for one class alone."""
    if isinstance(source, ShardStream):
        raise ConfigError(
            "model.classes", f"is not set, and {source.field} is a stream, which is not read to count them", "set it"
        )
    largest = int(source.labels.max())
    check_labels(source, largest + 1)
    if largest == 0:
        raise ConfigError(source.field, "every image has the label 0", "pack the images again, with classes")
    return largest + 1


def _no_label(field: str, name: str) -> ConfigError:
    return ConfigError(field, f"{name} has no label", "pack the images again, with classes")


def _no_class(field: str, label: int, classes: int) -> ConfigError:
    return ConfigError(
        "model.classes",
        f"{classes}, but {field} has the label {label}",
        f"set it to {label + 1} or more, or correct the labels",
    )


def train_batches(
    source: ShardSet,
    transform: TrainTransform,
    settings: ReaderConfig,
    part: EpochSlice,
    *,
    classes: int,
    device: torch.device = CPU,
    bad: dict[str, str] | None = None,
) -> Generator[tuple[Tensor, Tensor]]:
    """The micro-batches of a part of an epoch, for one rank.

    Each is images, float32 [batch, 3, S, S], channels_last, and soft targets, float32 [batch, classes], on ``device``:
    mixed within the micro-batch, by timm's Mixup ("batch" mode, as DeiT does), or smoothed labels. They depend on
    seed, epoch, the micro-batch's number, rank and samples alone. Of an index, augment.repeats copies of an image come
    in a row over the ranks. Order, workers, unreadable images and errors are those of `bossnas.data.batches`; and
    ConfigErrors for a stream's labels, for repeats of a stream and for an odd micro-batch that would have to be mixed.
    """
    augment = transform.augment
    copies = augment.repeats
    if copies > 1 and isinstance(source, ShardStream):
        raise ConfigError(
            "augment.repeats",
            f"{copies}, but a stream gives every image once",
            "set it to 1, or read local shards with data.reader=index",
        )
    mixup = None
    if (augment.mixup or augment.cutmix) and augment.mix_probability:
        if part.batch % 2:
            raise ConfigError(
                "train.micro_batch",
                f"{part.batch} is odd, and mixup and cutmix pair the images",
                "make it even, or set augment.mixup and augment.cutmix to 0",
            )
        mixup = Mixup(
            augment.mixup,
            augment.cutmix,
            prob=augment.mix_probability,
            label_smoothing=augment.smoothing,
            num_classes=classes,
        )
    erase = RandomErasing(augment.erasing, mode=augment.erasing_mode, device=str(device)) if augment.erasing else None
    collate = _Collate(transform, source.field, _shards(source), classes, part.seed, part.epoch)
    begun = epoch_batches(source, collate, settings, part, copies=copies, device=device, bad=bad)

    def finish() -> Generator[tuple[Tensor, Tensor]]:
        with closing(begun):
            for number, (images, labels) in enumerate(begun, part.start):
                with _own_numbers(device):
                    _seed((part.seed, part.epoch, number, part.rank), device)
                    if erase is not None:
                        images = erase(images)
                    if mixup is None:
                        targets = mixup_target(labels, classes, smoothing=augment.smoothing)
                    else:
                        images, targets = mixup(images, labels)
                yield images, targets

    return finish()


def eval_batches(
    source: ShardSet,
    transform: EvalTransform,
    settings: ReaderConfig,
    fixed: FixedBatches,
    *,
    classes: int | None = None,
    device: torch.device = CPU,
    bad: dict[str, str] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Labelled batches that are the same at every call; `FixedBatches.of_rank` deals them out to ranks.

    Each is images, float32 [n, 3, S, S], channels_last, and labels, int64 [n], on ``device``. Workers and unreadable
    images as in `bossnas.data.batches`; what comes in place of an unreadable one has its own label.
    ``classes``: raises ConfigError for a label that is none of so many.
    """
    collate = _Collate(transform, source.field, _shards(source), classes, fixed.seed, FIXED_EPOCH)
    return same_batches(source, collate, settings, fixed, device=device, bad=bad)


def _shards(source: ShardSet) -> tuple[str, ...]:
    return tuple(map(shown, source.urls)) if isinstance(source, ShardStream) else ()


@dataclass(frozen=True)
class _Collate:
    """A batcher (see bossnas.data.collate) of transformed pictures. ``shards``: of a stream, for messages; ``classes``:
    None if labels are not to be held against their number."""

    transform: TrainTransform | EvalTransform
    field: str
    shards: tuple[str, ...]
    classes: int | None
    seed: int
    epoch: int

    def begin(self, pictures: list[np.ndarray], samples: list[int], labels: list[int | None]) -> dict[str, Tensor]:
        self._check(samples, labels)
        size = self.transform.image_size
        made = np.empty((len(pictures), size, size, 3), np.uint8)
        with _own_numbers():
            for out, picture, sample in zip(made, pictures, samples, strict=True):
                if self.transform.is_random:
                    _seed((self.seed, self.epoch, sample))
                out[:] = self.transform(picture)
        return {"pictures": torch.from_numpy(made), "labels": torch.tensor(labels)}

    def _check(self, samples: list[int], labels: list[int | None]) -> None:
        for sample, label in zip(samples, labels, strict=True):
            if label is None:
                where = (
                    f"image {sample % 2**32} of {self.shards[sample // 2**32]}" if self.shards else f"image {sample}"
                )
                raise _no_label(self.field, where)
            if self.classes is not None and label >= self.classes:
                raise _no_class(self.field, label, self.classes)

    def complete(self, parts: dict[str, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
        size = self.transform.image_size
        mean, std = (torch.tensor(of, device=device).repeat(size) for of in (self.transform.mean, self.transform.std))
        rows = parts["pictures"].to(device, non_blocking=True).flatten(2).to(torch.float32)  # long ones: 5 times faster
        images = rows.mul_(1 / (255 * std)).sub_(mean / std).view(-1, size, size, 3).permute(0, 3, 1, 2)
        return images, parts["labels"].to(device, non_blocking=True)


@contextmanager
def _own_numbers(device: torch.device = CPU) -> Iterator[None]:
    """Puts the global generators back afterwards into the states they had."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if gpu is not None:
            torch.cuda.set_rng_state(gpu, device)


def _seed(key: tuple[int, ...], device: torch.device = CPU) -> None:
    """Seeds the global generators that timm draws from by a tuple of numbers below 2^64."""
    packed = 1
    for number in key:
        packed = packed << 64 | number
    random.seed(packed)
    np.random.seed(random.getrandbits(32))
    torch.default_generator.manual_seed(random.getrandbits(63))
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(random.getrandbits(63))
