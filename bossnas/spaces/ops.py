"""Building blocks of candidates. All of them take many items in one batch.

The batch dimension is ``groups`` equal pieces; every batch norm normalises each piece by its own statistics, so one
call on the concatenation of items gives what separate calls would. ``stats`` says where the statistics come from.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bossnas_kernels
from bossnas.errors import ConfigError
from bossnas_kernels import dwconv2d, dwconv2d_stats, gbn_act, mhsa2d, mhsa2d_stats
from bossnas_kernels.eager import (
    on_cpu,
    torch_operations as torch_operations,  # for those who may not ask the kernels
)
from bossnas_kernels.gated import gated_pointwise
from bossnas_kernels.products import LEAST_WORK, linear


def use_kernels(choice: str, device: torch.device) -> str:
    """Chooses the kernels of this process (auto | triton | reference); returns which of them run on ``device``.

    Raises ConfigError where Triton is asked for and cannot run.
    """
    try:
        bossnas_kernels.use(choice)
    except ValueError as error:
        problem, _, fix = str(error).removeprefix("kernels: ").partition("; ")
        raise ConfigError("kernels", f"is {choice!r}, but {problem}", fix) from None
    running = bossnas_kernels.implementation(device)
    if choice == "triton" and running != "triton":
        raise ConfigError(
            "kernels", f"is 'triton', but this run is on {device.type}", "set it to auto, or engine.device to cuda"
        )
    return running


class Statistics:
    """Batch-norm statistics of one pass: first recorded by a calibration batch, then used for evaluation.

    Maps a `GroupedBatchNorm` to its mean and unbiased variance, each [groups, C]. A norm runs once in a recorded pass,
    or once in each of its `at(place)`, the parts into which a pass of many paths falls.
    """

    def __init__(self, recording: bool = True) -> None:
        self.table: dict[GroupedBatchNorm, tuple[Tensor, Tensor]] = {}
        self.parts: dict[Hashable, Statistics] = {}
        self.recording = recording

    def at(self, place: Hashable) -> Statistics:
        """The statistics of one part of the pass, such as the items that go through one candidate of one layer."""
        return self.parts.setdefault(place, Statistics()) if self.recording else self.parts[place]

    @staticmethod
    def average(passes: Sequence[Statistics]) -> Statistics:
        """The mean of several recorded passes, ready for use (METHOD 4: statistics averaged over batches)."""
        result = Statistics(recording=False)
        for module in passes[0].table:
            means, variances = zip(*(p.table[module] for p in passes), strict=True)
            result.table[module] = (torch.stack(means).mean(0), torch.stack(variances).mean(0))
        for place in passes[0].parts:
            result.parts[place] = Statistics.average([p.parts[place] for p in passes])
        return result

    def norms(self) -> Iterator[tuple[GroupedBatchNorm, Tensor, Tensor]]:
        """Every recorded norm with its mean and variance, those of all parts included."""
        for module, (mean, var) in self.table.items():
            yield module, mean, var
        for part in self.parts.values():
            yield from part.norms()

    def write(self) -> None:
        """Copies one path's statistics into the modules' own buffers, which evaluation without `stats` uses."""
        for module, mean, var in self.norms():
            module.running_mean.copy_(mean[0])
            module.running_var.copy_(var[0])


class Frozen(Statistics):
    """In the place of statistics: norms read their buffers, as in evaluation mode, and convolutions before them may
    take them over, since neither will change."""

    def __init__(self) -> None:
        super().__init__(recording=False)

    def at(self, place: Hashable) -> Statistics:
        return self


class GroupedBatchNorm(nn.Module):
    """Batch norm with exact per-group statistics: eps 1e-5, affine. Input [groups*N, C, H, W] or [groups*N, C].

    Statistics: ``stats`` recording -> the batch's own, and recorded; ``stats`` recorded -> those; no ``stats`` ->
    the batch's own in training mode, the buffers in evaluation mode.

    ``momentum``: None in a supernet, whose training never touches the buffers: the rating recalibrates every path, and
    a finished block's winner gets its calibrated statistics written once. A number, for a network trained by itself:
    the buffers follow the batches as `nn.BatchNorm2d`'s do.
    """

    grouped = True
    is_norm = True

    def __init__(self, channels: int, act: str = "none", zero_init: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels) if zero_init else torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.running_mean: Tensor
        self.running_var: Tensor
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.act = act
        self.average: Average | None = None
        self.momentum: float | None = None

    def forward(
        self,
        x: Tensor,
        groups: int = 1,
        stats: Statistics | None = None,
        residual: Tensor | None = None,
        partial_stats: Tensor | None = None,
        folded: bool = False,
    ) -> Tensor:
        """``residual``, like x, is added before the activation. ``partial_stats``: see `bossnas_kernels.gbn_act`.
        ``folded``: x, which nothing else reads, is normalised already (`Chain`)."""
        if folded:
            x = x if residual is None else x.add_(residual)
            return F.relu_(x) if self.act == "relu" else F.silu(x, inplace=True) if self.act == "silu" else x
        own, mean, var = _source(self, stats)
        if own and stats is None and self.average is not None:
            return self._synchronised(x, groups, residual, self.average)
        y, mean, var = gbn_act(
            x,
            self.weight,
            self.bias,
            groups=groups,
            residual=residual,
            act=self.act,
            training=own,
            running_mean=mean,
            running_var=var,
            partial_stats=partial_stats,
        )
        if stats is not None and stats.recording:
            _record(self, stats, mean, var)
        elif own and stats is None:
            self.follow(mean, var)
        return y

    def follow(self, mean: Tensor, var: Tensor) -> None:
        """Moves the buffers by ``momentum`` towards a batch's mean and unbiased variance, each [groups, C]."""
        if self.momentum is not None:
            self.running_mean.lerp_(mean.detach().mean(0).to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(var.detach().mean(0).to(self.running_var.dtype), self.momentum)

    def _synchronised(self, x: Tensor, groups: int, residual: Tensor | None, average: Average) -> Tensor:
        """Normalised by the statistics of the group's images on all ranks, in plain PyTorch."""
        with torch.autocast(x.device.type, enabled=False):
            rows = full(x).unflatten(0, (groups, -1))  # [G, N, C, ...]
            inner = [1, *range(3, rows.ndim)]
            mean = average(rows.mean(inner, keepdim=True))
            centered = rows - mean
            var = average(centered.square().mean(inner, keepdim=True))
            if self.momentum is not None:
                count = rows[0, :, 0].numel()  # of this rank; those of all would change the variance by 1 / count
                self.follow(mean.flatten(1), var.flatten(1) * (count / max(count - 1, 1)))
            shape = (1, 1, -1) + (1,) * (rows.ndim - 3)
            y = centered * torch.rsqrt(var + 1e-5) * self.weight.view(shape) + self.bias.view(shape)
            y = y.flatten(0, 1)
            if residual is not None:
                y = y + residual
            y = F.relu(y) if self.act == "relu" else F.silu(y) if self.act == "silu" else y
            return y.to(x.dtype)


Average = Callable[[Tensor], Tensor]


def full(t: Tensor) -> Tensor:
    """At least float32: sums over maps and paths lose too much in 16 bits."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def synchronise(*modules: nn.Module, average: Average | None) -> None:
    """Has every batch norm of the modules use the images of all ranks in training. ``average(x)``: the mean of a tensor
    over the ranks, differentiable; None: use its own images again. Ratings, whose statistics are recorded,
    are not touched."""
    for module in modules:
        for norm in module.modules():
            if isinstance(norm, GroupedBatchNorm):
                norm.average = average


class PooledPointwise(nn.Module):
    """Global average pool of BN(1x1 conv(x)), computed from the input's channel mean and covariance.

    Equal to the plain chain, since all three are linear in x given the statistics, at a cost that depends on C_in
    alone, not on the map times the output width (METHOD 8). [groups*N, C_in, H, W] -> [groups*N, C_out].
    """

    grouped = True

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, 1, bias=False)
        self.norm = GroupedBatchNorm(c_out)

    def forward(self, x: Tensor, groups: int = 1, stats: Statistics | None = None) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # a covariance in bf16 would lose the variance
            return self._forward(x.float() if x.dtype in (torch.bfloat16, torch.float16) else x, groups, stats)

    def _forward(self, x: Tensor, groups: int, stats: Statistics | None) -> Tensor:
        norm, weight = self.norm, self.conv.weight.flatten(1)
        own, mean, var = _source(norm, stats)
        if own:
            average = norm.average if stats is None and norm.average is not None else lambda t: t
            rows = x.view(groups, -1, *x.shape[1:]).transpose(1, 2).flatten(2)  # [G, C_in, N*H*W]
            center = average(rows.mean(2, keepdim=True))
            rows, count = rows - center, rows.shape[2]
            covariance = average(torch.bmm(rows, rows.mT) / count)
            mean = center[..., 0] @ weight.T  # [G, C_out]
            # bmm, not @: matmul chooses its kernel by requires_grad, and a rating must not depend on that
            biased = (torch.bmm(weight.expand(groups, -1, -1), covariance) * weight).sum(2)
            if stats is not None:
                _record(norm, stats, mean, biased * (count / max(count - 1, 1)))
            elif norm.momentum is not None:
                norm.follow(mean, biased * (count / max(count - 1, 1)))
        else:
            assert mean is not None and var is not None
            biased = var
        y = (x.mean((2, 3)) @ weight.T).view(groups, -1, weight.shape[0])
        mean, biased = (t.view(-1, 1, t.shape[-1]) for t in (mean, biased))
        return ((y - mean) * torch.rsqrt(biased + 1e-5) * norm.weight + norm.bias).flatten(0, 1)


def _source(norm: GroupedBatchNorm, stats: Statistics | None) -> tuple[bool, Tensor | None, Tensor | None]:
    """Whether the batch's own statistics normalise, else the mean and variance that do."""
    if isinstance(stats, Frozen):
        return False, norm.running_mean, norm.running_var
    if stats is not None:
        return (True, None, None) if stats.recording else (False, *stats.table[norm])
    return (True, None, None) if norm.training else (False, norm.running_mean, norm.running_var)


def _record(norm: GroupedBatchNorm, stats: Statistics, mean: Tensor, var: Tensor) -> None:
    assert norm not in stats.table, "a batch norm ran twice in one recorded pass"
    stats.table[norm] = (mean, var)


Constants = tuple[Tensor, Tensor | None]  # weights and bias


class _GivesStats(Protocol):
    def with_stats(self, x: Tensor, groups: int) -> tuple[Tensor, Tensor | None]:
        """The output, and the statistics of each of its groups where the kernel takes them (see `gbn_act`)."""


class Chain(nn.Sequential):
    """A sequence that hands ``groups`` and ``stats`` to the parts that take them, and ``residual`` to the last part.

    Where a batch norm that uses the batch's own statistics follows a part that can give its output's (`with_stats`),
    it gets them from there and reads the map once less. Where a chain that begins with a 1x1 convolution follows a
    `SqueezeExcite`, the two are one operation (``gate``).
    """

    grouped = True

    def __init__(self, *parts: nn.Module):
        super().__init__(*parts)
        self._known: dict[int, tuple[tuple[Tensor, ...], tuple, Constants]] = {}  # of `_frozen`

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_known": {}}  # a copy has weights of its own

    def forward(
        self,
        x: Tensor,
        groups: int = 1,
        stats: Statistics | None = None,
        residual: Tensor | None = None,
        gate: SqueezeExcite | None = None,
    ) -> Tensor:
        parts = list(self)
        partial_stats: Tensor | None = None
        held: SqueezeExcite | None = None
        folded = False
        for i, part in enumerate(parts):
            following = parts[i + 1] if i + 1 < len(parts) else None
            extra: dict = {} if residual is None or following is not None else {"residual": residual}
            if folded:
                x, folded = part(x, folded=True, **extra), False
            elif gate is not None:
                x, gate = part(x, gate=gate), None
            elif held is not None:
                x, held = part(x, groups, stats, gate=held, **extra), None
            elif isinstance(part, SqueezeExcite) and isinstance(following, Chain) and following.takes_gate:
                held = part
            elif isinstance(part, GroupedBatchNorm):
                x, partial_stats = part(x, groups, stats, partial_stats=partial_stats, **extra), None
            elif getattr(part, "grouped", False):
                x = part(x, groups, stats, **extra)
            elif isinstance(stats, Frozen) and (constants := self._frozen(i, part, following, x)) is not None:
                x, folded = part(x, constants=constants), x.dtype == part.weight.dtype
            elif (
                hasattr(part, "with_stats") and isinstance(following, GroupedBatchNorm) and _source(following, stats)[0]
            ):
                x, partial_stats = cast("_GivesStats", part).with_stats(x, groups)
            else:
                x = part(x)
        return x

    def _frozen(self, i: int, part: nn.Module, following: nn.Module | None, x: Tensor) -> Constants | None:
        """Weights and bias of a convolution that will not change, made once: for 16-bit maps in 16 bits, and for maps
        on a CPU with the batch norm behind it. On a GPU the norm's own kernel adds the activation, too."""
        if (
            not isinstance(part, DenseConv | DepthwiseConv)
            or not isinstance(following, GroupedBatchNorm)
            or torch.is_grad_enabled()
        ):
            return None
        narrow = x.dtype in (torch.bfloat16, torch.float16) and x.dtype != part.weight.dtype
        if not narrow and not on_cpu(x, part.weight):
            return None
        tensors: tuple[Tensor, ...] = (
            part.weight,
            following.weight,
            following.bias,
            following.running_mean,
            following.running_var,
        )
        if part.bias is not None:
            tensors = (*tensors, part.bias)
        version = (x.dtype, *(t._version for t in tensors))
        known = self._known.get(i)
        if known is None or known[1] != version or any(a is not b for a, b in zip(known[0], tensors, strict=True)):
            bias = torch.zeros_like(following.bias) if part.bias is None else part.bias
            if narrow:
                weight = part.weight.to(x.dtype, memory_format=torch.channels_last)
                constants = weight, None if part.bias is None else part.bias.to(x.dtype)
            else:
                scale = torch.rsqrt(following.running_var.double() + 1e-5) * following.weight
                weight = (part.weight * scale[:, None, None, None]).to(x.dtype)
                constants = weight, ((bias - following.running_mean) * scale + following.bias).to(x.dtype)
            known = self._known[i] = tensors, version, constants
        return known[2]

    @property
    def takes_gate(self) -> bool:
        first = self[0] if len(self) else None
        return isinstance(first, DenseConv) and first.pointwise and first.bias is None


class DepthwiseConv(nn.Conv2d):
    """Depthwise convolution by `bossnas_kernels.dwconv2d`, which says what kernels and strides it takes."""

    def __init__(self, channels: int, kernel: int, stride: int = 1, bias: bool = False):
        super().__init__(
            channels, channels, kernel, stride, kernel // 2 if kernel % 2 else 0, groups=channels, bias=bias
        )

    def forward(self, x: Tensor, constants: Constants | None = None) -> Tensor:
        """``constants``: weights and bias to be used instead of its own."""
        weight, bias = constants or (self.weight, self.bias)
        return dwconv2d(x, weight, bias, stride=self.stride[0])

    def with_stats(self, x: Tensor, groups: int) -> tuple[Tensor, Tensor | None]:
        return dwconv2d_stats(x, self.weight, self.bias, stride=self.stride[0], groups=groups)


class Linear(nn.Linear):
    """`nn.Linear` of a matrix by `bossnas_kernels.products.linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class DenseConv(nn.Conv2d):
    """A dense convolution that on a CPU becomes one matrix product where the weights outweigh the map: oneDNN brings
    all weights into its own layout at every call, a product with the patches reads them as they lie (measured, forward
    and backward: 1.1 to 2.5 times faster up to the limits below, slower from twice as many positions on)."""

    @property
    def pointwise(self) -> bool:
        return self.kernel_size == self.stride == (1, 1)

    def forward(self, x: Tensor, gate: SqueezeExcite | None = None, constants: Constants | None = None) -> Tensor:
        """``gate``: the input is to pass that first; for 1x1 convolutions without bias. ``constants``: weights and bias
        to be used instead of its own."""
        weight, bias = constants or (self.weight, self.bias)
        if gate is not None:
            return gated_pointwise(x, self.weight, gate.gate, list(gate.parameters()))
        padding = cast("tuple[int, ...]", self.padding)  # never the name of a way to pad
        height, width = (
            (size + 2 * p - k) // s + 1
            for size, p, k, s in zip(x.shape[2:], padding, self.kernel_size, self.stride, strict=True)
        )
        limit = max(self.in_channels, self.out_channels) if self.pointwise else self.out_channels // 2
        # what is exported must work for any number of images
        positions = x.shape[0] * height * width
        if positions > limit or not on_cpu(x, weight, bias):
            return self._conv_forward(x, weight, bias)
        nhwc = x.is_contiguous(memory_format=torch.channels_last)
        if self.pointwise and not (nhwc and positions * weight.numel() >= LEAST_WORK):
            return self._conv_forward(x, weight, bias)
        if self.pointwise:
            rows = x.permute(0, 2, 3, 1).flatten(0, 2)  # a view
        else:
            patches = F.unfold(x, self.kernel_size, padding=padding, stride=self.stride)  # [N, C*k*k, positions]
            rows = patches.mT.flatten(0, 1)  # one product, not one per image
        y = linear(rows, weight.flatten(1), bias)
        return y.view(len(x), height, width, -1).permute(0, 3, 1, 2)


def conv(
    c_in: int, c_out: int, kernel: int = 1, stride: int = 1, depthwise: bool = False, bias: bool = False
) -> nn.Conv2d:
    """Convolution with padding kernel // 2 (even kernels: none, as for patches with kernel = stride)."""
    if depthwise and (kernel in (3, 5) and stride in (1, 2) or kernel == stride and kernel in (2, 4, 8)):
        return DepthwiseConv(c_in, kernel, stride, bias)
    padding = kernel // 2 if kernel % 2 else 0
    if depthwise:
        return nn.Conv2d(c_in, c_out, kernel, stride, padding, groups=c_in, bias=bias)
    return DenseConv(c_in, c_out, kernel, stride, padding, bias=bias)


def conv_norm(
    c_in: int, c_out: int, kernel: int = 1, stride: int = 1, act: str = "none", depthwise: bool = False
) -> Chain:
    """Convolution, batch norm, activation (none | relu | silu)."""
    return Chain(conv(c_in, c_out, kernel, stride, depthwise), GroupedBatchNorm(c_out, act))


class Attention(nn.Module):
    """Multi-head self-attention over the pixels of a map, no positional term. [N, C, H, W] -> [N, C, H, W].

    out_i = sum_j softmax_j(q_i . k_j / sqrt(d)) v_j, heads of width d = 64 or the next width that divides C.
    """

    def __init__(self, channels: int, head_width: int = 64):
        super().__init__()
        wanted = max(1, channels // head_width)
        self.heads = next(heads for heads in range(wanted, 0, -1) if channels % heads == 0)
        self.qkv = conv(channels, 3 * channels)

    def forward(self, x: Tensor) -> Tensor:
        return mhsa2d(self.qkv(x), self.heads)

    def with_stats(self, x: Tensor, groups: int) -> tuple[Tensor, Tensor | None]:
        return mhsa2d_stats(self.qkv(x), self.heads, groups=groups)


class SqueezeExcite(nn.Module):
    """Channel gate: pool, 1x1 conv to ``reduced``, SiLU, 1x1 conv back, sigmoid (both convs with bias)."""

    def __init__(self, channels: int, reduced: int):
        super().__init__()
        self.reduce = conv(channels, reduced, bias=True)
        self.expand = conv(reduced, channels, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x.mean((2, 3), keepdim=True))

    def gate(self, mean: Tensor) -> Tensor:
        """The channels' means [N, C, 1, 1] -> their factors."""
        return self.expand(F.silu(self.reduce(mean))).sigmoid()


class NoAdapter(nn.Module):
    """The neck's adapter where all outputs of a block have the neck's width already."""

    def forward(self, x: Tensor, choice: int, groups: int = 1, stats: Statistics | None = None) -> Tensor:
        return x


class HalvePool(nn.AvgPool2d):
    """2x2 average pool, stride 2, ceil mode, padding not counted: odd maps round up as stride-2 convolutions do."""

    def __init__(self) -> None:
        super().__init__(2, 2, ceil_mode=True, count_include_pad=False)


class SlimConv(nn.Conv2d):
    """Convolution that uses the leading ``c_out`` x ``c_in`` slice of its weights (METHOD 1.3), no bias."""

    def __init__(self, max_in: int, max_out: int, kernel: int, stride: int = 1):
        super().__init__(max_in, max_out, kernel, stride, kernel // 2, bias=False)

    def forward(self, x: Tensor, c_out: int) -> Tensor:  # type: ignore[override]  # called by its own layers alone
        return F.conv2d(x, self.weight[:c_out, : x.shape[1]], None, self.stride, self.padding)
