from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from bossnas import bootstrap, heads, spaces
from bossnas.ops import GroupedBatchNorm, Statistics
from bossnas.rate import best, calibrate, rate_block
from bossnas.supernet import Item, Supernet


def setup(name="nats", block=0):
    torch.manual_seed(0)
    space = spaces.make(name, width=0.125, image_size=32, restricted=True, split="cifar10")
    online = Supernet(space, 16, 8).double()
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
    predictor = heads.predictor(16, 8).double()
    images = torch.randn(2, 6, 3, 32, 32, dtype=torch.float64)
    calibration = [torch.randn(8, 3, 32, 32, dtype=torch.float64)]
    return space, online, target, predictor, images, calibration


def plain_copy(network: nn.Module) -> nn.Module:
    """The network with torch's own batch norms (momentum 1), to calibrate and evaluate the ordinary way."""
    network = copy.deepcopy(network)
    for module in network.modules():
        for name, child in module.named_children():
            if isinstance(child, GroupedBatchNorm):
                setattr(module, name, _Plain(child))
    return network


class _Plain(nn.BatchNorm2d):
    grouped = True

    def __init__(self, norm: GroupedBatchNorm):
        super().__init__(len(norm.weight), momentum=1.0, dtype=norm.weight.dtype)
        self.weight, self.bias, self.act = norm.weight, norm.bias, norm.act

    def _check_input_dim(self, x):
        pass

    def forward(self, x, groups=1, stats=None, residual=0):
        y = super().forward(x) + residual
        return {"none": lambda t: t, "relu": torch.relu, "silu": nn.functional.silu}[self.act](y)


def test_scores_equal_the_ordinary_procedure():
    """Calibrate torch's batch norms by a training-mode pass, evaluate, compare: METHOD 4 the long way, in float64."""
    space, online, target, predictor, (a, b), calibration = setup("mbconv")
    paths = space.paths(0, [])[:6]
    outputs = {}
    for path in paths:
        nets = [plain_copy(m) for m in (target, online, predictor)]
        t, o, q = nets
        with torch.no_grad():
            for net in nets:
                net.train()
            t.embed(0, [Item(path, calibration[0])])
            q(o.embed(0, [Item(path, calibration[0])])[0])
            for net in nets:
                net.eval()
            outputs[path] = [(t.embed(0, [Item(path, v)])[0], q(o.embed(0, [Item(path, v)])[0])) for v in (a, b)]
    centre_a, centre_b = (sum(outputs[p][v][0] for p in paths) / len(paths) for v in (0, 1))
    cos = nn.CosineSimilarity(dim=1)
    truth = {p: (-2 * cos(outputs[p][0][1], centre_b) - 2 * cos(outputs[p][1][1], centre_a)).mean().item()
             for p in paths}
    scores = rate_block(online, target, predictor, 0, [], paths, calibration, [(a, b)])
    assert list(scores) == paths
    assert [scores[p] for p in paths] == pytest.approx([truth[p] for p in paths], abs=1e-12)
    assert len(set(scores.values())) == len(paths) and best(scores) == min(truth, key=truth.get)


def test_batches_are_weighted_by_their_images():
    space, online, target, predictor, (a, b), calibration = setup()
    paths = space.paths(0, [])[:5]

    def scores(*cuts):
        return list(rate_block(online, target, predictor, 0, [], paths, calibration,
                               [(a[i:j], b[i:j]) for i, j in zip((0, *cuts), (*cuts, 6), strict=True)]).values())

    assert scores(4) == pytest.approx(scores(), abs=1e-12)
    assert scores(1, 2) == pytest.approx(scores(), abs=1e-12)


def test_later_blocks_are_rated_on_the_winners_of_earlier_ones():
    space, online, target, predictor, (a, b), calibration = setup(block=1)
    paths = space.paths(1, [(0, 0)])[::16]
    first, other = (rate_block(online, target, predictor, 1, [w], paths, calibration, [(a, b)])
                    for w in ((7, 7), (1, 2)))
    assert first != other
    with pytest.raises(AssertionError, match="prefix"):
        rate_block(online, target, predictor, 1, [(7, 7), (1, 1)], paths, calibration, [(a, b)])


def test_calibration_averages_batches_and_covers_the_predictor():
    space, online, target, predictor, _, _ = setup()
    path = (3, 4)
    batches = [torch.randn(8, 3, 32, 32, dtype=torch.float64) for _ in range(2)]
    of_target, of_online = calibrate(online, target, predictor, 0, path, batches)
    single = []
    for x in batches:
        stats = Statistics()
        target.embed(0, [Item(path, x)], stats)
        single.append(stats)
    for norm, (mean, var) in of_target.table.items():
        torch.testing.assert_close(mean, (single[0].table[norm][0] + single[1].table[norm][0]) / 2)
        torch.testing.assert_close(var, (single[0].table[norm][1] + single[1].table[norm][1]) / 2)
    mean, var = of_online.table[predictor[1]]
    assert mean.abs().max() > 1e-4 and not torch.allclose(var, torch.ones_like(var))


def test_rating_changes_no_weight_and_no_buffer():
    space, online, target, predictor, (a, b), calibration = setup()
    modules = nn.ModuleList([online, target, predictor])
    before = copy.deepcopy(modules.state_dict())
    rate_block(online, target, predictor, 0, [], space.paths(0, [])[:3], calibration, [(a, b)])
    assert all(torch.equal(v, before[k]) for k, v in modules.state_dict().items())


def test_centre_is_not_normalised_per_path():
    long, short = torch.tensor([[10.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    centre = bootstrap.population_centre([long, short])
    assert bootstrap.loss(long, centre) < -1.98
