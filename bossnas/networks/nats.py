"""NatsNet: the networks of NATS-Bench's size space (METHOD 1.3; Dong et al. 2021, arXiv:2009.00437). torch alone.

`bossnas export` copies this file into stand-alone network files, so it imports nothing of this project. Modules are
registered in the order in which a forward pass calls them, but for the operations of a cell, which are called node
after node.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

KINDS = ("N", "R", "N", "R", "N")  # normal cell or residual down-sampling, by layer


class NatsNet(nn.Module):
    """[N, in_chans, S, S] -> logits [N, num_classes].

    ``widths``: output channels of the five layers; the stem has the first layer's. ``skip_relu``: whether a normal
    cell's skip to another width begins with ReLU, as in the supernet; the benchmark's own networks have none there.
    ``drop_path_rate``: stochastic depth of what the last layer adds to its skip, linear from 0 at the first layer; the
    benchmark has none. ``num_classes`` 0: no classifier. Raises ValueError for an impossible value.
    """

    def __init__(
        self,
        widths: Sequence[int],
        skip_relu: bool = False,
        num_classes: int = 10,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
    ):
        super().__init__()
        if len(widths) != len(KINDS) or not all(isinstance(c, int) and c > 0 for c in widths):
            raise ValueError(f"widths: expected five channel numbers, got {widths!r}")
        self.widths, self.skip_relu = tuple(widths), skip_relu
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.grad_checkpointing, self.global_pool_type = False, global_pool
        self.arguments = {
            "widths": self.widths,
            "skip_relu": skip_relu,
            "num_classes": num_classes,
            "in_chans": in_chans,
            "global_pool": global_pool,
        }  # see export.py
        channels, reduction = widths[0], 1
        self.stem = nn.Sequential(nn.Conv2d(in_chans, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels))
        self.feature_info = []
        for number, (kind, width) in enumerate(zip(KINDS, widths, strict=True)):
            rate = drop_path_rate * number / (len(KINDS) - 1)
            self.add_module(
                f"layer{number + 1}",
                NormalCell(channels, width, skip_relu, rate) if kind == "N" else ResidualCell(channels, width, rate),
            )
            channels, reduction = width, reduction * (1 if kind == "N" else 2)
            if kind == "N":
                self.feature_info.append({"num_chs": channels, "reduction": reduction, "module": f"layer{number + 1}"})
        self.bn = nn.BatchNorm2d(channels)
        self.act = nn.ReLU()
        self.num_features = self.head_hidden_size = channels
        self.fc: nn.Module = nn.Identity()
        self.reset_classifier(num_classes, global_pool)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Convolutions: Kaiming normal, fan-out."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward_features(self, x: Tensor) -> Tensor:
        """[N, in_chans, S, S] -> the last map [N, C, H, W]."""
        x = self.stem(x)
        for name in ("layer1", "layer2", "layer3", "layer4", "layer5"):
            layer = getattr(self, name)
            x = _checkpointed(layer, x) if self.grad_checkpointing and self.training else layer(x)
        return self.act(self.bn(x))

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
        """Keeps no map within a cell in training, and computes it again in the backward pass."""
        self.grad_checkpointing = enable


class NormalCell(nn.Module):
    """Nodes n1 = f(n0), n2 = f(n0) + f(n1), n3 = skip(n0) + f(n1) + f(n2), each f a 3x3 operation of its own."""

    is_unit = True  # sharded as one

    def __init__(self, channels: int, width: int, skip_relu: bool, drop_path: float):
        super().__init__()
        self.skip: nn.Module = nn.Identity()
        if channels != width:
            self.skip = _operation(channels, width, 1, relu=skip_relu)
        self.op01 = _operation(channels, width, 3)
        self.op02 = _operation(channels, width, 3)
        self.op12 = _operation(width, width, 3)
        self.op13 = _operation(width, width, 3)
        self.op23 = _operation(width, width, 3)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        n1 = self.op01(x)
        n2 = self.op12(n1) + self.op02(x)
        return self.drop_path(self.op23(n2) + self.op13(n1)) + self.skip(x)


class ResidualCell(nn.Module):
    """Two 3x3 operations, the first with stride 2, plus the pooled input through a 1x1 convolution without norm."""

    is_unit = True

    def __init__(self, channels: int, width: int, drop_path: float):
        super().__init__()
        self.shortcut = nn.Sequential(
            nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False), nn.Conv2d(channels, width, 1, bias=False)
        )
        self.first = _operation(channels, width, 3, 2)
        self.second = _operation(width, width, 3)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.drop_path(self.second(self.first(x))) + self.shortcut(x)


def _operation(channels: int, width: int, kernel: int, stride: int = 1, relu: bool = True) -> nn.Sequential:
    """ReLU, convolution, batch norm."""
    return nn.Sequential(
        nn.ReLU() if relu else nn.Identity(),
        nn.Conv2d(channels, width, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(width),
    )


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
