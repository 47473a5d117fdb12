"""Shards: reading by index, decoding, and what is refused."""

from __future__ import annotations

import gzip
import io
import logging
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bossnas.data.images import BadImage, decode
from bossnas.data.shards import ShardIndex, index_shard, is_remote
from bossnas.errors import ConfigError

pytestmark = pytest.mark.quick


def picture(seed: int, ext: str = "png", mode: str = "RGB", size: tuple[int, int] = (12, 9)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, {"jpg": "JPEG"}.get(ext, ext.upper()))
    return file.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def shard_of(path: Path, numbers: range) -> Path:
    return write_tar(
        path,
        {
            name: data
            for i in numbers
            for name, data in ((f"k/{i:03d}.png", picture(i)), (f"k/{i:03d}.cls", str(i % 3).encode()))
        },
    )


def refused(pattern, words: str, field: str = "data.val") -> None:
    with pytest.raises(ConfigError, match=words) as error:
        ShardIndex.open(pattern, field)
    assert error.value.field == field


def test_reads_every_sample_in_order(tmp_path):
    shard_of(tmp_path / "train-0.tar", range(0, 5))
    shard_of(tmp_path / "train-1.tar", range(5, 12))
    index = ShardIndex.open(str(tmp_path / "train-*.tar"))
    assert len(index) == 12
    for i in range(12):
        assert index.read(i) == (picture(i), "png", i % 3)
        assert index.key(i) == f"k/{i:03d}"
    assert index.name(5) == str(tmp_path / "train-1.tar") + "/k/005"
    for outside in (-1, 12):
        with pytest.raises(IndexError):
            index.read(outside)


def test_brace_pattern_list_and_pickle_agree(tmp_path):
    for i in range(3):
        shard_of(tmp_path / f"s-{i}.tar", range(4 * i, 4 * i + 4))
    brace = ShardIndex.open(str(tmp_path / "s-{0..2}.tar"))
    listed = ShardIndex.open([str(tmp_path / f"s-{i}.tar") for i in range(3)])
    brace.read(0)
    travelled = pickle.loads(pickle.dumps(brace))
    assert [brace.key(i) for i in range(12)] == [listed.key(i) for i in range(12)]
    assert travelled.read(11) == brace.read(11)


def test_compressed_shard_reads_the_same(tmp_path):
    plain = shard_of(tmp_path / "a.tar", range(4))
    (tmp_path / "b.tar.gz").write_bytes(gzip.compress(plain.read_bytes()))
    index = ShardIndex.open([str(plain), str(tmp_path / "b.tar.gz")])
    assert [index.read(i) for i in range(4)] == [index.read(i + 4) for i in range(4)]
    assert [path.name for path in tmp_path.glob(".*.npz")] == [".a.tar.index.npz"]


def test_members_that_are_no_images_are_passed_over(tmp_path):
    path = write_tar(
        tmp_path / "a.tar",
        {
            "x.json": b"{}",
            "a.b/y.JPEG": picture(1, "jpg"),
            "z.pickle": b"?",
            "w.input.png": b"?",
            "ä" * 120 + ".png": picture(2),
        },
    )
    index = ShardIndex.open(str(path))
    assert [index.read(i) for i in range(2)] == [(picture(1, "jpg"), "jpeg", None), (picture(2), "png", None)]
    assert [index.key(i) for i in range(2)] == ["a.b/y", "ä" * 120]


def test_index_cache_follows_the_shard(tmp_path, caplog):
    path, cache = shard_of(tmp_path / "a.tar", range(3)), tmp_path / ".a.tar.index.npz"
    assert len(ShardIndex.open(str(path))) == 3
    before = cache.stat().st_mtime_ns
    assert len(ShardIndex.open(str(path))) == 3 and cache.stat().st_mtime_ns == before
    shard_of(path, range(8))
    assert len(ShardIndex.open(str(path))) == 8
    cache.write_bytes(cache.read_bytes()[:100])
    assert ShardIndex.open(str(path)).read(7)[0] == picture(7)
    assert "is unusable" in caplog.text


