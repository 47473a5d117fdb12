"""Every engine against one plain single-process reference; resuming bit for bit; what is refused."""

from __future__ import annotations

import json

import engine_worker as worker
import pytest
import ranks
import torch

from bossnas.engines import make
from bossnas.errors import ConfigError
from bossnas.optim import LARS, parameter_groups

LIMIT = 3e-7  # float32 sums in another order, three updates
STAGES = (0, 1, 2)


def plain_training(steps, clip=0.0):
    """METHOD 3.3 and 3.5 by hand on the whole batch: no engine, no LARS class."""
    module = worker.build()
    groups = parameter_groups(module)
    buffers = {group["name"]: torch.zeros_like(group["params"][0]) for group in groups}
    for step in range(steps):
        parameters = [group["params"][0] for group in groups]
        total = [None] * len(parameters)
        for micro in range(worker.ACCUMULATE):
            loss = module.loss(worker.batch(step, micro), worker.SAMPLED[(step + micro) % 4])
            for i, g in enumerate(torch.autograd.grad(loss, parameters, allow_unused=True)):
                if g is not None:
                    total[i] = g / worker.ACCUMULATE if total[i] is None else total[i] + g / worker.ACCUMULATE
        norm = torch.stack([g.norm() for g in total if g is not None]).norm()
        with torch.no_grad():
            for group, g in zip(groups, total, strict=True):
                if g is None or not g.any():
                    continue
                (w,) = group["params"]
                g = g * min(1.0, clip / norm) if clip else g
                if not group["excluded"]:
                    g = (g + 0.01 * w) * 0.1 * w.norm() / (g.norm() + 0.01 * w.norm())
                buffers[group["name"]].mul_(0.9).add_(g * 0.1 / (step + 1))
                w.sub_(buffers[group["name"]])
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def single_training(steps, split=False, **spec):
    module = worker.build()
    engine, trained = worker.make({"engine": "single", **spec}, module)
    worker.train(engine, trained, steps, split)
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def difference(a, b):
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def test_single_is_the_plain_training():
    start = {name: p.detach().clone() for name, p in worker.build().named_parameters()}
    trained = single_training(range(3))
    assert difference(trained, plain_training(3)) <= LIMIT
    assert difference(single_training(range(3), split=True), plain_training(3)) <= LIMIT
    moved = {name for name in start if not torch.equal(start[name], trained[name])}
    # both layers have sampled their choices 0..3, never 4; choice 0 began with a zero gamma
    names = ("0.weight", "0.bias", "2.weight", "3.weight", "3.bias")
    assert moved == {
        f"layers.{layer}.{choice}.{name}" for layer in (0, 1) for choice in range(4) for name in names
    }
    assert difference(single_training(range(3), clip=0.05), plain_training(3, clip=0.05)) <= LIMIT
    assert difference(single_training(range(3), clip=0.05), trained) > 1e-3


def test_bf16_is_autocast_over_float32_weights():
    low, full = single_training(range(3), precision="bf16"), single_training(range(3))
    assert all(p.dtype == torch.float32 for p in low.values())
    assert 1e-4 < difference(low, full) < 0.3


def test_single_resumes_bit_for_bit():
    module = worker.build()
    engine, _ = worker.make({"engine": "single"}, module)
    worker.train(engine, module, range(2))
    state = {name: t.clone() for name, t in engine.state().items()}
    weights = {name: t.clone() for name, t in module.state_dict().items()}
    resumed = worker.build()
    resumed.load_state_dict(weights)
    other, _ = worker.make({"engine": "single"}, resumed)
    other.load(state)
    worker.train(other, resumed, range(2, 4))
    straight = single_training(range(4))
    assert all(torch.equal(p, straight[name]) for name, p in resumed.named_parameters())


def test_foreign_optimizer_state_is_refused():
    module = worker.build()
    engine, _ = worker.make({"engine": "single"}, module)
    state = engine.state()
    other = torch.nn.Linear(2, 2)
    engine = make("single", accumulate=1, micro_batch=2)
    engine.wrap(other, None, lambda module, followers, sharded: LARS(parameter_groups(other), lr=1.0))
    with pytest.raises(ValueError, match="another model"):
        engine.load(state)


