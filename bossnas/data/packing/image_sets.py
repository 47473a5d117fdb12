"""Sets of images to pack: what every kind of set is turned into, and plain image folders."""

from __future__ import annotations

import os
import stat
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from bossnas.data.images import EXTENSIONS, MAX_BYTES
from bossnas.errors import ConfigError

SUFFIXES = tuple(f".{ext}" for ext in EXTENSIONS)


class ImageFile(NamedTuple):
    """One image of a set."""

    file: str  # its name below the set's folder or in its archive, for messages
    key: str  # of the sample: no dots, all different within a split
    label: int  # -1: none
    size: int  # bytes, for cutting shards to size
    offset: int = 0  # where it starts in an archive; its row in an array


@dataclass(frozen=True)
class ImageSet:
    """A set of images as it lies on the disk. ``read`` gives an item's file content and may be called by threads."""

    kind: str  # folder | imagenet | cifar10 | cifar100
    classes: list[str]  # label -> name
    splits: dict[str, list[ImageFile]]  # "train", and "val" where there is one; the order is always the same
    read: Callable[[ImageFile], bytes]
    fingerprint: str = ""  # of content that the items' names and sizes do not tell


def image_folder(folder: Path) -> ImageSet:
    """The JPEG, PNG and WebP files under a folder.

    ``train/`` and ``val/`` become splits of these names; a folder without ``train/`` is all "train". Where the images
    of a split lie in class folders, the sorted names of train's class folders give the labels. Raises ConfigError for
    a folder without images, images beside class folders, and class folders of val that train lacks.
    """
    has_splits = (folder / "train").is_dir()
    classes: list[str] = []
    splits = {}
    for split in ("train", "val") if has_splits else ("train",):
        root = folder / split if has_splits else folder
        names = list_images(root, split)
        if split == "train":
            classes = classes_of(names)
        prefix = f"{split}/" if has_splits else ""
        if names:
            splits[split] = items_in_classes(root, names, classes, prefix)
    return ImageSet("folder", classes, splits, reader(folder))


def list_images(root: Path, split: str = "train") -> list[str]:
    """Sorted names of the images below ``root``, relative to it. Raises ConfigError where train has none."""
    names = sorted(_walk(root))
    if not names and split == "train":
        raise ConfigError("folder", f"no {', '.join(EXTENSIONS)} file under {root}", "check the path")
    return names


def classes_of(names: list[str]) -> list[str]:
    """The sorted names of the class folders that image names begin with."""
    return sorted({name.split("/")[0] for name in names if "/" in name})


def items_in_classes(root: Path, names: list[str], classes: list[str], prefix: str) -> list[ImageFile]:
    """The images ``names`` below ``root``, labelled by their class folder, or all unlabelled where there are none."""
    tops = [name.split("/")[0] if "/" in name else None for name in names]
    if None in tops and any(tops):
        raise ConfigError(
            "folder", f"{root / names[tops.index(None)]} lies beside class folders", "move it into one, or remove it"
        )
    labels: dict[str | None, int] = {name: number for number, name in enumerate(classes)}
    unknown = {top for top in tops if top} - set(labels)
    if unknown:
        raise ConfigError(
            "folder",
            f"{root} has class folders that train lacks, such as {min(unknown)}",
            "give both splits the same class folders",
        )
    return [
        ImageFile(prefix + name, key, labels.get(top, -1), _size(root / name))
        for name, key, top in zip(names, sample_keys(names), tops, strict=True)
    ]


def sample_keys(names: list[str]) -> list[str]:
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


def reader(folder: Path) -> Callable[[ImageFile], bytes]:
    """Reads items that are files below ``folder``: of an absurdly large one only as much as shows that it is."""

    def read(item: ImageFile) -> bytes:
        with open(folder / item.file, "rb") as file:
            return file.read(min(os.fstat(file.fileno()).st_size, MAX_BYTES + 1))

    return read


def read_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """The bytes of a member that is a regular file."""
    file = tar.extractfile(member)
    assert file is not None, member.name
    return file.read()


def _size(path: Path) -> int:
    try:
        found = path.stat()
    except OSError as error:
        raise ConfigError("folder", f"{path} cannot be read ({error.strerror})", "restore it, or remove it") from None
    if not stat.S_ISREG(found.st_mode):  # a pipe would be waited for
        raise ConfigError("folder", f"{path} is no file", "remove it")
    return found.st_size


def _walk(root: Path) -> Iterable[str]:
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield os.path.relpath(os.path.join(folder, name), root).replace(os.sep, "/")
