import subprocess
import sys

import numpy as np
import pytest
import torch

from afterimage.config import AfterimageError, FeatureSpec
from afterimage.models.decoders import DECODERS, create_decoder
from afterimage.models.decoders.linear import RIDGES
from afterimage.models.decoders.wavelet import inverse_haar
from afterimage.models.layers.blocks import UpConv2x, clamp, pixel_shuffle, pixel_unshuffle
from decoder_contract import DecoderContract, count, spec

PUBLISHED = [
    ("resnet34.tv_in1k:layer1", (64, 56, 56), 250_147),
    ("resnet34.tv_in1k:layer2", (128, 28, 28), 974_563),
    ("resnet34.tv_in1k:layer3", (256, 14, 14), 3_865_187),
    ("resnet34.tv_in1k:layer4", (512, 7, 7), 15_413_603),
    ("vgg16.tv_in1k:block1", (64, 112, 112), 233_667),
    ("vgg16.tv_in1k:block2", (128, 56, 56), 958_083),
    ("vgg16.tv_in1k:block3", (256, 28, 28), 3_848_707),
    ("vgg16.tv_in1k:block4", (512, 14, 14), 15_397_123),
    ("vgg16.tv_in1k:block5", (512, 7, 7), 15_413_603),
    ("vit_base_patch16_224.augreg2_in21k_ft_in1k:block0", (768, 14, 14), 34_621_827),
]


class TestAttention(DecoderContract):
    name = "attention"


class TestTransposed(DecoderContract):
    name = "transposed"


class TestWavelet(DecoderContract):
    name = "wavelet"


class TestFrequency(DecoderContract):
    name = "frequency"


class TestResidual(DecoderContract):
    name = "residual"


def test_every_decoder_has_its_contract():
    assert {cls.name for cls in DecoderContract.__subclasses__() if "/" not in cls.name} == set(DECODERS)


@pytest.mark.parametrize(("source", "shape", "parameters"), PUBLISHED)
def test_attention_has_the_published_number_of_parameters(source, shape, parameters):
    with torch.device("meta"):
        assert count(create_decoder("attention", [FeatureSpec(source, *shape)], 224)) == parameters


def test_a_size_that_cannot_be_had_is_an_error():
    with pytest.raises(AfterimageError, match="the nearest is"):
        create_decoder("attention", [spec(64, 56, 56)], 224, parameters=100)


@pytest.mark.parametrize(("source", "shape", "parameters"), PUBLISHED)
def test_the_residual_decoder_can_have_four_million_parameters_on_any_layer(source, shape, parameters):
    with torch.device("meta"):
        decoder = create_decoder("residual", [FeatureSpec(source, *shape)], 224, parameters=4_000_000)
    assert count(decoder) == pytest.approx(4_000_000, rel=0.05)


def test_a_residual_decoder_that_shrank_its_linear_part_says_so():
    decoder = create_decoder("residual", [spec(32, 4, 4)], 16, parameters=20_000)
    assert count(decoder) == pytest.approx(20_000, rel=0.05) and decoder.base.kernel == 1
    features, images = torch.randn(8, 32, 4, 4), torch.rand(8, 3, 16, 16)
    decoder.begin_fit(8, 0)
    decoder.partial_fit([features], images)
    assert any("1x1 neighbourhoods" in note for note in decoder.finalize_fit())


def test_bad_requests_are_named():
    with pytest.raises(AfterimageError, match="did you mean 'transposed'"):
        create_decoder("transpose", [spec(8, 7, 7)], 28)
    with pytest.raises(AfterimageError, match=r"'deep'.*did you mean 'depth'"):
        create_decoder("attention", [spec(8, 7, 7)], 28, deep=3)
    with pytest.raises(AfterimageError, match="fuse them first"):
        create_decoder("transposed", [spec(8, 7, 7), spec(8, 7, 7)], 28)
    with pytest.raises(AfterimageError, match=r"built for test:layer .*\(8, 7, 7\).*got \(8, 6, 7\)"):
        create_decoder("transposed", [spec(8, 7, 7)], 28)([torch.zeros(1, 8, 6, 7)])


