"""K3: multi-head self-attention over the positions of an NHWC map, forward and backward, in Triton.

A map of packed q, k, v is a matrix of tokens, [N, T, 3*heads*d] in memory: every tile is read and every gradient
written where it lies, without transposes or copies. Forward: one program per image, head and tile of queries, online
softmax in base 2 over tiles of keys. Backward: dq by tiles of queries, then dk and dv by tiles of keys; where one tile
holds all keys, a single kernel gives all three and computes scores once. There are no atomics, so results repeat to
the bit. fp32 maps are multiplied in fp32 (input_precision="ieee"), not in tf32: exact, and slow next to 16 bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bossnas_kernels import checks, common
from bossnas_kernels.common import dense, new_map

HEAD_WIDTHS = (16, 32, 64, 128)
MAX_TOKENS = 256

# query, key: rows of a tile in the forward pass, at most. own: of queries or keys that a program of the backward pass
# answers for; step: of the keys or queries that it walks over. elements: of any tile, at most. warp: elements of a tile
# of query or own for each warp; there are at least four.
TABLE = {
    "sm_80": {"query": 64, "key": 64, "own": 64, "step": 32, "elements": 8192, "warp": 1024, "num_stages": 2},
    "sm_90": {"query": 64, "key": 64, "own": 64, "step": 64, "elements": 8192, "warp": 1024, "num_stages": 2},
    "gfx942": {"query": 64, "key": 64, "own": 64, "step": 32, "elements": 8192, "warp": 1024, "num_stages": 1},
    "default": {"query": 64, "key": 32, "own": 32, "step": 32, "elements": 4096, "warp": 1024, "num_stages": 1},
    "interpreter": {"query": 64, "key": 64, "own": 64, "step": 64, "elements": 8192, "warp": 1024, "num_stages": 1},
}
# Of fp32 maps, whose products run outside the tensor cores and hold both factors in registers.
TABLE_FP32 = {
    "sm_80": {"query": 32, "key": 32, "own": 32, "step": 16, "elements": 2048, "warp": 256, "num_stages": 1},
    "default": {"query": 32, "key": 32, "own": 32, "step": 32, "elements": 2048, "warp": 256, "num_stages": 1},
    "interpreter": TABLE["interpreter"],
}
_INTERPRET = tl.constexpr(common.INTERPRET)
_LOG2E = 1.4426950408889634


def takes(qkv: Tensor, heads: int) -> bool:
    """Whether the kernels are written for this head width and number of positions; if not, that is said once."""
    checks.mhsa2d(qkv, heads)
    width, tokens = _sizes(qkv, heads)
    if width in HEAD_WIDTHS and tokens <= MAX_TOKENS:
        return True
    common.tell_once(f"mhsa2d: heads of {width} channels over {tokens} positions are computed by the reference")
    return False


def mhsa2d(qkv: Tensor, heads: int) -> Tensor:
    """`bossnas_kernels.mhsa2d` for fp32, bf16 and fp16 maps on a CUDA or ROCm device; `takes` says which."""
    _check(qkv, heads)
    return _operation(qkv, heads, 0)[0]


def mhsa2d_stats(qkv: Tensor, heads: int, *, groups: int = 1) -> tuple[Tensor, Tensor]:
    """`mhsa2d` and the statistics of the result for `gbn_act`: (count, mean, M2), [3, groups, parts, heads*d] fp32.

    A part is an image's tile of queries. Statistics are those of the result in its own dtype; they carry no gradient.
    """
    _check(qkv, heads)
    checks.stats_groups(groups, qkv.shape[0])
    out, _, partial_stats = _operation(qkv, heads, groups)
    return out, partial_stats


def _check(qkv: Tensor, heads: int) -> None:
    checks.mhsa2d(qkv, heads)
    width, tokens = _sizes(qkv, heads)
    if qkv.dtype not in common.DTYPES:
        raise ValueError(f"qkv: the kernel takes float32, bfloat16 or float16, got {qkv.dtype}")
    if width not in HEAD_WIDTHS or tokens > MAX_TOKENS:
        raise ValueError(
            f"qkv: the kernel takes heads of {', '.join(map(str, HEAD_WIDTHS))} channels and at most "
            f"{MAX_TOKENS} positions, got {width} channels and {tokens} positions"
        )


def _forward(qkv: Tensor, heads: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """-> out, base-2 log-sum-exp of the scores [N, heads, T] fp32, partial_stats (empty for groups = 0)."""
    qkv = dense("qkv of mhsa2d", qkv)
    plan = _plan(qkv.shape, heads, qkv.dtype, qkv.device)
    out, lse, partial_stats = plan.results(qkv, groups)
    _attend[plan.query_grid](
        qkv,
        out,
        lse,
        partial_stats,
        heads,
        plan.scale * _LOG2E,
        partial_stats.stride(0),
        STATS=groups > 0,
        **plan.query_tile,
    )
    return out, lse, partial_stats


def _fake_forward(qkv, heads, groups):
    return _Plan(qkv.shape, heads, qkv.dtype, qkv.device).results(qkv, groups)


def _backward(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, heads: int) -> Tensor:
    """-> dqkv, packed as qkv is."""
    qkv, dout = dense("qkv of mhsa2d", qkv), dense("gradient of mhsa2d", dout)
    plan = _plan(qkv.shape, heads, qkv.dtype, qkv.device)
    dqkv = new_map(qkv)
    delta = lse if plan.whole else torch.empty_like(lse)  # sums of out * dout over a head's channels
    arguments = (qkv, out, dout, lse, delta, dqkv, heads, plan.scale, plan.scale * _LOG2E)
    if not plan.whole:
        _query_gradient[plan.own_grid](*arguments, **plan.own_tile)
    _key_gradient[plan.own_grid](*arguments, WHOLE=plan.whole, **plan.own_tile)
    return dqkv


def _fake_backward(dout, qkv, out, lse, heads):
    return new_map(qkv)


def _save(ctx, inputs, output):
    qkv, ctx.heads, _ = inputs
    out, lse, partial_stats = output
    ctx.save_for_backward(qkv, out, lse)
    ctx.mark_non_differentiable(lse, partial_stats)


def _gradients(ctx, backward, dout, *_):
    return backward(dout, *ctx.saved_tensors, ctx.heads), None, None


_operation = common.operation("mhsa2d", _forward, _fake_forward, _backward, _fake_backward, _save, _gradients)


class _Plan:
    """Tiles and grids for a map of qkv."""

    def __init__(self, shape: torch.Size, heads: int, dtype: torch.dtype, device: torch.device):
        self.table = common.config(TABLE_FP32 if dtype == torch.float32 else TABLE, device)
        batch, channels, height, width = shape
        self.heads, self.width, self.tokens = heads, channels // (3 * heads), height * width
        self.scale = self.width**-0.5
        self.out_shape = (batch, channels // 3, height, width)
        query, key, own, step = (self._rows(name) for name in ("query", "key", "own", "step"))
        self.query_tiles, own_tiles = triton.cdiv(self.tokens, query), triton.cdiv(self.tokens, own)
        self.whole = own_tiles == 1
        self.query_grid, self.own_grid = (self.query_tiles * batch * heads,), (own_tiles * batch * heads,)
        self.query_tile = {"BLOCK_Q": query, "BLOCK_K": key, **self._settings(query)}
        self.own_tile = {"OWN": own, "STEP": step, **self._settings(own)}

    def results(self, qkv: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
        """What `_forward` returns, without values."""
        batch, channels, height, width = self.out_shape
        shape = (3, groups, batch // groups * self.query_tiles, channels) if groups else (0,)
        return (
            new_map(qkv, shape=self.out_shape),
            torch.empty(batch, self.heads, height * width, dtype=torch.float32, device=qkv.device),
            torch.empty(shape, dtype=torch.float32, device=qkv.device),
        )

    def _rows(self, name: str) -> int:
        """Rows of a tile: a power of two from 16 (what a product takes at least), no larger than the map needs."""
        most = min(self.table[name], self.table["elements"] // self.width)
        rows = 16
        while rows < most and rows < self.tokens:
            rows *= 2
        return rows

    def _settings(self, rows: int) -> dict:
        return {
            "TOKENS": self.tokens,
            "WIDTH": self.width,
            "num_stages": self.table["num_stages"],
            "num_warps": max(4, rows * self.width // self.table["warp"]),
        }


_plan = common.remembered(_Plan)


def _sizes(qkv: Tensor, heads: int) -> tuple[int, int]:
    """Channels of a head, positions of the map."""
    return qkv.shape[1] // (3 * heads), qkv.shape[2] * qkv.shape[3]


@triton.jit
def _place(heads, TOKENS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """This program's rows of its map [BLOCK], its tile among all tiles of all images, and its head.

    Then where head and image begin: offsets into qkv, into a map of heads*d channels, into rows of [N, heads, T].
    """
    tiles = tl.cdiv(TOKENS, BLOCK)
    pid = tl.program_id(0)
    tile = pid % tiles
    head = pid // tiles % heads
    image = (pid // tiles // heads).to(tl.int64)
    token = image * TOKENS
    return (
        tile * BLOCK + tl.arange(0, BLOCK),
        image * tiles + tile,
        head,
        token * (3 * heads * WIDTH) + head * WIDTH,
        token * (heads * WIDTH) + head * WIDTH,
        (image * heads + head) * TOKENS,
    )


@triton.jit
def _at(row, stride, WIDTH: tl.constexpr):
    """Offsets of a head's channels in rows that lie stride apart, [rows, WIDTH]."""
    return row[:, None] * stride + tl.arange(0, WIDTH)[None, :]


