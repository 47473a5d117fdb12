"""What loading costs: views of ImageNet and CIFAR pictures against the official PIL pipeline, in one run, interleaved.

    python bench/data.py --shards 'data/imagenet/train-*.tar' --cifar 'data/cifar10/train-*.tar' --json data.json

"official" is the pipeline of the BossNAS release, built here of torchvision's transforms on PIL pictures: views of
224 x 224, four of augmentation A and four of B, as normalised float tensors; two of 32 x 32 for CIFAR. Ours is what a
loader process does in each place of data.views_on, from the shard's bytes to what it hands over, and beside it what is
left to the run's device, timed on the CPU. "loose files" and "webdataset" are the official pipeline on image files and
on webdataset's reader.

All figures are CPU seconds of one thread, per sample. In every round each variant works on the same samples; a ratio is
the median over the rounds of official ÷ ours.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from itertools import chain, islice, repeat
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[1] / "kernels")]
os.environ["WDS_SECURE"] = "1"

import numpy as np
import torch
import webdataset
from PIL import Image, ImageFilter, ImageOps
from torchvision import transforms as T

from bossnas.config import shared
from bossnas.data import views
from bossnas.data.batches import _Indexed
from bossnas.data.collate import Collate
from bossnas.data.images import decode
from bossnas.data.shards import ShardIndex
from bossnas.data.streams import ShardStream
from bossnas.errors import ConfigError

PLACES = ("device", "worker_crops", "worker")
PAIRS = {"imagenet": 4, "cifar": 1}
SIZE = {"imagenet": 224, "cifar": 32}


class Blur:
    """The release's Gaussian blur, with probability p."""

    def __init__(self, p: float):
        self.p = p

    def __call__(self, image: Image.Image) -> Image.Image:
        sigma = random.uniform(0.1, 2.0)
        return image.filter(ImageFilter.GaussianBlur(sigma)) if random.random() < self.p else image


class Solarise(Blur):
    def __call__(self, image: Image.Image) -> Image.Image:
        return ImageOps.solarize(image) if random.random() < self.p else image


def official(recipe: str) -> Callable[[bytes], list[torch.Tensor]]:
    """From a file's bytes to all its views."""
    end = [T.ToTensor(), T.Normalize(shared.MEAN[recipe], shared.STD[recipe])]
    if recipe == "cifar":
        of_view = [T.Compose([T.RandomCrop(32, padding=4), T.RandomHorizontalFlip(), *end])] * 2
    else:
        a, b = (
            T.Compose(
                [
                    T.RandomResizedCrop(224, interpolation=T.InterpolationMode.BICUBIC),
                    T.RandomHorizontalFlip(),
                    T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
                    T.RandomGrayscale(0.2),
                    Blur(blur),
                    Solarise(solarise),
                    *end,
                ]
            )
            for blur, solarise in ((0.1, 0.0), (1.0, 0.2))
        )
        of_view = [a] * 4 + [b] * 4

    def make(content: bytes) -> list[torch.Tensor]:
        image = Image.open(io.BytesIO(content)).convert("RGB")
        return [transform(image) for transform in of_view]

    return make


