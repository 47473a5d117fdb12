"""Labelled batches: the same looks for any ranks, workers and place in the epoch, and labels that belong to them."""

from __future__ import annotations

import io
import logging
import pickle
import random
import tarfile
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torch.nn import functional as F

from bossnas.config.retrain import AugmentConfig
from bossnas.config.shared import ReaderConfig
from bossnas.data.batches import Data, open_data
from bossnas.data.images import decode
from bossnas.data.order import EpochSlice, FixedBatches
from bossnas.data.shards import ShardIndex
from bossnas.data.streams import ShardStream
from bossnas.errors import ConfigError
from bossnas.networks.spec import Spec
from bossnas.retrain.batches import (
    _seed,
    check_labels,
    count_classes,
    eval_batches,
    eval_transform,
    train_batches,
    train_transform,
)

HERE = ReaderConfig(workers=0)
PLAIN = AugmentConfig(crop="pad", flip=0, auto=None, jitter=0, repeats=1, erasing=0, mixup=0, cutmix=0, smoothing=0)
FULL = AugmentConfig(repeats=1, erasing=0.9)  # everything that is random
SIZE = 16


def make(
    folder: Path,
    count: int,
    *,
    shards: int = 2,
    classes: int = 5,
    bad: tuple[int, ...] = (),
    without: tuple[int, ...] = (),
    side: int = SIZE,
) -> ShardIndex:
    """Image i is of the one grey level i, and its label i % classes."""
    folder.mkdir(exist_ok=True)
    for shard in range(shards):
        with tarfile.open(folder / f"s-{shard}.tar", "w") as tar:
            for i in range(shard * count // shards, (shard + 1) * count // shards):
                file = io.BytesIO()
                Image.new("RGB", (side, side), (i, i, i)).save(file, "PNG")
                members = {"png": b"damaged" if i in bad else file.getvalue(), "cls": str(i % classes).encode()}
                for ext in ("png",) if i in without else ("png", "cls"):
                    member = tarfile.TarInfo(f"{i:04d}.{ext}")
                    member.size = len(members[ext])
                    tar.addfile(member, io.BytesIO(members[ext]))
    return ShardIndex.open(str(folder / "s-*.tar"))


@pytest.fixture(scope="module")
def sample() -> Data:
    return open_data(ReaderConfig())


def train(source, augment: AugmentConfig = FULL, *, size: int = SIZE, workers: int = 0, **options):
    given = dict(classes=10, seed=5, epoch=2, start=0, steps=3, batch=8) | options
    settings = ReaderConfig(workers=workers, max_bad=given.pop("max_bad", 0.001), buffer=10)
    part = EpochSlice(**{field.name: given.pop(field.name) for field in fields(EpochSlice) if field.name in given})
    return list(train_batches(source, train_transform(augment, size), settings, part, **given))


def evaluated(source, size: int = SIZE, crop: float = 1.0, settings: ReaderConfig = HERE, **options):
    transform = eval_transform(Spec("any", image_size=size, crop=crop))
    given = dict(count=None, batch=8, rank=0, world=1) | options
    fixed = FixedBatches(given.pop("count"), given.pop("batch"))
    fixed = fixed.of_rank(len(source), given.pop("rank"), given.pop("world"))
    return list(eval_batches(source, transform, settings, fixed, **given))


def same(a, b) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)
    )


