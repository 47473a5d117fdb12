"""What is packed: ImageNet in every layout it is handed out in, its validation labels, and CIFAR's downloads."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from bossnas.data.images import MAX_BYTES, decode
from bossnas.data.packing.pack import open_source, pack
from bossnas.errors import ConfigError

pytestmark = pytest.mark.quick

WNIDS = ("n01440764", "n01443537", "n02084071", "n07747607")
IDS = {"n01440764": 3, "n01443537": 1, "n02084071": 4, "n07747607": 2}  # not in the order of the WordNet ids
VAL = ("n07747607", "n01440764", "n01440764", "n02084071", "n01443537")  # of the images 1 to 5
TRUTH = "".join(f"{IDS[wnid]}\n" for wnid in VAL)


def jpeg(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 11, 3), dtype=np.uint8)).save(file, "JPEG")
    return file.getvalue()


def val_name(number: int) -> str:
    return f"ILSVRC2012_val_{number:08d}.JPEG"


def tree(root: Path, flat: bool = True) -> Path:
    """Folders train/ and val/, this with class folders or flat."""
    for c, wnid in enumerate(WNIDS):
        (root / "train" / wnid).mkdir(parents=True)
        for i in range(3):
            (root / "train" / wnid / f"{wnid}_{i}.JPEG").write_bytes(jpeg(10 * c + i))
    for number, wnid in enumerate(VAL, 1):
        folder = root / "val" if flat else root / "val" / wnid
        folder.mkdir(parents=True, exist_ok=True)
        (folder / val_name(number)).write_bytes(jpeg(100 + number))
    return root


def devkit(folder: Path) -> Path:
    """The two files of the development kit that matter, as in its archive."""
    folder.mkdir(parents=True)
    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    rows = [(np.uint16(IDS[wnid]), wnid, "a word", "a gloss", np.uint8(0)) for wnid in sorted(IDS, key=IDS.get)]
    rows.append((np.uint16(5), "n00001740", "entity", "all of them", np.uint8(4)))
    savemat(folder / "meta.mat", {"synsets": np.array(rows, kind).reshape(-1, 1)})
    (folder / "ILSVRC2012_validation_ground_truth.txt").write_text(TRUTH)
    return folder


def tarred(path: Path, folder: Path) -> None:
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as tar:
        for file in sorted(folder.iterdir()):
            tar.add(file, file.name)


def archives(root: Path, source: Path) -> Path:
    """The original archives: a tar of a tar for each class, and a flat one."""
    (root / "tars").mkdir(parents=True)
    for folder in (source / "train").iterdir():
        tarred(root / "tars" / f"{folder.name}.tar", folder)
    tarred(root / "ILSVRC2012_img_train.tar", root / "tars")
    tarred(root / "ILSVRC2012_img_val.tar", source / "val")
    shutil.rmtree(root / "tars")
    devkit(root / "kit" / "ILSVRC2012_devkit_t12" / "data")
    tarred(root / "ILSVRC2012_devkit_t12.tar.gz", root / "kit")
    shutil.rmtree(root / "kit")
    return root


def kaggle(root: Path) -> Path:
    tree(root / "ILSVRC" / "Data" / "CLS-LOC")
    rows = [f"{val_name(i)[:-5]},{wnid} 85 1 499 272 {wnid} 1 2 3 4" for i, wnid in enumerate(VAL, 1)]
    (root / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *reversed(rows)]) + "\n")
    return root


def layout(name: str, root: Path) -> Path:
    if name == "class folders":
        return tree(root, flat=False)
    if name == "kaggle":
        return kaggle(root)
    if name == "inside kaggle":
        return kaggle(root) / "ILSVRC" / "Data" / "CLS-LOC"
    if name == "archives":
        return archives(root, tree(root.parent / "unpacked"))
    devkit(tree(root) / "ILSVRC2012_devkit_t12" / "data")
    return root


@pytest.mark.parametrize("name", ["class folders", "kaggle", "inside kaggle", "archives", "devkit"])
def test_imagenet_makes_the_same_shards_in_every_layout(tmp_path, name):
    root = layout(name, tmp_path / "set")
    source = open_source(root)
    assert source.kind == "imagenet" and source.classes == list(WNIDS)
    found = {
        split: [(item.key, item.label, source.read(item)) for item in items] for split, items in source.splits.items()
    }
    assert found["train"] == [
        (f"{wnid}/{wnid}_{i}", c, jpeg(10 * c + i)) for c, wnid in enumerate(WNIDS) for i in range(3)
    ]
    assert found["val"] == sorted(
        (f"{wnid}/{val_name(i)[:-5]}", WNIDS.index(wnid), jpeg(100 + i)) for i, wnid in enumerate(VAL, 1)
    )
    pack(root, tmp_path / "out", progress=False)
    pack(layout("class folders", tmp_path / "plain"), tmp_path / "expected", progress=False)
    for split in ("train", "val"):
        shard = f"{split}-000000.tar"
        assert (tmp_path / "out" / shard).read_bytes() == (tmp_path / "expected" / shard).read_bytes()


@pytest.mark.parametrize(
    "lines",
    [
        [f"{val_name(i)} {wnid}" for i, wnid in enumerate(VAL, 1)],
        [f"{val_name(i)}\t{WNIDS.index(wnid)}" for i, wnid in enumerate(VAL, 1)],
        [f"val/{val_name(i)[:-5]}, {wnid}" for i, wnid in enumerate(VAL, 1)],
    ],
)
def test_labels_from_a_text_file(tmp_path, lines):
    tree(tmp_path / "set")
    (tmp_path / "labels.txt").write_text("\n".join(lines))
    source = open_source(tmp_path / "set", val_labels=tmp_path / "labels.txt")
    assert {item.file: item.label for item in source.splits["val"]} == {
        f"val/{val_name(i)}": WNIDS.index(wnid) for i, wnid in enumerate(VAL, 1)
    }


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "no label for 5 of 5 images, such as ILSVRC2012_val_00000001.JPEG"),
        (["1 0", "2 0"], "no label for 5 of 5"),
        ([f"{val_name(i)} 0" for i in range(1, 5)], "no label for 1 of 5 images, such as ILSVRC2012_val_00000005.JPEG"),
        ([f"{val_name(i)} 0" for i in range(1, 7)], "1 of the 6 labels .* such as that of ILSVRC2012_val_00000006"),
        ([f"{val_name(i)} {i - 1}" for i in range(1, 6)], "line 5 of .* gives class 4 of 4; count classes from 0"),
        ([f"{val_name(i)} n99999999" for i in range(1, 6)], "gives ILSVRC2012_val_00000001.JPEG the class n99999999"),
        ([f"{val_name(1)} 0"] * 2, "names ILSVRC2012_val_00000001.JPEG twice"),
        ([val_name(1)], "line 1 of .* is 'ILSVRC2012_val_00000001.JPEG'; write an image's name and its class"),
        (["1", "2"], "class ids alone, and .*meta.mat, which tells their classes, is missing"),
    ],
)
def test_labels_that_do_not_fit_are_refused(tmp_path, lines, message):
    tree(tmp_path / "set")
    (tmp_path / "labels.txt").write_text("\n".join(lines))
    with pytest.raises(ConfigError, match=f"val_labels: .*{message}"):
        open_source(tmp_path / "set", val_labels=tmp_path / "labels.txt")


def test_ground_truth_must_fit_the_images(tmp_path):
    root = layout("devkit", tmp_path / "set")
    truth = root / "ILSVRC2012_devkit_t12" / "data" / "ILSVRC2012_validation_ground_truth.txt"
    truth.write_text(TRUTH + "1\n")
    with pytest.raises(ConfigError, match="1 of the 6 labels .* such as that of number 6"):
        open_source(root)
    truth.write_text(TRUTH.replace("4", "77"))
    with pytest.raises(ConfigError, match="has the id 77, which meta.mat lacks"):
        open_source(root)
    truth.write_text(TRUTH)
    os.rename(root / "val" / val_name(2), root / "val" / val_name(6))
    with pytest.raises(ConfigError, match="no label for 1 of 5 images, such as ILSVRC2012_val_00000006"):
        open_source(root)
    os.rename(root / "val" / val_name(6), root / "val" / "photo.JPEG")
    with pytest.raises(ConfigError, match="photo.JPEG is not numbered"):
        open_source(root)
    truth.with_name("meta.mat").write_bytes(b"not a mat file")
    with pytest.raises(ConfigError, match="meta.mat of .* cannot be read"):
        open_source(root)


def test_imagenet_names_what_is_missing(tmp_path):
    root = tree(tmp_path / "set")
    with pytest.raises(ConfigError, match="val_labels: the 5 images of val lie in no class folders"):
        open_source(root)
    assert [item.label for item in open_source(root, "folder").splits["val"]] == [-1] * 5
    (root / "train" / "stray.JPEG").write_bytes(jpeg(0))
    with pytest.raises(ConfigError, match="stray.JPEG lies in no class folder"):
        open_source(root, "imagenet")
    os.rename(root / "train" / "stray.JPEG", root / "train" / "n01440764.tar")
    with pytest.raises(ConfigError, match="n01440764.tar has not been unpacked"):
        open_source(root)
    shutil.rmtree(root / "train")
    with pytest.raises(ConfigError, match="no train folder and no ILSVRC2012_img_train.tar"):
        open_source(root, "imagenet")
    with pytest.raises(ConfigError, match="val_labels: .*class folders, which tell the labels"):
        open_source(tree(tmp_path / "sorted", flat=False), val_labels=tmp_path / "labels.txt")
    with pytest.raises(ConfigError, match="val_labels: serves ImageNet's layout, and this is folder"):
        open_source(root, "folder", val_labels=tmp_path / "labels.txt")


@pytest.mark.parametrize("damage", ["inner header", "outer header", "cut", "cut in the last image"])
def test_damaged_imagenet_archives_lose_nothing_silently(tmp_path, damage):
    root = archives(tmp_path / "set", tree(tmp_path / "unpacked"))
    file = root / "ILSVRC2012_img_train.tar"
    data = bytearray(file.read_bytes())
    with tarfile.open(file) as tar:
        second, last = tar.getmembers()[1], tar.getmembers()[-1]
    if damage == "inner header":
        with tarfile.open(fileobj=io.BytesIO(data[second.offset_data :])) as tar:
            data[second.offset_data + tar.getmembers()[1].offset + 5] ^= 0xFF
    elif damage == "outer header":
        data[second.offset + 5] ^= 0xFF
    elif damage == "cut":
        del data[second.offset_data + 3000 :]
    else:
        del data[last.offset_data + 600 :]
    file.write_bytes(data)
    with pytest.raises(ConfigError, match="ILSVRC2012_img_train.tar is damaged"):
        open_source(root)


def test_dangling_links_and_pipes_are_named(tmp_path):
    folder = tree(tmp_path / "set", flat=False) / "train" / WNIDS[0]
    (folder / "gone.jpg").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="folder: .*gone.jpg cannot be read"):
        open_source(tmp_path / "set")
    (folder / "gone.jpg").unlink()
    os.mkfifo(folder / "pipe.jpg")
    with pytest.raises(ConfigError, match="folder: .*pipe.jpg is no file"):
        open_source(tmp_path / "set")


def test_of_an_absurdly_large_file_little_is_read(tmp_path):
    (tmp_path / "a.png").write_bytes(jpeg(0))
    with open(tmp_path / "b.jpg", "wb") as file:
        file.truncate(50 * MAX_BYTES)  # takes no room on the disk
    summary = pack(tmp_path, tmp_path.parent / f"{tmp_path.name}-out", 5000, progress=False)
    assert [entry["file"] for entry in summary["bad"]] == ["b.jpg"]
    assert f"more than {MAX_BYTES}" in summary["bad"][0]["problem"] and summary["splits"]["train"]["samples"] == 1


class Python2Pickler(pickle._Pickler):
    """Writes strings and bytes as Python 2 wrote its strings, which CIFAR's pickles hold."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_string(self, value):
        data = value if isinstance(value, bytes) else value.encode("latin1")
        self.write(b"T" + struct.pack("<i", len(data)) + data)
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = save_string


