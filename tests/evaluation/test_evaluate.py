import statistics

import numpy as np
import pytest
import torch
from torch import nn

from afterimage.config import AfterimageError
from afterimage.data.images import ImageSet
from afterimage.evaluation.evaluate import (
    eval_mode,
    evaluate,
    evaluate_batches,
    reconstruct_batches,
    score_notes,
    summarise,
    to_uint8,
)
from afterimage.evaluation.metrics import PSNR_CAP, Metrics, psnr, ssim
from afterimage.runs.results import Score


class FakeImages(ImageSet):
    """What `evaluate` needs of `Images`: seven random ones."""

    def __init__(self, count: int = 7, size: int = 16) -> None:
        self.ids = [f"image-{i}" for i in range(count)]
        self.images = torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def crops(self, indices, *, device="cpu"):
        return self.images[torch.as_tensor(indices)].to(device)


@pytest.fixture
def sample_images() -> FakeImages:
    return FakeImages()


@pytest.fixture
def metrics(monkeypatch, tmp_path) -> Metrics:
    import huggingface_hub.constants

    monkeypatch.setenv("AFTERIMAGE_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return Metrics("alex")


def darker(images: torch.Tensor) -> torch.Tensor:
    return images * 0.9


@pytest.mark.parametrize("batch_size", [1, 3, 7, 16])
def test_one_row_a_image_whatever_the_batch(sample_images, metrics, batch_size):
    rows = evaluate(darker, sample_images, metrics, batch_size=batch_size).rows
    assert [row["id"] for row in rows] == sample_images.ids
    assert all(list(row) == ["id", "psnr", "ssim", "lpips"] and row["lpips"] is None for row in rows)
    expected = darker(sample_images.images), sample_images.images
    assert [row["psnr"] for row in rows] == pytest.approx(psnr(*expected).tolist(), abs=1e-5)
    assert [row["ssim"] for row in rows] == pytest.approx(ssim(*expected).tolist(), abs=1e-6)


def test_lpips_of_real_weights_is_in_the_rows(sample_images, weights_folder):
    sample_images = FakeImages(3, 32)
    metrics = Metrics("squeeze", weights=weights_folder)
    rows = evaluate(darker, sample_images, metrics, batch_size=2).rows
    expected = metrics.lpips(darker(sample_images.images), sample_images.images).tolist()
    assert [row["lpips"] for row in rows] == pytest.approx(expected, abs=1e-6)
    assert summarise(rows)["lpips"].mean == pytest.approx(sum(expected) / 3, abs=1e-6)


def test_together_is_each_alone_and_asks_once(sample_images, metrics):
    calls = []

    def both(images):
        calls.append(len(images))
        return [darker(images), 1 - images]

    batches = reconstruct_batches(both, sample_images, batch_size=4)
    first, second = evaluate_batches(batches, sample_images.ids, metrics)
    assert calls == [4, 3]
    assert first.rows == evaluate(darker, sample_images, metrics, batch_size=4).rows
    assert second.rows == evaluate(lambda images: 1 - images, sample_images, metrics, batch_size=4).rows


@pytest.mark.parametrize("keep", [0, 2, 5, 100])
def test_the_first_images_are_kept_as_a_png_holds_them(sample_images, metrics, keep):
    kept = evaluate(darker, sample_images, metrics, batch_size=3, keep=keep).images
    assert [name for name, _, _ in kept] == sample_images.ids[:keep]
    for index, (_, original, reconstruction) in enumerate(kept):
        assert original.shape == reconstruction.shape == (16, 16, 3)
        assert original.dtype == reconstruction.dtype == np.uint8
        image = sample_images.images[index].permute(1, 2, 0).numpy()
        np.testing.assert_allclose(original / 255, image, atol=0.5001 / 255)
        np.testing.assert_allclose(reconstruction / 255, image * 0.9, atol=0.5001 / 255)


def test_uint8_is_rounded_and_never_wraps():
    values = (
        torch.tensor([0.0, 0.4 / 255, 0.6 / 255, 1.0, 1 + 1e-7, -1e-7]).view(1, 1, 1, 6).expand(1, 3, 1, 6)
    )
    assert to_uint8(values)[0, 0, :, 0].tolist() == [0, 0, 1, 255, 255, 0]


def test_progress_counts_images(sample_images, metrics):
    seen = []
    evaluate(darker, sample_images, metrics, batch_size=3, progress=lambda *told: seen.append(told))
    assert seen == [("evaluating", 3, 7), ("evaluating", 6, 7), ("evaluating", 7, 7)]


class Odd(nn.Module):
    """Right in evaluation mode only; one part is frozen in it for good."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.trained = nn.Identity(), nn.Dropout(0.9)
        self.frozen.eval()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert torch.is_inference_mode_enabled()
        return self.trained(images)


def test_a_module_is_measured_in_evaluation_mode_which_is_taken_back(sample_images, metrics):
    module = Odd()
    rows = evaluate(module, sample_images, metrics).rows
    assert all(row["psnr"] == PSNR_CAP for row in rows)
    assert (module.training, module.trained.training, module.frozen.training) == (True, True, False)
    with pytest.raises(ZeroDivisionError), eval_mode(module):
        assert not module.trained.training
        raise ZeroDivisionError
    assert (module.training, module.trained.training, module.frozen.training) == (True, True, False)


def test_images_come_to_where_a_module_is(sample_images, metrics, monkeypatch):
    asked = []

    def crops(indices, device):
        asked.append(str(device))
        raise TypeError

    monkeypatch.setattr(sample_images, "crops", crops)
    for reconstruct in (nn.Conv2d(3, 3, 1, device="meta"), nn.Identity(), darker):
        with pytest.raises(TypeError):
            evaluate(reconstruct, sample_images, metrics)
    assert asked == ["meta", "cpu", "cpu"]


def spoiled(value: float, index: int = 4):
    """A reconstruction that is wrong in one value of image `index`."""

    def reconstruct(images: torch.Tensor) -> torch.Tensor:
        result = images.clone()
        for sample_image, original in zip(result, images, strict=True):
            if torch.equal(original, FakeImages().images[index]):
                sample_image[1, 2, 3] = value
        return result

    return reconstruct


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "not finite"),
        (float("inf"), "not finite"),
        (1.5, "to 1.5; images lie in"),
        (-0.1, "from -0.1"),
    ],
)
def test_a_bad_reconstruction_is_an_error_that_names_the_image(sample_images, metrics, value, message):
    with pytest.raises(AfterimageError, match=f"the reconstruction of image image-4 .*{message}"):
        evaluate(spoiled(value), sample_images, metrics, batch_size=3)
    with pytest.raises(AfterimageError, match="the reconstruction by second of image image-4"):
        batches = reconstruct_batches(lambda images: [images, spoiled(value)(images)], sample_images)
        evaluate_batches(batches, sample_images.ids, metrics, names=["first", "second"])


def test_a_reconstruction_of_another_size_is_an_error(sample_images, metrics):
    with pytest.raises(AfterimageError, match=r"shape \(7, 3, 8, 16\), its images \(7, 3, 16, 16\)"):
        evaluate(lambda images: images[:, :, ::2], sample_images, metrics)


def test_no_images_is_an_error(metrics):
    with pytest.raises(AfterimageError, match="no images"):
        evaluate(darker, FakeImages(0), metrics)


def test_summary_is_over_images_with_the_sample_standard_deviation():
    rows = [{"id": str(i), "psnr": 20.0 + i, "ssim": 0.5, "lpips": None} for i in range(5)]
    summary = summarise(rows)
    assert summary["psnr"] == Score(22.0, statistics.stdev([20.0, 21.0, 22.0, 23.0, 24.0]), 5)
    assert summary["ssim"] == Score(0.5, 0.0, 5)
    assert summary["lpips"] is None
    assert summarise(rows[:1])["psnr"] == Score(20.0, None, 1)


def test_summary_refuses_scores_of_some_images_only():
    rows = [
        {"id": "a", "psnr": 20.0, "ssim": 0.5, "lpips": 0.1},
        {"id": "b", "psnr": 20.0, "ssim": 0.5, "lpips": None},
    ]
    with pytest.raises(AfterimageError, match="lpips is missing for 1 of 2"):
        summarise(rows)
    with pytest.raises(AfterimageError, match="no scores"):
        summarise([])


def test_images_that_came_back_exactly_are_noted(sample_images, metrics):
    assert score_notes(evaluate(darker, sample_images, metrics).rows) == []
    rows = evaluate(lambda images: images, sample_images, metrics).rows
    assert score_notes(rows) == ["7 of 7 images came back exactly and count as 100 dB"]
