"""From a search to a network: the description of what it found, and the supernet's weights to begin training with."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from bossnas import spaces
from bossnas.config.search import Config
from bossnas.config.shared import MEAN, STD, SpaceConfig
from bossnas.errors import ConfigError
from bossnas.networks.bossnet import BossNet
from bossnas.networks.from_space import Standalone
from bossnas.networks.mbconv import MBConvNet
from bossnas.networks.nats import NatsNet, NormalCell
from bossnas.networks.spec import Spec
from bossnas.runs import checkpoint
from bossnas.runs.folder import read_config
from bossnas.spaces import Space
from bossnas.spaces.cost import read_architecture
from bossnas.spaces.hytra import KINDS, SCALES
from bossnas.spaces.ops import SlimConv
from bossnas.spaces.paths import Choices, encode

Names = Iterator[tuple[str, str]]  # of tensors: in the network, in the supernet
NORM = ("weight", "bias", "running_mean", "running_var")


def spec_of_run(
    folder: Path,
    classes: int,
    image_size: int | None = None,
    options: Mapping[str, Any] | None = None,
    *,
    inherited: bool = False,
) -> Spec:
    """The network that the finished search in ``folder`` found (its architecture.json), for as many classes.

    ``image_size``: None: the search's. ``options``: further arguments of the network. ``inherited``: for `inherit`,
    which then takes over all that the supernet has computed: NATS-Bench's networks as the supernet computes them, with
    ReLU in the skips. Raises ConfigError for a folder of another kind, an unfinished search and a damaged file.
    """
    config, architecture = _found(folder)
    space = _space(config.space)
    if inherited and config.space.name in spaces.known():
        options = {**spaces.traits(space).as_searched, **(options or {})}
    return _spec(
        config.space,
        space,
        architecture,
        classes,
        image_size or config.space.image_size,
        options,
        config.data.recipe,
    )


def spec_of_architecture(
    space: SpaceConfig, text: str, classes: int, image_size: int | None = None, options: Mapping[str, Any] | None = None
) -> Spec:
    """The network of an architecture such as 5433|3230|0010|0000 of a space, for as many classes.

    ``image_size``: None: the space's. Raises ConfigError for a text that is no architecture of the space.
    """
    made = _space(space)
    recipe = spaces.traits(spaces.known().get(space.name, object)).recipe
    return _spec(
        space, made, _read(made, text, "model.architecture"), classes, image_size or space.image_size, options, recipe
    )


@dataclass(frozen=True)
class Report:
    """Names of a network's tensors: ``taken`` from the supernet, and ``fresh``, as the network was made."""

    taken: list[str]
    fresh: list[str]


@torch.no_grad()
def inherit(model: nn.Module, spec: Spec, run: Path) -> Report:
    """Gives the network of ``spec`` the weights and running statistics of the target network's winners in the last
    checkpoint of the finished search ``run``, in place.

    The statistics are those that the rating calibrated along the winners. Networks of the MBConv and NATS spaces and of
    own spaces then compute the very features of the supernet; fresh are what stands behind them, and NATS's skips where
    the network's have no ReLU (`NatsNet`). A BossNet takes over the stem, and of every block the 1x1 entry, the PEG,
    the 3x3 convolution or attention, the last 1x1 convolution and all norms. Fresh are its shortcuts where the size or
    width changes (another operation than in the supernet), squeeze-and-excitation, stages without blocks and the
    classifier; SiLU stands where the supernet had ReLU, unless ``act`` is relu.

    HyTra's first layer adapts the stem's output before its entry, without an activation. At scale 3, where the adapter
    keeps the size, it is folded into the entry and the PEG's bias: exact but for the map's border, where the PEG's
    padding should see the adapter's bias as zero, too. At scale 2 the entry has another number of inputs: fresh.

    Raises ConfigError when the network is none of the search's architecture, or there is no whole checkpoint.
    """
    config, architecture = _found(run)
    space = _space(config.space)
    own = _spec(config.space, space, architecture, spec.classes, spec.image_size, None, config.data.recipe)
    needed = {key: spec.model_args.get(key) for key in own.model_args}
    if spec.architecture != own.architecture or needed != own.model_args:
        raise ConfigError(
            "model.inherit",
            f"{run} found {'|'.join(map(encode, architecture))}, which the network "
            f"{spec.architecture} {spec.model_args} is not",
            "inherit from the search that found it, or set it to false",
        )
    where = checkpoint.latest(run / "checkpoints")
    if where is None:
        raise ConfigError("model.inherit", f"{run} has no checkpoint any more", "set it to false")
    source = {name.removeprefix("target."): tensor for name, tensor in checkpoint.read(where, ("target",)).items()}
    into, folded = model.state_dict(), {}
    if isinstance(model, BossNet):
        pairs, folded = _bossnet(architecture), _adapted_entry(source, architecture[0][0])
    elif isinstance(model, MBConvNet):
        pairs = _mbconv(model, architecture)
    elif isinstance(model, NatsNet):
        pairs = _nats(model, architecture)
    else:
        assert isinstance(model, Standalone), type(model)
        pairs = _standalone(model, architecture, source)
    slim = [
        name
        for name, module in model.named_modules()
        if isinstance(module, SlimConv) or isinstance(model, NatsNet) and isinstance(module, nn.Conv2d)
    ]
    sliced, taken = {f"{name}.weight" for name in slim}, set()
    for name, theirs in pairs:
        tensor = folded.get(name, source[theirs])
        if name in sliced:
            tensor = tensor[: into[name].shape[0], : into[name].shape[1]]
        if into[name].shape == tensor.shape:
            into[name].copy_(tensor)
            taken.add(name)
    names = [name for name in into if not name.endswith("num_batches_tracked")]
    return Report([name for name in names if name in taken], [name for name in names if name not in taken])


