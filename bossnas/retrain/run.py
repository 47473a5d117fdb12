"""A retraining at hand: its network, data, engine and position, built from its config, saved and restored."""

from __future__ import annotations

import copy
import json
from collections.abc import Generator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn

from bossnas.config.retrain import RetrainConfig, RetrainTrain
from bossnas.config.shared import MEAN, STD, accumulation
from bossnas.data.batches import Data, data_state, open_data, open_set
from bossnas.data.order import EpochSlice
from bossnas.distributed import dist, engines, group
from bossnas.distributed.engines.protocol import Engine
from bossnas.errors import ConfigError
from bossnas.files import write_json
from bossnas.log import logger
from bossnas.networks import pretrained
from bossnas.networks.kernel_layers import use_kernels
from bossnas.networks.spec import Spec, build_network, load_network, refused_images
from bossnas.optim.library import ChosenOptimizer, check_optimizer, choose_optimizer
from bossnas.retrain import inherit
from bossnas.retrain.batches import check_labels, count_classes, train_batches, train_transform
from bossnas.runs import checkpoint, session
from bossnas.runs.folder import prepare_folder
from bossnas.runs.resume import check_data, claim, go_back
from bossnas.runs.session import Counted, Machine
from bossnas.spaces import cost

NETWORK = "network.json"  # the file of a run folder that describes its network
DROP_PATH = 0.1  # stochastic depth unless the config says it (METHOD 6)
RESULTS = ("done", "result.json", "last.safetensors")  # of a finished run


@dataclass
class Position:
    """Where a retraining is. Randomness and data order are functions of the seed and this position."""

    step: int = 0  # optimizer steps done
    images_seen: int = 0
    bad_steps: int = 0  # skipped because their gradient was not finite
    seconds: float = 0.0  # of steps
    evaluation_seconds: float = 0.0
    best: dict[str, Any] | None = None  # the best evaluation: top1, top5, epoch, step, ema


@dataclass(frozen=True)
class Beginning:
    """What a run begins with: its network, and the checkpoint to go on from, None: anew."""

    spec: Spec
    where: Path | None


@dataclass
class TrainedNetwork:
    """The network of a retraining. ``model``, ``average``: the plain homes of the weights and of their moving average
    (None: there is none), which an engine may train in copies. ``price``: macs and params. ``inherited``: what came
    from a supernet."""

    spec: Spec
    model: nn.Module
    average: nn.Module | None
    price: dict[str, int]
    inherited: inherit.Report | None


@dataclass
class Retraining(Counted):
    """Everything a retraining holds. ``where``: the checkpoint from which it goes on, None: it begins."""

    config: RetrainConfig
    network: TrainedNetwork
    images: Data
    machine: Machine
    engine: Engine
    optimizer: ChosenOptimizer
    where: Path | None
    state: Position = field(default_factory=Position)
    bad: dict[str, str] = field(default_factory=dict)  # unreadable training images met so far


def begin(config: RetrainConfig, resume: str | None) -> Beginning:
    """Checks that the run may be in its folder, and finds what it begins with; changes nothing. For rank 0.

    ``resume``: None: the folder must hold no run; "auto": it may; else a checkpoint of this run, or the run. A run that
    goes on knows its network from its own folder.
    """
    where, out = claim(config, resume), Path(config.out)
    if where is not None and where.resolve().parent.parent != out.resolve():
        raise ConfigError("resume", f"{where} is of another run than {out}", "set out to the folder of that run")
    if resume == "auto":
        where = checkpoint.latest(out / "checkpoints")
    if resume is not None and (out / NETWORK).exists():
        return Beginning(_read_spec(out / NETWORK), where)
    return Beginning(_spec(config), where)