def specs(folder, world):
    """For each stage: three updates by two engines in a row; clipped; 2 + resumed 2; 4 in one go."""
    result = []
    for stage in STAGES:
        base = {"engine": "deepspeed", "section": {"zero_optimization": {"stage": stage}}}
        half = folder / f"half-{stage}-{world}"
        half.mkdir()

        variant = {"zero_optimization": {"stage": stage}}
        if stage:  # more than one bucket
            variant["zero_optimization"] |= {"reduce_bucket_size": 30, "allgather_bucket_size": 32}
        if stage == 2:
            variant["zero_optimization"] |= {"overlap_comm": True, "contiguous_gradients": False}

        def out(what, stage=stage):
            return str(folder / f"{what}-{stage}-{world}.pt")

        result += [
            base | {"blocks": 2, "out": out("three")},
            base | {"clip": 0.05, "out": out("clip")},
            base | {"precision": "bf16", "out": out("bf16")},
            base | {"section": variant, "out": out("variant")},
            base | {"split": True, "out": out("split")},
            base | {"steps": [0, 2], "save": str(half), "out": out("half")},
            base | {"steps": [2, 4], "load": str(half), "out": out("resumed")},
            base | {"steps": [0, 4], "out": out("straight")},
        ]
    return result


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder of the results of all stages on one process without launcher and on two ranks."""
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("deepspeed")
    for launcher, world in (("python", 1), ("torchrun", 2)):
        code, output = ranks.start(launcher, world, "engine_worker.py", json.dumps(specs(folder, world)))
        assert code == 0, output
        assert "untested" not in output and "deprecated" not in output and "[INFO]" not in output, output
        last = [
            {
                "engine": "deepspeed",
                "section": {"zero_optimization": {"stage": 1}},
                "steps": [2, 4],
                "load": str(folder / f"half-2-{3 - world}"),
                "out": str(folder / f"other-{world}.pt"),
            }
        ]
        if world == 2:  # goes on on two ranks, under another stage, from what one process saved
            code, output = ranks.start(launcher, world, "engine_worker.py", json.dumps(last))
            assert code == 0, output
    return folder


@pytest.mark.parametrize("world", (1, 2))
@pytest.mark.parametrize("stage", STAGES)
def test_zero_is_the_single_process(trained, stage, world):
    blocks = torch.load(trained / f"three-{stage}-{world}.pt")
    start = {name: p.detach() for name, p in worker.build().named_parameters()}
    assert len(blocks) == 2
    for parameters in blocks.values():
        assert difference(parameters, plain_training(3)) <= LIMIT
        assert all(torch.equal(p, start[name]) for name, p in parameters.items() if ".4." in name)
    for what in ("variant", "split"):
        parameters = torch.load(trained / f"{what}-{stage}-{world}.pt")[0]
        assert difference(parameters, plain_training(3)) <= LIMIT
    clipped = torch.load(trained / f"clip-{stage}-{world}.pt")[0]
    assert difference(clipped, plain_training(3, clip=0.05)) <= LIMIT
    low = torch.load(trained / f"bf16-{stage}-{world}.pt")[0]
    assert difference(low, single_training(range(3), precision="bf16")) <= (0.0 if world == 1 else 0.02)


@pytest.mark.parametrize("world", (1, 2))
@pytest.mark.parametrize("stage", STAGES)
def test_zero_resumes_bit_for_bit(trained, stage, world):
    resumed = torch.load(trained / f"resumed-{stage}-{world}.pt")[0]
    straight = torch.load(trained / f"straight-{stage}-{world}.pt")[0]
    assert difference(resumed, torch.load(trained / f"half-{stage}-{world}.pt")[0]) > 1e-2
    assert all(torch.equal(p, straight[name]) for name, p in resumed.items())


def test_any_engine_goes_on_on_any_number_of_ranks(trained):
    reference = single_training(range(4))
    assert difference(torch.load(trained / "other-2.pt")[0], reference) <= LIMIT
    module = worker.build()
    module.load_state_dict(torch.load(trained / "half-1-2" / "module.pt"))
    engine, _ = worker.make({"engine": "single"}, module)
    engine.load(torch.load(trained / "half-1-2" / "optimizer.pt", weights_only=True))
    worker.train(engine, module, range(2, 4))
    assert difference(dict(module.named_parameters()), reference) <= LIMIT


def test_under_the_deepspeed_launcher(tmp_path):
    pytest.importorskip("deepspeed")
    spec = {
        "engine": "deepspeed",
        "section": {"zero_optimization": {"stage": 2}},
        "out": str(tmp_path / "out.pt"),
    }
    code, output = ranks.start("deepspeed", 2, "engine_worker.py", json.dumps([spec]))
    assert code == 0, output
    assert difference(torch.load(tmp_path / "out.pt")[0], plain_training(3)) <= LIMIT


def config(section, precision="fp32"):
    from bossnas.engines.deepspeed import deepspeed_config

    return deepspeed_config(section, 8, 4, precision, 2)


def test_section_is_filled_from_our_config():
    filled = config(
        {"zero_optimization": {"stage": 2, "overlap_comm": False}, "steps_per_print": 10, "_comment": "x"}
    )
    assert filled == {
        "zero_optimization": {"stage": 2, "overlap_comm": False},
        "steps_per_print": 10,
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
    }
    assert config({})["gradient_clipping"] == 0.0 and config({})["zero_optimization"] == {"stage": 0}
    same = {
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": 0,
        "bf16": {"enabled": False},
        "optimizer": {"type": "LARS"},
        "scheduler": None,
    }
    assert config(same) == config({})
    assert config({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, "bf16") == config({})


@pytest.mark.parametrize(
    "section, words",
    [
        (
            {"train_batch_size": 63},
            r"train_batch_size: is 63, but this run needs 64; remove it and set train.batch",
        ),
        ({"train_micro_batch_size_per_gpu": 4}, r"train_micro_batch_size_per_gpu: is 4.*train.micro_batch"),
        ({"gradient_accumulation_steps": 1}, r"gradient_accumulation_steps: is 1, but this run needs 4"),
        (
            {"gradient_clipping": 1.0},
            r"gradient_clipping: is 1.0, but this run needs 0.0; remove it and set train.clip",
        ),
        ({"bf16": {"enabled": True}}, r"bf16: contradicts train.precision 'fp32'"),
        ({"fp16": {"enabled": True}}, r"fp16: contradicts"),
        ({"torch_autocast": {"enabled": True}}, r"torch_autocast: contradicts.*set train.precision to bf16"),
        ({"optimizer": {"type": "AdamW"}}, r"optimizer: the optimizer is LARS"),
        ({"optimizer": {"type": "LARS", "params": {"lr": 1}}}, r"optimizer: the optimizer is LARS.*train.lr"),
        ({"scheduler": {"type": "WarmupLR"}}, r"scheduler: the schedule is the method's own"),
        ({"zero_optimisation": {}}, r"zero_optimisation: unknown.*zero_optimization"),
        ({"zero_allow_untested_optimizer": False}, r"zero_allow_untested_optimizer: is False"),
        ({"zero_optimization": True}, r"zero_optimization: is True; write"),
        (
            {"zero_optimization": {"stage": 3}},
            r"zero_optimization.stage: ZeRO 3 .*stale.*; set it to 0, 1 or 2",
        ),
        ({"zero_optimization": {"stage": 4}}, r"zero_optimization.stage: is 4; set it"),
        ({"zero_optimization": {"stage": True}}, r"zero_optimization.stage: is True"),
        ({"zero_optimization": {"stge": 1}}, r"zero_optimization.stge: unknown.*known: .*stage"),
        (
            {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}},
            r"zero_optimization.offload_optimizer: .*; remove it",
        ),
        (
            {"zero_optimization": {"stage": 1, "round_robin_gradients": True}},
            r"zero_optimization.round_robin_gradients: cannot be True",
        ),
        (
            {"zero_optimization": {"stage": 1, "ignore_unused_parameters": False}},
            r"zero_optimization.ignore_unused_parameters: cannot",
        ),
    ],
)
def test_contradictions_and_unknown_keys_are_refused(section, words):
    with pytest.raises(ConfigError, match=rf"^engine\.deepspeed\.{words}"):
        config(section)


def test_overlap_under_zero_1_is_refused():
    with pytest.raises(ConfigError, match="overlap_comm: under ZeRO 1 it loses .*set stage to 2"):
        config({"zero_optimization": {"stage": 1, "overlap_comm": True}})


def test_values_of_a_wrong_kind_are_a_user_error():
    pytest.importorskip("deepspeed")
    module = worker.build()
    engine = make(
        "deepspeed",
        accumulate=1,
        micro_batch=2,
        section={"zero_optimization": {"stage": 1, "reduce_bucket_size": "large"}},
    )
    with pytest.raises(ConfigError, match=r"^engine.deepspeed: DeepSpeed refuses it \(.*reduce_bucket_size"):
        engine.wrap(module, None, lambda module, followers, sharded: LARS(parameter_groups(module), lr=1.0))


def test_make_refuses(monkeypatch):
    with pytest.raises(ConfigError, match="engine.name: there is no engine 'zero'"):
        make("zero", accumulate=1, micro_batch=1)
    monkeypatch.setattr("bossnas.dist.world_size", lambda: 2)
    with pytest.raises(ConfigError, match="engine.name: single runs one process, but 2 were started"):
        make("single", accumulate=1, micro_batch=1)
    with pytest.raises(ConfigError, match="zero_optimization.stage: ZeRO 3"):
        make("deepspeed", accumulate=1, micro_batch=1, section={"zero_optimization": {"stage": 3}})
