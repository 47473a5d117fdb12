"""The settings of a tiny retraining, and what tests look at in its folder."""

from __future__ import annotations

import json

import torch

from bossnas.runs import checkpoint

TINY = [
    "model.name=bossnet",
    "model.options={width: 8, encoding: [[1], [], [0], [1]]}",
    "model.image_size=32",
    "model.drop=0.1",
    "model.drop_path=0.2",
    "data.workers=0",
    "data.val_images=72",
    "train.batch=32",
    "train.micro_batch=16",
    "train.epochs=2",
    "train.steps_per_epoch=3",
    "train.warmup_epochs=1",
    "train.ema=0.9",
    "train.lr=0.01",
    "checkpoint.every_steps=2",
    "evaluate.batch=20",
]
PLAIN = [
    "augment.auto=null",
    "augment.jitter=0",
    "augment.repeats=1",
    "augment.erasing=0",
    "augment.mixup=0",
    "augment.cutmix=0",
    "model.drop=0",
    "model.drop_path=0",
]
VIT = [
    "model.name=vit_tiny_patch16_224",
    "model.options={img_size: 32, patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2}",
    *PLAIN,
]  # without batch norms
SPEEDS = ("images_per_second", "seconds")


def metrics(folder, kind=None):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if name not in SPEEDS}
        for line in lines
        if kind in (None, line["kind"])
    ]


def tensors(folder, name="step00000006"):
    return checkpoint.read(folder / "checkpoints" / name, {"model", "ema", "momentum"})


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())
