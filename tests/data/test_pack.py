"""Packing images into shards and verifying them: what comes out, resuming, and what is refused."""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from ranks import HANG, until

from bossnas.data.images import MAX_PIXELS
from bossnas.data.packing.pack import pack, write_shard
from bossnas.data.packing.verify import verify
from bossnas.data.shards import ShardIndex
from bossnas.errors import ConfigError


def picture(seed: int, ext: str = "png", size: tuple[int, int] = (12, 9)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, {"jpg": "JPEG"}.get(ext, ext.upper()))
    return file.getvalue()


def image_folder(root: Path, classes: tuple[str, ...] = ("cat", "dog"), each: int = 6) -> Path:
    for c, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(each):
            (root / name / f"image.{i}.{'JPG' if i % 2 else 'png'}").write_bytes(
                picture(100 * c + i, "jpg" if i % 2 else "png", size=(300, 300))
            )
    return root


@pytest.mark.quick
def test_pack_and_read_back(tmp_path):
    image_folder(tmp_path / "images" / "train")
    image_folder(tmp_path / "images" / "val", ("dog",), 3)
    (tmp_path / "images" / "train" / "cat" / "._image.0.png").write_bytes(b"not an image: a file of macOS")
    summary = pack(tmp_path / "images", tmp_path / "out", shard_mb=1, progress=False)
    assert summary["classes"] == ["cat", "dog"] and summary["bad"] == [] and summary["kept"] == 0
    assert summary["splits"]["train"]["samples"] == 12 and summary["splits"]["val"]["samples"] == 3
    assert summary["splits"]["train"]["shards"] > 1
    index = ShardIndex.open(str(tmp_path / "out" / "train-*.tar"))
    assert sum(path.stat().st_size for path in index.shards) == summary["splits"]["train"]["bytes"]
    assert all(path.stat().st_size < 1.1 * 2**20 for path in index.shards)
    found = {index.key(i): index.read(i) for i in range(len(index))}
    assert len(found) == 12
    for label, name in enumerate(("cat", "dog")):
        for i in range(6):
            file = f"image.{i}.{'JPG' if i % 2 else 'png'}"
            expected = (tmp_path / "images" / "train" / name / file).read_bytes()
            assert found[f"{name}/image_{i}"] == (expected, file[-3:].lower(), label)
    val = ShardIndex.open(str(tmp_path / "out" / "val-*.tar"))
    assert {val.read(i)[2] for i in range(3)} == {1}


def test_webdataset_reads_packed_shards(tmp_path, monkeypatch):
    monkeypatch.setenv("WDS_SECURE", "1")
    import webdataset

    pack(image_folder(tmp_path / "images"), tmp_path / "out", progress=False)
    shard = str(tmp_path / "out" / "train-000000.tar")
    index = ShardIndex.open(shard)
    samples = list(webdataset.WebDataset(shard, shardshuffle=False))
    assert [s["__key__"] for s in samples] == [index.key(i) for i in range(12)]
    for i, sample in enumerate(samples):
        data, ext, label = index.read(i)
        assert sample[ext] == data and int(sample["cls"]) == label


def test_pack_without_classes_and_with_bad_images(tmp_path, caplog):
    images = tmp_path / "images"
    images.mkdir()
    for i in range(4):
        (images / f"{i}.png").write_bytes(picture(i))
    (images / "2.jpg").write_bytes(picture(2, "jpg"))
    (images / "torn.png").write_bytes(picture(9)[:60])
    summary = pack(images, tmp_path / "out", progress=False)
    assert [entry["file"] for entry in summary["bad"]] == ["torn.png"] and "torn.png" in caplog.text
    index = ShardIndex.open(str(tmp_path / "out" / "*.tar"))
    assert sorted(index.key(i) for i in range(5)) == ["0", "1", "2", "2_2", "3"] and len(index) == 5
    assert {index.read(i)[2] for i in range(5)} == {None}


