from __future__ import annotations

import json

import numpy as np
import pytest

from bossnas import cli, spaces
from bossnas.config.loading import dump, load
from bossnas.errors import ConfigError
from bossnas.files import write_json, write_text
from bossnas.runs.certainty import Parts, as_json
from bossnas.runs.show import lines, show_architecture, show_run
from bossnas.spaces.paths import encode

SPACE = ["space.name=nats", "space.image_size=32", "space.width=0.25", "data.recipe=cifar"]


@pytest.fixture
def run(tmp_path):
    """A rated run of NATS with three blocks; the first one's paths differ clearly, the others' do not."""
    folder, rng = tmp_path / "run", np.random.default_rng(0)
    folder.mkdir()
    config = load("configs/quickstart_ds.json", [*SPACE, f"out={folder}"])
    write_text(folder / "config.json", dump(config))
    (folder / "ratings").mkdir()
    space, winners = spaces.make(**config.space.model_dump()), []
    for block in range(space.blocks):
        paths = [encode(path) for path in space.paths(block, [])]
        off = rng.normal(0, 1, (len(paths), 64))
        step = 10.0 if block == 0 else 0.0
        scores = {path: step * i for i, path in enumerate(paths)}
        parts = {"x": Parts(off - off.mean(1, keepdims=True), np.full(64, 4.0))}
        write_json(
            folder / f"ratings/block_{block}.json",
            {
                "block": block,
                "prefix": [],
                "score": "x",
                "better": {"x": "lower"},
                "candidates": space.candidates(block),
                "paths": scores,
                "scores": {"x": scores},
                "chance": {"x": -5.5},
                **as_json({"x": scores}, parts, {"x": "lower"}),
            },
        )
        winners.append(paths[0])
    write_json(folder / "winners.json", {"winners": winners})
    return folder


@pytest.mark.quick
def test_a_run_in_words_and_how_sure_it_is(run, capsys, tmp_path):
    with pytest.raises(SystemExit) as ended:
        cli.main(["show", str(run), "--json", str(tmp_path / "shown.json")])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    text = " ".join(printed.split())
    assert "00|00|0: 5 of 2 channels" in text and "(chance gives -5.5000)" in text
    assert "none of the 63 other paths lie within two standard errors of it" in text
    assert "nothing is told apart: all 8 paths" in text and f"bossnas report {run}" in text
    result = json.loads((tmp_path / "shown.json").read_text())
    assert result == json.loads(json.dumps(show_run(run)))
    assert [block["nothing_told_apart"] for block in result["blocks"]] == [False, True, True]
    assert len(result["layers"]) == 5 and result["macs"] == sum(row["macs"] for row in result["layers"])
    long = [line for line in printed.splitlines() if len(line) > 80 and str(run) not in line]
    assert not long


def test_an_unfinished_run_and_one_of_before(run):
    write_json(run / "winners.json", {"winners": ["00"]})
    for block in (1, 2):
        (run / f"ratings/block_{block}.json").unlink()
    values = json.loads((run / "ratings/block_0.json").read_text())
    for key in ("groups", "errors", "behind_winner", "chance"):
        values.pop(key)
    write_json(run / "ratings/block_0.json", values)
    result = show_run(run)
    assert not result["finished"] and result["next"] == [] and len(result["layers"]) == 2
    assert "1 blocks so far" in lines(result, 80)[0] and "rate it again" in "\n".join(lines(result, 80))


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["nowhere"], "'nowhere' is no run folder"),
        (["00|00|0", "--space", "hytra"], "has 3 paths, the space 4 blocks"),
        (["00|00|9"], "RUN|ARCHITECTURE: block 2 has no path"),
        (["00|00|0", "--width", "9"], "--width: 9 is no width"),
        (["00|00|0", "--score", "x"], "--score: needs a run"),
        (["RUN", "--width", "0.5"], "says its space itself"),
        (["RUN", "--score", "y"], "has no score 'y'"),
        (["00|00|0", "--json", "/nowhere/x.json"], "--json"),
        (["00|00|0", "--space", "x.py:Y"], "--image-size: is not known for x.py:Y"),
    ],
)
def test_mistakes_cost_one_line(run, capsys, arguments, words):
    with pytest.raises(SystemExit) as ended:
        cli.main(["show", *(str(run) if argument == "RUN" else argument for argument in arguments)])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and words in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "winners, words",
    [("[]", "damaged"), ('{"winners": ["zz"]}', "not of its space"), ('{"winners": [3]}', "damaged"), ("{", "damaged")],
)
def test_damaged_winners_cost_one_line(run, winners, words):
    write_text(run / "winners.json", winners)
    with pytest.raises(ConfigError, match=words):
        show_run(run)


def test_an_architecture_by_itself():
    result = show_architecture("01|23|4")
    assert result["space"]["name"] == "nats" and result["words"].endswith("1 of 40 channels")
    assert show_architecture("01|2|34")["space"]["split"] == "cifar100"
    assert len(show_architecture("5433|3230|0010|0000", width=0.0625, image_size=32)["layers"]) == 17
