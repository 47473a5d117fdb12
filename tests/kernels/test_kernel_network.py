"""A retrained network whose layers are the Triton kernels: as the plain one, forward and backward."""

from __future__ import annotations

import copy

import pytest
import torch
from compare import TOLERANCE
from torch import nn

import bossnas_kernels
from bossnas.networks.bossnet import BossNet
from bossnas.networks.kernel_layers import use_kernels


@pytest.fixture(autouse=True)
def auto():
    yield
    bossnas_kernels.use("auto")


@pytest.mark.quick
def test_a_network_of_both_kinds_of_blocks(device):
    torch.manual_seed(0)
    plain = BossNet(encoding=((1,), (0,), (), ()), width=8, num_classes=5)
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.1)
    plain = plain.to(device).to(memory_format=torch.channels_last)
    other = copy.deepcopy(plain)
    assert use_kernels(other, "triton", device) == "triton"
    # 8 values per channel in the last maps: fewer would magnify rounding in both
    images = torch.randn(2, 3, 64, 64, device=device).contiguous(memory_format=torch.channels_last)
    logits, gradients = [], []
    for model in (plain, other):
        logits.append(model(images))
        gradients.append(torch.autograd.grad(logits[-1].square().sum(), model.parameters()))
    tolerance = 10 * TOLERANCE[torch.float32]  # both sides round in every layer
    assert (logits[0] - logits[1]).abs().max() <= tolerance * logits[0].abs().max()
    largest = max(gradient.abs().max() for gradient in gradients[0])
    for a, b in zip(*gradients, strict=True):
        assert (a - b).abs().max() <= tolerance * largest
    buffers = dict(other.named_buffers())
    for name, buffer in plain.named_buffers():
        assert (buffer - buffers[name]).abs().max() <= tolerance * buffer.abs().max().clamp_min(1), name
