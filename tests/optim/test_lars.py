"""LARS against a plain loop written out from METHOD 3.5; groups, schedules, moving average."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bossnas.distributed.engines.protocol import LossScale
from bossnas.optim.base import follow_where
from bossnas.optim.cosine import ema_momentum, learning_rate
from bossnas.optim.groups import ema_update, parameter_groups
from bossnas.optim.lars import LARS

pytestmark = pytest.mark.quick


class OwnNorm(nn.Module):
    is_norm = True

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(2, 5) + 0.5)
        self.bias = nn.Parameter(torch.zeros(2, 5))


def net():
    torch.manual_seed(1)
    module = nn.Sequential(
        nn.Conv2d(3, 5, 3, bias=True),
        nn.BatchNorm2d(5),
        nn.Linear(5, 4),
        nn.LayerNorm(4),
        nn.GroupNorm(2, 4),
        OwnNorm(),
        nn.Linear(4, 4, bias=False),
    )
    module[2].weight.requires_grad_(False)
    return module


def plain_lars(weights, grads, buffers, excluded, lr, momentum, wd, trust):
    """One step on lists of float64 tensors, in place, one parameter after the other."""
    for w, g, buf, out in zip(weights, grads, buffers, excluded, strict=True):
        if g is None or not g.any():
            continue
        decay = 0.0 if out else wd
        update = g + decay * w
        if not out:
            update = update * trust * w.norm() / (g.norm() + wd * w.norm())
        buf.mul_(momentum).add_(lr * update)
        w.sub_(buf)


def test_groups_by_module_type():
    groups = parameter_groups(net())
    excluded = {group["name"]: group["excluded"] for group in groups}
    assert excluded == {
        "0.weight": False,
        "0.bias": True,
        "1.weight": True,
        "1.bias": True,
        "2.bias": True,
        "3.weight": True,
        "3.bias": True,
        "4.weight": True,
        "4.bias": True,
        "5.weight": True,
        "5.bias": True,
        "6.weight": False,
    }
    assert all(len(group["params"]) == 1 for group in groups)


def test_shared_parameter_is_one_group():
    module = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    module[1].weight = module[0].weight
    assert [group["name"] for group in parameter_groups(module)] == ["0.weight", "0.bias", "1.bias"]


def test_lars_is_the_written_out_loop():
    module = net().double()
    groups = parameter_groups(module)
    parameters = [group["params"][0] for group in groups]
    excluded = [group["excluded"] for group in groups]
    settings = {"momentum": 0.9, "wd": 0.05, "trust": 0.01}
    optimizer = LARS(groups, lr=1.0, momentum=0.9, weight_decay=0.05, trust=0.01)
    weights = [p.detach().clone() for p in parameters]
    buffers = [torch.zeros_like(w) for w in weights]
    generator = torch.Generator().manual_seed(3)
    for step in range(6):
        grads = []
        for i, p in enumerate(parameters):
            g = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            kind = (step + i) % 4  # 0: no gradient, 1: all zero, else a usual one
            grads.append(None if kind == 0 else g * 0 if kind == 1 else g)
            p.grad = None if grads[-1] is None else grads[-1].clone()
        lr = 1.0 / (step + 1)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        plain_lars(weights, grads, buffers, excluded, lr, **settings)
        for p, w in zip(parameters, weights, strict=True):
            torch.testing.assert_close(p.detach(), w, rtol=1e-13, atol=1e-14)


def test_skipped_parameters_keep_weight_and_momentum():
    w = nn.Parameter(torch.ones(4))
    optimizer = LARS([{"params": [w], "name": "w", "excluded": False}], lr=0.5, weight_decay=0.1)
    w.grad = torch.full((4,), 2.0)
    optimizer.step()
    weight, momentum = w.detach().clone(), optimizer.full_state()["w"].clone()
    assert momentum.abs().max() > 0
    for gradient in (None, torch.zeros(4)):
        w.grad = gradient
        optimizer.step()
        assert torch.equal(w, weight) and torch.equal(optimizer.full_state()["w"], momentum)


def test_zero_initialised_norm_weight_moves():
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    nn.init.zeros_(module[1].weight)
    groups = parameter_groups(module)
    optimizer = LARS(groups, lr=0.1)
    module(torch.randn(8, 3)).sum().backward()
    module[1].weight.grad = torch.ones(3)
    optimizer.step()
    assert torch.allclose(module[1].weight, torch.full((3,), -0.1))
    module[1].weight.grad = torch.ones(3)

    frozen = nn.Parameter(torch.zeros(3))  # what the original does to it: |w| = 0 and not excluded
    original = LARS([{"params": [frozen], "name": "w", "excluded": False}], lr=0.1)
    frozen.grad = torch.ones(3)
    original.step()
    assert torch.equal(frozen, torch.zeros(3))


def test_tiny_gradients_are_not_taken_for_unused():
    w = nn.Parameter(torch.ones(2))
    optimizer = LARS([{"params": [w], "name": "w", "excluded": False}], lr=1.0, trust=0.1)
    w.grad = torch.full((2,), 1e-18)
    optimizer.step()
    assert not torch.equal(w, torch.ones(2))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(value):
    module = nn.Linear(2, 2)
    followers = nn.Linear(2, 2)
    optimizer = LARS(parameter_groups(module, followers), lr=1.0)
    before = [t.detach().clone() for t in (*module.parameters(), *followers.parameters())]
    for bad in (value, 0.5):
        module.weight.grad = torch.full((2, 2), 0.5)
        module.bias.grad = torch.tensor([bad, 0.5])
        optimizer.prepare(1.0, ema=0.5)
        optimizer.step()
        same = [torch.equal(a, b) for a, b in zip(before, (*module.parameters(), *followers.parameters()), strict=True)]
        assert optimizer.applied == (bad == 0.5) and same == [not optimizer.applied] * 4
        assert optimizer.applied or not any(buffer.any() for buffer in optimizer.full_state().values())


def test_loss_scale_and_clipping():
    def trained(factor, clip, loss_scale):
        torch.manual_seed(0)
        module = nn.Linear(3, 2)
        optimizer = LARS(parameter_groups(module), lr=1.0, clip=clip)
        module.weight.grad, module.bias.grad = torch.ones(2, 3) * factor, torch.ones(2) * factor
        optimizer.prepare(0.1, loss_scale=loss_scale)
        optimizer.step()
        return module.bias.detach()

    torch.testing.assert_close(trained(8.0, 0.0, 8.0), trained(1.0, 0.0, 1.0))
    norm = 8**0.5
    torch.testing.assert_close(trained(8.0, norm / 2, 8.0), trained(0.5, 0.0, 1.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(trained(8.0, 2 * norm, 8.0), trained(1.0, 0.0, 1.0))


def test_state_exists_before_the_first_step_and_round_trips():
    module = net()
    optimizer = LARS(parameter_groups(module), lr=0.1)
    state = optimizer.full_state()
    assert set(state) == {name for name, p in module.named_parameters() if p.requires_grad}
    filled = {name: torch.randn_like(t) for name, t in state.items()}
    optimizer.load_full_state(filled)
    assert all(torch.equal(optimizer.full_state()[name], t) for name, t in filled.items())
    with pytest.raises(ValueError, match="6.weight.*another model"):
        optimizer.load_full_state({name: t for name, t in filled.items() if name != "6.weight"})
    with pytest.raises(ValueError, match="another model"):
        optimizer.load_full_state(filled | {"extra": torch.zeros(1)})


def test_sharded_step_is_the_plain_step():
    """One flat share (one rank), as ZeRO makes it, gives the weights of one tensor per parameter."""
    plain, flat = net(), net()
    settings = {"lr": 0.7, "weight_decay": 0.01, "trust": 0.02}
    reference = LARS(parameter_groups(plain), **settings)
    sharded = LARS(parameter_groups(flat), sharded=True, **settings)
    parts = [p for group in parameter_groups(flat) for p in group["params"]]
    share = torch.cat([p.detach().flatten() for p in parts] + [torch.zeros(3)]).requires_grad_()  # padded at the end
    sharded.param_groups[0]["params"] = [share]
    sharded.create_state()
    generator = torch.Generator().manual_seed(0)
    for step in range(3):
        grads = []
        for i, group in enumerate(reference.param_groups):
            (p,) = group["params"]
            p.grad = torch.randn(p.shape, generator=generator) * ((i + step) % 3 > 0)
            grads.append(p.grad.flatten())
        share.grad = torch.cat([*grads, torch.zeros(3)])
        reference.step()
        sharded.step()
        whole = torch.cat([group["params"][0].detach().flatten() for group in reference.param_groups])
        torch.testing.assert_close(share[:-3].detach(), whole, rtol=1e-6, atol=1e-7)
    for name, momentum in reference.full_state().items():
        torch.testing.assert_close(sharded.full_state()[name], momentum, rtol=1e-5, atol=1e-7)


def test_no_trainable_parameter_is_an_error():
    with pytest.raises(ValueError, match="no trainable"):
        LARS(parameter_groups(nn.ReLU()), lr=1.0)


def test_learning_rate():
    assert learning_rate(4.8, 0, 6, 0, 100) == pytest.approx(4.8e-4)
    assert learning_rate(4.8, 0, 6, 50, 100) == pytest.approx(4.8 * (1 - 0.5 * (1 - 1e-4)))
    assert learning_rate(4.8, 0, 6, 100, 100) == 4.8
    assert learning_rate(4.8, 3, 6, 300, 100) == pytest.approx(2.4)
    assert learning_rate(4.8, 5, 6, 599, 100) == pytest.approx(4.8 * (1 + math.cos(math.pi * 5 / 6)) / 2)
    assert learning_rate(1.0, 0, 1, 0, 0) == 1.0


def test_ema():
    assert ema_momentum(0, 100) == pytest.approx(0.99)
    assert ema_momentum(50, 100) == pytest.approx(0.995)
    assert ema_momentum(100, 100) == pytest.approx(1.0)
    target, online = [torch.zeros(3), torch.ones(2)], [torch.ones(3), torch.full((2,), 3.0)]
    ema_update(target, online, 0.75)
    assert torch.allclose(target[0], torch.full((3,), 0.25)) and torch.allclose(target[1], torch.full((2,), 1.5))
    with pytest.raises(ValueError, match="differ"):
        ema_update(target, online[:1], 0.9)


def test_followers_move_only_where_a_step_was_applied():
    """By what a GPU runs: the flag stays there."""
    weights = [torch.randn(3, 2), torch.randn(4)]
    targets = [torch.randn(3, 2), torch.randn(4)]
    for applied in (False, True):
        moved, expected = ([t.clone() for t in targets] for _ in range(2))
        follow_where(torch.tensor(applied), moved, weights, 0.9)
        if applied:
            ema_update(expected, weights, 0.9)
        for a, b in zip(moved, expected, strict=True):
            assert torch.allclose(a, b) and torch.equal(a, b) >= (not applied)
    empty = [torch.empty(2, device="meta") for _ in range(3)]
    follow_where(empty[0][0] > 0, empty[1:2], empty[2:], 0.9)  # on tensors without data whatever waits fails


def test_a_loss_scale_stays_on_the_device():
    """On tensors without data whatever reads a number fails."""
    scale = LossScale("fp16")
    optimizer = SimpleNamespace(flag=torch.ones((), device="meta", dtype=torch.bool), prepare=lambda *_: None)
    assert scale.scaled(torch.ones((), device="meta")).is_meta
    verdict = scale.run(optimizer, lambda: None, 0.1, 0.9)
    assert verdict.applied.is_meta and verdict.scale.is_meta and verdict.next_scale.is_meta
