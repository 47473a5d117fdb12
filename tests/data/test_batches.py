"""Batches: the same for any ranks and workers, resumable, and steadfast against bad images."""

from __future__ import annotations

import io
import itertools
import logging
import multiprocessing
import os
import signal
import tarfile
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bossnas.config.search import DataConfig
from bossnas.data import collate, views
from bossnas.data.batches import SAMPLE, Data, fixed_view_batches, open_data, readers, view_batches
from bossnas.data.loader import PREFETCH
from bossnas.data.order import EpochSlice, FixedBatches
from bossnas.data.shards import ShardIndex
from bossnas.data.streams import ShardStream
from bossnas.errors import ConfigError

CIFAR = views.recipe("cifar", 8)
IMAGENET = views.recipe("imagenet", 8)


class Identity(views.Recipe):
    """A recipe whose view says which image it is of: the image in one pixel, neither shifted nor flipped."""

    def draw(self, *args, **kwargs):
        looks = super().draw(*args, **kwargs)
        looks.ints[..., 4:7] = 0
        return looks


IDENTITY = Identity("cifar", 1)


def numbers(view: torch.Tensor) -> list[int]:
    """Of png(): the number of every image in a batch."""
    pixels = view[:, :, 0, 0] * torch.tensor(IDENTITY.std) + torch.tensor(IDENTITY.mean)
    return (pixels * 255).round().int().matmul(torch.tensor([1, 256, 0], dtype=torch.int32)).tolist()


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (number % 256, number // 256, 0)).save(file, "PNG")
    return file.getvalue()


def make_index(folder: Path, count: int, shards: int = 3, bad: tuple[int, ...] = ()) -> ShardIndex:
    for shard in range(shards):
        with tarfile.open(folder / f"s-{shard}.tar", "w") as tar:
            for i in range(shard * count // shards, (shard + 1) * count // shards):
                content = b"damaged" if i in bad else png(i)
                member = tarfile.TarInfo(f"{i:04d}.png")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return ShardIndex.open(str(folder / "s-*.tar"))


@pytest.fixture
def index(tmp_path) -> ShardIndex:
    return make_index(tmp_path, 60)


@pytest.fixture(scope="module")
def sample() -> Data:
    return open_data(DataConfig())


def split(options: dict) -> tuple[DataConfig, dict]:
    """Keys of the data section, and the rest."""
    return (
        DataConfig(**{"workers": 0} | {k: v for k, v in options.items() if k in DataConfig.model_fields}),
        {k: v for k, v in options.items() if k not in DataConfig.model_fields},
    )


def grouped(group: type, options: dict) -> tuple:
    """The group made of its fields among the options, and the rest."""
    names = [field.name for field in fields(group)]
    return (
        group(**{name: options[name] for name in names if name in options}),
        {name: value for name, value in options.items() if name not in names},
    )


def batches(source, recipe, ids, pairs, **options):
    settings, rest = split(options)
    part, rest = grouped(EpochSlice, rest)
    return view_batches(source, views.Views(recipe, tuple(ids), pairs), settings, part, **rest)


def fixed(source, recipe, ids, pairs, **options):
    settings, rest = split(options)
    chosen, rest = grouped(FixedBatches, rest)
    return fixed_view_batches(source, views.Views(recipe, tuple(ids), pairs), settings, chosen, **rest)


def ids(source, **options) -> list[list[int]]:
    given = {"seed": 3, "epoch": 0, "start": 0, "steps": len(source) // options["batch"]} | options
    return [numbers(view) for (view,) in batches(source, IDENTITY, [0], 1, **given)]


def one_epoch(
    sample: Data, world: int, workers: int, start: int = 0, seed: int = 5, epoch: int = 2, views_on: str = "worker"
):
    """Four global micro-batches of 16 images: per view the ranks' tensors in one."""
    ranks = [
        batches(
            sample.train,
            IMAGENET,
            range(4),
            2,
            seed=seed,
            epoch=epoch,
            start=start,
            steps=4,
            batch=16 // world,
            rank=rank,
            world=world,
            workers=workers,
            views_on=views_on,
        )
        for rank in range(world)
    ]
    return [[torch.cat(parts) for parts in zip(*views, strict=True)] for views in zip(*ranks, strict=True)]


def same(a: list[list[torch.Tensor]], b: list[list[torch.Tensor]]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)
    )


@pytest.mark.parametrize(
    ("world", "workers", "views_on"),
    [
        (1, 2, "worker"),
        (2, 0, "worker"),
        (4, 1, "worker"),
        (1, 2, "device"),
        (2, 1, "device"),
        (4, 0, "device"),
        (2, 2, "worker_crops"),
        (4, 0, "worker_crops"),
    ],
)
def test_global_batches_are_the_same_for_any_ranks_and_workers(sample, world, workers, views_on):
    reference = one_epoch(sample, 1, 0, views_on=views_on)
    assert len(reference) == 4 and all(view.shape == (16, 3, 8, 8) for views in reference for view in views)
    assert all(view.is_contiguous(memory_format=torch.channels_last) for view in reference[0])
    assert same(one_epoch(sample, world, workers, views_on=views_on), reference)


@pytest.mark.quick
@pytest.mark.parametrize("recipe", [views.recipe("imagenet", 48), views.recipe("cifar", 32)])
def test_every_place_makes_the_same_views(tmp_path, recipe):
    for shard in range(2):
        with tarfile.open(tmp_path / f"s-{shard}.tar", "w") as tar:
            for i in range(8):
                pixels = np.random.default_rng([shard, i]).integers(0, 256, (9 + i, 12, 3), dtype=np.uint8)
                file = io.BytesIO()
                Image.fromarray(pixels).resize((70 + 9 * i, 60)).save(file, "JPEG")
                member = tarfile.TarInfo(f"{shard}/{i}.jpg")
                member.size = file.tell()
                tar.addfile(member, io.BytesIO(file.getvalue()))
    index = ShardIndex.open(str(tmp_path / "s-*.tar"))
    made = {
        views_on: next(
            batches(index, recipe, range(4), 2, seed=1, epoch=0, start=0, steps=1, batch=16, views_on=views_on)
        )
        for views_on in ("worker", "worker_crops", "device")
    }
    levels = 255 * torch.tensor(recipe.std)[:, None, None]
    for a, b in itertools.combinations(made.values(), 2):
        for x, y in zip(a, b, strict=True):
            assert ((x - y) * levels).abs().mean((1, 2, 3)).max() <= 0.6


def test_order_in_blocks_keeps_to_few_shards(tmp_path):
    index = make_index(tmp_path, 60, shards=6)
    whole = [i for batch in ids(index, batch=10, shuffle_block=20) for i in batch]
    assert sorted(whole) == list(range(60)) and whole != sorted(whole)
    for first in range(0, 60, 20):
        assert len({i // 10 for i in whole[first : first + 20]}) == 2
    assert ids(index, batch=10, shuffle_block=20, epoch=1) != ids(index, batch=10, shuffle_block=20)


def test_where_views_are_made_by_default():
    assert collate.place("auto", torch.device("cpu")) == "worker"
    assert collate.place("auto", torch.device("cuda")) == "device"
    assert collate.place("worker_crops", torch.device("cuda")) == "worker_crops"


@pytest.mark.quick
def test_global_batches_change_with_epoch_and_seed(sample):
    reference = one_epoch(sample, 1, 0)
    assert not same(one_epoch(sample, 1, 0, epoch=3), reference)
    assert not same(one_epoch(sample, 1, 0, seed=6), reference)


@pytest.mark.quick
@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 2), (2, 0)])
def test_resuming_continues_exactly(sample, world, workers):
    whole = one_epoch(sample, 1, 0)
    assert same(one_epoch(sample, world, workers, start=3), whole[3:])
    assert one_epoch(sample, world, workers, start=4) == []


def test_every_sample_comes_at_most_once_in_an_epoch(index):
    ranks = [ids(index, batch=7, rank=rank, world=2, steps=4) for rank in range(2)]
    drawn = [i for rank in ranks for batch in rank for i in batch]
    assert len(drawn) == len(set(drawn)) == 56 and set(drawn) <= set(range(60))
    whole = [ids(index, batch=60, epoch=epoch)[0] for epoch in range(2)]
    assert sorted(whole[0]) == sorted(whole[1]) == list(range(60)) and whole[0] != whole[1]


def test_the_views_asked_for_are_the_views_of_their_number(sample):
    options = dict(seed=0, epoch=0, start=0, steps=1, batch=6)
    (every,) = batches(sample.train, IMAGENET, range(8), 4, **options)
    (some,) = batches(sample.train, IMAGENET, [5, 1], 4, **options)
    assert same([some], [[every[5], every[1]]])
    assert len({view.sum().item() for view in every}) == 8  # independent draws
    row = next(iter(batches(sample.train, IMAGENET, [0], 4, **options)))[0]
    assert len({picture.sum().item() for picture in row}) == 6


def test_an_images_views_change_with_epoch_and_seed(tmp_path):
    with tarfile.open(tmp_path / "one.tar", "w") as tar:
        member = tarfile.TarInfo("one.png")
        member.size = len(png(40000))  # coloured, so that the jitter shows
        tar.addfile(member, io.BytesIO(png(40000)))
    index, options = ShardIndex.open(str(tmp_path / "one.tar")), dict(start=0, steps=1, batch=1)
    made = [
        next(batches(index, IMAGENET, [0], 1, seed=seed, epoch=epoch, **options))[0].sum().item()
        for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0))
    ]
    assert len(set(made)) == 3 and made[0] == made[3]