def _found(folder: Path) -> tuple[Config, list[Choices]]:
    """Config and architecture of a finished search."""
    try:
        config = read_config(folder)
    except ConfigError as error:
        raise ConfigError("model.run", error.problem, error.fix) from None
    file = folder / "architecture.json"
    try:
        text = json.loads(file.read_text(encoding="utf-8"))["architecture"]
    except FileNotFoundError:
        raise ConfigError(
            "model.run",
            f"{folder} has no architecture yet",
            f"finish the search with bossnas search --config {folder}/config.json --resume auto",
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            "model.run", f"{file} is damaged ({error})", "restore it, or give its architecture as model.architecture"
        ) from None
    return config, _read(_space(config.space), str(text), "model.run")


def _space(config: SpaceConfig) -> Space:
    return spaces.make(**config.model_dump())


def _read(space: Space, text: str, field: str) -> list[Choices]:
    try:
        return read_architecture(space, text)
    except ConfigError as error:
        raise ConfigError(field, error.problem, error.fix) from None


def _spec(
    config: SpaceConfig,
    space: Space,
    architecture: Sequence[Choices],
    classes: int,
    image_size: int,
    options: Mapping[str, Any] | None,
    recipe: str,
) -> Spec:
    if config.name in spaces.known():
        name, args = cast(Any, space).network(architecture)
    else:
        file, _, kind = config.name.rpartition(":")
        paths = [encode(path) for path in architecture]
        name, args = "bossnas_own", {"space": f"{Path(file).resolve()}:{kind}", "paths": paths, "width": config.width}
    return Spec(name, {**args, **(options or {})}, classes, image_size, MEAN[recipe], STD[recipe])


def _layers(architecture: Sequence[Choices]) -> Iterator[tuple[str, int]]:
    """Of every layer, its name in the supernet and its candidate."""
    for block, path in enumerate(architecture):
        for layer, choice in enumerate(path):
            yield f"blocks.{block}.{layer}", choice


def _norm(name: str, theirs: str) -> Names:
    for part in NORM:
        yield f"{name}.{part}", f"{theirs}.{part}"


def _bossnet(architecture: Sequence[Choices]) -> Names:
    yield "conv1.weight", "stem.0.weight"
    yield from _norm("bn1", "stem.1")
    numbers, above = [0, 0, 0, 0], SCALES[5]
    for layer, choice in _layers(architecture):
        scale, theirs = SCALES[choice], f"{layer}.candidates.{choice}"
        stage = 3 - scale
        name = f"layer{stage + 1}.{numbers[stage]}"
        entry = f"{theirs}.same" if scale == above or layer == "blocks.0.0" else f"{theirs}.down"
        if KINDS[choice] == "CONV":
            names = ["conv1", "peg.conv", "bn1", "conv2", "bn2", "conv3", "bn3"]
        else:
            names = ["proj.0", "proj.1.conv", "proj.2", "net.1.to_qkv", "net.2", "net.4", "net.5"]
        mix = f"{theirs}.body.0" if KINDS[choice] == "CONV" else f"{theirs}.body.0.qkv"
        first, peg, norm1, second, norm2, third, norm3 = (f"{name}.{part}" for part in names)
        yield f"{first}.weight", f"{entry}.0.weight"
        yield f"{peg}.weight", f"{entry}.1.weight"
        yield f"{peg}.bias", f"{entry}.1.bias"
        yield from _norm(norm1, f"{entry}.2")
        yield f"{second}.weight", f"{mix}.weight"
        yield from _norm(norm2, f"{theirs}.body.1")
        yield f"{third}.weight", f"{theirs}.body.2.weight"
        yield from _norm(norm3, f"{theirs}.body.3")
        numbers[stage], above = numbers[stage] + 1, scale


