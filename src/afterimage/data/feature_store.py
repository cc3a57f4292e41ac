"""Features and their images on disk: the one format that is extracted, audited and trained on.

A store is a `.safetensors`, `.npz` or `.parquet` file with `images`, `features` or `features.NAME`, and optional `ids`,
or several such files, shards, which `STORE.index.json` lists with their digests. What wrote itself says what it is of
(`StoreFacts`); a file of anybody else's need not.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from afterimage.config import (
    MAX_SIDE,
    SSIM_WINDOW,
    AfterimageError,
    DataConfig,
    FeatureSpec,
    from_dict,
    local_path,
    shown,
    to_dict,
)
from afterimage.data.store_files import BATCH, IDS, IMAGES, METADATA, Arrays, read_file, write_file
from afterimage.runs.files import LEFTOVER, read_json, sha256, write_json
from afterimage.runs.results import FeatureMap, UsedWeights
from afterimage.runtime.progress import Progress, silent

MAX_PREFIX = 5
"""Class token and registers: more tokens beside a square grid are taken for another shape of grid."""
VERSION = 1
"""Of the index and of `StoreFacts`: raised whenever a key changes its name or its meaning."""
NUMBERS = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint8, torch.int8, torch.int16,
           torch.int32, torch.int64)  # fmt: skip


@dataclass(frozen=True)
class StoreFacts:
    """What extracted features are of; extractions with equal facts write equal stores.

    Attributes:
        model: the encoder, `[provider/]model` with its tag
        features: shape and placement of each layer
        used: the encoder's weights
        weights: setting of the weights
        seed: seed of random weights
        mean: what the encoder subtracts from images in [0, 1], by channel
        std: what it divides them by then
        data: where images come from, and their size
        data_digest: SHA-256 of all images of that source, split and size
        split: `train`, `validation`, `test` or `all`
        images: how many images are stored
        dtype: number format of the features
        remarks: what a reader has to know of how images reached the encoder
    """

    model: str
    features: tuple[FeatureMap, ...]
    used: UsedWeights
    weights: str
    seed: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    data: DataConfig
    data_digest: str
    split: str
    images: int
    dtype: str
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Shard:
    """A file of a store: its name beside the index, its images, its size in bytes, its digest."""

    file: str
    images: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class StoreIndex:
    """The shards of a store that are written, in order. `facts` say how many images they will hold in the end."""

    version: int
    shard_images: int
    facts: StoreFacts
    shards: tuple[Shard, ...] = ()


@dataclass(frozen=True)
class _Part:
    """The arrays of one file: images `(N, 3, H, W)` uint8, features as they are stored."""

    name: str
    ids: list[str]
    named: bool
    images: np.ndarray
    features: dict[str, np.ndarray | Tensor]


Layout = Callable[[Tensor], Tensor]
"""Brings stored features of some images into the shape `(B, C, h, w)`."""


class FeatureStore:
    """The features and images of a store. Of `.safetensors` features are read when they are asked for.

    Attributes:
        path: the store
        facts: what it is of; None where nobody has said
        ids: names of the images; their numbers where the file names none
        named: whether the file names its images
        image_size: height and width of the images in pixels
        specs: shape and placement of the features by layer
        kinds: how the features were understood by layer, in words
        digest: SHA-256 of its files
        content: SHA-256 of the pixels of each image
    """

    def __init__(self, path: Path, parts: Sequence[_Part], facts: StoreFacts | None, digest: str) -> None:
        self.path, self.facts, self.digest = path, facts, digest
        self._parts = list(parts)
        self._ends = np.cumsum([len(part.images) for part in parts])
        self.named = all(part.named for part in parts)
        self.ids = [one for part in parts for one in part.ids]
        if not self.named:
            self.ids = [f"{i:06}" for i in range(len(self.ids))]
        _check_alike(parts)
        height, width = (int(side) for side in parts[0].images.shape[-2:])
        self.image_size = (height, width)
        known = {} if facts is None else {found.layer: found for found in facts.features}
        self.specs: dict[str, FeatureSpec] = {}
        self.kinds: dict[str, str] = {}
        self._layouts: dict[str, Layout] = {}
        for layer, values in parts[0].features.items():
            name, shape = f"{shown(path)}: {_key(layer)}", (len(self.ids), *values.shape[1:])
            found = known.get(layer)
            own, self.kinds[layer], self._layouts[layer] = _understood(name, shape, found)
            source = f"{shown(path.name)}:{layer}"
            self.specs[layer] = found.spec if found else FeatureSpec(source, *own)

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def content(self) -> list[str]:
        return [hashlib.sha256(image.tobytes()).hexdigest() for part in self._parts for image in part.images]

    def images(self, rows: Sequence[int] | np.ndarray) -> UInt8[np.ndarray, "batch 3 height width"]:
        """Return the images at `rows`."""
        found = np.empty((len(rows), 3, *self.image_size), np.uint8)
        for part, places, inside in self._located(rows):
            found[places] = part.images[inside]
        return found

    def features(self, layer: str, rows: Sequence[int] | np.ndarray) -> Float[Tensor, "batch _ _ _"]:
        """Return a layer's features of the images at `rows`, float32."""
        found = torch.empty(len(rows), *self.specs[layer].shape)
        for part, places, inside in self._located(rows):
            found[torch.from_numpy(places)] = self._layouts[layer](_float32(part.features[layer], inside))
        return found

    def _located(self, rows: Sequence[int] | np.ndarray) -> Iterator[tuple[_Part, np.ndarray, np.ndarray]]:
        """Each part that holds some of the rows: which of `rows`, and where in the part."""
        rows = np.asarray(rows, np.int64)
        numbers = np.searchsorted(self._ends, rows, side="right")
        for number in np.unique(numbers):
            part = self._parts[number]
            places = np.flatnonzero(numbers == number)
            yield part, places, rows[places] - (self._ends[number] - len(part.images))


