"""All blocks at once: any number of rows trains alike, to the bit, also after a stop; and what is streamed is right."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import ranks
import schedule_worker
import torch

from bossnas.config.loading import load
from bossnas.distributed import dist, pipe
from bossnas.errors import ConfigError, Stopped
from bossnas.runs import checkpoint, session
from bossnas.search import block_parallel, search
from bossnas.search.stage import Job, Trace, train_batches
from bossnas.spaces.paths import decode, encode
from bossnas.supernet.supernet import Item

HOP = f"{ranks.WORKERS / 'hop_space.py'}:Hop"
TINY = [
    "seed=10",
    "space.image_size=32",
    "heads.hidden=16",
    "heads.out=8",
    "data.workers=0",
    "train.batch=16",
    "train.micro_batch=8",
    "train.epochs=3",
    "train.steps_per_epoch=2",
    "train.lr=0.5",
    "train.warmup_epochs=0",
    "data.val_images=8",
    "rating.batch=8",
    "rating.max_gib=0.002",
    "rating.calibration_images=16",
    "rating.every_epochs=1",
    "checkpoint.every_steps=2",
    "checkpoint.keep=20",
    "engine.name=ddp",
    "schedule=block_parallel",
    f"engine.timeout_minutes={ranks.HANG / 60:g}",
]
OWN = ("images_per_second", "waited_seconds")  # of a run itself, not of its results


def settings(out, *more, space=HOP):
    return [*TINY, "rating.score=population_centre", f"space.name={space}", f"out={out}", *more]


def start(count, *tasks):
    code, output = ranks.start("torchrun", count, "schedule_worker.py", json.dumps(tasks))
    assert code == 0, output
    return output


def ratings(folder):
    return {f.name: json.loads(f.read_text()) for f in sorted((folder / "ratings").glob("*.json"))}


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in OWN} for line in lines]


def weights(folder):
    return checkpoint.read(checkpoint.latest(folder / "checkpoints"), ("online", "target", "predictors"))


def states(folder):
    return {f.parent.name: json.loads(f.read_text()) for f in (folder / "checkpoints").glob("*/state.json")}


def assert_same(a, b):
    assert ratings(a) == ratings(b) and metrics(a) == metrics(b)
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys() and all(torch.equal(x, theirs[name]) for name, x in ours.items())


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The reference: one process that trains all blocks, undisturbed."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    search.search(load(None, settings(folder)))
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two ranks did: an undisturbed run; a stopped one that went on; streams."""
    root = tmp_path_factory.mktemp("two")
    streams = [{"pipe": kind} for kind in ("whole", "step", "shape", "dtype")]
    output = start(
        2,
        *streams,
        {"set": settings(root / "run")},
        {"set": settings(root / "stopped"), "stop": [1, "blocks 1 to 2 step 1"]},
        {"set": settings(root / "stopped"), "resume": "auto"},
        {"set": settings(root / "three"), "stop": [0, "block 0 step 3"]},
    )
    return root, output


def test_the_run_is_what_its_rules_say(alone):
    """Leaders change and with them the scale that is handed over; blocks are rated in order; the files are whole."""
    run, rated = search.build(load(alone / "config.json")), ratings(alone)
    leaders = block_parallel.first_leaders(run.space, 10)
    assert block_parallel.first_leaders(run.space, 10) == leaders != block_parallel.first_leaders(run.space, 1)
    halvings = [leaders[0].count(2)]
    for epoch in (1, 2):
        found = []
        for block in range(3):
            values = rated[f"block_{block}_epoch_{epoch}.json"]
            assert values["prefix"] == found
            assert list(map(decode, values["paths"])) == run.space.paths(block, list(map(decode, found)))
            found.append(min(values["paths"], key=values["paths"].get))
        halvings.append(decode(found[0]).count(2))
        assert states(alone)[f"block0-step{2 * epoch + 2:06d}"]["leaders"] == found
    assert halvings == [0, 1, 2], "the scale that block 0 hands over changes at every rating"
    winners = json.loads((alone / "winners.json").read_text())["winners"]
    for block in range(3):
        assert rated[f"block_{block}.json"]["prefix"] == winners[:block]
        paths = rated[f"block_{block}.json"]["paths"]
        assert min(paths, key=paths.get) == winners[block]
    assert json.loads((alone / "architecture.json").read_text())["paths"] == winners and (alone / "done").exists()
    trained = [(line["step"], line["block"]) for line in metrics(alone) if line["kind"] == "train"]
    assert trained == [(step, block) for step in range(1, 7) for block in range(3)]
    assert states(alone)["block3-step000006"]["images_seen"] == 6 * 16


