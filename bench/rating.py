"""The batched rating against the official path-by-path procedure, on the same weights, one thread.

    python bench/rating.py --json rating.json                                  # every space and block; takes hours
    python bench/rating.py --space mbconv --block 1 --batches 1 4 --json mbconv.json

"official" is the procedure of the BossNAS release: for every path and validation batch two calibration views and then
two validation views pass the prefix and both networks, in NCHW, with torch's convolutions and batch norms and, for
NATS, the plain 1x1 convolution to 2048 channels. "ours" is bossnas.supernet.rate_block as a search calls it:
channels_last, all scores, units of the automatic size; finding that size is timed apart (footprint_s), since it is done
once.

Both must give the same scores. Times are CPU times of this process; the paths of the official procedure are timed in
slices, with ours between them. ratio = official / ours, of the medians; formula = P B (8L + 4Lp) / (2T + 4TB), the
layer evaluations of both. peak_gib: all tensors that ours has at once (units, statistics, prefix features), of which
the units keep to gib.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import sys
import time
from pathlib import Path

root = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(root), str(root / "kernels")]

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bossnas import spaces
from bossnas.search.rating import CPU_GIB
from bossnas.spaces.ops import GroupedBatchNorm, PooledPointwise, SlimConv
from bossnas.spaces.paths import Choices, decode
from bossnas.supernet import heads
from bossnas.supernet.memory import Footprint, peak_bytes
from bossnas.supernet.rate_block import RatingOptions, Validation, calibrate, rate_block
from bossnas.supernet.supernet import Item, Networks, Supernet
from bossnas.supernet.units import Unit, units

SIZES = {"hytra": 64, "mbconv": 64, "nats": 32}  # pixels
PREFIX = {"hytra": ["5433", "3230", "0010"]}  # of BossNet-T0; elsewhere the path in the middle of each block's list
PREFIX_IMAGES = 256  # that calibrate the prefix: in a few, channels are silent that others wake, times 1 / sqrt(eps)
SLICES = 4


class PlainNorm(nn.Module):
    """torch's batch norm with momentum 1, so that one pass in training mode calibrates it."""

    grouped = True

    def __init__(self, norm: GroupedBatchNorm):
        super().__init__()
        self.weight, self.bias, self.act = norm.weight, norm.bias, norm.act
        self.register_buffer("mean", norm.running_mean.clone())
        self.register_buffer("var", norm.running_var.clone())
        self.training = norm.training

    def forward(self, x: Tensor, groups: int = 1, stats: None = None, residual: Tensor | None = None) -> Tensor:
        y = F.batch_norm(x, self.mean, self.var, self.weight, self.bias, self.training, 1.0, 1e-5)
        y = y if residual is None else y + residual
        return F.relu_(y) if self.act == "relu" else F.silu(y) if self.act == "silu" else y


class PlainPooled(nn.Module):
    """1x1 convolution, batch norm and pool, one after another."""

    grouped = True

    def __init__(self, pooled: PooledPointwise):
        super().__init__()
        self.conv, self.norm = pooled.conv, PlainNorm(pooled.norm)

    def forward(self, x: Tensor, groups: int = 1, stats: None = None) -> Tensor:
        return self.norm(self.conv(x)).mean((2, 3))


def plain(module: nn.Module) -> nn.Module:
    """A copy, sharing the weights, with torch's batch norms."""
    memo = {id(p): p for p in module.parameters()}
    module = copy.deepcopy(module, memo)
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Conv2d) and not isinstance(child, SlimConv):
                child.__class__ = nn.Conv2d
            elif isinstance(child, GroupedBatchNorm):
                setattr(parent, name, PlainNorm(child))
            elif isinstance(child, PooledPointwise):
                setattr(parent, name, PlainPooled(child))
    return module


