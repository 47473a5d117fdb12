"""One process, or data parallelism with the gradients of a step averaged in one all-reduce."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from bossnas.distributed import dist
from bossnas.distributed.engines import protocol
from bossnas.distributed.engines.protocol import LossScale, MakeOptimizer, Outcome, Verdict


class DDPEngine:
    """The reference engine. ``accumulate``: micro-batches per update; ``precision``: fp32 | bf16 | fp16;
    ``group``: the ranks that share a batch (None: all).

    Unlike torch's DDP it takes any number of forward passes before a backward, and leaves parameters without gradient
    that no rank has used: only what some rank used is averaged. The gradients travel after the last backward of an
    update, not during it: with accumulation that is once in many micro-batches.
    """

    sharded = False

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
        self._kind = next(module.parameters()).device.type
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        self._optimizer = make_optimizer(module, followers, False)
        self._scale = LossScale(self.precision)
        return module, followers

    def autocast(self) -> AbstractContextManager:
        return protocol.autocast(self._kind, self.precision)

    def micro(self, loss: Tensor, last: bool) -> None:
        (self._scale.scaled(loss) * (1 / self.accumulate)).backward()

    def begin_step(self, lr: float, ema: float = 1.0) -> Verdict:
        average_gradients(self._parameters, self.group)
        verdict = self._scale.run(self._optimizer, self._optimizer.step, lr, ema)
        # None, not zeros: `average_gradients` sends every gradient that exists
        self._optimizer.zero_grad(set_to_none=True)
        return verdict

    def step(self, lr: float, ema: float = 1.0) -> Outcome:
        return self.begin_step(lr, ema).outcome

    @property
    def loss_scale(self) -> float:
        return self._scale.value

    def gather(self) -> None:
        pass

    def state(self) -> dict[str, Tensor]:
        return self._scale.add_to(self._optimizer.full_state())

    def load(self, state: dict[str, Tensor]) -> None:
        self._optimizer.load_full_state(self._scale.take_from(state))

    def close(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        del self._optimizer, self._parameters


@torch.no_grad()
def average_gradients(parameters: list[nn.Parameter], group: Any = None) -> None:
    """Averages over the ranks the gradients of all parameters that some rank has used; the others stay None."""
    world = dist.world_size(group)
    if world == 1 or not parameters:
        return
    # agreed on first: a rank that lacks one gradient would otherwise send a `flat` of another size. On the CPUs: no GPU
    # is waited for
    used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8)
    dist.all_reduce_max(used, group)
    chosen = [p for p, flag in zip(parameters, used.tolist(), strict=True) if flag]
    if not chosen:
        return
    gradients = []
    for p in chosen:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        gradients.append(p.grad)
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce_sum(flat, group).div_(world)
    for gradient, piece in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(piece.view_as(gradient))
