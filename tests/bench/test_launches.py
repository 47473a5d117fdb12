"""What a training step asks of a GPU, counted on tensors without data by bench/launches.py: it is not to grow
unnoticed. Whoever makes a step shorter lowers its numbers here."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from bossnas.supernet import losses

BENCH = Path(__file__).resolve().parent.parent.parent / "bench"
MOST = {  # launches of a step, and copies among them
    "hytra:0": (1002, 233),
    "hytra:1": (954, 217),
    "hytra:2": (615, 142),
    "hytra:3": (715, 161),
    "mbconv:0": (1009, 259),
    "mbconv:1": (1670, 430),
    "mbconv:2": (1745, 450),
    "mbconv:3": (1812, 470),
    "mbconv:4": (1894, 490),
    "nats:0": (2273, 378),
    "nats:1": (2252, 371),
    "nats:2": (1823, 299),
}


@pytest.fixture(scope="module")
def bench():
    pytest.importorskip("triton")
    spec = importlib.util.spec_from_file_location("launches", BENCH / "launches.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_block_of_every_space_has_its_numbers(bench):
    assert list(MOST) == bench.ROWS


@pytest.mark.parametrize("row", MOST)
def test_a_step_launches_no_more(bench, row):
    counts = bench.count(row)
    launches, copies = counts.of(), counts.of(names=bench.COPIES)
    assert (launches, copies) <= MOST[row] and copies <= MOST[row][1], (
        f"{row}: {launches} launches and {copies} copies, allowed are {MOST[row]}; `python bench/launches.py --only "
        f"{row} --names 20` says of what"
    )
    assert launches > 0.9 * MOST[row][0], f"{row}: lower its numbers to {launches} and {copies}"


def test_a_step_that_waits_for_the_device_fails(bench, monkeypatch):
    spread = losses.spread
    monkeypatch.setattr(losses, "spread", lambda projections: spread(projections).item())
    with pytest.raises(RuntimeError, match="meta"):
        bench.count("nats:2")
