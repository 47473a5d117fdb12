"""What an exported network is, for people and programs: card.json and README.md of the folder of `bossnas export`."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from bossnas import __version__, spaces
from bossnas.networks.spec import Network, Spec
from bossnas.spaces import cost
from bossnas.spaces.paths import decode
from bossnas.spaces.words import in_runs, words

FORMAT = "bossnas-card-1"
SHOWN = ("bossnas", "torch", "timm", "onnx", "onnxruntime")
USE = {  # by format; {name} and {ours} are put in
    "safetensors": """```python
from pathlib import Path
from bossnas import networks

network = networks.load(Path("{name}.safetensors"))
model = networks.build(network.spec)
model.load_state_dict(network.weights)
```
`bossnas evaluate` and `bossnas retrain` (`model.checkpoint`) read this file, too.""",
    "onnx": """```python
import onnxruntime

session = onnxruntime.InferenceSession("{name}.onnx")
(logits,) = session.run(None, {{"images": images}})  # float32 [n, 3, S, S]
```""",
    "torchscript": """```python
import torch

model = torch.jit.load("{name}.torchscript.pt")
```""",
    "torch_export": """```python
import torch

model = torch.export.load("{name}.pt2").module()
```""",
    "standalone": """`{name}.py` needs torch alone. `python {name}.py` tries it out.
```python
import {name}

model = {name}.load()  # weights: {name}.pt beside the file
```""",
    "hub": """A repository for the Hugging Face hub that timm reads; `hf upload OWNER/NAME hub` uploads it.
```python
{ours}import timm

model = timm.create_model("local-dir:hub", pretrained=True)  # after the upload: "hf-hub:OWNER/NAME"
```""",
}


def card(name: str, network: Network, model: nn.Module, files: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The network as plain values. ``model``: in evaluation mode; ``files``: what was exported, a row per format."""
    spec = network.spec
    image = torch.zeros(1, spec.model_args.get("in_chans", 3), spec.image_size, spec.image_size)
    return {
        "format": FORMAT,
        "name": name,
        "network": spec.to_json(),
        "layers": layers(spec),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "multiply_adds": cost.count([model], lambda: model(image))["macs"],
        "licence": {"definition": None if spec.architecture == "bossnas_own" else "Apache-2.0", "weights": None},
        "about": network.about,
        "versions": {"python": platform.python_version(), **_versions()},
        "files": list(files),
    }


def layers(spec: Spec) -> list[str]:
    """What each searched layer does, in order; [] of a network that no built-in space has."""
    known, found = spaces.known(), spec.model_args
    if spec.architecture == "bossnet" and "encoding" in found:
        strides = [4 * 2**stage for stage in range(4)]
        return [
            f"{'convolution' if layer else 'attention'} at 1/{stride}"
            for stride, stage in zip(strides, found["encoding"], strict=True)
            for layer in stage
        ]
    if spec.architecture == "bossnas_mbconv":
        space, paths = known["mbconv"](found.get("width", 1.0)), [decode(text) for text in found["paths"]]
        return [words(space, b, i, choice).text for b, path in enumerate(paths) for i, choice in enumerate(path)]
    return [f"{width} channels" for width in found["widths"]] if spec.architecture == "bossnas_nats" else []


def readme(card: dict[str, Any], ours: bool) -> str:
    """Markdown, headed as Hugging Face's model cards are. ``ours``: bossnas holds the network's definition."""
    spec = card["network"]
    size = f"{spec['image_size']}x{spec['image_size']}"
    hub = ["- timm", "library_name: timm"] if any(row["format"] == "hub" for row in card["files"]) else []
    text = [
        "---",
        "tags:",
        "- image-classification",
        *hub,
        "---",
        f"# {card['name']}",
        "",
        f"An image classifier, exported by bossnas {card['versions']['bossnas']}.",
        "",
        f"- Network: `{spec['architecture']}` {_plain(spec['model_args'])}".rstrip(),
        *([f"- Searched layers: {in_runs(card['layers'])}"] if card["layers"] else []),
        f"- {card['parameters']:,} parameters; {card['multiply_adds'] / 1e9:.4g} G multiply-adds at {size} pixels",
        f"- {spec['classes']} classes",
        f"- Images: float32 [n, {spec['model_args'].get('in_chans', 3)}, {spec['image_size']}, "
        f"{spec['image_size']}], pixels in 0..1, less mean {_plain(spec['mean'])}, by deviation "
        f"{_plain(spec['std'])}; for evaluation resized ({spec['interpolation']}) and cropped to the central "
        f"{spec['crop']:g} of the side",
    ]
    text += [f"- {key}: {_plain(value)}" for key, value in card["about"].items()]
    if card["licence"]["definition"]:
        text += [
            f"- Licence of the network's definition (bossnas, timm): {card['licence']['definition']}; that of the "
            "weights is for those to say who trained them"
        ]
    text += ["", "| Format | Files | MB | Largest difference of logits |", "|---|---|---|---|"]
    text += [
        f"| {row['format']}{' (batch norms folded)' if row['fused'] else ''} | {', '.join(row['files'])} | "
        f"{row['bytes'] / 1e6:.1f} | {row['difference']:.1e} |"
        for row in card["files"]
    ]
    for row in card["files"]:
        use = USE[row["format"]].format(name=card["name"], ours="import bossnas.timm_models\n" if ours else "")
        text += ["", f"## {row['format']}", "", use]
    return "\n".join(text) + "\n"


def _versions() -> dict[str, str]:
    found = {"bossnas": __version__}
    for package in SHOWN[1:]:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(one)}" for key, one in value.items())
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_plain, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)
