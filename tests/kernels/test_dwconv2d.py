"""dwconv2d, kernels and reference, against a float64 sum written out tap by tap; its statistics, through gbn_act."""

from __future__ import annotations

import logging

import pytest
import torch
from compare import TOLERANCE, check, strided_gradients

from bossnas_kernels import common, depthwise, grouped_norm, reference

KINDS = (torch.float32, torch.bfloat16, torch.float16)
# kernel size, stride
GEOMETRIES = [(3, 1), (3, 2), (5, 1), (5, 2), (2, 2), (4, 4), (8, 8)]


def draw(*size, seed=0, dtype=torch.float32, device="cpu"):
    gen = torch.Generator().manual_seed(seed + sum(size))
    return torch.randn(*size, generator=gen).to(device, dtype)


def leaves(shape, kernel, device="cpu", *, dtype=torch.float32, weights=torch.float32, bias=True):
    x = draw(*shape, dtype=dtype, device=device)
    if x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    parameters = [draw(shape[1], 1, kernel, kernel, seed=1, dtype=weights, device=device)]
    parameters += [draw(shape[1], seed=2, dtype=weights, device=device)] if bias else []
    return [t.requires_grad_() for t in (x, *parameters)]


def truth(x, weight, bias=None, *, stride):
    """Tap by tap: y[o] = bias + sum over i, j of weight[i, j] * padded[o * stride + (i, j)]."""
    k = weight.shape[-1]
    padding = 0 if k == stride else k // 2
    padded = torch.nn.functional.pad(x, (padding,) * 4)
    height, width = ((size - k) // stride + 1 for size in padded.shape[2:])
    y = 0 if bias is None else bias[:, None, None]
    for i in range(k):
        for j in range(k):
            rows, columns = slice(i, i + stride * height, stride), slice(j, j + stride * width, stride)
            y = y + weight[:, 0, i, j, None, None] * padded[:, :, rows, columns][:, :, :height, :width]
    return y


def compare(function, given, stride, grad_y=None):
    """Values and gradients of ``function`` against the truth. Returns y."""
    exact = [t.detach().double().cpu().requires_grad_() for t in given]
    y, want = function(*given, stride=stride), truth(*exact, stride=stride)
    if grad_y is None:
        grad_y = draw(*y.shape, seed=4, dtype=y.dtype, device=y.device)
    grads = torch.autograd.grad(y, given, grad_y)
    wanted = torch.autograd.grad(want, exact, grad_y.double().cpu())
    for name, a, b in zip(("y", "dx", "dweight", "dbias"), (y, *grads), (want, *wanted), strict=False):
        check(name, a, b.detach(), TOLERANCE[given[0].dtype])
    assert y.dtype == given[0].dtype and [g.dtype for g in grads] == [t.dtype for t in given]
    return y, grads


def kernels(given, stride, grad_y=None):
    y, grads = compare(depthwise.dwconv2d, given, stride, grad_y)
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in (y, grads[0]))
    return y


@pytest.mark.parametrize("kernel, stride", GEOMETRIES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_reference(kernel, stride, layout, bias):
    x, *parameters = leaves((2, 6, 11, 9), kernel, dtype=torch.float64, weights=torch.float64, bias=bias)
    x = x.detach().contiguous(memory_format=layout).requires_grad_()
    y, _ = compare(reference.dwconv2d, (x, *parameters), stride)
    statistics_too = reference.dwconv2d_stats(x, *parameters, stride=stride, groups=2)
    assert torch.equal(statistics_too[0], y) and statistics_too[1] is None


def test_reference_takes_parameters_of_another_dtype():
    compare(reference.dwconv2d, leaves((2, 6, 5, 7), 3, dtype=torch.bfloat16), 1)


@pytest.mark.parametrize("kernel, stride", GEOMETRIES)
@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("weights, bias", [(torch.float32, True), (None, False)], ids=["fp32 weights", "no bias"])
def test_values_and_gradients(device, kernel, stride, dtype, weights, bias):
    kernels(leaves((2, 24, 8, 9), kernel, device, dtype=dtype, weights=weights or dtype, bias=bias), stride)


@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1),
        (3, 17, 1, 9),
        (2, 33, 9, 1),
        (5, 70, 2, 3),
        (1, 130, 2, 2),
        (40, 8, 2, 2),
        (1, 8, 3, 70),
        (1, 8, 16, 3),
    ],
    ids=str,
)
@pytest.mark.parametrize("kernel, stride", [(3, 1), (3, 2), (5, 1), (5, 2)])
def test_shapes(device, shape, kernel, stride):
    kernels(leaves(shape, kernel, device), stride)


