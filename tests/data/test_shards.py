"""Shards and their index: found, checked, read once; hostile and broken ones are named errors."""

import gzip
import io
import logging
import os
import shutil
import tarfile

import numpy as np
import pytest

from afterimage.config import AfterimageError, DataConfig
from afterimage.data.dataset import load_data
from afterimage.data.images import Data
from afterimage.data.sources import parquet as parquet_module
from afterimage.data.sources import tar as tar_module
from afterimage.data.sources.folder import FolderShard
from afterimage.data.sources.shards import expand
from afterimage.data.sources.tar import TarShard
from afterimage.experiments.cost import training_images
from some_images import write_images
from some_shards import header, image_bytes, write_parquet, write_shards, write_tar

IMAGES = {f"{number:03d}.png": image_bytes(number) for number in range(12)}


def load(source: str, tmp_path, **settings) -> Data:
    config = DataConfig(source, resize=24, crop=16, stream=True, **settings)
    return load_data(config, cache=tmp_path / "cache")


def refused(path, tmp_path, message: str) -> None:
    with pytest.raises(AfterimageError, match=message) as error:
        load(f"webdataset:{path}", tmp_path)
    assert str(path) in str(error.value)


def with_header(path, block: bytes, first: bool = False):
    """A good tar file with another header (and its data) before or behind its images."""
    good = write_tar(path, IMAGES).read_bytes().rstrip(b"\0")
    good += bytes(-len(good) % 512)
    path.write_bytes((block + good if first else good + block) + bytes(1024))
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (tarfile.SYMTYPE, "member 'x.png' is a link, a device or sparse"),
        (tarfile.LNKTYPE, "member 'x.png' is a link, a device or sparse"),
        (tarfile.FIFOTYPE, "member 'x.png' is a link, a device or sparse"),
        (tarfile.CHRTYPE, "member 'x.png' is a link, a device or sparse"),
        (tarfile.GNUTYPE_SPARSE, "a link, a device or sparse|damaged"),
    ],
)
def test_links_and_devices_are_refused(tmp_path, kind, message):
    path = with_header(tmp_path / "x.tar", header("x.png", b"00000000000\0", kind))
    refused(path, tmp_path, message)


@pytest.mark.parametrize("name", ["../x.png", "/etc/x.png", "a/../../x.png"])
def test_names_that_lead_out_are_refused(tmp_path, name):
    refused(write_tar(tmp_path / "x.tar", IMAGES | {name: b"x"}), tmp_path, "leads out of the folder")


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (b"\xff" * 12, "overlaps another|damaged"),  # -1
        (b"\xff" * 9 + b"\xfc\0\0", "overlaps another|damaged"),  # -262,144: tarfile would read in circles
        (b"77777777777\0", "goes on after its end"),
        (b"\x80" + b"\0" * 3 + b"\x7f" + b"\xff" * 7, "goes on after its end"),
        (b"00000000000\0", "'x.png' is empty"),
    ],
)
def test_sizes_are_checked(tmp_path, size, message):
    refused(with_header(tmp_path / "x.tar", header("x.png", size)), tmp_path, message)


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_header_cannot_ask_for_more_memory_than_a_header_needs(tmp_path, kind):
    path = tmp_path / "x.tar"
    with_header(path, header("x", b"%011o\0" % 2**30, kind), first=True)
    os.truncate(path, 2**30 + 2**20)  # sparse on disk, but the declared bytes are there
    refused(path, tmp_path, "a header declares 1,073,741,824 bytes")


def test_headers_without_end_are_refused(tmp_path):
    path = with_header(tmp_path / "x.tar", header("x", b"%011o\0" % 0, tarfile.XHDTYPE) * 5000, first=True)
    refused(path, tmp_path, "damaged")


def test_what_was_cut_short_or_damaged_is_not_taken_for_the_end(tmp_path):
    path = write_tar(tmp_path / "x.tar", IMAGES)
    whole = path.read_bytes()
    ends = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    for cut, message in (
        (ends, "no mark at its end"),
        (ends - 512, "after its end|damaged"),
        (700, "after its end"),
    ):
        path.write_bytes(whole[:cut])
        refused(path, tmp_path, message)
    with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
        third = archive.getmembers()[3].offset
    flipped = bytearray(whole)
    flipped[third + 5] ^= 4
    path.write_bytes(flipped)
    refused(path, tmp_path, f"what stands at byte {third:,} is neither a member nor the end")
    path.write_bytes(whole + whole)
    refused(path, tmp_path, "neither a member nor the end")
    path.write_bytes(b"")
    refused(path, tmp_path, "damaged or no tar file")
    path.write_bytes(b"no tar file at all" * 100)
    refused(path, tmp_path, "damaged or no tar file")


