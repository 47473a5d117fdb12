"""Rating: every path of a block, in batches over a trie of paths (METHOD 4 and 8; BossNAS, section 3.4).

The frozen prefix runs once per batch; a node of the trie (a choice after the same choices) is calibrated once and
evaluated once per validation batch, both views together, in one batch with all nodes that use the same candidate. The
paths are cut into units, each computed at once. What is in a unit depends on the paths and the memory budget alone, so
the scores are the same to the bit for any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bossnas.distributed import dist
from bossnas.spaces.ops import Statistics
from bossnas.spaces.paths import Choices
from bossnas.supernet import losses, scores
from bossnas.supernet.supernet import Item, Networks, Supernet
from bossnas.supernet.units import Unit, units

Pair = Sequence[Tensor]  # view A and view B of some images, each [n, 3, S, S]
Pieces = dict[tuple[str, int, int], Tensor]  # ("target" | "online" | "sum", validation batch, unit) -> results
GROUPS = 64  # of validation images, at least, where there are as many: a standard error is then known to 9 %


class Validation(NamedTuple):
    """Validation images in batches: how many each batch holds, and how to get some of the batches, in order."""

    sizes: Sequence[int]
    take: Callable[[Sequence[int]], Iterable[Pair]]

    @classmethod
    def held(cls, pairs: Sequence[Pair]) -> Validation:
        """Of batches that are in memory."""
        return cls([len(a) for a, _ in pairs], lambda batches: (pairs[b] for b in batches))


class Rated(NamedTuple):
    """What `rate_block` finds: the scores, and what groups of the validation images say of them.

    ``scores``: by score and path; ``parts``: by score, each path's mean over each group, float64 [paths, groups], whose
    mean weighted by ``images``, the size of the groups, is the score. Blocks that are rated on the same images have the
    same groups.
    """

    scores: dict[str, dict[Choices, float]]
    parts: dict[str, Tensor]
    images: list[int]


@dataclass(frozen=True)
class RatingOptions:
    """``temperature``: of instance discrimination; ``most``: paths of a unit at most (None: all); ``autocast``: makes
    the context of the forward passes."""

    temperature: float = 0.2
    most: int | None = None
    autocast: Callable[[], AbstractContextManager] = nullcontext


@torch.no_grad()
def calibrate(
    networks: Networks,
    block: int,
    paths: Sequence[Choices],
    chosen: Sequence[Unit],
    features: Iterable[Tensor],
) -> tuple[Statistics, Statistics]:
    """Batch-norm statistics of every node of the units: a training-mode pass per batch, averaged over the batches.

    ``features``: inputs of the block, [N, C, H, W] each. -> those of the target, and of the online network with the
    predictor, which is calibrated too.
    """
    online, target, predictor = networks
    of_target, of_online = [], []
    for x in features:
        of_target.append(Statistics())
        for unit, items, ends in _features(target, block, paths, chosen, x, of_target[-1]):
            target.project(block, items, ends, of_target[-1].at(unit), last=False)
        of_online.append(Statistics())
        for unit, items, ends in _features(online, block, paths, chosen, x, of_online[-1]):
            stats = of_online[-1].at(unit)
            _predict(predictor[:-1], online.project(block, items, ends, stats), stats)
    return Statistics.average(of_target), Statistics.average(of_online)


@torch.no_grad()
def rate_block(
    networks: Networks,
    winners: Sequence[Choices],
    paths: Sequence[Choices],
    calibration: Iterable[Tensor],
    validation: Validation,
    how: RatingOptions | None = None,
    *,
    pieces: Pieces | None = None,
    advance: Callable[[Pieces, int], None] = lambda pieces, paths: None,
) -> Rated:
    """Every label-free score (`bossnas.supernet.scores`) of every path of the block behind ``winners``, a mean over the
    validation images.

    calibration: batches [N, 3, S, S] of one training view. Both networks start from the target's frozen prefix along
    ``winners`` (those of the blocks before this one, never of this block itself). Instance discrimination, view
    agreement and effective rank are those of the target network, within each batch.

    Ranks rate different batches, and where there are fewer batches than ranks, different units; all return the same
    scores, to the bit those of one rank. ``pieces`` is what an earlier call has already rated, with the same units;
    ``advance(pieces, n)`` is called with all pieces so far whenever n more paths have been calibrated or have passed
    one network for one batch, on all ranks alike.
    """
    how = how or RatingOptions()
    target = networks.target
    rating = _Rating(
        networks,
        len(winners),
        paths,
        # not cut by ranks: a product over another batch may round otherwise, and scores would depend on the ranks
        units(paths, how.most or len(paths)),
        how.temperature,
        grouped(validation.sizes),
        Statistics(recording=False),
        Statistics(recording=False),
    )
    pieces = dict(pieces or {})
    count, rank, world = len(validation.sizes), dist.rank(), dist.world_size()
    pending = [b for b in range(count) if len(rating.missing(pieces, "online", b))]
    # a wave gives each rank a batch; in a short last one several ranks divide the units of a batch. All ranks go
    # through the waves in step, since they exchange what they find
    waves = [pending[i : i + world] for i in range(0, len(pending), world)]
    mine = [wave[rank % len(wave)] for wave in waves]
    calibrated: set[int] = set()
    with how.autocast():
        for wave, views in zip(waves, validation.take(mine), strict=True):
            batch = wave[rank % len(wave)]
            shares = {
                network: [
                    _share(rating.missing(pieces, network, wave[r % len(wave)]), r, world, len(wave))
                    for r in range(world)
                ]
                for network in ("target", "online")
            }
            rating.calibrate(
                {u for of_ranks in shares.values() for u in of_ranks[rank]},
                lambda: (target.features(winners, x) for x in calibration),
            )
            new = {u for of_ranks in shares.values() for share in of_ranks for u in share} - calibrated
            calibrated |= new
            advance(pieces, sum(len(rating.units[u].rows) for u in new))
            x = target.features(winners, torch.cat(list(views)))
            # target first, on all ranks: the population centre needs the projections of all paths (METHOD 4)
            for network, of_ranks in shares.items():
                results = rating.run(network, batch, of_ranks[rank], x, pieces)
                # as many exchanges as the longest share has units: a rank that is done must still take part in each
                for _ in range(max(map(len, of_ranks))):
                    found: Pieces = {}
                    for piece in dist.all_gather_object(next(results, {})):
                        found |= piece
                    pieces |= found
                    advance(pieces, sum(len(value) for (kind, *_), value in found.items() if kind != "sum"))
            for b in wave:  # its centre is not needed any more
                for u in range(len(rating.units)):
                    pieces.pop(("sum", b, u), None)
    return rating.collect(pieces)


@dataclass
class _Rating:
    """A rating at work; the statistics of a unit are kept from its first batch on."""

    networks: Networks
    block: int
    paths: Sequence[Choices]
    units: list[Unit]
    temperature: float
    groups: list[list[int]]  # the sizes of each batch's groups of images
    of_target: Statistics
    of_online: Statistics

    def missing(self, pieces: Pieces, network: str, batch: int) -> list[int]:
        """Numbers of the units that the network has not rated for the batch."""
        return [u for u in range(len(self.units)) if (network, batch, u) not in pieces]

    def calibrate(self, wanted: Iterable[int], features: Callable[[], Iterable[Tensor]]) -> None:
        """Calibrates those of the wanted units that are not yet."""
        new = [self.units[u] for u in sorted(wanted) if self.units[u] not in self.of_target.parts]
        if new:
            found = calibrate(self.networks, self.block, self.paths, new, features())
            self.of_target.parts.update(found[0].parts)
            self.of_online.parts.update(found[1].parts)

    def run(self, network: str, batch: int, share: Sequence[int], x: Tensor, pieces: Pieces) -> Iterator[Pieces]:
        """Rates the units of a share one after another. ``x``: the block's input of both views, [2n, C, H, W]."""
        networks = self.networks
        chosen, number = [self.units[u] for u in share], {self.units[u]: u for u in share}
        if network == "target":
            for unit, items, features in _features(networks.target, self.block, self.paths, chosen, x, self.of_target):
                projections = networks.target.project(self.block, items, features, self.of_target.at(unit))
                u, t = number[unit], losses.full(torch.stack(projections))
                pooled = [losses.full(f.mean((2, 3))) for f in features]
                # the centre needs the sum alone: [2n, D] travels and is kept, not [P, 2n, D]
                yield {
                    ("target", batch, u): self._view_scores(batch, t, pooled).cpu(),
                    ("sum", batch, u): t.sum(0).cpu(),
                }
        elif share:
            # added in the order of the units, whichever rank made them: a float sum's last bits depend on its order
            sums = [pieces["sum", batch, u] for u in range(len(self.units))]
            centres = (torch.stack(sums).sum(0) / len(self.paths)).to(x.device).chunk(2)
            for unit, items, features in _features(networks.online, self.block, self.paths, chosen, x, self.of_online):
                stats = self.of_online.at(unit)
                projections = networks.online.project(self.block, items, features, stats)
                o = losses.full(_predict(networks.predictor, projections, stats))
                a, b = o.view(len(projections), -1, o.shape[1]).chunk(2, 1)
                score = self._means(batch, scores.population_centre(a, b, *centres)[:, None])
                yield {("online", batch, number[unit]): score.cpu()}

    def _view_scores(self, batch: int, t: Tensor, pooled: Sequence[Tensor]) -> Tensor:
        """The scores in BETTER's order, but for the first: of projections [P, 2n, D] and P averaged maps [2n, C], whose
        widths may differ. -> [P, 5, groups]."""
        a, b = t.chunk(2, 1)
        views = [p[None].chunk(2, 1) for p in pooled]
        rows = [
            scores.instance_discrimination(a, b, self.temperature),
            torch.cat([scores.instance_discrimination(x, y, self.temperature) for x, y in views]),
            scores.view_agreement(a, b),
            torch.cat([scores.view_agreement(x, y) for x, y in views]),
            scores.effective_rank(a, b),
        ]
        return self._means(batch, torch.stack(rows, 1))

    def _means(self, batch: int, parts: Tensor) -> Tensor:
        """[..., n] -> the means over the batch's groups of images, float64 [..., groups]."""
        # at random: neighbours may be of one class, and means of classes lie further apart than those of any images
        order = torch.randperm(parts.shape[-1], generator=torch.Generator().manual_seed(0)).to(parts.device)
        return torch.stack([group.mean(-1) for group in parts.double()[..., order].split(self.groups[batch], -1)], -1)

    def collect(self, pieces: Pieces) -> Rated:
        """The means over the images, summed in the order of the batches."""
        # float64, and added group by group whoever rated them: the same bits on any number of ranks, and after a resume
        images = [size for groups in self.groups for size in groups]
        parts = torch.zeros(len(self.paths), len(scores.BETTER), len(images), dtype=torch.float64)
        start = 0
        for batch, groups in enumerate(self.groups):
            for u, unit in enumerate(self.units):
                piece = torch.cat([pieces["online", batch, u], pieces["target", batch, u]], 1)
                parts[list(unit.rows), :, start : start + len(groups)] = piece
            start += len(groups)
        means = (parts @ torch.tensor(images, dtype=torch.float64) / sum(images)).T.tolist()
        return Rated(
            {
                name: dict(zip(self.paths, values, strict=True))
                for name, values in zip(scores.BETTER, means, strict=True)
            },
            dict(zip(scores.BETTER, parts.unbind(1), strict=True)),
            images,
        )


