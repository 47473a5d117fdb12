"""The public functions: each runs its Triton kernels on a GPU, and the plain PyTorch reference everywhere else.

`use` decides for the process, as `torch.backends` does: candidates are built deep inside a search space, and a choice
handed through every constructor would say the same thing a thousand times. Whatever the choice, fp64 tensors and shapes
that a kernel does not take go to the reference, which is said once in the log.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

from bossnas_kernels import augment_reference, checks, reference
from bossnas_kernels.looks import Looks

HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON:
    from bossnas_kernels import (
        attention,
        augment_colours,
        augment_crops,
        common,
        depthwise,
        ensemble_loss,
        grouped_norm,
        lars,
    )

CHOICES = ("auto", "triton", "reference")
_choice = "auto"


def use(choice: str) -> None:
    """Chooses the implementation for this process.

    "auto": Triton on a CUDA or ROCm device, the reference elsewhere. "triton": the same, but a ValueError here where
    there is neither such a device nor Triton's interpreter (TRITON_INTERPRET=1 in the environment, which runs the
    kernels on CPU tensors: right, and thousands of times slower). "reference": plain PyTorch everywhere.
    """
    global _choice
    if choice not in CHOICES:
        raise ValueError(f"kernels: expected one of {', '.join(CHOICES)}, got {choice!r}")
    if choice == "triton" and not HAS_TRITON:
        raise ValueError("kernels: triton is not installed; pip install 'triton>=3.6', or choose auto")
    if choice == "triton" and not (torch.cuda.is_available() or common.INTERPRET):
        raise ValueError(
            "kernels: triton needs a CUDA or ROCm device, or TRITON_INTERPRET=1 to run in its interpreter; choose auto"
        )
    _choice = choice


def implementation(device: torch.device | str) -> str:
    """Which one runs on tensors of a device: "triton" or "reference"."""
    if _choice == "reference" or not HAS_TRITON:
        return "reference"
    kind = device.type if isinstance(device, torch.device) else torch.device(device).type
    if common.INTERPRET:
        return "triton" if kind == "cpu" and _choice == "triton" else "reference"
    return "triton" if kind == "cuda" else "reference"


def gbn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    groups: int = 1,
    residual: Tensor | None = None,
    act: str = "none",
    training: bool = True,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    eps: float = 1e-5,
    partial_stats: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Grouped batch norm: y = act(norm(x) * weight + bias + residual), each group by its own statistics.

    Group g is the rows [g*N, (g+1)*N) of x. The result equals `groups` separate batch norms, in value and in gradient.

    x: [groups*N, C, H, W] or [groups*N, C], fp64, fp32, bf16 or fp16. Statistics are fp32 (fp64 for fp64).
    weight, bias: [C], shared by the groups (their gradients are summed), or [groups, C].
    residual: shape of x, added before the activation. act: "none", "relu" or "silu".
    training: normalise by the batch (biased variance, as `F.batch_norm`); otherwise by running_mean and running_var,
        [C] or [groups, C], which are read and never written.
    partial_stats: what `dwconv2d_stats` or `mhsa2d_stats` gave beside x for as many groups: saves reading x once more.

    Returns (y, mean, var), y like x; channels_last inputs give channels_last results (the kernels give no other). In
    training mean and **unbiased** var are those of every group, [groups, C], without gradient: what running statistics
    are averaged from; autograd may hold them, so do not write to them. In evaluation they are the statistics used.
    Raises ValueError for shapes, devices, groups or activations that do not fit, and in training for groups of a single
    value per channel.
    """
    if _by_kernel("gbn_act", x):
        return grouped_norm.gbn_act(
            x,
            weight,
            bias,
            groups=groups,
            residual=residual,
            act=act,
            training=training,
            running_mean=running_mean,
            running_var=running_var,
            eps=eps,
            partial_stats=partial_stats,
        )
    return reference.gbn_act(
        x,
        weight,
        bias,
        groups=groups,
        residual=residual,
        act=act,
        training=training,
        running_mean=running_mean,
        running_var=running_var,
        eps=eps,
    )


