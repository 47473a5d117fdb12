from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from bossnas import cli, layout, spaces
from bossnas.errors import ConfigError
from bossnas.selection import latency
from bossnas.spaces import cost, hytra, mbconv, nats
from bossnas.spaces.cost import CostTable, read_architecture
from bossnas.spaces.paths import decode
from bossnas.supernet.supernet import Supernet


def make(name, width=0.125, size=32, split="cifar10", restricted=True):
    return spaces.make(name, width=width, image_size=size, restricted=restricted, split=split)


def random_architecture(space, rng):
    architecture = []
    for block in range(space.blocks):
        paths = space.paths(block, architecture)
        architecture.append(paths[rng.integers(len(paths))])
    return architecture


@pytest.mark.parametrize(
    "name, width, size, options",
    [
        ("hytra", 0.125, 32, {}),
        ("hytra", 0.0625, 57, {}),
        ("hytra", 0.05, 96, {"restricted": False}),
        ("mbconv", 1.0, 32, {}),
        ("mbconv", 0.3, 45, {}),
        ("nats", 1.0, 32, {}),
        ("nats", 0.25, 9, {"split": "cifar100"}),
    ],
)
def test_the_table_is_what_counting_on_a_supernet_gives(name, width, size, options):
    space = make(name, width, size, **options)
    table = CostTable.of(space, size)
    net = Supernet(space, 8, 4).eval()
    x, rng = torch.zeros(1, 3, size, size), np.random.default_rng(0)
    architectures = [random_architecture(space, rng) for _ in range(12)]
    for architecture in architectures:
        counted = cost.count([net.stem, net.blocks], lambda a=architecture: net.features(a, x))
        assert table.network(architecture) == counted
        shape = tuple(net.features(architecture, x).shape[1:])
        steps = table.image
        for block, path in enumerate(architecture):
            steps = table.path(block, path, steps)[1]
        assert steps == shape
    assert CostTable.along(space, size, architecture).network(architecture) == table.network(architecture)
    together = table.networks(architectures)
    assert together["macs"].dtype == together["params"].dtype == np.int64
    assert together["macs"].tolist() == [table.network(a)["macs"] for a in architectures]
    assert together["params"].tolist() == [table.network(a)["params"] for a in architectures]


# Plain networks, written without the library: convolutions, batch norms and attention only.


def conv(c_in, c_out, kernel=1, stride=1, groups=1, bias=False, pad=None):
    return nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2 if pad is None else pad, groups=groups, bias=bias)


class PlainAttention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.qkv, self.heads = conv(c, 3 * c), c // 64

    def forward(self, x):
        n, c, h, w = x.shape
        q, k, v = self.qkv(x).view(n, 3, self.heads, 64, h * w).unbind(1)
        attention = torch.matmul(q.transpose(2, 3), k).div(8).softmax(-1)
        return torch.matmul(attention, v.transpose(2, 3)).transpose(2, 3).reshape(n, c, h, w)


class PlainHyTraLayer(nn.Module):
    def __init__(self, attention, scale, before, first):
        super().__init__()
        h = 64 * 2 ** (3 - scale)
        c_in, stride = (64, 1) if first else (256 * 2 ** (3 - before), 1 + (before > scale))
        self.adapter = nn.Identity()
        if first:
            patch = 2 ** (3 - scale)
            self.adapter = nn.Sequential(conv(64, 64, patch, patch, 64, pad=0), conv(64, h), nn.BatchNorm2d(h))
            c_in = h
        self.entry = nn.Sequential(conv(c_in, h), conv(h, h, 3, stride, h, bias=True), nn.BatchNorm2d(h), nn.ReLU())
        self.body = nn.Sequential(
            PlainAttention(h) if attention else conv(h, h, 3),
            nn.BatchNorm2d(h),
            nn.ReLU(),
            conv(h, 4 * h),
            nn.BatchNorm2d(4 * h),
        )
        self.shortcut = nn.Identity()
        if stride == 2:
            self.shortcut = nn.Sequential(conv(c_in, 4 * h, 3, 2), nn.BatchNorm2d(4 * h), nn.ReLU())
        elif c_in != 4 * h:
            self.shortcut = nn.Sequential(conv(c_in, 4 * h), nn.BatchNorm2d(4 * h), nn.ReLU())

    def forward(self, x):
        x = self.adapter(x)
        return F.relu(self.body(self.entry(x)) + self.shortcut(x))


