"""Weights from files that nobody vouches for: read without running anything, and fitted strictly."""

from __future__ import annotations

import argparse
import json
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import numpy as np
import timm
import torch
from safetensors import SafetensorError, safe_open
from timm.models import PretrainedCfg
from torch import Tensor, nn

from bossnas.errors import ConfigError
from bossnas.networks.spec import FORMAT, Colours, Network, Spec, load_network

EMA_KEYS = ("model_ema", "state_dict_ema")
KEYS = ("model", "state_dict", "module")  # under which training scripts keep the weights
PREFIXES = ("module.", "model.", "_orig_mod.")  # of DataParallel and EMA wrappers, Lightning, torch.compile
HUB = "model.safetensors"  # of a folder for the Hugging Face hub
AVERAGES = "n_averaged"  # a counter that torch's AveragedModel keeps beside the weights
DEEPEST = 4  # dictionaries around the weights; a pickle can hold itself
SHOWN = 3  # weights that an error names
# what training scripts store beside the weights: their arguments, and scores as NumPy scalars
_SCALARS = [type(np.dtype(name)) for name in ("bool", "int32", "int64", "float16", "float32", "float64")]
_scalar = np.float64().__reduce__()[0]  # the function that makes one, which NumPy 1 and 2 have in other places
SAFE: list[Any] = [
    argparse.Namespace,
    np.dtype,
    (_scalar, "numpy._core.multiarray.scalar"),
    (_scalar, "numpy.core.multiarray.scalar"),
    *_SCALARS,
]


def read(path: Path, ema: bool = True) -> dict[str, Tensor]:
    """The weights in a .safetensors file, or in a file of torch.save, on the CPU; floating ones as float32.

    They may lie under "model", "state_dict" or "module", and, taken first if ``ema``, "model_ema" or "state_dict_ema";
    prefixes that all names have in front, such as "module.", are taken off. Of a pickle only tensors, plain Python
    values, argparse.Namespace and NumPy scalars are built. Raises ConfigError for a file that asks for anything else,
    of which nothing is run, for one that is missing, damaged or of another kind, and where no weights are found.
    """
    if path.is_dir():
        raise ConfigError("checkpoint", f"{path} is a folder", "name a .pth, .pt or .safetensors file")
    try:
        if path.stat().st_size == 0:
            raise ConfigError("checkpoint", f"{path} is empty", "copy or write it again")
        loaded = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    except OSError as error:
        raise ConfigError(
            "checkpoint", f"cannot read {path} ({error.strerror or error})", "check the path, or copy the file again"
        ) from None
    state = _weights(loaded, EMA_KEYS + KEYS if ema else KEYS + EMA_KEYS)
    if not state:
        found = (
            f"a {type(loaded).__name__}"
            if not isinstance(loaded, Mapping)
            else f"only {', '.join(map(str, list(loaded)[:6])) or 'nothing'}"
        )
        raise ConfigError(
            "checkpoint",
            f"{path} holds no weights where they are looked for, but {found}",
            f"store the state dict itself, or under one of {', '.join(KEYS)}",
        )
    return {
        name: tensor.detach().float() if tensor.is_floating_point() else tensor.detach()
        for name, tensor in state.items()
    }


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ConfigError(
            "checkpoint", f"{path} is damaged, or no safetensors file ({error})", "copy or write it again"
        ) from None


def _read_pickle(path: Path) -> Any:
    again = "copy or write it again"
    try:
        _check_zip(path)
        with warnings.catch_warnings(), torch.serialization.safe_globals(SAFE):
            warnings.simplefilter("ignore")  # torch's of what is refused below
            return torch.load(path, map_location="cpu", weights_only=True)
    except (ConfigError, FileNotFoundError, PermissionError):
        raise
    except UnpicklingError as error:
        if (asked := re.search(r"GLOBAL (\S+)", str(error))) is None:
            raise ConfigError("checkpoint", f"{path} is damaged, or no file of torch.save", again) from None
        raise ConfigError(
            "checkpoint",
            f"{path} is refused: its pickle asks for {asked[1]}, which weights are not made of; nothing of it was run",
            "where you trust it, store its state dict alone, best as safetensors",
        ) from None
    except Exception as error:  # torch raises nearly anything on damaged data
        reason = f"{type(error).__name__}: {error}".partition("\n")[0].partition(". ")[0]
        raise ConfigError("checkpoint", f"{path} is damaged, or no file of torch.save ({reason})", again) from None


