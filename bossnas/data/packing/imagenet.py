"""ImageNet as it is handed out: class folders, Kaggle's tree or the original archives, and labels of its val split."""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from bossnas.data.images import MAX_BYTES
from bossnas.data.packing.image_sets import (
    SUFFIXES,
    ImageFile,
    ImageSet,
    classes_of,
    items_in_classes,
    list_images,
    read_member,
    reader,
    sample_keys,
)
from bossnas.errors import ConfigError
from bossnas.log import progress

ARCHIVES = {"train": "ILSVRC2012_img_train.tar", "val": "ILSVRC2012_img_val.tar"}
KAGGLE = Path("ILSVRC/Data/CLS-LOC")
DEVKIT = "ILSVRC2012_devkit_t12"
TRUTH, META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
LABEL_FILES = ("LOC_val_solution.csv", f"{DEVKIT}/data/{TRUTH}", f"{DEVKIT}.tar.gz", f"data/{TRUTH}", TRUTH)
WNID = re.compile(r"n\d{8}")
NUMBERED = re.compile(r".*_(\d+)")


def looks_like_imagenet(folder: Path) -> bool:
    """Whether the folder has ImageNet's archives, Kaggle's tree, a file of labels, or WordNet ids as classes."""
    if (folder / KAGGLE).is_dir() or any((folder / name).is_file() for name in ARCHIVES.values()):
        return True
    if _find_labels(folder, folder) is not None:
        return True
    if not (folder / "train").is_dir():
        return False
    names = [entry.name for entry in os.scandir(folder / "train") if entry.is_dir() and entry.name[0] != "."]
    return bool(names) and all(map(WNID.fullmatch, names))


def imagenet(folder: Path, val_labels: Path | None = None, show: bool = False) -> ImageSet:
    """The images of ImageNet, or of any set laid out like it; ``show`` shows progress in reading archives.

    ``train`` and ``val`` are folders, or the archives ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, which are
    read in place. Labels are positions in the sorted list of train's class folders. A val split without class folders
    takes its labels from ``val_labels``, or from the devkit or Kaggle's LOC_val_solution.csv where these lie in the
    usual places; keys are ``class/name`` in every layout, so that equal images make equal shards. Raises ConfigError
    for what is missing or damaged, for an image without a label and for a label without an image.
    """
    root = folder / KAGGLE if (folder / KAGGLE).is_dir() else folder
    names, places = _list(root, "train", show)
    if not names:
        raise ConfigError("folder", f"no train folder and no {ARCHIVES['train']} in {root}", "check the path")
    flat = next((name for name in names if "/" not in name), None)
    if flat is not None:
        raise ConfigError(
            "folder",
            f"{root / 'train' / flat} lies in no class folder",
            "move it into one, or use `kind` folder to pack images without labels",
        )
    classes = classes_of(names)
    splits = {"train": _items(root, "train", names, classes, places)}
    names, places = _list(root, "val", show)
    if any("/" in name for name in names):
        if val_labels is not None:
            raise ConfigError("val_labels", f"{root / 'val'} has class folders, which tell the labels", "leave it out")
        splits["val"] = _items(root, "val", names, classes, places)
    elif names:
        file = val_labels or _find_labels(folder, root)
        if file is None:
            raise ConfigError(
                "val_labels",
                f"the {len(names)} images of val lie in no class folders, and none of "
                f"{', '.join(LABEL_FILES[:3])} is in {folder}",
                "name their file",
            )
        wnids = _labels_of(names, _read_labels(file, names, classes), file)
        labels = {wnid: number for number, wnid in enumerate(classes)}
        unknown = next((wnid for wnid in wnids if wnid not in labels), None)
        if unknown is not None:
            raise ConfigError(
                "val_labels",
                f"{file} gives {names[wnids.index(unknown)]} the class {unknown}, which train lacks",
                "check both",
            )
        items = _items(root, "val", names, [], places)
        keys = sample_keys([f"{wnid}/{name}" for wnid, name in zip(wnids, names, strict=True)])
        splits["val"] = [
            item._replace(key=key, label=labels[wnid]) for item, key, wnid in zip(items, keys, wnids, strict=True)
        ]
    elif val_labels is not None:
        raise ConfigError("val_labels", f"there is no val split in {root}", "leave it out")
    for items in splits.values():
        items.sort(key=lambda item: item.key)
    return ImageSet("imagenet", classes, splits, _reader(root))


