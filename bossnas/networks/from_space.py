"""The networks of a search space on their own: only what an architecture uses, with fresh weights and a classifier."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bossnas.spaces import Space, traits
from bossnas.spaces.cost import call_stem
from bossnas.spaces.ops import GroupedBatchNorm, SlimConv
from bossnas.spaces.paths import Choices


class Standalone(nn.Module):
    """Stem, the layers of one architecture, classifier. [N, 3, S, S] -> logits [N, classes].

    Batch norms use the batch's own statistics in training mode and their buffers in evaluation mode. The methods are
    those of timm's networks.
    """

    def __init__(self, stem: nn.Module, layers: Sequence[nn.Module], choices: Sequence[int], head: nn.Sequential):
        super().__init__()
        last = head[-1]
        assert isinstance(last, nn.Linear)
        self.stem, self.layers, self.head = stem, nn.ModuleList(layers), head
        self.choices = tuple(choices)
        self.num_features = self.head_hidden_size = last.in_features
        self.num_classes, self.global_pool_type, self.grad_checkpointing = last.out_features, "avg", False
        layer: Any
        for layer in self.layers:
            layer.is_unit = True  # sharded as one

    def forward_features(self, x: Tensor) -> Tensor:
        """[N, 3, S, S] -> the last layer's map [N, C, H, W]."""
        x = call_stem(self.stem, x)
        for layer, choice in zip(self.layers, self.choices, strict=True):
            if self.grad_checkpointing and self.training:
                x = _checkpointed(layer, x, choice)
            else:
                x = layer(x, choice, 1, None)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if not self.global_pool_type:
            return x
        return self.head[:-1](x) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        return self.head[-1]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier; 0 classes: none. ``global_pool``: avg, or with 0 classes "" for maps; None: as it is."""
        pool = self.global_pool_type if global_pool is None else global_pool
        if pool != "avg" and (pool or num_classes):
            raise ValueError(f"global_pool: expected 'avg', or '' with num_classes 0, got {pool!r}")
        self.global_pool_type = pool
        self.num_classes = num_classes
        self.head[-1] = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keeps no map within a layer in training, and computes it again in the backward pass."""
        self.grad_checkpointing = enable


def standalone(
    space: Space, architecture: Sequence[Choices], classes: int, drop_rate: float = 0.0, momentum: float | None = None
) -> Standalone:
    """The network of an architecture, one path per block, with the initial weights that it would have by itself.

    Works for every space that follows the `Space` protocol. The layers are built one at a time and lose at once what
    the architecture does not use, so the whole supernet never is in memory; convolutions that would run on a slice of
    their weights are made anew in the slice's size. ``drop_rate``: dropout before the classifier. ``momentum``: by
    which running statistics follow the batches in training; None: they stay.
    """
    stem = space.stem()
    with torch.no_grad():
        x = call_stem(stem, torch.randn(2, 3, space.stride, space.stride))
    layers, choices = [], []
    for block, path in enumerate(architecture):
        for position, choice in enumerate(path):
            layer = space.layer(block, position)
            x = _keep_used(layer, choice, x)
            layers.append(layer)
            choices.append(choice)
    network = Standalone(stem, layers, choices, head(space, x.shape[1], classes, drop_rate))
    for module in network.modules():
        if isinstance(module, GroupedBatchNorm):
            module.momentum = momentum
    return network


def head(space: Space, channels: int, classes: int, drop_rate: float = 0.0) -> nn.Sequential:
    """Global average pool and linear classifier; NATS-Bench's networks normalise and rectify the map before."""
    last = [GroupedBatchNorm(channels, "relu")] if traits(space).norm_before_head else []
    return nn.Sequential(
        *last, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(drop_rate), nn.Linear(channels, classes)
    )


def _checkpointed(layer: nn.Module, x: Tensor, choice: int) -> Tensor:
    """The layer's output, of which the backward pass computes the inner maps again; compiled code cannot take a
    context."""
    if torch.compiler.is_compiling():
        return checkpoint(layer, x, choice, 1, None, use_reentrant=False)
    return checkpoint(
        layer,
        x,
        choice,
        1,
        None,
        use_reentrant=False,
        context_fn=lambda: (contextlib.nullcontext(), _second_pass(layer)),
    )


@contextlib.contextmanager
def _second_pass(layer: nn.Module) -> Iterator[None]:
    """Batch norms keep the running statistics that the first pass on the same images has left."""
    norms = [m for m in layer.modules() if isinstance(m, GroupedBatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def _keep_used(layer: nn.Module, choice: int, x: Tensor) -> Tensor:
    """Cuts a layer down to one candidate on inputs of x's shape, in place; returns the layer's output.

    A parameter is used if the output depends on it, that is, if autograd reaches it.
    """
    sizes: dict[SlimConv, tuple[int, int]] = {}

    def note(module: SlimConv, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        sizes[module] = (inputs[0].shape[1], output.shape[1])

    handles = [m.register_forward_hook(note) for m in layer.modules() if isinstance(m, SlimConv)]
    try:
        y = layer(x, choice, 1, None)
    finally:
        for handle in handles:
            handle.remove()
    parameters = list(layer.parameters())
    gradients = torch.autograd.grad(y.sum(), parameters, allow_unused=True) if y.requires_grad else ()
    used = {id(p) for p, g in zip(parameters, gradients, strict=False) if g is not None}
    _cut(layer, used, sizes)
    return y.detach()


def _cut(module: nn.Module, used: set[int], sizes: dict[SlimConv, tuple[int, int]]) -> None:
    for name, child in module.named_children():
        parameters = list(child.parameters())
        if parameters and not any(id(p) in used for p in parameters):
            setattr(module, name, nn.Identity())
        elif isinstance(child, SlimConv) and child in sizes:
            c_in, c_out = sizes[child]
            setattr(module, name, SlimConv(c_in, c_out, child.kernel_size[0], child.stride[0]))
        else:
            _cut(child, used, sizes)
