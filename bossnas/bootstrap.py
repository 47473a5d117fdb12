"""Ensemble bootstrapping (METHOD 3.3; BossNAS, section 3.3): pure functions over tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from bossnas.ops import full
from bossnas_kernels import byol_ensemble_loss


def ensemble_loss(predicted: Sequence[Tensor], projections: Sequence[Tensor]) -> Tensor:
    """Loss of each path's prediction against the ensemble target of the other view.

    ``predicted``: of P paths, ``projections``: of the target network along all T paths of the step, each [N, D]. The
    ensemble target is the mean over T of the L2-normalised projections. -> [P], means over the images, in [-2, 2].
    """
    return byol_ensemble_loss(torch.stack(list(predicted)), torch.stack(list(projections)))


def loss(predicted: Tensor, target: Tensor) -> Tensor:
    """-2 cos(predicted, target) for each image: [..., N, D], [N, D] -> [..., N], in [-2, 2]."""
    return -2 * F.cosine_similarity(full(predicted), full(target), dim=-1)


def path_loss(predicted_a: Tensor, predicted_b: Tensor, target_a: Tensor, target_b: Tensor) -> Tensor:
    """Symmetric loss for each image, of one path or many: view A predicts view B's target and the reverse. [-4, 4]."""
    return loss(predicted_a, target_b) + loss(predicted_b, target_a)


@torch.no_grad()
def spread(projections: Tensor) -> Tensor:
    """Collapse sentinel: standard deviation over the batch of the normalised projections [N, D], times sqrt(D).

    1 when they fill the sphere evenly, 0 when all images have one embedding (SimSiam, Chen & He 2021, section 4.1).
    """
    normal = F.normalize(projections.float(), dim=1)
    return normal.std(0).mean() * normal.shape[1] ** 0.5
