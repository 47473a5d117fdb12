"""dwconv2d against cuDNN in channels_last and PyTorch's own depthwise kernel in NCHW."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from timing import Case, Inputs, Results, Side, generator
from torch import Tensor

from bossnas_kernels import dwconv2d, reference

# (space, rows, channels, side of the input map, kernel, stride, with bias); kernel 2, 4, 8: patches.
FULL = [
    ("hytra", 256, 64, 56, 3, 1, True), ("mbconv", 256, 480, 14, 5, 1, False), ("mbconv", 256, 144, 56, 5, 2, False),
    ("hytra", 256, 1024, 14, 2, 2, False), ("hytra", 256, 256, 14, 3, 1, True), ("hytra", 256, 256, 28, 3, 2, True),
    ("hytra", 256, 128, 28, 3, 1, True), ("hytra", 256, 512, 7, 3, 1, True), ("mbconv", 256, 1152, 7, 5, 1, False),
    ("mbconv", 256, 96, 112, 3, 2, False), ("mbconv", 256, 240, 28, 5, 2, False), ("mbconv", 256, 240, 28, 3, 1, False),
    ("hytra", 256, 512, 28, 4, 4, False), ("hytra", 256, 256, 56, 8, 8, False),
]  # fmt: skip
# On a CPU: an eighth of the width.
CPU_FULL = [
    ("hytra", 16, 32, 28, 3, 1, True), ("mbconv", 16, 64, 14, 5, 1, False), ("hytra", 16, 128, 14, 2, 2, False),
    ("hytra", 16, 32, 28, 3, 2, True), ("mbconv", 16, 16, 56, 5, 2, False),
]  # fmt: skip


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """The most telling cases first. Quick: one map, one of 5x5, one of stride 2, one of patches on a GPU."""
    shapes = CPU_FULL if device.type == "cpu" else FULL
    for shape in (shapes[:3] if device.type == "cpu" else shapes[:4]) if quick else shapes:
        yield _case(shape, True, device)
        yield _case(shape, False, device)


def _case(shape: tuple, train: bool, device: torch.device) -> Case:
    """train: forward, gradient of the map and of the weight; else the forward pass alone, as when rating."""
    space, rows, channels, side, k, stride, with_bias = shape
    padding = k // 2 if k % 2 else 0
    out_side = (side + 2 * padding - k) // stride + 1
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16

    def draw() -> Inputs:
        normal = generator(device, dtype)
        inputs = {
            "x": normal(rows, channels, side, side).requires_grad_(train),
            "weight": normal(channels, 1, k, k, nchw=True).requires_grad_(train),
            "bias": normal(channels).requires_grad_(train) if with_bias else None,
            "dy": normal(rows, channels, out_side, out_side),
        }
        return {
            **inputs,
            "x_nchw": inputs["x"].detach().contiguous().requires_grad_(train),
            "dy_nchw": inputs["dy"].contiguous(),
        }

    def work(convolve: Callable[..., Tensor], x: str = "x", dy: str = "dy") -> Callable[[Inputs], Results]:
        def run(i: Inputs) -> Results:
            if not train:
                with torch.no_grad():
                    return (convolve(i[x], i["weight"], i["bias"]),)
            y = convolve(i[x], i["weight"], i["bias"])
            leaves = [t for t in (i[x], i["weight"], i["bias"]) if t is not None]
            return y, *torch.autograd.grad(y, leaves, i[dy])

        return run

    def torch_convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight, bias, stride, padding, groups=channels)

    def kernel(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, weight, bias: function(x, weight, bias, stride=stride)

    def native(i: Inputs) -> Results:
        with torch.backends.cudnn.flags(enabled=False):
            return work(torch_convolve, "x_nchw", "dy_nchw")(i)

    if device.type == "cuda":
        baselines = {"cuDNN NHWC": Side(work(torch_convolve)), "native NCHW": Side(native)}
    else:
        baselines = {"F.conv2d NHWC": Side(work(torch_convolve)), "F.conv2d NCHW": Side(native)}

    # Forward, gradient of the map and of the weight each pass over both maps once.
    moved = (3 if train else 1) * rows * channels * (side**2 + out_side**2) * dtype.itemsize
    name = (
        f"dwconv2d {space} {rows}x{channels}x{side}x{side} {'patch' if k == stride else 'k'}{k} s{stride} "
        f"{'bias ' if with_bias else ''}{str(dtype).removeprefix('torch.')} {'train' if train else 'forward'}"
    )
    return Case(
        name, dtype, draw, Side(work(kernel(dwconv2d))), work(kernel(reference.dwconv2d)), baselines, moved,
        gradients=2 + with_bias if train else 0, floor_ratio=(1.4 + 1.4 + 1.6) / 3 if train else 1.4,
        speedups={"cuDNN NHWC": 2.0})  # fmt: skip
