"""The training loop on several ranks against the method written out for one process."""

from __future__ import annotations

import json

import pytest
import ranks

DEEPSPEED = [{"engine": "deepspeed", "space": "hytra", "section": {"zero_optimization": {"stage": stage}}}
             for stage in (0, 2)]
OWN = [{"engine": engine, "space": space, "recompute": recompute}
       for space in ("hytra", "mbconv", "nats")
       for engine, recompute in (("ddp", False), ("ddp", True), ("fsdp2", False), ("fsdp2", True))]
SYNC = [{"engine": engine, "space": space, "sync": True, "own_group": own, "recompute": recompute}
        for engine, space, own, recompute in (("ddp", "nats", False, False), ("fsdp2", "nats", True, False),
                                              ("ddp", "hytra", True, False), ("fsdp2", "mbconv", False, True))]


def start(cases):
    code, output = ranks.start("torchrun", 2, "train_worker.py", json.dumps(cases), timeout=300)
    assert code == 0 and output.count("equal within") == len(cases), output


def test_two_ranks_train_as_the_method_says_and_with_synchronised_norms_as_one_rank():
    start(OWN + SYNC)


def test_two_deepspeed_ranks_train_and_rate_as_the_method_says():
    pytest.importorskip("deepspeed")
    start(DEEPSPEED)
