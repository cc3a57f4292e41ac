"""Folders and shards are taken for what their names say, and what is left out or pooled is said."""

import shutil

import pytest

from afterimage.config import AfterimageError, DataConfig
from afterimage.data.dataset import load_data
from afterimage.data.images import Data
from afterimage.data.sampling import (
    TEST,
    TRAINING,
    VALIDATION,
    nested_split,
    parse_split_name,
    pooled_names,
    split_names,
)
from afterimage.experiments.cost import training_images
from some_images import write_images
from some_shards import image_bytes, write_parquet, write_tar


def load(source, tmp_path, **settings) -> Data:
    config = DataConfig(str(source), **{"resize": 24, "crop": 16, **settings})
    return load_data(config, cache=tmp_path / "cache")


def write(root, folders: dict[str, int]) -> str:
    first = 0
    for name, count in folders.items():
        write_images(root / name, count, first=first)
        first += count
    return f"folder:{root}"


def places(data: Data) -> dict[str, set[str]]:
    """The folders that the images of each part come from."""
    parts = {TRAINING: data.train, VALIDATION: data.validation, TEST: data.test}
    return {part: {i.rpartition("/")[0] for i in sample_images.ids} for part, sample_images in parts.items()}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("train", (TRAINING, ())),
        ("Training", (TRAINING, ())),
        ("training_set", (TRAINING, ())),
        ("train2017", (TRAINING, ())),
        ("TRAIN", (TRAINING, ())),
        ("trainA", (TRAINING, ("a",))),
        ("TrainImages", (TRAINING, ())),
        ("DIV2K_train_HR", (TRAINING, ("div", "k", "hr"))),
        ("train_val", (TRAINING, ())),
        ("dev", (VALIDATION, ())),
        ("ILSVRC2012_img_val", (VALIDATION, ("ilsvrc",))),
        ("eval", (TEST, ())),
        ("test-00000-of-00002", (TEST, ())),
        ("train_test", None),
        ("trainer", None),
        ("untrained", None),
        ("contest", None),
        ("valley", None),
        ("devices", None),
        ("n01440764", None),
        ("", None),
    ],
)
def test_what_a_name_says(name, expected):
    assert parse_split_name(name) == expected


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("train test", "train test"),
        ("training testing", "training testing"),
        ("train dev", "train dev"),
        ("trn tst", "trn tst"),
        ("train eval", "train eval"),
        ("train2017 val2017 test2017 annotations", "train2017 val2017 test2017"),
        ("train test_images", "train test_images"),
        ("DIV2K_train_HR DIV2K_valid_HR", "DIV2K_train_HR DIV2K_valid_HR"),
        ("seg_train seg_test seg_pred", "seg_train seg_test"),
        ("trainA trainB testA testB", "trainA trainB testA testB"),
        # The plain name comes first, also of several words for one part.
        ("train test train_masks", "train test"),
        ("train test train_masks test_masks", "train test"),
        ("train train_2 test", "train test"),
        ("train eval test dev val", "train test val"),
        # One part alone, or names of different things, tell no split.
        ("train other", ""),
        ("test val", ""),
        ("train_station test_tube", ""),
        ("bus car train", ""),
        ("", ""),
    ],
)
def test_which_names_make_a_split(names, expected):
    assert set(split_names(names.split())) == set(expected.split())


def paths(text: str) -> set[tuple[str, ...]]:
    return {tuple(path.split("/")) for path in text.split()}


@pytest.mark.parametrize(
    ("found", "depth", "named"),
    [
        ("train/cat train/dog val/cat val/dog", 0, {"train", "val"}),
        ("images/train images/test", 1, {"train", "test"}),
        ("images images/train images/test", 1, {"train", "test"}),
        ("ILSVRC/Data/CLS/train/n1 ILSVRC/Data/CLS/val/n1", 3, {"train", "val"}),
        (
            "bottle/train/good bottle/test/broken cable/train/good cable/test/bent cable/masks",
            1,
            {"train", "test"},
        ),
        ("a/fold_train a/fold_test b/fold_train", 1, {"fold_train", "fold_test"}),
    ],
)
def test_nested_splits(found, depth, named):
    assert nested_split(paths(found)) == (depth, {n: parse_split_name(n)[0] for n in named})


