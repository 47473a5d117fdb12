from __future__ import annotations

import pytest
import yaml

from bossnas.config.loading import load, validate
from bossnas.config.retrain import RetrainConfig
from bossnas.selection.retraining import config_for, write_config

SPACE = ["space.name=nats", "space.image_size=32", "space.width=0.25", "data.recipe=cifar"]


@pytest.mark.parametrize("settings", [SPACE, ["space.image_size=224", "data.train=a/{0..3}.tar", "data.val=b.tar"]])
def test_the_config_of_its_retraining(settings):
    run = load("configs/quickstart_ds.json", settings)
    text = "00|00|0" if "space.name=nats" in settings else "3333|3333|3333|1111"
    values = config_for(run, {"architecture": text, "words": ""}, "runs/again")
    config = validate(values, RetrainConfig)
    assert config.model.architecture == text and config.model.space == run.space
    assert config.data.train == run.data.train and config.train.batch == run.train.batch
    small = run.space.image_size == 32
    assert config.train.lr == pytest.approx(2e-3 * 64 / 128 if small else 1e-3 * 64 / 1024, rel=0.01)
    assert (config.augment.auto is None) == small


def test_the_file_can_be_read(tmp_path):
    run = load("configs/quickstart_ds.json", SPACE)
    row = {"architecture": "00|00|0", "words": "5 of 2 channels"}
    result = {"top": [row], "runs": ["runs/a"], "score": "x", "limits": {"macs": 5_000_000}}
    file = tmp_path / "again.yaml"
    write_config(file, run, result)
    assert load(file, [], RetrainConfig) == validate(config_for(run, row, "runs/again"), RetrainConfig)
    text = file.read_text()
    assert "best of runs/a by x, with at most 5,000,000 macs" in text and yaml.safe_load(text)["out"] == "runs/again"
