"""Where a layer's locations lie in the image: against closed forms, gradients, and random chains of operations."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from afterimage.config import Axis
from afterimage.models.encoders.encoder import Encoder
from afterimage.models.encoders.forward_trace import ForwardTrace
from afterimage.models.encoders.layers import describe_unseen, find_placement
from afterimage.models.encoders.position_tracing import PositionTracer
from afterimage.models.encoders.providers import open_network
from afterimage.models.encoders.tensor_layout import Layout
from afterimage.models.encoders.tracing import layer_info, list_layers, trace


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
        ("inception_v4:features.7", 224, Axis(13.5 - 4, 8.0, 0, 223)),
        # PiT: patches of 16 pixels every 8, without padding; then 3x3 s2 with padding.
        ("pit_ti_224:patch_embed", 224, Axis(4.0, 8.0, 0, 224)),
        ("pit_ti_224:transformers.1", 224, None),
        # "Same" padding puts what is odd at the right: at an even size location i lies around pixel 2 i + 1.
        ("tf_efficientnet_b0:block1", 224, None),
        ("tf_efficientnet_b0:block1", 225, Axis(-1.5, 4.0, 0, 225)),
        ("swin_tiny_patch4_window7_224:layers.1", 224, None),
        ("swin_tiny_patch4_window7_224:layers.1", 226, Axis(0.0, 8.0, 0, 224)),
        ("convnext_atto:stages.1", 226, Axis(0.0, 8.0, 0, 224)),
        (
            "csatv2:stages.1",
            256,
            None,
        ),  # moves elements to where a table says, which the meta device does not have
    ],
)
def test_where_locations_lie(source, size, rows):
    info = layer_info(source, size)
    assert info.rows == info.columns == rows
    assert (info.unseen == "") == (rows is None or rows.last == size)


def test_rows_and_columns_are_measured_each_for_itself():
    encoder = Encoder("vit_tiny_patch16_224:block0", weights="random", image_size=(104, 96))
    (spec,), (described,) = encoder.specs, encoder.describe()
    assert (spec.rows, spec.columns) == (Axis(0.0, 16.0, 0, 96), None)
    assert (described.rows, described.columns) == (spec.rows, spec.columns)
    assert described.unseen == "the last 8 rows of 104x96 images are not seen"


def test_a_vector_has_no_placement_and_an_attention_without_residual_keeps_its_queries():
    kept = layer_info("cait_xxs24_224:blocks.0.attn", 64)
    assert kept.rows is None and kept.unseen == ""
    mixed = layer_info("gmlp_ti16_224:blocks.0.mlp_channels.gate.proj", 64)
    assert mixed.rows is None and "all of its locations depend on the whole image equally" in mixed.unseen


def test_what_is_not_seen_in_words():
    def said(rows, columns):
        return describe_unseen(
            rows and Axis(0.0, 1.0, *rows), columns and Axis(0.0, 1.0, *columns), (104, 100)
        )

    assert said(None, None) == said((0, 104), (0, 100)) == ""
    assert said((0, 96), (0, 92)) == "the last 8 rows and columns of 104x100 images are not seen"
    assert said((0, 103), (0, 99)) == "the last row and column of 104x100 images are not seen"
    assert said((2, 101), None) == "the first 2 rows and the last 3 rows of 104x100 images are not seen"
    assert said((0, 96), (1, 100)) == "the last 8 rows and the first column of 104x100 images are not seen"


def placed(network, size, *, layout=None):
    """The placement of what a network returns, and its positions."""
    seen = ForwardTrace(_Whole(network), torch.zeros(1, 3, *size), follow=True)
    assert seen.failure == ""
    event = seen.events["network"]
    ((key, shape),) = event.shapes
    layout = layout or Layout("NCHW", *shape[1:], key=key)
    return find_placement(event.positions[key], layout, size), event.positions[key]


class _Whole(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        return self.network(images)


PADS = {"zeros": nn.ZeroPad2d, "reflection": nn.ReflectionPad2d, "replication": nn.ReplicationPad2d}


@st.composite
def chains(draw):
    """A chain of windows: kernel, stride, padding, dilation and which module slides them.

    Padding may be a module of its own, with one more at the right and bottom, as "same" padding has it.
    """
    kinds = st.sampled_from(["convolution", "max", "mean", "depthwise", "zeros", "reflection", "replication"])
    return [
        (
            kind := draw(kinds),
            kernel := draw(st.integers(1, 5)),
            draw(st.integers(1, 3)),
            draw(st.integers(0, 3 if kind in PADS else kernel // 2)),
            1 if kind == "mean" else draw(st.integers(1, 2)),
        )
        for _ in range(draw(st.integers(1, 5)))
    ]


def build(chain):
    """The modules of a chain, with weights that keep every path's gradient positive."""
    modules, channels = [], 3
    for kind, kernel, stride, padding, dilation in chain:
        if kind == "max":
            modules.append(nn.MaxPool2d(kernel, stride, padding, dilation))
        elif kind == "mean":
            modules.append(nn.AvgPool2d(kernel, stride, padding))
        else:
            if kind in PADS:
                modules.append(PADS[kind]((padding, padding + 1, padding, padding + 1)))
                padding = 0
            groups = channels if kind == "depthwise" else 1
            modules.append(nn.Conv2d(channels, 6, kernel, stride, padding, dilation, groups))
            modules.append(nn.ReLU(inplace=True))
            channels = 6
    for parameter in (p for module in modules for p in module.parameters()):
        nn.init.constant_(parameter, 0.01)
    return nn.Sequential(*modules)


