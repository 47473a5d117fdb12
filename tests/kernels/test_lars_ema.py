"""lars_ema_step, kernels and reference, against METHOD 3.4 and 3.5 transcribed in float64."""

from __future__ import annotations

import logging

import pytest
import torch
import triton
from compare import TOLERANCE, check
from torch._subclasses.fake_tensor import FakeTensorMode

import bossnas_kernels
from bossnas_kernels import common, lars, lars_tensors, reference

SETTINGS = {"lr": 0.5, "momentum": 0.9, "weight_decay": 1e-2, "trust": 0.2, "ema": 0.99}
KINDS = ("scaled", "excluded", "none", "zero", "none excluded", "zero excluded")
STEPS = {"kernel": lars.lars_ema_step, "reference": reference.lars_ema_step}
FP32 = TOLERANCE[torch.float32]


def takes(*tensors) -> bool:
    return lars_tensors.judge(*tensors).why_not is None


@pytest.fixture(params=[*STEPS, "reference of a GPU"])
def step(request, monkeypatch):
    if request.param not in STEPS:
        monkeypatch.setattr(reference, "_read_at_once", lambda tensors: False)
    return STEPS.get(request.param, reference.lars_ema_step)


def truth(weights, gradients, momenta, excluded, targets=None, *, lr, momentum, weight_decay, trust, ema=1.0):
    """In place, on float64 tensors."""
    for i, (w, g, buffer) in enumerate(zip(weights, gradients, momenta, strict=True)):
        if g is not None and g.ne(0).any():
            if excluded[i]:
                g = lr * g
            else:
                norm, g_norm = w.norm(), g.norm()
                g = (g + weight_decay * w) * (lr * trust * norm / (g_norm + weight_decay * norm))
            buffer.mul_(momentum).add_(g)
            w.sub_(buffer)
        if targets is not None and targets[i] is not None:
            targets[i].mul_(ema).add_((1 - ema) * w)


class Network:
    """Weights, momenta, targets on a device, and the same in float64."""

    def __init__(self, shapes, kinds, device, targets=True, layout=torch.contiguous_format):
        self.gen = torch.Generator().manual_seed(len(shapes))
        self.kinds, self.device = kinds, device
        self.excluded = ["excluded" in kind for kind in kinds]

        def draw(shape):
            value = self.draw(shape).to(device)
            return value.contiguous(memory_format=layout) if value.dim() == 4 else value

        self.weights, self.momenta, self.targets = ([draw(s) for s in shapes] for _ in range(3))
        self.targets = self.targets if targets else None
        self.exact = [None if ts is None else exact(ts) for ts in (self.weights, self.momenta, self.targets)]

    def draw(self, shape):
        return torch.randn(shape, generator=self.gen)

    def gradients(self, scale=1.0):
        return [
            None
            if "none" in kind
            else torch.zeros_like(w)
            if "zero" in kind
            else torch.empty_like(w).copy_(self.draw(w.shape) * scale)
            for kind, w in zip(self.kinds, self.weights, strict=True)
        ]

    def step(self, function, gradients, **changes):
        settings = SETTINGS | changes
        function(self.weights, gradients, self.momenta, self.excluded, self.targets, **settings)
        weights, momenta, targets = self.exact
        truth(weights, exact(gradients), momenta, self.excluded, targets, **settings)

    def check(self, tolerance=FP32):
        for name, got, want in zip(
            ("weight", "momentum", "target"), (self.weights, self.momenta, self.targets), self.exact, strict=True
        ):
            for i, kind in enumerate(self.kinds):
                if got is None or got[i] is None:
                    continue
                check(f"{name} {i}, {kind}, {tuple(got[i].shape)}", got[i], want[i], tolerance)


def exact(tensors):
    return [None if t is None else t.detach().cpu().double() for t in tensors]


def chunk(device):
    return common.config(lars.TABLE, device)["chunk"]


