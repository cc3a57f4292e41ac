"""The shards of a store: what it is of, the index that lists them, and the writer that makes them one by one."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from afterimage.config import AfterimageError, DataConfig, from_dict, shown, to_dict
from afterimage.data.store_files import IMAGES, METADATA, write_file
from afterimage.runs.files import LEFTOVER, read_json, sha256, write_json
from afterimage.runs.results import FeatureMap, UsedWeights

INDEX = ".index.json"
VERSION = 1
"""Of the index and of `StoreFacts`: raised whenever a key changes its name or its meaning."""


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


def check_whole(path: Path, index: StoreIndex) -> None:
    """Raise `AfterimageError` where a shard is missing or cut short, or some are not written yet."""
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
        named = {key if key == IMAGES else layer_key(key): values for key, values in arrays.items()}
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


def read_facts(file: Path, values: Mapping[str, Any]) -> StoreFacts:
    """Return what a file says of itself; raises `AfterimageError` that names it."""
    try:
        if (version := values.get("version")) != VERSION:
            raise AfterimageError(f"version {version!r:.80}; this one reads {VERSION}")
        return from_dict(StoreFacts, {name: value for name, value in values.items() if name != "version"})
    except AfterimageError as error:
        raise AfterimageError(f"{shown(file)}: {METADATA}: {error}") from None


def layer_key(layer: str) -> str:
    """The name of a layer's features in a file."""
    return layer if layer == "features" else f"features.{layer}"
