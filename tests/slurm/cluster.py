"""A SLURM of two nodes on this machine, with munge, sockets, ports and folders of its own.

Both nodes are daemons on the loopback device. The partition `hi` preempts `main` by requeueing.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path

from ranks import HANG, until

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel", "sinfo", "squeue")
SEARCH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))  # where Debian puts the daemons
KILL_WAIT = 20  # seconds from SIGTERM to SIGKILL
EVERY = 0.3  # seconds between two questions to SLURM
NODES = ("n1", "n2")

CONF = """
ClusterName=bossnas
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={ports[0]}
AuthType=auth/munge
CredType=cred/munge
# A requeued job may begin again once its old credential has run out.
AuthInfo=socket={folder}/munge.socket,cred_expire=8
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait={kill_wait}
# A node that was down stays so until it is resumed.
ReturnToService=0
# Seconds until a node that does not answer is down.
SlurmdTimeout=30
SchedulerParameters=sched_interval=2,bf_interval=2
SlurmdParameters=config_overrides
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[2]}] CPUs=2 State=UNKNOWN
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=hi Nodes=n[1-2] MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing() -> list[str]:
    """The programs that are not installed."""
    return [name for name in PROGRAMS if shutil.which(name, path=SEARCH) is None]


class Cluster:
    """``with Cluster(folder) as cluster``: runs while the block does. ``folder``: its own, with a short name, since it
    holds sockets."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.daemons: list[subprocess.Popen] = []
        self.conf = folder / "slurm.conf"
        self.env = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        self.env |= {"SLURM_CONF": str(self.conf), "PATH": SEARCH}

    def __enter__(self) -> Cluster:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(Exception):
            for job in self.command("squeue", "--noheader", "--format=%A").split():
                self.command("scancel", "--full", "--signal=KILL", job)
                self.command("scancel", job)
            until(lambda: not self.command("squeue", "--noheader"), "no job is left", every=EVERY)
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in reversed(self.daemons):
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for process, _ in self._processes():  # what outlived the daemons
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def command(self, name: str, *arguments: str, check: bool = True, env: dict[str, str] | None = None) -> str:
        """What one of SLURM's commands prints. ``env``: more of the environment, which a submitted job gets too."""
        done = subprocess.run(
            [name, *arguments], env=self.env | (env or {}), text=True, capture_output=True, timeout=HANG, check=False
        )
        assert not check or done.returncode == 0, f"{name} {' '.join(arguments)}: {done.stderr or done.stdout}"
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """The job's record, as `scontrol show job` has it."""
        text = self.command("scontrol", "show", "job", "--oneliner", number)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def tasks(self, number: str, rank: int) -> list[int]:
        """The processes of a rank of a running job."""
        return [
            process
            for process, env in self._processes()
            if env.get("SLURM_JOB_ID") == number
            and env.get("SLURM_PROCID") == str(rank)
            and b"launch/train.py" in Path(f"/proc/{process}/cmdline").read_bytes()
            and "SLURM_STEP_ID" in env
        ]

    def start_node(self, node: str) -> None:
        self._daemon("slurmd", "-D", "-f", str(self.conf), "-N", node)

    def resume(self, node: str) -> None:
        """Takes a node that was down into service again, once it answers."""

        def is_up() -> bool:
            self.command("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)
            state = self.command("sinfo", "--noheader", "--partition=main", f"--nodes={node}", "--format=%T")
            return state in ("idle", "mixed")

        until(is_up, f"{node} is up", every=EVERY)

    def crash_node(self, node: str, number: str, rank: int) -> None:
        """Kills the node's daemon, and what it runs of a job: one rank and SLURM's keeper of it."""
        daemon = next(d for d in self.daemons if d.args[-1] == node)
        victims = self.tasks(number, rank)
        keepers = [int(Path(f"/proc/{victim}/stat").read_text().rpartition(")")[2].split()[1]) for victim in victims]
        self.daemons.remove(daemon)
        daemon.kill()
        daemon.wait()
        for process in keepers + victims:
            os.kill(process, signal.SIGKILL)

    def _start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir()
        self.conf.write_text(
            CONF.format(
                folder=self.folder,
                host=socket.gethostname().split(".")[0],
                user=getpass.getuser(),
                ports=_three_ports(),
                kill_wait=KILL_WAIT,
            )
        )
        self._daemon(
            "munged",
            "--force",
            "--foreground",
            f"--key-file={key}",
            *(f"--{kind}-file={self.folder}/munge.{kind}" for kind in ("pid", "log", "seed")),
            f"--socket={self.folder}/munge.socket",
        )
        until((self.folder / "munge.socket").exists, "munged's socket", every=EVERY)
        self._daemon("slurmctld", "-D", "-i", "-c", "-f", str(self.conf))
        for node in NODES:
            self.start_node(node)
        until(self._idle, "both nodes are idle", every=EVERY)

    def _daemon(self, name: str, *arguments: str) -> None:
        program = shutil.which(name, path=SEARCH)
        assert program is not None
        with (self.folder / f"{name}-{len(self.daemons)}.out").open("w") as out:
            self.daemons.append(
                subprocess.Popen(
                    [program, *arguments],
                    env=self.env,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )

    def _idle(self) -> bool:
        for daemon in self.daemons:
            assert daemon.poll() is None, f"{daemon.args} ended with {daemon.returncode}, see {self.folder}"
        states = self.command("sinfo", "--noheader", "--Node", "--partition=main", "--format=%T", check=False)
        return states.split() == ["idle", "idle"]

    def _processes(self) -> list[tuple[int, dict[str, str]]]:
        """Processes that carry this cluster's config in their environment: its jobs and their keepers."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (process / "environ").read_text(errors="replace").split("\0")
                env = dict(word.split("=", 1) for word in words if "=" in word)
                if env.get("SLURM_CONF") == str(self.conf) and int(process.name) != os.getpid():
                    found.append((int(process.name), env))
        return found


def _three_ports() -> list[int]:
    """Three free ports; the second and third follow each other, as a range of nodes wants them."""
    while True:
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            probes = [stack.enter_context(socket.socket()) for _ in range(3)]
            for probe in probes[:2]:
                probe.bind(("127.0.0.1", 0))
            first, second = (probe.getsockname()[1] for probe in probes[:2])
            probes[2].bind(("127.0.0.1", second + 1))
            return [first, second, second + 1]
