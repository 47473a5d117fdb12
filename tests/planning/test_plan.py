from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from ranks import HANG
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from bossnas import cli, spaces
from bossnas.cli.planning import GPUS as GPUS_HELP
from bossnas.config.loading import load
from bossnas.distributed.engines.protocol import autocast
from bossnas.errors import ConfigError
from bossnas.planning import plan, tables
from bossnas.planning.gpus import GIB, GPUS, HOST_SECONDS, NODE, Given, Rates, gpu_rates
from bossnas.planning.ranks import Task, memory, split
from bossnas.planning.workload import Workload, count_micro
from bossnas.spaces.ops import GroupedBatchNorm
from bossnas.supernet import heads, losses
from bossnas.supernet.supernet import Item, Networks, Supernet
from bossnas.supernet.train_block import sample_paths

TINY = [
    "space.width=0.0625",
    "space.image_size=32",
    "heads.hidden=16",
    "heads.out=8",
    "data.workers=0",
    "train.batch=64",
    "train.micro_batch=8",
    "train.epochs=2",
    "train.steps_per_epoch=4",
    "train.warmup_epochs=0",
    "data.val_images=24",
    "rating.batch=16",
    "rating.calibration_images=16",
    "rating.every_epochs=1",
    "checkpoint.every_steps=4",
]
NATS = ["space.name=nats", "space.width=0.25", "data.recipe=cifar"]
BF16 = 0.04  # fake tensors have a batch norm of a small map save its statistics in 16 bits, real ones in fp32
WINNERS = {
    "hytra": ["5433", "3230", "0010", "0000"],
    "nats": ["77", "77", "7"],
    "mbconv": ["00", "0123", "3210", "1111", "2222"],
}
MANY = 37  # images: as many as the plan counts with at 32 pixels, so that real tensors take the same code


def config(*more):
    return load(None, [*TINY, *more])


@cache
def counts(*more):
    settings = config(*more)
    space = spaces.make(
        settings.space.name,
        width=settings.space.width,
        image_size=settings.space.image_size,
        restricted=True,
        split="cifar10",
    )
    return Workload(settings, space, [tuple(map(int, path)) for path in WINNERS[settings.space.name]])


def networks(work, settings):
    """Real modules, drawn anew."""
    torch.manual_seed(0)
    online, target = (Supernet(work.space, settings.heads.hidden, settings.heads.out) for _ in range(2))
    return online, target.requires_grad_(False), heads.predictor(settings.heads.hidden, settings.heads.out)


@pytest.fixture(scope="module")
def tiny():
    return counts()


@pytest.mark.quick
def test_parameters_are_those_of_real_modules(tiny):
    online, target, predictor = networks(tiny, config())

    def size(module):
        return sum(p.numel() for p in module.parameters())

    for number in range(4):
        block = tiny.block(number)
        assert block.parameters == size(online.part(number)) == block.followers
        assert block.predictor == size(predictor)
    assert tiny.weights == size(online) + size(target) + 4 * size(predictor)


@pytest.mark.parametrize(
    ("more", "block"),
    [([], 0), (["train.precision=bf16"], 2), (["train.paths_per_pass=2", "train.activation_checkpointing=true"], 1)],
)
def test_tensors_without_data_are_counted_like_real_ones(more, block):
    """And parts that are played back like parts that run."""
    settings = config(*more)
    work = counts(*more)
    assert work.unit == MANY
    winners = work.winners[:block]
    found = work.micro(block, winners, 3, MANY)
    view = torch.zeros(MANY, 3, 32, 32)
    real = count_micro(Networks(*networks(work, settings)), work.space, winners, settings.train, 3, view, 0).of(MANY)
    bf16 = settings.train.precision == "bf16"
    assert_close(found, real, BF16 if bf16 else 0)


