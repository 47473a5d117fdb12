"""MBConvNet: the network of an architecture of the MBConv space (METHOD 1.2; DNA, BossNAS section 5). torch alone.

`bossnas export` copies this file into stand-alone network files, so it imports nothing of this project. Modules are
registered in the order in which a forward pass calls them, shortcuts first.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

CANDIDATES = ((6, 3), (6, 5), (3, 3), (3, 5))  # (expansion, kernel) by candidate id
BLOCKS = ((24, 2, 2), (40, 2, 4), (80, 2, 4), (112, 1, 4), (192, 2, 4))  # (width, first stride, layers)
LAST_BLOCK, LAST_WIDTH = 320, 1280  # not searched


class MBConvNet(nn.Module):
    """[N, in_chans, S, S] -> logits [N, num_classes].

    ``paths``: of each of the five blocks its layers' candidate ids, such as ["21", "1023", "3210", "0123", "1132"] or
    lists of numbers. ``width`` multiplies all channels, rounded to multiples of 8. ``last``: end as EfficientNets do,
    with a sixth block of one layer, expansion 6 and kernel 3, and a 1x1 convolution to 1280 channels; without it the
    classifier reads the searched layers, as in the search's costs. ``drop_path_rate``: stochastic depth of the last
    layer, linear from 0 at the first. ``num_classes`` 0: no classifier. Raises ValueError for an impossible value.
    """

    def __init__(
        self,
        paths: Sequence[str | Sequence[int]],
        width: float = 1.0,
        last: bool = True,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
    ):
        super().__init__()
        self.paths = _checked(paths)
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.grad_checkpointing, self.global_pool_type = False, global_pool
        self.arguments = {
            "paths": self.paths,
            "width": width,
            "last": last,
            "num_classes": num_classes,
            "in_chans": in_chans,
            "global_pool": global_pool,
        }  # see export.py
        first, channels = _round8(32 * width), _round8(16 * width)
        self.conv_stem = nn.Conv2d(in_chans, first, 3, 2, 1, bias=False)
        self.bn_stem = nn.BatchNorm2d(first)
        self.act_stem = nn.SiLU()
        self.block0 = SeparableConv(first, channels)
        self.feature_info = [{"num_chs": channels, "reduction": 2, "module": "block0"}]
        blocks = [
            (_round8(c * width), stride, [CANDIDATES[choice] for choice in path])
            for (c, stride, _), path in zip(BLOCKS, self.paths, strict=True)
        ]
        if last:
            blocks.append((_round8(LAST_BLOCK * width), 1, [(6, 3)]))
        total, number, reduction = sum(len(layers) for _, _, layers in blocks), 0, 2
        self.names = [f"block{i}" for i in range(1, len(blocks) + 1)]
        for name, (outer, stride, layers) in zip(self.names, blocks, strict=True):
            reduction *= stride
            block: list[nn.Module] = []
            for expand, kernel in layers:
                rate = drop_path_rate * number / (total - 1)
                block.append(InvertedResidual(channels, outer, expand, kernel, stride, rate))
                channels, number, stride = outer, number + 1, 1
            self.add_module(name, nn.Sequential(*block))
            if self.feature_info[-1]["reduction"] == reduction:  # of a size, the last map counts
                self.feature_info.pop()
            self.feature_info.append({"num_chs": channels, "reduction": reduction, "module": name})
        if last:
            outer = _round8(LAST_WIDTH * width)
            self.conv_head: nn.Module = nn.Conv2d(channels, outer, 1, bias=False)
            self.bn_head: nn.Module = nn.BatchNorm2d(outer)
            self.act_head: nn.Module = nn.SiLU()
            channels = outer
        else:
            self.conv_head, self.bn_head, self.act_head = nn.Identity(), nn.Identity(), nn.Identity()
        self.num_features = self.head_hidden_size = channels
        self.fc: nn.Module = nn.Identity()
        self.reset_classifier(num_classes, global_pool)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Convolutions: normal, variance 2 / fan-out of a group, as in EfficientNet; their biases: zero."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
                nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_out))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """[N, in_chans, S, S] -> the last map [N, C, H, W]."""
        x = self.block0(self.act_stem(self.bn_stem(self.conv_stem(x))))
        for name in self.names:
            block = getattr(self, name)
            if self.grad_checkpointing and self.training:
                for layer in block:
                    x = _checkpointed(layer, x)
            else:
                x = block(x)
        return self.act_head(self.bn_head(self.conv_head(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if self.global_pool_type == "avg":
            x = x.mean((2, 3))
        if self.drop_rate > 0:
            x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier; 0 classes: none. ``global_pool``: avg, or with 0 classes "" for maps; None: as it is."""
        pool = self.global_pool_type if global_pool is None else global_pool
        if pool != "avg" and (pool or num_classes):
            raise ValueError(f"global_pool: expected 'avg', or '' with num_classes 0, got {pool!r}")
        self.global_pool_type = pool
        self.num_classes = num_classes
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keeps no map within a layer in training, and computes it again in the backward pass."""
        self.grad_checkpointing = enable


class SeparableConv(nn.Module):
    """Depthwise 3x3 convolution, squeeze-and-excitation, 1x1 convolution; no shortcut, no activation at the end."""

    is_unit = True  # sharded as one

    def __init__(self, channels: int, outer: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, 1, 1, groups=channels, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act1 = nn.SiLU()
        self.se = SqueezeExcite(channels, max(1, round(channels / 4)))
        self.conv2 = nn.Conv2d(channels, outer, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(self.se(self.act1(self.bn1(self.conv1(x))))))


class InvertedResidual(nn.Module):
    """1x1 convolution to ``expand`` times the channels, depthwise convolution, squeeze-and-excitation, 1x1 convolution;
    always a shortcut, no activation after the sum."""

    is_unit = True

    def __init__(self, channels: int, outer: int, expand: int, kernel: int, stride: int, drop_path: float):
        super().__init__()
        middle = _round8(expand * channels)
        pool = [nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)] if stride == 2 else []
        widen = [nn.Conv2d(channels, outer, 1, bias=False), nn.BatchNorm2d(outer)] if channels != outer else []
        self.shortcut = nn.Sequential(*pool, *widen)
        self.conv1 = nn.Conv2d(channels, middle, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(middle)
        self.act1 = nn.SiLU()
        self.conv2 = nn.Conv2d(middle, middle, kernel, stride, kernel // 2, groups=middle, bias=False)
        self.bn2 = nn.BatchNorm2d(middle)
        self.act2 = nn.SiLU()
        self.se = SqueezeExcite(middle, max(1, round(channels / 4)))
        self.conv3 = nn.Conv2d(middle, outer, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outer)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.shortcut(x)
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.se(self.act2(self.bn2(self.conv2(x))))
        return self.drop_path(self.bn3(self.conv3(x))) + shortcut


class SqueezeExcite(nn.Module):
    """Channel gate: pool, 1x1 convolution to ``reduced``, SiLU, 1x1 convolution back, sigmoid."""

    def __init__(self, channels: int, reduced: int):
        super().__init__()
        self.fc1 = nn.Conv2d(channels, reduced, 1)
        self.act = nn.SiLU()
        self.fc2 = nn.Conv2d(reduced, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc2(self.act(self.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()


class DropPath(nn.Module):
    """Stochastic depth: leaves the branch of an image out with probability ``rate`` in training."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = 1 - self.rate
        return x * (x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(keep) / keep)


