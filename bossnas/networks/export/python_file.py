"""The Python file of one network that needs torch alone: the text of its module, its arguments, and `load`."""

from __future__ import annotations

import ast
import inspect
import sys
from pathlib import Path
from typing import Any

from torch import nn

from bossnas import __version__
from bossnas.errors import ConfigError
from bossnas.networks.spec import Spec

BLOCKED = ("bossnas", "bossnas_kernels", "timm", "torchvision")  # what the check of the file does without

ENDING = '''

# What bossnas export fills in: this network, and the images that it takes.
ARGUMENTS = {arguments}
IMAGES = {images}


def load(weights: str | None = None) -> {network}:
    """The network in evaluation mode: float32 [N, {channels}, {size}, {size}] -> logits [N, {classes}].

    Images are pixels in 0..1, less IMAGES["mean"], by IMAGES["std"]. ``weights``: a state dict's file; None: {name}.pt
    beside this file.
    """
    path = weights or __file__.rpartition(".")[0] + ".pt"
    network = {network}(**ARGUMENTS)
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network.eval()


if __name__ == "__main__":
    _network = load()
    _images = torch.randn(2, {channels}, {size}, {size}, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        _logits = _network(_images)
    print(f"{name}: {{sum(p.numel() for p in _network.parameters())}} parameters, "
          f"{{list(_images.shape)}} -> {{list(_logits.shape)}}")
    for _row in _logits.softmax(1):
        _top = _row.topk(min(5, len(_row)))
        print("random image, top classes:",
              ", ".join(f"{{int(i)}} ({{float(p):.3f}})" for p, i in zip(_top.values, _top.indices)))
'''


def check_alone(model: nn.Module) -> None:
    """Raises ConfigError for a network whose module needs more than torch: timm's, and those of spaces of one's own."""
    module = sys.modules[type(model).__module__]
    roots = _imports(inspect.getsource(module), module.__name__.partition(".")[0])
    more = sorted(roots - {"torch"} - set(sys.stdlib_module_names))
    if more or not hasattr(model, "arguments"):
        raise ConfigError(
            "standalone",
            f"the definition of {type(model).__name__} needs {' and '.join(more) or 'its caller'}, not torch alone",
            "leave it out of `formats` (torch_export, torchscript and onnx hold the network, too)",
        )


def source_text(model: nn.Module, name: str, spec: Spec) -> str:
    """The file's text, whose weights are ``name``.pt. ``model``: one that `check_alone` takes; its ``arguments`` are
    what its class was made with."""
    kind = type(model)
    given: Any = model.arguments
    arguments = {**given, "num_classes": spec.classes}
    images = {key: getattr(spec, key) for key in ("image_size", "mean", "std", "interpolation", "crop")}
    head = (
        f"# {spec.architecture}, written by bossnas {__version__} export. Needs torch alone.\n"
        "# SPDX-License-Identifier: Apache-2.0\n"
    )
    return (
        head
        + Path(inspect.getfile(kind)).read_text(encoding="utf-8").rstrip("\n")
        + "\n"
        + ENDING.format(
            arguments=_literal(arguments),
            images=_literal(images),
            network=kind.__name__,
            name=name,
            classes=spec.classes,
            channels=arguments["in_chans"],
            size=spec.image_size,
        )
    )


def _literal(values: dict[str, Any]) -> str:
    return "{\n" + "".join(f"    {key!r}: {value!r},\n" for key, value in values.items()) + "}"


def _imports(source: str, package: str) -> set[str]:
    """The outermost packages that a module of ``package`` imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(package if node.level else (node.module or "").partition(".")[0])
    return found
