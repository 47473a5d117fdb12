"""The Triton kernels of gbn_act against the float64 reference: values, gradients, layouts, compilation, repeats."""

from __future__ import annotations

import logging

import pytest
import torch
from compare import TOLERANCE, check, strided_gradients

from bossnas_kernels import common, grouped_norm, reference

KINDS = (torch.float32, torch.bfloat16, torch.float16)


def draw(*size, seed=0, dtype=torch.float32, device="cpu"):
    gen = torch.Generator().manual_seed(seed + sum(size))
    return torch.randn(*size, generator=gen).to(device, dtype)


def tensors(shape, groups, device, *, dtype=torch.float32, residual=False, per_group=False, affine=torch.float32):
    """Leaves x, weight, bias, residual; ``shape`` counts the rows of one group first."""
    full, c = (groups * shape[0], *shape[1:]), (groups, shape[1]) if per_group else (shape[1],)
    x, res = draw(*full, dtype=dtype, device=device), draw(*full, seed=1, dtype=dtype, device=device)
    if x.dim() == 4:
        x, res = (t.contiguous(memory_format=torch.channels_last) for t in (x, res))
    leaves = [x, 1 + draw(*c, seed=2, dtype=affine, device=device), draw(*c, seed=3, dtype=affine, device=device)]
    return [t.requires_grad_() for t in (*leaves, *([res] if residual else []))]


def both(leaves, groups, grad_y=None, tolerance=None, **options):
    """Runs the kernel and the truth; compares values and gradients. Returns y."""
    x, weight, bias, residual = (*leaves, None)[:4]
    exact = [t.detach().double().cpu().requires_grad_() for t in leaves]
    X, W, B, R = (*exact, None)[:4]
    precise = {k: v.double().cpu() if torch.is_tensor(v) else v for k, v in options.items()}
    got = grouped_norm.gbn_act(x, weight, bias, groups=groups, residual=residual, **options)
    want = reference.gbn_act(X, W, B, groups=groups, residual=R, **precise)
    if grad_y is None:
        grad_y = draw(*x.shape, seed=4, dtype=x.dtype, device=x.device)
        if options.get("act") == "relu":  # nearer to 0 than y's rounding, the sign before ReLU is a toss-up
            before = reference.gbn_act(X, W, B, groups=groups, residual=R, **(precise | {"act": "none"}))[0]
            grad_y = grad_y * (before.abs() > TOLERANCE[x.dtype]).to(x.device)
    grads = torch.autograd.grad(got[0], leaves, grad_y)
    wanted = torch.autograd.grad(want[0], exact, grad_y.double().cpu())
    names = ("y", "mean", "var", "dx", "dweight", "dbias", "dresidual")
    for name, a, b in zip(names, (*got, *grads), (*want, *wanted), strict=False):
        check(name, a, b.detach(), tolerance or TOLERANCE[torch.float32 if name in ("mean", "var") else x.dtype])
    assert [g.dtype for g in grads] == [t.dtype for t in leaves]
    assert got[1].dtype == got[2].dtype == torch.float32 and not (got[1].requires_grad or got[2].requires_grad)
    if x.dim() == 4:
        assert got[0].is_contiguous(memory_format=torch.channels_last)
        assert grads[0].is_contiguous(memory_format=torch.channels_last)
    return got[0]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("act", ["none", "relu", "silu"])
@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_values_and_gradients(device, dtype, act, residual, training):
    leaves = tensors((2, 24, 5, 3), 3, device, dtype=dtype, residual=residual)
    running = (
        {}
        if training
        else {"running_mean": draw(24, device=device), "running_var": draw(3, 24, device=device).square() + 0.1}
    )
    both(leaves, 3, act=act, training=training, **running)


@pytest.mark.parametrize(
    "shape",
    [
        (2, 1, 2, 2),
        (1, 17, 7, 7),
        (9, 130, 1, 1),
        (1, 16, 1, 50),
        (1, 16, 50, 1),
        (2, 7),
        (33, 200),
        (3, 8, 1, 1),
        (1, 4, 70, 30),
    ],
    ids=str,
)
@pytest.mark.parametrize("groups", [1, 5])
def test_shapes(device, shape, groups):
    both(tensors(shape, groups, device, residual=True), groups, act="silu")


