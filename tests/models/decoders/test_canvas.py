"""Where a feature map's cells lie in the image, and that every decoder and fusion puts things there."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from afterimage.config import (
    AfterimageError,
    Axis,
    DataConfig,
    DecoderConfig,
    FeatureSpec,
    FusionConfig,
    RunConfig,
)
from afterimage.data.sources.dead_leaves import dead_leaves
from afterimage.experiments.queue import train_runs
from afterimage.experiments.verify import verify_runs
from afterimage.models.decoders import create_decoder
from afterimage.models.decoders.canvas import Canvas, Span, extrapolate
from afterimage.models.fusion import align, create_fusion
from afterimage.report.write import write_report
from afterimage.training.checkpoint import load_reconstructor
from decoder_contract import spec
from fusion_contract import PLACED, maps


def axis(start, stride, size, count=None):
    """An axis whose locations see their cells and nothing else."""
    end = size if count is None else start + count * stride
    return Axis(float(start), float(stride), int(max(0, start)), int(min(size, end)))


def canvas(size, count, start, stride):
    along = axis(start, stride, size, count)
    return Canvas(spec(1, count, count, along, along), (size, size))


def psnr(images, others):
    return -10 * (images.clamp(0, 1) - others).square().flatten(1).mean(1).log10().mean()


placings = st.tuples(st.integers(1, 5), st.integers(1, 8), st.integers(0, 9), st.integers(0, 9))


@given(placings, placings)
@settings(max_examples=60, deadline=None)
def test_whole_cells_inside_the_image_are_placed_exactly(vertical, horizontal):
    spans, axes = [], []
    for count, stride, before, after in (vertical, horizontal):
        spans.append((before, before + count * stride, before + count * stride + after))
        axes.append(axis(before, stride, spans[-1][2], count))
    (top, bottom, height), (left, right, width) = spans
    placed = Canvas(spec(1, vertical[0], horizontal[0], *axes), (height, width))
    images = torch.rand(2, 3, height, width)
    cut = placed.cut(images)
    assert torch.equal(cut, images[..., top:bottom, left:right]) and cut.shape[-2:] == placed.size
    back = placed.place(cut)
    assert back.shape == images.shape
    assert torch.equal(back[..., top:bottom, left:right], images[..., top:bottom, left:right])
    assert back.min() >= cut.min() - 1e-5 and back.max() <= cut.max() + 1e-5


@given(st.integers(2, 6), st.integers(2, 8), st.integers(0, 6), st.integers(0, 6))
@settings(max_examples=40, deadline=None)
def test_a_decoder_of_fewer_cells_gives_the_same_pixels_where_these_lie(count, stride, before, after):
    """A map that begins a cell later is the same map: what is decoded stays where it was."""
    size = before + count * stride + after
    along, later = axis(before, stride, size, count), axis(before + stride, stride, size, count - 1)
    decoders = [
        create_decoder("linear", [spec(4, n, n, a, a)], size, kernel=1)
        for n, a in ((count, along), (count - 1, later))
    ]
    weight = torch.rand(3 * stride**2, 4) / 4
    for decoder in decoders:
        decoder.weight.data.copy_(weight)
    features = torch.rand(2, 4, count, count)
    whole, part = decoders[0]([features]), decoders[1]([features[..., 1:, 1:]])
    inside = slice(before + stride, before + count * stride)
    torch.testing.assert_close(part[..., inside, inside], whole[..., inside, inside])


@pytest.mark.parametrize(
    ("axis", "count", "size", "expected"),
    [
        (None, 14, 223, (0, 223 / 14, True)),
        (Axis(0.0, 16.0, 0, 96), 6, 104, (0, 16, False)),
        (Axis(0.0, 16.0, 0, 96), 6, 96, (0, 16.0, True)),
        (Axis(0.0, 15.999, 0, 224), 14, 224, (0, 16.0, True)),
        (Axis(13.5, 16.0, 0, 224), 12, 224, (13, 16, False)),
        # Padded convolutions of stride 4 put their first location at the first pixel, and it tells of those behind.
        (Axis(-1.5, 4.0, 0, 225), 57, 225, (0, 4, False)),
        (Axis(-7.5, 16.0, 0, 200), 13, 200, (0, 16, False)),
        (Axis(-20.0, 16.0, 0, 200), 15, 200, (-12, 16, False)),
        (Axis(6.0, 8.0, 0, 100), 12, 100, (4, 8, False)),
        (Axis(6.0, 7.3, 0, 64), 8, 64, (64 - 58.4, 7.3, False)),
        (Axis(3.0, 7.3, 0, 64), 8, 64, (3.0, 7.3, False)),
        (Axis(10.0, 30.0, 10, 40), 1, 64, (10, 30, False)),
    ],
)
def test_spans(axis, count, size, expected):
    span = Span.of(axis, count, size)
    assert (span.start, span.stride, span.even) == pytest.approx(expected)
    assert span.even or span.pixels == count * math.ceil(span.stride)


def test_cells_beside_the_image_are_an_error():
    with pytest.raises(AfterimageError, match="from pixel 70 to 102, beside an image of 64"):
        canvas(64, 4, 70, 8)


def test_cells_between_pixels_are_resampled():
    """A ramp is placed where it was cut from, whatever the width of a cell."""
    along = Axis(3.2, 5.4, 0, 64)
    placed = Canvas(spec(1, 9, 9, along, along), (64, 64))
    ramp = torch.arange(64.0).expand(1, 1, 64, 64) + torch.arange(64.0)[:, None]
    back = placed.place(placed.cut(ramp))
    assert placed.size == (54, 54)
    torch.testing.assert_close(back[..., 4:51, 4:51], ramp[..., 4:51, 4:51], atol=0.01, rtol=0)


def test_what_follows_the_border_is_harmonic():
    """Against the discrete Laplace equation, solved by itself: given on the left, no slope on the other three sides."""
    edge = torch.rand(12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    edge = F.interpolate(edge[None, None], 48, mode="linear")[0, 0]
    values = edge[:, None].repeat(1, 9)
    for _ in range(4000):
        around = F.pad(values[None, None], (0, 1, 1, 1), mode="replicate")[0, 0]
        values[:, 1:] = (around[1:-1, :-2] + around[1:-1, 2:] + around[:-2, 1:-1] + around[2:, 1:-1])[
            :, :8
        ] / 4
    images = edge.float().expand(1, 3, 4, 48).mT
    found = extrapolate(images, ((0, 48), (0, 4)), (48, 12))
    assert torch.equal(found[..., :4], images)
    torch.testing.assert_close(found[0, 0, :, 4:].double(), values[:, 1:], atol=0.01, rtol=0)
    flipped = extrapolate(images, ((0, 48), (8, 12)), (48, 12))
    torch.testing.assert_close(flipped, found.flip(-1))
    turned = extrapolate(images.mT, ((0, 4), (0, 48)), (12, 48))
    torch.testing.assert_close(turned, found.mT)
    flat = extrapolate(torch.full((1, 1, 5, 7), 0.25), ((2, 7), (1, 8)), (9, 30))
    torch.testing.assert_close(flat, torch.full((1, 1, 9, 30), 0.25))


def leaves(count, size):
    images = [np.asarray(dead_leaves(0, index, size, size)) for index in range(count)]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


def fitted(decoder, features, images, validation=None):
    decoder.begin_fit(len(images), 0)
    decoder.partial_fit([features], images)
    if validation:
        decoder.partial_fit([validation[0]], validation[1], validation=True)
    decoder.finalize_fit()
    return decoder.eval()


@given(st.integers(0, 7), st.integers(0, 7), st.sampled_from([1, 2, 4]))
@settings(max_examples=12, deadline=None)
def test_the_closed_form_recovers_what_the_cells_hold(before, after, stride):
    """An encoder that keeps every pixel of its cells, from an offset on: space to depth."""
    count = 6
    size = before + count * stride + after
    images = torch.rand(40, 3, size, size, generator=torch.Generator().manual_seed(2))
    inside = slice(before, before + count * stride)
    features = F.pixel_unshuffle(images[..., inside, inside], stride)
    along = axis(before, stride, size, count)
    decoder = create_decoder("linear", [spec(features.shape[1], count, count, along, along)], size, kernel=1)
    rebuilt = fitted(decoder, features, images)([features])
    torch.testing.assert_close(rebuilt[..., inside, inside], images[..., inside, inside], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["linear", "residual"])
@pytest.mark.parametrize("beyond", [2, 5])
def test_cells_that_reach_beyond_the_image_hold_what_is_in_it(name, beyond):
    """An encoder that pads at the right and below until its patches of 8 are whole."""
    size = 40 - beyond
    images = torch.rand(60, 3, size, size, generator=torch.Generator().manual_seed(2))
    features = F.pixel_unshuffle(F.pad(images, (0, beyond, 0, beyond)), 8)
    along = axis(0, 8, size)
    decoder = create_decoder(name, [spec(192, 5, 5, along, along)], size, kernel=1)
    rebuilt = fitted(decoder, features, images)([features])
    assert decoder.canvas.size == (40, 40)
    torch.testing.assert_close(rebuilt, images, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("crop", "patch"),
    [(52, 8), (55, 8), *(pytest.param(*sizes, marks=pytest.mark.long) for sizes in ((60, 14), (46, 16)))],
)
def test_dropped_pixels_cost_what_they_hold_and_no_more(crop, patch):
    """The reference: the same patches decoded by themselves, and every dropped pixel by the best constant there is."""
    count = crop // patch
    covered = count * patch
    images = leaves(60, crop)
    torch.manual_seed(0)
    project = torch.nn.Conv2d(3, 3 * patch**2 // 4, patch, patch)
    with torch.no_grad():
        features = project(images)
    parts = (slice(0, 40), slice(40, 48), slice(48, 60))
    inner = images[..., :covered, :covered]
    scores = {}
    for name, target, along in (
        ("covered", inner, None),
        ("placed", images, axis(0, patch, crop, count)),
        ("stretched", images, None),
    ):
        decoder = create_decoder(
            "linear", [spec(features.shape[1], count, count, along, along)], target.shape[-1]
        )
        decoder = fitted(
            decoder, features[parts[0]], target[parts[0]], (features[parts[1]], target[parts[1]])
        )
        scores[name] = decoder([features[parts[2]]])
    tested = images[parts[2]]
    reference = images[parts[0]].mean((0, 2, 3), keepdim=True).expand_as(tested).clone()
    constant = tested.clone()
    constant[..., :covered, :covered] = scores["covered"]
    outside = torch.ones(crop, crop, dtype=torch.bool)
    outside[:covered, :covered] = False
    edge = F.pad(scores["covered"], (0, crop - covered, 0, crop - covered), mode="replicate")
    allowed = []
    for filling in (reference, edge):
        filled = constant.clone()
        filled[..., outside] = filling[..., outside]
        allowed.append(psnr(filled, tested))
    assert psnr(scores["placed"], tested) > max(allowed) - 0.05
    assert psnr(scores["stretched"], tested) < max(allowed) - 0.3
    torch.testing.assert_close(scores["placed"][..., :covered, :covered], scores["covered"])


@pytest.mark.parametrize(("start", "stride", "size"), [(0, 4, 52), (-3, 4, 43), (5, 4, 60)])
def test_a_window_of_the_residual_decoder_is_a_part_of_the_whole(start, stride, size):
    along = Axis(float(start), float(stride), 0, size)
    decoder = create_decoder("residual", [spec(6, 12, 12, along, along)], size, seed=0, window=16, trunk=0)
    with torch.no_grad():
        decoder.base.weight.normal_(0, 0.1)
    features, images = torch.randn(2, 6, 12, 12), torch.rand(2, 3, size, size)
    whole = decoder([features])
    windows = [w for seed in range(8) for w in decoder.feature_crops(torch.Generator().manual_seed(seed))]
    assert len(windows) > 8 and None not in windows
    for window in windows:
        part, target = decoder([features], window), decoder.crop_images(images, window)
        assert part.shape == target.shape and part.numel()
        rows, columns = decoder.canvas.crop(window)[1]
        assert torch.equal(target, images[..., rows, columns])
        torch.testing.assert_close(part, whole[..., rows, columns])


def centres(start, stride, count):
    return start + (torch.arange(count) + 0.5) * stride


@given(
    st.integers(-4, 12),
    st.integers(3, 9),
    st.integers(4, 9),
    st.integers(0, 12),
    st.integers(3, 9),
    st.integers(4, 9),
)
@settings(max_examples=60, deadline=None)
def test_maps_are_aligned_by_where_they_lie(one, stride, count, other, width, number):
    """A map that holds its own places, in pixels, holds them still on another's cells, but beyond its own."""
    size = 96
    source, target = canvas(size, count, one, stride), canvas(size, number, other, width)
    along = centres(source.rows.start, source.rows.stride, count)
    maps = torch.stack([along[:, None].expand(count, count), along.expand(count, count)])[None]
    found = align(maps, source, target, smooth=False)
    wanted = centres(target.rows.start, target.rows.stride, number).clamp(along[0], along[-1])
    expected = torch.stack([wanted[:, None].expand(number, number), wanted.expand(number, number)])[None]
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)


