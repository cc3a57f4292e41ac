"""Find images of one split that stand in another one, exactly or nearly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt16
from PIL import Image

from afterimage.config import AfterimageError
from afterimage.data.images import Data, Pictures, StreamedPictures
from afterimage.data.records import Original

NAMES = ("training", "validation", "test")
SHOWN_COPIES = 20


def check_copies(parts: Sequence[Sequence[Original]], pictures: Sequence[Pictures]) -> list[str]:
    """Raise where a test picture is also a training or validation picture; note all other exact copies.

    Two files that hold the same pixels hold the same picture; of streamed pictures, whose pixels are not at hand, two
    files that hold the same bytes.
    """
    streamed = any(isinstance(part, StreamedPictures) for part in pictures)
    copies, leaks, count = _same_bytes(pictures) if streamed else _same_pixels(pictures)
    if leaks:
        lines = [
            f"{parts[2][index].name} is {parts[part][number].name} ({NAMES[part]})"
            for index, part, number in leaks[:SHOWN_COPIES]
        ]
        more = f"\n  … and {count - SHOWN_COPIES} more" if count > SHOWN_COPIES else ""
        raise AfterimageError(
            f"{count} of the test pictures are trained or validated on too, which would falsify all "
            "scores; take one of each pair out:\n  " + "\n  ".join(lines) + more
        )
    notes = [
        f"exact copies of other pictures among the {len(pictures[part])} {NAMES[part]} pictures: {copies[part]}"
        for part in range(len(pictures))
        if copies[part]
    ]
    if streamed:
        notes.append("copies were looked for by the bytes of the pictures' files, not by their pixels")
    return notes


def shared(first: Pictures, second: Pictures) -> tuple[np.ndarray, np.ndarray]:
    """Which pictures of `first` are also in `second`, by their content's digest, and where there."""
    (own, others) = (_keys(part.digests) for part in (first, second))
    order = np.argsort(others, kind="stable")
    places = np.searchsorted(others, own, sorter=order).clip(max=max(0, len(order) - 1))
    if not len(order):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    hits = np.flatnonzero(others[order[places]] == own)
    return hits, order[places[hits]]


def _keys(digests: np.ndarray) -> np.ndarray:
    """The first 64 of 256 bits: two of a million pictures share them by chance once in 40 million data sets."""
    return np.ascontiguousarray(digests[:, :8]).view(np.uint64).reshape(-1)


def _same_bytes(pictures: Sequence[Pictures]) -> tuple[list[int], list[tuple[int, int, int]], int]:
    """How many pictures of each part are copies of earlier ones, and the first leaks: `(test, part, number)`."""
    keys = np.concatenate([_keys(part.digests) for part in pictures])
    first = np.zeros(len(keys), bool)
    first[np.unique(keys, return_index=True)[1]] = True
    ends = np.cumsum([len(part) for part in pictures])[:-1]
    copies = [int((~own).sum()) for own in np.split(first, ends)]
    leaks, count = [], 0
    for part in (0, 1):
        indices, numbers = shared(pictures[2], pictures[part])
        count += len(indices)
        leaks += [(int(i), part, int(n)) for i, n in zip(indices[:SHOWN_COPIES], numbers[:SHOWN_COPIES], strict=True)]
    return copies, leaks, count


def _same_pixels(pictures: Sequence[Pictures]) -> tuple[list[int], list[tuple[int, int, int]], int]:
    first: dict[tuple[int, ...], tuple[int, int]] = {}
    copies, leaks = [0, 0, 0], []
    for part, split_pictures in enumerate(pictures):
        for index, content in enumerate(split_pictures.content):
            *_, height, width, crc = split_pictures.blob.slots[content]
            earlier, number = first.setdefault((height, width, crc), (part, index))
            if (earlier, number) == (part, index):
                continue
            pixels = pictures[earlier].blob.picture(pictures[earlier].content[number])
            if not np.array_equal(split_pictures.blob.picture(content), pixels):
                continue
            copies[part] += 1
            if part == 2 and earlier != 2:
                leaks.append((index, earlier, number))
    return copies, leaks, len(leaks)


BITS = 6
"""Pictures whose 64-bit hashes differ in no more bits are looked at more closely."""
DIFFERENCE = 0.04
"""Root mean square difference of two thumbnails, values in [0, 1], up to which they show the same picture."""
THUMBNAIL = 16
MOST = 100_000
SHOWN_NEAR = 5

_ONES = np.array([number.bit_count() for number in range(2**16)], np.uint8)


def near_duplicates(data: Data) -> list[str]:
    """Notes on test pictures that are nearly training or validation pictures; empty where there are none.

    Candidates share their difference hash (dHash, Krawetz 2013, "Kind of like that") up to `BITS` of 64; of these
    count those whose 16x16 thumbnails agree, since smooth pictures of any colour share their hash. A copy that was
    compressed again, resized or toned a little is found; one that was cropped or mirrored is not. They are
    reported, not refused: frames of one scene may look as much alike.
    """
    if len(data.train) + len(data.validation) + len(data.test) > MOST:
        return [f"near-duplicates of test pictures were not looked for among more than {MOST:,} pictures"]
    if any(isinstance(part, StreamedPictures) for part in (data.train, data.validation, data.test)):
        return ["near-duplicates of test pictures were not looked for, since pictures are streamed"]
    own, found = _hashes(data.test), []
    for name, pictures in (("training", data.train), ("validation", data.validation)):
        others = _hashes(pictures)
        for i, hash_ in enumerate(own):
            for j in np.flatnonzero(_ONES[others ^ hash_].sum(1) <= BITS).tolist():
                if _difference(data.test, i, pictures, j) <= DIFFERENCE:
                    found.append(f"{data.test.ids[i]} and {name} picture {pictures.ids[j]}")
    if not found:
        return []
    more = f"; and {len(found) - SHOWN_NEAR} more" if len(found) > SHOWN_NEAR else ""
    return [f"near-duplicates between test and training pictures: {'; '.join(found[:SHOWN_NEAR])}{more}"]


def _hashes(pictures: Pictures) -> UInt16[np.ndarray, "n 4"]:
    """Whether each of 8x8 cells is brighter than the one to its left, 64 bits a picture."""
    small = [_small(pictures, index, (9, 8), "L").astype(np.int16) for index in range(len(pictures))]
    bits = [np.packbits(cells[:, 1:] > cells[:, :-1]).view(np.uint16) for cells in small]
    return np.stack(bits)


def _difference(pictures: Pictures, index: int, others: Pictures, other: int) -> float:
    pair = ((pictures, index), (others, other))
    first, second = (_small(p, i, (THUMBNAIL, THUMBNAIL), "RGB").astype(np.float32) / 255 for p, i in pair)
    return float(np.sqrt(np.mean((first - second) ** 2)))


def _small(pictures: Pictures, index: int, size: tuple[int, int], mode: str) -> np.ndarray:
    picture = Image.fromarray(pictures.blob.picture(pictures.content[index]).transpose(1, 2, 0))
    return np.asarray(picture.convert(mode).resize(size, Image.Resampling.BOX))
