"""Split images into training, validation and test images by a seed and the images' ids alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from afterimage.config import AfterimageError
from afterimage.data.records import Original


@dataclass(frozen=True)
class Source:
    """Images of a source.

    Attributes:
        train: training images, from which splits that are None are taken
        validation: validation images, or None
        test: test images, or None
        root: folder of the files, or another name of the source
        notes: remarks on the files that are left out and on how the source is split
        pooled: folders whose images are pooled because their names give no split
    """

    train: Sequence[Original]
    validation: Sequence[Original] | None = None
    test: Sequence[Original] | None = None
    root: Path = Path("/")
    notes: tuple[str, ...] = ()
    pooled: tuple[str, ...] = ()


def shuffled(originals: Sequence[Original], seed: int) -> list[Original]:
    """Return images in the order of a split: by rank, then by a hash of the seed and the id.

    Raises:
        AfterimageError: two images have the same id
    """
    found = sorted(originals, key=lambda original: (original.rank, draw(seed, original.id), original.id))
    for first, second in pairwise(found):
        if first.id == second.id:
            raise AfterimageError(
                f"two images have one name: {first.name} and {second.name}; rename one of them"
            )
    return found


def take(originals: Sequence[Original], fraction: float, seed: int) -> tuple[list[Original], list[Original]]:
    """Take a fraction of the groups of images, at least one; most groups are single images.

    Returns:
        the images of these groups, and all others
    """
    groups = sorted({o.group for o in originals}, key=lambda group: (draw(seed, group), group))
    taken = set(groups[: max(1, round(fraction * len(groups)))])
    return [o for o in originals if o.group in taken], [o for o in originals if o.group not in taken]


def draw(seed: int, name: str) -> bytes:
    """Return the SHA-256 of a seed and a name, which decides an image's place in a split."""
    return hashlib.sha256(f"{seed}/{name}".encode()).digest()


def split(
    name: str, source: Source, validation_fraction: float, test_fraction: float | None, seed: int
) -> tuple[list[Original], list[Original], list[Original]]:
    """Divide the images of a source.

    Args:
        name: name of the source, for the error
        source: the source
        validation_fraction: share of validation images among the non-test images, if the source has no such split
        test_fraction: share of test images, if the source has no test split; None for no test images
        seed: seed of the split

    Returns:
        training, validation and test images

    Raises:
        AfterimageError: there are too few images, or two have the same id
    """
    train, validation, test = source.train, source.validation, source.test
    total, parts = len(train), ["training"]
    if test_fraction is None:
        test = []
    elif test is None:
        test, train = take(train, test_fraction, seed)
        parts.append("test")
    if validation is None:
        validation, train = take(train, validation_fraction, seed)
        parts.append("validation")
    if not train or not validation:
        raise AfterimageError(
            f"{name} has too few images to split into {', '.join(parts)}: it has {total}, "
            f"at least {len(parts)} are needed"
        )
    return shuffled(train, seed), shuffled(validation, seed), shuffled(test, seed)
