"""Every original is decoded once; the cache is shared, whole, checked and mended."""

import logging
import multiprocessing
import os
import resource
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from afterimage.config import AfterimageError, DataConfig
from afterimage.data import originals
from afterimage.data import pixel_cache as cache_module
from afterimage.data.dataset import cache_folder, load_data
from afterimage.data.decode import ImageStatistics
from afterimage.data.images import Data
from afterimage.data.originals import FileDigests, FileOriginal
from afterimage.data.pixel_cache import map_blob
from some_images import some_image, write_images

COUNT = 12
FACTS = ImageStatistics(0, 255, 256, 0, 4, 5)


@pytest.fixture
def folder(tmp_path) -> Path:
    write_images(tmp_path / "images", COUNT)
    return tmp_path / "images"


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def work(monkeypatch) -> dict[str, list]:
    """What is decoded and what is read through, by file name."""
    done = {"decoded": [], "read": []}
    decode, header = FileOriginal.decode_image, originals.check_header

    def decode_image(self, size, content):
        done["decoded"].append(self.path.name)
        return decode(self, size, content)

    def looked_at(content, name):
        done["read"].append(name)
        return header(content, name)

    monkeypatch.setattr(FileOriginal, "decode_image", decode_image)
    monkeypatch.setattr(originals, "check_header", looked_at)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})  # one thread, so that the counts are exact
    return done


def load(folder: Path, cache: Path, **settings) -> Data:
    return load_data(DataConfig(f"folder:{folder}", resize=24, crop=16, **settings), cache=cache)


def pixels(data: Data) -> dict[str, bytes]:
    parts = (data.train, data.validation, data.test)
    return {i: p.full_image(n).numpy().tobytes() for p in parts for n, i in enumerate(p.ids)}


def blobs(cache: Path) -> list[Path]:
    return sorted((cache / "images").glob("*.images"))


def test_the_second_start_decodes_and_reads_nothing(folder, cache, work):
    first = load(folder, cache)
    assert len(work["decoded"]) == len(work["read"]) == COUNT
    second = load(folder, cache)
    assert len(work["decoded"]) == len(work["read"]) == COUNT
    assert second.digest == first.digest
    assert pixels(second) == pixels(first)
    assert sorted(pixels(first)) == sorted(path.name for path in folder.iterdir())


def test_another_split_or_place_decodes_nothing(folder, cache, work):
    first = load(folder, cache)
    assert load(folder, cache, split_seed=1).digest != first.digest
    moved = folder.rename(folder.with_name("moved"))
    assert load(moved, cache).digest == first.digest
    assert len(work["decoded"]) == COUNT
    assert len(blobs(cache)) == 1


def test_only_new_images_are_decoded(folder, cache, work):
    load(folder, cache, limit_train=2, limit_validation=1, limit_test=1)
    assert len(work["decoded"]) == 4
    load(folder, cache)
    assert len(work["decoded"]) == COUNT
    write_images(folder, 2, first=COUNT)
    load(folder, cache)
    assert sorted(work["decoded"][COUNT:]) == ["0012.png", "0013.png"]


def test_another_size_is_another_file(folder, cache, work):
    load(folder, cache)
    config = DataConfig(f"folder:{folder}", resize=20, crop=16)
    assert load_data(config, cache=cache).train.full_image(0).shape[1] == 20
    assert len(blobs(cache)) == 2


