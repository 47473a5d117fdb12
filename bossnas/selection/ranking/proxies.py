"""Zero-cost proxies: scores of an untrained network from one batch. Pure functions; more is meant to be better.

Each is called as ``proxy(network, images, labels)`` with images [N, 3, S, S] and leaves the network as it was.
"Weights" are those of convolutions and linear layers, without biases and norms. Batch norms use the batch's own
statistics, in SynFlow their initial buffers. `naswot` sees activations that torch computes, so not those fused into
Triton kernels.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from bossnas.errors import ConfigError
from bossnas.spaces.ops import Attention

LABEL_SEED = 0  # of the random labels where none are given
ZICO_BATCHES = 2
_ACTIVATIONS = {getattr(torch.ops.aten, name).default for name in ("relu", "relu_", "silu", "silu_")}


def synflow(network: nn.Module, images: Tensor, labels: Tensor | None = None) -> float:
    """Synaptic flow (Tanaka et al. 2020): sum of |w dR/dw| over the weights, R = sum of the outputs.

    All parameters are replaced by their absolute values and the input is one image of ones, of ``images`` only the
    shape matters. Batch norms are in evaluation mode with their initial buffers (mean 0, variance 1): statistics of the
    batch would cancel the size of the flow, which is what the score measures. Attention spreads its values evenly: the
    softmax of logits as large as the flow is 0 or 1 and has no gradient. In float64, since the flow is a product of all
    layers.
    """
    network = _with_even_attention(copy.deepcopy(network).double().eval())
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.abs_()
    ones = torch.ones(1, *images.shape[1:], dtype=torch.float64, device=images.device)
    weights = _weights(network)
    gradients = torch.autograd.grad(network(ones).sum(), weights)
    return float(sum((w.detach() * g).abs().sum() for w, g in zip(weights, gradients, strict=True)))


@torch.no_grad()
def naswot(network: nn.Module, images: Tensor, labels: Tensor | None = None) -> float:
    """Neural architecture search without training (Mellor et al. 2021): log |det K|, K[i, j] = in how many units the
    activation codes of images i and j agree (number of units minus Hamming distance).

    A unit's code is whether its ReLU, or SiLU, is above zero. -inf when two images have equal codes.
    """
    network = copy.deepcopy(network).train()
    codes = _Codes(len(images), images.device)
    with codes:
        network(images)
    if not codes.units:
        raise ValueError("naswot needs a network with ReLU or SiLU activations")
    return float(torch.linalg.slogdet(codes.agreement)[1])


def gradnorm(network: nn.Module, images: Tensor, labels: Tensor | None = None) -> float:
    """Gradient norm (Abdelfattah et al. 2021): sum over the weights' tensors of the Euclidean norm of the gradient of
    the cross-entropy. Without labels they are drawn at random."""
    return float(sum(g.norm() for g in _gradients(network, images, labels)))


def zico(network: nn.Module, images: Tensor, labels: Tensor | None = None) -> float:
    """Inverse coefficient of variation on gradients (Li et al. 2023): sum over the weights' tensors of the log of
    sum_w mean |g_w| / std |g_w|, over the gradients g of 2 equal batches into which the images are split.

    As in the paper the deviation is that of |g|, divided by the number of batches. Weights whose |g| is the same in
    both batches have no ratio and are left out, as are tensors without any other.
    """
    labels = _labels(network, images, labels)
    size = len(images) // ZICO_BATCHES
    if size == 0:
        raise ValueError(f"zico splits the images into {ZICO_BATCHES} batches and needs as many images")
    batches = [
        _gradients(network, images[i * size : (i + 1) * size], labels[i * size : (i + 1) * size])
        for i in range(ZICO_BATCHES)
    ]
    total = 0.0
    for of_tensor in zip(*batches, strict=True):
        magnitudes = torch.stack(of_tensor).abs().double()
        std = magnitudes.std(0, correction=0)
        ratio = (magnitudes.mean(0)[std > 0] / std[std > 0]).sum()
        total += math.log(ratio) if ratio > 0 else 0.0
    return total


PROXIES = {"synflow": synflow, "naswot": naswot, "gradnorm": gradnorm, "zico": zico}


def chosen(names: str) -> list[str]:
    """ "synflow,zico" -> their names. Raises ConfigError for an unknown one."""
    result = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    unknown = [name for name in result if name not in PROXIES]
    if unknown or not result:
        raise ConfigError("proxies", f"there is no proxy {', '.join(unknown)!r}", f"choose of {', '.join(PROXIES)}")
    return result


def open_branches(network: nn.Module) -> nn.Module:
    """Sets the scales of norms that start at zero to one, in place: a branch that adds nothing yet (HyTra's, METHOD
    1.1) would be invisible to every proxy."""
    with torch.no_grad():
        for module in network.modules():
            if getattr(module, "is_norm", False):
                scale = module.get_parameter("weight")
                if not scale.any():
                    scale.fill_(1)
    return network


class _Codes(TorchDispatchMode):
    """Adds up, over all activations inside, in how many units two images are on the same side of zero."""

    def __init__(self, images: int, device: torch.device):
        super().__init__()
        self.agreement = torch.zeros(images, images, dtype=torch.float64, device=device)
        self.units = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _ACTIVATIONS and len(result) == len(self.agreement):
            signs = torch.where(result > 0, 1.0, -1.0).flatten(1)
            self.units += signs.shape[1]
            self.agreement += (signs.shape[1] + (signs @ signs.T).double()) / 2
        return result


class _EvenAttention(nn.Module):
    """Attention whose every output is the mean of the values."""

    def __init__(self, attention: Attention):
        super().__init__()
        self.qkv = attention.qkv

    def forward(self, x: Tensor) -> Tensor:
        v = self.qkv(x).chunk(3, 1)[2]
        return v.mean((2, 3), keepdim=True).expand_as(v)


def _with_even_attention(module: nn.Module) -> nn.Module:
    for name, child in module.named_children():
        setattr(module, name, _EvenAttention(child) if isinstance(child, Attention) else _with_even_attention(child))
    return module


def _weights(network: nn.Module) -> list[Tensor]:
    return [m.weight for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]


def _labels(network: nn.Module, images: Tensor, labels: Tensor | None) -> Tensor:
    if labels is not None:
        return labels
    linear = [m for m in network.modules() if isinstance(m, nn.Linear)]
    generator = torch.Generator().manual_seed(LABEL_SEED)
    return torch.randint(linear[-1].out_features, (len(images),), generator=generator).to(images.device)


def _gradients(network: nn.Module, images: Tensor, labels: Tensor | None) -> tuple[Tensor, ...]:
    """Gradients of the mean cross-entropy for the weights, of a copy in training mode."""
    network = copy.deepcopy(network).train()
    loss = F.cross_entropy(network(images), _labels(network, images, labels))
    return torch.autograd.grad(loss, _weights(network))
