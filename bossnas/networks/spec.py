"""Networks by description: what a retrained network is, as plain data, and the file that holds it with its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import timm
from pydantic import ConfigDict, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from bossnas.errors import ConfigError
from bossnas.files import draft, open_to_others
from bossnas.networks import registry  # noqa: F401  (registers the networks in timm)

FORMAT = "bossnas-network-1"
Colours = tuple[float, float, float]  # values of red, green and blue
# Arguments by which timm's create_model would read or fetch weights: a description says what a network is, no more.
REFUSED = (
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "checkpoint_path",
    "cache_dir",
    "scriptable",
    "exportable",
    "no_jit",
    "num_classes",
    "features_only",
)


@dataclass(frozen=True)
class Spec:
    """A network that `build_network` makes, and the images that it takes. Everything in it is what JSON can hold.

    ``architecture``: a name that timm knows, among them those of `bossnas.networks.registry`; ``model_args``: its own
    keyword arguments, such as an encoding; ``mean``, ``std``: by channel, of pixels in 0..1; ``crop``: the share of the
    resized picture's side that an evaluation sees.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", allow_inf_nan=False)

    architecture: str
    model_args: dict[str, Any] = field(default_factory=dict)
    classes: int = 1000
    image_size: int = 224
    mean: Colours = (0.485, 0.456, 0.406)
    std: Colours = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"
    crop: float = 0.875

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Spec:
        """Raises ValueError for what `to_json` does not give."""
        try:
            return TypeAdapter(cls).validate_python(values)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ValueError(f"not the description of a network ({where}: {first['msg']})") from None


def build_network(spec: Spec, **training: Any) -> nn.Module:
    """The network with fresh weights, drawn from torch's random numbers. ``training``: drop_rate, drop_path_rate.

    A network of an own space runs the Python file that the description names. Raises ConfigError for a name that timm
    does not know and for arguments that its network does not take.
    """
    if not timm.is_model(spec.architecture):
        near = timm.list_models(f"*{spec.architecture}*")[:3]
        raise ConfigError(
            "model.name",
            f"timm knows no {spec.architecture!r}",
            f"choose for example {', '.join(near or ['bossnet_t0', 'resnet50'])}",
        )
    refused = [key for key in spec.model_args if key in REFUSED]
    if refused:
        raise ConfigError(
            "model.options",
            f"{refused[0]} is no argument of a network",
            "remove it; weights come from `model.checkpoint`, the number of classes from `model.classes`",
        )
    try:
        return timm.create_model(spec.architecture, num_classes=spec.classes, **spec.model_args, **training)
    except Exception as error:  # a network's own code raises what it makes of the arguments
        words = " ".join(f"{type(error).__name__}: {error}".split())
        zero = [f"model.{name.removesuffix('_rate')} to 0" for name in training]
        raise ConfigError(
            "model.options",
            f"{spec.architecture} does not take {spec.model_args | training} ({words})",
            f"mend or remove them{', or set ' if zero else ''}{' and '.join(zero)}",
        ) from None


def refused_images(spec: Spec, error: Exception) -> ConfigError:
    """What to raise where the network of ``spec`` has failed with ``error`` on images of its size."""
    words = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ConfigError(
        "model.image_size",
        f"{spec.architecture} does not take images of {spec.image_size} pixels ({words})",
        "set another, or give `model.options` what the network needs for it",
    )


@dataclass(frozen=True)
class Network:
    """What a file of `save_network` holds. ``about``: where the weights come from and what was measured with them."""

    spec: Spec
    weights: dict[str, Tensor]
    about: dict[str, Any]


def save_network(path: Path, spec: Spec, weights: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Writes a network to a safetensors file, which is there whole or not at all. Raises OSError."""
    # copies, as safetensors refuses weights that share memory
    tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in weights.items()}
    metadata = {"format": FORMAT, "spec": json.dumps(spec.to_json()), "about": json.dumps(about)}
    try:
        with draft(path) as made:
            save_file(tensors, made, metadata)
            open_to_others(made)
    except SafetensorError as error:
        raise OSError(f"cannot write {path} ({error})") from None


def load_network(path: Path) -> Network:
    """Reads a file of `save_network`. Raises ConfigError when it is missing, damaged or none of those."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ConfigError(
                    "checkpoint",
                    f"{path} does not say which network it is of",
                    "name that as `model`, or give a file of bossnas retrain or bossnas export",
                )
            spec, about = Spec.from_json(json.loads(metadata["spec"])), dict(json.loads(metadata["about"]))
            return Network(spec, {name: file.get_tensor(name) for name in file.keys()}, about)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            "checkpoint", f"cannot read {path} ({getattr(error, 'strerror', None) or error})", "copy or write it again"
        ) from None
