"""Searches on a real SLURM of two nodes: disturbed in every way that SLURM knows, they end in the same ratings.

They take minutes, so they run only when asked for: `bash tests/run.sh --slurm`, or BOSSNAS_SLURM=1. With `pytest -s`
the table of what each disturbance cost comes out at the end.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest
from cluster import EVERY, Cluster, missing
from ranks import HANG, ROOT, until

ABSENT = missing()
pytestmark = [
    pytest.mark.timeout(4 * HANG),  # they wait several times
    pytest.mark.skipif(bool(ABSENT), reason=f"no SLURM here: {', '.join(ABSENT)} missing (tests/run.sh --slurm)"),
    pytest.mark.skipif(
        os.environ.get("BOSSNAS_SLURM") != "1",
        reason="takes minutes: bash tests/run.sh --slurm, or set BOSSNAS_SLURM=1",
    ),
]
CONFIG = {
    "space": {"name": "nats", "width": 0.25, "image_size": 16},
    "heads": {"hidden": 16, "out": 8},
    "data": {"recipe": "cifar", "workers": 0, "val_images": 24},
    "train": {"batch": 16, "micro_batch": 8, "epochs": 2, "steps_per_epoch": 6, "lr": 0.5},
    "rating": {"every_epochs": 0, "batch": 16, "calibration_images": 16},
    "engine": {"name": "fsdp2", "device": "cpu"},
    "checkpoint": {"every_steps": 4},
}
STEPS = 12  # of a block
RETRAINING = {
    "model": {"name": "bossnet", "options": {"width": 8, "encoding": [[1], [1], [0], [1]]}, "image_size": 32},
    "data": {"workers": 0, "val_images": 48},
    "augment": {"repeats": 1},
    "train": {"batch": 32, "micro_batch": 16, "epochs": 3, "steps_per_epoch": 40, "warmup_epochs": 1, "ema": 0.9},
    "engine": {"name": "ddp", "device": "cpu"},
    "checkpoint": {"every_steps": 10},
}
ONE_TASK = ("--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1")


@pytest.fixture(scope="module")
def cluster():
    folder = Path(tempfile.mkdtemp(prefix="bossnas-slurm-", dir="/tmp"))  # short: sockets have short names
    with Cluster(folder) as running:
        yield running
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def table():
    rows: list[str] = []
    yield rows
    print(
        "\n\n| SLURM's fault | steps lost | until it had ended, s | in the queue, s | until it went on, s |"
        " ratings equal |\n|---|---|---|---|---|---|"
    )
    print("\n".join(rows))


class Search:
    """A submitted search. ``place``: a folder that looks like the root of the checkout, where its files land."""

    def __init__(
        self,
        cluster: Cluster,
        place: Path,
        *options: str,
        script: str = "search.sbatch",
        sets: tuple[str, ...] = (),
        env: dict[str, str] | None = None,
        config: dict = CONFIG,
    ):
        for name in ("launch", "bossnas", "kernels"):
            (place / name).symlink_to(ROOT / name)
        (place / "config.json").write_text(json.dumps(config | {"out": "runs/a"}))
        self.cluster, self.place, self.run = cluster, place, place / "runs/a"
        self.number = cluster.command(
            "sbatch",
            "--parsable",
            f"--chdir={place}",
            *ONE_TASK,
            *options,
            str(place / "launch/slurm" / script),
            "config.json",
            *(f"--set={text}" for text in sets),
            env={"BOSSNAS_VENV": sys.prefix, "OMP_NUM_THREADS": "1", **(env or {})},
        )

    def wait(self, what: str, happened: Callable[[], object]) -> object:
        try:
            return until(happened, what, every=EVERY)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.said()}") from None

    def output(self) -> str:
        """What the batch script said."""
        return "".join(file.read_text() for file in sorted(self.place.glob("bossnas-*.out")))

    def said(self) -> str:
        """That, and the ends of the ranks' logs."""
        logs = [f"--- {log.name}\n{log.read_text()[-3000:]}" for log in sorted(self.place.glob("logs/*/*"))]
        return "\n".join([self.output(), *logs])

    def position(self) -> tuple[int, int]:
        """Block and step of the last whole line of the metrics."""
        file = self.run / "metrics.jsonl"
        lines = file.read_text().rpartition("\n")[0].splitlines() if file.exists() else []
        last = json.loads(lines[-1]) if lines else {"block": 0, "step": 0}
        return last.get("block", 0), last["step"]  # a retraining has no blocks

    def reaches(self, block: int, step: int) -> None:
        self.wait(f"block {block} step {step}", lambda: self.position() >= (block, step))

    def restarts(self) -> int:
        return int(self.cluster.job(self.number)["Restarts"])

    def returns(self) -> None:
        """Waits until the batch script runs again; the ranks then still have their libraries to load."""
        self.wait("its start out of the queue", lambda: " start 1 on" in self.output())

    def signal(self, number: int) -> None:
        """Signals all ranks behind SLURM's back."""
        for rank in (0, 1):
            for process in self.cluster.tasks(self.number, rank):
                os.kill(process, number)

    def ends(self) -> str:
        """Waits for the job's end and returns its state."""

        def ended() -> str | None:
            state = self.cluster.job(self.number)["JobState"]
            return None if state in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED") else state

        return str(self.wait("the job's end", ended))

    def completes(self) -> dict[str, dict]:
        """Waits for a good end and returns the ratings."""
        assert self.ends() == "COMPLETED" and (self.run / "done").exists(), self.said()
        return ratings(self.run)

    def resumed(self) -> list[tuple[float, int, int]]:
        """When, in which block and at which step it went on."""
        lines = (self.run / "log.txt").read_text().splitlines()
        found = [re.match(r"(\S+ \S+),.* going on in block (\d+) at step (\d+)", line) for line in lines]
        return [(datetime.fromisoformat(m[1]).timestamp(), int(m[2]), int(m[3])) for m in found if m]

    def when(self, words: str) -> float:
        """When the batch script first said so, seconds since the epoch."""
        match = re.search(rf"^(\S+) {words}", self.output(), re.MULTILINE)
        assert match, f"{words!r} was never said:\n{self.said()}"
        return datetime.fromisoformat(match[1]).timestamp()


