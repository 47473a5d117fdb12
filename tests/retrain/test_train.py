"""The retraining on one process: what it writes, resuming bit for bit, its average, its best, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_retraining import PLAIN, TINY, VIT, metrics, same, tensors

from bossnas.config.loading import load
from bossnas.config.retrain import RetrainConfig, RetrainTrain
from bossnas.config.shared import ReaderConfig
from bossnas.errors import ConfigError, Stopped
from bossnas.networks import pretrained
from bossnas.networks.bossnet import BossNet
from bossnas.networks.spec import Spec, build_network, load_network
from bossnas.retrain import evaluate, inherit, train as training
from bossnas.retrain.run import begin, build, epoch_batches
from bossnas.runs.metrics import Metrics


def config(out, *more):
    return load(None, [*TINY, f"out={out}", *more], RetrainConfig)


def run(out, *more, resume=None):
    return training.retrain(config(out, *more), resume)


def close(a, b, limit):
    assert a.keys() == b.keys()
    off = max((t.double() - b[name].double()).abs().max().item() for name, t in a.items())
    assert off <= limit, off


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return run(tmp_path_factory.mktemp("runs") / "a", "checkpoint.keep=3")


@pytest.mark.quick
def test_the_run_folder_holds_everything(finished):
    result = json.loads((finished / "result.json").read_text())
    lines = metrics(finished)
    assert [(line["kind"], line["step"]) for line in lines] == [
        ("train", 1),
        ("train", 2),
        ("train", 3),
        ("eval", 3),
        ("train", 4),
        ("train", 5),
        ("train", 6),
        ("eval", 6),
    ]
    assert all("block" not in line for line in lines)
    last = lines[-1]
    assert result["top1"] == max(last["top1"], last["ema_top1"]) and last["images"] == last["ema_images"] == 72
    assert result["best"]["top1"] == max(line[name] for line in lines for name in ("top1", "ema_top1") if name in line)
    network = load_network(finished / "best.safetensors")
    assert network.spec == Spec.from_json(json.loads((finished / "network.json").read_text()))
    assert network.spec.classes == 10 and network.spec.image_size == 32
    assert network.about["top1"] == result["best"]["top1"] and network.about["step"] == result["best"]["step"]
    model = build_network(network.spec)
    assert result["params"] == sum(p.numel() for p in model.parameters()) and result["macs"] > 1e5
    kept = tensors(finished)
    kind = "ema." if result["ema"] else "model."
    assert same(
        load_file(finished / "last.safetensors"),
        {name.removeprefix(kind): t for name, t in kept.items() if name.startswith(kind)},
    )
    assert kept["momentum.0.step"] == 6
    text = (finished / "log.txt").read_text()
    for words in (
        "DEMONSTRATION",
        "retraining of bossnet",
        "72 validation images",
        "optimizer torch fused AdamW",
        "kernels off",
        "single on 1 cpu rank(s)",
    ):
        assert words in text
    assert (finished / "done").exists()


@pytest.mark.quick
def test_the_best_network_evaluates_as_it_did_in_training(finished):
    network = pretrained.open_network(finished)
    settings = ReaderConfig(workers=0, val_images=72)
    result = evaluate.evaluate_network(network, settings, batch=20, device="cpu")
    assert result.images == 72 and result.top1 == network.about["top1"] and result.top5 == network.about["top5"]
    assert "top-1" in evaluate.line(result)
    everything = evaluate.evaluate_network(network, ReaderConfig(workers=0), batch=128, device="cpu")
    assert everything.images == 500


@pytest.mark.quick
def test_top_5_needs_six_classes():
    x, labels = torch.eye(5), torch.tensor([0, 1, 2, 3, 0])
    result = evaluate.evaluate(
        torch.nn.Identity(), [(x[:3], labels[:3]), (x[3:], labels[3:])], 5, device=torch.device("cpu")
    )
    assert (result.images, result.top1, result.top5) == (5, pytest.approx(0.8), None)
    x, labels = torch.arange(7.0).repeat(2, 1), torch.tensor([2, 1])  # two of the five largest
    result = evaluate.evaluate(torch.nn.Identity(), [(x, labels)], 7, device=torch.device("cpu"))
    assert (result.top1, result.top5) == (0.0, 0.5)
    assert result.loss == pytest.approx(torch.nn.functional.cross_entropy(x, labels).item())


@pytest.fixture
def stop_after(monkeypatch):
    """Sends SIGTERM once the metrics of a step, or of the evaluation after it, are written."""
    write = Metrics.write

    def arrange(step, wanted="train"):
        def stopping(self, kind, block, at, **values):
            write(self, kind, block, at, **values)
            if kind == wanted and at == step:
                os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(Metrics, "write", stopping)

    return arrange


@pytest.mark.parametrize(("step", "kind"), [(1, "train"), (3, "train"), (3, "eval")])
def test_going_on_after_a_stop_is_the_straight_run_bit_for_bit(finished, tmp_path, stop_after, step, kind):
    stop_after(step, kind)
    with pytest.raises(Stopped, match="SIGTERM.*everything is saved"):
        run(tmp_path / "b")
    assert not (tmp_path / "b" / "done").exists() and (tmp_path / "b" / "checkpoints" / f"step0000000{step}").exists()
    stop_after(-1)
    run(tmp_path / "b", resume="auto")
    assert metrics(tmp_path / "b") == metrics(finished)
    assert same(tensors(tmp_path / "b"), tensors(finished))
    for name in ("best.safetensors", "last.safetensors"):
        assert same(load_file(tmp_path / "b" / name), load_file(finished / name))
    ours, theirs = (json.loads((f / "result.json").read_text()) for f in (tmp_path / "b", finished))
    assert ours.keys() == theirs.keys()
    assert all(value == theirs[name] for name, value in ours.items() if "second" not in name)


def test_going_back_to_a_checkpoint_and_finished_runs(finished, tmp_path):
    out = tmp_path / "b"
    shutil.copytree(finished, out)
    back = out / "checkpoints" / "step00000002"
    retrain_before = tensors(finished)
    run(out, "checkpoint.keep=3", resume=str(back))
    assert same(tensors(out), retrain_before) and metrics(out) == metrics(finished)
    run(out, "checkpoint.keep=3", resume="auto")  # a finished run says the same again
    assert metrics(out) == metrics(finished) and "this run is finished" in (out / "log.txt").read_text()
    with pytest.raises(ConfigError, match="^out: .* already holds this run"):
        run(out)
    with pytest.raises(ConfigError, match=r"^out: .* holds another run \(train.lr differ"):
        run(out, "train.lr=0.02", resume="auto")
    with pytest.raises(ConfigError, match="^resume: .* is of another run"):
        run(tmp_path / "c", resume=str(back))


def test_the_best_weights_are_those_of_the_best_evaluation_that_counts(tmp_path, monkeypatch):
    """The run goes back to step 4, and what comes after it then comes out worse."""
    accuracy = {3: 0.5, 6: 0.9}

    def evaluated(model, batches, classes, **rest):
        step = 3 if len(metrics(tmp_path / "a", "eval")) == 0 else 6
        return evaluate.Result(72, accuracy[step], None, 1.0, 0.0)

    monkeypatch.setattr(training.evaluate, "evaluate", evaluated)
    run(tmp_path / "a", "checkpoint.keep=3")
    assert load_network(tmp_path / "a/best.safetensors").about["step"] == 6
    accuracy[6] = 0.1
    run(tmp_path / "a", "checkpoint.keep=3", resume=str(tmp_path / "a/checkpoints/step00000004"))
    result = json.loads((tmp_path / "a/result.json").read_text())
    about = load_network(tmp_path / "a/best.safetensors").about
    assert (about["step"], about["top1"]) == (result["best"]["step"], result["best"]["top1"])


def test_the_average_follows_weights_and_running_statistics(tmp_path):
    out = run(
        tmp_path / "a", "checkpoint.every_steps=1", "checkpoint.keep=10", "train.ema=0.95", "train.ema_warmup=true"
    )
    for step in range(1, 6):
        before, after = (tensors(out, f"step{s:08d}") for s in (step, step + 1))
        share = min(0.95, (1 + step) / (10 + step))
        moved = 0
        for name, t in after.items():
            if name.startswith("ema.") and t.is_floating_point():
                expected = before[name] + (1 - share) * (after["model." + name[4:]] - before[name])
                torch.testing.assert_close(t, expected, rtol=1e-5, atol=1e-6)
                moved += not torch.equal(t, before[name])
        assert moved > 20


def test_without_average(tmp_path):
    out = run(tmp_path / "a", "train.ema=0", "train.epochs=1")
    assert not any(name.startswith("ema.") for name in tensors(out, "step00000003"))
    assert not any(name.startswith("ema_") for line in metrics(out, "eval") for name in line)


def test_the_best_weights_are_kept(tmp_path, monkeypatch):
    scores = iter([0.1, 0.3, 0.5, 0.2, 0.5, 0.4])  # network and average after each of three epochs
    monkeypatch.setattr(evaluate, "evaluate", lambda *_, **__: evaluate.Result(72, next(scores), 0.9, 1.0, 0.1))
    out = run(
        tmp_path / "a", "train.epochs=3", "train.steps_per_epoch=1", "checkpoint.every_steps=1", "checkpoint.keep=9"
    )
    best, last = (load_network(out / f"{name}.safetensors").about for name in ("best", "last"))
    assert (best["step"], best["top1"], best["ema"]) == (2, 0.5, False)
    assert (last["step"], last["top1"], last["ema"]) == (3, 0.5, False)
    kept = tensors(out, "step00000002")
    assert same(
        load_file(out / "best.safetensors"), {name[6:]: t for name, t in kept.items() if name.startswith("model.")}
    )
    assert [line["best"] for line in metrics(out, "eval")] == [0.3, 0.5, 0.5]


def test_a_step_that_is_not_finite_changes_nothing(tmp_path, monkeypatch):
    batches = epoch_batches

    def spoiled(run, epoch, start):
        for number, (images, targets) in enumerate(batches(run, epoch, start), 2 * start):
            yield (images * float("nan") if (epoch, number) == (1, 1) else images), targets

    monkeypatch.setattr(training, "epoch_batches", spoiled)
    settings = ("checkpoint.every_steps=1", "checkpoint.keep=9", "train.precision=fp32")
    out = run(tmp_path / "a", *settings)
    assert [line["outcome"] for line in metrics(out, "train")] == ["applied"] * 3 + ["bad"] + ["applied"] * 2
    before, after = tensors(out, "step00000003"), tensors(out, "step00000004")
    # the count of batches is for nothing but norms without momentum
    assert all(torch.equal(t, before[name]) for name, t in after.items() if "num_batches" not in name)
    assert all(t.isfinite().all() for t in tensors(out).values())
    assert (
        metrics(out, "train")[3]["loss"] is None
        and "step 4: its gradient is not finite" in (out / "log.txt").read_text()
    )
    with pytest.raises(ConfigError, match="^train.lr: 1 steps had a gradient that is not finite"):
        run(tmp_path / "b", "train.max_bad_steps=0")


def test_fp16_begins_with_a_loss_scale(tmp_path):
    out = run(tmp_path / "a", "train.precision=fp16", "train.epochs=1", *PLAIN)
    scales = [line["loss_scale"] for line in metrics(out, "train")]
    assert scales[0] >= 2.0**13 and "momentum.0.loss_scale" in tensors(out, "step00000003")


def test_micro_batches_add_up_to_the_batch(tmp_path):
    whole = run(tmp_path / "a", *VIT, "train.micro_batch=32")
    parts = run(tmp_path / "b", *VIT, "train.micro_batch=8")
    other = run(tmp_path / "c", *VIT, "seed=1", "train.micro_batch=32")
    weights = {f: {n: t for n, t in tensors(f).items() if not n.startswith("momentum")} for f in (whole, parts, other)}
    close(weights[whole], weights[parts], 1e-4)
    assert not same(weights[whole], weights[other])


def test_activation_checkpointing_and_compiling_change_nothing_but_rounding(tmp_path, monkeypatch):
    more = ("train.epochs=1",)
    plain = tensors(run(tmp_path / "a", *more), "step00000003")
    names = [n for n in plain if n.startswith(("model.", "ema.")) and "num_batches" not in n]
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    for what in ("activation_checkpointing", "compile"):
        other = tensors(run(tmp_path / what, *more, f"train.{what}=true"), "step00000003")
        close({n: plain[n] for n in names}, {n: other[n] for n in names}, 1e-4)
    monkeypatch.delattr(BossNet, "set_grad_checkpointing")
    with pytest.raises(ConfigError, match="^train.activation_checkpointing: bossnet has none"):
        run(tmp_path / "d", "train.activation_checkpointing=true")


@pytest.mark.quick
def test_the_schedule_warms_up_and_ends_at_the_least_rate():
    train = RetrainTrain(epochs=10, lr=1.0, min_lr=0.1, warmup_epochs=2, warmup_lr=0.01)
    at = training.learning_rates(train, 5)
    assert at(0) == pytest.approx(0.01) and at(5) == pytest.approx(0.01 + 0.99 / 2)
    assert at(25) == pytest.approx(0.55) and at(50) == pytest.approx(0.1) and at(49) > 0.1
    assert at(10) == max(at(step) for step in range(50))


def test_weights_to_begin_with(finished, tmp_path):
    file = tmp_path / "start.safetensors"
    shutil.copy(finished / "last.safetensors", file)
    settings = config(tmp_path / "b", f"model.checkpoint={file}")
    built = build(settings, begin(settings, None))
    assert same(built.network.model.state_dict(), load_file(file)) and same(
        built.network.average.state_dict(), load_file(file)
    )
    with pytest.raises(ConfigError, match="^model.checkpoint: "):
        run(tmp_path / "c", "model.options={width: 16}", f"model.checkpoint={file}")
    assert not (tmp_path / "c").exists()


def test_a_run_that_goes_on_needs_nothing_of_what_it_began_with(tmp_path, monkeypatch, stop_after):
    spec = Spec("bossnet", {"width": 8, "encoding": [[1], [], [0], [1]]}, 10, 32)
    asked = []
    monkeypatch.setattr(inherit, "spec_of_run", lambda *given, **more: asked.append((given, more)) or spec)

    def from_supernet(model, spec, folder):
        torch.nn.init.constant_(model.conv1.weight, 0.25)
        return inherit.Report(["conv1.weight"], ["fc.weight", "fc.bias"])

    monkeypatch.setattr(inherit, "inherit", from_supernet)
    search = [
        "model.name=null",
        "model.run=runs/gone",
        "model.inherit=true",
        "model.options={}",
        "augment.normalise=cifar",
    ]
    stop_after(1)
    with pytest.raises(Stopped):
        run(tmp_path / "a", *search)
    assert asked == [((Path("runs/gone"), 10, 32, {}), {"inherited": True})]
    log = (tmp_path / "a" / "log.txt").read_text()
    assert "1 tensors are from the supernet of runs/gone; fresh are 2, of fc" in log
    assert json.loads((tmp_path / "a" / "network.json").read_text())["mean"][0] == pytest.approx(0.4914)
    first = tensors(tmp_path / "a", "step00000001")["model.conv1.weight"]
    assert (first - 0.25).abs().max() < 0.1
    monkeypatch.setattr(inherit, "spec_of_run", None)
    monkeypatch.setattr(inherit, "inherit", None)
    stop_after(-1)
    assert (run(tmp_path / "a", *search, resume="auto") / "done").exists()


@pytest.mark.parametrize(
    "sets, words",
    [
        (["model.name=bossnet_t9"], "model.name: timm knows no 'bossnet_t9'"),
        (["train.steps_per_epoch=100"], "train.steps_per_epoch: an epoch takes 3200 images"),
        (["train.batch=4096", "train.steps_per_epoch=null"], "train.batch: an epoch takes 4096 images"),
        (["train.micro_batch=1"], "train.micro_batch: 1 is odd"),
        (["model.classes=3"], "model.classes: 3, but data.train has the label 9"),
        (["train.sync_batch_norm=true"], "train.sync_batch_norm: is on, but torch has"),
        (["train.optimizer=lamb", "engine.name=fsdp2"], "train.optimizer: is lamb"),
        (["train.fused=apex"], "train.fused: is apex, which cannot be used here"),
        (
            ["model.name=vit_tiny_patch16_224", "model.options={}"],
            "model.image_size: vit_tiny_patch16_224 does not take",
        ),
        (["augment.auto=randy"], "augment.auto: timm does not know"),
        (["model.checkpoint=nowhere.pth"], "model.checkpoint: "),
        (["kernels=reference", "model.name=resnet18", "model.options={}"], "kernels: are not made for ResNet"),
        (
            ["engine.name=deepspeed", "engine.deepspeed={optimizer: {type: Lamb}}"],
            "engine.deepspeed.optimizer: the optimizer is ADAMW",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(tmp_path, sets, words):
    with pytest.raises(ConfigError, match=f"^{words}"):
        run(tmp_path / "a", *sets)
    assert not (tmp_path / "a").exists()


def test_the_kernels_train_the_same_network(tmp_path):
    more = ("train.epochs=1", "train.lr=0.001")
    plain, other = (tensors(run(tmp_path / k, *more, f"kernels={k}"), "step00000003") for k in ("off", "reference"))
    close(
        {n: t for n, t in plain.items() if n.startswith("model.") and "num_batches" not in n},
        {n: t for n, t in other.items() if n.startswith("model.") and "num_batches" not in n},
        2e-3,
    )
    assert "kernels reference" in (tmp_path / "reference" / "log.txt").read_text()
