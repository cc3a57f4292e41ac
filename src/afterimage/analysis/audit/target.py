"""Open the target of an audit, a network or a store of features, with its images and the attacker's."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from afterimage.config import (
    RANDOM_WEIGHTS,
    AfterimageError,
    DataConfig,
    FeatureSpec,
    local_path,
    printable_path,
    size_text,
    unknown_choice_error,
)
from afterimage.config.audit import AuditConfig
from afterimage.data.dataset import load_data
from afterimage.data.decode import examine, value_notes
from afterimage.data.duplicates import near_duplicates
from afterimage.data.feature_store import FeatureStore, open_store
from afterimage.data.images import Data, ImageSet, Indices
from afterimage.data.store_files import layer_key
from afterimage.evaluation.evaluate import Box
from afterimage.models.decoders.canvas import visible_box
from afterimage.models.encoders.encoder import Encoder
from afterimage.models.encoders.layers import describe_unseen
from afterimage.runs.results import VisibleRegion, WeightsRecord
from afterimage.runtime.terminal import Progress, no_progress

BATCH = 256
"""Number of stored images that are read at a time."""


@dataclass
class AuditTarget:
    """Target of an audit: a network or a store of features, with all images.

    Attributes:
        name: name of the network or store
        specs: shapes of the features by layer
        weights: the network's weights; None for a store, which has no network
        image_size: `(height, width)` in pixels
        data: test images, and training images, on which defences are fitted
        attacker_pool: images that an attacker may own
        notes: notes on the network and the images
        normalised: mean and std of a user's own network, which states them itself; None for any other
        failures: errors of the requested layers that cannot be read, by layer
    """

    config: AuditConfig
    name: str
    specs: dict[str, FeatureSpec]
    weights: WeightsRecord | None
    image_size: tuple[int, int]
    data: Data
    attacker_pool: Data
    notes: list[str] = field(default_factory=list)
    normalised: list[tuple[float, ...]] | None = None
    failures: dict[str, Exception] = field(default_factory=dict)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers that can be read."""
        return tuple(self.specs)

    @property
    def is_stored(self) -> bool:
        """True if the features come from a store."""
        return self.weights is None

    def encoder(self, layer: str) -> Encoder:
        """Return the frozen encoder that ends at one layer."""
        return _encoder(self.config, [layer])

    def box(self, layer: str) -> Box | None:
        """Return the box of an image that the receptive fields of a layer's locations cover; None if they cover all."""
        return visible_box([self.specs[layer]], self.image_size)

    def visible_region(self, layer: str) -> VisibleRegion | None:
        """Return this box with its share of the pixels and a description of the pixels outside; None if it is all."""
        box = self.box(layer)
        if box is None:
            return None
        (top, bottom), (left, right) = box
        height, width = self.image_size
        spec = self.specs[layer]
        unseen = describe_unseen(spec.rows, spec.columns, self.image_size)
        return VisibleRegion(*box, (bottom - top) * (right - left) / (height * width), unseen)


def open_target(
    config: AuditConfig, *, cache: Path | None = None, progress: Progress = no_progress
) -> AuditTarget:
    """Open the network and its weights, or the store, and all images.

    Layers that cannot be read are left out and listed in the target's `failures`.

    Raises:
        AfterimageError: the network, its weights, the store, the images or all layers cannot be read
    """
    if config.pairs:
        return _store(config)
    layers, failures = list(config.layers), {}
    try:
        # All layers at once, so that a wrong one is reported before anything is trained.
        encoder = _encoder(config, layers)
    except Exception as error:
        for layer in layers:
            try:
                _encoder(config, [layer])
            except Exception as found:
                failures[layer] = found
        layers = [layer for layer in layers if layer not in failures]
        if not layers or not failures:
            raise failures.get(config.layers[0], error) from None
        encoder = _encoder(config, layers)
    data = load_data(config.data, cache=cache, progress=progress)
    pool, near = data, []
    if config.attackers.data:
        elsewhere = replace(config.data, source=config.attackers.data, test="")
        pool = load_data(elsewhere, cache=cache, progress=progress)
        near = [f"the attacker's images: {note}" for note in near_duplicates(replace(pool, test=data.test))]
    notes = [*encoder.notes, *data.notes, *near]
    if encoder.weights.is_random:
        which = f"{encoder.weights.label.upper()} weights ({RANDOM_WEIGHTS[encoder.weights.label]})"
        notes.append(f"{which}: nothing here says anything about a trained network")
    size = config.data.size
    specs = dict(zip(layers, encoder.specs, strict=True))
    weights = encoder.weights.record
    network = encoder.network
    normalised = [network.mean, network.std] if network.is_custom else None
    return AuditTarget(config, network.name, specs, weights, size, data, pool, notes, normalised, failures)