def python2(value) -> bytes:
    file = io.BytesIO()
    Python2Pickler(file, 2).dump(value)
    return file.getvalue().replace(b"numpy._core.", b"numpy.core.")


def cifar_arrays(count: int) -> tuple[np.ndarray, list[int]]:
    rng = np.random.default_rng(count)
    return rng.integers(0, 256, (count, 3072), dtype=np.uint8), rng.integers(0, 10, count).tolist()


CIFAR10_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def cifar10(folder: Path, dump=python2) -> Path:
    folder.mkdir(parents=True)
    for i, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        data, labels = cifar_arrays(3 + i)
        (folder / name).write_bytes(
            dump(
                {
                    "data": data,
                    "labels": labels,
                    "batch_label": "training batch",
                    "filenames": [f"{n}.png" for n in range(3 + i)],
                }
            )
        )
    (folder / "batches.meta").write_bytes(dump({"label_names": CIFAR10_NAMES, "num_vis": 3072}))
    return folder


def cifar10_binary(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for i, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        data, labels = cifar_arrays(3 + i)
        (folder / f"{name}.bin").write_bytes(np.c_[np.array(labels, np.uint8), data].tobytes())
    (folder / "batches.meta.txt").write_text("\n".join(CIFAR10_NAMES) + "\n\n")
    return folder


def cifar100(folder: Path, dump=python2) -> Path:
    folder.mkdir(parents=True)
    for name, count in (("train", 7), ("test", 4)):
        data, _ = cifar_arrays(count)
        (folder / name).write_bytes(
            dump({"data": data, "fine_labels": list(range(90, 90 + count)), "coarse_labels": [0] * count})
        )
    (folder / "meta").write_bytes(dump({"fine_label_names": [f"fine_{i}" for i in range(100)]}))
    return folder


def dump3(value) -> bytes:
    return pickle.dumps(value, protocol=2)


@pytest.mark.parametrize("form", ["python", "python 3", "archive", "archive itself", "binary", "folder itself"])
def test_cifar10_is_read_from_every_form(tmp_path, form):
    name = "cifar-10-batches-bin" if form == "binary" else "cifar-10-batches-py"
    folder = (
        cifar10_binary(tmp_path / name)
        if form == "binary"
        else cifar10(tmp_path / name, dump3 if form == "python 3" else python2)
    )
    place = folder if form == "folder itself" else tmp_path
    if form.startswith("archive"):
        with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as tar:
            tar.add(folder, folder.name)
        shutil.rmtree(folder)
        place = tmp_path / "cifar-10-python.tar.gz" if form == "archive itself" else tmp_path
    source = open_source(place)
    assert source.kind == "cifar10" and source.classes == CIFAR10_NAMES
    parts = [cifar_arrays(3 + i) for i in range(6)]
    for split, chosen in (("train", parts[:5]), ("val", parts[5:])):
        images, labels = np.concatenate([data for data, _ in chosen]), sum((labels for _, labels in chosen), [])
        items = source.splits[split]
        assert [(item.key, item.label) for item in items] == [
            (f"{CIFAR10_NAMES[label]}/{i:05d}", label) for i, label in enumerate(labels)
        ]
        for item, image in zip(items, images, strict=True):
            png = source.read(item)
            assert png[:4] == b"\x89PNG" and np.array_equal(decode(png), image.reshape(3, 32, 32).transpose(1, 2, 0))


def test_cifar100_has_its_fine_labels_and_is_told_from_cifar10(tmp_path):
    cifar100(tmp_path / "cifar-100-python")
    summary = pack(tmp_path, tmp_path.parent / f"{tmp_path.name}-out", progress=False)
    assert summary["kind"] == "cifar100" and len(summary["classes"]) == 100
    assert {split: size["samples"] for split, size in summary["splits"].items()} == {"train": 7, "val": 4}
    assert [item.label for item in open_source(tmp_path).splits["train"]] == list(range(90, 97))
    cifar10(tmp_path / "cifar-10-batches-py")
    with pytest.raises(ConfigError, match="kind: .* holds CIFAR-10 and CIFAR-100"):
        open_source(tmp_path)
    assert open_source(tmp_path, "cifar10").classes == CIFAR10_NAMES
    with pytest.raises(ConfigError, match="folder: no cifar10 in"):
        open_source(tmp_path / "cifar-100-python", "cifar10")
    with pytest.raises(ConfigError, match="kind: 'mnist' is not known"):
        open_source(tmp_path, "mnist")


class Harmful:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_harmful_pickle_is_refused_by_name_and_does_not_run(tmp_path):
    folder = cifar10(tmp_path / "cifar-10-batches-py")
    harmful = pickle.dumps({"data": Harmful(tmp_path / "ran"), "labels": [0]}, protocol=2)
    pickle.loads(harmful)
    assert (tmp_path / "ran").exists()  # so it does run where pickles are trusted
    os.unlink(tmp_path / "ran")
    (folder / "data_batch_3").write_bytes(harmful)
    with pytest.raises(ConfigError, match=r"data_batch_3: this pickle asks for (posix|nt)\.system, which is no array"):
        open_source(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"data": np.array([{}], object), "labels": [0]}, "an array of object, not of whole numbers"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [0]}, "holds no labelled 32x32 images"),
        ({"data": np.zeros((2, 3072), np.float32), "labels": [0, 1]}, "an array of float32"),
        ({"data": np.zeros((2, 30), np.uint8), "labels": [0, 1]}, "holds no labelled 32x32 images"),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": [10]}, "has the label 10"),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": ["a"]}, "labels that are no class numbers"),
        ([1, 2], "holds no dict"),
        (None, "holds no dict"),
    ],
)
def test_pickles_that_are_not_cifar_are_refused(tmp_path, value, message):
    folder = cifar10(tmp_path / "cifar-10-batches-py")
    (folder / "data_batch_2").write_bytes(dump3(value))
    with pytest.raises(ConfigError, match=message):
        open_source(tmp_path)