def test_other_shards_that_cannot_be_read(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "x.tar", IMAGES)
    packed = tmp_path / "y.tar"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    refused(packed, tmp_path, "is compressed with gzip")
    refused(
        write_tar(tmp_path / "z.tar", {"a.txt": b"x", ".b.png": b"y"}),
        tmp_path,
        "no images among 2 members",
    )
    with pytest.raises(AfterimageError, match=r"two images have one name: .*001.png"):
        twice = write_tar(tmp_path / "w.tar", IMAGES)
        with tarfile.open(twice, "a") as archive:
            archive.add(write_images(tmp_path, 1)[0], "001.png")
        load(f"webdataset:{twice}", tmp_path)
    monkeypatch.setattr(tar_module, "MAX_MEMBERS", 5)
    refused(path, tmp_path, "more than 5 members")


def test_members_are_known_as_in_a_folder(tmp_path):
    names = [
        "./a/1.png",
        "a/2.PNG",
        "a/é.png",
        "n" * 150 + "/3.png",
        "a/4.json",
        ".h/5.png",
        "__MACOSX/6.png",
    ]
    path = write_tar(tmp_path / "x.tar", {name: image_bytes(n) for n, name in enumerate(names)})
    found = [(name.decode(), size) for name, _, size in TarShard(path, "").members()]
    expected = ["a/1.png", "a/2.PNG", "a/é.png", "n" * 150 + "/3.png"]
    assert [name for name, _ in found] == expected
    for (name, place, size), content in zip(TarShard(path, "").members(), range(4), strict=True):
        assert TarShard(path, "").read(name, place, size) == image_bytes(content)


def test_broken_images_are_named_before_anything_is_trained(tmp_path):
    broken = IMAGES | {"x.png": b"no image", "y.jpg": b"\xff\xd8 nor this"}
    path = write_tar(tmp_path / "x.tar", broken)
    with pytest.raises(AfterimageError, match=r"2 images cannot be read") as error:
        load(f"webdataset:{path}", tmp_path)
    assert f"{path}/x.png: is not an image" in str(error.value) and f"{path}/y.jpg" in str(error.value)


def test_a_image_that_cannot_be_decoded_is_named_when_it_is_used(tmp_path):
    path = write_tar(tmp_path / "x.tar", IMAGES | {"012.png": IMAGES["000.png"][:1500]})
    train = load(f"webdataset:{path}", tmp_path, split_seed=1).train
    damaged = list(train.ids).index("x.tar/012.png")
    train.crops([index for index in range(len(train)) if index != damaged])
    with pytest.raises(AfterimageError, match=r"x.tar/012.png: is damaged"):
        train.crops([damaged])


def test_a_shard_replaced_while_it_is_used_is_noticed(tmp_path):
    path = write_tar(tmp_path / "x.tar", IMAGES)
    train = load(f"webdataset:{path}", tmp_path).train
    write_tar(path, {name: IMAGES["003.png"] for name in IMAGES})
    with pytest.raises(AfterimageError, match=r"x.tar/\d+.png: (has changed|is cut short)"):
        train.crops(range(len(train)))
    path.unlink()
    with pytest.raises(AfterimageError, match=r"x.tar/\d+.png: no such file"):
        train.crops([0])


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """What is read through, by name."""
    done = []
    for kind in (TarShard, FolderShard):
        own = kind.read
        monkeypatch.setattr(
            kind,
            "read",
            lambda self, name, *place, own=own: done.append(name.decode()) or own(self, name, *place),
        )
    return done


def test_shards_are_read_once_for_as_long_as_they_stay_the_same(tmp_path, read):
    source = write_shards(tmp_path / "shards", 2, 5)
    first = load(source, tmp_path)
    assert len(read) == 10
    assert load(source, tmp_path).digest == first.digest and len(read) == 10
    write_shards(tmp_path / "shards", 1, 5, first=50)
    assert load(source, tmp_path).digest != first.digest and len(read) == 15


def test_of_a_folder_only_what_changed_is_read_again(tmp_path, read):
    paths = write_images(tmp_path / "images", 10)
    source = f"folder:{tmp_path / 'images'}"
    first = load(source, tmp_path)
    assert len(read) == 10 and load(source, tmp_path).digest == first.digest and len(read) == 10
    paths[3].write_bytes(image_bytes(100))
    paths[4].unlink()
    write_images(tmp_path / "images", 2, first=20)
    second = load(source, tmp_path)
    assert sorted(read[10:]) == ["0003.png", "0020.png", "0021.png"]
    assert second.digest == load_data(second.config, cache=tmp_path / "other").digest