def plain_hytra(architecture):
    layers = [nn.Sequential(conv(3, 64, 7, 2), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1))]
    before = 3
    for i, choice in enumerate(c for path in architecture for c in path):
        scale = (0, 0, 1, 1, 2, 3)[choice]
        layers.append(PlainHyTraLayer(choice in (0, 2), scale, before, first=i == 0))
        before = scale
    return nn.Sequential(*layers)


class PlainGate(nn.Module):
    def __init__(self, c, reduced):
        super().__init__()
        self.gate = nn.Sequential(conv(c, reduced, bias=True), nn.SiLU(), conv(reduced, c, bias=True), nn.Sigmoid())

    def forward(self, x):
        return x * self.gate(x.mean((2, 3), keepdim=True))


class PlainMBConv(nn.Module):
    def __init__(self, c_in, c_out, expand, kernel, stride):
        super().__init__()
        m = c_in * expand
        self.body = nn.Sequential(
            conv(c_in, m),
            nn.BatchNorm2d(m),
            nn.SiLU(),
            conv(m, m, kernel, stride, m),
            nn.BatchNorm2d(m),
            nn.SiLU(),
            PlainGate(m, round(c_in / 4)),
            conv(m, c_out),
            nn.BatchNorm2d(c_out),
        )
        self.shortcut = nn.Sequential(
            nn.AvgPool2d(2, 2, ceil_mode=True) if stride == 2 else nn.Identity(),
            nn.Identity() if c_in == c_out else nn.Sequential(conv(c_in, c_out), nn.BatchNorm2d(c_out)),
        )

    def forward(self, x):
        return self.body(x) + self.shortcut(x)


def plain_mbconv(architecture):
    layers = [
        conv(3, 32, 3, 2),
        nn.BatchNorm2d(32),
        nn.SiLU(),
        conv(32, 32, 3, groups=32),
        nn.BatchNorm2d(32),
        nn.SiLU(),
        PlainGate(32, 8),
        conv(32, 16),
        nn.BatchNorm2d(16),
    ]
    c = 16
    for (width, stride, _), path in zip(
        ((24, 2, 2), (40, 2, 4), (80, 2, 4), (112, 1, 4), (192, 2, 4)), architecture, strict=True
    ):
        for layer, choice in enumerate(path):
            expand, kernel = ((6, 3), (6, 5), (3, 3), (3, 5))[choice]
            layers.append(PlainMBConv(c, width, expand, kernel, stride if layer == 0 else 1))
            c = width
    return nn.Sequential(*layers)


class PlainCell(nn.Module):
    def __init__(self, c_in, c, residual):
        super().__init__()

        def op(a, kernel=3, stride=1):
            return nn.Sequential(nn.ReLU(), conv(a, c, kernel, stride), nn.BatchNorm2d(c))

        self.residual = residual
        if residual:
            self.ops = nn.ModuleList([op(c_in, stride=2), op(c)])
            self.shortcut = nn.Sequential(nn.AvgPool2d(2, 2, ceil_mode=True), conv(c_in, c))
        else:
            self.ops = nn.ModuleList([op(c_in), op(c_in), op(c), op(c), op(c)])
            self.shortcut = nn.Identity() if c_in == c else op(c_in, 1)

    def forward(self, x):
        if self.residual:
            return self.ops[1](self.ops[0](x)) + self.shortcut(x)
        n1 = self.ops[0](x)
        n2 = self.ops[1](x) + self.ops[2](n1)
        return self.shortcut(x) + self.ops[3](n1) + self.ops[4](n2)


def plain_nats(architecture):
    widths = [8 * (choice + 1) for path in architecture for choice in path]
    layers = [conv(3, widths[0], 3), nn.BatchNorm2d(widths[0])]
    for i, (before, width) in enumerate(zip([widths[0], *widths], widths, strict=False)):
        layers.append(PlainCell(before, width, residual=i in (1, 3)))
    return nn.Sequential(*layers)


PLAIN = {
    "hytra": (plain_hytra, ["5433|3230|0010|0000", "4444|3321|1100|0001", "4200|0101|1010|1111"], 64),
    "mbconv": (plain_mbconv, ["00|0123|3210|1111|2222", "31|3333|0000|0312|1230"], 64),
    "nats": (plain_nats, ["00|00|0", "77|77|7", "05|23|7", "31|64|0"], 32),
}


