"""Top-1 and top-5 accuracy of a network on labelled images, each counted once on any number of ranks."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bossnas import log
from bossnas.config.shared import ReaderConfig
from bossnas.data.batches import ShardSet, open_set
from bossnas.data.order import FixedBatches
from bossnas.distributed import dist
from bossnas.distributed.engines import protocol
from bossnas.networks import pretrained
from bossnas.networks.fuse import fuse_bn
from bossnas.networks.kernel_layers import use_kernels
from bossnas.networks.spec import Network, build_network, refused_images
from bossnas.retrain.batches import check_labels, eval_batches, eval_transform

LEAST_CLASSES = 6  # for a top-5


@dataclass(frozen=True)
class Result:
    """Of an evaluation: shares of the images in 0..1, top5 None where there are fewer than 6 classes; the mean
    cross-entropy; wall-clock seconds."""

    images: int
    top1: float
    top5: float | None
    loss: float
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain values; a loss that is not finite is None."""
        return asdict(self) | {"loss": self.loss if math.isfinite(self.loss) else None}


def line(result: Result) -> str:
    """The result in words."""
    top5 = "" if result.top5 is None else f"top-5 {result.top5:.2%}, "
    return (
        f"top-1 {result.top1:.2%}, {top5}loss {result.loss:.4f} on {result.images:,} images in {result.seconds:,.1f} s"
    )


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    classes: int,
    *,
    precision: str = "fp32",
    device: torch.device,
    advance: Callable[[int], None] = lambda images: None,
) -> Result:
    """``batches``: this rank's images [n, 3, S, S] and labels [n] on ``device``; ranks may have different numbers of
    them, or none. All ranks get the same result. ``advance`` hears of every batch.

    The model takes no part in communication: it is whole on every rank. Its mode is put back afterwards.
    """
    from torchmetrics.classification import MulticlassAccuracy  # late: with it comes all of its plotting

    started, was_training = time.perf_counter(), model.training
    metrics = [
        MulticlassAccuracy(classes, average="micro", top_k=k).to(device)
        for k in ((1, 5) if classes >= LEAST_CLASSES else (1,))
    ]
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # of losses, of images
    model.eval()
    try:
        for images, labels in batches:
            with protocol.autocast(device.type, precision):
                logits = model(images).float()
            for metric in metrics:
                metric.update(logits, labels)
            sums += torch.stack(
                [F.cross_entropy(logits, labels, reduction="sum").double(), sums.new_tensor(len(labels))]
            )
            advance(len(labels))
    finally:
        model.train(was_training)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*compute.* method .* was called before")  # a rank without batches
        top1, *top5 = [metric.compute().item() for metric in metrics]
    loss, images = dist.all_reduce_sum(sums).tolist()
    top1, *top5 = [round(share * images) / images for share in (top1, *top5)]  # which torchmetrics gives in float32
    return Result(int(images), top1, top5[0] if top5 else None, loss / images, time.perf_counter() - started)


def evaluate_network(
    network: Network,
    settings: ReaderConfig,
    *,
    batch: int,
    precision: str = "fp32",
    device: str = "auto",
    kernels: str = "off",
    fuse: bool = False,
    source: str = "the checkpoint",
) -> Result:
    """Evaluates a network on ``settings.val``, of which ``settings.val_images`` are taken, on all ranks.

    ``batch``: images per rank and batch; ``kernels``: as in `kernel_layers.use_kernels`, or off; ``fuse``: fold batch
    norms into convolutions; ``source``: where the weights come from, for messages. Raises
    ConfigError for what the user can mend.
    """
    where = dist.device(device)
    protocol.check_precision(where.type, precision)
    model, images = dist.together(lambda: _prepare(network, settings, where, kernels, fuse, source))
    transform, classes = eval_transform(network.spec), network.spec.classes
    own = FixedBatches(settings.val_images, batch).of_rank(len(images), dist.rank(), dist.world_size())
    assert own.only is not None
    batches = eval_batches(images, transform, settings, own, classes=classes, device=where)
    with log.progress("evaluate", len(own.only), show=dist.rank() == 0) as task:
        return evaluate(model, batches, classes, precision=precision, device=where, advance=lambda _: task.advance())


def _prepare(
    network: Network, settings: ReaderConfig, device: torch.device, kernels: str, fuse: bool, source: str
) -> tuple[nn.Module, ShardSet]:
    model = build_network(network.spec)
    pretrained.fit(model, network.weights, source)
    images = open_set(settings, "val")
    check_labels(images, network.spec.classes)
    model = model.to(device).eval()
    try:
        with torch.no_grad():
            model(torch.zeros(1, 3, network.spec.image_size, network.spec.image_size, device=device))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise refused_images(network.spec, error) from None
    if fuse:
        spec = network.spec
        model = fuse_bn(model, torch.randn(2, spec.model_args.get("in_chans", 3), spec.image_size, spec.image_size))
    if kernels != "off":
        use_kernels(model, kernels, device)
    return model, images
