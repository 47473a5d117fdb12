"""What GPUs and the wires between them sustain: datasheets, shares of them, and measured steps."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from bossnas.errors import ConfigError

NODE = 8  # GPUs of a node, joined by links; nodes are joined by a network
MATRIX, MEMORY, LINK = 0.5, 0.8, 0.7  # shares of datasheet rates that kernels and collectives are taken to reach
HOST_SECONDS = 5e-6  # to launch an operation from Python
HOP_SECONDS = 2e-5  # latency of a collective, times the binary logarithm of its ranks
GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """A GPU as its datasheet has it: dense TFLOP/s in 16 bits and in TF32, memory in GB and GB/s, GB/s in one
    direction to the GPUs of its node, and of the node's network."""

    half: float
    tf32: float
    memory_gb: float
    memory: float
    link: float
    network: float
    source: str


GPUS = {
    "v100": Gpu(125, 15.7, 32, 900, 150, 50, "NVIDIA V100 SXM2 and DGX-1 datasheets (fp32 without TF32, no bf16)"),
    "a100-40": Gpu(312, 156, 40, 1555, 300, 200, "NVIDIA A100 SXM4 40GB and DGX A100 datasheets"),
    "a100": Gpu(312, 156, 80, 2039, 300, 200, "NVIDIA A100 SXM4 80GB and DGX A100 datasheets"),
    "h100": Gpu(989, 495, 80, 3350, 450, 400, "NVIDIA H100 SXM5 and DGX H100 datasheets"),
    "h200": Gpu(989, 495, 141, 4800, 450, 400, "NVIDIA H200 SXM and DGX H200 datasheets"),
    "b200": Gpu(2250, 1125, 180, 8000, 900, 400, "NVIDIA B200 SXM and DGX B200 datasheets"),
    "mi300x": Gpu(1307, 654, 192, 5300, 448, 400, "AMD Instinct MI300X datasheet; a node with 8 x 400 Gb/s"),
}


@dataclass(frozen=True)
class Rates:
    """What a GPU sustains: FLOP/s in 16 bits and in more, bytes/s of its memory, of the links in a node and of its
    share of the network; ``factors``: measured seconds of a block's step over those that these rates give."""

    half: float
    full: float
    memory: float
    link: float
    network: float
    capacity: float
    factors: dict[int, float] = field(default_factory=dict)

    def seconds(self, rows: np.ndarray, block: int) -> float:
        """Of operations one after another, each as long as its work or its bytes take; or what launching them takes."""
        work = np.maximum(rows[:, 0] / self.half + rows[:, 1] / self.full, rows[:, 2] / self.memory).sum()
        return max(float(work), len(rows) * HOST_SECONDS) * self.factor(block)

    def factor(self, block: int) -> float:
        """Of a block that was not measured: the mean of those that were."""
        return self.factors.get(block, sum(self.factors.values()) / len(self.factors) if self.factors else 1.0)

    def exchange(self, size: float, messages: float, ranks: int) -> float:
        """Seconds in which each of the ranks receives ``size`` bytes in so many collectives."""
        if ranks == 1:
            return 0.0
        bandwidth = self.link if ranks <= NODE else min(self.link, self.network)
        return size / bandwidth + messages * HOP_SECONDS * math.log2(ranks)


def gpu_rates(gpu: str, tflops: float | None = None, gbps: float | None = None) -> Rates:
    """``tflops``: sustained by matrix products in 16 bits; ``gbps``: GB/s sustained by the GPU's memory; None: shares
    of the datasheet's. Raises ConfigError for an unknown GPU and rates that are not positive."""
    if gpu not in GPUS:
        raise ConfigError(
            "gpu",
            f"there is no {gpu!r}",
            f"choose {', '.join(GPUS)}, or the nearest of them with `tflops` and `gbps`",
        )
    for name, value in (("tflops", tflops), ("gbps", gbps)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ConfigError(name, f"is {value:g}", "give a positive number")
    sheet = GPUS[gpu]
    half = tflops or sheet.half * MATRIX
    return Rates(
        half * 1e12,
        half * 1e12 * sheet.tf32 / sheet.half,
        (gbps or sheet.memory * MEMORY) * 1e9,
        sheet.link * 1e9 * LINK,
        sheet.network * 1e9 / NODE * LINK,
        sheet.memory_gb * GIB,
    )
