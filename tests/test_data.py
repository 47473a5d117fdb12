"""Batches: the same for any ranks and workers, resumable, and steadfast against bad images."""

from __future__ import annotations

import io
import logging
import multiprocessing
import os
import signal
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bossnas import data, views
from bossnas.errors import ConfigError
from bossnas.shards import ShardIndex

CIFAR = views.recipe("cifar", 8)
IMAGENET = views.recipe("imagenet", 8)


class Identity:
    """A recipe whose view says which image it is of: the image's first two bytes."""

    image_size = 1

    def make(self, image, view, view_pairs, rng):
        red, green, _ = image.getpixel((0, 0))
        return torch.full((3, 1, 1), red + 256 * green)


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
def sample() -> data.Data:
    return data.open_data()


def ids(index: ShardIndex, **options) -> list[list[int]]:
    given = {"seed": 3, "epoch": 0, "start": 0, "steps": len(index) // options["batch"]} | options
    return [views[0].flatten(1)[:, 0].int().tolist()
            for views in data.batches(index, Identity(), [0], 1, **given)]


def one_epoch(sample: data.Data, world: int, workers: int, start: int = 0, seed: int = 5, epoch: int = 2):
    """Four global micro-batches of 16 images: per view the ranks' tensors in one."""
    ranks = [data.batches(sample.train, IMAGENET, range(4), 2, seed=seed, epoch=epoch, start=start,
                          steps=4, batch=16 // world, rank=rank, world=world, workers=workers)
             for rank in range(world)]
    return [[torch.cat(parts) for parts in zip(*views, strict=True)] for views in zip(*ranks, strict=True)]


def same(a: list[list[torch.Tensor]], b: list[list[torch.Tensor]]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for p, q in zip(a, b, strict=True)
                                    for x, y in zip(p, q, strict=True))


@pytest.mark.parametrize(("world", "workers"), [(1, 2), (2, 0), (2, 2), (4, 0), (4, 2)])
def test_global_batches_are_the_same_for_any_ranks_and_workers(sample, world, workers):
    reference = one_epoch(sample, 1, 0)
    assert len(reference) == 4 and all(view.shape == (16, 3, 8, 8) for views in reference for view in views)
    assert same(one_epoch(sample, world, workers), reference)
    assert not same(one_epoch(sample, 1, 0, epoch=3), reference)
    assert not same(one_epoch(sample, 1, 0, seed=6), reference)


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
    every, = data.batches(sample.train, IMAGENET, range(8), 4, **options)
    some, = data.batches(sample.train, IMAGENET, [5, 1], 4, **options)
    assert same([some], [[every[5], every[1]]])
    assert len({view.sum().item() for view in every}) == 8  # independent draws
    row = next(iter(data.batches(sample.train, IMAGENET, [0], 4, **options)))[0]
    assert len({picture.sum().item() for picture in row}) == 6


def test_an_images_views_change_with_epoch_and_seed(tmp_path):
    with tarfile.open(tmp_path / "one.tar", "w") as tar:
        member = tarfile.TarInfo("one.png")
        member.size = len(png(40000))  # coloured, so that the jitter shows
        tar.addfile(member, io.BytesIO(png(40000)))
    index, options = ShardIndex.open(str(tmp_path / "one.tar")), dict(start=0, steps=1, batch=1)
    made = [next(data.batches(index, IMAGENET, [0], 1, seed=seed, epoch=epoch, **options))[0].sum().item()
            for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0))]
    assert len(set(made)) == 3 and made[0] == made[3]


def test_an_epoch_that_is_too_long_is_refused_at_once(index):
    with pytest.raises(ConfigError, match="data.train: holds 60 images, but .* of 8 .* on 2 ranks takes 64"):
        data.batches(index, CIFAR, [0], 1, seed=0, epoch=0, start=0, steps=8, batch=4, world=2)
    with pytest.raises(ValueError, match="start 9"):
        data.batches(index, CIFAR, [0], 1, seed=0, epoch=0, start=9, steps=8, batch=4)