def dwconv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: int = 1) -> Tensor:
    """Depthwise convolution of a map, [N, C, H, W] -> [N, C, H', W'], as `F.conv2d` with C groups.

    weight: [C, 1, k, k]. k = 3 or 5, padding k // 2, stride 1 or 2; or patches: k = stride = 2, 4 or 8, no padding
    (rows and columns that fill no patch are dropped). bias: [C]. Computed in the dtype of x, or under autocast in
    autocast's; products are summed in fp32. ValueError for shapes, kernels, strides and devices that do not fit.
    """
    x = _autocast(x)
    if _by_kernel("dwconv2d", x):
        return depthwise.dwconv2d(x, weight, bias, stride=stride)
    return reference.dwconv2d(x, weight, bias, stride=stride)


def dwconv2d_stats(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: int = 1, groups: int = 1
) -> tuple[Tensor, Tensor | None]:
    """`dwconv2d` and, for the `gbn_act` that follows with as many groups, the result's statistics (reference: None)."""
    x = _autocast(x)
    if _by_kernel("dwconv2d", x):
        return depthwise.dwconv2d_stats(x, weight, bias, stride=stride, groups=groups)
    return reference.dwconv2d_stats(x, weight, bias, stride=stride, groups=groups)


def mhsa2d(qkv: Tensor, heads: int) -> Tensor:
    """Multi-head self-attention over the positions of a map: out_i = sum_j softmax_j(q_i.k_j / sqrt(d)) v_j.

    qkv: [N, 3*heads*d, H, W], channels ordered q (all heads), k, v, with d consecutive channels a head; the tokens are
    the H*W positions, row by row; no positional term. Returns [N, heads*d, H, W]. The kernels take d = 16, 32, 64 or
    128 and at most 256 positions; the rest goes to `scaled_dot_product_attention`.
    Raises ValueError for shapes that do not fit.
    """
    qkv = _autocast(qkv)
    if _by_kernel("mhsa2d", qkv) and attention.takes(qkv, heads):
        return attention.mhsa2d(qkv, heads)
    return reference.mhsa2d(qkv, heads)


def mhsa2d_stats(qkv: Tensor, heads: int, *, groups: int = 1) -> tuple[Tensor, Tensor | None]:
    """`mhsa2d` and, for the `gbn_act` that follows with as many groups, the result's statistics (reference: None)."""
    qkv = _autocast(qkv)
    if _by_kernel("mhsa2d", qkv) and attention.takes(qkv, heads):
        return attention.mhsa2d_stats(qkv, heads, groups=groups)
    return reference.mhsa2d_stats(qkv, heads, groups=groups)


def lars_ema_step(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    momenta: Sequence[Tensor],
    excluded: Sequence[bool],
    targets: Sequence[Tensor | None] | None = None,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    trust: float,
    ema: float = 1.0,
    loss_scale: float | Tensor = 1.0,
    clip: float = 0.0,
    squares: Tensor | None = None,
    norm: Tensor | None = None,
) -> Tensor:
    """One LARS update of many tensors, in place, and the moving average that follows it.

    For every tensor w with a gradient g that is not None and not all zero::

        g <- g / loss_scale * min(1, clip / (norm / loss_scale + 1e-6))        clip 0: no limit; g itself is not written
        g <- (g + weight_decay w) * lr * trust |w| / (|g| + weight_decay |w|)      excluded: g <- lr g
        buf <- momentum buf + g;  w <- w - buf

    Then, for every tensor with a target that is not None, target <- ema target + (1 - ema) w.

    Returns ``applied``, 0-dim bool on the tensors' device: whether the norm of the whole gradient is finite. If it is
    not, nothing changes: weights, momenta and targets stay as they are. Nothing waits for a GPU.

    loss_scale: a number, or a 0-dim float32 tensor on the device. clip: limit of the norm of g / loss_scale.
    squares: float64 [2, T], sums of squares of the T whole weights and gradients, as `lars_squares` gives them; for
        pieces of tensors, added up over the ranks that share them. None: of the tensors given here.
    norm: 0-dim float64, the norm of the whole gradient, times loss_scale; None: of the gradients in ``squares``.

    All lists are of equal length; shapes and devices must agree (ValueError).
    """
    settings = {
        "lr": lr,
        "momentum": momentum,
        "weight_decay": weight_decay,
        "trust": trust,
        "ema": ema,
        "loss_scale": loss_scale,
        "clip": clip,
        "squares": squares,
        "norm": norm,
    }
    if weights and _by_kernel("lars_ema_step", weights[0]):
        checks.lars_norms(weights, squares, norm, loss_scale)
        applied = lars.lars_ema_step(weights, gradients, momenta, excluded, targets, **settings)
        if applied is not None:
            return applied
    return reference.lars_ema_step(weights, gradients, momenta, excluded, targets, **settings)