def test_an_epoch_that_is_too_long_is_refused_at_once(index):
    with pytest.raises(ConfigError, match="data.train: holds 60 images, but .* of 8 .* on 2 ranks takes 64"):
        batches(index, CIFAR, [0], 1, seed=0, epoch=0, start=0, steps=8, batch=4, world=2)
    with pytest.raises(ValueError, match="start 9"):
        batches(index, CIFAR, [0], 1, seed=0, epoch=0, start=9, steps=8, batch=4)


def test_loading_leaves_the_runs_random_numbers_alone(sample):
    torch.manual_seed(1)
    expected = torch.rand(3)
    for workers in (0, 1):
        torch.manual_seed(1)
        np.random.seed(1)
        state = np.random.get_state()[1].copy()
        list(fixed(sample.val, CIFAR, [0], 1, seed=0, count=4, batch=2, shuffle=True, workers=workers))
        assert torch.equal(torch.rand(3), expected) and (np.random.get_state()[1] == state).all()


def many(sample: Data, workers: int):
    return batches(sample.train, CIFAR, [0, 1], 1, seed=0, epoch=0, start=0, steps=100, batch=16, workers=workers)


def test_closing_early_leaves_no_process(sample):
    for close in (True, False):
        batches = many(sample, workers=2)
        next(batches)
        assert len(multiprocessing.active_children()) == 2
        if close:
            batches.close()
        else:
            del batches
        assert multiprocessing.active_children() == []


