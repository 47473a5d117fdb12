"""One rank of distributed/test_dist.py: checks every collective, then leaves in the way that the test asks for."""

from __future__ import annotations

import sys
import time

import torch
from ranks import HANG

from bossnas.distributed import dist, launch
from bossnas.errors import ConfigError


def collectives() -> None:
    me, n = dist.rank(), dist.world_size()
    assert dist.device("cpu") == torch.device("cpu") and dist.local_rank() == me
    parts = dist.all_gather(torch.full((2, 3), me, dtype=torch.float64).t())  # not contiguous
    assert [part.unique().tolist() for part in parts] == [[r] for r in range(n)] and parts[0].shape == (3, 2)
    assert dist.together(lambda: me) == me
    assert dist.any_rank(me == n - 1) is True and dist.any_rank(False) is False
    assert dist.all_reduce_sum(torch.tensor([1.0 + me])).item() == n * (n + 1) / 2

    whole = torch.arange(4 * n * 3).view(4 * n, 3)
    mine = whole[me * 4 : me * 4 + 4]
    index = torch.randperm(4 * n, generator=torch.Generator().manual_seed(5))
    mixed = dist.shuffle(mine, index)
    assert torch.equal(torch.cat(dist.all_gather(mixed)), whole[index])
    assert torch.equal(dist.shuffle(mixed, index.argsort()), mine)
    try:
        dist.shuffle(mine, index[:-1])
    except ValueError:
        pass
    else:
        raise AssertionError("a short index was accepted")
    dist.barrier()


def mistake() -> None:
    raise ConfigError("data.train", "no file matches", "name shards")


def main() -> None:
    collectives()
    if dist.rank() == 0:
        print("collectives are right", flush=True)
    how = sys.argv[-1]
    # the launcher ends the rank that waits: only who is to speak first is quick, however busy the machine
    first = 1 if how in ("late", "broken") else 0
    launch.GRACE_SECONDS = 0.1 if dist.rank() == first else 2 * HANG
    if how == "user on one":  # the other rank learns of it and does not wait in the next collective
        dist.together(lambda: mistake() if dist.rank() == 1 else None)
        dist.barrier()
    if how == "late":  # nobody could tell the other rank
        if dist.rank() == 1:
            mistake()
        dist.barrier()
    if how == "user":
        mistake()
    if how == "broken" and dist.rank() == 1:
        raise RuntimeError("broken on purpose")
    if how == "broken":
        time.sleep(2 * HANG)  # a rank that does not look
    if how == "exit":
        sys.exit(3)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(launch.run(main, timeout_minutes=HANG / 60))
