from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bossnas import spaces
from bossnas.errors import ConfigError
from bossnas.networks.from_space import standalone
from bossnas.selection.ranking import proxies
from bossnas.spaces import cost
from bossnas.spaces.ops import Attention, GroupedBatchNorm, SlimConv
from bossnas.spaces.paths import decode
from bossnas.supernet.supernet import Item, Supernet

ARCHITECTURES = {"hytra": "5433|3230|0010|0000", "mbconv": "21|1023|3210|0123|1132", "nats": "74|33|2"}


def make(name, width=0.125):
    return spaces.make(name, width=width, image_size=32, restricted=True, split="cifar10")


def network(name="nats", width=0.125, seed=0, classes=10):
    torch.manual_seed(seed)
    paths = [decode(part) for part in ARCHITECTURES[name].split("|")]
    return standalone(make(name, width), paths, classes)


def small():
    """conv - batch norm - ReLU - pool - linear, with plain torch modules."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 5),
    ).double()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(8, 3, 6, 6, generator=generator, dtype=torch.float64),
        torch.randint(5, (8,), generator=generator),
    )


# ---- proxies by hand


def test_synflow_of_a_linear_network_is_the_sum_of_products():
    net = nn.Sequential(nn.Conv2d(3, 2, 1, bias=False), nn.Flatten(), nn.Linear(2, 4, bias=False))
    first, second = net[0].weight.detach().abs()[:, :, 0, 0].double(), net[2].weight.detach().abs().double()
    flow = sum(float(second[o, h] * first[h, i]) for o in range(4) for h in range(2) for i in range(3))
    assert proxies.synflow(net, torch.zeros(7, 3, 1, 1)) == pytest.approx(2 * flow)  # once for each layer's weights


def test_synflow_takes_batch_norm_in_evaluation_mode_and_even_attention():
    net = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([-2.0, 3.0]))
        net[1].bias.copy_(torch.tensor([0.5, -0.25]))
    a, b = (w.detach().abs().double().flatten() for w in (net[0].weight, net[3].weight))
    scale = torch.tensor([2.0, 3.0]).double() / math.sqrt(1 + 1e-5)
    expected = (a * scale * b).sum() * 2 + (torch.tensor([0.5, 0.25]) * b).sum()  # a bias flows through b alone
    assert proxies.synflow(net, torch.zeros(2, 1, 1, 1)) == pytest.approx(float(expected))

    attention = nn.Sequential(Attention(2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    values = attention[0].qkv.weight.detach().abs()[4:].sum()
    assert proxies.synflow(attention, torch.zeros(2, 2, 3, 3)) == pytest.approx(float(values))


def test_naswot_is_the_log_determinant_of_the_hamming_kernel():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3, 9), nn.ReLU(), nn.Linear(9, 7), nn.SiLU(), nn.Linear(7, 2))
    images = torch.randn(4, 3, 1, 1)
    with torch.no_grad():
        hidden = net[1](images.flatten(1))
        codes = torch.cat([hidden > 0, net[3](hidden.relu()) > 0], 1).tolist()
    kernel = [[16 - sum(a != b for a, b in zip(codes[i], codes[j], strict=True)) for j in range(4)] for i in range(4)]
    assert proxies.naswot(net, images) == pytest.approx(math.log(abs(torch.tensor(kernel).double().det())))
    assert proxies.naswot(net, images[:1].repeat(2, 1, 1, 1)) == -math.inf
    with pytest.raises(ValueError, match="ReLU or SiLU"):
        proxies.naswot(net[:2], images)


def test_naswot_sees_the_activations_inside_norms():
    net = nn.Sequential(nn.Conv2d(3, 5, 1), GroupedBatchNorm(5, "relu"))
    images = torch.randn(3, 3, 2, 2)
    codes = (net(images) > 0).flatten(1).double()
    kernel = codes @ codes.T + (1 - codes) @ (1 - codes).T
    assert proxies.naswot(net, images) == pytest.approx(float(torch.linalg.slogdet(kernel)[1]))


@pytest.mark.quick
def test_gradnorm_is_the_sum_of_norms(batch):
    images, labels = batch
    net = small()
    step, expected = 1e-6, 0.0

    @torch.no_grad()
    def loss(index=0, place=0, by=0.0):
        moved = copy.deepcopy(net).train()
        moved[index].weight.view(-1)[place] += by
        return float(F.cross_entropy(moved(images), labels))

    for index in (0, 5):
        squares = sum(((loss(index, place, step) - loss()) / step) ** 2 for place in range(net[index].weight.numel()))
        expected += math.sqrt(squares)
    assert proxies.gradnorm(net, images, labels) == pytest.approx(expected, rel=1e-4)


def test_zico_by_loops(batch):
    images, labels = batch
    net, gradients = small(), []
    for part in (slice(0, 4), slice(4, 8)):
        fresh = copy.deepcopy(net).train()
        F.cross_entropy(fresh(images[part]), labels[part]).backward()
        gradients.append([fresh[i].weight.grad.flatten().tolist() for i in (0, 5)])
    expected = 0.0
    for first, second in zip(*gradients, strict=True):
        total = 0.0
        for a, b in zip(first, second, strict=True):
            mean = (abs(a) + abs(b)) / 2
            std = math.sqrt(((abs(a) - mean) ** 2 + (abs(b) - mean) ** 2) / 2)
            total += mean / std
        expected += math.log(total)
    assert proxies.zico(net, images, labels) == pytest.approx(expected)
    with pytest.raises(ValueError, match="2 batches"):
        proxies.zico(net, images[:1], labels[:1])


@pytest.mark.parametrize("name", proxies.PROXIES)
def test_proxies_are_pure(name, batch):
    images, labels = batch
    net = small().train()
    before, random_state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    first = proxies.PROXIES[name](net, images, labels)
    assert proxies.PROXIES[name](net, images, labels) == first
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters()) and net.training
    assert proxies.PROXIES[name](net, images, None) == proxies.PROXIES[name](net, images, None)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_labels_matter_to_those_that_use_them(batch):
    images, labels = batch
    other = (labels + 1) % 5
    for name in ("gradnorm", "zico"):
        assert proxies.PROXIES[name](small(), images, labels) != proxies.PROXIES[name](small(), images, other)


def test_names_of_proxies():
    assert proxies.chosen("zico, synflow,zico") == ["zico", "synflow"]
    for text in ("zen", "synflow,zen", ""):
        with pytest.raises(ConfigError, match="^proxies: "):
            proxies.chosen(text)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_proxy_is_finite_on_every_space(name):
    net = proxies.open_branches(network(name))
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for proxy in proxies.PROXIES.values():
        assert math.isfinite(proxy(net, images, None))


def test_closed_branches_are_opened():
    net = network("hytra")
    closed = [m for m in net.modules() if isinstance(m, GroupedBatchNorm) and not m.weight.any()]
    assert len(closed) == 16
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    before = proxies.synflow(net, images)
    assert proxies.synflow(proxies.open_branches(net), images) > 10 * before
    assert all((m.weight == 1).all() for m in closed)


# ---- the stand-alone network


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_standalone_has_the_weights_of_its_cost(name):
    space, net = make(name), network(name)
    paths = [decode(part) for part in ARCHITECTURES[name].split("|")]
    net.eval()
    x = torch.zeros(1, 3, 32, 32)
    head = {"params": sum(p.numel() for p in net.head.parameters()), "macs": net.head[-1].weight.numel()}
    expected = cost.CostTable.of(space, 32).network(paths)
    expected = {key: expected[key] + head[key] for key in expected}
    assert cost.count([net], lambda: net(x)) == expected
    assert sum(p.numel() for p in net.parameters()) == expected["params"]  # and nothing that is not used
    assert net(torch.zeros(3, 3, 32, 32)).shape == (3, 10)


def test_standalone_of_nats_is_the_benchmarks():
    """Parameters by hand, from the definition of the cells: 3x3 and 1x1 convolutions and norms of two numbers each."""

    def cell(kind, c_in, c):
        if kind == "N":
            skip = 0 if c_in == c else c_in * c + 2 * c
            return 2 * (9 * c_in * c + 2 * c) + 3 * (9 * c * c + 2 * c) + skip
        return 9 * c_in * c + 2 * c + 9 * c * c + 2 * c + c_in * c

    widths = [64, 40, 32, 32, 24]
    total, c_in = 27 * 64 + 2 * 64, 64
    for kind, c in zip("NRNRN", widths, strict=True):
        total += cell(kind, c_in, c)
        c_in = c
    total += 2 * 24 + 24 * 10 + 10  # last batch norm, classifier
    assert sum(p.numel() for p in network("nats", width=1.0).parameters()) == total


@pytest.mark.quick
def test_standalone_computes_what_the_supernets_path_does():
    """With the supernet's weights, norms of the same batch: the features before the head are the same."""
    for name in ("hytra", "mbconv"):
        space, net = make(name), network(name)
        supernet = Supernet(space, 16, 8)
        paths = [decode(part) for part in ARCHITECTURES[name].split("|")]
        source = dict(supernet.stem.state_dict(prefix="stem."))
        position = 0
        for block, path in enumerate(paths):
            for layer in range(len(path)):
                source.update(supernet.blocks[block][layer].state_dict(prefix=f"layers.{position}."))
                position += 1
        mine = net.state_dict()
        net.load_state_dict({key: source.get(key, value) for key, value in mine.items()})
        assert sum(key in source for key in mine) == len(mine) - 2  # all but the classifier's
        seen = []
        net.head.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(inputs[0]))
        x = torch.randn(2, 3, 32, 32)
        net.train()(x)
        supernet.train()
        for block, path in enumerate(paths):
            x = supernet(block, [Item(path, x)])[0]
        torch.testing.assert_close(seen[0], x, rtol=1e-4, atol=1e-4)


def test_slices_become_convolutions_of_their_own_size():
    """Their initial weights have the spread of their own number of inputs, not of the widest candidate's."""
    net = network("nats", width=1.0)
    slim = [m for m in net.modules() if isinstance(m, SlimConv)]
    assert len(slim) > 15
    widths = {m.weight.shape[1] for m in slim}
    assert widths == {3, 64, 40, 32, 24}
    for conv in slim:
        bound = 1 / math.sqrt(conv.weight[0].numel())  # torch's default: uniform up to the root of 1 / fan-in
        assert 0.8 * bound < conv.weight.abs().max() <= bound


def test_standalone_of_an_own_space(tmp_path, project_root):
    text = (project_root / "docs/own_space.md").read_text().split("```python\n")[1].split("```")[0]
    (tmp_path / "my_space.py").write_text(text)
    space = spaces.make(
        f"{tmp_path / 'my_space.py'}:TinyRes", width=0.5, image_size=16, restricted=True, split="cifar10"
    )
    net = standalone(space, [decode("03"), decode("21")], 7)
    net.eval()
    x = torch.zeros(1, 3, 16, 16)
    assert net(x).shape == (1, 7)
    assert cost.count([net], lambda: net(x))["params"] == sum(p.numel() for p in net.parameters())
