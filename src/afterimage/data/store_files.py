"""File formats for features and their images: read without unpickling, written atomically."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from afterimage.config import (
    AfterimageError,
    DataConfig,
    from_dict,
    printable_path,
    to_dict,
    unknown_choice_error,
    utf8_path,
)
from afterimage.data.decode import decode
from afterimage.runs.files import atomic_file, read_object, remove_temporary_files, sha256, write_json
from afterimage.runs.results import FeatureMap, WeightsRecord

IMAGES, IDS, METADATA = "images", "ids", "afterimage"
"""Names of a file's entries beside `features` or `features.NAME`; the last is a JSON object."""
BYTES_PER_OBJECT = 32
"""Number of bytes that a number takes in a Python list."""
DEFAULT_MEMORY_BYTES = 16 * 2**30
BATCH = 256

Arrays = dict[str, Any]
"""Entries of a file by name: arrays, or tensors that are read from a `.safetensors` file on access."""


def read_file(path: Path) -> Arrays:
    """Read a `.safetensors`, `.npz` or `.parquet` file.

    Raises:
        AfterimageError: the file is missing, damaged or of another kind
    """
    if path.suffix not in READERS:
        raise unknown_choice_error("kind of store", path.suffix or path.name, READERS)
    if path.exists() and not path.is_file():  # opening a named pipe would block for ever
        raise AfterimageError(f"cannot read {printable_path(path)}: it is not a regular file")
    try:
        return READERS[path.suffix](path)
    except AfterimageError:
        raise
    except OSError as error:
        raise AfterimageError(f"cannot read {printable_path(path)}: {error.strerror or error}") from None
    except Exception as error:  # a damaged file may raise anything; a pickled array is a ValueError
        raise AfterimageError(f"cannot read {printable_path(path)}: {error}") from None


