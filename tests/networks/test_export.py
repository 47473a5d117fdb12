"""`bossnas export`: what it writes gives the network's logits elsewhere, and a failed export leaves nothing behind."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import timm
import torch
from ranks import HANG
from torch import Tensor, nn

from bossnas.errors import ConfigError
from bossnas.networks.export import export
from bossnas.networks.spec import Network, Spec, build_network, load_network, save_network

SIZE = 32
BOSSNET = Spec("bossnet", {"width": 8, "encoding": [[1], [0], [1, 0], [0]]}, 10, SIZE)
NATS = Spec("bossnas_nats", {"widths": [8] * 5}, 10, SIZE)
MBCONV = Spec("bossnas_mbconv", {"paths": ["21", "1023", "3210", "0123", "1132"], "width": 0.25}, 10, SIZE)
RESNET = Spec("test_resnet", {}, 10, SIZE)
HAS_ONNX = all(importlib.util.find_spec(package) for package in ("onnx", "onnxruntime", "onnxscript"))


def network(spec: Spec) -> Network:
    """With weights under which every layer matters."""
    torch.manual_seed(0)
    model = build_network(spec)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.running_mean.uniform_(-0.3, 0.3)
            module.running_var.uniform_(0.5, 2.0)
    return Network(spec, model.state_dict(), {"top1": 61.5, "run": "runs/cifar"})


def logits(given: Network, images: Tensor) -> Tensor:
    model = build_network(given.spec)
    model.load_state_dict(given.weights)
    with torch.no_grad():
        return model.eval()(images)


def images(count: int) -> Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5))


def near(a: Tensor, b: Tensor) -> bool:
    return float((a - b).abs().max()) < 1e-5 * max(1.0, float(b.abs().max()))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A network of both kinds of blocks in every format."""
    out, given = tmp_path_factory.mktemp("export") / "deep" / "out", network(BOSSNET)
    formats = [name for name in export.FORMATS if name != "onnx" or HAS_ONNX]
    return out, given, export.export_network(given, out, formats)


def test_every_format_is_there_and_described(exported):
    out, given, result = exported
    assert json.loads((out / "card.json").read_text()) == json.loads(json.dumps(result))
    assert [row["format"] for row in result["files"]] == [f for f in export.FORMATS if f != "onnx" or HAS_ONNX]
    named = {file for row in result["files"] for file in row["files"]}
    found = {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()}
    assert found - named == {"card.json", "README.md", "hub/README.md"} and named <= found
    for row in result["files"]:
        assert row["bytes"] == sum((out / file).stat().st_size for file in row["files"])
        assert row["difference"] <= row["limit"] and not row["fused"]
    assert result["parameters"] == sum(p.numel() for p in build_network(BOSSNET).parameters())
    assert result["network"] == BOSSNET.to_json() and result["about"] == given.about
    assert result["multiply_adds"] > 0 and result["versions"]["torch"]
    readme = (out / "README.md").read_text()
    assert "top1: 61.5" in readme and 'create_model("local-dir:hub"' in readme and "library_name: timm" in readme
    assert list(out.parent.iterdir()) == [out], "something is left beside the folder"
    text = export.lines(result, 80)
    assert max(map(len, text)) <= 80 and f"{result['parameters']:,} (" in text[0] and "difference" in "".join(text)
    assert all(any(line.startswith(row["format"]) for line in text) for row in result["files"])


def test_safetensors_and_the_hub_folder_load(exported):
    out, given, _ = exported
    wanted = logits(given, images(2))
    read = load_network(out / "bossnet.safetensors")
    assert read.spec == given.spec and read.about == given.about and near(logits(read, images(2)), wanted)
    model = timm.create_model(f"local-dir:{out / 'hub'}", pretrained=True).eval()
    with torch.no_grad():
        assert near(model(images(2)), wanted)
    data = timm.data.resolve_model_data_config(model)
    assert data["input_size"] == (3, SIZE, SIZE) and tuple(data["mean"]) == BOSSNET.mean
    assert model.pretrained_cfg.get("license") is None, "nobody has said what the weights' licence is"


def test_programs_take_batches_that_the_export_did_not_see(exported):
    out, given, _ = exported
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.load(str(out / "bossnet.torchscript.pt"))
    for model in (scripted, torch.export.load(out / "bossnet.pt2").module()):
        for count in (1, 5):
            with torch.no_grad():
                assert near(model(images(count)), logits(given, images(count)))
    if HAS_ONNX:
        import onnxruntime

        session = onnxruntime.InferenceSession(out / "bossnet.onnx")
        assert session.get_inputs()[0].shape == ["batch", 3, SIZE, SIZE]
        (found,) = session.run(None, {"images": images(5).numpy()})
        assert near(torch.from_numpy(found), logits(given, images(5)))