def _check_zip(path: Path) -> None:
    """torch does not compare the checksums of its zip archives; they are 0 where it was told to leave them out."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if any(name.endswith("/constants.pkl") for name in names):
            raise ConfigError(
                "checkpoint",
                f"{path} is a TorchScript archive: a program, not weights alone",
                "give the checkpoint that it was made from",
            )
        if any(info.CRC for info in archive.infolist()) and (bad := archive.testzip()) is not None:
            raise ConfigError(
                "checkpoint", f"{path} is damaged (the checksum of {bad} is wrong)", "copy or write it again"
            )


def _weights(loaded: Any, keys: tuple[str, ...]) -> dict[str, Tensor]:
    for _ in range(DEEPEST):
        if not isinstance(loaded, Mapping):
            return {}
        inner = next((loaded[key] for key in keys if isinstance(loaded.get(key), Mapping) and loaded[key]), None)
        if inner is None:
            break
        loaded = inner
    state = {name: value for name, value in loaded.items() if isinstance(name, str) and _is_weight(value)}
    while state:
        names = state.keys() - {AVERAGES}
        prefix = next((prefix for prefix in PREFIXES if names and all(name.startswith(prefix) for name in names)), None)
        if prefix is None:
            break
        state = {name.removeprefix(prefix): state[name] for name in state if name in names}
    return state


def _is_weight(value: Any) -> bool:
    """Whether a network's weight can be a copy of it."""
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and value.device.type == "cpu"  # not meta
        and not value.is_quantized
        and not value.is_complex()
    )


