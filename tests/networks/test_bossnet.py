"""BossNet against the released model definition, and what timm and users ask of it."""

from __future__ import annotations

import copy
import json
import math
import zlib

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from bossnas.networks import registry  # noqa: F401  (registers the networks in timm)
from bossnas.networks.bossnet import AttentionBlock, BossNet, ConvBlock, DropPath, SelfAttention
from bossnas.spaces import cost

SMALL = ((1,), (), (1, 0), (0, 1))


def small(**options):
    torch.manual_seed(0)
    return BossNet(SMALL, 8, **{"num_classes": 5, **options})


def opened(net):
    """With branches that do something: their last norms start at zero."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    return net


def golden_tensor(name, shape):
    n = np.random.RandomState(zlib.crc32(name.encode()) & 0xFFFFFFFF).standard_normal(shape).astype(np.float32)
    if name.endswith("num_batches_tracked"):
        return torch.zeros((), dtype=torch.int64)
    if name.endswith("running_mean"):
        n = 0.1 * n
    elif name.endswith("running_var"):
        n = 1 + 0.1 * np.abs(n)
    elif len(shape) >= 2:
        n = n * np.sqrt(2 / np.prod(shape[1:]))
    else:
        n = 0.1 * n if name.endswith("bias") else 1 + 0.1 * n
    if name.endswith(("bn3.weight", "net.5.weight")):
        n = 0.2 * n
    return torch.from_numpy(np.asarray(0.1 * n if name.endswith("fc.weight") else n, np.float32))


# ---- the release


@pytest.fixture(scope="module")
def released():
    torch.manual_seed(0)
    return BossNet()


@pytest.mark.quick
def test_names_and_shapes_are_the_releases(shared, released):
    manifest = json.loads((shared / "golden/bossnet_T0_manifest.json").read_text())["state_dict"]
    assert [[name, list(tensor.shape)] for name, tensor in released.state_dict().items()] == [
        [name, list(shape)] for name, shape, *_ in manifest
    ]
    assert len(manifest) == 380 and sum(p.numel() for p in released.parameters()) == 38_415_960


def test_golden_logits_gradients_and_buffers(shared, released):
    net = copy.deepcopy(released)
    net.load_state_dict({name: golden_tensor(name, tuple(t.shape)) for name, t in net.state_dict().items()})
    x = torch.from_numpy(np.random.RandomState(0).standard_normal((2, 3, 224, 224)).astype(np.float32))
    with torch.no_grad():
        logits = net.eval()(x).numpy()
    golden = np.load(shared / "golden/bossnet_T0_B_eval_224.npz")["logits"]
    assert np.abs(logits - golden).max() < 1e-5
    golden = np.load(shared / "golden/bossnet_T0_B_train_224.npz")
    logits = net.train()(x)
    loss = F.cross_entropy(logits, torch.tensor([3, 7]))
    loss.backward()
    assert np.abs(logits.detach().numpy() - golden["logits"]).max() < 1e-5
    assert loss.item() == pytest.approx(float(golden["loss"]), abs=1e-5)
    gradients = {name: p.grad.norm().item() for name, p in net.named_parameters()}
    expected = dict(zip(golden["grad_names"].tolist(), golden["grad_norms"].tolist(), strict=True))
    assert gradients.keys() == expected.keys()
    large = [name for name in expected if expected[name] > 1e-3]
    assert len(large) > 200
    assert max(abs(gradients[name] / expected[name] - 1) for name in large) < 2e-3
    buffers = {key.removeprefix("buf:"): golden[key] for key in golden.files if key.startswith("buf:")}
    assert buffers
    for name, value in buffers.items():
        np.testing.assert_allclose(net.get_buffer(name).numpy(), value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name, size, params, gmacs",
    [
        ("bossnet_t0_nose", 224, 37_319_080, 3.4419),
        ("bossnet_t0", 224, 38_415_960, 3.4430),
        ("bossnet_t0_288", 288, 38_415_960, 5.7319),
        ("bossnet_t1", 224, 38_415_960, 7.9444),
        ("bossnet_t1_256", 256, 38_415_960, 10.5091),
    ],
)
def test_cost_of_the_released_networks(name, size, params, gmacs):
    with torch.device("meta"):
        net = timm.create_model(name).eval()
        found = cost.count([net], lambda: net(torch.zeros(1, 3, size, size)))
    assert found["params"] == params and round(found["macs"] / 1e9, 4) == gmacs
    assert net.default_cfg["input_size"] == (3, size, size) and net.default_cfg["crop_pct"] == 0.875


# ---- the network


def test_attention_is_the_sum_over_the_values():
    torch.manual_seed(0)
    attention = SelfAttention(128)
    x = torch.randn(2, 128, 3, 2)
    assert attention.heads == 2
    q, k, v = attention.to_qkv(x).flatten(2).split(128, 1)
    expected = torch.zeros(2, 128, 6)
    for head in (slice(0, 64), slice(64, 128)):
        for i in range(6):
            weights = ((q[:, head, i, None] * k[:, head]).sum(1) / 8).softmax(1)
            expected[:, head, i] = (weights[:, None] * v[:, head]).sum(2)
    torch.testing.assert_close(attention(x).flatten(2), expected, rtol=1e-4, atol=1e-5)
    assert SelfAttention(96).heads == 1 and SelfAttention(6).heads == 1


def test_stages_strides_and_empty_stages():
    net = small()
    assert [len(stage) for stage in net.stages()] == [1, 3, 2, 2]  # the empty one: three plain layers
    assert isinstance(net.layer2[0], nn.Conv2d) and net.layer2[0].stride == (2, 2)
    sizes = []
    for stage in net.stages():
        stage.register_forward_hook(lambda module, inputs, output: sizes.append(tuple(output.shape[1:])))
    net(torch.randn(2, 3, 64, 64))
    assert sizes == [(32, 16, 16), (64, 8, 8), (128, 4, 4), (256, 2, 2)]
    assert small(last_stride=1).forward_features(torch.randn(2, 3, 64, 64)).shape == (2, 256, 4, 4)
    empty = BossNet(((), (), (), ()), 8, num_classes=5)
    assert empty(torch.randn(2, 3, 64, 64)).shape == (2, 5)


@pytest.mark.parametrize("size", [(33, 33), (47, 65), (32, 50)])
def test_any_size_of_images(size):
    net = opened(small())
    assert net(torch.randn(2, 3, *size)).shape == (2, 5)


def test_shortcuts_pool_before_the_convolution_and_have_no_activation():
    block = opened(ConvBlock(8, 4, 2, "relu", False, 0.0)).eval()
    x = torch.randn(2, 8, 5, 5)
    pool, conv, norm = block.downsample
    expected = norm(conv(F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)))
    assert (expected < 0).any()
    torch.testing.assert_close(block.downsample(x), expected)
    assert isinstance(ConvBlock(16, 4, 1, "relu", False, 0.0).downsample, nn.Identity)
    assert isinstance(AttentionBlock(8, 4, 1, "relu").shortcut[0], nn.Identity)  # wider, but of the same size


@pytest.mark.quick
def test_initial_weights():
    torch.manual_seed(0)
    net = BossNet(((1,), (0,), (), ()), 32, num_classes=5)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.weight.shape[0] * module.weight[0, 0].numel()  # groups are not counted
            if module.weight.numel() > 2000:
                assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.1)
            assert module.bias is None or not module.bias.any()
    assert not net.layer1[0].bn3.weight.any() and not net.layer2[0].net[5].weight.any()
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert sum(not norm.weight.any() for norm in norms) == 2


def test_squeeze_and_excitation_stands_in_convolution_blocks_alone():
    def gates(net):
        return [name for name, _ in net.named_parameters() if ".se." in name]

    assert {name.rsplit(".", 3)[0] for name in gates(small())} == {"layer1.0", "layer3.0", "layer4.1"}
    assert not gates(small(se=False))
    assert small().layer1[0].se.fc1.weight.shape == (2, 32, 1, 1)


# ---- stochastic depth


def test_stochastic_depth_rises_along_the_blocks_and_spares_attention():
    net = BossNet(((1,), (1,), (0, 1), (0, 1)), 4, num_classes=2, drop_path_rate=0.5)
    rates = {name: module.rate for name, module in net.named_modules() if isinstance(module, DropPath)}
    assert rates == pytest.approx({"layer2.0.drop_path": 0.1, "layer3.1.drop_path": 0.3, "layer4.1.drop_path": 0.5})
    assert not any(isinstance(m, DropPath) for m in small().modules())


def test_stochastic_depth_keeps_the_expectation():
    torch.manual_seed(0)
    drop = DropPath(0.25)
    y = drop(torch.ones(4000, 2, 3, 3))
    assert y.unique().tolist() == pytest.approx([0, 4 / 3])
    assert (y == y[:, :1, :1, :1]).all(), "an image is kept or left out as a whole"
    assert y.mean().item() == pytest.approx(1, abs=0.03)
    assert torch.equal(drop.eval()(y), y)


# ---- what timm's networks have


def test_gradient_checkpointing_changes_nothing():
    plain = opened(small(drop_path_rate=0.3)).train()
    again = copy.deepcopy(plain)
    again.set_grad_checkpointing()
    x, runs = torch.randn(4, 3, 64, 64), []
    again.layer4[1].conv2.register_forward_hook(lambda *_: runs.append(1))
    for net in (plain, again):
        torch.manual_seed(1)
        net(x).square().sum().backward()
    assert len(runs) == 2, "the forward pass runs twice"
    for (name, a), b in zip(plain.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name
    for (name, a), b in zip(plain.named_buffers(), again.named_buffers(), strict=True):
        assert torch.equal(a, b[1]), name
    assert all(m.momentum == 0.1 for m in again.modules() if isinstance(m, nn.BatchNorm2d))


def test_features_only():
    net = timm.create_model("bossnet", encoding=SMALL, width=8, features_only=True)
    assert net.feature_info.channels() == [8, 32, 64, 128, 256]
    assert net.feature_info.reduction() == [2, 4, 8, 16, 32]
    maps = net(torch.randn(2, 3, 64, 64))
    assert [tuple(m.shape[1:]) for m in maps] == [(8, 32, 32), (32, 16, 16), (64, 8, 8), (128, 4, 4), (256, 2, 2)]
    two = timm.create_model("bossnet", encoding=SMALL, width=8, features_only=True, out_indices=(1, 3))
    assert two.feature_info.channels() == [32, 128]


def test_features_are_the_networks_own():
    torch.manual_seed(0)
    whole = opened(timm.create_model("bossnet", encoding=SMALL, width=8)).eval()
    features = timm.create_model("bossnet", encoding=SMALL, width=8, features_only=True).eval()
    missing, unexpected = features.load_state_dict(whole.state_dict(), strict=False)
    assert not missing and set(unexpected) == {"fc.weight", "fc.bias"}
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(features(x)[-1], whole.forward_features(x))


def test_classifiers_channels_and_pooling():
    x = torch.randn(2, 3, 64, 64)
    net = small().eval()
    assert net.get_classifier() is net.fc and net.num_features == 256
    pooled = net.forward_head(net.forward_features(x), pre_logits=True)
    torch.testing.assert_close(net.fc(pooled), net(x))
    net.reset_classifier(0)
    assert torch.equal(net(x), pooled)
    net.reset_classifier(0, "")
    assert net(x).shape == (2, 256, 2, 2)
    net.reset_classifier(3, "avg")
    assert net(x).shape == (2, 3) and net.num_classes == 3
    assert small(num_classes=0)(x).shape == (2, 256)
    assert small(in_chans=1)(torch.randn(2, 1, 64, 64)).shape == (2, 5)
    dropped = small(drop_rate=0.9).train()
    assert not torch.equal(dropped(x), dropped(x)) and torch.equal(dropped.eval()(x), dropped(x))


@pytest.mark.parametrize(
    "options, names",
    [
        ({"encoding": ((1,), (1,), (1,))}, "encoding"),
        ({"encoding": ((1,), (2,), (1,), (0,))}, "encoding"),
        ({"act": "gelu"}, "act"),
        ({"last_stride": 3}, "last_stride"),
        ({"global_pool": "max"}, "global_pool"),
        ({"global_pool": "", "num_classes": 5}, "global_pool"),
    ],
)
def test_impossible_values_are_named(options, names):
    with pytest.raises(ValueError, match=f"^{names}: expected"):
        BossNet(**{"encoding": SMALL, "width": 4, "num_classes": 2, **options})


@pytest.mark.quick
def test_trains_and_its_branches_open():
    torch.manual_seed(0)
    net = BossNet(((1,), (0,), (1,), (0,)), 4, num_classes=2).train()
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    x, y = torch.randn(8, 3, 32, 32), torch.arange(8) % 2
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert net.layer1[0].bn3.weight.any() and net.layer4[0].net[5].weight.any()