def _checkpointed(block: nn.Module, x: Tensor) -> Tensor:
    """``block(x)``, of which the backward pass computes the inner maps again; compiled code cannot take a context."""
    if torch.compiler.is_compiling():
        return checkpoint(block, x, use_reentrant=False)
    return checkpoint(block, x, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), _second_pass(block)))


@contextlib.contextmanager
def _second_pass(block: nn.Module) -> Iterator[None]:
    """Batch norms keep the running statistics that the first pass on the same images has left."""
    norms = [m for m in block.modules() if isinstance(m, (nn.BatchNorm2d, nn.SyncBatchNorm))]
    kept = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm, _, batches in kept:
        norm.momentum, norm.num_batches_tracked = 0.0, None if batches is None else torch.zeros_like(batches)
    try:
        yield
    finally:
        for norm, momentum, batches in kept:
            norm.momentum, norm.num_batches_tracked = momentum, batches


def _checked(paths: Sequence[str | Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    lengths = [layers for _, _, layers in BLOCKS]
    try:
        found = tuple(tuple(int(choice) for choice in path) for path in paths)
    except (TypeError, ValueError):
        found = ()
    if [len(path) for path in found] != lengths or not all(0 <= c < len(CANDIDATES) for path in found for c in path):
        raise ValueError(
            f"paths: expected candidates 0 to {len(CANDIDATES) - 1} of blocks of "
            f"{', '.join(map(str, lengths))} layers, got {paths!r}"
        )
    return found


def _round8(channels: float) -> int:
    return max(8, int(channels + 4) // 8 * 8)
