"""The config of a retraining, written for an architecture that a selection found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from bossnas.config.loading import validate
from bossnas.config.retrain import RetrainConfig
from bossnas.config.search import Config
from bossnas.files import write_text

RATE, SMALL_RATE = (1e-3, 1024), (2e-3, 128)  # of AdamW, for so many images in a step
SMALL = 64  # pixels up to which pictures are small
# as configs/bossnet_cifar10.yaml: small networks underfit on a short schedule, so crops and flips are all
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
    rate, images = SMALL_RATE if small else RATE
    lr = rate * batch / images
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


def write_config(file: Path, run: Config, result: dict[str, Any]) -> None:
    """Writes it as YAML for the best architecture of the ``result`` of `select`."""
    row = result["top"][0]
    values = config_for(run, row, f"runs/{file.stem}")
    limits = ", ".join(f"at most {value:,} {name}" for name, value in result["limits"].items()) or "no limit of cost"
    recipe = "a short one for small pictures" if "crop" in values["augment"] else "BossNet-T0's for ImageNet"
    head = [
        f"# Retraining of {row['architecture']}: {row['words']}.",
        f"# It is the best of {', '.join(result['runs'])} by {result['score']}, with {limits}.",
        f"# Command: bossnas retrain --config {file}",
        f"# The recipe is {recipe}; its learning rate is in proportion to the batch.",
        "# Keys that are not here have their defaults (bossnas/config/retrain.py).",
    ]
    write_text(file, "\n".join(head) + "\n" + yaml.safe_dump(values, sort_keys=False, width=100))
