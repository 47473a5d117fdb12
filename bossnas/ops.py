"""Old door: the layers that spaces are made of, now in `bossnas.spaces.ops`. Files of own spaces import them here."""

from bossnas.spaces.ops import (
    Attention as Attention,
    Average as Average,
    Chain as Chain,
    DepthwiseConv as DepthwiseConv,
    GroupedBatchNorm as GroupedBatchNorm,
    HalvePool as HalvePool,
    NoAdapter as NoAdapter,
    PooledPointwise as PooledPointwise,
    SlimConv as SlimConv,
    SqueezeExcite as SqueezeExcite,
    Statistics as Statistics,
    WideConv as WideConv,
    conv as conv,
    conv_norm as conv_norm,
    full as full,
    synchronise as synchronise,
    use_kernels as use_kernels,
)
