"""The networks of a search space on their own: only what an architecture uses, with fresh weights and a classifier."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bossnas.cost import call_stem
from bossnas.ops import GroupedBatchNorm, SlimConv
from bossnas.paths import Path
from bossnas.spaces import Space
from bossnas.spaces.nats import Nats


class Standalone(nn.Module):
    """Stem, the layers of one architecture, classifier. [N, 3, S, S] -> logits [N, classes].

    Batch norms use the batch's own statistics in training mode and their buffers in evaluation mode.
    """

    def __init__(self, stem: nn.Module, layers: Sequence[nn.Module], choices: Sequence[int], head: nn.Module):
        super().__init__()
        self.stem, self.layers, self.head = stem, nn.ModuleList(layers), head
        self.choices = tuple(choices)

    def forward(self, x: Tensor) -> Tensor:
        x = call_stem(self.stem, x)
        for layer, choice in zip(self.layers, self.choices, strict=True):
            x = layer(x, choice, 1, None)
        return self.head(x)


def standalone(space: Space, architecture: Sequence[Path], classes: int) -> Standalone:
    """The network of an architecture, one path per block, with the initial weights that it would have by itself.

    Works for every space that follows the `Space` protocol. The layers are built one at a time and lose at once what
    the architecture does not use, so the whole supernet never is in memory; convolutions that would run on a slice of
    their weights are made anew in the slice's size.
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
    return Standalone(stem, layers, choices, head(space, x.shape[1], classes))


def head(space: Space, channels: int, classes: int) -> nn.Sequential:
    """Global average pool and linear classifier; NATS-Bench's networks normalise and rectify the map before."""
    last = [GroupedBatchNorm(channels, "relu")] if isinstance(space, Nats) else []
    return nn.Sequential(*last, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def _keep_used(layer: nn.Module, choice: int, x: Tensor) -> Tensor:
    """Cuts a layer down to one candidate on inputs of x's shape, in place; returns the layer's output.

    A parameter is used if the output depends on it, that is, if autograd reaches it.
    """
    sizes: dict[nn.Module, tuple[int, int]] = {}

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
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


def _cut(module: nn.Module, used: set[int], sizes: dict[nn.Module, tuple[int, int]]) -> None:
    for name, child in module.named_children():
        parameters = list(child.parameters())
        if parameters and not any(id(p) in used for p in parameters):
            setattr(module, name, nn.Identity())
        elif child in sizes:
            c_in, c_out = sizes[child]
            setattr(module, name, SlimConv(c_in, c_out, child.kernel_size[0], child.stride[0]))
        else:
            _cut(child, used, sizes)
