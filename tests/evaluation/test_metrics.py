import json
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from afterimage.config import LPIPS_MIN_SIDE, LPIPS_NETS, AfterimageError
from afterimage.evaluation.metrics import PSNR_CAP, Metrics, check_pair, psnr, ssim
from afterimage.models.lpips import BACKBONES, LPIPS


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def smooth(batch: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Images with structure: flat and textured places, values that reach both ends of [0, 1]."""
    small = noise(batch, 3, 6, 6, seed=seed) * 1.6 - 0.3
    return F.interpolate(small, (height, width), mode="bicubic").clamp(0, 1)


def damaged(images: torch.Tensor, amount: float, seed: int = 1) -> torch.Tensor:
    return (images + amount * (noise(*images.shape, seed=seed) - 0.5)).clamp(0, 1)


def pair(seed: int, amount: float, size: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    target = smooth(3, size, size + 5, seed=seed)
    return damaged(target, amount, seed=seed + 1), target


def as_array(image: torch.Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).double().numpy()


def skimage_ssim(prediction: torch.Tensor, target: torch.Tensor) -> float:
    return structural_similarity(
        as_array(prediction),
        as_array(target),
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=1,
        channel_axis=2,
    )


PAIRS = {
    "slightly noisy": lambda: (damaged(smooth(3, 64, 48), 0.02), smooth(3, 64, 48)),
    "very noisy": lambda: (damaged(smooth(3, 33, 57), 1.0), smooth(3, 33, 57)),
    "unrelated": lambda: (noise(2, 3, 40, 40), noise(2, 3, 40, 40, seed=1)),
    "inverted": lambda: (1 - smooth(2, 40, 40), smooth(2, 40, 40)),
    "white and nearly white": lambda: (damaged(torch.ones(2, 3, 32, 32), 1e-3), torch.ones(2, 3, 32, 32)),
    "black and grey": lambda: (torch.zeros(2, 3, 32, 32), torch.full((2, 3, 32, 32), 0.5)),
    "smallest": lambda: (noise(2, 3, 11, 11), noise(2, 3, 11, 11, seed=1)),
    "half black, half white": lambda: (
        damaged(torch.cat([torch.zeros(2, 3, 32, 32), torch.ones(2, 3, 32, 32)], 3), 1e-2),
        torch.cat([torch.zeros(2, 3, 32, 32), torch.ones(2, 3, 32, 32)], 3),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_psnr_and_ssim_agree_with_skimage(name):
    prediction, target = PAIRS[name]()
    expected = [
        peak_signal_noise_ratio(as_array(t), as_array(p), data_range=1)
        for p, t in zip(prediction, target, strict=True)
    ]
    np.testing.assert_allclose(psnr(prediction, target).numpy(), expected, atol=1e-4, rtol=0)
    expected = [skimage_ssim(p, t) for p, t in zip(prediction, target, strict=True)]
    np.testing.assert_allclose(ssim(prediction, target).numpy(), expected, atol=1e-6, rtol=0)


def test_known_values():
    grey, darker = torch.full((1, 3, 16, 16), 0.6), torch.full((1, 3, 16, 16), 0.5)
    assert psnr(grey, darker).item() == pytest.approx(20, abs=1e-4)
    assert ssim(grey, darker).item() == pytest.approx((2 * 0.3 + 1e-4) / (0.61 + 1e-4), abs=1e-6)


def test_identical_images_are_finite_and_pass_through_json():
    images = smooth(2, 20, 20)
    scores = {"psnr": psnr(images, images).tolist(), "ssim": ssim(images, images).tolist()}
    assert json.loads(json.dumps(scores, allow_nan=False)) == {"psnr": [PSNR_CAP] * 2, "ssim": [1.0] * 2}


def test_metrics_have_gradients():
    prediction, target = pair(0, 0.3)
    prediction.requires_grad_()
    (psnr(prediction, target) + ssim(prediction, target)).sum().backward()
    assert prediction.grad.isfinite().all() and prediction.grad.abs().sum() > 0


seeds, amounts = st.integers(0, 10_000), st.floats(1e-3, 2.0)


@given(seeds, amounts)
@settings(max_examples=25, deadline=None)
def test_symmetric_and_bounded(seed, amount):
    prediction, target = pair(seed, amount)
    for metric, low, high in ((psnr, 0, PSNR_CAP), (ssim, -1, 1)):
        values = metric(prediction, target)
        torch.testing.assert_close(values, metric(target, prediction), rtol=0, atol=2e-6 * high)
        assert values.shape == (3,)
        assert (values >= low).all() and (values < high).all()


@given(seeds, amounts, st.permutations(range(3)))
@settings(max_examples=25, deadline=None)
def test_a_image_scores_the_same_in_any_company(seed, amount, order):
    prediction, target = pair(seed, amount)
    for metric in (psnr, ssim):
        values = metric(prediction, target)
        torch.testing.assert_close(
            metric(prediction[order], target[order]), values[order], rtol=1e-6, atol=1e-6
        )
        alone = torch.cat([metric(p[None], t[None]) for p, t in zip(prediction, target, strict=True)])
        torch.testing.assert_close(alone, values, rtol=1e-6, atol=1e-6)


@given(seeds, amounts, st.sampled_from([(-1,), (-2,), (-2, -1)]))
@settings(max_examples=15, deadline=None)
def test_flipping_both_images_changes_nothing(seed, amount, axes):
    prediction, target = pair(seed, amount)
    for metric in (psnr, ssim):
        flipped = metric(prediction.flip(axes), target.flip(axes))
        torch.testing.assert_close(flipped, metric(prediction, target), rtol=1e-5, atol=1e-5)


@given(seeds)
@settings(max_examples=15, deadline=None)
def test_more_noise_scores_lower(seed):
    target = smooth(1, 24, 24, seed=seed)
    levels = [damaged(target, amount, seed=seed + 1) for amount in (0.02, 0.1, 0.5)]
    for metric in (psnr, ssim):
        values = [metric(level, target).item() for level in levels]
        assert values == sorted(values, reverse=True)


GOOD = torch.full((2, 3, 16, 16), 0.5)


def with_value(value: float) -> torch.Tensor:
    images = GOOD.clone()
    images[1, 2, 3, 4] = value
    return images


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("metric", [psnr, ssim])
def test_not_finite_raises(metric, value):
    with pytest.raises(
        AfterimageError, match="prediction: image 1 of the batch holds values that are not finite"
    ):
        metric(with_value(value), GOOD)
    with pytest.raises(AfterimageError, match="target: image 1"):
        metric(GOOD, with_value(value))


@pytest.mark.parametrize("value", [-1e-5, 1 + 1e-5, 255.0, -2.1])
@pytest.mark.parametrize("metric", [psnr, ssim])
def test_outside_the_range_raises(metric, value):
    with pytest.raises(AfterimageError, match=r"image 1 .* images lie in \[0, 1\]"):
        metric(with_value(value), GOOD)


def test_rounding_outside_the_range_is_accepted():
    assert psnr(with_value(1 + 1e-7), with_value(-1e-7)).isfinite().all()


@pytest.mark.parametrize(
    ("prediction", "target", "message"),
    [
        (GOOD, GOOD[:1], "differ in shape"),
        (GOOD, GOOD[..., :15], "differ in shape"),
        (GOOD[0], GOOD[0], r"shape \(B, 3, H, W\)"),
        (GOOD[:, :1], GOOD[:, :1], r"shape \(B, 3, H, W\)"),
        (GOOD[:0], GOOD[:0], r"shape \(B, 3, H, W\)"),
        ((GOOD * 255).byte(), GOOD, "floats"),
    ],
)
def test_wrong_shapes_and_types_raise(prediction, target, message):
    with pytest.raises(AfterimageError, match=message):
        check_pair(prediction, target)


def test_ssim_needs_eleven_pixels():
    with pytest.raises(AfterimageError, match="11x11 or more, got 10x30"):
        ssim(noise(1, 3, 10, 30), noise(1, 3, 10, 30))


@pytest.fixture(scope="module", params=LPIPS_NETS)
def lpips_pair(request, tmp_path_factory):
    """Ours, from a file of features alone, and the reference `lpips` package on the same random backbone."""
    import lpips

    net = request.param
    tensors = random_features(net)
    path = tmp_path_factory.mktemp("backbone") / f"{net}.safetensors"
    save_file(tensors, path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    copy_backbone(reference, tensors)
    return LPIPS(net, path), reference


def copy_backbone(reference: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    # The reference's slices keep torchvision's numbers: slice2.3.weight is features.3.weight.
    with torch.no_grad():
        for name, parameter in reference.net.named_parameters():
            parameter.copy_(tensors[f"features.{name.partition('.')[2]}"])


def random_features(net: str) -> dict[str, torch.Tensor]:
    """What a file of torchvision's weights may hold at least, with random values of a sensible size."""
    import torchvision

    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        network = getattr(torchvision.models, BACKBONES[net][0])(weights=None)
    tensors = {}
    for name, tensor in network.features.state_dict().items():
        inputs = tensor[0].numel() if tensor.ndim > 1 else 100
        tensors[f"features.{name}"] = torch.randn(tensor.shape, generator=generator) * (2 / inputs) ** 0.5
    return tensors


def test_lpips_agrees_with_the_reference(lpips_pair):
    ours, reference = lpips_pair
    target = smooth(2, 48, 56)
    for prediction in (damaged(target, 0.1), damaged(target, 1.0), 1 - target):
        with torch.no_grad():
            expected = reference(prediction, target, normalize=True).flatten()
            values = ours(prediction, target)
        assert values.shape == (2,)
        torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-6)


