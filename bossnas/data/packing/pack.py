"""From sets of images to WebDataset shards, with an index beside each, checksums and a record of what is done."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np

from bossnas.data.images import BadImage, decode
from bossnas.data.packing.cifar import cifar, find_cifar
from bossnas.data.packing.image_sets import ImageFile, ImageSet, image_folder
from bossnas.data.packing.imagenet import imagenet, looks_like_imagenet
from bossnas.data.shards import index_shard
from bossnas.errors import ConfigError
from bossnas.files import Abandoned, draft, write_text
from bossnas.log import progress as show_progress

log = logging.getLogger("bossnas.data.packing.pack")
KINDS = ("auto", "folder", "imagenet", "cifar10", "cifar100")
MEMBER_OVERHEAD = 2048  # bytes of tar headers and padding per sample, for cutting shards to size
PROGRESS_EVERY = 16  # images
MADE = {"samples", "bytes", "sha256", "bad"}  # what is recorded of a shard
RECORD, SUMS = "pack.json", "SHA256SUMS"


def pack(
    folder: str | Path,
    out: str | Path,
    shard_mb: int = 64,
    progress: bool = True,
    *,
    kind: str = "auto",
    val_labels: str | Path | None = None,
    workers: int | None = None,
) -> dict:
    """Packs a set of images into shards ``train-000000.tar`` ... and ``val-000000.tar`` ... of about ``shard_mb`` MiB.

    ``kind``: folder (any tree of JPEG, PNG and WebP files), imagenet, cifar10, cifar100, or auto, which looks. The
    order is shuffled once, so that every shard is a fair sample; the bytes of image files are kept as they are. An
    image that cannot be decoded, or is absurdly large, is left out and reported. ``workers`` threads (default: one per
    core) make one shard each at a time; their number changes no byte. Run again after an interruption, it keeps the
    shards whose checksum is right and makes the others. ``pack.json`` in ``out`` says what is done (docs/packing.md).

    Returns {"kind", "classes": [...], "splits": {split: {"shards", "samples", "bytes"}}, "bad": [{"file", "problem"}],
    "kept": number of shards kept from an earlier run}. Raises ConfigError for a folder without (good) images and
    whatever else is wrong with it, a full disk, and an ``out`` that holds anything else or is being written.
    """
    folder, out = Path(folder), Path(out)
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    for name, number in (("shard_mb", shard_mb), ("workers", workers)):
        if number < 1:
            raise ConfigError(name, f"{number} is too small", "use 1 or more")
    if out.resolve().is_relative_to(folder.resolve()):
        raise ConfigError("out", f"{out} lies in the image folder", "choose a folder outside of it")
    source = open_source(folder, kind, None if val_labels is None else Path(val_labels), progress)
    plan = _plan(source, shard_mb << 20)
    record = {"plan": _digest(shard_mb, source, plan), "kind": source.kind, "classes": source.classes}
    with _owned(out):
        done, kept = _make(plan, source, out, record, workers, progress)
    bad = [entry for shard in done.values() for entry in shard["bad"]]
    for entry in bad:
        log.warning("left out %s: %s", entry["file"], entry["problem"])
    splits = _splits(done)
    if "train" not in splits:
        raise ConfigError(
            "folder",
            f"none of the {len(bad)} images in {folder} can be decoded",
            "check the files, starting with " + bad[0]["file"],
        )
    return {"kind": source.kind, "classes": source.classes, "splits": splits, "bad": bad, "kept": kept}


def open_source(folder: Path, kind: str = "auto", val_labels: Path | None = None, show: bool = False) -> ImageSet:
    """The set of images in ``folder``, which may be CIFAR's archive as well. ``kind`` as for ``pack``."""
    if kind not in KINDS:
        raise ConfigError("kind", f"{kind!r} is not known", f"choose {', '.join(KINDS)}")
    if not folder.exists():
        raise ConfigError("folder", f"there is no {folder}", "check the path")
    found = find_cifar(folder)
    if kind == "auto":
        if len(found) > 1:
            raise ConfigError("kind", f"{folder} holds CIFAR-10 and CIFAR-100", "choose cifar10 or cifar100")
        is_imagenet = not found and folder.is_dir() and (val_labels is not None or looks_like_imagenet(folder))
        kind = next(iter(found), "imagenet" if is_imagenet else "folder")
        log.info("%s is packed as %s", folder, kind)
    if val_labels is not None and kind != "imagenet":
        raise ConfigError(
            "val_labels", f"serves ImageNet's layout, and this is {kind}", "leave it out, or give `kind` imagenet"
        )
    if kind in ("cifar10", "cifar100"):
        if kind not in found:
            raise ConfigError(
                "folder", f"no {kind} in {folder}", "name the folder of torchvision's download, or the archive"
            )
        return cifar(found[kind], kind)
    if not folder.is_dir():
        raise ConfigError("folder", f"{folder} is no folder", "name a folder, or CIFAR's archive")
    return image_folder(folder) if kind == "folder" else imagenet(folder, val_labels, show)


