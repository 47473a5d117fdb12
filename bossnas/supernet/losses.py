"""Ensemble bootstrapping (METHOD 3.3; BossNAS, section 3.3): pure functions over tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from bossnas.spaces.ops import full
from bossnas_kernels import byol_ensemble_loss


def ensemble_loss(predicted: Sequence[Tensor], projections: Sequence[Tensor]) -> Tensor:
    """Loss of each path's prediction against the ensemble target of the other view.

    ``predicted``: of P paths, ``projections``: of the target network along all T paths of the step, each [N, D]. The
    ensemble target is the mean over T of the L2-normalised projections. -> [P], means over the images, in [-2, 2].
    """
    # one call for all paths: they share one target, which is detached, and in float32 or more even under autocast
    return byol_ensemble_loss(torch.stack(list(predicted)), torch.stack(list(projections)))


def instance_loss(a: Sequence[Tensor], b: Sequence[Tensor], temperature: float) -> Tensor:
    """InfoNCE (van den Oord et al. 2018) between the two views of the same images along each path.

    ``a``, ``b``: of P paths, [N, D] each. -> [P], the mean over images and both directions of
    -log softmax_n(cos(a_i, b_n) / temperature) at n = i, at least 0, log N when all embeddings are equal. The other
    images are those of this micro-batch on this rank.
    """
    first, second = (F.normalize(full(torch.stack(list(x))), dim=-1) for x in (a, b))
    # autocast would have bmm round the embeddings to 16 bits, and dividing by the temperature enlarges that error
    with torch.autocast(first.device.type, enabled=False):
        agreement = torch.bmm(first, second.mT) / temperature  # [P, N, N]
        rows, columns = agreement.log_softmax(2), agreement.log_softmax(1)
    return -(rows + columns).diagonal(dim1=1, dim2=2).mean(1) / 2


def loss(predicted: Tensor, target: Tensor) -> Tensor:
    """-2 cos(predicted, target) for each image: [..., N, D], [N, D] -> [..., N], in [-2, 2]."""
    return -2 * F.cosine_similarity(full(predicted), full(target), dim=-1)


def path_loss(predicted_a: Tensor, predicted_b: Tensor, target_a: Tensor, target_b: Tensor) -> Tensor:
    """Symmetric loss for each image, of one path or many: view A predicts view B's target and the reverse. [-4, 4]."""
    return loss(predicted_a, target_b) + loss(predicted_b, target_a)


@torch.no_grad()
def spread(projections: Tensor) -> Tensor:
    """Collapse sentinel: standard deviation over the batch of the normalised projections [..., N, D], times sqrt(D),
    its mean over the first dimensions.

    1 when they fill the sphere evenly, 0 when all images have one embedding (SimSiam, Chen & He 2021, section 4.1).
    """
    normal = F.normalize(projections.float(), dim=-1)
    return normal.std(-2).mean() * normal.shape[-1] ** 0.5