def test_lpips_is_a_symmetric_distance_per_image(lpips_pair):
    ours, _ = lpips_pair
    target = smooth(3, 40, 40)
    prediction = damaged(target, 0.5)
    with torch.no_grad():
        values = ours(prediction, target)
        assert (values > 0).all()
        assert ours(target, target).tolist() == [0, 0, 0]
        torch.testing.assert_close(ours(target, prediction), values)
        torch.testing.assert_close(ours(prediction.flip(0), target.flip(0)), values.flip(0))
        torch.testing.assert_close(ours(prediction[:1], target[:1]), values[:1])


def test_lpips_takes_its_smallest_image_and_refuses_smaller(lpips_pair):
    ours, _ = lpips_pair
    size = LPIPS_MIN_SIDE[ours.net]
    assert ours(noise(1, 3, size, size), noise(1, 3, size, size, seed=1)).isfinite().all()
    with pytest.raises(AfterimageError, match=f"{size}x{size} or more, got {size - 1}x{size}"):
        ours(noise(1, 3, size - 1, size), noise(1, 3, size - 1, size))


def test_lpips_stays_frozen_and_in_float32(lpips_pair):
    ours, _ = lpips_pair
    ours.train()
    assert not any(part.training for part in ours.modules())
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    target = smooth(1, 40, 40)
    prediction = damaged(target, 0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = ours(prediction, target)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, ours(prediction, target), rtol=0, atol=0)