def test_workers_outlive_a_schedulers_signal_and_their_death_is_explained(sample):
    batches = many(sample, workers=1)
    next(batches)
    (worker,) = multiprocessing.active_children()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        os.kill(worker.pid, number)
    for _ in range(PREFETCH + 2):  # more than it has made by now
        assert len(next(batches)) == 2
    assert worker.is_alive()
    os.kill(worker.pid, signal.SIGKILL)
    os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)  # nothing is raised here
    with pytest.raises(ConfigError, match="data.workers: a loader process died .*; use fewer"):
        list(batches)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_replaced_counted_and_named(tmp_path, caplog, workers):
    clean, torn = tmp_path / "clean", tmp_path / "torn"
    clean.mkdir()
    torn.mkdir()
    index = make_index(torn, 60, bad=(10, 11, 59))
    expected = [[{10: 12, 11: 12, 59: 0}.get(i, i) for i in batch] for batch in ids(make_index(clean, 60), batch=6)]
    bad: dict[str, str] = {}
    with caplog.at_level(logging.WARNING, "bossnas.data.batches"):
        assert ids(index, batch=6, max_bad=0.05, bad=bad, workers=workers) == expected
    assert [name[-4:] for name in sorted(bad)] == ["0010", "0011", "0059"]
    assert all("no JPEG, PNG or WebP" in problem for problem in bad.values())
    for shard, key in (("s-0", "0010"), ("s-0", "0011"), ("s-2", "0059")):
        assert caplog.text.count(f"{shard}.tar/{key} is replaced") == 1
    caplog.clear()
    assert ids(index, batch=6, max_bad=0.05, bad=bad, epoch=1) and caplog.text == ""  # said once


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_images_stop_the_run(tmp_path, workers):
    index = make_index(tmp_path, 60, bad=(10, 30, 50))
    with pytest.raises(ConfigError, match=r"data.max_bad: 3 images .* than 2 .*s-\d.tar/00[135]0: no JPEG"):
        ids(index, batch=6, max_bad=0.04, workers=workers)
    assert ids(index, batch=6, max_bad=0.05)
    with pytest.raises(ConfigError, match="more than 1 "):
        ids(index, batch=6, max_bad=0.001)
    with pytest.raises(ConfigError, match="more than 0 "):
        ids(index, batch=6, max_bad=0.0)
    with pytest.raises(ConfigError, match="more than 1 "):  # a rank answers for its share
        for rank in range(2):
            ids(index, batch=30, steps=1, rank=rank, world=2, max_bad=0.05)


