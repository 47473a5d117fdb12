"""What a training step asks of a GPU: launches, copies and waits, counted on tensors without data; needs no GPU.

    python bench/launches.py                                # a step of every block of HyTra, MBConv and NATS
    python bench/launches.py --only hytra:3 --names 20      # and the names that are launched most

The real training loop runs a step in bf16 on meta tensors, with the Triton kernels noted, not launched. Whatever reads
a number back, and so would wait for the GPU, cannot run on tensors without data and fails. "copies" are those of
PyTorch among the launches: casts, copies, concatenations. The milliseconds are an estimate, launch by launch, of the
GPU's work alone: the larger of bytes / 2.8 TB/s, operations / 450 TFLOP/s (what an H100 reaches of its data sheet's
3.35 and 989) and 2 microseconds.
"""

import argparse
import collections
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

root = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(root), str(root / "kernels")]

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from triton.runtime.jit import KernelInterface

from bossnas import spaces
from bossnas.config.search import TrainConfig
from bossnas.distributed.engines.ddp import DDPEngine
from bossnas.distributed.engines.protocol import Verdict
from bossnas.optim.groups import parameter_groups
from bossnas.optim.lars import LARS
from bossnas.spaces.paths import decode
from bossnas.supernet import heads, train_block
from bossnas.supernet.supernet import Networks, Supernet
from bossnas_kernels import common, dispatch, lars

PREFIX = {"hytra": "5433|3230|0010", "mbconv": "03|0123|3210|0321", "nats": "44|33"}  # winners of the blocks before
SIZE = {"hytra": 224, "mbconv": 224, "nats": 32}
ROWS = [f"{name}:{block}" for name, blocks in (("hytra", 4), ("mbconv", 5), ("nats", 3)) for block in range(blocks)]
PHASES = ("prefix", "target", "online", "backward", "update")
SILENT = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "resize_")
COPIES = ("_to_copy", "copy_", "clone", "cat")
BYTES, OPERATIONS, LEAST = 2.8e12, 450e12, 2e-6  # a second; a second; seconds


class Counts(TorchDispatchMode):
    """Launches by (phase, name), and their estimated seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = "prefix"
        self.launches: collections.Counter = collections.Counter()
        self.seconds: collections.Counter = collections.Counter()

    def add(self, name: str, tensors: list[Tensor], operations: float = 0.0, times: int = 1) -> None:
        moved = sum({id(t): t.numel() * t.element_size() for t in tensors}.values())
        self.launches[self.phase, name] += times
        self.seconds[self.phase, name] += max(moved / BYTES, operations / OPERATIONS, times * LEAST)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._overloadpacket.__name__
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        if func.is_view or name in SILENT or not made or made[0].device.type == "cpu":
            return result
        given = [t for t in tree_leaves((args, kwargs or {})) if isinstance(t, Tensor)]
        count = flop_registry.get(func._overloadpacket)
        times = len(made) if name == "convolution_backward" else 1  # one for each gradient
        operations = 0 if count is None else count(*args, **(kwargs or {}), out_val=result)
        self.add(name, [*given, *made], operations, times)
        # without data, PyTorch forgets that maps stay in channels_last
        return result.contiguous(memory_format=torch.channels_last) if name == "convolution" else result

    def kernel(self, kernel: KernelInterface, grid: tuple):
        return lambda *args, **kwargs: self.add(kernel.__name__, [t for t in args if isinstance(t, Tensor)])

    def of(self, phase: str | None = None, names: tuple[str, ...] | None = None) -> int:
        chosen = ((p, n) for p, n in self.launches if phase in (None, p) and (names is None or n in names))
        return sum(self.launches[key] for key in chosen)


class MetaEngine(DDPEngine):
    """Tells the counts which part of a step runs; autocast, of which PyTorch knows nothing here, is `as_on_a_gpu`'s."""

    counts: Counts

    def begin_step(self, lr: float, ema: float = 1.0) -> Verdict:
        self.counts.phase = "update"
        return super().begin_step(lr, ema)

    def autocast(self) -> contextlib.AbstractContextManager:
        self.counts.phase = next(self.phases)
        return contextlib.nullcontext()

    def micro(self, loss: Tensor, last: bool) -> None:
        self.counts.phase = "backward"
        super().micro(loss, last)


