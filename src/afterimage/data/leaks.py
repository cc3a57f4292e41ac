"""No picture may both train and test: exact copies among the parts of a split."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from afterimage.config import AfterimageError
from afterimage.data.originals import Original
from afterimage.data.pictures import Pictures
from afterimage.data.stream import StreamedPictures

NAMES = ("training", "validation", "test")
SHOWN = 20


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
            for index, part, number in leaks[:SHOWN]
        ]
        more = f"\n  … and {count - SHOWN} more" if count > SHOWN else ""
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
        leaks += [(int(i), part, int(n)) for i, n in zip(indices[:SHOWN], numbers[:SHOWN], strict=True)]
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
