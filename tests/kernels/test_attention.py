"""attention against softmax attention written out in float64."""

from __future__ import annotations

import pytest
import torch

from bossnas_kernels import attention

# fp32: a few roundings over at most 49 terms. bf16: the products and probabilities are rounded at 2^-8.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 4e-2}
# N, heads, d, H, W
SHAPES = [(1, 1, 4, 1, 1), (2, 1, 8, 3, 2), (3, 2, 16, 5, 3), (2, 3, 5, 1, 7), (1, 2, 64, 7, 7)]


def truth(qkv, heads):
    """Token by token in the order of the definition, row-major tokens."""
    batch, channels, height, width = qkv.shape
    width_of_head = channels // (3 * heads)
    q, k, v = qkv.flatten(2).split(heads * width_of_head, dim=1)
    outputs = []
    for h in range(heads):
        rows = slice(h * width_of_head, (h + 1) * width_of_head)
        score = torch.einsum("ndi,ndj->nij", q[:, rows], k[:, rows]) / width_of_head**0.5
        weight = score.exp() / score.exp().sum(2, keepdim=True)
        outputs.append(torch.einsum("nij,ndj->ndi", weight, v[:, rows]))
    return torch.cat(outputs, 1).unflatten(2, (height, width))


def make(shape, layout="nchw", dtype=torch.float64):
    batch, heads, width_of_head, height, width = shape
    gen = torch.Generator().manual_seed(1)
    channels = 3 * heads * width_of_head
    qkv = torch.randn(batch, channels, height, width, generator=gen, dtype=torch.float64).to(dtype)
    if layout == "nhwc":
        qkv = qkv.contiguous(memory_format=torch.channels_last)
    return qkv.requires_grad_()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_values_and_gradients(shape, layout, dtype):
    qkv, heads = make(shape, layout, dtype), shape[1]
    exact = qkv.detach().double().requires_grad_()
    out, wanted = attention(qkv, heads), truth(exact, heads)
    assert out.shape == wanted.shape and out.dtype == dtype
    if layout == "nhwc":
        assert out.is_contiguous(memory_format=torch.channels_last)
    else:
        assert out.is_contiguous()
    halves = torch.linspace(-1, 1, 2 * out.numel(), dtype=torch.float64).reshape(
        out.shape[0], 2 * out.shape[1], *out.shape[2:]
    )
    for grad in (
        halves[:, : out.shape[1]],
        halves[:, ::2],
        torch.full((1, 1, 1, 1), 0.7, dtype=torch.float64).expand(out.shape),
        halves[:, ::2].transpose(2, 3).contiguous().transpose(2, 3),
    ):
        grad = grad.to(dtype)
        (got,) = torch.autograd.grad(out, qkv, grad, retain_graph=True)
        (want,) = torch.autograd.grad(wanted, exact, grad.double(), retain_graph=True)
        scale = max(1.0, want.abs().max().item())
        torch.testing.assert_close(got.double(), want, rtol=0, atol=TOLERANCE[dtype] * scale)
    torch.testing.assert_close(out.double(), wanted, rtol=0, atol=TOLERANCE[dtype] * 4)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_gradcheck(layout):
    qkv = make((2, 2, 3, 2, 3), layout)
    assert torch.autograd.gradcheck(lambda t: attention(t, 2), (qkv,))


def test_non_contiguous_input():
    wide = make((2, 2, 4, 6, 5)).detach()
    for view in (wide[:, :, ::2], wide[:, :, 1:5, 2:], wide.transpose(2, 3), wide[:1].expand(3, -1, -1, -1)):
        torch.testing.assert_close(attention(view, 2), truth(view, 2), rtol=1e-10, atol=1e-10)


def test_the_query_axis_is_the_one_kept():
    """A key that every query prefers puts its value everywhere; a query does not spread its own value."""
    qkv = torch.zeros(1, 3, 1, 4, dtype=torch.float64)
    qkv[0, 0] = 100.0
    qkv[0, 1, 0, 2] = 1.0
    qkv[0, 2, 0] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    torch.testing.assert_close(attention(qkv, 1), torch.full((1, 1, 1, 4), 3.0, dtype=torch.float64))


@pytest.mark.parametrize(
    ("qkv", "heads", "message"),
    [
        (torch.ones(2, 12), 1, r"qkv: expected \[N, 3\*heads\*d, H, W\], got shape \(2, 12\)"),
        (torch.ones(2, 12, 1, 1), 3, r"heads: expected 3\*heads to divide the 12 channels of qkv, got 3"),
        (torch.ones(2, 12, 1, 1), 0, "heads: expected"),
        (torch.ones(2, 0, 1, 1), 1, "heads: expected"),
    ],
)
def test_errors_say_what_was_expected(qkv, heads, message):
    with pytest.raises(ValueError, match=message):
        attention(qkv, heads)
