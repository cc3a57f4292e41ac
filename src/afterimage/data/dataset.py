"""Load the training, validation and test images that a `DataConfig` names."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from afterimage.config import AfterimageError, DataConfig, join_names
from afterimage.data.decode import BadImage, examine, load_image, resize_to_cover, size_notes, value_notes
from afterimage.data.duplicates import SPLIT_NAMES, check_copies, near_duplicates
from afterimage.data.images import Data, ImageSet, StreamedImages, content_digest, crops_digest
from afterimage.data.originals import Content, FileDigests, Original, broken_images_error
from afterimage.data.pixel_cache import load_or_decode
from afterimage.data.sampling import centre_crop_positions, fitting_sides, shuffled, split
from afterimage.data.sources import read_source
from afterimage.runtime.distributed import on_main_process
from afterimage.runtime.process import parallel_map
from afterimage.runtime.terminal import Progress, no_progress

logger = logging.getLogger("afterimage")

SPLITS = ("train", "validation", "test")
MAX_DECODED_IMAGES = 50_000
"""Largest number of images of one source that are kept decoded (10 GiB of pixels at 256 x 256); more are streamed."""


def cache_folder(given: str | Path | None = None) -> Path:
    """Return the cache folder: the given one, else `AFTERIMAGE_CACHE`, else `~/.cache/afterimage`."""
    return Path(os.path.expanduser(given or os.environ.get("AFTERIMAGE_CACHE") or "~/.cache/afterimage"))


def load_data(
    config: DataConfig, *, cache: str | Path | None = None, progress: Progress = no_progress
) -> Data:
    """Find, split, decode and check the images that a config names.

    Up to `MAX_DECODED_IMAGES` images of a source are decoded once and kept; the images of a larger source are decoded
    each time they are used. If `config.test` names a source, its test split is used, or its training images if it has
    none.

    Args:
        config: the sources and how they are split
        cache: folder of decoded images and digests; None for the one of `cache_folder`
        progress: called with the name of the current task, the amount done, and the total

    Returns:
        the three splits, with notes for readers of the scores

    Raises:
        AfterimageError: images are missing, broken or too few, or a test image is also a training or validation
            image; the message names the files
    """
    folder = cache_folder(cache)
    # List the test images before decoding anything, so that a wrong name is reported at once.
    listings = _listings(config, folder, progress)
    images = [part for listing in listings for part in _images(listing, config, folder, progress)]
    found = [note for listing in listings for note in listing.notes]
    found += _image_notes(dict(zip(SPLIT_NAMES, images, strict=True)), config.resize)
    _warn(found)
    notes = check_copies([part for listing in listings for part in listing.parts], images) + found
    data = Data(config, *images, content_digest(config, [part.content_digests for part in images]))
    near = near_duplicates(data, folder)
    _warn(near)
    return replace(data, notes=(*notes, *near))


def load_test_images(
    config: DataConfig,
    *,
    training: bool = True,
    cache: str | Path | None = None,
    progress: Progress = no_progress,
) -> tuple[ImageSet, list[str]]:
    """Load the test images of a config whose `test` names a separate source, and notes on them.

    The training images may be missing: a note then says that they could not be searched for copies of test images.
    With `training` unset they are not read, for measurements without training. The other arguments are those of
    `load_data`.

    Raises:
        AfterimageError: test images are missing or broken, or one is also a training or validation image
    """
    folder = cache_folder(cache)
    own = _test_listing(config, folder, progress)
    (test,) = _images(own, config, folder, progress)
    notes = own.notes + _image_notes({SPLIT_NAMES[2]: test}, config.resize)
    if training:
        try:
            others = _training_listing(config, folder, progress)
            images = _images(others, config, folder, progress)
        except AfterimageError as error:
            notes.append(f"it could not be checked whether a test image is also a training image: {error}")
        else:
            notes += check_copies([*others.parts, *own.parts], [*images, test])
            notes += near_duplicates(Data(config, *images, test, digest=""), folder)
    _warn(notes)
    return test, notes


def count_images(config: DataConfig, *, cache: str | Path | None = None) -> dict[str, int]:
    """Count the training, validation and test images that `load_data` would find, without decoding any.

    Raises:
        AfterimageError: images are missing or too few
    """
    parts = [
        part for listing in _listings(config, cache_folder(cache), no_progress) for part in listing.parts
    ]
    return {name: len(part) for name, part in zip(SPLITS, parts, strict=True)}


def current_digests(
    config: DataConfig, *, cache: str | Path | None = None, progress: Progress = no_progress
) -> tuple[str, str]:
    """Return `Data.digest` and `Data.test_digest` of the images that `load_data` would load, without decoding them.

    The arguments are those of `load_data`.

    Raises:
        AfterimageError: images are missing or too few, or their files cannot be read
    """
    folder, contents = cache_folder(cache), []
    for listing in _listings(config, folder, progress):
        originals = [original for part in listing.parts for original in part]
        digests, _, unreadable = _scan_originals(originals, listing.root, config, folder, progress)
        if unreadable:
            raise broken_images_error(list(unreadable.values()))
        names = iter(digest.tobytes().hex() for digest in digests)
        contents += [[next(names) for _ in part] for part in listing.parts]
    return content_digest(config, contents), crops_digest(config, contents[-1])


class _Listing(NamedTuple):
    """Images of one source by split, its root, and notes on the files that it leaves out and on its split."""

    parts: list[Sequence[Original]]
    root: Path
    notes: list[str]


def _listings(config: DataConfig, folder: Path, progress: Progress) -> list[_Listing]:
    """List the training, validation and test images, in one listing or two."""
    first = _training_listing(config, folder, progress)
    return [first, _test_listing(config, folder, progress)] if config.test else [first]


def _training_listing(config: DataConfig, folder: Path, progress: Progress) -> _Listing:
    """List the training, validation and, unless `config.test` is set, test images."""
    own = not config.test
    source = read_source(config.source, {"train", "test"} if own else {"train"}, folder, progress)
    notes = list(source.notes)
    if source.pooled:
        folders = f"{len(source.pooled):,} folders, {join_names(source.pooled)},"
        notes.append(f"the images of {folders} are pooled and split at random")
    if own and source.test is None and source.validation is not None:
        notes.append(
            "no folder or split is named as a test split: test images are drawn at random from the training images"
        )
    fractions = config.validation_fraction, config.test_fraction if own else None
    parts = split(config.source, source, *fractions, config.split_seed)[: 2 + own]
    limits = config.limit_train, config.limit_validation, config.limit_test
    return _Listing([part[:limit] for part, limit in zip(parts, limits, strict=False)], source.root, notes)


def _test_listing(config: DataConfig, folder: Path, progress: Progress) -> _Listing:
    """List the test images of the source that `config.test` names."""
    source = read_source(config.test, {"test"}, folder, progress)
    notes = list(source.notes)
    if source.test is None and source.validation is not None:
        notes.append("their source has no test split; its training images are used")
    test = shuffled(source.train if source.test is None else source.test, config.split_seed)
    return _Listing([test[: config.limit_test]], source.root, [f"test images: {note}" for note in notes])


def _warn(notes: Sequence[str]) -> None:
    if on_main_process():
        for note in notes:
            logger.warning("%s", note)


def _image_notes(parts: Mapping[str, ImageSet], size: int) -> list[str]:
    """Return notes on the range of values and the sizes of images, and on those that are streamed."""
    kept = {name: part.facts for name, part in parts.items() if not part.streamed}
    sides = {name: part.sides for name, part in parts.items()}
    notes = (value_notes(kept) if kept else []) + size_notes(sides, size)
    if streamed := sum(len(part) for part in parts.values() if part.streamed):
        notes.append(
            f"{streamed:,} images were streamed: decoded each time they were used, found to be images by their "
            "first bytes before; one that could not be decoded would have stopped the run. The range of their values "
            "was not examined"
        )
    return notes


def _images(listing: _Listing, config: DataConfig, cache: Path, progress: Progress) -> list[ImageSet]:
    """Return the image sets of a listing's parts: decoded and kept, or streamed above `MAX_DECODED_IMAGES` images."""
    parts = listing.parts
    originals = [original for part in parts for original in part]
    digests, sides, unreadable = _scan_originals(originals, listing.root, config, cache, progress)
    ends = np.cumsum([len(part) for part in parts])
    if len(originals) > MAX_DECODED_IMAGES:
        if unreadable:
            raise broken_images_error(list(unreadable.values()))
        each = zip(parts, np.split(digests, ends[:-1]), np.split(sides, ends[:-1]), strict=True)
        return [StreamedImages(*own, config.box, config.size) for own in each]
    contents = [digest.tobytes().hex() for digest in digests]
    pairs = zip(contents, originals, strict=True)
    readable = [pair for place, pair in enumerate(pairs) if place not in unreadable]
    broken: dict[str, BadImage] = {}
    blob = load_or_decode(dict(readable), config.box, cache, broken, progress)
    # Two files may hold the same broken content.
    also = [BadImage(original.name, broken[c].reason) for c, original in readable if c in broken]
    if unreadable or also:
        raise broken_images_error([*unreadable.values(), *also])
    each = zip(parts, [0, *ends[:-1]], ends, strict=True)
    return [
        ImageSet([o.id for o in part], contents[start:end], blob, config.size) for part, start, end in each
    ]


