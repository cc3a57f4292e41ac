"""File formats for features and their images: read without unpickling, written atomically."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from afterimage.config import AfterimageError, shown, unknown, utf8_path
from afterimage.data.decode import decode
from afterimage.runs.files import atomic_file

IMAGES, IDS, METADATA = "images", "ids", "afterimage"
"""Names of a file's entries beside `features` or `features.NAME`; the last is a JSON object."""
OBJECT = 32
"""Number of bytes that a number takes in a Python list."""
MEMORY = 16 * 2**30
BATCH = 256

Arrays = dict[str, Any]
"""Entries of a file by name: arrays, or tensors that are read from a `.safetensors` file on access."""


def read_file(path: Path) -> Arrays:
    """Read a `.safetensors`, `.npz` or `.parquet` file.

    Raises:
        AfterimageError: the file is missing, damaged or of another kind
    """
    if path.suffix not in READERS:
        raise unknown("kind of store", path.suffix or path.name, READERS)
    if path.exists() and not path.is_file():  # opening a named pipe would block for ever
        raise AfterimageError(f"cannot read {shown(path)}: it is not a regular file")
    try:
        return READERS[path.suffix](path)
    except OSError as error:
        raise AfterimageError(f"cannot read {shown(path)}: {error.strerror or error}") from None


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
        raise AfterimageError(f"cannot write {shown(path)}: {error.strerror or error}") from error


def _read_safetensors(path: Path) -> Arrays:
    try:
        # The tensors are memory-mapped: their values are read on access.
        with utf8_path(path) as name, safe_open(name, "pt") as file:
            found: Arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
        if METADATA in metadata:
            found[METADATA] = _parsed(metadata[METADATA])
            if IDS in found[METADATA]:
                found[IDS] = found[METADATA].pop(IDS)
        return found
    except OSError:
        raise
    except (SafetensorError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise AfterimageError(f"cannot read {shown(path)}: {error}") from None


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
    try:
        with np.load(path, allow_pickle=False) as file:
            _fits(path, sum(member.file_size for member in file.zip.infolist()))
            found = {name: np.asarray(file[name]) for name in file.files}  # bytes if a member is no array
        if METADATA in found:
            found[METADATA] = _parsed(str(found[METADATA]))
        return found
    except OSError:
        raise
    except Exception as error:  # a damaged archive raises anything; a pickled array is a ValueError
        raise AfterimageError(f"cannot read {shown(path)}: {error}") from None


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
    try:
        batches, size = [], 0
        with parquet.ParquetFile(path) as file:
            # Read in batches, so that a small file cannot unpack into all memory. The sizes in the columns' metadata
            # are not used, because Arrow aborts the process if they are damaged.
            for batch in file.iter_batches(BATCH):
                size += sum(c.nbytes * (OBJECT // 4 if "list" in str(c.type) else 1) for c in batch.columns)
                _fits(path, size)
                batches.append(batch)
            table = pa.Table.from_batches(batches, file.schema_arrow)
        arrays = {}
        for name in table.column_names:
            column = table.column(name).combine_chunks()
            shaped = isinstance(column.type, pa.FixedShapeTensorType)
            arrays[name] = column.to_numpy_ndarray() if shaped else column.to_pylist()
            if name == IMAGES and not shaped and arrays[name] and isinstance(arrays[name][0], bytes | dict):
                arrays[name] = _decoded(path, arrays[name])
        text = (table.schema.metadata or {}).get(METADATA.encode())
        metadata = {} if text is None else {METADATA: _parsed(text.decode())}
    except (AfterimageError, OSError):
        raise
    except Exception as error:  # Arrow may raise anything on a damaged file, and rows may be of any type
        raise AfterimageError(f"cannot read {shown(path)}: {error}") from None
    return {name: _stack(f"{shown(path)}: {name}", values) for name, values in arrays.items()} | metadata


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
        images.append(np.asarray(decode(content, f"{shown(path)}, image {i}")))
        if images[i].shape != images[0].shape:
            raise AfterimageError(f"{shown(path)}: image {i} has another size than image 0")
        _fits(path, len(contents) * images[0].size)
    return images


def _fits(path: Path, size: int) -> None:
    """Check that a file's unpacked `size` in bytes is at most half of this machine's memory."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else MEMORY
    if size > memory // 2:
        raise AfterimageError(
            f"{shown(path)} takes {size / 2**30:.1f} GiB of memory, over half of this machine's "
            f"{memory / 2**30:.1f} GiB"
        )


def _stack(name: str, values: Any) -> np.ndarray:
    try:
        return np.asarray(values)
    except ValueError:
        raise AfterimageError(f"{name} holds rows of different shapes") from None


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