def test_lpips_gradient_is_finite_where_no_feature_is_active(lpips_pair):
    ours, _ = lpips_pair
    dead = LPIPS(ours.net, ours.weights)
    first = dead.slices[0][0]
    first.bias.fill_(-1e3)
    prediction = noise(1, 3, 40, 40).requires_grad_()
    dead(prediction, smooth(1, 40, 40)).sum().backward()
    assert prediction.grad.isfinite().all()


def test_lpips_on_real_weights(weights_folder):
    import lpips
    from safetensors.torch import load_file

    path = weights_folder / "squeezenet1_1.torchvision.safetensors"
    ours = LPIPS("squeeze", path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = lpips.LPIPS(net="squeeze", pnet_rand=True, verbose=False)
    copy_backbone(reference, load_file(path))
    target = smooth(2, 96, 96)
    prediction = damaged(target, 0.5)
    with torch.no_grad():
        expected = reference(prediction, target, normalize=True).flatten()
        torch.testing.assert_close(ours(prediction, target), expected, rtol=0, atol=1e-5)
        assert (expected > 0.05).all()


def test_lpips_names_what_a_file_lacks(tmp_path):
    tensors = random_features("squeeze")
    path = tmp_path / "squeeze.safetensors"
    save_file({k: v for k, v in tensors.items() if k != "features.12.expand3x3.bias"}, path)
    with pytest.raises(AfterimageError, match=r"squeeze.safetensors lacks features\.12\.expand3x3\.bias"):
        LPIPS("squeeze", path)
    save_file(tensors | {"features.0.weight": torch.zeros(64, 3, 5, 5)}, path)
    with pytest.raises(
        AfterimageError, match=r"features\.0\.weight .* shape \(64, 3, 5, 5\), expected \(64, 3, 3, 3\)"
    ):
        LPIPS("squeeze", path)


def test_unknown_net_is_an_error_that_lists_the_known_ones():
    for make in (LPIPS, Metrics):
        with pytest.raises(AfterimageError, match=r"'squeze'; did you mean 'squeeze'.*alex, vgg, squeeze"):
            make("squeze")


@pytest.fixture
def no_weights(monkeypatch, tmp_path):
    monkeypatch.setenv("AFTERIMAGE_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def test_without_weights_lpips_is_unavailable_and_never_a_number(no_weights):
    metrics = Metrics("alex")
    status = metrics.lpips_status
    assert (status.net, status.available, status.weights) == ("alex", False, None)
    assert "alexnet" in status.reason and str(no_weights) in status.reason
    prediction, target = pair(0, 0.3)
    scores = metrics(prediction, target)
    assert scores["lpips"] is None and len(scores["psnr"]) == 3


def test_lpips_is_unavailable_for_images_known_to_be_too_small(no_weights):
    save_file(random_features("alex"), no_weights / "alexnet.torchvision.safetensors")
    assert Metrics("alex", size=31).lpips_status.available
    small = Metrics("alex", size=30)
    assert not small.lpips_status.available and "31x31 or more, got 30x30" in small.lpips_status.reason
    assert small(*pair(0, 0.3))["lpips"] is None


def test_weights_that_are_named_or_there_must_fit(no_weights):
    with pytest.raises(AfterimageError, match="nowhere"):
        Metrics("alex", weights=no_weights / "nowhere")
    save_file({"features.0.weight": torch.zeros(1)}, no_weights / "alexnet.torchvision.safetensors")
    with pytest.raises(AfterimageError, match=r"alexnet\.torchvision\.safetensors"):
        Metrics("alex")


def test_metrics_are_the_three_functions(no_weights):
    save_file(random_features("alex"), no_weights / "alexnet.torchvision.safetensors")
    metrics = Metrics("alex")
    assert metrics.lpips_status.available and metrics.lpips_status.reason is None
    assert len(metrics.lpips_status.weights.sha256) == 64
    target = smooth(6, 40, 40)
    first, second = damaged(target, 0.2), damaged(target, 0.9)
    both = metrics.compare([first, second], target)
    for scores, prediction in zip(both, (first, second), strict=True):
        assert scores["psnr"] == pytest.approx(psnr(prediction, target).tolist(), abs=1e-5)
        assert scores["ssim"] == pytest.approx(ssim(prediction, target).tolist(), abs=1e-6)
        assert scores["lpips"] == pytest.approx(metrics.lpips(prediction, target).tolist(), abs=1e-6)
    assert metrics(second, target) == both[1]
    with pytest.raises(AfterimageError, match="prediction: image 0"):
        metrics(first * 3, target)
