"""Ranks and collectives on one and two processes; how they leave, with which exit code."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest
import ranks
import torch

from bossnas.distributed import dist, environment, group, launch
from bossnas.errors import ConfigError


@pytest.fixture
def clean(monkeypatch):
    for name in list(ranks.os.environ):
        if name in ranks.LAUNCHED or name.startswith("SLURM_"):
            monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.quick
def test_one_process_has_no_group(clean):
    group.init()
    assert not torch.distributed.is_initialized()
    assert (dist.rank(), dist.world_size(), dist.local_rank()) == (0, 1, 0)
    x = torch.arange(6).view(3, 2)
    assert dist.all_gather(x)[0] is x and dist.any_rank(True) and not dist.any_rank(False)
    assert dist.together(lambda: "x") == "x" and dist.all_reduce_sum(x) is x
    assert torch.equal(dist.shuffle(x, torch.tensor([2, 0, 1])), x[[2, 0, 1]])
    dist.barrier()
    group.shutdown(1)  # returns


@pytest.mark.quick
def test_small_work_gets_one_thread_unless_the_user_says(clean):
    given, chosen = torch.get_num_threads(), []
    clean.setattr(torch, "set_num_threads", chosen.append)
    clean.delenv("OMP_NUM_THREADS", raising=False)
    group.spare_threads(group.SMALL_WORK)
    assert chosen == []
    group.spare_threads(group.SMALL_WORK - 1)
    assert chosen == [1]
    clean.setenv("OMP_NUM_THREADS", str(given))
    group.spare_threads(1)
    assert chosen == [1]


PAGES = """
import resource, sys
import torch
from bossnas.distributed import dist
if sys.argv[1] == "kept":
    dist.device("cpu")
for round in range(40):  # the first rounds find places for small things and large ones
    if round == 20:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    x = torch.ones(16 * 2**20)
    del x
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_a_run_on_a_cpu_keeps_the_memory_it_frees(clean):
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
        clean.delenv(name, raising=False)

    def pages(*how: str) -> int:  # that the system hands out for 20 times 64 MiB, each of which was freed before
        return int(subprocess.run([sys.executable, "-c", PAGES, *how], check=True, capture_output=True).stdout)

    assert pages("kept") < 20_000 < 100_000 < pages("given back")
    clean.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    assert pages("kept") > 100_000  # the user's own settings stand


@pytest.mark.quick
def test_missing_and_wrong_environment_is_named(clean):
    clean.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="RANK: is not set"):
        group.init()
    clean.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="MASTER_ADDR: is not set"):
        group.init()
    clean.setenv("WORLD_SIZE", "two")
    with pytest.raises(ConfigError, match="WORLD_SIZE.*'two'"):
        group.init()


@pytest.mark.quick
def test_srun_is_read_but_a_batch_script_is_one_process(clean):
    for name, value in {
        "SLURM_PROCID": "0",
        "SLURM_NTASKS": "4",
        "SLURM_LOCALID": "0",
        "SLURM_JOB_ID": "7",
    }.items():
        clean.setenv(name, value)
    group.init()
    assert dist.world_size() == 1 and "WORLD_SIZE" not in ranks.os.environ
    joined = {}
    clean.setattr(torch.distributed, "init_process_group", lambda backend, timeout: joined.update(t=timeout))
    for name in ranks.LAUNCHED:  # so that monkeypatch takes away what init writes
        clean.setenv(name, "")
        clean.delenv(name)
    for name, value in {
        "SLURM_PROCID": "3",
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": "gpu[07-08]",
    }.items():
        clean.setenv(name, value)
    group.init(timeout_minutes=2)
    env = ranks.os.environ
    assert (env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"], env["MASTER_ADDR"]) == ("3", "4", "1", "gpu07")
    assert 20000 <= int(env["MASTER_PORT"]) < 32000 and joined["t"].seconds == 120


@pytest.mark.quick
@pytest.mark.parametrize(
    "nodes, first",
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[03-05,9],cpu1", "gpu03"),
        ("a-b[1,3]-x,c", "a-b1-x"),
        ("rack2n[10]", "rack2n10"),
    ],
)
def test_first_host(nodes, first):
    assert environment.first_host(nodes) == first


@pytest.mark.quick
def test_device(clean):
    assert dist.device("cpu").type == "cpu"
    clean.setattr(torch.cuda, "is_available", lambda: False)
    assert dist.device("auto").type == "cpu"
    with pytest.raises(ConfigError, match="engine.device: cuda"):
        dist.device("cuda")
    clean.setattr(torch.cuda, "is_available", lambda: True)
    clean.setattr(torch.cuda, "set_device", lambda index: None)
    clean.setattr(torch.cuda, "device_count", lambda: 2)
    clean.setenv("LOCAL_RANK", "1")
    assert dist.device("auto") == torch.device("cuda", 1)
    clean.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match="local rank 2"):
        dist.device("cuda")
    clean.setattr(torch.cuda, "device_count", lambda: 1)
    assert dist.device("cuda") == torch.device("cuda", 0)


@pytest.mark.quick
def test_run_in_one_process(clean, capsys):
    def user():
        raise ConfigError("a.b", "wrong", "mend it")

    def broken():
        raise RuntimeError("no")

    def interrupted():
        raise KeyboardInterrupt

    assert launch.run(lambda: None) == 0
    assert launch.run(user) == 2 and capsys.readouterr().err == "error: a.b: wrong; mend it\n"
    assert launch.run(broken) == 1 and "RuntimeError: no" in capsys.readouterr().err
    assert launch.run(interrupted) == 130
    assert launch.run(lambda: sys.exit(5)) == 5 and launch.run(lambda: sys.exit()) == 0
    assert launch.run(lambda: sys.exit("said")) == 1 and "said" in capsys.readouterr().err


@pytest.mark.quick
def test_two_ranks_leave_quietly():
    code, output = ranks.start("torchrun", 2, "dist_worker.py", "well")
    assert code == 0, output
    assert output.count("collectives are right") == 1
    assert "terminate called" not in output and "Traceback" not in output, output


def test_a_broken_rank_ends_all_of_them():
    code, output = ranks.start("torchrun", 2, "dist_worker.py", "broken")
    assert code == 1 and "RuntimeError: broken on purpose" in output and "rank 1 failed" in output, output


@pytest.mark.parametrize("how, expected", [("user", 2), ("user on one", 2), ("late", 2), ("exit", 3)])
def test_exit_codes_through_the_deepspeed_launcher(how, expected):
    pytest.importorskip("deepspeed")
    code, output = ranks.start("deepspeed", 2, "dist_worker.py", how)
    assert code == expected, output
    if "user" in how:
        assert output.count("error: data.train: no file matches; name shards") == 1, output
        assert "Traceback" not in output
