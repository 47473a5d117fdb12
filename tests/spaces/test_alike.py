import pytest
import torch
from torch import nn

from bossnas import spaces
from bossnas.spaces.alike import alike


def test_layers_of_one_build_are_alike():
    space = spaces.make("hytra", width=0.0625, image_size=32, restricted=True, split="cifar10")
    first, second, third = (space.layer(0, depth) for depth in range(3))
    assert alike(second, third) and alike(second, second.eval())
    assert not alike(first, second) and not alike(second, space.layer(1, 1))
    third.requires_grad_(False)
    assert not alike(second, third)


class Part(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (1, 1, True),
        (1, 2, False),
        (torch.ones(2), torch.ones(2), False),
        (nn.ReLU(), nn.ReLU(), True),
        (None, 1, False),
    ],
)
def test_attributes_count(one, other, same):
    assert alike(Part(one), Part(other)) == same