def test_the_finest_map_is_fused_as_it_is():
    fusion, features = create_fusion(FusionConfig("aligned"), PLACED, 100), maps(PLACED)
    assert torch.equal(fusion(features)[:, :6], features[0])


def test_a_stacked_fusion_reads_coarse_maps_where_they_lie():
    """Red from an even fine map, green and blue from a coarse one that leaves out the last 4 pixels."""
    images = torch.rand(40, 3, 20, 20, generator=torch.Generator().manual_seed(3))
    fine = F.pixel_unshuffle(images[:, :1], 2)
    coarse = F.pixel_unshuffle(images[:, 1:, :16, :16], 4)
    along = Axis(0.0, 4.0, 0, 16)
    specs = [FeatureSpec("fine:x", 4, 10, 10), FeatureSpec("coarse:x", 32, 4, 4, along, along)]
    fusion = create_fusion(FusionConfig("stacked"), specs, 20)
    fusion.begin_fit(40, seed=0)
    fusion.partial_fit([fine, coarse], images)
    fusion.finalize_fit()
    (read,) = fusion([fine, coarse]).split([4, 12], 1)[1:]
    said = F.pixel_shuffle(read, 2)
    assert (said[:, 1:, :16, :16] - images[:, 1:, :16, :16]).abs().max() < 0.05
    assert fusion.spec == FeatureSpec("fine:x + coarse:x", 16, 10, 10)