def assert_close(found, real, rel):
    """The measured differences: at most 3 casts of a weight a phase that autocast would have kept, 0.1 % of the bytes
    moved; the memory at its highest 3.4 % above."""
    assert found.used == real.used
    assert found.averages == real.averages
    assert found.kept == pytest.approx(real.kept, rel=rel + 0.002)
    assert -0.002 - rel <= found.peak / real.peak - 1 <= 0.04 + rel
    assert found.phases.keys() == real.phases.keys() == {"prefix", "target", "online", "backward"}
    for name, rows in found.phases.items():
        assert np.array_equal(rows[:, :2].sum(0), real.phases[name][:, :2].sum(0)), name
        assert 0 <= len(rows) - len(real.phases[name]) <= 3, name
        assert rows[:, 2].sum() == pytest.approx(real.phases[name][:, 2].sum(), rel=rel + 0.001)


@pytest.mark.parametrize(
    ("more", "block"),
    [
        ([*NATS, "train.objective=both", "train.paths=2"], 1),
        (["space.name=mbconv", "space.width=0.25", "train.precision=bf16"], 1),
        (["train.sync_batch_norm=true", "train.activation_checkpointing=true"], 1),
    ],
)
def test_a_micro_batch_of_known_parts_is_what_the_loop_takes(more, block):
    """For another number of images than was counted, too."""
    settings, work = config(*more), counts(*more)
    winners, images = work.winners[:block], 64
    found = work.micro(block, winners, 3, images)
    assert found is work.micro(block, winners, 3, images)
    with work.mode:
        view = torch.zeros(images, 3, 32, 32)
        whole = count_micro(Networks(*networks(work, settings)), work.space, winners, settings.train, 3, view, 0)
    assert_close(found, whole.of(images), 0)


@pytest.mark.parametrize(("more", "block"), [([], 0), (["train.precision=bf16"], 1), (NATS, 0)])
def test_activations_are_what_autograd_saves(more, block):
    """Independently: the storages that a real pass saves, and what the loop holds beside them."""
    settings = config(*more)
    work = counts(*more)
    winners, pairs, precision = work.winners[:block], work.space.view_pairs, settings.train.precision
    online, target, predictor = networks(work, settings)
    online.train(), target.train()
    paths = sample_paths(work.space, block, winners, 0, 6)
    views = [
        torch.zeros(MANY, *work.input_shape(block, winners))
        .contiguous(memory_format=torch.channels_last)
        .to(torch.bfloat16 if block and precision == "bf16" else torch.float32)
        for _ in range(2 * pairs)
    ]
    items = [Item(path, views[v]) for j, path in enumerate(paths) for v in (j % pairs, j % pairs + pairs)]
    held, alive = {}, []

    def hold(tensor):
        storage = tensor.untyped_storage()
        held[storage._cdata] = storage.nbytes()
        alive.append(tensor)
        return tensor

    with torch.no_grad(), autocast("cpu", precision):
        for projection in (of_target := target.embed(block, items)):
            hold(projection)
    with saved_tensors_hooks(hold, lambda tensor: tensor), autocast("cpu", precision):
        projections = online.embed(block, items)
        predicted = predictor(torch.cat(projections), len(projections)).split([len(x) for x in projections])
        loss = (
            losses.ensemble_loss(predicted[0::2], of_target[1::2])
            + losses.ensemble_loss(predicted[1::2], of_target[0::2])
        ).sum()
    for tensor in [*projections, loss]:
        hold(tensor)
    given = {
        t.untyped_storage()._cdata
        for t in [*views, *online.parameters(), *predictor.parameters(), *online.buffers(), *predictor.buffers()]
    }
    sums = 2 * 4  # loss_sum and spread_sum of the loop
    found = work.micro(block, winners, 3, MANY)
    expected = sum(size for storage, size in held.items() if storage not in given) + sums
    assert found.kept == pytest.approx(expected, rel=BF16 if precision == "bf16" else 0, abs=0)


