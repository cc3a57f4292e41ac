"""Stored features with their images: the file format that `extract` writes and that audits and training read.

A store is a `.safetensors`, `.npz` or `.parquet` file with `images`, `features` or `features.NAME`, and optional `ids`,
or several such files (shards), which `STORE.index.json` lists with their digests. Stores that afterimage wrote hold
metadata (`StoreMetadata`); files from elsewhere need not.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from afterimage.config import MAX_SIDE, SSIM_WINDOW, AfterimageError, FeatureSpec, local_path, printable_path
from afterimage.data.store_files import (
    BATCH,
    IDS,
    IMAGES,
    INDEX,
    METADATA,
    Arrays,
    StoreMetadata,
    index_path,
    layer_key,
    read_facts,
    read_file,
    read_index,
)
from afterimage.runs.files import sha256
from afterimage.runs.results import FeatureMap
from afterimage.runtime.terminal import Progress, no_progress

MAX_PREFIX = 5
"""Largest number of prefix tokens (class token and registers) before a square grid of tokens."""
NUMERIC_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint8, torch.int8, torch.int16,
           torch.int32, torch.int64)  # fmt: skip


@dataclass(frozen=True)
class _Part:
    """Arrays of one file: ids if it has them, images `(N, 3, H, W)` uint8, and features in the file's own layout."""

    name: str
    ids: list[str] | None
    images: np.ndarray
    features: dict[str, np.ndarray | Tensor]


Layout = Callable[[Tensor], Tensor]
"""Function that brings stored features of a batch of images into the shape `(B, C, h, w)`."""


class FeatureStore:
    """Features and images of a store. Features in `.safetensors` files are read on access.

    Attributes:
        path: path of the store
        facts: metadata of the extraction; None if the files have none
        ids: names of the images; their numbers as six digits if the files have no ids
        has_ids: whether the files have ids
        image_size: height and width of the images in pixels
        specs: shape and placement of the features by layer
        layout_descriptions: description of the stored shape by layer, such as "taken as vectors (N, C)"
        digest: SHA-256 over the digests of the files
        content_digests: SHA-256 of the pixels of each image
    """

    def __init__(self, path: Path, parts: Sequence[_Part], facts: StoreMetadata | None, digest: str) -> None:
        self.path, self.facts, self.digest = path, facts, digest
        self._parts = list(parts)
        self._ends = np.cumsum([len(part.images) for part in parts])
        self.ids = [one for part in parts for one in part.ids or ()]
        self.has_ids = bool(self.ids)
        if not self.has_ids:
            self.ids = [f"{i:06}" for i in range(self._ends[-1])]
        _check_alike(parts)
        height, width = (int(side) for side in parts[0].images.shape[-2:])
        self.image_size = (height, width)
        known = {} if facts is None else {found.layer: found for found in facts.features}
        self.specs: dict[str, FeatureSpec] = {}
        self.layout_descriptions: dict[str, str] = {}
        self._layouts: dict[str, Layout] = {}
        for layer, values in parts[0].features.items():
            name, shape = f"{printable_path(path)}: {layer_key(layer)}", (len(self.ids), *values.shape[1:])
            found = known.get(layer)
            own, self.layout_descriptions[layer], self._layouts[layer] = _infer_layout(name, shape, found)
            source = f"{printable_path(path.name)}:{layer}"
            self.specs[layer] = found.spec if found else FeatureSpec(source, *own)

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def content_digests(self) -> list[str]:
        return [hashlib.sha256(image.tobytes()).hexdigest() for part in self._parts for image in part.images]

    def images(self, rows: Sequence[int] | np.ndarray) -> UInt8[np.ndarray, "batch 3 height width"]:
        """Return the images at `rows`."""
        found = np.empty((len(rows), 3, *self.image_size), np.uint8)
        for part, places, inside in self._locate_rows(rows):
            found[places] = part.images[inside]
        return found

    def features(self, layer: str, rows: Sequence[int] | np.ndarray) -> Float[Tensor, "batch _ _ _"]:
        """Return a layer's features of the images at `rows`: `(B, C, h, w)` float32."""
        found = torch.empty(len(rows), *self.specs[layer].shape)
        for part, places, inside in self._locate_rows(rows):
            found[torch.from_numpy(places)] = self._layouts[layer](_float32(part.features[layer], inside))
        return found

    def _locate_rows(
        self, rows: Sequence[int] | np.ndarray
    ) -> Iterator[tuple[_Part, np.ndarray, np.ndarray]]:
        """Yield each part that holds some of the rows, with their indices in `rows` and in the part."""
        rows = np.asarray(rows, np.int64)
        numbers = np.searchsorted(self._ends, rows, side="right")
        for number in np.unique(numbers):
            part = self._parts[number]
            places = np.flatnonzero(numbers == number)
            yield part, places, rows[places] - (self._ends[number] - len(part.images))


