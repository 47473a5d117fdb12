"""LARS, and the target network that follows (METHOD 3.4, 3.5)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bossnas.distributed import dist
from bossnas.optim.base import SharedOptimizer, check_state
from bossnas_kernels import lars_ema_step, lars_squares

MOMENTUM = "momentum"


class LARS(SharedOptimizer):
    """Layer-wise adaptive rate scaling with momentum (METHOD 3.5), and the target network that follows (3.4).

    `bossnas_kernels.lars_ema_step` says what a step does, in few launches whatever the number of parameters. A
    parameter without gradient, or with an all-zero one, is left alone together with its momentum: it was on no
    sampled path. All state exists from the start. ``lr`` and ``ema``, the share of a target that stays (1: targets
    stay as they are), are read from the first parameter group at every step; `prepare` sets them. ``clip`` limits the
    norm of the whole gradient (0: no limit).

    ``groups``: of `groups.parameter_groups`. ``sharded`` and ``norm_group``: see `base`. Parameters may be DTensors,
    sharded by rows; their targets and gradients then are, too.
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
        self.momentum, self.weight_decay, self.trust = momentum, weight_decay, trust
        if sharded:
            own = [{"params": [group["params"][0] for group in groups]}]
        else:
            own = [{key: group[key] for key in ("params", "name", "excluded")} for group in groups]
        super().__init__(groups, own, {"lr": lr}, kinds=(MOMENTUM,), sharded=sharded, clip=clip, norm_group=norm_group)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # torch's may take a closure
        """One update with the gradients of the parameters."""
        assert closure is None, "LARS takes no closure"
        settings: dict[str, Any] = {
            "lr": self.param_groups[0]["lr"],
            "momentum": self.momentum,
            "weight_decay": self.weight_decay,
            "trust": self.trust,
            "loss_scale": self.loss_scale,
            "clip": self.clip,
        }
        if self.sharded or self.by_rows:
            self._step_on_shares(settings)
            return
        # whole tensors: the kernel takes the norms itself, and moves the targets in the same pass over the weights
        held = self.held()
        self.flag = lars_ema_step(
            [piece.weight for piece in held],
            [piece.gradient for piece in held],
            [piece.buffers[0] for piece in held],
            self.excluded,
            self.targets,
            **settings,
            ema=self.param_groups[0]["ema"],
        )

    def _step_on_shares(self, settings: dict[str, Any]) -> None:
        """A trust ratio needs the norms of whole parameters: their squares are added up over the ranks first."""
        # ZeRO fills the gradients of unused parameters with zeros: a norm of zero says that a parameter is to be left
        # alone, as a missing gradient does elsewhere
        held = [piece for piece in self.held() if piece.gradient is not None]
        index = [piece.number for piece in held]
        weights, gradients = [piece.weight for piece in held], [piece.gradient for piece in held]
        where = self.state[self.param_groups[0]["params"][0]][MOMENTUM].device
        squares = torch.zeros(2, len(self.names), dtype=torch.float64, device=where)
        columns = dist.send(torch.tensor(index, dtype=torch.int64), where)  # a list would make the GPU wait
        if index:
            squares.index_copy_(1, columns, lars_squares(weights, gradients))
        dist.all_reduce_sum(squares, self.norm_group)
        self.flag = lars_ema_step(
            weights,
            gradients,
            [piece.buffers[0] for piece in held],
            [self.excluded[i] for i in index],
            None,
            **settings,
            squares=squares.index_select(1, columns),
            norm=squares[1].sum().sqrt(),
        )
        # rows follow rows; on a flat share the weights are not whole yet, and the engine does it
        if self.by_rows:
            self.follow()

    def full_state(self) -> dict[str, Tensor]:
        """Momentum by parameter name: of DTensors as DTensors, otherwise whole, also when sharded (then all ranks call
        it)."""
        return self.whole(MOMENTUM)

    def load_full_state(self, state: dict[str, Tensor]) -> None:
        """Copies what ``full_state`` gave, sharded or not, as whole tensors or DTensors. Raises ValueError if it is
        another model's."""
        check_state(state, dict(zip(self.names, self.shapes, strict=True)))
        self.load_whole(MOMENTUM, state)
