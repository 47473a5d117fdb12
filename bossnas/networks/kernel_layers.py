"""The kernels inside the retrained networks: their layers computed by bossnas_kernels, with the same weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bossnas.errors import ConfigError
from bossnas.networks.bossnet import BossNet, SelfAttention
from bossnas.networks.fuse import pairs
from bossnas.networks.mbconv import MBConvNet
from bossnas.networks.nats import NatsNet
from bossnas.spaces import ops
from bossnas_kernels import gbn_act, mhsa2d

NETWORKS = (BossNet, MBConvNet, NatsNet)
ACTIVATIONS = {nn.ReLU: "relu", nn.SiLU: "silu"}


def use_kernels(model: nn.Module, choice: str, device: torch.device) -> str:
    """Has the network's layers computed by bossnas_kernels, in place; returns which implementation runs on ``device``.

    Batch norms together with the activation that follows, depthwise convolutions, and self-attention. The results,
    gradients and statistics are the plain layers' but for rounding, and the names in the state dict the same.
    ``choice``: auto | triton | reference. Call it before the network is compiled, sharded or wrapped.
    Raises ConfigError for a network that is none of the search spaces', and as `ops.use_kernels`.
    """
    if not isinstance(model, NETWORKS):
        raise ConfigError(
            "kernels",
            f"are not made for {type(model).__name__}",
            "set it to off, or choose a network of a search space, such as bossnet_t0",
        )
    running = ops.use_kernels(choice, device)
    following = dict(pairs(model, (nn.BatchNorm2d,), tuple(ACTIVATIONS)))
    for name, module in list(model.named_modules()):
        if type(module) is nn.BatchNorm2d:
            act = "none"
            if name in following:
                act = ACTIVATIONS[type(model.get_submodule(following[name]))]
                model.set_submodule(following[name], nn.Identity())
            model.set_submodule(name, KernelNorm(module, act))
        elif type(module) is nn.Conv2d and _is_depthwise(module):
            layer = ops.DepthwiseConv(
                module.in_channels, module.kernel_size[0], module.stride[0], module.bias is not None
            )
            model.set_submodule(name, _take_over(layer, module))
        elif type(module) is SelfAttention:
            model.set_submodule(name, KernelAttention(module))
    return running


class KernelNorm(nn.BatchNorm2d):
    """Batch norm and the activation after it in one (none | relu | silu), by `bossnas_kernels.gbn_act`."""

    def __init__(self, norm: nn.BatchNorm2d, act: str):
        super().__init__(norm.num_features, norm.eps, norm.momentum)
        _take_over(self, norm)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        y, mean, var = gbn_act(
            x,
            self.weight,
            self.bias,
            act=self.act,
            training=self.training,
            running_mean=self.running_mean,
            running_var=self.running_var,
            eps=self.eps,
        )
        if self.training:
            own_mean, own_var, batches = self.running_mean, self.running_var, self.num_batches_tracked
            assert own_mean is not None and own_var is not None and batches is not None and self.momentum is not None
            with torch.no_grad():
                batches.add_(1)
                own_mean.lerp_(mean[0].to(own_mean.dtype), self.momentum)
                own_var.lerp_(var[0].to(own_var.dtype), self.momentum)
        return y

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, act={self.act}"


class KernelAttention(SelfAttention):
    """`SelfAttention` by `bossnas_kernels.mhsa2d`."""

    def __init__(self, plain: SelfAttention):
        nn.Module.__init__(self)
        self.heads, self.to_qkv = plain.heads, plain.to_qkv
        self.train(plain.training)

    def forward(self, x: Tensor) -> Tensor:
        return mhsa2d(self.to_qkv(x), self.heads)


def _is_depthwise(conv: nn.Conv2d) -> bool:
    """Whether `bossnas_kernels.dwconv2d` computes it."""
    kernel, stride = conv.kernel_size[0], conv.stride[0]
    return (
        conv.groups == conv.in_channels == conv.out_channels > 1
        and kernel in (3, 5)
        and stride in (1, 2)
        and conv.kernel_size == (kernel, kernel)
        and conv.stride == (stride, stride)
        and conv.padding == (kernel // 2, kernel // 2)
        and conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
    )


def _take_over(new: nn.Module, old: nn.Module) -> nn.Module:
    """``new`` with the parameters and buffers of ``old``, and in its mode."""
    for name, parameter in old.named_parameters(recurse=False):
        setattr(new, name, parameter)
    for name, buffer in old.named_buffers(recurse=False):
        setattr(new, name, buffer)
    return new.train(old.training)
