import pytest
import torch
import torch.nn.functional as F
from jaxtyping import TypeCheckError

from afterimage.config import AfterimageError
from afterimage.evaluation.metrics import psnr
from afterimage.models.lpips import LPIPS
from afterimage.training.losses import L1, LOSSES, MSE, create_loss, parse_loss

SQUEEZE = "squeezenet1_1.torchvision.safetensors"


@pytest.fixture
def images() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(3, 3, 40, 40, generator=generator), torch.rand(3, 3, 40, 40, generator=generator)


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("mse", {"mse": 1}),
        ("0.5*mse+0.5*lpips", {"mse": 0.5, "lpips": 0.5}),
        (" 0.5 * mse + 2*l1 + lpips ", {"mse": 0.5, "l1": 2, "lpips": 1}),
        ("1e-1*mse+1e+1*l1", {"mse": 0.1, "l1": 10}),
        ("mse+1*l1", {"mse": 1, "l1": 1}),
    ],
)
def test_parse(text, terms):
    assert parse_loss(text) == terms


@pytest.mark.parametrize(
    "text", ["", "+", "mse+", "mse++l1", "*mse", "mse*0.5", "0.5*mse*l1", "2", "x*mse", "mse-l1"]
)
def test_what_cannot_be_read_is_an_error_that_lists_the_losses(text):
    with pytest.raises(AfterimageError, match="mse, l1, lpips"):
        parse_loss(text)


def test_unknown_loss_suggests_a_near_one():
    with pytest.raises(AfterimageError, match="'lpip'; did you mean 'lpips'"):
        create_loss("mse + lpip")


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf"])
def test_weights_are_positive_numbers(weight):
    with pytest.raises(AfterimageError, match=f"the weight of mse must be greater than 0, got {weight}"):
        parse_loss(f"{weight}*mse")


def test_a_loss_named_twice_is_an_error():
    with pytest.raises(AfterimageError, match="names mse twice"):
        parse_loss("mse+0.5*mse")


@pytest.mark.parametrize(("text", "torch_loss"), [("mse", F.mse_loss), ("l1", F.l1_loss)])
def test_pixel_losses_agree_with_torch(text, torch_loss, images):
    loss = create_loss(text)
    value = loss(*images)
    assert value.shape == () and value.dtype == torch.float32
    torch.testing.assert_close(value, torch_loss(*images))
    per_image = loss.per_image(*images)
    expected = torch.stack([torch_loss(p, t) for p, t in zip(*images, strict=True)])
    torch.testing.assert_close(per_image, expected)


def test_mse_is_what_psnr_counts(images):
    torch.testing.assert_close(-10 * MSE().per_image(*images).log10(), psnr(*images))


def test_a_weighted_sum_is_the_sum_of_its_weighted_losses(images):
    loss = create_loss("0.25*mse + 3*l1")
    expected = 0.25 * MSE().per_image(*images) + 3 * L1().per_image(*images)
    torch.testing.assert_close(loss.per_image(*images), expected)
    torch.testing.assert_close(loss(*images), expected.mean())
    torch.testing.assert_close(create_loss("2*mse")(*images), 2 * MSE()(*images))


@pytest.mark.parametrize("text", ["mse", "l1", "0.5*mse+0.5*l1"])
def test_losses_stay_in_float32_in_mixed_precision(text, images):
    prediction, target = images
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = create_loss(text)(prediction.bfloat16(), target)
    assert value.dtype == torch.float32
    torch.testing.assert_close(
        value, create_loss(text)(prediction.bfloat16().float(), target), rtol=0, atol=0
    )


@pytest.mark.parametrize("loss", [MSE(), L1()])
def test_shapes_that_would_broadcast_are_refused(loss, images):
    prediction, target = images
    with pytest.raises((AfterimageError, TypeCheckError)):
        loss(prediction, target[:1])


def test_lpips_loss_is_lpips_and_gives_gradients_to_the_prediction_alone(weights_folder, images, monkeypatch):
    monkeypatch.setenv("AFTERIMAGE_WEIGHTS", str(weights_folder))
    prediction, target = (image.requires_grad_() for image in images)
    loss = create_loss("0.5*mse+0.5*lpips:squeeze")
    value = loss(prediction, target)
    lpips = LPIPS("squeeze", weights_folder / SQUEEZE)(prediction, target)
    torch.testing.assert_close(value, 0.5 * F.mse_loss(prediction, target) + 0.5 * lpips.mean())
    only = create_loss("lpips:squeeze")
    torch.testing.assert_close(only.per_image(prediction, target), lpips)
    only(prediction, target).backward()
    assert prediction.grad.isfinite().all() and prediction.grad.abs().sum() > 0
    assert target.grad is None
    assert not any(parameter.requires_grad for parameter in loss.parameters())


def test_a_step_against_the_gradient_makes_lpips_smaller(weights_folder, images, monkeypatch):
    monkeypatch.setenv("AFTERIMAGE_WEIGHTS", str(weights_folder))
    prediction, target = images[0].requires_grad_(), images[1]
    loss = create_loss("lpips:squeeze")
    before = loss(prediction, target)
    before.backward()
    step = 0.01 * prediction.grad / prediction.grad.abs().amax()
    assert loss(prediction.detach() - step, target) < before


def test_lpips_without_weights_is_an_error(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setenv("AFTERIMAGE_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(AfterimageError, match=r"lpips:alex .lpips:vgg or lpips:squeeze are others.*alexnet"):
        create_loss("0.5*mse+0.5*lpips")


def test_every_loss_says_which_paper_it_is_from():
    for loss in LOSSES.values():
        assert "20" in loss.__doc__.partition("\n")[0]
