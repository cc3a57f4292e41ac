"""Sample images: the split, the order of an epoch, and random crops, as pure functions of seeds.

A split depends on the seed and the images' ids alone. Orders and crops are hashes of a purpose, seed, epoch and image
index, so resuming a run, grouping runs or spreading them over processes changes nothing. That hash is the finaliser of
SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from afterimage.config import AfterimageError, format_count, join_names, printable_path, size_pair
from afterimage.data.originals import Original


@dataclass(frozen=True)
class Source:
    """Images of a source.

    Attributes:
        train: training images, from which splits that are None are taken
        validation: validation images, or None
        test: test images, or None
        root: folder of the files, or another name of the source
        notes: notes on the files that are left out and on how the source is split
        pooled: folders whose images are pooled because their names give no split
    """

    train: Sequence[Original]
    validation: Sequence[Original] | None = None
    test: Sequence[Original] | None = None
    root: Path = Path("/")
    notes: tuple[str, ...] = ()
    pooled: tuple[str, ...] = ()


def shuffled(originals: Sequence[Original], seed: int) -> list[Original]:
    """Return images in the order of a split: by priority, then by a hash of the seed and the id.

    Raises:
        AfterimageError: two images have the same id
    """
    found = sorted(
        originals, key=lambda original: (original.priority, split_hash(seed, original.id), original.id)
    )
    for first, second in pairwise(found):
        if first.id == second.id:
            raise AfterimageError(
                f"two images have one name: {first.name} and {second.name}; rename one of them"
            )
    return found


def split_off(
    originals: Sequence[Original], fraction: float, seed: int
) -> tuple[list[Original], list[Original]]:
    """Take a fraction of the groups of images, at least one; most groups are single images.

    Returns:
        the images of these groups, and all others
    """
    groups = sorted({o.group for o in originals}, key=lambda group: (split_hash(seed, group), group))
    taken = set(groups[: max(1, round(fraction * len(groups)))])
    return [o for o in originals if o.group in taken], [o for o in originals if o.group not in taken]


def split_hash(seed: int, name: str) -> bytes:
    """Return the SHA-256 of a seed and a name, which decides an image's position in a split."""
    return hashlib.sha256(f"{seed}/{name}".encode()).digest()


def split(
    name: str, source: Source, validation_fraction: float, test_fraction: float | None, seed: int
) -> tuple[list[Original], list[Original], list[Original]]:
    """Divide the images of a source into training, validation and test images.

    Args:
        name: name of the source, for the error
        source: the source
        validation_fraction: share of validation images among the non-test images, if the source has no such split
        test_fraction: share of test images, if the source has no test split; None for no test images
        seed: seed of the split

    Raises:
        AfterimageError: there are too few images, or two have the same id
    """
    train, validation, test = source.train, source.validation, source.test
    total, parts = len(train), ["training"]
    if test_fraction is None:
        test = []
    elif test is None:
        test, train = split_off(train, test_fraction, seed)
        parts.append("test")
    if validation is None:
        validation, train = split_off(train, validation_fraction, seed)
        parts.append("validation")
    if not train or not validation:
        raise AfterimageError(
            f"{name} has too few images to split into {', '.join(parts)}: it has {total}, "
            f"at least {len(parts)} are needed"
        )
    return shuffled(train, seed), shuffled(validation, seed), shuffled(test, seed)


TRAINING, VALIDATION, TEST = "training", "validation", "test"
SPLIT_WORDS = {
    TRAINING: ("train", "training", "trn", "trainset", "trainval"),
    VALIDATION: (
        "validation", "validate", "val", "valid", "dev", "devel", "development", "valset", "validset", "devset",
    ),
    TEST: ("test", "testing", "tst", "testset", "eval", "evaluation", "holdout"),
}  # fmt: skip
"""Words that name a split, alone or as a word of a longer name (`DIV2K_train_HR`, `val2017`)."""
SELF_EXPLANATORY_NAMES = frozenset(("train", "test", "validation", "val", "valid"))
"""Self-explanatory names of splits, for which no note is needed."""
IGNORED_WORDS = frozenset((
    "data", "dataset", "files", "folder", "image", "images", "img", "imgs", "jpeg", "jpg", "of", "photo", "photos",
    "picture", "pictures", "png", "set", "split",
))  # fmt: skip
"""Words that are ignored when names are matched: `train` and `test_images` belong to one data set."""
_PART = {word: part for part, words in SPLIT_WORDS.items() for word in words}
_TOKEN = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+|[^\W\d_]+")


def parse_split_name(name: str) -> tuple[str, tuple[str, ...]] | None:
    """Find the split that a name contains.

    Returns:
        `training`, `validation` or `test`, and the name's other words; None if it names no split, or several
    """
    tokens = [token.lower() for token in _TOKEN.findall(name)]
    parts = {_PART[token] for token in tokens if token in _PART}
    if parts == {TRAINING, VALIDATION}:  # train_val means all images that are not test images
        parts = {TRAINING}
    if len(parts) != 1:
        return None
    rest = (
        token for token in tokens if token not in _PART and token not in IGNORED_WORDS and not token.isdigit()
    )
    return parts.pop(), tuple(rest)