@pytest.mark.parametrize(
    ("size", "target", "stages"),
    [(56, 224, 2), (7, 224, 5), (37, 224, 3), (224, 224, 0), (300, 224, 0), (55, 224, 2)],
)
def test_number_of_stages(size, target, stages):
    assert len(create_decoder("transposed", [spec(4, size, size)], target).stages) == stages


def test_doubling_is_a_transposed_convolution():
    torch.manual_seed(0)
    ours = UpConv2x(6, 5)
    theirs = torch.nn.ConvTranspose2d(6, 5, kernel_size=4, stride=2, padding=1)
    theirs.load_state_dict(ours.state_dict())
    maps = torch.randn(2, 6, 7, 9, requires_grad=True)
    slope = torch.randn(2, 5, 14, 18)
    torch.testing.assert_close(ours(maps), theirs(maps))
    got, expected = (
        torch.autograd.grad(module(maps), (maps, *module.parameters()), slope) for module in (ours, theirs)
    )
    for mine, other in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, other)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(maps).dtype == torch.bfloat16


def test_clamp_lets_gradients_bring_values_back():
    values = torch.tensor([-0.5, 0.5, 1.5], requires_grad=True)
    clamp(values).sub(torch.tensor([0.2, 0.2, 0.2])).square().sum().backward()
    assert values.grad[0] < 0 < values.grad[2]


def test_clamp_stops_gradients_that_lead_further_out():
    values = torch.tensor([-0.5, -0.5, 0.5, 0.5, 1.5, 1.5], requires_grad=True)
    clamp(values).backward(torch.tensor([2.0, -2.0, 2.0, -2.0, 2.0, -2.0]))
    assert values.grad.tolist() == [0.0, -2.0, 2.0, -2.0, 2.0, 0.0]


