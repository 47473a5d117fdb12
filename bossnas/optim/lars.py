"""LARS, its parameter groups, the schedules and the target network's moving average (METHOD 3.4, 3.5)."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from bossnas.distributed import dist
from bossnas.distributed.shares import in_share, is_dtensor, local, shard
from bossnas.optim.groups import ema_update
from bossnas_kernels import lars_ema_step
from bossnas_kernels.reference import lars_update


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling with momentum (METHOD 3.5), and the target network that follows (3.4).

    `bossnas_kernels.lars_ema_step` says what a step does, in few launches whatever the number of parameters. A
    parameter without gradient, or with an all-zero one, is left alone together with its momentum: it was on no
    sampled path. All state exists from the start. ``lr`` and ``ema``, the share of a target that stays (1: targets
    stay as they are), are read from the first parameter group at every step; `prepare` sets them. ``clip`` limits the
    norm of the whole gradient (0: no limit).

    A gradient that is not finite changes nothing: weights, momentum and targets stay as they are, on all ranks, and
    ``applied`` is False until the next step.

    ``groups``: of ``parameter_groups``. ``sharded``: for ZeRO 1 and 2, which replace the parameters by this
    rank's equal share of all of them laid end to end; the squared norms are then added up over
    ``norm_group`` (None: all ranks) in one all-reduce. The engine calls ``create_state`` once the share is
    in place, and ``follow`` after every step, when the weights are whole again.

    Parameters may be DTensors, sharded by rows as FSDP2 does; their targets and gradients then are, too. Each rank
    updates its rows, and the norms are added up over the ranks of their mesh.
    """

    def __init__(
        self,
        groups: list[dict],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 1e-6,
        trust: float = 0.001,
        norm_group: Any = None,
        sharded: bool = False,
        clip: float = 0.0,
    ):
        if not groups:
            raise ValueError("LARS: no trainable parameter")
        self.names: list[str] = [group["name"] for group in groups]
        self.excluded: list[bool] = [group["excluded"] for group in groups]
        self.shapes = [group["params"][0].shape for group in groups]
        self.ends = list(itertools.accumulate(shape.numel() for shape in self.shapes))
        self.momentum, self.weight_decay, self.trust = momentum, weight_decay, trust
        self.norm_group, self.sharded, self.clip = norm_group, sharded, clip
        self.by_rows = is_dtensor(groups[0]["params"][0])
        if self.by_rows:
            self.norm_group = groups[0]["params"][0].device_mesh.get_group()
        self.loss_scale, self.applied = 1.0, True
        parameters = [group["params"][0] for group in groups]
        followed = [(parameter, group.get("target")) for parameter, group in zip(parameters, groups, strict=True)]
        self._followed = [pair for pair in followed if pair[1] is not None]
        self._targets = [target for _, target in followed]
        own = [{key: group[key] for key in ("params", "name", "excluded")} for group in groups]
        super().__init__([{"params": parameters}] if sharded else own, {"lr": lr, "ema": 1.0})
        if not sharded:
            self.create_state()

    def create_state(self) -> None:
        """Zero momentum for the parameters as they are now; state of replaced ones is dropped."""
        self.state.clear()
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)

    def prepare(self, lr: float, ema: float = 1.0, loss_scale: float = 1.0) -> None:
        """Says how the next step is to be taken; gradients are ``loss_scale`` times too large."""
        for group in self.param_groups:
            group["lr"], group["ema"] = lr, ema
        self.loss_scale = loss_scale

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update with the gradients of the parameters."""
        assert closure is None, "LARS takes no closure"
        settings = {
            "lr": self.param_groups[0]["lr"],
            "momentum": self.momentum,
            "weight_decay": self.weight_decay,
            "trust": self.trust,
        }
        if not self.sharded and not self.by_rows:
            _, weights, gradients, buffers = zip(*self._pieces(), strict=True)
            present = [g for g in gradients if g is not None]
            norms = torch._foreach_norm(present) if present else []
            self._scale(present, torch.stack(norms).norm().item() if norms else 0.0)
            if self.applied:
                lars_ema_step(
                    weights,
                    gradients,
                    buffers,
                    self.excluded,
                    self._targets,
                    **settings,
                    ema=self.param_groups[0]["ema"],
                )
            return
        pieces = [piece for piece in self._pieces() if piece[2] is not None]
        index, weights, gradients, buffers = ([piece[k] for piece in pieces] for k in range(4))
        w_norm, g_norm = self._norms(index, weights, gradients)
        factor = self._scale(gradients, math.hypot(*g_norm))
        if self.applied:
            lars_update(
                weights,
                gradients,
                buffers,
                [self.excluded[i] for i in index],
                [w_norm[i] for i in index],
                [g_norm[i] * factor for i in index],
                **settings,
            )
            if self.by_rows:
                self.follow()

    def _scale(self, gradients: list[Tensor], norm: float) -> float:
        """Divides the gradients, whose norm over all ranks is ``norm``, by the loss scale and clips them: returns the
        factor. Says in ``applied`` whether they are finite."""
        self.applied = math.isfinite(norm)
        factor = 1 / self.loss_scale
        if self.clip > 0:
            factor *= min(1.0, self.clip / (norm / self.loss_scale + 1e-6))
        if self.applied and factor != 1 and gradients:
            torch._foreach_mul_(gradients, factor)
        return factor

    def follow(self) -> None:
        """Moves the targets towards the parameters, where ``step`` saw but a share of these."""
        ema_update(
            [local(t) for _, t in self._followed], [local(p) for p, _ in self._followed], self.param_groups[0]["ema"]
        )

    @torch.no_grad()
    def full_state(self) -> dict[str, Tensor]:
        """Momentum by parameter name: of DTensors as DTensors, otherwise whole, also when sharded (then all ranks call
        it)."""
        if not self.sharded:
            parameters = [group["params"][0] for group in self.param_groups]
            return {name: self.state[p]["momentum"] for name, p in zip(self.names, parameters, strict=True)}
        flat = torch.cat(dist.all_gather(self.state[self.param_groups[0]["params"][0]]["momentum"]))
        counts = [shape.numel() for shape in self.shapes]
        parts = flat[: self.ends[-1]].split(counts)
        return {name: part.view(shape) for name, part, shape in zip(self.names, parts, self.shapes, strict=True)}

    @torch.no_grad()
    def load_full_state(self, state: dict[str, Tensor]) -> None:
        """Copies what ``full_state`` gave, sharded or not, as whole tensors or DTensors. Raises ValueError if it is
        another model's."""
        shapes = dict(zip(self.names, self.shapes, strict=True))
        for name in shapes.keys() | state.keys():
            if name not in state or name not in shapes or state[name].shape != shapes[name]:
                raise ValueError(
                    f"momentum of {name}: {_shape(state.get(name))} was saved, {shapes.get(name, 'none')}"
                    " is needed; it belongs to another model"
                )
        if not self.sharded:
            for name, buffer in self.full_state().items():
                local(buffer).copy_(shard(state[name], buffer))
            return
        for i, _, _, buffer in self._pieces():
            start = self._bounds(i)[2]
            buffer.copy_(shard(state[self.names[i]], buffer).flatten()[start : start + buffer.numel()])

    def _bounds(self, i: int) -> tuple[int, int, int]:
        """Parameter ``i`` in this rank's share: start and stop there, and its first element there."""
        size = self.param_groups[0]["params"][0].numel()
        return in_share(self.ends[i] - self.shapes[i].numel(), self.ends[i], size, dist.rank(self.norm_group))

    def _pieces(self) -> list[tuple[int, Tensor, Tensor | None, Tensor]]:
        """(number, weight, gradient, momentum) of what this rank updates; views of the share if sharded, the rows that
        it holds of DTensors."""
        if not self.sharded:
            parameters = [group["params"][0] for group in self.param_groups]
            return [
                (i, local(p), None if p.grad is None else local(p.grad), local(self.state[p]["momentum"]))
                for i, p in enumerate(parameters)
            ]
        (share,) = self.param_groups[0]["params"]
        buffer, pieces = self.state[share]["momentum"], []
        for i in range(len(self.names)):
            start, stop, _ = self._bounds(i)
            if start < stop:
                gradient = None if share.grad is None else share.grad[start:stop]
                pieces.append((i, share.detach()[start:stop], gradient, buffer[start:stop]))
        return pieces

    def _norms(self, index: list[int], weights: list[Tensor], gradients: list[Tensor]) -> tuple[list, list]:
        """Norms of all sharded parameters and of all their gradients, over the ranks that share them."""
        where = self.state[self.param_groups[0]["params"][0]]["momentum"].device
        # float64: the squares of small norms stay above zero
        squares = torch.zeros(2, len(self.names), dtype=torch.float64, device=where)
        if index:
            norms = torch.stack(torch._foreach_norm(weights) + torch._foreach_norm(gradients))
            squares[:, torch.tensor(index, device=where)] = norms.double().square().view(2, -1)
        dist.all_reduce_sum(squares, self.norm_group)
        w_norm, g_norm = squares.sqrt().tolist()
        return w_norm, g_norm


def _shape(tensor: Tensor | None) -> object:
    return "none" if tensor is None else tensor.shape