@pytest.mark.quick
@pytest.mark.parametrize("shape", [(1, 1, 2, 2), (5, 70, 2, 3), (40, 8, 3, 2), (1, 8, 3, 70)], ids=str)
def test_shapes_of_patches(device, shape):
    kernels(leaves(shape, 2, device), 2)


@pytest.mark.parametrize("kernel", [2, 4, 8])
def test_what_fills_no_patch_gets_no_gradient(device, kernel):
    given = leaves((2, 8, 2 * kernel - 1, kernel + 1), kernel, device)
    (dx,) = torch.autograd.grad(depthwise.dwconv2d(*given, stride=kernel).sum(), given[:1])
    assert not dx[:, :, kernel:].any() and not dx[..., kernel:].any() and dx[:, :, :kernel, :kernel].all()


@pytest.mark.parametrize(
    "name", ["expanded", "row expanded", "every second", "transposed", "channels last", "slice of a concatenation"]
)
@pytest.mark.parametrize("kernel, stride", [(3, 1), (5, 2)])
def test_gradients_of_any_strides(device, name, kernel, stride):
    given = leaves((3, 6, 5, 4), kernel, device)
    y = depthwise.dwconv2d(*given, stride=stride)
    kernels(given, stride, dict(strided_gradients(y))[name])


@pytest.mark.parametrize("view", ["nchw", "channel slice", "every second column", "expanded"])
def test_inputs_of_any_strides(device, view, caplog):
    wide = draw(6, 8, 5, 6, device=device)
    x = {
        "nchw": wide[:, :4].contiguous(),
        "channel slice": wide[:, 2:6],
        "every second column": wide[:, :4, :, ::2],
        "expanded": wide[:, :4, :1].expand(6, 4, 5, 6),
    }[view]
    _, weight, bias = leaves((6, 4, 5, 6), 3, device)
    common._told.clear()
    with caplog.at_level(logging.INFO, "bossnas_kernels"):
        for _ in range(2):
            kernels([x.detach().requires_grad_(), weight, bias], 1)
    assert len([m for m in caplog.messages if m.startswith("x of dwconv2d is not channels_last")]) == 1


@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "x weight", "weight bias"])
@pytest.mark.parametrize("kernel, stride", [(3, 1), (2, 2)])
def test_inputs_without_gradient(device, wanted, kernel, stride):
    given = dict(zip(("x", "weight", "bias"), leaves((3, 4, 4, 6), kernel, device), strict=True))
    complete = torch.autograd.grad(depthwise.dwconv2d(**given, stride=stride).square().sum(), list(given.values()))
    for name, tensor in given.items():
        tensor.requires_grad_(name in wanted.split())
    depthwise.dwconv2d(**given, stride=stride).square().sum().backward()
    for (name, tensor), want in zip(given.items(), complete, strict=True):
        assert torch.equal(tensor.grad, want) if name in wanted.split() else tensor.grad is None


def test_several_strips_and_runs(device, monkeypatch):
    """More than one program, run of rows and strip of a program everywhere, of unequal lengths."""
    monkeypatch.setitem(
        depthwise.TABLE,
        common.architecture(device),
        {
            "elements": 1024,
            "weight_elements": 512,
            "programs": 20,
            "weight_programs": 12,
            "part_elements": 512,
            "num_warps": 4,
        },
    )
    given = leaves((3, 66, 23, 9), 3, device, dtype=torch.bfloat16)
    plan = depthwise._Plan(given[0].shape, 3, 1, 0, given[0].device)
    assert plan.strips.walk[1:] == (3, 8) and plan.sums.parts > 1
    kernels(given, 1)


def parts_of(stats):
    """Mean and biased variance by group of partial statistics, in float64."""
    count, mean, m2 = stats.double()
    total = count.sum(1)
    centre = (count * mean).sum(1) / total
    return total, centre, (m2 + count * (mean - centre[:, None]).square()).sum(1) / total


@pytest.mark.parametrize("kernel, stride", [(3, 1), (5, 2), (4, 4)])
@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("groups", [1, 3])
def test_statistics_are_those_of_the_rounded_result(device, kernel, stride, dtype, groups):
    given = leaves((6, 40, 5, 8), kernel, device, dtype=dtype)
    y, stats = depthwise.dwconv2d_stats(*given, stride=stride, groups=groups)
    assert torch.equal(y, depthwise.dwconv2d(*given, stride=stride))
    assert stats.dtype == torch.float32 and not stats.requires_grad and stats.shape[:2] == (3, groups)
    rows = y.detach().double().unflatten(0, (groups, -1)).transpose(1, 2).flatten(2)  # [groups, C, values]
    total, mean, var = parts_of(stats)
    assert (total == rows.shape[2]).all()
    check("mean", mean, rows.mean(2), 1e-6)
    check("variance", var, rows.var(2, correction=0), 1e-6)