def test_the_standalone_file_runs_where_bossnas_is_not(exported, tmp_path):
    out, given, _ = exported
    torch.save(images(4), tmp_path / "images")
    code = (
        f"import sys\nfor name in ('bossnas', 'bossnas_kernels', 'timm'): sys.modules[name] = None\n"
        f"sys.path.insert(0, {str(out)!r})\nimport torch, bossnet\n"
        f"model = bossnet.load()\nassert not model.training\n"
        f"with torch.no_grad(): torch.save(model(torch.load({str(tmp_path / 'images')!r})), "
        f"{str(tmp_path / 'logits')!r})\n"
        f"import runpy; runpy.run_path({str(out / 'bossnet.py')!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-I", "-B", "-c", code], capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stderr
    assert near(torch.load(tmp_path / "logits"), logits(given, images(4)))
    assert "[2, 3, 32, 32] -> [2, 10]" in done.stdout and done.stdout.count("top classes") == 2


def test_batch_norms_fold_in_programs_alone(tmp_path):
    given = network(NATS)
    formats = ["safetensors", "torchscript", *(["onnx"] if HAS_ONNX else [])]
    result = export.export_network(given, tmp_path / "out", formats, fuse=True, batch=2)
    assert [row["fused"] for row in result["files"]] == [False, True, True][: len(formats)]
    assert load_network(tmp_path / "out" / "bossnas_nats.safetensors").weights.keys() == given.weights.keys()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.load(str(tmp_path / "out" / "bossnas_nats.torchscript.pt"))
    assert len(scripted.state_dict()) < len(given.weights) / 2, "the norms are still there"
    said = {line.split()[0]: line for line in export.lines(result, 120) if line}
    assert " folded " in said["torchscript"] and " kept " in said["safetensors"]
    if HAS_ONNX:
        import onnx

        graph = onnx.load(tmp_path / "out" / "bossnas_nats.onnx").graph
        kinds = [node.op_type for node in graph.node]
        assert kinds.count("BatchNormalization") == 1, "the last one, which follows a sum, alone is left"
        assert [d.dim_value for d in graph.input[0].type.tensor_type.shape.dim] == [2, 3, SIZE, SIZE]


def test_mbconv_and_networks_of_timm(tmp_path):
    result = export.export_network(network(MBCONV), tmp_path / "mbconv", ["torchscript", "standalone"], fuse=True)
    assert [row["fused"] for row in result["files"]] == [True, False]
    with pytest.raises(ConfigError, match="standalone: the definition of ResNet needs timm, not torch alone"):
        export.export_network(network(RESNET), tmp_path / "resnet", ["standalone"])
    assert not (tmp_path / "resnet").exists()
    export.export_network(network(RESNET), tmp_path / "resnet", ["hub", "torchscript"])
    assert "import bossnas" not in (tmp_path / "resnet" / "hub" / "README.md").read_text()


def test_other_logits_fail_and_leave_nothing(tmp_path, monkeypatch):
    write = export._torchscript
    monkeypatch.setattr(export, "_torchscript", lambda *a: [x + 1e-3 for x in write(*a)])
    with pytest.raises(
        ConfigError,
        match="torchscript: gives other logits than the network: the largest difference is 1.00e-03, allowed is",
    ):
        export.export_network(network(NATS), tmp_path / "out", ["safetensors", "torchscript"])
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(export, "_torchscript", lambda *a: [x * float("nan") for x in write(*a)])
    with pytest.raises(ConfigError, match="torchscript: gives other logits"):
        export.export_network(network(NATS), tmp_path / "out", ["torchscript"])


def test_a_folder_with_files_needs_force(tmp_path, monkeypatch):
    out, given = tmp_path / "out", network(NATS)
    out.mkdir()
    monkeypatch.chdir(out)
    export.export_network(given, Path("."), ["safetensors"])  # an empty folder is as good as none
    (out / "notes.txt").write_text("mine")
    (out / "hub").mkdir()
    with pytest.raises(ConfigError, match="is not empty; choose another folder, or write into it with `force`"):
        export.export_network(given, out, ["safetensors"])
    before = (out / "bossnas_nats.safetensors").read_bytes()
    monkeypatch.setattr(export, "_standalone", lambda *a: [torch.zeros(1, 10)] * 2)
    with pytest.raises(ConfigError, match="standalone: gives other logits"):
        export.export_network(given, out, ["safetensors", "standalone"], force=True)
    assert sorted(file.name for file in out.iterdir()) == [
        "README.md",
        "bossnas_nats.safetensors",
        "card.json",
        "hub",
        "notes.txt",
    ]
    assert (out / "bossnas_nats.safetensors").read_bytes() == before
    other = Network(NATS, {name: tensor + 1 for name, tensor in given.weights.items()}, {})
    export.export_network(other, out, ["safetensors"], force=True)
    assert (out / "bossnas_nats.safetensors").read_bytes() != before and (out / "notes.txt").read_text() == "mine"
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file; name a folder"):
        export.export_network(given, tmp_path / "file", ["safetensors"])