@pytest.mark.parametrize("targets", [True, False], ids=["targets", "no targets"])
def test_five_steps(device, step, targets):
    """Every size with every kind of gradient; from step to step another part of the tensors has one."""
    c = chunk(device)
    sizes = (0, 1, 3, 16, 17, c - 1, c, c + 1, 2 * c + 5)
    shapes = [(size,) for size in sizes for _ in KINDS]
    network = Network(shapes, KINDS * len(sizes), device, targets)
    for turn in range(5):
        network.kinds = (KINDS[turn:] + KINDS[:turn]) * len(sizes)
        network.step(step, network.gradients(10.0**-turn))
        network.check()


@pytest.mark.quick
@pytest.mark.parametrize("ema", [1.0, 0.99, 0.4, 0.0])
def test_moving_average(device, step, ema):
    network = Network([(37,)] * len(KINDS), KINDS, device)
    before = [t.clone() for t in network.targets]
    network.step(step, network.gradients(), ema=ema)
    network.check()
    if ema in (0.0, 1.0):
        wanted = before if ema else network.weights
        assert all(torch.equal(t, w) for t, w in zip(network.targets, wanted, strict=True))


@pytest.mark.quick
def test_some_weights_have_no_target(device, step):
    network = Network([(37,)] * len(KINDS), KINDS, device)
    network.targets[::2] = network.exact[2][::2] = [None] * 3
    assert takes(network.weights, network.gradients(), network.momenta, network.excluded, network.targets)
    network.step(step, network.gradients())
    network.check()


@pytest.mark.parametrize(
    "changes", [{"lr": 0.0}, {"momentum": 0.0}, {"weight_decay": 0.0}, {"lr": 1, "momentum": 1}], ids=str
)
def test_settings(device, step, changes):
    network = Network([(37,)] * len(KINDS), KINDS, device)
    for _ in range(2):
        network.step(step, network.gradients(), **changes)
    network.check()


def test_without_a_gradient_weight_and_momentum_stay(device, step):
    network = Network([(40,)] * len(KINDS), KINDS, device)
    before = [t.clone() for t in (*network.weights, *network.momenta)]
    network.step(step, network.gradients())
    for i, (was, now) in enumerate(zip(before, (*network.weights, *network.momenta), strict=True)):
        live = KINDS[i % len(KINDS)] in ("scaled", "excluded")
        assert torch.equal(was, now) != live


def test_a_zero_weight_moves_by_its_momentum(device, step):
    network = Network([(21,), (21,)], ("scaled", "excluded"), device)
    for tensors in (network.weights, network.exact[0]):
        for t in tensors:
            t.zero_()
    network.step(step, network.gradients())
    network.check()
    assert network.weights[0].ne(0).all()


# the squares of 1e-30 and 1e30 do not fit into fp32, in which the reference takes norms
@pytest.mark.parametrize(
    "name, scale",
    [*((name, scale) for name in STEPS for scale in (1e-20, 1e-12, 1e15)), ("kernel", 1e-30), ("kernel", 1e30)],
    ids=str,
)
@pytest.mark.parametrize("weight_decay", [0.0, 1e-6])
def test_the_size_of_gradients_does_not_matter(device, name, scale, weight_decay):
    network = Network([(5,), (3000,)], ("scaled", "scaled"), device)
    network.step(STEPS[name], network.gradients(scale), lr=50.0, weight_decay=weight_decay)
    assert network.momenta[1].abs().max() > 10, "the step is as large as ever"
    network.check()


@pytest.mark.parametrize("weight_decay", [0.0, 1e-6])
def test_the_smallest_numbers(device, weight_decay):
    """Nearly as small as fp32 gets, where the scale of the step has no number: still finite, and still a step."""
    network = Network([(50,)], ("scaled",), device)
    gradient = torch.zeros(50, device=device)
    gradient[3] = 2.0**-149
    before = network.weights[0].clone()
    network.step(lars.lars_ema_step, [gradient], weight_decay=weight_decay)
    assert network.weights[0].isfinite().all() and network.weights[0].ne(before).all()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("value", [float("nan"), float("-inf")], ids=str)