def fit(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Loads the weights into the network, all or none. Raises ConfigError, which lists what does not fit and says so
    where only the number of classes differs. ``source``: where the weights come from, for the message."""
    own = model.state_dict()
    missing, surplus = [name for name in own if name not in state], [name for name in state if name not in own]
    reshaped = [name for name in own if name in state and own[name].shape != state[name].shape]
    if not (missing or surplus or reshaped):
        model.load_state_dict(state, strict=True)
        return
    classifier = _classifier(model)
    if (
        reshaped
        and not (missing or surplus)
        and all(
            name.rpartition(".")[0] in classifier and state[name].ndim and state[name].shape[1:] == own[name].shape[1:]
            for name in reshaped
        )
    ):
        has, wants = len(state[reshaped[0]]), len(own[reshaped[0]])
        raise ConfigError(
            "checkpoint",
            f"{source} has {has} classes, the network {wants}",
            f"set `model.classes` to {has}, or give weights of {wants} classes",
        )
    parts = [
        f"{len(names)} {what} ({', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''})"
        for names, what in ((missing, "are missing"), (surplus, "are not the network's"))
        if names
    ]
    if reshaped:
        shapes = [f"{name} {_shape(state[name])} in place of {_shape(own[name])}" for name in reshaped[:SHOWN]]
        parts.append(f"{len(reshaped)} have another shape ({', '.join(shapes)}{', ...' * (len(reshaped) > SHOWN)})")
    raise ConfigError(
        "checkpoint",
        f"{source} does not fit the network: of its {len(own)} weights {', '.join(parts)}",
        "give weights of this network, or name theirs",
    )


def _classifier(model: nn.Module) -> set[str]:
    """The names of the classifier's modules, where timm's ``get_classifier`` tells them."""
    get: Callable[[], Any] | None = getattr(model, "get_classifier", None)
    found = () if get is None else get()
    modules = found if isinstance(found, tuple) else (found,)
    return {name for name, module in model.named_modules() if any(module is one for one in modules)}


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "()"


def open_network(
    source: Path,
    *,
    model: str | None = None,
    options: Mapping[str, Any] | None = None,
    classes: int | None = None,
    image_size: int | None = None,
) -> Network:
    """A network with weights: a retraining's folder (its best.safetensors), a file of `spec.save_network`, a folder for
    the Hugging Face hub that timm wrote, or a checkpoint from elsewhere of the network that ``model`` names in timm,
    with ``options`` as its arguments.

    ``classes``: of such a checkpoint; None: as many as its classifier has rows, else timm's number. ``image_size``: at
    which the network is to work; None: its own. Pictures are prepared as timm says for ``model``. `fit` has not been
    called yet. Raises ConfigError.
    """
    is_hub = (source / "config.json").exists() and (source / HUB).exists()
    if source.is_dir() and not is_hub:
        source = _best(source)
    if is_hub or _is_ours(source):
        network = _hub(source) if is_hub else load_network(source)
        spec = network.spec
        if model is not None or options:
            raise ConfigError(
                "model", f"is set, but {source} says itself that it is {spec.architecture}", "leave it out"
            )
        if classes not in (None, spec.classes):
            raise ConfigError("model.classes", f"{classes}, but {source} has {spec.classes} classes", "leave it out")
        return replace(network, spec=replace(spec, image_size=image_size or spec.image_size))
    state = read(source)
    if model is None:
        raise ConfigError(
            "model", f"is not set, and {source} does not say which network it is of", "name it, such as bossnet_t0"
        )
    if not timm.is_model(model):
        raise ConfigError("model", f"timm knows no {model!r}", "choose one of timm.list_models(), or bossnet_t0")
    about = timm.get_pretrained_cfg(model) or PretrainedCfg()
    heads = [about.classifier] if isinstance(about.classifier, str) else list(about.classifier or ())
    weights = [state[f"{head}.weight"] for head in heads if f"{head}.weight" in state]
    rows = next((len(weight) for weight in weights if weight.ndim), None)
    spec = Spec(
        model,
        dict(options or {}),
        classes or rows or about.num_classes,
        image_size or about.input_size[-1],
        cast("Colours", tuple(about.mean)),
        cast("Colours", tuple(about.std)),
        about.interpolation,
        about.crop_pct,
    )
    return Network(spec, state, {"weights": source.name})


def _hub(folder: Path) -> Network:
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        images = values["pretrained_cfg"]
        spec = Spec.from_json(
            {
                "architecture": values["architecture"],
                "model_args": {
                    key: value for key, value in values.get("model_args", {}).items() if key != "num_classes"
                },
                "classes": values["num_classes"],
                "image_size": images["input_size"][-1],
                "mean": images["mean"],
                "std": images["std"],
                "interpolation": images["interpolation"],
                "crop": images["crop_pct"],
            }
        )
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise ConfigError(
            "checkpoint",
            f"{folder}/config.json does not describe a network as timm does ({error})",
            f"name {folder / HUB} and its network as `model`",
        ) from None
    return Network(spec, read(folder / HUB), {"weights": folder.name})


def _best(folder: Path) -> Path:
    best = folder / "best.safetensors"
    if best.exists():
        return best
    if (folder / "network.json").exists():
        raise ConfigError("checkpoint", f"{folder} has no best.safetensors yet", "let it get to its first evaluation")
    if (folder / "config.json").exists():
        raise ConfigError(
            "checkpoint",
            f"{folder} holds a search or a rating, whose network is not trained yet",
            f"train it with bossnas retrain --from-run {folder}",
        )
    raise ConfigError(
        "checkpoint", f"{folder} is not a run's folder", "name one of bossnas retrain, or a .pth or .safetensors file"
    )


def _is_ours(path: Path) -> bool:
    if path.suffix != ".safetensors":
        return False
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (OSError, SafetensorError):
        return False  # read says what is wrong
