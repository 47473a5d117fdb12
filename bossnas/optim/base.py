"""What LARS and the libraries' optimizers share: parameters of which a rank may hold a share, and state known by name.

Three layouts, of which the engine decides:

* plain (one process, DDP, ZeRO 0): every rank holds all parameters, with equal gradients;
* by rows (FSDP2): parameters, gradients and state are DTensors, of which a rank holds some rows, perhaps none;
* flat (ZeRO 1 and 2, ``sharded``): DeepSpeed lays all parameters end to end and gives every rank an equal piece of that
  vector, whatever parameter it cuts through.

State leaves as whole tensors or DTensors by the parameters' names (`full_state`), so a checkpoint goes from any layout
to any other.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bossnas.distributed import dist
from bossnas.distributed.shares import in_share, is_dtensor, local, shard
from bossnas.errors import ConfigError
from bossnas.optim.groups import ema_update


class Held(NamedTuple):
    """What this rank holds of parameter ``number``: views, whatever the layout."""

    number: int
    weight: Tensor
    gradient: Tensor | None
    buffers: list[Tensor]  # in the order of the optimizer's ``kinds``


class SharedOptimizer(torch.optim.Optimizer):
    """An optimizer behind the engines (`engines.protocol.GroupOptimizer`), but for its step.

    ``parameters``: of `groups.parameter_groups`. ``own``: the same, as torch's optimizer keeps them. ``kinds``: names
    of the tensors that it keeps of every parameter. ``clip``: limit of the whole gradient's norm, 0: none.
    ``norm_group``: the ranks over which squares are added up where each holds a share (None: all of them).

    A gradient that is not finite changes nothing: weights, state and followers stay as they are, on all ranks, and
    ``flag`` is False until the next step: a tensor on a GPU, for which nothing waits but `applied`.
    """

    def __init__(
        self,
        parameters: Sequence[dict],
        own: list[dict],
        defaults: dict[str, Any],
        *,
        kinds: tuple[str, ...],
        sharded: bool,
        clip: float,
        norm_group: Any = None,
    ):
        first = parameters[0]["params"][0]
        self.names: list[str] = [group["name"] for group in parameters]
        self.excluded: list[bool] = [group["excluded"] for group in parameters]
        self.shapes = [group["params"][0].shape for group in parameters]
        self.ends = list(itertools.accumulate(shape.numel() for shape in self.shapes))
        self.kinds, self.sharded, self.clip = kinds, sharded, clip
        self.by_rows = is_dtensor(first)
        self.norm_group = first.device_mesh.get_group() if self.by_rows else norm_group
        self.loss_scale: float | Tensor = 1.0
        self.flag: bool | Tensor = True
        self.targets: list[Tensor | None] = [group.get("target") for group in parameters]
        self._followed = [
            (group["params"][0], target)
            for group, target in zip(parameters, self.targets, strict=True)
            if target is not None
        ]
        super().__init__(own, {**defaults, "ema": 1.0})
        if not sharded:  # else the engine calls it, once the share is in place
            self.create_state()

    @torch.no_grad()
    def create_state(self) -> None:
        """Zeros for the parameters as they are now; state of replaced ones is dropped."""
        # all at once: if state came with a first gradient, a checkpoint's names would depend on the paths sampled
        self.state.clear()
        for group in self.param_groups:
            for parameter in group["params"]:
                for kind in self.kinds:
                    self.state[parameter][kind] = torch.zeros_like(parameter)

    @property
    def applied(self) -> bool:
        """Whether the last step changed anything; waits for the device."""
        return bool(self.flag)

    def prepare(self, lr: float, ema: float = 1.0, loss_scale: float | Tensor = 1.0) -> None:
        """Says how the next step is to be taken; gradients are ``loss_scale`` times too large."""
        for group in self.param_groups:
            group["lr"], group["ema"] = lr, ema
        self.loss_scale = loss_scale

    def scale(self, gradients: list[Tensor], norm: float) -> float:
        """Divides the gradients, whose norm over all ranks is ``norm``, by the loss scale and clips them: returns the
        factor. Says in ``flag`` whether they are finite."""
        self.flag, scale = math.isfinite(norm), float(self.loss_scale)
        factor = 1 / scale
        if self.clip > 0:
            factor *= min(1.0, self.clip / (norm / scale + 1e-6))
        if self.flag and factor != 1 and gradients:
            torch._foreach_mul_(gradients, factor)
        return factor

    @torch.no_grad()
    def follow(self) -> None:
        """Moves the followers towards the parameters, if the step was applied. After a step on a flat share the engine
        calls it, when the weights are whole again."""
        targets, weights = ([local(pair[k]) for pair in self._followed] for k in (1, 0))
        ema = self.param_groups[0]["ema"]
        if targets and isinstance(self.flag, Tensor) and self.flag.device.type != "cpu":  # no wait for the flag
            follow_where(self.flag, targets, weights, ema)
        elif self.flag:
            ema_update(targets, weights, ema)

    def held(self) -> list[Held]:
        """What this rank holds of the parameters, in their order; of a flat share only those in it."""
        if not self.sharded:
            parameters = [parameter for group in self.param_groups for parameter in group["params"]]
            return [
                Held(
                    i,
                    local(p),
                    None if p.grad is None else local(p.grad),
                    [local(self.state[p][kind]) for kind in self.kinds],
                )
                for i, p in enumerate(parameters)
            ]
        (share,), result = self.param_groups[0]["params"], []
        for i in range(len(self.names)):
            start, stop, _ = self._bounds(i)
            if start < stop:
                gradient = None if share.grad is None else share.grad[start:stop]
                buffers = [self.state[share][kind][start:stop] for kind in self.kinds]
                result.append(Held(i, share.detach()[start:stop], gradient, buffers))
        return result

    def whole(self, kind: str) -> dict[str, Tensor]:
        """State of one kind by the parameters' names: of DTensors as DTensors, otherwise whole, also of a flat share
        (then all ranks call it)."""
        if self.sharded:
            (share,) = self.param_groups[0]["params"]
            flat = torch.cat(dist.all_gather(self.state[share][kind]))
            # DeepSpeed pads the vector so that it divides evenly
            parts = flat[: self.ends[-1]].split([shape.numel() for shape in self.shapes])
            tensors = [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]
        else:
            tensors = [self.state[p][kind] for group in self.param_groups for p in group["params"]]
        return dict(zip(self.names, tensors, strict=True))

    @torch.no_grad()
    def load_whole(self, kind: str, saved: Mapping[str, Tensor]) -> None:
        """Takes over what `whole` gave on any layout, as whole tensors or DTensors."""
        if self.sharded:
            for number, _, _, buffers in self.held():
                first = self._bounds(number)[2]
                buffer = buffers[self.kinds.index(kind)]
                buffer.copy_(shard(saved[self.names[number]], buffer).flatten()[first : first + buffer.numel()])
            return
        for name, buffer in self.whole(kind).items():
            local(buffer).copy_(shard(saved[name], buffer))

    def _bounds(self, i: int) -> tuple[int, int, int]:
        """Parameter ``i`` in this rank's share: start and stop there, and its first element there."""
        size = self.param_groups[0]["params"][0].numel()
        return in_share(self.ends[i] - self.shapes[i].numel(), self.ends[i], size, dist.rank(self.norm_group))