def test_a_gradient_that_is_not_finite_changes_nothing(device, step, value):
    network = Network([(50,)] * 3, ("scaled", "excluded", "none"), device)
    gradients = network.gradients()
    gradients[1][7] = value
    applied = step(network.weights, gradients, network.momenta, network.excluded, network.targets, **SETTINGS)
    assert applied.shape == () and applied.dtype == torch.bool and applied.device.type == device.type
    assert not applied
    network.check(0.0)


@pytest.mark.parametrize("clip", [0.0, 1e-2, 1e6])
@pytest.mark.parametrize("on_device", [False, True], ids=["number", "tensor"])
def test_loss_scale_and_clip(device, step, clip, on_device):
    """As a step with gradients that were divided and clipped before; they are not written to."""
    network = Network([(37,), (1030,)] * 3, KINDS, device)
    gradients = network.gradients()
    scaled = [None if g is None else 1024 * g for g in gradients]
    before = [None if g is None else g.clone() for g in scaled]
    scale = torch.tensor(1024.0, device=device) if on_device else 1024.0
    norm = sum(g.double().square().sum().item() for g in gradients if g is not None) ** 0.5
    factor = min(1.0, clip / (norm + 1e-6)) if clip else 1.0
    network.step(lambda w, _, *rest, **s: step(w, scaled, *rest, **s, loss_scale=scale, clip=clip),
                 [None if g is None else factor * g for g in gradients])  # fmt: skip
    network.check()
    assert all(a is None or torch.equal(a, b) for a, b in zip(scaled, before, strict=True))


def pieces(tensors, parts):
    """Flat pieces of tensors, which begin and end anywhere: [parts][tensors]."""
    return [list(row) for row in zip(*(t.flatten().tensor_split(parts) for t in tensors), strict=True)]


def test_pieces_of_tensors_by_the_squares_of_all(device, step, caplog):
    """Two ranks' pieces, most of them off multiples of 16 bytes, move as the whole tensors do."""
    network = Network([(c,) for c in (1, 21, 1500, 2 * chunk(device) + 9)], ("scaled",) * 3 + ("excluded",), device)
    whole = Network([(c,) for c in (1, 21, 1500, 2 * chunk(device) + 9)], network.kinds, device)
    gradients = network.gradients()
    parts = [pieces(t, 2) for t in (network.weights, gradients, network.momenta, network.targets)]
    squares_of = {lars.lars_ema_step: lars.lars_squares, reference.lars_ema_step: reference.lars_squares}[step]
    common._told.clear()
    with caplog.at_level(logging.INFO, "bossnas_kernels"):
        given = [(w, g, m, network.excluded, t) for w, g, m, t in zip(*parts, strict=True)]
        assert all(takes(*arguments) for arguments in given)
        squares = sum(squares_of(w, g) for w, g, *_ in given)
        norm = squares[1].sum().sqrt()
        exact_squares = torch.stack([t.double().square().sum() for t in (*network.weights, *gradients)]).view(2, -1)
        check("squares", squares, exact_squares.cpu(), FP32)
        for arguments in given:
            assert step(*arguments, **SETTINGS, squares=squares)
        bad = [t.clone() for t in network.weights]
        for arguments in given:
            assert not step(*arguments, **SETTINGS, squares=squares, norm=norm * float("nan"))
    assert all(torch.equal(a, b) for a, b in zip(bad, network.weights, strict=True))
    whole.step(step, gradients)
    network.exact = whole.exact
    network.check()
    assert not caplog.messages, "nothing was copied"


def test_squares_without_a_gradient_are_zero(device):
    weights = [torch.full((5,), 2.0, device=device), torch.ones(4, device=device)]
    for module in (lars, reference):
        assert module.lars_squares(weights, [None, None]).eq(0).all()
        assert module.lars_squares(weights, [None, 3 * weights[1]]).tolist() == [[0, 4], [0, 36]]
    assert reference.lars_squares([], []).shape == (2, 0)


