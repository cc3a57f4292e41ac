"""The best estimate: its network, and that it is nearer to the originals than decoder and refined image."""

from dataclasses import replace

import pytest
import torch

from afterimage.analysis.inversion.best_estimate import Corrector, correct, train_corrector
from afterimage.analysis.inversion.measure import BatchCache, bound_controls, mean_features
from afterimage.analysis.inversion.refinement import Refinement, decoder_errors, train_on_refined
from afterimage.config import AfterimageError, DataConfig
from afterimage.config.inversion import EstimateConfig, InvertConfig, num_error_images
from afterimage.data.dataset import load_data
from afterimage.evaluation.evaluate import to_uint8
from afterimage.evaluation.metrics import Metrics, psnr
from afterimage.models.decoders import create_decoder
from afterimage.models.reconstructor import MultiEncoder, Reconstructor
from afterimage.runtime.terminal import no_progress
from afterimage.training.trainer import train

FEW = EstimateConfig(images=16, steps=60, channels=8)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    config = DataConfig("procedural:80", resize=72, crop=64)
    return load_data(config, cache=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def reconstructor(data):
    """A linear decoder on a deep layer of a small network, 8 by 8 locations for 64 by 64 pixels."""
    encoders = MultiEncoder(["test_resnet.r160_in1k:layer2"], weights="random-init", image_size=64)
    made = Reconstructor(encoders, create_decoder("linear", encoders.specs, image_size=64))
    train(made, data)
    return made


def noisy(count: int, size: tuple[int, int] = (50, 37)) -> list[torch.Tensor]:
    """Smooth originals, what a decoder, and what a search makes of them: each less noisy than the last."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    originals = torch.nn.functional.interpolate(coarse, size, mode="bilinear")
    noise = [torch.randn(originals.shape, generator=generator) for _ in range(2)]
    return [originals, *[(originals + 0.05 * (2 - i) * n).clamp(0, 1) for i, n in enumerate(noise)]]


def test_a_corrector_starts_as_the_best_mixture_of_its_images():
    originals, decoded, refined = noisy(4)
    corrector = train_corrector(originals, decoded, refined, replace(FEW, steps=1))
    start = Corrector(8, corrector.mix.item(), corrector.step, corrector.scale)(decoded, refined)
    step = refined - decoded
    mix = float((step * (originals - decoded)).sum() / step.square().sum())
    torch.testing.assert_close(start, decoded + mix * step, atol=1e-3, rtol=0)
    best = (start - originals).square().mean()
    assert best <= (decoded - originals).square().mean() and best <= (refined - originals).square().mean()


def test_a_corrector_learns_to_average_what_is_invented():
    originals, *images = noisy(8)
    corrector = train_corrector(originals, *images, replace(FEW, steps=150))
    estimate = correct(corrector, *images, "32-true")
    each = torch.cat(
        [correct(corrector, *[part[i : i + 1] for part in images], "32-true") for i in range(len(originals))]
    )
    torch.testing.assert_close(each, estimate, atol=1e-5, rtol=1e-4)
    assert psnr(estimate, originals).mean() > psnr(images[1], originals).mean() + 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"images": -1}, "images must"),
        ({"steps": 0}, "steps must be"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(AfterimageError, match=message):
        EstimateConfig(**settings)


def test_controls_of_a_bound_owe_nothing_to_the_images_own_features():
    generator = torch.Generator().manual_seed(0)
    originals = torch.rand(4, 3, 40, 40, generator=generator)
    found = (originals + 0.05 * torch.randn(originals.shape, generator=generator)).clamp(0, 1)
    pixels = [to_uint8(part) for part in (originals, found)]
    images = [(f"{i}", a, b) for i, (a, b) in enumerate(zip(*pixels, strict=True))]
    grey = torch.full((1, 3, 40, 40), 0.5)
    controls = bound_controls(images, Metrics(), grey)
    rounded = [torch.from_numpy(part).movedim(-1, 1).float() / 255 for part in pixels]
    wrong = psnr(rounded[1].roll(1, 0), rounded[0])
    assert controls.other_image["psnr"].mean == pytest.approx(float(wrong.mean()), abs=1e-4)
    assert controls.prior_alone["psnr"].mean == pytest.approx(
        float(psnr(grey.expand(4, -1, -1, -1), rounded[0]).mean()), abs=1e-4
    )
    assert controls.identified == 1.0 and controls.candidates == 4

    shuffled = [(name, a, images[(i + 1) % 4][2]) for i, (name, a, _) in enumerate(images)]
    assert bound_controls(shuffled, Metrics()).identified == 0.0
    single = bound_controls(images[:1], Metrics())
    assert single.other_image is None and single.prior_alone is None


def test_features_that_tell_nothing_are_the_mean_of_many(reconstructor, data):
    images = data.validation.crops(range(6))
    (mean,) = mean_features(reconstructor.encoders, images.split(4))
    with torch.no_grad():
        torch.testing.assert_close(mean, reconstructor.encoders(images)[0].mean(0, keepdim=True))


def test_few_validation_images_do_no_harm(reconstructor, data, tmp_path):
    """Learned from images whose errors the search knows, where it does too well, an estimate is worse than both."""
    config = replace(data.config, limit_validation=8, limit_test=6)
    few = load_data(config, cache=tmp_path / "cache")
    errors = decoder_errors(reconstructor, few.validation, num_error_images(8), "cpu")
    refinement = Refinement(reconstructor, InvertConfig(steps=30), errors, 0)
    corrector, count = train_on_refined(
        refinement,
        few.validation,
        EstimateConfig(channels=16),
        BatchCache(tmp_path, ""),
        0,
        "cpu",
        no_progress,
    )
    images = few.test.crops(torch.arange(6))
    refined, decoded = list(refinement(images))[-1].images, reconstructor(images).clamp(0, 1)
    found = psnr(correct(corrector, decoded, refined, "32-true"), images).mean()
    assert count == 4
    assert found > max(psnr(decoded, images).mean(), psnr(refined.clamp(0, 1), images).mean()) - 0.1
