"""byol_ensemble_loss against its plain formula, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from timing import Case, Inputs, Results, Side, compiled, generator
from torch import Tensor

from bossnas_kernels import byol_ensemble_loss, reference

# (space, paths, targets, images, width of the embedding)
FULL = [("hytra", 4, 4, 64, 256), ("nats", 8, 8, 256, 256), ("hytra", 4, 4, 1024, 256), ("mbconv", 4, 4, 256, 256)]
CPU_FULL = [("hytra", 4, 4, 32, 64), ("nats", 8, 8, 64, 256), ("mbconv", 4, 4, 64, 256)]


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Training (forward and backward) and rating (forward). The floors are below a launch: no target asks for them."""
    shapes = CPU_FULL if device.type == "cpu" else FULL
    for shape in shapes[:2] if quick else shapes:
        yield _case(shape, True, device)
        yield _case(shape, False, device)


def _case(shape: tuple, train: bool, device: torch.device) -> Case:
    space, paths, targets, images, width = shape
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16

    def draw() -> Inputs:
        normal = generator(device, dtype)
        return {
            "q": normal(paths, images, width).requires_grad_(train),
            "k": normal(targets, images, width, mean=0.5),
            "dloss": normal(paths, dtype=torch.float32),
        }

    def work(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Inputs], Results]:
        def run(i: Inputs) -> Results:
            if not train:
                with torch.no_grad():
                    return (loss(i["q"], i["k"]),)
            y = loss(i["q"], i["k"])
            return y, *torch.autograd.grad(y, [i["q"]], i["dloss"])

        return run

    baselines = {"formula": Side(work(formula))}
    if device.type == "cuda":
        baselines["compiled formula"] = Side(work(compiled(formula)))
    # Forward reads q and k; backward reads them again and writes the gradient of q.
    moved = ((3 if train else 1) * paths + (2 if train else 1) * targets) * images * width * dtype.itemsize
    name = (
        f"byol_ensemble_loss {space} {paths} paths {targets} targets {images}x{width} "
        f"{str(dtype).removeprefix('torch.')} {'train' if train else 'forward'}"
    )
    return Case(name, dtype, draw, Side(work(byol_ensemble_loss)), work(reference.byol_ensemble_loss), baselines, moved,
                gradients=int(train))  # fmt: skip


def formula(q: Tensor, k: Tensor) -> Tensor:
    """[P, N, D], [T, N, D] -> [P]: normalise, average the targets, cosine, mean over the images; fp32 inside."""

    def at_least_fp32(t: Tensor) -> Tensor:
        return t.to(torch.promote_types(t.dtype, torch.float32))

    target = F.normalize(at_least_fp32(k), dim=2).mean(0)
    return -2 * F.cosine_similarity(at_least_fp32(q), target, dim=2).mean(1)