def test_nothing_is_read_back(monkeypatch):
    """On tensors without data every copy to the host raises; launches are counted, not made."""
    launched = []
    monkeypatch.setattr(triton.runtime.jit.KernelInterface, "__getitem__", lambda kernel, grid: (
        lambda *a, **k: launched.append(kernel.__name__)))  # fmt: skip
    shapes = [(8, 6, 3, 3), (40,), (12,)]
    lists = [[torch.empty(s, device="meta") for s in shapes] for _ in range(4)]
    lists[1][2] = None
    known = {"loss_scale": torch.ones((), device="meta"), "clip": 1.0}
    for step in (lars.lars_ema_step, reference.lars_ema_step):
        applied = step(*lists[:3], [False, True, True], lists[3], **SETTINGS, **known)
        assert applied.device.type == "meta"
    assert lars.lars_squares(*lists[:2]).shape == (2, 3)
    assert launched == ["_squares", "_totals", "_decide", "_update"] + ["_squares", "_totals"]
    with FakeTensorMode():
        fake = [[torch.empty(s, device="cuda") for s in shapes] for _ in range(4)]
        squares = reference.lars_squares(*fake[:2])
        reference.lars_ema_step(
            *fake[:3], [False, True, True], fake[3], **SETTINGS, squares=squares, norm=squares.sum()
        )


def test_a_verdict_is_of_what_tensors_look_like(device):
    """Not of where they lie: the same memory may hold other tensors."""
    lars_tensors._kept.clear()
    memory = torch.zeros(48, device=device)
    whole = [memory.view(6, 8)]
    for _ in range(2):
        assert takes(whole, [None], whole, [False])
    assert len(lars_tensors._kept) == 1
    memory_of_two = [w.clone() for w in whole]
    assert takes(memory_of_two, [None], memory_of_two, [False])
    assert len(lars_tensors._kept) == 2
    memory_of_two[0].data = memory_of_two[0].double()
    assert not takes(memory_of_two, [None], memory_of_two, [False])
    assert not takes([memory.view(6, 8).T], [None], [memory.view(8, 6)], [False])
    assert not takes([memory.view(torch.int32).view(6, 8)], [None], whole, [False])
    with pytest.raises(ValueError, match=r"momenta\[0\]: expected the shape"):
        takes([memory], [None], whole, [False])


def test_channels_last(device, step, caplog):
    shapes = [(8, 6, 3, 3), (12, 8, 1, 1), (6, 1, 3, 3), (1, 5, 2, 2), (9,), (5, 7)]
    network = Network(shapes, ("scaled",) * len(shapes), device, layout=torch.channels_last)
    common._told.clear()
    with caplog.at_level(logging.INFO, "bossnas_kernels"):
        assert takes(network.weights, network.gradients(), network.momenta, network.excluded, network.targets)
        network.step(step, network.gradients())
        gradients = network.gradients()
        gradients[1] = gradients[1].contiguous().clone()  # of 1x1 kernels the strides differ, not the order
        gradients[2] = gradients[2].reshape(gradients[2].shape)
        network.step(step, gradients)
    network.check()
    assert not caplog.messages, "nothing was copied"


@pytest.mark.parametrize("name", ["contiguous", "expanded", "every second"])
def test_gradients_laid_out_otherwise(device, step, name, caplog):
    network = Network([(8, 6, 3, 3), (40,)], ("scaled", "scaled"), device, layout=torch.channels_last)
    noise = network.draw((2 * 8 * 6 * 9 + 1,)).to(device)
    four, one = {
        "contiguous": (noise[:432].reshape(8, 6, 3, 3), noise[:40]),
        "expanded": (noise[:9].reshape(1, 1, 3, 3).expand(8, 6, 3, 3), noise[:1].expand(40)),
        "every second": (noise[:864:2].reshape(8, 6, 3, 3), noise[:80:2]),
    }[name]
    common._told.clear()
    with caplog.at_level(logging.INFO, "bossnas_kernels"):
        for _ in range(2):
            assert takes(network.weights, [four, one], network.momenta, network.excluded, network.targets)
            network.step(step, [four, one])
    network.check()
    assert len(caplog.messages) == 1, "the copy is said once"


