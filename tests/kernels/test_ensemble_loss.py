"""byol_ensemble_loss, kernels and reference, against -2 cos of the mean normalised target in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compare import TOLERANCE, check

import bossnas_kernels
from bossnas_kernels import common, ensemble_loss, reference

KINDS = (torch.float32, torch.bfloat16, torch.float16)
LOSSES = {"kernel": ensemble_loss.byol_ensemble_loss, "reference": reference.byol_ensemble_loss}
FP32 = TOLERANCE[torch.float32]


@pytest.fixture(params=list(LOSSES))
def loss(request):
    return LOSSES[request.param]


def truth(q, k):
    target = F.normalize(k, dim=2).mean(0)
    return torch.stack([-2 * F.cosine_similarity(path, target, dim=1) for path in q]).mean(1)


def draw(*shape, seed=0, dtype=torch.float32, device="cpu"):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(device, dtype)


def both(loss, q, k, grad=None):
    """Compares the loss and the gradient of q with the truth. q: a leaf that requires a gradient."""
    exact = q.detach().double().cpu().requires_grad_()
    got, want = loss(q, k), truth(exact, k.detach().double().cpu())
    assert got.dtype == torch.promote_types(q.dtype, torch.float32)
    check("loss", got.detach(), want.detach(), TOLERANCE[got.dtype])
    # so large that elements of dq are around 1, where errors are relative to them
    grad = draw(len(q), seed=9, device=q.device) * q[0].numel() if grad is None else grad
    (dq,), (wanted,) = torch.autograd.grad(got, q, grad), torch.autograd.grad(want, exact, grad.double().cpu())
    assert dq.dtype == q.dtype
    check("dq", dq, wanted, TOLERANCE[q.dtype])


@pytest.mark.parametrize("k_dtype", KINDS, ids=str)
@pytest.mark.parametrize("q_dtype", KINDS, ids=str)
def test_values_and_gradients(device, loss, q_dtype, k_dtype):
    q = draw(4, 5, 48, dtype=q_dtype, device=device).requires_grad_()
    both(loss, q, draw(3, 5, 48, seed=1, dtype=k_dtype, device=device))


@pytest.mark.parametrize(
    "paths, targets, images, width",
    [
        (1, 1, 1, 1),
        (8, 8, 3, 7),
        (3, 1, 17, 130),
        (1, 5, 2, 4096),
        (2, 3, 33, 256),
        (2, 2, 9, 1000),
        (7, 2, 1, 3001),
        (1, 2, 300, 16),
        (2, 2, 2, 5000),
    ],
)
def test_shapes(device, loss, paths, targets, images, width):
    q = draw(paths, images, width, device=device).requires_grad_()
    both(loss, q, draw(targets, images, width, seed=1, device=device))


@pytest.mark.parametrize("name", ["expanded", "every second", "reversed"])
def test_gradients_of_any_strides(device, loss, name):
    q, k = draw(4, 3, 20, device=device).requires_grad_(), draw(2, 3, 20, seed=1, device=device)
    noise = draw(8, seed=2, device=device)
    both(loss, q, k, {"expanded": noise[:1].expand(4), "every second": noise[::2], "reversed": noise[:4].flip(0)}[name])
    exact = q.detach().double().cpu().requires_grad_()
    loss(q, k).mean().backward()  # autograd's own expanded gradient
    truth(exact, k.double().cpu()).mean().backward()
    check("dq", q.grad, exact.grad, FP32)


@pytest.mark.quick
@pytest.mark.parametrize(
    "view",
    ["one path for all", "one image for all", "one number for all", "slice", "unaligned", "transposed", "every second"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inputs_of_any_strides(device, loss, view, dtype):
    def look(seed):
        wide = draw(6, 8, 40, seed=seed, dtype=dtype, device=device)
        return {
            "one path for all": wide[:1, :4, :24].expand(3, -1, -1),
            "one image for all": wide[:3, :1].expand(-1, 4, -1),
            "one number for all": wide[:3, :4, :1].expand(-1, -1, 24),
            "slice": wide[2:5, 3:7, 8:32],
            "unaligned": wide[2:5, 3:7, 3:28],
            "transposed": wide.transpose(0, 2)[:3, :4],
            "every second": wide[::2, ::2, ::2],
        }[view]

    both(loss, look(0).detach().requires_grad_(), look(1))


@pytest.mark.quick
def test_a_zero_vector_has_a_finite_loss(device, loss):
    q, k = draw(3, 5, 24, device=device), draw(2, 5, 24, seed=1, device=device)
    q[0, 1] = 0
    k[1, 2] = 0
    k[:, 3] = 0
    k[1, 4] = -k[0, 4]  # targets that cancel out
    q.requires_grad_()
    got = loss(q, k)
    exact = q.detach().double().cpu().requires_grad_()
    want = truth(exact, k.double().cpu())
    check("loss", got.detach(), want.detach(), FP32)
    (dq,), (wanted,) = torch.autograd.grad(got.sum(), q), torch.autograd.grad(want.sum(), exact)
    assert dq.isfinite().all()
    check("dq of the zero vector", dq[0, 1], wanted[0, 1], FP32)
    dq, wanted = dq.clone(), wanted.clone()
    dq[0, 1] = wanted[0, 1] = 0
    check("dq", dq, wanted, FP32)


def test_tiny_norms_count_as_their_bound(device, loss):
    """q of norm 1e-10 is divided by 1e-8 and has the slope of that; k of norm 1e-14 is divided by 1e-12."""
    q = (F.normalize(draw(2, 3, 24, device=device), dim=2) * 1e-10).requires_grad_()
    k = F.normalize(draw(2, 3, 24, seed=1, device=device), dim=2)
    k[1] *= 1e-14
    target = torch.stack([k[0].double(), k[1].double() / 1e-12]).mean(0)
    direction = F.normalize(target, dim=1).cpu()
    cosine = (q.detach().double().cpu() * direction / 1e-8).sum(2)
    got = loss(q, k)
    check("loss * 100", got.detach() * 100, -200 * cosine.mean(1), FP32)
    (dq,) = torch.autograd.grad(got.sum(), q)
    check("dq", dq, (-2 * direction / 1e-8 / 3).expand(2, -1, -1), FP32)


def test_nan_shows(device, loss):
    q, k = draw(3, 4, 24, device=device), draw(2, 4, 24, seed=1, device=device)
    spoilt = q.clone()
    spoilt[1, 2, 5] = float("nan")
    assert loss(spoilt, k).isnan().tolist() == [False, True, False]
    k[1, 3, 0] = float("nan")
    assert loss(q, k).isnan().all()


def test_targets_get_no_gradient(device, loss):
    q, k = draw(3, 4, 24, device=device), draw(2, 4, 24, seed=1, device=device).requires_grad_()
    assert not loss(q, k).requires_grad
    before = q.clone(), k.detach().clone()
    loss(q.requires_grad_(), k).sum().backward()
    assert k.grad is None and q.grad is not None
    assert torch.equal(q, before[0]) and torch.equal(k, before[1]), "inputs are left alone"


def test_float64_goes_to_the_reference(device):
    q, k = (draw(2, 3, 5, seed=s, dtype=torch.float64, device=device).requires_grad_() for s in (0, 1))
    bossnas_kernels.use("triton")
    try:
        both(bossnas_kernels.byol_ensemble_loss, q, k)
    finally:
        bossnas_kernels.use("auto")


def test_gradcheck():
    q, k = draw(3, 4, 6, dtype=torch.float64).requires_grad_(), draw(2, 4, 6, seed=1, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda q: reference.byol_ensemble_loss(q, k), (q,))


@pytest.mark.parametrize("row", sorted({tuple(sorted(r.items())) for r in ensemble_loss.TABLE.values()}), ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 30), (1, 1, 4096)], ids=str)
def test_every_config(device, row, shape, monkeypatch):
    monkeypatch.setitem(ensemble_loss.TABLE, common.architecture(device), dict(row))
    q = draw(*shape, dtype=torch.bfloat16, device=device).requires_grad_()
    both(ensemble_loss.byol_ensemble_loss, q, draw(*shape, seed=1, dtype=torch.bfloat16, device=device))


def test_repeats_to_the_bit(device):
    q = draw(4, 33, 200, dtype=torch.bfloat16, device=device).requires_grad_()
    k = draw(4, 33, 200, seed=1, dtype=torch.bfloat16, device=device)

    def once():
        got = ensemble_loss.byol_ensemble_loss(q, k)
        return got, *torch.autograd.grad(got.sum(), q)

    first = once()
    for _ in range(50 if device.type == "cuda" else 3):
        assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))


@pytest.mark.parametrize("k_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(device, k_dtype):
    q, k = draw(2, 3, 8, device=device).requires_grad_(), draw(2, 3, 8, seed=1, dtype=k_dtype, device=device)
    torch.library.opcheck(torch.ops.bossnas.byol_ensemble_loss.default, (q, k))
    torch.library.opcheck(
        torch.ops.bossnas.byol_ensemble_loss_backward.default,
        (torch.ones(2, device=device), q.detach(), draw(3, 8, device=device)),
    )


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(device, loss, backend):
    q, k = draw(2, 3, 8, device=device).requires_grad_(), draw(2, 3, 8, seed=1, device=device)

    def function(q, k):
        return loss(2 * q + 1, 3 * k) + 1

    torch._dynamo.reset()
    got, want = torch.compile(function, backend=backend, fullgraph=True)(q, k), function(q, k)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    grad = draw(2, seed=5, device=device)
    torch.testing.assert_close(torch.autograd.grad(got, q, grad), torch.autograd.grad(want, q, grad), rtol=0, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs 14 GiB of GPU memory")
def test_more_than_two_to_the_31_elements(device):
    q = torch.randn(8, 70_000, 4096, device=device, dtype=torch.bfloat16).requires_grad_()
    k = q.detach()[2:3]
    assert q.numel() > 2**31
    got = ensemble_loss.byol_ensemble_loss(q, k)
    want = truth(q.detach()[6:, :50].double(), k[:, :50].double())
    check("loss of equal vectors", got[2:3].detach(), torch.tensor([-2.0]).double(), FP32)
    (dq,) = torch.autograd.grad(got.sum(), q)
    part = q.detach()[6:, -50:].double().requires_grad_()
    truth(part, k[:, -50:].double()).sum().mul(50 / 70_000).backward()
    assert want.isfinite().all()
    check("dq", dq[6:, -50:] * 1e5, part.grad * 1e5, TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize(
    "q, k, message",
    [
        (torch.ones(3, 4), torch.ones(2, 3, 4), r"q: expected \[P, N, D\], got shape \(3, 4\)"),
        (torch.ones(2, 3, 4), torch.ones(3, 4), r"k: expected \[T, N, D\], got shape \(3, 4\)"),
        (
            torch.ones(2, 3, 4),
            torch.ones(2, 3, 5),
            r"k: expected \[T, 3, 4\], images and dimensions of q, got \(2, 3, 5\)",
        ),
        (torch.ones(2, 3, 4), torch.ones(1, 2, 4), r"k: expected \[T, 3, 4\]"),
        (torch.ones(2, 0, 4), torch.ones(2, 0, 4), "q: expected at least one path, image and dimension"),
        (torch.ones(2, 3, 4), torch.ones(0, 3, 4), "k: expected at least one path"),
        (
            torch.ones(2, 3, 4),
            torch.ones(2, 3, 4, dtype=torch.long),
            "k: expected a floating-point tensor, got torch.int",
        ),
        (torch.ones(2, 3, 4), torch.ones(2, 3, 4, device="meta"), "k: expected a tensor on cpu"),
    ],
)
def test_errors(loss, q, k, message):
    with pytest.raises(ValueError, match=message):
        loss(q, k)


def test_the_kernel_names_the_dtypes_it_takes():
    with pytest.raises(ValueError, match="k: the kernel takes float32, bfloat16 or float16, got torch.float64"):
        ensemble_loss.byol_ensemble_loss(torch.ones(2, 3, 4), torch.ones(2, 3, 4, dtype=torch.float64))