def levels(images: torch.Tensor, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)) -> list[int]:
    """Of images of one grey level each: that level, taken from the middle."""
    pixels = images * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    return (pixels[:, 0, SIZE // 2, SIZE // 2] * 255).round().int().tolist()


@pytest.mark.quick
def test_batches_have_shapes_types_and_soft_targets(sample):
    for images, targets in train(sample.train):
        assert images.shape == (8, 3, SIZE, SIZE) and images.dtype == targets.dtype == torch.float32
        assert images.is_contiguous(memory_format=torch.channels_last) and targets.shape == (8, 10)
        assert torch.allclose(targets.sum(1), torch.ones(8)) and 0.3 < images.std() < 3


@pytest.mark.parametrize(
    "augment",
    [FULL, AugmentConfig(crop="pad", auto=None, repeats=1), AugmentConfig(auto="original-mstd0.5", repeats=1)],
    ids=["rand", "jitter", "auto"],
)
def test_batches_do_not_depend_on_workers_or_where_an_epoch_is_taken_up(sample, augment):
    whole = train(sample.train, augment)
    assert same(train(sample.train, augment, workers=2), whole)
    assert same(train(sample.train, augment, start=2), whole[2:])
    assert not same(train(sample.train, augment, epoch=3), whole)
    assert not same(train(sample.train, augment, seed=6), whole)


def test_looks_do_not_depend_on_ranks_but_erasing_and_mixing_do(sample):
    looks = FULL.model_copy(update={"erasing": 0, "mixup": 0, "cutmix": 0})
    whole = train(sample.train, looks)
    ranks = [train(sample.train, looks, batch=4, rank=rank, world=2) for rank in range(2)]
    joined = [[torch.cat(parts) for parts in zip(*pair, strict=True)] for pair in zip(*ranks, strict=True)]
    assert same(joined, whole)
    for changed in ({"erasing": 1.0, "mixup": 0, "cutmix": 0}, {"erasing": 0}):
        augment = FULL.model_copy(update=changed)
        parts = [train(sample.train, augment, batch=4, rank=rank, world=2)[0] for rank in range(2)]
        differences = [(part[0] != clean[0]).any(1) for part, clean in zip(parts, (r[0] for r in ranks), strict=True)]
        assert differences[0].any() and not torch.equal(*differences)


def test_loading_leaves_the_runs_random_numbers_alone(sample):
    def numbers() -> list[float]:
        return [random.random(), random.gauss(0, 1), np.random.rand(), torch.rand(1).item(), torch.randn(1).item()]

    def seed() -> None:
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)

    seed()
    expected = [numbers() for _ in range(4)]
    seed()
    settings, got = ReaderConfig(workers=0), [numbers()]
    transform = train_transform(AugmentConfig(auto=None, repeats=1, erasing=1), SIZE)  # jitter: torch's
    for _ in train_batches(sample.train, transform, settings, EpochSlice(0, 0, 0, 3, 4), classes=10):
        got.append(numbers())
    assert got == expected


def test_the_transform_can_travel():
    for augment in (FULL, AugmentConfig(auto="augmix-m5"), AugmentConfig(auto=None)):
        transform = train_transform(augment, SIZE)
        picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        made = []
        for copy in (transform, pickle.loads(pickle.dumps(transform))):
            _seed((1, 2, 3))
            made.append(copy(picture))
        assert made[0].shape == (SIZE, SIZE, 3) and made[0].dtype == np.uint8 and (made[0] == made[1]).all()
    assert eval_transform(Spec("any")) and pickle.dumps(eval_transform(Spec("any")))


def test_the_random_crop_is_timms():
    augment = AugmentConfig(flip=0, auto=None, jitter=0)
    transform = train_transform(augment, SIZE)
    theirs = create_transform(
        SIZE, is_training=True, hflip=0, color_jitter=None, interpolation="bicubic", use_prefetcher=True
    )
    for seed in range(20):
        picture = np.random.default_rng(seed).integers(0, 256, (31, 44, 3), dtype=np.uint8)
        _seed((seed,))
        mine = transform(picture)
        _seed((seed,))
        assert (mine == theirs(Image.fromarray(picture)).permute(1, 2, 0).numpy()).all()


def test_the_crop_from_a_border_moves_by_an_eighth_at_most_and_flips():
    picture = np.arange(1, SIZE * SIZE * 3 + 1).reshape(SIZE, SIZE, 3).astype(np.uint8)
    transform = train_transform(PLAIN.model_copy(update={"flip": 0.5}), SIZE)
    border, framed = SIZE // 8, np.pad(picture, ((2, 2), (2, 2), (0, 0)))
    possible = {
        framed[top : top + SIZE, left : left + SIZE][:, ::step].tobytes(): (top, left, step)
        for top in range(2 * border + 1)
        for left in range(2 * border + 1)
        for step in (1, -1)
    }
    found = set()
    for seed in range(600):
        _seed((seed,))
        found.add(possible[np.ascontiguousarray(transform(picture)).tobytes()])
    assert found == set(possible.values())
    _seed((0,))
    assert transform(np.zeros((40, 30, 3), np.uint8)).shape == (SIZE, SIZE, 3)


def test_random_augmentation_outlives_its_highest_level():
    transform = train_transform(AugmentConfig(auto="rand-m10-p1-inc1-n4"), SIZE)
    picture = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    for seed in range(60):  # without a posterisation to at least one bit, some raise
        _seed((seed,))
        assert transform(picture).shape == picture.shape
    (policy,) = transform.colours.transforms
    (posterised,) = [op for op in policy.ops if op.name.startswith("Posterize")]
    assert set(np.unique(np.asarray(posterised(Image.fromarray(picture))))) == {0, 128}


@pytest.mark.parametrize("auto", ["randd", "rand-q9", "v9", ""])
def test_an_unknown_policy_is_refused(auto):
    if auto:
        with pytest.raises(ConfigError, match="augment.auto: timm does not know"):
            train_transform(AugmentConfig(auto=auto), SIZE)
    else:
        assert train_transform(AugmentConfig(auto=auto, jitter=0), SIZE).colours.transforms == []


def test_labels_belong_to_their_images_and_smoothing_is_spread_over_the_classes(tmp_path):
    index = make(tmp_path, 40)
    for images, targets in train(index, PLAIN, classes=5, steps=5):
        assert torch.equal(targets, F.one_hot(torch.tensor(levels(images)) % 5, 5).float())
    ((_, targets),) = train(index, PLAIN.model_copy(update={"smoothing": 0.1}), classes=5, steps=1)
    assert torch.allclose(targets.sort(1).values, torch.tensor([0.02, 0.02, 0.02, 0.02, 0.92]))


def test_mixing_pairs_images_and_targets_with_the_same_share(tmp_path):
    index = make(tmp_path, 200, classes=200)
    plain = PLAIN.model_copy(update={"crop": "random_resized"})  # of images of one level: the images
    clean = train(index, plain, classes=200, steps=10)
    for alpha in ("mixup", "cutmix"):
        made = train(index, plain.model_copy(update={alpha: 1.0}), classes=200, steps=10)
        shares = []
        for (images, targets), (whole, labels) in zip(made, clean, strict=True):
            share = float(targets[0, labels[0].argmax()])
            shares.append(share)
            assert torch.allclose(targets, share * labels + (1 - share) * labels.flip(0), atol=1e-6)
            if alpha == "mixup":
                assert torch.allclose(images, share * whole + (1 - share) * whole.flip(0), atol=1e-5)
            else:
                kept = images == whole
                assert (images == torch.where(kept, whole, whole.flip(0))).all() and (kept == kept[:1]).all()
                assert abs(kept[0, 0].float().mean().item() - share) < 1e-6
        (smooth,) = train(index, plain.model_copy(update={alpha: 1.0, "smoothing": 0.1}), classes=200, steps=1)
        assert torch.allclose(smooth[1], 0.9 * made[0][1] + 0.1 / 200, atol=1e-6)
        assert len(set(shares)) > 6 and 0 <= min(shares) < max(shares) <= 1


def test_an_odd_batch_cannot_be_mixed(sample):
    with pytest.raises(ConfigError, match="train.micro_batch: 7 is odd"):
        train(sample.train, batch=7)
    assert len(train(sample.train, FULL.model_copy(update={"mix_probability": 0.0}), batch=7, steps=1)[0][0]) == 7


@pytest.mark.parametrize("world", [1, 2, 3])
def test_copies_of_an_image_come_in_a_row_over_the_ranks_with_other_looks(tmp_path, world):
    index = make(tmp_path, 48, classes=48)
    augment = PLAIN.model_copy(update={"repeats": 3})
    batch = 12 // world
    ranks = [train(index, augment, classes=48, batch=batch, steps=4, rank=rank, world=world) for rank in range(world)]
    labels = torch.stack([torch.stack([targets.argmax(1) for _, targets in rank]) for rank in ranks])
    dealt = labels.permute(1, 2, 0).reshape(-1)  # by micro-batch, place and rank
    assert (dealt.view(16, 3) == dealt[::3, None]).all() and len(set(dealt.tolist())) == 16
    if world == 3:
        assert (labels == labels[:1]).all()  # each rank has one copy of every image
    again = train(index, augment, classes=48, batch=12, steps=4)
    images = torch.stack([torch.stack([images for images, _ in rank]) for rank in ranks])
    by_place = images.permute(1, 2, 0, 3, 4, 5).reshape(4, 12, 3, SIZE, SIZE)
    assert torch.equal(by_place, torch.stack([images for images, _ in again]))  # looks, whatever the ranks
    looks = by_place.reshape(16, 3, -1)
    assert sum(not torch.equal(a, b) for a, b, _ in looks) >= 12
    assert same(train(index, augment, classes=48, batch=12, steps=4, start=2), again[2:])
    with pytest.raises(ConfigError, match="holds 48 images"):
        train(index, augment, batch=12, steps=5)


def test_a_stream_gives_its_labels_and_no_copies(tmp_path):
    make(tmp_path, 40)
    source = ShardStream.open(str(tmp_path / "s-*.tar"), images=40)
    batches = train(source, PLAIN, classes=5, steps=5)
    assert sorted(level for images, _ in batches for level in levels(images)) == list(range(40))
    for images, targets in batches:
        assert targets.argmax(1).tolist() == [level % 5 for level in levels(images)]
    assert same(train(source, FULL, steps=4, workers=1), whole := train(source, FULL, steps=4))
    assert same(train(source, FULL, steps=4, start=2), whole[2:])
    with pytest.raises(ConfigError, match="augment.repeats: 3"):
        train(source, FULL.model_copy(update={"repeats": 3}))
    with pytest.raises(ConfigError, match="model.classes: 4, but data.train has the label 4; set it to 5"):
        train(source, PLAIN, classes=4, steps=5)
    with pytest.raises(ConfigError, match="model.classes: is not set, and data.train is a stream"):
        count_classes(source)
    check_labels(source, 2)  # a stream is not read
    assert same(evaluated(source), evaluated(ShardIndex.open(str(tmp_path / "s-*.tar"))))
    make(tmp_path / "without", 40, without=(25,))
    with pytest.raises(ConfigError, match=r"data.train: image 5 of .*s-1.tar has no label"):
        evaluated(ShardStream.open(str(tmp_path / "without" / "s-*.tar"), images=40))


def test_labels_are_checked_and_counted(tmp_path):
    index = make(tmp_path / "good", 20)
    assert count_classes(index) == 5
    check_labels(index, 5)
    with pytest.raises(ConfigError, match="model.classes: 4, but data.train has the label 4; set it to 5"):
        check_labels(index, 4)
    with pytest.raises(ConfigError, match="model.classes"):
        evaluated(index, classes=4)
    some = make(tmp_path / "some", 20, without=(13, 17))
    for call in (lambda: count_classes(some), lambda: check_labels(some, 9)):
        with pytest.raises(ConfigError, match=r"data.train: .*s-1.tar/0013, of 2 such, has no label"):
            call()
    with pytest.raises(ConfigError, match="every image has the label 0"):
        count_classes(make(tmp_path / "one", 4, classes=1))


@pytest.mark.parametrize("workers", [0, 1])
def test_what_comes_for_an_unreadable_image_has_its_own_label(tmp_path, caplog, workers):
    index = make(tmp_path, 40, bad=(3, 20))
    bad: dict[str, str] = {}
    with caplog.at_level(logging.WARNING, "bossnas.data.batches"):
        batches = train(index, PLAIN, classes=5, steps=5, max_bad=0.1, bad=bad, workers=workers)
    seen = [level for images, _ in batches for level in levels(images)]
    assert sorted(seen) == sorted([*(set(range(40)) - {3, 20}), 4, 21])
    assert [label for _, targets in batches for label in targets.argmax(1).tolist()] == [i % 5 for i in seen]
    assert len(bad) == 2 and caplog.text.count("is replaced") == 2
    stream = ShardStream.open(str(tmp_path / "s-*.tar"), images=40)
    for images, labels in evaluated(stream, settings=ReaderConfig(workers=workers, max_bad=0.1)):
        assert labels.tolist() == [level % 5 for level in levels(images)]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_batches_are_the_same_for_any_ranks(sample, world):
    whole = evaluated(sample.val, count=44, batch=16)
    assert [len(labels) for _, labels in whole] == [16, 16, 12] and whole[0][1].dtype == torch.int64
    assert whole[0][0].is_contiguous(memory_format=torch.channels_last)
    labels = [sample.val.read(i)[2] for i in range(44)]
    assert [label for _, of_batch in whole for label in of_batch.tolist()] == labels
    ranks = [
        evaluated(sample.val, count=44, batch=16, rank=rank, world=world, settings=ReaderConfig(workers=rank % 2))
        for rank in range(world)
    ]
    assert all(same(ranks[rank], whole[rank::world]) for rank in range(world))
    assert sum(len(labels) for _, labels in evaluated(sample.val, batch=100)) == len(sample.val)


@pytest.mark.parametrize(("size", "resized"), [(224, 256), (288, 329), (256, 292)])
def test_evaluation_resizes_the_shorter_side_and_cuts_out_the_middle(size, resized):
    picture = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    width = int(resized * 400 / 300)
    whole = Image.fromarray(picture).resize((width, resized), Image.Resampling.BICUBIC)
    top, left = round((resized - size) / 2), round((width - size) / 2)
    expected = np.asarray(whole)[top : top + size, left : left + size]
    assert (eval_transform(Spec("any", image_size=size))(picture) == expected).all()


def test_images_of_the_right_size_pass_an_evaluation_unchanged(sample):
    side = decode(sample.val.read(0)[0]).shape[0]
    (images, _), *_ = evaluated(sample.val, size=side, batch=4)
    pixels = images.movedim(1, -1) * torch.tensor(Spec("any").std) + torch.tensor(Spec("any").mean)
    for i in range(4):
        assert ((pixels[i] * 255).round().byte().numpy() == decode(sample.val.read(i)[0])).all()