def ratings(run: Path) -> dict[str, dict]:
    return {file.name: json.loads(file.read_text()) for file in sorted((run / "ratings").glob("*.json"))}


@pytest.fixture(scope="module")
def undisturbed(cluster, tmp_path_factory):
    """The ratings of a search of two nodes that nothing happens to."""
    search = Search(cluster, tmp_path_factory.mktemp("undisturbed"))
    found = search.completes()
    assert search.restarts() == 0 and search.resumed() == [], search.said()
    assert len(found) == 3 and "2 cpu rank(s)" in (search.run / "log.txt").read_text()
    return found


def settle(search: Search, name: str, hit: float, table: list[str], undisturbed: dict) -> None:
    """What a fault cost: for a search that was hit at the time ``hit`` and is about to go on."""
    block_before, step_before = search.position()
    found = search.completes()
    gone_on, block, step = search.resumed()[0]
    lost = (block_before - block) * STEPS + step_before - step
    ended = search.when("srun ended")
    begun = search.when("start 1") if search.restarts() else ended
    table.append(
        f"| {name} | {lost} | {ended - hit:.0f} | {begun - ended:.0f} | {gone_on - begun:.0f} | "
        f"{'yes' if found == undisturbed else 'NO'} |"
    )
    assert found == undisturbed, search.said()
    assert 0 <= lost <= CONFIG["checkpoint"]["every_steps"], search.said()
    assert not list((search.run / "checkpoints").glob("*.tmp"))


def test_a_search_on_two_nodes_ends(undisturbed):
    assert all(rated["paths"] for rated in undisturbed.values())


def requeue(search: Search) -> None:
    search.cluster.command("scontrol", "requeue", search.number)


def preempt(search: Search) -> None:
    search.cluster.command(
        "sbatch", "--partition=hi", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 3"
    )


def node_down(search: Search) -> None:
    """The job needs both nodes, so it waits until the node is back."""
    search.cluster.command("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
    search.wait("its return to the queue", lambda: search.restarts() > 0)
    search.cluster.resume("n2")


def node_crash(search: Search) -> None:
    """SLURM learns it from the silence. The other rank fails, and the batch script tries again meanwhile."""
    search.cluster.crash_node("n2", search.number, rank=1)
    search.wait("its return to the queue", lambda: search.restarts() > 0)
    search.cluster.start_node("n2")
    search.cluster.resume("n2")


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        (requeue, "`scontrol requeue`"),
        (preempt, "preemption by a partition with priority"),
        (node_down, "a node set down and back"),
        (node_crash, "a node that dies, and comes back"),
    ],
)
def test_what_slurm_takes_away_goes_on(cluster, tmp_path, table, undisturbed, fault, name):
    search = Search(cluster, tmp_path)
    search.reaches(1, 5)
    hit = time.time()
    fault(search)
    search.returns()
    settle(search, name, hit, table, undisturbed)


