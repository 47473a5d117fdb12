"""From decoded pictures to a batch of views, begun in a loader process and completed on the run's device.

Where the work is done is a matter of cost, not of content: looks are drawn in the loader in any case, so every place
makes the same views (to a few tenths of a grey level, see docs/data.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from bossnas.data import views
from bossnas.data.views import Views


def place(views_on: str, device: torch.device) -> str:
    """Resolves data.views_on: "auto" is "device" on a GPU and "worker" elsewhere, where all share the same cores."""
    return views_on if views_on != "auto" else "device" if device.type == "cuda" else "worker"


class Batcher(Protocol):
    """Makes batches of an epoch: begun in a loader process, to which it travels, and completed on the device."""

    @property
    def seed(self) -> int: ...

    @property
    def epoch(self) -> int: ...

    def begin(self, pictures: list[np.ndarray], samples: list[int], labels: list[int | None]) -> dict[str, Tensor]: ...

    def complete(self, parts: dict[str, Tensor], device: torch.device) -> Any: ...


@dataclass(frozen=True)
class Collate:
    """Views of pictures, drawn by seed and epoch. ``place``: device | worker_crops | worker."""

    views: Views
    seed: int
    epoch: int
    place: str

    def begin(self, pictures: list[np.ndarray], samples: list[int], labels: list[int | None]) -> dict[str, Tensor]:
        """What the loader does: tensors that travel to the run. pictures: uint8 [H, W, 3]; samples: their numbers."""
        sizes = np.array([picture.shape[:2] for picture in pictures])
        looks = self.views.recipe.draw(
            sizes, samples, self.views.ids, self.views.pairs, seed=self.seed, epoch=self.epoch
        )
        if self.place == "device":
            lengths = sizes.prod(1) * 3
            pixels = torch.empty(int(lengths.sum()), dtype=torch.uint8)
            starts = np.cumsum(lengths) - lengths
            into = pixels.numpy()
            for picture, start, length in zip(pictures, starts, lengths, strict=True):
                into[start : start + length] = picture.reshape(-1)
            table = torch.from_numpy(np.column_stack([starts, sizes]).astype(np.int64))
            return {"pixels": pixels, "table": table, "ints": looks.ints, "floats": looks.floats}
        size = self.views.recipe.image_size
        crops = torch.empty(len(self.views.ids), len(pictures), size, size, 3, dtype=torch.uint8)
        made, ints, floats = crops.numpy(), looks.ints.tolist(), looks.floats.tolist()
        for n, picture in enumerate(pictures):
            views.crop(picture, [of_view[n][:7] for of_view in ints], made[:, n])
        if self.place == "worker_crops":
            return {"crops": crops, "ints": looks.ints, "floats": looks.floats}
        if self.views.recipe.name != "cifar":  # a CIFAR view is a crop and a flip
            for v, n in np.ndindex(*crops.shape[:2]):
                made[v, n] = views.paint(made[v, n], ints[v][n], floats[v][n])
        return {"pictures": crops}

    def complete(self, parts: dict[str, Tensor], device: torch.device) -> list[Tensor]:
        """The batch of each view on the device: float32 [n, 3, S, S], channels_last, normalised."""
        if "pictures" in parts:
            made = views.normalise(parts["pictures"].to(device, non_blocking=True), self.views.recipe)
        elif "crops" in parts:
            crops = parts["crops"].to(device, non_blocking=True)
            made = views.finish(crops, views.Looks(parts["ints"], parts["floats"]), self.views.recipe)
        else:
            pixels = parts["pixels"].to(device, non_blocking=True)
            made = views.augment(pixels, parts["table"], views.Looks(parts["ints"], parts["floats"]), self.views.recipe)
        return list(made.unbind(0))
