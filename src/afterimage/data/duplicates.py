"""Find exact copies and near-duplicates of images between splits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64, UInt16
from PIL import Image

from afterimage.config import AfterimageError, listed
from afterimage.data.images import Data, ImageSet
from afterimage.data.records import Original

NAMES = ("training", "validation", "test")
SHOWN_COPIES = 20
BITS = 6
"""Largest number of different bits between the 64-bit hashes of two images whose thumbnails are compared."""
DIFFERENCE = 0.04
"""Largest root mean square difference between thumbnails of near-duplicates, values in [0, 1]."""
THUMBNAIL = 16
"""Side of those thumbnails, in pixels."""
MOST = 100_000
"""Largest number of images among which near-duplicates are looked for: each is compared with every test image."""
SHOWN_NEAR = 5

_ONES = np.array([number.bit_count() for number in range(2**16)], np.uint8)


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
            f"{parts[2][number[at]].name} is {parts[of[other]][number[other]].name} ({NAMES[of[other]]})"
            for at, other in leaks
        ]
        told = listed(lines, SHOWN_COPIES, "\n  ")
        raise AfterimageError(
            f"{len(leaks)} of the test images are trained or validated on too, which would falsify all "
            f"scores; take one of each pair out:\n  {told}"
        )
    notes = [
        f"exact copies of other images among the {len(images[part])} {NAMES[part]} images: {copies[part]}"
        for part in range(len(images))
        if copies[part]
    ]
    if streamed:
        notes.append("copies were looked for by the bytes of the images' files, not by their pixels")
    return notes


def shared(images: ImageSet, others: ImageSet) -> Int64[np.ndarray, " shared"]:
    """Return the indices in `images` of those that `others` holds too, by the digests of their contents."""
    return np.flatnonzero(np.isin(_keys(images.digests), _keys(others.digests)))


def _keys(digests: np.ndarray) -> np.ndarray:
    """Return the first 64 of 256 bits: two of a million images share them by chance once in 40 million data sets."""
    return np.ascontiguousarray(digests[:, :8]).view(np.uint64).reshape(-1)


def _pixel_keys(images: ImageSet) -> np.ndarray:
    """Return a number for each image: equal for equal pixels, and nearly always different for different ones."""
    slots = [images.blob.slots[content] for content in images.content]
    return np.array([(s.crc << 32) ^ (s.height << 16) ^ s.width for s in slots], np.uint64)


def _pixels(images: ImageSet, index: int | np.integer) -> np.ndarray:
    return images.blob.image(images.content[index])


def check_split(data: Data) -> None:
    """Check that no image is both a test image and a training or validation image, by the digests of their contents.

    Raises:
        AfterimageError: an image is in both; the message names it
    """
    for name, images in (("training", data.train), ("validation", data.validation)):
        for place in shared(images, data.test)[:1]:
            tested = data.test.ids[data.test.content.index(images.content[place])]
            raise AfterimageError(
                f"test image {tested} is also {name} image {images.ids[place]}, which would falsify all scores"
            )


def near_duplicates(data: Data) -> list[str]:
    """Return notes on near-duplicates of test images among the training and validation images.

    Candidates are pairs whose difference hashes (dHash, Krawetz 2013, "Kind of like that") differ in at most `BITS` of
    64 bits. A pair counts if its 16x16 thumbnails agree too, since smooth images of any colour share their hash. This
    finds copies that were compressed again, resized or toned a little, but not cropped or mirrored ones. Pairs are
    reported and not refused, because frames of one scene may look equally alike.
    """
    others = dict(zip(NAMES, (data.train, data.validation), strict=False))
    if len(data.train) + len(data.validation) + len(data.test) > MOST:
        return [f"near-duplicates of test images were not looked for among more than {MOST:,} images"]
    if any(part.streamed for part in (*others.values(), data.test)):
        return ["near-duplicates of test images were not looked for, since images are streamed"]
    own, pairs = _hashes(data.test), []
    for name, images in others.items():
        hashes = _hashes(images)
        for i, hash_ in enumerate(own):
            for j in np.flatnonzero(_ONES[hashes ^ hash_].sum(1) <= BITS).tolist():
                if _difference(data.test, i, images, j) <= DIFFERENCE:
                    pairs.append(f"{data.test.ids[i]} and {name} image {images.ids[j]}")
    if not pairs:
        return []
    return [f"near-duplicates of test images: {listed(pairs, SHOWN_NEAR, '; ')}"]


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
