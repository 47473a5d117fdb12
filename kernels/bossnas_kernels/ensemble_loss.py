"""K7: loss of predictions against the ensemble of targets, two launches forward and one backward, in Triton.

Forward: of every image, the normalised targets' mean and its direction, then the cosine with each prediction; then the
mean over the images. The directions are kept for the backward pass, which reads every prediction once and makes its
gradient.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bossnas_kernels import checks, common

# elements: of a tile, images x dimensions, if an image does not take more. warps: per so many elements of it.
TABLE = {
    "sm_80": {"elements": 1024, "warps": 256},
    "sm_90": {"elements": 1024, "warps": 256},
    "gfx942": {"elements": 1024, "warps": 512},
    "default": {"elements": 1024, "warps": 256},
    "interpreter": {"elements": 8192, "warps": 256},
}


def byol_ensemble_loss(q: Tensor, k: Tensor) -> Tensor:
    """`bossnas_kernels.byol_ensemble_loss` for fp32, bf16 and fp16 tensors of one CUDA or ROCm device."""
    checks.byol_ensemble_loss(q, k)
    for name, value in (("q", q), ("k", k)):
        if value.dtype not in common.DTYPES:
            raise ValueError(f"{name}: the kernel takes float32, bfloat16 or float16, got {value.dtype}")
    return _operation(q, k.detach())[0]


def _forward(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """-> loss [P], direction of the mean target [N, D]; fp32."""
    q, k = _rows(q), _rows(k)
    paths, images, width = q.shape
    cosines = torch.empty(paths, images, dtype=torch.float32, device=q.device)
    direction = torch.empty(images, width, dtype=torch.float32, device=q.device)
    grid, tile = _plan(images, width, q.device)
    _cosines[(grid,)](
        q, k, cosines, direction, images, width, paths, k.shape[0], *q.stride()[:2], *k.stride()[:2], **tile
    )
    loss = torch.empty(paths, dtype=torch.float32, device=q.device)
    _losses[(paths,)](cosines, loss, images, BLOCK=1024, num_warps=4)
    return loss, direction


def _fake_forward(q, k):
    return q.new_empty(q.shape[0], dtype=torch.float32), q.new_empty(q.shape[1:], dtype=torch.float32)


def _backward(dloss: Tensor, q: Tensor, direction: Tensor) -> Tensor:
    """-> dq [P, N, D], contiguous."""
    q, direction = _rows(q), direction.contiguous()
    paths, images, width = q.shape
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    grid, tile = _plan(images, width, q.device)
    _gradient[(grid * paths,)](dloss, q, direction, dq, images, width, dloss.stride(0), *q.stride()[:2], **tile)
    return dq


def _fake_backward(dloss, q, direction):
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def _save(ctx, inputs, output):
    _, direction = output
    ctx.save_for_backward(inputs[0], direction)
    ctx.mark_non_differentiable(direction)


def _gradients(ctx, backward, dloss, _):
    q, direction = ctx.saved_tensors
    return backward(dloss, q, direction), None


_operation = common.operation(
    "byol_ensemble_loss", _forward, _fake_forward, _backward, _fake_backward, _save, _gradients
)


def _rows(x: Tensor) -> Tensor:
    """x with its last dimension dense; the others may have any strides, 0 where they are expanded."""
    return x if x.stride(2) == 1 else x.contiguous()


@common.remembered
def _plan(images: int, width: int, device: torch.device) -> tuple[int, dict]:
    """Number of tiles of images, and their shape."""
    table = common.config(TABLE, device)
    block_d = triton.next_power_of_2(width)
    block_n = max(1, min(table["elements"] // block_d, triton.next_power_of_2(images)))
    warps = max(1, min(16, block_n * block_d // table["warps"]))
    return triton.cdiv(images, block_n), {"BLOCK_N": block_n, "BLOCK_D": block_d, "num_warps": warps}


@triton.jit
def _cosines(
    q,
    k,
    cosines,
    direction,
    images,
    width,
    paths,
    targets,
    q_path,
    q_image,
    k_target,
    k_image,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Direction of the mean normalised target of every image, and the cosines of all predictions with it."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    mask = (n < images)[:, None] & (d < width)[None, :]
    mean = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    at = k + n[:, None] * k_image + d[None, :]
    for _ in range(targets):
        value = tl.load(at, mask=mask, other=0).to(tl.float32)
        norm = tl.sqrt(tl.sum(value * value, 1))
        mean += value / tl.maximum(norm, 1e-12)[:, None]
        at += k_target
    mean /= targets
    norm = tl.sqrt(tl.sum(mean * mean, 1))
    mean /= tl.maximum(norm, 1e-8)[:, None]
    tl.store(direction + n[:, None] * width + d[None, :], mean, mask=mask)
    at = q + n[:, None] * q_image + d[None, :]
    to = cosines + n
    for _ in range(paths):
        value = tl.load(at, mask=mask, other=0).to(tl.float32)
        norm = tl.sqrt(tl.sum(value * value, 1))
        cosine = tl.sum(value * mean, 1) / tl.maximum(norm, 1e-8)
        tl.store(to, cosine, mask=n < images)
        at += q_path
        to += images


@triton.jit
def _losses(cosines, loss, images, BLOCK: tl.constexpr):
    """-2 times the mean over the images of one path's cosines."""
    path = tl.program_id(0)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, images, BLOCK):
        n = start + tl.arange(0, BLOCK)
        total += tl.load(cosines + path.to(tl.int64) * images + n, mask=n < images, other=0)
    tl.store(loss + path, tl.sum(total, 0) * (-2 / images))


@triton.jit
def _gradient(
    dloss, q, direction, dq, images, width, dloss_path, q_path, q_image, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):
    """dq of one path and tile of images: (direction - cosine q/|q|) / |q| * -2 / images, times the loss's gradient."""
    tiles = tl.cdiv(images, BLOCK_N)
    p = (tl.program_id(0) // tiles).to(tl.int64)
    n = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    mask = (n < images)[:, None] & (d < width)[None, :]
    value = tl.load(q + p * q_path + n[:, None] * q_image + d[None, :], mask=mask, other=0).to(tl.float32)
    target = tl.load(direction + n[:, None] * width + d[None, :], mask=mask, other=0)
    norm = tl.sqrt(tl.sum(value * value, 1))
    scale = 1 / tl.maximum(norm, 1e-8)
    # below this norm the loss divides by a constant, which has no slope
    cosine = tl.where(norm > 1e-8, tl.sum(value * target, 1) * scale, 0)
    factor = tl.load(dloss + p * dloss_path).to(tl.float32) * -2 / images * scale
    grad = (target - value * (cosine * scale)[:, None]) * factor[:, None]
    tl.store(dq + (p * images + n)[:, None] * width + d[None, :], grad.to(dq.dtype.element_ty), mask=mask)
