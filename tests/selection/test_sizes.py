from __future__ import annotations

import numpy as np
import pytest
import torch

from bossnas import spaces
from bossnas.networks.from_space import standalone
from bossnas.selection.sizes import SIZE_DEFINITIONS, log_channels, size_baselines
from bossnas.spaces import cost
from bossnas.spaces.paths import decode


def sizes(name, texts, classes=10, width=1.0, image_size=32, split="cifar10"):
    space = spaces.make(name, width=width, image_size=image_size, restricted=True, split=split)
    architectures = [[decode(part) for part in text.split("|")] for text in texts]
    return space, architectures, size_baselines(cost.CostTable.of(space, image_size), architectures, classes)


@pytest.mark.parametrize(
    "name, texts",
    [
        ("nats", ["00|00|0", "74|33|2", "77|77|7"]),
        ("mbconv", ["00|0000|0000|0000|0000", "21|1023|3210|0123|1132"]),
        ("hytra", ["5433|3230|0010|0000", "5444|4333|2210|1111"]),
    ],
)
def test_params_and_macs_are_those_of_the_whole_network(name, texts):
    space, architectures, found = sizes(name, texts, classes=7, width=0.25)
    assert set(found) == set(SIZE_DEFINITIONS)
    for i, architecture in enumerate(architectures):
        net = standalone(space, architecture, 7).eval()
        assert found["params"][i] == sum(p.numel() for p in net.parameters())
        assert found["macs"][i] == cost.count([net], lambda net=net: net(torch.zeros(1, 3, 32, 32)))["macs"]


def test_channels_and_wide_candidates_of_nats():
    for texts, split in (
        (["03|47|5", "30|47|5", "77|77|7"], "cifar10"),
        (["03|4|75", "30|4|75", "77|7|77"], "cifar100"),
    ):
        _, _, found = sizes("nats", texts, split=split)
        channels = [[8, 32, 40, 64, 48], [32, 8, 40, 64, 48], [64] * 5]
        assert found["sum_channels"].tolist() == [sum(c) for c in channels]
        assert found["sum_log_channels"] == pytest.approx([np.log(c).sum() for c in channels])
        assert found["sum_log_channels"][0] == found["sum_log_channels"][1]  # the same factors: a tie, to the last bit
        assert found["wide_candidates"].tolist() == [3, 3, 5]  # of 40, 48, 56 and 64 channels


@pytest.mark.quick
def test_wide_candidates_of_mbconv_are_those_that_expand_by_6():
    texts = ["11|1111|1101|1011|1101", "21|1023|3210|0123|1132", "33|3333|3333|3333|3333"]
    _, _, found = sizes("mbconv", texts)
    assert found["wide_candidates"].tolist() == [sum(c in "01" for c in text) for text in texts]
    assert np.ptp(found["sum_channels"]) == 0


def test_wide_candidates_of_hytra_are_judged_among_those_that_can_stand_there():
    _, _, found = sizes("hytra", ["5433|3230|0010|0000", "5433|3330|1010|1111"], width=0.25)
    assert found["sum_channels"].tolist() == [(256 + 512 + 5 * 1024 + 9 * 2048) / 4] * 2
    assert found["wide_candidates"][1] > found["wide_candidates"][0]  # convolutions weigh more than attention


def test_the_whole_space_is_counted():
    space = spaces.make("nats", width=1.0, image_size=32, restricted=True, split="cifar10")
    every = [[a, b, c] for a in space.paths(0, []) for b in space.paths(1, [a]) for c in space.paths(2, [a, b])]
    found = size_baselines(cost.CostTable.of(space, 32), every, 10)
    assert len(every) == 32_768 and all(len(values) == 32_768 for values in found.values())
    assert len(np.unique(found["sum_log_channels"])) == 336  # as many products of five widths
    assert found["params"].dtype == found["macs"].dtype == np.int64


@pytest.mark.parametrize("name, text", [("nats", "03|47|5"), ("hytra", "5433|3230|0010|0000")])
@pytest.mark.parametrize("known", [True, False])
def test_log_channels_of_blocks_add_up_to_those_of_the_architecture(name, text, known):
    space, (architecture,), found = sizes(name, [text], width=0.25)
    table, total = cost.CostTable.of(space, 32), 0.0
    for block, path in enumerate(architecture):
        prefix = architecture[:block] if known or name == "hytra" else []
        paths = space.paths(block, architecture[:block])
        logs = log_channels(table, block, prefix, paths)
        assert list(logs) == paths
        total += logs[path]
    assert total == pytest.approx(found["sum_log_channels"][0])
