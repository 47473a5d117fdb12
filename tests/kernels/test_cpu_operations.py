"""What is written for a CPU alone: it gives what torch's own operations give, in value and in gradient."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from bossnas_kernels import gated, products, reference


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()


def agree(given, wanted, leaves, tolerance):
    gradient = torch.randn(given.shape, generator=torch.Generator().manual_seed(1), dtype=given.dtype)
    pairs = zip(
        (given, *torch.autograd.grad(given, leaves, gradient)),
        (wanted, *torch.autograd.grad(wanted, leaves, gradient)),
        strict=True,
    )
    for a, b in pairs:
        assert (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("rows, inputs, outputs", [(3, 64, 32), (128, 512, 300), (33, 1700, 329)])
def test_linear(rows, inputs, outputs, bias):
    x, weight, shift = draw(rows, inputs), draw(outputs, inputs), draw(outputs) if bias else None
    leaves = [t for t in (x, weight, shift) if t is not None]
    agree(products.linear(x, weight, shift), F.linear(x, weight, shift), leaves, 1e-5)


@pytest.mark.skipif(not products.HAS_ONEDNN, reason="this torch was built without oneDNN")
def test_which_library_multiplies_depends_on_shapes_alone():
    x, weight = draw(128, 512), draw(300, 512)
    with_gradient = products.linear(x, weight)
    assert "Linear" in with_gradient.grad_fn.name()
    with torch.no_grad():
        assert torch.equal(products.linear(x, weight), with_gradient)


@pytest.mark.parametrize("outputs", [5, 80], ids=["gates in the weights", "gated map"])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["NHWC", "NCHW"])
def test_gated_pointwise(outputs, layout):
    x = draw(6, 12, 7, 5, dtype=torch.float64).detach().contiguous(memory_format=layout).requires_grad_()
    parts = [
        draw(*shape, dtype=torch.float64) for shape in ((3, 12, 1, 1), (3,), (12, 3, 1, 1), (12,), (outputs, 12, 1, 1))
    ]
    *inner, weight = parts

    def gate(mean):
        return F.conv2d(F.silu(F.conv2d(mean, *inner[:2])), *inner[2:]).sigmoid()

    wanted = F.conv2d(x * gate(x.mean((2, 3), keepdim=True)), weight)
    given = gated.gated_pointwise(x, weight, gate, inner)
    agree(given, wanted, [x, *parts], 1e-12)
    assert ("Gated" in given.grad_fn.name()) == (outputs == 5)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("height, width", [(7, 8), (6, 7), (3, 2), (2, 1), (1, 3)])
def test_depthwise_kernels_of_5(height, width, stride, bias):
    x, weight = draw(3, 4, height, width, dtype=torch.float64), draw(4, 1, 5, 5, dtype=torch.float64)
    leaves = [x, weight, *([draw(4, dtype=torch.float64)] if bias else [])]
    wanted = F.conv2d(*leaves, stride=stride, padding=2, groups=4)
    agree(reference.dwconv2d(*leaves, stride=stride), wanted, leaves, 1e-12)
