from __future__ import annotations

import json

import pytest
import yaml

from bossnas.config.loading import dump, load, validate
from bossnas.config.retrain import RetrainConfig
from bossnas.config.search import Config
from bossnas.config.shared import accumulation
from bossnas.errors import ConfigError

pytestmark = pytest.mark.quick


def test_json_and_yaml_are_equal(tmp_path):
    values = {"space": {"name": "nats"}, "train": {"lr": 0.48}}
    (tmp_path / "a.json").write_text(json.dumps(values))
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(values))
    assert load(tmp_path / "a.json") == load(tmp_path / "a.yaml")


def test_dump_is_the_config_again():
    config = load(None, ["space.name=mbconv", "train.weight_decay=1e-6", "data.train=[a.tar, b.tar]"])
    assert config.train.weight_decay == 1e-6 and config.data.train == ["a.tar", "b.tar"]
    assert validate(json.loads(dump(config))) == config


@pytest.mark.parametrize(
    "override, field, words",
    [
        ("train.epoch=3", "train.epoch", "did you mean 'epochs'"),
        ("trian.epochs=3", "trian", "did you mean 'train'"),
        ("train.epochs=many", "train.epochs", "got 'many'"),
        ("train.lr=-1", "train.lr", "greater than 0"),
        ("train.batch=100", "train.batch", "multiple"),
        ("space=hytra", "space", "hytra"),
        ("seed.a=1", "seed", "integer"),
        ("train.epochs", "overrides", "a.b=value"),
        ("engine.deepspeed={zero_optimization: {stage: 1}}", "engine.deepspeed", "engine.name"),
        ("train.warmup_epochs=7", "train.warmup_epochs", "more than train.epochs"),
        ("train.ema=.nan", "train.ema", "finite"),
    ],
)
def test_mistakes_name_the_field_and_the_fix(override, field, words):
    with pytest.raises(ConfigError) as caught:
        load(None, [override])
    assert caught.value.field == field
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "overrides, field, words",
    [
        (["model.space.nam=nats", "model.architecture=a"], "model.space.nam", "did you mean 'name'"),
        (["augment.scale=[0.5, 0.1]"], "augment.scale", "smaller one first"),
        (["augment.scale=[0.1, 1.5]"], "augment.scale", "at most 1"),
        (["augment.ratio=[0, 1]"], "augment.ratio", "above 0"),
    ],
)
def test_mistakes_in_the_config_of_a_retraining(overrides, field, words):
    with pytest.raises(ConfigError) as caught:
        load(None, ["model.name=bossnet_t0", *overrides], RetrainConfig)
    assert caught.value.field == field and words in str(caught.value)


@pytest.mark.parametrize("name, text", [("a.json", "{"), ("a.yaml", "a: [1"), ("a.yaml", "- 1"), ("b.json", None)])
def test_unreadable_config_files(tmp_path, name, text):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match="^config: "):
        load(tmp_path / name)


def test_yaml_tags_do_not_run_code(tmp_path):
    (tmp_path / "a.yaml").write_text("out: !!python/object/apply:os.system ['touch hacked']")
    with pytest.raises(ConfigError, match="not valid yaml"):
        load(tmp_path / "a.yaml")


def test_the_batch_is_divided_over_ranks():
    config = load(None, ["train.batch=4096", "train.micro_batch=64"])
    assert [accumulation(config, n) for n in (1, 8, 64)] == [64, 8, 1]
    for ranks in (3, 128):
        with pytest.raises(ConfigError, match="train.batch"):
            accumulation(config, ranks)


def test_a_config_of_the_other_kind_is_told(project_root):
    with pytest.raises(ConfigError, match="config: has the section 'space', so it is not of a retraining"):
        load(project_root / "configs/quickstart_ds.json", [], RetrainConfig)
    with pytest.raises(ConfigError, match="config: has the section 'model', so it is not of a search.*retrain"):
        load(project_root / "configs/bossnet_cifar10.yaml")


def test_every_shipped_config_loads(project_root):
    files = [f for f in (project_root / "configs").rglob("*") if f.suffix in (".json", ".yaml")]
    assert len(files) >= 5
    for file in files:
        load(file, schema=RetrainConfig if file.name.startswith("bossnet_") else Config)
        assert "Command:" in file.read_text(), f"{file} does not open with its command"
