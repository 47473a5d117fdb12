"""What an engine must do: apply parallelism to the trained block and own its gradients and its optimizer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from bossnas.errors import ConfigError

# applied; overflow: gradients beyond fp16, the loss scale is halved; bad: not finite for another reason. The last two
# leave weights, momentum and targets as they were.
Outcome = Literal["applied", "overflow", "bad"]
SCALE = "loss_scale"


class GroupOptimizer(Protocol):
    """What engines need of an optimizer (`bossnas.optim`). It divides the gradients by the loss scale, clips them by
    their norm over all ranks, and applies nothing where they are not finite."""

    names: list[str]  # of the parameters, in the order in which a flat share has them
    flag: bool | Tensor  # whether the last step changed anything, the same on all ranks; a tensor on a GPU
    param_groups: list[dict[str, Any]]

    def prepare(self, lr: float, ema: float = 1.0, loss_scale: float | Tensor = 1.0) -> None:
        """Says how the next step is to be taken."""

    def step(self) -> None:
        """One update with the gradients of the parameters; followers move, too, unless it is sharded."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Lets the gradients go."""

    def create_state(self) -> None:
        """Fresh state, for the parameters that the engine has put in place."""

    def follow(self) -> None:
        """Moves the followers, if the step was applied; sharded: the engine calls it after a step, when the weights are
        whole again."""

    def full_state(self) -> dict[str, Tensor]:
        """Its state by name, whole or as DTensors; all ranks call it."""

    def load_full_state(self, state: dict[str, Tensor]) -> None:
        """Takes over what `full_state` gave on any engine. Raises ValueError if it is another model's."""


MakeOptimizer = Callable[[nn.Module, nn.Module | None, bool], GroupOptimizer]  # module, followers, sharded


class Verdict(NamedTuple):
    """What became of a step, as numbers or as tensors on a GPU, which nothing has waited for.

    ``applied``: whether it changed anything; ``scale``: the loss scale that it had, ``next_scale``: that of the next.
    """

    applied: bool | Tensor
    scale: float | Tensor
    next_scale: float | Tensor

    @property
    def outcome(self) -> Outcome:
        """In a word; waits for the device."""
        return outcome(bool(self.applied), float(self.scale))


def outcome(applied: bool, scale: float) -> Outcome:
    return "applied" if applied else "overflow" if scale > 1 else "bad"


class Engine(Protocol):
    """One engine per trained block or network. Forward passes call what `wrap` returned or its submodules, never the
    engine.

    All ranks of a data-parallel group sample the same paths and call every method at the same time.
    """

    sharded: bool  # whether a rank's optimizer sees parts of parameters

    def check(self, kind: str) -> None:
        """Raises ConfigError if the settings cannot work on devices of type ``kind`` (cpu | cuda)."""

    def wrap(
        self,
        module: nn.Module,
        followers: nn.Module | None,
        make_optimizer: MakeOptimizer,
    ) -> tuple[nn.Module, nn.Module | None]:
        """Takes over ``module``, which is on its device, and ``followers``, the part of the target network that
        follows it by name. Returns what the training's forward passes go through in their place: the same modules, or
        copies of which each rank holds a share; buffers are the same tensors in both.
        ``make_optimizer(module, followers, sharded)`` builds their optimizer; ``sharded``: for one flat share of all
        parameters."""

    def autocast(self) -> AbstractContextManager:
        """Context of a forward pass in the run's precision."""

    def micro(self, loss: Tensor, last: bool) -> None:
        """Back-propagates a micro-batch's scalar loss; ``last`` marks the update's last call.

        The gradient of an update is (1 / accumulate) x the sum over its calls, averaged over the ranks. A
        micro-batch may come in several calls whose losses add up to its own.
        """

    def begin_step(self, lr: float, ema: float = 1.0) -> Verdict:
        """One optimizer step at learning rate ``lr``, then target <- ema target + (1 - ema) online for the
        followers (METHOD 3.4). Gradients are gone afterwards. The verdict is the same on all ranks. LARS on whole
        tensors does not wait for a GPU."""

    def step(self, lr: float, ema: float = 1.0) -> Outcome:
        """`begin_step`, and what became of it."""

    @property
    def loss_scale(self) -> float:
        """What fp16 multiplies losses by; 1 in other precisions. Waits for the device."""

    def gather(self) -> None:
        """Brings the trained weights, of the followers too, into the modules that `wrap` was given, on all ranks."""

    def state(self) -> dict[str, Tensor]:
        """The optimizer's state by name, whole or as DTensors, the same for every engine; all ranks call it."""

    def load(self, state: dict[str, Tensor]) -> None:
        """Takes over what `state` of any engine on any number of ranks gave. The weights are in the modules that `wrap`
        was given. Raises ValueError if it is another model's."""

    def close(self) -> None:
        """Gathers, and lets go of hooks and buffers. The modules stay usable."""


class LossScale:
    """The factor that keeps small gradients above zero in fp16: halved where they overflow, doubled after
    ``patience`` steps in which they did not. Other precisions: 1. It is a tensor where the losses are, so that no step
    waits for the one before."""

    def __init__(self, precision: str, start: float = 2.0**16, patience: int = 2000):
        self.dynamic, self.patience = precision == "fp16", patience
        self._value = torch.tensor(start, dtype=torch.float32)
        self._good = torch.zeros((), dtype=torch.int64)

    @property
    def value(self) -> float:
        """The factor now; waits for the device."""
        return self._value.item() if self.dynamic else 1.0

    def scaled(self, loss: Tensor) -> Tensor:
        if not self.dynamic:
            return loss
        self._value, self._good = self._value.to(loss.device), self._good.to(loss.device)
        return loss * self._value

    def run(self, optimizer: GroupOptimizer, step: Callable[[], object], lr: float, ema: float) -> Verdict:
        """Has ``step`` make ``optimizer`` take its step, and judges it."""
        scale = self._value if self.dynamic else 1.0
        optimizer.prepare(lr, ema, scale)
        step()
        if not self.dynamic:
            return Verdict(optimizer.flag, 1.0, 1.0)
        applied = torch.as_tensor(optimizer.flag, device=self._value.device)
        good = torch.where(applied, self._good + 1, 0)
        grown = torch.where(good % self.patience == 0, self._value * 2, self._value)
        # an outcome is bad, not an overflow, where the scale is 1 already
        self._value = torch.where(applied, grown, torch.where(self._value > 1, self._value / 2, self._value))
        self._good = good
        return Verdict(optimizer.flag, scale, self._value)

    def add_to(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        numbers = [self._value.item(), self._good.item()]
        return {**state, SCALE: torch.tensor(numbers, dtype=torch.float64)} if self.dynamic else state

    def take_from(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Reads the scale, if there is one; the rest of the state."""
        if self.dynamic and SCALE in state:
            self._value.fill_(state[SCALE][0].item())
            self._good.fill_(int(state[SCALE][1]))
        return {name: tensor for name, tensor in state.items() if name != SCALE}


def autocast(device_type: str, precision: str) -> AbstractContextManager:
    """Autocast to a 16-bit type or nothing. ``precision``: fp32 | bf16 | fp16."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device_type, dtype=dtype, enabled=precision != "fp32")


def check_precision(kind: str, precision: str) -> None:
    """Raises ConfigError when devices of type ``kind`` (cpu | cuda) cannot do ``precision``."""
    if precision == "bf16" and kind == "cuda" and not torch.cuda.is_bf16_supported():
        raise ConfigError("train.precision", "this GPU has no bfloat16", "set it to fp16 or fp32")
