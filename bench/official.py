"""A training step as the original release takes it (METHOD of the release, section by section), to compare with ours.

Written from the method's description, in plain PyTorch. Its costs are the release's own:

* each sampled path goes forward and backward by itself, one view at a time, with `F.batch_norm` on maps as PyTorch
  lays them out by default (NCHW);
* the blocks before are run for every path and view: in the online network with gradient, in the target network
  without, both in training mode, and their parameters stay in the optimizer;
* LARS and the moving average go from parameter to parameter.

The candidates are the space's own modules, with attention over the right axis; so the arithmetic of a path is ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bossnas.optim.groups import parameter_groups
from bossnas.spaces.ops import DenseConv, DepthwiseConv, GroupedBatchNorm, Linear, PooledPointwise
from bossnas.spaces.paths import Choices
from bossnas.supernet.supernet import Item, Supernet


class _Norm(nn.Module):
    """Batch norm with running statistics, the residual's sum and the activation, one after another."""

    grouped = True
    is_norm = True

    def __init__(self, norm: GroupedBatchNorm):
        super().__init__()
        self.weight, self.bias, self.act = norm.weight, norm.bias, norm.act
        self.register_buffer("running_mean", norm.running_mean)
        self.register_buffer("running_var", norm.running_var)

    def forward(self, x: Tensor, groups: int = 1, stats: None = None, residual: Tensor | None = None) -> Tensor:
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, 1e-5)
        y = y if residual is None else y + residual
        return F.relu(y, inplace=True) if self.act == "relu" else F.silu(y) if self.act == "silu" else y


class _Depthwise(nn.Conv2d):
    """`nn.Conv2d`'s own forward."""


class _Pointwise(nn.Module):
    """1x1 convolution, batch norm, global average pool."""

    grouped = True

    def __init__(self, conv: nn.Conv2d, norm: _Norm):
        super().__init__()
        self.conv, self.norm = conv, norm

    def forward(self, x: Tensor, groups: int = 1, stats: None = None) -> Tensor:
        return self.norm(self.conv(x)).mean((2, 3))


def plain(module: nn.Module) -> nn.Module:
    """Puts plain modules in the place of ours, throughout ``module``, sharing the parameters."""
    for name, child in list(module.named_children()):
        setattr(module, name, plain(child))
    if isinstance(module, GroupedBatchNorm):
        return _Norm(module)
    if isinstance(module, PooledPointwise):
        return _Pointwise(module.conv, module.norm)  # type: ignore[arg-type]  # which `plain` has replaced
    if isinstance(module, DepthwiseConv | DenseConv):
        module.__class__ = _Depthwise
    if isinstance(module, Linear):
        module.__class__ = nn.Linear
    return module


class OfficialStep:
    """Networks and an optimizer for block ``len(winners)``; `step` trains them once."""

    def __init__(
        self, online: Supernet, target: Supernet, predictor: nn.Module, winners: Sequence[Choices], settings: dict
    ):
        """``settings``: lr, momentum, weight_decay, trust. The networks are changed."""
        self.block, self.winners, self.settings = len(winners), list(winners), settings
        layout = torch.contiguous_format
        self.online = plain(online).to(memory_format=layout).train().requires_grad_(True)
        self.target = plain(target).to(memory_format=layout).train().requires_grad_(False)
        self.predictor = plain(predictor).train()
        trained = [self.online.part(b) for b in range(self.block + 1)]
        followers = [self.target.part(b) for b in range(self.block + 1)]
        for b in range(self.block):  # the necks of blocks that are done are not run
            for part in (trained[b], followers[b]):
                del part["projector"]
        module = nn.ModuleDict({**{str(b): part for b, part in enumerate(trained)}, "predictor": self.predictor})
        following = nn.ModuleDict({str(b): part for b, part in enumerate(followers)})
        self.groups = parameter_groups(module, following)
        # of this block all from the start, as they are after some steps: memory is compared in the long run
        self.momenta = {
            group["name"]: torch.zeros_like(group["params"][0])
            for group in self.groups
            if group["name"].startswith((f"{self.block}.", "predictor."))
        }

    def step(self, paths: Sequence[Choices], views: Sequence[Tensor], ema: float) -> float:
        """One update with all ``paths``, of views [n, 3, H, W] each, those of kind A first; the mean loss."""
        pairs = len(views) // 2
        ends = [[(j % pairs) + kind * pairs for kind in (0, 1)] for j in range(len(paths))]
        with torch.no_grad():
            targets = [
                [F.normalize(self._embed(self.target, path, views[v]), dim=1) for v in of_path]
                for path, of_path in zip(paths, ends, strict=True)
            ]
            ensemble = [torch.stack([t[kind] for t in targets]).mean(0) for kind in (0, 1)]
        total = 0.0
        for path, of_path in zip(paths, ends, strict=True):
            predicted = [self.predictor(self._embed(self.online, path, views[v])) for v in of_path]
            loss = sum(
                -2 * F.cosine_similarity(p, t, dim=1).mean() for p, t in zip(predicted, reversed(ensemble), strict=True)
            )
            loss.backward()  # type: ignore[union-attr]
            total += loss.item() / len(paths)  # type: ignore[union-attr]
        self._update(ema)
        return total

    def _embed(self, network: Supernet, path: Choices, x: Tensor) -> Tensor:
        for b, winner in enumerate(self.winners):
            x = network.forward(b, [Item(winner, x)])[0]
        return network.embed(self.block, [Item(path, x)])[0]

    @torch.no_grad()
    def _update(self, ema: float) -> None:
        s = self.settings
        for group in self.groups:
            (weight,), name = group["params"], group["name"]
            if weight.grad is None or not weight.grad.any():
                continue
            update = weight.grad
            if not group["excluded"]:
                w_norm, g_norm = weight.norm(), weight.grad.norm()
                ratio = s["trust"] * w_norm / (g_norm + s["weight_decay"] * w_norm)
                update = update.add(weight, alpha=s["weight_decay"]).mul(ratio)
            update = update.mul(s["lr"])
            buffer = self.momenta.get(name)
            if buffer is None:
                self.momenta[name] = buffer = update.clone()
            else:
                buffer.mul_(s["momentum"]).add_(update)
            weight.sub_(buffer)
            weight.grad = None
        for group in self.groups:
            (weight,), target = group["params"], group["target"]
            if target is not None:
                target.mul_(ema).add_(weight, alpha=1 - ema)
