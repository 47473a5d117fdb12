"""The config of a retraining, written for an architecture that a selection found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from bossnas.config.loading import validate
from bossnas.config.retrain import RetrainConfig
from bossnas.config.search import Config
from bossnas.files import write_text

RECIPE_BATCH = 1024  # images per step of the paper's recipe, to which its learning rate belongs
SMALL = 64  # pixels up to which pictures are small
# small pictures and networks underfit on a short schedule: crops and flips are all
SMALL_AUGMENT = {
    "crop": "pad",
    "auto": None,
    "jitter": 0.0,
    "repeats": 1,
    "erasing": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
}


def config_for(run: Config, row: dict[str, Any], out: str) -> dict[str, Any]:
    """The keys of a retraining of ``row``, an architecture of `select`, on the images of the search ``run``."""
    batch, small = run.train.batch, run.space.image_size <= SMALL
    space = {key: value for key, value in run.space.model_dump(mode="json").items() if key != "image_size"}
    defaults = type(run.space)().model_dump(mode="json")
    own = {key: value for key, value in space.items() if key == "name" or value != defaults[key]}
    lr = RetrainConfig().train.lr * batch / RECIPE_BATCH
    values: dict[str, Any] = {
        "out": out,
        "model": {
            "architecture": row["architecture"],
            "space": {**own, "image_size": run.space.image_size},
            "image_size": run.space.image_size,
        },
        "data": {"train": run.data.train, "val": run.data.val, "workers": run.data.workers},
        "augment": {**(SMALL_AUGMENT if small else {}), "normalise": run.data.recipe},
        "train": {
            "batch": batch,
            "micro_batch": run.train.micro_batch,
            "lr": float(f"{lr:.3g}"),
            "min_lr": float(f"{lr / 100:.3g}"),
            **({"epochs": 30, "warmup_epochs": 2.0, "ema": 0.0} if small else {}),
            "precision": run.train.precision,
        },
        "evaluate": {"crop": 1.0} if small else {},
        "engine": {"name": "single"},
    }
    validate(values, RetrainConfig)  # what is written here can be read
    return {key: value for key, value in values.items() if value != {}}


def write_config(file: Path, run: Config, row: dict[str, Any], chosen: str) -> None:
    """Writes it as YAML. ``chosen``: how the architecture was chosen, in words."""
    values = config_for(run, row, f"runs/{file.stem}")
    rate = "ImageNet's recipe of BossNet-T0" if "crop" not in values["augment"] else "a short recipe for small pictures"
    head = [
        f"# Retraining of {row['architecture']}: {row['words']}.",
        f"# Chosen by: {chosen}",
        f"# Command:   bossnas retrain --config {file}",
        f"# The recipe is {rate}; the learning rate is the recipe's for {RECIPE_BATCH} images, in",
        "# proportion to the batch. Keys that are not here have the defaults of bossnas/config/retrain.py.",
    ]
    write_text(file, "\n".join(head) + "\n" + yaml.safe_dump(values, sort_keys=False, width=100))
