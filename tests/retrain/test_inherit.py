"""From a search's folder to a network: its description, and the supernet's weights in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from bossnas import spaces
from bossnas.config.loading import load
from bossnas.config.retrain import RetrainConfig
from bossnas.config.shared import SpaceConfig
from bossnas.errors import ConfigError
from bossnas.files import write_json
from bossnas.networks.spec import Spec, build_network
from bossnas.retrain import inherit
from bossnas.runs import checkpoint
from bossnas.runs.folder import prepare_folder, read_config
from bossnas.search import search
from bossnas.spaces.ops import GroupedBatchNorm
from bossnas.spaces.paths import decode
from bossnas.supernet.supernet import Supernet

OWN = "tests/workers/hop_space.py:Hop"
HYTRA, MBCONV = "5433|3230|0010|0000", "21|1023|3210|0123|1132"
WIDTH = {"hytra": 0.0625, "mbconv": 0.125, "nats": 0.5, OWN: 1.0}


@pytest.fixture(autouse=True)
def at_the_root(project_root, monkeypatch):
    monkeypatch.chdir(project_root)  # the own space's file is named from there


def randomise(module):
    """Weights, statistics and open branches as after a search: what an image shows reaches the end."""
    for each in module.modules():
        if isinstance(each, nn.Conv2d):
            nn.init.kaiming_normal_(each.weight)
        elif isinstance(each, (nn.BatchNorm2d, GroupedBatchNorm)):
            nn.init.uniform_(each.weight, 0.5, 1.5)
            nn.init.normal_(each.bias, 0, 0.2)
            nn.init.normal_(each.running_mean, 0, 0.2)
            nn.init.uniform_(each.running_var, 0.5, 1.5)
    return module


def found(folder, name, text, *more):
    """The folder of a finished search, without its weights."""
    config = load(
        None, [f"space.name={name}", f"space.width={WIDTH[name]}", "space.image_size=64", f"out={folder}", *more]
    )
    prepare_folder(folder, config)
    write_json(folder / "architecture.json", {"architecture": text})
    return config


def finished(folder, name, text, change=None):
    """The folder of a finished search with its weights, and the target network that has them."""
    config = found(folder, name, text)
    torch.manual_seed(0)
    target = randomise(Supernet(spaces.make(**config.space.model_dump()), 8, 4)).eval()
    if change:
        change(target)
    tensors = {
        f"target.{key}": tensor for key, tensor in target.state_dict().items() if not key.startswith("projectors")
    }
    checkpoint.Saver(folder / "checkpoints", 1, asynchronous=False).save("block4-step000000", tensors, {})
    return target


def taken_over(folder, dtype=torch.float32, **options):
    spec = inherit.spec_of_run(folder, 5, options=options, inherited=True)
    torch.manual_seed(1)
    net = randomise(build_network(spec)).eval().to(dtype)
    return net, inherit.inherit(net, spec, folder)


def at(net, name, x):
    """What the module of that name gives within the network."""
    seen = []
    handle = net.get_submodule(name).register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        net(x)
    handle.remove()
    return seen[0]


def paths(text):
    return [decode(part) for part in text.split("|")]


# ---- what was found


def test_descriptions_of_what_searches_found(tmp_path):
    found(tmp_path / "h", "hytra", HYTRA)
    spec = inherit.spec_of_run(tmp_path / "h", 7)
    assert spec == Spec(
        "bossnet", {"encoding": [[1], [1], [1, 1, 1, 0, 1], [0, 0, 0, 1, 0, 0, 0, 0, 0]], "width": 4}, 7, 64
    )
    assert inherit.spec_of_run(tmp_path / "h", 7, 96, {"se": False}).model_args["se"] is False
    assert inherit.spec_of_run(tmp_path / "h", 7, 96).image_size == 96
    assert build_network(spec)(torch.zeros(2, 3, 64, 64)).shape == (2, 7)
    found(tmp_path / "n", "nats", "74|33|2", "data.recipe=cifar", "space.width=1.0")
    spec = inherit.spec_of_run(tmp_path / "n", 10)
    assert spec.architecture == "bossnas_nats" and spec.model_args == {"widths": [64, 40, 32, 32, 24]}
    assert spec.mean == (0.4914, 0.4822, 0.4465) and spec.std == (0.2023, 0.1994, 0.201)
    assert inherit.spec_of_run(tmp_path / "n", 10, inherited=True).model_args["skip_relu"] is True
    found(tmp_path / "m", "mbconv", MBCONV)
    assert inherit.spec_of_run(tmp_path / "m", 10).model_args == {"paths": MBCONV.split("|"), "width": 0.125}
    found(tmp_path / "o", OWN, "01|20|12")
    assert inherit.spec_of_run(tmp_path / "o", 10) == Spec(
        "bossnas_own", {"space": str(Path(OWN).resolve()), "paths": ["01", "20", "12"], "width": 1.0}, 10, 64
    )


def test_descriptions_are_plain_data(tmp_path):
    for number, (name, text) in enumerate(
        {"hytra": HYTRA, "mbconv": MBCONV, "nats": "74|33|2", OWN: "01|20|12"}.items()
    ):
        found(tmp_path / str(number), name, text)
        spec = inherit.spec_of_run(tmp_path / str(number), 3)
        assert Spec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
        build_network(spec)


def test_descriptions_of_texts():
    spec = inherit.spec_of_architecture(SpaceConfig(), HYTRA, 1000)
    assert spec == Spec(
        "bossnet", {"encoding": [[1], [1], [1, 1, 1, 0, 1], [0, 0, 0, 1, 0, 0, 0, 0, 0]], "width": 64}, 1000, 224
    )
    nats = SpaceConfig(name="nats", image_size=32, split="cifar100")
    assert inherit.spec_of_architecture(nats, "74|3|32", 100, options={"skip_relu": True}).model_args == {
        "widths": [64, 40, 32, 32, 24],
        "skip_relu": True,
    }
    for text, problem in (
        ("5433|3230", "2 paths"),
        ("5433|3230|0010|000x", "block 3 has no path"),
        ("0000|3230|0010|0000", "block 0 has no path"),
    ):
        with pytest.raises(ConfigError, match=f"^model.architecture: .*{problem}"):
            inherit.spec_of_architecture(SpaceConfig(), text, 10)


def test_folders_of_no_finished_search(tmp_path):
    found(tmp_path / "a", "nats", "74|33|2")
    (tmp_path / "a/architecture.json").rename(tmp_path / "a/away.json")
    with pytest.raises(ConfigError, match="^model.run: .* no architecture yet; finish the search"):
        inherit.spec_of_run(tmp_path / "a", 10)
    (tmp_path / "a/architecture.json").write_text("{")
    with pytest.raises(ConfigError, match="^model.run: .*architecture.json is damaged"):
        inherit.spec_of_run(tmp_path / "a", 10)
    (tmp_path / "a/architecture.json").write_text('{"architecture": "74|33"}')
    with pytest.raises(ConfigError, match="^model.run: .* 2 paths"):
        inherit.spec_of_run(tmp_path / "a", 10)
    with pytest.raises(ConfigError, match="^model.run: .*holds no config.json"):
        inherit.spec_of_run(tmp_path / "nowhere", 10)
    retraining = load(None, ["model.name=bossnet_t0", f"out={tmp_path / 'b'}"], RetrainConfig)
    prepare_folder(tmp_path / "b", retraining)
    with pytest.raises(ConfigError, match="^model.run: .*holds a retraining"):
        inherit.spec_of_run(tmp_path / "b", 10)


# ---- weights


@pytest.mark.parametrize(
    "name, text, last",
    [
        ("mbconv", MBCONV, "block5"),
        ("nats", "74|33|2", "layer5"),
        ("nats", "22|22|2", "layer5"),
        (OWN, "02|20|12", "layers.5"),
    ],
)
def test_the_network_computes_what_the_supernet_does(tmp_path, name, text, last):
    target = finished(tmp_path, name, text)
    net, report = taken_over(tmp_path)
    x = torch.randn(2, 3, 64, 64)
    found = at(net, last, x)
    assert (found.diff(dim=0).abs() > 0.1).any(), "this test would not see the first layers"
    torch.testing.assert_close(found, target.features(paths(text), x), rtol=1e-4, atol=1e-5)
    behind = {"mbconv": ("block6", "conv_head", "bn_head", "fc"), "nats": ("bn.", "fc"), OWN: ("head",)}[name]
    assert report.fresh and all(part.startswith(behind) for part in report.fresh)
    counted = [key for key in net.state_dict() if not key.endswith("num_batches_tracked")]
    assert sorted(report.taken + report.fresh) == sorted(counted)


def test_nats_without_relu_keeps_its_own_skips(tmp_path):
    finished(tmp_path, "nats", "74|33|2")
    net, report = taken_over(tmp_path, skip_relu=False)
    assert {part.rsplit(".", 1)[0] for part in report.fresh} == {
        "bn",
        "fc",
        "layer3.skip.1",
        "layer3.skip.2",
        "layer5.skip.1",
        "layer5.skip.2",
    }


def silence(*norms):
    """Batch norms that give nothing: their branch does not count."""
    for norm in norms:
        nn.init.zeros_(norm.weight)
        nn.init.zeros_(norm.bias)


def without_shortcuts(target):
    """The supernet without what a BossNet computes in another way: shortcuts that change size or width, and the
    constant of the stem's adapter, which a border shows. In float64: sixteen layers amplify what folding rounds."""
    target.double()
    for name, module in target.named_modules():
        if name.endswith(("down_shortcut", "same_shortcut")) and len(list(module.children())):
            silence(module[-1])
        if "stem_adapters" in name and isinstance(module, GroupedBatchNorm):
            gain = module.weight / (module.running_var + 1e-5).sqrt()
            module.bias.data = gain.data * module.running_mean