def lars_squares(weights: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> Tensor:
    """Sums of squares of T weights and of their gradients, float64 [2, T] on their device; 0 without a gradient.

    Of pieces of tensors, they are to be added up over the ranks before `lars_ema_step` gets them. Raises ValueError
    where lengths, shapes or devices do not agree.
    """
    squares = None
    if weights and _by_kernel("lars_ema_step", weights[0]):
        squares = lars.lars_squares(weights, gradients)
    return reference.lars_squares(weights, gradients) if squares is None else squares


def byol_ensemble_loss(q: Tensor, k: Tensor) -> Tensor:
    """Loss of predictions against the ensemble of targets (BossNAS, section 3.3): [P, N, D], [T, N, D] -> [P], fp32.

    loss[p] = mean over images n of -2 cos(q[p, n], mean over t of k[t, n] / |k[t, n]|), in [-2, 2]. Differentiable in q
    alone: targets carry no gradient. Norms below 1e-8 (q) and 1e-12 (k) count as these. ValueError for shapes that do
    not fit.
    """
    if _by_kernel("byol_ensemble_loss", q) and _by_kernel("byol_ensemble_loss", k):
        return ensemble_loss.byol_ensemble_loss(q, k)
    return reference.byol_ensemble_loss(q, k)


def crop_views(pixels: Tensor, table: Tensor, looks: Looks, size: int) -> Tensor:
    """Crops of pictures as Pillow makes them: bicubic, antialiased, rounded to 8 bits after each direction.

    pixels: uint8 [bytes], N RGB pictures of any sizes, rows of HWC; its device is where the work is done.
    table: int64 [N, 3], of every picture the offset in pixels, height and width. looks: see `Looks`; a crop lies within
    its picture. table and looks are on the CPU, where launches are planned, and best in pinned memory: they are copied
    to a GPU, and nothing waits for it.

    Returns uint8 [V, N, size, size, 3]: resized to size x size, shifted (black outside), then flipped. The kernels'
    crops are Pillow 13's to the bit; those of the reference on a CPU are 0.004 of 255 off in the mean.
    Raises ValueError for tensors that do not fit and crops that leave their picture.
    """
    module = augment_reference if implementation(pixels.device) == "reference" else augment_crops
    return module.crop_views(pixels, table, looks, size)


def finish_views(
    crops: Tensor,
    looks: Looks,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Colour jitter, grey, Gaussian blur and solarisation of crops, then (pixel / 255 - mean) / std.

    crops: uint8 [V, N, S, S, 3], from `crop_views`. looks: see `Looks`; on the CPU. mean, std: by channel.
    dtype: float32, bfloat16 or float16. Returns [V, N, 3, S, S], every [v] in channels_last.

    Colours and blur are Pillow's to the bit, on every device; dtype then rounds. A view does not depend on what else is
    in the batch. Raises ValueError for tensors that do not fit, orders that name an operation twice, a sigma above 2.4,
    and factors that are not finite.
    """
    module = augment_reference if implementation(crops.device) == "reference" else augment_colours
    return module.finish_views(crops, looks, mean, std, dtype)


def augment_views(
    pixels: Tensor,
    table: Tensor,
    looks: Looks,
    size: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """All V views of N pictures, [V, N, 3, size, size]: `finish_views` of `crop_views`."""
    return finish_views(crop_views(pixels, table, looks, size), looks, mean, std, dtype)


def _by_kernel(name: str, x: Tensor) -> bool:
    """Whether Triton takes x; where it could but for x's dtype, that is said once."""
    if implementation(x.device) == "reference":
        return False
    if x.dtype not in common.DTYPES:
        common.tell_once(f"{name}: {x.dtype} tensors are computed by the reference")
        return False
    return True


def _autocast(x: Tensor) -> Tensor:
    """x in the dtype in which autocast would run a convolution."""
    if x.is_floating_point() and x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x
