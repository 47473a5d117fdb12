"""The retraining on two ranks: every engine alike, as one rank, checkpoints from one engine to another, evaluation."""

from __future__ import annotations

import importlib.util
import json

import pytest
import ranks
import torch
from tiny_retraining import TINY, VIT, metrics, same, tensors

from bossnas.config.loading import load
from bossnas.config.retrain import RetrainConfig
from bossnas.config.shared import ReaderConfig
from bossnas.networks import pretrained
from bossnas.retrain import evaluate, train

ENGINES = {
    "ddp": ["engine.name=ddp"],
    "fsdp2": ["engine.name=fsdp2"],
    **{
        f"zero{stage}": ["engine.name=deepspeed", f"engine.deepspeed={{zero_optimization: {{stage: {stage}}}}}"]
        for stage in (0, 1, 2)
    },
}
GOES_ON = {"ddp": "zero1", "fsdp2": "ddp", "zero1": "zero2", "zero2": "fsdp2"}  # what this one wrote
MORE = ["checkpoint.every_steps=4", "evaluate.every_epochs=0", "train.clip=0.5", "train.lr=0.003", "train.eps=1e-4"]
LIMIT = 2e-4  # float32 sums in another order, five updates by Adam
VALUES = (10, 72)  # images of an evaluation: fewer batches than ranks, and a short last one


def engines():
    return [name for name in ENGINES if name[:4] != "zero" or importlib.util.find_spec("deepspeed")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder with every engine's run on two ranks: straight; from the fourth step of another, or its own ("again")."""
    folder = tmp_path_factory.mktemp("ranks")

    def again(source, to, engine, network, part="step00000004"):
        out = folder / to
        return {
            "copy": str(folder / source),
            "to": str(out),
            "resume": str(out / "checkpoints" / part),
            "sets": [*network, *MORE, *ENGINES[engine], f"out={out}"],
        }

    jobs = [{"sets": [*TINY, *MORE, *ENGINES[name], f"out={folder / name}"]} for name in engines()]
    for name in engines():
        if name in ("fsdp2", "zero2"):
            jobs.append(again(name, f"{name}-again", name, TINY))
        if GOES_ON.get(name) in engines():
            jobs.append(again(GOES_ON[name], f"{name}-other", name, TINY))
    jobs.append({"sets": [*TINY, *VIT, *MORE, *ENGINES["fsdp2"], f"out={folder / 'vit'}"]})
    jobs.append(
        {
            "sets": [
                *TINY,
                *MORE,
                *ENGINES["fsdp2"],
                "train.activation_checkpointing=true",
                f"out={folder / 'recomputed'}",
            ]
        }
    )
    jobs += [{"evaluate": str(folder / "ddp"), "val_images": n, "out": str(folder / f"eval{n}.json")} for n in VALUES]
    code, output = ranks.start("torchrun", 2, "retrain_worker.py", json.dumps(jobs))
    assert code == 0, output
    return folder


def trainable(folder, name="step00000006"):
    return {n: t for n, t in tensors(folder, name).items() if n.startswith(("model.", "ema.")) and "num_b" not in n}


def off(a, b):
    assert a.keys() == b.keys()
    return max((t - b[name]).abs().max().item() for name, t in a.items())


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_trains_as_ddp_and_goes_on_from_any_checkpoint(trained, name):
    if name not in engines():
        pytest.skip("deepspeed is not installed")
    reference = trainable(trained / "ddp")
    assert off(trainable(trained / "ddp", "step00000004"), reference) > 10 * LIMIT
    assert off(trainable(trained / name), reference) <= LIMIT
    assert any("running_var" in n for n in reference)
    if (trained / f"{name}-again").exists():
        assert same(tensors(trained / name), tensors(trained / f"{name}-again"))
        assert metrics(trained / name) == metrics(trained / f"{name}-again")
    if (trained / f"{name}-other").exists():
        assert off(trainable(trained / f"{name}-other"), reference) <= LIMIT
    text = (trained / name / "log.txt").read_text()
    assert "on 2 cpu rank(s): optimizer torch fused AdamW" in text


def test_two_ranks_train_as_one(trained, tmp_path):
    one = train.retrain(load(None, [*TINY, *VIT, *MORE, f"out={tmp_path / 'one'}"], RetrainConfig))
    assert off(trainable(one), trainable(trained / "vit")) <= LIMIT
    ours, theirs = (metrics(folder, "eval") for folder in (one, trained / "vit"))
    assert [line["images"] for line in theirs] == [72]
    assert all(a["loss"] == pytest.approx(b["loss"], abs=1e-3) for a, b in zip(ours, theirs, strict=True))


def test_sharded_and_recomputed_is_ddp(trained):
    assert off(trainable(trained / "recomputed"), trainable(trained / "ddp")) <= LIMIT


@pytest.mark.parametrize("images", VALUES)
def test_an_evaluation_is_the_same_on_one_rank(trained, images):
    everyone = json.loads((trained / f"eval{images}.json").read_text())
    network = pretrained.open_network(trained / "ddp")
    alone = evaluate.evaluate_network(network, ReaderConfig(workers=0, val_images=images), batch=20, device="cpu")
    assert everyone[0] == everyone[1] and everyone[0][:3] == [alone.images, alone.top1, alone.top5]
    if images == 72:  # both ranks had the same running statistics when they evaluated in training
        assert (network.about["top1"], network.about["loss"]) == (alone.top1, pytest.approx(alone.loss, rel=1e-6))
    assert alone.images == images and everyone[0][3] == pytest.approx(alone.loss, rel=1e-12)


def test_weights_of_the_average_are_whole(trained):
    network = pretrained.open_network(trained / "fsdp2")
    assert all(type(t) is torch.Tensor and t.isfinite().all() for t in network.weights.values())
