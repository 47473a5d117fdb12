"""The stream of features from rank to rank: one message per micro-batch, checked, a bounded number under way.

Of every message a header goes ahead, which says what comes: a receiver would take a shorter or another message for the
one it waits for without a word. Receives are posted before they are needed, so that a message travels while both sides
compute. Headers and tensors in CPU memory go by gloo. CUDA tensors go by NCCL, which no test covers: it takes two GPUs.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as torch_dist
from torch import Tensor

from bossnas.distributed import dist

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # by their number in a header
WIDTH = 10  # numbers in a header: step, micro-batch, dtype, dimensions, sizes, the rest zero
POLL_SECONDS = 1e-4


class Link(NamedTuple):
    """Groups of all ranks that nothing but the stream uses."""

    headers: Any
    payloads: Any
    device: torch.device


class Place(NamedTuple):
    """Which message: micro-batch ``micro`` of step ``step``."""

    step: int
    micro: int


def connect(device: torch.device, timeout_minutes: float) -> Link:
    """Makes the groups; all ranks call it. A message that does not come within ``timeout_minutes`` is an error."""
    headers = payloads = dist.host_group(timeout_minutes)
    if device.type == "cuda":
        payloads = torch_dist.new_group(backend="nccl", timeout=timedelta(minutes=timeout_minutes))
    return Link(headers, payloads, device)


def pack(views: list[Tensor]) -> Tensor:
    """One tensor [V, n, H, W, C] of the ``views`` [n, C, H, W], all of one shape."""
    return torch.stack([x.permute(0, 2, 3, 1) for x in views])


def unpack(packed: Tensor) -> list[Tensor]:
    """The views that `pack` was given, channels_last, without a copy."""
    return [x.permute(0, 3, 1, 2) for x in packed]


class Sender:
    """Sends tensors to rank ``peer``; at most ``most`` of them are under way, and none is let go before it is there."""

    def __init__(self, link: Link, peer: int, most: int):
        self.link, self.peer, self.most = link, peer, most
        self.under_way: deque[tuple[list, list[Tensor]]] = deque()
        self.count = 0

    def send(self, place: Place, x: Tensor) -> None:
        """Waits while ``most`` tensors are under way, and starts to send ``x``, which nobody may change any more."""
        # flow control: else a fast row would keep the features of all micro-batches that it is ahead
        while len(self.under_way) >= self.most:
            self._finish()
        x = x.contiguous()
        numbers = [*place, DTYPES.index(x.dtype), x.ndim, *x.shape]
        header = torch.tensor(numbers + [0] * (WIDTH - len(numbers)), dtype=torch.int64)
        # gloo matches by tag; NCCL knows no tags and matches by order, in which both sides post the payloads
        tag = 2 * self.count
        works = [
            torch_dist.isend(header, self.peer, group=self.link.headers, tag=tag),
            torch_dist.isend(x, self.peer, group=self.link.payloads, tag=tag + 1),
        ]
        self.under_way.append((works, [header, x]))
        self.count += 1

    def drain(self) -> None:
        """Waits until everything is there."""
        while self.under_way:
            self._finish()

    def _finish(self) -> None:
        works, _ = self.under_way.popleft()
        works[0].wait()
        if self.link.device.type == "cuda":  # there `wait` holds up the stream, not this process
            while not works[1].is_completed():
                time.sleep(POLL_SECONDS)
        else:
            works[1].wait()


class Receiver:
    """Receives what the `Sender` on rank ``peer`` sends; ``most`` messages are waited for ahead of need."""

    def __init__(self, link: Link, peer: int, most: int):
        self.link, self.peer, self.most = link, peer, most
        self.expected: Iterator[Place] = iter(())
        self.posted: deque[_Posted] = deque()
        self.shape: tuple[torch.Size, torch.dtype] | None = None
        self.count = 0

    def expect(self, places: Iterable[Place]) -> None:
        """Says what comes next, in order: tensors of one shape and dtype. All expected before has been received."""
        assert not self.posted, "features of micro-batches before these are still expected"
        self.expected = iter(places)
        self.shape = None  # the leaders may have changed, and with them the scale
        self._post()

    def receive(self) -> Tensor:
        """The next expected tensor. Raises RuntimeError where another one comes."""
        message = self.posted.popleft()
        message.header_work.wait()
        shape, dtype = _read(message, self.peer, self.shape)
        if self.shape is None:
            self.shape = (shape, dtype)
            for later in (message, *self.posted):
                self._post_payload(later, shape, dtype)
        message.payload_work.wait()
        self._post()
        return message.payload

    def _post(self) -> None:
        """The header of the first message says what shape all have; from then on payloads are posted ahead, too."""
        while len(self.posted) < self.most and (place := next(self.expected, None)) is not None:
            header = torch.empty(WIDTH, dtype=torch.int64)
            work = torch_dist.irecv(header, self.peer, group=self.link.headers, tag=2 * self.count)
            self.posted.append(_Posted(place, self.count, header, work))
            self.count += 1
            if self.shape is not None:
                self._post_payload(self.posted[-1], *self.shape)

    def _post_payload(self, message: _Posted, shape: torch.Size, dtype: torch.dtype) -> None:
        message.payload = torch.empty(shape, dtype=dtype, device=self.link.device)
        message.payload_work = torch_dist.irecv(
            message.payload, self.peer, group=self.link.payloads, tag=2 * message.number + 1
        )


class _Posted:
    """A message that is waited for."""

    payload: Tensor  # both once its shape is known
    payload_work: Any

    def __init__(self, place: Place, number: int, header: Tensor, header_work: Any):
        self.place, self.number, self.header, self.header_work = place, number, header, header_work


def _read(message: _Posted, peer: int, known: tuple[torch.Size, torch.dtype] | None) -> tuple[torch.Size, torch.dtype]:
    step, micro, dtype, ndim, *sizes = message.header.tolist()
    if not (0 <= dtype < len(DTYPES) and 0 < ndim <= len(sizes) and min(sizes[:ndim]) > 0):
        raise RuntimeError(f"the features from rank {peer} begin with {message.header.tolist()}, which is no header")
    found = torch.Size(sizes[:ndim]), DTYPES[dtype]
    if (step, micro) != message.place:
        raise RuntimeError(
            f"rank {peer} sends the features of step {step}, micro-batch {micro}, but those of step "
            f"{message.place.step}, micro-batch {message.place.micro} are next"
        )
    if known is not None and found != known:
        raise RuntimeError(
            f"rank {peer} sends features {list(found[0])} {found[1]} in step {step}, micro-batch "
            f"{micro}, but {list(known[0])} {known[1]} are expected"
        )
    return found