def write_shard(path: Path, samples: Iterable[tuple[tuple, tuple[bytes, str | None]]]) -> dict:
    """Writes one tar under another name and renames it, so that a shard is whole or absent.

    ``samples``: ((file, key, label or -1, ...), (bytes, what is wrong with them or None)). The same samples give the
    same bytes. Returns {"samples", "bytes", "sha256", "bad"}; a shard without a good sample is not written.
    """
    os.environ.setdefault("WDS_SECURE", "1")  # read at the import: no pipes, no pickles
    import webdataset

    count, bad = 0, []
    with draft(path) as made:
        with open(made, "wb") as file:
            hashed = _Hashed(file)
            with webdataset.TarWriter(
                hashed, encoder=False, user="", group="", mode=0o644, mtime=0, format="PAX_FORMAT"
            ) as tar:
                for (name, key, label, *_), (data, problem) in samples:
                    if problem is not None:
                        bad.append({"file": name, "problem": problem})
                        continue
                    sample = {"__key__": key, name.rsplit(".", 1)[1].lower(): data}
                    tar.write(sample | ({} if label < 0 else {"cls": str(label).encode()}))
                    count += 1
        if not count:
            raise Abandoned
    if not count:
        return {"samples": 0, "bytes": 0, "sha256": None, "bad": bad}
    return {"samples": count, "bytes": path.stat().st_size, "sha256": hashed.digest.hexdigest(), "bad": bad}


