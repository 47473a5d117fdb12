"""A run at hand: its networks, space, data and position, built from its config, saved and restored."""

from __future__ import annotations

import copy
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from bossnas import spaces
from bossnas.config.search import Config
from bossnas.config.shared import accumulation
from bossnas.data import views
from bossnas.data.batches import Data, data_state, open_data
from bossnas.distributed import dist, engines, group
from bossnas.distributed.engines.protocol import Engine
from bossnas.files import write_json
from bossnas.log import logger
from bossnas.runs import checkpoint, session
from bossnas.runs.resume import check_data
from bossnas.runs.session import Counted, Machine
from bossnas.spaces import Space, cost, ops
from bossnas.spaces.cost import CostTable
from bossnas.spaces.ops import Chain
from bossnas.spaces.paths import Choices, decode, encode
from bossnas.spaces.words import layers, summary
from bossnas.supernet import heads
from bossnas.supernet.supernet import Networks, Supernet
from bossnas.supernet.train_block import RunState


@dataclass
class Run(Counted):
    """Everything a search holds: networks, space, data and where it is."""

    config: Config
    space: Space
    online: Supernet
    target: Supernet
    predictors: nn.ModuleList
    images: Data
    machine: Machine
    state: RunState = field(default_factory=RunState)
    bad: dict[str, str] = field(default_factory=dict)  # unreadable training images met so far
    calibration: list[Tensor] = field(default_factory=list)  # the calibration images, once they are drawn

    def views(self, *ids: int) -> views.Views:
        """These of the views that the space asks for."""
        recipe = views.recipe(self.config.data.recipe, self.config.space.image_size)
        return views.Views(recipe, ids, self.space.view_pairs)

    def networks(self, block: int) -> Networks:
        """What the training and the rating of a block work on."""
        return Networks(self.online, self.target, cast(Chain, self.predictors[block]))


def build(config: Config, training: bool = True) -> Run:
    """Networks, space and data of a config, all checked against each other; weights as drawn from the seed.

    ``training=False``: for a rating alone; what only the training needs is not checked.
    """
    device = dist.device(config.engine.device)
    space = spaces.make(**config.space.model_dump())
    kernels = ops.use_kernels(config.kernels, device)
    mesh = dist.mesh(config.schedule if training else "sequential", space.blocks)
    if training:
        make_engine(config, mesh).check(device.type)
    images = open_data(config.data, session.epoch_images(config))
    if training:
        session.check_epoch(config, len(images.train))
    torch.manual_seed(config.seed)
    online = Supernet(space, config.heads.hidden, config.heads.out)
    predictors = nn.ModuleList(heads.predictor(config.heads.hidden, config.heads.out) for _ in range(space.blocks))
    target = copy.deepcopy(online).requires_grad_(False)
    if device.type == "cpu":
        group.spare_threads(_macs(space, target, config.space.image_size) * config.train.micro_batch)
    return Run(
        config,
        space,
        online.to(device),
        target.to(device),
        predictors.to(device),
        images,
        Machine(device, kernels, mesh),
    )


def _macs(space: Space, network: Supernet, size: int) -> int:
    """Multiply-adds of an image of S x S pixels along the first path of every block."""
    paths: list[Choices] = []
    for block in range(space.blocks):
        paths.append(space.paths(block, paths)[0])
    x = torch.zeros(1, 3, size, size)
    network.eval()
    macs = cost.count([], lambda: network.features(paths, x))["macs"]
    network.train()
    return macs


def make_engine(config: Config, mesh: dist.Mesh) -> Engine:
    """The engine that the config names. Raises ConfigError where its batch cannot be divided over the ranks."""
    return engines.make(
        config.engine.name,
        accumulate=accumulation(config, mesh.shards),
        micro_batch=config.train.micro_batch,
        precision=config.train.precision,
        section=config.engine.deepspeed,
        group=mesh.group,
    )