def _encoder(config: AuditConfig, layers: list[str]) -> Encoder:
    size = config.data.size
    return Encoder(config.model, layers=layers, weights=config.weights, image_size=size, seed=config.seed)


def _store(config: AuditConfig) -> AuditTarget:
    data, store = load_stored_pairs(
        config.pairs, test_fraction=config.test_fraction, seed=config.data.split_seed
    )
    layers = config.layers or tuple(store.specs)
    specs = {layer: store.specs[layer] for layer in layers if layer in store.specs}
    failures: dict[str, Exception] = {
        layer: unknown_choice_error(f"layer of {config.pairs}", layer, store.specs)
        for layer in layers
        if layer not in specs
    }
    if not specs:
        raise failures[layers[0]]
    name = printable_path(Path(local_path(config.pairs)).name)
    augmented = "attackers train without random crops and flips, since stored features belong to whole images"
    notes = [*data.notes, augmented]
    return AuditTarget(config, name, specs, None, store.image_size, data, data, notes, failures=failures)


class StoredImages(ImageSet):
    """Images of one split of a store. They cannot be cropped or flipped, since their features are fixed."""

    def __init__(self, store: FeatureStore, rows: np.ndarray) -> None:
        self.store, self.rows = store, rows
        self.ids, self.content_digests = (
            [values[i] for i in rows] for values in (store.ids, store.content_digests)
        )

    def subset(self, indices: np.ndarray) -> StoredImages:
        return StoredImages(self.store, self.rows[indices])

    def concat(self, other: StoredImages) -> StoredImages:
        return StoredImages(self.store, np.concatenate([self.rows, other.rows]))

    def crops(
        self, indices: Indices, *, seed: int | None = None, epoch: int = 0, device: str | torch.device = "cpu"
    ) -> Float[Tensor, "batch 3 height width"]:
        """Return the whole images at `indices`, float32 in [0, 1]."""
        if seed is not None:
            raise AfterimageError("stored pairs cannot be cropped at random: set recipe.augment = false")
        chosen = torch.from_numpy(self.store.images(self._rows(indices)))
        return chosen.to(device).float().div_(255)

    def features(
        self, indices: Indices, layer: str, device: str | torch.device = "cpu"
    ) -> Float[Tensor, "batch _ _ _"]:
        return self.store.features(layer, self._rows(indices)).to(device)

    def _rows(self, indices: Indices) -> np.ndarray:
        return self.rows[np.asarray(indices, np.int64)]


def load_stored_pairs(
    path: str | Path, *, test_fraction: float = 0.2, seed: int = 42
) -> tuple[Data, FeatureStore]:
    """Open a store of features and images, and split it into pairs that an attacker may own and pairs to attack.

    Returns:
        the images, with notes on how the layout of features was interpreted, and a digest of splits and all features;
        and the store

    Raises:
        AfterimageError: `open_store` raises it, or there are too few pairs
    """
    store = open_store(path)
    notes = [f"{layer_key(layer)}: {kind}" for layer, kind in store.layout_descriptions.items()]
    chunks = np.split(np.arange(len(store)), range(BATCH, len(store), BATCH))
    facts = [
        examine(Image.fromarray(image.transpose(1, 2, 0)))
        for chunk in chunks
        for image in store.images(chunk)
    ]
    notes += value_notes({"all": np.array(facts, np.int64).reshape(-1, 6)})
    order = np.random.default_rng(seed).permutation(len(store))
    held = round(test_fraction * len(store))
    rest = len(store) - held
    if held < 2 or rest < 5:
        raise AfterimageError(
            f"{printable_path(store.path)} holds {len(store)} pairs, too few to hold out {test_fraction:g} for the test"
        )
    cut = rest - max(1, rest // 5)
    parts = [StoredImages(store, part) for part in np.split(order, [cut, rest])]
    # By split: another split of the same pairs is another measurement.
    hashed = hashlib.sha256(json.dumps([part.content_digests for part in parts]).encode())
    for layer in store.specs:
        for chunk in chunks:
            hashed.update(store.features(layer, chunk).numpy().tobytes())
    size = store.image_size
    config = DataConfig(source=f"pairs:{store.path}", resize=min(size), crop=size_text(size))
    return Data(config, *parts, hashed.hexdigest(), tuple(notes)), store
