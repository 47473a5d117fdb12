"""Size baselines: what counting tells of an architecture before any image is seen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from bossnas.networks.from_space import head
from bossnas.spaces.cost import CostTable, Shape
from bossnas.spaces.paths import Choices

SIZE_DEFINITIONS = {
    "params": "parameters of the stand-alone network: stem, searched layers, classifier",
    "macs": "multiply-adds of the stand-alone network on one image",
    "sum_channels": "sum over the searched layers of the layer's output channels",
    "sum_log_channels": "sum over the searched layers of the log of the layer's output channels",
    "wide_candidates": "number of layers whose candidate has more parameters than the median candidate of that layer "
    "on the same input (NATS: the four larger widths; MBConv: expansion 6)",
}


def size_baselines(table: CostTable, architectures: Sequence[Sequence[Choices]], classes: int) -> dict[str, np.ndarray]:
    """The sizes named in SIZE_DEFINITIONS, each an array with one value per architecture; params and macs are int64."""
    sizes = table.networks(architectures)
    layers = _Layers(table)
    walked = np.array([layers.walk(architecture) for architecture in architectures])
    ends, end_of = np.unique(walked[:, 3].astype(int), return_inverse=True)
    heads = [head(table.space, channels, classes) for channels in ends.tolist()]
    return {
        "params": sizes["params"] + np.array([sum(p.numel() for p in h.parameters()) for h in heads])[end_of],
        "macs": sizes["macs"] + (ends * classes)[end_of],
        "sum_channels": walked[:, 0],
        "sum_log_channels": walked[:, 1],
        "wide_candidates": walked[:, 2],
    }


def log_channels(
    table: CostTable, block: int, prefix: Sequence[Choices], paths: Iterable[Choices]
) -> dict[Choices, float]:
    """The sum of log channels of a block's paths, behind those of the blocks before it; without ``prefix`` behind any
    that lead to them."""
    layers, result = _Layers(table), {}
    for path in paths:
        before = prefix or next(winners for start, winners in table.starts[block].items() if path in start.paths)
        result[path] = float(layers.walk([*before, path])[1] - layers.walk(before)[1])
    return result


class _Layers:
    """Channels and wide candidates of paths, remembered by block, path and input."""

    def __init__(self, table: CostTable):
        self.table = table
        self.known: dict[tuple[int, Choices, Shape], tuple[np.ndarray, Shape]] = {}
        offered: dict[tuple[int, int, Shape], list[int]] = {}
        for (block, layer, _, shape), entry in table.entries.items():
            offered.setdefault((block, layer, shape), []).append(entry.cost.params)
        self.median = {place: float(np.median(params)) for place, params in offered.items()}

    def walk(self, architecture: Sequence[Choices]) -> np.ndarray:
        """Sum of channels, sum of their logs, wide candidates, channels at the end."""
        total, shape = np.zeros(3), self.table.stem.shape
        for block, path in enumerate(architecture):
            if (block, path, shape) not in self.known:
                self.known[block, path, shape] = self._path(block, path, shape)
            of_path, shape = self.known[block, path, shape]
            total = total + of_path
        # rounded, so that sums of the same logs in another order are the ties that they are
        return np.append(total.round(9), shape[0])

    def _path(self, block: int, path: Choices, shape: Shape) -> tuple[np.ndarray, Shape]:
        total = np.zeros(3)
        for layer, choice in enumerate(path):
            entry = self.table.entries[block, layer, choice, shape]
            wide = entry.cost.params > self.median[block, layer, shape]
            total += entry.shape[0], np.log(entry.shape[0]), wide
            shape = entry.shape
        return total, shape
