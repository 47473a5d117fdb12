"""One supernet block: a training step and rating passes, many paths at once or one by one, with each kind of kernels.

    python bench/supernet.py --width 0.125 --image-size 32 --hidden 256 --out 64 --batch 32
    python bench/supernet.py --space hytra --block 0 --batch 32 --dtype bf16 --json hytra.json       # on a GPU

Variants: "triton", "reference" (the kernels' plain PyTorch), "eager" (a loop of F.batch_norm over the items, otherwise
PyTorch's operations), "compile" (batch norm as a formula, every layer under torch.compile). All items of a step are
computed together; "item-" before a name computes them one by one, as the official procedure does.

Parts: "step" is the sampled paths' two views through target and online network, loss, backward, LARS and moving
average; "calibrate" passes one batch of two views through --paths paths with the batch's own statistics and scores
them; "rate" is bossnas.supernet.rate_block.rate_block for the same paths: no "item-" there.

All variants start from the same weights and must first agree on the mean scores of the rating passes and on the loss of
a step; one that does not is not timed, and the exit code is 1. The parts are timed by the wall clock, the variants in
turn; "x" is the median of variant ÷ first variant over neighbours.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

root = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(root), str(root / "kernels")]

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bossnas_kernels
from bossnas import spaces
from bossnas.optim.groups import parameter_groups
from bossnas.optim.lars import LARS
from bossnas.spaces.paths import Choices, decode
from bossnas.supernet import heads, losses
from bossnas.supernet.rate_block import RatingOptions, Validation, rate_block
from bossnas.supernet.supernet import Item, Networks, Supernet
from bossnas_kernels import reference

KERNELS = ("triton", "reference", "eager", "compile")
VARIANTS = KERNELS + tuple(f"item-{kernels}" for kernels in KERNELS)
PARTS = ("step", "calibrate", "rate")
# Largest difference of a mean loss or score, which are cosines between -4 and 4: rounding through some 50 layers.
TOLERANCE = {"fp32": 1e-3, "bf16": 1e-1}
WARM_UP = 2


@dataclass
class Task:
    """What all variants compute. views: per kind and pair the block's inputs [N, C, H, W]; images: those of rating."""

    block: int
    pairs: int
    winners: list[Choices]
    sampled: list[Choices]
    rated: list[Choices]
    views: list[Tensor]
    images: tuple[Tensor, Tensor]
    autocast: Callable[[], Any]


