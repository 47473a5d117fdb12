from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

from bossnas import spaces
from bossnas.spaces.ops import GroupedBatchNorm, PooledPointwise, Statistics
from bossnas.supernet import heads
from bossnas.supernet.memory import Footprint, peak_bytes
from bossnas.supernet.rate_block import (
    GROUPS,
    RatingOptions,
    Validation,
    _features,
    best,
    calibrate,
    grouped,
    rate_block,
)
from bossnas.supernet.scores import BETTER
from bossnas.supernet.supernet import Item, Networks, Supernet
from bossnas.supernet.units import Unit, units


def setup(name="nats", block=0, dtype=torch.float64, images=6, size=32, width=0.125, hidden=16, out=8):
    torch.manual_seed(0)
    space = spaces.make(name, width=width, image_size=size, restricted=True, split="cifar10")
    online = Supernet(space, hidden, out).to(dtype)
    for module in online.modules():
        if isinstance(module, GroupedBatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    target = copy.deepcopy(online).requires_grad_(False)
    with torch.no_grad():
        for p in target.parameters():
            p.add_(0.05 * torch.randn_like(p))
    for b in range(block):
        online.freeze(b)
        target.freeze(b)
    predictor = heads.predictor(hidden, out).to(dtype)
    images = torch.randn(2, images, 3, size, size, dtype=dtype)
    calibration = [torch.randn(8, 3, size, size, dtype=dtype)]
    return space, online, target, predictor, images, calibration


def first_winners(space, block):
    winners = []
    for b in range(block):
        winners.append(space.paths(b, winners)[0])
    return winners


def scored(networks, block, winners, paths, calibration, pairs, **how):
    assert len(winners) == block, "the block is the one behind the winners"
    rest = {name: how.pop(name) for name in ("pieces", "advance") if name in how}
    return rate_block(
        Networks(*networks), winners, paths, calibration, Validation.held(pairs), RatingOptions(**how), **rest
    ).scores


def plain_copy(network: nn.Module) -> nn.Module:
    """The network with torch's own batch norms (momentum 1), to calibrate and evaluate the ordinary way."""
    network = copy.deepcopy(network)
    for module in network.modules():
        for name, child in module.named_children():
            if isinstance(child, GroupedBatchNorm):
                setattr(module, name, _Plain(child))
            elif isinstance(child, PooledPointwise):
                setattr(module, name, _PlainPooled(child.conv, _Plain(child.norm)))
    return network


class _Plain(nn.BatchNorm2d):
    grouped = True

    def __init__(self, norm: GroupedBatchNorm):
        super().__init__(len(norm.weight), momentum=1.0, dtype=norm.weight.dtype)
        self.weight, self.bias, self.act = norm.weight, norm.bias, norm.act

    def _check_input_dim(self, x):
        pass

    def forward(self, x, groups=1, stats=None, residual=None):
        y = super().forward(x) + (0 if residual is None else residual)
        return {"none": lambda t: t, "relu": torch.relu, "silu": nn.functional.silu}[self.act](y)


class _PlainPooled(nn.Sequential):
    grouped = True

    def forward(self, x, groups=1, stats=None):
        return super().forward(x).mean((2, 3))


def ordinary(networks, block, winners, paths, calibration, pairs):
    """METHOD 4 the long way, path by path: torch's batch norms, a training-mode pass, then evaluation."""
    outputs = {}
    for path in paths:
        nets = o, t, q = [plain_copy(m) for m in networks]
        prefix = [networks[1].features(winners, x) for x in (calibration[0], *itertools.chain(*pairs))]
        with torch.no_grad():
            for net in nets:
                net.train()
            t.embed(block, [Item(path, prefix[0])])
            q(o.embed(block, [Item(path, prefix[0])])[0])
            for net in nets:
                net.eval()
            outputs[path] = [
                (
                    t.embed(block, [Item(path, x)])[0],
                    q(o.embed(block, [Item(path, x)])[0]),
                    t(block, [Item(path, x)])[0].mean((2, 3)),
                )
                for x in prefix[1:]
            ]
    cos, scores = nn.CosineSimilarity(dim=1), {name: dict.fromkeys(paths, 0.0) for name in BETTER}
    images = sum(len(a) for a, _ in pairs)
    for batch in range(len(pairs)):
        views = {p: outputs[p][2 * batch : 2 * batch + 2] for p in paths}
        centre_a, centre_b = (sum(views[p][v][0] for p in paths) / len(paths) for v in (0, 1))
        for p in paths:
            (t_a, o_a, z_a), (t_b, o_b, z_b) = views[p]
            n = len(t_a)
            both = torch.cat([t_a, t_b]).double()
            sigma = torch.linalg.svdvals(both - both.mean(0))
            share = sigma[sigma > 1e-6 * sigma[0]] / sigma[sigma > 1e-6 * sigma[0]].sum()
            found = {
                "population_centre": (-2 * cos(o_a, centre_b) - 2 * cos(o_b, centre_a)).mean().item(),
                "instance_discrimination": told_apart(t_a, t_b, cos),
                "pooled_instance_discrimination": told_apart(z_a, z_b, cos),
                "view_agreement": cos(t_a, t_b).mean().item(),
                "pooled_view_agreement": cos(z_a, z_b).mean().item(),
                "effective_rank": (-(share * share.log()).sum()).exp().item(),
            }
            for name, value in found.items():
                scores[name][p] += value * n / images
    return scores


def told_apart(a, b, cos):
    """Instance discrimination at temperature 0.2, image by image."""
    table = torch.tensor([[cos(x[None], y[None]).item() / 0.2 for y in b] for x in a], dtype=torch.float64)
    rows = [table[i, i] - table[i].logsumexp(0) for i in range(len(a))]
    columns = [table[i, i] - table[:, i].logsumexp(0) for i in range(len(a))]
    return (sum(rows) + sum(columns)).item() / (2 * len(a))


@pytest.mark.parametrize(
    "name, block", [("mbconv", 0), ("mbconv", 1), ("hytra", 0), ("hytra", 1), ("nats", 0), ("nats", 2)]
)
def test_scores_equal_the_ordinary_procedure(name, block):
    """Every score, together in one unit and cut into small ones, in float64 and in float32."""
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        size, width = (32, 0.5) if name == "nats" else (64, 0.125)
        # with 8 dimensions, float32 rounds the direction of an embedding by more than the limit
        made = setup(name, block, dtype, 8, size, width, hidden=128, out=64)
        space, online, target, predictor, (a, b), calibration = made
        winners = first_winners(space, block)
        paths = space.paths(block, winners)
        paths = paths[:: max(1, len(paths) // 6)]  # six or seven: three units of at most three
        nets, pairs = (online, target, predictor), [(a, b), (b[:5], a[:5])]
        truth = ordinary(nets, block, winners, paths, calibration, pairs)
        for most in (None, 3):
            scores = scored(nets, block, winners, paths, calibration, pairs, most=most)
            assert scores.keys() == BETTER.keys() and all(list(values) == paths for values in scores.values())
            for score, values in scores.items():
                scale = 8 if score == "effective_rank" else 1  # which goes up to 8, the others stay around 1
                assert list(values.values()) == pytest.approx(list(truth[score].values()), abs=scale * tolerance), score
                assert len(set(values.values())) == len(paths)
            found, expected = scores["population_centre"], truth["population_centre"]
            assert sorted(paths, key=found.get) == sorted(paths, key=expected.get)


def test_groups_of_images_add_up_to_the_scores():
    space, online, target, predictor, _, calibration = setup()
    paths = space.paths(0, [])[:5]
    a, b = torch.randn(2, 7, 3, *calibration[0].shape[2:], dtype=calibration[0].dtype)
    found = rate_block(
        Networks(online, target, predictor), [], paths, calibration, Validation.held([(a[:5], b[:5]), (a[5:], b[5:])])
    )
    assert found.images == [1] * 7  # fewer images than groups
    for name, values in found.scores.items():
        parts = found.parts[name]
        assert parts.shape == (5, 7) and parts.mean(1).tolist() == pytest.approx(list(values.values()))
        assert len(set(parts.flatten().tolist())) > 20
    # of a mean over images, each part is what an image gives alone
    alone = rate_block(
        Networks(online, target, predictor),
        [],
        paths,
        calibration,
        Validation.held([(a[i : i + 1], b[i : i + 1]) for i in range(7)]),
    ).parts
    for name in ("population_centre", "view_agreement"):
        for together, single in zip(found.parts[name].tolist(), alone[name].tolist(), strict=True):
            assert sorted(together) == pytest.approx(sorted(single), abs=1e-5)


@pytest.mark.parametrize("sizes", [[250] * 4, [32, 32, 7], [500], [20], [1], [10] * 200])
def test_groups_are_near_equal_and_enough(sizes):
    groups = grouped(sizes)
    assert [sum(of_batch) for of_batch in groups] == sizes
    assert all(max(of_batch) - min(of_batch) <= 1 and min(of_batch) > 0 for of_batch in groups)
    count = sum(map(len, groups))
    assert count >= min(GROUPS, sum(sizes)) or len(sizes) == 3 and count >= 7 + 22 + 22
    assert count < max(2 * GROUPS, len(sizes) + 1)


@pytest.mark.quick
def test_batches_are_weighted_by_their_images():
    space, online, target, predictor, (a, b), calibration = setup()
    paths = space.paths(0, [])[:5]

    def scores(*cuts):
        pairs = [(a[i:j], b[i:j]) for i, j in zip((0, *cuts), (*cuts, 6), strict=True)]
        found = scored((online, target, predictor), 0, [], paths, calibration, pairs)
        return [*found["population_centre"].values(), *found["view_agreement"].values()]

    assert scores(4) == pytest.approx(scores(), abs=1e-12)
    assert scores(1, 2) == pytest.approx(scores(), abs=1e-12)


@pytest.mark.quick
def test_later_blocks_are_rated_on_the_winners_of_earlier_ones():
    space, online, target, predictor, (a, b), calibration = setup(block=1)
    paths = space.paths(1, [(0, 0)])[::16]
    nets = (online, target, predictor)
    first, other = (scored(nets, 1, [w], paths, calibration, [(a, b)]) for w in ((7, 7), (1, 2)))
    assert first != other


def test_calibration_averages_batches_and_covers_the_predictor():
    space, online, target, predictor, _, _ = setup()
    paths, unit = [(3, 4)], Unit((), (0,))
    batches = [torch.randn(8, 3, 32, 32, dtype=torch.float64) for _ in range(2)]
    of_target, of_online = calibrate(Networks(online, target, predictor), 0, paths, [unit], batches)
    single = []
    for x in batches:
        stats = Statistics()
        target.embed(0, [Item(paths[0], x)], stats)
        single.append({norm: (mean, var) for norm, mean, var in stats.norms()})
    found = {norm: (mean, var) for norm, mean, var in of_target.norms()}
    assert found.keys() == single[0].keys()
    for norm, both in found.items():
        for i, value in enumerate(both):
            torch.testing.assert_close(value, (single[0][norm][i] + single[1][norm][i]) / 2)
    mean, var = next((mean, var) for norm, mean, var in of_online.norms() if norm is predictor[1])
    assert mean.abs().max() > 1e-4 and not torch.allclose(var, torch.ones_like(var))


@pytest.mark.quick
def test_rating_changes_no_weight_and_no_buffer():
    space, online, target, predictor, (a, b), calibration = setup()
    modules = nn.ModuleList([online, target, predictor])
    before = copy.deepcopy(modules.state_dict())
    scored((online, target, predictor), 0, [], space.paths(0, [])[:3], calibration, [(a, b)])
    assert all(torch.equal(v, before[k]) for k, v in modules.state_dict().items())


def test_every_node_is_computed_once(monkeypatch):
    """MBConv: 4 + 16 nodes of two layers, each once per calibration batch and once per validation batch and network."""
    space, online, target, predictor, (a, b), calibration = setup("mbconv")
    images = {0: 0, 1: 0}
    for network in (online, target):
        for depth, layer in enumerate(network.blocks[0]):
            layer.register_forward_hook(lambda m, args, y, d=depth: images.__setitem__(d, images[d] + len(args[0])))
    for most in (None, 4, 1):
        images.update({0: 0, 1: 0})
        scored((online, target, predictor), 0, [], space.paths(0, []), calibration, [(a, b), (b, a)], most=most)
        assert images == {0: 2 * 4 * (8 + 2 * 12), 1: 2 * 16 * (8 + 2 * 12)}


def test_a_rating_goes_on_from_its_pieces():
    space, online, target, predictor, (a, b), calibration = setup("hytra")
    paths, pairs = space.paths(0, [])[::3], [(a, b), (b, a), (a, a)]
    nets = (online, target, predictor)
    whole, counts = scored(nets, 0, [], paths, calibration, pairs, most=4), []
    for stop in (1, 7, 12, 19):
        kept, seen = {}, []

        class Cut(Exception):
            pass

        def until(pieces, count, stop=stop, seen=seen, kept=kept):
            seen.append(count)
            if len(seen) > stop:
                kept.update(pieces)
                raise Cut  # noqa: F821

        with pytest.raises(Cut):
            scored(nets, 0, [], paths, calibration, pairs, most=4, advance=until)
        rest = []
        again = scored(
            nets,
            0,
            [],
            paths,
            calibration,
            pairs,
            most=4,
            pieces=kept,
            advance=lambda pieces, count, rest=rest: rest.append(count),
        )
        assert again == whole
        counts.append(sum(rest))
    assert counts == sorted(counts, reverse=True) and counts[-1] < counts[0] - 2 * len(paths)


def test_the_temperature_changes_instance_discrimination_alone():
    space, online, target, predictor, (a, b), calibration = setup()
    args = (online, target, predictor), 0, [], space.paths(0, [])[:6], calibration, [(a, b)]
    usual, warm = scored(*args), scored(*args, temperature=1.0)
    assert {score for score in BETTER if usual[score] != warm[score]} == {
        "instance_discrimination",
        "pooled_instance_discrimination",
    }


@pytest.mark.parametrize("name, block", [("hytra", 0), ("hytra", 1), ("mbconv", 1), ("nats", 0), ("nats", 2)])
def test_units_are_a_cut_of_the_trie(name, block):
    space = spaces.make(name, width=0.125, image_size=32, restricted=True, split="cifar10")
    paths = space.paths(block, first_winners(space, block))
    for most in (1, 3, 7, 16, 1000):
        cut = units(paths, most)
        assert [row for unit in cut for row in unit.rows] == list(range(len(paths)))
        assert all(0 < len(unit.rows) <= most for unit in cut)
        assert all(paths[row][: len(unit.prefix)] == unit.prefix for unit in cut for row in unit.rows)
        # neighbours that could share a unit do: below one prefix no two of them fit together
        for one, two in itertools.pairwise(cut):
            assert one.prefix != two.prefix or len(one.rows) + len(two.rows) > most or most == 1


@pytest.mark.parametrize("name, block", [("hytra", 0), ("mbconv", 1), ("nats", 0)])
def test_units_keep_to_their_memory(name, block):
    """What a unit's tensors take at once, measured, is within what was computed for it, and that within the limit."""
    space, online, target, predictor, (a, b), _ = setup(name, block, torch.float32, images=32)
    winners = first_winners(space, block)
    paths = space.paths(block, winners)
    x = target.features(winners, torch.cat([a, b]))
    footprint = Footprint(target, block, paths, x[:4])
    sizes = []
    for limit in (2**20, 2**22, 2**24, 2**40):
        most = footprint.most(len(x), limit)
        assert most <= len(paths)
        for unit in units(paths, most) if most else ():
            with torch.no_grad():
                used = peak_bytes(
                    lambda u=unit: [
                        target.project(block, i, f) for _, i, f in _features(target, block, paths, [u], x, None)
                    ]
                )
            assert 0.2 * footprint.of(unit, len(x)) < used <= footprint.of(unit, len(x)) <= limit
        sizes.append(most)
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1] == len(paths)


def test_peak_bytes():
    def call():
        x = torch.ones(1000)
        y = x + 1
        del x
        z = y.view(10, 100) * 2  # a view takes nothing
        return z.sum()

    assert peak_bytes(call) == 8000 + 4


def test_the_better_value_wins():
    values = {(0,): 1.0, (1,): 3.0, (2,): 1.0, (3,): 3.0}
    assert best(values) == best(values, "lower") == (0,) and best(values, "higher") == (1,)
