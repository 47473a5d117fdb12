"""From an image folder to WebDataset shards."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from rich.progress import MofNCompleteColumn, Progress

from bossnas.errors import ConfigError
from bossnas.images import EXTENSIONS, BadImage, decode
from bossnas.shards import ShardIndex

log = logging.getLogger("bossnas.pack")
SUFFIXES = tuple(f".{ext}" for ext in EXTENSIONS)
MEMBER_OVERHEAD = 2048  # bytes of tar headers and padding per sample, for cutting shards to size


def pack(folder: str | Path, out: str | Path, shard_mb: int = 64, progress: bool = True) -> dict:
    """Packs the JPEG, PNG and WebP files under a folder into shards of about ``shard_mb`` MiB.

    ``train/`` and ``val/`` in the folder become splits of these names; a folder without ``train/`` is all
    "train". Where the images of a split lie in class folders, the sorted names of train's class folders
    give the labels. The order is shuffled once, so that every shard is a fair sample; the image bytes are
    kept as they are. An image that cannot be decoded is left out and reported. Run again after an
    interruption, it keeps the whole shards and makes the others; ``pack.json`` in ``out`` says what is done.

    Returns {"classes": [...], "splits": {split: {"shards", "samples", "bytes"}}, "bad": [{"file",
    "problem"}], "kept": number of shards kept from an earlier run}. Raises ConfigError for a folder without
    (good) images, images beside class folders, a full disk, and an ``out`` that holds anything else.
    """
    folder, out = Path(folder), Path(out)
    if shard_mb < 1:
        raise ConfigError("shard_mb", f"{shard_mb} is too small", "use 1 or more")
    if out.resolve().is_relative_to(folder.resolve()):
        raise ConfigError("out", f"{out} lies in the image folder", "choose a folder outside of it")
    classes, plan = _plan(folder, shard_mb << 20)
    digest = hashlib.sha256(json.dumps([shard_mb, classes, plan]).encode()).hexdigest()
    done, kept = _earlier(out, digest), 0
    try:
        out.mkdir(parents=True, exist_ok=True)
        _record(out, digest, done)  # before the first shard, which a later run then knows as ours
        with ThreadPoolExecutor() as pool, Progress(*Progress.get_default_columns(), MofNCompleteColumn(),
                                                    disable=not progress) as bar:
            task = bar.add_task("images", total=sum(map(len, plan.values())))
            for name, files in plan.items():
                if name in done and _is_whole(out / name, done[name]):
                    kept += 1
                else:
                    samples = pool.map(_read, (folder / file for file, *_ in files))
                    done[name] = write_shard(out / name, zip(files, samples, strict=True))
                    _record(out, digest, done)
                bar.advance(task, len(files))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise ConfigError("out", f"no room left in {out}",
                          "free some and run again, or choose another disk") from None
    bad = [entry for shard in done.values() for entry in shard["bad"]]
    for entry in bad:
        log.warning("left out %s: %s", entry["file"], entry["problem"])
    splits = {}
    for split in ("train", "val"):
        shards = [shard for name, shard in done.items() if name.startswith(split) and shard["samples"]]
        if shards:
            splits[split] = {"shards": len(shards), "samples": sum(shard["samples"] for shard in shards),
                             "bytes": sum(shard["bytes"] for shard in shards)}
    if "train" not in splits:
        raise ConfigError("folder", f"none of the {len(bad)} images in {folder} can be decoded",
                          "check the files, starting with " + bad[0]["file"])
    return {"classes": classes, "splits": splits, "bad": bad, "kept": kept}


def write_shard(path: Path, samples: Iterable[tuple[tuple, tuple[bytes, str | None]]]) -> dict:
    """Writes one tar under another name and renames it, so that a shard is whole or absent.

    ``samples``: ((file, key, label or -1, ...), (bytes, what is wrong with them or None)). The same samples
    give the same bytes. Returns {"samples", "bytes", "bad"}; a shard without a good sample is not written.
    """
    os.environ.setdefault("WDS_SECURE", "1")  # read at the import: no pipes, no pickles
    import webdataset

    count, bad = 0, []
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            with webdataset.TarWriter(file, encoder=False, user="", group="", mode=0o644, mtime=0,
                                      format="PAX_FORMAT") as tar:
                for (name, key, label, *_), (data, problem) in samples:
                    if problem is not None:
                        bad.append({"file": name, "problem": problem})
                        continue
                    sample = {"__key__": key, name.rsplit(".", 1)[1].lower(): data}
                    tar.write(sample | ({} if label < 0 else {"cls": str(label).encode()}))
                    count += 1
            file.flush()
            os.fsync(file.fileno())
        size = temporary.stat().st_size
        if count:
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return {"samples": count, "bytes": size if count else 0, "bad": bad}


def _plan(folder: Path, limit: int) -> tuple[list[str], dict[str, list[tuple[str, str, int, int]]]]:
    """The classes, and for each shard its files: (path in the folder, key, label or -1, bytes)."""
    classes: list[str] = []
    plan: dict[str, list] = {}
    has_splits = (folder / "train").is_dir()
    for split in ("train", "val") if has_splits else ("train",):
        root = folder / split if has_splits else folder
        names = sorted(_walk(root))
        if not names and split == "train":
            raise ConfigError("folder", f"no {', '.join(EXTENSIONS)} file under {root}", "check the path")
        tops = [name.split("/")[0] if "/" in name else None for name in names]
        if None in tops and any(tops):
            raise ConfigError("folder", f"{root / names[tops.index(None)]} lies beside class folders",
                              "move it into one, or remove it")
        if split == "train":
            classes = sorted({top for top in tops if top})
        unknown = {top for top in tops if top} - set(classes)
        if unknown:
            raise ConfigError("folder", f"{root} has class folders that train lacks, such as {min(unknown)}",
                              "give both splits the same class folders")
        keys, labels = _keys(names), {name: number for number, name in enumerate(classes)}
        size = limit
        for i in np.random.Generator(np.random.PCG64(0)).permutation(len(names)):
            name = names[i]
            length = os.path.getsize(root / name)
            if size + length + MEMBER_OVERHEAD > limit:
                number = sum(shard.startswith(split) for shard in plan)
                shard, size = plan.setdefault(f"{split}-{number:06d}.tar", []), 0
            size += length + MEMBER_OVERHEAD
            file = f"{split}/{name}" if has_splits else name
            shard.append((file, keys[i], labels.get(tops[i], -1), length))
    return classes, plan


def _walk(root: Path) -> Iterable[str]:
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield os.path.relpath(os.path.join(folder, name), root).replace(os.sep, "/")


def _keys(names: list[str]) -> list[str]:
    """Sample keys: the names without extension and, as WebDataset asks, without dots; all different."""
    keys, used = [], set()
    for name in names:
        head, _, base = name.rsplit(".", 1)[0].rpartition("/")
        stem = key = f"{head}/{base.replace('.', '_')}" if head else base.replace(".", "_")
        number = 1
        while key in used:
            number += 1
            key = f"{stem}_{number}"
        used.add(key)
        keys.append(key)
    return keys


def _earlier(out: Path, digest: str) -> dict[str, dict]:
    """The shards that an earlier run of the same plan recorded."""
    record = {"plan": None, "shards": {}}
    if (out / "pack.json").exists():
        try:
            record = json.loads((out / "pack.json").read_text())
        except ValueError:
            raise ConfigError("out", f"{out / 'pack.json'} is damaged", "choose an empty folder") from None
    if record["plan"] == digest:
        return record["shards"]
    if record["shards"] or any(out.glob("*.tar")):
        raise ConfigError("out", f"{out} holds shards of other images or of another shard size",
                          "choose an empty folder, or remove them")
    return {}


def _is_whole(path: Path, made: dict) -> bool:
    if not made["samples"]:
        return True
    try:
        return len(ShardIndex.open([str(path)], "out")) == made["samples"]
    except ConfigError as error:
        log.warning("%s is made again (%s)", path, error)
        return False


def _read(path: Path) -> tuple[bytes, str | None]:
    try:
        data = path.read_bytes()
        decode(data)
    except (OSError, BadImage) as error:
        return b"", str(error)
    return data, None


def _record(out: Path, digest: str, done: dict[str, dict]) -> None:
    temporary = out / ".pack.json.tmp"
    temporary.write_text(json.dumps({"plan": digest, "shards": done}))
    os.replace(temporary, out / "pack.json")
