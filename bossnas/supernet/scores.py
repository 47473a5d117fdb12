"""Label-free scores of paths, from their embeddings of two views of the same images. Pure functions over tensors.

A score of a batch is the mean of what each image adds to it; the functions give these parts, [P, N]. Where the score
is no mean over images, the part of image i is the score plus N times its derivative by the weight of image i
(infinitesimal jackknife: Jaeckel 1972; Efron 1982, section 6.3). The spread of the parts tells the standard error.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from bossnas.spaces.ops import full
from bossnas.supernet import losses

# Which of two values of a score is the better one. "pooled" scores are of the block's output, averaged over the map;
# the others of the projections (of population_centre: of the predictions).
BETTER = {
    "population_centre": "lower",
    "instance_discrimination": "higher",
    "pooled_instance_discrimination": "higher",
    "view_agreement": "higher",
    "pooled_view_agreement": "higher",
    "effective_rank": "higher",
}


def population_centre(predicted_a: Tensor, predicted_b: Tensor, centre_a: Tensor, centre_b: Tensor) -> Tensor:
    """The paper's score (METHOD 4): each view's prediction against the population centre of the other view.

    ``predicted``: of P paths, [P, N, D]; ``centre``: [N, D], the mean of all paths' target projections. -> [P, N]:
    -2 cos - 2 cos of each image, in [-4, 4]; lower is better.
    """
    return losses.path_loss(predicted_a, predicted_b, centre_a, centre_b)


def instance_discrimination(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    """How surely an image's view is told from the others of the batch by the image's other view.

    ``a``, ``b``: embeddings of the two views along P paths, [P, N, D]. -> parts [P, N] of the mean over images and both
    directions of log softmax_n(cos(a_i, b_n) / temperature) at n = i: the negative InfoNCE loss (van den Oord et al.
    2018). It is at most 0; `chance` when all embeddings are equal.
    """
    first, second = F.normalize(full(a), dim=-1), F.normalize(full(b), dim=-1)
    with torch.autocast(first.device.type, enabled=False):  # 16 bits would be too few, as in `losses.instance_loss`
        agreement = torch.bmm(first, second.mT) / temperature  # [P, N, N]
        rows, columns = agreement.log_softmax(2), agreement.log_softmax(1)
    # an image counts by its own terms, and as one of the others in the terms of all
    own = (rows + columns).diagonal(dim1=1, dim2=2)
    other = rows.exp_().sum(1) + columns.exp_().sum(2)
    return (own - other) / 2 + 1


def chance(images: int) -> float:
    """`instance_discrimination` in a batch of so many images when nothing tells them apart: -log N."""
    return -math.log(images)


def view_agreement(a: Tensor, b: Tensor) -> Tensor:
    """The cosine between the embeddings of each image's two views: [P, N, D], [P, N, D] -> [P, N], in [-1, 1]."""
    return F.cosine_similarity(a, b, dim=-1)


def effective_rank(a: Tensor, b: Tensor) -> Tensor:
    """exp of the entropy of the normalised singular values of the centred embeddings (Roy & Vetterli 2007).

    ``a``, ``b``: [P, N, D], both views together make 2N rows. -> parts [P, N] of a value between 1 and min(2N - 1, D);
    0 where all rows are equal, NaN where one is not finite. In float64, from the eigenvalues of the smaller of the two
    Gram matrices.
    """
    raw = torch.cat([a, b], 1).double()
    rows = raw - raw.mean(1, keepdim=True)
    small = rows.shape[1] <= rows.shape[2]
    gram = torch.bmm(rows, rows.mT) if small else torch.bmm(rows.mT, rows)
    # singular values below the rounding of the embeddings, or of the Gram matrix, count as zero
    noise = raw.square().sum((1, 2)) * rows.shape[1] * max(torch.finfo(a.dtype).eps ** 2, torch.finfo(torch.double).eps)
    finite = gram.isfinite().all(2).all(1)
    eigenvalues, vectors = torch.linalg.eigh(torch.where(finite[:, None, None], gram, 0))  # which takes no NaN
    eigenvalues = torch.where(eigenvalues > noise[:, None], eigenvalues, 0)
    singular = eigenvalues.sqrt()
    total = singular.sum(1)
    share = singular / torch.where(total > 0, total, 1)[:, None]
    entropy = -torch.special.xlogy(share, share).sum(1)
    rank = torch.where(total > 0, entropy, -torch.inf).exp()
    # by the weight of row r the rank changes by -rank/2 sum_k share_k (log share_k + entropy) u_rk^2, with u_k the unit
    # vectors over the rows that belong to the singular values
    slopes = torch.special.xlogy(share, share) + share * entropy[:, None]
    if small:
        by_row = torch.einsum("prk,pk->pr", vectors.square(), slopes)
    else:
        scale = torch.where(eigenvalues > 0, slopes / torch.where(eigenvalues > 0, eigenvalues, 1), 0)
        by_row = torch.einsum("prk,pk->pr", torch.bmm(rows, vectors).square(), scale)
    by_image = by_row[:, : a.shape[1]] + by_row[:, a.shape[1] :]
    parts = rank[:, None] * (1 - a.shape[1] / 2 * by_image)
    return torch.where(finite[:, None], parts, torch.nan).to(a.dtype)