def _list(root: Path, split: str, show: bool) -> tuple[list[str], dict[str, tuple[int, int]]]:
    """Sorted names of a split's images; of archived ones also (offset, size)."""
    folder, archive = root / split, root / ARCHIVES[split]
    if folder.is_dir():
        packed = next(folder.glob("n*.tar"), None)
        if packed is not None:
            raise ConfigError(
                "folder",
                f"{packed} has not been unpacked",
                f"finish unpacking, or move {folder} away and keep {ARCHIVES[split]}",
            )
        return list_images(folder, split), {}
    if not archive.is_file():
        return [], {}
    places: dict[str, tuple[int, int]] = {}
    length = archive.stat().st_size
    with open(archive, "rb") as file, progress(f"listing {archive.name}, MiB", length >> 20, show=show) as bar:
        try:
            for name, offset, size in _members(file, 0, length):
                if name.endswith(".tar"):
                    wnid = PurePosixPath(name).stem
                    places |= {
                        f"{wnid}/{image}": (start, count)
                        for image, start, count in _members(file, offset, offset + size)
                        if image.lower().endswith(SUFFIXES)
                    }
                elif name.lower().endswith(SUFFIXES):
                    places[PurePosixPath(name).name] = offset, size
                bar.advance(count=(offset + size >> 20) - bar.done)
        except (tarfile.TarError, EOFError) as error:
            raise ConfigError("folder", f"{archive} is damaged ({error})", "download it again") from None
    if not places:
        raise ConfigError("folder", f"{archive} holds no images", "download it again")
    return sorted(places), places


def _members(file: BinaryIO, start: int, end: int) -> Iterator[tuple[str, int, int]]:
    """(name, offset in the file, size) of the files of the tar that lies between ``start`` and ``end``.

    Raises TarError also where a damaged header hides the rest, which tarfile takes for the end.
    """
    file.seek(start)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            if member.offset_data + member.size > end:
                raise tarfile.ReadError(f"it ends within {member.name}")
            if member.isreg():
                yield member.name, member.offset_data, member.size
        file.seek(tar.offset)
        mark = file.read(tarfile.BLOCKSIZE)
        if tar.offset + tarfile.BLOCKSIZE > end or mark.strip(b"\0"):
            raise tarfile.ReadError(f"no valid header at byte {tar.offset}")


def _items(root: Path, split: str, names: list[str], classes: list[str], places: dict) -> list[ImageFile]:
    if not places:
        return items_in_classes(root / split, names, classes, f"{split}/")
    labels = {name: number for number, name in enumerate(classes)}
    return [
        ImageFile(
            f"{ARCHIVES[split]}/{name}", key, labels.get(name.split("/")[0], -1), places[name][1], places[name][0]
        )
        for name, key in zip(names, sample_keys(names), strict=True)
    ]


def _reader(root: Path):
    read_file = reader(root)

    def read(item: ImageFile) -> bytes:
        top = item.file.split("/", 1)[0]
        if top not in ARCHIVES.values():
            return read_file(item)
        with open(root / top, "rb", buffering=0) as file:
            data = os.pread(file.fileno(), min(item.size, MAX_BYTES + 1), item.offset)
        if len(data) < min(item.size, MAX_BYTES + 1):
            raise OSError(f"{root / top} ends within the image")
        return data

    return read


def _find_labels(folder: Path, root: Path) -> Path | None:
    places = [folder, root, *root.parents[2:3]] if root.parts[-3:] == KAGGLE.parts else [folder, root]
    return next((place / name for place in places for name in LABEL_FILES if (place / name).is_file()), None)