class Task:
    """Networks with random weights, a prefix that is frozen and calibrated, and random images."""

    def __init__(self, space: str, block: int, batches: int, options: argparse.Namespace):
        self.space = spaces.make(space, width=options.width, image_size=SIZES[space], restricted=True, split="cifar10")
        self.block, self.images, self.layout, self.gib = block, options.images, options.layout, options.gib
        hidden, out = options.hidden, options.out
        torch.manual_seed(0)
        self.online = Supernet(_First(self.space, block + 1), hidden, out)
        for module in self.online.modules():
            if isinstance(module, GroupedBatchNorm):  # residual branches start at zero, which would hide mistakes
                nn.init.uniform_(module.weight, 0.5, 1.5)
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        with torch.no_grad():
            for p in self.target.parameters():
                p.add_(torch.randn_like(p), alpha=0.01)
        self.predictors = [heads.predictor(hidden, out) for _ in range(block + 1)]
        self.calibration = self._views()  # the official procedure passes both, the second counts
        self.validation = [self._views() for _ in range(batches)]
        self.winners: list[Choices] = []
        many = torch.cat([self._views()[1] for _ in range(-(-PREFIX_IMAGES // options.images))])
        for b in range(block):
            paths = self.space.paths(b, self.winners)
            winner = decode(PREFIX[space][b]) if space in PREFIX else paths[len(paths) // 2]
            features = [self.target.features(self.winners, many)]
            stats, _ = calibrate(self.networks(b), b, [winner], [Unit((), (0,))], features)
            stats.write()
            for network in (self.online, self.target):
                network.freeze(b)
            self.winners.append(winner)
        self.paths = self.space.paths(block, self.winners)
        started = time.process_time()
        few = self.target.features(self.winners, self.calibration[1][:4])
        footprint = Footprint(self.target, block, self.paths, few)
        self.most = options.most or max(1, footprint.most(2 * options.images, int(options.gib * 2**30)))
        self.footprint_s = time.process_time() - started

    def _views(self) -> tuple[Tensor, Tensor]:
        """Two views of random images that differ in colour and coarse structure, as pictures do. (To a network all
        images of plain noise are alike, and batch norms divide rounding errors by next to nothing.)"""
        size = SIZES[type(self.space).__name__.lower()]
        coarse = F.interpolate(torch.randn(self.images, 3, 4, 4), size=size, mode="bilinear")
        image = 2 * coarse + 2 * torch.randn(self.images, 3, 1, 1)
        a, b = (image + 0.3 * torch.randn_like(image) for _ in range(2))
        return a.contiguous(memory_format=torch.channels_last), b.contiguous(memory_format=torch.channels_last)

    def networks(self, block: int) -> Networks:
        return Networks(self.online, self.target, self.predictors[block])

    def ours(self) -> list[float]:
        """Scores against the population centre."""
        found = rate_block(
            self.networks(self.block),
            self.winners,
            self.paths,
            self.calibration[1:],
            Validation.held(self.validation),
            RatingOptions(most=self.most),
        )
        return list(found.scores["population_centre"].values())


class _First:
    """The first ``blocks`` blocks of a space: nothing behind the rated block takes memory."""

    def __init__(self, space, blocks: int):
        self.space, self.blocks = space, blocks

    def __getattr__(self, name: str):
        return getattr(self.space, name)


class Official:
    """The path-by-path procedure; its results are kept batch by batch, as the release keeps them."""

    def __init__(self, task: Task):
        self.task = task
        self.target, self.online, self.predictor = (
            plain(m) for m in (task.target, task.online, task.predictors[task.block])
        )
        self.trained = nn.ModuleList(
            [*self.target.part(task.block).values(), *self.online.part(task.block).values(), self.predictor]
        )
        layout = torch.contiguous_format if task.layout == "nchw" else torch.channels_last
        self.calibration = [x.contiguous(memory_format=layout) for x in task.calibration]
        self.validation = [[x.contiguous(memory_format=layout) for x in views] for views in task.validation]
        self.outputs: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}

    @torch.no_grad()
    def run(self, rows: range) -> None:
        """All batches for some paths: calibration, then evaluation, the prefix anew each time."""
        for batch, views in enumerate(self.validation):
            for row in rows:
                self.trained.train()
                for x in self.calibration:
                    self._pass(row, x)
                self.trained.eval()
                self.outputs[batch, row] = [self._pass(row, x) for x in views]

    def _pass(self, row: int, x: Tensor) -> tuple[Tensor, Tensor]:
        block, path = self.task.block, self.task.paths[row]
        x = self.target.features(self.task.winners, x)
        t = self.target.embed(block, [Item(path, x)])[0]
        return t, self.predictor(self.online.embed(block, [Item(path, x)])[0])

    def scores(self) -> list[float]:
        """Mean over the batches of the loss against the population centre."""
        task, cos = self.task, nn.CosineSimilarity(dim=1)
        total = torch.zeros(len(task.paths), dtype=torch.float64)
        for batch in range(len(task.validation)):
            views = [self.outputs[batch, row] for row in range(len(task.paths))]
            centre_a, centre_b = (torch.stack([v[i][0] for v in views]).mean(0) for i in (0, 1))
            total += torch.stack([(-2 * cos(a[1], centre_b) - 2 * cos(b[1], centre_a)).mean() for a, b in views])
        return (total / len(task.validation)).tolist()


def measure(task: Task) -> dict:
    """Times both in turn; how much they differ, and whether their orders agree."""
    official, rows = Official(task), len(task.paths)
    cuts = [rows * i // SLICES for i in range(SLICES + 1)]
    ours_s, official_s = [], 0.0
    task.ours()
    official.run(range(1))
    for first, last in zip(cuts, cuts[1:], strict=False):
        started = time.process_time()
        ours = task.ours()
        ours_s.append(time.process_time() - started)
        started = time.process_time()
        official.run(range(first, last))
        official_s += time.process_time() - started
    truth = official.scores()
    batches, layers, behind = len(task.validation), len(task.paths[0]), sum(len(p) for p in task.winners)
    nodes = sum(len({p[:d] for p in task.paths}) for d in range(1, layers + 1))
    order = [sorted(range(rows), key=scores.__getitem__) for scores in (ours, truth)]
    return {
        "paths": rows,
        "official_s": round(official_s, 3),
        "ours_s": round(statistics.median(ours_s), 3),
        "ours_spread_s": [round(min(ours_s), 3), round(max(ours_s), 3)],
        "ratio": official_s / statistics.median(ours_s),
        "max_abs_diff": max(abs(a - b) for a, b in zip(ours, truth, strict=True)),
        "same_order": order[0] == order[1],
        "units": len(units(task.paths, task.most)),
        "footprint_s": round(task.footprint_s, 3),
        "gib": task.gib,
        "peak_gib": round(peak_bytes(task.ours) / 2**30, 4),
        "nodes": nodes,
        "formula": round(rows * batches * (8 * layers + 4 * behind) / (2 * nodes + 4 * nodes * batches), 2),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", choices=tuple(SIZES), help="default: all")
    parser.add_argument("--block", type=int, help="default: all")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4], help="validation batches (default 1 4)")
    parser.add_argument("--images", type=int, default=8, help="images per batch, N (default 8)")
    parser.add_argument("--gib", type=float, default=CPU_GIB, help=f"rating.max_gib of ours (default {CPU_GIB})")
    parser.add_argument("--most", type=int, help="paths in a unit of ours, instead of --gib")
    parser.add_argument("--layout", choices=("nchw", "nhwc"), default="nchw", help="of the official procedure")
    parser.add_argument("--width", type=float, default=1.0, help="multiplier of all channels (default 1)")
    parser.add_argument("--hidden", type=int, default=4096, help="hidden units of the heads (default 4096)")
    parser.add_argument("--out", type=int, default=256, help="dimension of the embedding (default 256)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the rows there, after every row")
    options = parser.parse_args(argv)
    if min(options.batches) < 1 or options.images < 4:
        parser.error("--batches: at least 1; --images: at least 4")
    torch.set_num_threads(1)
    report = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "images": options.images,
        "width": options.width,
        "hidden": options.hidden,
        "out": options.out,
        "official_layout": options.layout,
        "rows": [],
    }
    for space in [options.space] if options.space else SIZES:
        count = spaces.make(space, width=1.0, image_size=SIZES[space], restricted=True, split="cifar10").blocks
        if options.block is not None and not 0 <= options.block < count:
            parser.error(f"--block: {space} has blocks 0 to {count - 1}")
        for block in range(count) if options.block is None else [options.block]:
            for batches in options.batches:
                task = Task(space, block, batches, options)
                row = {"space": space, "block": block, "batches": batches, **measure(task)}
                report["rows"].append(row)
                print(json.dumps(row), flush=True)
                if options.json:
                    options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