@triton.jit
def _dot(a, b):
    if _INTERPRET:  # whose 16-bit products are wrong
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _attend(
    qkv,
    out,
    lse,
    partial,
    heads,
    scale2,
    plane,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STATS: tl.constexpr,
):
    """One tile of queries against all keys -> out, lse and, with STATS, count, mean and M2 of the tile's results."""
    row, part, head, qkv_base, out_base, row_base = _place(heads, TOKENS, WIDTH, BLOCK_Q)
    row_ok = (row < TOKENS)[:, None]
    channels = heads * WIDTH
    keys = qkv + qkv_base + channels
    values = keys + channels
    q = tl.load(qkv + qkv_base + _at(row, 3 * channels, WIDTH), mask=row_ok, other=0)
    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, WIDTH], tl.float32)
    for start in range(0, TOKENS, BLOCK_K):
        key = start + tl.arange(0, BLOCK_K)
        at = _at(key, 3 * channels, WIDTH)
        k = tl.load(keys + at, mask=(key < TOKENS)[:, None], other=0)
        v = tl.load(values + at, mask=(key < TOKENS)[:, None], other=0)
        score = tl.where((key < TOKENS)[None, :], _dot(q, tl.trans(k)) * scale2, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))  # every tile holds a key, so this is not -inf
        p = tl.math.exp2(score - higher[:, None])
        shrink = tl.math.exp2(top - higher)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None] + _dot(p.to(v.dtype), v)
        top = higher
    result = (acc / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + out_base + _at(row, channels, WIDTH), result, mask=row_ok)
    tl.store(lse + row_base + row, top + tl.math.log2(total), mask=row < TOKENS)
    if STATS:
        value = tl.where(row_ok, result.to(tl.float32), 0)
        count = tl.sum((row < TOKENS).to(tl.float32), 0)
        pivot = tl.sum(value, 0) / count  # all but the mean: what is off it sums without loss
        off = tl.where(row_ok, value - pivot[None, :], 0)
        shift = tl.sum(off, 0) / count
        to = partial + part * channels + head * WIDTH + tl.arange(0, WIDTH)
        tl.store(to, shift * 0 + count)
        tl.store(to + plane, pivot + shift)
        tl.store(to + 2 * plane, tl.sum(off * off, 0) - count * shift * shift)