def test_a_replaced_image_is_seen_though_size_and_time_are_the_same(tmp_path, cache):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(6):
        some_image(number).save(folder / f"{number}.bmp")
    first = load(folder, cache)
    before = (folder / "0.bmp").stat()
    some_image(99).save(folder / "0.bmp")
    os.utime(folder / "0.bmp", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (folder / "0.bmp").stat().st_size == before.st_size
    second = load(folder, cache)
    assert second.digest != first.digest
    assert pixels(second)["0.bmp"] != pixels(first)["0.bmp"]


def test_a_image_that_changes_while_it_is_read_is_an_error(folder, tmp_path):
    original = FileOriginal("a", folder, "0000.png")
    content, _, _ = original.content(FileDigests(tmp_path, folder), 24)
    some_image(99).save(folder / "0000.png")
    with pytest.raises(AfterimageError, match=r"0000\.png: changed"):
        original.decode_image(24, content)


FAULTS = ["cut", "empty", "flipped pixel", "flipped index", "flipped footer", "other"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_file_is_seen_and_built_again(folder, cache, fault, caplog, work):
    expected = pixels(load(folder, cache))
    (path,) = blobs(cache)
    content = bytearray(path.read_bytes())
    end = len(map_blob(path).pixels)
    place = {"flipped pixel": 1000, "flipped index": end + 40, "flipped footer": len(content) - 20}.get(fault)
    if place is not None:
        content[place] ^= 4
    changed = {"cut": content[: end // 2], "empty": b"", "other": b"x" * 500}.get(fault, content)
    path.write_bytes(changed)
    assert pixels(load(folder, cache)) == expected
    assert "is damaged" in caplog.text and str(path) in caplog.text
    # Of a file with one bad pixel the other images are still good.
    assert len(work["decoded"]) == COUNT + (1 if fault == "flipped pixel" else COUNT)
    caplog.clear()
    load(folder, cache)
    assert caplog.text == ""


@pytest.mark.parametrize("seed", range(20))
def test_any_cut_and_any_flipped_bit_is_seen(tmp_path, seed):
    random = np.random.default_rng(seed)
    slots = {f"{n}": random.integers(0, 256, (3, 5, 4), np.uint8) for n in range(3)}
    path = tmp_path / "a.images"
    with open(path, "wb") as file:
        cache_module.write_blob(file, ((name, pixels, FACTS) for name, pixels in slots.items()), "t")
    assert cache_module._open(path, slots.keys()).slots.keys() == slots.keys()
    content = bytearray(path.read_bytes())
    if seed % 2:
        content[random.integers(len(content))] ^= 1 << random.integers(8)
    else:
        content = content[: random.integers(len(content))]
    path.write_bytes(content)
    assert cache_module._open(path, slots.keys()) is None


def run_together(target, *arguments, processes: int = 3) -> list[int]:
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=target, args=arguments) for _ in range(processes)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    return [child.exitcode for child in children]


def test_processes_that_start_together_share_one_file(folder, cache, tmp_path):
    log = tmp_path / "decoded"
    original = FileOriginal.decode_image

    def decode_image(self, size, content):
        time.sleep(0.01)  # so that the others come while it goes on
        with open(log, "a") as file:
            file.write("x")
        return original(self, size, content)

    def child():
        FileOriginal.decode_image = decode_image
        load(folder, cache)

    assert run_together(child) == [0, 0, 0]
    assert log.stat().st_size == COUNT
    assert len(blobs(cache)) == 1
    assert list((cache / "images").glob(".*.part")) == []


def test_a_killed_process_leaves_nothing_that_harms(folder, cache):
    def child():
        original = FileOriginal.decode_image

        def decode_image(self, size, content):
            if self.path.name == "0005.png":
                os.kill(os.getpid(), signal.SIGKILL)
            return original(self, size, content)

        FileOriginal.decode_image = decode_image
        load(folder, cache)

    assert run_together(child, processes=1) == [-signal.SIGKILL]
    assert blobs(cache) == []
    assert len(list((cache / "images").glob(".*.part"))) == 1
    assert len(pixels(load(folder, cache))) == COUNT
    assert list((cache / "images").glob(".*.part")) == []


def test_a_cache_that_cannot_be_written_is_kept_in_memory(folder, cache, tmp_path, caplog):
    expected = load(folder, cache)
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    data = load(folder, blocked / "cache")
    assert pixels(data) == pixels(expected)
    assert data.digest == expected.digest
    assert "kept in memory" in caplog.text and "not a directory" in caplog.text


@pytest.mark.parametrize("room", [10, 3000], ids=["not even the lock", "some images"])
def test_a_full_disk_is_no_end(folder, cache, caplog, room):
    """A limit on the size of files stands for the full disk: both fail in the middle of a write."""
    expected = pixels(load(folder, cache))
    shutil.rmtree(cache)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        data = load(folder, cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert pixels(data) == expected
    assert "cannot write the image cache" in caplog.text
    assert [path for path in (cache / "images").iterdir() if path.suffix != ".lock"] == []


def test_too_much_for_memory_is_an_error(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "MEMORY_LIMIT", 10_000)
    (tmp_path / "file").touch()
    with pytest.raises(AfterimageError, match="AFTERIMAGE_CACHE"):
        load(folder, tmp_path / "file")


def test_remembered_digests_that_cannot_be_read_are_taken_anew(folder, cache, caplog):
    first = load(folder, cache)
    (file,) = (cache / "digests").iterdir()
    whole = file.read_bytes()
    with np.load(file) as stored:
        table = stored["table"]
    others = []
    for arrays in (
        {"table": table[::-1]},
        {"table": np.zeros(3)},
        {"other": table},
        {"table": np.array([print])},
    ):
        np.savez(file, **arrays)
        others.append(file.read_bytes())
    flipped = whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1 :]
    for content in (b"", b"PK", whole[:-100], flipped, *others):
        file.write_bytes(content)
        caplog.clear()
        assert load(folder, cache).digest == first.digest
        assert "cannot be read" in caplog.text
        assert file.read_bytes() != content, "what was damaged is written again"


def test_a_broken_image_stays_an_error_and_costs_no_more_than_itself(folder, cache, work):
    whole = (folder / "0003.png").read_bytes()
    (folder / "0003.png").write_bytes(whole[:-40])
    for attempt in (0, 1):
        with pytest.raises(AfterimageError, match=r"0003\.png: is damaged"):
            load(folder, cache)
        assert len(work["decoded"]) == COUNT + attempt
    (folder / "0003.png").write_bytes(whole)
    assert len(pixels(load(folder, cache))) == COUNT
    assert work["decoded"][COUNT:] == ["0003.png", "0003.png"]


def test_progress_counts_to_the_end(folder, cache):
    seen: dict[str, list[tuple[int, int]]] = {}
    config = DataConfig(f"folder:{folder}", resize=24, crop=16)
    load_data(config, cache=cache, progress=lambda what, *counts: seen.setdefault(what, []).append(counts))
    assert seen.keys() == {"reading images", "decoding images"}
    for counts in seen.values():
        assert counts == [(done, COUNT) for done in range(1, COUNT + 1)]


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("AFTERIMAGE_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("AFTERIMAGE_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "afterimage"


def test_logging_is_visible_without_any_setup():
    assert logging.getLogger("afterimage").isEnabledFor(logging.WARNING)