def open_store(path: str | Path, progress: Progress = no_progress) -> FeatureStore:
    """Open a store and check all of its arrays.

    Images are uint8 or floats in [0, 1], `(N, H, W, 3)` or `(N, 3, H, W)`; in Parquet they may also be encoded image
    files. Features are maps `(N, C, h, w)` or `(N, h, w, C)`, tokens `(N, L, C)` of a square grid, or vectors `(N, C)`.
    Optional `ids` name the images.

    Args:
        path: path of the file, of a store with shards, or of its index
        progress: called with the name of the current task, the amount done, and the total

    Raises:
        AfterimageError: a file is missing, damaged or of another kind, lacks an array, holds values that are not
            finite or arrays of different lengths, or the store is not finished; the message names file and array
    """
    path = Path(local_path(str(path)).removesuffix(INDEX))
    index = read_index(path)
    files, facts, known = [path], None, [""]
    if index is not None:
        files, facts = [path.with_name(shard.file) for shard in index.shards], index.facts
        known = [shard.sha256 for shard in index.shards]
        if (done := sum(shard.images for shard in index.shards)) != facts.images:
            raise AfterimageError(
                f"{printable_path(path)} is not finished: it holds {done:,} of {facts.images:,} images; "
                "the same extract "
                "command goes on from there"
            )
    parts, digests = [], []
    for number, (file, expected) in enumerate(zip(files, known, strict=True)):
        progress("checking stored features", number, len(files))
        arrays = read_file(file)
        digests.append(sha256(file))
        if expected and digests[-1] != expected:
            raise AfterimageError(
                f"{printable_path(file)} is damaged: its digest is not the one in "
                f"{printable_path(index_path(path).name)}; delete it and "
                "run the same extract command again"
            )
        if index is None and METADATA in arrays:
            facts = read_facts(file, arrays[METADATA])
        parts.append(_part(file, arrays, [] if facts is None else facts.features))
    progress("checking stored features", len(files), len(files))
    _check_ids(path, parts)
    return FeatureStore(path, parts, facts, hashlib.sha256("\n".join(digests).encode()).hexdigest())


def _part(file: Path, arrays: Arrays, known: Sequence[FeatureMap]) -> _Part:
    """Check the arrays of a file and return them."""
    layers = [name for name in arrays if name == "features" or name.startswith("features.")]
    if IMAGES not in arrays or not layers:
        raise AfterimageError(
            f"{printable_path(file)} must hold `images` and `features` (or `features.NAME`); "
            f"it holds {', '.join(sorted(arrays)) or 'nothing'}"
        )
    pixels = _pixels(f"{printable_path(file)}: {IMAGES}", arrays[IMAGES])
    if not SSIM_WINDOW <= min(pixels.shape[-2:]) <= MAX_SIDE:
        raise AfterimageError(
            f"{printable_path(file)}: images of {pixels.shape[2]}x{pixels.shape[3]}; their shorter side must have "
            f"{SSIM_WINDOW}, for SSIM, to {MAX_SIDE} pixels"
        )
    given = arrays.get(IDS)
    if isinstance(given, Tensor):
        given = given.numpy()
    ids = None if given is None else [str(i) for i in np.atleast_1d(given)]
    if ids is not None and len(ids) != len(pixels):
        raise _wrong_ids(file, len(pixels))
    found = {}
    for name in layers:
        layer = name.partition(".")[2] or name
        if known and layer not in {one.layer for one in known}:
            raise AfterimageError(
                f"{printable_path(file)}: {name} is none of the layers that its metadata names"
            )
        _check_numbers(f"{printable_path(file)}: {name}", arrays[name], ids, len(pixels))
        found[layer] = arrays[name]
    return _Part(printable_path(file.name), ids, pixels, found)