@pytest.fixture(scope="module", params=list(PLAIN))
def plain_networks(request):
    """(our cost, the plain network, its image size) of some full-width architectures."""
    build, texts, size = PLAIN[request.param]
    if request.param == "hytra":  # only what the architectures need of 853 M parameters
        space = make("hytra", 1.0, size)
        table = CostTable.of(_Narrowed(space, [read_architecture(space, t) for t in texts]), size)
    else:
        space = make(request.param, 1.0, size)
        table = CostTable.of(space, size)
    chosen = [read_architecture(space, text) for text in texts]
    return [(table.network(a), build(a).eval(), size) for a in chosen]


class _Narrowed:
    """A space cut down to the paths of some architectures, so that fewer candidates are run."""

    def __init__(self, space, architectures):
        self.space, self.architectures = space, architectures
        self.blocks = space.blocks

    def __getattr__(self, name):
        return getattr(self.space, name)

    def paths(self, block, winners):
        return sorted({a[block] for a in self.architectures if a[:block] == winners})


def test_macs_and_parameters_equal_those_of_plain_networks(plain_networks):
    for ours, net, size in plain_networks:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(torch.zeros(1, 3, size, size))
        assert ours["macs"] == counter.get_total_flops() // 2
        assert ours["params"] == sum(p.numel() for p in net.parameters())


def test_macs_equal_fvcores(plain_networks):
    analysis = pytest.importorskip("fvcore.nn", reason="fvcore is not installed: pip install fvcore")
    for ours, net, size in plain_networks:
        counted = analysis.FlopCountAnalysis(net, torch.zeros(1, 3, size, size))
        counted.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        assert ours["macs"] == sum(counted.by_operator()[name] for name in ("conv", "matmul", "linear"))


@pytest.mark.quick
def test_the_shared_shortcut_counts_once_and_the_entry_follows_the_scale():
    space = make("mbconv", 1.0)
    table = CostTable.of(space, 32)
    shape = next(iter(table.starts[1])).shape
    every_candidate = sum(table.entries[1, 0, choice, shape].cost.params for choice in range(4))
    layer = space.layer(1, 0)
    shared = sum(p.numel() for p in layer.shortcut.parameters())
    assert shared and every_candidate == sum(p.numel() for p in layer.parameters()) + 3 * shared
    space = make("hytra")
    table = CostTable.of(space, 64)
    same, down = (table.entries[1, 1, 3, shape].cost for shape in ((128, 4, 4), (64, 8, 8)))
    assert same != down and table.entries[1, 1, 3, (64, 8, 8)].shape == (128, 4, 4)


def test_the_table_holds_what_can_occur_and_nothing_else():
    space = make("nats", 1.0)
    table = CostTable.of(space, 32)
    assert len(table.entries) == 8 + 4 * 64 and [len(s) for s in table.starts] == [1, 8, 8]
    table = CostTable.of(make("mbconv"), 32)
    assert len(table.entries) == 18 * 4 and [len(s) for s in table.starts] == [1] * 5
    table = CostTable.of(make("hytra"), 32)
    # blocks 1, 2 and 3 start at the scales where the block before can end and this one goes on
    assert [len(s) for s in table.starts] == [1, 3, 2, 2]
    assert {key[3][0] for key in table.entries if key[0] == 3} == {4 * table.space.inner(s) for s in (0, 1)}
    with pytest.raises(ConfigError, match="path 5555 of block 0"):
        table.path(0, decode("5555"), (3, 16, 16))


@pytest.mark.quick
def test_own_layers_are_built_one_at_a_time(monkeypatch):
    alive, most = set(), []

    class Watched(nn.Module):
        def __init__(self):
            super().__init__()
            alive.add(id(self))
            most.append(len(alive))

        def __del__(self):
            alive.discard(id(self))

        def forward(self, x, choice, groups=1, stats=None):
            return x

    space = make("mbconv")
    monkeypatch.setattr(space, "layer", lambda block, layer: Watched(), raising=False)
    CostTable.of(space, 32)
    assert len(most) == 1 + 18 and max(most) <= 2  # the first one tells how large they are


@pytest.mark.parametrize(
    "text, words",
    [
        ("00|0000|0000|0000", "has 4 paths, the space 5 blocks"),
        ("00|0000|0000|0000|0004", "block 4 has no path '0004'"),
        ("00|0000|0000|0000|000", "no path '000'"),
        ("00|0000|0000||0000", "'' is no path"),
        ("00|0000|00-0|0000|0000", "'00-0' is no path"),
        ("٠٠|0000|0000|0000|0000", "is no path"),
    ],
)
def test_architectures_that_are_none(text, words):
    with pytest.raises(ConfigError, match="^architecture: ") as caught:
        read_architecture(make("mbconv"), text)
    assert words in str(caught.value)