@pytest.mark.parametrize("affine", KINDS, ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_affine_of_every_group(device, affine, training):
    leaves = tensors((2, 24, 5, 3), 3, device, dtype=torch.bfloat16, per_group=True, affine=affine)
    running = {} if training else {"running_mean": draw(3, 24, device=device), "running_var": torch.ones(24).to(device)}
    both(leaves, 3, act="relu", training=training, tolerance=TOLERANCE[torch.bfloat16], **running)


@pytest.mark.quick
@pytest.mark.parametrize(
    "name", ["expanded", "row expanded", "every second", "transposed", "channels last", "slice of a concatenation"]
)
@pytest.mark.parametrize("act", ["none", "relu"])
def test_gradients_of_any_strides(device, name, act):
    leaves = tensors((2, 6, 5, 3), 2, device, residual=True)
    both(leaves, 2, act=act, grad_y=dict(strided_gradients(leaves[0]))[name])


@pytest.mark.parametrize("view", ["nchw", "channel slice", "every second column", "expanded", "rows"])
def test_inputs_of_any_strides(device, view, caplog):
    wide = draw(6, 8, 5, 6, device=device)
    x = {
        "nchw": wide[:, :4].contiguous(),
        "channel slice": wide[:, 2:6],
        "every second column": wide[:, :4, :, ::2],
        "expanded": wide[:, :4, :1].expand(6, 4, 5, 6),
        "rows": draw(8, 18, device=device).T,
    }[view]
    _, weight, bias = tensors((2, x.shape[1], 5, 3), 3, device)
    common._told.clear()
    with caplog.at_level(logging.INFO, "bossnas_kernels"):
        both([x.detach().requires_grad_(), weight, bias], 3, act="relu")
        both([x.detach().requires_grad_(), weight, bias], 3, act="relu")
    said = [r for r in caplog.messages if r.startswith("x of gbn_act is not channels_last")]
    assert len(said) == (x.dim() == 4)


@pytest.mark.quick
def test_large_mean_keeps_the_variance(device):
    x, weight, bias = tensors((8, 16, 6, 6), 2, device)
    # At mean 1000 an fp32 input itself is rounded at 3e-5, and so is the mean.
    both([(x.detach() + 1000).requires_grad_(), weight, bias], 2, tolerance=2e-4)


def test_many_chunks_are_combined(device, monkeypatch):
    monkeypatch.setitem(
        grouped_norm.TABLE,
        common.architecture(device),
        {"elements": 64, "channels": 16, "programs": 80, "parts": 16, "part_elements": 256, "num_warps": 4},
    )
    leaves = tensors((1, 16, 9, 32), 2, device)
    assert grouped_norm._Plan(leaves[0].shape, 2, leaves[0].device).chunks > 32  # more than one tile of partial sums
    both([(leaves[0].detach() + 100).requires_grad_(), *leaves[1:]], 2, act="silu", tolerance=5e-5)


@pytest.mark.parametrize("row", sorted({tuple(sorted(r.items())) for r in grouped_norm.TABLE.values()}), ids=str)
def test_every_config(device, row, monkeypatch):
    monkeypatch.setitem(grouped_norm.TABLE, common.architecture(device), dict(row))
    both(tensors((3, 24, 4, 5), 2, device, dtype=torch.bfloat16, residual=True), 2, act="relu")


def test_repeats_to_the_bit(device):
    leaves = tensors((8, 48, 7, 7), 4, device, dtype=torch.bfloat16, residual=True)
    grad_y = draw(*leaves[0].shape, seed=9, dtype=torch.bfloat16, device=device)

    def once():
        outputs = grouped_norm.gbn_act(*leaves[:3], groups=4, residual=leaves[3], act="silu")
        return (*outputs, *torch.autograd.grad(outputs[0], leaves, grad_y))

    first = once()
    for _ in range(50 if device.type == "cuda" else 3):
        assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))


@pytest.mark.parametrize("act", ["none", "relu", "silu"])
def test_nan_shows(device, act):
    x, weight, bias = tensors((4, 3, 2, 2), 2, device)
    x = x.detach()
    x[0, 1] = float("nan")
    y, mean, var = grouped_norm.gbn_act(x, weight, bias, groups=2, act=act)
    assert y[:4, 1].isnan().all() and mean[0, 1].isnan() and var[0, 1].isnan()
    assert y.isnan().sum() == y[:4, 1].numel(), "the other channels and the other group know nothing of it"


