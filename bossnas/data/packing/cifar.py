"""CIFAR-10 and CIFAR-100 as their makers hand them out: Python pickles, of which only arrays are read, or binary."""

from __future__ import annotations

import hashlib
import io
import pickle
import re
import tarfile
import zlib
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from bossnas.data.packing.image_sets import ImageFile, ImageSet, read_member
from bossnas.errors import ConfigError

BATCHES = [f"data_batch_{i}" for i in range(1, 6)]
FOLDERS = {"cifar10": ("cifar-10-batches-py", "cifar-10-batches-bin"), "cifar100": ("cifar-100-python",)}
ARCHIVES = {"cifar10": ("cifar-10-python.tar.gz", "cifar-10-binary.tar.gz"), "cifar100": ("cifar-100-python.tar.gz",)}
CLASSES = {"cifar10": 10, "cifar100": 100}
# kind of files: (files of train, files of val, file of the class names)
PYTHON = {"cifar10": (BATCHES, ["test_batch"], "batches.meta"), "cifar100": (["train"], ["test"], "meta")}
BINARY = ([f"{name}.bin" for name in BATCHES], ["test_batch.bin"], "batches.meta.txt")
SIDE, PIXELS = 32, 3 * 32 * 32
MAX_MEMBER = 2**28  # bytes of a file in an archive


def find_cifar(folder: Path) -> dict[str, Path]:
    """Where CIFAR lies: {"cifar10" or "cifar100": its folder or archive} for a folder above it, or for that itself."""
    found = {}
    for kind, names in FOLDERS.items():
        inside = [folder / name for name in names if (folder / name).is_dir()]
        inside += [folder / name for name in ARCHIVES[kind] if (folder / name).is_file()]
        if folder.is_file() and folder.name in ARCHIVES[kind] or _holds(folder, kind):
            inside.insert(0, folder)
        if inside:
            found[kind] = inside[0]
    return found


def cifar(place: Path, kind: str) -> ImageSet:
    """CIFAR-10 or CIFAR-100 (with its fine labels) from what ``find_cifar`` found; items are read as PNG files.

    Its test split is called "val". Keys are ``class/number``. Raises ConfigError for missing and damaged files, and for
    a pickle that asks for anything but numpy arrays, none of which is run.
    """
    files = _Files(place)
    binary = kind == "cifar10" and files.has(BINARY[0][0])
    train, val, meta = BINARY if binary else PYTHON[kind]
    if binary:
        classes = files.read(meta).decode("latin1").split()
    else:
        names = files.load(meta).get("label_names" if kind == "cifar10" else "fine_label_names")
        classes = [str(name) for name in names] if isinstance(names, list) else []
    if len(set(classes)) != CLASSES[kind] or not all(re.fullmatch(r"\w+", name) for name in classes):
        raise ConfigError("folder", f"{meta} of {place} holds no names of {CLASSES[kind]} classes", "download it again")
    pixels, splits, digest, rows = [], {}, hashlib.sha256(), 0
    for split, names in (("train", train), ("val", val)):
        images, labels = _stack([(_from_binary if binary else _from_pickle)(files, name, kind) for name in names])
        if labels.max() >= len(classes):
            raise ConfigError("folder", f"{place} has the label {labels.max()}", "download it again")
        keys = [f"{classes[label]}/{i:05d}" for i, label in enumerate(labels)]
        splits[split] = [
            ImageFile(f"{split}/{key}.png", key, int(label), PIXELS, rows + i)
            for i, (key, label) in enumerate(zip(keys, labels, strict=True))
        ]
        rows += len(images)
        digest.update(images.data)
        pixels.append(images)
    images_n3hw = np.concatenate(pixels).reshape(-1, 3, SIDE, SIDE)

    def read(item: ImageFile) -> bytes:
        png = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(images_n3hw[item.offset].transpose(1, 2, 0))).save(png, "PNG")
        return png.getvalue()

    return ImageSet(kind, classes, splits, read, digest.hexdigest())


