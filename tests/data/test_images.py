"""Crops and orders: right, reproducible, and the same however they are asked for."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.functional import center_crop

from afterimage.config import DataConfig
from afterimage.data.dataset import load_data, prepare_image
from afterimage.data.decode import ImageStatistics
from afterimage.data.images import ImageSet, gather_crops
from afterimage.data.pixel_cache import PixelStore, Slot
from afterimage.data.sampling import centre_crop_positions, epoch_order, random_crop_positions
from some_images import some_image, write_images

numbers = st.integers(-(2**70), 2**70)


def make_images(sizes: list[tuple[int, int]], crop: int | tuple[int, int]) -> ImageSet:
    """Images of these heights and widths in which every value is different from its neighbours'."""
    parts, slots, offset = [], {}, 0
    for number, (height, width) in enumerate(sizes):
        parts.append(np.random.default_rng(number).integers(0, 256, 3 * height * width, np.uint8))
        slots[f"content {number}"] = Slot(
            offset, height, width, 0, ImageStatistics(0, 255, 256, 0, width, height)
        )
        offset += 3 * height * width
    ids = [f"image {number}" for number in range(len(sizes))]
    return ImageSet(ids, list(slots), PixelStore(np.concatenate(parts), slots, "none"), crop)


@given(st.integers(0, 200), numbers, numbers)
@settings(deadline=None)
def test_order_is_a_permutation(n, seed, epoch):
    result = epoch_order(n, seed, epoch)
    assert sorted(result.tolist()) == list(range(n))
    assert np.array_equal(result, epoch_order(n, seed, epoch))


def test_order_never_changes_between_versions():
    assert epoch_order(8, seed=42, epoch=0).tolist() == [6, 2, 1, 5, 4, 3, 7, 0]
    assert not np.array_equal(epoch_order(100, 42, 0), epoch_order(100, 42, 1))
    assert not np.array_equal(epoch_order(100, 42, 0), epoch_order(100, 43, 0))


def test_every_place_in_the_order_is_equally_likely():
    first = np.bincount(
        [epoch_order(5, seed, epoch)[0] for seed in range(50) for epoch in range(40)], minlength=5
    )
    assert abs(first / 2000 - 0.2).max() < 0.04


@given(st.integers(1, 500), st.integers(0, 300), st.integers(0, 300), numbers, numbers, st.integers(0, 10**6))
@settings(deadline=None)
def test_random_crops_fit(crop, down, right, seed, epoch, index):
    height, width = np.array([crop + down]), np.array([crop + right])
    top, left, _ = random_crop_positions(height, width, crop, np.array([index]), seed, epoch)
    assert 0 <= top[0] <= down
    assert 0 <= left[0] <= right


def test_random_crops_are_uniform_and_independent():
    n = 20_000
    sides = np.full(n, 227)
    top, left, flip = random_crop_positions(sides, sides, 224, np.arange(n), 42, 3)
    together = np.bincount(top * 8 + left * 2 + flip, minlength=32)
    assert abs(together / n * 32 - 1).max() < 0.15


@given(st.integers(1, 400), st.integers(1, 400), st.integers(1, 300))
@settings(max_examples=50, deadline=None)
def test_centre_crop_is_where_torchvision_takes_it(height, width, crop):
    height, width = max(height, crop), max(width, crop)
    rows = torch.arange(height)[:, None].expand(height, width)
    columns = torch.arange(width).expand(height, width)
    expected = center_crop(torch.stack([rows, columns]), [crop])[:, 0, 0]
    top, left = centre_crop_positions(np.array([height]), np.array([width]), crop)
    assert [top[0], left[0]] == expected.tolist()


def test_centre_crops_are_exact():
    sample_images = make_images([(30, 45), (51, 31), (24, 24)], crop=24)
    crops = sample_images.crops([2, 0, 1])
    assert crops.shape == (3, 3, 24, 24)
    assert crops.dtype == torch.float32
    for crop, index in zip(crops, [2, 0, 1], strict=True):
        assert torch.equal(crop, center_crop(sample_images.full_image(index), [24]).to(torch.float32) / 255)


@pytest.mark.parametrize("limit", [10**6, 0], ids=["kept", "streamed"])
def test_crops_that_are_not_square(tmp_path, monkeypatch, limit):
    """An image is resized until it covers a box of the crop's shape, whose shorter side is `resize`."""
    monkeypatch.setattr("afterimage.data.dataset.MAX_DECODED_IMAGES", limit)
    folder = tmp_path / "images"
    folder.mkdir()
    for number, size in enumerate([(90, 60), (60, 90), (61, 61), (200, 50)]):
        some_image(number, *size).save(folder / f"{number}.png")
    config = DataConfig(f"folder:{folder}", resize=40, crop="30x45")
    assert (config.size, config.box) == ((30, 45), (40, 60))
    data = load_data(config, cache=tmp_path / "cache")
    whole, sides = {}, {}
    for part in (data.train, data.validation, data.test):
        assert part.streamed == (limit == 0)
        assert part.crops(range(len(part)), seed=1).shape == (len(part), 3, 30, 45)
        for index, name in enumerate(part.ids):
            (crop,) = part.crops([index])
            whole[name], sides[name] = tuple(part.full_image(index).shape[1:]), part.sides[index]
            assert torch.equal(crop, center_crop(part.full_image(index), [30, 45]).float() / 255)
            assert torch.equal(crop, prepare_image(folder / name, config)[0])
    assert whole == {"0.png": (40, 60), "1.png": (90, 60), "2.png": (60, 60), "3.png": (40, 160)}
    assert sides == {"0.png": 60, "1.png": 40, "2.png": 40, "3.png": 50}


