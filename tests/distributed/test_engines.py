"""Every engine against one plain single-process reference; resuming bit for bit; what is refused."""

from __future__ import annotations

import importlib.util
import json
import re
from collections import Counter

import engine_worker as worker
import pytest
import ranks
import torch
from torch import nn

from bossnas import spaces
from bossnas.config.loading import load
from bossnas.distributed.engines import make
from bossnas.errors import ConfigError
from bossnas.networks.bossnet import BossNet
from bossnas.optim.groups import parameter_groups
from bossnas.optim.lars import LARS
from bossnas.supernet.heads import predictor
from bossnas.supernet.supernet import Supernet

LIMIT = 3e-7  # float32 sums in another order, three updates
HALF = 0.01  # forward passes in fp16, whose steps are 2**-10
OVERFLOW = {"step": 3, "factor": "1e4"}
KINDS = {
    "ddp": {"engine": "ddp"},
    "fsdp2": {"engine": "fsdp2"},
    **{
        f"zero{stage}": {"engine": "deepspeed", "section": {"zero_optimization": {"stage": stage}}}
        for stage in (0, 1, 2)
    },
}
WORLDS = (1, 2)
GOES_ON = {"fsdp2": "zero1", "ddp": "fsdp2", "zero1": "zero2", "zero2": "ddp", "zero0": "fsdp2"}  # after this kind


def plain_training(steps, clip=0.0):
    """METHOD 3.3 to 3.5 by hand on the whole batch: no engine, no LARS class. ``steps``: the numbers of those done."""
    module = worker.build()
    target = worker.target_of(module)
    groups = parameter_groups(module)
    buffers = {group["name"]: torch.zeros_like(group["params"][0]) for group in groups}
    for step in steps:
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
            for t, w in zip(target.parameters(), module.layers.parameters(), strict=True):
                t.mul_(worker.EMA).add_((1 - worker.EMA) * w)
    return {
        **{f"online.{name}": p.detach() for name, p in module.named_parameters()},
        **{f"target.{name}": p.detach() for name, p in target.named_parameters()},
        **{f"momentum.{name}": buffer for name, buffer in buffers.items()},
    }


def single_training(steps, split=False, bad=None, **spec):
    module = worker.build()
    target = worker.target_of(module)
    engine, trained = worker.make({"engine": "single", **spec}, module, target)
    seen = worker.train(engine, trained, steps, split, bad)
    return worker.everything(engine, module, target) | {"seen": [seen]}


def difference(a, b):
    a, b = ({name: t for name, t in x.items() if name != "seen"} for x in (a, b))
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.mark.quick
def test_single_is_the_plain_training():
    start = {name: p.detach().clone() for name, p in worker.build().named_parameters()}
    trained = single_training(range(3))
    assert difference(trained, plain_training(range(3))) <= LIMIT
    assert difference(single_training(range(3), split=True), plain_training(range(3))) <= LIMIT
    moved = {name for name in start if not torch.equal(start[name], trained[f"online.{name}"])}
    # both layers have sampled their choices 0..3, never 4; choice 0 began with a zero gamma
    names = ("0.weight", "0.bias", "2.weight", "3.weight", "3.bias", "4.weight")
    assert moved == {f"layers.{layer}.{choice}.{name}" for layer in (0, 1) for choice in range(4) for name in names}
    assert difference(single_training(range(3), clip=0.05), plain_training(range(3), clip=0.05)) <= LIMIT
    assert difference(single_training(range(3), clip=0.05), trained) > 1e-3


@pytest.mark.quick
def test_bf16_is_autocast_over_float32_weights():
    low, full = single_training(range(3), precision="bf16"), single_training(range(3))
    assert all(p.dtype == torch.float32 for name, p in low.items() if name != "seen")
    assert 1e-4 < difference(low, full) < 0.3


def test_foreign_optimizer_state_is_refused():
    module = worker.build()
    engine, _ = worker.make({"engine": "single"}, module)
    state = engine.state()
    other = torch.nn.Linear(2, 2)
    engine = make("single", accumulate=1, micro_batch=2)
    engine.wrap(other, None, lambda module, followers, sharded: LARS(parameter_groups(other), lr=1.0))
    with pytest.raises(ValueError, match="another model"):
        engine.load(state)