@torch.no_grad()
def follow_where(applied: Tensor, targets: list[Tensor], weights: list[Tensor], ema: float) -> None:
    """`ema_update` where ``applied``, a 0-dim bool on the tensors' device, is true; nothing waits for it."""
    steps = torch._foreach_sub(weights, targets)
    torch._foreach_mul_(steps, applied * (1 - ema))
    torch._foreach_add_(targets, steps)


def plain_norm(gradients: list[Tensor]) -> float:
    """The norm of gradients that this rank holds whole."""
    return torch.stack(torch._foreach_norm(gradients)).norm().item() if gradients else 0.0


def check_state(saved: Mapping[str, Tensor], needed: Mapping[str, torch.Size]) -> None:
    """Raises ValueError unless the saved tensors have the names and shapes of the needed ones."""
    for name in sorted(saved.keys() | needed.keys()):
        had = saved[name].shape if name in saved else None
        if had != needed.get(name):
            raise ValueError(
                f"optimizer state of {name}: {had or 'nothing'} was saved, {needed.get(name, 'nothing')} is needed; it "
                "belongs to another model"
            )


def check_bad_steps(count: int, most: int, of: str, last: int) -> None:
    """Raises ConfigError when more than ``most`` steps had a gradient that was not finite (outcome "bad").

    ``of``: what was trained, for the message, such as " of block 0"; ``last``: the number of the last such step.
    """
    if count > most:
        raise ConfigError(
            "train.lr",
            f"{count} steps{of} had a gradient that is not finite, the last one step {last}; train.max_bad_steps "
            "allows no more",
            "lower it, or lengthen train.warmup_epochs; the last checkpoint is unharmed",
        )
