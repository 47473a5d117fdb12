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
ONE_PORT = "a network of 400 Gb/s for the node assumed"


@dataclass(frozen=True)
class Gpu:
    """A GPU as its datasheet has it: dense TFLOP/s in 16 bits, summed in 32 bits, and in TF32, memory in GB and GB/s,
    GB/s in one direction to the GPUs of its node (NVLink, or PCIe where there is none), and of the node's network."""

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
    "rtx3090": Gpu(71, 35.6, 24, 936, 32, 50, "NVIDIA GA102 whitepaper, GeForce RTX 3090; PCIe 4.0 x16, " + ONE_PORT),
    "rtx4090": Gpu(165.2, 82.6, 24, 1008, 32, 50, "NVIDIA Ada whitepaper, GeForce RTX 4090; PCIe 4.0 x16, " + ONE_PORT),
    "a10": Gpu(125, 62.5, 24, 600, 32, 50, "NVIDIA A10 datasheet; PCIe 4.0 x16, " + ONE_PORT),
    "l4": Gpu(121, 60, 24, 300, 32, 50, "NVIDIA L4 datasheet, without sparsity; PCIe 4.0 x16, " + ONE_PORT),
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


@dataclass(frozen=True)
class Given:
    """What is known of a GPU better than its datasheet: TFLOP/s that matrix products sustain in 16 bits, GB/s that its
    memory sustains, and GB of memory; None: shares of the datasheet's rates, its memory."""

    tflops: float | None = None
    gbps: float | None = None
    memory: float | None = None


def gpu_rates(gpu: str, given: Given | None = None) -> Rates:
    """What the GPU sustains. Raises ConfigError for an unknown GPU and given numbers that are not positive."""
    given = given or Given()
    if gpu not in GPUS:
        raise ConfigError(
            "gpu",
            f"there is no {gpu!r}",
            f"choose {', '.join(GPUS)}, or the nearest of them with `tflops`, `gbps` and `memory`",
        )
    for name, value in vars(given).items():
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ConfigError(name, f"is {value:g}", "give a positive number")
    sheet = GPUS[gpu]
    half = given.tflops or sheet.half * MATRIX
    return Rates(
        half * 1e12,
        half * 1e12 * sheet.tf32 / sheet.half,
        (given.gbps or sheet.memory * MEMORY) * 1e9,
        sheet.link * 1e9 * LINK,
        sheet.network * 1e9 / NODE * LINK,
        (given.memory or sheet.memory_gb) * GIB,
    )