@pytest.mark.quick
def test_pack_resumes_and_redoes_a_torn_shard(tmp_path):
    image_folder(tmp_path / "images", each=12)
    pack(tmp_path / "images", tmp_path / "whole", 1, progress=False)
    made = {path.name: path.read_bytes() for path in (tmp_path / "whole").glob("*.tar")}
    assert len(made) >= 4
    out = tmp_path / "out"
    pack(tmp_path / "images", out, 1, progress=False)
    torn, damaged, lost, untold = sorted(made)[:4]
    os.truncate(out / torn, 5000)
    data = bytearray(made[damaged])
    data[20] ^= 0xFF
    (out / damaged).write_bytes(data)
    (out / lost).unlink()
    record = json.loads((out / "pack.json").read_text())
    del record["shards"][untold]  # stopped after the shard, before the record
    (out / "pack.json").write_text(json.dumps(record))
    summary = pack(tmp_path / "images", out, 1, progress=False)
    assert summary["kept"] == len(made) - 4 and summary["splits"]["train"]["samples"] == 24
    assert {path.name: path.read_bytes() for path in out.glob("*.tar")} == made
    assert pack(tmp_path / "images", out, 1, progress=False)["kept"] == len(made)


def test_pack_stopped_in_the_first_shard_resumes(tmp_path, monkeypatch):
    image_folder(tmp_path / "images")

    synced = []

    def stop(_):
        synced.append(1)
        if len(synced) > 1:  # after pack.json, every shard
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "fsync", stop)
        pack(tmp_path / "images", tmp_path / "out", 1, progress=False)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["pack.json"]
    assert pack(tmp_path / "images", tmp_path / "out", 1, progress=False)["splits"]["train"]["samples"] == 12


@pytest.mark.quick
def test_pack_refuses_to_overwrite(tmp_path):
    image_folder(tmp_path / "images")
    pack(tmp_path / "images", tmp_path / "out", progress=False)
    before = (tmp_path / "out" / "train-000000.tar").read_bytes()
    with pytest.raises(ConfigError, match="out: .* holds shards of other images"):
        pack(tmp_path / "images", tmp_path / "out", 2, progress=False)
    (tmp_path / "images" / "cat" / "new.png").write_bytes(picture(77))
    with pytest.raises(ConfigError, match="out: .* holds shards of other images"):
        pack(tmp_path / "images", tmp_path / "out", progress=False)
    (tmp_path / "foreign.tar").touch()
    with pytest.raises(ConfigError, match="out: .* holds shards of other images"):
        pack(tmp_path / "images", tmp_path, progress=False)
    assert (tmp_path / "out" / "train-000000.tar").read_bytes() == before


def test_pack_names_what_is_wrong(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="folder: there is no "):
        pack(tmp_path / "absent", tmp_path / "out", progress=False)
    images = image_folder(tmp_path / "images")
    with pytest.raises(ConfigError, match="shard_mb: 0 is too small"):
        pack(images, tmp_path / "out", 0, progress=False)
    with pytest.raises(ConfigError, match="workers: 0 is too small"):
        pack(images, tmp_path / "out", workers=0, progress=False)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="out: cannot make .*file"):
        pack(images, tmp_path / "file", progress=False)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(ConfigError, match="out: no room left"):
        patch.setattr(os, "fsync", full)
        pack(images, tmp_path / "full", progress=False)
    (images / "stray.png").write_bytes(picture(0))
    with pytest.raises(ConfigError, match="stray.png lies beside class folders"):
        pack(images, tmp_path / "out", progress=False)
    image_folder(tmp_path / "two" / "train")
    image_folder(tmp_path / "two" / "val", ("cow",))
    with pytest.raises(ConfigError, match="class folders that train lacks, such as cow"):
        pack(tmp_path / "two", tmp_path / "out", progress=False)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"?")
    with pytest.raises(ConfigError, match="none of the 1 images"):
        pack(tmp_path / "bad", tmp_path / "out", progress=False)


def test_the_shards_may_not_lie_among_the_images(tmp_path):
    for out in (tmp_path, tmp_path / "shards"):
        with pytest.raises(ConfigError, match="out: .* lies in the image folder"):
            pack(tmp_path, out, progress=False)


