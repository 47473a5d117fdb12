"""K5: LARS and the moving average of the target for all tensors of a network, in three launches.

Squares of every chunk of weights and gradients -> scale of every tensor's step -> update and moving average. The
kernels find the tensors through a table of addresses and a list of chunks; both stay on the GPU from step to step.
Gradients are new memory on every step, so their addresses are sent each time, from pinned memory. Nothing is copied
back, and nothing waits for the GPU.

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

from bossnas_kernels import checks, common

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


def takes(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    momenta: Sequence[Tensor],
    targets: Sequence[Tensor | None] | None,
) -> bool:
    """Whether the kernels can work on these tensors; says once why not. Gradients may have any strides."""
    targets = targets or [None] * len(weights)
    kept = [t for t in (*weights, *momenta, *targets) if t is not None]
    why_not = None
    if any(t.dtype != torch.float32 for t in (*kept, *gradients) if t is not None):
        why_not = "tensors that are not all float32"
    elif any(hasattr(t, "__tensor_flatten__") for t in kept):
        why_not = "sharded or otherwise wrapped tensors"
    elif not all(t.is_contiguous() or t.is_contiguous(memory_format=torch.channels_last) for t in weights):
        why_not = "weights that are neither contiguous nor channels_last"
    elif not all(
        t is None or _same_order(w, t) for others in (momenta, targets) for w, t in zip(weights, others, strict=False)
    ):
        why_not = "momenta or targets laid out unlike the weights"
    elif any(t.data_ptr() % 16 for t in kept):
        why_not = "tensors that do not start at a multiple of 16 bytes"
    if why_not:
        common.tell_once(f"lars_ema_step: {why_not} are updated by the reference")
    return why_not is None


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
) -> None:
    """`bossnas_kernels.lars_ema_step` for tensors that `takes` takes."""
    checks.lars_ema_step(weights, gradients, momenta, excluded, targets)
    if not any(w.numel() for w in weights):
        return
    device = weights[0].device
    chunk = common.config(TABLE, device)["chunk"]
    # dies after the launches are queued: then the allocator gives its memory only to what comes later in the stream
    gradients = [None if g is None else _like_weight(w, g) for w, g in zip(weights, gradients, strict=True)]
    followers = [0 if t is None else t.data_ptr() for t in targets or ()]
    with torch.cuda.device_of(weights[0]):
        stream = torch.cuda.current_stream().cuda_stream if device.type == "cuda" else 0
        table, chunks = _tables(
            device,
            stream,
            chunk,
            tuple(w.data_ptr() for w in weights),
            tuple(m.data_ptr() for m in momenta),
            tuple(followers),
            tuple(w.numel() for w in weights),
            tuple(map(bool, excluded)),
        )
        addresses = _send(torch.tensor([0 if g is None else g.data_ptr() for g in gradients]), device)
        _launch(table, chunks, addresses, lr, momentum, weight_decay, trust, ema)
    changed = (*weights, *momenta, *(t for t in targets or () if t is not None))
    torch.autograd.graph.increment_version(changed)  # as in-place operators do


def _same_order(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape have their elements in the same order: strides of single rows do not matter."""
    return a.stride() == b.stride() or all(
        n == 1 or i == j for n, i, j in zip(a.shape, a.stride(), b.stride(), strict=False)
    )


def _like_weight(weight: Tensor, gradient: Tensor) -> Tensor:
    if _same_order(weight, gradient) and gradient.data_ptr() % 16 == 0:
        return gradient
    common.tell_once(
        "lars_ema_step: gradients laid out unlike their weights, or not at multiples of 16 bytes, are "
        "copied on every step"
    )
    return torch.empty_like(weight).copy_(gradient)


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
    return _send(table, device), _send(torch.stack([tensor, within], 1).to(torch.int32), device)


