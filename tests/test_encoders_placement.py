"""Where a layer's locations lie in the image: against closed forms, gradients, and random chains of operations."""

import pytest

from afterimage.config import Axis
from afterimage.encoders import Encoder, layer_info


@pytest.mark.parametrize(
    ("source", "size", "rows"),
    [
        ("vit_tiny_patch16_224:block0", 96, None),
        ("vit_tiny_patch16_224:block0", 104, Axis(0.0, 16.0, 0, 96)),
        ("vit_small_patch14_reg4_dinov2:block1", 256, Axis(0.0, 14.0, 0, 252)),
        # Padded convolutions of odd kernels: location i of stride s lies around pixel i s, whatever the image's size.
        ("resnet18:layer1", 224, None),
        ("resnet18:layer4", 224, None),
        ("resnet18:layer1", 225, Axis(-1.5, 4.0, 0, 225)),
        ("resnet18:layer4", 225, Axis(-15.5, 32.0, 0, 225)),
        # Inception v3's stem by hand: 3x3 s2, 3x3, 3x3 padded, pool 3x3 s2, 1x1, 3x3, pool 3x3 s2, then 3x3 s2.
        # Centres of location 0: 1.5, 3.5, 3.5, 5.5, 5.5, 9.5, 13.5, 21.5, at strides 2, 2, 2, 4, 4, 4, 8, 16.
        ("inception_v3:Mixed_5b", 224, Axis(13.5 - 4, 8.0, 0, 221)),
        ("inception_v3:Mixed_6a", 224, Axis(21.5 - 8, 16.0, 0, 221)),
        # PiT: patches of 16 pixels every 8, without padding.
        ("pit_ti_224:patch_embed", 224, Axis(4.0, 8.0, 0, 224)),
    ],
)
def test_where_locations_lie(source, size, rows):
    info = layer_info(source, size)
    assert info.rows == info.columns == rows
    assert (info.unseen == "") == (rows is None or rows.last == size)


def test_an_encoders_specs_and_its_description_say_where_and_what_is_not_seen():
    encoder = Encoder("vit_tiny_patch16_224:block0", weights="random", image_size=(104, 100))
    (spec,), (described,) = encoder.specs, encoder.describe()
    assert (spec.rows, spec.columns) == (Axis(0.0, 16.0, 0, 96), Axis(0.0, 16.0, 0, 96))
    assert described["rows"] == {"start": 0, "stride": 16, "first": 0, "last": 96}
    assert described["unseen"] == "the last 8 rows and the last 4 columns of 104x100 images are not seen"
