"""Which images a source has, how they are split, and what is refused."""

import os
import shutil
from dataclasses import asdict
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afterimage.config import AfterimageError, DataConfig
from afterimage.data.dataset import load_data
from afterimage.data.decode import BadImage
from afterimage.data.originals import FileDigests, FileOriginal, Original, PartOriginal
from afterimage.data.sampling import Source, shuffled, split, split_off
from afterimage.data.sources import dead_leaves as procedural
from afterimage.data.sources import read_source
from afterimage.data.sources.dead_leaves import DeadLeaves, dead_leaves
from afterimage.data.sources.folder import read_folder
from afterimage.data.sources.sample_images import read_photographs
from some_images import some_image, write_images
from source_contract import SourceContract


class Named(Original):
    def __init__(self, id: str, of: str | None = None) -> None:
        self.id, self._of = id, of or id

    @property
    def group(self) -> str:
        return self._of

    def content(self, digests, size):
        raise AssertionError("a split does not look into images")

    decode_image = content


def ids(originals) -> list[str]:
    return [original.id for original in originals]


def load(source: str, tmp_path, **settings):
    config = DataConfig(source, **{"resize": 24, "crop": 16, **settings})
    return load_data(config, cache=tmp_path / "cache")


class TestFolder(SourceContract):
    @pytest.fixture
    def source(self, tmp_path):
        write_images(tmp_path / "images", 10)
        write_images(tmp_path / "images" / "more", 6, first=10)
        return f"folder:{tmp_path / 'images'}"


class TestSampleImages(SourceContract):
    @pytest.fixture
    def source(self):
        return "photographs"


class TestDeadLeaves(SourceContract):
    @pytest.fixture
    def source(self):
        return "procedural:8"


# Splits


@given(st.sets(st.text(max_size=6), min_size=4, max_size=40), st.integers(), st.randoms())
@settings(deadline=None, max_examples=25)
def test_a_split_parts_everything_and_forgets_the_order(names, seed, random):
    listed = sorted(names)
    parts = split("x", Source([Named(name) for name in listed]), 0.2, 0.1, seed)
    assert sorted(name for part in parts for name in ids(part)) == listed
    assert len(parts[2]) == max(1, round(0.1 * len(names)))
    random.shuffle(listed)
    again = split("x", Source([Named(name) for name in listed]), 0.2, 0.1, seed)
    assert list(map(ids, parts)) == list(map(ids, again))


def test_the_split_of_the_study():
    numbers = [Named(f"{number:04d}") for number in range(1, 901)]
    source = Source(numbers[:800], None, numbers[800:])
    train, validation, test = split("div2k", source, 0.2, 0.1, 42)
    assert (len(train), len(validation), len(test)) == (640, 160, 100)
    # A later version must not train on what an earlier one validated on.
    assert ids(train)[:4] == ["0529", "0610", "0761", "0249"]
    assert sorted(ids(validation))[:4] == ["0001", "0009", "0023", "0027"]
    assert ids(split("div2k", source, 0.2, 0.1, 43)[0]) != ids(train)


def test_another_image_does_not_shuffle_the_others():
    numbers = [Named(f"{number}") for number in range(50)]
    order = ids(shuffled(numbers[:49], 42))
    assert [name for name in ids(shuffled(numbers, 42)) if name != "49"] == order


@given(st.lists(st.integers(1, 4), min_size=3, max_size=12), st.integers())
@settings(deadline=None, max_examples=30)
def test_a_group_stays_together(sizes, seed):
    originals = [Named(f"{g}-{n}", f"{g}") for g, size in enumerate(sizes) for n in range(size)]
    taken, left = split_off(originals, 0.3, seed)
    assert taken
    assert not {o.group for o in taken} & {o.group for o in left}
    assert len(taken) + len(left) == len(originals)


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_images_to_split(tmp_path, count):
    write_images(tmp_path / "a", count)
    with pytest.raises(AfterimageError, match=f"too few images.* has {count}, at least 3"):
        load(f"folder:{tmp_path / 'a'}", tmp_path)


def test_three_images_are_enough(tmp_path):
    write_images(tmp_path / "a", 3)
    data = load(f"folder:{tmp_path / 'a'}", tmp_path)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [1, 1, 1]


