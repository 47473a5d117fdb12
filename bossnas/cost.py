"""Multiply-adds and parameters of a network or path, counted while it runs once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


@torch.no_grad()
def count(modules: list[nn.Module], call: Callable[[], object]) -> dict[str, int]:
    """Runs ``call()`` and returns {"macs", "params"} of what it used of ``modules``.

    MACs are those of convolutions, linear layers and attention products; give one image for the cost of an image.
    Parameters are those of the leaf modules that ran; a convolution that ran on a slice of its weights counts the
    slice. Norms and activations add no MACs, as in the literature.
    """
    used: dict[nn.Module, int] = {}

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            kernel = module.weight[0, 0].numel()
            size = output.shape[1] * inputs[0].shape[1] // module.groups * kernel
            used[module] = size + (0 if module.bias is None else output.shape[1])
        else:
            used[module] = sum(p.numel() for p in module.parameters(recurse=False))

    handles = [leaf.register_forward_hook(note) for module in modules for leaf in module.modules()
               if any(True for _ in leaf.parameters(recurse=False))]
    try:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            call()
    finally:
        for handle in handles:
            handle.remove()
    return {"macs": counter.get_total_flops() // 2, "params": sum(used.values())}
