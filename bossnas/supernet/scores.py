"""Label-free scores of paths, from their embeddings of two views of the same images. Pure functions over tensors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

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

    ``predicted``: of P paths, [P, N, D]; ``centre``: [N, D], the mean of all paths' target projections. -> [P], the
    mean over the images of -2 cos - 2 cos, in [-4, 4]; lower is better.
    """
    return losses.path_loss(predicted_a, predicted_b, centre_a, centre_b).mean(1)


def instance_discrimination(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    """How surely an image's view is told from the others of the batch by the image's other view.

    ``a``, ``b``: embeddings of the two views along P paths, [P, N, D]. -> [P], the mean over images and both directions
    of log softmax_n(cos(a_i, b_n) / temperature) at n = i: the negative InfoNCE loss (van den Oord et al. 2018). At
    most 0; log(1/N) when all embeddings are equal.
    """
    return -losses.instance_loss(list(a), list(b), temperature)


def view_agreement(a: Tensor, b: Tensor) -> Tensor:
    """Mean cosine between the embeddings of an image's two views: [P, N, D], [P, N, D] -> [P], in [-1, 1]."""
    return F.cosine_similarity(a, b, dim=-1).mean(1)


def effective_rank(a: Tensor, b: Tensor) -> Tensor:
    """exp of the entropy of the normalised singular values of the centred embeddings (Roy & Vetterli 2007).

    ``a``, ``b``: [P, N, D], both views together make 2N rows. -> [P], between 1 and min(2N - 1, D); 0 where all rows
    are equal, NaN where one is not finite. In float64, from the eigenvalues of the smaller of the two Gram matrices.
    """
    raw = torch.cat([a, b], 1).double()
    rows = raw - raw.mean(1, keepdim=True)
    gram = torch.bmm(rows, rows.mT) if rows.shape[1] <= rows.shape[2] else torch.bmm(rows.mT, rows)
    # singular values below the rounding of the embeddings, or of the Gram matrix, count as zero
    noise = raw.square().sum((1, 2)) * rows.shape[1] * max(torch.finfo(a.dtype).eps ** 2, torch.finfo(torch.double).eps)
    finite = gram.isfinite().all(2).all(1)
    eigenvalues = torch.linalg.eigvalsh(torch.where(finite[:, None, None], gram, 0))  # which takes no NaN
    singular = torch.where(eigenvalues > noise[:, None], eigenvalues, 0).clamp_min(0).sqrt()
    total = singular.sum(1)
    share = singular / torch.where(total > 0, total, 1)[:, None]
    rank = torch.where(total > 0, -torch.special.xlogy(share, share).sum(1), -torch.inf).exp()
    return torch.where(finite, rank, torch.nan).to(a.dtype)
