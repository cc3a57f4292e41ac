"""Rate: quantisers, coded sizes and entropies against what is known of them."""

import io
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from afterimage.analysis.controls.rate_distortion import (
    BITS,
    Quantiser,
    coded_bytes,
    entropy,
    histograms,
    measure_codecs,
)
from afterimage.evaluation.metrics import psnr


def values(channels=3, count=4000, seed=0):
    return (
        torch.randn(channels, count, generator=torch.Generator().manual_seed(seed))
        * torch.arange(1, channels + 1)[:, None]
    )


@given(st.sampled_from(BITS), st.integers(0, 100))
@settings(max_examples=20, deadline=None)
def test_a_decoded_value_lies_in_its_cell_and_codes_to_itself(bits, seed):
    table = values(seed=seed)
    quantiser = Quantiser.fit(table, bits)
    maps = table[:, :100].view(1, 3, 10, 10)
    symbols = quantiser.encode(maps)
    assert symbols.max().item() < 2**bits
    inner = (symbols > 0) & (symbols < 2**bits - 1)
    decoded = quantiser.decode(symbols)
    assert torch.equal(quantiser.encode(decoded)[inner], symbols[inner])
    width = quantiser.width.view(1, 3, 1, 1).expand_as(maps)
    assert ((decoded - maps).abs() <= width * 1.0001)[inner].all()


def test_more_bits_lose_less_and_a_uniform_source_loses_a_twelfth_of_a_step_squared():
    table = torch.rand(1, 200_000, generator=torch.Generator().manual_seed(0))
    maps, errors = table.view(1, 1, 400, 500), []
    for bits in BITS:
        quantiser = Quantiser.fit(table, bits)
        error = (quantiser.decode(quantiser.encode(maps)) - maps).square().mean().item()
        if bits <= 4:  # with finer steps the tails beyond the range come in
            assert error == pytest.approx(quantiser.width.item() ** 2 / 12, rel=0.03)
        errors.append(error)
    assert errors == sorted(errors)


def test_a_symbol_stands_for_the_mean_of_its_cell():
    table = values(1)
    quantiser = Quantiser.fit(table, 1)
    symbols = quantiser.encode(table.view(1, 1, 40, 100)).flatten()
    for symbol in (0, 1):
        mean = table[0][symbols == symbol].mean().item()
        assert quantiser.table[0, symbol].item() == pytest.approx(mean, rel=1e-4)


@pytest.mark.parametrize("bits", BITS)
def test_constant_features_cost_next_to_nothing(bits):
    constant = torch.full((4, 1000), 2.5)
    quantiser = Quantiser.fit(constant, bits)
    maps = torch.full((2, 4, 56, 56), 2.5)
    symbols = quantiser.encode(maps)
    assert torch.equal(quantiser.decode(symbols), maps)
    assert max(coded_bytes(symbols)) * 8 / 224**2 < 0.02
    assert entropy(histograms(symbols, bits)).tolist() == [0, 0, 0, 0]


def test_entropies_of_known_distributions():
    counts = torch.tensor([[8, 0, 0, 0], [1, 1, 1, 1], [2, 1, 1, 0], [0, 0, 0, 0]]).double()
    assert entropy(counts).tolist() == pytest.approx([0, 2, 1.5, 0])
    p = 0.11
    binary = -(p * math.log2(p) + (1 - p) * math.log2(1 - p))
    assert entropy(torch.tensor([[11.0, 89.0]]).double()).item() == pytest.approx(binary)


def test_histograms_count_by_channel():
    symbols = torch.tensor([[[[0, 1]], [[3, 3]]], [[[1, 1]], [[0, 2]]]], dtype=torch.uint8)
    assert histograms(symbols, 2).tolist() == [[1, 3, 0, 0], [1, 0, 1, 2]]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_values_without_memory_are_coded_close_to_their_entropy(bits):
    """bzip2 can neither beat nor badly miss the entropy of independent symbols."""
    generator = torch.Generator().manual_seed(bits)
    symbols = torch.randint(2**bits, (1, 8, 64, 64), generator=generator).to(torch.uint8)
    size = 8 * coded_bytes(symbols)[0] / symbols.numel()
    assert 0.98 * bits < size < 1.25 * bits + 0.1


def sample_images():
    coarse = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return (
        torch.nn.functional.interpolate(coarse, (64, 64), mode="bicubic").clamp(0, 1).mul(255).round() / 255
    )


def test_codecs_are_pillows_whole_files():
    images = sample_images()
    rows = {(r["codec"], r["quality"]): r for r in measure_codecs(images.split(2))}
    sizes, scores = [], []
    for sample_image in images:
        buffer = io.BytesIO()
        array = (sample_image * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(array).save(buffer, "JPEG", quality=80, optimize=True)
        sizes.append(8 * len(buffer.getvalue()) / 64**2)
        decoded = torch.from_numpy(np.asarray(Image.open(buffer)).astype(np.float32) / 255).permute(2, 0, 1)
        scores.append(psnr(decoded[None], sample_image[None]).item())
    assert rows["JPEG", 80]["bits_per_pixel"] == pytest.approx(np.mean(sizes))
    assert rows["JPEG", 80]["psnr"] == pytest.approx(np.mean(scores), abs=1e-3)
    for codec in ("JPEG", "WebP"):
        curve = [r for (name, _), r in rows.items() if name == codec]
        assert all(a["psnr"] < b["psnr"] + 0.3 for a, b in itertools.pairwise(curve))
        assert curve[0]["bits_per_pixel"] < curve[-1]["bits_per_pixel"]
    assert rows["lossless WebP", None]["psnr"] is None
