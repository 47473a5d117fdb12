"""Which part of a tensor this rank holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: some rows of a DTensor, perhaps none, all of another. For no_grad."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def shard(tensor: Tensor, like: Tensor) -> Tensor:
    """What this rank holds of ``tensor``, whole or a DTensor, when it is laid out as ``like``."""
    if not is_dtensor(like):
        return tensor.full_tensor() if is_dtensor(tensor) else tensor
    if is_dtensor(tensor):
        return tensor.to_local()
    mesh = like.device_mesh
    rows = -(-tensor.shape[0] // mesh.size())
    return tensor[rows * mesh.get_local_rank() :][:rows]


def in_share(first: int, end: int, size: int, rank: int) -> tuple[int, int, int]:
    """Elements first..end-1 of one vector of which every rank has a share of ``size`` elements: start and stop in the
    share of ``rank``, and which of the elements is the first there."""
    first, end = first - rank * size, end - rank * size
    start = min(max(first, 0), size)
    return start, min(max(end, 0), size), start - first


def is_dtensor(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether ranks share the tensor."""
    return hasattr(tensor, "to_local")