@pytest.mark.parametrize("frozen", [0, 1, 2, 3])
def test_inputs_without_gradient(device, frozen):
    leaves = tensors((3, 4, 2, 2), 2, device, residual=True)

    def gradients():
        y, _, _ = grouped_norm.gbn_act(*leaves[:3], groups=2, residual=leaves[3], act="relu")
        y.square().sum().backward()
        found = [t.grad for t in leaves]
        for t in leaves:
            t.grad = None
        return found

    complete = gradients()
    leaves[frozen].requires_grad_(False)
    for i, (got, want) in enumerate(zip(gradients(), complete, strict=True)):
        assert got is None if i == frozen else torch.equal(got, want)


def arguments(device, act="relu", residual=True, training=True):
    x, weight, bias, res = tensors((2, 5, 3, 2), 2, device, residual=True)
    running = (None, None) if training else (draw(2, 5, device=device), draw(2, 5, device=device).square())
    return x, weight, bias, res if residual else None, *running, None, 2, act, 1e-5


@pytest.mark.parametrize(
    "act, residual, training",
    [("relu", True, True), ("silu", False, True), ("none", True, False), ("silu", True, False)],
)
def test_opcheck(device, act, residual, training):
    inputs = arguments(device, act, residual, training)
    torch.library.opcheck(torch.ops.bossnas.gbn_act_v2.default, inputs)
    y, statistics = torch.ops.bossnas.gbn_act_v2(*inputs)
    x, weight, bias, res = (None if t is None else t.detach() for t in inputs[:4])
    extra = None if res is None or act == "none" else y.detach() if act == "relu" else res
    torch.library.opcheck(
        torch.ops.bossnas.gbn_act_v2_backward.default,
        (torch.ones_like(x), x, extra, statistics, *inputs[4:6], weight, bias, 2, act, 1e-5),
    )


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("act, residual", [("relu", True), ("none", True), ("silu", False)])
def test_compiled(device, backend, act, residual):
    leaves = tensors((2, 8, 3, 2), 2, device, residual=residual)

    def function(x, weight, bias, res=None):
        y, mean, _ = grouped_norm.gbn_act(2 * x, weight, bias, groups=2, residual=res, act=act)
        return y + 1, mean

    torch._dynamo.reset()
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    (y, mean), (want, want_mean) = compiled(*leaves), function(*leaves)
    assert y.stride() == want.stride() and y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close((y, mean), (want, want_mean), rtol=0, atol=1e-6)
    grad_y = draw(*y.shape, seed=5, device=device)
    for got, wanted in zip(
        torch.autograd.grad(y, leaves, grad_y), torch.autograd.grad(want, leaves, grad_y), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs 26 GiB of GPU memory")
def test_more_than_two_to_the_31_elements(device):
    x = torch.randn(700, 64, 224, 224, device=device, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    assert x.numel() > 2**31
    y, mean, var = grouped_norm.gbn_act(x, torch.ones(64, device=device), torch.zeros(64, device=device), groups=7)
    for g in (0, 6):
        part = x[100 * g : 100 * (g + 1)].float()
        check("mean", mean[g], part.mean((0, 2, 3)).double(), 1e-4)
        check("y", y[100 * g], torch.nn.functional.batch_norm(part, None, None, training=True)[0].double(), 2e-2)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"x": torch.ones(4, 3, dtype=torch.float64)},
            "x: the kernel takes float32, bfloat16 or float16, got .*float64",
        ),
        ({"weight": torch.ones(3, device="meta")}, "weight: expected a tensor on .*, got meta"),
        (
            {"partial_stats": torch.ones(3, 1, 5, 3)},
            r"partial_stats: expected \[3, 2, parts, 3\] .* got \(3, 1, 5, 3\)",
        ),
        ({"groups": 3}, "groups: expected a positive divisor of the 4 rows of x, got 3"),
        ({"x": torch.ones(4, 3, 0, 2)}, r"x: expected at least one channel and one position, got shape \(4, 3, 0, 2\)"),
    ],
)
def test_errors(changes, message):
    given = {"x": torch.ones(4, 3), "weight": torch.ones(3), "bias": torch.ones(3), "groups": 2} | changes
    with pytest.raises(ValueError, match=message):
        grouped_norm.gbn_act(given.pop("x"), given.pop("weight"), given.pop("bias"), **given)
