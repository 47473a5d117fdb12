"""Packing image folders into shards: what comes out, resuming, and what is refused."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bossnas.errors import ConfigError
from bossnas.pack import pack
from bossnas.shards import ShardIndex


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
                picture(100 * c + i, "jpg" if i % 2 else "png", size=(300, 300)))
    return root


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

    def stop(*_):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "fsync", stop)
        pack(tmp_path / "images", tmp_path / "out", 1, progress=False)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["pack.json"]
    assert pack(tmp_path / "images", tmp_path / "out", 1, progress=False)["splits"]["train"]["samples"] == 12


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