def _read_labels(file: Path, names: list[str], classes: list[str]) -> dict[str, str]:
    """{image's name without extension: WordNet id}, from any of the formats that docs/packing.md lists."""
    meta: Path | io.BytesIO = file.parent / META
    try:
        if file.name.endswith((".tar.gz", ".tgz", ".tar")):
            with tarfile.open(file) as tar:
                inside = {PurePosixPath(member.name).name: member for member in tar if member.isreg()}
                if TRUTH not in inside or META not in inside:
                    raise ConfigError(
                        "val_labels", f"{file} lacks {TRUTH} or {META}", f"download {DEVKIT}.tar.gz again"
                    )
                text = read_member(tar, inside[TRUTH]).decode()
                meta = io.BytesIO(read_member(tar, inside[META]))
        else:
            text = file.read_text(encoding="utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError, tarfile.TarError) as error:
        raise ConfigError("val_labels", f"{file} cannot be read ({error})", "check the file") from None
    lines = [line.strip() for line in text.splitlines()]
    while lines and not lines[-1]:
        lines.pop()
    if lines and all(map(str.isdecimal, lines)):
        return _by_number(file, [int(line) for line in lines], names, meta)
    is_kaggle = bool(lines) and lines[0].startswith("ImageId,")
    labels: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        fields = re.split(r"[,\s]+", line)
        if is_kaggle and number == 1:
            continue
        if len(fields) < 2 or len(fields) > 2 and not is_kaggle:
            raise ConfigError(
                "val_labels",
                f"line {number} of {file} is {line[:60]!r}",
                "write an image's name and its class, or class number, on every line",
            )
        name, label = _stem(fields[0]), fields[1]
        if name in labels:
            raise ConfigError("val_labels", f"{file} names {fields[0]} twice", "remove one line")
        if label.isdecimal():
            if int(label) >= len(classes):
                raise ConfigError(
                    "val_labels",
                    f"line {number} of {file} gives class {label} of {len(classes)}",
                    "count classes from 0, in the sorted order of train's class folders",
                )
            label = classes[int(label)]
        labels[name] = label
    return labels


def _by_number(file: Path, ids: list[int], names: list[str], meta: Path | io.BytesIO) -> dict[str, str]:
    """The devkit's ground truth: line n is the ILSVRC id of image number n, and meta.mat says which class that is.

    The ids are not in the order of the WordNet ids.
    """
    from scipy.io import loadmat

    if isinstance(meta, Path) and not meta.is_file():
        raise ConfigError(
            "val_labels",
            f"{file} holds class ids alone, and {meta}, which tells their classes, is missing",
            "put the devkit's meta.mat there",
        )
    try:
        synsets = loadmat(meta, variable_names=["synsets"], squeeze_me=True)["synsets"]
        wnids = {int(i): str(wnid) for i, wnid in zip(synsets["ILSVRC2012_ID"], synsets["WNID"], strict=True)}
    except Exception as error:  # loadmat raises nearly anything on a damaged file
        raise ConfigError(
            "val_labels",
            f"the meta.mat of {file} cannot be read ({type(error).__name__}: {error})",
            "download the devkit again",
        ) from None
    unknown = next((i for i in ids if i not in wnids), None)
    if unknown is not None:
        raise ConfigError(
            "val_labels", f"{file} has the id {unknown}, which meta.mat lacks", "take both from one devkit"
        )
    numbers = {}
    for name in names:
        match = NUMBERED.fullmatch(_stem(name))
        if match is None or int(match[1]) in numbers:
            raise ConfigError(
                "val_labels",
                f"the image {name} is not numbered as ImageNet's are, and {file} tells labels by number",
                "use a file of lines 'name class'",
            )
        numbers[int(match[1])] = _stem(name)
    return {numbers.get(number, f"number {number}"): wnids[i] for number, i in enumerate(ids, 1)}


def _labels_of(names: list[str], labels: dict[str, str], file: Path) -> list[str]:
    stems = [_stem(name) for name in names]
    missing = [name for name, stem in zip(names, stems, strict=True) if stem not in labels]
    if missing:
        raise ConfigError(
            "val_labels",
            f"{file} has no label for {len(missing)} of {len(names)} images, such as {missing[0]}",
            "complete the file",
        )
    extra = labels.keys() - set(stems)
    if extra:
        raise ConfigError(
            "val_labels",
            f"{len(extra)} of the {len(labels)} labels in {file} belong to no image, such as that of {min(extra)}",
            "complete the images, or remove these labels",
        )
    return [labels[stem] for stem in stems]


def _stem(name: str) -> str:
    """An image's name without folders and extension."""
    name = name.rsplit("/", 1)[-1]
    return name.rsplit(".", 1)[0] if name.lower().endswith(SUFFIXES) else name