@triton.jit
def _query_gradient(
    qkv,
    out,
    dout,
    lse,
    delta,
    dqkv,
    heads,
    scale,
    scale2,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    OWN: tl.constexpr,
    STEP: tl.constexpr,
):
    """dq of one tile of queries, and delta, which `_key_gradient` reads."""
    row, part, head, qkv_base, out_base, row_base = _place(heads, TOKENS, WIDTH, OWN)
    row_ok = (row < TOKENS)[:, None]
    channels = heads * WIDTH
    keys = qkv + qkv_base + channels
    values = keys + channels
    q_at = qkv_base + _at(row, 3 * channels, WIDTH)
    out_at = out_base + _at(row, channels, WIDTH)
    q = tl.load(qkv + q_at, mask=row_ok, other=0)
    do = tl.load(dout + out_at, mask=row_ok, other=0)
    d = tl.sum(tl.load(out + out_at, mask=row_ok, other=0).to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta + row_base + row, d, mask=row < TOKENS)
    norm = tl.load(lse + row_base + row, mask=row < TOKENS, other=float("inf"))
    dq = tl.zeros([OWN, WIDTH], tl.float32)
    for start in range(0, TOKENS, STEP):
        key = start + tl.arange(0, STEP)
        at = _at(key, 3 * channels, WIDTH)
        k = tl.load(keys + at, mask=(key < TOKENS)[:, None], other=0)
        v = tl.load(values + at, mask=(key < TOKENS)[:, None], other=0)
        p = tl.math.exp2(_dot(q, tl.trans(k)) * scale2 - norm[:, None])
        p = tl.where((key < TOKENS)[None, :], p, 0)  # exp2(-norm) may be inf
        ds = p * (_dot(do, tl.trans(v)) - d[:, None])
        dq += _dot(ds.to(k.dtype), k)
    tl.store(dqkv + q_at, (dq * scale).to(dqkv.dtype.element_ty), mask=row_ok)