def _pixels(name: str, values: np.ndarray | Tensor) -> np.ndarray:
    """Check images and return them as uint8 `(N, 3, H, W)`."""
    if isinstance(values, Tensor):
        values = (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    if values.ndim != 4 or 3 not in (values.shape[1], values.shape[3]) or not values.size:
        raise AfterimageError(f"{name} must be (N, H, W, 3) or (N, 3, H, W), got {values.shape}")
    if values.shape[1] != 3:
        values = values.transpose(0, 3, 1, 2)
    if values.dtype != np.uint8:
        if not np.issubdtype(values.dtype, np.floating):
            raise AfterimageError(f"{name} must be uint8 or floats in [0, 1], got {values.dtype}")
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise AfterimageError(f"{name} must lie in [0, 1], got {values.min():.4g} to {values.max():.4g}")
        values = np.rint(values * 255).astype(np.uint8)
    return np.ascontiguousarray(values)


def _check_numbers(name: str, values: np.ndarray | Tensor, ids: Sequence[str] | None, count: int) -> None:
    """Check that features are finite numbers with one row for each image."""
    # Complex numbers and times are refused.
    real = values.dtype in NUMERIC_DTYPES if isinstance(values, Tensor) else values.dtype.kind in "iuf"
    if not real or values.ndim == 0 or len(values) != count or not math.prod(values.shape):
        raise AfterimageError(
            f"{name} must be numbers for each of {count} images, got {tuple(values.shape)} {values.dtype}"
        )
    for start in range(0, count, BATCH):
        some = _float32(values, slice(start, start + BATCH))
        finite = some.reshape(len(some), -1).isfinite().all(1)
        if not finite.all():
            row = start + int(finite.logical_not().nonzero()[0])
            image = f" (image {ids[row]})" if ids else f" (row {row})"
            raise AfterimageError(f"{name} holds values that are not finite{image}")


def _float32(values: np.ndarray | Tensor, rows: Any) -> Tensor:
    """Return some rows of an array, float32 and contiguous; values beyond its range become infinite."""
    if isinstance(values, Tensor):
        return values[torch.from_numpy(rows) if isinstance(rows, np.ndarray) else rows].float()
    with np.errstate(over="ignore"):
        return torch.from_numpy(np.array(values[rows], np.float32))


def _check_alike(parts: Sequence[_Part]) -> None:
    """Check that all shards hold the same layers and shapes as the first."""
    first, *others = (
        {IMAGES: part.images.shape[1:]}
        | {layer_key(layer): tuple(values.shape[1:]) for layer, values in part.features.items()}
        for part in parts
    )
    for part, own in zip(parts[1:], others, strict=True):
        for name in first.keys() | own.keys():
            if first.get(name) != own.get(name):
                raise AfterimageError(
                    f"the shards differ: {name} is {own.get(name, 'missing')} an image in {part.name}, but "
                    f"{first.get(name, 'missing')} in {parts[0].name}"
                )


def _check_ids(path: Path, parts: Sequence[_Part]) -> None:
    if len({part.ids is None for part in parts}) > 1:
        raise AfterimageError(f"{printable_path(path)}: only some of its shards hold {IDS}")
    counted = Counter(one for part in parts for one in part.ids or ())
    if doubled := [one for one, count in counted.items() if count > 1]:
        raise AfterimageError(
            f"{_wrong_ids(path, sum(len(part.images) for part in parts))}: {printable_path(doubled[0])} is there "
            f"{counted[doubled[0]]} times"
        )


def _wrong_ids(file: Path, count: int) -> AfterimageError:
    return AfterimageError(
        f"{printable_path(file)}: ids must name each of the {count} images, each differently"
    )


def _infer_layout(
    name: str, shape: tuple[int, ...], known: FeatureMap | None
) -> tuple[tuple[int, int, int], str, Layout]:
    """Return the shape `(C, h, w)` of features stored as `(N, ...)`, a description of them, and their layout."""
    text = "x".join(map(str, shape))
    if known is not None:
        if shape[1:] != known.shape:
            raise AfterimageError(
                f"{name} is {text}, but its metadata says {'x'.join(map(str, known.shape))}"
            )
        return known.shape, f"{text}, maps (N, C, h, w) of {known.source}", lambda maps: maps
    if len(shape) == 2:
        return (shape[1], 1, 1), f"{text} taken as vectors (N, C)", lambda maps: maps[:, :, None, None]
    if len(shape) == 3:
        side = math.isqrt(shape[1])
        prefix = shape[1] - side**2
        if prefix > MAX_PREFIX:
            raise AfterimageError(
                f"{name} has {shape[1]} tokens, no square grid with at most {MAX_PREFIX} before it"
            )
        own = (shape[2], side, side)
        kind = f"tokens (N, L, C) of a {side}x{side} grid" + (
            f", the first {prefix} left out" if prefix else ""
        )
        return own, f"{text} taken as {kind}", lambda maps: maps[:, prefix:].mT.reshape(-1, *own)
    if len(shape) != 4:
        raise AfterimageError(f"{name} must have 2, 3 or 4 axes, got shape {shape}")
    if shape[1] == shape[2] != shape[3]:
        own = (shape[3], *shape[1:3])
        return own, f"{text} taken as maps (N, h, w, C)", lambda maps: maps.permute(0, 3, 1, 2)
    return shape[1:], f"{text} taken as maps (N, C, h, w)", lambda maps: maps
