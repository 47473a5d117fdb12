"""What `bossnas pack` reads besides image folders: ImageNet in its layouts, CIFAR, and what it refuses; --verify."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from bossnas.errors import ConfigError
from bossnas.images import decode
from bossnas.pack import pack
from bossnas.shards import ShardIndex
from bossnas.verify import verify

WNIDS = ("n01440764", "n01443537", "n02110341")
DEVKIT = "ILSVRC2012_devkit_t12"


def picture(seed: int, size: tuple[int, int] = (9, 8), kind: str = "JPEG") -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def imagenet_tree(root: Path, base: str = "", flat: bool = True) -> dict[str, int]:
    """Three classes of two training images, six validation images. -> the label of each validation image."""
    for c, wnid in enumerate(WNIDS):
        (root / base / "train" / wnid).mkdir(parents=True)
        for i in range(2):
            (root / base / "train" / wnid / f"{wnid}_{i}.JPEG").write_bytes(picture(10 * c + i))
    labels = {}
    for i in range(1, 7):
        label = (i * 2) % 3
        name = f"ILSVRC2012_val_{i:08d}"
        folder = root / base / "val" / ("" if flat else WNIDS[label])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.JPEG").write_bytes(picture(100 + i))
        labels[name] = label
    return labels


def devkit(labels: dict[str, int]) -> dict[str, bytes]:
    """The devkit's two files. Its ids are not in the order of the WordNet ids."""
    ids = {0: 3, 1: 1, 2: 2}
    synsets = np.array([(ids[c], wnid) for c, wnid in enumerate(WNIDS)],
                       dtype=[("ILSVRC2012_ID", object), ("WNID", object)])
    file = io.BytesIO()
    savemat(file, {"synsets": synsets})
    truth = "".join(f"{ids[labels[name]]}\n" for name in sorted(labels))
    return {"meta.mat": file.getvalue(), "ILSVRC2012_validation_ground_truth.txt": truth.encode()}


def val_labels_of(out: Path) -> dict[str, int]:
    index = ShardIndex.open(str(out / "val-*.tar"))
    return {index.key(i).split("/")[1]: index.read(i)[2] for i in range(len(index))}


def checksums(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.glob("*.tar"))}


@pytest.mark.parametrize("layout", ["folders", "kaggle", "devkit", "devkit archive", "names and classes",
                                    "names and numbers"])