def test_a_run_says_what_no_location_sees_and_still_holds(tmp_path, no_figures):
    """A ViT of patches of 16 on crops of 40: the last 8 pixels are dropped."""
    config = RunConfig(
        ("vit_tiny_patch16_224:block0", "vit_tiny_patch16_224:block1"),
        weights="random",
        decoder=DecoderConfig("linear", options={"kernel": 1}),
        fusion=FusionConfig("aligned"),
        data=DataConfig("procedural:30", resize=44, crop=40),
    )
    alone = replace(config, sources=config.sources[:1], fusion=None)
    runs = train_runs([config, alone], tmp_path / "runs", cache=tmp_path / "cache", accelerator="cpu")
    for run in runs:
        result = run.result
        notes = "\n".join(result.notes)
        assert notes.count("the last 8 rows and columns of 40x40 images are not seen") == len(result.sources)
        assert "36.0% of an image's pixels are seen by no location" in notes
        seen = result.scores_seen["psnr"].mean
        assert f"on the other pixels alone the mean PSNR is {seen:.2f} dB" in notes
        assert seen > result.scores["psnr"].mean
        assert load_reconstructor(run).reconstruct(torch.rand(1, 3, 40, 40)).shape == (1, 3, 40, 40)
        (verdict,) = verify_runs([run], cache=tmp_path / "cache", accelerator="cpu")
        assert verdict.holds
    written = write_report(runs, tmp_path / "report")
    for name in ("report.md", "index.html"):
        assert "the last 8 rows and columns of 40x40 images are not seen" in written[name].read_text()