def sha256(path: Path) -> str:
    """The checksum of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_record(out: Path) -> dict | None:
    """What ``pack.json`` in ``out`` says, or None without it. Raises ConfigError when it is damaged."""
    try:
        record = json.loads((out / RECORD).read_text(encoding="utf-8"))
        if isinstance(record["plan"], str) and all(MADE <= shard.keys() for shard in record["shards"].values()):
            return record
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise ConfigError("out", f"{out / RECORD} is damaged", "pack again, into an empty folder")


class _Hashed:
    """A file that is hashed as it is written."""

    def __init__(self, file):
        self.file, self.digest = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self.file.write(data)


class _Stopped(Exception):
    """Another shard has failed or Ctrl-C was pressed: this one is not finished."""


def _plan(source: ImageSet, limit: int) -> dict[str, list[ImageFile]]:
    """For each shard its items, in shuffled order."""
    plan: dict[str, list[ImageFile]] = {}
    for split, items in source.splits.items():
        size, number = limit, 0
        for i in np.random.Generator(np.random.PCG64(0)).permutation(len(items)):
            length = items[i].size + MEMBER_OVERHEAD
            if size + length > limit:
                shard = plan.setdefault(f"{split}-{number:06d}.tar", [])
                size, number = 0, number + 1
            size += length
            shard.append(items[i])
    return plan


def _digest(shard_mb: int, source: ImageSet, plan: dict[str, list[ImageFile]]) -> str:
    digest = hashlib.sha256(json.dumps([shard_mb, source.classes, source.fingerprint]).encode())
    for name, items in plan.items():
        digest.update(json.dumps([name, items]).encode())
    return digest.hexdigest()


def _make(
    plan: dict[str, list[ImageFile]],
    source: ImageSet,
    out: Path,
    record: dict,
    workers: int,
    show: bool,
) -> tuple[dict[str, dict], int]:
    """Makes the shards that are not whole. -> {name: what write_shard says} in plan order, number of those kept."""
    earlier = _earlier(out, record["plan"])
    done, kept = dict(earlier), []
    stop, lock = threading.Event(), threading.Lock()

    def make(name: str) -> dict:
        if name in earlier and _is_whole(out / name, earlier[name]):
            kept.append(name)
            advance(len(plan[name]))
            made = earlier[name]
        else:
            made = write_shard(out / name, zip(plan[name], _read(plan[name], source.read, stop, advance), strict=True))
        if made["samples"]:
            index_shard(out / name, "out")
        return made

    def advance(count: int) -> None:
        with lock:
            bar.advance(count=count)

    def save() -> None:
        shards = {name: done[name] for name in plan if name in done}
        head = {**record, "unfinished": len(plan) - len(shards), "splits": _splits(shards)}
        lines = [f"{json.dumps(field)}: {json.dumps(value)}" for field, value in head.items()]
        rows = [f"  {json.dumps(name)}: {json.dumps(made)}" for name, made in shards.items()]
        lines.append('"shards": {\n' + ",\n".join(rows) + "\n}")
        write_text(out / RECORD, "{" + ",\n".join(lines) + "}\n")

    for leftover in out.glob(".*.tmp"):  # of a run that was killed; nobody else packs into this folder
        leftover.unlink(missing_ok=True)
    try:
        save()  # before the first shard, which a later run then knows as ours
        with (
            show_progress("packing, images", sum(map(len, plan.values())), show=show) as bar,
            ThreadPoolExecutor(workers) as pool,
        ):
            names: dict[Future, str] = {}
            try:
                for name in plan:
                    names[pool.submit(make, name)] = name
                for future in as_completed(names):
                    done[names[future]] = future.result()
                    save()
            except BaseException:
                stop.set()
                pool.shutdown(cancel_futures=True)
                done |= {names[future]: future.result() for future in names if _has_made(future)}
                save()
                raise
        done = {name: done[name] for name in plan}
        write_text(out / SUMS, "".join(f"{made['sha256']}  {name}\n" for name, made in done.items() if made["samples"]))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise ConfigError("out", f"no room left in {out}", "free some and run again, or choose another disk") from None
    return done, len(kept)


def _has_made(future: Future) -> bool:
    return not future.cancelled() and future.exception() is None


def _read(
    items: list[ImageFile],
    read: Callable[[ImageFile], bytes],
    stop: threading.Event,
    advance: Callable[[int], None],
) -> Iterator[tuple[bytes, str | None]]:
    """For each item its file's bytes and None, or nothing and what is wrong with them."""
    for number, item in enumerate(items, 1):
        if stop.is_set():
            raise _Stopped
        problem = None
        try:
            data = read(item)
            decode(data)
        except BadImage as error:
            data, problem = b"", str(error)
        except OSError as error:  # not the image's fault: it may be readable the next time
            raise ConfigError(
                "folder", f"{item.file} cannot be read ({error.strerror or error})", "mend or remove it, and run again"
            ) from None
        if number % PROGRESS_EVERY == 0 or number == len(items):
            advance((number - 1) % PROGRESS_EVERY + 1)
        yield data, problem


@contextlib.contextmanager
def _owned(out: Path) -> Iterator[None]:
    """Makes the folder, and keeps other packings out of it as long as this one runs."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = os.open(out, os.O_RDONLY)
    except OSError as error:
        raise ConfigError("out", f"cannot make {out} ({error.strerror})", "choose another folder") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise ConfigError("out", f"another bossnas pack is writing to {out}", "wait for its end, or end it") from None
    except OSError as error:  # some network file systems cannot
        log.debug("%s cannot be locked (%s)", out, error)
    try:
        yield
    finally:
        os.close(lock)


def _earlier(out: Path, plan: str) -> dict[str, dict]:
    """The shards that an earlier run of the same plan recorded."""
    record = read_record(out) or {"plan": None, "shards": {}}
    if record["plan"] == plan:
        return record["shards"]
    if record["shards"] or any(out.glob("*.tar")):
        raise ConfigError(
            "out",
            f"{out} holds shards of other images or of another shard size",
            "choose an empty folder, or remove them",
        )
    return {}


def _is_whole(path: Path, made: dict) -> bool:
    if not made["samples"]:
        return True
    if path.is_file() and path.stat().st_size == made["bytes"] and sha256(path) == made["sha256"]:
        return True
    log.warning("%s is missing or damaged and is made again", path)
    return False


def _splits(shards: dict[str, dict]) -> dict[str, dict]:
    """{split: {"shards", "samples", "bytes"}}, of splits that have samples."""
    splits: dict[str, dict] = {}
    for name, shard in shards.items():
        if shard["samples"]:
            split = splits.setdefault(name.split("-")[0], {"shards": 0, "samples": 0, "bytes": 0})
            for field, amount in (("shards", 1), ("samples", shard["samples"]), ("bytes", shard["bytes"])):
                split[field] += amount
    return splits