def many_images(root: Path, count: int = 90) -> Path:
    """Links to a few files of noise: 260 kB each, so that shards of 1 MiB hold three."""
    (root / "a").mkdir(parents=True)
    for i in range(6):
        (root / "a" / f"{i}.png").write_bytes(picture(i, size=(300, 300)))
    for i in range(6, count):
        os.link(root / "a" / f"{i % 6}.png", root / "a" / f"{i}.png")
    return root


def recorded(out: Path) -> int:
    file = out / "pack.json"
    return len(json.loads(file.read_text())["shards"]) if file.exists() else 0


def contents(out: Path) -> dict[str, bytes]:
    """All that packing promises to the byte; the indices hold the time of the shards."""
    return {path.name: path.read_bytes() for path in out.iterdir() if not path.name.endswith(".index.npz")}


def test_any_number_of_workers_makes_the_same_bytes(tmp_path):
    image_folder(tmp_path / "images", each=12)
    (tmp_path / "images" / "cat" / "torn.png").write_bytes(picture(9)[:60])
    for workers in (1, 2, 7):
        pack(tmp_path / "images", tmp_path / str(workers), 1, progress=False, workers=workers)
    assert len(contents(tmp_path / "1")) >= 6
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "7")


def test_record_checksums_and_index(tmp_path):
    image_folder(tmp_path / "images" / "train", each=9)
    image_folder(tmp_path / "images" / "val", each=2)
    (tmp_path / "images" / "train" / "cat" / "torn.png").write_bytes(picture(9)[:60])
    out = tmp_path / "out"
    summary = pack(tmp_path / "images", out, 1, progress=False)
    record = json.loads((out / "pack.json").read_text())
    assert record["classes"] == ["cat", "dog"] and record["kind"] == "folder" and record["unfinished"] == 0
    assert record["splits"] == summary["splits"] and set(record["splits"]) == {"train", "val"}
    names = sorted(path.name for path in out.glob("*.tar"))
    assert list(record["shards"]) == names and "val-000000.tar" in names
    for name, shard in record["shards"].items():
        data = (out / name).read_bytes()
        assert shard["sha256"] == hashlib.sha256(data).hexdigest() and shard["bytes"] == len(data)
        assert (out / f".{name}.index.npz").exists()
        assert len(ShardIndex.open(str(out / name))) == shard["samples"]
    assert [bad["file"] for shard in record["shards"].values() for bad in shard["bad"]] == ["train/cat/torn.png"]
    checked = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=out, capture_output=True, text=True, check=True)
    assert checked.stdout.splitlines() == [f"{name}: OK" for name in names]


def test_images_above_the_limits_are_reported(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "small.png").write_bytes(picture(0))
    side = int(MAX_PIXELS**0.5) + 1
    Image.new("1", (side, side)).save(tmp_path / "images" / "bomb.png")
    summary = pack(tmp_path / "images", tmp_path / "out", progress=False)
    assert summary["bad"] == [{"file": "bomb.png", "problem": f"{side}x{side} pixels, more than {MAX_PIXELS}"}]
    assert verify(tmp_path / "out", progress=False) == {"shards": 1, "samples": 1, "checksums": True, "problems": []}


