"""What is said of images whose values or sizes decide what a score means: the same in every run."""

import logging
import math
import re

import numpy as np
import pytest
from PIL import Image

from afterimage.analysis.inversion.inputs import from_files
from afterimage.config import SSIM_WINDOW, DataConfig
from afterimage.data import dataset
from afterimage.data.dataset import file_notes, load_data
from afterimage.data.decode import ImageStatistics, examine, size_notes, value_notes
from afterimage.data.images import Data
from some_images import some_image, write_images
from some_shards import image_bytes, write_tar

COUNT = 12


def smooth(number: int) -> np.ndarray:
    """Grey values from 0 to 255, `(60, 80)` uint8."""
    values = np.asarray(some_image(number, 80, 60, "L"), float)
    return ((values - values.min()) / np.ptp(values) * 255).round().astype(np.uint8)


def write(folder, make, count: int = COUNT) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        image = make(number)
        (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(
            folder / f"{number:03}.png"
        )


def load(source, tmp_path, **settings) -> Data:
    config = DataConfig(str(source), **{"resize": 24, "crop": 16, **settings})
    return load_data(config, cache=tmp_path / "cache")


def test_facts_are_of_the_image_before_it_is_resized():
    image = some_image(1, 40, 30)
    pixels = np.asarray(image)
    expected = ImageStatistics(pixels.min(), pixels.max(), len(np.unique(pixels)), 0, 40, 30)
    assert examine(image) == expected
    assert examine(Image.new("RGB", (3, 5), (7, 7, 90))) == ImageStatistics(7, 90, 2, 1, 3, 5)


# What a row of images is, and what has to be said of it.
KINDS = {
    "12 bits in 16": (
        lambda n: (smooth(n).astype(np.uint32) * 4095 // 255).astype(np.uint16),
        ["narrow range", f"{COUNT} of {COUNT} images", "from 0 to 16", "17 different", "24 dB|25 dB"],
    ),
    "10 bits in 16": (
        lambda n: (smooth(n).astype(np.uint32) * 1023 // 255).astype(np.uint16),
        ["narrow range", "from 0 to 4", "36 dB"],
    ),
    "14 bits in 16": (
        lambda n: (smooth(n).astype(np.uint32) * 16383 // 255).astype(np.uint16),
        ["narrow range", "from 0 to 64", "12 dB"],
    ),
    "masks of 0 and 1": (
        lambda n: (smooth(n) > 99).astype(np.uint8),
        ["narrow range", "from 0 to 1", "48 dB"],
    ),
    "masks of black and white": (
        lambda n: (smooth(n) > 99).astype(np.uint8) * 255,
        ["few values", "use 2 of the 256"],
    ),
    "16 levels": (lambda n: smooth(n) // 16 * 17, ["few values", "use 1[56]( to 16)? of the 256"]),
    "one colour": (
        lambda n: Image.new("RGB", (50, 40), (n, 99, 200)),
        ["of a single colour", f"{COUNT} of {COUNT} images"],
    ),
    "8 bits": (smooth, []),
    "grey stored as RGB": (lambda n: np.stack([smooth(n)] * 3, 2), []),
    "colour": (lambda n: some_image(n, 80, 60), []),
    "16 bits": (lambda n: smooth(n).astype(np.uint16) * 257, []),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_range_that_is_not_used_is_said(tmp_path, kind, caplog):
    make, expected = KINDS[kind]
    write(tmp_path / "images", make)
    first = load(f"folder:{tmp_path / 'images'}", tmp_path)
    notes = [note for note in first.notes if not note.startswith("near-duplicates")]
    text = "\n".join(notes)
    assert len(notes) == bool(expected)
    for words in expected:
        assert re.search(words, text), text
    assert ("(1 of 1 test images)" in text) == bool(expected)
    assert all(note in caplog.text for note in first.notes)
    # What the cache holds is not decoded again, and says the same.
    assert load(f"folder:{tmp_path / 'images'}", tmp_path).notes == first.notes
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    assert load(f"folder:{tmp_path / 'images'}", blocked).notes == first.notes


def test_some_of_many_are_counted_and_test_images_apart(tmp_path):
    write(tmp_path / "a" / "train", smooth, 10)
    write(tmp_path / "a" / "test", lambda n: smooth(50 + n) if n else smooth(50) // 9, 4)
    Image.new("L", (60, 50), 0).save(tmp_path / "a" / "train" / "black.png")
    notes = load(f"folder:{tmp_path / 'a'}", tmp_path).notes
    flat = "of a single colour, in which there is nothing to reconstruct"
    assert notes[0] == f"{flat}: 1 of 15 images (0 of 4 test images)"
    assert "1 of 15 images (1 of 4 test images) use only values from 0 to 28" in notes[1]
    assert f"{20 * math.log10(255 / 28):.0f} dB higher" in notes[1]


@pytest.mark.parametrize("side", [1, 28])
def test_images_that_are_enlarged_are_said(tmp_path, side):
    write(tmp_path / "images", lambda n: some_image(n).resize((side, side + 3)))
    notes = load(f"folder:{tmp_path / 'images'}", tmp_path, resize=64, crop=32).notes
    assert (
        f"enlarged: {COUNT} of {COUNT} images (1 of 1 test images), the side {64 / side:.3g} times"
        in notes[-1]
    )
    assert f"has {side} pixels and is made 64" in notes[-1]
    if side >= SSIM_WINDOW:  # no smaller crop can be measured
        own = load(f"folder:{tmp_path / 'images'}", tmp_path, resize=side, crop=side).notes
        assert not any("enlarged" in note or "few values" in note for note in own)


def test_of_several_sizes_the_smallest_and_the_middle_one_are_said():
    (note,) = size_notes({"training": np.array([10, 20, 40]), "test": np.array([80, 300])}, 100)
    assert "4 of 5 images (1 of 2 test images), the side 10 times at most (median 3.33)" in note
    assert "has 10 to 80 pixels and is made 100" in note
    assert size_notes({"test": np.array([100, 300])}, 100) == []


def test_nothing_is_said_of_no_images():
    none = np.zeros((0, 6), np.int64)
    assert value_notes({"test": none}) == [] and size_notes({"test": none[:, 0]}, 9) == []


def test_streamed_images_say_what_was_not_examined(tmp_path, monkeypatch):
    write_images(tmp_path / "images", 20)
    path = write_tar(tmp_path / "a.tar", {f"{n:03}.png": image_bytes(n) for n in range(20)})
    for source in (f"folder:{tmp_path / 'images'}", f"webdataset:{path}"):
        kept = load(source, tmp_path, resize=60).notes
        assert not any("not examined" in note for note in kept)
        with monkeypatch.context() as patch:
            patch.setattr(dataset, "MAX_DECODED_IMAGES", 10)
            first = load(source, tmp_path, resize=60)
            assert load(source, tmp_path, resize=60).notes == first.notes
            # Test images of another source may be kept though the others are streamed.
            mixed = load(source, tmp_path, resize=60, test="procedural:3").notes
        assert any("was not examined" in note for note in first.notes)
        (enlarged,) = [note for note in first.notes if "enlarged" in note]
        assert enlarged.startswith("enlarged: 20 of 20 images (2 of 2 test images), the side 2")
        assert [note for note in kept if "enlarged" in note] == [enlarged]
        assert any("enlarged: 20 of 23 images (0 of 3 test images)" in note for note in mixed)
        assert any("not examined" in note for note in mixed)


def test_files_of_ones_own_say_the_same(tmp_path):
    write(tmp_path, lambda n: (smooth(n) > 99).astype(np.uint8), 2)
    paths = sorted(tmp_path.glob("*.png"))
    narrow, enlarged = file_notes(paths, DataConfig(resize=90, crop=64))
    assert "narrow range of values: 2 of 2 images use only values from 0 to 1" in narrow
    assert "enlarged: 2 of 2 images, the side 1.5 times" in enlarged
    assert from_files(paths, resize=90, crop=64).notes == (narrow, enlarged)


def test_another_rank_says_nothing(tmp_path, caplog, monkeypatch):
    write(tmp_path / "images", lambda n: (smooth(n) > 99).astype(np.uint8))
    monkeypatch.setattr("afterimage.data.dataset.on_main_process", lambda: False)
    with caplog.at_level(logging.WARNING):
        assert load(f"folder:{tmp_path / 'images'}", tmp_path).notes and caplog.text == ""
