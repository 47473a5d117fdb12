"""One rank of search/test_block_parallel.py: does one after another what the JSON argument lists.

{"set": [...], "resume": null | "auto", "stop": [rank, place]}: a search; that rank gets a SIGTERM when it says that
it is at that place. {"pipe": ...}: a check of the stream between ranks 0 and 1.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time

import torch
from ranks import HANG

from bossnas.config.loading import load
from bossnas.distributed import dist, launch, pipe
from bossnas.distributed.alive import Guard
from bossnas.distributed.pipe import Place, Receiver, Sender
from bossnas.errors import Stopped
from bossnas.search.search import search

CPU = torch.device("cpu")


class Signalled(Guard):
    stop: tuple[int, str] = (-1, "")

    def at(self, place: str) -> None:
        super().at(place)
        if dist.rank() == self.stop[0] and place == self.stop[1]:
            Signalled.stop = (-1, "")
            os.kill(os.getpid(), signal.SIGTERM)


def run(task: dict) -> None:
    Signalled.stop = tuple(task.get("stop", (-1, "")))
    try:
        search(load(None, task["set"]), task.get("resume"))
        assert not task.get("stop"), "the run was not stopped"
    except Stopped as stopped:
        assert task.get("stop"), stopped
        if dist.rank() == 0:
            print(f"rank 0: {stopped}", flush=True)


def check_pipe(kind: str) -> None:
    link = pipe.connect(CPU, HANG / 60)
    x = torch.arange(24.0).view(2, 3, 4)
    if dist.rank() == 0:
        sender = Sender(link, 1, most=2)
        if kind == "whole":
            most = 0
            for i in range(12):
                sender.send(Place(i // 4, i % 4), (x + i).to(torch.bfloat16))
                most = max(most, len(sender.under_way))
            sender.drain()
            for i in range(3):  # another shape after a boundary
                sender.send(Place(3, i), x[0] + i)
            sender.drain()
            print(f"whole: {most} under way", flush=True)
        else:
            sender.send(Place(0, 0), x)
            sender.send(
                *{"step": (Place(1, 0), x), "shape": (Place(0, 1), x[:1]), "dtype": (Place(0, 1), x.half())}[kind]
            )
    elif dist.rank() == 1:
        receiver = Receiver(link, 0, most=2)
        if kind == "whole":
            receiver.expect(Place(i // 4, i % 4) for i in range(12))
            for i in range(12):
                time.sleep(0.02 * (i == 3))
                assert torch.equal(receiver.receive(), (x + i).to(torch.bfloat16))
            receiver.expect(Place(3, i) for i in range(3))
            for i in range(3):
                assert torch.equal(receiver.receive(), x[0] + i)
        else:
            receiver.expect([Place(0, 0), Place(0, 1)])
            assert torch.equal(receiver.receive(), x)
            try:
                receiver.receive()
                raise AssertionError(f"a message of another {kind} was taken")
            except RuntimeError as error:
                print(f"{kind}: {error}", flush=True)
    dist.barrier()  # until here the sender is there: what it sends would go with it


def main() -> None:
    for task in json.loads(sys.argv[1]):
        check_pipe(task["pipe"]) if "pipe" in task else run(task)


if __name__ == "__main__":
    torch.set_num_threads(1)
    from bossnas.runs import session

    session.Guard = Signalled
    sys.exit(launch.run(main, timeout_minutes=HANG / 60))
