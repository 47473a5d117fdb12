"""Makes this folder's shards from Fashion-MNIST: ``python -m bossnas.data.sample.make FOLDER_OF_THE_IDX_FILES``.

The four ``*-ubyte.gz`` files are those of github.com/zalandoresearch/fashion-mnist, which Debian packages as
``dataset-fashion-mnist``. The choice of images is seeded and balanced over the classes. The pixels and
their order are the same everywhere; the bytes of the files depend on the zlib that Pillow and Python use.
"""

from __future__ import annotations

import gzip
import io
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from bossnas.data.packing.pack import write_shard

SEED, CLASSES = 0, 10
SPLITS = {"train": ("train", 200), "val": ("t10k", 50)}  # split: (files' prefix, images per class)


def read_idx(path: Path) -> np.ndarray:
    """An IDX file of bytes: header (two zeros, type 8, number of dimensions, big-endian sizes), data."""
    data = gzip.decompress(path.read_bytes())
    if data[:3] != b"\0\0\x08":
        raise ValueError(f"{path}: expected an IDX file of unsigned bytes")
    shape = np.frombuffer(data, ">u4", data[3], 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)


def choose(labels: np.ndarray, per_class: int, rng: np.random.Generator) -> np.ndarray:
    """``per_class`` indices of every class, in random order."""
    chosen = [rng.choice(np.flatnonzero(labels == label), per_class, replace=False) for label in range(CLASSES)]
    return rng.permutation(np.concatenate(chosen))


def main(source: Path, out: Path) -> None:
    """Writes ``<split>-000000.tar.gz`` for both splits to ``out``, from the IDX files in ``source``."""
    rng = np.random.Generator(np.random.PCG64(SEED))
    for split, (prefix, per_class) in SPLITS.items():
        images = read_idx(source / f"{prefix}-images-idx3-ubyte.gz")
        labels = read_idx(source / f"{prefix}-labels-idx1-ubyte.gz")
        samples = []
        for i in choose(labels, per_class, rng):
            png = io.BytesIO()
            Image.fromarray(images[i]).save(png, "PNG", optimize=True)
            samples.append(((f"{i}.png", f"{prefix}/{i:05d}", int(labels[i])), (png.getvalue(), None)))
        with tempfile.TemporaryDirectory() as folder:
            tar = Path(folder) / f"{split}.tar"
            write_shard(tar, samples)
            packed = gzip.compress(tar.read_bytes(), 9, mtime=0)
        (out / f"{split}-000000.tar.gz").write_bytes(packed)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(__file__).parent)