@pytest.mark.parametrize(
    "space, leaders, last",
    [
        (HOP, ["20", "12", "00"], (8, 4, 4)),  # channels and pixels: two halvings after the stem's
        ("hytra", ["4432", "2221", "0110", "0110"], (128, 1, 1)),
    ],
)
def test_features_are_the_target_networks_before_the_update(tmp_path, space, leaders, last):
    """Streamed features against the definition, view by view, over two steps of two micro-batches."""
    run = search.build(load(None, settings(tmp_path, "space.width=0.0625", space=space)))
    leaders = [decode(text) for text in leaders]
    run.state.leaders[:] = leaders
    assert all(path in run.space.paths(block, leaders[:block]) for block, path in enumerate(leaders))
    row = block_parallel._Row(Job(run, None, Trace()), None)
    images = train_batches(run, 0, 0)
    for step in range(2):
        before = copy.deepcopy(run.target)
        for micro in range(2):
            views = next(images)
            row._stream(pipe.Place(step, micro))
            for block, leader in enumerate(leaders):
                (streamed,) = row.queues[block]
                for mine, theirs in zip(streamed, views, strict=True):
                    assert torch.allclose(mine, theirs, atol=1e-5) and mine.shape == theirs.shape
                    assert mine.is_contiguous(memory_format=torch.channels_last)
                with torch.no_grad():
                    views = [before.forward(block, [Item(leader, x)])[0] for x in streamed]
            assert views[0].shape[1:] == last
            for block in range(len(leaders)):
                next(row.stages[block].steps)
        changed = [not torch.equal(p, q) for p, q in zip(before.parameters(), run.target.parameters(), strict=True)]
        assert any(changed), "this test would not notice weights of the wrong step"
    row.close()


def test_two_rows_train_as_one_process(alone, two):
    assert_same(alone, two[0] / "run")


def test_three_rows_train_as_one_process(alone, two, tmp_path):
    """And finish a run that two ranks began and a signal stopped."""
    start(3, {"set": settings(tmp_path / "run")}, {"set": settings(two[0] / "three"), "resume": "auto"})
    assert_same(alone, tmp_path / "run")
    assert_same(alone, two[0] / "three")


def test_ranks_of_a_row_share_its_batches(tmp_path):
    """Two rows of two ranks, with batch norm over a row's ranks, train as one process with larger micro-batches; FSDP2
    as DDP."""

    def of(name, *more):
        # a small learning rate: biases before a batch norm have a gradient of mere rounding
        return settings(tmp_path / name, "train.sync_batch_norm=true", "train.lr=0.01", *more, space=f"{HOP}2")

    output = start(
        4,
        {"set": of("ddp")},
        {"set": of("fsdp2", "engine.name=fsdp2"), "stop": [3, "block 1 step 2"]},
        {"set": of("fsdp2", "engine.name=fsdp2"), "resume": "auto"},
    )
    assert "rank 0: stopped on SIGTERM" in output
    search.search(load(None, of("alone", "train.micro_batch=16")))
    truth = weights(tmp_path / "alone")
    for name in ("ddp", "fsdp2"):
        found = weights(tmp_path / name)
        for key, x in found.items():  # of the largest value, or absolute
            assert (x - truth[key]).abs().max() < 1e-6 * truth[key].abs().max().clamp(min=1), (name, key)
        for file, rated in ratings(tmp_path / "alone").items():
            assert ratings(tmp_path / name)[file]["paths"] == pytest.approx(rated["paths"], abs=1e-6), (name, file)


