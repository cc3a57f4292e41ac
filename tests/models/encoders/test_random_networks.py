"""Which parameters close a branch is seen in a pass: by what they do there, not by their names."""

import math

import pytest
import torch
from torch import nn

from afterimage.models.encoders.forward_trace import ForwardTrace
from afterimage.models.encoders.providers.base import CLOSED_GAIN, open_branches

WIDTH, SIZE = 8, (16, 16)


class Branches(nn.Module):
    """Parameters that start at or near zero: the first seven close what they multiply, the others do not."""

    def __init__(self, ends_early=False):
        super().__init__()
        self.ends_early = ends_early
        self.stem = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.a = nn.Parameter(torch.full((WIDTH,), 1e-5))
        self.b = nn.Parameter(torch.tensor(0.0))
        self.c = nn.Parameter(torch.zeros(1, WIDTH, 1, 1))
        self.d, self.e = nn.BatchNorm2d(WIDTH), nn.GroupNorm(2, WIDTH)
        self.f = nn.LayerNorm(WIDTH)
        self.gain = nn.Parameter(torch.full((WIDTH, 1, 1, 1), -0.1))  # of a kernel, before it meets an image
        for norm in (self.d, self.e, self.f):
            nn.init.zeros_(norm.weight)
        self.narrow = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)
        nn.init.normal_(self.narrow.weight, std=0.02)
        nn.init.normal_(self.linear.weight, std=1e-6)

        self.position = nn.Parameter(torch.zeros(1, WIDTH, *SIZE))
        self.shift = nn.Parameter(torch.zeros(WIDTH))
        self.table = nn.Parameter(torch.zeros(5, WIDTH))
        self.gate = nn.Parameter(torch.tensor(1e-4))
        self.drawn = nn.Parameter(torch.linspace(-0.02, 0.02, WIDTH))
        self.scale = nn.Parameter(torch.full((WIDTH,), 0.5))
        self.places = nn.Linear(2, WIDTH)  # what it makes depends on no image
        nn.init.normal_(self.places.weight, std=1e-3)
        self.wide = nn.Conv2d(WIDTH, WIDTH, 1)

    def forward(self, images):
        x = self.stem(images) + self.position
        x = x + self.a.view(-1, 1, 1) * self.d(x)
        x = x.mul(torch.sigmoid(self.gate)) + self.e(x) * self.b
        x = torch.addcmul(self.shift.view(-1, 1, 1), self.c, x) + self.narrow(x)
        x = x + nn.functional.conv2d(x, self.wide.weight * self.gain, self.wide.bias)
        if self.ends_early:
            raise RuntimeError("it cannot run on images of this size")
        y = self.f(x.permute(0, 2, 3, 1))
        y = y + self.linear(y) + self.places(torch.ones(2)) + self.table[torch.tensor([2])]
        return y * self.scale + y * self.drawn


FACTORS = ("a", "b", "c", "d.weight", "e.weight", "f.weight", "gain")
MATRICES = ("narrow.weight", "linear.weight")


def open_as_seen(model, device="cpu"):
    """Open the branches of a network by what is seen of it on a device."""
    with torch.device(device):
        seen = ForwardTrace(Branches(model.ends_early).eval(), torch.zeros(1, 3, *SIZE))
    open_branches(model, seen.factors, seen.matrices)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_what_closes_a_branch_is_opened_and_nothing_else(device):
    model = Branches().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    open_as_seen(model, device)
    after = model.state_dict()
    assert all(value.device.type == "cpu" for value in after.values())
    for name in FACTORS:
        assert torch.equal(after[name], torch.ones_like(before[name])), name
    for name in MATRICES:
        gain = after[name].square().mean().sqrt() * math.sqrt(after[name][0].numel())
        assert gain.item() == pytest.approx(1)
        torch.testing.assert_close(after[name] / after[name].norm(), before[name] / before[name].norm())
    for name in before.keys() - {*FACTORS, *MATRICES}:
        assert torch.equal(after[name], before[name]), name
    again = {name: value.clone() for name, value in after.items()}
    open_as_seen(model)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in again.items())


def test_of_a_network_that_ends_early_what_runs_is_opened():
    model = Branches(ends_early=True).eval()
    open_as_seen(model)
    assert model.a.unique().item() == model.gain.unique().item() == 1
    assert model.f.weight.unique().item() == 0 and model.linear.weight.std() < CLOSED_GAIN


def test_a_factor_that_two_blocks_share_is_opened_once():
    model = Branches().eval()
    model.b = model.a
    seen = ForwardTrace(model, torch.zeros(1, 3, *SIZE))
    open_branches(model, seen.factors, seen.matrices)
    assert model.a is model.b and model.a.unique().item() == 1
