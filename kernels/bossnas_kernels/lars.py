"""K5: LARS and the moving average of the target for all tensors of a network, in four launches.

Squares of every chunk of weights and gradients -> sums by tensor -> one program that decides: whether the step is
taken, what gradients are multiplied by, the scale of every tensor's step -> update and moving average. The kernels find
the tensors through a table of addresses and a list of chunks; both stay on the GPU from step to step. Gradients are new
memory on every step, so their addresses are sent each time, from pinned memory. Nothing is copied back, and nothing
waits for the GPU.

Norms are taken in fp64, which costs nothing beside the memory traffic: a gradient counts as zero only if all of its
elements are, however small they get. (The reference takes norms in fp32, where that is so from about 1e-22 up.)

Addresses are read on the host at every call: not for CUDA graphs, nor for torch.compile.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from bossnas_kernels import common
from bossnas_kernels.lars_tensors import judge

# chunk: elements that one program goes through, a multiple of block. block: elements at a time.
TABLE = {
    "sm_80": {"chunk": 16384, "block": 2048, "num_warps": 4},
    "sm_90": {"chunk": 16384, "block": 2048, "num_warps": 4},
    "gfx942": {"chunk": 16384, "block": 2048, "num_warps": 4},
    "default": {"chunk": 16384, "block": 2048, "num_warps": 4},
    "interpreter": {"chunk": 1024, "block": 512, "num_warps": 4},
}
_COLUMNS = 7  # of the table: addresses of weight, momentum, target; elements; excluded; first chunk, one past the last
_LARGEST: tl.constexpr = tl.constexpr(3.4e38)  # finite number of fp32, nearly


@torch.no_grad()
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
) -> Tensor | None:
    """`bossnas_kernels.lars_ema_step` for at least one tensor. None, and nothing done, where `judge` says why not."""
    verdict = judge(weights, gradients, momenta, excluded, targets)
    if verdict.why_not:
        return None
    device = weights[0].device
    # dies after the launches are queued: then the allocator gives its memory only to what comes later in the stream
    gradients = _like_weights(weights, gradients, verdict.copied)
    with common.on_device_of(weights[0]):
        table, chunks = _tables(*_place_of(weights), *_rows(weights, momenta, targets or (), excluded))
        addresses = _addresses(gradients, device)
        if squares is None:
            squares = _sum_squares(table, chunks, addresses)
        decided = _settle(
            table,
            addresses,
            squares.contiguous(),
            norm,
            lr=lr,
            weight_decay=weight_decay,
            trust=trust,
            loss_scale=loss_scale,
            clip=clip,
        )
        _move(table, chunks, addresses, *decided, momentum, weight_decay, ema)
    changed = (*weights, *momenta, *(t for t in targets or () if t is not None))
    torch.autograd.graph.increment_version(changed)  # as in-place operators do
    return decided[0]


@torch.no_grad()
def lars_squares(weights: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> Tensor | None:
    """`bossnas_kernels.lars_squares` for at least one tensor. None where `judge` says why not."""
    verdict = judge(weights, gradients)
    if verdict.why_not:
        return None
    gradients = _like_weights(weights, gradients, verdict.copied)
    with common.on_device_of(weights[0]):
        table, chunks = _tables(*_place_of(weights), *_rows(weights, (), (), ()))
        return _sum_squares(table, chunks, _addresses(gradients, weights[0].device))


def _place_of(weights: Sequence[Tensor]) -> tuple[torch.device, int, int]:
    """Device, stream, and the elements of a chunk there."""
    device = weights[0].device
    stream = torch.cuda.current_stream().cuda_stream if device.type == "cuda" else 0
    return device, stream, common.config(TABLE, device)["chunk"]


def _rows(
    weights: Sequence[Tensor],
    momenta: Sequence[Tensor],
    targets: Sequence[Tensor | None],
    excluded: Sequence[bool],
) -> tuple[tuple[int, ...], ...]:
    """What `_tables` puts into its columns."""
    return (
        tuple(map(Tensor.data_ptr, weights)),
        tuple(map(Tensor.data_ptr, momenta)),
        tuple([0 if t is None else t.data_ptr() for t in targets]),
        tuple(map(Tensor.numel, weights)),
        tuple(map(bool, excluded)),
    )


def _addresses(gradients: Sequence[Tensor | None], device: torch.device) -> Tensor:
    """int64 [tensors] on the device, 0 for none."""
    return common.send(torch.tensor([0 if g is None else g.data_ptr() for g in gradients], dtype=torch.int64), device)


def _like_weights(
    weights: Sequence[Tensor], gradients: Sequence[Tensor | None], copied: list[int]
) -> list[Tensor | None]:
    gradients = list(gradients)
    for i in copied:
        gradients[i] = torch.empty_like(weights[i]).copy_(gradients[i])
    return gradients


# What is cached depends on the arguments alone, so it never goes stale; a stream of its own has a table of its own, as
# it would not wait for the copy in another.
@functools.lru_cache(maxsize=8)
def _tables(
    device: torch.device,
    stream: int,
    chunk: int,
    weights: tuple[int, ...],
    momenta: tuple[int, ...],
    targets: tuple[int, ...],
    elements: tuple[int, ...],
    excluded: tuple[bool, ...],
) -> tuple[Tensor, Tensor]:
    """-> table int64 [tensors, _COLUMNS], chunks int32 [chunks, 2]: number of a tensor, number of the chunk in it."""
    table = torch.zeros(len(weights), _COLUMNS, dtype=torch.int64)
    for column, values in enumerate((weights, momenta, targets, elements, excluded)):
        if values:
            table[:, column] = torch.tensor(values)
    counts = (table[:, 3] + chunk - 1) // chunk
    table[:, 6] = counts.cumsum(0)
    table[:, 5] = table[:, 6] - counts
    tensor = torch.arange(len(weights)).repeat_interleave(counts)
    within = torch.arange(len(tensor)) - table[tensor, 5]
    return common.send(table, device), common.send(torch.stack([tensor, within], 1).to(torch.int32), device)


def _shape(device: torch.device) -> dict[str, int]:
    """Constants of the kernels that go through chunks."""
    row = common.config(TABLE, device)
    return {"COLUMNS": _COLUMNS, "CHUNK": row["chunk"], "BLOCK": row["block"], "num_warps": row["num_warps"]}


def _sum_squares(table: Tensor, chunks: Tensor, gradients: Tensor) -> Tensor:
    """table, chunks: of `_tables`. gradients: of `_addresses`. -> float64 [2, tensors], of weights and of gradients."""
    partial = torch.empty(len(chunks), 2, dtype=torch.float64, device=table.device)
    squares = torch.empty(2, len(table), dtype=torch.float64, device=table.device)
    if len(chunks):
        _squares[(len(chunks),)](table, chunks, gradients, partial, **_shape(table.device))
    _totals[(len(table),)](table, gradients, partial, squares, len(table), COLUMNS=_COLUMNS, BLOCK=256, num_warps=1)
    return squares


def _settle(
    table: Tensor,
    gradients: Tensor,
    squares: Tensor,
    norm: Tensor | None,
    *,
    lr: float,
    weight_decay: float,
    trust: float,
    loss_scale: float | Tensor,
    clip: float,
) -> tuple[Tensor, Tensor]:
    """-> applied, 0-dim bool; fp32 [tensors + 1]: scales of the tensors' steps (NaN: none), then the factor of all
    gradients."""
    applied = torch.empty((), dtype=torch.bool, device=table.device)
    scales = torch.empty(len(table) + 1, dtype=torch.float32, device=table.device)
    on_device = isinstance(loss_scale, Tensor)
    _decide[(1,)](
        table,
        gradients,
        squares,
        squares if norm is None else norm,
        loss_scale if on_device else float(loss_scale),
        applied.view(torch.int8),
        scales,
        len(table),
        float(lr),
        float(weight_decay),
        float(trust),
        float(clip),
        HAS_NORM=norm is not None,
        SCALE_ON_DEVICE=on_device,
        COLUMNS=_COLUMNS,
        BLOCK=512,
        num_warps=4,
    )
    return applied, scales


def _move(
    table: Tensor,
    chunks: Tensor,
    gradients: Tensor,
    applied: Tensor,
    scales: Tensor,
    momentum: float,
    weight_decay: float,
    ema: float,
) -> None:
    """applied, scales: of `_settle`."""
    if len(chunks):
        _update[(len(chunks),)](
            table,
            chunks,
            gradients,
            applied.view(torch.int8),
            scales,
            len(table),
            float(momentum),
            float(weight_decay),
            1.0 - ema,
            **_shape(table.device),
        )


@triton.jit
def _chunk(table, chunks, COLUMNS: tl.constexpr, CHUNK: tl.constexpr):
    """This program's tensor, its row of the table, the chunk's first element, and how many elements are left there."""
    tensor = tl.load(chunks + 2 * tl.program_id(0))
    first = tl.load(chunks + 2 * tl.program_id(0) + 1).to(tl.int64) * CHUNK
    row = table + tensor * COLUMNS
    left = tl.minimum(tl.load(row + 3) - first, CHUNK).to(tl.int32)
    return tensor, row, first, left


@triton.jit
def _at(address, first, offsets, VECTOR: tl.constexpr):
    """Pointers to elements of a tensor. VECTOR: they start at a multiple of 16 bytes, for loads 128 bits wide."""
    pointers = address.to(tl.pointer_type(tl.float32)) + first + offsets
    if VECTOR:
        pointers = tl.multiple_of(pointers, 16)
    return pointers


@triton.jit
def _add_squares(total, address, first, offsets, mask, VECTOR: tl.constexpr):
    value = tl.load(_at(address, first, offsets, VECTOR), mask=mask, other=0).to(tl.float64)
    return total + value * value


@triton.jit
def _squares(
    table,
    chunks,
    gradients,
    partial,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    SINGLES: tl.constexpr = 512,
):
    """Sums of squares of a chunk of a weight and its gradient -> partial [chunks, 2]; nothing without a gradient."""
    tensor, row, first, left = _chunk(table, chunks, COLUMNS, CHUNK)
    gradient = tl.load(gradients + tensor)
    if gradient != 0:
        weight = tl.load(row)
        scaled = tl.load(row + 4) == 0  # excluded: the norm of the weight is not needed
        whole = _vectors(left, weight | gradient)
        w_total = tl.zeros([BLOCK], tl.float64)
        g_total = tl.zeros([BLOCK], tl.float64)
        for start in range(0, whole, BLOCK):
            i = start + tl.arange(0, BLOCK)
            w_total = _add_squares(w_total, weight, first, i, (i < whole) & scaled, True)
            g_total = _add_squares(g_total, gradient, first, i, i < whole, True)
        w_sum = tl.sum(w_total, 0)
        g_sum = tl.sum(g_total, 0)
        w_total = tl.zeros([SINGLES], tl.float64)
        g_total = tl.zeros([SINGLES], tl.float64)
        for start in range(whole, left, SINGLES):
            i = start + tl.arange(0, SINGLES)
            w_total = _add_squares(w_total, weight, first, i, (i < left) & scaled, False)
            g_total = _add_squares(g_total, gradient, first, i, i < left, False)
        to = partial + 2 * tl.program_id(0)
        tl.store(to, w_sum + tl.sum(w_total, 0))
        tl.store(to + 1, g_sum + tl.sum(g_total, 0))


@triton.jit
def _vectors(left, addresses):
    """How many of the elements that are left are read 128 bits at a time: none of tensors off multiples of 16 bytes."""
    return tl.where((addresses & 15) == 0, left // 16 * 16, 0)


@triton.jit
def _totals(table, gradients, partial, squares, tensors, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Sums over the chunks of a tensor -> squares [2, tensors]; zeros without a gradient."""
    tensor = tl.program_id(0)
    row = table + tensor * COLUMNS
    first = tl.load(row + 5)
    last = tl.where(tl.load(gradients + tensor) == 0, first, tl.load(row + 6))
    w_total = tl.zeros([BLOCK], tl.float64)
    g_total = tl.zeros([BLOCK], tl.float64)
    for start in range(first, last, BLOCK):
        i = start + tl.arange(0, BLOCK)
        w_total += tl.load(partial + 2 * i, mask=i < last, other=0)
        g_total += tl.load(partial + 2 * i + 1, mask=i < last, other=0)
    tl.store(squares + tensor, tl.sum(w_total, 0))
    tl.store(squares + tensors + tensor, tl.sum(g_total, 0))