@pytest.mark.quick
def test_statistics_at_a_large_mean_keep_the_variance(device):
    x, weight, _ = leaves((4, 16, 14, 14), 3, device)
    y, stats = depthwise.dwconv2d_stats(x, weight * 0.3, torch.full((16,), 1000.0, device=device), groups=2)
    rows = y.detach().double().unflatten(0, (2, -1)).transpose(1, 2).flatten(2)
    _, mean, var = parts_of(stats)
    check("mean", mean / 1000, rows.mean(2) / 1000, 1e-6)
    check("variance", var, rows.var(2, correction=0), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("groups", [1, 2])
def test_gbn_act_takes_the_statistics(device, dtype, groups):
    given = leaves((4, 24, 9, 8), 3, device, dtype=dtype)
    affine = [(1 + draw(24, seed=6, device=device)).requires_grad_(), draw(24, seed=7, device=device).requires_grad_()]
    grad_y = draw(4, 24, 9, 8, seed=8, dtype=dtype, device=device)

    def both(with_statistics):
        y, stats = depthwise.dwconv2d_stats(*given, groups=groups)
        z, mean, var = grouped_norm.gbn_act(
            y, *affine, groups=groups, act="silu", partial_stats=stats if with_statistics else None
        )
        return z, mean, var, *torch.autograd.grad(z, [*given, *affine], grad_y)

    names = ("z", "mean", "var", "dx", "dweight", "dbias", "daffine", "dshift")
    for name, got, want in zip(names, both(True), both(False), strict=True):
        # a bf16 map may round to either side
        limit = TOLERANCE[dtype] if got.dtype == dtype or name.startswith("d") else TOLERANCE[torch.float32]
        check(name, got.detach(), want.detach().double(), limit)


@pytest.mark.parametrize("row", sorted({tuple(sorted(r.items())) for r in depthwise.TABLE.values()}), ids=str)
@pytest.mark.parametrize("kernel, stride", [(3, 1), (5, 2)])
def test_every_config(device, row, kernel, stride, monkeypatch):
    monkeypatch.setitem(depthwise.TABLE, common.architecture(device), dict(row))
    kernels(leaves((2, 40, 8, 6), kernel, device, dtype=torch.bfloat16), stride)


@pytest.mark.parametrize("kernel, stride", [(5, 1), (3, 2), (4, 4)])
def test_repeats_to_the_bit(device, kernel, stride):
    given = leaves((8, 48, 8, 8) if device.type == "cuda" else (2, 24, 4, 4), kernel, device, dtype=torch.bfloat16)

    def once():
        y, stats = depthwise.dwconv2d_stats(*given, stride=stride, groups=2)
        return y, stats, *torch.autograd.grad(y.float().square().sum(), given)

    first = once()
    for _ in range(50 if device.type == "cuda" else 3):
        assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))


@pytest.mark.parametrize("kernel, stride", [(3, 1), (5, 2), (2, 2)])
def test_nan_shows_where_it_reaches(device, kernel, stride):
    x, weight, bias = leaves((2, 3, 6, 6), kernel, device)
    x = x.detach()
    x[0, 1, 3, 3] = float("nan")
    y = depthwise.dwconv2d(x, weight, bias, stride=stride)
    assert torch.equal(y.isnan().cpu(), truth(*(t.detach().cpu() for t in (x, weight, bias)), stride=stride).isnan())