def test_multiply_adds_are_those_of_the_networks(tiny):
    """Of the training's forward pass, and of rating an image along all paths."""
    settings = config()
    online, target, predictor = networks(tiny, settings)
    for block in (0, 1):
        winners = tiny.winners[:block]
        x = torch.zeros(8, *tiny.input_shape(block, winners))
        views, items = [x.clone() for _ in range(8)], []
        for j, path in enumerate(sample_paths(tiny.space, block, winners, 0, 6)):
            items += [Item(path, views[j]), Item(path, views[4 + j])]
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            target.train().embed(block, items)
        phases = tiny.micro(block, winners, 3, 8).phases
        assert phases["target"][:, :2].sum() == counter.get_total_flops()
        everything = [Item(path, x) for path in tiny.space.paths(block, winners)]
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            target.embed(block, everything)
        macs = tiny.block(block).rated_macs
        assert macs[0] * 8 * 2 == counter.get_total_flops()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            predictor(torch.zeros(8 * len(everything), 8), len(everything))
        assert (macs[1] - macs[0]) * 8 * 2 == counter.get_total_flops()


def test_instance_discrimination_needs_no_target_network_and_fewer_paths_are_less_work(tiny):
    whole, instance, few = (
        counts(*more).micro(0, [], 3, 8).phases for more in ((), ("train.objective=instance",), ("train.paths=2",))
    )
    assert not len(instance["target"]) and few["target"][:, :2].sum() < whole["target"][:, :2].sum()
    assert few["online"][:, :2].sum() < whole["online"][:, :2].sum()
    both = counts("train.objective=both").micro(0, [], 3, 8).phases
    assert both["online"][:, :2].sum() > whole["online"][:, :2].sum() > instance["online"][:, :2].sum()


def test_a_backward_pass_is_two_forward_passes(tiny):
    """But for the first convolution, as images have no gradient, and attention, which multiplies once more."""
    phases = tiny.micro(0, [], 3, 8).phases
    stem = 8 * 8 * 2 * tiny.table.stem.cost.macs  # of 8 images, 8 views
    twice = 2 * phases["online"][:, :2].sum() - stem
    assert twice <= phases["backward"][:, :2].sum() < 1.001 * twice
    half = counts("train.precision=bf16").micro(0, [], 3, 8).phases["backward"]
    assert half[:, 0].sum() > 0.99 * phases["backward"][:, :2].sum()


def test_the_largest_draw_is_the_largest(tiny):
    winners = tiny.winners[:1]
    _, most, size = tiny.draws(1, winners)

    def values(step):
        """Of an image, in all maps behind the layers."""
        paths = sample_paths(tiny.space, 1, winners, 0, 2 * step)
        shapes = []
        for path in paths:
            x = torch.zeros(1, *tiny.input_shape(1, winners))
            for depth in range(4):
                x = tiny.space.layer(1, depth).eval()(x, path[depth], 1, None)
                shapes.append(x.numel())
        return sum(shapes)

    assert values(most) == size
    assert all(values(step) <= size for step in range(0, 512, 101))


def task(engine, shards, accumulate, block, micro):
    return Task(engine, shards, accumulate, 8, 8, 4, 4, 8, block, micro)


def test_what_a_rank_receives(tiny):
    block, micro = tiny.block(1), tiny.micro(1, tiny.winners[:1], 3, 8)
    trained = block.parameters + block.predictor

    def received(engine, shards=4, accumulate=1):
        return task(engine, shards, accumulate, block, micro).gradients()[0]

    assert 0 < micro.used < trained
    assert received("ddp") == pytest.approx(2 * 3 / 4 * 4 * micro.used)  # the formula of a ring's all-reduce
    assert received("ddp", accumulate=64) == pytest.approx(2 * 3 / 4 * 4 * trained, rel=1e-3)  # in time all are used
    assert received("deepspeed 0") == received("deepspeed 1") == received("deepspeed 2") == 2 * 3 / 4 * 4 * trained
    assert received("deepspeed 2", accumulate=3) == 4 * 3 / 4 * 4 * trained  # reduces every micro-batch
    assert received("fsdp2") == pytest.approx(4 * 3 / 4 * 4 * micro.used)
    assert task("ddp", 1, 1, block, micro).shuffle() == (0, 0)
    maps = 8 * 8 * math.prod(block.input_shape) * 4  # views x images x values x bytes
    assert task("ddp", 4, 2, block, micro).shuffle()[0] == 2 * 3 / 4 * (maps + 8 * 8 * 8 * 4)