def open_store(path: str | Path, progress: Progress = silent) -> FeatureStore:
    """Open a store and check all of it.

    Images are uint8 or floats in [0, 1], `(N, H, W, 3)` or `(N, 3, H, W)`, in Parquet also encoded files. Features
    are maps `(N, C, h, w)` or `(N, h, w, C)`, tokens `(N, L, C)` of a square grid, or vectors `(N, C)`. Optional `ids`
    name the images.

    Args:
        path: the file, or what shards are named after; the index is found beside it
        progress: called with what is done, how far it is, and the total

    Raises:
        AfterimageError: a file is missing, damaged or of another kind, lacks a part, holds values that are not
            finite, or its parts differ in length; the store is not finished; the message names the file and the part
    """
    path = Path(local_path(str(path)).removesuffix(INDEX))
    index = read_index(path)
    if index is None:
        files, facts = [path], None
    else:
        files, facts = [path.with_name(shard.file) for shard in index.shards], index.facts
        _check_whole(path, index)
    parts, digests = [], []
    for number, file in enumerate(files):
        progress("checking stored features", number, len(files))
        arrays = read_file(file)
        digests.append(sha256(file))
        if index is not None and digests[-1] != index.shards[number].sha256:
            raise AfterimageError(
                f"{shown(file)} is damaged: its digest is not the one in {shown(index_path(path).name)}; delete it and "
                "run the same extract command again"
            )
        if index is None and METADATA in arrays:
            facts = _facts(file, arrays[METADATA])
        parts.append(_part(file, arrays, [] if facts is None else facts.features))
    progress("checking stored features", len(files), len(files))
    _check_ids(path, parts)
    return FeatureStore(path, parts, facts, hashlib.sha256("\n".join(digests).encode()).hexdigest())


# Files and shards

INDEX = ".index.json"


def index_path(path: Path) -> Path:
    """Return where the list of a store's shards is."""
    return path.with_name(path.name + INDEX)


def read_index(path: Path) -> StoreIndex | None:
    """Return the index of the store at `path`; None where there is none."""
    file = index_path(path)
    if not file.exists():
        return None
    values = read_json(file)
    try:
        if not isinstance(values, dict) or values.get("version") != VERSION:
            raise AfterimageError(f"it must be an object of version {VERSION}")
        index = from_dict(StoreIndex, values)
        if outside := [shard.file for shard in index.shards if Path(shard.file).name != shard.file]:
            raise AfterimageError(f"{outside[0]!r:.200} is no file beside it")
        return index
    except AfterimageError as error:
        raise AfterimageError(f"{shown(file)}: {error}") from None