class Variant:
    """Networks of its own, and how they are run."""

    def __init__(self, name: str, online: Supernet, target: Supernet, predictor: nn.Module, task: Task):
        self.kernels, self.grouped, self.task = name.removeprefix("item-"), not name.startswith("item-"), task
        self.online, self.target, self.predictor = (copy.deepcopy(m) for m in (online, target, predictor))
        trained = nn.ModuleDict({**self.online.part(task.block), "predictor": self.predictor}).train()
        self.optimizer = LARS(parameter_groups(trained, self.target.part(task.block).train()), lr=0.1)
        self.optimizer.param_groups[0]["ema"] = 0.99
        if self.kernels == "compile":
            for network in (self.online, self.target):
                for layer in network.blocks[task.block]:
                    layer.compile(dynamic=False)

    def step(self) -> float:
        """One training step; its loss, the mean over the paths."""
        task, paths = self.task, self.task.sampled
        items = [Item(path, task.views[v]) for j, path in enumerate(paths)
                 for v in (j % task.pairs, j % task.pairs + task.pairs)]  # fmt: skip
        with torch.no_grad(), task.autocast():
            targets = self._embed(self.target, items)
        with task.autocast():
            predicted = self._predict(self._embed(self.online, items))
            loss = (losses.ensemble_loss(predicted[0::2], targets[1::2])
                    + losses.ensemble_loss(predicted[1::2], targets[0::2])).sum()  # fmt: skip
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item() / len(paths)

    @torch.no_grad()
    def calibrate(self) -> float:
        """Both networks with the batch's own statistics, the population centre, and the mean score."""
        task = self.task
        x = torch.cat([task.views[0], task.views[task.pairs]])
        items = [Item(path, x) for path in task.rated]
        with task.autocast():
            targets = torch.stack([losses.full(t) for t in self._embed(self.target, items)])
            centre_a, centre_b = targets.mean(0).chunk(2)
            scores = [losses.path_loss(*losses.full(o).chunk(2), centre_a, centre_b).mean()
                      for o in self._predict(self._embed(self.online, items))]  # fmt: skip
        return torch.stack(scores).mean().item()

    def rate(self) -> float:
        """The rating procedure itself on one calibration and one validation batch; the mean score."""
        task = self.task
        rated = rate_block(
            Networks(self.online, self.target, self.predictor),
            task.winners,
            task.rated,
            [task.images[0]],
            Validation.held([task.images]),
            RatingOptions(autocast=task.autocast),
        )
        return statistics.mean(rated.scores["population_centre"].values())

    def _embed(self, network: Supernet, items: list[Item]) -> list[Tensor]:
        if self.grouped:
            return network.embed(self.task.block, items)
        return [network.embed(self.task.block, [item])[0] for item in items]

    def _predict(self, projections: list[Tensor]) -> list[Tensor]:
        if self.grouped:
            return list(self.predictor(torch.cat(projections), len(projections)).chunk(len(projections)))
        return [self.predictor(o) for o in projections]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", choices=("hytra", "mbconv", "nats"), default="hytra")
    parser.add_argument("--width", type=float, default=1.0, help="multiplier of all channels (default 1)")
    parser.add_argument("--image-size", type=int, default=224, help="pixels (default 224)")
    parser.add_argument("--hidden", type=int, default=4096, help="hidden units of the heads (default 4096)")
    parser.add_argument("--out", type=int, default=256, help="dimension of the embedding (default 256)")
    parser.add_argument("--block", type=int, default=0)
    parser.add_argument("--prefix", default="", help="winners of the blocks before, as 5433|3230; default: the first")
    parser.add_argument("--batch", type=int, default=32, help="images per view (default 32)")
    parser.add_argument("--paths", type=int, default=8, help="paths of a rating pass (default 8)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="of autocast (default: bf16 on a GPU, else fp32)")
    parser.add_argument("--layout", choices=("nhwc", "nchw"), default="nhwc", help="memory format (default nhwc)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        metavar="VARIANT",
        help="the first is what the others are compared with; default: all that make sense here",
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rounds", type=int, default=10, help="measurements of each (default 10)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the measurements there, after every part")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device is available; leave --device out or say cpu")
    for name, least in (("batch", 2), ("paths", 1), ("rounds", 2), ("threads", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name}: expected at least {least}, got {getattr(options, name)}")
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu")
    options.dtype = options.dtype or ("bf16" if device.type == "cuda" else "fp32")
    names = options.variants or (["triton", "reference", "eager", "item-eager", "compile"] if device.type == "cuda"
                                 else ["reference", "eager", "item-reference", "item-eager"])  # fmt: skip
    if device.type == "cpu" and any(name.endswith("triton") for name in names):
        parser.error("--variants: the Triton kernels need a GPU; choose reference")
    try:
        task, networks = set_up(options, device)
    except ValueError as error:
        parser.error(str(error))
    torch._dynamo.config.recompile_limit = 1000  # every candidate, shape and number of items compiles once

    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {options.threads} threads",
        "python": platform.python_version(), "torch": torch.__version__,
        "setting": {key: getattr(options, key) for key in ("space", "width", "image_size", "hidden", "out", "block",
                                                           "batch", "dtype", "layout", "rounds")},
        "sampled_paths": len(task.sampled), "rated_paths": len(task.rated), "parts": {}, "not_timed": {}}  # fmt: skip
    print(json.dumps({key: value for key, value in report.items() if key not in ("parts", "not_timed")}, indent=1))
    variants = {name: Variant(name, *networks, task) for name in names}
    parts = [part for part in PARTS if part in options.parts]
    timed = {}
    for part in reversed(parts):  # the step comes last: it changes the weights, and each variant's a little differently
        chosen = {name: variant for name, variant in variants.items() if part != "rate" or variant.grouped}
        timed[part] = agreeing(part, chosen, options.dtype, report)
    for part in parts:
        time_part(part, timed[part], options.rounds, device, report)
        if options.json:
            options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if report["not_timed"] else 0


def set_up(options: argparse.Namespace, device: torch.device) -> tuple[Task, tuple[Supernet, Supernet, nn.Module]]:
    """Space, networks, paths and random images. Raises ValueError for what cannot be."""
    space = spaces.make(
        options.space, width=options.width, image_size=options.image_size, restricted=True, split="cifar10"
    )
    block = options.block
    if not 0 <= block < space.blocks:
        raise ValueError(f"--block: there is no block {block}; choose 0 to {space.blocks - 1}")
    try:
        prefix = [decode(text) for text in options.prefix.split("|") if text]
    except ValueError:
        raise ValueError(f"--prefix: {options.prefix!r} is not a list of paths; write 5433|3230") from None
    winners: list[Choices] = []
    for b in range(block):
        paths = space.paths(b, winners)
        winners.append(prefix[b] if b < len(prefix) else paths[0])
        if winners[b] not in paths:
            raise ValueError(f"--prefix: block {b} has no such path; see docs/method.md")

    torch.manual_seed(0)
    layout = torch.channels_last if options.layout == "nhwc" else torch.contiguous_format
    online = Supernet(space, options.hidden, options.out)
    del online.blocks[block + 1 :], online.projectors[block + 1 :]
    for module in online.modules():
        if getattr(module, "is_norm", False):  # residual branches start with zero weights, which would hide mistakes
            nn.init.ones_(module.weight)
    for b in range(block):
        online.freeze(b)
    online = online.to(device, memory_format=layout)
    target = copy.deepcopy(online).requires_grad_(False)
    predictor = heads.predictor(options.hidden, options.out).to(device)

    def images() -> Tensor:
        x = torch.randn(options.batch, 3, options.image_size, options.image_size)
        return x.to(device, memory_format=layout)

    def autocast() -> Any:
        return torch.autocast(device.type, torch.bfloat16) if options.dtype == "bf16" else nullcontext()

    paths = space.paths(block, winners)
    rated = [paths[i] for i in sorted(set(np.linspace(0, len(paths) - 1, options.paths).round().astype(int).tolist()))]
    with autocast():
        views = [target.features(winners, images()) for _ in range(2 * space.view_pairs)]
    sampled = space.sample(block, winners, np.random.default_rng(0))
    task = Task(block, space.view_pairs, winners, sampled, rated, views, (images(), images()), autocast)
    return task, (online, target, predictor)


def agreeing(part: str, variants: dict[str, Variant], dtype: str, report: dict[str, Any]) -> dict[str, Variant]:
    """Runs a part of every variant, which also warms it up; those that work and agree with the first that does."""
    expected: float | None = None
    running: dict[str, Variant] = {}
    for name, variant in variants.items():
        try:
            with kernels_in_use(variant.kernels):
                result, *_ = [getattr(variant, part)() for _ in range(WARM_UP)]
        except Exception as error:  # a compiler that fails must not lose the others' measurements
            reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"
        else:
            expected = result if expected is None else expected
            agrees = abs(result - expected) <= TOLERANCE[dtype]
            reason = None if agrees else f"gives {result:+.4f}, the first variant {expected:+.4f}"
        if reason is None:
            running[name] = variant
        else:
            report["not_timed"][f"{part} {name}"] = reason
            print(f"{part}, {name}: NOT TIMED: {reason}", flush=True)
    return running


def time_part(
    part: str, variants: dict[str, Variant], rounds: int, device: torch.device, report: dict[str, Any]
) -> None:
    """Times one part of all variants in turn and adds it to the report. peak_gib: GPU memory beyond the networks'."""
    print(f"\n{part}", flush=True)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    peaks: dict[str, float] = {}
    order = list(variants)
    for turn in range(rounds if order else 0):
        first = turn % len(order)
        for name in order[first:] + order[:first]:
            with kernels_in_use(variants[name].kernels):
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()
                seconds[name].append(_seconds(getattr(variants[name], part), device))
                if device.type == "cuda":
                    peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**30
    report["parts"][part] = {}
    for name, times in seconds.items():
        fifths = statistics.quantiles(times, n=5, method="inclusive")
        ratio = statistics.median(t / base for t, base in zip(times, seconds[order[0]], strict=True))
        result = {"median_s": statistics.median(times), "q20_s": fifths[0], "q80_s": fifths[3], "x": ratio}
        shown = f"{result['median_s'] * 1e3:>9.1f} ms ({fifths[0] * 1e3:.1f}-{fifths[3] * 1e3:.1f})  x {ratio:.2f}"
        if name in peaks:
            result["peak_gib"] = peaks[name]
            shown += f"  {peaks[name]:.2f} GiB"
        report["parts"][part][name] = result
        print(f"  {name:<16} {shown}", flush=True)


@contextmanager
def kernels_in_use(kernels: str) -> Iterator[None]:
    """Lets everything below run on these kernels; eager code and formula take the place of the reference."""
    written_out = {"eager": eager_gbn_act, "compile": formula_gbn_act}
    original = reference.gbn_act
    bossnas_kernels.use("triton" if kernels == "triton" else "reference")
    reference.gbn_act = written_out.get(kernels, original)
    try:
        yield
    finally:
        reference.gbn_act = original
        bossnas_kernels.use("auto")


def eager_gbn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    groups: int = 1,
    residual: Tensor | None = None,
    act: str = "none",
    training: bool = True,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """`gbn_act` as a loop of F.batch_norm over the groups."""
    if training:
        mean, var = weight.new_zeros(2, groups, x.shape[1])
    else:
        mean, var = (t.expand(groups, x.shape[1]) for t in (running_mean, running_var))
    residuals = [None] * groups if residual is None else residual.chunk(groups)
    ys = []
    for piece, r, m, v in zip(x.chunk(groups), residuals, mean, var, strict=True):
        # With momentum 1 the running statistics become the group's own.
        y = F.batch_norm(piece, m, v, weight, bias, training, 1.0, eps)
        ys.append(_activate(y if r is None else y + r, act))
    return ys[0] if groups == 1 else torch.cat(ys), mean, var


def formula_gbn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    groups: int = 1,
    residual: Tensor | None = None,
    act: str = "none",
    training: bool = True,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """`gbn_act` written out over all groups at once, in fp32: what torch.compile can fuse best."""
    wide = x.unflatten(0, (groups, -1)).float()  # [groups, N, C, ...]
    spread = (-1, 1, x.shape[1], *(1,) * (x.dim() - 2))
    if training:
        axes = [d for d in range(wide.dim()) if d not in (0, 2)]
        var, mean = (t.view(groups, -1) for t in torch.var_mean(wide, axes, correction=0, keepdim=True))
        count = x.numel() // (groups * x.shape[1])
        unbiased = var * (count / max(count - 1, 1))
    else:
        mean, var = (t.expand(groups, x.shape[1]) for t in (running_mean, running_var))
        unbiased = var
    y = (wide - mean.view(spread)) * torch.rsqrt(var.view(spread) + eps) * weight.view(spread) + bias.view(spread)
    y = y.flatten(0, 1)
    return _activate(y if residual is None else y + residual, act).to(x.dtype), mean.detach(), unbiased.detach()


def _activate(x: Tensor, act: str) -> Tensor:
    return F.relu(x) if act == "relu" else F.silu(x) if act == "silu" else x


def _seconds(function: Callable[[], float], device: torch.device) -> float:
    """Wall time of a call; its result comes to the host, so that the device has done all of it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


if __name__ == "__main__":
    sys.exit(main())
