"""One rank of the engine tests; started by test_engines.py through torchrun, deepspeed or plain python.

Arguments: JSON with engine, section, clip, out, and optionally steps, blocks, split, save, load. Trains the
reference task and writes rank 0's parameters.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import nn

from bossnas import dist, engines
from bossnas.optim import LARS, parameter_groups

ACCUMULATE, ROWS, BRANCHES = 2, 12, 5  # rows of a micro-batch over all ranks
SAMPLED = [[(0, 1), (1, 2)], [(2, 0), (0, 2)], [(1, 3), (3, 1)], [(3, 0), (2, 3)]]  # branch 4 never


class Branches(nn.Module):
    """Two layers, each with five private branches; every micro-batch goes through two paths."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList(
                nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 6, bias=False), nn.LayerNorm(6))
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


def batch(step, micro):
    generator = torch.Generator().manual_seed(100 * step + micro)
    return torch.randn(ROWS, 6, generator=generator)


def build():
    torch.manual_seed(0)
    return Branches()


def train(engine, module, steps, split=False):
    """``split``: one backward per path instead of one per micro-batch."""
    per_rank = ROWS // dist.world_size()
    for step in steps:
        for micro in range(ACCUMULATE):
            x = batch(step, micro)[dist.rank() * per_rank :][:per_rank]
            paths = SAMPLED[(step + micro) % 4]
            parts = [[path] for path in paths] if split else [paths]
            for part in parts:
                with engine.autocast():
                    loss = module.loss(x, part)
                engine.micro(loss, last=micro == ACCUMULATE - 1 and part is parts[-1])
        engine.step(lr=0.1 / (step + 1))


def make(spec, module):
    engine = engines.make(
        spec["engine"],
        accumulate=ACCUMULATE,
        micro_batch=ROWS // dist.world_size(),
        precision=spec.get("precision", "fp32"),
        section=spec.get("section", {}),
    )
    trained, _ = engine.wrap(
        module,
        None,
        lambda module, followers, sharded: LARS(
            parameter_groups(module), lr=1.0, weight_decay=1e-2, trust=0.1, sharded=sharded, clip=spec.get("clip", 0.0)
        ),
    )
    return engine, trained


def run(spec):
    results = {}
    for block in range(spec.get("blocks", 1)):  # one engine per block
        module = build()
        if spec.get("load"):
            module.load_state_dict(torch.load(Path(spec["load"]) / "module.pt", weights_only=True))
        engine, trained = make(spec, module)
        if spec.get("load"):
            engine.load(torch.load(Path(spec["load"]) / "optimizer.pt", weights_only=True))
        train(engine, trained, range(*spec.get("steps", [0, 3])), spec.get("split", False))
        if spec.get("save"):
            engine.gather()
            state = {name: tensor.clone() for name, tensor in engine.state().items()}
            if dist.rank() == 0:
                torch.save(state, Path(spec["save"]) / "optimizer.pt")
                torch.save(module.state_dict(), Path(spec["save"]) / "module.pt")
            dist.barrier()
        engine.close()
        results[block] = {name: p.detach().clone() for name, p in module.named_parameters()}
    if dist.rank() == 0:
        torch.save(results, spec["out"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    argument = next(a for a in sys.argv[1:] if not a.startswith("--local_rank"))
    specs = json.loads(argument)
    sys.exit(dist.run(lambda: [run(spec) for spec in specs], timeout_minutes=1))