def _send(values: Tensor, device: torch.device) -> Tensor:
    """Copies to the device without waiting; the allocator keeps the pinned memory until the copy has been made."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values


def _launch(
    table: Tensor,
    chunks: Tensor,
    gradients: Tensor,
    lr: float,
    momentum: float,
    weight_decay: float,
    trust: float,
    ema: float,
) -> None:
    """table, chunks: of `_tables`. gradients: addresses, int64 [tensors], 0 for none."""
    config = common.config(TABLE, table.device)
    shape = {"CHUNK": config["chunk"], "BLOCK": config["block"], "num_warps": config["num_warps"]}
    partial = torch.empty(len(chunks), 2, dtype=torch.float64, device=table.device)
    scales = torch.empty(len(table), dtype=torch.float32, device=table.device)
    live = torch.empty(len(table), dtype=torch.int32, device=table.device)
    _squares[(len(chunks),)](table, chunks, gradients, partial, COLUMNS=_COLUMNS, **shape)
    _scales[(len(table),)](
        table,
        gradients,
        partial,
        scales,
        live,
        float(lr),
        float(weight_decay),
        float(trust),
        COLUMNS=_COLUMNS,
        BLOCK=256,
        num_warps=1,
    )
    _update[(len(chunks),)](
        table,
        chunks,
        gradients,
        scales,
        live,
        float(momentum),
        float(weight_decay),
        1.0 - ema,
        COLUMNS=_COLUMNS,
        **shape,
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
    TAIL: tl.constexpr = 16,
):
    """Sums of squares of a chunk of a weight and its gradient -> partial [chunks, 2]; nothing without a gradient."""
    tensor, row, first, left = _chunk(table, chunks, COLUMNS, CHUNK)
    gradient = tl.load(gradients + tensor)
    if gradient != 0:
        weight = tl.load(row)
        scaled = tl.load(row + 4) == 0  # excluded: the norm of the weight is not needed
        whole = left // TAIL * TAIL  # a bound that vectors do not cross
        w_total = tl.zeros([BLOCK], tl.float64)
        g_total = tl.zeros([BLOCK], tl.float64)
        for start in range(0, whole, BLOCK):
            i = start + tl.arange(0, BLOCK)
            w_total = _add_squares(w_total, weight, first, i, (i < whole) & scaled, True)
            g_total = _add_squares(g_total, gradient, first, i, i < whole, True)
        i = whole + tl.arange(0, TAIL)
        nothing = tl.zeros([TAIL], tl.float64)
        w_tail = _add_squares(nothing, weight, first, i, (i < left) & scaled, False)
        g_tail = _add_squares(nothing, gradient, first, i, i < left, False)
        to = partial + 2 * tl.program_id(0)
        tl.store(to, tl.sum(w_total, 0) + tl.sum(w_tail, 0))
        tl.store(to + 1, tl.sum(g_total, 0) + tl.sum(g_tail, 0))


@triton.jit
def _scales(
    table, gradients, partial, scales, live, lr, weight_decay, trust, COLUMNS: tl.constexpr, BLOCK: tl.constexpr
):
    """Scale of a tensor's step, and whether there is one: live is 0 without a gradient or with a zero one, else 1."""
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
    w_norm = tl.sqrt(tl.sum(w_total, 0))
    g_norm = tl.sqrt(tl.sum(g_total, 0))
    norms = g_norm + weight_decay * w_norm
    scale = lr * trust * w_norm / tl.where(g_norm == 0, 1, norms)
    scale = tl.where(scale > _LARGEST, _LARGEST, scale)  # infinity times an element of 0 is NaN
    scale = tl.where(tl.load(row + 4) == 0, scale, lr)
    tl.store(scales + tensor, scale.to(tl.float32))
    tl.store(live + tensor, tl.where(g_norm == 0, 0, 1))  # NaN is not 0: it shows in the weights


@triton.jit
def _update_part(
    weight, gradient, buffer, target, first, offsets, mask, live, scale, momentum, decay, share, VECTOR: tl.constexpr
):
    w_at = _at(weight, first, offsets, VECTOR)
    b_at = _at(buffer, first, offsets, VECTOR)
    t_at = _at(target, first, offsets, VECTOR)
    averaged = target != 0
    w = tl.load(w_at, mask=mask & (live | averaged), other=0)
    g = tl.load(_at(gradient, first, offsets, VECTOR), mask=mask & live, other=0)
    b = tl.load(b_at, mask=mask & live, other=0)
    t = tl.load(t_at, mask=mask & averaged, other=0)
    b = momentum * b + (g + decay * w) * scale
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
    scales,
    lives,
    momentum,
    weight_decay,
    share,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr = 16,
):
    """One chunk: momentum and weight if the gradient is live, then the target, ``share`` of the way to the weight."""
    tensor, row, first, left = _chunk(table, chunks, COLUMNS, CHUNK)
    weight, buffer, target = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    gradient = tl.load(gradients + tensor)
    decay = tl.where(tl.load(row + 4) == 0, weight_decay, 0.0)
    scale = tl.load(scales + tensor)
    live = tl.load(lives + tensor) != 0
    whole = left // TAIL * TAIL  # a bound that vectors do not cross
    for start in range(0, whole, BLOCK):
        i = start + tl.arange(0, BLOCK)
        _update_part(weight, gradient, buffer, target, first, i, i < whole, live, scale, momentum, decay, share, True)
    i = whole + tl.arange(0, TAIL)
    _update_part(weight, gradient, buffer, target, first, i, i < left, live, scale, momentum, decay, share, False)
