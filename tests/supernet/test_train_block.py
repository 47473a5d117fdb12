from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bossnas import spaces
from bossnas.config.search import TrainConfig
from bossnas.distributed.engines.ddp import DDPEngine
from bossnas.errors import ConfigError
from bossnas.optim.groups import parameter_groups
from bossnas.optim.lars import LARS
from bossnas.spaces.ops import Attention
from bossnas.supernet import heads, losses, memory
from bossnas.supernet.supernet import Item, Networks, Supernet
from bossnas.supernet.train_block import RunState, Training, sample_paths, train_block


def setup(name="hytra", seed=0, block=0, winners=(), **settings):
    torch.manual_seed(seed)
    space = spaces.make(name, width=0.125, image_size=32, restricted=True, split="cifar10")
    online = Supernet(space, 32, 16)
    predictor = heads.predictor(32, 16)
    target = copy.deepcopy(online).requires_grad_(False)
    for b in range(block):
        online.freeze(b)
        target.freeze(b)
    values = {"batch": 8, "micro_batch": 8, "epochs": 1, "lr": 1.0, "warmup_epochs": 0, **settings}
    config = TrainConfig(**values)
    run = SimpleNamespace(
        space=space,
        online=online,
        target=target,
        predictor=predictor,
        config=config,
        state=RunState(block=block, winners=list(winners)),
    )
    run.trained = nn.ModuleDict({**online.part(block), "predictor": predictor})
    return run


def train(run, steps, accumulate=1, data_seed=1, n=8):
    engine = DDPEngine(accumulate, "fp32")
    engine.wrap(
        run.trained,
        run.target.part(run.state.block),
        lambda module, followers, sharded: LARS(parameter_groups(module, followers), run.config.lr),
    )
    generator = torch.Generator().manual_seed(data_seed)
    batches = iter(
        [
            [torch.randn(n, 3, 32, 32, generator=generator) for _ in range(2 * run.space.view_pairs)]
            for _ in range(steps * accumulate * run.config.epochs)
        ]
    )

    def inputs():
        for views in batches:
            yield [run.target.features(run.state.winners, x) for x in views]

    results = train_block(
        Networks(run.online, run.target, run.predictor),
        run.space,
        engine,
        inputs(),
        run.state,
        Training(run.config, steps, accumulate),
        run.state.winners,
    )
    return [step for step in results if step is not None]