def test_one_bad_image_is_always_put_up_with(tmp_path):
    assert ids(make_index(tmp_path, 60, bad=(10,)), batch=60, max_bad=0.001)


@pytest.mark.parametrize("count", [1, 5])
def test_nothing_but_bad_images_ends(tmp_path, count):
    with pytest.raises(ConfigError, match="data.max_bad"):
        ids(make_index(tmp_path, count, shards=1, bad=tuple(range(count))), batch=1, max_bad=0.9)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_breaks_under_the_run_is_named(tmp_path, workers):
    index = make_index(tmp_path, 60)
    os.truncate(tmp_path / "s-2.tar", 1000)
    with pytest.raises(ConfigError, match="data.train: .*s-2.tar has become shorter"):
        ids(index, batch=6, workers=workers)
    assert multiprocessing.active_children() == []


@pytest.mark.quick
def test_fixed_batches(sample):
    options = dict(seed=4, batch=20, count=50, shuffle=True)
    first = list(fixed(sample.train, IMAGENET, [0, 2], 2, **options))
    assert [view.shape[0] for view, _ in first] == [20, 20, 10]
    assert same(first, list(fixed(sample.train, IMAGENET, [0, 2], 2, workers=2, **options)))
    longer, other = (
        list(fixed(sample.train, IMAGENET, [0, 2], 2, **options | changed)) for changed in ({"count": 60}, {"seed": 5})
    )
    assert same(first[:2], longer[:2]) and not same(first, other)


def test_fixed_batches_in_the_order_of_the_index(index):
    def given(**options):
        return [numbers(view) for (view,) in fixed(index, IDENTITY, [0], 1, seed=1, **options)]

    assert given(count=None, batch=25, shuffle=False) == [[*range(25)], [*range(25, 50)], [*range(50, 60)]]
    assert given(count=None, batch=25, shuffle=False, only=[2, 0]) == [[*range(50, 60)], [*range(25)]]
    assert given(count=100, batch=60, shuffle=False) == [list(range(60))]
    assert sorted(given(count=None, batch=60, shuffle=True)[0]) == list(range(60))


def test_packaged_sample(sample):
    assert sample.is_sample and len(sample.train) == 2000 and len(sample.val) == 500
    for index, each in ((sample.train, 200), (sample.val, 50)):
        labels = [index.read(i)[2] for i in range(len(index))]
        assert np.bincount(labels).tolist() == [each] * 10
        assert len({index.key(i) for i in range(len(index))}) == len(index)
        assert len(set(labels[:100])) == 10  # mixed
    ((shown,),) = fixed(sample.val, CIFAR, [0], 1, seed=0, count=64, batch=64, shuffle=False)
    assert 0.3 < shown.std() < 3
    assert sum(path.stat().st_size for path in SAMPLE.glob("*.gz")) < 3e6
    assert not list(SAMPLE.glob(".*.npz"))


def test_open_data_names_the_field(tmp_path, index):
    shards = str(tmp_path / "s-*.tar")
    opened = open_data(DataConfig(train=shards, val=shards))
    assert len(opened.train) == 60 and not opened.is_sample
    absent = str(tmp_path / "v*")
    for train, val, field in (
        (shards, None, "data.val"),
        (None, shards, "data.train"),
        (shards, absent, "data.val"),
        (absent, shards, "data.train"),
    ):
        with pytest.raises(ConfigError) as error:
            open_data(DataConfig(train=train, val=val))
        assert error.value.field == field