def test_the_time_is_up(cluster, tmp_path, table, undisturbed):
    """SLURM warns the batch script, which alone requeues the job. SLURM looks every half minute, therefore the ranks
    stand still until the warning."""
    search = Search(cluster, tmp_path, "--signal=B:USR1@120", "--time=60")
    search.reaches(1, 5)
    search.signal(signal.SIGSTOP)
    minutes = int((time.time() - search.when("start 0")) / 60) + 2  # one to two are left: the warning is due
    cluster.command("scontrol", "update", f"JobId={search.number}", f"TimeLimit={minutes}")
    search.wait("the warning", lambda: "got SIGUSR1" in search.output())
    hit = time.time()
    search.signal(signal.SIGCONT)
    search.wait("its return to the queue", lambda: search.restarts() > 0)
    cluster.command("scontrol", "update", f"JobId={search.number}", "TimeLimit=60")
    search.returns()
    assert "after SIGUSR1" in search.output() and "back into the queue" in search.output()
    settle(search, "time limit, `--signal=B:USR1@120`", hit, table, undisturbed)


def test_a_killed_rank_is_started_again_where_it_is(cluster, tmp_path, table, undisturbed):
    search = Search(cluster, tmp_path)
    search.reaches(1, 5)
    hit, (victim,) = time.time(), cluster.tasks(search.number, rank=1)
    os.kill(victim, signal.SIGKILL)
    search.wait("the end of srun", lambda: "srun ended" in search.output())
    settle(search, "`kill -9` of a rank", hit, table, undisturbed)
    assert search.restarts() == 0


def test_a_cancelled_search_stays_cancelled_and_can_be_submitted_again(cluster, tmp_path, undisturbed):
    search = Search(cluster, tmp_path)
    search.reaches(0, 5)
    cluster.command("scancel", search.number)
    assert search.ends() == "CANCELLED" and search.restarts() == 0, search.said()
    assert not (search.run / "done").exists()
    block, step = search.position()
    for name in ("launch", "bossnas", "kernels"):
        (tmp_path / name).unlink()
    again = Search(cluster, tmp_path)
    assert again.completes() == undisturbed
    assert again.resumed()[0][1:] == (block, step)  # everything was saved


def test_restarts_have_a_limit(cluster, tmp_path):
    search = Search(cluster, tmp_path, env={"BOSSNAS_MAX_RESTARTS": "0"})
    search.reaches(0, 2)
    cluster.command("scancel", "--batch", "--signal=USR1", search.number)
    assert search.ends() == "FAILED" and search.restarts() == 0, search.said()
    assert cluster.job(search.number)["ExitCode"] == "75:0"
    assert "BOSSNAS_MAX_RESTARTS allows no more" in search.output()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train.lr=much", "error: train.lr: input should be a valid number"),  # seen by the batch script
        ("data.train=nowhere/*.tar", "error: data.val: is not set, but data.train is"),  # seen by the ranks
    ],
)
def test_a_mistake_of_the_user_ends_the_job(cluster, tmp_path, text, words):
    search = Search(cluster, tmp_path, sets=(text,))
    assert search.ends() == "FAILED" and search.restarts() == 0, search.said()
    assert cluster.job(search.number)["ExitCode"] == "2:0" and words in search.output(), search.said()
    assert search.output().count("srun ended") <= 1  # not tried again


def test_an_array_searches_with_several_seeds(cluster, tmp_path):
    """One of its tasks is sent back into the queue, which the other does not notice."""
    search = Search(cluster, tmp_path, "--array=3,4", "--nodes=1", script="array.sbatch", sets=("engine.name=single",))
    runs = [search.place / f"runs/a-seed{seed}" for seed in (3, 4)]
    search.wait("the first step", (runs[0] / "checkpoints/latest").exists)
    cluster.command("scancel", "--batch", "--signal=USR1", f"{search.number}_3")
    search.wait("both searches", lambda: search.output().count("done: runs/a-seed") == 2)
    assert search.output().count("start 1 on") == 1 and "going on in block" in (runs[0] / "log.txt").read_text()
    assert all((run / "done").exists() for run in runs)
    assert [json.loads((run / "config.json").read_text())["seed"] for run in runs] == [3, 4]
    assert ratings(runs[0]) != ratings(runs[1])


def test_a_retraining_goes_on_where_it_was(cluster, tmp_path):
    def retraining(name: str) -> Search:
        (tmp_path / name).mkdir()
        return Search(cluster, tmp_path / name, "--nodes=2", script="retrain.sbatch", config=RETRAINING)

    found = []
    for name in ("undisturbed", "requeued"):
        job = retraining(name)
        if name == "requeued":
            job.reaches(0, 50)
            requeue(job)
            job.returns()
        assert job.ends() == "COMPLETED" and (job.run / "done").exists(), job.said()
        result = json.loads((job.run / "result.json").read_text())
        found.append([result[key] for key in ("top1", "loss", "steps", "best", "ranks")])
        assert ("going on at step" in (job.run / "log.txt").read_text()) == (name == "requeued")
    assert found[0] == found[1] and found[0][4] == 2