def test_random_crops_are_parts_of_the_image_flipped_or_not():
    sample_images = make_images([(30, 45)] * 12, crop=24)
    crops = sample_images.crops(range(12), seed=1, epoch=2)
    top, left, flip = random_crop_positions(np.full(12, 30), np.full(12, 45), 24, np.arange(12), 1, 2)
    assert flip.any() and not flip.all()
    for index, crop in enumerate(crops):
        part = sample_images.full_image(index)[
            :, top[index] : top[index] + 24, left[index] : left[index] + 24
        ]
        part = part.flip(-1) if flip[index] else part
        assert torch.equal(crop, part.to(torch.float32) / 255)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=8), st.integers(0, 2**40), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_a_crop_depends_on_nothing_but_seed_epoch_and_index(indices, seed, epoch):
    sample_images = make_images([(20, 33), (41, 20), (20, 20), (29, 27), (20, 21), (22, 50)], crop=20)
    everything = sample_images.crops(range(6), seed=seed, epoch=epoch)
    assert torch.equal(sample_images.crops(indices, seed=seed, epoch=epoch), everything[indices])
    assert torch.equal(
        sample_images.crops(torch.tensor(indices), seed=seed, epoch=epoch), everything[indices]
    )


@given(st.integers(0, 2**40), st.integers(0, 100), st.sampled_from([20, (13, 20), (20, 9)]))
@settings(max_examples=40, deadline=None)
def test_the_gather_on_a_device_equals_the_copies(seed, epoch, crop):
    sizes = [(20, 33), (41, 20), (20, 20), (29, 27), (20, 21), (22, 50)]
    sample_images = make_images(sizes, crop)
    heights, widths = np.array(sizes).T
    top, left, flip = random_crop_positions(heights, widths, crop, np.arange(6), seed, epoch)
    offsets = np.array(
        [sample_images.blob.slots[content].offset for content in sample_images.content_digests]
    )
    pixels = torch.from_numpy(sample_images.blob.pixels)
    crops = gather_crops(pixels, offsets + top * widths + left, heights, widths, flip, sample_images.size)
    assert torch.equal(crops.to(torch.float32) / 255, sample_images.crops(range(6), seed=seed, epoch=epoch))


def test_another_device_gets_its_crops_there():
    sample_images = make_images([(20, 33), (41, 20)], crop=20)
    crops = sample_images.crops([0, 1], seed=1, device="meta")
    assert crops.device.type == "meta"
    assert crops.shape == (2, 3, 20, 20)
    assert sample_images.blob.to_device(torch.device("meta")) is sample_images.blob.to_device(
        torch.device("meta")
    )


def test_pixels_that_do_not_fit_on_a_device_are_cropped_before(monkeypatch):
    monkeypatch.setattr("afterimage.data.pixel_cache.RESIDENT_LIMIT", 100)
    sample_images = make_images([(20, 33)], crop=20)
    assert sample_images.blob.to_device(torch.device("meta")) is None
    assert sample_images.crops([0], device="meta").shape == (1, 3, 20, 20)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_crops_on_cuda_equal_those_on_the_cpu(monkeypatch):
    sample_images = make_images([(20, 33), (41, 20), (20, 20)], crop=20)
    for seed in (None, 5):
        expected = sample_images.crops([2, 0, 1], seed=seed)
        assert torch.equal(sample_images.crops([2, 0, 1], seed=seed, device="cuda").cpu(), expected)
    monkeypatch.setattr(PixelStore, "to_device", lambda self, device: None)
    assert torch.equal(sample_images.crops([2, 0, 1], seed=5, device="cuda").cpu(), expected)


def test_indices_outside_are_errors():
    sample_images = make_images([(20, 33)], crop=20)
    for index in (-1, 1):
        with pytest.raises(IndexError, match="of 1 images"):
            sample_images.crops([index])
    assert sample_images.crops([]).shape == (0, 3, 20, 20)


def test_loaded_images_have_the_size_asked_for(tmp_path):
    write_images(tmp_path / "images", 6)
    config = DataConfig(f"folder:{tmp_path / 'images'}", resize=24, crop=16)
    data = load_data(config, cache=tmp_path / "cache")
    crops = data.train.crops(range(len(data.train)), seed=0)
    assert crops.shape == (len(data.train), 3, 16, 16)
    assert 0 <= crops.min() < crops.max() <= 1
    assert data.train.full_image(0).shape == (3, 24, 32)
