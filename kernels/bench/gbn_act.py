"""gbn_act against a loop of F.batch_norm over the groups, a compiled formula, cuDNN and apex."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from timing import Case, Inputs, Results, Side, compiled, generator
from torch import Tensor
from torch.func import functional_call

from bossnas_kernels import gbn_act, reference

try:
    from apex.contrib.groupbn import BatchNorm2d_NHWC
except ImportError:
    BatchNorm2d_NHWC = None

ACT = {"none": lambda x: x, "relu": F.relu, "silu": F.silu}

# (space, rows over all groups, channels, side of the map, activation, with residual); side 0: rows of an MLP.
HYTRA = [
    ("hytra", 256, 256, 14, "relu", False), ("hytra", 256, 512, 28, "relu", True),
    ("hytra", 256, 64, 56, "relu", False), ("hytra", 256, 256, 56, "relu", True),
    ("hytra", 256, 128, 28, "relu", False), ("hytra", 256, 1024, 14, "relu", True),
    ("hytra", 256, 512, 7, "relu", False), ("hytra", 256, 2048, 7, "relu", True),
]  # fmt: skip
MBCONV = [
    ("mbconv", 256, 480, 14, "silu", False), ("mbconv", 256, 96, 112, "silu", False),
    ("mbconv", 256, 144, 56, "silu", False), ("mbconv", 256, 1152, 7, "silu", False),
    ("mbconv", 256, 40, 28, "none", False),
]  # fmt: skip
OTHERS = [
    ("nats", 1024, 64, 32, "none", False), ("nats", 1024, 40, 16, "none", False), ("nats", 1024, 64, 8, "none", False),
    ("projector", 512, 4096, 0, "relu", False),
]  # fmt: skip
# One map without residual, one with, one with SiLU: these are shown for every number of groups and when rating.
TYPICAL = [HYTRA[0], HYTRA[1], MBCONV[0]]

# On a CPU: maps of the same spaces at an eighth of the width and an MLP's rows.
CPU_QUICK = [("hytra", 64, 64, 14, "relu", False), ("hytra", 128, 64, 7, "relu", True)]
CPU_FULL = [
    ("hytra", 64, 16, 28, "relu", False), ("hytra", 64, 64, 14, "relu", False), ("hytra", 64, 256, 14, "relu", True),
    ("hytra", 128, 256, 7, "relu", False), ("mbconv", 64, 120, 14, "silu", False), ("nats", 128, 32, 16, "none", False),
    ("projector", 512, 1024, 0, "relu", False),
]  # fmt: skip


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """The most telling cases first, one after another, so that only one's tensors are alive at a time."""
    if device.type == "cpu":
        for shape in CPU_QUICK if quick else CPU_FULL:
            for nchw in (False, True) if shape[3] else (False,):
                for groups in (1, 8, 64):
                    yield _case(shape, groups, "train", device, nchw)
        for shape in CPU_QUICK if quick else CPU_FULL:
            yield _case(shape, 8, "calibrate", device, False)
            yield _case(shape, 8, "evaluate", device, False)
        return
    for shape in TYPICAL:
        for groups in (8, 64) if quick else (8, 64, 2, 1):
            yield _case(shape, groups, "train", device, False)
    for shape in TYPICAL:
        for regime in ("calibrate", "evaluate"):
            for groups in (8,) if quick else (8, 64):
                yield _case(shape, groups, regime, device, False)
    for shape in [] if quick else [s for s in HYTRA + MBCONV + OTHERS if s not in TYPICAL]:
        yield _case(shape, 8, "train", device, False)


