from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bossnas import spaces
from bossnas.spaces import nats
from bossnas.spaces.ops import Attention, GroupedBatchNorm, PooledPointwise, Statistics, conv
from bossnas.supernet.supernet import Item, Supernet


def make(name, seed=0):
    torch.manual_seed(seed)
    space = spaces.make(name, width=0.125, image_size=32, restricted=True, split="cifar10")
    return space, Supernet(space, 16, 8).double()


def randomise_gammas(net):
    for module in net.modules():
        if isinstance(module, GroupedBatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)


@pytest.mark.parametrize("name", ["hytra", "mbconv", "nats"])
def test_many_items_equal_one_by_one_with_gradients(name):
    space, net = make(name)
    randomise_gammas(net)
    x = [torch.randn(3, 3, 32, 32, dtype=torch.float64) for _ in range(2)]
    paths = space.sample(0, [], np.random.default_rng(1))
    paths.append(paths[0])  # an item twice: computed once
    items = [Item(p, v) for p in paths for v in x]
    weights = [torch.randn(3, 8, dtype=torch.float64) for _ in items]

    def gradients(outputs):
        net.zero_grad()
        sum((w * o).sum() for w, o in zip(weights, outputs, strict=True)).backward()
        return {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}

    together = net.embed(0, items)
    alone = [net.embed(0, [item])[0] for item in items]
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    many, single = gradients(together), gradients(alone)
    assert many.keys() == single.keys()
    for key in many:
        torch.testing.assert_close(many[key], single[key], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", ["hytra", "mbconv", "nats"])
def test_frozen_blocks_run_once_over_all_views(name):
    """Whichever images share a call, and with norms that convolutions have taken over; a change of weights is seen."""
    space, net = make(name)
    randomise_gammas(net)
    for module in net.modules():
        if isinstance(module, GroupedBatchNorm):
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    winners = []
    for block in range(2):
        winners.append(space.paths(block, winners)[7])
        net.freeze(block)
    views = [torch.randn(3, 3, 32, 32, dtype=torch.float64) for _ in range(4)]
    views = [x.contiguous(memory_format=torch.channels_last) for x in views]

    def compare(network):
        expected = [network.features(winners, x) for x in views]
        for most in (1, 5, 12):
            given = network.features_of_views(winners, views, most)
            for a, b in zip(given, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        return expected

    before = compare(net)
    copied = copy.deepcopy(net)
    with torch.no_grad():
        for tensor in (*copied.parameters(), *copied.buffers()):
            tensor.mul_(1.25)
    after = compare(copied)
    assert not torch.allclose(before[0], after[0])
    torch.testing.assert_close(compare(net), before)
    assert net.features_of_views([], views, 2) is views


@pytest.mark.quick
def test_groups_inside_an_item_are_normalised_alone():
    space, net = make("hytra")
    path = space.paths(0, [])[3]
    a, b = (torch.randn(3, 3, 32, 32, dtype=torch.float64) for _ in range(2))
    both = net.embed(0, [Item(path, torch.cat([a, b]), groups=2)])[0]
    alone = torch.cat([net.embed(0, [Item(path, v)])[0] for v in (a, b)])
    torch.testing.assert_close(both, alone, rtol=1e-9, atol=1e-9)
    mixed = net.embed(0, [Item(path, torch.cat([a, b]))])[0]
    assert not torch.allclose(both, mixed)


@pytest.mark.quick
def test_shared_prefixes_are_computed_once():
    space, net = make("hytra")
    calls = []
    for layer in net.blocks[0]:
        layer.register_forward_hook(lambda m, args, out: calls.append(len(args[0])))
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    net(0, [Item((5, 4, 3, 3), x), Item((5, 4, 3, 1), x), Item((5, 4, 3, 3), x)])
    assert calls == [2, 2, 2, 2, 2]  # three shared layers, then the two different last candidates


@pytest.mark.parametrize("name", ["hytra", "mbconv", "nats"])
def test_recorded_statistics_repeat_the_recorded_pass(name):
    space, net = make(name)
    randomise_gammas(net)
    path = space.paths(0, [])[5]
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    pixels = {}

    def note(module, args, _):
        pixels[getattr(module, "norm", module)] = args[0].numel() / args[0].shape[1]

    for module in net.modules():
        if isinstance(module, GroupedBatchNorm | PooledPointwise):
            module.register_forward_hook(note)
    stats = Statistics()
    first = net.embed(0, [Item(path, x)], stats)[0]
    recorded = Statistics.average([stats])
    again = net.embed(0, [Item(path, x)], recorded)[0]
    assert not torch.equal(first, again)  # the recorded variance is unbiased, the normalising one is not
    for place, part in stats.parts.items():
        for norm, (mean, var) in part.table.items():
            recorded.parts[place].table[norm] = (mean, var * (1 - 1 / pixels[norm]))
    torch.testing.assert_close(net.embed(0, [Item(path, x)], recorded)[0], first, rtol=1e-9, atol=1e-9)
    again = net.embed(0, [Item(path, x)], recorded)[0]
    half = net.embed(0, [Item(path, x[:2])], recorded)[0]
    torch.testing.assert_close(half, again[:2], rtol=1e-9, atol=1e-9)  # an image no longer depends on its batch


def test_written_statistics_serve_evaluation_mode():
    space, net = make("hytra")
    path = space.paths(0, [])[5]
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    stats = Statistics()
    net.embed(0, [Item(path, x)], stats)
    recorded = Statistics.average([stats])
    recorded.write()
    net.freeze(0)
    torch.testing.assert_close(net.features([path], x), net(0, [Item(path, x)], recorded)[0])
    assert not any(p.requires_grad for p in net.part(0).parameters())


def test_batch_norm_against_torch():
    norm, truth = GroupedBatchNorm(5).double(), nn.BatchNorm2d(5, momentum=1.0).double()
    x = torch.randn(6, 5, 4, 4, dtype=torch.float64)
    stats = Statistics()
    torch.testing.assert_close(norm(x, 1, stats), truth(x))
    mean, var = stats.table[norm]
    torch.testing.assert_close(mean[0], truth.running_mean)
    torch.testing.assert_close(var[0], truth.running_var)


@pytest.mark.parametrize("groups", [1, 3])
def test_pooled_pointwise_equals_the_plain_chain(groups):
    torch.manual_seed(0)
    module = PooledPointwise(4, 10).double()
    nn.init.uniform_(module.norm.weight, 0.5, 1.5)
    x = torch.randn(6, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    stats, plain = Statistics(), Statistics()
    out = module(x, groups, stats)
    truth = module.norm(module.conv(x), groups, plain).mean((2, 3))
    torch.testing.assert_close(out, truth)
    for a, b in zip(stats.table[module.norm], plain.table[module.norm], strict=True):
        torch.testing.assert_close(a, b)
    weight = torch.randn_like(out)
    ours = torch.autograd.grad((out * weight).sum(), [x, module.conv.weight, module.norm.weight])
    theirs = torch.autograd.grad((truth * weight).sum(), [x, module.conv.weight, module.norm.weight])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    used, plain = Statistics.average([stats]), Statistics.average([plain])
    if groups == 1:
        torch.testing.assert_close(module(x, 1, used), module.norm(module.conv(x), 1, plain).mean((2, 3)))


@pytest.mark.quick
def test_attention_mixes_over_keys():
    """out_i = sum_j A_ij v_j, not the original supernet's transposed product."""
    torch.manual_seed(0)
    attention = Attention(128).double()
    x = torch.randn(2, 128, 3, 3, dtype=torch.float64)
    q, k, v = attention.qkv(x).flatten(2).view(2, 3, 2, 64, 9).unbind(1)
    weights = (torch.einsum("bhdi,bhdj->bhij", q, k) / 8).softmax(-1)
    truth = torch.einsum("bhij,bhdj->bhdi", weights, v).reshape(2, 128, 3, 3)
    torch.testing.assert_close(attention(x), truth)


@pytest.mark.quick
def test_nats_normal_cell_against_its_definition():
    torch.manual_seed(0)
    cell = nats._Normal((2, 4)).double()
    x = torch.randn(3, 2, 6, 6, dtype=torch.float64)

    def op(edge, node, kernel=1):
        module = cell.ops[edge] if edge else cell.skip
        y = F.conv2d(F.relu(node), module.conv.weight[:4, : node.shape[1]], padding=kernel)
        return F.batch_norm(y, None, None, module.norms[1].weight, module.norms[1].bias, True)

    n1 = op("01", x)
    n2 = op("02", x) + op("12", n1)
    torch.testing.assert_close(cell(x, 1), op("", x, 0) + op("13", n1) + op("23", n2))
    same = torch.randn(3, 4, 6, 6, dtype=torch.float64)
    n1 = op("01", same)
    torch.testing.assert_close(cell(same, 1), same + op("13", n1) + op("23", op("02", same) + op("12", n1)))


@pytest.mark.quick
def test_hytra_candidate_against_its_definition():
    """Same-scale convolution and down-scale attention entry, written out with torch's own functions."""
    space, net = make("hytra")
    randomise_gammas(net)
    candidate = net.blocks[0][1].candidates[3]  # CONV at scale 1
    x = torch.randn(3, 4 * space.inner(1), 4, 4, dtype=torch.float64)

    def bn(y, norm):
        return F.batch_norm(y, None, None, norm.weight, norm.bias, True)

    def body(entry, y):
        y = F.conv2d(y, entry[0].weight)
        stride = entry[1].stride
        y = bn(F.conv2d(y, entry[1].weight, entry[1].bias, stride, 1, groups=y.shape[1]), entry[2])
        mix, norm1, last, norm2 = candidate.body
        y = bn(F.conv2d(F.relu(y), mix.weight, padding=1), norm1)
        return bn(F.conv2d(F.relu(y), last.weight), norm2)

    torch.testing.assert_close(candidate(x), F.relu(body(candidate.same, x) + x))
    x = torch.randn(3, 4 * space.inner(2), 8, 8, dtype=torch.float64)
    shortcut = candidate.down_shortcut
    residual = F.relu(bn(F.conv2d(x, shortcut[0].weight, stride=2, padding=1), shortcut[1]))
    torch.testing.assert_close(candidate(x), F.relu(body(candidate.down, x) + residual))


def test_last_gammas_start_at_zero():
    _, net = make("hytra")
    zero = [m for m in net.modules() if isinstance(m, GroupedBatchNorm) and not m.weight.any()]
    assert len(zero) == 4 * (6 + 5 + 4 + 4)


@pytest.mark.quick
def test_target_is_a_copy():
    _, net = make("nats")
    target = copy.deepcopy(net)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), target.parameters(), strict=True))


