"""Stored features in place of an encoder, to train and measure decoders without the encoder."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from afterimage.config import (
    AfterimageError,
    FeaturesConfig,
    FeatureSpec,
    local_path,
    printable_path,
    size_text,
    unknown_choice_error,
)
from afterimage.data.dataset import SPLITS
from afterimage.data.feature_store import FeatureStore, open_store
from afterimage.data.images import Data
from afterimage.models.reconstructor import FeatureSource
from afterimage.runs.results import FeatureMap, WeightsRecord
from afterimage.runtime.terminal import Progress, no_progress

BATCH = 64


class StoredEncoders(FeatureSource):
    """Lookup of the stored features of images, with the interface of a `MultiEncoder`.

    An image is identified by the SHA-256 of its pixels, so that no image is paired with the features of another one.

    Args:
        store: the feature store
        sources: sources of the wanted layers, as in `store.specs`; empty for all layers

    Raises:
        AfterimageError: the store has no such layer
    """

    def __init__(self, store: FeatureStore, sources: Sequence[str] = ()) -> None:
        super().__init__()
        self.store, known = store, {spec.source: layer for layer, spec in store.specs.items()}
        self.sources = tuple(sources or known)
        for source in self.sources:
            if source not in known:
                raise unknown_choice_error(f"layer of {printable_path(store.path)}", source, known)
        self._layers = [known[source] for source in self.sources]
        self._rows = {content: row for row, content in enumerate(store.content_digests)}
        self._unused = ""
        self.eval()

    @property
    def specs(self) -> tuple[FeatureSpec, ...]:
        """Shape and placement of each source's features."""
        return tuple(self.store.specs[layer] for layer in self._layers)

    def describe(self) -> list[FeatureMap]:
        """Return each layer's description by the encoder; if the store has none, only shape and reduction are set."""
        facts = self.store.facts
        if facts is not None:
            found = {one.source: one for one in facts.features}
            return [found[source] for source in self.sources]
        none = {"module": "", "order": 0, "encoder_parameters": 0, "encoder_macs": 0}
        height = self.store.image_size[0]
        return [
            FeatureMap(spec.source, *spec.shape, reduction=height / spec.height, **none)
            for spec in self.specs
        ]

    def weights_of(self, sources: Sequence[str]) -> list[WeightsRecord]:
        """Return the encoder weights that the features were computed with; the store itself if they are unknown."""
        store = self.store
        if store.facts is not None:
            return [store.facts.used]
        return [
            WeightsRecord(
                printable_path(store.path.name),
                "store",
                printable_path(store.path),
                store.digest,
                "unknown",
                False,
            )
        ]

    def notes_of(self, sources: Sequence[str]) -> list[str]:
        """Return remarks on the origin of the features, on the encoder, and on unused images that `check` found."""
        facts, path = self.store.facts, printable_path(self.store.path)
        kind = "as they are in the file, by whatever made them" if facts is None else facts.dtype
        origin = (
            f"features come from {path} ({kind}), not from an encoder; they are of centre crops: training has no "
            "random crops and flips"
        )
        return [origin, *([] if facts is None else facts.remarks), *filter(None, [self._unused])]

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> list[Tensor]:
        """Look up the features of images `(B, 3, H, W)` in [0, 1].

        Returns:
            the feature map `(B, C, h, w)` of each source

        Raises:
            AfterimageError: the store has no image with these pixels
        """
        rows = [self._rows.get(content) for content in _contents(images)]
        if None in rows:
            raise AfterimageError(
                f"{printable_path(self.store.path)} has no features of an image: its pixels are none of "
                f"the {len(self.store):,} "
                f"images' there. Other images need the encoder{self._encoder()}"
            )
        return [self.store.features(layer, rows).to(images.device) for layer in self._layers]

    def _encoder(self) -> str:
        facts = self.store.facts
        return (
            ", which is not recorded in the store"
            if facts is None
            else f" {facts.model}: --weights {facts.weights}"
        )

    def check(self, data: Data) -> None:
        """Raise an `AfterimageError` unless the store has features of every image's pixels; note unused images.

        Of a split with streamed images only the first batch is checked here; `forward` checks the others when used.
        """
        store, name, config = self.store, printable_path(self.store.path), data.config
        facts = store.facts
        resize = config.resize if facts is None else facts.data.resize
        if (resize, store.image_size) != (config.resize, config.size):
            stored, now = size_text(store.image_size), size_text(config.size)
            raise AfterimageError(
                f"{name}: features are of images of {stored} pixels, resized to {resize} before, but those of this run "
                f"have {now}, resized to {config.resize} before: give --size {stored} --resize {resize}"
            )
        content = dict(zip(store.ids, store.content_digests, strict=True)) if store.has_ids else {}
        used: set[str] = set()
        for split, part in zip(SPLITS, (data.train, data.validation, data.test), strict=True):
            missing = [one for one in part.ids if one not in content] if store.has_ids else []
            if missing:
                raise AfterimageError(
                    f"{name} has no features of {len(missing):,} of the {len(part):,} {split} images, for example "
                    f"{printable_path(missing[0])}: extract them too"
                )
            used.update(part.ids)
            checked = np.arange(min(len(part), BATCH) if part.streamed else len(part))
            chunks = np.split(checked, range(BATCH, len(checked), BATCH))
            for chunk, images in zip(chunks, part.batches(chunks), strict=True):
                for i, found in zip(chunk, _contents(images), strict=True):
                    one = part.ids[i]
                    if store.has_ids and content[one] != found:
                        raise AfterimageError(
                            f"{name}: features of {printable_path(one)} are of other pixels than the "
                            f"{split} image of that "
                            "name: it was prepared otherwise, or is another image"
                        )
                    if found not in self._rows:
                        raise AfterimageError(
                            f"{name} has no features of the {split} image {printable_path(one)}"
                        )
        if unused := [one for one in content if one not in used]:
            self._unused = (
                f"{name} also has features of {len(unused):,} ids that are no images of this run, for example "
                f"{printable_path(unused[0])}"
            )


def _contents(images: Tensor) -> list[str]:
    """Return the SHA-256 of each image's pixels as in `FeatureStore.content_digests`; images are in [0, 1]."""
    pixels = images.mul(255).round().to(torch.uint8).cpu().contiguous().numpy()
    return [hashlib.sha256(image.tobytes()).hexdigest() for image in pixels]


def open_features(config: FeaturesConfig, progress: Progress = no_progress) -> FeatureStore:
    """Open the feature store of a run; raise an `AfterimageError` if its digest is not that of the run's settings."""
    store = open_store(Path(local_path(config.path)), progress)
    if config.sha256 != store.digest:
        raise AfterimageError(
            f"{printable_path(store.path)} is not the store that the run was made for: digest "
            f"{config.sha256[:12]} then, "
            f"{store.digest[:12]} now"
        )
    return store
