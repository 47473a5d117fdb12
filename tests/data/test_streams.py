"""Streams of shards: order, resuming, and what happens when connections, servers and shards fail."""

from __future__ import annotations

import gzip
import importlib.util
import io
import json
import logging
import lzma
import multiprocessing
import os
import pickle
import tarfile
from itertools import islice
from pathlib import Path

import fsspec
import numpy as np
import pytest
from http_server import FaultyServer
from ranks import HANG, until

from bossnas.data import streams
from bossnas.data.shards import ShardIndex
from bossnas.data.streams import Sample, ShardStream, share
from bossnas.errors import ConfigError

pytestmark = pytest.mark.quick

SHARDS, PER_SHARD = 4, 7
FAST = {"retries": 3, "timeout": float(HANG), "backoff": 0.01}


def tar_bytes(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def shard_bytes(shard: int, size: int = 1000) -> bytes:
    """Nothing here decodes, so any bytes do for images."""
    members = {}
    for i in range(PER_SHARD * shard, PER_SHARD * (shard + 1)):
        members |= {
            f"k/{i:03d}.jpg": np.random.default_rng(i).bytes(size + i),
            f"k/{i:03d}.cls": b"%d\n" % (i % 3),
            f"k/{i:03d}.json": b"{}",
        }
    return tar_bytes(members)


def served(size: int = 1000) -> dict[str, bytes]:
    return {f"s-{shard}.tar": shard_bytes(shard, size) for shard in range(SHARDS)}


def plain(files: dict[str, bytes], folder: Path) -> list[tuple[bytes, int | None]]:
    """What the index gives for the same shards."""
    for name, data in files.items():
        (folder / name).write_bytes(data)
    index = ShardIndex.open([str(folder / name) for name in files])
    return [(data, label) for data, _, label in map(index.read, range(len(index)))]


def contents(samples) -> list[tuple[bytes, int | None]]:
    return [(sample.data, sample.label) for sample in samples]


def in_order(stream: ShardStream) -> list[Sample]:
    return list(stream.read(range(len(stream.urls)), [0], buffer=0))


def fails(stream: ShardStream, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        in_order(stream)
    assert error.value.field == "data.train"


@pytest.mark.parametrize("place", ["local", "file", "http", "memory", "gz", "xz"])
def test_stream_and_index_give_the_same_samples(tmp_path, place):
    files = served()
    expected = plain(files, tmp_path)
    with FaultyServer(dict(files)) as server:
        pattern = {
            "local": f"{tmp_path}/s-*.tar",
            "file": f"file://{tmp_path}/s-*.tar",
            "memory": "memory://bucket/s-*.tar",
        }.get(place, server.url + "/s-{0..3}.tar")
        if place == "memory":
            for name, data in files.items():
                fsspec.filesystem("memory").pipe(f"/bucket/{name}", data)
        elif place in ("gz", "xz"):
            pack = {"gz": gzip, "xz": lzma}[place].compress
            server.files = {f"{name}.{place}": pack(data) for name, data in files.items()}
            pattern += f".{place}"
        stream = ShardStream.open(pattern, **FAST)
        samples = in_order(stream)
    assert contents(samples) == expected
    assert [sample.id for sample in samples] == [s << 32 | row for s in range(SHARDS) for row in range(PER_SHARD)]
    assert samples[8].name == f"{stream.urls[1]}/k/008"


def test_order_is_seeded_and_skipping_goes_on_exactly(tmp_path):
    plain(served(), tmp_path)
    stream = ShardStream.open(f"{tmp_path}/s-*.tar")

    def ids(epoch: int, worker: int = 0, skip: int = 0, buffer: int = 10) -> list[int]:
        shards = share(stream.order(5, epoch), worker, 2)
        return [sample.id for sample in stream.read(shards, [5, epoch, worker], buffer, skip)]

    whole = ids(0)
    assert whole == ids(0) and sorted(whole + ids(0, 1)) == sorted(sample.id for sample in in_order(stream))
    assert whole != ids(0, buffer=0) and whole != ids(1) and stream.order(5, 0).tolist() != stream.order(6, 0).tolist()
    for skip in (0, 1, 9, 13, 14):
        assert ids(0, skip=skip) == whole[skip:]


def test_shares_are_disjoint_and_never_empty():
    order = np.arange(7)[::-1]
    assert sorted(np.concatenate([share(order, reader, 3) for reader in range(3)])) == list(range(7))
    with pytest.raises(ConfigError, match="8 readers .* share 7 shards, so 1 would have none") as error:
        share(order, 0, 8)
    assert error.value.field == "data.workers"


def read_in_child(stream: ShardStream, queue) -> None:
    queue.put(contents(in_order(stream)))


@pytest.mark.parametrize("start", ["fork", "forkserver"])
def test_streams_travel_to_other_processes(tmp_path, start):
    files = served()
    record = {"plan": "x", "shards": {name: {"samples": PER_SHARD} for name in files}}
    with FaultyServer({**files, "pack.json": json.dumps(record).encode()}) as server:
        stream = ShardStream.open(server.url + "/s-{0..3}.tar", **FAST)
        assert stream.samples == SHARDS * PER_SHARD
        before = contents(in_order(stream))  # so that this process has connections of its own
        context = multiprocessing.get_context(start)
        queue = context.Queue()
        child = context.Process(target=read_in_child, args=(stream, queue))
        child.start()
        assert queue.get(timeout=HANG) == before == plain(files, tmp_path)
        child.join()


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("states_length", [True, False])
def test_dropped_connections_lose_and_double_nothing(tmp_path, caplog, ranges, states_length):
    files = {"s.tar": shard_bytes(0, 150_000)}
    with FaultyServer(files) as server:
        server.ranges, server.states_length, server.faulty, server.after = ranges, states_length, 2, 400_321
        samples = in_order(ShardStream.open(f"{server.url}/s.tar", **FAST))
        starts = [start for path, start in server.requests if path == "s.tar"]
    assert contents(samples) == plain(files, tmp_path)
    assert len(starts) == 3 and starts[0] == 0 and starts == sorted(starts)
    assert caplog.text.count("s.tar at byte") == 2 and "retry 1 of 3 in 0.0 s" in caplog.text


def test_a_connection_that_gets_on_a_little_every_time_gets_through(tmp_path):
    files = {"s.tar": shard_bytes(0, 1_000_000)}
    with FaultyServer(files) as server:
        server.faulty, server.after = -1, 1_500_000
        assert contents(in_order(ShardStream.open(f"{server.url}/s.tar", **FAST))) == plain(files, tmp_path)
        assert len(server.requests) > 4  # the first is for pack.json


def test_stalled_connections_are_given_up_and_taken_up_again(tmp_path, caplog):
    """On a busy machine a healthy connection, too, may be given up: hence the many retries."""
    files = {"s.tar": shard_bytes(0, 100_000)}
    with FaultyServer(files) as server:
        server.faulty, server.after, server.stall = 2, 300_000, 2.0 * HANG
        stream = ShardStream.open(f"{server.url}/s.tar", retries=100, timeout=0.2, backoff=0.01)
        assert contents(in_order(stream)) == plain(files, tmp_path)
    assert caplog.text.count("Timeout") >= 2


@pytest.mark.parametrize("extra", [900, -40_000])
def test_wrong_content_length_loses_nothing(tmp_path, extra):
    files = {"s.tar": shard_bytes(0, 10_000)}
    with FaultyServer(files) as server:
        server.faulty, server.extra = 1, extra
        assert contents(in_order(ShardStream.open(f"{server.url}/s.tar", **FAST))) == plain(files, tmp_path)


def test_busy_server_is_asked_again_and_a_refusing_one_is_not(tmp_path):
    files = served()
    with FaultyServer(dict(files)) as server:
        stream = ShardStream.open(server.url + "/s-{0..3}.tar", **FAST)
        server.statuses = [500, 503, 429]
        assert contents(in_order(stream)) == plain(files, tmp_path)
        for status, words in (
            (404, "s-0.tar cannot be read at byte 0: not found"),
            (403, "HTTP 403"),
            (410, "HTTP 410"),
        ):
            server.requests.clear()
            server.statuses = [status]
            fails(stream, words)
            assert len(server.requests) == 1
        server.statuses = [500] * 9
        fails(stream, "at byte 0: HTTP 500")
        assert len(server.statuses) == 5


def test_a_server_that_always_fails_ends_in_an_error(caplog):
    with FaultyServer({"s.tar": shard_bytes(0, 100_000)}) as server:
        stream = ShardStream.open(f"{server.url}/s.tar?key=SECRET", **FAST)
        server.faulty, server.after, server.ranges = -1, 5000, False
        fails(stream, r"s.tar cannot be read at byte \d+: ClientPayloadError")
        server.states_length = False
        fails(stream, r"s.tar is damaged \(it ends before byte \d+, without an end mark")
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
            tar.addfile(tarfile.TarInfo("long" * 30 + ".jpg"))
        server.files["s.tar"], server.states_length, server.after = file.getvalue(), True, 600
        fails(stream, r"s.tar cannot be read at byte \d+: ClientPayloadError")  # within an extended header
        server.files.clear()
        with pytest.raises(ConfigError, match="not found") as error:
            in_order(ShardStream.open(server.url.replace("://", "://me:PASSWORD@") + "/s.tar?key=SECRET", **FAST))
    fails(stream, "s.tar cannot be read at byte 0: ClientConnectorError")
    for text in (str(error.value), caplog.text):
        assert "SECRET" not in text and "PASSWORD" not in text


@pytest.mark.parametrize("place", ["local", "http", "memory", "pipe", "gz"])
@pytest.mark.parametrize("harm", ["payload", "boundary", "damaged header", "zeroed header"])
def test_torn_or_damaged_shard_is_named(tmp_path, place, harm):
    data = bytearray(shard_bytes(0))
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        member = tar.getmembers()[9]
    if harm == "damaged header":
        data[member.offset + 20] ^= 0xFF
    elif harm == "zeroed header":
        data[member.offset : member.offset + 512] = bytes(512)
    else:
        data = data[: member.offset + (0 if harm == "boundary" else 700)]
    words = (
        f"is damaged .no valid header at byte {member.offset}"
        if harm.endswith("header")
        else f"is damaged .it ends before byte {member.offset + 512 + 1536 * (harm == 'payload')}, without an end mark"
    )
    data = gzip.compress(bytes(data)) if place == "gz" else bytes(data)
    name = "s.tar.gz" if place == "gz" else "s.tar"
    (tmp_path / name).write_bytes(data)
    fsspec.filesystem("memory").pipe("/torn/s.tar", data)
    with FaultyServer({name: data}) as server:
        url = {
            "local": str(tmp_path / name),
            "memory": "memory://torn/s.tar",
            "pipe": f"pipe:cat {tmp_path / name}",
        }.get(place, f"{server.url}/{name}")
        fails(ShardStream.open(url, allow_pipe=True, **FAST), words)


def test_a_cut_compressed_shard_is_named(tmp_path):
    for name, data in (("s.tar.gz", gzip.compress(shard_bytes(0))), ("s.tar.xz", lzma.compress(shard_bytes(0)))):
        (tmp_path / name).write_bytes(data[:-300])
        fails(ShardStream.open(str(tmp_path / name)), f"{name} is damaged")


def test_shard_that_vanishes_and_shard_without_images_are_named(tmp_path):
    plain(served(), tmp_path)
    stream = ShardStream.open(f"{tmp_path}/s-*.tar", **FAST)
    samples = stream.read(range(SHARDS), [0], buffer=0)
    next(samples)
    (tmp_path / "s-1.tar").unlink()
    with pytest.raises(ConfigError, match="s-1.tar cannot be read at byte 0: not found"):
        list(samples)
    (tmp_path / "s-1.tar").write_bytes(tar_bytes({"a.cls": b"1"}))
    fails(stream, "s-1.tar holds no jpg")
    (tmp_path / "s-1.tar").write_bytes(tar_bytes({"a.jpg": b"", "a.cls": b"cat"}))
    fails(stream, "a.cls is no class number")


def test_pipes_run_only_when_allowed(tmp_path):
    files = {"s.tar": shard_bytes(0)}
    expected, mark = plain(files, tmp_path), tmp_path / "ran"
    with pytest.raises(ConfigError, match="runs a command; set data.allow_pipe=true"):
        ShardStream.open(f"pipe:touch {mark}; cat {tmp_path}/s.tar")
    assert not mark.exists()
    broken_once = f"pipe:cd {tmp_path}; test -e ran && exec cat s.tar; touch ran; head -c 5000 s.tar; exit 3"
    assert contents(in_order(ShardStream.open(broken_once, allow_pipe=True, **FAST))) == expected
    fails(ShardStream.open("pipe:exit 3", allow_pipe=True, **FAST), "the command ended with exit code 3")


def test_a_pipe_that_hangs_is_given_up(tmp_path, monkeypatch):
    plain({"s.tar": shard_bytes(0)}, tmp_path)
    real = streams._Pipe.read

    def read(pipe: streams._Pipe, size: int) -> bytes:
        """A command may take its time for its first bytes, on a busy machine."""
        data = real(pipe, size)
        pipe.timeout = 0.2
        return data

    monkeypatch.setattr(streams._Pipe, "read", read)
    command = f"pipe:head -c 5000 {tmp_path}/s.tar; sleep {2 * HANG}"
    hangs = ShardStream.open(command, allow_pipe=True, **FAST | {"retries": 1})
    fails(hangs, "at byte 5000: TimeoutError: no byte for 0.2 s")


def test_abandoned_streams_leave_nothing_open(tmp_path):
    files = {"s.tar": shard_bytes(0, 200_000)}
    plain(files, tmp_path)
    mark = tmp_path / "pid"
    with FaultyServer(files) as server:
        in_order(ShardStream.open(f"{server.url}/s.tar"))  # the connection pool's own descriptors come once
        before = len(os.listdir("/proc/self/fd"))
        pipe = f"pipe:echo $$ > {mark}; cat {tmp_path}/s.tar; sleep {2 * HANG}"
        for url in (pipe, f"{server.url}/s.tar", f"{tmp_path}/s.tar"):
            samples = ShardStream.open(url, allow_pipe=True).read([0], [0], buffer=2)
            next(samples)
            del samples
        assert not Path(f"/proc/{int(mark.read_text())}").exists()
        # the server's end and the loop's thread close in their own time
        until(lambda: len(os.listdir("/proc/self/fd")) <= before, "all descriptors to be closed")


class Harmful:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_is_unpickled(tmp_path):
    trap = pickle.dumps(Harmful(tmp_path / "trap"))
    members = {"a.jpg": b"image", **{f"a.{ext}": trap for ext in ("pkl", "pickle", "pyd", "pth", "pt", "npy")}}
    path = tmp_path / "s.tar"
    path.write_bytes(tar_bytes(members))
    assert contents(in_order(ShardStream.open(str(path)))) == [(b"image", None)]
    assert ShardIndex.open(str(path)).read(0)[0] == b"image"
    assert not (tmp_path / "trap").exists()
    pickle.loads(trap)
    assert (tmp_path / "trap").exists(), "the trap does not work"


def test_urls_that_cannot_be_read_are_refused_at_once():
    for pattern, words in (
        ("https://host/train-*.tar", r"a web server does not list its files; write braces"),
        ("nonsense://bucket/x.tar", "no driver is known for nonsense://"),
        (["memory://b/x.tar", "memory://b/x.tar"], "listed more than once"),
        ("memory://nothing/x-*.tar", "no file matches memory://nothing/x-"),
        ("memory://b/x-{0..3.tar", "unbalanced braces"),
        ([], "names no shard"),
        ("/nowhere/x-*.tar", "no file matches"),
    ):
        with pytest.raises(ConfigError, match=words) as error:
            ShardStream.open(pattern, "data.val")
        assert error.value.field == "data.val"
    fails(ShardStream.open("memory://no-bucket/x.tar", **FAST), "x.tar cannot be read at byte 0: not found")


@pytest.mark.parametrize(("url", "package"), [("s3://bucket/x-*.tar", "s3fs"), ("gs://bucket/x.tar", "gcsfs")])
def test_missing_driver_is_named(url, package):
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    with pytest.raises(ConfigError, match=f"needs {package} .*; pip install {package}"):
        ShardStream.open(url)


def test_equal_base_names_are_different_shards(tmp_path):
    with FaultyServer({"a/s.tar": shard_bytes(0), "b/s.tar": shard_bytes(1)}) as server:
        samples = in_order(ShardStream.open(f"{server.url}/{{a,b}}/s.tar", **FAST))
    expected = plain({"0.tar": shard_bytes(0), "1.tar": shard_bytes(1)}, tmp_path)
    assert contents(samples) == expected


def test_counts_of_pack_json_are_used_and_checked(tmp_path, caplog):
    plain(served(), tmp_path)
    pattern = f"{tmp_path}/s-*.tar"

    def record(text: str) -> ShardStream:
        (tmp_path / "pack.json").write_text(text)
        return ShardStream.open(pattern)

    assert ShardStream.open(pattern).samples is None and len(ShardStream.open(pattern, images=9)) == 9
    whole = {f"s-{i}.tar": {"samples": PER_SHARD} for i in range(SHARDS)}
    assert record(json.dumps({"shards": whole})).samples == SHARDS * PER_SHARD
    assert record(json.dumps({"shards": {"s-0.tar": whole["s-0.tar"]}})).samples is None
    assert len(ShardStream.open(pattern, images=9)) == 9 and not caplog.records
    (tmp_path / "pack.json").write_text(json.dumps({"shards": whole}))
    assert len(ShardStream.open(pattern, images=9)) == SHARDS * PER_SHARD
    for damaged in ('{"sha', "[]", '{"shards": {"s-0.tar": 7}}'):
        assert record(damaged).samples is None
    assert caplog.text.count("pack.json is unusable") == 3
    stream = record(json.dumps({"shards": whole}))
    with tarfile.open(tmp_path / "s-2.tar") as tar:  # a download that stopped, in a file made long enough before
        cut = tar.getmembers()[6].offset
    os.truncate(tmp_path / "s-2.tar", cut)
    os.truncate(tmp_path / "s-2.tar", cut + 40_000)
    assert len(list(islice(stream.read([2], [0], buffer=0), 2))) == 2
    fails(stream, "s-2.tar holds 2 samples, but pack.json says 7")


def test_both_readers_see_repeated_keys_alike(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in (
            ("a.jpg", b"1"),
            ("a.cls", b"1"),
            ("a.jpg", b"2"),
            ("a.cls", b"2"),
            ("b.png", b"3"),
            ("b.jpg", b"4"),
            ("c.cls", b"5"),
            ("c.cls", b"6"),
            ("c.webp", b"7"),
            ("d.v2.jpg", b"8"),
            ("a.jpg", b""),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    expected = plain({"s.tar": file.getvalue()}, tmp_path)
    assert expected == [(b"1", 1), (b"2", 2), (b"3", None), (b"7", 6), (b"", None)]
    said = [record.getMessage().rsplit("s.tar: ")[1] for record in caplog.records]
    assert said == [
        "2 keys come twice in a row; each is a sample of its own",
        "1 images are passed over, for another image has their key",
        "2 samples have no image and are passed over",
    ]
    caplog.clear()
    assert contents(in_order(ShardStream.open(str(tmp_path / "s.tar")))) == expected
    assert len(caplog.records) == 3