def test_synchronised_batch_norms_are_counted(tiny):
    """A mean and a variance for every norm that runs; for the online network both once more in the backward pass."""
    winners, norms = tiny.winners[:3], Counter()
    found = counts("train.sync_batch_norm=true").micro(3, winners, 3, 8)
    online, target, predictor = networks(tiny, config())
    for name, network in (("online", online), ("target", target), ("online", predictor)):
        for module in network.train().modules():
            if isinstance(module, GroupedBatchNorm):
                module.register_forward_hook(lambda *_, name=name: norms.update([name]))
    x = torch.zeros(8, *tiny.input_shape(3, winners))
    items = [Item(path, x.clone()) for path in sample_paths(tiny.space, 3, winners, 0, 6) for _ in "AB"]
    predictor(torch.cat(online.embed(3, items)), len(items)), target.embed(3, items)
    assert found.averages[0] == 4 * norms["online"] + 2 * norms["target"]


def test_memory_of_the_engines(tiny):
    block, micro = tiny.block(1), tiny.micro(1, tiny.winners[:1], 3, 8)
    trained, followers = 4 * (block.parameters + block.predictor), 4 * block.followers

    def held(engine, shards=4, accumulate=1, peak=10**9):
        return memory([task(engine, shards, accumulate, block, micro)], [peak], 1000, 3 * 32 * 32 * 4, 0, 500)

    plain = held("ddp", shards=1)
    assert (plain["weights"], plain["gradients"], plain["optimizer"]) == (4000, trained, trained)
    sharded = held("fsdp2")
    assert sharded["weights"] == 4000 + (trained + followers) / 4
    assert sharded["gradients"] == sharded["optimizer"] == trained / 4
    assert trained / 4 < held("fsdp2", accumulate=2)["gradients"] <= trained  # whole while they accumulate
    zero = held("deepspeed 2")
    assert (zero["weights"], zero["gradients"], zero["optimizer"]) == (4000 + trained / 4, trained / 4, trained / 4)
    assert zero["activations"] == 10**9 + 500
    for pieces in (plain, sharded, zero):
        assert pieces["total"] == sum(size for name, size in pieces.items() if name != "total")
    assert held("ddp", peak=1)["activations"] == trained


@pytest.mark.parametrize(
    ("gpus", "schedule", "expected"),
    [
        (1, "sequential", {"shards": 1, "micro_batch": 8, "accumulate": 8, "change": None}),
        (8, "sequential", {"shards": 8, "micro_batch": 8, "accumulate": 1, "change": None}),
        (16, "sequential", {"shards": 16, "micro_batch": 4, "accumulate": 1, "change": "train.micro_batch=4"}),
        (3, "sequential", {"reason": "64 images cannot be divided over 3 ranks"}),
        (64, "sequential", {"reason": "64 images over 64 ranks leave 1 a rank; batch norm needs two"}),
        (2, "block_parallel", {"shards": 1, "rows": [range(0, 2), range(2, 4)], "accumulate": 8}),
        (16, "block_parallel", {"shards": 4, "rows": [range(b, b + 1) for b in range(4)], "accumulate": 2}),
        (6, "block_parallel", {"reason": "6 ranks cannot be divided over 4 blocks; start 4 or 8"}),
    ],
)
def test_which_numbers_of_gpus_can_run(gpus, schedule, expected):
    cut = split(config(), 4, gpus, schedule, "ddp")
    assert {key: cut.get(key) for key in expected} == expected
    assert ("reason" in cut) == ("reason" in expected)


def search_of(tiny, rates, *more):
    return plan._Search(config(*more), tiny, rates, 256, 24)


def test_hours_halve_but_for_communication(tiny):
    fast = Rates(1e12, 1e12, 1e12, math.inf, math.inf, 80 * GIB)  # messages still take their latency
    slow = replace(fast, link=1e9, network=1e8)
    for rates in (fast, slow):
        search = search_of(tiny, rates, "rating.every_epochs=0", "data.val_images=16")
        one, two, four = (search.row(n, "sequential", "ddp")["hours"] for n in (1, 2, 4))
        assert one["shuffle"] == one["gradients"] == 0
        for fewer, more in ((one, two), (two, four)):
            assert more["work"] == pytest.approx(fewer["work"] / 2)
            assert (
                more["total"]
                <= fewer["total"] / 2 + more["shuffle"] + more["gradients"] + more["update"] + more["rating"]
            )
        assert two["total"] == pytest.approx(sum(v for name, v in two.items() if name != "total"))
    assert search.row(2, "sequential", "ddp")["hours"]["shuffle"] > 0


