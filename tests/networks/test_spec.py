"""The networks of the other spaces, alone and in timm, and networks by description."""

from __future__ import annotations

import copy
import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from bossnas import spaces
from bossnas.errors import ConfigError
from bossnas.networks.from_space import Standalone, standalone
from bossnas.networks.mbconv import InvertedResidual, MBConvNet
from bossnas.networks.nats import NatsNet
from bossnas.networks.spec import FORMAT, Spec, build_network, load_network, save_network
from bossnas.spaces import cost, ops
from bossnas.spaces.ops import GroupedBatchNorm
from bossnas.spaces.paths import decode

PATHS = ["21", "1023", "3210", "0123", "1132"]
WIDTHS = [24, 40, 40, 16, 24]
OWN = "tests/workers/hop_space.py:Hop"
MODELS = {
    "mbconv": ("bossnas_mbconv", {"paths": PATHS, "width": 0.125}),
    "nats": ("bossnas_nats", {"widths": WIDTHS}),
    "own": ("bossnas_own", {"space": OWN, "paths": ["01", "20", "12"]}),
}


@pytest.fixture(autouse=True)
def at_the_root(project_root, monkeypatch):
    monkeypatch.chdir(project_root)  # the own space's file is named from there


def make(name, **options):
    torch.manual_seed(0)
    model, own = MODELS[name]
    return timm.create_model(model, **own, **{"num_classes": 5, **options})


