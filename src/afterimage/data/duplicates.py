"""Find exact copies and near-duplicates of images between splits."""

from __future__ import annotations

import contextlib
import logging
import operator
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int64, UInt16
from PIL import Image

from afterimage.config import AfterimageError, join_names, printable_path
from afterimage.data.images import Data, ImageSet, content_digest
from afterimage.data.originals import Original
from afterimage.runs.files import read_json, write_json

logger = logging.getLogger("afterimage")

SPLIT_NAMES = ("training", "validation", "test")
SHOWN_COPIES = 20
MAX_HASH_DISTANCE = 6
"""Largest number of different bits between the 64-bit hashes of two images whose thumbnails are compared."""
MAX_THUMBNAIL_RMS = 0.04
"""Largest root mean square difference between thumbnails of near-duplicates, values in [0, 1]."""
THUMBNAIL = 16
"""Side of those thumbnails, in pixels."""
MAX_COMPARED_IMAGES = 100_000
"""Largest number of images among which near-duplicates are looked for: each is compared with every test image."""
SHOWN_NEAR = 5

_POPCOUNT = np.array([number.bit_count() for number in range(2**16)], np.uint8)


def check_copies(parts: Sequence[Sequence[Original]], images: Sequence[ImageSet]) -> list[str]:
    """Check that no test image is also a training or validation image, and count all other exact copies.

    Two images are equal if their pixels are. The files' bytes are compared instead if any split is streamed, as the
    pixels of streamed images are not kept. `parts` are the originals of the images of each split.

    Returns:
        notes on copies within splits and between training and validation images

    Raises:
        AfterimageError: a test image is also a training or validation image; the message names the pairs
    """
    streamed = any(part.streamed for part in images)
    keys = np.concatenate([_keys(part.digests) if streamed else _pixel_keys(part) for part in images])
    of = np.repeat(np.arange(len(images)), list(map(len, images)))
    number = np.concatenate([np.arange(len(part)) for part in images])
    _, first, place = np.unique(keys, return_index=True, return_inverse=True)
    earlier = first[place]

    def same(at: int) -> bool:
        return streamed or np.array_equal(*(_pixels(images[of[i]], number[i]) for i in (at, earlier[at])))

    found = [at for at in np.flatnonzero(earlier != np.arange(len(keys))).tolist() if same(at)]
    copies = np.bincount(of[found], minlength=len(images))
    leaks = [(at, earlier[at]) for at in found if of[at] == 2 and of[earlier[at]] != 2]
    if leaks:
        lines = [
            f"{parts[2][number[at]].name} is {parts[of[other]][number[other]].name} ({SPLIT_NAMES[of[other]]})"
            for at, other in leaks
        ]
        told = join_names(lines, SHOWN_COPIES, "\n  ")
        raise AfterimageError(
            f"{len(leaks)} of the test images are also training or validation images, which would falsify all "
            f"scores; remove one image of each pair:\n  {told}"
        )
    notes = [
        f"exact copies of other images among the {len(images[part])} {SPLIT_NAMES[part]} images: {copies[part]}"
        for part in range(len(images))
        if copies[part]
    ]
    if streamed:
        notes.append("copies were looked for by the bytes of the images' files, not by their pixels")
    return notes


def shared_indices(images: ImageSet, others: ImageSet) -> Int64[np.ndarray, " shared"]:
    """Return the indices in `images` of those that `others` holds too, by the digests of their contents."""
    return np.flatnonzero(np.isin(_keys(images.digests), _keys(others.digests)))


def _keys(digests: np.ndarray) -> np.ndarray:
    """Return the first 64 bits of each digest: only one of 40 million data sets of a million images has two alike."""
    return np.ascontiguousarray(digests[:, :8]).view(np.uint64).reshape(-1)


def _pixel_keys(images: ImageSet) -> np.ndarray:
    """Return a number for each image: equal for equal pixels, and nearly always different for different ones."""
    slots = [images.blob.slots[content] for content in images.content_digests]
    return np.array([(s.crc << 32) ^ (s.height << 16) ^ s.width for s in slots], np.uint64)


def _pixels(images: ImageSet, index: int | np.integer) -> np.ndarray:
    return images.blob.image(images.content_digests[index])


def check_split(data: Data) -> None:
    """Check that no image is both a test image and a training or validation image, by the digests of their contents.

    Raises:
        AfterimageError: an image is in both; the message names it
    """
    for name, images in (("training", data.train), ("validation", data.validation)):
        for place in shared_indices(images, data.test)[:1]:
            tested = data.test.ids[data.test.content_digests.index(images.content_digests[place])]
            raise AfterimageError(
                f"test image {tested} is also {name} image {images.ids[place]}, which would falsify all scores"
            )


