"""What the readers promise, tried on real shards: order and pixels, faults, memory. Prints tables; exit code 1 if one
promise is broken.

    python bench/loading.py order  --shards 'data/imagenet/train-*.tar' --cifar 'data/cifar10/train-*.tar'
    python bench/loading.py faults --shards 'data/imagenet/train-*.tar'
    MALLOC_MMAP_THRESHOLD_=131072 python bench/loading.py memory --cifar 'data/cifar10/train-*.tar' --epochs 20
    python bench/loading.py kill   --cifar 'data/cifar10/train-*.tar'

order: the global batches of an epoch, hashed, for 1, 2 and 4 ranks x 0, 1 and 2 workers in every place of
data.views_on, and taken up in mid-epoch by another number of ranks.
faults: damages copies of the shards, one fault after another, and reads them.
memory: resident memory of this process and its loaders, and open files, after every epoch.
kill: kill -9 of a process that loads, and what it leaves behind.
"""

from __future__ import annotations

import argparse
import glob
import hashlib
import io
import logging
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import numpy as np
import torch
from PIL import Image

from bossnas.config.search import DataConfig
from bossnas.data import views
from bossnas.data.batches import view_batches
from bossnas.data.order import EpochSlice, permutation
from bossnas.data.shards import ShardIndex
from bossnas.data.streams import ShardStream
from bossnas.errors import ConfigError

PLACES = ("device", "worker_crops", "worker")
broken: list[str] = []


def check(holds: bool, what: str) -> str:
    if not holds:
        broken.append(what)
    return "yes" if holds else "NO"


# ---------------------------------------------------------------------------------------------------------- order


