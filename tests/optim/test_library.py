"""The optimizers of a retraining: against torch on the whole batch, on every engine, and what runs them."""

from __future__ import annotations

import importlib.util
import json
import sys
from types import ModuleType

import engine_worker as worker
import pytest
import ranks
import timm.optim
import torch
from torch import nn

from bossnas.distributed.engines import make
from bossnas.errors import ConfigError
from bossnas.optim.groups import parameter_groups
from bossnas.optim.library import _algorithm, check_optimizer, choose_optimizer

LIMIT = (
    3e-6  # float32 sums in another order; with eps 0.1 an update is at most lr/eps = 1 times as far off as its gradient
)
CPU = torch.device("cpu")
KINDS = {
    "ddp": {"engine": "ddp"},
    "fsdp2": {"engine": "fsdp2"},
    **{
        f"zero{stage}": {"engine": "deepspeed", "section": {"zero_optimization": {"stage": stage}}}
        for stage in (0, 1, 2)
    },
}
GOES_ON = {"ddp": "fsdp2", "fsdp2": "zero1", "zero0": "ddp", "zero1": "zero2", "zero2": "fsdp2"}  # from this kind


def reference(kind, steps, clip=0.0):
    """Updates on the whole batch by a library's optimizer with two groups, and the average by hand."""
    module = worker.build()
    target = worker.target_of(module)
    found = parameter_groups(module)
    groups = [
        {
            "params": [g["params"][0] for g in found if g["excluded"] == excluded],
            "weight_decay": 0.0 if excluded else 0.1,
        }
        for excluded in (False, True)
    ]
    settings = {"lr": 1.0, "eps": 0.1, "betas": (0.9, 0.95)}
    optimizer = {
        "adamw": lambda: torch.optim.AdamW(groups, foreach=False, **settings),
        "lamb": lambda: timm.optim.Lamb(groups, max_grad_norm=None, foreach=False, **settings),
        "sgd": lambda: torch.optim.SGD(groups, lr=1.0, momentum=0.9, nesterov=True, foreach=False),
    }[kind]()
    for step in steps:
        for micro in range(worker.ACCUMULATE):
            (module.loss(worker.batch(step, micro), worker.ALL[0]) / worker.ACCUMULATE).backward()
        if clip:
            nn.utils.clip_grad_norm_(module.parameters(), clip)
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / (step + 1)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for t, w in zip(target.parameters(), module.layers.parameters(), strict=True):
                t.mul_(worker.EMA).add_((1 - worker.EMA) * w)
    return {f"online.{name}": p.detach() for name, p in module.named_parameters()} | {
        f"target.{name}": p.detach() for name, p in target.named_parameters()
    }


def alone(kind, steps, fused="auto", clip=0.0, **more):
    module = worker.build()
    target = worker.target_of(module)
    engine, trained = worker.make({"engine": "single", "optimizer": kind, "fused": fused, "clip": clip}, module, target)
    worker.train(engine, trained, steps, sampled=worker.ALL, **more)
    return worker.everything(engine, module, target)


def difference(a, b):
    names = [name for name in b if not name.startswith("momentum.") and name != "seen"]
    assert len(names) > 20
    return max((a[name] - b[name]).abs().max().item() for name in names)


@pytest.mark.quick
@pytest.mark.parametrize("kind", ["adamw", "lamb", "sgd"])
@pytest.mark.parametrize("fused", ["auto", "none"])
def test_one_process_trains_as_the_library_alone(kind, fused):
    start = {f"online.{name}": p.detach() for name, p in worker.build().named_parameters()}
    trained = alone(kind, range(3), fused)
    assert difference(trained, reference(kind, range(3))) <= LIMIT
    assert difference(trained, reference(kind, range(2))) > 100 * LIMIT
    moved = [name for name, p in start.items() if not torch.equal(p, trained[name])]
    assert len(moved) == len(start) - 1  # but the frozen one
    assert difference(alone(kind, range(3), fused, clip=0.05), reference(kind, range(3), clip=0.05)) <= LIMIT


def test_decay_spares_biases_and_norms():
    settings = {"weight_decay": 0.5, "momentum": 0.9, "beta2": 0.99, "eps": 1e-8}
    module = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    make_optimizer, _ = choose_optimizer("sgd", "auto", CPU, **settings)
    optimizer = make_optimizer(module, None, False)
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.prepare(0.1)
    optimizer.step()
    for name, p in module.named_parameters():
        if name == "0.weight":  # Nesterov's first step: the gradient and 0.9 times it once more
            torch.testing.assert_close(p.detach(), before[name] * (1 - 0.1 * 0.5 * 1.9))
        else:
            assert torch.equal(p, before[name])