class Task:
    """One set of shards: the work of each variant and stage on a list of samples."""

    def __init__(self, shards: str, recipe: str, batch: int, folder: Path, limit: int):
        self.index = ShardIndex.open(shards, "--shards" if recipe == "imagenet" else "--cifar")
        self.recipe, self.batch, self.pairs = views.recipe(recipe, SIZE[recipe]), batch, PAIRS[recipe]
        self.official, self.folder, self.limit = official(recipe), folder, min(limit, len(self.index))
        self.stream = ShardStream.open(shards)
        folder.mkdir()
        for i in range(self.limit):
            (folder / str(i)).write_bytes(self.index.read(i)[0])

    def collate(self, place: str) -> Collate:
        return Collate(views.Views(self.recipe, tuple(range(2 * self.pairs)), self.pairs), 0, 0, place)

    def dataset(self, place: str, samples: list[int]) -> _Indexed:
        chunks = [np.array(samples[i : i + self.batch]) for i in range(0, len(samples), self.batch)]
        return _Indexed(self.index, self.collate(place), 0, chunks)

    def variants(self) -> dict[str, Callable[[list[int]], None]]:
        def loose(samples: list[int]) -> None:
            for i in samples:
                self.official((self.folder / str(i)).read_bytes())

        def plain_webdataset(samples: list[int]) -> None:
            for sample in self.webdataset(len(samples)):
                self.official(sample)

        return {
            "official": lambda samples: [self.official(self.index.read(i)[0]) for i in samples],
            "loose files": loose,
            "webdataset": plain_webdataset,
            **{place: lambda samples, place=place: self.work(place, samples) for place in PLACES},
        }

    def work(self, place: str, samples: list[int]) -> None:
        dataset = self.dataset(place, samples)
        for i in range(len(dataset)):
            item = dataset[i]
            if item.bad or item.error:
                raise SystemExit(f"{self.index.field}: {item.error or item.bad}")

    def webdataset(self, count: int):
        """The first images as webdataset reads them, again from the beginning where they end."""
        urls = [str(shard) for shard in self.index.shards]
        dataset = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
        for sample in islice(chain.from_iterable(repeat(dataset)), count):
            yield next(sample[ext] for ext in ("jpg", "jpeg", "png", "webp") if ext in sample)

    def streamed(self, count: int) -> list:
        """As many samples of our stream."""
        shards = range(len(self.stream.urls))
        passes = (self.stream.read(shards, [0], buffer=0) for _ in repeat(None))
        return list(islice(chain.from_iterable(passes), count))

    def stages(self) -> dict[str, Callable[[list[int]], None]]:
        """Parts of our work, each on prepared inputs."""
        contents = {i: self.index.read(i)[0] for i in range(self.limit)}
        pictures = {i: decode(content) for i, content in contents.items()}
        sizes = {i: picture.shape[:2] for i, picture in pictures.items()}

        def draw(samples: list[int]) -> views.Looks:
            return self.recipe.draw(
                np.array([sizes[i] for i in samples]), samples, range(2 * self.pairs), self.pairs, seed=0, epoch=0
            )

        looks = draw(list(range(self.limit)))
        ints, floats = looks.ints.tolist(), looks.floats.tolist()
        side = self.recipe.image_size
        crops = {i: np.empty((2 * self.pairs, side, side, 3), np.uint8) for i in range(self.limit)}

        def crop(samples: list[int]) -> None:
            for i in samples:
                views.crop(pictures[i], [of_view[i][:7] for of_view in ints], crops[i])

        crop(list(range(self.limit)))
        begun: dict[str, list] = {}

        def paint(samples: list[int]) -> None:
            for i in samples:
                for v, crop in enumerate(crops[i]):
                    views.paint(crop, ints[v][i], floats[v][i])

        def complete(place: str) -> Callable[[list[int]], None]:
            def run(samples: list[int]) -> None:
                for item in begun.pop(place):
                    self.collate(place).complete(item.parts, torch.device("cpu"))

            def prepare(samples: list[int]) -> None:
                dataset = self.dataset(place, samples)
                begun[place] = [dataset[i] for i in range(len(dataset))]

            run.prepare = prepare
            return run

        return {
            "read: index": lambda samples: [self.index.read(i) for i in samples],
            "read: loose files": lambda samples: [(self.folder / str(i)).read_bytes() for i in samples],
            "read: webdataset": lambda samples: list(self.webdataset(len(samples))),
            "read: stream": lambda samples: self.streamed(len(samples)),
            "decode": lambda samples: [decode(contents[i]) for i in samples],
            "decode: PIL": lambda samples: [
                np.asarray(Image.open(io.BytesIO(contents[i])).convert("RGB")) for i in samples
            ],
            "draw looks": draw,
            "crops": crop,
            "colours, blur": paint,
            **{f"on the device (CPU): {place}": complete(place) for place in PLACES},
        }


