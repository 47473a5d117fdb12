"""Kernels of bossnas as plain functions over tensors; needs torch alone (and Triton on a GPU), not bossnas.

`gbn_act`: grouped batch norm + residual + activation. `dwconv2d`: depthwise convolution. `mhsa2d`: self-attention over
the positions of a map. `lars_ema_step`: optimizer and moving average of many tensors. `byol_ensemble_loss`: the loss of
ensemble bootstrapping. `augment_views`: augmented views of a batch of pictures. `use` chooses between the Triton
kernels and their plain PyTorch yardstick (`bossnas_kernels.reference`, `augment_reference`); `implementation` says
which one runs. `bossnas_kernels.products` and `bossnas_kernels.gated` are for a CPU alone.
"""

from __future__ import annotations

from bossnas_kernels.dispatch import (
    augment_views,
    byol_ensemble_loss,
    crop_views,
    dwconv2d,
    dwconv2d_stats,
    finish_views,
    gbn_act,
    implementation,
    lars_ema_step,
    lars_squares,
    mhsa2d,
    mhsa2d_stats,
    use,
)
from bossnas_kernels.looks import Looks

__all__ = [
    "Looks",
    "augment_views",
    "byol_ensemble_loss",
    "crop_views",
    "dwconv2d",
    "dwconv2d_stats",
    "finish_views",
    "gbn_act",
    "implementation",
    "lars_ema_step",
    "lars_squares",
    "mhsa2d",
    "mhsa2d_stats",
    "use",
]
