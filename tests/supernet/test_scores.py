from __future__ import annotations

import math

import pytest
import torch

from bossnas.supernet import scores


def test_instance_discrimination_by_hand():
    a = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    b = torch.tensor([[[3.0, 0.0], [1.0, 1.0]]])
    r = math.sqrt(0.5)
    cosines = [[1, r], [0, r]]  # of a's rows with b's
    tau = 0.5

    def log_softmax(chosen, others):
        return chosen / tau - math.log(sum(math.exp(o / tau) for o in others))

    rows = [log_softmax(1, cosines[0]), log_softmax(r, cosines[1])]
    columns = [log_softmax(1, [1, 0]), log_softmax(r, [r, r])]
    assert scores.instance_discrimination(a, b, tau).mean().item() == pytest.approx(sum(rows + columns) / 4, abs=1e-6)


def test_instance_discrimination_ends():
    same = torch.ones(2, 7, 4)
    assert scores.instance_discrimination(same, same, 0.1).tolist() == [pytest.approx([scores.chance(7)] * 7)] * 2
    apart = torch.eye(7)[None]
    assert -1e-3 < scores.instance_discrimination(apart, apart, 0.1).mean().item() < 0


def test_effective_rank_ends():
    torch.manual_seed(0)
    assert not scores.effective_rank(torch.ones(1, 5, 3), torch.ones(1, 5, 3)).any()
    broken = torch.randn(2, 4, 3)
    broken[0, 1, 2] = torch.nan
    found = scores.effective_rank(broken, broken).mean(1)
    assert found[0].isnan() and 1 < found[1] <= 3
    line = torch.randn(1, 6, 1) * torch.randn(1, 1, 9) + 4
    assert scores.effective_rank(line, line.flip(1)).mean().item() == pytest.approx(1, abs=1e-3)
    corners = torch.cat([torch.eye(4), -torch.eye(4)])[None]  # the same spread in four directions
    assert scores.effective_rank(corners, corners).mean().item() == pytest.approx(4, abs=1e-5)


@pytest.mark.parametrize("shape", [(3, 5, 40), (3, 40, 5)])
def test_effective_rank_against_singular_values(shape):
    torch.manual_seed(0)
    a, b = torch.randn(2, *shape, dtype=torch.float64)
    for p, found in enumerate(scores.effective_rank(a, b).mean(1).tolist()):
        rows = torch.cat([a[p], b[p]])
        sigma = torch.linalg.svdvals(rows - rows.mean(0))
        share = sigma[sigma > 1e-9] / sigma.sum()
        assert found == pytest.approx((-(share * share.log()).sum()).exp().item(), abs=1e-9)


def test_view_agreement_and_population_centre_by_hand():
    a, b = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), torch.tensor([[[2.0, 0.0], [0.0, -1.0]]])
    assert scores.view_agreement(a, b).tolist() == [[1.0, -1.0]]
    centre_a, centre_b = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[5.0, 0.0], [0.0, 5.0]])
    # image 0: -2 - 2; image 1: -2 cos(a, centre_b) - 2 cos(b, centre_a) = -2 + 0
    assert scores.population_centre(a, b, centre_a, centre_b).tolist() == [[-4.0, -2.0]]


def weighted(name, a, b, weights):
    """The score of a batch in which image i counts ``weights[i]`` times, written out; [N, D] each, float64."""
    share = weights / weights.sum()
    if name == "instance_discrimination":
        table = torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=-1) / 0.3
        n = len(a)
        rows = table.diagonal() - (table.exp() * share * n).sum(1).log()
        columns = table.diagonal() - (table.exp() * share[:, None] * n).sum(0).log()
        return (share * (rows + columns)).sum() / 2
    both, twice = torch.cat([a, b]), torch.cat([share, share]) / 2
    centred = (both - (twice[:, None] * both).sum(0)) * twice.sqrt()[:, None]
    sigma = torch.linalg.svdvals(centred)
    part = sigma[sigma > 1e-9] / sigma.sum()
    return (-(part * part.log()).sum()).exp()


@pytest.mark.parametrize("name", ["instance_discrimination", "effective_rank"])
@pytest.mark.parametrize("shape", [(6, 30), (30, 6)])
def test_an_image_s_part_is_the_derivative_by_its_weight(name, shape):
    torch.manual_seed(0)
    a = torch.randn(shape, dtype=torch.float64)
    b = a + 0.5 * torch.randn(shape, dtype=torch.float64)
    parts = {
        "instance_discrimination": lambda: scores.instance_discrimination(a[None], b[None], 0.3),
        "effective_rank": lambda: scores.effective_rank(a[None], b[None]),
    }[name]()[0]
    n = len(a)
    assert parts.mean().item() == pytest.approx(weighted(name, a, b, torch.ones(n, dtype=torch.float64)).item())
    for i in range(3):
        step = torch.zeros(n, dtype=torch.float64)
        step[i] = 1e-5
        slope = (weighted(name, a, b, 1 + step) - weighted(name, a, b, 1 - step)) / 2e-5
        assert parts[i].item() == pytest.approx((parts.mean() + n * slope).item(), rel=1e-6)