def specs(kind, folder, world):
    """Three updates by two engines in a row, in other ways; a step with a NaN; 2 + resumed 2 updates; 4 in one go."""
    base = KINDS[kind]
    half = folder / f"half-{kind}-{world}"
    half.mkdir()

    def spec(what, **more):
        return base | {"out": str(folder / f"{what}-{kind}-{world}.pt")} | more

    result = [
        spec("three", blocks=2),
        spec("clip", clip=0.05),
        spec("bf16", precision="bf16"),
        spec("fp16", precision="fp16", steps=[0, 1, 2, 3, 4], bad=OVERFLOW | {"rank": world - 1}),
        spec("split", split=True),
        spec("nan", bad={"step": 1, "rank": world - 1, "factor": "nan"}),
        spec("half", steps=[0, 1], save=str(half)),
        spec("resumed", steps=[2, 3], load=str(half)),
        spec("straight", steps=[0, 1, 2, 3]),
    ]
    if kind in ("zero1", "zero2"):  # more than one bucket
        variant = {"stage": int(kind[-1]), "reduce_bucket_size": 30, "allgather_bucket_size": 32}
        variant |= {"overlap_comm": True, "contiguous_gradients": False} if kind == "zero2" else {}
        result.append(spec("variant", section={"zero_optimization": variant}))
    if world == 2:  # goes on from what another engine on one rank saved
        result.append(spec("other", steps=[2, 3], load=str(folder / f"half-{GOES_ON[kind]}-1")))
    return result


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder of the results of all engines on one process without launcher and on two ranks."""
    folder = tmp_path_factory.mktemp("engines")
    for launcher, world in (("python", 1), ("torchrun", 2)):
        jobs = [spec for kind in kinds() for spec in specs(kind, folder, world)]
        code, output = ranks.start(launcher, world, "engine_worker.py", json.dumps(jobs))
        assert code == 0, output
        for noise in ("untested", "deprecated", "[INFO]", "Warning"):
            assert noise not in output, output
    return folder


def kinds():
    return [kind for kind in KINDS if kind[:4] != "zero" or importlib.util.find_spec("deepspeed")]


@pytest.fixture(params=[(kind, world) for kind in KINDS for world in WORLDS], ids=lambda p: f"{p[0]}-{p[1]}")
def result(request, trained):
    """What the engine of a kind on some ranks wrote, by the name of its spec."""
    kind, world = request.param
    if kind not in kinds():
        pytest.skip("deepspeed is not installed")

    def read(what, block=0):
        return torch.load(trained / f"{what}-{kind}-{world}.pt")[block]

    read.kind, read.world = kind, world
    return read


def test_an_engine_is_the_single_process(result):
    start = {name: p.detach() for name, p in worker.build().named_parameters()}
    for block in (0, 1):
        after = result("three", block)
        assert difference(after, plain_training(range(3))) <= LIMIT
        assert all(
            torch.equal(after[f"online.{name}"], p)
            for name, p in start.items()
            if name.startswith(("layers.0.4.", "layers.1.4."))
        )
    for what in ("split", *(["variant"] if result.kind in ("zero1", "zero2") else [])):
        assert difference(result(what), plain_training(range(3))) <= LIMIT
    assert difference(result("clip"), plain_training(range(3), clip=0.05)) <= LIMIT
    low = single_training(range(3), precision="bf16")
    assert difference(result("bf16"), low) <= (LIMIT if result.world == 1 else 0.02)


def test_a_gradient_that_is_not_finite_on_one_rank_changes_nothing_on_any(result):
    after = result("nan")
    assert after["seen"] == [[("applied", 1.0, False), ("bad", 1.0, True), ("applied", 1.0, False)]] * result.world
    assert difference(after, plain_training([0, 2])) <= LIMIT


def test_an_overflow_halves_the_loss_scale_on_all_ranks(result):
    after = result("fp16")
    seen = [
        ("overflow", 2.0**15, True),
        ("overflow", 2.0**14, True),
        ("applied", 2.0**14, False),
        ("overflow", 2.0**13, True),
        ("applied", 2.0**13, False),
    ]  # the first two overflow by themselves
    assert after["seen"] == [seen] * result.world
    assert difference(after, plain_training([2, 4])) <= HALF
    assert difference(plain_training([2, 4]), plain_training([2, 3, 4])) > 4 * HALF


def test_resuming_is_the_straight_run_bit_for_bit(result):
    resumed, straight = result("resumed"), result("straight")
    assert difference(resumed, result("half")) > 1e-2
    assert difference(straight, plain_training(range(4))) <= LIMIT
    assert resumed.keys() == straight.keys()
    assert all(torch.equal(t, straight[name]) for name, t in resumed.items() if name != "seen")


def test_any_engine_goes_on_on_any_number_of_ranks(result, trained):
    reference = plain_training(range(4))
    if result.world == 2:
        assert difference(result("other"), reference) <= LIMIT
    saved = torch.load(trained / f"half-{result.kind}-{result.world}" / "half.pt")
    module = worker.build()
    target = worker.target_of(module)
    module.load_state_dict({name[7:]: t for name, t in saved.items() if name.startswith("online.")})
    target.load_state_dict({name[7:]: t for name, t in saved.items() if name.startswith("target.")})
    engine, _ = worker.make({"engine": "single"}, module, target)
    engine.load({name[9:]: t for name, t in saved.items() if name.startswith("momentum.")})
    worker.train(engine, module, [2, 3])
    assert difference(worker.everything(engine, module, target), reference) <= LIMIT


def test_under_the_deepspeed_launcher(tmp_path):
    pytest.importorskip("deepspeed")
    spec = KINDS["zero2"] | {"out": str(tmp_path / "out.pt")}
    code, output = ranks.start("deepspeed", 2, "engine_worker.py", json.dumps([spec]))
    assert code == 0, output
    assert difference(torch.load(tmp_path / "out.pt")[0], plain_training(range(3))) <= LIMIT


def test_the_fsdp_config_is_the_deepspeed_config_but_for_the_engine(project_root):
    ours, theirs = (load(project_root / "configs" / name).model_dump() for name in ("hytra_fsdp.yaml", "hytra_ds.json"))
    assert ours.pop("engine")["name"] == "fsdp2" and theirs.pop("engine")["name"] == "deepspeed"
    assert ours.pop("out") != theirs.pop("out") and ours == theirs


class OwnLayer(nn.Module):
    """Candidates, one of which shares a weight with another if ``shared``."""

    def __init__(self, shared=False):
        super().__init__()
        self.before = nn.Linear(2, 2)
        self.candidates = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(2))
        if shared:
            self.candidates[1][0].weight = self.candidates[0][0].weight

    def forward(self, x, choice):
        return self.candidates[choice](self.before(x))


@pytest.mark.parametrize(
    "name, expected",
    [
        (
            "hytra",
            {
                "stem": 1,
                "block.0.stem_adapters.#": 4,
                **{f"block.{i}.candidates.#": 6 for i in range(4)},
                "projector.adapter.scales.#": 3,
                "projector.mlp": 1,
                "predictor": 1,
            },
        ),
        (
            "mbconv",
            {
                "stem": 1,
                "block.0.candidates.#": 4,
                "block.1.candidates.#": 4,
                "block.#": 1,
                "projector.mlp": 1,
                "predictor": 1,
            },
        ),  # the first layer with its shortcut
        ("nats", {"block.#": 2, "projector.adapter.fixes.#": 8, "projector.mlp": 1, "predictor": 1}),
    ],
)
def test_units_are_candidates_heads_and_the_rest_of_layers(name, expected):
    from bossnas.distributed.engines.fsdp2 import units

    supernet = Supernet(spaces.make(name, width=0.5, image_size=32, restricted=True, split="cifar10"), 8, 4)
    part = nn.ModuleDict({**supernet.part(0), "predictor": predictor(8, 4)})
    names = {module: name for name, module in part.named_modules()}
    found = list(units(part))
    assert Counter(re.sub(r"\d+$", "#", names[unit]) for unit in found) == expected
    assert {p for unit in found for p in unit.parameters()} == set(part.parameters())


def test_units_of_a_network_are_its_blocks_and_the_rest():
    from bossnas.distributed.engines.fsdp2 import units

    model = BossNet(((1,), (), (0, 1), (1,)), width=8)
    assert list(units(model)) == [model.layer1[0], model.layer3[0], model.layer3[1], model.layer4[0], model]
    model.layer4[0].conv3.weight = model.layer1[0].conv3.weight  # of two blocks
    assert list(units(model)) == [model]


def test_candidates_that_share_weights_are_one_unit():
    from bossnas.distributed.engines.fsdp2 import units

    layer, shared = OwnLayer(), OwnLayer(shared=True)
    assert list(units(nn.ModuleList([layer]))) == [*layer.candidates, layer]
    assert list(units(nn.ModuleList([shared]))) == [shared]


def test_parameters_that_cannot_be_sharded_are_refused():
    def wrap(module):
        make("fsdp2", accumulate=1, micro_batch=2).wrap(module, None, lambda *_: None)

    part = nn.ModuleDict({"layer": OwnLayer()})
    part.gain = nn.Parameter(torch.ones(1))
    with pytest.raises(ConfigError, match="cannot shard the parameter gain; it belongs to no module that is called"):
        wrap(part)
    part = nn.ModuleDict({"layer": OwnLayer()})
    part["layer"].gain = nn.Parameter(torch.ones(()))
    with pytest.raises(ConfigError, match="cannot shard the parameter layer.gain; it is a scalar: give it the shape"):
        wrap(part)


def config(section, precision="fp32"):
    from bossnas.distributed.engines.deepspeed import deepspeed_config

    return deepspeed_config(section, 8, 4, precision, 2)


def test_section_is_filled_from_our_config():
    filled = config({"zero_optimization": {"stage": 2, "overlap_comm": False}, "steps_per_print": 10, "_comment": "x"})
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
    monkeypatch.setattr("bossnas.distributed.dist.world_size", lambda: 2)
    with pytest.raises(ConfigError, match="engine.name: single runs one process, but 2 were started"):
        make("single", accumulate=1, micro_batch=1)
    with pytest.raises(ConfigError, match="zero_optimization.stage: ZeRO 3"):
        make("deepspeed", accumulate=1, micro_batch=1, section={"zero_optimization": {"stage": 3}})