def measure(task: Task, rounds: int, samples: int) -> dict:
    """Median CPU milliseconds per sample of every variant and stage, and the ratios official ÷ ours."""
    work = {**task.variants(), **task.stages()}
    times: dict[str, list[float]] = {name: [] for name in work}
    for r in range(rounds + 1):
        first = r * samples
        chosen = [(first + i) % task.limit for i in range(samples)]
        for name, run in work.items():
            if hasattr(run, "prepare"):
                run.prepare(chosen)
            random.seed(r)
            torch.manual_seed(r)
            start = time.process_time()
            run(chosen)
            if r:  # the first round warms up
                times[name].append((time.process_time() - start) / samples)
    ratios = {
        name: sorted(a / b for a, b in zip(times["official"], times[name], strict=True))
        for name in task.variants()
        if name != "official"
    }
    return {
        "cpu_ms_per_sample": {name: round(1e3 * statistics.median(t), 4) for name, t in times.items()},
        "samples_per_second_and_core": {name: round(1 / statistics.median(times[name]), 1) for name in task.variants()},
        "ratio": {name: round(statistics.median(r), 2) for name, r in ratios.items()},
        "ratio_range": {name: [round(r[0], 2), round(r[-1], 2)] for name, r in ratios.items()},
    }


def show(title: str, found: dict) -> None:
    print(f"\n{title}\n{'':34}{'ms/sample':>10}{'samples/s':>11}{'official ÷':>12}   (least, most)")
    for name, ms in found["cpu_ms_per_sample"].items():
        rate = found["samples_per_second_and_core"].get(name)
        ratio = found["ratio"].get(name)
        low, high = found["ratio_range"].get(name, (0, 0))
        print(
            f"{name:34}{ms:10.3f}"
            + (f"{rate:11.1f}" if rate else "")
            + (f"{ratio:12.2f}   ({low:.2f}, {high:.2f})" if ratio else "")
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", required=True, help="shards of ImageNet-like pictures: glob or brace pattern")
    parser.add_argument("--cifar", help="shards of 32 x 32 pictures")
    parser.add_argument("--rounds", type=int, default=9, help="measured rounds (default 9)")
    parser.add_argument("--samples", type=int, default=16, help="ImageNet pictures a round (default 16)")
    parser.add_argument("--batch", type=int, default=16, help="of a loader's batch (default 16)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures there")
    options = parser.parse_args()
    if min(options.rounds, options.samples, options.batch) < 1:
        parser.error("--rounds, --samples and --batch: at least 1")
    if options.json is not None and not os.access(options.json.absolute().parent, os.W_OK):
        parser.error(f"--json: cannot write {options.json}")
    torch.set_num_threads(1)
    views.one_thread()
    about = {
        "cpu": _cpu(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "torchvision", "pillow", "webdataset", "numpy")},
        **{name: _version(name) for name in ("simplejpeg", "opencv-python-headless")},
    }
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    result: dict = {"about": about, "ratio": {}}
    with tempfile.TemporaryDirectory() as folder:
        try:
            task = Task(options.shards, "imagenet", options.batch, Path(folder) / "imagenet", 250)
            result["imagenet"] = measure(task, options.rounds, options.samples)
            show(f"ImageNet pictures, 8 views of 224 x 224 ({task.limit} of {len(task.index)})", result["imagenet"])
            result["ratio"] |= {place: result["imagenet"]["ratio"][place] for place in PLACES}
            if options.cifar:
                task = Task(options.cifar, "cifar", 256, Path(folder) / "cifar", 2048)
                result["cifar"] = measure(task, options.rounds, 32 * options.samples)
                show(f"CIFAR, 2 views of 32 x 32 ({task.limit} of {len(task.index)})", result["cifar"])
                result["ratio"]["cifar"] = result["cifar"]["ratio"]["device"]
        except ConfigError as error:
            parser.error(str(error))
    print("\nratios of the worker's cost, official ÷ ours:", result["ratio"])
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(name: str) -> str:
    try:
        return version(name)
    except ImportError:  # PackageNotFoundError
        return "absent"


if __name__ == "__main__":
    main()