@pytest.mark.parametrize(
    "refused, reason",
    [
        ("dtype", "tensors that are not all float32"),
        ("gradient dtype", "tensors that are not all float32"),
        ("transposed", "weights that are neither contiguous nor channels_last"),
        ("momentum", "momenta or targets laid out unlike the weights"),
        ("target", "momenta or targets laid out unlike the weights"),
    ],
)
def test_the_rest_goes_to_the_reference(device, refused, reason, caplog):
    network = Network([(6, 8), (7,)], ("scaled", "excluded"), device)
    gradients, tolerance = network.gradients(), FP32
    if refused == "dtype":
        network.weights, network.momenta, network.targets, gradients = (
            [t.double() for t in ts] for ts in (network.weights, network.momenta, network.targets, gradients)
        )
        tolerance = TOLERANCE[torch.float64]
    elif refused == "gradient dtype":
        gradients[0] = gradients[0].half()
    elif refused == "transposed":
        network.weights[0] = network.weights[0].T.contiguous().T
    elif refused == "momentum":
        network.momenta[0] = network.momenta[0].T.contiguous().T
    elif refused == "target":
        network.targets[0] = network.targets[0].T.contiguous().T
    common._told.clear()
    bossnas_kernels.use("triton")
    try:
        with caplog.at_level(logging.INFO, "bossnas_kernels"):
            network.step(bossnas_kernels.lars_ema_step, gradients)
    finally:
        bossnas_kernels.use("auto")
    network.check(tolerance)
    if refused != "dtype":  # float64 weights are refused before
        assert caplog.messages == [f"lars_ema_step: {reason} are updated by the reference"]


def test_tables_are_kept_while_the_tensors_are(device):
    network = Network([(40,)] * len(KINDS), KINDS, device)
    lars._tables.cache_clear()
    kept = []
    for _ in range(3):
        gradients = network.gradients()
        kept.append(gradients)  # so that the next ones are somewhere else
        network.step(lars.lars_ema_step, gradients)
    assert lars._tables.cache_info()[:2] == (2, 1)  # hits, misses
    old, network.weights = network.weights, [w.clone() for w in network.weights]
    before = [w.clone() for w in old]
    network.step(lars.lars_ema_step, network.gradients())
    assert lars._tables.cache_info()[:2] == (2, 2)
    network.check()
    assert all(torch.equal(a, b) for a, b in zip(old, before, strict=True)), "the replaced ones are left alone"
    network.excluded = [not e for e in network.excluded]
    network.step(lars.lars_ema_step, network.gradients())
    network.check()


def test_autograd_sees_the_change(device, step):
    weight = torch.nn.Parameter(torch.ones(20, device=device))
    loss = weight.square().sum()
    momentum = torch.zeros(20, device=device)
    step([weight], [torch.ones(20, device=device)], [momentum], [False], **SETTINGS)
    assert weight.requires_grad and weight.is_leaf and weight.ne(1).all()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_more_chunks_than_one_tile_of_partial_sums(device, monkeypatch):
    monkeypatch.setitem(lars.TABLE, common.architecture(device), {"chunk": 16, "block": 16, "num_warps": 1})
    network = Network([(16 * 300 + 3,), (5,)], ("scaled", "scaled"), device)
    network.step(lars.lars_ema_step, network.gradients())
    network.check()


@pytest.mark.parametrize("row", sorted({tuple(sorted(r.items())) for r in lars.TABLE.values()}), ids=str)
def test_every_config(device, row, monkeypatch):
    monkeypatch.setitem(lars.TABLE, common.architecture(device), dict(row))
    c = dict(row)["chunk"]
    network = Network([(c + 30,), (3,), (2 * c + 1,)], ("scaled", "excluded", "none"), device)
    network.step(lars.lars_ema_step, network.gradients())
    network.check()