def test_index_goes_to_the_users_cache_where_it_cannot_lie_beside_the_shard(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    name = "a" * 245 + ".tar"  # the index beside it would have a name that is too long
    (tmp_path / "data").mkdir()
    path = shard_of(tmp_path / "data" / name, range(3))
    assert len(ShardIndex.open(str(path))) == 3
    [cache] = (tmp_path / "home" / "bossnas" / "index").iterdir()
    assert cache.suffix == ".npz" and os.listdir(tmp_path / "data") == [name]
    before = cache.stat().st_mtime_ns
    assert ShardIndex.open(str(path)).read(2)[0] == picture(2) and cache.stat().st_mtime_ns == before
    shard_of(path, range(4))
    assert len(index_shard(path, "data.train")["offset"]) == 4 and cache.stat().st_mtime_ns > before
    assert not caplog.records


def test_index_stays_in_memory_where_it_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    path = shard_of(tmp_path / "a.tar", range(3))

    def full(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "replace", full)
    assert ShardIndex.open(str(path)).read(2)[0] == picture(2)
    assert [file.name for file in tmp_path.iterdir()] == ["a.tar"]


def test_missing_empty_and_foreign_shards_are_refused(tmp_path):
    shard_of(tmp_path / "s-0.tar", range(2))
    write_tar(tmp_path / "none.tar", {"a.cls": b"1"})
    write_tar(tmp_path / "label.tar", {"a.png": picture(0), "a.cls": b"cat"})
    (tmp_path / "zero.tar").touch()
    refused(str(tmp_path / "t-*.tar"), "no file matches")
    refused([], "no file matches")
    refused(str(tmp_path / "s-{0..2}.tar"), "2 of 3 shards are missing, first .*s-1.tar")
    refused(str(tmp_path / "none.tar"), "none.tar holds no jpg")
    refused(str(tmp_path / "label.tar"), "a.cls is no class number: b'cat'")
    refused(str(tmp_path / "zero.tar"), "zero.tar is damaged")
    refused(str(tmp_path), "is a folder; name its shards")
    refused([str(tmp_path / "s-0.tar")] * 2, "listed more than once")
    refused(str(tmp_path / "s-{0..2"), "unbalanced braces")
    refused("pipe:cat x.tar", "data.reader=stream")
    refused("https://host/x.tar", "data.reader=stream")
    (tmp_path / "x.zip").touch()
    refused(str(tmp_path / "x.zip"), "is not a shard")


@pytest.mark.parametrize("harm", ["payload", "header", "boundary", "damaged header", "zeroed header", "gzip"])
def test_torn_or_damaged_tar_is_named(tmp_path, harm):
    path = shard_of(tmp_path / "a.tar", range(6))
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        third = tar.getmembers()[2]
    if harm == "payload":
        data = data[: third.offset_data + 10]
    elif harm == "header":
        data = data[: third.offset + 100]
    elif harm == "boundary":
        data = data[: third.offset]
    elif harm == "damaged header":
        data[third.offset + 20] ^= 0xFF
    elif harm == "zeroed header":
        data[third.offset : third.offset + 512] = bytes(512)
    else:
        path, data = tmp_path / "a.tar.gz", gzip.compress(bytes(data))[:-200]
    path.write_bytes(bytes(data))
    refused(str(path), rf"the shard .*{path.name} is damaged")
    assert not (tmp_path / ".a.tar.index.npz").exists()


def test_shard_that_shrinks_while_in_use_is_named(tmp_path):
    path = shard_of(tmp_path / "a.tar", range(6))
    index = ShardIndex.open(str(path))
    os.truncate(path, 2000)
    with pytest.raises(ConfigError, match="a.tar has become shorter"):
        index.read(5)


def test_open_files_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("bossnas.data.shards.OPEN_FILES", 2)
    index = ShardIndex.open([str(shard_of(tmp_path / f"{i}.tar", range(i, i + 1))) for i in range(5)])
    for i in (0, 1, 2, 3, 4, 0, 3):
        assert index.read(i)[0] == picture(i)
        assert len(index._files) <= 2
    index.close()
    assert index.read(1)[0] == picture(1)


def tar_of(path: Path, form: int, names: list[str], **fields) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for i, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = len(picture(i))
            for field, value in fields.items():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(picture(i)))
    return path