def test_the_slowest_row_sets_the_pace(tiny):
    search = search_of(tiny, gpu_rates("h100"))
    row = search.row(4, "block_parallel", "ddp")
    works = [search.work_seconds(block, 8, "block_parallel") * 8 for block in range(4)]
    update = [search.task(b, "ddp", {"shards": 1, "accumulate": 8, "micro_batch": 8}).update_bytes() for b in range(4)]
    steps = [w + u / search.rates.memory for w, u in zip(works, update, strict=True)]
    assert row["step_s"] == pytest.approx(max(steps))
    fill = (8 // 4 + 1 + 1) * 3 * max(steps) / 8  # two checkpoints, a rating in mid-stage, the end; three rows to fill
    assert row["hours"]["waiting"] * 3600 == pytest.approx(fill)
    assert row["idle"] == pytest.approx(1 - 8 * sum(steps) / 4 / (8 * max(steps) + fill))
    together = search.row(1, "block_parallel", "ddp")
    assert together["step_s"] == pytest.approx(sum(steps)) and together["idle"] == 0


def test_a_stream_that_is_slower_than_the_work_sets_the_pace(tiny):
    search = search_of(tiny, replace(gpu_rates("h100"), link=1e3))
    row = search.row(4, "block_parallel", "ddp")
    sizes = [8 * 64 * search.all_blocks[b].input_bytes for b in (1, 2, 3)]
    assert row["step_s"] == pytest.approx(max(sizes) / 1e3)


def test_ratings_are_divided_by_batches(tiny):
    search = search_of(tiny, gpu_rates("h100"), "data.val_images=24")  # two batches of 16 and 8
    one, two, many = (search.rating_seconds(1, ranks) for ranks in (1, 2, 64))
    assert many == two < one  # no more ranks than batches; all ranks calibrate
    calibration, batch = 16, 2 * 16
    assert one / two == pytest.approx((calibration + 2 * batch) / (calibration + batch))


def test_a_measured_step_scales_the_work(tiny, tmp_path):
    search = search_of(tiny, gpu_rates("h100"))
    before = [search.work_seconds(b, 8, "sequential") for b in range(4)]
    step = {
        "space": "hytra",
        "width": 0.0625,
        "image_size": 32,
        "precision": "fp32",
        "block": 1,
        "batch": 16,
        "micro_batch": 8,
        "median_step_s": 2 * 3 * before[1],
    }
    file = tmp_path / "step.json"
    file.write_text(json.dumps(step))
    search.measure([plan._read_step(file, config(), 4)])
    assert [search.work_seconds(b, 8, "sequential") / t for b, t in enumerate(before)] == pytest.approx([3.0] * 4)
    for wrong in ({"block": 7}, {"median_step_s": None}, {"precision": "bf16"}):
        file.write_text(json.dumps({**step, **wrong}))
        with pytest.raises(ConfigError, match="^measured: "):
            plan._read_step(file, config(), 4)


def test_launching_can_take_longer_than_the_work():
    rows = np.array([[1e9, 0, 1e3]] * 10)
    rates = Rates(1e12, 1e12, 1e9, 1, 1, 1)
    assert rates.seconds(rows, 0) == pytest.approx(10e-3)
    assert rates.seconds(rows / 1e6, 0) == pytest.approx(10 * HOST_SECONDS)


def run_cli(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        cli.main(["plan", *arguments])
    return end.value.code, capsys.readouterr()


def options(tmp_path, *more):
    file = tmp_path / "config.json"
    file.write_text("{}")
    return ["--config", str(file), *(f"--set={value}" for value in TINY), *more]


def test_the_command(tiny, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "Workload", lambda config, space, winners: tiny if winners == tiny.winners else None)
    out = tmp_path / "plan.json"
    code, said = run_cli(
        capsys,
        *options(
            tmp_path,
            "--gpus",
            "8,1,3",
            "--architecture",
            "5433|3230|0010|0000",
            "--train-images",
            "256",
            "--json",
            str(out),
        ),
    )
    assert code == 0
    result = json.loads(out.read_text())
    assert Counter(row["gpus"] for row in result["rows"]) == {1: 7, 3: 7, 8: 7}
    cannot = [row for row in result["rows"] if not row["runs"]]
    assert {(row["gpus"], row["schedule"]) for row in cannot} == {(3, "sequential")}
    assert "cannot run: 64" in said.out and "divided over 3" in said.out, "a note folds in its column"
    for space in (80, 120, 250):
        text = tables.lines(result, space)
        assert max(map(len, text)) <= space and not any("…" in line for line in text)
    assert "Assumptions:" in said.out and "nothing is measured" in said.out and "NVIDIA H100 SXM5" in said.out
    assert [block["winner"] for block in result["blocks"]] == WINNERS["hytra"]
    alone = next(row for row in result["rows"] if row["runs"] and row["gpus"] == 1)
    assert alone["scaling"] == 1 and alone["fits"] and alone["memory_gib"]["total"] < 3


@pytest.mark.quick
@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["--gpu", "gtx480"], "--gpu: there is no 'gtx480'; choose v100, a100-40, a100, h100"),
        (["--gpus", "0"], "--gpus: '0' is not a list of positive whole numbers"),
        (["--gpus", "4,-1"], "--gpus: '4,-1' is not a list"),
        (["--gpus", "many"], "--gpus: 'many' is not a list"),
        (["--tflops", "-3"], "--tflops: is -3; give a positive number"),
        (["--memory", "0"], "--memory: is 0; give a positive number"),
        (["--kernel-rates", "none.json"], "--kernel-rates: none.json holds no measured step"),
        (["--architecture", "5433"], "--architecture: '5433' has 1 paths"),
        (["--train-images", "10"], "--train-images: 10 are fewer than an epoch takes"),
        (["--gpu", "v100", "--set", "train.precision=bf16"], "train.precision: v100 has no bfloat16"),
        (
            ["--set", "engine.name=deepspeed", "--set", "engine.deepspeed={zero_optimization: {stage: 3}}"],
            "engine.deepspeed.zero_optimization.stage: ZeRO 3",
        ),
        (["--json", "/nowhere/plan.json"], "--json: cannot write"),
    ],
)
def test_mistakes_are_one_line(capsys, tmp_path, more, line):
    code, said = run_cli(capsys, *options(tmp_path, *more))
    assert code == 2 and said.err.startswith(f"error: {line}") and said.err.count("\n") == 1


