"""The training loop on several ranks against the method written out for one process."""

from __future__ import annotations

import json

import pytest
import ranks

OBJECTIVES = [
    {"engine": "ddp", "space": "nats", "objective": "instance", "paths": 3},
    {"engine": "fsdp2", "space": "hytra", "objective": "both"},
    {"engine": "fsdp2", "space": "nats", "objective": "instance"},
]
DEEPSPEED = [
    {"engine": "deepspeed", "space": "hytra", "section": {"zero_optimization": {"stage": stage}}, "rate": stage == 2}
    for stage in (0, 2)
]
DEEPSPEED.append(
    {"engine": "deepspeed", "space": "nats", "section": {"zero_optimization": {"stage": 1}}, "objective": "instance"}
)
OWN = [
    {"engine": engine, "space": space, "recompute": recompute}
    for engine, space, recompute in (
        ("ddp", "hytra", False),
        ("ddp", "mbconv", True),
        ("ddp", "nats", False),
        ("fsdp2", "hytra", False),
        ("fsdp2", "hytra", True),
        ("fsdp2", "mbconv", False),
        ("fsdp2", "mbconv", True),
        ("fsdp2", "nats", False),
        ("fsdp2", "nats", True),
    )
]
SYNC = [
    {"engine": engine, "space": space, "sync": True, "own_group": own, "recompute": recompute}
    for engine, space, own, recompute in (
        ("ddp", "hytra", True, False),
        ("fsdp2", "mbconv", False, True),
        ("fsdp2", "nats", True, False),
    )
]


def start(cases):
    code, output = ranks.start("torchrun", 2, "train_worker.py", json.dumps(cases))
    assert code == 0 and output.count("equal within") == len(cases), output


def test_two_ranks_train_as_the_method_says_and_with_synchronised_norms_as_one_rank():
    start(OWN + OBJECTIVES + SYNC)


def test_two_deepspeed_ranks_train_and_rate_as_the_method_says():
    pytest.importorskip("deepspeed")
    start(DEEPSPEED)