@pytest.mark.parametrize("form", ["USTAR_FORMAT", "GNU_FORMAT", "PAX_FORMAT"])
def test_every_dialect_of_tar_is_read_as_tarfile_reads_it(tmp_path, form):
    names = ["a/b.png", "n" * 90 + "/" + "m" * 90 + ".png", "x" * 95 + ".png", "y" * 96 + ".png", "c.png"]
    names += [] if form == "USTAR_FORMAT" else ["ü/" + "z" * 300 + ".png", "q" * 120 + ".png"]
    tar_of(tmp_path / "a.tar", getattr(tarfile, form), names, uid=7, uname="me", mtime=1700000000)
    if form != "USTAR_FORMAT":  # times with fractions, as webdataset's writer sets, and large ids
        tar_of(tmp_path / "b.tar", getattr(tarfile, form), names, mtime=1700000000.25, uid=2**31)
    for shard in tmp_path.glob("*.tar"):
        index = ShardIndex.open(str(shard))
        assert [index.key(i) for i in range(len(index))] == [name[:-4] for name in names]
        assert [index.read(i)[0] for i in range(len(index))] == [picture(i) for i in range(len(names))]
        with tarfile.open(shard) as tar:
            assert index._tables[0]["offset"].tolist() == [member.offset_data for member in tar]


def test_links_and_absurd_headers_are_refused(tmp_path):
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            info = tarfile.TarInfo("a.png")
            info.type, info.linkname = kind, "b.png"
            tar.addfile(info)
        refused(str(tmp_path / "a.tar"), "a.png in .*a.tar is a link")
    tar_of(tmp_path / "a.tar", tarfile.PAX_FORMAT, ["a.png"], pax_headers={"comment": "x" * 2**21})
    refused(str(tmp_path / "a.tar"), "is damaged .no valid header at byte 0: an extended header is absurdly long")


def test_empty_and_absurdly_large_images_are_samples_of_which_little_is_read(tmp_path):
    path = tmp_path / "a.tar"
    with open(path, "wb") as file:  # a hole in the file stands for 8 GB of an image
        for name, size in (("a.png", 0), ("b.png", 2**33), ("c.png", len(picture(0)))):
            info = tarfile.TarInfo(name)
            info.size = size
            file.write(info.tobuf(tarfile.GNU_FORMAT))
            file.seek(size + -size % 512, os.SEEK_CUR) if name != "c.png" else file.write(picture(0))
        file.truncate(file.tell() + -file.tell() % 512 + 1024)
    index = ShardIndex.open(str(path))
    assert index.read(2)[0] == picture(0)
    for i, words in ((0, "an empty file"), (1, "67108865 bytes, more than")):
        with pytest.raises(BadImage, match=words):
            decode(index.read(i)[0])


def test_many_shards_are_announced_with_progress(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "bossnas.data.shards")
    for i in range(22):
        shard_of(tmp_path / f"s-{i:02d}.tar", range(i, i + 2))
    monkeypatch.setattr("bossnas.data.shards.PROGRESS_SECONDS", 0.0)
    index = ShardIndex.open(str(tmp_path / "s-*.tar"))
    assert [index.key(i) for i in (0, 1, 42, 43)] == ["k/000", "k/001", "k/021", "k/022"]
    assert caplog.messages[0] == "data.train: 22 shards have no index yet and are indexed"
    assert caplog.messages[-1] == "data.train: 22 of 22 shards are indexed"
    caplog.clear()
    ShardIndex.open(str(tmp_path / "s-*.tar"))
    assert not caplog.records


def test_urls_are_told_from_paths():
    for url in ("http://h/a.tar", "https://h/a-{0..3}.tar", "s3://b/k", "gs://b/k", "pipe:cat a.tar", "memory://a"):
        assert is_remote(url)
    for path in ("a.tar", "/data/s-*.tar", "./pipe/a.tar", "c:/x.tar", "a:b.tar", "data//a.tar"):
        assert not is_remote(path)