def test_every_gpu_of_the_table_can_be_planned_for():
    for name, sheet in GPUS.items():
        found = gpu_rates(name)
        assert found.half >= found.full > 0 and sheet.memory > sheet.link >= sheet.network / NODE
    ours = gpu_rates("rtx4090", Given(tflops=100, gbps=900, memory=48))
    assert (ours.half, ours.full, ours.memory, ours.capacity) == (1e14, 5e13, 9e11, 48 * GIB)
    assert gpu_rates("rtx4090").capacity == 24 * GIB


def test_help_lists_the_gpus():
    assert GPUS_HELP.split(" | ") == list(GPUS)


def test_instance_discrimination_can_be_rated():
    """It trains no target network, whose forward pass else says how long a multiply-add takes."""
    search = search_of(counts("train.objective=instance"), gpu_rates("h100"))
    assert 0 < search.rating_seconds(0, 1) < math.inf


def test_ctrl_c_is_one_line(tmp_path):
    program = (
        "import os, signal, sys\n"
        "from bossnas import cli\n"
        "from bossnas.cli import planning\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "planning.load = lambda *_: os.kill(os.getpid(), signal.SIGINT)\n"
        "cli.main(['plan', '--config', sys.argv[1]])\n"
    )
    ended = subprocess.run([sys.executable, "-c", program, "none.json"], capture_output=True, text=True, timeout=HANG)
    assert (ended.returncode, ended.stdout) == (130, "")
    assert ended.stderr == "\nplan: interrupted; nothing is written\n"