def test_unreadable_files_end_the_packing_which_then_goes_on(tmp_path, monkeypatch):
    """The storage, not the images, is at fault: nothing is left out for it."""
    images, out = many_images(tmp_path / "images"), tmp_path / "out"
    pack(images, tmp_path / "whole", 1, progress=False)

    def lost_after_the_first(path: Path, samples) -> dict:
        made = write_shard(path, samples)
        os.rename(images / "a", tmp_path / "away")
        return made

    with monkeypatch.context() as patch:
        patch.setattr("bossnas.data.packing.pack.write_shard", lost_after_the_first)
        with pytest.raises(ConfigError, match=r"folder: a/\d+.png cannot be read \(No such file or directory\)"):
            pack(images, out, 1, progress=False, workers=1)
    os.rename(tmp_path / "away", images / "a")
    assert pack(images, out, 1, progress=False)["kept"] == 1
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_packing_goes_on_to_the_same_bytes(tmp_path, project_root, signum):
    images, out = many_images(tmp_path / "images"), tmp_path / "out"
    pack(images, tmp_path / "whole", 1, progress=False)
    code = (
        "import signal, sys, threading; from bossnas.data.packing import pack\n"
        "signalled, real = threading.Event(), pack.write_shard\n"
        "def held(samples):\n"
        "    yield next(samples)\n"
        "    signalled.wait()\n"
        "    yield from samples\n"
        "def write(path, samples):\n"
        "    return real(path, held(samples) if path.name > 'train-000005.tar' else samples)\n"
        "def interrupted(number, frame):\n"
        "    signalled.set()\n"
        "    raise KeyboardInterrupt\n"
        # a shell's background jobs ignore Ctrl-C, and hand that down to the tests' processes
        "signal.signal(signal.SIGINT, interrupted)\n"
        "pack.write_shard = write\n"
        "pack.pack(sys.argv[1], sys.argv[2], 1, progress=False, workers=2)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(images), str(out)], cwd=project_root, stderr=subprocess.PIPE, text=True
    )
    until(lambda: process.poll() is not None or recorded(out) == 6, "the first shards")
    process.send_signal(signum)
    _, errors = process.communicate(timeout=HANG)
    assert process.returncode != 0 and ("KeyboardInterrupt" in errors) == (signum == signal.SIGINT)
    record = json.loads((out / "pack.json").read_text())
    made = len(list(out.glob("*.tar")))
    assert 0 < record["unfinished"] <= 30 - 6 and not (out / "SHA256SUMS").exists()
    if signum == signal.SIGINT:
        assert not list(out.glob(".*.tmp")) and len(record["shards"]) == made
    (out / ".768c31660fdaa49c.index.tmp").touch()  # what SIGKILL may leave of an index
    problems = verify(out, progress=False)["problems"]
    assert problems[0]["problem"] == f"{record['unfinished']} shards have not been packed"
    summary = pack(images, out, 1, progress=False)
    assert summary["kept"] == len(record["shards"]) >= 1
    assert contents(out) == contents(tmp_path / "whole")
    assert verify(out, progress=False)["problems"] == []


def test_two_packings_do_not_write_to_one_folder(tmp_path):
    image_folder(tmp_path / "images")
    (tmp_path / "out").mkdir()
    other = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(ConfigError, match="out: another bossnas pack is writing"):
        pack(tmp_path / "images", tmp_path / "out", progress=False)
    os.close(other)
    assert pack(tmp_path / "images", tmp_path / "out", progress=False)["kept"] == 0