def near_duplicates(data: Data, cache: Path | None = None) -> list[str]:
    """Return notes on near-duplicates of test images among the training and validation images.

    Candidates are pairs whose difference hashes (dHash, Krawetz 2013, "Kind of like that") differ in at most
    `MAX_HASH_DISTANCE` of 64 bits. A pair counts if its 16x16 thumbnails agree too, since smooth images of any colour
    share their hash. This finds copies that were compressed again, resized or toned a little, but not cropped or
    mirrored ones. Pairs are reported and not refused, because frames of one scene may look equally alike.

    Args:
        data: the three splits
        cache: folder that stores the pairs, so that the same images are compared only once; None stores nothing

    Returns:
        the notes; empty if there are no near-duplicates
    """
    if len(data.train) + len(data.validation) + len(data.test) > MAX_COMPARED_IMAGES:
        return [
            f"near-duplicates of test images were not looked for among more than {MAX_COMPARED_IMAGES:,} images"
        ]
    if any(part.streamed for part in (data.train, data.validation, data.test)):
        return ["near-duplicates of test images were not looked for, since images are streamed"]
    parts = (data.train, data.validation, data.test)
    digest = content_digest(data.config, [part.content_digests for part in parts])
    named = f"{digest}-{MAX_HASH_DISTANCE}-{MAX_THUMBNAIL_RMS:g}.json"
    path = None if cache is None else cache / "near-duplicates" / named
    pairs = None if path is None or not path.exists() else _read_cached_pairs(path, data)
    if pairs is None:
        pairs = _near_pairs(data.test, parts[:2])
        if path is not None:
            with contextlib.suppress(AfterimageError):  # without the file, the next run searches again
                write_json(path, {"pairs": pairs})
    if not pairs:
        return []
    told = [f"{data.test.ids[i]} and {SPLIT_NAMES[p]} image {parts[p].ids[j]}" for p, i, j in pairs]
    return [f"near-duplicates of test images: {join_names(told, SHOWN_NEAR, '; ')}"]


def _read_cached_pairs(path: Path, data: Data) -> list[tuple[int, int, int]] | None:
    """Read the pairs that an earlier search stored; None, with a warning, if the file is damaged."""
    try:
        pairs = [tuple(map(operator.index, pair)) for pair in read_json(path)["pairs"]]
        sizes = (len(data.train), len(data.validation))
        if not all(p in (0, 1) and i in range(len(data.test)) and j in range(sizes[p]) for p, i, j in pairs):
            raise ValueError("a pair names an image that does not exist")
        return pairs
    except (AfterimageError, LookupError, TypeError, ValueError) as error:
        logger.warning(
            "the near-duplicates in %s cannot be read (%s) and are searched for again",
            printable_path(path),
            error,
        )
        return None


def _near_pairs(test: ImageSet, others: Sequence[ImageSet]) -> list[tuple[int, int, int]]:
    """Find near-duplicates: tuples of the index in `others`, the test image's index and the other image's index."""
    own, found = _hashes(test), []
    for part, images in enumerate(others):
        hashes = _hashes(images)
        for i, hash_ in enumerate(own):
            for j in np.flatnonzero(_POPCOUNT[hashes ^ hash_].sum(1) <= MAX_HASH_DISTANCE).tolist():
                if _difference(test, i, images, j) <= MAX_THUMBNAIL_RMS:
                    found.append((part, i, j))
    return found


def _hashes(images: ImageSet) -> UInt16[np.ndarray, "n 4"]:
    """Compute difference hashes: one bit for each of 8x8 cells, set if it is brighter than its left neighbour."""
    small = [_small(images, index, (9, 8), "L").astype(np.int16) for index in range(len(images))]
    return np.stack([np.packbits(cells[:, 1:] > cells[:, :-1]).view(np.uint16) for cells in small])


def _difference(images: ImageSet, index: int, others: ImageSet, other: int) -> float:
    pair = ((images, index), (others, other))
    first, second = (_small(p, i, (THUMBNAIL, THUMBNAIL), "RGB").astype(np.float32) / 255 for p, i in pair)
    return float(np.sqrt(np.mean((first - second) ** 2)))


def _small(images: ImageSet, index: int, size: tuple[int, int], mode: str) -> np.ndarray:
    # Merging channels is several times as fast as turning the pixels to (height, width, 3).
    image = Image.merge("RGB", [Image.fromarray(channel) for channel in _pixels(images, index)])
    return np.asarray(image.convert(mode).resize(size, Image.Resampling.BOX))