# Folders


def test_a_folder_is_read_to_any_depth(tmp_path):
    write_images(tmp_path / "b" / "c", 1)
    some_image(7).save(tmp_path / "A.JPG")
    write_images(tmp_path / ".hidden", 1)
    write_images(tmp_path / "__MACOSX", 1)
    for name in ("README.md", "labels.txt", "a.json", ".DS_Store", "._A.jpg", "no_extension"):
        (tmp_path / name).write_text("x")
    source = read_folder(str(tmp_path))
    assert ids(source.train) == ["A.JPG", "b/c/0000.png"]
    assert source.validation is None and source.test is None


def test_a_folder_with_its_own_splits(tmp_path):
    for number, name in enumerate(("Train/x", "test", "val", "other")):
        write_images(tmp_path / name, 2, first=2 * number)
    source = read_folder(str(tmp_path))
    assert ids(source.train) == ["Train/x/0000.png", "Train/x/0001.png"]
    assert ids(source.test) == ["test/0002.png", "test/0003.png"]
    assert ids(source.validation) == ["val/0004.png", "val/0005.png"]
    shutil.rmtree(tmp_path / "test")
    assert read_folder(str(tmp_path)).test is None
    assert len(read_folder(str(tmp_path)).validation) == 2


def test_train_and_test_folders_leave_the_test_images_alone(tmp_path):
    write_images(tmp_path / "a" / "train", 10)
    write_images(tmp_path / "a" / "test", 3, first=10)
    data = load(f"folder:{tmp_path / 'a'}", tmp_path)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [8, 2, 3]
    assert sorted(data.test.ids) == ["test/0010.png", "test/0011.png", "test/0012.png"]


def test_links_are_followed_and_loops_end(tmp_path):
    write_images(tmp_path / "elsewhere", 2)
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "a" / "b" / "loop").symlink_to(tmp_path / "a")
    assert ids(read_folder(str(tmp_path / "a")).train) == ["linked/0000.png", "linked/0001.png"]


def test_odd_names_have_ids_that_can_be_written(tmp_path):
    names = [b"\xff.png", b"\\xff.png", b"a b\n<script>.png", "ünïcödé ☕.png".encode()]
    for number, name in enumerate(names):
        some_image(number).save(os.fsdecode(bytes(tmp_path) + b"/" + name), "PNG")
    found = ids(read_folder(str(tmp_path)).train)
    assert len(set(found)) == len(names)
    assert all(name.isprintable() and name.encode() for name in found)
    assert len(load(f"folder:{tmp_path}", tmp_path).train) == 2


def test_an_empty_folder_says_what_was_looked_for(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "photo.heic").write_text("x")
    with pytest.raises(AfterimageError, match=r"no images in .*\.jpg, .* found only 1 \.txt, 1 \.heic"):
        read_folder(str(tmp_path))
    for missing in (str(tmp_path / "missing"), "~nobody-at-all/images"):
        with pytest.raises(AfterimageError, match="no such file"):
            read_folder(missing)
    with pytest.raises(AfterimageError, match="not a directory"):
        read_folder(str(tmp_path / "notes.txt"))


def test_all_broken_files_are_listed_before_anything_begins(tmp_path):
    folder = tmp_path / "a"
    write_images(folder, 5)
    for number in range(30):
        (folder / f"broken{number:02d}.png").write_bytes(b"" if number % 2 else b"no image")
    (folder / "a dangling.jpg").symlink_to("nowhere")
    with pytest.raises(AfterimageError) as error:
        load(f"folder:{folder}", tmp_path)
    lines = str(error.value).splitlines()
    assert lines[0].startswith("31 images cannot be read")
    assert len(lines) == 22 and lines[-1].strip() == "and 11 more"
    assert any("is empty" in line for line in lines) and any("no such file" in line for line in lines)


def test_one_broken_file_is_named(tmp_path):
    write_images(tmp_path / "a", 5)
    content = (tmp_path / "a" / "0003.png").read_bytes()
    (tmp_path / "a" / "0003.png").write_bytes(content[:-40])
    with pytest.raises(AfterimageError, match=r"0003\.png: is damaged"):
        load(f"folder:{tmp_path / 'a'}", tmp_path)