def test_imagenet_in_every_layout_makes_the_same_shards(tmp_path, layout):
    folder, given = tmp_path / "imagenet", None
    labels = imagenet_tree(folder, "ILSVRC/Data/CLS-LOC" if layout == "kaggle" else "", flat=layout != "folders")
    if layout == "kaggle":
        lines = [f"{name},{WNIDS[label]} 1 2 3 4 {WNIDS[0]} 5 6 7 8" for name, label in labels.items()]
        (folder / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + "\n".join(lines) + "\n")
    elif layout == "devkit":
        (folder / DEVKIT / "data").mkdir(parents=True)
        for name, content in devkit(labels).items():
            (folder / DEVKIT / "data" / name).write_bytes(content)
    elif layout == "devkit archive":
        with tarfile.open(folder / f"{DEVKIT}.tar.gz", "w:gz") as tar:
            for name, content in devkit(labels).items():
                member = tarfile.TarInfo(f"{DEVKIT}/data/{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    elif layout.startswith("names"):
        given = tmp_path / "labels.txt"
        given.write_text("".join(f"{name}.JPEG {WNIDS[label] if 'classes' in layout else label}\n"
                                 for name, label in labels.items()))
    made = pack(folder, tmp_path / "out", progress=False, val_labels=given)
    assert made["kind"] == "imagenet" and made["classes"] == list(WNIDS) and made["bad"] == []
    assert made["splits"]["train"]["samples"] == made["splits"]["val"]["samples"] == 6
    assert val_labels_of(tmp_path / "out") == labels
    imagenet_tree(tmp_path / "plain", flat=False)
    pack(tmp_path / "plain", tmp_path / "expected", progress=False)
    assert checksums(tmp_path / "out") == checksums(tmp_path / "expected")


def test_the_original_archives_of_imagenet_are_read_in_place(tmp_path):
    labels = imagenet_tree(tmp_path / "plain", flat=False)
    folder = tmp_path / "archives"
    folder.mkdir()
    with tarfile.open(folder / "ILSVRC2012_img_train.tar", "w") as outer:
        for wnid in WNIDS:
            inner = tmp_path / f"{wnid}.tar"
            with tarfile.open(inner, "w") as tar:
                for file in sorted((tmp_path / "plain" / "train" / wnid).iterdir()):
                    tar.add(file, file.name)
            outer.add(inner, inner.name)
    with tarfile.open(folder / "ILSVRC2012_img_val.tar", "w") as tar:
        for file in sorted((tmp_path / "plain" / "val").rglob("*.JPEG")):
            tar.add(file, file.name)
    (folder / DEVKIT / "data").mkdir(parents=True)
    for name, content in devkit(labels).items():
        (folder / DEVKIT / "data" / name).write_bytes(content)
    assert pack(folder, tmp_path / "out", progress=False)["kind"] == "imagenet"
    pack(tmp_path / "plain", tmp_path / "expected", progress=False)
    assert checksums(tmp_path / "out") == checksums(tmp_path / "expected")
    with open(folder / "ILSVRC2012_img_val.tar", "r+b") as file:
        file.truncate(2000)
    with pytest.raises(ConfigError, match="ILSVRC2012_img_val.tar is damaged"):
        pack(folder, tmp_path / "again", progress=False)


def test_labels_that_do_not_fit_are_refused(tmp_path):
    labels = imagenet_tree(tmp_path / "images")
    lines = [f"{name}.JPEG {label}" for name, label in labels.items()]

    def refused(text: list[str], words: str) -> None:
        (tmp_path / "labels.txt").write_text("\n".join(text))
        with pytest.raises(ConfigError, match=words) as error:
            pack(tmp_path / "images", tmp_path / "out", progress=False, val_labels=tmp_path / "labels.txt")
        assert error.value.field == "val_labels" and not (tmp_path / "out").exists()
    refused(lines[:-1], "no label for 1 of 6 images, such as ILSVRC2012_val_00000006.JPEG")
    refused([*lines, "other.JPEG 1"], "1 of the 7 labels .* belong to no image, such as that of other")
    refused([*lines[:-1], "ILSVRC2012_val_00000006.JPEG 7"], "line 6 .* gives class 7 of 3")
    refused([*lines[:-1], "ILSVRC2012_val_00000006.JPEG n09999999"], "the class n09999999, which train lacks")
    refused([*lines, lines[0]], "names ILSVRC2012_val_00000001.JPEG twice")
    refused(["a b c"], "line 1 .* is 'a b c'")
    with pytest.raises(ConfigError, match="the 6 images of val lie in no class folders"):
        pack(tmp_path / "images", tmp_path / "out", progress=False)


def cifar_folder(root: Path, kind: str = "cifar10", each: int = 4) -> dict[str, np.ndarray]:
    """CIFAR's pickles, written as its makers did. -> by split the pictures [N, 32, 32, 3] and labels."""
    names = ([f"data_batch_{i}" for i in range(1, 6)], ["test_batch"]) if kind == "cifar10" else (["train"], ["test"])
    folder = root / ("cifar-10-batches-py" if kind == "cifar10" else "cifar-100-python")
    folder.mkdir(parents=True)
    rng, truth = np.random.default_rng(0), {}
    classes = 10 if kind == "cifar10" else 100
    for split, files in zip(("train", "val"), names, strict=True):
        pictures, labels = [], []
        for name in files:
            data = rng.integers(0, 256, (each, 3072), dtype=np.uint8)
            of_file = rng.integers(0, classes, each).tolist()
            key = "labels" if kind == "cifar10" else "fine_labels"
            (folder / name).write_bytes(pickle.dumps({"data": data, key: of_file, "batch_label": name}, protocol=2))
            pictures.append(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
            labels += of_file
        truth[split] = np.concatenate(pictures), labels
    meta = ("batches.meta", "label_names") if kind == "cifar10" else ("meta", "fine_label_names")
    (folder / meta[0]).write_bytes(pickle.dumps({meta[1]: [f"class{i}" for i in range(classes)]}, protocol=2))
    return truth


@pytest.mark.parametrize("kind", ["cifar10", "cifar100"])
@pytest.mark.parametrize("archived", [False, True])
def test_cifar_is_packed_without_loss(tmp_path, kind, archived):
    truth = cifar_folder(tmp_path / "data", kind)
    source = tmp_path / "data"
    if archived:
        inside, = source.iterdir()
        source = tmp_path / f"{'cifar-10' if kind == 'cifar10' else 'cifar-100'}-python.tar.gz"
        with tarfile.open(source, "w:gz") as tar:
            tar.add(inside, inside.name)
    made = pack(source, tmp_path / "out", progress=False)
    assert made["kind"] == kind and len(made["classes"]) == (10 if kind == "cifar10" else 100)
    for split, (pictures, labels) in truth.items():
        index = ShardIndex.open(str(tmp_path / "out" / f"{split}-*.tar"))
        assert len(index) == len(labels)
        for i in range(len(index)):
            data, ext, label = index.read(i)
            name, number = index.key(i).split("/")
            assert ext == "png" and label == labels[int(number)] and name == f"class{label}"
            assert np.array_equal(decode(data), pictures[int(number)])


def test_the_binary_cifar_gives_the_same_images(tmp_path):
    truth = cifar_folder(tmp_path / "python")
    folder = tmp_path / "binary" / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    (folder / "batches.meta.txt").write_text("".join(f"class{i}\n" for i in range(10)) + "\n")
    for split, names in (("train", [f"data_batch_{i}" for i in range(1, 6)]), ("val", ["test_batch"])):
        pictures, labels = truth[split]
        rows = np.column_stack([np.array(labels, np.uint8), pictures.transpose(0, 3, 1, 2).reshape(len(labels), -1)])
        for name, part in zip(names, np.array_split(rows, len(names)), strict=True):
            (folder / f"{name}.bin").write_bytes(part.tobytes())
    for name in ("python", "binary"):
        pack(tmp_path / name, tmp_path / f"out-{name}", progress=False)
    assert checksums(tmp_path / "out-python") == checksums(tmp_path / "out-binary")


class Harm:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def test_a_harmful_pickle_is_refused_and_not_run(tmp_path):
    cifar_folder(tmp_path / "data")
    for name in ("data_batch_3", "batches.meta"):
        file = tmp_path / "data" / "cifar-10-batches-py" / name
        good = file.read_bytes()
        file.write_bytes(pickle.dumps({"data": Harm(tmp_path / "mark"), "labels": [1]}, protocol=2))
        with pytest.raises(ConfigError, match="asks for posix.system, which is no array and may do harm"):
            pack(tmp_path / "data", tmp_path / "out", progress=False)
        assert not (tmp_path / "mark").exists() and not (tmp_path / "out").exists()
        file.write_bytes(good[:50])
        with pytest.raises(ConfigError, match=f"{name} is damaged|{name}: "):
            pack(tmp_path / "data", tmp_path / "out", progress=False)
        file.write_bytes(good)


def test_the_wrong_kind_is_refused(tmp_path):
    cifar_folder(tmp_path / "both")
    cifar_folder(tmp_path / "both", "cifar100")
    (tmp_path / "empty").mkdir()
    for folder, kind, words in (("both", "auto", "holds CIFAR-10 and CIFAR-100"), ("empty", "cifar10", "no cifar10 in"),
                                ("empty", "mnist", "'mnist' is not known"), ("absent", "auto", "there is no"),
                                ("empty", "imagenet", "no train folder")):
        with pytest.raises(ConfigError, match=words):
            pack(tmp_path / folder, tmp_path / "out", progress=False, kind=kind)


def many_images(root: Path) -> Path:
    for c in range(2):
        (root / f"class{c}").mkdir(parents=True)
        for i in range(12):
            (root / f"class{c}" / f"{i}.png").write_bytes(picture(50 * c + i, (300, 300), "PNG"))
    return root


def test_the_number_of_workers_changes_no_byte(tmp_path):
    images = many_images(tmp_path / "images")
    for workers in (1, 3):
        pack(images, tmp_path / str(workers), 1, progress=False, workers=workers)
    assert len(checksums(tmp_path / "1")) > 3 and checksums(tmp_path / "1") == checksums(tmp_path / "3")
    sums = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=tmp_path / "1", capture_output=True, text=True)
    assert sums.returncode == 0 and sums.stdout.count(": OK") == len(checksums(tmp_path / "1"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_packing_goes_on(tmp_path, project_root, number):
    images = many_images(tmp_path / "images")
    pack(images, tmp_path / "expected", 1, progress=False)
    code = ("import sys, time; from bossnas import pack; read = pack.decode\n"
            "def slow(data): time.sleep(0.1); return read(data)\n"
            "pack.decode = slow; pack.pack(sys.argv[1], sys.argv[2], 1, progress=False, workers=1)")
    process = subprocess.Popen([sys.executable, "-c", code, images, tmp_path / "out"], cwd=project_root,
                               env={**os.environ, "PYTHONPATH": f"{project_root}:{project_root / 'kernels'}"},
                               stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "out").glob("train-*.tar")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    process.wait(30)
    assert 1 <= len(checksums(tmp_path / "out")) < len(checksums(tmp_path / "expected"))
    made = pack(images, tmp_path / "out", 1, progress=False)
    assert made["kept"] >= 1 and checksums(tmp_path / "out") == checksums(tmp_path / "expected")
    assert not [path for path in (tmp_path / "out").iterdir() if "tmp" in path.name]
    assert verify(tmp_path / "out", progress=False)["problems"] == []


def test_verify_names_the_damaged_shard_and_packing_again_mends_it(tmp_path):
    images = many_images(tmp_path / "images")
    pack(images, tmp_path / "out", 1, progress=False)
    good = checksums(tmp_path / "out")
    found = verify(tmp_path / "out", progress=False)
    assert found["problems"] == [] and found["samples"] == 24 and found["shards"] == len(good) and found["checksums"]
    names = sorted(good)
    with open(tmp_path / "out" / names[0], "r+b") as file:  # one bit of a picture
        file.seek(5000)
        byte = file.read(1)[0]
        file.seek(5000)
        file.write(bytes([byte ^ 1]))
    (tmp_path / "out" / names[1]).unlink()
    found = verify(tmp_path / "out", progress=False)
    assert [problem["shard"] for problem in found["problems"]] == names[:2]
    assert "checksum" in found["problems"][0]["problem"] and "missing" in found["problems"][1]["problem"]
    assert pack(images, tmp_path / "out", 1, progress=False)["kept"] == len(good) - 2
    assert checksums(tmp_path / "out") == good


def test_verify_of_shards_from_elsewhere(tmp_path):
    images = many_images(tmp_path / "images")
    pack(images, tmp_path / "out", 1, progress=False)
    (tmp_path / "out" / "pack.json").unlink()
    found = verify(tmp_path / "out", progress=False)
    assert found["problems"] == [] and not found["checksums"] and found["samples"] == 24
    with tarfile.open(tmp_path / "out" / "x.tar", "w") as tar:
        member = tarfile.TarInfo("a.png")
        member.size = 5
        tar.addfile(member, io.BytesIO(b"wrong"))
    problem, = verify(tmp_path / "out", progress=False)["problems"]
    assert problem["shard"] == "x.tar" and "no JPEG, PNG or WebP" in problem["problem"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no shards"):
        verify(tmp_path / "empty", progress=False)