def test_loading_leaves_the_runs_random_numbers_alone(sample):
    torch.manual_seed(1)
    expected = torch.rand(3)
    for workers in (0, 1):
        torch.manual_seed(1)
        np.random.seed(1)
        state = np.random.get_state()[1].copy()
        list(data.fixed_batches(sample.val, CIFAR, [0], 1, seed=0, count=4, batch=2, shuffle=True,
                                workers=workers))
        assert torch.equal(torch.rand(3), expected) and (np.random.get_state()[1] == state).all()


def many(sample: data.Data, workers: int):
    return data.batches(sample.train, CIFAR, [0, 1], 1, seed=0, epoch=0, start=0, steps=100, batch=16,
                        workers=workers)


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
    worker, = multiprocessing.active_children()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        os.kill(worker.pid, number)
    time.sleep(0.2)
    assert worker.is_alive() and len(next(batches)) == 2
    os.kill(worker.pid, signal.SIGKILL)
    time.sleep(0.2)  # nothing is raised here
    with pytest.raises(ConfigError, match="data.workers: a loader process died .*; use fewer"):
        list(batches)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_replaced_counted_and_named(tmp_path, caplog, workers):
    clean, torn = tmp_path / "clean", tmp_path / "torn"
    clean.mkdir()
    torn.mkdir()
    index = make_index(torn, 60, bad=(10, 11, 59))
    expected = [[{10: 12, 11: 12, 59: 0}.get(i, i) for i in batch]
                for batch in ids(make_index(clean, 60), batch=6)]
    bad: dict[int, str] = {}
    with caplog.at_level(logging.WARNING, "bossnas.data"):
        assert ids(index, batch=6, max_bad=0.05, bad=bad, workers=workers) == expected
    assert sorted(bad) == [10, 11, 59] and "no JPEG, PNG or WebP" in bad[10]
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


def test_fixed_batches(sample):
    options = dict(seed=4, batch=20, count=50, shuffle=True)
    first = list(data.fixed_batches(sample.train, IMAGENET, [0, 2], 2, **options))
    assert [view.shape[0] for view, _ in first] == [20, 20, 10]
    assert same(first, list(data.fixed_batches(sample.train, IMAGENET, [0, 2], 2, workers=2, **options)))
    longer, other = (list(data.fixed_batches(sample.train, IMAGENET, [0, 2], 2, **options | changed))
                     for changed in ({"count": 60}, {"seed": 5}))
    assert same(first[:2], longer[:2]) and not same(first, other)


def test_fixed_batches_in_the_order_of_the_index(index):
    def numbers(**options):
        return [view.flatten(1)[:, 0].int().tolist() for view, in
                data.fixed_batches(index, Identity(), [0], 1, seed=1, **options)]
    assert numbers(count=None, batch=25, shuffle=False) == [[*range(25)], [*range(25, 50)], [*range(50, 60)]]
    assert numbers(count=100, batch=60, shuffle=False) == [list(range(60))]
    assert sorted(numbers(count=None, batch=60, shuffle=True)[0]) == list(range(60))


def test_packaged_sample(sample):
    assert sample.is_sample and len(sample.train) == 2000 and len(sample.val) == 500
    for index, each in ((sample.train, 200), (sample.val, 50)):
        labels = [index.read(i)[2] for i in range(len(index))]
        assert np.bincount(labels).tolist() == [each] * 10
        assert len({index.key(i) for i in range(len(index))}) == len(index)
        assert len(set(labels[:100])) == 10  # mixed
    (shown,), = data.fixed_batches(sample.val, CIFAR, [0], 1, seed=0, count=64, batch=64, shuffle=False)
    assert 0.3 < shown.std() < 3
    assert sum(path.stat().st_size for path in data.SAMPLE.glob("*.gz")) < 3e6
    assert not list(data.SAMPLE.glob(".*.npz"))


def test_open_data_names_the_field(tmp_path, index):
    shards = str(tmp_path / "s-*.tar")
    opened = data.open_data(shards, shards)
    assert len(opened.train) == 60 and not opened.is_sample
    absent = str(tmp_path / "v*")
    for train, val, field in ((shards, None, "data.val"), (None, shards, "data.train"),
                              (shards, absent, "data.val"), (absent, shards, "data.train")):
        with pytest.raises(ConfigError) as error:
            data.open_data(train, val)
        assert error.value.field == field