def test_verify_names_each_damage_and_packing_again_mends_it(tmp_path):
    out = tmp_path / "out"
    pack(many_images(tmp_path / "images", 24), out, 1, progress=False)
    before = contents(out)
    assert verify(out, progress=False) == {"shards": 8, "samples": 24, "checksums": True, "problems": []}
    names = sorted(name for name in before if name.endswith(".tar"))
    pixel, header, cut, gone, extra = *names[:4], "train-000099.tar"
    index = ShardIndex.open(str(out / pixel))
    stat = (out / pixel).stat()
    for name, offset in ((pixel, index._tables[0]["offset"][1] + 5000), (header, 20)):
        data = bytearray(before[name])
        data[offset] ^= 0xFF
        (out / name).write_bytes(data)
    os.utime(out / pixel, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as when the disk is at fault
    os.truncate(out / cut, 300_000)
    (out / gone).unlink()
    shutil.copy(out / names[5], out / extra)
    found = verify(out, workers=2, progress=False)
    problems = {entry["shard"]: entry["problem"] for entry in found["problems"]}
    assert list(problems) == [pixel, header, cut, gone, extra] and found["samples"] < 18
    assert problems[pixel].startswith("its checksum differs; 1 images do not decode, such as " + index.key(1))
    assert problems[header].startswith("its checksum differs; the shard ") and "no valid header" in problems[header]
    assert problems[cut].startswith(f"it has 300000 bytes instead of {len(before[cut])}; the shard ")
    assert problems[gone] == "it is missing" and problems[extra] == "pack.json does not name it"
    assert {entry["fix"] for entry in found["problems"][:4]} == {"pack again: whole shards are kept"}
    (out / extra).unlink()
    assert pack(tmp_path / "images", out, 1, progress=False)["kept"] == 4
    assert contents(out) == before and verify(out, progress=False)["problems"] == []


def test_verify_finds_an_index_that_tells_of_other_samples(tmp_path):
    out = tmp_path / "out"
    pack(image_folder(tmp_path / "images"), out, progress=False)
    file = out / ".train-000000.tar.index.npz"
    with np.load(file) as table:
        columns = dict(table)
    columns["label"][3] += 1
    np.savez(file, **columns)
    assert verify(out, progress=False)["problems"] == [
        {"shard": "train-000000.tar", "problem": "its index tells of other samples", "fix": f"remove {file.name}"}
    ]
    columns["stamp"][1] += 1  # of another file: out of date, as after copying
    np.savez(file, **columns)
    assert verify(out, progress=False)["problems"] == []
    with np.load(file) as table:
        assert table["label"][3] == columns["label"][3] - 1


def test_verify_shards_from_elsewhere(tmp_path):
    with pytest.raises(ConfigError, match="out: there are no shards"):
        verify(tmp_path, progress=False)
    pack(many_images(tmp_path / "images", 9), tmp_path / "out", 1, progress=False)
    (tmp_path / "out" / "pack.json").unlink()
    assert verify(tmp_path / "out", progress=False) == {"shards": 3, "samples": 9, "checksums": False, "problems": []}
    os.truncate(tmp_path / "out" / "train-000001.tar", 400_000)
    problems = verify(tmp_path / "out", progress=False)["problems"]
    assert [entry["shard"] for entry in problems] == ["train-000001.tar"]
    assert problems[0]["fix"] == "copy it again or repack it"
    (tmp_path / "out" / "pack.json").write_text('{"plan": 3}')
    with pytest.raises(ConfigError, match="pack.json is damaged"):
        verify(tmp_path / "out", progress=False)


def test_the_command_packs_verifies_and_ends_with_2(tmp_path, project_root):
    """Three commands in one process, which spares two imports of PyTorch."""
    image_folder(tmp_path / "images")
    out = tmp_path / "out"
    code = """
import os, sys
from bossnas.cli import main
images, out = sys.argv[1:]
for arguments in ([images, out, "--workers", "2", "--shard-mb", "1"], ["--verify", out], ["--verify", out]):
    try:
        main(["pack", *arguments, "--json", f"{out}-{len(arguments)}.json"])
    except SystemExit as end:
        print("exit", end.code)
        if arguments == ["--verify", out]:
            os.truncate(out + "/train-000000.tar", 5000)
"""
    lines = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "images"), str(out)],
        cwd=project_root,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": "kernels"},
    )
    made, summary, end, whole, end_whole, damaged, end_damaged = lines.stdout.splitlines()
    assert made.startswith("train: 12 images in ") and summary.startswith("2 classes, 0 unreadable images left out")
    assert whole.startswith("12 images in ") and whole.endswith(" shards are whole")
    assert damaged.startswith("train-000000.tar: it has 5000 bytes instead of ")
    assert damaged.endswith("; pack again: whole shards are kept")
    packed, verified = (json.loads((tmp_path / f"out-{count}.json").read_text()) for count in (6, 2))
    assert packed["splits"]["train"]["samples"] == 12 and packed["kept"] == 0 and packed["out"] == str(out)
    assert [problem["shard"] for problem in verified["problems"]] == ["train-000000.tar"], (
        "written though it ends with 2"
    )
    assert [end, end_whole, end_damaged] == ["exit 0", "exit 0", "exit 2"]
    assert lines.stderr.splitlines()[-1].startswith("error: --verify: 1 problems with the shards in ")