@settings(deadline=None, max_examples=60)
@given(chains(), st.integers(20, 70), st.integers(20, 70))
def test_chains_of_windows_lie_where_kernel_stride_and_padding_say(chain, height, width):
    network = build(chain)
    centre, stride = 0.5, 1
    images = torch.zeros(1, 3, height, width)
    try:
        shapes = [(images := module(images)).shape for module in network]
    except RuntimeError:  # an image too small for the chain
        return
    if any(1 in shape[2:] for shape in shapes[:-1]):  # what is beside a single location cannot be known
        return
    shape = shapes[-1]
    for _, kernel, step, padding, dilation in chain:
        centre += stride * ((kernel - 1) * dilation / 2 - padding)
        stride *= step
    (rows, columns, _), positions = placed(network, (height, width))
    ((y, x, _),) = positions.centres
    for array, count in ((y, shape[2]), (x, shape[3])):
        expected = centre + stride * torch.arange(count, dtype=torch.float64)
        torch.testing.assert_close(array.flatten().expand(count), expected, rtol=0, atol=1e-4)
    first, last = zip(*_seen(network, (height, width)), strict=True)
    for axis, size, count, near, far in zip(
        (rows, columns), (height, width), shape[2:], first, last, strict=True
    ):
        if axis is None:
            assert (near, far) == (0, size)
            assert count == 1 or (
                abs(stride * count - size) <= stride / 8
                and abs(centre + stride * (count - 1) / 2 - size / 2) <= stride / 2
            )
        else:
            assert (axis.first, axis.last) == (near, far)
            assert count == 1 or (axis.start, axis.stride) == pytest.approx((centre - stride / 2, stride))


def _seen(network, size):
    """The first and last row, and column, that change anything, by gradients: max pools see what means see."""
    network = nn.Sequential(
        *(
            _Mean(m) if isinstance(m, nn.MaxPool2d) else nn.Identity() if isinstance(m, nn.ReLU) else m
            for m in network
        )
    )
    images = torch.rand(1, 3, *size, requires_grad=True)
    network(images).sum().backward()
    changes = images.grad.abs().sum((0, 1)) > 0
    return [(int(found[0]), int(found[-1]) + 1) for axis in (1, 0) for found in [changes.any(axis).nonzero()]]


class _Mean(nn.Module):
    """A max pool's windows, averaged."""

    def __init__(self, pool):
        super().__init__()
        self.options = pool.stride, pool.padding, pool.dilation
        self.kernel = pool.kernel_size

    def forward(self, images):
        channels = images.shape[1]
        weight = torch.full((channels, 1, self.kernel, self.kernel), 0.01)
        return nn.functional.conv2d(images, weight, None, *self.options, groups=channels)


class _Follow(TorchDispatchMode):
    def __init__(self, images):
        super().__init__()
        self.flow = PositionTracer(images)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.flow.trace_operation(func, args, kwargs or {}, result)
        return result