# The command


def call(*arguments):
    with pytest.raises(SystemExit) as caught:
        cli.main(["cost", *map(str, arguments)])
    return caught.value.code


@pytest.fixture
def config(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"space": {"name": "nats", "image_size": 8, "width": 0.25}}))
    return file


def test_the_cost_of_an_architecture(config, tmp_path, capsys):
    assert call("--config", config, "--architecture", "05|23|7", "--json", tmp_path / "a.json") == 0
    result = json.loads((tmp_path / "a.json").read_text())
    space = make("nats", 0.25, 8)
    wanted = CostTable.of(space, 8).network([(0, 5), (2, 3), (7,)])
    assert {k: result[k] for k in ("macs", "params")} == wanted
    said = " ".join(capsys.readouterr().out.split())
    assert f"{wanted['macs']:,} ({layout.brief(wanted['macs'])}) multiply-adds, {wanted['params']:,}" in said


def test_measured_latencies_come_back(config, tmp_path, capsys):
    file = tmp_path / "latency.json"
    assert call("--config", config, "--measure", "--repeats", 3, "--batch", 2, "--threads", 1, "--json", file) == 0
    result = json.loads(file.read_text())
    assert (result["batch"], result["threads"], result["repeats"]) == (2, 1, 3)
    assert result["torch"] == torch.__version__ and result["device"] and result["space"]["width"] == 0.25
    table = CostTable.of(make("nats", 0.25, 8), 8)
    assert len(result["rows"]) == 1 + len(table.entries)
    for row in result["rows"]:
        assert 0 <= row["latency_p10_ms"] <= row["latency_ms"] <= row["latency_p90_ms"]
    text = capsys.readouterr().out.splitlines()
    assert (
        max(map(len, latency.lines(result, 80))) <= 80 and text[-1].endswith(" ms") and "latency" in "".join(text[:4])
    )
    assert any(f" {layout.brief(result['rows'][-1]['macs'])} " in line for line in text), "a prefix, not zeros"
    timed = latency.attach(table, file, "-")
    by_key = {(r["block"], r["layer"], r["candidate"], tuple(r["input"])): r["latency_ms"] for r in result["rows"]}
    one = timed.cost([(0, 5), (2, 3), (7,)])
    widths = table.space.widths
    steps = [
        (None, None, None, (3, 8, 8)),
        (0, 0, 0, (3, 8, 8)),
        (0, 1, 5, (widths[0], 8, 8)),
        (1, 0, 2, (widths[5], 4, 4)),
        (1, 1, 3, (widths[2], 4, 4)),
        (2, 0, 7, (widths[3], 2, 2)),
    ]
    assert one.latency_ms == pytest.approx(sum(by_key[step] for step in steps), abs=1e-6)
    assert (one.macs, one.params) == tuple(table.network([(0, 5), (2, 3), (7,)]).values())


@pytest.mark.quick
@pytest.mark.parametrize(
    "options, words",
    [
        (["--measure"], "--measure: "),
        (["--architecture", "05|23"], "--architecture: "),
        (["--architecture", "05|23|7", "--measure", "--json", "a.json"], "--measure: "),
        (["--json", "/nowhere/a.json"], "--json: cannot write"),
        (["--set", "space.image_size=2"], "space.image_size: "),
        (["--set", "space.name=cnn"], "space.name: "),
    ],
)
def test_mistakes_end_with_one_line(config, capfd, options, words):
    assert call("--config", config, *options) == 2
    errors = capfd.readouterr().err.splitlines()
    assert len(errors) == 1 and errors[0].startswith(f"error: {words}"), errors


def test_published_constants_of_the_spaces_are_those_of_the_plain_networks():
    assert hytra.SCALES == (0, 0, 1, 1, 2, 3) and nats.WIDTHS == tuple(range(8, 65, 8))
    assert mbconv.BLOCKS == ((24, 2, 2), (40, 2, 4), (80, 2, 4), (112, 1, 4), (192, 2, 4))


def test_large_layers_are_counted_without_values(monkeypatch):
    space = make("hytra", 0.125, 32)
    real = CostTable.of(space, 32)
    monkeypatch.setattr(cost, "LARGE", 0)
    assert CostTable.of(space, 32).entries == real.entries
