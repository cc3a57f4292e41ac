"""What is lost: closed forms of spectra, colour planes and regions."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from afterimage.analysis.controls.error_breakdown import (
    BANDS,
    REGIONS,
    ErrorBreakdown,
    cross_spectrum,
    frequencies,
    regions,
    ycbcr,
)
from afterimage.evaluation.evaluate import to_uint8


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_white_noise_has_a_flat_spectrum():
    white = 0.3 * noise(40, 1, 128, 128)
    power = cross_spectrum(white, white).mean((0, 1))
    # The first bands average few frequencies, and Hann's main lobe takes some of the mean that was taken out.
    np.testing.assert_allclose(power[4:].numpy(), 0.09, rtol=0.05)
    assert power[1:].mean().item() == pytest.approx(0.09, rel=0.02)


@pytest.mark.parametrize("cycles", [10, 30, 50])
def test_a_grating_has_its_power_at_its_frequency(cycles):
    x = torch.arange(128, dtype=torch.float64) / 128
    grating = torch.sin(2 * torch.pi * cycles * x).expand(1, 1, 128, 128).contiguous()
    power = cross_spectrum(grating, grating)[0, 0]
    assert abs(frequencies()[power.argmax()] - cycles / 128) <= 1 / (4 * BANDS) + 1e-9


def test_power_is_symmetric_and_shared_power_is_bounded():
    a, b = noise(2, 2, 96, 128), noise(2, 2, 96, 128, seed=1)
    torch.testing.assert_close(cross_spectrum(a, b), cross_spectrum(b, a))
    bound = (cross_spectrum(a, a) * cross_spectrum(b, b)).sqrt()
    assert (cross_spectrum(a, b).abs() <= bound + 1e-12).all()
    assert (cross_spectrum(a, b).abs() < 0.3 * bound)[..., 8:].all()
    torch.testing.assert_close(cross_spectrum(a, -a), -cross_spectrum(a, a))


def test_small_images_have_empty_bands():
    tiny = noise(1, 1, 16, 16)
    power = cross_spectrum(tiny, tiny)
    assert power.isnan().any() and not power.isnan().all()


def test_planes_are_pillows():
    images = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images = torch.from_numpy(to_uint8(images)).permute(0, 3, 1, 2).double() / 255
    theirs = np.asarray(Image.fromarray(to_uint8(images)[0]).convert("YCbCr")).astype(float)
    ours = ycbcr(images)[0].permute(1, 2, 0).numpy() * 255 + [0, 128, 128]
    np.testing.assert_allclose(ours, theirs, atol=1.01)


def lost(images, outputs):
    measure = ErrorBreakdown()
    measure.add([str(i) for i in range(len(images))], images, outputs)
    return measure, measure.result()


def test_a_pure_chroma_error_has_no_luma_part():
    images = 0.3 + 0.4 * torch.rand(3, 3, 80, 80, generator=torch.Generator().manual_seed(0))
    direction = torch.tensor([1.0, -0.299 / 0.587, 0.0])[:, None, None]  # luma 0.299 - 0.299 = 0
    error = 0.05 * torch.rand(3, 1, 80, 80, generator=torch.Generator().manual_seed(1)) * direction
    measure, facts = lost(images, images + error)
    assert facts["planes"]["luma"]["error"] < 1e-12 < 1e-5 < facts["planes"]["cr"]["error"]
    assert all(row["psnr_luma"] == 100 and row["psnr_cr"] < 40 for row in measure.rows)
    luma, chroma = facts["spectra"]["luma"], facts["spectra"]["chroma"]
    assert max(luma["error"]) < 1e-10 < max(chroma["error"])


def test_nothing_lost_is_nothing():
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    measure, facts = lost(images, images)
    assert all(row["psnr_luma"] == row["psnr_cb"] == 100 for row in measure.rows)
    assert not any(map(any, facts["place"]))
    assert facts["spectra"]["luma"]["image"] == facts["spectra"]["luma"]["shared"]


def test_an_error_in_one_corner_is_there_on_the_map():
    images = torch.full((2, 3, 112, 112), 0.5)
    outputs = images.clone()
    outputs[:, :, :8, 104:] += 0.2
    _, facts = lost(images, outputs)
    place = np.array(facts["place"])
    assert place.shape == (56, 56)
    np.testing.assert_allclose(place[:4, 52:], 0.2, rtol=1e-4)
    place[:4, 52:] = 0
    assert not place.any()


def test_flat_edge_and_texture_are_told_apart():
    flat = torch.full((3, 64, 64), 0.4)
    edge = flat.clone()
    edge[:, :, 32:] = 0.8
    texture = 0.3 + 0.4 * torch.rand(1, 64, 64, generator=torch.Generator().manual_seed(0)).expand(3, -1, -1)
    kinds = regions(torch.stack([flat, edge, texture]))
    assert (kinds[0] == REGIONS.index("flat")).all()
    assert (kinds[1][:, 30:34] == REGIONS.index("edge")).all() and (kinds[1][:, :24] == 0).all()
    # Where noise happens to line up within 7 x 7 pixels it passes for an edge.
    assert (kinds[2] == REGIONS.index("texture")).double().mean() > 0.9


@given(st.integers(0, 10_000), st.floats(0.0, 0.2))
@settings(max_examples=15, deadline=None)
def test_the_parts_add_up(seed, strength):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(2, 3, 28, 28, generator=generator)
    outputs = (images + strength * torch.randn(2, 3, 28, 28, generator=generator)).clamp(0, 1)
    measure, facts = lost(images, outputs)
    error = (outputs.double() - images.double()).square().mean().item()
    for row in measure.rows:
        assert sum(row[f"share_{kind}"] for kind in REGIONS) == pytest.approx(1)
    total = sum(facts["regions"][k]["share"] * (facts["regions"][k]["mse"] or 0) for k in REGIONS)
    assert total == pytest.approx(error, rel=1e-6, abs=1e-12)
    place = np.square(facts["place"])
    assert place.mean() == pytest.approx(error, rel=1e-3, abs=1e-12)