def write_file(
    path: Path, ids: Sequence[str], arrays: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> None:
    """Write a file for `read_file`, completely or not at all; equal arguments give equal bytes.

    Args:
        path: the file, whose suffix selects the format
        ids: names of the images
        arrays: `images` and `features.NAME`, one row for each image
        metadata: plain JSON values

    Raises:
        AfterimageError: the file cannot be written
    """
    try:
        with atomic_file(path) as file:
            WRITERS[path.suffix](file, ids, arrays, metadata)
    except OSError as error:
        raise AfterimageError(f"cannot write {printable_path(path)}: {error.strerror or error}") from error


def _read_safetensors(path: Path) -> Arrays:
    # The tensors are memory-mapped: their values are read on access.
    with utf8_path(path) as name, safe_open(name, "pt") as file:
        found: Arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata() or {}
    if METADATA in metadata:
        found[METADATA] = _parsed(metadata[METADATA])
        if IDS in found[METADATA]:
            found[IDS] = found[METADATA].pop(IDS)
    return found


def _write_safetensors(
    file: BinaryIO, ids: Sequence[str], arrays: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> None:
    # Ids go into the header, as tensors cannot hold text, and into one entry, as the order of several would vary.
    file.write(save(dict(arrays), {METADATA: json.dumps({**metadata, IDS: list(ids)})}))


def _parsed(text: str) -> dict[str, Any]:
    values = json.loads(text)
    if not isinstance(values, dict):
        raise ValueError(f"{METADATA} must be a JSON object, got {values!r:.80}")
    return values


def _read_npz(path: Path) -> Arrays:
    with np.load(path, allow_pickle=False) as file:
        _check_memory(path, sum(member.file_size for member in file.zip.infolist()))
        found = {name: np.asarray(file[name]) for name in file.files}  # bytes if a member is no array
    if METADATA in found:
        found[METADATA] = _parsed(str(found[METADATA]))
    return found


def _write_npz(
    file: BinaryIO, ids: Sequence[str], arrays: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> None:
    np.savez(
        file,
        **{name: values.numpy() for name, values in arrays.items()},
        **{IDS: np.array(list(ids)), METADATA: np.array(json.dumps(metadata))},
    )


def _arrow() -> tuple[Any, Any]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as parquet
    except ImportError:
        raise AfterimageError("Parquet needs pyarrow: pip install 'afterimage[datasets]'") from None
    return pa, parquet


def _read_parquet(path: Path) -> Arrays:
    pa, parquet = _arrow()
    batches, size = [], 0
    with parquet.ParquetFile(path) as file:
        # Read in batches, so that a small file cannot unpack into all memory. The sizes in the columns' metadata
        # are not used, because Arrow aborts the process if they are damaged.
        for batch in file.iter_batches(BATCH):
            size += sum(
                c.nbytes * (BYTES_PER_OBJECT // 4 if "list" in str(c.type) else 1) for c in batch.columns
            )
            _check_memory(path, size)
            batches.append(batch)
        table = pa.Table.from_batches(batches, file.schema_arrow)
    found: Arrays = {}
    for name in table.column_names:
        column = table.column(name).combine_chunks()
        if isinstance(column.type, pa.FixedShapeTensorType):
            found[name] = column.to_numpy_ndarray()
            continue
        rows = column.to_pylist()
        if name == IMAGES and rows and isinstance(rows[0], bytes | dict):
            rows = _decoded(path, rows)
        try:
            found[name] = np.asarray(rows)
        except ValueError:
            raise AfterimageError(f"{printable_path(path)}: {name} holds rows of different shapes") from None
    if (text := (table.schema.metadata or {}).get(METADATA.encode())) is not None:
        found[METADATA] = _parsed(text.decode())
    return found


def _write_parquet(
    file: BinaryIO, ids: Sequence[str], arrays: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> None:
    pa, parquet = _arrow()
    columns = {IDS: pa.array(list(ids), pa.string())}
    for name, values in arrays.items():
        columns[name] = pa.FixedShapeTensorArray.from_numpy_ndarray(values.numpy())
    table = pa.table(columns)
    parquet.write_table(table.replace_schema_metadata({METADATA: json.dumps(metadata)}), file)


def _decoded(path: Path, rows: list[Any]) -> list[np.ndarray]:
    """Decode image files, which must have one size, to `(H, W, 3)` uint8 each."""
    contents = [row["bytes"] if isinstance(row, dict) else row for row in rows]
    images: list[np.ndarray] = []
    for i, content in enumerate(contents):
        images.append(np.asarray(decode(content, f"{printable_path(path)}, image {i}")))
        if images[i].shape != images[0].shape:
            raise AfterimageError(f"{printable_path(path)}: image {i} has another size than image 0")
        _check_memory(path, len(contents) * images[0].size)
    return images


def _check_memory(path: Path, size: int) -> None:
    """Check that a file's unpacked `size` in bytes is at most half of this machine's memory."""
    memory = (
        os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if hasattr(os, "sysconf")
        else DEFAULT_MEMORY_BYTES
    )
    if size > memory // 2:
        raise AfterimageError(
            f"{printable_path(path)} takes {size / 2**30:.1f} GiB of memory, over half of this machine's "
            f"{memory / 2**30:.1f} GiB"
        )


READERS: dict[str, Callable[[Path], Arrays]] = {
    ".safetensors": _read_safetensors,
    ".npz": _read_npz,
    ".parquet": _read_parquet,
}

WRITERS: dict[str, Callable[[BinaryIO, Sequence[str], Mapping[str, Tensor], Mapping[str, Any]], None]] = {
    ".safetensors": _write_safetensors,
    ".npz": _write_npz,
    ".parquet": _write_parquet,
}

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""Number formats of stored features. `.npz` and `.parquet` cannot hold bfloat16, which NumPy and Arrow lack."""


INDEX = ".index.json"
VERSION = 1
"""Version of the index and of `StoreMetadata`: increase it whenever a key changes its name or its meaning."""


@dataclass(frozen=True)
class StoreMetadata:
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
    used: WeightsRecord
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

    shard_images: int
    facts: StoreMetadata
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
    values = read_object(file, "version", VERSION)
    try:
        index = from_dict(StoreIndex, values)
        if outside := [shard.file for shard in index.shards if Path(shard.file).name != shard.file]:
            raise AfterimageError(f"{outside[0]!r:.200} is not a file in its folder")
        return index
    except AfterimageError as error:
        raise AfterimageError(f"{printable_path(file)}: {error}") from None


class StoreWriter:
    """Writer of a store, shard by shard. An interrupted extraction continues and keeps its complete shards.

    Args:
        path: path of the store
        facts: metadata of the extraction
        shard_images: number of images in each shard but the last

    Raises:
        AfterimageError: `path` holds another extraction or another file
    """

    def __init__(self, path: Path, facts: StoreMetadata, shard_images: int) -> None:
        self.path, self.facts, self.shard_images = path, facts, shard_images
        self.index = StoreIndex(shard_images, facts)
        self._done: dict[str, Shard] = {}
        if (before := read_index(path)) is not None:
            if changed := _changed(before, self.index):
                raise AfterimageError(
                    f"{printable_path(path)} holds another extraction, with other {', '.join(changed)}: "
                    "choose another file, "
                    f"or delete its shards and {printable_path(index_path(path).name)}"
                )
            self._done = {shard.file: shard for shard in before.shards if self._is_whole(shard)}
        elif path.exists():
            raise AfterimageError(
                f"{printable_path(path)} exists, and no extraction has written it: choose another file"
            )
        remove_temporary_files(path.parent, [index_path(path).name, *self._rows()])
        self._save()

    def _is_whole(self, shard: Shard) -> bool:
        file = self.path.with_name(shard.file)
        return file.exists() and file.stat().st_size == shard.bytes and sha256(file) == shard.sha256

    def _rows(self) -> dict[str, range]:
        """Return the rows of each shard, by the shard's name."""
        total, each = self.facts.images, self.shard_images
        parts = [range(start, min(total, start + each)) for start in range(0, total, each)]
        if len(parts) == 1:
            return {self.path.name: parts[0]}
        stem, suffix = self.path.stem, self.path.suffix
        return {f"{stem}-{i:05}-of-{len(parts):05}{suffix}": part for i, part in enumerate(parts, 1)}

    def missing(self) -> dict[str, range]:
        """Return the rows of each shard that is still to be written, by the shard's name."""
        return {name: rows for name, rows in self._rows().items() if name not in self._done}

    def write(self, name: str, ids: Sequence[str], arrays: Mapping[str, Tensor]) -> None:
        """Write one of the `missing` shards: `ids` of its images, `images` and features by layer, a row for each."""
        file = self.path.with_name(name)
        named = {key if key == IMAGES else layer_key(key): values for key, values in arrays.items()}
        write_file(file, ids, named, {"version": VERSION, **to_dict(self.facts)})
        self._done[name] = Shard(name, len(ids), file.stat().st_size, sha256(file))
        self._save()

    def _save(self) -> None:
        shards = [to_dict(self._done[name]) for name in self._rows() if name in self._done]
        write_json(index_path(self.path), {"version": VERSION, **to_dict(self.index), "shards": shards})


def _changed(before: StoreIndex, now: StoreIndex) -> list[str]:
    """Return the names of the settings in which two extractions differ."""
    names = [f.name for f in fields(StoreMetadata) if f.name not in ("data_digest", "used")]
    changed = [name for name in names if getattr(before.facts, name) != getattr(now.facts, name)]
    if not changed and before.facts.data_digest != now.facts.data_digest:
        changed.append("images")
    if before.facts.used.identity != now.facts.used.identity and "weights" not in changed:
        changed.append("weights")
    return changed + ["shard_images"] * (before.shard_images != now.shard_images)


def read_facts(file: Path, values: Mapping[str, Any]) -> StoreMetadata:
    """Return the facts in a file's metadata.

    Raises:
        AfterimageError: the metadata are of another version or damaged; the message names the file
    """
    try:
        if (version := values.get("version")) != VERSION:
            raise AfterimageError(f"version {version!r:.80}; this one reads {VERSION}")
        return from_dict(StoreMetadata, {name: value for name, value in values.items() if name != "version"})
    except AfterimageError as error:
        raise AfterimageError(f"{printable_path(file)}: {METADATA}: {error}") from None


def layer_key(layer: str) -> str:
    """Return the name of a layer's features in a file."""
    return layer if layer == "features" else f"features.{layer}"