@pytest.mark.parametrize("found", ["cat dog misc/train misc/test", "a/b c/d", ""])
def test_what_has_no_place_in_a_split_keeps_it_from_being_one(found):
    assert nested_split(paths(found)) is None


def test_pooled_folders_are_those_side_by_side():
    assert pooled_names(paths("a/b/cat a/b/dog a/b/dog/small")) == ["a/b/cat", "a/b/dog"]
    assert pooled_names(paths("cat dog misc/train misc/test")) == ["cat", "dog", "misc"]
    assert pooled_names(paths("images/all")) == pooled_names({()}) == pooled_names(set()) == []
    assert pooled_names({(), ("more",)}) == [".", "more"]


SPLITS = {
    "training": ("training", "testing"),
    "capitals": ("Training", "Testing"),
    "trn": ("trn", "tst"),
    "eval": ("train", "eval"),
    "div2k": ("DIV2K_train_HR", "DIV2K_test_HR"),
    "coco": ("train2017", "test2017"),
    "nested": ("images/train", "images/test"),
    "classes": ("data/training_set/cat", "data/test_set/cat"),
}


@pytest.mark.parametrize("kind", SPLITS)
def test_test_images_come_from_the_test_folder(tmp_path, kind):
    train, test = SPLITS[kind]
    source = write(tmp_path / "a", {train: 8, test: 4})
    data = load(source, tmp_path)
    assert places(data) == {TRAINING: {train}, VALIDATION: {train}, TEST: {test}}
    assert len(data.test) == 4
    (note,) = [note for note in data.notes if "split by the names" in note]
    names = [name.removesuffix("/cat") for name in (train, test)]
    assert (
        note == f"split by the names of folders: training images from {names[0]}; test images from {names[1]}"
    )
    assert not any("pooled" in note for note in data.notes)


def test_train_and_dev_is_a_split_whose_test_images_are_said_to_be_drawn(tmp_path):
    data = load(write(tmp_path / "a", {"train": 10, "dev": 4}), tmp_path)
    assert places(data) == {TRAINING: {"train"}, VALIDATION: {"dev"}, TEST: {"train"}}
    assert data.notes[-1] == (
        "no folder or split is named as a test split: test images are drawn at random from the training images"
    )
    other = load("procedural:9", tmp_path, test=f"folder:{tmp_path / 'a'}")
    assert places(other)[TEST] == {"train"}
    assert other.notes[-1].startswith("test images: their source has no test split")


def test_plain_names_say_nothing_and_what_lies_beside_is_said(tmp_path, caplog):
    folders = {"train/cat": 6, "val/cat": 2, "test/dog": 3}
    assert load(write(tmp_path / "a", folders), tmp_path).notes == () and caplog.text == ""
    write_images(tmp_path / "a" / "other" / "deep", 2, first=50)
    write_images(tmp_path / "a", 1, first=60)
    data = load(f"folder:{tmp_path / 'a'}", tmp_path)
    assert data.notes == (
        "left out beside the folders of the split: 3 images, 2 in other, 1 in the folder itself",
    )
    assert data.notes[0] in caplog.text


def test_pooled_folders_are_named(tmp_path):
    data = load(write(tmp_path / "a", {"train": 6, "portraits": 5, "more/x": 2}), tmp_path)
    assert data.notes == ("the images of 3 folders, train, more, portraits, are pooled and split at random",)
    only = load("procedural:9", tmp_path, test=f"folder:{tmp_path / 'a'}")
    assert len(only.test) == 13 and only.notes == ()  # all are test images: nothing is split
    many = load(write(tmp_path / "b", {f"class{n:02}": 1 for n in range(20)}), tmp_path)
    assert "20 folders, class00, class01, " in many.notes[0] and "and 12 more, are pooled" in many.notes[0]