def snapshot(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


@pytest.mark.parametrize("name", ["hytra", "mbconv", "nats"])
def test_every_sampled_candidate_moves_and_no_other(name):
    """The original's attention candidates never move: their last gamma starts at 0 and LARS scales by its norm."""
    run = setup(name)
    before = snapshot(run.online)
    train(run, steps=3)
    used = [set() for _ in range(run.space.layers(0))]
    for micro in range(3):
        for path in sample_paths(run.space, 0, [], 0, micro):
            for layer, choice in enumerate(path):
                used[layer].add(choice)
    moved = {k for k, v in run.online.state_dict().items() if not torch.equal(v, before[k])}
    if name == "nats":  # all widths share the weights; each has norms of its own
        for layer, choices in enumerate(used):
            cell = f"blocks.0.{layer}." + ("cell.ops.01" if layer == 0 else "first")
            assert choices == {i for i in range(8) if f"{cell}.norms.{i}.weight" in moved}
        return
    for layer, choices in enumerate(used):
        for choice in range(len(run.space.candidates(0))):
            prefix = f"blocks.0.{layer}.candidates.{choice}."
            names = {k for k in before if k.startswith(prefix) and not k.endswith(("mean", "var"))}
            changed = names & moved
            if choice not in choices:
                assert not changed, f"{prefix} was on no path"
                continue
            assert changed
            if name == "hytra":
                body = run.online.blocks[0][layer].candidates[choice].body
                assert f"{prefix}body.3.weight" in moved, "the last gamma is stuck at zero"
                if (
                    isinstance(body[0], Attention)
                    and sum(choice == p[layer] for m in range(3) for p in sample_paths(run.space, 0, [], 0, m)) > 1
                ):
                    assert f"{prefix}body.0.qkv.weight" in moved, "attention weights did not train"
    assert name != "hytra" or any(".qkv." in k for k in moved), "no attention weight moved at all"
    assert not any(k.startswith(("blocks.1", "projectors.1")) for k in moved), "later blocks are not trained"


def test_instance_loss_is_cross_entropy_over_the_images_in_both_directions():
    a, b = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    found = losses.instance_loss(list(a), list(b), 0.3)
    for p in range(3):
        table = F.normalize(a[p]) @ F.normalize(b[p]).T / 0.3
        right = torch.arange(5)
        expected = (F.cross_entropy(table, right) + F.cross_entropy(table.T, right)) / 2
        assert found[p].item() == pytest.approx(expected.item(), abs=1e-12)
    assert losses.instance_loss([torch.ones(4, 2)], [torch.ones(4, 2)], 0.1).item() == pytest.approx(math.log(4))


def test_objectives_and_the_number_of_paths():
    """Instance discrimination leaves the predictor alone; both losses add up; fewer paths train fewer candidates."""
    moved = {}
    for objective in ("bootstrap", "instance", "both"):
        run = setup("nats", objective=objective)
        before = snapshot(run.predictor)
        (step,) = train(run, steps=1)
        changed = [k for k, v in run.predictor.state_dict().items() if not torch.equal(v, before[k])]
        assert bool(changed) == (objective != "instance")
        moved[objective] = step.loss
    assert moved["both"] == pytest.approx(moved["bootstrap"] + moved["instance"], abs=1e-5)
    assert 0 < moved["instance"] < 2 * math.log(8) and -4 <= moved["bootstrap"] <= 4
    run = setup("nats", paths=2)
    train(run, steps=1)
    cell = run.online.blocks[0][1].first.norms
    fresh = setup("nats").online.blocks[0][1].first.norms
    used = {i for i in range(8) if not torch.equal(cell[i].weight, fresh[i].weight)}
    assert used == {path[1] for path in sample_paths(run.space, 0, [], 0, 0)[:2]}


def test_loss_and_gradient_follow_the_method():
    """One step against METHOD 3.3 written out: sum over paths, ensemble targets, mean logged."""
    run = setup(lr=1e-3)
    twin = copy.deepcopy(run)
    generator = torch.Generator().manual_seed(1)
    views = [torch.randn(8, 3, 32, 32, generator=generator) for _ in range(8)]
    paths = sample_paths(run.space, 0, [], 0, 0)
    for net in (twin.online, twin.target):
        net.train()

    def unit(t):
        return t / t.norm(dim=1, keepdim=True)

    with torch.no_grad():
        T = [twin.target.embed(0, [Item(p, v)])[0] for j, p in enumerate(paths) for v in (views[j], views[4 + j])]
        t_a, t_b = (sum(unit(t) for t in T[k::2]) / 4 for k in (0, 1))
    found_losses = []
    for j, path in enumerate(paths):
        a, b = (twin.predictor(twin.online.embed(0, [Item(path, views[v])])[0]) for v in (j, 4 + j))
        found_losses.append((-2 * (unit(a) * unit(t_b)).sum(1) - 2 * (unit(b) * unit(t_a)).sum(1)).mean())
    sum(found_losses).backward()
    truth = {k: p.grad for k, p in twin.trained.named_parameters() if p.grad is not None}

    seen = {}
    wrapped = run.trained
    step = DDPEngine.begin_step
    try:
        DDPEngine.begin_step = lambda self, lr, ema: (
            seen.update({k: p.grad.clone() for k, p in wrapped.named_parameters() if p.grad is not None})
            or step(self, lr, ema)
        )
        report = train(run, steps=1)
    finally:
        DDPEngine.begin_step = step
    assert report[0].loss == pytest.approx(sum(found_losses).item() / 4, abs=1e-5)
    assert seen.keys() == truth.keys()
    for key, value in truth.items():
        torch.testing.assert_close(seen[key], value, rtol=1e-3, atol=2e-5, msg=key)


def test_paths_per_pass_is_only_a_memory_knob():
    results = []
    for limit in (None, 1, 3):
        run = setup(paths_per_pass=limit)
        found_losses = [s.loss for s in train(run, steps=2, accumulate=2)]
        results.append((found_losses, snapshot(run.online)))
    for found_losses, weights in results[1:]:
        assert found_losses == pytest.approx(results[0][0], abs=1e-4)
        for key, value in weights.items():
            torch.testing.assert_close(value, results[0][1][key], rtol=1e-3, atol=1e-3)


def test_a_cpu_takes_as_many_paths_at_once_as_a_limit_allows(monkeypatch):
    """The same training, in more passes; as `paths_per_pass` would ask for."""
    passes = []
    micro = DDPEngine.micro

    def counted(engine, loss, last):
        passes.append(last)
        micro(engine, loss, last)

    monkeypatch.setattr(DDPEngine, "micro", counted)
    results = {}
    for limit, calls in ((memory.KEPT_BYTES, 1), (1, 4)):
        monkeypatch.setattr(memory, "KEPT_BYTES", limit)
        run = setup()
        passes.clear()
        found_losses = [s.loss for s in train(run, steps=2)]
        assert passes == [*[False] * (calls - 1), True] * 2
        results[calls] = found_losses, snapshot(run.online)
    run = setup(paths_per_pass=1)
    assert [s.loss for s in train(run, steps=2)] == results[4][0]
    for key, value in snapshot(run.online).items():
        assert torch.equal(value, results[4][1][key])
        torch.testing.assert_close(value, results[1][1][key], rtol=1e-3, atol=1e-3)


def test_the_prefix_is_frozen_and_the_target_follows():
    run = setup(block=1, winners=[(5, 4, 3, 3)])
    online, target = snapshot(run.online), snapshot(run.target)
    train(run, steps=2)
    for net, before in ((run.online, online), (run.target, target)):
        for key, value in net.state_dict().items():
            same = torch.equal(value, before[key])
            if key.startswith(("stem", "blocks.0", "projectors.0", "blocks.2")):
                assert same, f"{key} is not part of block 1"
    moved = [k for k in target if not torch.equal(target[k], run.target.state_dict()[k])]
    assert any(k.startswith("blocks.1") for k in moved) and any(k.startswith("projectors.1") for k in moved)


def test_the_target_follows_and_schedules_count_micro_batches():
    run = setup("nats", warmup_epochs=0.5, epochs=2, ema=0.9)
    before = snapshot(run.target.part(0))
    first = train(run, steps=4, accumulate=2)[0]  # two epochs of four steps: 16 micro-batches, a warm-up of 4
    assert first.lr == pytest.approx(1 - (1 - 1 / 4) * (1 - 1e-4))  # at the update's last micro-batch, number 1
    m = 1 - 0.1 * (math.cos(math.pi * 1 / 16) + 1) / 2
    assert first.ema_momentum == pytest.approx(m)
    run = setup("nats", warmup_epochs=0, epochs=1, ema=0.9)
    train(run, steps=1)
    m = 1 - 0.1  # the cosine starts at 1
    for name, value in run.target.part(0).named_parameters():
        online = run.online.part(0).get_parameter(name)
        torch.testing.assert_close(value, m * before[name] + (1 - m) * online, msg=name)


def test_the_loss_falls():
    run = setup("nats", lr=0.5, epochs=1)
    views = [torch.randn(16, 3, 32, 32) for _ in range(2)]
    engine = DDPEngine(1, "fp32")
    engine.wrap(
        run.trained,
        run.target.part(run.state.block),
        lambda module, followers, sharded: LARS(parameter_groups(module, followers), run.config.lr),
    )
    steps = list(
        train_block(
            Networks(run.online, run.target, run.predictor),
            run.space,
            engine,
            iter([views] * 6),
            run.state,
            Training(run.config, steps_per_epoch=6),
            [],
        )
    )
    assert steps[-1].loss < steps[0].loss - 0.5
    assert all(-4 <= s.loss <= 4 and s.spread > 0.1 for s in steps)
    assert [s.ends_epoch for s in steps] == [False] * 5 + [True]


@pytest.mark.quick
def test_paths_are_a_function_of_the_position():
    run = setup()
    assert sample_paths(run.space, 0, [], 0, 7) == sample_paths(run.space, 0, [], 0, 7)
    assert len({tuple(sample_paths(run.space, 0, [], 0, m)) for m in range(20)}) == 20
    assert sample_paths(run.space, 0, [], 0, 7) != sample_paths(run.space, 0, [], 1, 7)


@pytest.mark.quick
def test_a_loss_that_is_not_finite_stops_the_run():
    run = setup("nats", max_bad_steps=1)
    with torch.no_grad():
        run.predictor[0].weight.fill_(float("nan"))
    before = snapshot(run.trained)
    (step,) = train(run, steps=1)
    assert step.outcome == "bad" and math.isnan(step.loss) and run.state.bad_steps == 1
    after = snapshot(run.trained)
    assert all(torch.equal(after[k], v) or k == "predictor.0.weight" for k, v in before.items()), "the step is skipped"
    run.state.step = 0
    with pytest.raises(ConfigError, match="train.lr: 2 steps of block 0 had a gradient that is not finite"):
        train(run, steps=1)


def test_losses_and_spread():
    a = torch.randn(5, 7, dtype=torch.float64)
    torch.testing.assert_close(losses.loss(a, 3 * a), torch.full((5,), -2.0, dtype=torch.float64))
    torch.testing.assert_close(losses.path_loss(a, a, -a, -a), torch.full((5,), 4.0, dtype=torch.float64))
    b = torch.randn(5, 7, dtype=torch.float64)
    target = (F.normalize(a) + F.normalize(b)) / 2  # the mean of unit vectors, itself shorter
    torch.testing.assert_close(
        losses.ensemble_loss([b, a, a], [a, b]).double(),
        torch.stack([losses.loss(p, target).mean() for p in (b, a, a)]),
    )
    assert losses.spread(torch.ones(6, 4)) == 0
    assert 0.9 < losses.spread(torch.randn(4000, 16)) < 1.1
