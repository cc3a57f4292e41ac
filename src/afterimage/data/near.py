"""Near-duplicates: test pictures that look like training or validation pictures, though their pixels differ."""

from __future__ import annotations

import numpy as np
from jaxtyping import UInt16
from PIL import Image

from afterimage.data.load import Data
from afterimage.data.pictures import Pictures
from afterimage.data.stream import StreamedPictures

BITS = 6
"""Pictures whose 64-bit hashes differ in no more bits are looked at more closely."""
DIFFERENCE = 0.04
"""Root mean square difference of two thumbnails, values in [0, 1], up to which they show the same picture."""
THUMBNAIL = 16
MOST = 100_000
SHOWN = 5

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
    more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return [f"near-duplicates between test and training pictures: {'; '.join(found[:SHOWN])}{more}"]


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