@contextlib.contextmanager
def as_on_a_gpu(counts: Counts) -> Iterator[None]:
    """Has the kernels' launchers run, note what they launch, and convolutions and products cast as under autocast."""
    conv2d, linear = F.conv2d, F.linear

    def half(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(torch.bfloat16)

    with (
        mock.patch.object(KernelInterface, "__getitem__", lambda kernel, grid: counts.kernel(kernel, grid)),
        mock.patch.object(torch, "autocast", lambda *_, **__: contextlib.nullcontext()),  # it knows no such device
        mock.patch.object(common, "architecture", lambda device: "sm_90"),
        mock.patch.object(dispatch, "implementation", lambda device: "triton"),
        mock.patch.object(dispatch, "_autocast", half),
        mock.patch.object(F, "conv2d", lambda x, w, b=None, *rest, **k: conv2d(half(x), half(w), half(b), *rest, **k)),
        mock.patch.object(F, "linear", lambda x, w, b=None: linear(half(x), half(w), half(b))),
        mock.patch.object(train_block, "images_at_once", lambda *_: 2**31),
    ):
        common.forget()
        lars._tables.cache_clear()  # without data all addresses are 0: blocks would share tables
        yield
    common.forget()


def count(row: str, batch: int = 64) -> Counts:
    """A step of a block, such as "hytra:3", at full size, of ``batch`` images."""
    name, _, number = row.partition(":")
    block, size = int(number), SIZE[name]
    space = spaces.make(name, width=1.0, image_size=size, restricted=True, split="cifar10")
    winners = [decode(path) for path in PREFIX[name].split("|")[:block]]
    with torch.device("meta"):
        online, target = (Supernet(space, 4096, 256) for _ in range(2))
        predictor = heads.predictor(4096, 256)
        images = [torch.empty(batch, 3, size, size) for _ in range(2 * space.view_pairs)]
        images = [x.contiguous(memory_format=torch.channels_last) for x in images]
    target.requires_grad_(False)
    for before in range(block):
        online.freeze(before)
        target.freeze(before)
    settings = TrainConfig(batch=batch, micro_batch=batch, lr=1.0, precision="bf16")
    counts = Counts()
    engine = MetaEngine(1, "fp32")
    engine.counts, engine.phases = counts, iter(PHASES[:3] if block else PHASES[1:3])
    trained, followers = nn.ModuleDict({**online.part(block), "predictor": predictor}), target.part(block)
    engine.wrap(trained, followers, lambda module, theirs, _: LARS(parameter_groups(module, theirs), 1.0))
    state = train_block.RunState(block, winners=winners)
    inputs = iter([images])
    if block:
        inputs = train_block.frozen_inputs(target, winners, inputs, engine.autocast)
    steps = train_block.train_block(
        Networks(online, target, predictor),
        space,
        engine,
        inputs,
        state,
        train_block.Training(settings, steps_per_epoch=10),
        winners,
    )
    with as_on_a_gpu(counts):
        if block:  # what is made once is not part of a step
            target.features_of_views(winners, images[:1], batch)
        counts.launches.clear(), counts.seconds.clear()
        with counts:
            next(steps)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ROWS, metavar="ROW", default=ROWS, help=", ".join(ROWS))
    parser.add_argument("--batch", type=int, default=64, help="images of a micro-batch (default 64)")
    parser.add_argument("--names", type=int, default=0, metavar="N", help="also the N names launched most")
    options = parser.parse_args()
    print("| block | launches | " + " | ".join(PHASES) + " | copies | GPU, ms |")
    print("|---" * (4 + len(PHASES)) + "|")
    for row in options.only:
        counts = count(row, options.batch)
        cells: list = [counts.of(), *(counts.of(phase) for phase in PHASES), counts.of(names=COPIES)]
        print(
            f"| {row} | " + " | ".join(map(str, cells)) + f" | {sum(counts.seconds.values()) * 1e3:.1f} |", flush=True
        )
        names: collections.Counter = collections.Counter()
        for (_, name), times in counts.launches.items():
            names[name] += times
        for name, times in names.most_common(options.names):
            print(f"    {times:6} {name}")


if __name__ == "__main__":
    main()
