"""Kernels of bossnas as plain functions over tensors; needs torch alone and can be used without bossnas.

`gbn_act`: grouped batch norm + residual + activation.
`attention`: multi-head self-attention over the positions of a map.
`bossnas_kernels.reference` holds their plain PyTorch implementations, the yardstick for every other one.
"""

from __future__ import annotations

from bossnas_kernels.reference import attention, gbn_act

__all__ = ["attention", "gbn_act"]
