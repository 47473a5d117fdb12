"""Where operations that are written for a CPU may take the place of torch's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_allowed = True


@contextmanager
def torch_operations() -> Iterator[None]:
    """Has torch's own operations run, as on a GPU: for whoever counts on a CPU what a GPU will do."""
    global _allowed
    before, _allowed = _allowed, False
    try:
        yield
    finally:
        _allowed = before


def on_cpu(x: Tensor, *others: Tensor | None) -> bool:
    """Whether x and the others are float32 or float64 on a CPU, outside autocast, and run at once: what is traced,
    exported or compiled gets torch's own operations, which other programs know."""
    return (
        _allowed
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and all(other is None or other.dtype == x.dtype for other in others)
        and not torch.is_autocast_enabled("cpu")
        and not torch.jit.is_tracing()
        and not torch.compiler.is_compiling()
    )
