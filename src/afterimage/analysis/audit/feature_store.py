"""Read a leaked store: features and their images from one file, never unpickled."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load_file
from torch import Tensor

from afterimage.config import (
    MAX_SIDE,
    SSIM_WINDOW,
    AfterimageError,
    DataConfig,
    FeatureSpec,
    local_path,
    shown,
    unknown,
    utf8_path,
)
from afterimage.data.decode import decode
from afterimage.data.examine import examine, value_notes
from afterimage.data.images import Data, ImageSet, Indices

IMAGES, IDS = "images", "ids"
OBJECT = 32
"""Bytes that a number takes in a list of Python's."""
MEMORY = 16 * 2**30
BATCH = 256
MAX_PREFIX = 5
"""Class token and registers: more tokens beside a square grid are taken for another shape of grid."""


class StoredImages(ImageSet):
    """One split of a store: images that cannot be cropped or flipped, since their features are given.

    Images are kept as uint8 `(N, 3, H, W)`, features as `(N, C, h, w)` by layer.
    """

    def __init__(self, ids: list[str], pixels: np.ndarray, features: Mapping[str, np.ndarray]) -> None:
        self.ids, self.pixels, self.stored = ids, pixels, features
        self.content = [hashlib.sha256(image.tobytes()).hexdigest() for image in pixels]

    def subset(self, indices: np.ndarray) -> StoredImages:
        features = {layer: maps[indices] for layer, maps in self.stored.items()}
        return StoredImages([self.ids[i] for i in indices], self.pixels[indices], features)

    def joined(self, other: StoredImages) -> StoredImages:
        features = {layer: np.concatenate([maps, other.stored[layer]]) for layer, maps in self.stored.items()}
        return StoredImages([*self.ids, *other.ids], np.concatenate([self.pixels, other.pixels]), features)

    def crops(
        self, indices: Indices, *, seed: int | None = None, epoch: int = 0, device: str | torch.device = "cpu"
    ) -> Float[Tensor, "batch 3 height width"]:
        """Return the whole images at `indices`, float32 in [0, 1]."""
        if seed is not None:
            raise AfterimageError("stored pairs cannot be cropped at random: set recipe.augment = false")
        chosen = torch.from_numpy(self.pixels[np.asarray(indices, np.int64)])
        return chosen.to(device).float().div_(255)

    def features(
        self, indices: Indices, layer: str, device: str | torch.device = "cpu"
    ) -> Float[Tensor, "batch _ _ _"]:
        return torch.from_numpy(self.stored[layer][np.asarray(indices, np.int64)]).float().to(device)


@dataclass(frozen=True, eq=False)
class Store:
    """A file's pairs, split by a seed into what an attacker may own and what is attacked."""

    data: Data
    specs: dict[str, FeatureSpec]
    image_size: tuple[int, int]
    digest: str
    notes: tuple[str, ...]


