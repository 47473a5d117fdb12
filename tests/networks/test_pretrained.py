"""Weights from foreign files: read safely, unwrapped, and fitted strictly or refused in one clear line."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from bossnas.errors import ConfigError
from bossnas.networks import pretrained
from bossnas.networks.spec import Spec, build_network, load_network, save_network

SMALL = Spec("bossnet", {"encoding": [[1], [1], [1], [0]], "width": 8}, classes=5, image_size=64)


def small(classes: int = 5) -> nn.Module:
    return build_network(Spec(SMALL.architecture, SMALL.model_args, classes=classes))


def problem(call) -> str:
    with pytest.raises(ConfigError) as error:
        call()
    text = str(error.value)
    assert "\n" not in text and error.value.fix
    return text


def same(a: dict, b: dict) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


class Harmful:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("how", ["archive", "legacy", "plain"])
def test_a_pickle_that_asks_for_code_is_refused_and_nothing_of_it_is_run(tmp_path, how):
    marker, file = tmp_path / "marker", tmp_path / "harmful.pth"
    content = {"model": {"weight": torch.zeros(2)}, "args": Harmful(marker)}
    if how == "plain":
        file.write_bytes(pickle.dumps({"args": Harmful(marker)}, protocol=2))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=how == "archive")
    text = problem(lambda: pretrained.read(file))
    assert f"{os.system.__module__}.system" in text and "nothing of it was run" in text
    assert not marker.exists()
    torch.load(file, weights_only=False) if how != "plain" else pickle.loads(file.read_bytes())
    assert marker.exists()  # so the file was harmful


def test_a_pickled_network_and_other_classes_are_refused_by_name(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "whole.pth")
    assert "torch.nn.modules.linear.Linear" in problem(lambda: pretrained.read(tmp_path / "whole.pth"))
    torch.save({"model": {"w": torch.zeros(1)}, "args": argparse.Namespace(out=Path("/x"))}, tmp_path / "path.pth")
    assert "PosixPath" in problem(lambda: pretrained.read(tmp_path / "path.pth"))


def test_damaged_and_foreign_files_give_one_clear_line_each(tmp_path):
    def read(name: str, content: bytes | None = None) -> str:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        return problem(lambda: pretrained.read(tmp_path / name))

    torch.save({"weight": torch.rand(100, 100)}, tmp_path / "good.pth")
    good = (tmp_path / "good.pth").read_bytes()
    for left in (len(good) // 2, len(good) - 10, 100):
        assert "damaged" in read("cut.pth", good[:left])
    turned = bytearray(good)
    turned[len(good) // 2] ^= 1
    assert "checksum" in read("turned.pth", bytes(turned))
    torch.save({"weight": torch.rand(100)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert "damaged" in read("old.pth", (tmp_path / "old.pth").read_bytes()[:-100])
    assert "no file of torch.save" in read("text.pth", b"<html>not found</html>" * 9)
    assert "is empty" in read("empty.pth", b"") and "is empty" in read("empty.safetensors", b"")
    assert "No such file" in read("missing.pth") and "No such file" in read("missing.safetensors")
    assert "is a folder" in problem(lambda: pretrained.read(tmp_path))
    save_file({"weight": torch.rand(100)}, tmp_path / "good.safetensors")
    assert "damaged" in read("cut.safetensors", (tmp_path / "good.safetensors").read_bytes()[:-9])
    assert "no safetensors file" in read("other.safetensors", good)
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        archive.writestr("script/constants.pkl", b"")
        archive.writestr("script/data.pkl", b"")
    assert "TorchScript" in read("script.pt")


def test_files_without_weights_say_what_they_hold(tmp_path):
    deep = {"weight": torch.zeros(1)}  # a pickle can hold itself, so looking into it has to end somewhere
    for _ in range(9):
        deep = {"model": deep}
    for content, found in (
        ({"net": {"w": torch.zeros(1)}, "epoch": 3}, "only net, epoch"),
        ([1, 2], "a list"),
        ({}, "only nothing"),
        ({"model": {"w": 1.0}}, "only model"),
        (deep, "only model"),
    ):
        torch.save(content, tmp_path / "odd.pth")
        assert found in problem(lambda: pretrained.read(tmp_path / "odd.pth"))


def test_checksums_that_were_left_out_are_no_damage(tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"weight": torch.ones(3)}, tmp_path / "no.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    assert pretrained.read(tmp_path / "no.pth")["weight"].tolist() == [1, 1, 1]


def with_prefix(state: dict, prefix: str) -> dict:
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.quick
def test_wrappers_prefixes_and_the_average_are_found(tmp_path):
    state = {"conv1.weight": torch.rand(2, 3), "fc.bias": torch.rand(2), "bn.num_batches_tracked": torch.tensor(4)}
    average = {name: value + 1 for name, value in state.items()}
    args, score = argparse.Namespace(lr=0.1, model="x"), np.float64(81.2)
    deit = {"model": state, "optimizer": {"state": {}}, "epoch": 3, "model_ema": average, "args": args, "best": score}
    timm_like = {"state_dict": state, "state_dict_ema": with_prefix(average, "module."), "arch": "x", "args": args}
    lightning = {"state_dict": with_prefix(state, "model."), "global_step": 3}
    compiled = {"model": with_prefix(with_prefix(state, "_orig_mod."), "module.")}
    averaged = {"n_averaged": torch.tensor(9), **with_prefix(state, "module.")}
    for content, ema, expected in (
        (deit, True, average),
        (deit, False, state),
        (timm_like, True, average),
        (timm_like, False, state),
        (lightning, True, state),
        (compiled, True, state),
        (averaged, True, state),
        ({"module": state}, True, state),
        (state, True, state),
        ({"model_ema": average}, False, average),
        ({"model_ema": None, "model": state}, True, state),
    ):
        torch.save(content, tmp_path / "some.pth")
        assert same(pretrained.read(tmp_path / "some.pth", ema), expected)
    inner = {"model.weight": torch.ones(1), "head.weight": torch.ones(1)}  # a prefix of some names only
    torch.save(inner, tmp_path / "some.pth")
    assert same(pretrained.read(tmp_path / "some.pth"), inner)


def test_half_precision_is_read_as_float32(tmp_path):
    state = {
        "a": torch.rand(3).half(),
        "b": torch.rand(3).bfloat16(),
        "c": nn.Parameter(torch.rand(3)),
        "n": torch.tensor(3),
    }
    torch.save(state, tmp_path / "half.pth")
    read = pretrained.read(tmp_path / "half.pth")
    assert [t.dtype for t in read.values()] == [torch.float32] * 3 + [torch.int64]
    assert torch.equal(read["a"].half(), state["a"]) and not read["c"].requires_grad


def test_tensors_that_no_weight_can_be_a_copy_of_are_not_taken_for_weights(tmp_path):
    model = small()
    weight = model.state_dict()["fc.weight"]
    for odd in (weight.to_sparse(), weight.to("meta"), weight.to(torch.complex64)):
        torch.save(model.state_dict() | {"fc.weight": odd}, tmp_path / "odd.pth")
        assert "1 are missing (fc.weight)" in problem(
            lambda: pretrained.fit(model, pretrained.read(tmp_path / "odd.pth"), "it")
        )


@pytest.mark.quick
def test_fitting_is_strict_and_lists_what_does_not_fit():
    torch.manual_seed(0)
    model, other = small(), small()
    pretrained.fit(model, other.state_dict(), "a.pth")
    assert same(model.state_dict(), other.state_dict())

    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = {name: torch.zeros_like(value) for name, value in before.items()}
    assert "a.pth has 7 classes, the network 5; set `model.classes` to 7" in problem(
        lambda: pretrained.fit(model, small(7).state_dict(), "a.pth")
    )
    lacking = {name: value for name, value in state.items() if name not in ("conv1.weight", "bn1.bias")}
    text = problem(lambda: pretrained.fit(model, lacking | {"head.weight": torch.zeros(1)}, "a.pth"))
    assert "2 are missing (conv1.weight, bn1.bias)" in text and "1 are not the network's (head.weight)" in text
    assert f"of its {len(before)} weights" in text
    wrong = state | {"conv1.weight": torch.zeros(9, 3, 7, 7), "fc.weight": small(7).state_dict()["fc.weight"]}
    shape = "x".join(map(str, before["conv1.weight"].shape))
    assert f"2 have another shape (conv1.weight 9x3x7x7 in place of {shape}, fc.weight" in problem(
        lambda: pretrained.fit(model, wrong, "a.pth")
    )
    columns = state | {"fc.weight": torch.zeros(5, 9)}  # of as many classes
    assert "1 have another shape (fc.weight 5x9 in place of" in problem(lambda: pretrained.fit(model, columns, "a.pth"))
    assert "fc.bias () in place of 5" in problem(
        lambda: pretrained.fit(model, state | {"fc.bias": torch.tensor(1.0)}, "a.pth")
    )
    assert same(model.state_dict(), before)  # all or none
    many = problem(lambda: pretrained.fit(model, {}, "a.pth"))
    assert f"{len(before)} are missing (conv1.weight, bn1.weight, bn1.bias, ...)" in many and len(many) < 300


def test_a_networks_own_file_says_what_it_is(tmp_path):
    model, file = small(), tmp_path / "best.safetensors"
    save_network(file, SMALL, model.state_dict(), {"top1": 0.5})
    network = pretrained.open_network(file)
    assert network.spec == SMALL and network.about == {"top1": 0.5}
    assert same(network.weights, load_network(file).weights)
    assert pretrained.open_network(file, image_size=96).spec.image_size == 96
    assert "says itself that it is bossnet" in problem(lambda: pretrained.open_network(file, model="resnet18"))
    assert "has 5 classes" in problem(lambda: pretrained.open_network(file, classes=10))
    assert sorted(pretrained.read(file)) == sorted(model.state_dict())


def test_a_folder_must_be_a_retrainings(tmp_path):
    def run(kind: str | None) -> Path:
        folder = tmp_path / str(kind)
        folder.mkdir()
        if kind:
            (folder / "config.json").write_text("{}")
            (folder / "versions.json").write_text(json.dumps({"kind": kind}))
        if kind == "retraining":
            (folder / "network.json").write_text("{}")
        return folder

    assert "not a run's folder" in problem(lambda: pretrained.open_network(run(None)))
    assert "holds a search" in (text := problem(lambda: pretrained.open_network(run("search"))))
    assert "bossnas retrain --from-run" in text
    folder = run("retraining")
    assert "no best.safetensors yet" in problem(lambda: pretrained.open_network(folder))
    save_network(folder / "best.safetensors", SMALL, small().state_dict(), {})
    assert pretrained.open_network(folder).spec == SMALL


def test_a_foreign_checkpoint_with_its_name_in_timm(tmp_path):
    model = small()
    for file in (tmp_path / "foreign.pth", tmp_path / "foreign.safetensors"):
        if file.suffix == ".pth":
            torch.save({"state_dict": with_prefix(model.state_dict(), "module.")}, file)
        else:
            save_file(model.state_dict(), file)
        assert "model: is not set" in problem(lambda file=file: pretrained.open_network(file))
        assert "timm knows no 'bossnett'" in problem(lambda file=file: pretrained.open_network(file, model="bossnett"))
        network = pretrained.open_network(file, model="bossnet", options=SMALL.model_args, image_size=64)
        assert network.spec == SMALL  # with the rows of its classifier
        fresh = build_network(network.spec)
        pretrained.fit(fresh, network.weights, str(file))
        assert torch.equal(fresh.state_dict()["fc.weight"], model.state_dict()["fc.weight"])
        odd = model.state_dict() | {"fc.weight": torch.tensor(1.0)}
        torch.save(odd, tmp_path / "odd.pth")
        opened = pretrained.open_network(tmp_path / "odd.pth", model="bossnet", options=SMALL.model_args)
        assert "fc.weight () in place of" in problem(
            lambda opened=opened: pretrained.fit(build_network(opened.spec), opened.weights, "it")
        )
        other = pretrained.open_network(file, model="resnet10t", classes=7)
        assert (other.spec.classes, other.spec.image_size, other.spec.crop) == (7, 176, 0.875)
        assert "are missing" in problem(
            lambda other=other: pretrained.fit(build_network(other.spec), other.weights, "it")
        )


def test_a_release_like_checkpoint_of_bossnet_t0_loads_strictly(tmp_path, shared):
    manifest = json.loads((shared / "golden" / "bossnet_T0_manifest.json").read_text())
    state = {
        name: torch.zeros(shape, dtype=torch.float16 if kind == "float32" else torch.int64)
        for name, shape, kind in manifest["state_dict"]
    }
    average = {name: value + 1 for name, value in state.items()}
    torch.save(
        {"model": state, "model_ema": average, "args": argparse.Namespace(lr=5e-4), "epoch": 299}, tmp_path / "T0.pth"
    )
    network = pretrained.open_network(tmp_path / "T0.pth", model="bossnet_t0")
    assert network.spec == Spec("bossnet_t0")
    model = build_network(network.spec)
    pretrained.fit(model, network.weights, "T0.pth")
    assert len(state) == 380 and all((value == 1).all() for value in model.state_dict().values())


@pytest.mark.quick
def test_a_hub_folder_is_opened(tmp_path):
    spec = Spec(
        "bossnet",
        {"encoding": [[1], [], [0], [1]], "width": 8},
        7,
        48,
        (0.4, 0.5, 0.6),
        (0.1, 0.2, 0.3),
        "bilinear",
        1.0,
    )
    model = build_network(spec)
    about = {
        "input_size": (3, 48, 48),
        "mean": spec.mean,
        "std": spec.std,
        "interpolation": "bilinear",
        "crop_pct": 1.0,
    }
    timm.models.save_for_hf(
        model,
        tmp_path / "hub",
        safe_serialization=True,
        model_config={"pretrained_cfg": about, "model_args": spec.model_args},
    )
    opened = pretrained.open_network(tmp_path / "hub")
    pretrained.fit(build_network(opened.spec), opened.weights, "hub")
    assert opened.spec.model_args == {**spec.model_args, "in_chans": 3}
    assert all(
        getattr(opened.spec, key) == getattr(spec, key)
        for key in ("architecture", "classes", "image_size", "mean", "std", "interpolation", "crop")
    )
    (tmp_path / "hub/config.json").write_text('{"architecture": "bossnet"}')
    with pytest.raises(ConfigError, match="does not describe a network as timm does"):
        pretrained.open_network(tmp_path / "hub")
