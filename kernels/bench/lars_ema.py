"""lars_ema_step against LARS and a moving average in foreach operations, and apex's LARC."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from timing import Case, Inputs, Results, Side, generator

from bossnas_kernels import lars_ema_step, reference

try:
    from apex.parallel.LARC import LARC
except ImportError:
    LARC = None

SETTINGS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-6, "trust": 0.001}
EMA = 0.99


def hytra_shapes(width: int, layers: int) -> list[tuple[int, ...]]:
    """Parameters of a block of the hybrid space, about: six candidates a layer; width: inner channels at 7x7."""
    shapes: list[tuple[int, ...]] = []
    for _ in range(layers):
        for inner, attention in ((width, True), (width, False), (width // 2, True), (width // 2, False),
                                 (width // 4, False), (width // 8, False)):  # fmt: skip
            outer = 4 * inner
            mix = (3 * inner, inner, 1, 1) if attention else (inner, inner, 3, 3)
            shapes += [(inner, outer, 1, 1), (inner, 1, 3, 3), (inner,), (inner,), (inner,), mix, (inner,), (inner,),
                       (outer, inner, 1, 1), (outer,), (outer,)]  # fmt: skip
            if inner < width:
                shapes += [(2 * outer, outer, 3, 3), (2 * outer,), (2 * outer,)]
    return shapes


def mbconv_shapes(width: int, layers: int) -> list[tuple[int, ...]]:
    """Parameters of a block of inverted residuals: many small tensors; width: channels between the layers."""
    shapes: list[tuple[int, ...]] = []
    for _ in range(layers):
        for expand, k in ((6, 3), (6, 5), (3, 3), (3, 5)):
            middle = expand * width
            shapes += [(middle, width, 1, 1), (middle,), (middle,), (middle, 1, k, k), (middle,), (middle,),
                       (width // 4, middle, 1, 1), (width // 4,), (middle, width // 4, 1, 1), (middle,),
                       (width, middle, 1, 1), (width,), (width,)]  # fmt: skip
    return shapes


def nats_shapes(width: int, layers: int) -> list[tuple[int, ...]]:
    """Parameters of a block of slimmable cells: one weight per operation, a batch norm for each of eight widths."""
    norms = [(width * w // 8,) for w in range(1, 9) for _ in range(2)]
    return [shape for _ in range(layers) for _ in range(6) for shape in [(width, width, 3, 3), *norms]]


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """The most telling cases first: all parameters with a gradient, then those of a step on a few paths."""
    full = device.type == "cuda"
    blocks = [("hytra", hytra_shapes(512 if full else 64, 4)), ("mbconv", mbconv_shapes(192 if full else 48, 4))]
    if not quick:
        blocks.append(("nats", nats_shapes(64, 2)))
    for space, shapes in blocks:
        yield _case(space, shapes, 1, device)
    if not quick:
        yield _case("hytra", blocks[0][1], 4, device)


def _case(space: str, shapes: list[tuple[int, ...]], every: int, device: torch.device) -> Case:
    """every: one parameter in so many has a gradient."""
    excluded = [len(shape) == 1 for shape in shapes]
    counts = [torch.Size(shape).numel() for shape in shapes]

    def draw() -> Inputs:
        normal = generator(device, torch.float32)
        inputs = {name: [normal(*shape, nchw=True) for shape in shapes] for name in ("weights", "momenta", "targets")}
        gradients = [normal(*shape, nchw=True) if k % every == 0 else None for k, shape in enumerate(shapes)]
        return {**inputs, "gradients": gradients}

    def work(step: Callable[[Inputs], None]) -> Callable[[Inputs], Results]:
        def run(i: Inputs) -> Results:
            step(i)
            return *i["weights"], *i["momenta"], *i["targets"]

        return run

    def kernel(function: Callable[..., None]) -> Callable[[Inputs], None]:
        return lambda i: function(
            i["weights"], i["gradients"], i["momenta"], excluded, i["targets"], ema=EMA, **SETTINGS)  # fmt: skip

    baselines = {"foreach": Side(work(lambda i: foreach(i, excluded)), graph=False)}
    if LARC is not None and device.type == "cuda":
        baselines["apex LARC"] = Side(work(larc_of(excluded)), graph=False)

    # Every weight is read and every target read and written; with a gradient that is read twice, as the weight is,
    # and weight and momentum are written, the momentum read.
    moved = 4 * sum(n * (9 if k % every == 0 else 3) for k, n in enumerate(counts))
    name = f"lars_ema_step {space} {len(shapes)} tensors {sum(counts) / 1e6:.1f}M fp32 gradients of 1 in {every}"
    # No graph: every step sends the gradients' addresses to the device, from host memory that is another one's later.
    return Case(
        name, torch.float32, draw, Side(work(kernel(lars_ema_step)), graph=False),
        work(kernel(reference.lars_ema_step)), baselines, moved, floor_ratio=1.15 if moved > 50e6 else None,
        speedups={"foreach": 2.0})  # fmt: skip


@torch.no_grad()
def foreach(i: Inputs, excluded: list[bool]) -> None:
    """LARS by foreach operations with one copy of the norms to the host, then `torch._foreach_lerp_`."""
    lr, wd, trust = SETTINGS["lr"], SETTINGS["weight_decay"], SETTINGS["trust"]
    index = [k for k, gradient in enumerate(i["gradients"]) if gradient is not None]
    weights, gradients, momenta = ([i[name][k] for k in index] for name in ("weights", "gradients", "momenta"))
    norms = torch.stack(torch._foreach_norm(weights) + torch._foreach_norm(gradients)).double().tolist()
    scale = [lr if excluded[k] else lr * trust * w / (g + wd * w)
             for k, w, g in zip(index, norms[: len(index)], norms[len(index) :], strict=True)]  # fmt: skip
    updates = torch._foreach_mul(weights, [0.0 if excluded[k] else wd for k in index])
    torch._foreach_add_(updates, gradients)
    torch._foreach_mul_(updates, scale)
    torch._foreach_mul_(momenta, SETTINGS["momentum"])
    torch._foreach_add_(momenta, updates)
    torch._foreach_sub_(weights, momenta)
    torch._foreach_lerp_(i["targets"], i["weights"], 1 - EMA)


def larc_of(excluded: list[bool]) -> Callable[[Inputs], None]:
    """A step of apex's LARC around SGD, and of plain SGD for the excluded, then `torch._foreach_lerp_`.

    SGD takes the rate into the step, LARS into the momentum: the rate is therefore put into the trust coefficient,
    for the excluded into SGD's dampening. LARC overwrites the gradients, so only its first step is the others'.
    """
    built: dict[int, tuple[Inputs, list]] = {}  # holds the inputs too, so that no other ones get their id

    def optimizers(i: Inputs) -> list:
        result = []
        for plain in (False, True):
            index = [k for k, g in enumerate(i["gradients"]) if g is not None and excluded[k] == plain]
            parameters = [torch.nn.Parameter(i["weights"][k]) for k in index]  # shares the weight's memory
            sgd = torch.optim.SGD(parameters, 1.0, SETTINGS["momentum"], dampening=1 - SETTINGS["lr"] if plain else 0,
                                  weight_decay=0 if plain else SETTINGS["weight_decay"])  # fmt: skip
            for k, parameter in zip(index, parameters, strict=True):
                parameter.grad = i["gradients"][k]
                sgd.state[parameter]["momentum_buffer"] = i["momenta"][k]
            result.append(sgd if plain else LARC(sgd, SETTINGS["lr"] * SETTINGS["trust"], clip=False))
        return result

    @torch.no_grad()
    def step(i: Inputs) -> None:
        if id(i) not in built:
            built[id(i)] = (i, optimizers(i))
        for optimizer in built[id(i)][1]:
            optimizer.step()
        torch._foreach_lerp_(i["targets"], i["weights"], 1 - EMA)

    return step