# Copies


def test_a_test_image_to_train_on_is_an_error_that_names_both(tmp_path):
    folder = tmp_path / "a"
    write_images(folder / "train", 6)
    write_images(folder / "test", 2, first=6)
    shutil.copy(folder / "train" / "0002.png", folder / "test" / "copy.png")
    with pytest.raises(AfterimageError, match=r"1 of the test(.|\n)*test/copy\.png is .*train/0002\.png"):
        load(f"folder:{folder}", tmp_path)


def test_the_same_pixels_in_another_file_are_the_same_image(tmp_path):
    write_images(tmp_path / "a", 6)
    (tmp_path / "b").mkdir()
    some_image(2).save(tmp_path / "b" / "copy.bmp")
    some_image(50).save(tmp_path / "b" / "other.bmp")
    with pytest.raises(AfterimageError, match=r"copy\.bmp is .*0002\.png"):
        load(f"folder:{tmp_path / 'a'}", tmp_path, test=f"folder:{tmp_path / 'b'}")


def test_copies_within_a_split_are_noted(tmp_path):
    folder = tmp_path / "a"
    write_images(folder / "train", 6)
    write_images(folder / "val", 2, first=6)
    write_images(folder / "test", 2, first=8)
    shutil.copy(folder / "train" / "0002.png", folder / "train" / "copy.png")
    data = load(f"folder:{folder}", tmp_path)
    assert len(data.train) == 7
    assert data.notes == ("exact copies of other images among the 7 training images: 1",)


# Names of sources


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("div2", "did you mean"),
        ("photos", "Valid: folder:PATH"),
        ("photographs:3", "unknown source"),
        ("folder:", "Valid: folder:PATH"),
        ("", "unknown source"),
        ("procedural:0", "between 1 and"),
        ("procedural:many", "between 1 and"),
        ("procedural:99999999999999999999", "between 1 and"),
        ("div2k:/nowhere", "no folder /nowhere"),
    ],
)
def test_unknown_sources(name, message, tmp_path):
    with pytest.raises(AfterimageError, match=message):
        read_source(name, {"train"}, tmp_path)


def test_a_path_alone_is_told_how_to_be_a_source(tmp_path):
    with pytest.raises(AfterimageError, match=f"did you mean 'folder:{tmp_path}'"):
        read_source(str(tmp_path), {"train"}, tmp_path)


def test_the_description_is_complete(tmp_path):
    data = load("procedural:10", tmp_path, test="photographs")
    assert asdict(data.describe()) == {
        "source": "procedural:10",
        "test": "photographs",
        "digest": data.digest,
        "test_digest": data.test_digest,
        "train": 8,
        "validation": 2,
        "test_images": 18,
        "resize": 24,
        "crop": 16,
    }


def test_the_test_digest_is_of_the_test_images_as_they_are_scored(tmp_path):
    first = load("procedural:10", tmp_path, test="photographs").test_digest
    assert load("procedural:20", tmp_path, test="photographs").test_digest == first
    others = [
        load("procedural:10", tmp_path, test="procedural:10"),
        load("procedural:10", tmp_path, test="photographs", crop=12),
        load("procedural:10", tmp_path, test="photographs", limit_test=5),
    ]
    assert len({first, *(data.test_digest for data in others)}) == 4


def test_the_digest_is_of_contents_and_split(tmp_path):
    write_images(tmp_path / "a", 10)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first = load(f"folder:{tmp_path / 'a'}", tmp_path).digest
    assert load(f"folder:{tmp_path / 'b'}", tmp_path).digest == first
    assert load(f"folder:{tmp_path / 'a'}", tmp_path, resize=25).digest != first
    some_image(77).save(tmp_path / "b" / "0003.png")
    assert load(f"folder:{tmp_path / 'b'}", tmp_path).digest != first


# Photographs


def test_the_photographs_of_scikit_image():
    source = read_photographs()
    assert len(source.train) == 18
    assert len(set(ids(source.train))) == 18
    first = ids(shuffled(source.train, 42))[:8]
    assert sorted(first) == [
        "astronaut", "cat", "coffee", "deep-field", "motorcycle", "retina", "rocket", "tissue",
    ]  # fmt: skip


