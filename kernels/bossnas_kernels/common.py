"""What the Triton kernels share: memory layout, the architecture that picks a table row, one wrapper for autograd."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton import knobs

log = logging.getLogger("bossnas_kernels")

INTERPRET = knobs.runtime.interpret  # kernels run in Triton's interpreter, on the CPU (TRITON_INTERPRET=1)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_told: set[str] = set()


@functools.cache
def architecture(device: torch.device) -> str:
    """Row of the config tables for a device: "sm_80", "sm_90", "gfx942", ..., or "interpreter"."""
    if INTERPRET:
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def config(table: dict[str, dict], device: torch.device) -> dict:
    """The row of a table for a device; architectures without a row of their own use "default"."""
    return table.get(architecture(device), table["default"])


_forgetful: list[Callable[[], None]] = []


def remembered(plan: Callable) -> Callable:
    """A function of shapes, dtypes and devices that computes each of its results once; `forget` begins anew."""
    cached = functools.lru_cache(maxsize=4096)(plan)
    _forgetful.append(cached.cache_clear)
    return cached


def forget() -> None:
    """Drops all plans; call it after a change of a TABLE."""
    for clear in _forgetful:
        clear()


def tell_once(message: str) -> None:
    """Logs a message the first time, except while torch.compile traces."""
    if not torch.compiler.is_compiling() and message not in _told:
        _told.add(message)
        log.info(message)


def dense(name: str, x: Tensor) -> Tensor:
    """x as the kernels read it: maps [N, C, H, W] in channels_last, anything else contiguous. Copies said once."""
    if x.dim() != 4:
        return x.contiguous()
    if not x.is_contiguous(memory_format=torch.channels_last):
        tell_once(
            f"{name} is not channels_last: it is copied on every call; give the model images that are "
            ".to(memory_format=torch.channels_last)"
        )
    return x.contiguous(memory_format=torch.channels_last)


def new_map(x: Tensor, dtype: torch.dtype | None = None, shape: tuple[int, ...] | None = None) -> Tensor:
    """Uninitialised tensor in the layout of `dense`, with x's device and, unless given, its dtype and shape."""
    shape = x.shape if shape is None else shape
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return torch.empty(shape, dtype=dtype or x.dtype, device=x.device, memory_format=layout)


def operation(
    name: str,
    forward: Callable,
    fake_forward: Callable,
    backward: Callable,
    fake_backward: Callable,
    save: Callable,
    gradients: Callable,
) -> Callable:
    """A differentiable function of tensors that runs kernels, for eager mode and for torch.compile.

    In eager mode it is an `autograd.Function` without a `setup_context`, for which PyTorch would bind a signature at
    every call; under torch.compile the custom operator ``bossnas::name``, whose boundary would cost tens of
    microseconds in eager mode. ``forward(*inputs)`` and ``backward(...)`` launch kernels and return new tensors; the
    fake ones return tensors of the same shapes and strides without data; ``save(ctx, inputs, output)`` keeps what
    ``gradients(ctx, backward, *grad_outputs)`` needs, which returns one gradient or None for each input. It is called
    only where the first output has a gradient; the others never have one. A name gets another number when arguments or
    results change: PyTorch finds compiled graphs on disk by it.
    """
    forward, backward = _on_its_device(forward), _on_its_device(backward)
    forward_op = torch.library.custom_op(f"bossnas::{name}", forward, mutates_args=())
    forward_op.register_fake(fake_forward)
    backward_op = torch.library.custom_op(f"bossnas::{name}_backward", backward, mutates_args=())
    backward_op.register_fake(fake_backward)
    forward_op.register_autograd(lambda ctx, *grads: gradients(ctx, backward_op, *grads), setup_context=save)

    @once_differentiable
    def differentiate(ctx, first, *others):
        # a None is what PyTorch would fill with zeros: there is nothing to compute then
        return (None,) * len(ctx.needs_input_grad) if first is None else gradients(ctx, backward, first, *others)

    def run(ctx, *inputs):
        ctx.set_materialize_grads(False)
        output = forward(*inputs)
        save(ctx, inputs, output)
        return output

    eager = type(
        f"Eager_{name}",
        (torch.autograd.Function,),
        {
            "forward": staticmethod(run),
            "backward": staticmethod(differentiate),
        },
    )

    def call(*inputs):
        return forward_op(*inputs) if torch.compiler.is_compiling() else eager.apply(*inputs)

    return call


def _on_its_device(launch: Callable) -> Callable:
    """Launches on the GPU of the first argument; Triton alone would take the current one."""

    @functools.wraps(launch)
    def guarded(first, *others):
        with on_device_of(first):
            return launch(first, *others)

    return guarded


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Makes the GPU of x the current one, which Triton launches on; no work where it is, or where there is no other."""
    index = x.get_device() if x.is_cuda else -1
    return _HERE if index < 0 or _gpus() == 1 or index == torch.cuda.current_device() else torch.cuda.device(index)


_HERE: contextlib.AbstractContextManager = contextlib.nullcontext()
_gpus = functools.cache(torch.cuda.device_count)


def send(values: Tensor, device: torch.device) -> Tensor:
    """Copies to the device without waiting; the allocator keeps the pinned memory until the copy has been made."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


@triton.jit
def sigmoid(z):
    return 1 / (1 + tl.exp(-z))
