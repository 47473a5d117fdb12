"""What every implementation of a kernel accepts. Each check raises ValueError: what was expected, what came."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bossnas_kernels.looks import Looks

ACTIVATIONS = ("none", "relu", "silu")


def gbn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    residual: Tensor | None,
    act: str,
    training: bool,
    running_mean: Tensor | None,
    running_var: Tensor | None,
) -> None:
    if x.dim() not in (2, 4):
        raise ValueError(f"x: expected [groups*N, C, H, W] or [groups*N, C], got shape {tuple(x.shape)}")
    _floating("x", x)
    rows, channels = x.shape[:2]
    if groups < 1 or rows == 0 or rows % groups:
        raise ValueError(f"groups: expected a positive divisor of the {rows} rows of x, got {groups}")
    if x.numel() == 0:
        raise ValueError(f"x: expected at least one channel and one position, got shape {tuple(x.shape)}")
    if act not in ACTIVATIONS:
        raise ValueError(f"act: expected one of {', '.join(ACTIVATIONS)}, got {act!r}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual: expected the shape of x, {tuple(x.shape)}, got {tuple(residual.shape)}")
    _per_channel("weight", weight, groups, channels)
    _per_channel("bias", bias, groups, channels)
    if training:
        if x.numel() == groups * channels:
            raise ValueError(
                f"x: expected more than one value per channel in each of the {groups} groups to normalise "
                f"by, got shape {tuple(x.shape)}"
            )
        return
    if running_mean is None or running_var is None:
        raise ValueError("running_mean, running_var: expected tensors in evaluation mode, got None")
    _per_channel("running_mean", running_mean, groups, channels)
    _per_channel("running_var", running_var, groups, channels)


def dwconv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> None:
    if x.dim() != 4:
        raise ValueError(f"x: expected [N, C, H, W], got shape {tuple(x.shape)}")
    _floating("x", x)
    if x.numel() == 0:
        raise ValueError(f"x: expected at least one image, channel and position, got shape {tuple(x.shape)}")
    channels, kernel = x.shape[1], weight.shape[-1] if weight.dim() else 0
    if tuple(weight.shape) != (channels, 1, kernel, kernel):
        raise ValueError(
            f"weight: expected shape [{channels}, 1, k, k] for the {channels} channels of x, got {tuple(weight.shape)}"
        )
    _floating("weight", weight)
    if not (kernel in (3, 5) and stride in (1, 2) or kernel in (2, 4, 8) and stride == kernel):
        raise ValueError(
            f"weight, stride: expected k = 3 or 5 with stride 1 or 2, or patches, k = stride = 2, 4 or 8; "
            f"got k = {kernel}, stride {stride!r}"
        )
    if kernel == stride and min(x.shape[2:]) < kernel:
        raise ValueError(f"x: expected at least one patch of {kernel}x{kernel}, got a map of {x.shape[2]}x{x.shape[3]}")
    if bias is not None:
        if tuple(bias.shape) != (channels,):
            raise ValueError(f"bias: expected shape [{channels}], got {tuple(bias.shape)}")
        _floating("bias", bias)


def mhsa2d(qkv: Tensor, heads: int) -> None:
    if qkv.dim() != 4:
        raise ValueError(f"qkv: expected [N, 3*heads*d, H, W], got shape {tuple(qkv.shape)}")
    _floating("qkv", qkv)
    channels = qkv.shape[1]
    if heads < 1 or channels == 0 or channels % (3 * heads):
        raise ValueError(f"heads: expected 3*heads to divide the {channels} channels of qkv, got {heads}")
    if qkv.numel() == 0:
        raise ValueError(f"qkv: expected at least one image and one position, got shape {tuple(qkv.shape)}")


def lars_ema_step(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    momenta: Sequence[Tensor] | None,
    excluded: Sequence[bool] | None,
    targets: Sequence[Tensor | None] | None,
) -> None:
    """Lists of equal length, of tensors that fit; None for those that a function does not take."""
    others = {"gradients": gradients, "momenta": momenta, "targets": targets}
    for name, values in {**others, "excluded": excluded}.items():
        if values is not None and len(values) != len(weights):
            raise ValueError(f"{name}: expected {len(weights)} entries, one for each weight, got {len(values)}")
    others["weights"] = weights
    for name, tensors in others.items():
        for i, (weight, tensor) in enumerate(zip(weights, tensors or (), strict=False)):
            if tensor is None and name in ("gradients", "targets"):
                continue
            if tensor.shape != weight.shape:
                raise ValueError(
                    f"{name}[{i}]: expected the shape of weights[{i}], {tuple(weight.shape)}, got {tuple(tensor.shape)}"
                )
            if tensor.device != weights[0].device:
                raise ValueError(
                    f"{name}[{i}]: expected a tensor on {weights[0].device}, as weights[0] is, got {tensor.device}"
                )


def lars_norms(
    weights: Sequence[Tensor], squares: Tensor | None, norm: Tensor | None, loss_scale: float | Tensor
) -> None:
    """What is known of norms, and the scale of the loss; they lie where the weights do."""
    scale = loss_scale if isinstance(loss_scale, Tensor) else None
    for name, value, shape, dtype in (
        ("squares", squares, (2, len(weights)), torch.float64),
        ("norm", norm, (), torch.float64),
        ("loss_scale", scale, (), torch.float32),
    ):
        if value is None:
            continue
        if tuple(value.shape) != shape or value.dtype != dtype:
            raise ValueError(
                f"{name}: expected {dtype} of shape {list(shape)}, got {value.dtype} of {list(value.shape)}"
            )
        if weights and value.device != weights[0].device:
            raise ValueError(f"{name}: expected a tensor on {weights[0].device}, as weights[0] is, got {value.device}")


def byol_ensemble_loss(q: Tensor, k: Tensor) -> None:
    for name, value, letter in (("q", q, "P"), ("k", k, "T")):
        if value.dim() != 3:
            raise ValueError(f"{name}: expected [{letter}, N, D], got shape {tuple(value.shape)}")
        _floating(name, value)
        if value.numel() == 0:
            raise ValueError(f"{name}: expected at least one path, image and dimension, got shape {tuple(value.shape)}")
    if q.shape[1:] != k.shape[1:]:
        raise ValueError(
            f"k: expected [T, {q.shape[1]}, {q.shape[2]}], images and dimensions of q, got {tuple(k.shape)}"
        )
    same_device(q, k=k)


def crop_views(pixels: Tensor, table: Tensor, looks: Looks, size: int) -> None:
    if pixels.dim() != 1 or pixels.dtype != torch.uint8:
        raise ValueError(f"pixels: expected uint8 [bytes], got {pixels.dtype} of shape {tuple(pixels.shape)}")
    if table.dim() != 2 or table.shape[1] != 3 or table.dtype != torch.int64 or table.device.type != "cpu":
        raise ValueError(
            "table: expected int64 [N, 3] on the CPU, offset, height and width of every picture, "
            f"got {table.dtype} of shape {tuple(table.shape)} on {table.device}"
        )
    if size < 1:
        raise ValueError(f"size: expected a positive number of pixels, got {size}")
    _looks(looks, len(table))
    offset, height, width = table.unbind(1)
    inside = (offset >= 0) & (height > 0) & (width > 0) & (offset + 3 * height * width <= len(pixels))
    _every(
        "table",
        inside & (3 * height * width < 2**31),
        table,
        f"pictures of at least one pixel and less than 2^31 bytes within the {len(pixels)} bytes of pixels",
    )
    top, left, high, wide = looks.ints[..., :4].long().unbind(-1)
    inside = (top >= 0) & (left >= 0) & (high > 0) & (wide > 0) & (top + high <= height) & (left + wide <= width)
    _every("looks.ints", inside, looks.ints, "crops of at least one pixel within their pictures")


def finish_views(
    crops: Tensor, looks: Looks, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype, max_sigma: float
) -> None:
    if crops.dim() != 5 or crops.dtype != torch.uint8 or crops.shape[4] != 3 or crops.shape[2] != crops.shape[3]:
        raise ValueError(f"crops: expected uint8 [V, N, S, S, 3], got {crops.dtype} of shape {tuple(crops.shape)}")
    if crops.numel() == 0:
        raise ValueError(f"crops: expected at least one view of one pixel, got shape {tuple(crops.shape)}")
    _looks(looks, crops.shape[1], crops.shape[0])
    order = looks.ints[..., 7:11].sort(-1).values
    good = (order[..., 0] >= -1) & (order[..., 3] <= 3)
    for column in range(3):
        good &= (order[..., column] < order[..., column + 1]) | (order[..., column] == -1)
    _every(
        "looks.ints", good, looks.ints, "an order (columns 7..10) of colour operations 0..3, none of them twice, and -1"
    )
    sigma = looks.floats[..., 4]
    _every(
        "looks.floats",
        looks.floats.isfinite().all(-1) & (sigma >= 0) & (sigma <= max_sigma),
        looks.floats,
        f"finite factors, and 0 to {max_sigma} for sigma (column 4)",
    )
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != 3:
            raise ValueError(f"{name}: expected three numbers, one a channel, got {len(values)}")
    if min(std) <= 0:
        raise ValueError(f"std: expected positive numbers, got {tuple(std)}")
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype: expected float32, bfloat16 or float16, got {dtype}")


def _looks(looks: Looks, images: int, views: int | None = None) -> None:
    """Shapes, dtypes and device of Looks for so many pictures, and views if the number is known."""
    for name, value, columns, dtype in (
        ("looks.ints", looks.ints, 13, torch.int32),
        ("looks.floats", looks.floats, 5, torch.float32),
    ):
        expected = (looks.ints.shape[0] if views is None else views, images, columns)
        if tuple(value.shape) != expected or value.dtype != dtype or value.device.type != "cpu":
            raise ValueError(
                f"{name}: expected {dtype} [{expected[0] if views else 'V'}, {images}, {columns}] on the "
                f"CPU, got {value.dtype} of shape {tuple(value.shape)} on {value.device}"
            )
    if looks.ints.numel() == 0:
        raise ValueError(f"looks.ints: expected at least one view of one picture, got {tuple(looks.ints.shape)}")


def _every(name: str, good: Tensor, values: Tensor, expected: str) -> None:
    """Names the first row of values that is not good."""
    if not good.all():
        at = tuple((~good).nonzero()[0].tolist())
        raise ValueError(f"{name}: expected {expected}, got {values[at].tolist()} at {list(at)}")


def stats_groups(groups: int, batch: int) -> None:
    if groups < 1 or batch % groups:
        raise ValueError(f"groups: expected a positive divisor of the batch of {batch}, got {groups}")


def same_device(x: Tensor, **others: Tensor | None) -> None:
    for name, other in others.items():
        if other is not None and other.device != x.device:
            raise ValueError(f"{name}: expected a tensor on {x.device}, as the first argument is, got {other.device}")


def _floating(name: str, value: Tensor) -> None:
    if not value.is_floating_point():
        raise ValueError(f"{name}: expected a floating-point tensor, got {value.dtype}")


def _per_channel(name: str, value: Tensor, groups: int, channels: int) -> None:
    if tuple(value.shape) not in ((channels,), (groups, channels)):
        raise ValueError(f"{name}: expected shape [{channels}] or [{groups}, {channels}], got {tuple(value.shape)}")
