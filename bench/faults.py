"""Injects faults into a small search and shows what each of them costs. Prints a table; exit code 1 if a promise is
broken.

    python bench/faults.py --json faults.json                 (all; about a minute each on two cores)
    python bench/faults.py --only kill_rank_1 --keep runs/faults
    python bench/faults.py --list

A fault is injected in block 1 at step 5 of 8, on two ranks unless it says otherwise; checkpoints are written every 3
steps, and blocks that train at once are hurt after the first. Where the launcher does not start the run again, the same
command is given again.
The columns: steps that had to be trained once more; seconds from the fault to the first new step, starts of Python
included; whether ratings, winners and weights at the end are those of an undisturbed run, to the bit. Linux. The full
disk needs root, for a small tmpfs, and is left out without it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import torch

from bossnas.distributed import launch
from bossnas.runs import checkpoint

TINY = [
    "space.name=nats",
    "space.width=0.125",
    "space.image_size=32",
    "heads.hidden=16",
    "heads.out=8",
    "data.workers=0",
    "train.batch=16",
    "train.micro_batch=8",
    "train.epochs=1",
    "train.steps_per_epoch=8",
    "train.lr=0.5",
    "train.warmup_epochs=0",
    "data.val_images=8",
    "rating.batch=4",
    "rating.every_epochs=0",
    "rating.calibration_images=16",
    "checkpoint.every_steps=3",
    "checkpoint.keep=3",
    "checkpoint.asynchronous=false",
    "engine.timeout_minutes=0.5",
]
BLOCKS, STEPS, AT = 3, 8, (1, 5)
FULL_TIMEOUT = 400.0  # seconds for anything
MARK = "BOSSNAS_FAULTS"  # environment variable by which all processes of a case are found


class Search:
    """A search that is started, watched, hurt and started again."""

    def __init__(self, folder: Path, engine: str, ranks: int, sets: tuple[str, ...], inject: str):
        self.folder, self.run, self.log = folder, folder / "run", folder / "output.txt"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        script = [str(ROOT / "launch/train.py")]
        if inject:
            script = [str(Path(__file__)), "--inject", inject, str(folder / "injected")]
        self.elastic = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        self.front = [] if ranks == 1 else [*self.elastic, "--max-restarts", "3"]
        self.back = [
            *script,
            *(["search"] if inject else []),
            "--config",
            str(folder / "config.json"),
            "--resume",
            "auto",
            *(f"--set={o}" for o in [*TINY, f"engine.name={engine}", f"out={self.run}", *sets]),
        ]
        self.parallel = "schedule=block_parallel" in sets
        self.process: subprocess.Popen | None = None
        self.codes: list[int] = []  # of the commands that have ended

    def start(self) -> None:
        launched = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
        env = {k: v for k, v in os.environ.items() if k not in launched and not k.startswith("SLURM_")}
        env |= {MARK: str(self.folder), "OMP_NUM_THREADS": "1"}
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(
                [sys.executable, *self.front, *self.back], env=env, stdout=log, stderr=log, start_new_session=True
            )

    def trained(self) -> list[tuple[int, int]]:
        """(block, step) of every step in metrics.jsonl."""
        try:
            lines = (self.run / "metrics.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return []
        found = []
        for line in lines:
            if '"kind": "train"' in line and line.endswith("}"):
                values = json.loads(line)
                found.append((values["block"], values["step"]))
        return found

    def position(self) -> tuple[int, int]:
        """The last (block, step) in metrics.jsonl; of blocks that train at once (0, step), as of the
        last checkpoint."""
        last = max(self.trained(), default=(0, 0))
        return (0, last[1]) if self.parallel else last

    def reach(self, place: tuple[int, int]) -> None:
        deadline = time.monotonic() + FULL_TIMEOUT
        while self.position() < place:
            assert self.process.poll() is None and time.monotonic() < deadline, f"{place} is not reached\n{self.said()}"
            time.sleep(0.005)

    def said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def starts(self) -> list[tuple[int, int]]:
        """Where the run began or went on, once for each start of the ranks."""
        log = self.run / "log.txt"
        found = []
        for part in (log.read_text() if log.exists() else "").split(" search on ")[1:]:
            place = re.search(r"going on in block (\d+) at step (\d+)", part)
            if place or "train " in part or "first leaders" in part:  # else the line that says so is yet to come
                found.append((int(place[1]), int(place[2])) if place else (0, 0))
        return found

    def pids(self, rank: int | None = None) -> list[int]:
        """Processes of this case; only those of a rank."""
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            try:
                env = dict(e.split("=", 1) for e in (place / "environ").read_text().split("\0") if "=" in e)
                alive = (place / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
            except (OSError, UnicodeDecodeError, IndexError):
                continue
            if alive and env.get(MARK) == str(self.folder) and (rank is None or env.get("RANK") == str(rank)):
                found.append(int(place.name))
        return found

    def signal(self, number: int, rank: int | None = None) -> None:
        """To a rank, or None: to the command that was started (the launcher, or the one process)."""
        for pid in [self.process.pid] if rank is None else self.pids(rank):
            os.kill(pid, number)

    def clean(self) -> None:
        for _ in range(50):
            left = self.pids()
            for pid in left:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            if self.process is not None:
                self.process.poll()
            if not left:
                return
            time.sleep(0.1)
        raise RuntimeError(f"processes of {self.folder} do not end: {left}")

    @property
    def done(self) -> bool:
        return (self.run / "done").exists()

    def finish(self, before: Callable[[], None]) -> dict:
        """From the fault on: waits for the end, starts the command again when it ends without having finished, up to
        3 times. ``before``: what is mended before the first new start."""
        start, at, times = time.monotonic(), self.position(), len(self.starts())
        lost, seconds, resumed = 0, None, None
        while time.monotonic() < start + FULL_TIMEOUT:
            now, went_on = self.position(), self.starts()
            if len(went_on) > times:
                resumed, times = went_on[-1], len(went_on)
                lost = max(lost, _index(at) - _index(resumed))
            elif resumed is None:
                at = max(at, now)
            elif seconds is None and now > resumed and self.trained().count(now) == 1:
                seconds = time.monotonic() - start
            if self.process.poll() is not None:
                self.codes.append(self.process.returncode)
                orphans = time.monotonic() + 60
                while self.pids() and time.monotonic() < orphans:  # ranks that outlive their launcher
                    time.sleep(0.05)
                assert not self.pids(), f"processes stay behind\n{self.said()}"
                if self.done:
                    return {"lost": max(lost, 0), "seconds": seconds, "codes": self.codes}
                assert len(self.codes) < 4, f"it does not get through\n{self.said()}"
                before()
                self.start()
            time.sleep(0.02)
        raise AssertionError(f"it does not end\n{self.said()}")


def _index(place: tuple[int, int]) -> int:
    return place[0] * STEPS + place[1]


@dataclass(frozen=True)
class Fault:
    """``hurt`` does it, once the place is reached; ``mend`` undoes it before the command is given again. ``inject``:
    what the ranks do to themselves instead. ``lost``: the most steps that may be lost; ``same``: whether the end must
    be that of an undisturbed run; ``says``: what the output must hold; ``code``: the first command's exit code."""

    name: str
    what: str
    hurt: Callable[[Search], None] = lambda search: None
    mend: Callable[[Search], None] = lambda search: None
    engine: str = "ddp"
    ranks: int = 2
    sets: tuple[str, ...] = ()
    inject: str = ""
    lost: int = 3  # 2 since the checkpoint, and one that was on its way
    same: bool = True
    says: str = ""
    code: int | None = None


