"""One rank of the engine tests; started by distributed/test_engines.py through torchrun, deepspeed or plain python.

Arguments: JSON list of specs: engine, out, and optionally section, clip, precision, steps (their numbers), blocks,
split, bad, save, load, optimizer (its kind; every step then goes through all branches). Each trains the reference
task; rank 0 writes for every block the parameters, the target's, the momentum and what every rank saw.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import torch
from ranks import HANG
from torch import nn

from bossnas.distributed import dist, engines, launch
from bossnas.optim.groups import parameter_groups
from bossnas.optim.lars import LARS
from bossnas.optim.library import choose_optimizer

ACCUMULATE, ROWS, BRANCHES, EMA = 2, 12, 5, 0.9  # rows of a micro-batch over all ranks
SAMPLED = [[(0, 1), (1, 2)], [(2, 0), (0, 2)], [(1, 3), (3, 1)], [(3, 0), (2, 3)]]  # branch 4 never
ALL = [[(i, i) for i in range(BRANCHES)]] * 4


class Branches(nn.Module):
    """Two layers, each with five private branches; every micro-batch goes through two paths."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList(
                nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 6, bias=False), nn.LayerNorm(6), Scaled())
                for _ in range(BRANCHES)
            )
            for _ in range(2)
        )
        nn.init.zeros_(self.layers[0][0][3].weight)  # as the last gamma of a candidate
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def loss(self, x, paths):
        """Sum over the paths of a mean over the batch."""
        total = 0.0
        for path in paths:
            y = x
            for layer, choice in zip(self.layers, path, strict=True):
                y = y + layer[choice](y)
            total = total + (y - 1).square().mean()
        return total


class Scaled(nn.Module):
    """A weight of one row, of which all ranks but one hold nothing when it is sharded."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x * self.weight


def batch(step, micro):
    generator = torch.Generator().manual_seed(100 * step + micro)
    return torch.randn(ROWS, 6, generator=generator)


def build():
    torch.manual_seed(0)
    return Branches()


def target_of(module):
    return nn.ModuleDict({"layers": copy.deepcopy(module.layers).requires_grad_(False)})


def train(engine, module, steps, split=False, bad=None, look=lambda: None, sampled=SAMPLED):
    """``split``: one backward per path instead of one per micro-batch. ``bad``: {step, rank, factor}: there the loss is
    multiplied by factor. Returns of every step the outcome, the loss scale after it, and whether what ``look`` shows
    was left alone."""
    per_rank, seen = ROWS // dist.world_size(), []
    for step in steps:
        before = look()
        for micro in range(ACCUMULATE):
            x = batch(step, micro)[dist.rank() * per_rank :][:per_rank]
            paths = sampled[(step + micro) % 4]
            parts = [[path] for path in paths] if split else [paths]
            for part in parts:
                with engine.autocast():
                    loss = module.loss(x, part)
                if bad and (step, dist.rank(), micro) == (bad["step"], bad["rank"], 0):
                    loss = loss * float(bad["factor"])
                engine.micro(loss, last=micro == ACCUMULATE - 1 and part is parts[-1])
        outcome = engine.step(0.1 / (step + 1), EMA)
        after = look()
        same = before is not None and all(torch.equal(before[name], after[name]) for name in before)
        seen.append((outcome, engine.loss_scale, same))
    return seen


def make(spec, module, target=None):
    """-> the engine and what to train in place of ``module``."""
    engine = engines.make(
        spec["engine"],
        accumulate=ACCUMULATE,
        micro_batch=ROWS // dist.world_size(),
        precision=spec.get("precision", "fp32"),
        section=spec.get("section", {}),
    )

    def lars(module, followers, sharded):
        return LARS(
            parameter_groups(module, followers),
            lr=1.0,
            weight_decay=1e-2,
            trust=0.1,
            sharded=sharded,
            clip=spec.get("clip", 0.0),
        )

    trained, _ = engine.wrap(module, target, library(spec)[0] if "optimizer" in spec else lars)
    return engine, trained


def library(spec):
    return choose_optimizer(
        spec["optimizer"],
        spec.get("fused", "auto"),
        torch.device("cpu"),
        weight_decay=0.1,
        momentum=0.9,
        beta2=0.95,
        eps=0.1,
        clip=spec.get("clip", 0.0),
    )


def everything(engine, module, target):
    """Whole copies of all that a step may change, on every rank."""
    engine.gather()
    state = {
        f"momentum.{name}": t.full_tensor() if hasattr(t, "full_tensor") else t
        for name, t in engine.state().items()
        if name != "loss_scale"
    }
    parameters = {f"online.{name}": p.detach() for name, p in module.named_parameters()}
    targets = {f"target.{name}": p.detach() for name, p in target.named_parameters()}
    return {name: t.clone() for name, t in (parameters | targets | state).items()}


def run(spec):
    results = {}
    for block in range(spec.get("blocks", 1)):  # one engine per block
        module = build()
        target = target_of(module)
        if spec.get("load"):
            saved = torch.load(Path(spec["load"]) / "half.pt", weights_only=True)
            module.load_state_dict({name[7:]: t for name, t in saved.items() if name.startswith("online.")})
            target.load_state_dict({name[7:]: t for name, t in saved.items() if name.startswith("target.")})
        engine, trained = make(spec, module, target)
        if spec.get("load"):
            engine.load({name[9:]: t for name, t in saved.items() if name.startswith("momentum.")})

        def look(engine=engine, module=module, target=target):
            return everything(engine, module, target) if "bad" in spec else None

        steps = spec.get("steps", [0, 1, 2])
        seen = train(
            engine,
            trained,
            steps,
            spec.get("split", False),
            spec.get("bad"),
            look,
            ALL if "optimizer" in spec else SAMPLED,
        )
        tensors = everything(engine, module, target)
        if spec.get("save") and dist.rank() == 0:
            torch.save(tensors, Path(spec["save"]) / "half.pt")
        engine.close()
        results[block] = tensors | {"seen": dist.all_gather_object(seen)}
    dist.barrier()
    if dist.rank() == 0:
        torch.save(results, spec["out"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    argument = next(a for a in sys.argv[1:] if not a.startswith("--local_rank"))
    specs = json.loads(argument)
    sys.exit(launch.run(lambda: [run(spec) for spec in specs], timeout_minutes=HANG / 60))
