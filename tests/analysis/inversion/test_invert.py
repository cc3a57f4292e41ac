import numpy as np
import pytest
import torch

from afterimage.analysis.inversion.batched_lbfgs import LBFGS
from afterimage.analysis.inversion.decoder_errors import WHITENING_FLOOR, DecoderErrors
from afterimage.analysis.inversion.invert import invert, search
from afterimage.analysis.inversion.objective import Objective, alpha_norm, feature_distance, total_variation
from afterimage.analysis.inversion.parametrisations import (
    PARAMETRISATIONS,
    Fourier,
    natural_spectrum,
    radii,
)
from afterimage.config import AfterimageError
from afterimage.config.inversion import InvertConfig

SIZE = (6, 6)
VALUES = 3 * 6 * 6


def sample_images(count: int, seed: int = 0, size: tuple[int, int] = SIZE) -> torch.Tensor:
    return 0.2 + 0.6 * torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(seed))


def linear(outputs: int, seed: int = 1):
    """A linear encoder as a matrix and as a function to feature maps; singular values from 0.5 to 1.5."""
    generator = torch.Generator().manual_seed(seed)
    left, _ = torch.linalg.qr(torch.randn(VALUES, VALUES, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(VALUES, VALUES, generator=generator, dtype=torch.float64))
    scales = torch.linspace(0.5, 1.5, VALUES, dtype=torch.float64)[
        torch.randperm(VALUES, generator=generator)
    ]
    matrix = ((left * scales) @ right)[:outputs].float()
    return matrix, lambda images: [(images.flatten(1) @ matrix.T).view(len(images), outputs, 1, 1)]


@pytest.mark.parametrize(
    ("method", "optimizer"), [("pixels", "lbfgs"), ("pixels", "adam"), ("fourier", "lbfgs")]
)
def test_an_invertible_linear_encoder_is_inverted_exactly(method, optimizer):
    originals, (_, features_of) = sample_images(3), linear(VALUES)
    config = InvertConfig(method, optimizer, steps=400)
    result = invert(features_of, features_of(originals), SIZE, method=config)
    tolerance = (
        2e-2 if optimizer == "adam" else 1e-3
    )  # the least likely colours of high frequencies come last
    torch.testing.assert_close(result.images, originals, atol=tolerance, rtol=0)
    assert result.images.shape == originals.shape and result.loss.shape == (3,)
    assert (result.loss < 1e-6).all()


def test_what_a_linear_encoder_does_not_see_stays_at_the_start():
    matrix, features_of = linear(40)
    originals, start = sample_images(2), 0.4 + 0.2 * sample_images(2, seed=5)
    originals = start + (originals - 0.5) / 4
    result = invert(
        features_of, features_of(originals), SIZE, start=start, method=InvertConfig("pixels", steps=120)
    )
    gap = (originals - start).flatten(1)
    expected = start.flatten(1) + gap @ (torch.linalg.pinv(matrix) @ matrix).T
    inside = (expected > 0).all() and (expected < 1).all()
    assert inside, "the test's own images must not touch the clamp"
    torch.testing.assert_close(result.images.flatten(1), expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("natural", [True, False])
def test_fourier_moves_the_unseen_as_a_gaussian_posterior_does(natural):
    """Against x0 + S A' (A S A')^-1 A (x - x0), S the covariance of the corrections."""
    matrix, features_of = linear(30)
    originals, start = sample_images(1), sample_images(1, seed=5)
    rings = int(radii(SIZE).max()) + 1
    generator = torch.Generator().manual_seed(3)
    spectrum = (
        natural_spectrum(SIZE) if natural else torch.rand(rings, 3, 3, generator=generator) + torch.eye(3)
    )
    mix = torch.randn(30, 30, generator=generator) / 30**0.5 + torch.eye(30)
    form = Fourier(start, 0, spectrum)
    initial = form.initial
    map_ = torch.autograd.functional.jacobian(
        lambda p: form.correction(p.view_as(initial)).flatten(), initial.flatten()
    )
    covariance = (map_ @ map_.T).double()
    a = matrix.double()
    gain = covariance @ a.T @ torch.linalg.inv(a @ covariance @ a.T)
    expected = start.flatten().double() + gain @ a @ (originals - start).flatten().double()
    config = InvertConfig("fourier", steps=250)
    result = invert(
        features_of,
        features_of(originals),
        SIZE,
        start=start,
        method=config,
        errors=None if natural else DecoderErrors(spectrum, (mix,)),
    )
    torch.testing.assert_close(result.images.flatten().double(), expected.clamp(0, 1), atol=2e-3, rtol=0)
    assert not torch.allclose(expected.clamp(0, 1), originals.flatten().double(), atol=0.05)


def test_regularisers_against_numpy():
    images = sample_images(2, size=(5, 7))
    for image, norm, variation in zip(
        images.numpy(), alpha_norm(images, 6.0), total_variation(images, 1.5), strict=True
    ):
        expected = sum(abs((v - 0.5) / 0.5) ** 6 for v in image.flatten()) / 35
        assert float(norm) == pytest.approx(expected, rel=1e-5)
        total = 0.0
        for channel in image.astype(float):
            for y in range(5):
                for x in range(7):
                    down = channel[y + 1, x] - channel[y, x] if y < 4 else 0.0
                    right = channel[y, x + 1] - channel[y, x] if x < 6 else 0.0
                    total += (down**2 + right**2) ** 0.75
        assert float(variation) == pytest.approx(total / (35 * 0.005**1.5), rel=1e-4)


def test_a_flat_image_has_no_variation_and_grey_no_norm():
    flat = torch.full((1, 3, 4, 4), 0.5)
    assert float(total_variation(flat)) == float(alpha_norm(flat)) == 0


def test_feature_distance_is_relative_and_a_mean_over_layers():
    targets = [torch.ones(2, 3, 2, 2), 5 * torch.ones(2, 1, 4, 4)]
    features = [2 * targets[0], targets[1]]
    assert feature_distance(features, targets).tolist() == [0.5, 0.5]
    scaled = [[10 * t for t in part] for part in (features, targets)]
    torch.testing.assert_close(feature_distance(*scaled), feature_distance(features, targets))


def test_the_objectives_gradient_against_finite_differences():
    weight = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def features_of(images):
        maps = torch.tanh(torch.nn.functional.conv2d(images, weight, stride=2))
        return [maps, maps.mean((2, 3), keepdim=True)]

    originals = sample_images(2).double()
    config = InvertConfig(tv=0.01, alpha_norm=0.1, beta=1.5)
    objective = Objective(features_of, features_of(originals), config)
    at = sample_images(2, seed=9).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda images: objective(images)[0], at)
    with_shift = objective(at, (1, -1))[0]
    assert not torch.allclose(with_shift, objective(at)[0])


def nonlinear(images):
    weight = torch.randn(5, 3, 3, 3, generator=torch.Generator().manual_seed(2))
    return [torch.relu(torch.nn.functional.conv2d(images, weight, padding=1))]


@pytest.mark.parametrize("method", PARAMETRISATIONS)
@pytest.mark.parametrize("optimizer", ["lbfgs", "adam"])
def test_a_image_does_not_depend_on_its_batch(method, optimizer):
    size = (12, 12)
    originals = sample_images(3, size=size)
    config = InvertConfig(method, optimizer, steps=12, starts=2)
    together = invert(nonlinear, nonlinear(originals), size, method=config, seed=4)
    begun = invert(
        nonlinear, nonlinear(originals), size, method=InvertConfig(method, optimizer, steps=1, starts=2)
    )
    assert (together.loss < begun.loss).all()
    for i in range(3):
        alone = invert(nonlinear, nonlinear(originals[i : i + 1]), size, method=config, seed=4)
        # A batch of another size sums in another order.
        torch.testing.assert_close(alone.images[0], together.images[i], atol=2e-3, rtol=0)
        assert float(alone.loss[0]) == pytest.approx(float(together.loss[i]), rel=0.02)


def test_the_seed_decides():
    originals, config = sample_images(1, size=(12, 12)), InvertConfig("pixels", "adam", steps=5, jitter=2)
    first, again, other = (
        invert(nonlinear, nonlinear(originals), (12, 12), method=config, seed=seed).images
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_of_several_starts_the_nearest_is_kept():
    """A fold: of two starts only the one on the right side reaches the target."""
    originals = sample_images(1)
    one, many = (
        invert(nonlinear, nonlinear(originals), SIZE, method=InvertConfig(steps=15, starts=k), seed=0)
        for k in (1, 4)
    )
    assert float(many.loss) <= float(one.loss)
    start = sample_images(1, seed=8)
    untouched = invert(
        nonlinear,
        nonlinear(start),
        SIZE,
        start=start,
        method=InvertConfig("pixels", "adam", steps=1, starts=3),
    )
    torch.testing.assert_close(
        untouched.images, start
    )  # the first start is taken without noise, and is perfect


def test_the_best_image_is_kept_and_watched():
    originals = sample_images(2)
    config = InvertConfig("pixels", "adam", steps=30, learning_rate=0.1)  # overshoots
    looks = list(search(nonlinear, nonlinear(originals), SIZE, method=config, milestones=(1, 10)))
    result = invert(nonlinear, nonlinear(originals), SIZE, method=config)
    assert [look.step for look in looks] == [0, 1, 10, 30]
    assert (looks[-1].loss < looks[0].loss).all()
    assert torch.equal(looks[-1].loss, result.loss) and torch.equal(looks[-1].images, result.images)
    assert (looks[0].images - 0.5).abs().max() < 0.1


@pytest.mark.parametrize(
    "config",
    [
        InvertConfig("pixels", "adam", steps=9, learning_rate=0.5),
        InvertConfig("pixels", "adam", steps=9, jitter=3, starts=2),
        InvertConfig(steps=9, starts=3),
    ],
    ids=["beyond [0, 1]", "shifted", "of several starts"],
)
def test_the_distance_told_is_that_of_the_very_images(config):
    """The search itself measures images before they are clamped, and shifted ones under jitter."""
    targets = nonlinear((sample_images(3) * 3 - 1).clamp(0, 1))
    for found in search(nonlinear, targets, SIZE, method=config, milestones=(3,), seed=5):
        torch.testing.assert_close(found.loss, feature_distance(nonlinear(found.images), targets))


@pytest.mark.parametrize("optimizer", ["lbfgs", "adam"])
def test_the_last_pass_has_no_way_back(optimizer):
    passed = []

    def features_of(images):
        if images.requires_grad:
            passed.append(images)
            images.register_hook(lambda _: passed.pop())
        return nonlinear(images)

    invert(features_of, nonlinear(sample_images(1)), SIZE, method=InvertConfig("pixels", optimizer, steps=3))
    assert len(passed) == 1


def test_lbfgs_finds_rosenbrocks_minimum():
    def rosenbrock(x):
        return (100 * (x[1::2] - x[::2] ** 2) ** 2 + (1 - x[::2]) ** 2).sum()

    search = LBFGS(torch.tensor([-1.2, 1.0, -1.2, 1.0], dtype=torch.float64), first=0.05)
    for _ in range(120):
        at = search.trial.clone().requires_grad_()
        loss = rosenbrock(at)
        (gradient,) = torch.autograd.grad(loss, at)
        search.update(float(loss.detach()), gradient)
    np.testing.assert_allclose(search.point.numpy(), 1, atol=1e-5)


def test_lbfgs_steps_back_from_what_is_not_a_number():
    search = LBFGS(torch.tensor([1.0]), first=4.0)
    for _ in range(60):
        at = search.trial
        loss = float("nan") if float(at) < 0 else float((at.sqrt() - 0.5) ** 2)
        search.update(loss, (1 - 0.5 / at.clamp_min(1e-9).sqrt()))
    assert float(search.point) == pytest.approx(0.25, abs=1e-3)


def test_a_decoders_errors_are_the_roots_of_their_covariances():
    generator = torch.Generator().manual_seed(0)
    mix = torch.tensor([[0.2, 0.0, 0.0], [0.1, 0.1, 0.0], [0.0, 0.05, 0.02]])
    channels = torch.diag(torch.tensor([8.0, 1.0, 0.5])) + 0.1
    white = torch.randn(200, 3, 16, 16, generator=generator)
    pixels = torch.einsum("ij,bjhw->bihw", mix, white)
    maps = torch.einsum("ij,bjhw->bihw", channels, torch.randn(200, 3, 16, 16, generator=generator))
    batches = [(a, [b]) for a, b in zip(pixels.split(64), maps.split(64), strict=True)]
    errors = DecoderErrors.estimate(batches)
    assert errors.spectrum.shape == (int(radii((16, 16)).max()) + 1, 3, 3)
    for root in errors.spectrum[1:]:
        torch.testing.assert_close(root @ root, mix @ mix.T, atol=3e-3, rtol=0)
    covariance = channels @ channels.T
    floor = WHITENING_FLOOR * covariance.trace() / 3 * torch.eye(3)
    (whitening,) = errors.whitening
    torch.testing.assert_close(whitening @ (covariance + floor) @ whitening, torch.eye(3), atol=0.02, rtol=0)
    with pytest.raises(AfterimageError, match="no images to learn"):
        DecoderErrors.estimate([])


def test_bfloat16_serves_until_its_rounding_would_tell_and_each_image_for_itself():
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(3, 12, 4, 4)
    used = []

    def features_of(images):
        used.append((torch.is_autocast_enabled("cpu"), len(images)))
        return [layer(images)]

    with torch.no_grad():
        originals = sample_images(2)
        targets = [layer(originals)]
        start = torch.stack([sample_images(1, seed=5)[0], (originals[1] + 1e-3).clamp(0, 1)])
    exact = invert(features_of, targets, SIZE, start=start, method=InvertConfig(steps=80))
    assert not any(bfloat16 for bfloat16, _ in used)
    used.clear()
    mixed = invert(
        features_of, targets, SIZE, start=start, method=InvertConfig(steps=80, precision="bf16-mixed")
    )
    # The second image starts nearer to its features than bfloat16 can tell.
    assert (True, 1) in used and (False, 1) in used and used[-1] == (False, 2)
    # Clamping costs the first image most of its loss, in both.
    torch.testing.assert_close(mixed.loss, exact.loss, atol=2e-5, rtol=0.05)
    torch.testing.assert_close(mixed.images, exact.images, atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "waves"}, "unknown inversion method 'waves'.*pixels, fourier, prior"),
        ({"optimizer": "sgd"}, "unknown optimizer 'sgd'.*adam, lbfgs"),
        ({"steps": 0}, "steps must be greater than 0"),
        ({"starts": 0}, "starts must be greater than 0"),
        ({"tv": -1.0}, "tv must be 0 or more"),
        ({"learning_rate": float("nan")}, "learning_rate must be greater than 0"),
        ({"jitter": 2, "optimizer": "lbfgs"}, "jitter changes the objective"),
    ],
)
def test_settings_that_make_no_sense_are_errors(settings, message):
    with pytest.raises(AfterimageError, match=message):
        InvertConfig(**settings)


def test_targets_that_do_not_fit_are_errors():
    originals = sample_images(2)
    targets = nonlinear(originals)
    quick = {"method": InvertConfig(steps=1)}
    with pytest.raises(AfterimageError, match="the targets have shapes"):
        invert(nonlinear, [targets[0][:, :2]], SIZE, **quick)
    with pytest.raises(AfterimageError, match="target 1 holds values that are not finite"):
        invert(nonlinear, [targets[0] * float("nan")], SIZE, **quick)
    with pytest.raises(AfterimageError, match="features of the start are not finite"):
        invert(lambda images: [images * float("inf")], [originals], SIZE, **quick)
