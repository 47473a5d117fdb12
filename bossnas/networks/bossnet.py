"""BossNet: the retraining network of HyTra architectures (METHOD 6; BossNAS, section 4 and appendix). torch alone.

`bossnas export` copies this file into stand-alone network files, so it imports nothing of this project. Names in the
state dict are those of the released checkpoints. Modules are registered in the order in which a forward pass calls
them, shortcuts first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

T0 = ((1,), (1,), (1, 1, 1, 0, 1), (0, 0, 0, 1, 0, 0, 0, 0, 0))  # 1 CONV, 0 ATT; also T1's
HEAD_WIDTH = 64
ACTIVATIONS = {"silu": nn.SiLU, "relu": nn.ReLU}


class BossNet(nn.Module):
    """[N, in_chans, S, S] -> logits [N, num_classes].

    ``encoding``: of each of the four stages its blocks, 1 convolution, 0 attention; a stage may be empty. ``width``:
    channels of the stem; stage i (from 0) works inside with width * 2**i and hands on four times as many.
    ``act``: silu | relu. ``se``: squeeze-and-excitation in convolution blocks. ``last_stride``: of stage 4, 2 or
    1 (T1). ``drop_path_rate``: stochastic depth of the last block, linear from 0 at the first; convolution blocks alone
    have it. ``num_classes`` 0: no classifier. Raises ValueError for an impossible value.
    """

    def __init__(
        self,
        encoding: Sequence[Sequence[int]] = T0,
        width: int = 64,
        act: str = "silu",
        se: bool = True,
        last_stride: int = 2,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
    ):
        super().__init__()
        _check(encoding, act, last_stride)
        self.encoding = tuple(tuple(int(kind) for kind in stage) for stage in encoding)
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.grad_checkpointing, self.global_pool_type = False, global_pool
        self.arguments = {
            "encoding": self.encoding,
            "width": width,
            "act": act,
            "se": se,
            "last_stride": last_stride,
            "num_classes": num_classes,
            "in_chans": in_chans,
            "global_pool": global_pool,
        }  # see export.py
        self.conv1 = nn.Conv2d(in_chans, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = ACTIVATIONS[act]()
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.feature_info = [{"num_chs": width, "reduction": 2, "module": "act1"}]
        total, number, channels, reduction = sum(map(len, self.encoding)), 0, width, 4
        for stage, kinds in enumerate(self.encoding):
            inner, stride = width * 2**stage, (1, 2, 2, last_stride)[stage]
            blocks: list[nn.Module] = []
            for kind in kinds:
                rate = drop_path_rate * number / max(total - 1, 1)
                blocks.append(
                    ConvBlock(channels, inner, stride, act, se, rate)
                    if kind
                    else AttentionBlock(channels, inner, stride, act)
                )
                number, channels = number + 1, 4 * inner
                reduction, stride = reduction * stride, 1
            if not kinds:
                blocks += [
                    nn.Conv2d(channels, 4 * inner, 3, stride, 1, bias=False),
                    nn.BatchNorm2d(4 * inner),
                    ACTIVATIONS[act](),
                ]
                channels, reduction = 4 * inner, reduction * stride
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
            self.feature_info.append({"num_chs": channels, "reduction": reduction, "module": f"layer{stage + 1}"})
        self.num_features = self.head_hidden_size = channels
        self.fc: nn.Module = nn.Identity()
        self.reset_classifier(num_classes, global_pool)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Convolutions: Kaiming normal, fan-out, groups not counted; the last norm of every branch: zero."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, ConvBlock):
                nn.init.zeros_(module.bn3.weight)
            elif isinstance(module, AttentionBlock):
                nn.init.zeros_(module.net.get_parameter("5.weight"))

    def stages(self) -> list[nn.Sequential]:
        return [getattr(self, name) for name in ("layer1", "layer2", "layer3", "layer4")]

    def forward_features(self, x: Tensor) -> Tensor:
        """[N, in_chans, S, S] -> the last map [N, C, H, W]."""
        x = self.maxpool(self.act1(self.bn1(self.conv1(x))))
        for stage in self.stages():
            if self.grad_checkpointing and self.training and not torch.jit.is_scripting():
                for block in stage:
                    x = _checkpointed(block, x)
            else:
                x = stage(x)
        return x

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
        """Keeps no map within a block in training, and computes it again in the backward pass."""
        self.grad_checkpointing = enable


class ConvBlock(nn.Module):
    """1x1 convolution, PEG with the stride, 3x3 and 1x1 convolution; squeeze-and-excitation; shortcut."""

    is_unit = True  # sharded as one

    def __init__(self, channels: int, inner: int, stride: int, act: str, se: bool, drop_path: float):
        super().__init__()
        outer = 4 * inner
        self.downsample = _shortcut(channels, outer, stride)
        self.conv1 = nn.Conv2d(channels, inner, 1, bias=False)
        self.peg = PEG(inner, stride)
        self.bn1 = nn.BatchNorm2d(inner)
        self.act1 = ACTIVATIONS[act]()
        self.conv2 = nn.Conv2d(inner, inner, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.act2 = ACTIVATIONS[act]()
        self.conv3 = nn.Conv2d(inner, outer, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outer)
        self.se = SqueezeExcite(outer, max(1, outer // 16)) if se else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.act3 = ACTIVATIONS[act]()

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.downsample(x)
        x = self.act1(self.bn1(self.peg(self.conv1(x))))
        x = self.act2(self.bn2(self.conv2(x)))
        x = self.drop_path(self.se(self.bn3(self.conv3(x))))
        return self.act3(x + shortcut)


class AttentionBlock(nn.Module):
    """1x1 convolution, PEG with the stride, self-attention over the positions, 1x1 convolution; shortcut."""

    is_unit = True

    def __init__(self, channels: int, inner: int, stride: int, act: str):
        super().__init__()
        outer = 4 * inner
        self.shortcut = _shortcut(channels, outer, stride)
        self.proj = nn.Sequential(nn.Conv2d(channels, inner, 1, bias=False), PEG(inner, stride), nn.BatchNorm2d(inner))
        self.net = nn.Sequential(
            ACTIVATIONS[act](),
            SelfAttention(inner),
            nn.BatchNorm2d(inner),
            ACTIVATIONS[act](),
            nn.Conv2d(inner, outer, 1, bias=False),
            nn.BatchNorm2d(outer),
        )
        self.act = ACTIVATIONS[act]()

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.shortcut(x)
        return self.act(self.net(self.proj(x)) + shortcut)


class PEG(nn.Module):
    """Position encoding generator: a depthwise 3x3 convolution with bias that replaces its input."""

    def __init__(self, channels: int, stride: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride, 1, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class SelfAttention(nn.Module):
    """out_i = sum_j softmax_j(q_i . k_j / sqrt(d)) v_j over the positions of a map [N, C, H, W], without positional
    term. Heads of 64 channels, or of the next width that divides C."""

    def __init__(self, channels: int):
        super().__init__()
        wanted = max(1, channels // HEAD_WIDTH)
        self.heads = next(heads for heads in range(wanted, 0, -1) if channels % heads == 0)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        q, k, v = self.to_qkv(x).view(n, 3, self.heads, c // self.heads, h * w).mT.unbind(1)
        return F.scaled_dot_product_attention(q, k, v).mT.reshape(n, c, h, w)


class SqueezeExcite(nn.Module):
    """Channel gate: pool, 1x1 convolution to ``reduced``, ReLU, 1x1 convolution back, sigmoid."""

    def __init__(self, channels: int, reduced: int):
        super().__init__()
        self.fc1 = nn.Conv2d(channels, reduced, 1)
        self.act = nn.ReLU()
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


def _shortcut(channels: int, outer: int, stride: int) -> nn.Module:
    if stride == 1 and channels == outer:
        return nn.Identity()
    pool = nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False) if stride == 2 else nn.Identity()
    return nn.Sequential(pool, nn.Conv2d(channels, outer, 1, bias=False), nn.BatchNorm2d(outer))


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


def _check(encoding: Sequence[Sequence[int]], act: str, last_stride: int) -> None:
    if len(encoding) != 4 or any(kind not in (0, 1) for stage in encoding for kind in stage):
        raise ValueError(f"encoding: expected four lists of 0 (attention) and 1 (convolution), got {encoding}")
    if act not in ACTIVATIONS:
        raise ValueError(f"act: expected silu or relu, got {act!r}")
    if last_stride not in (1, 2):
        raise ValueError(f"last_stride: expected 1 or 2, got {last_stride!r}")