def test_a_frozen_parameter_may_have_a_follower():
    module, follower = nn.Linear(2, 2), nn.Linear(2, 2)
    module.bias.requires_grad_(False)
    was = follower.bias.detach().clone()
    optimizer = choose_optimizer("adamw", "auto", CPU, weight_decay=0.0, momentum=0.9, beta2=0.99, eps=1e-8)[0](
        module, follower, False
    )
    module.weight.grad = torch.ones(2, 2)
    optimizer.prepare(0.1, ema=0.0)
    optimizer.step()
    assert torch.allclose(follower.weight, module.weight) and torch.equal(follower.bias, was)


@pytest.mark.parametrize(
    "kind, fused, name",
    [
        ("adamw", "auto", "torch fused AdamW"),
        ("adamw", "torch", "torch fused AdamW"),
        ("adamw", "none", "torch AdamW"),
        ("lamb", "auto", "timm LAMB"),
        ("sgd", "auto", "torch fused SGD"),
        ("sgd", "none", "torch SGD"),
    ],
)
def test_the_name_says_what_runs(kind, fused, name):
    assert worker.library({"optimizer": kind, "fused": fused})[1] == name


class FusedStub(torch.optim.Optimizer):
    """What apex's FusedAdam and FusedLAMB look like from outside: the step count in the group, made at the first step
    as an int, and lazy state."""

    def __init__(
        self,
        params,
        lr=1e-3,
        bias_correction=True,
        betas=(0.9, 0.999),
        eps=1e-8,
        adam_w_mode=True,
        weight_decay=0.0,
        amsgrad=False,
        set_grad_none=True,
        max_grad_norm=1.0,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.adam_w_mode, self.max_grad_norm = adam_w_mode, max_grad_norm

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] = group["step"] + 1 if "step" in group else 1
            assert type(group["step"]) is int
            (b1, b2), n = group["betas"], group["step"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if len(state) == 0:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                state["exp_avg"].mul_(b1).add_(p.grad, alpha=1 - b1)
                state["exp_avg_sq"].mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
                root = (state["exp_avg_sq"] / (1 - b2**n)).sqrt() + group["eps"]
                p.sub_(group["lr"] * (state["exp_avg"] / (1 - b1**n) / root + group["weight_decay"] * p))


@pytest.fixture
def apex(monkeypatch):
    package, found = ModuleType("apex"), ModuleType("apex.optimizers")
    found.FusedAdam = found.FusedLAMB = FusedStub
    package.optimizers = found
    monkeypatch.setitem(sys.modules, "apex", package)
    monkeypatch.setitem(sys.modules, "apex.optimizers", found)
    return found


def test_apex_is_used_where_it_is_asked_for(apex):
    assert worker.library({"optimizer": "adamw", "fused": "apex"})[1] == "AdamW by apex FusedAdam"
    assert worker.library({"optimizer": "lamb", "fused": "apex"})[1] == "LAMB by apex FusedLAMB"
    assert worker.library({"optimizer": "adamw", "fused": "auto"})[1] == "torch fused AdamW"  # no GPU
    assert difference(alone("adamw", range(3), "apex"), reference("adamw", range(3))) <= LIMIT


@pytest.mark.quick
@pytest.mark.parametrize("first, then", [("apex", "torch"), ("torch", "apex"), ("apex", "apex")])
def test_state_goes_between_apex_and_torch(apex, first, then):
    module = worker.build()
    target = worker.target_of(module)
    engine, trained = worker.make({"engine": "single", "optimizer": "adamw", "fused": first}, module, target)
    worker.train(engine, trained, [0, 1], sampled=worker.ALL)
    state = {name: t.clone() for name, t in engine.state().items()}
    engine.close()
    engine, trained = worker.make({"engine": "single", "optimizer": "adamw", "fused": then}, module, target)
    engine.load(state)
    worker.train(engine, trained, [2, 3], sampled=worker.ALL)
    assert difference(worker.everything(engine, module, target), reference("adamw", range(4))) <= LIMIT


def test_apex_that_cannot_run_is_refused_or_passed_over(apex, monkeypatch):
    def broken(params, **more):
        raise RuntimeError("apex.optimizers.FusedAdam requires cuda extensions")

    monkeypatch.setattr(apex, "FusedAdam", broken)
    with pytest.raises(ConfigError, match="^train.fused: is apex, which cannot be used here .*cuda extensions"):
        worker.library({"optimizer": "adamw", "fused": "apex"})
    assert _algorithm("adamw", "auto", torch.device("cuda"), 0.9, 0.9, 1e-8).name == "torch fused AdamW"
    monkeypatch.delattr(apex, "FusedLAMB")  # another package of that name
    with pytest.raises(ConfigError, match="^train.fused: .*install NVIDIA's apex"):
        worker.library({"optimizer": "lamb", "fused": "apex"})
    with pytest.raises(ConfigError, match="^train.fused: is apex, of which AdamW and LAMB are used"):
        worker.library({"optimizer": "sgd", "fused": "apex"})


def test_lamb_refuses_engines_that_share_parameters_out():
    check_optimizer("lamb", make("single", accumulate=1, micro_batch=1).sharded)
    check_optimizer("adamw", make("fsdp2", accumulate=1, micro_batch=1).sharded)
    section = {"zero_optimization": {"stage": 1}}
    for engine in (
        make("fsdp2", accumulate=1, micro_batch=1),
        make("deepspeed", accumulate=1, micro_batch=1, section=section),
    ):
        with pytest.raises(ConfigError, match="^train.optimizer: is lamb.*set engine.name to ddp"):
            check_optimizer("lamb", engine.sharded)


def test_foreign_state_is_refused():
    module = worker.build()
    engine, _ = worker.make({"engine": "single", "optimizer": "adamw"}, module)
    state = engine.state()
    engine.load(state)
    other, _ = worker.make({"engine": "single", "optimizer": "sgd"}, module)
    with pytest.raises(ValueError, match="another model"):
        other.load(state)
    with pytest.raises(ValueError, match="another model"):
        engine.load({name: t for name, t in state.items() if name != "layers.0.0.0.weight.exp_avg"})


def specs(kind, folder, world):
    base = KINDS[kind] | {"optimizer": "adamw"}
    half = folder / f"half-{kind}-{world}"
    half.mkdir()

    def spec(what, **more):
        return base | {"out": str(folder / f"{what}-{kind}-{world}.pt")} | more

    result = [
        spec("clip", clip=0.05),
        spec("sgd", optimizer="sgd"),
        spec("nan", steps=[0, 1, 2], bad={"step": 1, "rank": world - 1, "factor": "nan"}),
        spec("half", steps=[0, 1], save=str(half)),
        spec("resumed", steps=[2, 3], load=str(half)),
        spec("straight", steps=[0, 1, 2, 3]),
    ]
    if kind in ("ddp", "zero0"):
        result.append(spec("lamb", optimizer="lamb"))
    if world == 2:
        result.append(spec("other", steps=[2, 3], load=str(folder / f"half-{GOES_ON[kind]}-1")))
    return result


def kinds():
    return [kind for kind in KINDS if kind[:4] != "zero" or importlib.util.find_spec("deepspeed")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("optimizers")
    for launcher, world in (("python", 1), ("torchrun", 2)):
        jobs = [spec for kind in kinds() for spec in specs(kind, folder, world)]
        code, output = ranks.start(launcher, world, "engine_worker.py", json.dumps(jobs))
        assert code == 0, output
    return folder


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_an_engine_trains_as_one_process_and_goes_on_where_another_stopped(trained, kind, world):
    if kind not in kinds():
        pytest.skip("deepspeed is not installed")

    def read(what):
        return torch.load(trained / f"{what}-{kind}-{world}.pt")[0]

    assert difference(read("clip"), reference("adamw", range(3), clip=0.05)) <= LIMIT
    assert difference(read("sgd"), reference("sgd", range(3))) <= LIMIT
    if kind in ("ddp", "zero0"):
        assert difference(read("lamb"), reference("lamb", range(3))) <= LIMIT
    after = read("nan")
    assert after["seen"] == [[("applied", 1.0, False), ("bad", 1.0, True), ("applied", 1.0, False)]] * world
    resumed, straight = read("resumed"), read("straight")
    assert difference(straight, reference("adamw", range(4))) <= LIMIT
    assert resumed.keys() == straight.keys()
    assert all(torch.equal(t, straight[name]) for name, t in resumed.items() if name != "seen")
    assert straight["momentum.step"] == 4
    if world == 2:
        assert difference(read("other"), reference("adamw", range(4))) <= LIMIT
