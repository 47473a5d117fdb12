"""Old doors stay open: what bossnas 0.1.0 wrote before its modules had rooms still works, and so do the names that
users' own files import.

before_rooms.tar.xz was made by commit cf8518d: a search of NATS-Bench's space at a sixteenth of its width (s.yaml) with
a checkpoint in its last block and its last one, a retraining that began with the search's weights (r.yaml) stopped
before its last step, that network exported for the hub, the search's weights, and what `select` and `evaluate` said.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from ranks import HANG, environment
from safetensors.torch import load_file

from bossnas import cli

FILES = Path(__file__).with_suffix("").with_name("before_rooms.tar.xz")


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(FILES) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture
def here(old, tmp_path, monkeypatch):
    """A copy of the old files to work in; their configs name folders beside them."""
    subprocess.run(["cp", "-r", f"{old}/.", str(tmp_path)], check=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def bossnas(*arguments) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([str(argument) for argument in arguments])
    assert caught.value.code == 0


def scores(folder: Path) -> dict[str, dict]:
    return {file.name: json.loads(file.read_text())["scores"] for file in (folder / "ratings").glob("*.json")}


# what another processor may round otherwise; the scores of a block lie about a hundred times as far apart
ROUNDING = {"population_centre": 1e-5, "effective_rank": 1e-2}


def close(found: dict, expected: dict) -> bool:
    return found.keys() == expected.keys() and all(
        found[name][score] == pytest.approx(values, abs=ROUNDING.get(score, 1e-3))
        for name, of_file in expected.items()
        for score, values in of_file.items()
    )


def test_a_search_goes_on_from_its_checkpoint(here, old):
    bossnas("search", "--config", "s.yaml", "--resume", "search/checkpoints/block2-step000002")
    assert close(scores(here / "search"), scores(old / "search"))
    lines = [json.loads(line) for line in (here / "search/metrics.jsonl").read_text().splitlines()]
    assert [(line["block"], line["step"]) for line in lines if line["kind"] == "train"] == [
        (block, step) for block in range(3) for step in range(1, 5)
    ]
    assert (here / "search/done").exists()


def test_a_finished_search_is_rated_selected_and_exported(here, old):
    bossnas("search", "--config", "s.yaml", "--resume", "auto")
    bossnas("rate", "search", "--block", 2)
    assert close(scores(here / "search"), scores(old / "search"))
    bossnas("select", old / "search", "--top", 3, "--json", "again.json")
    found, expected = (json.loads(file.read_text()) for file in (here / "again.json", old / "selected.json"))
    assert expected["greedy"] == {key: found["greedy"][key] for key in expected["greedy"]}  # which has more now
    assert [row["architecture"] for row in found["top"]] == [row["architecture"] for row in expected["top"]]
    bossnas("export-weights", "search", "again.safetensors")
    again, before = load_file("again.safetensors"), load_file(old / "weights.safetensors")
    assert again.keys() == before.keys() and all(torch.equal(tensor, before[name]) for name, tensor in again.items())


def test_a_retraining_goes_on(here, old):
    for name in ("done", "result.json", "last.safetensors"):
        (here / "retrain" / name).unlink()
    bossnas("retrain", "--config", "r.yaml", "--resume", "auto")
    assert (here / "retrain/done").exists()
    results = [json.loads((folder / "retrain/result.json").read_text()) for folder in (here, old)]
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], abs=1e-4) and results[0]["steps"] == 4
    again, before = (load_file(folder / "retrain/last.safetensors") for folder in (here, old))
    assert again.keys() == before.keys()
    assert all(torch.allclose(tensor, before[name], atol=1e-4) for name, tensor in again.items())


def test_a_new_retraining_inherits_from_an_old_search(here):
    bossnas("retrain", "--config", "r.yaml", "--set", "out=new", "--set", "train.epochs=1")
    assert "112 tensors are from the supernet of search; fresh are 6, of bn, fc" in (here / "new/log.txt").read_text()


def test_old_networks_are_evaluated(here, old):
    images = Path(cli.__file__).parents[1] / "data/sample/val-*.tar.gz"
    found = {}
    for network in ("retrain/last.safetensors", "retrain/best.safetensors", "exported/hub"):
        bossnas("evaluate", network, "--val", images, "--workers", 0, "--json", "again.json")
        found[network] = json.loads((here / "again.json").read_text())
    last, best, exported = found.values()
    expected = json.loads((old / "evaluated.json").read_text())
    assert last["images"] == expected["images"] == 500
    assert last["loss"] == pytest.approx(expected["loss"], abs=1e-4)
    assert exported["loss"] == pytest.approx(best["loss"], abs=1e-6) and abs(best["loss"] - last["loss"]) > 1e-6


OWN = """
import torch
from torch import nn

import bossnas.timm_models
from bossnas.config import Config, load
from bossnas.errors import ConfigError
from bossnas.ops import Chain, GroupedBatchNorm, NoAdapter, SlimConv, Statistics, conv, conv_norm
from bossnas.paths import Path, all_paths, decode, encode, fair_sample, uniform_sample


class Layer(nn.Module):
    def __init__(self, c_in, c_out):
        super().__init__()
        self.candidates = nn.ModuleList(conv_norm(c_in, c_out, kernel, 2, act="relu") for kernel in (1, 3))

    def forward(self, x, choice, groups=1, stats=None):
        return self.candidates[choice](x, groups, stats)


class Mine:
    blocks, view_pairs, stride = 2, 1, 8

    def __init__(self, width: float = 1.0):
        self.widths = [round(c * width) for c in (8, 16, 16)]

    def layers(self, block): return 1
    def candidates(self, block): return ["k1", "k3"]
    def stem(self): return conv_norm(3, self.widths[0], 3, act="relu")
    def layer(self, block, layer): return Layer(self.widths[block], self.widths[block + 1])
    def adapter(self, block): return NoAdapter()
    def neck_width(self, block): return self.widths[block + 1]
    def paths(self, block, winners: list[Path]) -> list[Path]: return all_paths([2])
    def sample(self, block, winners, rng): return fair_sample(2, 1, rng)
    def describe(self, architecture): return {"paths": [encode(path) for path in architecture]}
"""


def test_a_space_of_ones_own_imports_by_the_old_names(tmp_path, capfd):
    (tmp_path / "mine.py").write_text(OWN)
    sets = [f"space.name={tmp_path}/mine.py:Mine", "space.image_size=32"]
    (tmp_path / "empty.yaml").write_text("")
    bossnas("cost", "--config", tmp_path / "empty.yaml", *(f"--set={value}" for value in sets), "--architecture", "0|1")
    assert capfd.readouterr().out.startswith("0|1: ")


@pytest.mark.parametrize("module", ["bossnas", "bossnas.cli"])
def test_the_command_is_a_module_too(module):
    run = subprocess.run(
        [sys.executable, "-m", module, "--version"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=HANG,
        check=True,
    )
    assert run.stdout == "0.1.0\n"
