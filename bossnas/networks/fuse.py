"""Batch norms folded into what stands before them, for inference: fewer operations on the maps, the same logits."""

from __future__ import annotations

import copy

import torch
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import Tensor, fx, nn

from bossnas.errors import ConfigError
from bossnas.networks.bossnet import SelfAttention

CONVOLUTIONS = (nn.Conv2d, Conv2dSame)  # exactly these: others may do more with their weights than convolve
TOLERANCE = 1e-4  # of the largest logit; float32 keeps about 1e-7 per operation


def fuse_bn(model: nn.Module, images: Tensor | None = None) -> nn.Module:
    """A copy of the network in evaluation mode whose batch norms are folded into the convolutions before them.

    Which ones: those that a traced forward pass shows to be the only reader of a convolution's result; others stay.
    A batch norm after `SelfAttention` is folded as well: the weights of every position's sum are 1 together, so scaling
    and shifting the values scales and shifts the result. Folded convolutions have a bias, and the state dict no entries
    of the norms: it is none of the original network's any more.

    ``images`` [n, C, S, S]: on which the copy is compared with the network; None: two of noise, 64 pixels wide.
    Raises ConfigError for a network that cannot be traced or has nothing to fold, and where the copy's results are
    others by more than 1e-4 of the largest.
    """
    device = next(model.parameters()).device
    original = copy.deepcopy(model).eval().cpu()  # where float32 is exact, not TF32
    fused = copy.deepcopy(original)
    found = pairs(fused, (*CONVOLUTIONS, SelfAttention), (nn.BatchNorm2d, BatchNormAct2d))
    found = [(first, name) for first, name in found if fused.get_submodule(name).running_mean is not None]
    if not found:
        raise ConfigError(
            "fuse_bn", "the network has no batch norm that can be folded into a convolution before it", "leave it out"
        )
    for first, name in found:
        before, norm = fused.get_submodule(first), fused.get_submodule(name)
        assert isinstance(norm, nn.BatchNorm2d)  # timm's norm with activation is one, too
        if isinstance(before, SelfAttention):
            # output channels are q, k, v (METHOD 1.1): the last third makes the values
            _fold(before.to_qkv, norm, rows=slice(2 * norm.num_features, None))
        else:
            assert isinstance(before, nn.Conv2d)
            _fold(before, norm)
        rest = nn.Sequential(norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else nn.Identity()
        fused.set_submodule(name, rest)
    difference = _difference(original, fused.eval(), _noise(original) if images is None else images.cpu())
    if not difference <= TOLERANCE:
        raise ConfigError(
            "fuse_bn",
            f"folding the batch norms of {type(model).__name__} changed its results by "
            f"{difference:.1e} of the largest one, more than {TOLERANCE:.0e}",
            "leave it out",
        )
    return fused.to(device)


def pairs(
    model: nn.Module, first: tuple[type[nn.Module], ...], second: tuple[type[nn.Module], ...]
) -> list[tuple[str, str]]:
    """Names of modules of exactly the types ``first`` whose result goes to one of the types ``second`` and nowhere
    else, with the names of those; each is called once in a forward pass.

    Raises ConfigError for a network whose forward pass depends on its input's values, which cannot be traced.
    """
    still = copy.deepcopy(model).eval()  # training may be random, and checkpointing cannot be traced
    try:
        calls = [node for node in _Tracer().trace(still).nodes if node.op == "call_module"]
    except Exception as error:  # whatever the network's own code does with placeholders
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            "network", f"the forward pass of {type(model).__name__} cannot be traced ({reason})", "use it as it is"
        ) from None
    module_of = {node: still.get_submodule(node.target) for node in calls}
    times = list(module_of.values())
    found = []
    for node, module in module_of.items():
        users = list(node.users)
        if (
            type(module) in first
            and len(users) == 1
            and type(following := module_of.get(users[0])) in second
            and following is not None
            and times.count(module) == times.count(following) == 1
        ):
            found.append((node.target, users[0].target))
    return found


class _Tracer(fx.Tracer):
    """Keeps modules without children, batch norms and self-attention whole."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (
            isinstance(m, (nn.BatchNorm2d, SelfAttention))
            or not any(True for _ in m.children())
            or super().is_leaf_module(m, module_qualified_name)
        )


@torch.no_grad()
def _fold(conv: nn.Conv2d, norm: nn.BatchNorm2d, rows: slice = slice(None)) -> None:
    """norm(conv(x)) = fold(conv)(x) in the output channels ``rows``. The sums are float64's."""
    mean, var = norm.running_mean, norm.running_var
    assert mean is not None and var is not None
    scale = torch.rsqrt(var.double() + norm.eps)
    scale = scale if norm.weight is None else scale * norm.weight.double()
    weight, bias = conv.weight.double(), torch.zeros(conv.out_channels, dtype=torch.float64)
    if conv.bias is not None:
        bias += conv.bias.double()
    weight[rows] *= scale[:, None, None, None]
    bias[rows] = (bias[rows] - mean.double()) * scale
    if norm.bias is not None:
        bias[rows] += norm.bias.double()
    conv.weight = nn.Parameter(weight.to(conv.weight.dtype))
    conv.bias = nn.Parameter(bias.to(conv.weight.dtype))


def _noise(model: nn.Module) -> Tensor:
    weight = next(m.weight for m in model.modules() if isinstance(m, nn.Conv2d))
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, weight.shape[1], 64, 64, generator=generator).to(weight)


@torch.no_grad()
def _difference(a: nn.Module, b: nn.Module, images: Tensor) -> float:
    """The largest one of the results on the images, as a share of the largest result of ``a``."""
    ya, yb = a(images), b(images)
    return float((ya - yb).abs().max() / ya.abs().max().clamp_min(1e-30))
