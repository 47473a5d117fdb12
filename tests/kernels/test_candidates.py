"""Candidates of the search spaces on the kernels: as on the reference, in eager mode and under torch.compile."""

from __future__ import annotations

import copy

import pytest
import torch
from compare import TOLERANCE

import bossnas_kernels
from bossnas import spaces
from bossnas.spaces.ops import Chain, Statistics
from bossnas_kernels import depthwise, grouped_norm


def space(name):
    return spaces.make(name, width=0.25, image_size=32, restricted=True, split="cifar10")


# A layer of a space, the candidate, and the shape of its input; two groups of two images.
CASES = {
    "hytra attention": ("hytra", 3, 1, 0, (4, 512, 4, 4)),
    "hytra convolution, down": ("hytra", 1, 1, 1, (4, 256, 4, 4)),
    "mbconv 5x5": ("mbconv", 1, 1, 3, (4, 8, 4, 4)),
    "nats": ("nats", 1, 0, 2, (4, 16, 4, 4)),
}


@pytest.fixture(autouse=True)
def auto():
    yield
    bossnas_kernels.use("auto")


def setup(case, device):
    name, block, layer, choice, shape = CASES[case]
    torch.manual_seed(0)
    module = space(name).layer(block, layer).to(device)
    for parameter in module.parameters():  # the last gamma of HyTra starts at 0, which would hide what is before it
        torch.nn.init.normal_(parameter, 0.3 if parameter.dim() == 1 else 0.0, 0.1)
    x = torch.randn(shape, device=device).to(memory_format=torch.channels_last).requires_grad_()
    return module, choice, x


def run(function, module, x):
    y = function(x)
    leaves = [x, *(p for p in module.parameters() if p.requires_grad)]
    return y, torch.autograd.grad(y.square().sum(), leaves, allow_unused=True)


def close(got, want):
    """Within twice the tolerance of fp32, since both sides round, of the largest value or gradient.

    Of the module's largest, since the bias of a convolution before a batch norm has a gradient of zero: what stands
    there is the rounding of sums that cancel.
    """
    (y, grads), (true_y, true_grads) = got, want
    assert [g is None for g in grads] == [g is None for g in true_grads]
    pairs = [(g, t) for g, t in zip(grads, true_grads, strict=True) if t is not None]
    scale = max(t.abs().max().item() for _, t in pairs)
    torch.testing.assert_close(y, true_y, rtol=0, atol=2 * TOLERANCE[torch.float32] * true_y.abs().max().item())
    for gradient, truth in pairs:
        torch.testing.assert_close(gradient, truth, rtol=0, atol=2 * TOLERANCE[torch.float32] * scale)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("statistics", ["batch", "recorded"])
def test_kernels_give_what_the_reference_gives(device, case, statistics):
    module, choice, x = setup(case, device)
    results = {}
    for kernels in ("reference", "triton"):
        bossnas_kernels.use(kernels)
        stats = None
        if statistics == "recorded":
            stats = Statistics()
            with torch.no_grad():
                module(x, choice, 2, stats)
            stats.recording = False
        results[kernels] = run(lambda t, s=stats: module(t, choice, 2, s), module, x)
    close(results["triton"], results["reference"])


@pytest.mark.quick
def test_the_norm_takes_its_statistics_from_the_part_before(device, monkeypatch):
    module, choice, x = setup("mbconv 5x5", device)
    chain = module.candidates[choice]
    assert isinstance(chain, Chain)
    given = []
    real = grouped_norm.gbn_act
    monkeypatch.setattr(grouped_norm, "gbn_act", lambda *a, **k: given.append(k["partial_stats"]) or real(*a, **k))
    bossnas_kernels.use("triton")
    chain(x, 2)
    assert [p is not None for p in given] == [False, True, False], "the second of three norms follows the depthwise"
    given.clear()
    monkeypatch.setattr(depthwise, "dwconv2d_stats", lambda *a, **k: pytest.fail("statistics that nobody reads"))
    chain.eval()(x, 2)
    assert given == [None] * 3


@pytest.mark.parametrize("kernels", ["reference", "triton"])
@pytest.mark.parametrize("case", CASES)
def test_compiled(device, case, kernels):
    module, choice, x = setup(case, device)
    bossnas_kernels.use(kernels)
    torch._dynamo.reset()
    twin = copy.deepcopy(module)
    compiled = torch.compile(lambda t: twin(t, choice, 2), backend="aot_eager", fullgraph=True)
    close(run(compiled, twin, x), run(lambda t: module(t, choice, 2), module, x))
