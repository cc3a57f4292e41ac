"""Leaked store of images and features, split into pairs that an attacker may own and pairs to attack."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from afterimage.config import AfterimageError, DataConfig, FeatureSpec, shown, size_text
from afterimage.data.examine import examine, value_notes
from afterimage.data.feature_store import FeatureStore, open_store
from afterimage.data.images import Data, ImageSet, Indices
from afterimage.data.store_files import layer_key

BATCH = 256


class StoredImages(ImageSet):
    """One split of a store: images that cannot be cropped or flipped, since their features are fixed."""

    def __init__(self, store: FeatureStore, rows: np.ndarray) -> None:
        self.store, self.rows = store, rows
        self.ids, self.content = ([values[i] for i in rows] for values in (store.ids, store.content))

    def subset(self, indices: np.ndarray) -> StoredImages:
        return StoredImages(self.store, self.rows[indices])

    def joined(self, other: StoredImages) -> StoredImages:
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


@dataclass(frozen=True, eq=False)
class Store:
    """Pairs of a store, split into pairs that an attacker may own and pairs to attack.

    Attributes:
        data: the images: those of an attacker for training and validation, and the test images to attack
        specs: shapes of the features by layer
        image_size: `(height, width)` in pixels
        digest: SHA-256 of the images of each split and of all features
        notes: remarks for the audit's notes, such as how the features were understood
    """

    data: Data
    specs: dict[str, FeatureSpec]
    image_size: tuple[int, int]
    digest: str
    notes: tuple[str, ...]


def load_pairs(path: str | Path, *, test_fraction: float = 0.2, seed: int = 42) -> Store:
    """Open a store of features and images, and split it.

    Args:
        path: the store, see `open_store`
        test_fraction: share of the pairs that is held out for testing
        seed: seed of the split

    Raises:
        AfterimageError: `open_store` raises it, or there are too few pairs
    """
    store = open_store(path)
    notes = [f"{layer_key(layer)}: {kind}" for layer, kind in store.kinds.items()]
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
            f"{shown(store.path)} holds {len(store)} pairs, too few to hold out {test_fraction:g} for the test"
        )
    cut = rest - max(1, rest // 5)
    parts = [StoredImages(store, part) for part in np.split(order, [cut, rest])]
    # By split: another split of the same pairs is another measurement.
    hashed = hashlib.sha256(json.dumps([part.content for part in parts]).encode())
    for layer in store.specs:
        for chunk in chunks:
            hashed.update(store.features(layer, chunk).numpy().tobytes())
    size = store.image_size
    config = DataConfig(source=f"pairs:{store.path}", resize=min(size), crop=size_text(size))
    data = Data(config, *parts, hashed.hexdigest(), ())
    return Store(data, store.specs, store.image_size, hashed.hexdigest(), tuple(notes))
