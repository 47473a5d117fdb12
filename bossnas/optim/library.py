"""AdamW, LAMB and SGD of torch, timm or apex behind what engines ask of an optimizer (`engines.protocol`)."""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import timm.optim
import torch
from torch import Tensor, nn

from bossnas.distributed import dist
from bossnas.distributed.engines.protocol import MakeOptimizer
from bossnas.distributed.shares import in_share, is_dtensor, local, shard
from bossnas.errors import ConfigError
from bossnas.optim.groups import ema_update, parameter_groups

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
) -> tuple[MakeOptimizer, str]:
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

    return make, found.name


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


class LibraryOptimizer(torch.optim.Optimizer):
    """A library's optimizer over all trainable parameters, and the moving average that follows them.

    Engines see one group with all parameters, and ZeRO may put a flat share in their place (``sharded``); the library's
    own optimizer works on the pieces that this rank holds: whole parameters, rows of DTensors, or parts of the share.
    It is told to let weights alone where it needs no decay (``excluded``), gets gradients that are divided by the loss
    scale and clipped by their norm over all ranks (``clip``), and takes no step where that norm is not finite, on all
    ranks alike. Then ``applied`` is False. State exists from the start, and is known by parameter, whole, in
    `full_state`: checkpoints go from any engine on any number of ranks to any other.

    ``groups``: of `groups.parameter_groups`, with ``target``: what follows a parameter, or None.
    """

    def __init__(
        self, groups: list[dict], algorithm: Algorithm, *, weight_decay: float, clip: float = 0.0, sharded: bool = False
    ):
        if not groups:
            raise ConfigError("model", "has no trainable parameter", "choose another network")
        parameters = [group["params"][0] for group in groups]
        self.names: list[str] = [group["name"] for group in groups]
        self.excluded: list[bool] = [group["excluded"] for group in groups]
        self.shapes = [parameter.shape for parameter in parameters]
        self.ends = list(itertools.accumulate(shape.numel() for shape in self.shapes))
        self.algorithm, self.weight_decay, self.clip, self.sharded = algorithm, weight_decay, clip, sharded
        self.by_rows = is_dtensor(parameters[0])
        self.norm_group = parameters[0].device_mesh.get_group() if self.by_rows else None
        self.steps, self.loss_scale, self.applied = 0, 1.0, True
        self._followed = [
            (p, group["target"]) for p, group in zip(parameters, groups, strict=True) if group["target"] is not None
        ]
        super().__init__([{"params": parameters}], {"lr": 0.0, "ema": 1.0})
        if not sharded:
            self.create_state()

    @torch.no_grad()
    def create_state(self) -> None:
        """Fresh state, for the parameters as they are now."""
        self.state.clear()
        for parameter in self.param_groups[0]["params"]:
            for name in self.algorithm.buffers:
                self.state[parameter][name] = torch.zeros_like(parameter)
        views = self._views()
        # leaves of their own, since what this rank holds of a parameter is none
        self._pieces = [
            (i, weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight.detach()))
            for i, weight, _, _ in views
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
        self._counts = torch.zeros(len(views), device=where)
        for count, (_, piece), (_, _, _, buffers) in zip(self._counts, self._pieces, views, strict=True):
            state = dict(zip(self.algorithm.buffers, buffers, strict=True))
            if self.algorithm.steps == "state":
                state[STEPS] = count
            if state:
                self._library.state[piece] = state

    def _counts_on_device(self) -> bool:
        return self._library is not None and bool(self._library.defaults.get("fused"))

    def prepare(self, lr: float, ema: float = 1.0, loss_scale: float = 1.0) -> None:
        """Says how the next step is to be taken; gradients are ``loss_scale`` times too large."""
        self.param_groups[0]["lr"], self.param_groups[0]["ema"] = lr, ema
        self.loss_scale = loss_scale

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update with the gradients of the parameters; the followers come after it, unless it is sharded."""
        assert closure is None, "this optimizer takes no closure"
        views = self._views()
        gradients = [gradient for _, _, gradient, _ in views if gradient is not None]
        norm = self._norm(gradients)
        self.applied = math.isfinite(norm)
        if not self.applied:
            return
        factor = 1 / self.loss_scale
        if self.clip > 0:
            factor *= min(1.0, self.clip / (norm / self.loss_scale + 1e-6))
        if factor != 1 and gradients:
            torch._foreach_mul_(gradients, factor)
        if self._library is not None:
            self._update(views)
        self.steps += 1
        if not self.sharded:
            self.follow()

    def _update(self, views: list[tuple[int, Tensor, Tensor | None, list[Tensor]]]) -> None:
        for (_, piece), (_, weight, gradient, _) in zip(self._pieces, views, strict=True):
            if piece is not weight:
                piece.data, piece.grad = weight.detach(), gradient
        self._counts.fill_(self.steps)
        for group in self._library.param_groups:
            group["lr"] = self.param_groups[0]["lr"]
            if callable(self.algorithm.steps):
                group[STEPS] = self.algorithm.steps(self.steps)
        self._library.step()
        for (_, piece), (_, weight, _, _) in zip(self._pieces, views, strict=True):
            if piece is not weight:
                piece.grad = None

    def _norm(self, gradients: list[Tensor]) -> float:
        """Of the whole gradient, over all ranks."""
        norms = torch._foreach_norm(gradients) if gradients else []
        if not self.sharded and not self.by_rows:
            return torch.stack(norms).norm().item() if norms else 0.0
        where = local(self.param_groups[0]["params"][0]).device
        square = torch.zeros((), dtype=torch.float64, device=where)
        if norms:
            square += torch.stack(norms).double().square().sum()
        return math.sqrt(value) if (value := dist.all_reduce_sum(square, self.norm_group).item()) >= 0 else math.nan

    def follow(self) -> None:
        """Moves the followers towards the parameters, where ``step`` saw but a share of these."""
        ema_update(
            [local(target) for _, target in self._followed],
            [local(p) for p, _ in self._followed],
            self.param_groups[0]["ema"],
        )

    @torch.no_grad()
    def full_state(self) -> dict[str, Tensor]:
        """``parameter.buffer`` of all parameters, of DTensors as DTensors, otherwise whole, also when sharded (then all
        ranks call it), and the number of steps taken."""
        parameters = self.param_groups[0]["params"]
        result = {STEPS: torch.tensor([float(self.steps)], dtype=torch.float64)}
        for buffer in self.algorithm.buffers:
            if self.sharded:
                flat = torch.cat(dist.all_gather(self.state[parameters[0]][buffer]))
                parts = flat[: self.ends[-1]].split([shape.numel() for shape in self.shapes])
                whole = [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]
            else:
                whole = [self.state[parameter][buffer] for parameter in parameters]
            result.update({f"{name}.{buffer}": part for name, part in zip(self.names, whole, strict=True)})
        return result

    @torch.no_grad()
    def load_full_state(self, state: dict[str, Tensor]) -> None:
        """Copies what ``full_state`` gave, sharded or not, as whole tensors or DTensors. Raises ValueError if it is
        another model's."""
        names = {
            f"{name}.{buffer}": shape
            for name, shape in zip(self.names, self.shapes, strict=True)
            for buffer in self.algorithm.buffers
        } | {STEPS: torch.Size([1])}
        for name in sorted(names.keys() | state.keys()):
            saved = state[name].shape if name in state else None
            if saved != names.get(name):
                raise ValueError(f"{name}: {saved} was saved, {names.get(name)} is needed; it belongs to another model")
        self.steps = int(state[STEPS].item())
        for i, _, _, buffers in self._views():
            for kind, buffer in zip(self.algorithm.buffers, buffers, strict=True):
                saved = state[f"{self.names[i]}.{kind}"]
                if self.sharded:
                    first = self._bounds(i)[2]
                    buffer.copy_(shard(saved, buffer).flatten()[first : first + buffer.numel()])
                else:
                    like = self.state[self.param_groups[0]["params"][i]][kind]
                    buffer.copy_(shard(saved, like))

    def _bounds(self, i: int) -> tuple[int, int, int]:
        """Parameter ``i`` in this rank's share: start and stop there, and its first element there."""
        size = self.param_groups[0]["params"][0].numel()
        return in_share(self.ends[i] - self.shapes[i].numel(), self.ends[i], size, dist.rank(self.norm_group))

    def _views(self) -> list[tuple[int, Tensor, Tensor | None, list[Tensor]]]:
        """(number, weight, gradient, buffers) of what this rank holds of the parameters, where that is anything."""
        kinds, parameters = self.algorithm.buffers, self.param_groups[0]["params"]
        if not self.sharded:
            found = [
                (i, local(p), None if p.grad is None else local(p.grad), [local(self.state[p][k]) for k in kinds])
                for i, p in enumerate(parameters)
            ]
            return [view for view in found if view[1].numel()]
        (share,), result = parameters, []
        for i in range(len(self.names)):
            start, stop, _ = self._bounds(i)
            if start < stop:
                gradient = None if share.grad is None else share.grad[start:stop]
                result.append(
                    (i, share.detach()[start:stop], gradient, [self.state[share][k][start:stop] for k in kinds])
                )
        return result