def test_damaged_cifar_files_are_named(tmp_path):
    folder = cifar10(tmp_path / "cifar-10-batches-py")
    whole = (folder / "test_batch").read_bytes()
    (folder / "test_batch").write_bytes(whole[:-500])
    with pytest.raises(ConfigError, match="test_batch(:| is damaged)"):
        open_source(tmp_path)
    (folder / "test_batch").unlink()
    with pytest.raises(ConfigError, match="lacks test_batch"):
        open_source(tmp_path)
    (folder / "test_batch").write_bytes(whole)
    (folder / "batches.meta").write_bytes(dump3({"label_names": ["../up", *CIFAR10_NAMES[1:]]}))
    with pytest.raises(ConfigError, match="holds no names of 10 classes"):
        open_source(tmp_path)
    shutil.rmtree(folder)
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"\x1f\x8b cut off")
    with pytest.raises(ConfigError, match="cifar-10-python.tar.gz is damaged"):
        open_source(tmp_path)
    binary = cifar10_binary(tmp_path / "b" / "cifar-10-batches-bin")
    os.truncate(binary / "data_batch_4.bin", 5000)
    with pytest.raises(ConfigError, match="data_batch_4.bin is cut off"):
        open_source(tmp_path / "b")


def test_other_pixels_are_another_set(tmp_path):
    folder = cifar10(tmp_path / "set" / "cifar-10-batches-py")
    pack(tmp_path / "set", tmp_path / "out", progress=False)
    data, labels = cifar_arrays(3)
    (folder / "data_batch_1").write_bytes(dump3({"data": data ^ 1, "labels": labels}))
    with pytest.raises(ConfigError, match="holds shards of other images"):
        pack(tmp_path / "set", tmp_path / "out", progress=False)
