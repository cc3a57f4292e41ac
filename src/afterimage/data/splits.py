"""Which image trains, which validates and which tests: a pure function of the seed and the ids."""

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
    """The images of a source; a part that is None is to be taken from `train`. Files lie below `root`.

    `notes` say what was left out and how the source is split; `pooled` are the folders that have no part in that.
    """

    train: Sequence[Original]
    validation: Sequence[Original] | None = None
    test: Sequence[Original] | None = None
    root: Path = Path("/")
    notes: tuple[str, ...] = ()
    pooled: tuple[str, ...] = ()


def shuffled(originals: Sequence[Original], seed: int) -> list[Original]:
    """The order of a split: each image's place depends on the seed and on its own id alone.

    Raises `AfterimageError` where two images have one id.
    """
    found = sorted(originals, key=lambda original: (original.rank, draw(seed, original.id), original.id))
    for first, second in pairwise(found):
        if first.id == second.id:
            raise AfterimageError(
                f"two images have one name: {first.name} and {second.name}; rename one of them"
            )
    return found


def take(originals: Sequence[Original], fraction: float, seed: int) -> tuple[list[Original], list[Original]]:
    """Part off a fraction of the groups (mostly of one image each), at least one; gives taken and left."""
    groups = sorted({o.group for o in originals}, key=lambda group: (draw(seed, group), group))
    taken = set(groups[: max(1, round(fraction * len(groups)))])
    return [o for o in originals if o.group in taken], [o for o in originals if o.group not in taken]


def draw(seed: int, name: str) -> bytes:
    """What decides an image's place in a split: SHA-256 of the seed and its id."""
    return hashlib.sha256(f"{seed}/{name}".encode()).digest()


def split(
    name: str, source: Source, validation_fraction: float, test_fraction: float | None, seed: int
) -> tuple[list[Original], list[Original], list[Original]]:
    """Train, validation and test images of a source; no test images where `test_fraction` is None."""
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