def test_repeats_to_the_bit(device):
    def once():
        network = Network([(3 * chunk(device) + 5,), (100,)], ("scaled", "excluded"), device)
        network.step(lars.lars_ema_step, network.gradients())
        return *network.weights, *network.momenta, *network.targets

    first = once()
    for _ in range(50 if device.type == "cuda" else 3):
        assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))


def test_nothing_to_do(device, step):
    assert reference.lars_ema_step([], [], [], [], **SETTINGS)
    empty = torch.zeros(0, device=device)
    step([empty], [empty], [empty], [False], [empty], **SETTINGS)
    weight = torch.ones(3, device=device)
    step([weight], [None], [torch.zeros_like(weight)], [False], **SETTINGS)
    assert weight.eq(1).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_nothing_waits_for_the_gpu(device):
    network = Network([(1000, 33), (64,)] * len(KINDS), KINDS * 2, device)
    steps = [network.gradients() for _ in range(3)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for gradients in steps:
            lars.lars_ema_step(
                network.weights, gradients, network.momenta, network.excluded, network.targets, **SETTINGS
            )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(w.isfinite().all() for w in network.weights)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs 27 GiB of GPU memory")
def test_more_than_two_to_the_31_elements(device):
    count = 2**31 + 100
    weight, momentum = torch.ones(count, device=device), torch.zeros(count, device=device)
    gradient = torch.zeros(count, device=device)
    gradient[-1] = 3.0
    lars.lars_ema_step([weight], [gradient], [momentum], [False], lr=1e-3, momentum=0.9, weight_decay=0.0, trust=1.0)
    assert weight[:-1].eq(1).all()
    check("last weight", weight[-1:], torch.tensor([1 - 1e-3 * count**0.5], dtype=torch.float64), FP32)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"gradients": [None]}, "gradients: expected 2 entries, one for each weight, got 1"),
        ({"momenta": []}, "momenta: expected 2 entries, one for each weight, got 0"),
        ({"excluded": [True] * 3}, "excluded: expected 2 entries"),
        ({"targets": [torch.ones(3)]}, "targets: expected 2 entries"),
        (
            {"gradients": [None, torch.ones(3)]},
            r"gradients\[1\]: expected the shape of weights\[1\], \(2, 2\), got \(3,\)",
        ),
        (
            {"momenta": [torch.ones(3, 1), torch.ones(2, 2)]},
            r"momenta\[0\]: expected the shape of weights\[0\], \(3,\)",
        ),
        ({"targets": [torch.ones(3), torch.ones(4)]}, r"targets\[1\]: expected the shape"),
        ({"gradients": [torch.ones(3, device="meta"), None]}, r"gradients\[0\]: expected a tensor on cpu, .* got meta"),
        ({"momenta": [torch.ones(3), torch.ones(2, 2, device="meta")]}, r"momenta\[1\]: expected a tensor on cpu"),
        ({"weights": [torch.ones(3), torch.ones(2, 2, device="meta")]}, r"weights\[1\]: expected a tensor on cpu"),
        ({"targets": [torch.ones(3), torch.ones(2, 2, device="meta")]}, r"targets\[1\]: expected a tensor on cpu"),
        (
            {"squares": torch.ones(2, 1)},
            r"squares: expected torch.float64 of shape \[2, 2\], got torch.float32 of \[2, 1\]",
        ),
        ({"norm": torch.ones((), dtype=torch.float64, device="meta")}, "norm: expected a tensor on cpu"),
        ({"loss_scale": torch.ones(1)}, r"loss_scale: expected torch.float32 of shape \[\]"),
    ],
)
@pytest.mark.parametrize("choice", ["triton", "reference"])
def test_errors(changes, message, choice):
    tensors = [torch.ones(3), torch.ones(2, 2)]
    given = {
        "weights": tensors,
        "gradients": [None, None],
        "momenta": tensors,
        "excluded": [False, False],
        "targets": tensors,
    } | changes
    bossnas_kernels.use(choice)
    try:
        with pytest.raises(ValueError, match=message):
            bossnas_kernels.lars_ema_step(**given, **SETTINGS)
    finally:
        bossnas_kernels.use("auto")
