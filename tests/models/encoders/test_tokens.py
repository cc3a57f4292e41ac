"""Which of several tokens lie somewhere in the image, and in which grid: measured, whatever their number suggests."""

from collections import OrderedDict
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torchvision
from torch import nn

from afterimage.analysis.audit.task_utility import whole_network
from afterimage.config import AfterimageError, Axis
from afterimage.models.encoders.encoder import Encoder


@pytest.mark.parametrize(
    ("source", "size", "grid", "prefix"),
    [
        ("coat_lite_tiny:serial_blocks4.0", 32, (1, 1), 1),  # 2 tokens, not a grid of 1x2
        ("coat_lite_tiny:serial_blocks4.1", (32, 64), (1, 2), 1),
        ("pit_ti_224:transformers.2.blocks.1", (224, 336), (7, 11), 1),  # 78 tokens, not 7x10 and 8
        ("pit_ti_224:transformers.0.blocks.0", 224, (27, 27), 1),
        ("pit_ti_224:transformers.2.blocks.0", 32, (1, 1), 1),
        ("deit_tiny_distilled_patch16_224:block3", (64, 96), (4, 6), 2),
        ("vit_small_patch14_reg4_dinov2:block3", 56, (4, 4), 5),
        ("xcit_nano_12_p8_224:blocks.1", (64, 96), (8, 12), 0),
        ("vit_tiny_r_s16_p8_224:block1", (64, 96), (2, 3), 1),
        ("hiera_tiny_224:block0", 64, (16, 16), 0),
    ],
)
def test_the_grid_of_tokens_is_measured(source, size, grid, prefix):
    encoder = Encoder(source, weights="random-init", image_size=size)
    (spec,), layout = encoder.specs, encoder._layers[0].layout
    assert ((spec.height, spec.width), layout.prefix, layout.suffix) == (grid, prefix, 0)
    assert encoder(torch.rand(2, 3, *encoder.image_size))[0].shape == (2, spec.channels, *grid)


class Tokens(nn.Module):
    """Patches of 8 pixels as tokens, with `extra` of its own before or after them; made for one size of image."""

    def __init__(self, grid=(4, 4), extra=4, *, after=0, order=None, blocks=1):
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, 8)
        self.extra = nn.Parameter(torch.randn(1, extra, 16))
        self.after = nn.Parameter(torch.randn(1, after, 16))
        self.position = nn.Parameter(torch.randn(1, extra + grid[0] * grid[1] + after, 16))
        layers = [nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(blocks)]
        self.blocks, self.order = nn.Sequential(*layers), order
        self.eval()

    def forward(self, images):
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        tokens = tokens if self.order is None else tokens[:, self.order]
        before, after = (part.expand(len(images), -1, -1) for part in (self.extra, self.after))
        return self.blocks(torch.cat([before, tokens, after], 1) + self.position)


CASES = {
    "registers": (Tokens(), (32, 32), (4, 4), 4, 0),  # 20 tokens, not 4x5
    "a class token at the end": (Tokens(extra=0, after=1), (32, 32), (4, 4), 0, 1),
    "both, not square, deeper": (Tokens((3, 5), 1, after=2, blocks=4), (24, 40), (3, 5), 1, 2),
    "one patch": (Tokens((1, 1), 3), (8, 8), (1, 1), 3, 0),
    "one row": (Tokens((1, 6), 2), (8, 48), (1, 6), 2, 0),
}


@pytest.mark.parametrize("case", CASES)
def test_own_networks_of_one_size_need_not_say_what_their_tokens_are(case):
    network, size, grid, prefix, suffix = CASES[case]
    encoder = Encoder(network, ["output", "blocks.0"], image_size=size)
    for place, spec in zip(encoder._layers, encoder.specs, strict=True):
        assert (place.layout.prefix, place.layout.suffix) == (prefix, suffix)
        assert (spec.height, spec.width) == grid
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens = network(images)
    places = tokens[:, prefix : tokens.shape[1] - suffix].transpose(1, 2).reshape(2, 16, *grid)
    torch.testing.assert_close(encoder(images)[0], places)


