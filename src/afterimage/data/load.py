"""From a `DataConfig` to the pictures that train, validate and test."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from afterimage.config import AfterimageError, DataConfig
from afterimage.data.cache import cached
from afterimage.data.decode import VERSION, BadPicture
from afterimage.data.digests import FileDigests
from afterimage.data.originals import Original, broken_pictures
from afterimage.data.parallel import Progress, in_parallel
from afterimage.data.pictures import Pictures
from afterimage.data.sources import read_source
from afterimage.data.split import shuffled, split

_NAMES = ("training", "validation", "test")


@dataclass(frozen=True, eq=False)
class Data:
    """The pictures of a run.

    `digest` is a SHA-256 over the pictures' contents, their split and their size; paths have no part in it.
    `notes` are sentences for whoever reads the results.
    """

    config: DataConfig
    train: Pictures
    validation: Pictures
    test: Pictures
    digest: str
    notes: tuple[str, ...] = ()

    def describe(self) -> dict[str, Any]:
        """What a run's summary says of its data, as plain JSON values."""
        return {
            "source": self.config.source,
            "test": self.config.test,
            "digest": self.digest,
            "train": len(self.train),
            "validation": len(self.validation),
            "test_pictures": len(self.test),
            "resize": self.config.resize,
            "crop": self.config.crop,
        }


def default_cache() -> Path:
    """`AFTERIMAGE_CACHE`, else `~/.cache/afterimage`."""
    folder = os.environ.get("AFTERIMAGE_CACHE")
    return Path(os.path.expanduser(folder)) if folder else Path(os.path.expanduser("~/.cache/afterimage"))


def load_data(
    config: DataConfig, *, cache: str | Path | None = None, progress: Progress | None = None
) -> Data:
    """Find, split, decode and check the pictures that a config names.

    `cache` is the folder of the decode-once cache (default: `default_cache()`); `progress` is called with
    (what, done, total). Of a source that only tests, its own test split is used where it has one, else all of
    it. Raises an `AfterimageError` that names the file, the source or the counts where pictures are missing,
    broken or too few, and where a test picture is also a training or validation picture.
    """
    folder = Path(os.path.expanduser(cache)) if cache is not None else default_cache()
    seed, own = config.split_seed, not config.test
    source = read_source(config.source, {"train", "test"} if own else {"train"}, folder, progress)
    fractions = config.validation_fraction, config.test_fraction if own else None
    train, validation, test = split(config.source, source, *fractions, seed)
    parts = [train[: config.limit_train], validation[: config.limit_validation]]
    if own:
        parts.append(test[: config.limit_test])
        pictures = _decode(parts, source.root, config, folder, progress)
    else:
        other = read_source(config.test, {"test"}, folder, progress)
        test = shuffled(other.train if other.test is None else other.test, seed)
        pictures = _decode(parts, source.root, config, folder, progress)
        parts.append(test[: config.limit_test])
        pictures += _decode(parts[2:], other.root, config, folder, progress)
    notes = _check(parts, pictures)
    text = json.dumps([VERSION, config.resize, *(p.content for p in pictures)])
    return Data(config, *pictures, hashlib.sha256(text.encode()).hexdigest(), tuple(notes))


def _decode(
    parts: Sequence[Sequence[Original]],
    root: Path,
    config: DataConfig,
    cache: Path,
    progress: Progress | None,
) -> list[Pictures]:
    digests = FileDigests(cache, root)
    broken: dict[str, BadPicture] = {}
    originals = [original for part in parts for original in part]

    def content(original: Original) -> str | BadPicture:
        try:
            return original.content(digests, config.resize)
        except BadPicture as error:
            return error

    contents = list(in_parallel(content, originals, len(originals), "reading pictures", progress))
    digests.save()
    pairs = list(zip(contents, originals, strict=True))
    wanted = {c: o for c, o in pairs if isinstance(c, str)}
    blob = cached(wanted, config.resize, cache, broken, progress)
    unreadable = [c for c in contents if isinstance(c, BadPicture)]
    # Two files may hold the same broken content.
    unreadable += [BadPicture(o.name, broken[c].reason) for c, o in pairs if c in broken]
    if unreadable:
        raise broken_pictures(unreadable)
    remaining = iter(contents)
    return [
        Pictures([o.id for o in part], [next(remaining) for _ in part], blob, config.crop) for part in parts
    ]


def _check(parts: Sequence[Sequence[Original]], pictures: Sequence[Pictures]) -> list[str]:
    """Raise where a test picture is also a training or validation picture; note all other exact copies.

    Two files that hold the same pixels hold the same picture.
    """
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
                names = parts[part][index].name, parts[earlier][number].name
                leaks.append(f"{names[0]} is {names[1]} ({_NAMES[earlier]})")
    if leaks:
        more = f"\n  … and {len(leaks) - 20} more" if len(leaks) > 20 else ""
        raise AfterimageError(
            f"{len(leaks)} of the test pictures are trained or validated on too, which would falsify all "
            "scores; take one of each pair out:\n  " + "\n  ".join(leaks[:20]) + more
        )
    return [
        f"exact copies of other pictures among the {len(pictures[part])} {_NAMES[part]} pictures: {count}"
        for part, count in enumerate(copies)
        if count
    ]
