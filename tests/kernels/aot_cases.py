"""The launches that the ahead-of-time gate compiles: every kernel at real shapes, on `meta` tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import triton
from torch import Tensor


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16, grad: bool = True) -> Tensor:
    """A tensor without data; maps are channels_last."""
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=layout, requires_grad=grad)


def train(output: Tensor) -> None:
    output.backward(torch.empty_like(output))


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    yield from gbn_act_cases()
    yield from dwconv2d_cases()
    yield from mhsa2d_cases()
    yield from lars_ema_step_cases()
    yield from byol_ensemble_loss_cases()
    yield from augment_views_cases()


def gbn_act_cases():
    from bossnas_kernels import grouped_norm

    def run(shape, groups, dtype, act, residual, training=True):
        c = shape[1]
        x, res = meta(*shape, dtype=dtype), meta(*shape, dtype=dtype) if residual else None
        affine = [meta(c, dtype=torch.float32) for _ in range(2)]
        running = (
            {}
            if training
            else {k: meta(groups, c, dtype=torch.float32, grad=False) for k in ("running_mean", "running_var")}
        )
        y, _, _ = grouped_norm.gbn_act(x, *affine, groups=groups, residual=res, act=act, training=training, **running)
        train(y)

    for shape, groups, dtype, act, residual, training in (
        ((256, 64, 56, 56), 8, torch.bfloat16, "relu", False, True),
        ((256, 256, 56, 56), 8, torch.bfloat16, "relu", True, True),
        ((256, 2048, 7, 7), 8, torch.bfloat16, "relu", True, True),
        ((256, 1024, 14, 14), 64, torch.float16, "silu", False, True),
        ((256, 480, 14, 14), 2, torch.bfloat16, "silu", True, True),
        ((256, 1024, 14, 14), 64, torch.bfloat16, "relu", True, False),
        ((1024, 4096), 8, torch.float32, "relu", False, True),
        ((1024, 64, 224, 224), 1, torch.bfloat16, "relu", False, True),
    ):
        mode = act + "+res" * residual + " eval" * (not training)
        name = f"gbn_act {'x'.join(map(str, shape))} G={groups} {str(dtype)[6:]} {mode}"
        yield name, lambda a=(shape, groups, dtype, act, residual, training): run(*a)


def mhsa2d_cases():
    from bossnas_kernels import attention

    def run(shape, heads, dtype, groups):
        qkv = meta(*shape, dtype=dtype)
        train(attention.mhsa2d_stats(qkv, heads, groups=groups)[0] if groups else attention.mhsa2d(qkv, heads))

    half, brain, single = torch.float16, torch.bfloat16, torch.float32
    for batch, heads, width, side, dtype, groups in (
        (256, 4, 64, 14, brain, 0),
        (256, 4, 64, 14, brain, 8),
        (256, 4, 64, 14, half, 0),
        (256, 4, 64, 14, single, 8),
        (256, 8, 64, 7, brain, 0),
        (256, 8, 64, 7, half, 8),
        (256, 8, 64, 7, single, 0),
        (256, 8, 32, 14, brain, 8),
        (256, 8, 32, 7, brain, 0),
        (256, 8, 32, 14, single, 0),
        (256, 2, 128, 16, brain, 8),
        (256, 2, 128, 14, half, 0),
        (256, 2, 128, 16, single, 0),
    ):
        name = f"mhsa2d N={batch} heads={heads}x{width} {side}x{side} {str(dtype)[6:]}" + f" G={groups}" * bool(groups)
        shape = (batch, 3 * heads * width, side, side)
        yield name, lambda a=(shape, heads, dtype, groups): run(*a)


def dwconv2d_cases():
    from bossnas_kernels import depthwise

    def run(channels, side, kernel, stride, dtype, groups, bias):
        x, weight = meta(256, channels, side, side, dtype=dtype), meta(channels, 1, kernel, kernel, dtype=torch.float32)
        bias = meta(channels, dtype=torch.float32) if bias else None
        if groups:
            train(depthwise.dwconv2d_stats(x, weight, bias, stride=stride, groups=groups)[0])
        else:
            train(depthwise.dwconv2d(x, weight, bias, stride=stride))

    brain, single = torch.bfloat16, torch.float32
    for channels, side, kernel, stride, dtype, groups, bias in (
        # the position encoding of HyTra
        (64, 56, 3, 1, brain, 8, True),
        (64, 56, 3, 1, brain, 0, True),
        (64, 56, 3, 1, single, 8, True),
        (128, 28, 3, 1, brain, 8, True),
        (256, 14, 3, 1, brain, 8, True),
        (512, 7, 3, 1, brain, 8, True),
        (64, 56, 3, 2, brain, 8, True),
        (512, 14, 3, 2, brain, 0, True),
        # MBConv
        (96, 112, 3, 2, brain, 2, False),
        (480, 14, 3, 1, brain, 8, False),
        (480, 14, 5, 1, brain, 8, False),
        (480, 14, 5, 1, single, 8, False),
        (144, 56, 5, 2, brain, 8, False),
        (144, 56, 5, 2, single, 0, False),
        (1152, 7, 5, 1, brain, 8, False),
        # patches of stem and neck
        (64, 56, 2, 2, brain, 8, False),
        (64, 56, 4, 4, brain, 8, False),
        (64, 56, 8, 8, brain, 8, False),
        (256, 56, 8, 8, brain, 0, True),
        (256, 56, 8, 8, single, 8, True),
        (512, 28, 4, 4, brain, 0, True),
        (512, 28, 4, 4, single, 0, True),
        (1024, 14, 2, 2, brain, 0, True),
        (1024, 14, 2, 2, single, 0, True),
    ):
        name = f"dwconv2d {channels}x{side}x{side} k={kernel} s={stride} {str(dtype)[6:]} G={groups}" + "+bias" * bias
        yield name, lambda a=(channels, side, kernel, stride, dtype, groups, bias): run(*a)


def lars_ema_step_cases():
    from bossnas_kernels import common, lars

    def run(tensors, elements, shared):
        chunks = tensors * triton.cdiv(elements, common.config(lars.TABLE, torch.device("meta"))["chunk"])
        tables = [
            torch.empty(*shape, dtype=dtype, device="meta")
            for shape, dtype in (
                ((tensors, lars._COLUMNS), torch.int64),
                ((chunks, 2), torch.int32),
                ((tensors,), torch.int64),
            )
        ]
        table, chunks, gradients = tables
        squares = lars._sum_squares(table, chunks, gradients)
        norm = torch.empty((), dtype=torch.float64, device="meta") if shared else None
        scale = torch.empty((), device="meta") if shared else 1.0
        settings = {"lr": 0.1, "weight_decay": 1e-6, "trust": 1e-3, "loss_scale": scale, "clip": 0.0}
        lars._move(*tables, *lars._settle(table, gradients, squares, norm, **settings), 0.9, 1e-6, 0.99)

    for tensors, elements, shared in ((400, 100_000, False), (400, 4_000_000, True), (1, 3_000_000_000, False)):
        name = f"lars_ema_step {tensors} of {elements}" + " shared" * shared
        yield name, lambda a=(tensors, elements, shared): run(*a)


def byol_ensemble_loss_cases():
    from bossnas_kernels import ensemble_loss

    def run(width, q_dtype, k_dtype):
        q, k = meta(4, 256, width, dtype=q_dtype), meta(4, 256, width, dtype=k_dtype, grad=False)
        train(ensemble_loss.byol_ensemble_loss(q, k))

    brain, single = torch.bfloat16, torch.float32
    for width, q_dtype, k_dtype in (
        (256, brain, brain),
        (256, single, single),
        (4096, brain, brain),
        (4096, single, single),
        (4096, single, brain),
    ):
        name = f"byol_ensemble_loss P=T=4 N=256 D={width} {str(q_dtype)[6:]} {str(k_dtype)[6:]}"
        yield name, lambda a=(width, q_dtype, k_dtype): run(*a)


def augment_views_cases():
    from bossnas_kernels import Looks, augment_colours, augment_crops

    def run(views, images, height, width, size, dtype, jitter):
        table = torch.tensor([[i * 3 * height * width, height, width] for i in range(images)])
        ints, floats = torch.zeros(views, images, 13, dtype=torch.int32), torch.ones(views, images, 5)
        ints[..., 2:4] = torch.tensor([height, width])
        ints[..., 7:11], floats[..., 4] = torch.arange(4) if jitter else -1, float(jitter)
        pixels = torch.empty(images * 3 * height * width, dtype=torch.uint8, device="meta")
        looks, colours = Looks(ints, floats), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), dtype)
        augment_colours.finish_views(augment_crops.crop_views(pixels, table, looks, size), looks, *colours)

    for views, images, height, width, size, dtype, jitter in (
        (8, 256, 375, 500, 224, torch.float32, True),
        (2, 4096, 32, 32, 32, torch.bfloat16, False),
    ):
        name = f"augment_views {views}x{images} of {height}x{width} to {size} {str(dtype)[6:]}" + " jitter" * jitter
        yield name, lambda a=(views, images, height, width, size, dtype, jitter): run(*a)