def _case(shape: tuple, groups: int, regime: str, device: torch.device, nchw: bool) -> Case:
    """regime: "train" (forward and backward), "calibrate" (forward by the batch's statistics) or "evaluate"."""
    space, rows, channels, side, act, with_residual = shape
    size = (rows, channels, side, side) if side else (rows, channels)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    train = regime == "train"

    def draw() -> Inputs:
        normal = generator(device, dtype)
        inputs = {
            "x": normal(*size, mean=1, nchw=nchw),
            "weight": normal(channels, mean=1, dtype=torch.float32),
            "bias": normal(channels, dtype=torch.float32),
            "residual": normal(*size, nchw=nchw) if with_residual else None,
            "dy": normal(*size, nchw=nchw) if train else None,
            "mean": normal(groups, channels, mean=1, dtype=torch.float32),
            "var": normal(groups, channels, dtype=torch.float32).abs() + 0.5,
        }
        for name in ("x", "weight", "bias", "residual"):
            if train and inputs[name] is not None:
                inputs[name].requires_grad_()
        return inputs

    def work(norm: Callable[[Inputs], Tensor]) -> Callable[[Inputs], Results]:
        def run(inputs: Inputs) -> Results:
            if not train:
                with torch.no_grad():
                    return (norm(inputs),)
            y = norm(inputs)
            leaves = [inputs[name] for name in ("x", "weight", "bias", "residual") if inputs[name] is not None]
            return y, *torch.autograd.grad(y, leaves, inputs["dy"])

        return run

    def kernel(function: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> Callable[[Inputs], Tensor]:
        return lambda i: function(
            i["x"], i["weight"], i["bias"], groups=groups, residual=i["residual"], act=act,
            training=regime != "evaluate", running_mean=i["mean"], running_var=i["var"])[0]  # fmt: skip

    def loop(i: Inputs) -> Tensor:
        return eager_loop(i, groups, act, training=regime != "evaluate")

    baselines = {"eager loop": Side(work(loop))}
    if device.type == "cuda":
        formula = compiled(formula_of(groups, act, training=regime != "evaluate"))
        baselines["compiled formula"] = Side(work(formula))
        if regime != "evaluate" and side:  # in evaluation PyTorch has its own kernel for all dtypes
            baselines["fp16 cuDNN loop"] = Side(work(loop), torch.float16)
        if BatchNorm2d_NHWC is not None and act == "relu" and train and side:
            module = BatchNorm2d_NHWC(channels, fuse_relu=True).to(device)
            baselines["apex NHWC loop"] = Side(work(lambda i: apex_loop(i, groups, module)), torch.float16)

    # Forward: x twice (statistics, result), y once; with a residual one more. Evaluation reads x once.
    # Backward: x, dy and what the activation needs of y, in two passes, and dx; with a residual dresidual as well.
    passes = (2 if regime == "evaluate" else 3) + with_residual
    passes += (5 + 2 * with_residual) if train else 0
    moved = passes * rows * channels * max(1, side * side) * dtype.itemsize
    layout = "rows" if not side else "nchw" if nchw else "nhwc"
    name = (
        f"gbn_act {space} {'x'.join(map(str, size))} {layout} {'add+' if with_residual else ''}{act} G={groups} "
        f"{str(dtype).removeprefix('torch.')} {regime}"
    )
    to_compiled = 1.05 if with_residual else 1.3 if act == "silu" or groups > 1 else None
    return Case(
        name, dtype, draw, Side(work(kernel(gbn_act))), work(kernel(reference.gbn_act)), baselines, moved,
        gradients=3 + with_residual if train else 0, floor_ratio=1.15 if moved > 50e6 else None,
        speedups={"eager loop": 1.4, **({} if to_compiled is None else {"compiled formula": to_compiled})})  # fmt: skip


def eager_loop(i: Inputs, groups: int, act: str, training: bool) -> Tensor:
    """F.batch_norm, residual and activation group by group, as eager code writes it; one concatenation."""
    residuals = [None] * groups if i["residual"] is None else i["residual"].chunk(groups)
    ys = []
    for x, residual, mean, var in zip(i["x"].chunk(groups), residuals, i["mean"], i["var"], strict=True):
        # Without momentum the running statistics stay as they are, so that every call does the same.
        y = F.batch_norm(x, mean, var, i["weight"], i["bias"], training, 0.0)
        ys.append(ACT[act](y if residual is None else y + residual))
    return ys[0] if groups == 1 else torch.cat(ys)


def formula_of(groups: int, act: str, training: bool) -> Callable[[Inputs], Tensor]:
    """The norm written out over all groups at once, in fp32: what torch.compile can fuse best."""

    def formula(i: Inputs) -> Tensor:
        x = i["x"].unflatten(0, (groups, -1)).float()  # [groups, N, C, ...]
        spread = (-1, 1, x.shape[2], *(1,) * (x.dim() - 3))
        if training:
            axes = [d for d in range(x.dim()) if d not in (0, 2)]
            var, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
        else:
            var, mean = i["var"].view(spread), i["mean"].view(spread)
        y = (x - mean) * torch.rsqrt(var + 1e-5) * i["weight"].view(spread) + i["bias"].view(spread)
        y = y.flatten(0, 1)
        return ACT[act](y if i["residual"] is None else y + i["residual"]).to(i["x"].dtype)

    return formula


def apex_loop(i: Inputs, groups: int, module: torch.nn.Module) -> Tensor:
    """apex's NHWC batch norm + (residual +) ReLU, group by group."""
    affine = {"weight": i["weight"], "bias": i["bias"]}
    maps = [i["x"]] if i["residual"] is None else [i["x"], i["residual"]]
    pieces = zip(*(t.permute(0, 2, 3, 1).chunk(groups) for t in maps), strict=True)
    return torch.cat([functional_call(module, affine, piece) for piece in pieces]).permute(0, 3, 1, 2)
