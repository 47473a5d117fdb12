"""The networks with the kernels' layers against the plain ones: results, gradients, statistics, names."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import bossnas_kernels
from bossnas.errors import ConfigError
from bossnas.networks.bossnet import BossNet
from bossnas.networks.kernel_layers import KernelAttention, KernelNorm, use_kernels
from bossnas.networks.mbconv import MBConvNet
from bossnas.networks.nats import NatsNet
from bossnas.spaces import ops

CPU = torch.device("cpu")
NETWORKS = {
    "bossnet": lambda: BossNet(width=8, num_classes=10, encoding=((1,), (0,), (1, 0), (0,))),
    "bossnet_relu": lambda: BossNet(width=8, num_classes=10, encoding=((), (1,), (0, 0), (1,)), act="relu", se=False),
    "mbconv": lambda: MBConvNet(["01", "2301", "0123", "3210", "1032"], width=0.125, num_classes=10),
    "nats": lambda: NatsNet([8, 12, 8, 8, 8], num_classes=10),
}


@pytest.fixture(autouse=True)
def auto():
    yield
    bossnas_kernels.use("auto")


def both(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """The network as it is and with the kernels' layers, all norms of which do something."""
    torch.manual_seed(0)
    plain = NETWORKS[name]().to(dtype)
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.uniform_(-0.3, 0.3)
    other = copy.deepcopy(plain)
    assert use_kernels(other, "reference", CPU) == "reference"
    return plain, other


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> bool:
    return bool((a - b).abs().max() <= tolerance * a.abs().max().clamp_min(1e-3))


@pytest.mark.parametrize("name", NETWORKS)
def test_training_and_evaluation_equal_the_plain_network(name):
    plain, other = both(name, torch.float64)  # with rounding out of the way, only mistakes are left
    images, labels = torch.randn(4, 3, 64, 64, dtype=torch.float64), torch.tensor([1, 2, 3, 4])
    for _ in range(2):
        results = []
        for model in (plain, other):
            model.zero_grad()
            logits = model.train()(images)
            F.cross_entropy(logits, labels).backward()
            results.append(logits)
        assert close(*results, 1e-10)
    # the gradient of what a batch norm takes away again is rounding, a PEG's bias foremost
    largest = max(float(p.grad.abs().max()) for p in plain.parameters())
    for (key, a), b in zip(plain.named_parameters(), other.parameters(), strict=True):
        assert float((a.grad - b.grad).abs().max()) <= 1e-10 * largest, key
    buffers = dict(other.named_buffers())
    for key, a in plain.named_buffers():
        assert close(a.double(), buffers[key].double(), 1e-10), key
    assert {int(count) for key, count in buffers.items() if key.endswith("num_batches_tracked")} == {2}
    with torch.no_grad():
        assert close(plain.eval()(images), other.eval()(images), 1e-10)


def test_names_and_order_in_the_state_dict_stay():
    plain, other = both("bossnet")
    assert list(plain.state_dict()) == list(other.state_dict())
    assert [name for name, _ in plain.named_parameters()] == [name for name, _ in other.named_parameters()]
    other.load_state_dict(plain.state_dict())


@pytest.mark.quick
def test_every_layer_that_has_a_kernel_is_one():
    _, other = both("bossnet")
    kinds = [type(module) for module in other.modules()]
    assert nn.BatchNorm2d not in kinds and nn.SiLU in kinds  # the one after a sum stays
    assert kinds.count(KernelAttention) == 3
    assert kinds.count(ops.DepthwiseConv) == 5  # the PEGs
    acts = [module.act for module in other.modules() if isinstance(module, KernelNorm)]
    assert acts.count("silu") == 1 + 5 * 2  # the stem's; two in every block
    assert acts.count("none") == 5 + 4  # before every sum; the shortcuts that change the width


@pytest.mark.quick
def test_under_autocast():
    plain, other = both("bossnet")
    images = torch.randn(4, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        a, b = plain.train()(images), other.train()(images)
        b.float().square().mean().backward()
    assert a.dtype == b.dtype == torch.bfloat16
    assert close(a.float(), b.float(), 0.05)  # bf16 keeps 8 bits, and the attention's products come in another order
    assert all(torch.isfinite(parameter.grad).all() for parameter in other.parameters())
    assert other.bn1.running_mean.dtype == torch.float32
    assert close(plain.bn1.running_var, other.bn1.running_var, 1e-3)


def test_a_copy_of_the_network_has_weights_of_its_own():
    _, other = both("bossnet")
    average = copy.deepcopy(other)
    with torch.no_grad():
        other.bn1.weight.add_(1)
    assert not torch.equal(average.bn1.weight, other.bn1.weight)


def test_other_networks_are_refused():
    with pytest.raises(ConfigError, match="kernels: are not made for ResNet; set it to off"):
        use_kernels(timm.create_model("resnet18"), "auto", CPU)
    with pytest.raises(ConfigError, match="kernels: is 'fast'"):
        use_kernels(BossNet(width=8), "fast", CPU)