def test_a_loss_that_always_asks_for_more_ends_at_the_bound():
    """LPIPS may ask a white pixel to be whiter, and sees no difference when it is."""
    values = torch.tensor([0.2, 0.9], requires_grad=True)
    optimizer = torch.optim.Adam([values], lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        (clamp(values)[0] - clamp(values)[1]).backward()
        optimizer.step()
    assert clamp(values).tolist() == [0.0, 1.0]
    assert -1 < values[0] < 0 and 1 < values[1] < 2


def haar(images):
    """Apply one level of the orthonormal Haar transform: approximation and details."""
    a, b = images[..., ::2, ::2], images[..., ::2, 1::2]
    c, d = images[..., 1::2, ::2], images[..., 1::2, 1::2]
    details = torch.cat((a - b + c - d, a + b - c - d, a - b - c + d), dim=1)
    return (a + b + c + d) / 2, details / 2


def test_haar_is_inverted_exactly_and_keeps_energy():
    sample_images = torch.rand(2, 3, 12, 20, dtype=torch.float64)
    approximation, details = haar(sample_images)
    torch.testing.assert_close(inverse_haar(approximation, details), sample_images)
    energy = approximation.square().sum() + details.square().sum()
    torch.testing.assert_close(energy, sample_images.square().sum())


def repeated(features):
    return torch.nn.functional.pad(features, (1, 1, 1, 1), mode="replicate")


def test_residual_starts_at_the_linear_solution():
    generator = torch.Generator().manual_seed(5)
    features = torch.randn(12, 6, 5, 5, generator=generator)
    images = torch.rand(12, 3, 20, 20, generator=generator)
    linear, residual = (
        create_decoder(name, [spec(6, 5, 5)], 20, seed=0, kernel=5) for name in ("linear", "residual")
    )
    for decoder in (linear, residual):
        decoder.begin_fit(12, seed=0)
        decoder.partial_fit([features], images)
        decoder.finalize_fit()
    assert torch.equal(linear([features]), residual([features]))
    torch.testing.assert_close(residual.mean, features.mean((0, 2, 3)), atol=1e-5, rtol=1e-5)


def randomised_residual(shape, size, generator, **options):
    decoder = create_decoder("residual", [spec(*shape)], size, seed=0, **options)
    for parameter in decoder.parameters():
        torch.nn.init.uniform_(parameter, -0.1, 0.1, generator=generator)
    return decoder


@pytest.mark.parametrize("trunk", [0, 1])
def test_a_window_of_a_residual_decoder_is_that_part_of_the_image(trunk):
    generator = torch.Generator().manual_seed(5)
    decoder = randomised_residual((6, 40, 60), (80, 120), generator, blocks=1, trunk=trunk)
    features = [torch.rand(2, 6, 40, 60, generator=generator)]
    feature_crops = decoder.feature_crops(generator)
    assert [window[2:] for window in feature_crops] == [(32, 32)] * 2
    for top, left, height, width in [*feature_crops, (0, 0, 32, 32), (8, 28, 32, 32)]:
        assert 0 <= top <= 8 and 0 <= left <= 28
        window = (top, left, height, width)
        part, whole = decoder(features, window), decoder.crop_images(decoder(features), window)
        assert part.shape == (2, 3, 64, 64) and part.std() > 0.01
        # Four convolutions on 2x2 pixels a cell see no further than 8 pixels, the trunk's two locations more.
        inner = slice(8 + 4 * trunk, -8 - 4 * trunk)
        torch.testing.assert_close(part[..., inner, inner], whole[..., inner, inner], atol=1e-6, rtol=0)
        assert not torch.equal(part, whole)


def test_a_residual_decoder_decodes_with_an_average_that_weighs_late_steps_most():
    generator = torch.Generator().manual_seed(6)
    decoder = randomised_residual((6, 8, 8), (64, 64), generator, blocks=1, trunk=1)
    steps, weights = [], decoder.correction.head.weight
    for _ in range(5):
        torch.nn.init.uniform_(weights, -0.1, 0.1, generator=generator)
        decoder.after_optimizer_step()
        steps.append(weights.detach().clone())
    share = [(i**9 - (i - 1) ** 9) / 5**9 for i in range(1, 6)]
    features = [torch.rand(1, 6, 8, 8, generator=generator)]
    decoder.eval()
    with torch.no_grad():
        decoded = decoder(features)
        reloaded = create_decoder("residual", [spec(6, 8, 8)], 64, blocks=1, trunk=1)
        reloaded.load_state_dict(decoder.state_dict())
        assert torch.equal(reloaded.eval()(features), decoded)
        weights.copy_(sum(s * w for s, w in zip(share, steps, strict=True)))
        torch.testing.assert_close(decoder.train()(features), decoded)
        weights.copy_(steps[-1])
        assert (decoder(features) - decoded).abs().max() > 1e-4


@pytest.mark.parametrize(("shape", "size"), [((6, 28, 28), 56), ((6, 40, 40), 90), ((6, 5, 5), 20)])
def test_small_maps_and_blocks_that_are_not_whole_are_trained_whole(shape, size):
    decoder = create_decoder("residual", [spec(*shape)], size)
    assert decoder.feature_crops(torch.Generator()) == [None]


@pytest.mark.parametrize("block", [(2, 2), (2, 3)])
@pytest.mark.parametrize("count", [0, 2])
def test_blocks_of_pixels_and_back(block, count):
    maps = torch.rand(count, 5 * block[0] * block[1], 3, 4)
    pixels = pixel_shuffle(maps, block)
    assert pixels.shape == (count, 5, 3 * block[0], 4 * block[1])
    assert torch.equal(pixel_unshuffle(pixels, block), maps)


def test_a_size_and_a_width_are_not_both_taken():
    with pytest.raises(AfterimageError, match="channels is chosen so that AttentionDecoder has 4,000,000"):
        create_decoder("attention", [spec(64, 14, 14)], 224, parameters=4_000_000, channels=64)


def test_residual_standardises_channels_far_from_zero():
    generator = torch.Generator().manual_seed(0)
    features = 100 + 0.02 * torch.randn(8, 6, 10, 10, generator=generator)
    decoder = create_decoder("residual", [spec(6, 10, 10)], 40, blocks=1)
    decoder.begin_fit(8, seed=0)
    for chunk in features.split(3):
        decoder.partial_fit([chunk], torch.rand(len(chunk), 3, 40, 40, generator=generator))
    decoder.finalize_fit()
    deviation = features.double().std((0, 2, 3), correction=0)
    torch.testing.assert_close(decoder.scale.double().flatten(), 1 / deviation, rtol=1e-4, atol=0)


class TestLinear(DecoderContract):
    name = "linear"

    def fitted(self, features, images, *, validation=None, **options):
        decoder = create_decoder("linear", [spec(*features.shape[1:])], tuple(images.shape[-2:]), **options)
        decoder.begin_fit(len(features), seed=0)
        for chunk in torch.arange(len(features)).split(3):
            decoder.partial_fit([features[chunk]], images[chunk])
        decoder.partial_fit([validation[0]], validation[1], validation=True) if validation else None
        return decoder, decoder.finalize_fit()

    def test_asking_for_the_cost_leaves_a_fit_under_way_alone(self):
        generator = torch.Generator().manual_seed(2)
        features = torch.randn(6, 4, 40, 40, generator=generator)
        images = torch.rand(6, 3, 40, 40, generator=generator)

        def weight(asked: bool) -> torch.Tensor:
            decoder = create_decoder("linear", [spec(4, 40, 40)], 40, rows_per_input=10)
            decoder.begin_fit(2000, seed=3)  # so many that locations are sampled
            for chunk in torch.arange(6).split(3):
                decoder.partial_fit([features[chunk]], images[chunk])
                if asked:
                    assert decoder.fit_macs(10) > 0
            decoder.finalize_fit()
            return decoder.weight

        assert torch.equal(weight(True), weight(False))

    def test_recovers_a_linear_map_exactly(self):
        generator = torch.Generator().manual_seed(0)
        features = torch.randn(20, 4, 6, 5, generator=generator)
        kernel = 0.02 * torch.randn(12, 4, 3, 3, generator=generator)
        blocks = torch.nn.functional.conv2d(repeated(features), kernel) + 0.5
        images = torch.nn.functional.pixel_shuffle(blocks, 2)
        assert images.min() > 0 and images.max() < 1
        decoder, _ = self.fitted(features, images, validation=(features, images))
        torch.testing.assert_close(decoder([features]), images, atol=1e-5, rtol=1e-4)

    def test_equals_least_squares_by_another_road(self):
        generator = torch.Generator().manual_seed(1)
        features = (
            torch.randn(30, 3, 4, 4, generator=generator) * torch.tensor([1.0, 50.0, 0.01])[:, None, None]
        )
        images = torch.rand(30, 3, 8, 8, generator=generator)
        decoder, _ = self.fitted(features, images, validation=(features, images))
        unfolded = torch.nn.functional.unfold(repeated(features), 3).transpose(1, 2).reshape(-1, 27).numpy()
        targets = torch.nn.functional.pixel_unshuffle(images, 2).permute(0, 2, 3, 1).reshape(-1, 12).numpy()
        inputs = np.hstack([unfolded, np.ones((len(unfolded), 1))]).astype(np.float64)
        solution, *_ = np.linalg.lstsq(inputs, targets.astype(np.float64), rcond=None)
        expected = (inputs @ solution).clip(0, 1)
        ours = torch.nn.functional.pixel_unshuffle(decoder([features]), 2).permute(0, 2, 3, 1).reshape(-1, 12)
        np.testing.assert_allclose(ours.numpy(), expected, atol=2e-5)

    @pytest.mark.parametrize(
        ("sample_images", "noise", "expected"),
        [(60, 0.003, 1e-8), (60, 0.3, 1e-3), (20, 0.5, 1e-1), (3, 30, 1e-1)],
    )
    def test_the_ridge_is_the_best_on_validation_images(self, sample_images, noise, expected):
        """Against ridge regression by numpy's `finalize_fit`, with every ridge."""
        generator = torch.Generator().manual_seed(2)
        count = sample_images + 40
        features = torch.randn(count, 8, 3, 3, generator=generator)
        images = features.mean(1, keepdim=True).expand(-1, 3, -1, -1) / 10 + 0.5
        images = (images + noise * torch.rand(count, 3, 3, 3, generator=generator) / 8).clamp(0, 1)
        held_out = features[sample_images:], images[sample_images:]
        decoder, notes = self.fitted(features[:sample_images], images[:sample_images], validation=held_out)
        unfolded = torch.nn.functional.unfold(repeated(features), 3).double().numpy()
        rows, targets = unfolded.transpose(0, 2, 1), images.flatten(2).transpose(1, 2).double().numpy()
        inputs, outputs = rows[:sample_images].reshape(-1, 72), targets[:sample_images].reshape(-1, 3)
        mean, colour = inputs.mean(0), outputs.mean(0)
        centred, moments = inputs - mean, (inputs - mean).T @ (inputs - mean)
        first = rows[:3].reshape(-1, 72).mean(0)  # of the first batch: what the decoder shifts by
        scale, errors = ((inputs - first) ** 2).sum(0), {}
        for ridge in RIDGES:
            solution = np.linalg.solve(moments + np.diag(ridge * scale), centred.T @ (outputs - colour))
            errors[ridge] = np.mean(
                ((rows[sample_images:] - mean) @ solution + colour - targets[sample_images:]) ** 2
            )
        best = min(errors, key=errors.__getitem__)
        assert best == expected
        assert f"ridge {best:g}, chosen on the validation images" in notes
        with torch.no_grad():
            blocks = decoder.blocks(repeated(held_out[0]))
        error = (blocks - held_out[1]).double().square().mean()
        assert float(error) == pytest.approx(errors[best], rel=1e-3)

    def test_sampling_locations_is_said_and_hardly_matters(self):
        generator = torch.Generator().manual_seed(3)
        features = torch.randn(12, 2, 100, 100, generator=generator)
        images = (features.mean(1, keepdim=True) / 10 + 0.5).clamp(0, 1).expand(-1, 3, -1, -1)
        whole, notes = self.fitted(features, images, rows_per_input=10**6)
        assert not any("random" in note for note in notes)
        sampled, notes = self.fitted(features, images, rows_per_input=1)
        assert any("100,008 locations, a random 83%" in note for note in notes)
        torch.testing.assert_close(whole([features]), sampled([features]), atol=1e-4, rtol=1e-4)

    def test_features_without_information_give_the_mean(self):
        images = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(4))
        decoder, _ = self.fitted(torch.zeros(6, 3, 4, 4), images)
        blocks = images.unflatten(2, (4, 2)).unflatten(4, (4, 2)).mean((0, 2, 4))
        torch.testing.assert_close(
            decoder([torch.zeros(1, 3, 4, 4)])[0, :, :2, :2], blocks, atol=1e-5, rtol=1e-5
        )


MEMORY = """
import resource, torch
torch.set_num_threads(1)
from afterimage.config import FeatureSpec
from afterimage.models.decoders import create_decoder
decoder = create_decoder("attention", [FeatureSpec("vgg16:block1", 64, 80, 80)], 160, seed=0, depth=1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
decoder([torch.randn(1, 64, 80, 80)]).mean().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_attention_never_holds_the_matrix_of_all_pairs():
    output = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True).stdout
    one_head_in_float32 = 4 * (80 * 80) ** 2
    assert int(output) < one_head_in_float32