def _check_whole(path: Path, index: StoreIndex) -> None:
    for shard in index.shards:
        file = path.with_name(shard.file)
        if not file.exists():
            raise AfterimageError(f"{shown(path)}: the shard {shown(shard.file)} is missing")
        if (size := file.stat().st_size) != shard.bytes:
            raise AfterimageError(f"{shown(file)} was cut short: it has {size:,} of {shard.bytes:,} bytes")
    done = sum(shard.images for shard in index.shards)
    if done != index.facts.images:
        raise AfterimageError(
            f"{shown(path)} is not finished: it holds {done:,} of {index.facts.images:,} images; the same extract "
            "command goes on from there"
        )


class StoreWriter:
    """Writes a store shard by shard. What the same extraction has begun goes on; shards that are whole stay.

    Args:
        path: the store
        facts: what it is of
        shard_images: images in each shard but the last

    Raises:
        AfterimageError: something else is there already
    """

    def __init__(self, path: Path, facts: StoreFacts, shard_images: int) -> None:
        self.path, self.facts, self.shard_images = path, facts, shard_images
        self.index = StoreIndex(VERSION, shard_images, facts)
        self._done: dict[str, Shard] = {}
        if (before := read_index(path)) is not None:
            if changed := _changed(before, self.index):
                raise AfterimageError(
                    f"{shown(path)} holds another extraction, with other {', '.join(changed)}: choose another file, "
                    f"or delete its shards and {shown(index_path(path).name)}"
                )
            self._done = {shard.file: shard for shard in before.shards if self._is_whole(shard)}
        elif path.exists():
            raise AfterimageError(
                f"{shown(path)} exists, and no extraction has written it: choose another file"
            )
        for left in path.parent.glob(f".{path.stem}*{LEFTOVER}"):
            with contextlib.suppress(OSError):
                left.unlink()
        self._save()

    def _is_whole(self, shard: Shard) -> bool:
        file = self.path.with_name(shard.file)
        return file.exists() and file.stat().st_size == shard.bytes and sha256(file) == shard.sha256

    @property
    def _starts(self) -> dict[str, int]:
        """The name of each shard, and the row that it starts with."""
        count = -(-self.facts.images // self.shard_images)
        if count == 1:
            return {self.path.name: 0}
        stem, suffix = self.path.stem, self.path.suffix
        names = [f"{stem}-{i:05}-of-{count:05}{suffix}" for i in range(1, count + 1)]
        return {name: i * self.shard_images for i, name in enumerate(names)}

    def missing(self) -> dict[str, range]:
        """Return the shards that are still to be written, and the rows of each."""
        end = self.facts.images
        starts = self._starts.items()
        return {
            name: range(start, min(end, start + self.shard_images))
            for name, start in starts
            if name not in self._done
        }

    def write(self, name: str, ids: Sequence[str], arrays: Mapping[str, Tensor]) -> None:
        """Write one of the missing shards: `images` and layers by name, a row an image."""
        file = self.path.with_name(name)
        named = {key if key == IMAGES else _key(key): values for key, values in arrays.items()}
        write_file(file, ids, named, {"version": VERSION, **to_dict(self.facts)})
        self._done[name] = Shard(name, len(ids), file.stat().st_size, sha256(file))
        self._save()

    def _save(self) -> None:
        shards = [to_dict(self._done[name]) for name in self._starts if name in self._done]
        write_json(index_path(self.path), {**to_dict(self.index), "shards": shards})


def _changed(before: StoreIndex, now: StoreIndex) -> list[str]:
    """The settings of two extractions that differ."""
    names = [f.name for f in fields(StoreFacts) if f.name not in ("data_digest", "used")]
    changed = [name for name in names if getattr(before.facts, name) != getattr(now.facts, name)]
    if not changed and before.facts.data_digest != now.facts.data_digest:
        changed.append("images")
    if before.facts.used.identity != now.facts.used.identity and "weights" not in changed:
        changed.append("weights")
    return changed + ["shard_images"] * (before.shard_images != now.shard_images)


def _facts(file: Path, values: Mapping[str, Any]) -> StoreFacts:
    try:
        if (version := values.get("version")) != VERSION:
            raise AfterimageError(f"version {version!r:.80}; this one reads {VERSION}")
        return from_dict(StoreFacts, {name: value for name, value in values.items() if name != "version"})
    except AfterimageError as error:
        raise AfterimageError(f"{shown(file)}: {METADATA}: {error}") from None


def _key(layer: str) -> str:
    """The name of a layer's features in a file."""
    return layer if layer == "features" else f"features.{layer}"


# What a file holds


def _part(file: Path, arrays: Arrays, known: Sequence[FeatureMap]) -> _Part:
    """A file's arrays, checked one by one."""
    layers = [name for name in arrays if name == "features" or name.startswith("features.")]
    if IMAGES not in arrays or not layers:
        raise AfterimageError(
            f"{shown(file)} must hold `images` and `features` (or `features.NAME`); "
            f"it holds {', '.join(sorted(arrays)) or 'nothing'}"
        )
    pixels = _pixels(f"{shown(file)}: {IMAGES}", arrays[IMAGES])
    if not SSIM_WINDOW <= min(pixels.shape[-2:]) <= MAX_SIDE:
        raise AfterimageError(
            f"{shown(file)}: images of {pixels.shape[2]}x{pixels.shape[3]}; their shorter side must have "
            f"{SSIM_WINDOW}, for SSIM, to {MAX_SIDE} pixels"
        )
    given = arrays.get(IDS)
    if isinstance(given, Tensor):
        given = given.numpy()
    ids = [] if given is None else [str(i) for i in np.atleast_1d(given)]
    if given is not None and len(ids) != len(pixels):
        raise _wrong_ids(file, len(pixels))
    found = {}
    for name in layers:
        layer = name.partition(".")[2] or name
        if known and layer not in {one.layer for one in known}:
            raise AfterimageError(f"{shown(file)}: {name} is none of the layers that its metadata names")
        _check_numbers(f"{shown(file)}: {name}", arrays[name], ids, len(pixels))
        found[layer] = arrays[name]
    return _Part(shown(file.name), ids or [""] * len(pixels), given is not None, pixels, found)


def _pixels(name: str, values: np.ndarray | Tensor) -> np.ndarray:
    """uint8 `(N, 3, H, W)`."""
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


def _check_numbers(name: str, values: np.ndarray | Tensor, ids: Sequence[str], count: int) -> None:
    """Raise where features are not finite numbers, a row an image."""
    # No complex numbers, no times.
    real = values.dtype in NUMBERS if isinstance(values, Tensor) else values.dtype.kind in "iuf"
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
    """Some rows of an array, float32 and contiguous; what is too large for it is infinite."""
    if isinstance(values, Tensor):
        return values[torch.from_numpy(rows) if isinstance(rows, np.ndarray) else rows].float()
    with np.errstate(over="ignore"):
        return torch.from_numpy(np.array(values[rows], np.float32))


def _check_alike(parts: Sequence[_Part]) -> None:
    """Raise where shards hold other layers or other shapes than the first."""

    def shapes(part: _Part) -> dict[str, tuple[int, ...]]:
        found = {_key(layer): tuple(values.shape[1:]) for layer, values in part.features.items()}
        return found | {IMAGES: part.images.shape[1:]}

    first = shapes(parts[0])
    for part in parts[1:]:
        own = shapes(part)
        for name in first.keys() | own.keys():
            if first.get(name) != own.get(name):
                raise AfterimageError(
                    f"the shards differ: {name} is {own.get(name, 'missing')} an image in {part.name}, but "
                    f"{first.get(name, 'missing')} in {parts[0].name}"
                )


def _check_ids(path: Path, parts: Sequence[_Part]) -> None:
    if any(part.named for part in parts) and not all(part.named for part in parts):
        raise AfterimageError(f"{shown(path)}: only some of its shards hold {IDS}")
    counted = Counter(one for part in parts if part.named for one in part.ids)
    if doubled := [one for one, count in counted.items() if count > 1]:
        raise AfterimageError(
            f"{_wrong_ids(path, sum(len(part.images) for part in parts))}: {shown(doubled[0])} is there "
            f"{counted[doubled[0]]} times"
        )


def _wrong_ids(file: Path, count: int) -> AfterimageError:
    return AfterimageError(f"{shown(file)}: ids must name each of the {count} images, each differently")


def _understood(
    name: str, shape: tuple[int, ...], known: FeatureMap | None
) -> tuple[tuple[int, int, int], str, Layout]:
    """The shape `(C, h, w)` of features that are stored as `(N, ...)`, in words what they are, and their layout."""
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
