"""One rank of test_train_ranks.py: a training step and a rating on several ranks against one process doing it all."""

from __future__ import annotations

import copy
import sys
from itertools import islice

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from bossnas import bootstrap, dist, engines, heads, spaces
from bossnas.config import TrainConfig
from bossnas.optim import LARS, ema_momentum, learning_rate, parameter_groups
from bossnas.rate import Validation, rate_block
from bossnas.supernet import Item, Supernet
from bossnas.train import SHUFFLE, RunState, sample_paths, train_block

N, ACCUMULATE, LR = 6, 2, 0.1


def build():
    torch.manual_seed(0)
    space = spaces.make("hytra", width=0.125, image_size=32, restricted=True, split="cifar10")
    online = Supernet(space, 16, 8)
    return space, online, copy.deepcopy(online).requires_grad_(False), heads.predictor(16, 8)


def views_of(rank: int, micro: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * micro + rank)
    return [torch.randn(N, 3, 32, 32, generator=generator) for _ in range(8)]


def by_hand(world: int, shuffled: bool = True) -> tuple[nn.ModuleDict, Supernet, float]:
    """METHOD 3.3 and 3.4 for all ranks in one process; the engine and the loop have no part in it."""
    space, online, target, predictor = build()
    trained = nn.ModuleDict({**online.part(0), "predictor": predictor})
    optimizer = LARS(parameter_groups(trained), LR)
    logged = []
    for micro in range(ACCUMULATE):
        paths = sample_paths(space, 0, [], 0, micro)
        views = [views_of(r, micro) for r in range(world)]
        order = np.random.default_rng([0, SHUFFLE, 0, micro]).permutation(N * world)
        order = torch.from_numpy(order if shuffled else np.arange(N * world))
        targets = []
        for j, path in enumerate(paths):
            for v in (j, j + 4):
                whole = torch.cat([views[r][v] for r in range(world)])
                out = torch.empty(N * world, 8)
                with torch.no_grad():
                    for r in range(world):
                        rows = order[r * N:(r + 1) * N]
                        out[rows] = target.embed(0, [Item(path, whole[rows])])[0]
                targets.append(out)
        t_a, t_b = (torch.stack([F.normalize(t) for t in targets[k::2]]).mean(0) for k in (0, 1))
        for r in range(world):
            mine = slice(r * N, (r + 1) * N)
            for j, path in enumerate(paths):
                a, b = (predictor(online.embed(0, [Item(path, views[r][v])])[0]) for v in (j, j + 4))
                loss = bootstrap.path_loss(a, b, t_a[mine], t_b[mine]).mean()
                (loss / ACCUMULATE / world).backward()
                logged.append(loss.item())
    optimizer.step()
    m = ema_momentum(ACCUMULATE - 1, 4 * ACCUMULATE)
    for t, o in zip(target.part(0).parameters(), online.part(0).parameters(), strict=True):
        t.data.mul_(m).add_(o.data, alpha=1 - m)
    return trained, target, float(np.mean(logged))


def difference(a: nn.Module, b: nn.Module) -> float:
    return max((p - q).abs().max().item() for p, q in zip(a.parameters(), b.parameters(), strict=True))


def main() -> None:
    world, rank = dist.world_size(), dist.rank()
    space, online, target, predictor = build()
    trained = nn.ModuleDict({**online.part(0), "predictor": predictor})
    engine = engines.make("deepspeed", accumulate=ACCUMULATE, micro_batch=N, section={
        "zero_optimization": {"stage": int(sys.argv[-1])}})
    engine.wrap(trained, target.part(0), lambda module, followers, sharded: LARS(
        parameter_groups(module, followers), LR, sharded=sharded))
    settings = TrainConfig(batch=N * world * ACCUMULATE, micro_batch=N, epochs=2, lr=LR, warmup_epochs=0)
    batches = (views_of(rank, micro) for micro in range(ACCUMULATE))
    *nothing, step = islice(train_block(
        online, target, predictor, space, engine, batches, RunState(), settings, prefix=[], accumulate=ACCUMULATE,
        steps_per_epoch=2, seed=0, device=torch.device("cpu")), ACCUMULATE)
    assert nothing == [None]
    truth, truth_target, loss = by_hand(world)
    assert learning_rate(LR, 0, 2, 1, 0) == LR == step.lr
    assert abs(step.loss - loss) < 1e-5, (step.loss, loss)
    off = difference(trained, truth), difference(target, truth_target)
    assert max(off) < 1e-5, f"parameters differ by {off}"
    unshuffled = difference(trained, by_hand(world, shuffled=False)[0])
    assert unshuffled > 1e-4, "this check would not notice a missing shuffle"

    paths, x = space.paths(0, []), torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    batches = [(x[:5], x[3:]), (x[1:4], x[4:7]), (x[:5], x[2:7])]

    def rate(count: int, batch_count: int, most: int | None, **resume):
        return rate_block(online, target, predictor, 0, [], paths[:count], [x], Validation.held(batches[:batch_count]),
                          most=most, **resume)

    # more batches than ranks, fewer, units to share, an uneven share, a rank without work
    for count, batch_count, most in ((50, 3, None), (50, 1, 4), (5, 3, 2), (5, 1, None), (1, 1, None)):
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
    if rank == 0:
        print(f"equal within {max(off):.1e}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(dist.run(main, timeout_minutes=2))
