"""A run that is asked to stop, and one that hangs: in one process, in two, and under the launchers."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace

import pytest
import ranks

from bossnas.data import loader
from bossnas.distributed import alive, launch
from bossnas.distributed.alive import Guard
from bossnas.errors import ConfigError, Stopped

LONG = ranks.HANG / 60  # minutes: the limit of a watchdog that is not to speak


@pytest.mark.quick
@pytest.mark.parametrize("number", alive.SIGNALS)
def test_a_signal_is_heard_by_the_next_question(number, request):
    # where nohup began the tests, SIGHUP is ignored, and a guard leaves it so
    request.addfinalizer(partial(signal.signal, number, signal.signal(number, signal.SIG_DFL)))
    before = {n: signal.getsignal(n) for n in alive.SIGNALS}
    with pytest.raises(Stopped) as caught:
        with Guard(LONG) as guard:
            guard.at("block 0 step 12")
            assert not guard.should_stop() and not guard.should_stop(lag=3)
            os.kill(os.getpid(), number)
            assert guard.should_stop() and guard.should_stop(), "it stays so"
            raise guard.stopped()
    assert str(caught.value) == (
        f"stopped on {number.name} at block 0 step 12; everything is saved; go on with --resume auto"
    )
    assert {n: signal.getsignal(n) for n in alive.SIGNALS} == before


@pytest.mark.quick
def test_ctrl_c_twice_leaves_at_once_but_another_signal_in_between_does_not(capfd):
    with pytest.raises(KeyboardInterrupt), Guard(LONG) as guard:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)
        assert guard.should_stop() and guard.reason == "SIGINT", "the first one counts"
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(ranks.HANG)
    assert capfd.readouterr().err.count("saves and stops at the next step") == 1


@pytest.mark.quick
def test_dist_run_turns_it_into_an_exit_code(capfd):
    def program():
        raise Stopped("stopped on SIGTERM at block 0 step 12")

    handler = signal.getsignal(signal.SIGTERM)
    assert launch.run(program) == launch.RESUMABLE == 75
    assert capfd.readouterr().err == "stopped on SIGTERM at block 0 step 12\n"
    assert signal.getsignal(signal.SIGTERM) == handler


def test_an_error_says_where_and_a_users_mistake_does_not(capfd):
    for error, said in (
        (RuntimeError("no"), "rank 0: RuntimeError at block 1 step 2\n"),
        (ConfigError("a", "b", "c"), ""),
    ):
        with pytest.raises(type(error)), Guard(LONG) as guard:
            guard.at("block 1 step 2")
            raise error
        assert capfd.readouterr().err == said


def run(how: str, launcher: str = "torchrun") -> tuple[int, str]:
    return ranks.start(launcher, 2, "alive_worker.py", how)


def test_the_watchdog_ends_a_process_that_does_not_move():
    program = (
        "import time\nfrom bossnas.distributed.alive import Guard\n"
        f"with Guard({LONG}) as guard:\n"
        "    for step in range(3):\n        guard.at(f'block 0 step {step}')\n"
        f"    guard.timeout = 1.0; time.sleep({ranks.HANG})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=ranks.environment(), capture_output=True, text=True, timeout=ranks.HANG
    )
    assert done.returncode == 1
    assert re.search(
        r"^rank 0 has not moved for \d+\.\d s: it is at block 0 step 2, <module> \(<string>:6\)", done.stderr
    ), done.stderr


@pytest.mark.quick
def test_the_watchdog_waits_for_its_limit_after_every_move(monkeypatch, capfd):
    """By a clock that the test sets, and which counts how often the watchdog looks at it."""
    now, looks, codes = [0.0], [], []

    def clock() -> float:
        looks.append(now[0])
        return now[0]

    def passes(seconds: float) -> None:
        now[0] += seconds
        before = len(looks)
        ranks.until(lambda: len(looks) > before + 1 or codes, "the watchdog's look at the clock")

    monkeypatch.setattr(alive, "time", SimpleNamespace(monotonic=clock, sleep=lambda seconds: None))
    monkeypatch.setattr(alive.os, "_exit", lambda code: (codes.append(code), guard._left.set()))
    with Guard(0.08 / 60) as guard:  # it looks every 20 ms
        for step in range(3):
            guard.at(f"step {step}")
            passes(0.07)
        assert not codes
        passes(0.02)
    assert codes == [1] and "rank 0 has not moved for 0.1 s: it is at step 2" in capfd.readouterr().err


@pytest.mark.quick
def test_a_guard_that_was_left_watches_no_more():
    with Guard(LONG) as guard:
        pass
    for thread in guard._threads:
        thread.join(ranks.HANG)
    assert guard._threads and not [t for t in alive.threading.enumerate() if t.name.startswith("guard")]


def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Guard(LONG) as guard:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not guard.should_stop()
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("how", ["usr1", "agent"])
def test_two_ranks_stop_after_the_same_step(how):
    code, output = run(how)
    name = "SIGUSR1" if how == "usr1" else "SIGTERM"
    assert code == 1, output  # torchrun loses the ranks' 75
    assert len(re.findall(rf"^stopped on {name} at step \d+; everything is saved", output, re.M)) == 1, output
    assert "ended" not in output and "failed:" not in output and "(SIGKILL)" not in output, output
    if how == "usr1":
        assert "at step 7;" in output and output.count("exitcode  : 75") == 2, output


def test_deepspeed_passes_the_exit_code_on():
    pytest.importorskip("deepspeed")
    code, output = run("usr1", "deepspeed")
    assert code == launch.RESUMABLE and "stopped on SIGUSR1 at step 7" in output, output


def test_votes_of_ranks_that_run_apart_are_all_counted():
    code, output = run("uneven")
    assert code == 0 and output.count("ended") == 2, output


@pytest.mark.parametrize(("how", "silent"), [("freeze", 1), ("stuck", None), ("frozen store", 0)])
def test_who_waits_says_for_whom(how, silent):
    """A rank that is frozen gives no sign of life, one that is stuck says where itself."""
    program = [sys.executable, str(ranks.WORKERS / "alive_worker.py"), how]
    env = ranks.environment() | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ranks.free_port())}
    started = [
        subprocess.Popen(program, env=env | {"RANK": str(r)}, stderr=subprocess.PIPE, text=True) for r in range(2)
    ]
    try:
        errors = {r: p.communicate(timeout=ranks.HANG)[1] for r, p in enumerate(started) if r != silent}
    finally:
        for process in started:
            process.kill()
            process.communicate()
    for r, error in errors.items():
        assert started[r].returncode == 1, error
        assert re.search(rf"^rank {r} has not moved for \d+\.\d s: it is at step 5, ", error, re.M), error
    if how == "freeze":
        assert re.search(r"^  rank 1 was last seen at .*; its process gives no sign of life for \d", errors[0], re.M)
        # it waits for the other rank's answer, or for its vote of the step before
        assert re.search(r"(all_reduce_max|_count_votes) \(", errors[0]), errors[0]
    elif how == "stuck":
        assert re.search(r"^  rank 1 was last seen at step 5, \d+\.\d s ago$", errors[0], re.M), errors[0]
        assert "meet (" in errors[1], errors[1]
    else:
        assert "  of 1 ranks nothing is known: the store" in errors[1], errors[1]


def test_torchrun_starts_dead_ranks_again():
    """Rank 0 is killed in the first start, rank 1 in the second; the third finds nothing of them in the store."""
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE" not in ranks.environment()
    program = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--max-restarts",
        "2",
        "--master_port",
        str(ranks.free_port()),
        str(ranks.WORKERS / "alive_worker.py"),
        "survive",
    ]
    done = subprocess.run(program, env=ranks.environment(), capture_output=True, text=True, timeout=ranks.HANG)
    assert done.returncode == 0 and done.stdout.count("got through in start 2") == 2, done.stdout + done.stderr


def test_processes_started_by_a_loader_never_get_the_signals():
    """Also the server that forks loader processes, which nobody tells to ignore them."""
    before, heard = signal.pthread_sigmask(signal.SIG_BLOCK, ()), []
    handler = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    try:
        with loader._held_back():
            os.kill(os.getpid(), signal.SIGUSR1)
            child = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for number in loader.IGNORED:
            child.send_signal(number)
        assert child.communicate(b"still here", ranks.HANG)[0] == b"still here" and child.returncode == 0
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
        assert heard == [signal.SIGUSR1], "this process gets it afterwards"
    finally:
        signal.signal(signal.SIGUSR1, handler)
        child.kill()
        child.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.parametrize("end", ["killed", "stopped"])
@pytest.mark.parametrize("kind", ["served", "streamed"])
def test_no_loader_process_outlives_the_run_or_holds_it_up(kind, end):
    mark = f"alive-{os.getpid()}-{time.monotonic_ns()}"

    def left() -> list[str]:
        found = []
        for place in alive.Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if f"MARK={mark}" in (place / "environ").read_text(errors="replace"):
                    found.append(place.name)
        return found

    program = [sys.executable, str(ranks.WORKERS / "alive_worker.py"), kind, end]
    done = subprocess.run(program, env=ranks.environment() | {"MARK": mark}, stdout=subprocess.PIPE, timeout=ranks.HANG)
    assert done.stdout == b"loading\n" and done.returncode == (-signal.SIGKILL if end == "killed" else 75)
    ranks.until(lambda: not left(), "the end of all loader processes")


def test_ranks_whose_launcher_was_killed_save_and_stop(tmp_path):
    program = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        str(ranks.free_port()),
        str(ranks.WORKERS / "alive_worker.py"),
        "orphan",
    ]
    with open(tmp_path / "errors", "w") as errors:  # a pipe would end with the launcher
        launcher = subprocess.Popen(program, env=ranks.environment(), stderr=errors, start_new_session=True)
    try:
        launcher.wait(ranks.HANG)
        ranks.until(lambda: "stopped on SIGHUP" in (tmp_path / "errors").read_text(), "the end of the ranks")
    finally:
        launcher.kill()
        launcher.wait()
    assert launcher.returncode == -signal.SIGKILL


def test_a_rank_that_fails_says_where():
    code, output = run("error")
    assert code == 1 and "rank 1: RuntimeError at step 5" in output and "broken on purpose" in output, output


def test_all_groups_get_the_timeout():
    program = (
        "import torch.distributed as d\nfrom bossnas.distributed import dist, group\n"
        "group.ensure_group()\ngroups = [d.group.WORLD, d.new_group([0])]\ndist.set_timeout(2)\n"
        "print([g._get_backend(dist.device('cpu')).options._timeout.total_seconds() for g in groups])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=ranks.environment(), capture_output=True, text=True, timeout=ranks.HANG
    )
    assert done.stdout == "[120.0, 120.0]\n", done.stdout + done.stderr