@triton.jit
def _decide(
    table,
    gradients,
    squares,
    norm,
    loss_scale,
    applied,
    scales,
    tensors,
    lr,
    weight_decay,
    trust,
    clip,
    HAS_NORM: tl.constexpr,
    SCALE_ON_DEVICE: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program for all: applied, if the gradient's norm is finite; scales [tensors + 1], as `_settle` returns."""
    if HAS_NORM:
        whole = tl.load(norm)
    else:
        total = tl.zeros([BLOCK], tl.float64)
        for start in range(0, tensors, BLOCK):
            i = start + tl.arange(0, BLOCK)
            total += tl.load(squares + tensors + i, mask=i < tensors, other=0)
        whole = tl.sqrt(tl.sum(total, 0))
    tl.store(applied, tl.where(whole < float("inf"), 1, 0).to(tl.int8))  # NaN is not below
    if SCALE_ON_DEVICE:
        loss_scale = tl.load(loss_scale)
    factor = 1 / tl.cast(loss_scale, tl.float64)
    limited = clip / (whole * factor + 1e-6)
    factor *= tl.where(clip > 0, tl.minimum(limited, 1.0), 1.0)
    tl.store(scales + tensors, factor.to(tl.float32))
    for start in range(0, tensors, BLOCK):
        i = start + tl.arange(0, BLOCK)
        mask = i < tensors
        w_norm = tl.sqrt(tl.load(squares + i, mask=mask, other=0))
        g_norm = tl.sqrt(tl.load(squares + tensors + i, mask=mask, other=0)) * factor
        norms = g_norm + weight_decay * w_norm
        scale = lr * trust * w_norm / tl.where(g_norm == 0, 1, norms)
        scale = tl.where(scale > _LARGEST, _LARGEST, scale)  # infinity times an element of 0 is NaN
        scale = tl.where(tl.load(table + i * COLUMNS + 4, mask=mask, other=0) == 0, scale, lr)
        live = (tl.load(gradients + i, mask=mask, other=0) != 0) & (g_norm != 0)
        tl.store(scales + i, tl.where(live, scale, float("nan")).to(tl.float32), mask=mask)


@triton.jit
def _update_part(
    weight,
    gradient,
    buffer,
    target,
    first,
    offsets,
    mask,
    live,
    factor,
    scale,
    momentum,
    decay,
    share,
    VECTOR: tl.constexpr,
):
    w_at = _at(weight, first, offsets, VECTOR)
    b_at = _at(buffer, first, offsets, VECTOR)
    t_at = _at(target, first, offsets, VECTOR)
    averaged = target != 0
    w = tl.load(w_at, mask=mask & (live | averaged), other=0)
    g = tl.load(_at(gradient, first, offsets, VECTOR), mask=mask & live, other=0)
    b = tl.load(b_at, mask=mask & live, other=0)
    t = tl.load(t_at, mask=mask & averaged, other=0)
    b = momentum * b + (g * factor + decay * w) * scale
    w = tl.where(live, w - b, w)
    tl.store(b_at, b, mask=mask & live)
    tl.store(w_at, w, mask=mask & live)
    # torch.lerp's two forms, exact at both ends
    t = tl.where(share < 0.5, t + share * (w - t), w - (1 - share) * (w - t))
    tl.store(t_at, t, mask=mask & averaged)


@triton.jit
def _update(
    table,
    chunks,
    gradients,
    applied,
    scales,
    tensors,
    momentum,
    weight_decay,
    share,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    SINGLES: tl.constexpr = 512,
):
    """One chunk: momentum and weight if the gradient is live, then the target, ``share`` of the way to the weight."""
    if tl.load(applied) != 0:
        tensor, row, first, left = _chunk(table, chunks, COLUMNS, CHUNK)
        weight, buffer, target = tl.load(row), tl.load(row + 1), tl.load(row + 2)
        gradient = tl.load(gradients + tensor)
        decay = tl.where(tl.load(row + 4) == 0, weight_decay, 0.0)
        scale = tl.load(scales + tensor)
        live = tl.where(scale < float("inf"), 1, 0) != 0  # NaN is not below
        factor = tl.load(scales + tensors)
        whole = _vectors(left, weight | gradient | buffer | target)
        for start in range(0, whole, BLOCK):
            i = start + tl.arange(0, BLOCK)
            _update_part(
                weight,
                gradient,
                buffer,
                target,
                first,
                i,
                i < whole,
                live,
                factor,
                scale,
                momentum,
                decay,
                share,
                True,
            )
        for start in range(whole, left, SINGLES):
            i = start + tl.arange(0, SINGLES)
            _update_part(
                weight,
                gradient,
                buffer,
                target,
                first,
                i,
                i < left,
                live,
                factor,
                scale,
                momentum,
                decay,
                share,
                False,
            )
