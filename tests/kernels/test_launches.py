"""What every operation launches, forward and backward, counted on tensors without data: it is not to grow unnoticed."""

from __future__ import annotations

import pytest
import torch
from aot_cases import meta
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import KernelInterface

from bossnas_kernels import attention, depthwise, ensemble_loss, grouped_norm

SILENT = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach")  # besides views
NORM_BACKWARD = ["_reduce_gradient", "_add_up", "_apply_gradient"]


class Launches(TorchDispatchMode):
    """Names of PyTorch's operators that launch something; those of kernels are added by `launched`."""

    def __init__(self, names: list[str]):
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if not func.is_view and name not in SILENT:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def launched(monkeypatch):
    names: list[str] = []
    monkeypatch.setattr(
        KernelInterface, "__getitem__", lambda kernel, grid: lambda *a, **k: names.append(kernel.__name__)
    )
    with Launches(names):
        yield names


def count(names, forward, leaves):
    """Names of a forward pass and of the backward pass to leaves."""
    y = forward()
    after = len(names)
    torch.autograd.grad(y, leaves, torch.empty_like(y))
    return names[:after], names[after:]


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("mode", ["training", "given statistics", "evaluation"])
@pytest.mark.parametrize("act", ["none", "relu", "silu"])
def test_gbn_act(launched, act, mode, residual):
    x, res = meta(8, 24, 4, 4), meta(8, 24, 4, 4) if residual else None
    affine = [meta(24, dtype=torch.float32) for _ in range(2)]
    options = {
        "training": {},
        "given statistics": {"partial_stats": torch.empty(3, 2, 5, 24, device="meta")},
        "evaluation": {
            "training": False,
            "running_mean": meta(24, dtype=torch.float32, grad=False),
            "running_var": meta(2, 24, dtype=torch.float32, grad=False),
        },
    }[mode]
    leaves = [x, *affine, *([res] if residual else [])]
    forward, backward = count(
        launched, lambda: grouped_norm.gbn_act(x, *affine, groups=2, residual=res, act=act, **options)[0], leaves
    )
    statistics = {"training": ["_statistics", "_combine"], "given statistics": ["_combine"], "evaluation": []}[mode]
    assert forward == [*statistics, "_apply"]
    assert backward == NORM_BACKWARD


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel, stride", [(3, 1), (5, 2), (4, 4)])
def test_dwconv2d(launched, kernel, stride, dtype, bias):
    x, weight = meta(8, 24, 8, 8), meta(24, 1, kernel, kernel, dtype=dtype)
    shift = [meta(24, dtype=dtype)] if bias else []
    forward, backward = count(
        launched,
        lambda: depthwise.dwconv2d_stats(x, weight, *shift, stride=stride, groups=2)[0],
        [x, weight, *shift],
    )
    assert forward == ["_arrange", "_convolve"]
    assert backward == ["_convolve" if stride == 1 else "_gather_gradient", "_sum_gradient", "_add_up"]


@pytest.mark.parametrize("side", [4, 14])
def test_mhsa2d(launched, side):
    qkv = meta(8, 192, side, side)
    forward, backward = count(launched, lambda: attention.mhsa2d_stats(qkv, 1, groups=2)[0], [qkv])
    assert forward == ["_attend"]
    assert backward == ["_query_gradient"] * (len(backward) - 1) + ["_key_gradient"] and len(backward) <= 2


def test_byol_ensemble_loss(launched):
    q, k = meta(4, 8, 64), meta(3, 8, 64, grad=False)
    forward, backward = count(launched, lambda: ensemble_loss.byol_ensemble_loss(q, k), [q])
    assert forward == ["_cosines", "_losses"]
    assert backward == ["_gradient"]


class Cut(torch.autograd.Function):
    """Hands on a map, and no gradient of it."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return None


def test_without_a_gradient_nothing_is_launched(launched):
    x, weight, qkv = meta(8, 24, 4, 4), meta(24, 1, 3, 3), meta(8, 192, 4, 4)
    q, k, affine = meta(4, 8, 64), meta(3, 8, 64, grad=False), [meta(24, dtype=torch.float32) for _ in range(2)]
    for y, leaf in (
        (grouped_norm.gbn_act(x, *affine, groups=2)[0], x),
        (depthwise.dwconv2d(x, weight), x),
        (attention.mhsa2d(qkv, 1), qkv),
        (ensemble_loss.byol_ensemble_loss(q, k), q),
    ):
        cut = Cut.apply(y)
        launched.clear()
        assert torch.autograd.grad(cut, leaf, torch.empty_like(cut), allow_unused=True) == (None,)
        assert launched == []