@pytest.mark.parametrize("name", ["hytra", "mbconv", "nats"])
def test_statistics_of_many_paths_are_those_of_each(name):
    """Recorded together, every path evaluates as when it was recorded alone; layers may be split off in front."""
    space, net = make(name)
    randomise_gammas(net)
    paths = space.paths(0, [])[::7]
    x, images = (torch.randn(n, 3, 32, 32, dtype=torch.float64) for n in (4, 3))
    together = Statistics()
    net.embed(0, [Item(p, x) for p in paths], together)
    together = Statistics.average([together])
    found = net.embed(0, [Item(p, images) for p in paths], together)
    for path, ours in zip(paths, found, strict=True):
        alone = Statistics()
        net.embed(0, [Item(path, x)], alone)
        truth = net.embed(0, [Item(path, images)], Statistics.average([alone]))[0]
        torch.testing.assert_close(ours, truth, rtol=1e-11, atol=1e-11)
    entered = net.enter(0, images)
    first = net(0, [Item(paths[0], entered)], start=0, stop=1)[0]
    rest = net(0, [Item(paths[0], first)], start=1)[0]
    torch.testing.assert_close(rest, net(0, [Item(paths[0], images)])[0])


def test_a_wide_convolution_of_a_small_map_is_a_convolution():
    torch.manual_seed(0)
    wide = conv(6, 128, 3, 2).double()
    for size, layout in ((4, torch.channels_last), (5, torch.contiguous_format), (16, torch.channels_last)):
        x = torch.randn(3, 6, size, size, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
        y, truth = wide(x), F.conv2d(x, wide.weight, None, 2, 1)
        torch.testing.assert_close(y, truth)
        weight = torch.randn_like(truth)
        for a, b in zip(*(torch.autograd.grad((t * weight).sum(), [x, wide.weight]) for t in (y, truth)), strict=True):
            torch.testing.assert_close(a, b)


def test_projections_without_the_last_layer_are_the_hidden_units():
    space, net = make("nats")
    items = [Item(path, torch.randn(2, 3, 32, 32, dtype=torch.float64)) for path in ((0, 1), (7, 3))]
    features = net.forward(0, items)
    hidden = net.project(0, items, features, last=False)
    assert [tuple(rows.shape) for rows in hidden] == [(2, 16)] * 2
    for rows, whole in zip(hidden, net.project(0, items, features), strict=True):
        assert torch.allclose(net.projectors[0].mlp[-1](rows), whole)
