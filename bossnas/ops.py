"""Old door: the layers that spaces are made of, now in `bossnas.spaces.ops`. Files of own spaces import them here."""

from bossnas.spaces.ops import (
    Attention,
    Average,
    Chain,
    DenseConv,
    DepthwiseConv,
    GroupedBatchNorm,
    HalvePool,
    NoAdapter,
    PooledPointwise,
    SlimConv,
    SqueezeExcite,
    Statistics,
    conv,
    conv_norm,
    full,
    synchronise,
    use_kernels,
)

WideConv = DenseConv  # its name until it took kernels of 1, too

__all__ = [
    "Attention",
    "Average",
    "Chain",
    "DenseConv",
    "DepthwiseConv",
    "GroupedBatchNorm",
    "HalvePool",
    "NoAdapter",
    "PooledPointwise",
    "SlimConv",
    "SqueezeExcite",
    "Statistics",
    "WideConv",
    "conv",
    "conv_norm",
    "full",
    "synchronise",
    "use_kernels",
]
