"""Streamed images: batches that depend on their indices alone, copies by their bytes, threads that end."""

import threading

import numpy as np
import pytest
import torch

from afterimage.config import AfterimageError
from afterimage.data import dataset
from afterimage.data.duplicates import near_duplicates
from afterimage.data.images import StreamedImages
from afterimage.data.sampling import epoch_order
from some_images import write_images
from some_shards import image_bytes, write_shards, write_tar
from source_contract import load, streaming  # noqa: F401

pytestmark = pytest.mark.usefixtures("streaming")


@pytest.fixture(params=["folder", "webdataset"])
def source(request, tmp_path) -> str:
    if request.param == "folder":
        write_images(tmp_path / "images", 40)
        return f"folder:{tmp_path / 'images'}"
    return write_shards(tmp_path / "shards", 2, 20)


def test_streaming_writes_no_pixels_and_says_what_it_leaves_out(source, tmp_path):
    data = load(source, tmp_path / "cache")
    data.train.crops([0])
    assert not list((tmp_path / "cache").rglob("*.images"))
    assert any("40 images were streamed" in note for note in data.notes)
    assert "were not looked for, since images are streamed" in near_duplicates(data)[0]


def test_as_many_images_as_are_kept_are_not_streamed(source, tmp_path, monkeypatch):
    for above, streamed in ((39, True), (40, False)):
        monkeypatch.setattr(dataset, "MAX_DECODED_IMAGES", above)
        assert load(source, tmp_path / "cache").train.streamed == streamed
    monkeypatch.setattr(dataset, "MAX_DECODED_IMAGES", 20)
    assert not load(
        source, tmp_path / "cache", limit_train=10, limit_validation=5, limit_test=5
    ).train.streamed


def test_another_source_may_test(source, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "MAX_DECODED_IMAGES", 10)
    data = load(source, tmp_path / "cache", test="procedural:3")
    assert data.train.streamed and not data.test.streamed
    assert data.test.crops([0, 1, 2]).shape == (3, 3, 16, 16)


def test_a_test_image_that_trains_is_refused_and_copies_are_counted(tmp_path):
    content = {f"{number:03d}.png": image_bytes(number) for number in range(20)}
    own = write_tar(tmp_path / "a.tar", content)
    other = write_tar(tmp_path / "b.tar", {"x.png": image_bytes(50), "y.png": content["007.png"]})
    leak = r"1 of the test images are also training .*\n .*b.tar/y.png is .*a.tar/007.png"
    with pytest.raises(AfterimageError, match=leak):
        load(f"webdataset:{own}", tmp_path, test=f"webdataset:{other}")
    write_tar(tmp_path / "c.tar", {"x.png": image_bytes(50), "y.png": image_bytes(50)})
    notes = load(f"webdataset:{own}", tmp_path, test=f"webdataset:{tmp_path}/c.tar").notes
    assert "exact copies of other images among the 2 test images: 1" in notes


def test_batches_depend_on_their_indices_alone(source, tmp_path):
    train = load(source, tmp_path / "cache").train
    visit = epoch_order(len(train), 1, 3)
    chunks = [visit[start : start + 4] for start in range(0, len(visit), 4)]
    everything = list(train.batches(iter(chunks), seed=1, epoch=3))
    assert [len(batch) for batch in everything] == [len(chunk) for chunk in chunks]
    for chunk, batch in zip(chunks, everything, strict=True):
        assert torch.equal(batch, train.crops(chunk, seed=1, epoch=3))
    resumed = list(train.batches(chunks[2:], seed=1, epoch=3))
    assert all(map(torch.equal, resumed, everything[2:])) and len(resumed) == len(everything) - 2


def test_a_rank_may_have_no_part_of_a_batch(source, tmp_path):
    train = load(source, tmp_path / "cache").train
    chunks = [[], [3], [], [], [1, 2], []]
    assert [len(batch) for batch in train.batches(chunks)] == [0, 1, 0, 0, 2, 0]
    assert list(train.batches([])) == [] and train.crops([]).shape == (0, 3, 16, 16)
    with pytest.raises(IndexError):
        train.crops([len(train)])


def test_a_file_that_was_replaced_is_noticed_when_it_is_used(tmp_path):
    paths = write_images(tmp_path / "images", 12)
    train = load(f"folder:{tmp_path / 'images'}", tmp_path / "cache").train
    for path in paths:
        path.write_bytes(image_bytes(99))
    with pytest.raises(AfterimageError, match=r"images/\d+.png: changed since it was first read"):
        train.crops(np.arange(len(train)))
    for path in paths:
        path.unlink()
    with pytest.raises(AfterimageError, match=r"images/\d+.png: no such file"):
        train.crops([0])


def test_decoding_stays_a_few_batches_ahead_and_its_threads_end(tmp_path, monkeypatch):
    train = load(write_shards(tmp_path / "shards", 2, 100), tmp_path).train
    decoded, decode = [], StreamedImages._pixels
    monkeypatch.setattr(
        StreamedImages, "_pixels", lambda self, index: decoded.append(index) or decode(self, index)
    )
    before = set(threading.enumerate())
    batches = train.batches([range(i, i + 20) for i in range(0, 140, 20)])
    next(batches)
    # Another test's thread may end meanwhile: these alone count.
    started = set(threading.enumerate()) - before
    assert started and len(decoded) <= 20 * 3
    batches.close()
    assert not any(thread.is_alive() for thread in started) and len(decoded) <= 20 * 3
