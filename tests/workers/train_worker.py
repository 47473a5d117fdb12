"""One rank of supernet/test_train_block_ranks.py: training steps and a rating on several ranks against one process.

Arguments: JSON list of cases: engine, space, and optionally section, recompute, sync, own_group, objective, paths, rate
(afterwards).
In float64, with engine deepspeed in float32.
"""

from __future__ import annotations

import copy
import json
import sys
from functools import cache, partial
from itertools import islice

import numpy as np
import torch
from ranks import HANG
from torch import nn
from torch.nn import functional as F

from bossnas import spaces
from bossnas.config.search import TrainConfig
from bossnas.distributed import dist, engines, launch
from bossnas.optim.cosine import ema_momentum, learning_rate
from bossnas.optim.groups import parameter_groups
from bossnas.optim.lars import LARS
from bossnas.spaces.ops import synchronise
from bossnas.supernet import heads, losses
from bossnas.supernet.rate_block import RatingOptions, Validation, rate_block
from bossnas.supernet.supernet import Item, Networks, Supernet
from bossnas.supernet.train_block import SHUFFLE, RunState, Training, sample_paths, train_block

N, ACCUMULATE, LR, STEPS = 4, 2, 0.1, 2
EPOCHS, STEPS_PER_EPOCH = 2, 2
TEMPERATURE = 0.3
WIDTHS = {"hytra": 0.125, "mbconv": 0.125, "nats": 0.25}


def build(name: str, dtype: torch.dtype) -> tuple:
    torch.manual_seed(0)
    space = spaces.make(name, width=WIDTHS[name], image_size=32, restricted=True, split="cifar10")
    online = Supernet(space, 16, 8).to(dtype)
    return space, online, copy.deepcopy(online).requires_grad_(False), heads.predictor(16, 8).to(dtype)


def views_of(space, rank: int, micro: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * micro + rank)
    return [torch.randn(N, 3, 32, 32, generator=generator).to(dtype) for _ in range(2 * space.view_pairs)]


@cache
def by_hand(
    world: int,
    name: str,
    dtype: torch.dtype,
    shuffled: bool = True,
    objective: str = "bootstrap",
    most: int | None = None,
) -> tuple[list, list, float]:
    """METHOD 3.3 and 3.4 for all ranks in one process; the engine and the loop have no part in it. -> parameters of the
    trained modules, of the target network, loss of the last step."""
    space, online, target, predictor = build(name, dtype)
    trained = nn.ModuleDict({**online.part(0), "predictor": predictor})
    optimizer = LARS(parameter_groups(trained), LR)
    pairs = space.view_pairs
    for step in range(STEPS):
        logged = []
        for micro in range(step * ACCUMULATE, (step + 1) * ACCUMULATE):
            paths = sample_paths(space, 0, [], 0, micro)[:most]
            views = [views_of(space, r, micro, dtype) for r in range(world)]
            order = np.random.default_rng([0, SHUFFLE, 0, micro]).permutation(N * world)
            order = torch.from_numpy(order if shuffled else np.arange(N * world))
            targets = []
            for j, path in enumerate(paths):
                for v in (j % pairs, j % pairs + pairs):
                    whole = torch.cat([views[r][v] for r in range(world)])
                    out = torch.empty(N * world, 8, dtype=dtype)
                    with torch.no_grad():
                        for r in range(world):
                            rows = order[r * N : (r + 1) * N]
                            out[rows] = target.embed(0, [Item(path, whole[rows])])[0]
                    targets.append(out)
            t_a, t_b = (torch.stack([F.normalize(t) for t in targets[k::2]]).mean(0) for k in (0, 1))
            for r in range(world):
                mine = slice(r * N, (r + 1) * N)
                for j, path in enumerate(paths):
                    o_a, o_b = (online.embed(0, [Item(path, views[r][v])])[0] for v in (j % pairs, j % pairs + pairs))
                    loss = torch.zeros((), dtype=dtype)
                    if objective != "instance":
                        loss = losses.path_loss(predictor(o_a), predictor(o_b), t_a[mine], t_b[mine]).mean()
                    if objective != "bootstrap":
                        table = F.normalize(o_a) @ F.normalize(o_b).T / TEMPERATURE
                        right = torch.arange(N)
                        loss = loss + (F.cross_entropy(table, right) + F.cross_entropy(table.T, right)) / 2
                    (loss / ACCUMULATE / world).backward()
                    logged.append(loss.item())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        m = ema_momentum(micro, EPOCHS * STEPS_PER_EPOCH * ACCUMULATE)
        for t, o in zip(target.part(0).parameters(), online.part(0).parameters(), strict=True):
            t.data.mul_(m).add_(o.data, alpha=1 - m)
    return tensors(trained), tensors(target), float(np.mean(logged))


