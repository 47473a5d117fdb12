"""AdamW, LAMB and SGD of torch, timm or apex behind what engines ask of an optimizer (`engines.protocol`)."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import timm.optim
import torch
from torch import Tensor, nn

from bossnas.distributed import dist
from bossnas.distributed.engines.protocol import MakeOptimizer
from bossnas.distributed.shares import local
from bossnas.errors import ConfigError
from bossnas.optim.base import Held, SharedOptimizer, check_state, plain_norm
from bossnas.optim.groups import parameter_groups

STEPS = "step"
Kind = Literal["adamw", "lamb", "sgd"]
Fused = Literal["auto", "apex", "torch", "none"]


@dataclass(frozen=True)
class Algorithm:
    """A library's optimizer. ``make(groups)`` builds it; ``buffers``: what it keeps of every parameter, by its own
    names; ``steps``: where it counts its steps, "state": in a tensor for every parameter, otherwise in every group, in
    the form that ``steps(count)`` gives, None: nowhere."""

    name: str
    make: Callable[[list[dict]], torch.optim.Optimizer]
    buffers: tuple[str, ...]
    steps: Literal["state"] | Callable[[int], Any] | None = None


class ChosenOptimizer(NamedTuple):
    """What builds the optimizer for an engine, and the name of the implementation that runs."""

    make: MakeOptimizer
    name: str


def choose_optimizer(
    kind: Kind,
    fused: Fused,
    device: torch.device,
    *,
    weight_decay: float,
    momentum: float,
    beta2: float,
    eps: float,
    clip: float = 0.0,
) -> ChosenOptimizer:
    """What builds the optimizer for an engine, and the name of the implementation that runs.

    ``fused``: auto: apex's where it is installed on a GPU, else torch's; none: plain torch. ``weight_decay`` spares
    biases and norms; ``momentum``: sgd's (Nesterov), else the first beta; ``clip``: limit of the gradient's norm, 0:
    none. Raises ConfigError where apex is asked for and cannot run.
    """
    found = _algorithm(kind, fused, device, momentum, beta2, eps)

    def make(module: nn.Module, followers: nn.Module | None, sharded: bool) -> LibraryOptimizer:
        groups, targets = parameter_groups(module), dict(followers.named_parameters()) if followers is not None else {}
        for group in groups:
            group["target"] = targets.get(group["name"])
        return LibraryOptimizer(groups, found, weight_decay=weight_decay, clip=clip, sharded=sharded)

    return ChosenOptimizer(make, found.name)


def check_optimizer(kind: Kind, sharded: bool) -> None:
    """Raises ConfigError where an engine shows the optimizer parts of parameters and it needs whole ones."""
    if kind == "lamb" and sharded:
        raise ConfigError(
            "train.optimizer",
            "is lamb, which needs the norms of whole parameters, but the engine gives each rank a share of them",
            "set engine.name to ddp (or deepspeed with zero_optimization.stage 0), or train.optimizer to adamw",
        )


def _algorithm(kind: Kind, fused: Fused, device: torch.device, momentum: float, beta2: float, eps: float) -> Algorithm:
    adam: dict[str, Any] = {"lr": 0.0, "betas": (momentum, beta2), "eps": eps}
    moments = ("exp_avg", "exp_avg_sq")
    if fused == "apex" and kind == "sgd":
        raise ConfigError("train.fused", "is apex, of which AdamW and LAMB are used", "set it to torch")
    if kind != "sgd" and (fused == "apex" or fused == "auto" and device.type == "cuda"):
        apex, why = _apex({"adamw": "FusedAdam", "lamb": "FusedLAMB"}[kind], device)
        if apex is None and fused == "apex":
            raise ConfigError(
                "train.fused",
                f"is apex, which cannot be used here ({why})",
                "install NVIDIA's apex with its CUDA extensions, or set it to auto",
            )
        if apex is not None and kind == "adamw":
            return Algorithm(
                "AdamW by apex FusedAdam", lambda groups: apex(groups, adam_w_mode=True, **adam), moments, int
            )
        if apex is not None:  # it clips by itself, and 0 would not mean never
            return Algorithm(
                "LAMB by apex FusedLAMB", lambda groups: apex(groups, max_grad_norm=math.inf, **adam), moments, int
            )
    is_fused = fused != "none"
    prefix = "torch fused" if is_fused else "torch"
    if kind == "adamw":
        return Algorithm(
            f"{prefix} AdamW", lambda groups: torch.optim.AdamW(groups, fused=is_fused, **adam), moments, "state"
        )
    if kind == "lamb":
        return Algorithm(
            "timm LAMB",
            lambda groups: timm.optim.Lamb(groups, max_grad_norm=None, **adam),
            moments,
            lambda count: torch.tensor(float(count)),
        )
    return Algorithm(
        f"{prefix} SGD",
        lambda groups: torch.optim.SGD(groups, lr=0.0, momentum=momentum, nesterov=momentum > 0, fused=is_fused),
        ("momentum_buffer",) if momentum else (),
    )


def _apex(name: str, device: torch.device) -> tuple[Any, str]:
    """Apex's optimizer, or None and why not. Another package is called apex, too, and NVIDIA's can lack its kernels,
    which shows when an optimizer is built."""
    try:
        found = getattr(importlib.import_module("apex.optimizers"), name)
        found([nn.Parameter(torch.zeros(1, device=device))])
    except (ImportError, AttributeError, RuntimeError) as error:
        return None, str(error)
    return found, ""


class LibraryOptimizer(SharedOptimizer):
    """A library's optimizer over all trainable parameters, and the moving average that follows them.

    Engines see one group with all parameters, and ZeRO may put a flat share in their place (``sharded``); the library's
    own optimizer works on the pieces that this rank holds: whole parameters, rows of DTensors, or parts of the share.
    It is told to let weights alone where it needs no decay (``excluded``), gets gradients that are divided by the loss
    scale and clipped by their norm over all ranks (``clip``), and takes no step where that norm is not finite, on all
    ranks alike. State exists from the start, and is known by parameter, whole, in `full_state`.

    ``groups``: of `groups.parameter_groups`, with ``target``: what follows a parameter, or None.
    """

    def __init__(
        self,
        groups: list[dict],
        algorithm: Algorithm,
        *,
        weight_decay: float,
        clip: float = 0.0,
        sharded: bool = False,
    ):
        if not groups:
            raise ConfigError("model", "has no trainable parameter", "choose another network")
        self.algorithm, self.weight_decay, self.steps = algorithm, weight_decay, 0
        own = [{"params": [group["params"][0] for group in groups]}]
        super().__init__(groups, own, {"lr": 0.0}, kinds=algorithm.buffers, sharded=sharded, clip=clip)

    @torch.no_grad()
    def create_state(self) -> None:
        """Fresh state, for the parameters as they are now."""
        super().create_state()
        held = self._held()
        # leaves of their own, since what this rank holds of a parameter is none
        self._pieces = [
            (piece.number, piece.weight if isinstance(piece.weight, nn.Parameter) else _leaf(piece.weight))
            for piece in held
        ]
        groups = [
            {
                "params": [piece for i, piece in self._pieces if self.excluded[i] == excluded],
                "weight_decay": 0.0 if excluded else self.weight_decay,
            }
            for excluded in (False, True)
        ]
        groups = [group for group in groups if group["params"]]
        self._library = self.algorithm.make(groups) if groups else None
        where = self._pieces[0][1].device if self._pieces and self._counts_on_device() else None
        self._counts = torch.zeros(len(held), device=where)
        for count, (_, leaf), piece in zip(self._counts, self._pieces, held, strict=True):
            state = dict(zip(self.kinds, piece.buffers, strict=True))
            if self.algorithm.steps == "state":
                state[STEPS] = count
            if state:
                assert self._library is not None, "what is held is in a group"
                self._library.state[leaf] = state

    def _counts_on_device(self) -> bool:
        return self._library is not None and bool(self._library.defaults.get("fused"))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # torch's may take a closure
        """One update with the gradients of the parameters; the followers come after it, unless it is sharded."""
        assert closure is None, "this optimizer takes no closure"
        held = self._held()
        gradients = [piece.gradient for piece in held if piece.gradient is not None]
        self.scale(gradients, self._norm(gradients))
        if not self.applied:
            return
        if self._library is not None:
            self._update(self._library, held)
        self.steps += 1
        if not self.sharded:
            self.follow()

    def _update(self, library: torch.optim.Optimizer, held: list[Held]) -> None:
        for (_, leaf), piece in zip(self._pieces, held, strict=True):
            if leaf is not piece.weight:
                leaf.data, leaf.grad = piece.weight.detach(), piece.gradient
        self._counts.fill_(self.steps)
        for group in library.param_groups:
            group["lr"] = self.param_groups[0]["lr"]
            if callable(self.algorithm.steps):
                group[STEPS] = self.algorithm.steps(self.steps)
        library.step()
        for (_, leaf), piece in zip(self._pieces, held, strict=True):
            if leaf is not piece.weight:
                leaf.grad = None

    def _norm(self, gradients: list[Tensor]) -> float:
        """Of the whole gradient, over all ranks."""
        if not self.sharded and not self.by_rows:
            return plain_norm(gradients)
        where = local(self.param_groups[0]["params"][0]).device
        square = torch.zeros((), dtype=torch.float64, device=where)
        if gradients:
            square += torch.stack(torch._foreach_norm(gradients)).double().square().sum()
        return math.sqrt(value) if (value := dist.all_reduce_sum(square, self.norm_group).item()) >= 0 else math.nan

    @torch.no_grad()
    def full_state(self) -> dict[str, Tensor]:
        """``parameter.buffer`` of all parameters, of DTensors as DTensors, otherwise whole, also when sharded (then all
        ranks call it), and the number of steps taken."""
        result = {STEPS: torch.tensor([float(self.steps)], dtype=torch.float64)}
        for kind in self.kinds:
            result.update({f"{name}.{kind}": tensor for name, tensor in self.whole(kind).items()})
        return result

    @torch.no_grad()
    def load_full_state(self, state: dict[str, Tensor]) -> None:
        """Copies what ``full_state`` gave, sharded or not, as whole tensors or DTensors. Raises ValueError if it is
        another model's."""
        needed = {
            f"{name}.{kind}": shape for name, shape in zip(self.names, self.shapes, strict=True) for kind in self.kinds
        }
        check_state(state, needed | {STEPS: torch.Size([1])})
        self.steps = int(state[STEPS].item())
        for kind in self.kinds:
            self.load_whole(kind, {name: state[f"{name}.{kind}"] for name in self.names})

    def _held(self) -> list[Held]:
        """What this rank holds, where that is anything: a library cannot step on no elements."""
        return [piece for piece in self.held() if piece.weight.numel()]


def _leaf(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.detach())
