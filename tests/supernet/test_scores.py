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
    assert scores.instance_discrimination(a, b, tau).item() == pytest.approx(sum(rows + columns) / 4, abs=1e-6)


def test_instance_discrimination_ends():
    same = torch.ones(2, 7, 4)
    assert scores.instance_discrimination(same, same, 0.1).tolist() == pytest.approx([-math.log(7)] * 2)
    apart = torch.eye(7)[None]
    assert -1e-3 < scores.instance_discrimination(apart, apart, 0.1).item() < 0


def test_effective_rank_ends():
    torch.manual_seed(0)
    assert scores.effective_rank(torch.ones(1, 5, 3), torch.ones(1, 5, 3)).item() == 0
    broken = torch.randn(2, 4, 3)
    broken[0, 1, 2] = torch.nan
    found = scores.effective_rank(broken, broken)
    assert found[0].isnan() and 1 < found[1] <= 3
    line = torch.randn(1, 6, 1) * torch.randn(1, 1, 9) + 4
    assert scores.effective_rank(line, line.flip(1)).item() == pytest.approx(1, abs=1e-3)
    corners = torch.cat([torch.eye(4), -torch.eye(4)])[None]  # the same spread in four directions
    assert scores.effective_rank(corners, corners).item() == pytest.approx(4, abs=1e-5)


@pytest.mark.parametrize("shape", [(3, 5, 40), (3, 40, 5)])
def test_effective_rank_against_singular_values(shape):
    torch.manual_seed(0)
    a, b = torch.randn(2, *shape, dtype=torch.float64)
    for p, found in enumerate(scores.effective_rank(a, b).tolist()):
        rows = torch.cat([a[p], b[p]])
        sigma = torch.linalg.svdvals(rows - rows.mean(0))
        share = sigma[sigma > 1e-9] / sigma.sum()
        assert found == pytest.approx((-(share * share.log()).sum()).exp().item(), abs=1e-9)


def test_view_agreement_and_population_centre_by_hand():
    a, b = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), torch.tensor([[[2.0, 0.0], [0.0, -1.0]]])
    assert scores.view_agreement(a, b).tolist() == [0.0]
    centre_a, centre_b = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[5.0, 0.0], [0.0, 5.0]])
    # image 0: -2 - 2; image 1: -2 cos(a, centre_b) - 2 cos(b, centre_a) = -2 + 0
    assert scores.population_centre(a, b, centre_a, centre_b).tolist() == [-3.0]