def _into_buffer(tensor):
    buffer = torch.zeros(tensor.shape[0] + 1, *tensor.shape[1:], dtype=tensor.dtype)
    buffer[1:] = tensor
    return buffer[1:]


def _overwrite(tensor):
    tensor = tensor.clone()
    view = tensor.flatten()
    tensor[0].copy_(tensor[-1].clone())
    return view.reshape(tensor.shape)


MOVES = {
    "flatten": lambda t, n: t.flatten(n % t.ndim),
    "transpose": lambda t, n: t.transpose(n % t.ndim, -1),
    "roll": lambda t, n: t.roll(n, n % t.ndim),
    "roll all": lambda t, n: t.roll(n),
    "flip": lambda t, n: t.flip(n % t.ndim),
    "slice": lambda t, n: t.narrow(n % t.ndim, 0, max(1, t.shape[n % t.ndim] - 1)),
    "step": lambda t, n: t.movedim(n % t.ndim, 0)[::2],
    "split": lambda t, n: t.unflatten(n % t.ndim, (2, -1)) if t.shape[n % t.ndim] % 2 == 0 else t,
    "windows": lambda t, n: t.unfold(n % t.ndim, min(2, t.shape[n % t.ndim]), 1),
    "halves swapped": lambda t, n: torch.cat(t.chunk(2, n % t.ndim)[::-1], n % t.ndim),
    "chosen": lambda t, n: t.index_select(n % t.ndim, torch.arange(t.shape[n % t.ndim] - 1, -1, -2)),
    "indexed": lambda t, n: t[torch.arange(t.shape[0] - 1, -1, -1)],
    "stacked": lambda t, n: torch.stack([t, t.flip(0)], n % (t.ndim + 1)),
    "repeated": lambda t, n: t.repeat_interleave(2, n % t.ndim) if t.numel() < 5_000 else t,
    "contiguous": lambda t, n: t.contiguous(),
    "into a buffer": lambda t, n: _into_buffer(t),
    "overwritten": lambda t, n: _overwrite(t),
    "strided": lambda t, n: t.contiguous().as_strided((t.numel() // 2,), (2,)) if t.numel() > 1 else t,
    "multiplied": lambda t, n: t * 1,
}


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(st.sampled_from(sorted(MOVES)), st.integers(0, 6)), min_size=1, max_size=7))
def test_what_only_moves_elements_moves_their_places_with_them(moves):
    """The image holds its own coordinates, so that each element can be asked where it came from."""
    height, width = 6, 8
    rows = torch.arange(height, dtype=torch.float64)[:, None] + 0.5
    columns = torch.arange(width, dtype=torch.float64) + 0.5
    images = (100 * rows + columns).expand(1, 3, height, width).contiguous()
    with _Follow(images) as mode:
        moved = images
        for name, number in moves:
            moved = MOVES[name](moved, number)
        moved = moved * 1
    positions = mode.flow.positions_of(moved)
    ((y, x, mixed),) = positions.centres
    assert positions.shape == moved.shape and positions.unknown_operations == frozenset()
    assert torch.equal((100 * y + x).expand(moved.shape), moved)
    assert (mixed == 0).all()
    ends = ([array.min() for array in arrays] for arrays in positions.receptive_field)
    top, left, bottom, right = map(min, zip(*ends, strict=True))
    assert top == moved.min().div(100).floor() and -bottom == moved.max().div(100).ceil()
    assert 0 <= left < -right <= width


def test_an_operation_that_is_not_known_leaves_the_place_open_and_is_named():
    class Sorted(nn.Module):
        def forward(self, images):
            return nn.functional.avg_pool2d(images, 4).sort(2)[0]

    placement, _ = placed(Sorted(), (32, 32))
    assert placement[:2] == (None, None) and "aten::sort" in placement[2]

    class Residual(Sorted):
        def forward(self, images):
            return nn.functional.avg_pool2d(images, 4) + super().forward(images)

    placement, _ = placed(Residual(), (34, 32))
    assert placement == (Axis(0.0, 4.0, 0, 32), None, "the last 2 rows of 34x32 images are not seen")


