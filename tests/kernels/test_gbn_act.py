"""gbn_act against one F.batch_norm per group in float64: values, statistics, gradients, layouts, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compare import strided_gradients

from bossnas_kernels import gbn_act, reference

# Element-wise error against float64, relative to values of order one. fp32: sums of at most a few thousand
# terms lose a few of 24 bits. bf16 / fp16: statistics are fp32, so what is left is the rounding of one store
# (2^-8, 2^-11), with a residual of two, and in the gradients of another two.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}
FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
MAPS = [(3, 5, 7, 3), (2, 3, 1, 1), (1, 4, 2, 5), (4, 8, 2, 2)]  # the rows of one group first
LAID_OUT = [(shape, layout) for shape in MAPS for layout in FORMATS] + [((5, 7), "nchw"), ((2, 1), "nchw")]


@pytest.fixture(params=["fold", "one_by_one"])
def formulation(request, monkeypatch):
    """Both formulations of training-mode groups, whatever the size of the groups."""
    monkeypatch.setattr(reference, "_FOLD_ELEMENTS", 0 if request.param == "one_by_one" else 1 << 40)
    return request.param


def truth(x, weight, bias, groups, residual, act, running=None, eps=1e-5):
    """One F.batch_norm per group."""
    outputs, means, variances = [], [], []
    for g, rows in enumerate(x.chunk(groups)):
        row = [t if t is None or t.dim() == 1 else t[g] for t in (weight, bias, *(running or (None, None)))]
        outputs.append(F.batch_norm(rows, row[2], row[3], row[0], row[1], running is None, 0.0, eps))
        if running is None:
            per_channel = rows.detach().transpose(0, 1).flatten(1)
            means.append(per_channel.mean(1))
            variances.append(per_channel.var(1, correction=1))
    y = torch.cat(outputs)
    y = y if residual is None else y + residual
    y = {"none": lambda t: t, "relu": F.relu, "silu": F.silu}[act](y)
    return (y, torch.stack(means), torch.stack(variances)) if running is None else (y, *running)


def inputs(shape, groups, *, per_group=False, residual=False, layout="nchw", dtype=torch.float64, seed=0):
    gen = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(*size, generator=gen, dtype=torch.float64).to(dtype)

    rows, channels, *tail = shape
    full = (groups * rows, channels, *tail)
    affine = (groups, channels) if per_group else (channels,)
    x = draw(*full)
    res = draw(*full) if residual else None
    if x.dim() == 4:
        x = x.contiguous(memory_format=FORMATS[layout])
        res = None if res is None else res.contiguous(memory_format=FORMATS[layout])
    tensors = [x, draw(*affine) + 1, draw(*affine), res]
    return [None if t is None else t.requires_grad_() for t in tensors]


def compare(tensors, groups, act, grad_y=None, tolerance=TOLERANCE[torch.float64], **options):
    """gbn_act on tensors = (x, weight, bias, residual) against float64, forward and backward."""
    x, weight, bias, residual = tensors
    exact = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
    y, mean, var = gbn_act(x, weight, bias, groups=groups, residual=residual, act=act, **options)
    wanted = truth(*exact[:3], groups, exact[3], act, **options)
    if grad_y is None:
        grad_y = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).sin().reshape(y.shape).to(y.dtype)
    got = torch.autograd.grad(y, [t for t in tensors if t is not None], grad_y)
    needed = torch.autograd.grad(wanted[0], [t for t in exact if t is not None], grad_y.double())
    for value, want in zip((y, mean, var, *got), (*wanted, *needed), strict=True):
        scale = max(1.0, want.abs().max().item())
        torch.testing.assert_close(value.double(), want, rtol=0, atol=tolerance * scale)
    return y, mean, var


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize(("shape", "layout"), LAID_OUT, ids=str)
@pytest.mark.parametrize("per_group", [False, True], ids=["shared", "per_group"])
def test_float64_values_and_gradients(formulation, groups, shape, layout, per_group):
    for act, residual in (("none", False), ("relu", True), ("silu", True), ("relu", False), ("none", True)):
        tensors = inputs(shape, groups, per_group=per_group, residual=residual, layout=layout)
        y, mean, var = compare(tensors, groups, act)
        assert mean.shape == var.shape == (groups, shape[1])
        assert not (mean.requires_grad or var.requires_grad)
        if len(shape) == 4:
            assert y.is_contiguous(memory_format=FORMATS[layout])


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("act", ["none", "relu", "silu"])
@pytest.mark.parametrize("shape", [(2, 3, 2, 3), (3, 2)], ids=str)
def test_gradcheck(formulation, groups, act, shape):
    x, weight, bias, residual = inputs(shape, groups, residual=True, seed=3)

    def function(x, weight, bias, residual):
        return gbn_act(x, weight, bias, groups=groups, residual=residual, act=act)[0]

    assert torch.autograd.gradcheck(function, (x, weight, bias, residual), eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("act", ["relu", "silu"])
def test_lower_precision(formulation, dtype, layout, act):
    x, _, _, residual = inputs((5, 6, 7, 3), 4, residual=True, layout=layout, dtype=dtype)
    _, weight, bias, _ = inputs((5, 6, 7, 3), 4, dtype=torch.float32)
    # Where the map before ReLU is nearer to 0 than the rounding, its sign and so the gradient is a toss-up.
    before, _, _ = truth(*(t.detach().double() for t in (x, weight, bias)), 4, residual.double(), "none")
    grad_y = torch.linspace(-1, 1, x.numel()).sin().reshape(x.shape) * (before.abs() > TOLERANCE[dtype])
    tensors = (x, weight, bias, residual)
    y, mean, var = compare(tensors, 4, act, grad_y=grad_y.to(dtype), tolerance=TOLERANCE[dtype])
    assert y.dtype == dtype and mean.dtype == var.dtype == torch.float32


@pytest.mark.parametrize("shape", [(6, 8, 15, 14), (3, 8, 2, 2)], ids=["large groups", "small groups"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compiled(shape, training):
    x, weight, bias, residual = inputs(shape, 3, residual=True, layout="nhwc", dtype=torch.float32)
    running = {} if training else {"running_mean": torch.ones(8), "running_var": torch.ones(3, 8)}

    def function(x, weight, bias, residual):
        y, mean, _ = gbn_act(2 * x, weight, bias, groups=3, residual=residual, act="relu", training=training, **running)
        return y + mean.sum()

    torch._dynamo.reset()
    y, want = (f(x, weight, bias, residual) for f in (torch.compile(function, fullgraph=True), function))
    torch.testing.assert_close(y, want, rtol=0, atol=1e-5)
    leaves, grad_y = (x, weight, bias, residual), torch.linspace(-1, 1, y.numel()).view(y.shape)
    for got, wanted in zip(
        torch.autograd.grad(y, leaves, grad_y), torch.autograd.grad(want, leaves, grad_y), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 * max(1, wanted.abs().max().item()))


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_large_groups_by_default(layout):
    shape = (6, 16, 14, 14)
    assert 6 * 16 * 14 * 14 > reference._FOLD_ELEMENTS
    compare(inputs(shape, 3, residual=True, layout=layout), 3, "relu")


def test_large_mean_keeps_the_variance(formulation):
    x, weight, bias, _ = inputs((8, 3, 4, 4), 2, dtype=torch.float32)
    x = (x.detach() + 1000).requires_grad_()
    # At mean 1000 an fp32 input itself is rounded at 3e-5, and the mean again.
    compare((x, weight, bias, None), 2, "relu", tolerance=2e-4)


@pytest.mark.parametrize(
    ("shape", "layout"), [((3, 4, 5, 3), "nchw"), ((3, 4, 5, 3), "nhwc"), ((3, 4), "nchw")], ids=str
)
@pytest.mark.parametrize("act", ["none", "relu"])
def test_gradients_of_any_strides(formulation, layout, shape, act):
    tensors = inputs(shape, 3, residual=True, layout=layout)
    for _, grad_y in strided_gradients(tensors[0]):
        compare(tensors, 3, act, grad_y=grad_y)


@pytest.mark.parametrize("groups", [1, 3])
def test_non_contiguous_inputs(formulation, groups):
    noise = torch.linspace(-3, 3, 2 * 6 * 4 * 5 * 3, dtype=torch.float64).sin()
    _, weight, bias, _ = inputs((6 // groups, 4, 5, 3), groups)
    wide = noise.reshape(6, 8, 5, 3)
    views = {
        "channel slice": wide[:, 2:6],
        "every second column": noise.reshape(6, 4, 5, 6)[..., ::2],
        "swapped": noise[: 6 * 4 * 5 * 3].reshape(4, 6, 3, 5).permute(1, 0, 3, 2),
        "expanded": noise[: 6 * 4 * 3].reshape(6, 4, 1, 3).expand(6, 4, 5, 3),
    }
    for view in views.values():
        compare((view.detach().requires_grad_(), weight, bias, wide[:, 1:5].requires_grad_()), groups, "relu")


@pytest.mark.parametrize("frozen", ["x", "weight", "bias", "residual"])
@pytest.mark.parametrize("act", ["none", "relu"])
def test_inputs_without_gradient(formulation, frozen, act):
    names = ("x", "weight", "bias", "residual")
    tensors = dict(zip(names, inputs((3, 4, 2, 2), 2, residual=True), strict=True))

    def gradients():
        y, _, _ = gbn_act(tensors["x"], tensors["weight"], tensors["bias"], groups=2,
                          residual=tensors["residual"], act=act)  # fmt: skip
        wanted = [t for t in tensors.values() if t.requires_grad]
        return dict(zip([n for n, t in tensors.items() if t.requires_grad],
                        torch.autograd.grad(y.square().sum(), wanted), strict=True))  # fmt: skip

    complete = gradients()
    tensors[frozen].requires_grad_(False)
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, complete[name], rtol=1e-12, atol=1e-12)


def test_inputs_are_left_alone(formulation):
    tensors = inputs((3, 4, 2, 2), 2, residual=True)
    before = [t.detach().clone() for t in tensors]
    with torch.no_grad():
        gbn_act(*tensors[:3], groups=2, residual=tensors[3], act="relu")
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize(("shape", "layout"), [*LAID_OUT, ((1, 3, 1, 1), "nchw")], ids=str)
@pytest.mark.parametrize("per_group", [False, True], ids=["shared", "per_group"])
def test_evaluation(groups, shape, per_group, layout):
    size = (groups, shape[1]) if per_group else (shape[1],)
    gen = torch.Generator().manual_seed(5)
    running_mean = torch.randn(size, generator=gen, dtype=torch.float64)
    running_var = torch.rand(size, generator=gen, dtype=torch.float64) + 0.1
    kept = running_mean.clone(), running_var.clone()
    for act, residual in (("relu", True), ("silu", False), ("none", False)):
        tensors = inputs(shape, groups, per_group=per_group, residual=residual, layout=layout)
        x, weight, bias, res = tensors
        y, mean, var = gbn_act(
            x, weight, bias, groups=groups, residual=res, act=act, training=False,
            running_mean=running_mean, running_var=running_var,
        )  # fmt: skip
        wanted, _, _ = truth(x, weight, bias, groups, res, act, running=(running_mean, running_var))
        torch.testing.assert_close(y, wanted, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(mean, running_mean.expand(groups, -1))
        torch.testing.assert_close(var, running_var.expand(groups, -1))
        given = [t for t in tensors if t is not None]
        grad_y = torch.ones(1, dtype=y.dtype).expand(y.shape)
        for got, want in zip(
            torch.autograd.grad(y, given, grad_y), torch.autograd.grad(wanted, given, grad_y), strict=True
        ):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
        if len(shape) == 4:
            assert y.is_contiguous(memory_format=FORMATS[layout])
    assert torch.equal(running_mean, kept[0]) and torch.equal(running_var, kept[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.ones(4, 3, 2)}, r"x: expected \[groups\*N, C, H, W\].*got shape \(4, 3, 2\)"),
        ({"x": torch.ones(4, 3, dtype=torch.long)}, "x: expected a floating-point tensor"),
        ({"groups": 3}, "groups: expected a positive divisor of the 4 rows of x, got 3"),
        ({"groups": 0}, "groups: expected a positive divisor"),
        ({"x": torch.ones(0, 3)}, "groups: expected a positive divisor of the 0 rows"),
        ({"act": "gelu"}, "act: expected one of none, relu, silu, got 'gelu'"),
        ({"residual": torch.ones(4, 1)}, r"residual: expected the shape of x, \(4, 3\), got \(4, 1\)"),
        ({"weight": torch.ones(2)}, r"weight: expected shape \[3\] or \[2, 3\], got \(2,\)"),
        ({"bias": torch.ones(3, 3)}, r"bias: expected shape \[3\] or \[2, 3\]"),
        ({"training": False}, "running_mean, running_var: expected tensors in evaluation mode"),
        (
            {"training": False, "running_mean": torch.ones(4), "running_var": torch.ones(3)},
            r"running_mean: expected shape \[3\] or \[2, 3\]",
        ),
        ({"groups": 4}, "x: expected more than one value per channel in each of the 4 groups"),
    ],
)
def test_errors_say_what_was_expected(changes, message):
    arguments = {"x": torch.ones(4, 3), "weight": torch.ones(3), "bias": torch.ones(3), "groups": 2} | changes
    with pytest.raises(ValueError, match=message):
        gbn_act(arguments.pop("x"), arguments.pop("weight"), arguments.pop("bias"), **arguments)
