"""FSDP2: every rank holds a share of the trained block's weights, gradients, momentum and target (`fully_shard`)."""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import group as torch_group
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DeviceMesh, DTensor

from bossnas.distributed.engines import protocol
from bossnas.distributed.engines.protocol import LossScale, MakeOptimizer, Outcome, Verdict
from bossnas.distributed.group import ensure_group
from bossnas.distributed.shares import local, shard
from bossnas.errors import ConfigError


class FSDP2Engine:
    """``accumulate``: micro-batches per update; ``precision``: fp32 | bf16 | fp16 (autocast); ``group``: the ranks that
    share a batch and the weights (None: all).

    `wrap` shards copies, and the training runs through these. What it was given stays as it is, the plain home of the
    weights, to which `gather` and `close` bring them: ratings and checkpoints never meet a share.

    A unit, whose weights are brought together before its forward pass and let go after it, is one candidate of a layer,
    the rest of the layer, or a head (`units`). Candidates that a step did not sample cost neither communication nor
    work, and keep their weights, momentum and None for a gradient.

    Memory per rank, in sizes of the block, on R ranks: home 1 + 1 (online, target), and 4 / R for weights, gradients,
    momentum and target; ddp has 4. While micro-batches accumulate, the gradients of the sampled candidates are whole.
    On top come the units at work, and under autocast the 16-bit copies that the backward pass will need, which
    activation checkpointing does without.
    """

    sharded = True

    def __init__(self, accumulate: int, precision: str, group: Any = None):
        self.accumulate, self.precision, self.group = accumulate, precision, group

    def check(self, kind: str) -> None:
        protocol.check_precision(kind, self.precision)

    def wrap(
        self,
        module: nn.Module,
        followers: nn.Module | None,
        make_optimizer: MakeOptimizer,
    ) -> tuple[nn.Module, nn.Module | None]:
        """As in the protocol, and raises ConfigError where a parameter cannot be sharded."""
        for part in (module, followers):
            if part is not None:
                _check(part)
        ensure_group()
        self._kind = next(module.parameters()).device.type
        group = self.group or torch_group.WORLD
        assert group is not None
        mesh = DeviceMesh.from_group(group, self._kind)
        self._roots: list[_Root] = []
        self._pairs: list[tuple[nn.Parameter, DTensor]] = []
        for home in (module, followers):
            if home is None:
                continue
            # batch norms may hold the group, which stays one; their running statistics are those of the home
            copied = copy.deepcopy(home, {id(part): part for part in (self.group, *home.buffers())})
            self._roots.append(_sharded(copied, mesh))
            self._pairs += [
                (whole, shared)
                for whole, shared in zip(home.parameters(), copied.parameters(), strict=True)
                if isinstance(shared, DTensor)
            ]
        module, *rest = [root.part for root in self._roots]
        followers = rest[0] if rest else None
        self._optimizer = make_optimizer(module, followers, False)
        self._scale = LossScale(self.precision)
        return module, followers

    def autocast(self) -> AbstractContextManager:
        return protocol.autocast(self._kind, self.precision)

    def micro(self, loss: Tensor, last: bool) -> None:
        # the last pass reduces what all passes added up: FSDP2's root also visits the units that this one did not use
        self._roots[0].set_requires_gradient_sync(last)
        (self._scale.scaled(loss) * (1 / self.accumulate)).backward()

    def begin_step(self, lr: float, ema: float = 1.0) -> Verdict:
        verdict = self._scale.run(self._optimizer, self._optimizer.step, lr, ema)
        self._optimizer.zero_grad(set_to_none=True)
        for root in self._roots[1:]:  # it takes down the order of forward passes, which only a backward pass ends
            if hasattr(root, "reset_iter_state"):  # not in the oldest torch, where a few bytes a pass stay
                root.reset_iter_state()
        return verdict

    def step(self, lr: float, ema: float = 1.0) -> Outcome:
        return self.begin_step(lr, ema).outcome

    @property
    def loss_scale(self) -> float:
        return self._scale.value

    @torch.no_grad()
    def gather(self) -> None:
        for home, sharded in self._pairs:
            home.copy_(sharded.full_tensor())

    def state(self) -> dict[str, Tensor]:
        return self._scale.add_to(self._optimizer.full_state())

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        self._optimizer.load_full_state(self._scale.take_from(state))
        for home, sharded in self._pairs:
            local(sharded).copy_(shard(home, sharded))

    def close(self) -> None:
        self.gather()
        del self._optimizer, self._roots, self._pairs


class _Root(nn.Module):
    """Above all units, which are called by themselves: FSDP2 keeps here which of them still have gradients to reduce,
    and in which order to bring their weights together ahead of time."""

    set_requires_gradient_sync: Callable[[bool], None]  # `fully_shard` gives it these two
    reset_iter_state: Callable[[], None]

    def __init__(self, part: nn.Module):
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        return x


def _check(part: nn.Module) -> None:
    """Raises ConfigError for a parameter that cannot be sharded."""
    inside = {id(p) for unit in units(part) for p in unit.parameters()}
    for name, parameter in part.named_parameters():
        if id(parameter) in inside and parameter.ndim == 0:
            why = "is a scalar: give it the shape [1]"
        elif id(parameter) not in inside and parameter.requires_grad:
            why = "belongs to no module that is called: give that one a forward"
        else:
            continue
        raise ConfigError(
            "engine.name", f"is fsdp2, which cannot shard the parameter {name}", f"it {why}, or set engine.name to ddp"
        )


def _sharded(part: nn.Module, mesh: DeviceMesh) -> _Root:
    """``part`` with its units sharded in place, below a root."""
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")  # none changed in place
    root = _Root(part)
    for unit in list(units(part)):
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    others = {p for p in part.parameters() if not isinstance(p, DTensor)}  # frozen, outside of units
    fully_shard(root, mesh=mesh, ignored_params=others)
    root(torch.zeros(1))  # its first forward pass makes it the root
    return root


def units(module: nn.Module) -> Iterator[nn.Module]:
    """What is sharded as one, inner units first: every module that forward passes call, that is, which has a `forward`
    and is not inside of one that has; and in it the elements of its lists (ModuleList, ModuleDict), of which a pass
    calls but some, and the modules that say ``is_unit = True``, unless they share weights with other parts of it."""
    for called in _called([module]):
        elements = list(_elements(called))
        owners: dict[int, set[nn.Module]] = defaultdict(set)
        for element in elements:
            for p in element.parameters():
                owners[id(p)].add(element)
        for rest in _outside(called, set(elements)):
            for p in rest.parameters(recurse=False):
                owners[id(p)].add(called)
        if any(len(found) > 1 for found in owners.values()):
            elements = []
        yield from (element for element in elements if any(True for _ in element.parameters()))
        inside = {id(p) for element in elements for p in element.parameters()}
        if any(id(p) not in inside for p in called.parameters()):
            yield called


def _elements(called: nn.Module) -> Iterator[nn.Module]:
    for child in called.children():
        if not _has_forward(child):
            yield from _called([child])
        elif getattr(child, "is_unit", False):
            yield child
        else:
            yield from _marked(child)


def _marked(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if getattr(child, "is_unit", False):
            yield child
        else:
            yield from _marked(child)


def _outside(module: nn.Module, elements: set[nn.Module]) -> Iterator[nn.Module]:
    """``module`` and what is in it, but for the elements."""
    yield module
    for child in module.children():
        if child not in elements:
            yield from _outside(child, elements)


def _called(modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
    for module in modules:
        if _has_forward(module):
            yield module
        else:
            yield from _called(module.children())


def _has_forward(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward
