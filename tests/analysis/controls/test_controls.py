import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from afterimage.config import AfterimageError, DataConfig
from afterimage.evaluation.baselines import BASELINES, baseline, display_name, run_baselines
from afterimage.evaluation.metrics import psnr


def images(height: int = 40, width: int = 56, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(2, 3, 9, 9, generator=generator)
    smooth = torch.nn.functional.interpolate(small, (height, width), mode="bilinear")
    return (smooth + 0.2 * (torch.rand(2, 3, height, width, generator=generator) - 0.5)).clamp(0, 1)


def test_mean_is_each_images_own_colour():
    originals = images()
    result = baseline("mean")(originals)
    assert result.shape == originals.shape
    for original, sample_image in zip(originals.numpy(), result.numpy(), strict=True):
        expected = original.reshape(3, -1).mean(1)[:, None, None]
        np.testing.assert_allclose(sample_image, np.broadcast_to(expected, sample_image.shape), atol=1e-6)


@pytest.mark.parametrize("size", [1, 5, 7, 14, 39])
def test_thumbnails_agree_with_pillow(size):
    originals = images()
    for original, sample_image in zip(originals, baseline(f"thumbnail-{size}")(originals), strict=True):
        for channel, result in zip(original.numpy(), sample_image.numpy(), strict=True):
            small = Image.fromarray(channel).resize((size * 56 // 40, size), Image.Resampling.BICUBIC)
            expected = np.asarray(small.resize((56, 40), Image.Resampling.BICUBIC))
            np.testing.assert_allclose(result, expected.clip(0, 1), atol=1e-5)


def test_a_thumbnail_of_full_size_is_the_image():
    originals = images(24, 24)
    torch.testing.assert_close(baseline("thumbnail-24")(originals), originals, rtol=0, atol=1e-6)


@pytest.mark.parametrize("quality", [1, 50, 95, 100])
def test_jpeg_is_pillows(quality):
    originals = images()
    for original, sample_image in zip(originals, baseline(f"jpeg-{quality}")(originals), strict=True):
        pixels = (original.permute(1, 2, 0).numpy().astype(np.float64) * 255 + 0.5).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, format="jpeg", quality=quality)
        expected = np.asarray(Image.open(file)).astype(np.float32) / 255
        np.testing.assert_allclose(sample_image.permute(1, 2, 0).numpy(), expected, atol=1e-6)


def test_jpeg_is_a_good_copy():
    assert (psnr(baseline("jpeg-95")(images()), images()) > 25).all()


def test_more_information_scores_higher():
    originals = images(120, 120)
    names = ["mean", *(f"thumbnail-{size}" for size in (7, 14, 28, 56, 112))]
    scores = [psnr(baseline(name)(originals), originals).mean().item() for name in names]
    assert scores == sorted(scores)


@given(
    st.sampled_from(["mean", "thumbnail-3", "thumbnail-11", "jpeg-20"]), st.integers(0, 1000), st.booleans()
)
@settings(max_examples=25, deadline=None)
def test_baselines_stay_in_range_and_take_each_image_alone(name, seed, hard):
    originals = images(16, 21, seed)
    originals = originals.round() if hard else originals
    before = originals.clone()
    result = baseline(name)(originals)
    assert torch.equal(originals, before)
    assert result.shape == originals.shape and result.dtype == torch.float32
    assert result.min() >= 0 and result.max() <= 1
    torch.testing.assert_close(baseline(name)(originals[1:]), result[1:], rtol=0, atol=1e-6)


def test_baselines_of_every_table():
    assert [display_name(name) for name in BASELINES] == [
        "Mean colour",
        "Bicubic thumbnail 7×7",
        "Bicubic thumbnail 14×14",
        "Bicubic thumbnail 28×28",
        "Bicubic thumbnail 56×56",
        "Bicubic thumbnail 112×112",
        "JPEG quality 50",
    ]


@pytest.mark.parametrize(
    "name", ["", "mean-3", "thumbnail", "thumbnail-0", "thumbnail-07", "jpeg-101", "jpeg-0", "png"]
)
def test_unknown_names_are_errors_that_list_the_known_ones(name):
    for function in (baseline, display_name):
        with pytest.raises(AfterimageError, match=r"unknown baseline .*mean, thumbnail-7, .*jpeg-QUALITY"):
            function(name)


def test_a_thumbnail_larger_than_the_image_is_an_error():
    with pytest.raises(AfterimageError, match="a thumbnail of 41 pixels is larger than the images, 40x56"):
        baseline("thumbnail-41")(images())


@pytest.fixture
def no_weights(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setenv("AFTERIMAGE_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


DATA = DataConfig(source="procedural:20", resize=36, crop=32)


def test_baselines_become_runs_once(no_weights, tmp_path):
    runs = run_baselines(DATA, tmp_path / "runs", cache=tmp_path / "cache", keep=1)
    results = [run.result for run in runs]
    assert [result.config.baseline for result in results] == [
        "mean",
        "thumbnail-7",
        "thumbnail-14",
        "thumbnail-28",
        "jpeg-50",
    ]
    for run, result in zip(runs, results, strict=True):
        assert run.state == "done"
        assert (result.kind, result.sources, result.parameters) == ("baseline", (), 0)
        assert result.lpips.available is False and result.scores["lpips"] is None
        scores = [row["psnr"] for row in result.per_image]
        assert len(scores) == result.data.test_images == 2
        assert result.scores["psnr"].mean == pytest.approx(np.mean(scores))
        assert len(run.images) == 1
    means = [result.scores["psnr"].mean for result in results[:4]]
    assert means == sorted(means)
    written = [run.file("summary.json").stat().st_mtime_ns for run in runs]
    assert run_baselines(DATA, tmp_path / "runs", cache=tmp_path / "cache") == runs
    assert [run.file("summary.json").stat().st_mtime_ns for run in runs] == written


def test_a_named_thumbnail_larger_than_the_images_is_an_error(no_weights, tmp_path):
    with pytest.raises(AfterimageError, match="a thumbnail of 56 pixels"):
        run_baselines(DATA, tmp_path / "runs", names=["thumbnail-56"], cache=tmp_path / "cache")
