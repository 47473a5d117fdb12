"""What an engine must do: apply parallelism to the trained block and own its gradients and its optimizer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bossnas.errors import ConfigError
from bossnas.optim import LARS

OPTIMIZER_FILE = "optimizer.pt"


class Engine(Protocol):
    """One engine per trained block. Forward passes call the wrapped module's submodules, never the engine.

    All ranks of a data-parallel group sample the same paths and call every method at the same time.
    """

    def check(self, kind: str) -> None:
        """Raises ConfigError if the settings cannot work on devices of type ``kind`` (cpu | cuda)."""

    def wrap(self, module: nn.Module, make_optimizer: Callable[[bool], Optimizer]) -> None:
        """Takes over ``module``, which is on its device. ``make_optimizer(sharded)`` builds its optimizer."""

    def autocast(self) -> AbstractContextManager:
        """Context of a forward pass in the run's precision."""

    def micro(self, loss: Tensor, last: bool) -> None:
        """Back-propagates a micro-batch's scalar loss; ``last`` marks the update's last call.

        The gradient of an update is (1 / accumulate) x the sum over its calls, averaged over the ranks. A
        micro-batch may come in several calls whose losses add up to its own.
        """

    def step(self, lr: float, ema: float = 1.0) -> None:
        """One optimizer step at learning rate ``lr``, then target <- ema target + (1 - ema) online for the
        optimizer's targets (METHOD 3.4). Gradients are gone afterwards."""

    def save(self, folder: Path) -> None:
        """Writes the optimizer's state into ``folder``. All ranks call it, between updates."""

    def load(self, folder: Path) -> None:
        """Reads what any engine on any number of ranks saved, once the weights are in the module."""

    def close(self) -> None:
        """Lets go of hooks and buffers. The module stays usable."""


def autocast(device_type: str, precision: str) -> AbstractContextManager:
    """Autocast to bfloat16 or nothing. ``precision``: fp32 | bf16."""
    return torch.autocast(device_type, dtype=torch.bfloat16, enabled=precision == "bf16")


def check_precision(kind: str, precision: str) -> None:
    """Raises ConfigError when devices of type ``kind`` (cpu | cuda) cannot do ``precision``."""
    if precision == "bf16" and kind == "cuda" and not torch.cuda.is_bf16_supported():
        raise ConfigError("train.precision", "this GPU has no bfloat16", "set it to fp32")


def save_optimizer(optimizer: LARS, folder: Path, write: bool) -> None:
    """Gathers the whole momentum (all ranks call it) and writes it if ``write``."""
    state = optimizer.full_state()
    if write:
        with open(folder / OPTIMIZER_FILE, "wb") as file:
            torch.save({name: tensor.cpu().clone() for name, tensor in state.items()}, file)


def load_optimizer(optimizer: LARS, folder: Path) -> None:
    """Reads what ``save_optimizer`` wrote. Raises ConfigError when it does not fit the model."""
    state = torch.load(folder / OPTIMIZER_FILE, map_location="cpu", weights_only=True)
    try:
        optimizer.load_full_state(state)
    except ValueError as error:
        raise ConfigError(
            "out",
            f"{folder} does not fit this run ({error})",
            "go on with the config of that run, or choose another folder",
        ) from None