def test_parts_of_a_photograph_lie_side_by_side(tmp_path):
    from skimage import io

    data = load("procedural:3", tmp_path, test="photographs", resize=256, crop=224)
    whole = io.imread(next(o.path for o in read_photographs().train if o.id == "astronaut"))
    part = data.test.full_image(data.test.ids.index("astronaut-part-2")).permute(1, 2, 0).numpy()
    assert np.array_equal(part, whole[:256, 256:])


def test_parts_never_leave_their_photograph(tmp_path):
    data = load("photographs", tmp_path)
    parts = (data.train, data.validation, data.test)
    of = [{name.split("-part-")[0] for name in part.ids} for part in parts]
    assert not (of[0] & of[1] or of[0] & of[2] or of[1] & of[2])


def test_a_part_of_a_file_that_has_changed_is_refused(tmp_path):
    some_image(0).save(tmp_path / "a.png")
    part = PartOriginal("a-part-1", FileOriginal("a", tmp_path, "a.png"), (0, 0, 2, 1))
    content = part.content(FileDigests(tmp_path, tmp_path), 32).sha256
    part.decode_image(32, content)
    some_image(1).save(tmp_path / "a.png")
    with pytest.raises(BadImage, match=r"a\.png: changed since it was first read"):
        part.decode_image(32, content)


# Procedural images


def test_dead_leaves_are_a_pure_function_of_their_numbers():
    first = np.asarray(dead_leaves(0, 1, 60, 48))
    assert first.shape == (48, 60, 3)
    assert np.array_equal(first, dead_leaves(0, 1, 60, 48))
    for other in ((0, 2), (1, 1)):
        assert not np.array_equal(first, dead_leaves(*other, 60, 48))


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (7, 300), (20, 16)])
def test_dead_leaves_of_any_size(size):
    assert dead_leaves(0, 0, *size).size == size


def test_dead_leaves_have_the_statistics_of_photographs():
    grey = np.stack([np.asarray(dead_leaves(0, n, 160, 128).convert("L"), float)[:, :128] for n in range(24)])
    window = np.outer(np.hanning(128), np.hanning(128))
    grey -= grey.mean((1, 2), keepdims=True)
    power = (np.abs(np.fft.fft2(grey * window)) ** 2).mean(0)
    frequency = np.hypot(np.fft.fftfreq(128)[:, None], np.fft.fftfreq(128))
    bands = np.geomspace(0.03, 0.35, 9)
    means = [power[(frequency >= a) & (frequency < b)].mean() for a, b in pairwise(bands)]
    slope = np.polyfit(np.log(np.sqrt(bands[1:] * bands[:-1])), np.log(means), 1)[0]
    assert -3 < slope < -1.8
    # Edges are rare and strong: differences between neighbours are far from Gaussian (kurtosis 3).
    steps = np.diff(grey, axis=2)
    assert (steps**4).mean() / (steps**2).mean() ** 2 > 8
    assert grey.std() > 30


def test_leaf_radii_fall_as_their_third_power():
    random = np.random.default_rng(0)
    slopes = []
    for _ in range(10):
        radii = procedural._radii(random, 320, 256)
        # Large leaves reach in from further away: seen over the whole plane they are rarer by as much.
        weights = 1 / ((320 + 2 * radii) * (256 + 2 * radii))
        edges = np.geomspace(radii.min(), 60, 9)
        density = np.histogram(radii, edges, weights=weights)[0] / np.diff(edges)
        middles = np.sqrt(edges[1:] * edges[:-1])
        slopes.append(np.polyfit(np.log(middles), np.log(density), 1)[0])
    assert abs(np.mean(slopes) + 3) < 0.15


def test_procedural_images_to_test_on_are_others_than_those_to_train_on(tmp_path):
    data = load("procedural:6", tmp_path, test="procedural:6")
    assert not set(data.test.ids) & set(data.train.ids + data.validation.ids)
    assert data.train.ids == load("procedural:6", tmp_path, test="photographs").train.ids
    assert DeadLeaves(0, 3).decode_image(24, "").size == (30, 24)