def test_files_that_are_not_read_are_counted_by_kind(tmp_path, caplog):
    write_images(tmp_path / "a", 12)
    names = [
        "a.heic",
        "B.HEIC",
        "c.jxl",
        "photo",
        "IMG_0002",
        "notes.txt",
        "x.\nodd",
        ".hidden.heic",
        "labels.json",
    ]
    for number, name in enumerate(names):
        (tmp_path / "a" / name).write_text(str(number))
    first = load(f"folder:{tmp_path / 'a'}", tmp_path)
    note = "left out: 8 files not read: 2 .heic, 2 without extension, 1 .\\nodd, 1 .json, 1 .jxl, 1 .txt"
    assert note in first.notes and note in caplog.text
    assert load(f"folder:{tmp_path / 'a'}", tmp_path).notes == first.notes
    tested = load("procedural:9", tmp_path, test=f"folder:{tmp_path / 'a'}")
    assert tested.notes == (f"test images: {note}",)


def test_only_what_lies_in_the_folders_of_a_split_is_counted(tmp_path):
    source = write(tmp_path / "a", {"train": 8, "test": 3})
    for name in ("train/x.heic", "test/y.jxl", "readme.md"):
        (tmp_path / "a" / name).write_text("x")
    (tmp_path / "a" / "labels").mkdir()
    (tmp_path / "a" / "labels" / "z.xml").write_text("x")
    assert load(source, tmp_path).notes == ("left out: 2 files not read: 1 .heic, 1 .jxl",)


def test_an_empty_test_folder_is_an_error(tmp_path):
    source = write(tmp_path / "a", {"training": 8})
    (tmp_path / "a" / "testing").mkdir()
    with pytest.raises(AfterimageError, match=r"no images in .*testing or below"):
        load(source, tmp_path)
    # Folders that happen to have such words in their names, and hold no images, are no split.
    shutil.rmtree(tmp_path / "a" / "testing")
    for name in ("train_logs", "test_logs"):
        (tmp_path / "a" / name).mkdir()
    assert len(load(source, tmp_path).test) == 1


@pytest.mark.parametrize("kind", ["webdataset", "parquet"])
def test_shards_are_taken_for_what_their_names_say(tmp_path, kind):
    if kind == "webdataset":
        for number, name in enumerate(("train-000", "train-001", "val-000", "test-000")):
            content = {f"{n:03}.png": image_bytes(n) for n in range(5 * number, 5 * number + 5)}
            write_tar(tmp_path / "shards" / f"{name}.tar", content)
        source = f"webdataset:{tmp_path}/shards/*.tar"
    else:
        write_parquet(tmp_path / "shards", 4, 5, group=5)
        made = sorted((tmp_path / "shards").iterdir())
        for path, name in zip(made, ("train-0", "train-1", "validation-0", "test-0"), strict=True):
            path.rename(path.with_name(f"{name}-of-2.parquet"))
        source = f"parquet:{tmp_path}/shards/*.parquet"
    data = load(source, tmp_path)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [10, 5, 5]
    assert all("train" in name for name in data.train.ids) and all("test" in name for name in data.test.ids)
    (note,) = [note for note in data.notes if "split by the names of shards" in note]
    assert "training images from train-0" in note and "test images from test-0" in note
    assert training_images(data.config) == 10
    assert load(source, tmp_path).notes == data.notes


def test_other_members_of_shards_are_counted_at_every_start(tmp_path):
    content = {f"{n:03}.{kind}": image_bytes(n) for n in range(12) for kind in ("png", "heic")}
    content |= {"000.txt": b"x", ".hidden": b"x", "README": b"x"}
    path = write_tar(tmp_path / "x.tar", content)
    for _ in range(2):
        notes = load(f"webdataset:{path}", tmp_path).notes
        assert "left out: 14 files not read: 12 .heic, 1 .txt, 1 without extension" in notes