def announce(run: Run, folder: Path, title: str) -> None:
    """The log's first lines: what runs on what, and from where it goes on."""
    session.warn_of_sample(run.config, len(run.images.train), len(run.images.val))
    parameters = sum(p.numel() for p in run.online.parameters())
    logger.info(
        "%s %s on %d %s rank(s), %s kernels: %d blocks, %.1f M supernet parameters, %d training images",
        run.config.space.name,
        title,
        dist.world_size(),
        run.machine.device.type,
        run.machine.kernels,
        run.space.blocks,
        parameters / 1e6,
        len(run.images.train),
    )
    if run.state.block or run.state.step:
        session.log_position(
            folder, run.state.block == run.space.blocks, f"in block {run.state.block} at step {run.state.step}"
        )


def write_architecture(run: Run, folder: Path) -> None:
    """architecture.json: the winners put together (greedy), with their cost."""
    winners, size = run.state.winners, run.config.space.image_size
    x = torch.zeros(1, 3, size, size, device=run.machine.device)
    networks: list[nn.Module] = [run.target.stem, run.target.blocks]
    price = cost.count(networks, lambda: run.target.features(winners, x))
    text = "|".join(encode(p) for p in winners)
    write_json(
        folder / "architecture.json",
        {
            "space": run.config.space.name,
            "width": run.config.space.width,
            "image_size": size,
            "architecture": text,
            "paths": [encode(p) for p in winners],
            **run.space.describe(winners),
            **price,
            "words": summary(run.space, winners),
            "layers": [asdict(layer) for layer in layers(CostTable.along(run.space, size, winners), winners)],
        },
    )


def save(saver: checkpoint.Saver, run: Run, engines: dict[int, Engine]) -> None:
    """A checkpoint of the whole run; all ranks call it. ``engines``: of the blocks that this rank trains at the moment,
    {} between two blocks.

    Within a block, a rank contributes the blocks that are its own; between two, all ranks have all of them.
    """
    for engine in engines.values():
        engine.gather()
    state = run.state
    tensors = _weights(run, run.machine.mesh.own if engines else range(run.space.blocks))
    for block, engine in engines.items():
        tensors.update(checkpoint.momentum(block, engine))
    saver.save(
        f"block{state.block}-step{state.step:06d}",
        tensors,
        {
            "schedule": run.config.schedule,
            "block": state.block,
            "step": state.step,
            "images_seen": state.images_seen,
            "bad_steps": state.bad_steps,
            "bad_by_block": list(state.bad_by_block),
            "winners": [encode(p) for p in state.winners],
            "leaders": [encode(p) for p in state.leaders],
            "data": data_state(run.images.train, run.config.data, run.machine.mesh.shards),
        },
    )


def restore(run: Run, folder: Path, training: bool = True) -> Path | None:
    """Loads the weights and the position of ``folder``'s last checkpoint, or of the checkpoint that ``folder`` is.
    Returns the checkpoint, where the optimizers' states lie (`checkpoint.load_engine`), None if there is none.

    All ranks call it. ``training=False``: for a rating alone, which does not go on in the order of the training images.
    """
    where = dist.from_main(lambda: checkpoint.whole(folder))
    if where is not None:
        dist.together(lambda: _load(run, where, training))
    return where


def _load(run: Run, where: Path, training: bool) -> None:
    values, state = checkpoint.read_state(where), run.state
    if training:
        check_data(
            values["data"], data_state(run.images.train, run.config.data, run.machine.mesh.shards), bool(values["step"])
        )
    checkpoint.load(where, _weights(run, range(run.space.blocks)))
    state.block, state.step, state.images_seen = values["block"], values["step"], values["images_seen"]
    state.bad_steps, state.bad_by_block[:] = values["bad_steps"], values["bad_by_block"]
    state.winners[:] = [decode(text) for text in values["winners"]]
    state.leaders[:] = [decode(text) for text in values["leaders"]]
    for block in range(state.block):
        run.online.freeze(block)
        run.target.freeze(block)


def _weights(run: Run, blocks: range) -> dict[str, Tensor]:
    """Weights and buffers of these blocks, of the online and the target network and the predictors, by the names that
    they have in a checkpoint; the stem belongs to block 0."""
    modules = nn.ModuleDict({"online": run.online, "target": run.target, "predictors": run.predictors})
    found = {}
    for name, tensor in modules.state_dict().items():
        number = re.match(r"(?:\w+\.(?:blocks|projectors)|predictors)\.(\d+)\.", name)
        if (int(number[1]) if number else 0) in blocks:
            found[name] = tensor
    return found
