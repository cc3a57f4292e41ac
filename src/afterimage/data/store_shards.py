"""Shards of a feature store: metadata, the index that lists the shards, and the writer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from afterimage.config import AfterimageError, DataConfig, from_dict, shown, to_dict
from afterimage.data.store_files import IMAGES, METADATA, write_file
from afterimage.runs.files import read_json, remove_leftovers, sha256, write_json
from afterimage.runs.results import FeatureMap, UsedWeights

INDEX = ".index.json"
VERSION = 1
"""Version of the index and of `StoreFacts`: increase it whenever a key changes its name or its meaning."""


@dataclass(frozen=True)
class StoreFacts:
    """Metadata of extracted features; extractions with equal metadata write equal stores.

    Attributes:
        model: the encoder, `[provider/]model` with its tag
        features: shape and placement of each layer
        used: weights that the encoder loaded
        weights: requested weights, such as `pretrained` or `random`
        seed: seed of random weights
        mean: mean by channel that the encoder subtracts from images in [0, 1]
        std: standard deviation by channel that the encoder divides by
        data: source and size of the images
        data_digest: SHA-256 over all images of the source, their split and size
        split: `train`, `validation`, `test` or `all`
        images: number of images in the complete store
        dtype: number format of the features
        remarks: notes on how images were prepared for the encoder
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
    """File of a store: its name in the index's folder, number of images, size in bytes, and digest."""

    file: str
    images: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class StoreIndex:
    """Index of a store: the shards written so far, in order. `facts.images` counts the images of all shards."""

    version: int
    shard_images: int
    facts: StoreFacts
    shards: tuple[Shard, ...] = ()


def index_path(path: Path) -> Path:
    """Return the path of a store's index."""
    return path.with_name(path.name + INDEX)


def read_index(path: Path) -> StoreIndex | None:
    """Return the index of the store at `path`; None if there is none.

    Raises:
        AfterimageError: the index is damaged or of another version
    """
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
    """Raise `AfterimageError` if a shard is missing or cut short, or not all shards are written yet."""
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
    """Writer of a store, shard by shard. An interrupted extraction continues and keeps its complete shards.

    Args:
        path: path of the store
        facts: metadata of the extraction
        shard_images: number of images in each shard but the last

    Raises:
        AfterimageError: `path` holds another extraction or another file
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
        remove_leftovers(path.parent, [index_path(path).name, *self._starts])
        self._save()

    def _is_whole(self, shard: Shard) -> bool:
        file = self.path.with_name(shard.file)
        return file.exists() and file.stat().st_size == shard.bytes and sha256(file) == shard.sha256

    @property
    def _starts(self) -> dict[str, int]:
        """First row of each shard, by the shard's name."""
        count = -(-self.facts.images // self.shard_images)
        if count == 1:
            return {self.path.name: 0}
        stem, suffix = self.path.stem, self.path.suffix
        names = [f"{stem}-{i:05}-of-{count:05}{suffix}" for i in range(1, count + 1)]
        return {name: i * self.shard_images for i, name in enumerate(names)}

    def missing(self) -> dict[str, range]:
        """Return the rows of each shard that is still to be written, by the shard's name."""
        end = self.facts.images
        starts = self._starts.items()
        return {
            name: range(start, min(end, start + self.shard_images))
            for name, start in starts
            if name not in self._done
        }

    def write(self, name: str, ids: Sequence[str], arrays: Mapping[str, Tensor]) -> None:
        """Write one of the missing shards.

        Args:
            name: name of the shard, from `missing`
            ids: names of the images
            arrays: `images`, and features by layer, one row for each image
        """
        file = self.path.with_name(name)
        named = {key if key == IMAGES else layer_key(key): values for key, values in arrays.items()}
        write_file(file, ids, named, {"version": VERSION, **to_dict(self.facts)})
        self._done[name] = Shard(name, len(ids), file.stat().st_size, sha256(file))
        self._save()

    def _save(self) -> None:
        shards = [to_dict(self._done[name]) for name in self._starts if name in self._done]
        write_json(index_path(self.path), {**to_dict(self.index), "shards": shards})


def _changed(before: StoreIndex, now: StoreIndex) -> list[str]:
    """Return the names of the settings in which two extractions differ."""
    names = [f.name for f in fields(StoreFacts) if f.name not in ("data_digest", "used")]
    changed = [name for name in names if getattr(before.facts, name) != getattr(now.facts, name)]
    if not changed and before.facts.data_digest != now.facts.data_digest:
        changed.append("images")
    if before.facts.used.identity != now.facts.used.identity and "weights" not in changed:
        changed.append("weights")
    return changed + ["shard_images"] * (before.shard_images != now.shard_images)


def read_facts(file: Path, values: Mapping[str, Any]) -> StoreFacts:
    """Return the facts in a file's metadata.

    Raises:
        AfterimageError: the metadata are of another version or damaged; the message names the file
    """
    try:
        if (version := values.get("version")) != VERSION:
            raise AfterimageError(f"version {version!r:.80}; this one reads {VERSION}")
        return from_dict(StoreFacts, {name: value for name, value in values.items() if name != "version"})
    except AfterimageError as error:
        raise AfterimageError(f"{shown(file)}: {METADATA}: {error}") from None


def layer_key(layer: str) -> str:
    """Return the name of a layer's features in a file."""
    return layer if layer == "features" else f"features.{layer}"
