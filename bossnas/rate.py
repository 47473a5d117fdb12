"""Rating: every path of a block against the population centre (METHOD 4; BossNAS, section 3.4).

The straightforward procedure, path by path, on cached prefix features. Lower scores are better.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from bossnas import bootstrap, dist
from bossnas.ops import Statistics
from bossnas.paths import Path
from bossnas.supernet import Item, Supernet

Calibration = tuple[Statistics, Statistics]  # of the target, and of the online network with its predictor


@torch.no_grad()
def calibrate(online: Supernet, target: Supernet, predictor: nn.Module, block: int, path: Path,
              features: Sequence[Tensor]) -> Calibration:
    """Batch-norm statistics of ``path``: one training-mode pass per calibration batch, averaged over the batches.

    ``features``: inputs of the block, [N, C, H, W] each. The predictor is calibrated too.
    """
    of_target, of_online = [], []
    for x in features:
        t, o = Statistics(), Statistics()
        target.embed(block, [Item(path, x)], t)
        predictor(online.embed(block, [Item(path, x)], o)[0], 1, o)
        of_target.append(t)
        of_online.append(o)
    return Statistics.average(of_target), Statistics.average(of_online)


@torch.no_grad()
def rate_block(online: Supernet, target: Supernet, predictor: nn.Module, block: int, winners: Sequence[Path],
               paths: Sequence[Path], calibration: Sequence[Tensor], validation: Iterable[Sequence[Tensor]], *,
               autocast: Callable[[], AbstractContextManager] = nullcontext,
               advance: Callable[[], None] = lambda: None) -> dict[Path, float]:
    """Scores every path of the block: mean over the images of l(o^A, c^B) + l(o^B, c^A), in [-4, 4].

    calibration: batches [N, 3, S, S] of one training view. validation: batches (view A, view B), each [n, 3, S, S].
    Both networks start from the target's frozen prefix along ``winners`` (those of the blocks before this one, never
    of this block itself). The paths are split over the ranks; all ranks return the same scores, to the bit those of
    one rank. ``advance`` is called once per calibrated path and once per rated batch and path.
    """
    assert len(winners) == block, "the prefix holds exactly the blocks before this one"
    mine = paths[dist.rank()::dist.world_size()] or paths[:1]  # a surplus rank keeps in step; its result is not used
    with autocast():
        inputs = [target.features(winners, x) for x in calibration]
        tables = []
        for path in mine:
            tables.append(calibrate(online, target, predictor, block, path, inputs))
            advance()
        total = torch.zeros(len(mine), dtype=torch.float64)
        images = 0
        for view_a, view_b in validation:
            x = target.features(winners, torch.cat([view_a, view_b]))
            targets, predictions = [], []
            for path, (of_target, of_online) in zip(mine, tables, strict=True):
                targets.append(bootstrap.full(target.embed(block, [Item(path, x)], of_target)[0]))
                o = online.embed(block, [Item(path, x)], of_online)[0]
                predictions.append(bootstrap.full(predictor(o, 1, of_online)))
                advance()
            centre_a, centre_b = _centre(targets, len(paths)).chunk(2)
            for i, o in enumerate(predictions):
                o_a, o_b = o.chunk(2)
                total[i] += bootstrap.path_loss(o_a, o_b, centre_a, centre_b).double().sum().item()
            images += len(view_a)
    return dict(zip(paths, _interleave(total / images, len(paths)), strict=True))


def _centre(targets: list[Tensor], count: int) -> Tensor:
    """Population centre over all ranks' paths, summed in the order of the paths whatever the number of ranks."""
    world = dist.world_size()
    if world == 1:
        return bootstrap.population_centre(targets)
    slots = targets + [torch.zeros_like(targets[0])] * (-(-count // world) - len(targets))
    gathered = dist.all_gather(torch.stack(slots))
    return bootstrap.population_centre([gathered[p % world][p // world] for p in range(count)])


def _interleave(mine: Tensor, count: int) -> list[float]:
    """All paths' scores in order, from each rank's share."""
    world = dist.world_size()
    slots = torch.zeros(-(-count // world), dtype=torch.float64)
    slots[:len(mine)] = mine
    gathered = dist.all_gather(slots)
    return [gathered[p % world][p // world].item() for p in range(count)]


def best(scores: dict[Path, float]) -> Path:
    """The path with the lowest score; of equal ones the first."""
    return min(scores, key=scores.__getitem__)
