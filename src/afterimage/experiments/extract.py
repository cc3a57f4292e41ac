"""Extraction of features to disk, with their images, for `audit --feature-store` and `train --features`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from afterimage.config import (
    MAX_BATCH,
    MAX_IMAGES,
    MAX_SEED,
    AfterimageError,
    DataConfig,
    FeatureSpec,
    RecipeConfig,
    absolute_weights,
    check_choice,
    check_range,
    printable_path,
    split_source,
    unknown_choice_error,
)
from afterimage.data.dataset import SPLITS, count_images, load_data
from afterimage.data.images import ImageSet
from afterimage.data.store_files import DTYPES, IMAGES, WRITERS, StoreMetadata, StoreWriter
from afterimage.models.encoders.providers import at_native_size, resolve_source
from afterimage.models.encoders.tracing import layer_info
from afterimage.models.reconstructor import MultiEncoder
from afterimage.runs.results import FeatureMap
from afterimage.runtime.device import create_single_device_fabric
from afterimage.runtime.terminal import Progress, no_progress
from afterimage.training.feature_loader import FeatureLoader, RunContext

SHARD_BYTES = 2**28
"""Default size of a shard in bytes. Writing a shard takes about three times as much memory."""


@dataclass(frozen=True)
class Extraction:
    """Settings of a feature extraction: layers, images and file format.

    Attributes:
        sources: layers of one encoder, `model:layer` each
        data: source of the images and how they are split
        split: the split to extract: `train`, `validation`, `test` or `all`
        weights: `pretrained`, the name of a random control, or a path
        seed: seed of random weights
        dtype: number format of the features: `float32`, `float16` or `bfloat16`
        shard_images: number of images per file; None for as many as fit in `SHARD_BYTES`
        batch_size: number of images per encoder pass
    """

    sources: tuple[str, ...]
    data: DataConfig = DataConfig()
    split: str = "all"
    weights: str = "pretrained"
    seed: int = 42
    dtype: str = "float32"
    shard_images: int | None = None
    batch_size: int = 16

    def __post_init__(self) -> None:
        if not self.sources:
            raise AfterimageError("name at least one MODEL:LAYER, for example resnet34.tv_in1k:layer1")
        sources = tuple(dict.fromkeys(map(resolve_source, self.sources)))
        models = dict.fromkeys(split_source(source)[0] for source in sources)
        if len(models) > 1:
            raise AfterimageError(
                f"a store holds features of one encoder, got {', '.join(models)}: extract each into a store of its own"
            )
        check_choice("split", self.split, (*SPLITS, "all"))
        check_choice("dtype", self.dtype, DTYPES)
        check_range("seed", self.seed, 0, MAX_SEED)
        check_range("shard_images", 1 if self.shard_images is None else self.shard_images, 1, MAX_IMAGES)
        check_range("batch_size", self.batch_size, 1, MAX_BATCH)
        object.__setattr__(self, "sources", sources)
        object.__setattr__(self, "data", at_native_size(self.data, sources))
        object.__setattr__(self, "weights", absolute_weights(self.weights))

    def image_bytes(self, specs: Sequence[FeatureSpec]) -> tuple[int, list[int]]:
        """Return the bytes of one image's pixels, and of its features in each layer."""
        size = torch.finfo(DTYPES[self.dtype]).bits // 8
        return 3 * math.prod(self.data.size), [size * spec.values for spec in specs]

    def images_per_shard(self, specs: Sequence[FeatureSpec], images: int) -> int:
        """Return the number of images in each shard except the last."""
        pixels, features = self.image_bytes(specs)
        return min(images, self.shard_images or max(1, SHARD_BYTES // (pixels + sum(features))))


@dataclass(frozen=True)
class StoreSize:
    """Size of the store that an extraction would write.

    Attributes:
        layers: description of each layer's features, such as their shape
        images: number of images
        pixels: bytes of all images
        features: bytes of all features, by layer
        shards: number of files
    """

    layers: tuple[FeatureMap, ...]
    images: int
    pixels: int
    features: tuple[int, ...]
    shards: int


def plan_extraction(settings: Extraction, path: Path, *, cache: Path | None = None) -> StoreSize:
    """Compute the size of the store that an extraction would write, without decoding images or loading weights.

    Args:
        settings: settings of the extraction
        path: path of the store, as for `extract`
        cache: folder of downloaded images; None for the default

    Raises:
        AfterimageError: the file type, a model, a layer or the images cannot be used
    """
    _check_kind(settings, path)
    layers = tuple(layer_info(source, settings.data.size) for source in settings.sources)
    counts = count_images(settings.data, cache=cache)
    images = sum(counts.values()) if settings.split == "all" else counts[settings.split]
    pixels, features = settings.image_bytes(layers)
    shards = math.ceil(images / settings.images_per_shard(layers, images))
    return StoreSize(layers, images, images * pixels, tuple(images * size for size in features), shards)


def extract(
    settings: Extraction,
    path: Path,
    *,
    cache: Path | None = None,
    accelerator: str = "auto",
    progress: Progress = no_progress,
) -> StoreMetadata:
    """Write a feature store shard by shard on one pass through the encoder; existing complete shards are kept.

    Args:
        settings: settings of the extraction
        path: path of the store, a `.safetensors`, `.npz` or `.parquet` file; several shards are named after it
        cache, accelerator, progress: as for `queue.train_runs`

    Returns:
        description of the store's contents

    Raises:
        AfterimageError: the path already holds something else, a model, a layer, weights or images cannot be used, two
            images have the same id, or features are not finite in the number format; the message names the image
    """
    _check_kind(settings, path)
    fabric = create_single_device_fabric(accelerator, "32-true")
    encoders = MultiEncoder(
        settings.sources, weights=settings.weights, image_size=settings.data.size, seed=settings.seed
    )
    data = load_data(settings.data, cache=cache, progress=progress)
    parts = [getattr(data, name) for name in (SPLITS if settings.split == "all" else (settings.split,))]
    ids = [one for part in parts for one in part.ids]
    if doubled := [one for one, count in Counter(ids).items() if count > 1]:
        raise AfterimageError(
            f"{len(doubled)} ids name two images, for example {printable_path(doubled[0])}, once from "
            f"{settings.data.source} and "
            f"once from {settings.data.test}: extract them with --split into two stores, or rename the images"
        )
    (network,) = (encoder.network for encoder in encoders.encoders)
    facts = StoreMetadata(
        model=network.name,
        features=tuple(encoders.describe()),
        used=encoders.weights_of(encoders.sources)[0],
        weights=settings.weights,
        seed=settings.seed,
        mean=tuple(network.mean),
        std=tuple(network.std),
        data=settings.data,
        data_digest=data.digest,
        split=settings.split,
        images=len(ids),
        dtype=settings.dtype,
        remarks=tuple(encoders.notes_of(encoders.sources)),
    )
    writer = StoreWriter(path, facts, settings.images_per_shard(encoders.specs, len(ids)))
    recipe = RecipeConfig(batch_size=settings.batch_size)
    context = RunContext(progress=progress)
    loader = FeatureLoader(
        encoders.to(fabric.device), data, recipe, fabric, seed=settings.seed, context=context
    )
    missing = writer.missing()
    done = len(ids) - sum(map(len, missing.values()))
    if done:
        progress(f"{done:,} of {len(ids):,} images are there", 1, 1)
    for name, rows in missing.items():
        writer.write(name, [ids[row] for row in rows], _shard(loader, parts, rows, settings, done, len(ids)))
        done += len(rows)
    return facts


def _check_kind(settings: Extraction, path: Path) -> None:
    if path.suffix not in WRITERS:
        raise unknown_choice_error("kind of store", path.suffix or path.name, WRITERS)
    if settings.dtype == "bfloat16" and path.suffix != ".safetensors":
        raise AfterimageError(
            f"{printable_path(path)}: bfloat16 goes into .safetensors; {path.suffix} has float32 or float16"
        )


def _shard(
    loader: FeatureLoader, parts: Sequence[ImageSet], rows: range, settings: Extraction, done: int, total: int
) -> dict[str, Tensor]:
    """Return the images of the given rows, uint8, and their features in each layer, by name."""
    dtype, specs = DTYPES[settings.dtype], loader.encoders.specs
    pixels = torch.empty(len(rows), 3, *settings.data.size, dtype=torch.uint8)
    features = [torch.empty(len(rows), *spec.shape, dtype=dtype) for spec in specs]
    position = 0
    for part, indices in _indices(parts, rows):
        for chunk, images, maps in loader.batches(part, indices):
            chunk_rows = slice(position, position + len(chunk))
            loader.non_finite_check.check("the extraction", range(len(specs)))
            pixels[chunk_rows] = images.mul(255).round().to(torch.uint8).cpu()
            for spec, stored, found in zip(specs, features, maps, strict=True):
                stored[chunk_rows] = found
                if not (finite := stored[chunk_rows].flatten(1).isfinite().all(1)).all():
                    image = part.ids[int(chunk[int(finite.logical_not().nonzero()[0])])]
                    raise AfterimageError(
                        f"the features of {spec.source} go beyond {settings.dtype}'s largest number for image "
                        f"{printable_path(image)}: take --dtype bfloat16 or float32"
                    )
            position += len(chunk)
            loader.context.progress("extracting", done + position, total)
    return {IMAGES: pixels, **{spec.layer: stored for spec, stored in zip(specs, features, strict=True)}}


def _indices(parts: Sequence[ImageSet], rows: range) -> Iterator[tuple[ImageSet, Tensor]]:
    """Yield each part that holds some of the rows, which count over all parts, with their indices in that part."""
    start = 0
    for part in parts:
        inside = range(max(rows.start, start), min(rows.stop, start + len(part)))
        if inside:
            yield part, torch.arange(inside.start - start, inside.stop - start)
        start += len(part)