def stream(folder: Path, count: int, shards: int, bad: tuple[int, ...] = ()) -> ShardStream:
    make_index(folder, count, shards, bad)
    return ShardStream.open(str(folder / "s-*.tar"), images=count)


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 2), (2, 0), (2, 2)])
def test_a_streams_epoch_has_every_sample_once_and_resumes_exactly(tmp_path, world, workers):
    source = stream(tmp_path, 64, shards=8)
    options = dict(batch=4, steps=16 // world, workers=workers, world=world, buffer=10)
    ranks = [ids(source, rank=rank, **options) for rank in range(world)]
    assert sorted(i for rank in ranks for batch in rank for i in batch) == list(range(64))
    assert ranks[0] != ids(source, rank=0, epoch=1, **options)
    for start in (1, 4, 7):
        assert [ids(source, rank=rank, start=start, **options) for rank in range(world)] == [r[start:] for r in ranks]


def test_a_streams_pixels_do_not_depend_on_where_an_epoch_is_taken_up(tmp_path):
    source = stream(tmp_path, 24, shards=4)
    options = dict(seed=0, epoch=0, steps=6, batch=4, workers=2)
    whole = list(batches(source, IMAGENET, [0, 1], 1, start=0, **options))
    assert same(whole[3:], list(batches(source, IMAGENET, [0, 1], 1, start=3, **options)))


def test_a_reader_whose_shards_end_begins_them_again_and_says_so(tmp_path, caplog):
    source = stream(tmp_path, 50, shards=3)  # 16, 17 and 17 images
    caplog.set_level(logging.WARNING, "bossnas.data.batches")
    taken = [i for batch in ids(source, batch=25, steps=1, world=2, rank=0, workers=0, buffer=0) for i in batch]
    taken += [i for batch in ids(source, batch=25, steps=1, world=2, rank=1, workers=0, buffer=0) for i in batch]
    assert len(taken) == 50 and 40 <= len(set(taken)) < 50
    assert caplog.text.count("has come to the end of its 1 shards in epoch 0 and begins them again") == 1


def test_bad_images_of_a_stream_are_replaced_by_a_neighbour_and_named(tmp_path, caplog):
    source, bad = stream(tmp_path, 60, shards=3, bad=(0, 11, 59)), {}
    options = dict(batch=6, workers=0, buffer=0, epoch=0, max_bad=0.05)
    with caplog.at_level(logging.WARNING, "bossnas.data.batches"):
        taken = [i for batch in ids(source, bad=bad, **options) for i in batch]
    assert len(taken) == 60 and set(range(60)) - set(taken) == {0, 11, 59}
    assert [name[-4:] for name in sorted(bad)] == ["0000", "0011", "0059"] and caplog.text.count("is replaced") == 3
    with pytest.raises(ConfigError, match="data.max_bad: 2 images .* more than 1 "):
        ids(source, **options | {"max_bad": 0.001})
    worse = tmp_path / "worse"
    worse.mkdir()
    with pytest.raises(ConfigError, match="data.max_bad"):
        ids(stream(worse, 12, shards=1, bad=tuple(range(12))), **options | {"max_bad": 0.99})


@pytest.mark.parametrize("workers", [0, 2])
def test_fixed_batches_of_a_stream(tmp_path, workers):
    source, index = stream(tmp_path, 60, shards=3), ShardIndex.open(str(tmp_path / "s-*.tar"))
    options = dict(seed=1, batch=25, workers=workers)

    def given(of, **more):
        return [numbers(view) for (view,) in fixed(of, IDENTITY, [0], 1, **options | more)]

    whole = given(source, count=None, shuffle=False)
    assert whole == given(index, count=None, shuffle=False)
    assert given(source, count=None, shuffle=False, only=[1, 2]) == whole[1:]
    assert given(source, count=None, shuffle=False, only=[]) == []
    drawn = given(source, count=30, shuffle=True)
    assert [len(batch) for batch in drawn] == [25, 5] and drawn == given(source, count=30, shuffle=True)
    assert drawn[0] != whole[0] and len({i for batch in drawn for i in batch}) == 30
    short = ShardStream.open(str(tmp_path / "s-*.tar"), images=70)
    with pytest.raises(ConfigError, match="ends 10 images too early"):
        given(short, count=None, shuffle=False)


def test_a_stream_needs_its_number_of_images_and_enough_shards(tmp_path):
    make_index(tmp_path, 12, shards=2)
    shards = str(tmp_path / "s-*.tar")
    with pytest.raises(ConfigError, match="train.steps_per_epoch: is not set"):
        open_data(DataConfig(train=shards, val=shards, reader="stream"))
    with pytest.raises(ConfigError, match="data.val_images: is not set"):
        open_data(DataConfig(train=shards, val=shards, reader="stream"), 12)
    opened = open_data(DataConfig(train=shards, val=shards, reader="stream", val_images=6), 12)
    assert (len(opened.train), len(opened.val)) == (12, 6)
    assert readers(opened.train, DataConfig(workers=3), 2) == 6
    assert readers(ShardIndex.open(shards), DataConfig(workers=3), 2) is None
    with pytest.raises(ConfigError, match="data.workers: 4 readers"):
        ids(opened.train, batch=2, steps=1, world=2, workers=2)
    with pytest.raises(ConfigError, match="data.train: .*runs a command"):
        open_data(DataConfig(train="pipe:cat x.tar", val=shards))