def split_names(names: Iterable[str]) -> dict[str, str]:
    """Find the names that belong to a split, and the split of each; none without training images and another split.

    Names belong together if their other words are the same: `DIV2K_train_HR` and `DIV2K_valid_HR`, but not
    `train_station` and `test_tube`. If the names without other words give a split, only they are used: for each part
    the name that is its first word in `SPLIT_WORDS`, or all of them if none is just a word.
    """
    families: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for name in sorted(names):
        if (read := parse_split_name(name)) is not None:
            families.setdefault(read[1], {}).setdefault(read[0], []).append(name)
    whole = {rest: parts for rest, parts in families.items() if TRAINING in parts and len(parts) > 1}
    if () in whole:
        whole = {(): {part: _exact_names(part, own) for part, own in whole[()].items()}}
    return {name: part for parts in whole.values() for part, own in parts.items() for name in own}


def _exact_names(part: str, names: Sequence[str]) -> list[str]:
    for word in SPLIT_WORDS[part]:
        if own := [name for name in names if name.lower() == word]:
            return own
    return list(names)


def nested_split(paths: Collection[tuple[str, ...]]) -> tuple[int, dict[str, str]] | None:
    """Find the first level of folders whose names give a split, and the split of each name there; None without one.

    A level counts if every folder one level up has a folder of the split in it: `bottle/train`, `bottle/test` and
    `cable/train` give a split, but no longer if images lie in a folder `other` beside `bottle` and `cable`. `paths` are
    the folders that hold images, each as its names from the top; level 0 is the uppermost.
    """
    for depth in range(max(map(len, paths), default=0)):
        parts = split_names({path[depth] for path in paths if len(path) > depth})
        named = {path[:depth] for path in paths if len(path) > depth and path[depth] in parts}
        if parts and named == {path[:depth] for path in paths}:
            return depth, parts
    return None


def pooled_names(paths: Collection[tuple[str, ...]]) -> list[str]:
    """List the folders whose images are pooled because their names give no split.

    These are the folders at the first level that has several; those whose names contain a split come first. `paths` are
    the folders that hold images, each as its names from the top.
    """
    for level in range(1, max(map(len, paths), default=0) + 1):
        folders = {path[:level] for path in paths}
        if len(folders) > 1:
            ordered = sorted(folders, key=lambda path: (not path or parse_split_name(path[-1]) is None, path))
            return ["/".join(path) or "." for path in ordered]
    return []


def file_extension(name: str) -> str:
    """Return a file's extension in lower case, or `without extension`."""
    extension = os.path.splitext(name)[1].lower()
    return extension if len(extension) > 1 else "without extension"


def ignored_files_note(others: Counter[str]) -> list[str]:
    """Return a note on files that are not read, by extension; empty if there are none."""
    kinds = sorted(others, key=lambda kind: (-others[kind], kind))
    told = join_names([f"{others[kind]:,} {printable_path(kind)}" for kind in kinds])
    return [f"left out: {format_count(others.total(), 'file')} not read: {told}"] if others else []


_MASK = 2**64 - 1
_ORDER, _CROP = 1, 2


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order of `n` images in an epoch, a permutation of 0 to n - 1 as `(n,)` int64."""
    return np.argsort(_hash(np.arange(n), _ORDER, seed, epoch), kind="stable")


def random_crop_positions(
    heights: np.ndarray,
    widths: np.ndarray,
    crop: int | tuple[int, int],
    indices: np.ndarray,
    seed: int,
    epoch: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw random crops, uniformly over all positions where they fit.

    Args:
        heights, widths: sides of each image in pixels
        crop: height and width of the crops in pixels, or the side of square crops
        indices: indices of the images
        seed, epoch: seed of the draws, and number of the epoch

    Returns:
        top and left in pixels, and whether to flip, for each image
    """
    bits = _hash(indices, _CROP, seed, epoch)
    high = (bits >> np.uint64(33)).astype(np.int64)
    low = ((bits >> np.uint64(2)) & np.uint64(2**31 - 1)).astype(np.int64)
    height, width = size_pair(crop)
    top = (high * (heights - height + 1)) >> 31
    left = (low * (widths - width + 1)) >> 31
    return top, left, (bits & np.uint64(1)).astype(bool)


def centre_crop_positions(
    heights: np.ndarray, widths: np.ndarray, crop: int | tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Return top and left of centre crops in pixels, rounded half to even as by torchvision's CenterCrop."""
    pairs = zip((heights, widths), size_pair(crop), strict=True)
    return tuple(np.rint((sides - side) / 2).astype(np.int64) for sides, side in pairs)


def fitting_sides(
    heights: np.ndarray | int, widths: np.ndarray | int, crop: tuple[int, int]
) -> np.ndarray | np.int64:
    """Return the shorter side of the largest box with the crop's aspect ratio in each image, in whole pixels.

    For square crops this is the image's shorter side.
    """
    height, width = crop
    short = min(crop)
    return np.minimum(heights * short // height, widths * short // width)


def _hash(numbers: Sequence[int] | np.ndarray, purpose: int, seed: int, epoch: int) -> np.ndarray:
    key = 0
    for part in (purpose, seed, epoch):
        key = int(_mix(np.array([(key ^ part) & _MASK], np.uint64))[0])
    return _mix(_mix(np.asarray(numbers).astype(np.uint64)) ^ np.uint64(key))


def _mix(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