@triton.jit
def _key_gradient(
    qkv,
    out,
    dout,
    lse,
    delta,
    dqkv,
    heads,
    scale,
    scale2,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    OWN: tl.constexpr,
    STEP: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """dk and dv of one tile of keys; dq as well where the tile is all keys (WHOLE). Scores are keys x queries here."""
    key, part, head, qkv_base, out_base, row_base = _place(heads, TOKENS, WIDTH, OWN)
    key_ok = (key < TOKENS)[:, None]
    channels = heads * WIDTH
    k_at = qkv_base + channels + _at(key, 3 * channels, WIDTH)
    k = tl.load(qkv + k_at, mask=key_ok, other=0)
    v = tl.load(qkv + k_at + channels, mask=key_ok, other=0)
    dk = tl.zeros([OWN, WIDTH], tl.float32)
    dv = tl.zeros([OWN, WIDTH], tl.float32)
    for start in range(0, TOKENS, STEP):
        row = start + tl.arange(0, STEP)
        row_ok = (row < TOKENS)[:, None]
        q_at = qkv_base + _at(row, 3 * channels, WIDTH)
        out_at = out_base + _at(row, channels, WIDTH)
        q = tl.load(qkv + q_at, mask=row_ok, other=0)
        do = tl.load(dout + out_at, mask=row_ok, other=0)
        if WHOLE:
            d = tl.sum(tl.load(out + out_at, mask=row_ok, other=0).to(tl.float32) * do.to(tl.float32), 1)
        else:
            d = tl.load(delta + row_base + row, mask=row < TOKENS, other=0)
        norm = tl.load(lse + row_base + row, mask=row < TOKENS, other=float("inf"))
        p = tl.math.exp2(_dot(k, tl.trans(q)) * scale2 - norm[None, :])
        p = tl.where(key_ok, p, 0)  # exp2(-norm) may be inf
        dv += _dot(p.to(do.dtype), do)
        ds = (p * (_dot(v, tl.trans(do)) - d[None, :])).to(q.dtype)
        dk += _dot(ds, q)
        if WHOLE:
            tl.store(dqkv + q_at, (_dot(tl.trans(ds), k) * scale).to(dqkv.dtype.element_ty), mask=row_ok)
    tl.store(dqkv + k_at, (dk * scale).to(dqkv.dtype.element_ty), mask=key_ok)
    tl.store(dqkv + k_at + channels, dv.to(dqkv.dtype.element_ty), mask=key_ok)