def silence_shortcuts(net):
    for name, module in net.named_modules():
        if isinstance(module, nn.BatchNorm2d) and (".downsample." in name or ".shortcut." in name):
            silence(module)


def test_a_bossnet_takes_over_all_that_is_the_same_operation(tmp_path):
    target = finished(tmp_path, "hytra", HYTRA, change=without_shortcuts)
    net, report = taken_over(tmp_path, torch.float64, act="relu", se=False)
    silence_shortcuts(net)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    assert (at(net, "layer4.8", x).diff(dim=0).abs() > 0.01).any(), "this test would not see the first layers"
    for block, last in enumerate(("layer3.1", "layer4.0", "layer4.4", "layer4.8")):
        torch.testing.assert_close(
            at(net, last, x), target.features(paths(HYTRA)[: block + 1], x), rtol=1e-9, atol=1e-9
        )
    assert all(".downsample." in part or ".shortcut." in part or part.startswith("fc.") for part in report.fresh)
    assert len(report.fresh) == 4 * 5 + 2 and "layer1.0.conv1.weight" in report.taken


def test_the_adapter_is_folded_but_for_the_border(tmp_path):
    target = finished(tmp_path, "hytra", HYTRA)
    net, _ = taken_over(tmp_path, act="relu", se=False)
    x = torch.randn(2, 3, 64, 64)
    layer = target.blocks[0][0]
    with torch.no_grad():
        adapted = layer.stem_adapters[3](target.stem(x, 1, None), 1, None)
        expected = nn.Sequential(*layer.candidates[5].same[:2])(adapted)
    found = at(net, "layer1.0.peg", x)
    inner = (..., slice(1, -1), slice(1, -1))
    torch.testing.assert_close(found[inner], expected[inner], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, expected, atol=1e-3), "this test would not see an adapter without a constant"


