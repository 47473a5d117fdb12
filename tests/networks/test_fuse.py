"""Batch norms folded away: the same logits with fewer layers, and only where that is right."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from bossnas.errors import ConfigError
from bossnas.networks import fuse
from bossnas.networks.bossnet import BossNet, SelfAttention
from bossnas.networks.fuse import fuse_bn
from bossnas.networks.mbconv import MBConvNet
from bossnas.networks.nats import NatsNet

TINY = {"width": 8, "num_classes": 10}


def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """With statistics, scales and shifts as trained networks have them: fresh ones hide mistakes, with last norms 0."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.weight, 0.5, 1.5),
                (module.bias, -0.3, 0.3),
                (module.running_mean, -0.3, 0.3),
                (module.running_var, 0.5, 2.0),
            ):
                tensor.data.uniform_(low, high, generator=generator)
    return model


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def largest(model: nn.Module, other: nn.Module, images: torch.Tensor) -> float:
    with torch.no_grad():
        logits = model(images)
        return float((logits - other(images)).abs().max() / logits.abs().max())


@pytest.mark.quick
@pytest.mark.parametrize(
    "options", [{}, {"act": "relu", "se": False, "last_stride": 1}, {"encoding": ((), (0, 0), (1,), (0,))}]
)
def test_every_norm_of_a_bossnet_folds(options):
    torch.manual_seed(0)
    model = lively(BossNet(**TINY, **options, drop_path_rate=0.1)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fused = fuse_bn(model)
    assert norms(model) > 10 and norms(fused) == 0
    assert not fused.training and model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()), "the network changed"
    images = torch.randn(3, 3, 48, 48)
    assert largest(model.eval(), fused, images) < 1e-5
    double = fuse_bn(model.double())
    assert largest(model, double, images.double()) < 1e-13


def test_the_norm_after_self_attention_goes_into_the_values():
    torch.manual_seed(0)
    attention, norm = SelfAttention(128), lively(nn.BatchNorm2d(128))
    model = nn.Sequential(nn.Conv2d(3, 128, 3), attention, norm).eval()
    fused = fuse_bn(model)
    assert isinstance(fused[2], nn.Identity)
    assert torch.equal(fused[1].to_qkv.weight[:256], attention.to_qkv.weight[:256])
    assert not fused[1].to_qkv.bias[:256].any() and fused[1].to_qkv.bias[256:].any()
    assert largest(model, fused, torch.randn(2, 3, 9, 9)) < 1e-5


def test_the_networks_of_the_other_spaces_fold():
    torch.manual_seed(0)
    mbconv = lively(MBConvNet(["01", "2301", "0123", "3210", "1032"], width=0.25, num_classes=10)).eval()
    assert norms(fused := fuse_bn(mbconv)) == 0
    assert largest(mbconv, fused, torch.randn(2, 3, 64, 64)) < 1e-5
    nats = lively(NatsNet([8, 12, 8, 8, 8], num_classes=10)).eval()
    assert norms(fused := fuse_bn(nats)) == 1, "the last one, which follows a sum, alone is left"
    assert largest(nats, fused, torch.randn(2, 3, 32, 32)) < 1e-5


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_b0"])
def test_networks_of_timm_fold(name):
    torch.manual_seed(0)
    model = lively(timm.create_model(name, num_classes=10)).eval()
    fused = fuse_bn(model)
    assert norms(fused) == 0 and largest(model, fused, torch.randn(2, 3, 64, 64)) < 1e-5


class Forked(nn.Module):
    """A convolution whose result is read twice, one that runs twice, and one that a single norm reads."""

    def __init__(self):
        super().__init__()
        self.twice, self.shared, self.plain = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.bn1, self.bn2, self.bn3 = (nn.BatchNorm2d(3) for _ in range(3))

    def forward(self, x):
        x = self.twice(x)
        x = self.bn1(x) + x
        x = self.bn2(self.shared(x)) + self.shared(x)
        return self.bn3(self.plain(x)).mean((2, 3))


def test_what_something_else_reads_stays():
    torch.manual_seed(0)
    model = lively(Forked()).eval()
    fused = fuse_bn(model)
    assert [type(m) for m in (fused.bn1, fused.bn2, fused.bn3)] == [nn.BatchNorm2d, nn.BatchNorm2d, nn.Identity]
    assert largest(model, fused, torch.randn(2, 3, 8, 8)) < 1e-5


class ByValue(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.bn(self.conv(x)) if x.mean() > 0 else x


def test_what_cannot_be_folded_is_named():
    with pytest.raises(ConfigError, match="fuse_bn: the network has no batch norm that can be folded"):
        fuse_bn(timm.create_model("vit_tiny_patch16_224", depth=1))
    with pytest.raises(ConfigError, match="forward pass of ByValue cannot be traced"):
        fuse_bn(ByValue())


@pytest.mark.quick
def test_a_wrong_fold_is_found(monkeypatch):
    monkeypatch.setattr(fuse, "_fold", lambda conv, norm, rows=slice(None): None)
    with pytest.raises(ConfigError, match="folding the batch norms of BossNet changed its results by"):
        fuse_bn(lively(BossNet(**TINY)))
