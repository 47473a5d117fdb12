from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
import torch

from bossnas import spaces
from bossnas.errors import ConfigError
from bossnas.spaces import cost, hytra, mbconv, paths
from bossnas.spaces.paths import decode, encode
from bossnas.supernet.supernet import Item, Supernet

T0 = [decode(p) for p in "5433|3230|0010|0000".split("|")]


def make(name, image_size=32, width=0.125, split="cifar10", restricted=True):
    return spaces.make(name, width=width, image_size=image_size, restricted=restricted, split=split)


def test_hytra_path_counts():
    assert [len(hytra.path_set(d)) for d in (4, 3, 2, 1)] == [51, 99, 80, 16]
    assert [len(hytra.path_set(d, restricted=False)) for d in (4, 3, 2, 1)] == [131, 115, 80, 16]
    ends = {d: [sum(hytra.SCALES[p[-1]] == s for p in hytra.path_set(d)) for s in range(4)] for d in (4, 3, 2)}
    assert ends == {4: [24, 22, 4, 1], 3: [68, 30, 1, 0], 2: [64, 16, 0, 0]}


def test_hytra_runnable_architectures():
    assert hytra.count_runnable() == 1_615_872
    space = make("hytra")
    assert len(space.paths(0, [])) == 50 and decode("5555") not in space.paths(0, [])
    assert decode("4444") not in space.paths(1, [decode("5444")])
    # the same number by walking the space as a search does, one block's end scale at a time
    total, ends = 0, {None: 1}
    representative = {e: next(p for p in hytra.path_set(4) if hytra.SCALES[p[-1]] == e) for e in range(4)}
    for block in range(4):
        counts: dict[int, int] = {}
        for end, ways in ends.items():
            for path in space.paths(block, [] if block == 0 else [representative[end]] * block):
                counts[hytra.SCALES[path[-1]]] = counts.get(hytra.SCALES[path[-1]], 0) + ways
        ends, total = counts, sum(counts.values())
    assert total == 1_615_872


def test_published_t0_is_in_the_space_and_maps_to_the_retraining_net():
    space = make("hytra")
    for block, path in enumerate(T0):
        assert path in space.paths(block, T0[:block])
    assert hytra.retraining_encoding(T0) == [[1], [1], [1, 1, 1, 0, 1], [0, 0, 0, 1, 0, 0, 0, 0, 0]]


def test_mbconv_and_nats_path_counts():
    space = make("mbconv")
    assert [len(space.paths(b, [])) for b in range(5)] == [16, 256, 256, 256, 256]
    assert mbconv.count_architectures() == 4**18
    for split, counts in (("cifar10", [64, 64, 8]), ("cifar100", [64, 8, 64])):
        space = make("nats", split=split)
        assert [len(space.paths(b, [])) for b in range(3)] == counts


@pytest.mark.parametrize("name", ["mbconv", "nats"])
def test_fair_sampling_uses_each_candidate_once(name):
    space = make(name)
    for block in range(space.blocks):
        sampled = space.sample(block, [], np.random.default_rng(block))
        for layer in zip(*sampled, strict=True):
            assert sorted(layer) == list(range(len(space.candidates(block))))


def test_hytra_samples_distinct_paths():
    space = make("hytra")
    sampled = space.sample(0, [], np.random.default_rng(0))
    assert len(set(sampled)) == 4 and set(sampled) <= set(space.paths(0, []))


@pytest.mark.quick
@pytest.mark.parametrize("name, sizes", [("hytra", (32, 40, 57)), ("mbconv", (32, 45)), ("nats", (4, 9, 32))])
def test_any_image_size_runs_every_end(name, sizes):
    for size in sizes:
        space = make(name, size, width=0.0625)
        net = Supernet(space, 8, 4)
        x, winners = torch.randn(2, 3, size, size), []
        for block in range(space.blocks):
            choices = space.paths(block, winners)
            for path in {p[-1]: p for p in choices}.values():
                assert net.embed(block, [Item(path, x)])[0].shape == (2, 4)
            winner = choices[len(choices) // 2]
            x = net(block, [Item(winner, x)])[0].detach()
            winners.append(winner)


def test_every_hytra_path_of_every_start_runs():
    space = make("hytra", width=0.0625)
    net = Supernet(space, 8, 4)
    for end in range(3):  # each scale at which block 0 may end
        winner = next(p for p in space.paths(0, []) if hytra.SCALES[p[-1]] == end)
        x = net(0, [Item(winner, torch.randn(2, 3, 32, 32))])[0].detach()
        for path in space.paths(1, [winner]):
            assert torch.isfinite(net(1, [Item(path, x)])[0]).all()


def test_hytra_macs_fall_and_attention_counts():
    space = make("hytra", 64)
    net = Supernet(space, 8, 4).eval()
    x = torch.zeros(1, 3, 64, 64)

    def price(path):
        return cost.count([net.stem, net.blocks], lambda: net(0, [Item(decode(path), x)]))

    conv, attention = price("1111"), price("0000")
    inner = space.inner(0)
    # a 3x3 convolution against qkv and two products over the 2x2 map of 4 tokens, in each of four layers
    assert conv["macs"] - attention["macs"] == 4 * (9 * inner**2 * 4 - 3 * inner**2 * 4 - 2 * 4 * 4 * inner)
    assert conv["params"] - attention["params"] == 4 * 6 * inner**2


def test_encoding_of_paths():
    assert encode((5, 4, 3, 3)) == "5433" and decode("5433") == (5, 4, 3, 3)
    assert all(decode(encode(p)) == p for p in itertools.product(range(36), repeat=2))
    assert len(paths.all_paths([2, 3])) == 6


@pytest.mark.parametrize(
    "name, size, words",
    [
        ("resnet", 32, "there is no space"),
        ("hytra", 31, "at least 32"),
        ("nats", 3, "at least 4"),
        ("nowhere.py:A", 32, "no file"),
    ],
)
def test_impossible_spaces_are_refused(name, size, words):
    with pytest.raises(ConfigError, match=words):
        make(name, size)


def test_settings_without_effect_are_refused():
    with pytest.raises(ConfigError, match="space.split"):
        make("hytra", split="cifar100")
    with pytest.raises(ConfigError, match="space.restricted"):
        make("nats", restricted=False)


@pytest.mark.quick
def test_own_space_of_the_documentation(project_root, tmp_path):
    code = re.search(r"```python\n(.*?)```", (project_root / "docs/own_space.md").read_text(), re.S).group(1)
    file = tmp_path / "my_space.py"
    file.write_text(code)
    space = make(f"{file}:TinyRes")
    net = Supernet(space, 8, 4)
    x = torch.randn(2, 3, 32, 32)
    sampled = space.sample(0, [], np.random.default_rng(0))
    assert [tuple(t.shape) for t in net.embed(0, [Item(p, x) for p in sampled])] == [(2, 4)] * 4
    with pytest.raises(ConfigError, match="defines no Nothing"):
        make(f"{file}:Nothing")
    file.write_text(code.replace("    def describe", "    def _describe"))
    with pytest.raises(ConfigError, match="lacks describe"):
        make(f"{file}:TinyRes")