class _Files:
    """The files of a folder, or of a tar archive, whose own folder counts as that folder."""

    def __init__(self, place: Path):
        self.place = place
        self.archive: dict[str, bytes] | None = None
        if place.is_file():
            self.archive = {}
            try:
                with tarfile.open(place) as tar:
                    for member in tar:
                        if member.isreg() and member.size <= MAX_MEMBER:
                            self.archive[PurePosixPath(member.name).name] = read_member(tar, member)
            except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
                raise ConfigError("folder", f"{place} is damaged ({error})", "download it again") from None

    def has(self, name: str) -> bool:
        return (self.place / name).is_file() if self.archive is None else name in self.archive

    def read(self, name: str) -> bytes:
        if not self.has(name):
            raise ConfigError("folder", f"{self.place} lacks {name}", "download it again")
        return (self.place / name).read_bytes() if self.archive is None else self.archive[name]

    def load(self, name: str) -> dict[str, Any]:
        """A pickled dict. Raises ConfigError for a damaged one, and for one that asks for anything but arrays."""
        try:
            value = _ArraysOnly(io.BytesIO(self.read(name)), encoding="latin1").load()
        except ConfigError:
            raise
        except pickle.UnpicklingError as error:
            raise ConfigError("folder", f"{self.place / name}: {error}", "download it again") from None
        except Exception as error:  # damaged pickles raise nearly anything
            raise ConfigError(
                "folder", f"{self.place / name} is damaged ({type(error).__name__}: {error})", "download it again"
            ) from None
        if not isinstance(value, dict):
            raise ConfigError("folder", f"{self.place / name} holds no dict", "download it again")
        return {key: field.array if isinstance(field, _Array) else field for key, field in value.items()}


class _ArraysOnly(pickle.Unpickler):
    """Reads plain values and numpy arrays, these without numpy's own unpickling. Any other global is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return _Array
        known = {("numpy", "ndarray"): _Array, ("numpy", "dtype"): _Dtype, ("_codecs", "encode"): _encode}
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"this pickle asks for {module}.{name}, which is no array and may do harm")
        return known[module, name]


class _Dtype:
    def __init__(self, code: str, *_: Any):
        self.dtype = np.dtype(str(code))
        if self.dtype.kind not in "iub":
            raise pickle.UnpicklingError(f"this pickle has an array of {self.dtype}, not of whole numbers")

    def __setstate__(self, state: tuple) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    def __init__(self, *_: Any):
        self.array = np.empty(0, np.uint8)

    def __setstate__(self, state: tuple) -> None:
        _, shape, kind, is_fortran, data = state
        data = data.encode("latin1") if isinstance(data, str) else data  # Python 2 had no bytes
        self.array = np.frombuffer(data, kind.dtype).reshape(shape, order="F" if is_fortran else "C")


def _encode(text: str, encoding: str) -> bytes:
    """How Python 3 pickles bytes in protocol 2."""
    return text.encode("latin1")


def _from_pickle(files: _Files, name: str, kind: str) -> tuple[np.ndarray, np.ndarray]:
    batch = files.load(name)
    labels = batch.get("labels" if kind == "cifar10" else "fine_labels")
    return _check(files, name, batch.get("data"), labels)


def _from_binary(files: _Files, name: str, kind: str) -> tuple[np.ndarray, np.ndarray]:
    data = np.frombuffer(files.read(name), np.uint8)
    if len(data) % (1 + PIXELS):
        raise ConfigError("folder", f"{files.place / name} is cut off", "download it again")
    rows = data.reshape(-1, 1 + PIXELS)
    return _check(files, name, rows[:, 1:], rows[:, 0])


def _check(files: _Files, name: str, data: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    """-> images uint8 [N, 3072], labels int64 [N]"""
    is_images = isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.ndim == 2 and data.shape[1] == PIXELS
    if not is_images or not isinstance(labels, (list, np.ndarray)) or not 0 < len(labels) == len(data):
        raise ConfigError("folder", f"{files.place / name} holds no labelled {SIDE}x{SIDE} images", "download it again")
    try:
        numbers = np.array([int(label) for label in labels])
    except (TypeError, ValueError):
        numbers = np.array([-1])
    if numbers.min() < 0:
        raise ConfigError("folder", f"{files.place / name} has labels that are no class numbers", "download it again")
    return data, numbers


def _stack(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    images, labels = zip(*parts, strict=True)
    return np.concatenate(images), np.concatenate(labels)


def _holds(folder: Path, kind: str) -> bool:
    if kind == "cifar10" and (folder / BINARY[0][0]).is_file():
        return True
    return all((folder / name).is_file() for name in (PYTHON[kind][0][0], PYTHON[kind][2]))