@pytest.mark.parametrize("kernel, stride, groups, bias", [(3, 1, 2, True), (5, 2, 0, False), (2, 2, 1, True)])
def test_opcheck(device, kernel, stride, groups, bias):
    x, weight, *b = leaves((2, 5, 4, 6), kernel, device, bias=bias)
    given = (x, weight, b[0] if bias else None, stride, groups)
    torch.library.opcheck(torch.ops.bossnas.dwconv2d_v2.default, given)
    y, _, taps = torch.ops.bossnas.dwconv2d_v2(*given)
    for wants in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(
            torch.ops.bossnas.dwconv2d_v2_backward.default,
            (torch.ones_like(y), *(None if t is None else t.detach() for t in (*given[:3], taps)), stride, *wants),
        )


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("kernel, stride, groups", [(3, 1, 2), (5, 2, 0), (4, 4, 0)])
def test_compiled(device, backend, kernel, stride, groups):
    given = leaves((2, 8, 4, 5), kernel, device)

    def function(x, weight, bias):
        if groups:
            y, stats = depthwise.dwconv2d_stats(2 * x, weight, bias, stride=stride, groups=groups)
            return y + 1, stats
        return depthwise.dwconv2d(2 * x, weight, bias, stride=stride) + 1, None

    torch._dynamo.reset()
    (y, stats), (want, want_stats) = torch.compile(function, backend=backend, fullgraph=True)(*given), function(*given)
    assert y.stride() == want.stride() and y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close((y, stats), (want, want_stats), rtol=0, atol=1e-6)
    grad_y = draw(*y.shape, seed=5, device=device)
    for got, wanted in zip(
        torch.autograd.grad(y, given, grad_y), torch.autograd.grad(want, given, grad_y), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs 20 GiB of GPU memory")
@pytest.mark.parametrize("kernel, stride", [(3, 1), (3, 2)])
def test_more_than_two_to_the_31_elements(device, kernel, stride):
    x = torch.empty(700, 64, 224, 224, device=device, dtype=torch.bfloat16, memory_format=torch.channels_last)
    x[-1] = 2 * draw(64, 224, 224, device=device)
    assert x.numel() > 2**31
    _, weight, bias = leaves((1, 64, 1, 1), kernel, device)
    x.requires_grad_()
    y = depthwise.dwconv2d(x, weight, bias, stride=stride)
    last = [x[-1:].detach().double().cpu().requires_grad_(), weight.detach().double().cpu(), bias.double().cpu()]
    want = truth(*last, stride=stride)
    check("y", y[-1:], want.detach(), TOLERANCE[x.dtype])
    grad_y = torch.ones(1, dtype=x.dtype, device=device).expand(y.shape)
    (dx,) = torch.autograd.grad(y, x, grad_y)
    check("dx", dx[-1:], torch.autograd.grad(want.sum(), last[0])[0], TOLERANCE[x.dtype])


ERRORS = [
    ({"x": torch.ones(4, 3, 2)}, r"x: expected \[N, C, H, W\], got shape \(4, 3, 2\)"),
    ({"x": torch.ones(2, 3, 4, 4, dtype=torch.int)}, "x: expected a floating-point tensor, got torch.int32"),
    ({"x": torch.ones(0, 3, 4, 4)}, r"x: expected at least one image, channel and position, got shape \(0, 3, 4, 4\)"),
    ({"weight": torch.ones(4, 1, 3, 3)}, r"weight: expected shape \[3, 1, k, k\] .* got \(4, 1, 3, 3\)"),
    ({"weight": torch.ones(3, 1, 3, 5)}, r"weight: expected shape \[3, 1, k, k\]"),
    ({"weight": torch.tensor(1.0)}, r"weight: expected shape \[3, 1, k, k\]"),
    ({"weight": torch.ones(3, 1, 7, 7)}, "weight, stride: expected k = 3 or 5 .* got k = 7, stride 1"),
    ({"stride": 3}, "weight, stride: .* got k = 3, stride 3"),
    ({"weight": torch.ones(3, 1, 4, 4), "stride": 2}, "weight, stride: .* got k = 4, stride 2"),
    ({"weight": torch.ones(3, 1, 8, 8), "stride": 8}, "x: expected at least one patch of 8x8, got a map of 4x4"),
    ({"bias": torch.ones(4)}, r"bias: expected shape \[3\], got \(4,\)"),
]


@pytest.mark.parametrize("changes, message", ERRORS)
@pytest.mark.parametrize("module", [reference, depthwise], ids=["reference", "kernels"])
def test_errors(module, changes, message):
    given = {"x": torch.ones(2, 3, 4, 4), "weight": torch.ones(3, 1, 3, 3), "bias": None} | changes
    for function in (module.dwconv2d, module.dwconv2d_stats):
        with pytest.raises(ValueError, match=message):
            function(**given)


@pytest.mark.parametrize("module", [reference, depthwise], ids=["reference", "kernels"])
def test_groups_divide_the_batch(module):
    with pytest.raises(ValueError, match="groups: expected a positive divisor of the batch of 4, got 3"):
        module.dwconv2d_stats(torch.ones(4, 3, 4, 4), torch.ones(3, 1, 3, 3), groups=3)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"x": torch.ones(2, 3, 4, 4, dtype=torch.float64)},
            "x: the kernel takes float32, bfloat16 or float16, got .*64",
        ),
        ({"weight": torch.ones(3, 1, 3, 3, device="meta")}, "weight: expected a tensor on cpu.*, got meta"),
        (
            {
                "x": torch.ones(1, 1, 1, 1).expand(1, 2**11, 2**10, 2**10),
                "weight": torch.ones(1, 1, 1, 1).expand(2**11, 1, 3, 3),
            },
            r"x: the kernel takes images of less than 2\^31",
        ),
    ],
)
def test_what_the_kernels_do_not_take(changes, message):
    given = {"x": torch.ones(2, 3, 4, 4), "weight": torch.ones(3, 1, 3, 3)} | changes
    with pytest.raises(ValueError, match=message):
        depthwise.dwconv2d(**given)
