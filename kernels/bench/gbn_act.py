"""gbn_act against an eager loop of F.batch_norm over the groups, forward and backward in training mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bossnas_kernels import gbn_act

# Rows over all groups, channels, height, width: inner maps of a hybrid network and a projector's batch.
QUICK = [(64, 64, 14, 14), (128, 64, 7, 7)]
FULL = [(64, 16, 28, 28), (64, 64, 14, 14), (64, 256, 14, 14), (128, 256, 7, 7), (512, 1024)]
GROUPS = (1, 8, 64)
# fp32 against fp32: both sum the same few thousand values, in another order.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Case:
    """One thing to time: `ours` and `baseline` do the same work and return the same tensors."""

    name: str
    ours: Callable[[], tuple[Tensor, ...]]
    baseline: Callable[[], tuple[Tensor, ...]]
    bytes_moved: int  # what the two passes have to read and write at least


def loop(x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor) -> Tensor:
    """The baseline: F.batch_norm + ReLU group by group, each with running statistics; one concatenation."""
    rows = zip(x.chunk(len(running_mean)), running_mean, running_var, strict=True)
    return torch.cat([F.relu(F.batch_norm(r, mean, var, weight, bias, True, 0.1)) for r, mean, var in rows])


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """The cases of this benchmark, one after another, so that only one's tensors are alive at a time."""
    for shape in QUICK if quick else FULL:
        for layout in ("nchw", "nhwc") if len(shape) == 4 else ("rows",):
            for groups in GROUPS:
                yield _case(shape, layout, groups, device)


def _case(shape: tuple[int, ...], layout: str, groups: int, device: torch.device) -> Case:
    gen = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=gen).to(device)

    x, grad_y = draw(*shape), draw(*shape)
    if layout == "nhwc":
        x, grad_y = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad_y))
    weight, bias = draw(shape[1]) + 1, draw(shape[1])
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    running_mean, running_var = draw(groups, shape[1]), draw(groups, shape[1]).abs()

    def ours() -> tuple[Tensor, ...]:
        y, _, _ = gbn_act(x, weight, bias, groups=groups, act="relu")
        return y, *torch.autograd.grad(y, leaves, grad_y)

    def baseline() -> tuple[Tensor, ...]:
        y = loop(x, weight, bias, running_mean, running_var)
        return y, *torch.autograd.grad(y, leaves, grad_y)

    # Forward: x twice (statistics, result), y once. Backward: x and dy twice, dx once.
    moved = 8 * x.numel() * x.element_size()
    size = "x".join(map(str, shape))
    return Case(f"gbn_act {size} {layout} G={groups}", ours, baseline, moved)