def opened(net):
    for module in net.modules():
        if isinstance(module, (nn.BatchNorm2d, GroupedBatchNorm)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    return net


def size(net, images):
    return cost.count([net.eval()], lambda: net(torch.zeros(1, 3, images, images)))


# ---- against the spaces


@pytest.mark.parametrize("width", [0.25, 1.0])
def test_mbconv_without_its_last_layers_costs_what_the_search_counts(width):
    space = spaces.make("mbconv", width=width, image_size=64, restricted=True, split="cifar10")
    paths = [decode(path) for path in PATHS]
    found, net = cost.CostTable.of(space, 64).network(paths), MBConvNet(PATHS, width, last=False, num_classes=5)
    head = net.fc.weight.numel()
    assert size(net, 64) == {"macs": found["macs"] + head, "params": found["params"] + head + 5}
    shapes = sorted(tuple(p.shape) for p in standalone(space, paths, 5).parameters())
    assert sorted(tuple(p.shape) for p in net.parameters()) == shapes


def test_mbconv_ends_as_efficientnets_do():
    searched, net = MBConvNet(PATHS, last=False), MBConvNet(PATHS)
    block = InvertedResidual(192, 320, 6, 3, 1, 0.0)
    added = sum(p.numel() for p in block.parameters()) + 320 * 1280 + 2 * 1280
    added += (1280 - 192) * 1000  # of the classifier
    assert sum(p.numel() for p in net.parameters()) == sum(p.numel() for p in searched.parameters()) + added
    assert net.num_features == 1280 and searched.num_features == 192
    assert net.block6[0].conv2.kernel_size == (3, 3) and not isinstance(net.act_head, nn.Identity)
    ids = [(layer.conv1.out_channels // layer.conv1.in_channels, layer.conv2.kernel_size[0]) for layer in net.block2]
    assert ids == [(6, 5), (6, 3), (3, 3), (3, 5)]  # candidates 1, 0, 2, 3


def test_mbconvs_shortcuts():
    """Always there: pooled where the size halves, convolved where the width changes, both, or the map itself."""
    kinds = [
        [type(part).__name__ for part in layer.shortcut]
        for block in ("block1", "block3", "block4")
        for layer in getattr(MBConvNet(PATHS), block)[:2]
    ]
    assert kinds == [
        ["AvgPool2d", "Conv2d", "BatchNorm2d"],
        [],
        ["AvgPool2d", "Conv2d", "BatchNorm2d"],
        [],
        ["Conv2d", "BatchNorm2d"],
        [],
    ]
    block = opened(InvertedResidual(8, 8, 3, 3, 1, 0.0)).eval()
    x = torch.randn(2, 8, 5, 5)
    nn.init.zeros_(block.bn3.weight)
    nn.init.zeros_(block.bn3.bias)
    assert torch.equal(block(x), x), "no activation after the sum"


@pytest.mark.parametrize("widths", [[64, 40, 32, 32, 24], [8, 8, 8, 8, 8], [64] * 5])
def test_nats_has_the_benchmarks_parameters(widths):
    """By hand, from the definition of the cells: 3x3 and 1x1 convolutions and norms of two numbers each."""

    def cell(kind, c_in, c):
        if kind == "N":
            skip = 0 if c_in == c else c_in * c + 2 * c
            return 2 * (9 * c_in * c + 2 * c) + 3 * (9 * c * c + 2 * c) + skip
        return 9 * c_in * c + 2 * c + 9 * c * c + 2 * c + c_in * c

    total, c_in = 27 * widths[0] + 2 * widths[0], widths[0]
    for kind, c in zip("NRNRN", widths, strict=True):
        total, c_in = total + cell(kind, c_in, c), c
    total += 2 * c_in + 10 * c_in + 10
    for skip_relu in (False, True):
        assert sum(p.numel() for p in NatsNet(widths, skip_relu).parameters()) == total
    space = spaces.make("nats", width=1.0, image_size=32, restricted=True, split="cifar10")
    ids = [c // 8 - 1 for c in widths]
    searched = cost.CostTable.of(space, 32).network([tuple(ids[:2]), tuple(ids[2:4]), (ids[4],)])
    found = size(NatsNet(widths), 32)
    assert found == {"macs": searched["macs"] + 10 * c_in, "params": total}


def test_nats_skips_have_no_relu_in_the_benchmark():
    plain, relu = NatsNet(WIDTHS), NatsNet(WIDTHS, skip_relu=True)
    assert isinstance(plain.layer1.skip, nn.Identity) and isinstance(relu.layer1.skip, nn.Identity)
    assert isinstance(plain.layer5.skip[0], nn.Identity) and isinstance(relu.layer5.skip[0], nn.ReLU)
    assert plain.state_dict().keys() == relu.state_dict().keys()
    x = -torch.rand(2, 16, 8, 8)
    assert plain.layer5.skip[1](x).any() and not relu.layer5.skip[:2](x).any()


@pytest.mark.quick
@pytest.mark.parametrize("name", MODELS)
def test_images_of_odd_sizes(name):
    assert opened(make(name))(torch.randn(2, 3, 35, 49)).shape == (2, 5)


# ---- what timm's networks have


@pytest.mark.parametrize("name", MODELS)
def test_timms_arguments(name):
    x = torch.randn(2, 3, 32, 32)
    net = make(name).eval()
    assert net(x).shape == (2, 5) and net.num_classes == 5 and net.get_classifier().out_features == 5
    assert net.default_cfg["architecture"] == MODELS[name][0]
    pooled = net.forward_head(net.forward_features(x), pre_logits=True)
    assert pooled.shape == (2, net.num_features)
    torch.testing.assert_close(net.get_classifier()(pooled), net(x))
    assert net.forward_features(x).ndim == 4
    net.reset_classifier(3)
    assert net(x).shape == (2, 3) and net.num_classes == 3
    net.reset_classifier(0)
    assert torch.equal(net(x), pooled)
    net.reset_classifier(0, "")
    assert net(x).ndim == 4
    assert make(name, num_classes=0)(x).shape == (2, net.num_features)
    assert make(name, num_classes=0, global_pool="")(x).ndim == 4
    with pytest.raises(ValueError, match="global_pool"):
        make(name, global_pool="max")
    dropped = make(name, drop_rate=0.9).train()
    assert not torch.equal(dropped(x), dropped(x)) and torch.equal(dropped.eval()(x), dropped(x))
    assert dropped.state_dict().keys() == make(name).state_dict().keys()
    if name != "own":
        assert make(name, in_chans=1)(x[:, :1]).shape == (2, 5)


@pytest.mark.quick
@pytest.mark.parametrize("name", ["mbconv", "nats"])
def test_features_only(name):
    torch.manual_seed(0)
    model, own = MODELS[name]
    features = timm.create_model(model, features_only=True, **own).eval()
    maps = features(torch.randn(2, 3, 64, 64))
    assert [m.shape[1] for m in maps] == features.feature_info.channels()
    assert (
        [64 // m.shape[2] for m in maps]
        == features.feature_info.reduction()
        == ([2, 4, 8, 16, 32] if name == "mbconv" else [1, 2, 4])
    )
    hooked = timm.create_model(model, features_only=True, feature_cls="hook", **own).eval()
    assert [m.shape for m in hooked(torch.randn(2, 3, 64, 64))] == [m.shape for m in maps]


@pytest.mark.parametrize("name", [*MODELS, "built-in"])
def test_gradient_checkpointing_changes_nothing(name):
    torch.manual_seed(0)
    if name == "built-in":  # by its space, with many norms in a layer
        plain = timm.create_model("bossnas_own", space="nats", paths=["74", "33", "2"], width=0.25, num_classes=5)
    else:
        plain = make(name, **({} if name == "own" else {"drop_path_rate": 0.3}))
    opened(plain).train()
    again = copy.deepcopy(plain)
    again.set_grad_checkpointing()
    before = {key: tensor.clone() for key, tensor in plain.named_buffers()}
    x, runs = torch.randn(4, 3, 32, 32), []
    convolution = [m for m in again.modules() if isinstance(m, nn.Conv2d)][-3]
    convolution.register_forward_hook(lambda *_: runs.append(1))
    for net in (plain, again):
        torch.manual_seed(1)
        net(x).square().sum().backward()
    assert len(runs) >= 1 + (name != "mbconv"), "the forward pass runs twice"  # its last layers are not within a block
    for (key, a), b in zip(plain.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), key
    for (key, a), b in zip(plain.named_buffers(), again.named_buffers(), strict=True):
        assert torch.equal(a, b[1]) and not torch.equal(a, before[key]), key


def test_stochastic_depth_leaves_the_shortcut():
    for net in (MBConvNet(PATHS, 0.125, num_classes=2, drop_path_rate=0.4), NatsNet([8] * 5, drop_path_rate=0.4)):
        rates = [m.rate for m in net.modules() if type(m).__name__ == "DropPath"]
        assert rates == sorted(rates) and rates[-1] == pytest.approx(0.4)
        assert len(rates) == (18 if isinstance(net, MBConvNet) else 4)
    block = opened(InvertedResidual(8, 8, 3, 3, 1, 0.5)).train()
    torch.manual_seed(0)
    x = torch.randn(64, 8, 4, 4)
    kept = (block(x) != x).flatten(1).any(1)
    assert 16 < kept.sum() < 48
    cell = NatsNet([8] * 5, drop_path_rate=0.5).train().layer5
    kept = (cell(x) != x).flatten(1).any(1)
    assert 16 < kept.sum() < 48


@pytest.mark.parametrize(
    "name, options, text",
    [
        ("bossnas_mbconv", {}, "paths: is needed"),
        ("bossnas_mbconv", {"paths": PATHS[:4]}, "blocks of 2, 4, 4, 4, 4"),
        ("bossnas_mbconv", {"paths": ["24", *PATHS[1:]]}, "0 to 3"),
        ("bossnas_mbconv", {"paths": ["2x", *PATHS[1:]]}, "0 to 3"),
        ("bossnas_nats", {}, "widths: is needed"),
        ("bossnas_nats", {"widths": [8, 8]}, "five channel numbers"),
        ("bossnas_nats", {"widths": [8, 8, 0, 8, 8]}, "five channel numbers"),
        ("bossnas_own", {"paths": ["01"]}, "space: is needed"),
        ("bossnas_own", {"space": OWN}, "paths: is needed"),
        ("bossnas_own", {"space": OWN, "paths": ["01", "20"]}, "no architecture"),
        ("bossnas_own", {"space": OWN, "paths": ["22", "22", "00"]}, "no architecture"),
        ("bossnas_own", {"space": "missing.py:A", "paths": ["01"]}, "there is no file"),
        ("bossnas_own", {"space": OWN, "paths": ["01", "20", "12"], "drop_path_rate": 0.1}, "stochastic depth"),
        ("bossnas_own", {"space": OWN, "paths": ["01", "20", "12"], "in_chans": 1}, "in_chans"),
        ("bossnas_own", {"space": OWN, "paths": ["01", "20", "12"], "features_only": True}, "features_only"),
    ],
)
def test_impossible_arguments_are_named(name, options, text):
    with pytest.raises(ValueError, match=text):
        timm.create_model(name, **options)


@pytest.mark.parametrize("name", ["bossnet_t0", "bossnas_nats"])
def test_there_are_no_hosted_weights(name):
    with pytest.raises(RuntimeError, match=f"^{name} has no hosted weights: .*checkpoint_path"):
        timm.create_model(name, pretrained=True, **({"widths": WIDTHS} if name == "bossnas_nats" else {}))


@pytest.mark.parametrize("name", MODELS)
def test_a_file_of_weights(name, tmp_path):
    trained = opened(make(name)).eval()
    torch.save({"model": {f"module.{key}": tensor for key, tensor in trained.state_dict().items()}}, tmp_path / "a.pth")
    net = make(name, checkpoint_path=str(tmp_path / "a.pth")).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(net(x), trained(x))


# ---- own spaces train by themselves


@pytest.mark.parametrize("shape", [(6, 3, 4, 5), (6, 3)])
def test_norms_of_own_spaces_follow_the_batches_as_torchs_do(shape):
    torch.manual_seed(0)
    own = GroupedBatchNorm(3)
    own.momentum = 0.1
    theirs = (nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d)(3)
    for _ in range(3):
        x = 3 + 2 * torch.randn(shape)
        torch.testing.assert_close(own(x), theirs(x))
    torch.testing.assert_close(own.running_mean, theirs.running_mean)
    torch.testing.assert_close(own.running_var, theirs.running_var)
    torch.testing.assert_close(own.eval()(x), theirs.eval()(x))
    kept = own.running_mean.clone()
    own.train()(x, stats=ops.Statistics())
    own.eval()(x)
    assert torch.equal(own.running_mean, kept), "a calibration and an evaluation move nothing"


def test_synchronised_norms_follow_the_batches_too():
    plain, synchronised = GroupedBatchNorm(3), GroupedBatchNorm(3)
    plain.momentum = synchronised.momentum = 0.1
    ops.synchronise(synchronised, average=lambda t: t)
    x = 3 + 2 * torch.randn(6, 3, 4, 5)
    torch.testing.assert_close(synchronised(x), plain(x))
    torch.testing.assert_close(synchronised.running_mean, plain.running_mean)
    torch.testing.assert_close(synchronised.running_var, plain.running_var)


def test_the_supernets_norms_follow_nothing():
    norm = GroupedBatchNorm(3)
    norm(torch.randn(6, 3, 4, 5))
    pooled = ops.PooledPointwise(3, 2)
    pooled(torch.randn(6, 3, 4, 5))
    for each in (norm, pooled.norm):
        assert not each.running_mean.any() and (each.running_var == 1).all()


@pytest.mark.quick
def test_an_own_network_trains():
    net = make("own", num_classes=2).train()
    assert isinstance(net, Standalone)
    x, y = torch.randn(8, 3, 32, 32), torch.arange(8) % 2
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    for _ in range(25):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    with torch.no_grad():
        assert (net.eval()(x).argmax(1) == y).all(), "the running statistics fit"
    space = spaces.make(OWN, width=1.0, image_size=32, restricted=True, split="cifar10")
    assert all(
        m.momentum is None
        for m in standalone(space, [(0, 1), (2, 0), (1, 2)], 2).modules()
        if isinstance(m, GroupedBatchNorm)
    )


# ---- networks by description


@pytest.mark.quick
@pytest.mark.parametrize("name", MODELS)
def test_a_network_comes_back_from_its_file(name, tmp_path):
    model, own = MODELS[name]
    spec = Spec(model, own, 5, 32)
    net = opened(build_network(spec)).eval()
    save_network(tmp_path / "a.safetensors", spec, net.state_dict(), {"top1": 12.5})
    loaded = load_network(tmp_path / "a.safetensors")
    assert loaded.spec == spec and loaded.about == {"top1": 12.5}
    again = build_network(Spec.from_json(json.loads(json.dumps(spec.to_json())))).eval()
    again.load_state_dict(loaded.weights)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(again(x), net(x))


def test_weights_that_share_memory_are_saved_each(tmp_path):
    weight = torch.arange(6.0)
    save_network(tmp_path / "a.safetensors", Spec("any"), {"a": weight, "b": weight, "c": weight[1:]}, {})
    assert {name: t.tolist() for name, t in load_network(tmp_path / "a.safetensors").weights.items()} == {
        "a": [0, 1, 2, 3, 4, 5],
        "b": [0, 1, 2, 3, 4, 5],
        "c": [1, 2, 3, 4, 5],
    }


@pytest.mark.parametrize(
    "spec, training, text",
    [
        (Spec("bossnet_t9"), {}, "model.name: timm knows no 'bossnet_t9'"),
        (Spec("bossnas_nats", {"widths": [8]}), {}, "model.options: bossnas_nats does not take"),
        (Spec("bossnet_t0", {"depth": 3}), {}, "model.options: bossnet_t0 does not take .*depth"),
        (Spec(*MODELS["own"]), {"drop_path_rate": 0.1}, "no stochastic depth"),
        (Spec("vgg11"), {"drop_path_rate": 0.1}, "vgg11 does not take .*or set model.drop_path to 0"),
        (Spec("bossnet_t0", {"width": -8}), {}, "model.options: bossnet_t0 does not take"),
        (Spec("resnet18", {"norm_layer": "nope"}), {}, "model.options: .*KeyError: 'nope'"),
        (Spec("bossnet_t0.none"), {}, "Invalid pretrained tag"),
        (Spec("bossnet_t0", {"features_only": True}), {}, "features_only is no argument"),
    ],
)
def test_a_description_of_no_network(spec, training, text):
    with pytest.raises(ConfigError, match=text):
        build_network(spec, **training)


def test_a_file_of_something_else(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "plain.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "plain.safetensors").read_bytes()[:-3])
    good, names = (
        Spec("bossnet").to_json(),
        {"plain": "does not say which network", "cut": "cannot read", "none": "cannot read"},
    )
    for key, value in {
        "image_size": "large",
        "classes": None,
        "mean": [0.5],
        "model_args": [1],
        "architecture": 3,
        "crop": "x",
        "colour": 1,
    }.items():
        save_file(
            {"a": torch.zeros(2)},
            tmp_path / f"{key}.safetensors",
            {"format": FORMAT, "spec": json.dumps(good | {key: value}), "about": "{}"},
        )
        names[key] = rf"not the description of a network \({key}"
    save_file(
        {"a": torch.zeros(2)},
        tmp_path / "about.safetensors",
        {"format": FORMAT, "spec": json.dumps(good), "about": "3"},
    )
    names["about"] = "cannot read"
    for name, text in names.items():
        with pytest.raises(ConfigError, match=text):
            load_network(tmp_path / f"{name}.safetensors")