def _newest(search: Search) -> Path:
    root = search.run / "checkpoints"
    return root / (root / "latest").read_text().strip()


def _largest(search: Search) -> Path:
    return max(_newest(search).iterdir(), key=lambda file: file.stat().st_size)


def _tear(how: str) -> Callable[[Search], None]:
    def mend(search: Search) -> None:
        if len(search.codes) > 1:
            return
        file = _largest(search)
        size = file.stat().st_size
        if how == "cut":
            os.truncate(file, size // 2)
        elif how == "bit":
            with open(file, "r+b") as f:
                f.seek(size // 2)
                byte = f.read(1)[0]
                f.seek(size // 2)
                f.write(bytes([byte ^ 1]))
        elif how == "gone":
            file.unlink()
        else:
            (search.run / "checkpoints/latest").unlink()

    return mend


def _kill_all(search: Search) -> None:
    for pid in search.pids():
        os.kill(pid, signal.SIGKILL)


def _kill_rank_itself(search: Search) -> None:
    """Rank 1 alone: its loader processes have to notice."""
    own = search.pids(1)
    parents = {pid: int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) for pid in own}
    os.kill(next(pid for pid in own if parents[pid] == search.process.pid), signal.SIGKILL)


def _fill(search: Search) -> None:
    with open(search.folder / "filler", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(65536))
        except OSError:
            pass


def _by_signal(number: int, rank: int | None = None, everyone: bool = False) -> Callable[[Search], None]:
    def hurt(search: Search) -> None:
        if everyone:
            for pid in search.pids():
                os.kill(pid, number)
        else:
            search.signal(number, rank)

    return hurt


STOPPED = r"stopped on {} at block 1 step \d+; everything is saved"
FAULTS = [
    Fault("kill_rank_1", "kill -9 of rank 1", _by_signal(signal.SIGKILL, 1), code=0),
    Fault("kill_rank_0", "kill -9 of rank 0", _by_signal(signal.SIGKILL, 0), code=0),
    Fault(
        "kill_rank_1_async",
        "kill -9 of rank 1, asynchronous checkpoints",
        _by_signal(signal.SIGKILL, 1),
        sets=("checkpoint.asynchronous=true",),
        lost=6,
        code=0,
    ),
    Fault(
        "kill_rank_1_loader",
        "kill -9 of rank 1, which has a loader process",
        _kill_rank_itself,
        sets=("data.workers=1",),
        code=0,
    ),
    Fault("kill_rank_1_fsdp2", "kill -9 of rank 1, FSDP2", _by_signal(signal.SIGKILL, 1), engine="fsdp2", code=0),
    Fault("kill_agent", "kill -9 of torchrun", _by_signal(signal.SIGKILL), lost=0, says=STOPPED.format("SIGHUP")),
    Fault("kill_everything", "kill -9 of all processes (a node's power)", _kill_all),
    Fault(
        "term_agent", "SIGTERM to torchrun", _by_signal(signal.SIGTERM), lost=0, code=1, says=STOPPED.format("SIGTERM")
    ),
    Fault(
        "term_agent_fsdp2",
        "SIGTERM to torchrun, FSDP2",
        _by_signal(signal.SIGTERM),
        engine="fsdp2",
        lost=0,
        code=1,
        says=STOPPED.format("SIGTERM"),
    ),
    Fault(
        "hangup_agent",
        "SIGHUP to torchrun (its terminal closes)",
        _by_signal(signal.SIGHUP),
        lost=0,
        code=1,
        says=STOPPED.format("SIGHUP"),
    ),
    Fault(
        "usr1_rank_1",
        "SIGUSR1 to rank 1",
        _by_signal(signal.SIGUSR1, 1),
        lost=0,
        code=1,
        says=STOPPED.format("SIGUSR1"),
    ),
    Fault(
        "term_everyone",
        "SIGTERM to every process, loaders too",
        _by_signal(signal.SIGTERM, everyone=True),
        lost=0,
        code=1,
        sets=("data.workers=1",),
        says=STOPPED.format("SIGTERM"),
    ),
    Fault(
        "usr1_single",
        "SIGUSR1, one process",
        _by_signal(signal.SIGUSR1),
        ranks=1,
        engine="single",
        lost=0,
        code=launch.RESUMABLE,
        says=STOPPED.format("SIGUSR1"),
    ),
    Fault(
        "int_single",
        "Ctrl-C, one process with a loader",
        _by_signal(signal.SIGINT, everyone=True),
        ranks=1,
        engine="single",
        sets=("data.workers=1",),
        lost=0,
        code=launch.RESUMABLE,
        says=STOPPED.format("SIGINT"),
    ),
    Fault(
        "freeze_rank_1",
        "SIGSTOP of rank 1",
        _by_signal(signal.SIGSTOP, 1),
        code=0,
        says="rank 1 was last seen at .*no sign of life",
    ),
    Fault(
        "freeze_rank_0",
        "SIGSTOP of rank 0",
        _by_signal(signal.SIGSTOP, 0),
        code=0,
        says="rank 0 was last seen at .*no sign of life",
    ),
    Fault(
        "stuck_rank_1",
        "rank 1 never comes back from a loader",
        inject="stuck",
        code=0,
        says=r"rank 1 has not moved for .* at block 1 step \d+",
    ),
    Fault("slow_rank_1", "rank 1 takes half a second longer in every step of block 1", inject="slow", lost=0, code=0),
    Fault("save_tensors", "kill -9 while tensors are written", inject="tensors", lost=5, code=0),
    Fault("save_rename", "kill -9 before the checkpoint's rename", inject="rename", lost=5, code=0),
    Fault("save_latest", "kill -9 between rename and latest", inject="latest", lost=5, code=0),
    Fault(
        "disk_full",
        "disk full while saving",
        _fill,
        lambda search: (search.folder / "filler").unlink(),
        lost=5,
        says="disk is full|No space left",
    ),
    Fault(
        "nan_once",
        "a loss that is not a number, once",
        inject="nan once",
        lost=0,
        same=False,
        code=0,
        says="its gradient is not finite, so it is skipped",
    ),
    Fault(
        "nan_always",
        "losses that are not numbers from then on",
        inject="nan always",
        lost=16,
        same=False,
        sets=("train.max_bad_steps=2",),
        says="train.max_bad_steps allows no more",
    ),
    Fault("torn_cut", "newest checkpoint cut in half", _kill_all, _tear("cut"), lost=6, says="is passed over"),
    Fault("torn_bit", "a bit of the newest checkpoint flipped", _kill_all, _tear("bit"), lost=6, says="is passed over"),
    Fault(
        "torn_gone", "a file of the newest checkpoint is gone", _kill_all, _tear("gone"), lost=6, says="is passed over"
    ),
    Fault("no_latest", "the file latest is gone", _kill_all, _tear("latest")),
    Fault(
        "kill_row",
        "kill -9 of row 1, schedule block_parallel",
        _by_signal(signal.SIGKILL, 1),
        code=0,
        sets=("schedule=block_parallel",),
    ),
    Fault(
        "term_row",
        "SIGTERM to torchrun, schedule block_parallel",
        _by_signal(signal.SIGTERM),
        lost=0,
        code=1,
        sets=("schedule=block_parallel",),
        says="stopped on SIGTERM at block",
    ),
]


def outcome(run: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """What a finished run is compared by: its result files, and its weights."""
    files = sorted([*(run / "ratings").glob("*.json"), run / "winners.json", run / "architecture.json"])
    weights = checkpoint.read(checkpoint.latest(run / "checkpoints"), ("online", "target", "predictors"))
    return {str(f.relative_to(run)): json.loads(f.read_text()) for f in files}, weights


@contextmanager
def small_disk(folder: Path, mebibytes: int) -> Iterator[None]:
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def undisturbed(root: Path, fault: Fault, known: dict) -> tuple[dict, dict[str, torch.Tensor]]:
    """The run of the same config that nothing happens to; made once."""
    sets = tuple(s for s in fault.sets if s.startswith("schedule"))
    key = (fault.engine, fault.ranks, sets)
    if key not in known:
        search = Search(root / f"undisturbed-{len(known)}", *key, "")
        try:
            search.start()
            search.finish(lambda: None)
        finally:
            search.clean()
        assert search.codes == [0], f"the undisturbed run fails\n{search.said()}"
        known[key] = outcome(search.run)
    return known[key]


def measure(root: Path, fault: Fault, known: dict) -> dict:
    """One row of the table."""
    truth = undisturbed(root, fault, known)
    search = Search(root / fault.name / "case", fault.engine, fault.ranks, fault.sets, fault.inject)
    try:
        search.start()
        search.reach((0, STEPS) if fault.inject else (0, 3) if search.parallel else AT)
        if search.parallel:
            while not (search.run / "checkpoints/latest").exists():  # its metrics are written before it
                time.sleep(0.01)
            time.sleep(1)  # into the steps after that checkpoint
        fault.hurt(search)
        if fault.inject in ("stuck", "tensors", "rename", "latest", "nan once", "nan always"):
            deadline = time.monotonic() + FULL_TIMEOUT
            while not (search.folder / "injected").exists():  # the rank leaves it just before
                assert time.monotonic() < deadline, f"the fault does not come\n{search.said()}"
                time.sleep(0.005)
        row = search.finish(lambda: fault.mend(search) if len(search.codes) == 1 else None)
        files, weights = outcome(search.run)
    finally:
        search.clean()
    trained = search.trained()
    if search.parallel and fault.lost:  # its steps are in metrics.jsonl only from the next checkpoint on
        row["lost"] = f"at most {fault.lost}"
    row |= {
        "name": fault.name,
        "fault": fault.what,
        "engine": fault.engine,
        "ranks": fault.ranks,
        "by": "torchrun"
        if len(row["codes"]) == 1 and row["seconds"]
        else "the command again"
        if len(row["codes"]) > 1
        else "nobody",
        "ratings_equal": files == truth[0],
        "weights_equal": weights.keys() == truth[1].keys()
        and all(torch.equal(tensor, truth[1][name]) for name, tensor in weights.items()),
    }
    said, broken = search.said(), []
    if isinstance(row["lost"], int) and row["lost"] > fault.lost:
        broken.append(f"{row['lost']} steps lost, at most {fault.lost} may be")
    if fault.same and not (row["ratings_equal"] and row["weights_equal"]):
        broken.append("the end differs from the undisturbed run's")
    if sorted(trained) != [(b, s) for b in range(BLOCKS) for s in range(1, STEPS + 1)]:
        broken.append("metrics.jsonl has steps twice or not at all")
    if not re.search(fault.says, said + (search.run / "log.txt").read_text()):
        broken.append(f"nothing says {fault.says!r}")
    if fault.code is not None and row["codes"][0] != fault.code:
        broken.append(f"exit code {row['codes'][0]}, not {fault.code}")
    if broken:
        print(said[-6000:], file=sys.stderr)
    return row | {"broken": broken}


def inject(what: str, marker: str) -> None:
    """Makes this rank do something to itself in block 1, once for each marker file."""
    from bossnas.distributed.engines import ddp
    from bossnas.supernet.train_block import sample_paths

    rank, marker = int(os.environ.get("RANK", "0")), Path(marker)
    position: dict[str, int] = {}
    draw, micro, rename, replace, fsync = (sample_paths, ddp.DDPEngine.micro, Path.rename, os.replace, os.fsync)

    def now() -> bool:
        """In block 1, from the 5th step on, whose one micro-batch each rank takes a share of."""
        return position.get("block") == 1 and position["micro"] >= AT[1] - 1

    def drawn(space, block, winners, seed, micro):  # tells where the training is
        position.update(block=block, micro=micro)
        return draw(space, block, winners, seed, micro)

    def hurt(self, loss, last):
        if what == "slow" and rank == 1 and position.get("block") == 1 and last:
            time.sleep(0.5)
        if rank == 1 and now():
            if what == "stuck" and not marker.exists():
                marker.touch()
                time.sleep(1000)
            first = what.startswith("nan") and not marker.exists()
            if first:
                marker.touch()
            if first or what == "nan always" and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0" and _mine(marker):
                loss = loss * float("nan")
        micro(self, loss, last)

    def die(point: str, name: str) -> None:
        if what == point and "block1-step000006" in name and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def renamed(self, target):
        die("rename", str(target))
        return rename(self, target)

    def replaced(source, target, **more):
        if str(target).endswith("latest") and Path(source).exists():
            die("latest", Path(source).read_text())
        return replace(source, target, **more)

    def synced(number):
        path = os.readlink(f"/proc/self/fd/{number}")
        if what == "tensors" and path.endswith(".distcp") and not marker.exists() and "block1-step000006" in path:
            os.truncate(path, os.path.getsize(path) // 2)
            die("tensors", path)
        return fsync(number)

    sample_paths, ddp.DDPEngine.micro = drawn, hurt
    Path.rename, os.replace, os.fsync = renamed, replaced, synced


_started = time.time()


def _mine(marker: Path) -> bool:
    """Whether it was this process that left the marker."""
    return marker.stat().st_mtime > _started


def table(rows: list[dict]) -> str:
    lines = [
        "| fault | engine x ranks | steps lost | seconds to go on | gone on by | exit codes | ratings equal | "
        "weights equal |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        seconds = "-" if row["seconds"] is None else f"{row['seconds']:.1f}"
        lines.append(
            f"| {row['fault']} | {row['engine']} x {row['ranks']} | {row['lost']} | {seconds} | {row['by']} | "
            f"{', '.join(map(str, row['codes']))} | {'yes' if row['ratings_equal'] else 'no'} | "
            f"{'yes' if row['weights_equal'] else 'no'} |"
        )
    return "\n".join(lines)


def main() -> None:
    if sys.argv[1:2] == ["--inject"]:
        from bossnas import cli

        inject(sys.argv[2], sys.argv[3])
        cli.main(sys.argv[4:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[fault.name for fault in FAULTS], metavar="NAME")
    parser.add_argument("--list", action="store_true", help="print the names of the faults")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--keep", type=Path, help="folder for the runs; default: a temporary one")
    options = parser.parse_args()
    if options.list:
        for fault in FAULTS:
            print(f"{fault.name:20} {fault.what}")
        return
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))  # cleans up
    root = options.keep or Path(tempfile.mkdtemp(prefix="faults-"))
    rows, left_out, known = [], [], {}
    try:
        for fault in FAULTS:
            if options.only and fault.name not in options.only:
                continue
            print(f"{fault.name}: {fault.what} ...", file=sys.stderr, flush=True)
            try:
                if fault.name != "disk_full":
                    rows.append(measure(root, fault, known))
                elif os.geteuid():
                    left_out.append(fault.name)
                    continue
                else:
                    with small_disk(root / fault.name, 64):
                        rows.append(measure(root, fault, known))
            except (AssertionError, RuntimeError) as error:
                print(f"{fault.name}: {error}", file=sys.stderr)
                left_out.append(fault.name)
                continue
            for problem in rows[-1]["broken"]:
                print(f"  broken: {problem}", file=sys.stderr, flush=True)
            if options.json:
                where = {
                    "cpus": len(os.sched_getaffinity(0)),
                    "python": platform.python_version(),
                    "torch": torch.__version__,
                }
                options.json.write_text(json.dumps({"environment": where, "rows": rows}, indent=2) + "\n")
    finally:
        if options.keep is None:
            shutil.rmtree(root, ignore_errors=True)
    print(table(rows))
    if left_out:
        print(f"\nnot measured: {', '.join(left_out)}")
    if left_out or any(row["broken"] for row in rows):
        sys.exit("broken: " + ", ".join([row["name"] for row in rows if row["broken"]] + left_out))


if __name__ == "__main__":
    main()