def _adapted_entry(source: Mapping[str, Tensor], choice: int) -> dict[str, Tensor]:
    """BossNet's first 1x1 convolution and PEG bias with the stem's adapter folded in; {} if that is not possible.

    Adapter: depthwise 1x1 d, 1x1 W, norm y -> g y + t. Entry E(g W d x + t) = (E g W d) x + E t, and the PEG spreads
    the constant E t by the sum of its weights.
    """
    if SCALES[choice] != 3:
        return {}
    adapter = "blocks.0.0.stem_adapters.3"
    depthwise, pointwise = source[f"{adapter}.0.weight"].flatten(), source[f"{adapter}.1.0.weight"].flatten(1)
    gamma, beta, mean, var = (source[f"{adapter}.1.1.{part}"] for part in NORM)
    gain = gamma * torch.rsqrt(var + 1e-5)
    entry = f"blocks.0.0.candidates.{choice}.same"
    matrix, peg = source[f"{entry}.0.weight"].flatten(1), source[f"{entry}.1.weight"]
    constant = matrix @ (beta - gain * mean)
    folded = matrix @ (gain[:, None] * pointwise * depthwise)
    return {
        "layer1.0.conv1.weight": folded[:, :, None, None],
        "layer1.0.peg.conv.bias": source[f"{entry}.1.bias"] + constant * peg.sum((1, 2, 3)),
    }


def _mbconv(model: MBConvNet, architecture: Sequence[Choices]) -> Names:
    yield "conv_stem.weight", "stem.0.0.weight"
    yield from _norm("bn_stem", "stem.0.1")
    yield "block0.conv1.weight", "stem.1.0.weight"
    yield from _norm("block0.bn1", "stem.1.1")
    yield from _gate("block0.se", "stem.2")
    yield "block0.conv2.weight", "stem.3.0.weight"
    yield from _norm("block0.bn2", "stem.3.1")
    names = [f"{name}.{i}" for name in model.names for i in range(len(getattr(model, name)))]
    for name, (layer, choice) in zip(names, _layers(architecture), strict=False):  # the sixth block is not searched
        theirs, shortcut = f"{layer}.candidates.{choice}", model.get_submodule(f"{name}.shortcut")
        yield f"{name}.conv1.weight", f"{theirs}.0.0.weight"
        yield from _norm(f"{name}.bn1", f"{theirs}.0.1")
        yield f"{name}.conv2.weight", f"{theirs}.1.weight"
        yield from _norm(f"{name}.bn2", f"{theirs}.2")
        yield from _gate(f"{name}.se", f"{theirs}.3")
        yield f"{name}.conv3.weight", f"{theirs}.4.0.weight"
        yield from _norm(f"{name}.bn3", f"{theirs}.4.1")
        for i, part in enumerate(shortcut.children()):
            if isinstance(part, nn.Conv2d):
                yield f"{name}.shortcut.{i}.weight", f"{layer}.shortcut.{i}.0.weight"
                yield from _norm(f"{name}.shortcut.{i + 1}", f"{layer}.shortcut.{i}.1")


def _gate(name: str, theirs: str) -> Names:
    for ours, part in (("fc1", "reduce"), ("fc2", "expand")):
        yield f"{name}.{ours}.weight", f"{theirs}.{part}.weight"
        yield f"{name}.{ours}.bias", f"{theirs}.{part}.bias"


def _nats(model: NatsNet, architecture: Sequence[Choices]) -> Names:
    for number, (layer, choice) in enumerate(_layers(architecture), 1):
        if number == 1:
            yield "stem.0.weight", f"{layer}.stem.conv.weight"
            yield from _norm("stem.1", f"{layer}.stem.norms.{choice}")
            layer = f"{layer}.cell"
        cell = model.get_submodule(f"layer{number}")
        if isinstance(cell, NormalCell):
            parts = [(f"op{edge}", f"ops.{edge}") for edge in ("01", "02", "12", "13", "23")]
            if isinstance(cell.skip, nn.Sequential) and model.skip_relu:
                parts.append(("skip", "skip"))
        else:
            parts = [("first", "first"), ("second", "second")]
            yield f"layer{number}.shortcut.1.weight", f"{layer}.shortcut.weight"
        for ours, theirs in parts:
            yield f"layer{number}.{ours}.1.weight", f"{layer}.{theirs}.conv.weight"
            yield from _norm(f"layer{number}.{ours}.2", f"{layer}.{theirs}.norms.{choice}")


def _standalone(model: Standalone, architecture: Sequence[Choices], source: Mapping[str, Tensor]) -> Names:
    layers = [layer for layer, _ in _layers(architecture)]
    for name in model.state_dict():
        part, _, rest = name.partition(".")
        number, _, inner = rest.partition(".")
        theirs = f"{layers[int(number)]}.{inner}" if part == "layers" else name
        if theirs in source:
            yield name, theirs