def test_an_unusable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="out: cannot write .*Not a directory"):
        export.export_network(network(NATS), tmp_path / "file" / "out", ["safetensors"])


@pytest.mark.quick
def test_weights_that_are_not_finite_are_refused(tmp_path):
    given = network(NATS)
    given.weights["fc.bias"][3] = float("nan")
    with pytest.raises(ConfigError, match="checkpoint: the network's logits are not finite"):
        export.export_network(given, tmp_path / "out", ["safetensors"])
    assert not list(tmp_path.iterdir())


class OneBatch(nn.Module):
    """A trace of it holds the number of images, which Python has computed with."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 10)

    def forward(self, x):
        return self.fc(x.mean((2, 3))).view(int(x.shape[0]), 10)


def test_a_network_that_a_format_cannot_hold(tmp_path, monkeypatch):
    model = OneBatch()
    monkeypatch.setattr(export, "build_network", lambda spec: model)
    given = Network(Spec("one_batch", {}, 10, SIZE), model.state_dict(), {})
    with pytest.raises(ConfigError, match="torchscript: cannot be made of one_batch .*leave it out of `formats`"):
        export.export_network(given, tmp_path / "out", ["torchscript"])
    export.export_network(given, tmp_path / "out", ["torchscript"], batch=2)


def test_formats_and_what_they_need(tmp_path, monkeypatch):
    assert export.chosen("all") is None
    assert export.chosen("hub, standalone,hub") == ["hub", "standalone"]
    for text in ("onxx", "safetensors,tflite", ","):
        with pytest.raises(ConfigError, match="formats: .*choose of safetensors, onnx"):
            export.chosen(text)
    with pytest.raises(ConfigError, match="fuse_bn: changes nothing in safetensors, hub, which keep"):
        export.export_network(network(NATS), tmp_path / "out", ["safetensors", "hub"], fuse=True)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "onnxscript" else find(name, *a))
    with pytest.raises(ConfigError, match=r"onnx: onnxscript not installed; pip install onnx onnxruntime onnxscript"):
        export.export_network(network(NATS), tmp_path / "out", ["onnx"])


@pytest.mark.quick
def test_a_file_is_opened_and_exported(tmp_path):
    given = network(NATS)
    save_network(tmp_path / "best.safetensors", given.spec, given.weights, given.about)
    result = export.export(tmp_path / "best.safetensors", tmp_path / "out", ["safetensors"])
    assert result["network"] == given.spec.to_json() and result["files"][0]["difference"] == 0
    torch.save({"model": given.weights}, tmp_path / "other.pth")
    result = export.export(
        tmp_path / "other.pth",
        tmp_path / "again",
        ["safetensors"],
        model="bossnas_nats",
        options={"widths": [8] * 5},
        image_size=16,
    )
    assert (result["network"]["image_size"], result["network"]["classes"]) == (16, 10)
    vit = network(Spec("vit_tiny_patch16_224", {"depth": 1, "embed_dim": 48, "num_heads": 1}, 10, 96))
    with pytest.raises(ConfigError, match=r"model.image_size: vit_.* does not take images of 96 pixels \(Input height"):
        export.export_network(vit, tmp_path / "vit", ["safetensors"])
    given.weights.pop("fc.bias")
    torch.save(given.weights, tmp_path / "short.pth")
    with pytest.raises(ConfigError, match="fc.bias"):
        export.export(
            tmp_path / "short.pth",
            tmp_path / "short",
            ["safetensors"],
            model="bossnas_nats",
            options={"widths": [8] * 5},
        )
    assert not (tmp_path / "short").exists()


def test_all_formats_leave_out_what_a_network_of_timm_lacks(tmp_path):
    pytest.importorskip("onnxscript")
    spec = Spec("resnet18", {"channels": [8, 8, 8, 8], "layers": [1, 1, 1, 1]}, 3, 32)
    network = Network(spec, build_network(spec).state_dict(), {})
    result = export.export_network(network, tmp_path / "out", export.chosen("all"))
    assert [row["format"] for row in result["files"]] == [name for name in export.FORMATS if name != "standalone"]
    modes = {file.stat().st_mode & 0o777 for file in (tmp_path / "out").rglob("*") if file.is_file()}
    assert len(modes) == 1  # others may read all of it, or none