def test_a_bossnet_of_another_first_scale(tmp_path):
    """At scale 2 the entry reads more channels than the adapter gave, and the first stage is one convolution."""
    text = "4333|3230|0010|0000"
    finished(tmp_path, "hytra", text)
    net, report = taken_over(tmp_path)
    assert net.encoding[0] == () and net.encoding[1] == (1,)
    assert "layer2.0.conv1.weight" in report.fresh and "layer2.0.peg.conv.weight" in report.taken
    others = {"layer1.0.weight", *(f"layer1.1.{part}" for part in inherit.NORM), "layer2.0.conv1.weight"}
    assert all(
        part in others or any(role in part for role in (".downsample.", ".shortcut.", ".se.", "fc."))
        for part in report.fresh
    )
    assert others <= set(report.fresh)


def test_networks_of_another_architecture_or_shape(tmp_path):
    finished(tmp_path / "a", "mbconv", MBCONV)
    found(tmp_path / "b", "mbconv", "21|1023|3210|0123|1133")
    found(tmp_path / "c", "nats", "74|33|2")
    spec = inherit.spec_of_run(tmp_path / "a", 5)
    net = build_network(spec)
    for other in "bc":
        with pytest.raises(ConfigError, match="^model.inherit: .* found .*which the network bossnas_mbconv"):
            inherit.inherit(net, spec, tmp_path / other)
    narrow = inherit.spec_of_run(tmp_path / "a", 5, options={"width": 0.5})
    with pytest.raises(ConfigError, match="^model.inherit"):
        inherit.inherit(build_network(narrow), narrow, tmp_path / "a")
    grey = inherit.spec_of_run(tmp_path / "a", 5, options={"in_chans": 1, "last": False})
    report = inherit.inherit(build_network(grey), grey, tmp_path / "a")
    assert report.fresh == ["conv_stem.weight", "fc.weight", "fc.bias"]
    for file in (tmp_path / "a/checkpoints").rglob("*.distcp"):
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ConfigError, match="unusable"):
        inherit.inherit(net, spec, tmp_path / "a")


def test_after_a_real_search(tmp_path):
    """The winners' calibrated statistics lie in the last checkpoint."""
    folder = tmp_path / "run"
    search.search(
        load(
            None,
            [
                "space.name=tests/workers/hop_space.py:Hop2",
                "space.image_size=32",
                "heads.hidden=16",
                "heads.out=8",
                "data.workers=0",
                "data.val_images=16",
                "train.batch=16",
                "train.micro_batch=16",
                "train.epochs=1",
                "train.steps_per_epoch=1",
                "train.warmup_epochs=0",
                "rating.batch=16",
                "rating.calibration_images=16",
                "rating.every_epochs=0",
                "checkpoint.asynchronous=false",
                f"out={folder}",
            ],
        )
    )
    net, report = taken_over(folder)
    assert [part.partition(".")[0] for part in report.fresh] == ["head", "head"]
    config = read_config(folder)
    target = Supernet(spaces.make(**config.space.model_dump()), 16, 8).eval()
    state = checkpoint.read(checkpoint.latest(folder / "checkpoints"), ("target",))
    target.load_state_dict({key.removeprefix("target."): tensor for key, tensor in state.items()})
    winners = [decode(text) for text in json.loads((folder / "winners.json").read_text())["winners"]]
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(net.forward_features(x), target.features(winners, x), rtol=1e-5, atol=1e-5)
    assert all(m.running_mean.any() and m.momentum == 0.1 for m in net.modules() if isinstance(m, GroupedBatchNorm))