def global_batches(
    index: ShardIndex,
    recipe: views.Recipe,
    pairs: int,
    batch: int,
    world: int,
    workers: int,
    place: str,
    steps: int,
    start: int = 0,
) -> list[str]:
    """A hash of the pixels of every global batch, from all ranks' parts in turn."""
    settings = DataConfig(workers=workers, views_on=place)
    ranks = [
        view_batches(
            index,
            views.Views(recipe, tuple(range(2 * pairs)), pairs),
            settings,
            EpochSlice(1, 3, start, steps, batch // world, rank, world),
        )
        for rank in range(world)
    ]
    hashes = []
    for parts in zip(*ranks, strict=True):
        digest = hashlib.sha256()
        for of_view in zip(*parts, strict=True):
            digest.update(torch.cat(of_view).contiguous().numpy().tobytes())
        hashes.append(digest.hexdigest())
    return hashes


def order(options: argparse.Namespace) -> None:
    sets = [
        ("ImageNet pictures", options.shards, views.recipe("imagenet", 224), 4, 40, 6),
        ("CIFAR", options.cifar, views.recipe("cifar", 32), 1, 1000, None),
    ]
    print("| set | place | ranks x workers | global batches | same pixels | taken up in mid-epoch |")
    print("|---" * 6 + "|")
    for title, shards, recipe, pairs, batch, steps in sets:
        if not shards:
            continue
        index = ShardIndex.open(shards, "--shards")
        steps = min(steps or 10**9, len(index) // batch)
        for place in PLACES:
            first = global_batches(index, recipe, pairs, batch, 1, 0, place, steps)
            for world in (1, 2, 4):
                for workers in (0, 1, 2):
                    if (world, workers) == (1, 0):
                        continue
                    found = global_batches(index, recipe, pairs, batch, world, workers, place, steps)
                    half = steps // 2
                    rest = global_batches(index, recipe, pairs, batch, world, workers, place, steps, half)
                    name = f"{title} {place} {world}x{workers}"
                    print(
                        f"| {title} | {place} | {world} x {workers} | {len(found)} of {batch} | "
                        f"{check(found == first, name)} | {check(rest == first[half:], name + ' resumed')} |",
                        flush=True,
                    )
        drawn = permutation(index, 1, 3, None)
        print(
            f"\n{title}: every sample once in an epoch: "
            f"{check(sorted(drawn.tolist()) == list(range(len(index))), title + ' once')}\n"
        )


# --------------------------------------------------------------------------------------------------------- faults


class Fault:
    """A copy of the shards in ``folder``, for one fault."""

    def __init__(self, shards: list[Path], folder: Path):
        folder.mkdir()
        self.folder = folder
        self.shards = [Path(shutil.copy(shard, folder)) for shard in shards]
        self.index = ShardIndex.open(list(map(str, self.shards)))

    def replace(self, make: Callable[[bytes], bytes]) -> None:
        """Another image in the place of the first shard's third."""
        self.rewrite(
            lambda members: [
                (name, make(content) if i == 2 else content)
                for i, (name, content) in enumerate([m for m in members if m[0].endswith("jpg")])
            ]
        )

    def rewrite(self, change: Callable[[list], list]) -> None:
        with tarfile.open(self.shards[0]) as tar:
            members = [(m.name, tar.extractfile(m).read()) for m in tar if m.isreg()]
        with tarfile.open(self.shards[0], "w") as tar:
            for name, content in change(members):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def opened(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


def rotated(content: bytes) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(opened(content).convert("RGB"), "JPEG", exif=exif)


def read_all(source, log: io.StringIO, during: Callable[[int], None] = lambda i: None) -> str:
    """An epoch of all samples in batches of 10; what became of it."""
    bad: dict[str, str] = {}
    settings = DataConfig(workers=1 if isinstance(source, ShardIndex) else 0, max_bad=0.02, buffer=10)
    taken, steps = 0, len(source) // 10
    try:
        for i, (view,) in enumerate(
            view_batches(
                source,
                views.Views(views.recipe("imagenet", 64), (0,), 4),
                settings,
                EpochSlice(0, 0, 0, steps, 10),
                bad=bad,
            )
        ):
            taken += len(view)
            during(i)
    except ConfigError as error:
        return f"stops after {taken} samples: {error}"
    said = [line for line in log.getvalue().splitlines() if line]
    return f"{taken} of {10 * steps} samples, {len(bad)} replaced" + (f"; logged: {said[0]}" if said else "")


def faults(options: argparse.Namespace) -> None:
    shards = sorted(map(Path, glob.glob(options.shards)))
    if not shards:
        raise SystemExit(f"--shards: no file matches {options.shards!r}")
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    for name in ("bossnas.data.batches", "bossnas.data.shards", "bossnas.data.streams"):
        logging.getLogger(name).addHandler(handler)
        logging.getLogger(name).propagate = False
    logging.getLogger("bossnas.data.streams").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as root:

        def fault(title: str, prepare: Callable[[Fault], None], stream: bool = True) -> None:
            here = Fault(shards, Path(root) / str(time.monotonic_ns()))
            count = len(here.index)
            prepare(here)
            names = list(map(str, here.shards))
            outcome = []
            for reader in (lambda: ShardIndex.open(names), lambda: ShardStream.open(names, images=count)):
                log.truncate(0)
                log.seek(0)
                try:
                    outcome.append(read_all(reader(), log))
                except ConfigError as error:
                    outcome.append(f"refused at the start: {error}")
            report(title, outcome if stream else outcome[:1], here.folder)

        def report(title: str, outcome: list[str], folder: Path) -> None:
            for reader, what in zip(("index", "stream"), outcome, strict=False):
                print(f"| {title} | {reader} | {what.replace(str(folder) + '/', '').replace('|', '/')} |", flush=True)
            shutil.rmtree(folder)

        def truncate(here: Fault) -> None:
            os.truncate(here.shards[0], here.shards[0].stat().st_size // 2)

        def damage(here: Fault) -> None:
            with tarfile.open(here.shards[0]) as tar:
                members = tar.getmembers()
                middle = members[len(members) // 2].offset
            with open(here.shards[0], "r+b") as file:
                file.seek(middle)
                file.write(b"\xff" * 512)

        print("| fault | reader | what happens |\n|---|---|---|")
        fault("none", lambda here: None)
        fault("truncated tar", truncate)
        fault("damaged header in mid-tar", damage)
        fault("bad JPEG", lambda here: here.replace(lambda c: c[: len(c) // 2]))
        fault("PNG named .jpg", lambda here: here.replace(lambda c: encoded(opened(c).convert("RGB"), "PNG")))
        fault("greyscale JPEG", lambda here: here.replace(lambda c: encoded(opened(c).convert("L"), "JPEG")))
        fault("CMYK JPEG", lambda here: here.replace(lambda c: encoded(opened(c).convert("CMYK"), "JPEG")))
        fault("EXIF-rotated JPEG (rotation is not applied)", lambda here: here.replace(rotated))
        fault("image of zero bytes", lambda here: here.replace(lambda c: b""))
        fault(
            "decompression bomb (PNG of 30000 x 30000)",
            lambda here: here.replace(lambda c: encoded(Image.new("1", (30000, 30000)), "PNG")),
        )
        fault("duplicate keys", lambda here: here.rewrite(lambda members: members[:4] + members[2:4] + members[4:]))
        fault(
            "a pickle among the members",
            lambda here: here.rewrite(
                lambda members: (
                    members[:2]
                    + [(members[0][0][:-4] + ".pkl", b"cos\nsystem\n(S'touch /tmp/pwned'\ntR.")]
                    + members[2:]
                )
            ),
        )

        here = Fault(shards, Path(root) / "deleted")
        index = ShardIndex.open(list(map(str, here.shards)))
        outcome = read_all(index, log, lambda i: i or here.shards[-1].unlink())
        report("a shard deleted in mid-run, after its first sample", [outcome], here.folder)
        here = Fault(shards, Path(root) / "gone")
        index = ShardIndex.open(list(map(str, here.shards)))
        here.shards[-1].unlink()
        report("a shard deleted after indexing, before its first sample", [read_all(index, log)], here.folder)

        here = Fault(shards, Path(root) / "http")
        for title, after, times in (
            ("HTTP connection dropped three times", 200_000, 3),
            ("HTTP connection always dropped at once", 0, 10**9),
        ):
            with dropping(here.folder, after, times) as url:
                urls = [f"{url}/{shard.name}" for shard in here.shards]
                log.truncate(0)
                log.seek(0)
                stream = ShardStream.open(urls, retries=3, timeout=5, backoff=0.05, images=len(here.index))
                report_http = read_all(stream, log).replace(url, "http://…")
                retries = log.getvalue().count("retry")
                print(f"| {title} | stream | {report_http}{f'; {retries} retries' if retries else ''} |", flush=True)
    if Path("/tmp/pwned").exists():
        broken.append("a pickle was run")


class dropping:
    """A web server that closes the first ``times`` answers after so many bytes."""

    def __init__(self, folder: Path, after: int, times: int):
        class Handler(SimpleHTTPRequestHandler):
            left = times

            def copyfile(self, source, outputfile):
                if self.path.endswith(".tar") and Handler.left > 0:
                    Handler.left -= 1
                    outputfile.write(source.read(after))
                    outputfile.flush()
                    self.connection.close()
                else:
                    super().copyfile(source, outputfile)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), lambda *a: Handler(*a, directory=str(folder)))
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)

    def __enter__(self) -> str:
        self.thread.start()
        return f"http://127.0.0.1:{self.server.server_port}"

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()


# --------------------------------------------------------------------------------------------------------- memory


def family(process: int) -> list[int]:
    """A process and its descendants."""
    found = [process]
    for file in Path(f"/proc/{process}/task").glob("*/children"):
        found += [pid for child in file.read_text().split() for pid in family(int(child))]
    return found


def resident_mib(process: int) -> float:
    """What a process and its descendants have written, in memory or swapped; what they share is counted once. Pages of
    files, such as libraries, are not theirs alone and are left out."""
    total = 0
    for pid in family(process):
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:  # it has ended
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:", "SwapPss:")))
    return total / 1024


def epochs(index: ShardIndex, count: int) -> Iterator[tuple[int, float, int]]:
    """After every epoch: its number, the memory in its middle (MiB), files open in this process."""
    settings = DataConfig(workers=2)
    recipe = views.recipe("cifar", 32)
    steps = len(index) // 250
    for epoch in range(count):
        memory = 0.0
        for i, _ in enumerate(
            view_batches(index, views.Views(recipe, (0, 1), 1), settings, EpochSlice(0, epoch, 0, steps, 250))
        ):
            if i == steps // 2:
                memory = resident_mib(os.getpid())
        yield epoch, memory, len(os.listdir("/proc/self/fd"))


def memory(options: argparse.Namespace) -> None:
    index = ShardIndex.open(options.cifar, "--cifar")
    print("| epoch | memory of the process and its 2 loaders, MiB | open files |\n|---|---|---|")
    rows = []
    for epoch, mib, files in epochs(index, options.epochs):
        rows.append((mib, files))
        print(f"| {epoch + 1} | {mib:.1f} | {files} |", flush=True)
    late, early = np.mean([mib for mib, _ in rows[-3:]]), np.mean([mib for mib, _ in rows[1:4]])
    print(
        f"\nlast three epochs against epochs 2 to 4: {late - early:+.1f} MiB; flat: "
        f"{check(late - early < 0.03 * early, 'memory')}; no file left open: "
        f"{check(min(files for _, files in rows[-5:]) <= min(files for _, files in rows[:5]), 'open files')}"
    )


def kill(options: argparse.Namespace) -> None:
    def held() -> tuple[set[str], set[str]]:
        return set(os.listdir("/dev/shm")), set(glob.glob("/tmp/torch_*") + glob.glob("/tmp/pymp-*"))

    before = held()
    print("| loaders | killed | gone after, s | left in /dev/shm | left in /tmp |\n|---|---|---|---|---|")
    for workers in (2, 4):
        code = (
            f"import sys; sys.argv = ['x', 'memory', '--cifar', {options.cifar!r}]; "
            f"sys.path.insert(0, {str(ROOT / 'bench')!r}); import loading; "
            "from bossnas.config.search import DataConfig; "
            f"loading.DataConfig = lambda **k: DataConfig(workers={workers}); "
            "print('go', flush=True); list(loading.epochs(loading.ShardIndex.open(sys.argv[3]), 100))"
        )
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
        process.stdout.readline()
        deadline = time.monotonic() + 60
        while len(family(process.pid)) <= workers and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(2)
        killed = family(process.pid)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        start = time.monotonic()
        while any(Path(f"/proc/{pid}").exists() for pid in killed) and time.monotonic() < start + 60:
            time.sleep(0.1)
        seconds = time.monotonic() - start
        left = [now - then for now, then in zip(held(), before, strict=True)]
        check(not any(left) and seconds < 60, f"kill with {workers} loaders")
        print(
            f"| {workers} | the run, kill -9 | {seconds:.1f} | {sorted(left[0]) or 'nothing'} | "
            f"{sorted(left[1]) or 'nothing'} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("order", "faults", "memory", "kill"))
    parser.add_argument("--shards", help="shards of ImageNet-like pictures")
    parser.add_argument("--cifar", help="shards of 32 x 32 pictures")
    parser.add_argument("--epochs", type=int, default=20, help="of memory (default 20)")
    options = parser.parse_args()
    needed = {"order": options.shards or options.cifar, "faults": options.shards}.get(options.part, options.cifar)
    if not needed:
        parser.error("--shards or --cifar: name the shards (see --help)")
    torch.set_num_threads(1)
    try:
        {"order": order, "faults": faults, "memory": memory, "kill": kill}[options.part](options)
    except ConfigError as error:
        parser.error(str(error))
    if broken:
        sys.exit("broken: " + ", ".join(broken))


if __name__ == "__main__":
    main()