def load_pairs(path: str | Path, *, test_fraction: float = 0.2, seed: int = 42) -> Store:
    """Read pairs from `.safetensors`, `.npz` or `.parquet`: `images` and `features`, or `features.NAME` for more.

    Images are uint8 or floats in [0, 1], `(N, H, W, 3)` or `(N, 3, H, W)`, in Parquet also encoded files. Features
    are maps `(N, C, h, w)` or `(N, h, w, C)`, tokens `(N, L, C)` of a square grid, or vectors `(N, C)`; how they were
    understood is in `notes`. Optional `ids` name the images.

    Raises:
        AfterimageError: the file is missing, damaged or of another kind, lacks a part, holds values that are not
            finite, or its parts differ in length; it names the part.
    """
    path = Path(local_path(str(path)))
    if path.suffix not in READERS:
        raise unknown("kind of pairs file", path.suffix or path.name, READERS)
    if path.exists() and not path.is_file():  # opening a named pipe would wait for ever
        raise AfterimageError(f"cannot read {shown(path)}: it is not a regular file")
    try:
        arrays = READERS[path.suffix](path)
    except OSError as error:
        raise AfterimageError(f"cannot read {shown(path)}: {error.strerror or error}") from None
    layers = [name for name in arrays if name == "features" or name.startswith("features.")]
    if IMAGES not in arrays or not layers:
        raise AfterimageError(
            f"{shown(path)} must hold `images` and `features` (or `features.NAME`); "
            f"it holds {', '.join(sorted(arrays)) or 'nothing'}"
        )
    pixels = _pixels(f"{shown(path)}: {IMAGES}", arrays[IMAGES])
    size, notes, specs, maps = pixels.shape[-2:], [], {}, {}
    for name in layers:
        layer = name.partition(".")[2] or name
        maps[layer] = _maps(f"{shown(path)}: {name}", arrays[name], len(pixels), notes)
        specs[layer] = FeatureSpec(f"{shown(path.name)}:{layer}", *maps[layer].shape[1:])
    facts = [examine(Image.fromarray(image.transpose(1, 2, 0))) for image in pixels]
    notes += value_notes({"all": np.array(facts, np.int64).reshape(-1, 6)})
    if not SSIM_WINDOW <= min(size) <= MAX_SIDE:
        raise AfterimageError(
            f"{shown(path)}: images of {size[0]}x{size[1]}; their shorter side must have {SSIM_WINDOW}, for SSIM, to "
            f"{MAX_SIDE} pixels"
        )
    given = np.atleast_1d(arrays[IDS]) if IDS in arrays else None
    ids = [f"{i:06}" for i in range(len(pixels))] if given is None else [str(i) for i in given]
    if len(ids) != len(pixels) or len(set(ids)) != len(ids):
        raise AfterimageError(
            f"{shown(path)}: ids must name each of the {len(pixels)} images, each differently"
        )
    everything = StoredImages(ids, pixels, maps)
    order = np.random.default_rng(seed).permutation(len(ids))
    held = round(test_fraction * len(ids))
    rest = len(ids) - held
    if held < 2 or rest < 5:
        raise AfterimageError(
            f"{shown(path)} holds {len(ids)} pairs, too few to hold out {test_fraction:g} for the test"
        )
    cut = rest - max(1, rest // 5)
    train, validation, test = np.split(order, [cut, rest])
    parts = [everything.subset(part) for part in (train, validation, test)]
    # Part by part: another split of the same pairs is another measurement.
    hashed = hashlib.sha256(json.dumps([part.content for part in parts]).encode())
    for layer in maps:
        hashed.update(maps[layer].tobytes())
    config = DataConfig(source=f"pairs:{path}", resize=min(size), crop=min(size))
    data = Data(config, *parts, hashed.hexdigest(), ())
    return Store(data, specs, (int(size[0]), int(size[1])), hashed.hexdigest(), tuple(notes))


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        with utf8_path(path) as name:
            return load_file(name)
    except (SafetensorError, ValueError, TypeError, KeyError, AttributeError) as error:
        # NumPy has no bfloat16, among others.
        raise AfterimageError(f"cannot read {shown(path)}: {error}") from None


def _read_npz(path: Path) -> dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as file:
            _fits(path, sum(member.file_size for member in file.zip.infolist()))
            return {name: np.asarray(file[name]) for name in file.files}  # bytes where a member is no array
    except OSError:
        raise
    except Exception as error:  # a damaged archive raises anything; a pickled array is a ValueError
        raise AfterimageError(f"cannot read {shown(path)}: {error}") from None


def _read_parquet(path: Path) -> dict[str, Any]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as parquet
    except ImportError:
        raise AfterimageError("Parquet needs pyarrow: pip install 'afterimage[datasets]'") from None
    try:
        batches, size = [], 0
        with parquet.ParquetFile(path) as file:
            # Batch by batch, so that a small file cannot unpack to all memory; Arrow itself aborts the process where
            # the columns' metadata, which would tell, are damaged.
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
    except (AfterimageError, OSError):
        raise
    except Exception as error:  # a damaged file raises anything in Arrow, and rows may be of any kind
        raise AfterimageError(f"cannot read {shown(path)}: {error}") from None
    return {name: _stack(f"{shown(path)}: {name}", values) for name, values in arrays.items()}


def _decoded(path: Path, rows: list[Any]) -> list[np.ndarray]:
    """Encoded image files, all of one size: `(H, W, 3)` uint8 each."""
    contents = [row["bytes"] if isinstance(row, dict) else row for row in rows]
    images: list[np.ndarray] = []
    for i, content in enumerate(contents):
        images.append(np.asarray(decode(content, f"{shown(path)}, image {i}")))
        if images[i].shape != images[0].shape:
            raise AfterimageError(f"{shown(path)}: image {i} has another size than image 0")
        _fits(path, len(contents) * images[0].size)
    return images


def _fits(path: Path, size: int) -> None:
    """Raise where what a file unpacks to would take over half of this machine's memory."""
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


READERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    ".safetensors": _read_safetensors,
    ".npz": _read_npz,
    ".parquet": _read_parquet,
}


def _pixels(name: str, values: np.ndarray) -> np.ndarray:
    """uint8 `(N, 3, H, W)`."""
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


def _maps(name: str, values: np.ndarray, count: int, notes: list[str]) -> np.ndarray:
    """`(N, C, h, w)`, float."""
    real = values.dtype.kind in "iuf"  # no complex numbers, no times
    if not real or values.ndim == 0 or len(values) != count or not values.size:
        raise AfterimageError(
            f"{name} must be numbers for each of {count} images, got {values.shape} {values.dtype}"
        )
    with np.errstate(over="ignore"):  # what is too large for float32 is infinite, which is told
        finite = np.isfinite(values.astype(np.float32)).all()
    if not finite:
        raise AfterimageError(f"{name} holds values that are not finite")
    shape, kind = values.shape, "maps (N, C, h, w)"
    if values.ndim == 2:
        values, kind = values[:, :, None, None], "vectors (N, C)"
    elif values.ndim == 3:
        side = math.isqrt(shape[1])
        prefix = shape[1] - side**2
        if prefix > MAX_PREFIX:
            raise AfterimageError(
                f"{name} has {shape[1]} tokens, no square grid with at most {MAX_PREFIX} before it"
            )
        values = values[:, prefix:].transpose(0, 2, 1).reshape(count, shape[2], side, side)
        kind = f"tokens (N, L, C) of a {side}x{side} grid" + (
            f", the first {prefix} left out" if prefix else ""
        )
    elif values.ndim == 4 and shape[1] == shape[2] != shape[3]:
        values, kind = values.transpose(0, 3, 1, 2), "maps (N, h, w, C)"
    elif values.ndim != 4:
        raise AfterimageError(f"{name} must have 2, 3 or 4 axes, got shape {shape}")
    notes.append(f"{name.rpartition(' ')[2]}: {'x'.join(map(str, shape))} taken as {kind}")
    return np.ascontiguousarray(values, dtype=np.float32)
