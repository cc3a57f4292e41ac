"""Streamed images: the same splits, order and crops as kept ones, with threads that end."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from afterimage.config import AfterimageError, DataConfig, RunConfig, from_dict, to_dict
from afterimage.data import dataset as load_module
from afterimage.data.dataset import load_data
from afterimage.data.duplicates import near_duplicates
from afterimage.data.images import Data, StreamedImages
from afterimage.data.sampling import ShuffleBuffer, order
from afterimage.data.sources.folder import index_folder, read_folder
from afterimage.data.splits import split
from some_images import write_images
from some_shards import image_bytes, write_parquet, write_shards, write_tar

PARTS = ("train", "validation", "test")


@pytest.fixture(params=["folder", "webdataset", "parquet"])
def source(request, tmp_path) -> str:
    if request.param == "folder":
        write_images(tmp_path / "images", 30)
        write_images(tmp_path / "images" / "more", 10, first=30)
        return f"folder:{tmp_path / 'images'}"
    if request.param == "webdataset":
        return write_shards(tmp_path / "shards", 2, 20)
    return write_parquet(tmp_path / "parquet", 2, 20, group=6)


def load(source: str, tmp_path, stream: bool | None = True, **settings) -> Data:
    config = DataConfig(source, resize=24, crop=16, stream=stream, **settings)
    return load_data(config, cache=tmp_path / "cache")


def test_both_ways_give_the_same_images_bit_for_bit(source, tmp_path):
    streamed, kept = load(source, tmp_path), load(source, tmp_path, stream=False)
    assert streamed.digest == kept.digest
    for name in PARTS:
        ours, theirs = getattr(streamed, name), getattr(kept, name)
        assert isinstance(ours, StreamedImages) and not isinstance(theirs, StreamedImages)
        assert list(ours.ids) == list(theirs.ids) and list(ours.content) == list(theirs.content)
        assert np.array_equal(ours.digests, theirs.digests)
        everything = np.arange(len(ours))[::-1]
        for crop in ({}, {"seed": 3, "epoch": 2}):
            assert torch.equal(ours.crops(everything, **crop), theirs.crops(everything, **crop))
        assert torch.equal(ours.whole(1), theirs.whole(1))
        orders = [order(len(ours), 5, 1, sample_images.windows) for sample_images in (ours, theirs)]
        assert np.array_equal(*orders)
    assert not any("near-duplicates" in note for note in near_duplicates(kept))
    assert "were not looked for, since images are streamed" in near_duplicates(streamed)[0]
    assert any("40 images were streamed" in note for note in streamed.notes)


def test_streaming_writes_no_pixels(source, tmp_path):
    load(source, tmp_path).train.crops([0])
    assert not list((tmp_path / "cache").rglob("*.images"))


@pytest.mark.parametrize("own", [True, False])
def test_the_split_of_a_folder_is_the_one_it_always_was(tmp_path, own):
    write_images(tmp_path / "a" / "train", 20)
    write_images(tmp_path / "a" / ("val" if own else "other"), 10, first=20)
    for fractions in ((0.3, 0.2), (0.2, None)):
        ways = [read_folder(str(tmp_path / "a")), index_folder(str(tmp_path / "a"), tmp_path / "cache")]
        ids = [[[o.id for o in part] for part in split("a", way, *fractions, 7)] for way in ways]
        names = [[[o.name for o in part] for part in split("a", way, *fractions, 7)] for way in ways]
        assert ids[0] == ids[1] and names[0] == names[1] and len(ids[0][0]) > 5


def test_parquet_and_tar_and_folder_hold_the_same_contents(tmp_path):
    write_images(tmp_path / "images", 12)
    sources = [
        f"folder:{tmp_path / 'images'}",
        write_shards(tmp_path / "shards", 3, 4),
        write_parquet(tmp_path / "parquet", 3, 4, group=3),
        write_parquet(tmp_path / "plain", 3, 4, group=3, plain=True),
    ]
    data = [load(source, tmp_path) for source in sources]
    contents = [sorted(c for part in PARTS for c in getattr(d, part).content) for d in data]
    assert all(content == contents[0] for content in contents)
    assert data[1].test.ids[0].startswith("shard-00") and data[1].test.ids[0].endswith(".png")


def test_limits_keep_the_first_of_a_split(tmp_path):
    source = write_shards(tmp_path / "shards", 2, 20)
    few = load(source, tmp_path, limit_train=5, limit_validation=2, limit_test=1)
    everything = load(source, tmp_path)
    for name, count in zip(PARTS, (5, 2, 1), strict=True):
        assert list(getattr(few, name).ids) == list(getattr(everything, name).ids)[:count]


def test_many_images_are_streamed_unless_told_otherwise(source, tmp_path, monkeypatch):
    def streamed(stream=None, **settings):
        return isinstance(load(source, tmp_path, stream, **settings).train, StreamedImages)

    assert not streamed()
    monkeypatch.setattr(load_module, "STREAM_ABOVE", 20)
    assert streamed() and not streamed(stream=False)
    assert not streamed(limit_train=10, limit_validation=5, limit_test=5)
    monkeypatch.setattr(load_module, "STREAM_ABOVE", 40)
    assert not streamed() and streamed(stream=True)


def test_only_what_is_used_changes_a_runs_digest():
    run = RunConfig(("resnet18.tv_in1k:layer1",))
    settings = to_dict(run)
    assert "stream" not in settings["data"]
    digests = {replace(run, data=replace(run.data, stream=stream)).digest for stream in (None, True, False)}
    assert len(digests) == 3 and run.digest in digests
    assert from_dict(DataConfig, {"source": "folder:x", "stream": True}).stream is True
    with pytest.raises(AfterimageError, match="stream must be bool"):
        from_dict(DataConfig, {"stream": 1})


def test_what_cannot_be_streamed_says_so(tmp_path):
    with pytest.raises(
        AfterimageError, match="procedural:9 cannot be streamed; what can: folder, webdataset"
    ):
        load("procedural:9", tmp_path)


def test_another_source_may_test(tmp_path):
    source = write_shards(tmp_path / "shards", 1, 20)
    data = load(source, tmp_path, test="procedural:3")
    assert isinstance(data.train, StreamedImages) and len(data.test) == 3
    assert data.test.crops([0, 1, 2]).shape == (3, 3, 16, 16)
    write_images(tmp_path / "images", 3, first=100)
    assert len(load(source, tmp_path, test=f"folder:{tmp_path / 'images'}").test) == 3


def test_a_test_image_that_trains_is_refused_and_copies_are_counted(tmp_path):
    content = {f"{number:03d}.png": image_bytes(number) for number in range(20)}
    own = write_tar(tmp_path / "a.tar", content)
    other = write_tar(tmp_path / "b.tar", {"x.png": image_bytes(50), "y.png": content["007.png"]})
    leak = r"1 of the test images are trained .*\n .*b.tar/y.png is .*a.tar/007.png"
    with pytest.raises(AfterimageError, match=leak):
        load(f"webdataset:{own}", tmp_path, test=f"webdataset:{other}")
    write_tar(tmp_path / "c.tar", {"x.png": image_bytes(50), "y.png": image_bytes(50)})
    notes = load(f"webdataset:{own}", tmp_path, test=f"webdataset:{tmp_path}/c.tar").notes
    assert "exact copies of other images among the 2 test images: 1" in notes


def test_batches_depend_on_their_indices_alone(source, tmp_path):
    train = load(source, tmp_path).train
    visit = order(len(train), 1, 3, train.windows)
    chunks = [visit[start : start + 4] for start in range(0, len(visit), 4)]
    everything = list(train.batches(iter(chunks), seed=1, epoch=3))
    assert [len(batch) for batch in everything] == [len(chunk) for chunk in chunks]
    for chunk, batch in zip(chunks, everything, strict=True):
        assert torch.equal(batch, train.crops(chunk, seed=1, epoch=3))
    resumed = list(
        train.batches([visit[start : start + 4] for start in range(8, len(visit), 4)], seed=1, epoch=3)
    )
    assert all(map(torch.equal, resumed, everything[2:])) and len(resumed) == len(everything) - 2


def test_a_rank_may_have_no_part_of_a_batch(tmp_path):
    train = load(write_shards(tmp_path / "shards", 1, 20), tmp_path).train
    chunks = [[], [3], [], [], [1, 2], []]
    assert [len(batch) for batch in train.batches(chunks)] == [0, 1, 0, 0, 2, 0]
    assert list(train.batches([])) == [] and train.crops([]).shape == (0, 3, 16, 16)
    with pytest.raises(IndexError):
        train.crops([len(train)])


def test_decoding_stays_a_few_batches_ahead_and_its_threads_end(tmp_path, monkeypatch):
    train = load(write_shards(tmp_path / "shards", 2, 100), tmp_path).train
    decoded, decode = [], StreamedImages._decoded
    monkeypatch.setattr(
        StreamedImages, "_decoded", lambda self, index: decoded.append(index) or decode(self, index)
    )
    before = set(threading.enumerate())
    batches = train.batches([range(i, i + 20) for i in range(0, 140, 20)])
    next(batches)
    # Another test's thread may end meanwhile: these alone count.
    started = set(threading.enumerate()) - before
    assert started and len(decoded) <= 20 * 3
    batches.close()
    assert not any(thread.is_alive() for thread in started) and len(decoded) <= 20 * 3


def test_row_groups_are_visited_together_in_any_order():
    part = np.repeat(np.arange(10), 8)
    windows = ShuffleBuffer(part, 2)
    visits = [order(80, seed, epoch, windows) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for visit in visits:
        assert sorted(visit) == list(range(80))
        for start in range(0, 80, 16):
            window = visit[start : start + 16]
            assert len(set(part[window])) == 2 and list(window) != sorted(window)
    assert len({tuple(visit) for visit in visits}) == 3
    assert np.array_equal(visits[0], order(80, 0, 0, windows))