FAMILIES = {
    # Sizes that are no multiple of the reduction, so that an even grid would be wrong by a part of a location.
    "vit_tiny_patch16_224": (108, 124),
    "vit_small_patch14_reg4_dinov2": (92, 80),
    "resnet18": (97, 113),
    "pit_ti_224": (104, 120),
    "swin_tiny_patch4_window7_224": (90, 102),
    "pvt_v2_b0": (97, 113),
    "coat_lite_tiny": (102, 90),
    "levit_128s": (97, 113),
    "tf_mobilenetv3_small_minimal_100": (97, 113),
    "hrnet_w18_small": (97, 113),
    "focalnet_tiny_srf": (90, 102),
}
SHARP = 5
"""Locations along an axis from which on what one of them reads stands out from what they all read."""


@pytest.mark.long
@pytest.mark.parametrize("model", FAMILIES)
def test_gradients_peak_where_locations_lie(model):
    """Of the network as it is drawn, with all its attention, gates and norms: what a row of locations reads most."""
    size = FAMILIES[model]
    infos = [info for info in list_layers(model, size) if min(info.height, info.width) >= SHARP]
    infos = [infos[0], infos[-1]]
    encoder = Encoder(model, layers=[info.layer for info in infos], weights="random", image_size=size)
    for index, spec in enumerate(encoder.specs):
        for axis, placement in enumerate((spec.rows, spec.columns)):
            count, length = (spec.height, spec.width)[axis], size[axis]
            start, stride = (placement.start, placement.stride) if placement else (0, length / count)
            chosen = torch.tensor([1, count // 2, count - 2])
            peaks = _peaks(encoder, index, axis, chosen.tolist())
            expected = start + (chosen + 0.5) * stride
            inside = (expected > 0) & (expected < length)
            errors = ((peaks - expected) / stride).abs()[inside]
            assert errors.max() < 0.75, (
                f"{spec.source} {placement}: {peaks.tolist()}, expected {expected.tolist()}"
            )


def _peaks(encoder, index, axis, lines, draws=3):
    """Where along an axis of the image the gradient of lines of locations is largest: its centre of energy."""
    generator = torch.Generator().manual_seed(0)
    energy = 0
    for _ in range(draws):
        images = torch.rand(1, 3, *encoder.image_size, generator=generator).requires_grad_()
        with encoder.gradients():
            features = encoder(images)[index]
        weighted = features * torch.randn(features.shape, generator=generator)
        found = []
        for line in lines:
            (gradient,) = torch.autograd.grad(
                weighted.select(2 + axis, line).sum(), images, retain_graph=True
            )
            found.append(gradient.double().square().sum((0, 1, 3 - axis)))
        energy = energy + torch.stack(found)
    shares = energy / energy.sum(1, keepdim=True)
    sharp = (shares - shares.median(0).values).clamp_min(0).square()
    return (sharp * (torch.arange(shares.shape[1]) + 0.5)).sum(1) / sharp.sum(1)


def test_a_trace_that_ended_early_is_said_with_the_size_that_works(capsys):
    from afterimage.cli.layers import Layers

    assert trace(open_network("crossvit_9_240"), (240, 240)).early_stop_note == ""
    assert trace(open_network("resnet18"), (64, 64)).early_stop_note == ""
    Layers("crossvit_9_240").run()
    out = capsys.readouterr().out
    assert "WARNING: crossvit_9_240.in1k ended early on 224x224 images (The size of tensor a" in out
    assert "it runs to its end on 240x240, the size of its pretraining" in out
    assert (
        "every layer: the last 8 rows and columns of 224x224 images are not seen" in out
        and "every 12 from 0" in out
    )
    Layers("crossvit_9_240", "240").run()
    out = capsys.readouterr().out
    assert "ended early" not in out and "not seen" not in out and "blocks.2.blocks.1" in out


@pytest.mark.long
def test_a_study_of_models_lists_their_layers_at_its_own_crop_and_says_what_ended_early():
    command = [
        sys.executable,
        "-m",
        "afterimage",
        "study",
        "--models",
        "crossvit_9_240",
        "--data",
        "procedural:20",
    ]
    for crop, runs, ended in ((224, 2, True), (240, 8, False)):
        done = subprocess.run(
            [*command, "--resize", "256", "--crop", str(crop), "--dry-run"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert f"{runs} runs, none started" in done.stdout
        assert ("ended early on 224x224 images" in done.stderr) == ended
        assert ("the last 8 rows and columns of 224x224 images are not seen" in done.stdout) == ended
