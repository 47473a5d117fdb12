"""One process, one device."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bossnas.engines import protocol


class SingleEngine:
    """The reference engine. ``precision``: fp32 | bf16; ``clip``: gradient norm limit, 0 none."""

    def __init__(self, accumulate: int, precision: str, clip: float):
        self.accumulate, self.precision, self.clip = accumulate, precision, clip

    def check(self, kind: str) -> None:
        protocol.check_precision(kind, self.precision)

    def wrap(self, module: nn.Module, make_optimizer: Callable[[bool], Optimizer]) -> None:
        self._kind = next(module.parameters()).device.type
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        self._optimizer = make_optimizer(False)

    def autocast(self) -> AbstractContextManager:
        return protocol.autocast(self._kind, self.precision)

    def micro(self, loss: Tensor, last: bool) -> None:
        (loss / self.accumulate).backward()

    def step(self, lr: float, ema: float = 1.0) -> None:
        if self.clip > 0:
            torch.nn.utils.clip_grad_norm_(self._parameters, self.clip)
        for group in self._optimizer.param_groups:
            group["lr"], group["ema"] = lr, ema
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def save(self, folder: Path) -> None:
        protocol.save_optimizer(self._optimizer, folder, write=True)

    def load(self, folder: Path) -> None:
        protocol.load_optimizer(self._optimizer, folder)

    def close(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        del self._optimizer, self._parameters