def test_a_run_that_was_stopped_goes_on_to_the_bit(alone, two):
    root, output = two
    assert "rank 0: stopped on SIGTERM at block 0 step 2; everything is saved" in output
    assert_same(alone, root / "stopped")


def test_one_process_stops_in_training_and_in_ratings(alone, tmp_path, monkeypatch):
    """At a step, before and in a mid-stage rating, twice in it, before and in the last ratings: to the same end."""
    monkeypatch.setattr(session, "Guard", schedule_worker.Signalled)
    out, resume = tmp_path / "run", None
    for place in (
        "blocks 0 to 2 step 1",
        "blocks 0 to 2 step 2",
        "the rating of block 1 epoch 1",
        "the rating of block 1 epoch 1",
        "blocks 0 to 2 step 6",
        "the rating of block 1",
    ):
        monkeypatch.setattr(schedule_worker.Signalled, "stop", (0, place))
        with pytest.raises(Stopped, match="stopped on SIGTERM at " + place):
            search.search(load(None, settings(out)), resume)
        resume = "auto"
        assert not (out / "done").exists()
    search.search(load(None, settings(out)), resume)
    assert (out / "done").exists()
    assert_same(alone, out)


def test_a_stream_keeps_its_bounds_and_notices_other_messages(two):
    output = two[1]
    assert "whole: 2 under way" in output
    assert "step: rank 0 sends the features of step 1, micro-batch 0, but those of step 0, micro-batch 1 are" in output
    assert "shape: rank 0 sends features [1, 3, 4] torch.float32 in step 0, micro-batch 1, but [2, 3, 4]" in output
    assert "dtype: rank 0 sends features [2, 3, 4] torch.float16" in output


def test_views_are_packed_without_loss():
    views = [torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last) for _ in range(3)]
    packed = pipe.pack(views)
    assert packed.is_contiguous() and all(map(torch.equal, pipe.unpack(packed), views))
    assert pipe.unpack(packed)[1].stride() == views[1].stride()


@pytest.mark.parametrize(
    "world, rows",
    [(1, [range(4)]), (3, [range(1), range(1, 2), range(2, 4)]), (8, [range(b, b + 1) for b in range(4)])],
)
def test_the_mesh(monkeypatch, world, rows):
    monkeypatch.setattr(dist, "world_size", lambda group=None: world)
    monkeypatch.setattr(dist, "rank", lambda group=None: world - 1)
    mesh = dist.mesh("block_parallel", 4)
    assert list(mesh.blocks) == rows and mesh.own == rows[-1] and mesh.shards == max(world // 4, 1) == mesh.shard + 1


def test_mistakes_are_refused(monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match="engine.name: is deepspeed, which trains one block at a time"):
        load(None, settings(tmp_path, "engine.name=deepspeed"))
    monkeypatch.setattr(dist, "world_size", lambda group=None: 5)
    with pytest.raises(ConfigError, match="schedule: .* 5 ranks .* over 3 blocks; start 3 or 6 ranks"):
        search.build(load(None, settings(tmp_path)))


def test_time_is_taken_down(tmp_path):
    """Waiting is told in the metrics, and a trace holds all spans."""
    trace, out = Trace(keep=True), tmp_path / "run"
    search.search(load(None, settings(out, "train.epochs=1", "rating.every_epochs=0")), trace=trace)
    trace.write(tmp_path / "trace.json", rank=0)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert sum(event["name"] == "block 1" for event in events) == 4  # micro-batches
    names = {"images", "hand over", "block 0", "block 1", "block 2", "vote", "save", "rate"}
    assert {event["name"] for event in events} == names
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all(line["waited_seconds"] >= 0 for line in lines if line["kind"] == "train")
    assert encode((0, 1)) == "01" and Path(out / "done").exists()