def grouped(sizes: Sequence[int]) -> list[list[int]]:
    """The sizes of the groups into which each batch's images are dealt out: as equal as they can be, at least one
    for each batch, and together GROUPS or a few more."""
    count = max(1, -(-GROUPS // max(1, len(sizes))))
    result = []
    for size in sizes:
        groups = max(1, min(count, size))
        result.append([size * (g + 1) // groups - size * g // groups for g in range(groups)])
    return result


def _features(
    network: Supernet, block: int, paths: Sequence[Choices], chosen: Sequence[Unit], x: Tensor, stats: Statistics | None
) -> Iterator[tuple[Unit, list[Item], list[Tensor]]]:
    """Each unit with its items and their features; the layers of a unit's prefix run once for all units behind it."""

    def at(place: Hashable) -> Statistics | None:
        return None if stats is None else stats.at(place)

    if not chosen:
        return
    trail = [network.enter(block, x, at("stem"))]
    here: Choices = ()
    for unit in chosen:
        depth = next(
            (d for d, (a, b) in enumerate(zip(here, unit.prefix, strict=False)) if a != b),
            min(len(here), len(unit.prefix)),
        )
        del trail[depth + 1 :]
        while depth < len(unit.prefix):
            node = unit.prefix[: depth + 1]
            trail += network(block, [Item(node, trail[-1])], at(node), start=depth, stop=depth + 1)
            depth += 1
        here, items = unit.prefix, [Item(paths[row], trail[-1]) for row in unit.rows]
        yield unit, items, network(block, items, at(unit), start=depth)


def _predict(predictor: nn.Module, projections: Sequence[Tensor], stats: Statistics) -> Tensor:
    """Predictions of all paths of a unit in one batch, [paths * rows, D]."""
    return predictor(torch.cat(list(projections)), len(projections), stats.at("predictor"))


def _share(pending: Sequence[int], rank: int, world: int, batches: int) -> list[int]:
    """The rank's part of a batch's units: those ranks that work on one batch take neighbouring units."""
    team = range(rank % batches, world, batches)
    member, size = team.index(rank), len(pending)
    return list(pending[size * member // len(team) : size * (member + 1) // len(team)])


def best(values: dict[Choices, float], better: str = "lower") -> Choices:
    """The path with the best value; of equal ones the first. ``better``: lower | higher."""
    return (min if better == "lower" else max)(values, key=values.__getitem__)