def train(case: dict, dtype: torch.dtype, batches: list[list[torch.Tensor]], group: object = None) -> tuple:
    """``STEPS`` updates by `train_block` on this rank's batches: what was trained, plain, and the last Step."""
    world = dist.world_size(group)
    space, online, target, predictor = build(case["space"], dtype)
    trained = nn.ModuleDict({**online.part(0), "predictor": predictor})
    if case.get("sync"):
        synchronise(trained, target.part(0), average=partial(dist.average, group=group))
    n = len(batches[0][0])
    engine = engines.make(
        case["engine"], accumulate=ACCUMULATE, micro_batch=n, section=case.get("section"), group=group
    )
    part, followers = engine.wrap(
        trained,
        target.part(0),
        lambda module, followers, sharded: LARS(parameter_groups(module, followers), LR, sharded=sharded),
    )
    settings = TrainConfig(
        batch=n * world * ACCUMULATE,
        micro_batch=n,
        epochs=EPOCHS,
        lr=LR,
        warmup_epochs=0,
        activation_checkpointing=case.get("recompute", False),
        temperature=TEMPERATURE,
        objective=case.get("objective", "bootstrap"),
        paths=case.get("paths"),
    )
    steps = train_block(
        Networks(online.replaced(0, part), target.replaced(0, followers), part["predictor"]),
        space,
        engine,
        iter(batches),
        RunState(),
        Training(settings, STEPS_PER_EPOCH, ACCUMULATE, group=group, check_paths=True),
        [],
    )
    *others, step = islice(steps, STEPS * ACCUMULATE)
    assert [s is None for s in others] == [True, False] * (STEPS - 1) + [True]
    assert learning_rate(LR, 0, EPOCHS, 1, 0) == LR == step.lr and step.outcome == "applied"
    engine.close()
    assert not any(hasattr(p, "to_local") for p in trained.parameters())
    return space, online, target, predictor, trained, step


def tensors(module: nn.Module) -> list[torch.Tensor]:
    return [p.detach() for p in module.parameters()]


def difference(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    return max((p - q).abs().max().item() for p, q in zip(a, b, strict=True))


def check(case: dict) -> None:
    world, rank = dist.world_size(), dist.rank()
    double = case["engine"] != "deepspeed"
    dtype, limit = (torch.float64, 1e-10) if double else (torch.float32, 1e-5)
    space = build(case["space"], dtype)[0]
    mine = [views_of(space, rank, micro, dtype) for micro in range(STEPS * ACCUMULATE)]
    group = torch.distributed.new_group(list(range(world))) if case.get("own_group") else None
    plan = {"objective": case.get("objective", "bootstrap"), "most": case.get("paths")}
    expected = dist.from_main(lambda: by_hand(world, case["space"], dtype, **plan))
    if case.get("sync"):  # as one process with the whole batch, in which no group has more than one rank
        alone = [torch.distributed.new_group([r]) for r in range(world)][rank]
        views = [[views_of(space, r, micro, dtype) for r in range(world)] for micro in range(STEPS * ACCUMULATE)]
        whole = [[torch.cat(parts) for parts in zip(*ranks, strict=True)] for ranks in views]
        *_, truth_target, _, truth, last = train({"engine": "ddp", "space": case["space"]}, dtype, whole, alone)
        other, expected = expected, (tensors(truth), tensors(truth_target), last.loss)
        what = "norms of one rank"
    elif case.get("objective") == "instance":
        other, what = dist.from_main(lambda: by_hand(world, case["space"], dtype)), "the other objective"
    else:
        other = dist.from_main(lambda: by_hand(world, case["space"], dtype, shuffled=False, **plan))
        what = "a missing shuffle"
    space, online, target, predictor, trained, step = train(case, dtype, mine, group)
    assert abs(step.loss - expected[2]) < 1e-5, (case, step.loss, expected[2])
    off = difference(tensors(trained), expected[0]), difference(tensors(target), expected[1])
    assert max(off) < limit, f"{case}: parameters differ by {off}"
    seen = difference(tensors(trained), other[0])
    assert seen > 1e-4, f"{case}: this check would not notice {what}: {seen}"
    if case.get("rate"):
        check_rating(space, online, target, predictor)
    if rank == 0:
        print(f"{case}: equal within {max(off):.1e}", flush=True)


def check_rating(space, online: Supernet, target: Supernet, predictor: nn.Module) -> None:
    paths, x = space.paths(0, []), torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    batches = [(x[:5], x[3:]), (x[1:4], x[4:7]), (x[:5], x[2:7])]

    def rate(count: int, batch_count: int, most: int | None, **resume):
        return rate_block(
            Networks(online, target, predictor),
            [],
            paths[:count],
            [x],
            Validation.held(batches[:batch_count]),
            RatingOptions(most=most),
            **resume,
        ).scores

    # more batches than ranks, fewer, units to share, an uneven share, a rank without work
    for count, batch_count, most in ((16, 3, None), (16, 1, 4), (5, 3, 2), (5, 1, None), (1, 1, None)):
        pieces, counted = {}, []

        def advance(found: dict, n: int, counted=counted, pieces=pieces) -> None:
            counted.append(n)
            pieces.update(found)

        scores = rate(count, batch_count, most, advance=advance)
        real = {name: getattr(dist, name) for name in ("world_size", "rank", "all_gather_object")}
        dist.world_size, dist.rank, dist.all_gather_object = lambda group=None: 1, lambda group=None: 0, lambda v: [v]
        alone, counted_alone = rate(count, batch_count, most), []
        half = {key: value for i, (key, value) in enumerate(pieces.items()) if i % 3}  # another number of ranks goes on
        for batch in {b for _, b, _ in half}:
            if any(("target", batch, u) not in half for _, _, u in pieces):
                half = {key: value for key, value in half.items() if key[1] != batch}
        resumed = rate(count, batch_count, most, pieces=half, advance=lambda _, n, c=counted_alone: c.append(n))
        for name, function in real.items():
            setattr(dist, name, function)
        assert scores == alone == resumed, (scores, alone, resumed)
        assert sum(counted) == count * (1 + 2 * batch_count) >= sum(counted_alone)


def main() -> None:
    for case in json.loads(sys.argv[-1]):
        check(case)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(launch.run(main, timeout_minutes=HANG / 60))