def _read_spec(file: Path) -> Spec:
    try:
        return Spec.from_json(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ConfigError("out", f"cannot read {file} ({error})", "restore it, or choose another folder") from None


def _spec(config: RetrainConfig) -> Spec:
    """The network that the config's model section means, and its images."""
    model = config.model
    classes = model.classes or count_classes(open_set(config.data, "train", session.epoch_images(config)))
    if model.run is not None:
        spec = inherit.spec_of_run(Path(model.run), classes, model.image_size, model.options, inherited=model.inherit)
    elif model.architecture is not None:
        assert model.space is not None, "`check` refuses one without the other"
        spec = inherit.spec_of_architecture(model.space, model.architecture, classes, model.image_size, model.options)
    else:
        assert model.name is not None, "`check` wants one of the three"
        cfg = timm.get_pretrained_cfg(model.name) if timm.is_model(model.name) else None
        size = model.image_size or (cfg.input_size[-1] if cfg is not None else Spec.image_size)
        spec = Spec(model.name, model.options, classes, size)
    return replace(
        spec,
        mean=MEAN[config.augment.normalise],
        std=STD[config.augment.normalise],
        interpolation=config.augment.interpolation,
        crop=config.evaluate.crop,
    )


def build(config: RetrainConfig, start: Beginning) -> Retraining:
    """Network, data and engine of a config, all checked against each other. Weights are drawn from the seed, or come
    from where the config says; those of a run that goes on are still to be restored."""
    train, device, spec = config.train, dist.device(config.engine.device), start.spec
    engine = engines.make(
        config.engine.name,
        accumulate=accumulation(config, dist.world_size()),
        micro_batch=train.micro_batch,
        precision=train.precision,
        section=config.engine.deepspeed,
        optimizer=train.optimizer,
    )
    engine.check(device.type)
    check_optimizer(train.optimizer, engine.sharded)
    optimizer = choose_optimizer(
        train.optimizer,
        train.fused,
        device,
        weight_decay=train.weight_decay,
        momentum=train.momentum,
        beta2=train.beta2,
        eps=train.eps,
        clip=train.clip,
    )
    images = open_data(config.data, session.epoch_images(config))
    session.check_epoch(config, len(images.train))
    for source in (images.train, images.val):
        check_labels(source, spec.classes)
    model, price, inherited = _network(config, start)
    if device.type == "cpu":
        group.spare_threads(price["macs"] * train.micro_batch)
    model = _adapted(model.to(device), train, spec.architecture)
    kernels = "off" if config.kernels == "off" else use_kernels(model, config.kernels, device)
    average = copy.deepcopy(model).requires_grad_(False).eval() if train.ema else None
    run = Retraining(
        config,
        TrainedNetwork(spec, model, average, price, inherited),
        images,
        Machine(device, kernels, dist.mesh("sequential", 1)),
        engine,
        optimizer,
        start.where,
    )
    epoch_batches(run, 0, 0)  # raises what does not go together
    return run


def _adapted(model: nn.Module, train: RetrainTrain, name: str) -> nn.Module:
    """The network with synchronised batch norms, and with activation checkpointing, where the config has them on."""
    if train.sync_batch_norm:
        if next(model.parameters()).device.type != "cuda":
            raise ConfigError(
                "train.sync_batch_norm",
                "is on, but torch has synchronised batch norms for GPUs alone",
                "set it to false",
            )
        model = convert_sync_batchnorm(model)
        if not any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
            raise ConfigError(
                "train.sync_batch_norm",
                f"is on, but {name} has no batch norm that torch can synchronise",
                "set it to false",
            )
    if train.activation_checkpointing:
        network: Any = model
        try:
            network.set_grad_checkpointing(True)
        except (AttributeError, AssertionError, NotImplementedError):
            raise ConfigError("train.activation_checkpointing", f"{name} has none", "set it to false") from None
    return model


def _network(config: RetrainConfig, start: Beginning) -> tuple[nn.Module, dict[str, int], inherit.Report | None]:
    """The network with the weights that it begins with, its cost, and what came from a supernet."""
    spec, model_config, inherited = start.spec, config.model, None
    depth = model_config.drop_path
    if depth is None:
        depth = 0.0 if spec.architecture == "bossnas_own" else DROP_PATH
    rates = {"drop_rate": model_config.drop, "drop_path_rate": depth}
    torch.manual_seed(config.seed)
    model = build_network(spec, **{name: rate for name, rate in rates.items() if rate})
    x = torch.zeros(1, 3, spec.image_size, spec.image_size)
    model.eval()
    try:
        price = cost.count([model], lambda: model(x))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise refused_images(spec, error) from None
    if start.where is None and model_config.checkpoint is not None:
        file = Path(model_config.checkpoint)
        try:
            pretrained.fit(model, pretrained.read(file), str(file))
        except ConfigError as error:
            raise ConfigError("model.checkpoint", error.problem, error.fix) from None
    elif start.where is None and model_config.inherit:
        assert model_config.run is not None, "`check` refuses to inherit from nothing"
        inherited = inherit.inherit(model, spec, Path(model_config.run))
    return model.train(), price, inherited


def epoch_batches(run: Retraining, epoch: int, start: int) -> Generator[tuple[Tensor, Tensor]]:
    """This rank's micro-batches of an epoch, from its step ``start`` on."""
    config = run.config
    part = EpochSlice(
        config.seed,
        epoch,
        start * run.accumulate,
        run.steps_per_epoch * run.accumulate,
        config.train.micro_batch,
        dist.rank(),
        dist.world_size(),
    )
    return train_batches(
        run.images.train,
        train_transform(config.augment, run.network.spec.image_size),
        config.data,
        part,
        classes=run.network.spec.classes,
        device=run.machine.device,
        bad=run.bad,
    )


def prepare(run: Retraining, folder: Path) -> None:
    """Makes the run folder ready, now that all is checked. For rank 0."""
    state = [*run.network.model.parameters(), *run.network.model.buffers()]
    size = sum(t.numel() * t.element_size() for t in state) * (
        4 if run.network.average is not None else 3
    )  # two moments
    session.require_room(run.config, size)
    prepare_folder(folder, run.config)
    write_json(folder / NETWORK, run.network.spec.to_json())
    if run.where is not None and checkpoint.newer(run.where):
        go_back(run.where, RESULTS)


def weights(run: Retraining) -> dict[str, Tensor]:
    """Weights and buffers of the network and its average by the names that they have in a checkpoint."""
    homes = {"model": run.network.model} | ({} if run.network.average is None else {"ema": run.network.average})
    return {f"{kind}.{name}": tensor for kind, home in homes.items() for name, tensor in home.state_dict().items()}


def save(run: Retraining, saver: checkpoint.Saver) -> None:
    """A checkpoint of the whole run; all ranks call it."""
    bring_home(run)
    saver.save(
        f"step{run.state.step:08d}",
        weights(run) | checkpoint.momentum(0, run.engine),
        {**asdict(run.state), "data": data_state(run.images.train, run.config.data, run.machine.mesh.shards)},
    )


def restore(run: Retraining) -> None:
    """Weights and position of the checkpoint that the run goes on from; the optimizer's state is for the engine."""
    if run.where is None:
        return
    values = checkpoint.read_state(run.where)
    check_data(
        values["data"],
        data_state(run.images.train, run.config.data, run.machine.mesh.shards),
        bool(values["step"] % run.steps_per_epoch),
    )
    checkpoint.load(run.where, weights(run))
    run.state = Position(**{name: values[name] for name in asdict(run.state)})
    best, file = run.state.best, Path(run.config.out) / "best.safetensors"
    if best is not None and (not file.exists() or load_network(file).about.get("step") != best["step"]):
        logger.info(
            "%s is not of the best evaluation so far, step %d: the next one counts as the best", file, best["step"]
        )  # it was written after the checkpoint, and what follows may come out otherwise
        run.state.best = None


def bring_home(run: Retraining) -> None:
    """The trained weights into the plain networks, whose running statistics become the mean over the ranks."""
    run.engine.gather()
    found = [s for home in (run.network.model, run.network.average) if home is not None for s in statistics(home)]
    if dist.world_size() == 1 or not found:
        return
    flat = dist.all_reduce_sum(torch.cat([s.flatten() for s in found])).div_(dist.world_size())
    for s, mean in zip(found, flat.split([s.numel() for s in found]), strict=True):
        s.copy_(mean.view_as(s))


def statistics(model: nn.Module) -> list[Tensor]:
    """The running means and variances of a network's norms."""
    found = [getattr(module, name, None) for module in model.modules() for name in ("running_mean", "running_var")]
    return [s for s in found if isinstance(s, Tensor)]