def _scan_originals(
    originals: Sequence[Original], root: Path, config: DataConfig, cache: Path, progress: Progress
) -> tuple[UInt8[np.ndarray, "n 32"], Int64[np.ndarray, " n"], dict[int, BadImage]]:
    """Return the SHA-256 and the shorter side of every original, and by index the errors of unreadable ones."""
    known = FileDigests(cache, root)
    digests, sides = np.zeros((len(originals), 32), np.uint8), np.zeros(len(originals), np.int64)
    unreadable: dict[int, BadImage] = {}

    def look(original: Original) -> Content | BadImage:
        try:
            return original.content(known, max(config.box))
        except BadImage as error:
            return error

    found = parallel_map(look, originals, len(originals), "reading images", progress)
    for place, content in enumerate(found):
        if isinstance(content, BadImage):
            unreadable[place] = content
        else:
            digests[place] = np.frombuffer(bytes.fromhex(content.sha256), np.uint8)
            sides[place] = fitting_sides(content.height, content.width, config.size)
    known.save()
    return digests, sides, unreadable


def prepare_image(path: Path, config: DataConfig) -> Tensor:
    """Read an image file, resize it and cut out its centre: `(1, 3, height, width)` in [0, 1].

    Raises:
        BadImage: the file cannot be read as an image
    """
    image, (height, width) = resize_to_cover(load_image(path), config.box), config.size
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    sides = np.array(pixels.shape[-2:]).reshape(2, 1)
    top, left = (int(place[0]) for place in centre_crop_positions(*sides, config.size))
    return pixels[..., top : top + height, left : left + width].float() / 255


def file_notes(paths: Sequence[Path], config: DataConfig) -> list[str]:
    """Return notes on image files for readers of their scores, like `Data.notes`.

    Raises:
        BadImage: a file cannot be read as an image
    """
    facts = np.array([examine(load_image(path)) for path in paths], np.int64).reshape(-1, 6)
    return value_notes({"given": facts}) + size_notes(
        {"given": fitting_sides(facts[:, -1], facts[:, -2], config.size)}, config.resize
    )
