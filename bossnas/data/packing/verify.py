"""Whether shards are whole: checksums, index, number of samples, and every image decodes."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from bossnas.data.images import EXTENSIONS, BadImage, decode
from bossnas.data.packing.pack import read_record, sha256
from bossnas.data.shards import OPENERS, index_shard
from bossnas.data.tars import entries
from bossnas.errors import ConfigError
from bossnas.log import progress as show_progress

AGAIN = "pack again: whole shards are kept"


def verify(out: str | Path, workers: int | None = None, progress: bool = True) -> dict:
    """Reads all shards of a folder again, ``workers`` at a time (default: one per core).

    With the ``pack.json`` of ``bossnas pack``, each is compared with it; of other shards it is checked that the tars
    are whole and that all images decode. An index that is out of date, as after copying, is no damage and is made anew.

    Returns {"shards": number, "samples": number of good ones, "checksums": whether there were any, "problems":
    [{"shard": name, "problem", "fix"}]}. Raises ConfigError for a folder without shards and a damaged pack.json.
    """
    out = Path(out)
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    if workers < 1:
        raise ConfigError("workers", f"{workers} is too small", "use 1 or more")
    record = read_record(out)
    present = [path.name for path in out.glob("*") if path.name.endswith(tuple(OPENERS)) and path.is_file()]
    made = {name: shard for name, shard in record["shards"].items() if shard["samples"]} if record else {}
    names = sorted({*present, *made})
    unfinished = record.get("unfinished", 0) if record else 0
    if not names and not unfinished:
        raise ConfigError("out", f"there are no shards in {out}", "check the path")
    problems, samples, stop = [], 0, threading.Event()
    if unfinished:
        problems.append({"shard": "pack.json", "problem": f"{unfinished} shards have not been packed", "fix": AGAIN})

    def check(name: str) -> tuple[int, dict[str, str]]:
        if record and name not in made:
            return 0, {"pack.json does not name it": AGAIN if unfinished else "move it elsewhere"}
        return _check_shard(out / name, made.get(name), AGAIN if record else "copy it again or repack it", stop)

    with show_progress("verifying, shards", len(names), show=progress) as bar, ThreadPoolExecutor(workers) as pool:
        try:
            for name, (count, found) in zip(names, pool.map(check, names), strict=True):
                samples += count
                if found:
                    problems.append(
                        {"shard": name, "problem": "; ".join(found), "fix": " and ".join(dict.fromkeys(found.values()))}
                    )
                bar.advance()
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    return {"shards": len(names), "samples": samples, "checksums": record is not None, "problems": problems}


def _check_shard(path: Path, made: dict | None, fix: str, stop: threading.Event) -> tuple[int, dict[str, str]]:
    """-> number of good samples, and {what is wrong with the shard: how to mend it}."""
    if not path.is_file():
        return 0, {"it is missing": fix}
    found, good, bad, rows = {}, 0, [], []
    try:
        if made is not None and path.stat().st_size != made["bytes"]:
            found[f"it has {path.stat().st_size} bytes instead of {made['bytes']}"] = fix
        elif made is not None and sha256(path) != made["sha256"]:
            found["its checksum differs"] = fix
        opener = next(opener for ending, opener in OPENERS.items() if path.name.endswith(ending))
        with opener(path, "rb") as file:
            for entry in entries(file, str(path), "verify", with_data=True):
                if stop.is_set():
                    break
                label = -1 if entry.label is None else entry.label
                rows.append((entry.key, entry.offset, entry.size, label, entry.ext))
                try:
                    decode(entry.data)
                    good += 1
                except BadImage as error:
                    bad.append(f"{entry.key} ({error})")
        if bad:
            found[f"{len(bad)} images do not decode, such as {bad[0]}"] = fix
        if made is not None and len(rows) != made["samples"]:
            found[f"it has {len(rows)} samples instead of {made['samples']}"] = fix
        if _rows(index_shard(path, "verify")) != rows:
            found["its index tells of other samples"] = f"remove .{path.name}.index.npz"
    except ConfigError as error:
        found[error.problem] = fix
    except OSError as error:
        found[f"it cannot be read ({error.strerror or error})"] = fix
    return good, found


def _rows(table: dict[str, np.ndarray]) -> list[tuple[str, int, int, int, str]]:
    """(key, offset, size, label, extension) of each sample of an index."""
    text, ends = table["keys"].tobytes(), table["key_end"].tolist()
    keys = [text[start:end].decode("utf-8", "surrogateescape") for start, end in zip([0, *ends], ends, strict=False)]
    columns = (table[name].tolist() for name in ("offset", "size", "label"))
    return list(zip(keys, *columns, (EXTENSIONS[i] for i in table["ext"]), strict=True))