@pytest.mark.parametrize("damage", ["flipped", "cut", "other", "pickled"])
def test_a_damaged_index_is_built_again(tmp_path, caplog, damage):
    source = write_shards(tmp_path / "shards", 1, 10)
    first = load(source, tmp_path)
    (file,) = (tmp_path / "cache" / "index").iterdir()
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "other":
        with np.load(file) as stored:
            np.savez(file, **dict(stored) | {"ends": stored["ends"][::-1]})
    elif damage == "pickled":
        with np.load(file) as stored:
            np.savez(file, **dict(stored) | {"names": np.array([print], object)})
    else:
        file.write_bytes(content if damage == "flipped" else content[:-100])
    with caplog.at_level(logging.WARNING, "afterimage"):
        assert load(source, tmp_path).digest == first.digest
    assert "damaged" in caplog.text


def test_an_index_that_cannot_be_kept_is_no_error(tmp_path, caplog):
    source = write_shards(tmp_path / "shards", 1, 10)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "index").write_text("in the way")
    with caplog.at_level(logging.WARNING, "afterimage"):
        load(source, tmp_path)
    assert "cannot keep the index" in caplog.text


def test_patterns(tmp_path):
    for name in ("a-08.tar", "a-09.tar", "a-10.tar", "b/x.tar", "b/y.tar", "c{1.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")

    def names(pattern):
        return [str(path.relative_to(tmp_path)) for path in expand(f"{tmp_path}/{pattern}")]

    assert names("a-{08..10}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert names("{b/y,a-10}.tar") == ["b/y.tar", "a-10.tar"]
    assert names("b/*.tar") == ["b/x.tar", "b/y.tar"] and len(names("**/*.tar")) == 6
    assert names("a-{08,08}.tar") == ["a-08.tar"] and names("c{1.tar") == ["c{1.tar"]
    for pattern, message in (
        ("a-{08..11}.tar", "there is no file .*a-11.tar"),
        ("z*.tar", "no file matches"),
        ("b", "there is no file"),
        ("{5..1}.tar", "must go up"),
        ("{0..999999999999}.tar", "at most 100,000"),
        ("{0..999}{0..999}.tar", "names 1,000,000 files"),
    ):
        with pytest.raises(AfterimageError, match=message):
            names(pattern)


def test_parquet_that_cannot_be_read(tmp_path, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    def refuse(table, message, **options):
        pq.write_table(pa.table(table), tmp_path / "x.parquet", **options)
        with pytest.raises(AfterimageError, match=message) as error:
            load(f"parquet:{tmp_path}/x.parquet", tmp_path)
        assert "x.parquet" in str(error.value)

    refuse({"label": [1, 2]}, "has no column of bytes; .* its columns: label")
    refuse({"a": [b"x"], "b": [b"y"]}, r"several columns of bytes \(a, b\)")
    refuse({"image": [b"x", None]}, r"0000001: has no bytes in the column image")
    refuse({"image": pa.array([], pa.binary())}, "has no rows")
    refuse(
        {"image": [{"bytes": None, "path": "x.png"}] * 2, "k": [b"", b""]}, "no column of bytes|has no bytes"
    )
    monkeypatch.setattr(parquet_module, "MAX_GROUP", 1000)
    refuse({"image": list(IMAGES.values())}, "row group of .* write the file again")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 not really PAR1")
    with pytest.raises(AfterimageError, match="damaged or no Parquet file"):
        load(f"parquet:{tmp_path}/x.parquet", tmp_path)


def test_a_row_group_is_read_once_an_epoch_and_few_are_held(tmp_path, monkeypatch):
    from afterimage.data.sampling import order

    monkeypatch.setattr("afterimage.data.shard_index.WINDOW_BYTES", 50_000)
    monkeypatch.setattr("afterimage.data.sources.shards.WINDOW_BYTES", 50_000)
    read, group = [], parquet_module.ParquetShard.group
    monkeypatch.setattr(
        parquet_module.ParquetShard, "group", lambda self, number: read.append(number) or group(self, number)
    )
    source = write_parquet(tmp_path / "shards", 1, 80, group=4)
    data = load(source, tmp_path)
    assert len(read) == 20, "once to index"
    assert 1 < data.train.windows.together < 8
    visit = order(len(data.train), 0, 0, data.train.windows)
    list(data.train.batches([visit[start : start + 4] for start in range(0, len(visit), 4)], seed=0))
    assert 16 < len(read[20:]) == len(set(read[20:])) <= 20
    assert any("each epoch visits these in random order" in note for note in data.notes)
    (shard,) = (block.shard for block in data.train.rows.index.blocks)
    assert sum(column.nbytes for column in shard._groups._held.values()) <= 100_000


def test_a_plan_counts_the_images_of_shards_without_reading_them(tmp_path, read):
    source = write_shards(tmp_path / "shards", 2, 20)
    assert training_images(DataConfig(source)) == 29 and not read
    assert len(load(source, tmp_path).train) == 29
    shutil.rmtree(tmp_path / "cache")
    config = DataConfig(source, test="procedural:2", limit_train=1000)
    assert training_images(config) == 32 == len(load_data(config, cache=tmp_path / "cache").train)