def test_tokens_after_the_map_go_on_beside_it_when_it_is_replaced():
    network, size, _, _, _ = CASES["both, not square, deeper"]
    whole = nn.Sequential(OrderedDict(body=network, pool=_Mean(), head=nn.Linear(16, 5))).eval()
    cut = whole_network(Encoder(whole, ["body"], image_size=size))
    images = torch.rand(3, 3, *size)
    assert cut.prefix == 3
    torch.testing.assert_close(cut(images, lambda maps: maps), cut(images))
    with torch.no_grad():
        beside = network(images)
        beside[:, 1:-2] = 0
        torch.testing.assert_close(cut(images, torch.zeros_like), whole.head(whole.pool(beside)))


class _Mean(nn.Module):
    def forward(self, tokens):
        return tokens.mean(1)


def test_torchvisions_vision_transformer_is_measured():
    encoder = Encoder(torchvision.models.vit_b_32(weights=None), ["encoder.layers.encoder_layer_0"])
    assert (encoder.specs[0].height, encoder.specs[0].width, encoder._layers[0].layout.prefix) == (7, 7, 1)


def test_tokens_that_are_no_grid_in_raster_order_are_refused():
    columns_first = torch.arange(16).reshape(4, 4).T.flatten()
    for order in (columns_first, torch.randperm(16, generator=torch.Generator().manual_seed(0))):
        with pytest.raises(AfterimageError, match="not in raster order"):
            Encoder(Tokens(order=order), ["output"], image_size=32)

    class TwoScales(Tokens):
        def forward(self, images):
            return torch.cat([super().forward(images), super().forward(images)[:, 4::5]], 1)

    with pytest.raises(AfterimageError, match="not in raster order"):
        Encoder(TwoScales(), ["output"], image_size=32)


class Opaque(Tokens):
    """Moves its tokens by an operation that is not followed: only their number tells."""

    def forward(self, images):
        tokens = super().forward(images)
        return tokens.sort(2)[0]


def test_the_number_of_prefix_tokens_can_be_said():
    with pytest.raises(AfterimageError, match="prefix_tokens"):
        Encoder(Opaque(extra=1), ["output"], image_size=32)
    network = Opaque(extra=1)
    network.prefix_tokens = 1
    encoder = Encoder(network, ["output"], image_size=32)
    assert (encoder.specs[0].height, encoder.specs[0].width, encoder._layers[0].layout.prefix) == (4, 4, 1)
    assert "aten::sort" in encoder.describe()[0].unseen
    measured = Tokens()
    measured.prefix_tokens = 2  # what is measured is not overruled
    assert Encoder(measured, ["output"], image_size=32)._layers[0].layout.prefix == 4


@dataclass
class Output:
    maps: torch.Tensor
    pooled: torch.Tensor | None = None
    step: int = 3


@dataclass(frozen=True)
class Frozen:
    maps: torch.Tensor


class ModelOutput(OrderedDict):
    """As in transformers: a dict by name, with its keys as attributes."""

    def __getattr__(self, name):
        return self[name]


WRAPS = {
    "a dataclass": Output,
    "a frozen one": Frozen,
    "a namespace": lambda maps: SimpleNamespace(maps=maps),
    "a model output": lambda maps: ModelOutput(maps=maps),
}


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("layer", ["output", "output[maps]"])
def test_maps_inside_dataclasses_are_found_and_can_be_replaced(wrap, layer):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches = nn.Conv2d(3, 16, 8, 8)

        def forward(self, images):
            return WRAPS[wrap](self.patches(images))

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = Wrapped(), nn.Linear(16, 5)

        def forward(self, images):
            return Output(self.head(self.body(images).maps.mean((2, 3))))

    encoder = Encoder(Wrapped(), [layer], image_size=36)
    assert encoder.specs[0].rows == Axis(0.0, 8.0, 0, 32)
    whole, layer = Whole(), layer.replace("output", "body")
    network = whole_network(Encoder(whole, [layer], image_size=36))
    images = torch.rand(3, 3, 36, 36)
    with torch.no_grad():
        torch.testing.assert_close(network(images, torch.zeros_like), whole.head(torch.zeros(3, 16)))
    assert not network.has_bypass(images)


def test_an_own_networks_dropped_pixels_are_named():
    encoder = Encoder(nn.Sequential(nn.Conv2d(3, 8, 4, 4)), ["output"], image_size=(34, 32))
    assert (encoder.specs[0].rows, encoder.specs[0].columns) == (Axis(0.0, 4.0, 0, 32), None)
    assert encoder.describe()[0].unseen == "the last 2 rows of 34x32 images are not seen"
