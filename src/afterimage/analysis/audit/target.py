"""Open the target of an audit, a network or a store of features, with its images and the attacker's."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from afterimage.analysis.audit.feature_store import load_pairs
from afterimage.config import RANDOM_WEIGHTS, FeatureSpec, local_path, shown, unknown
from afterimage.config.audit import AuditConfig
from afterimage.data.dataset import load_data
from afterimage.data.duplicates import near_duplicates
from afterimage.data.images import Data
from afterimage.evaluation.evaluate import Box
from afterimage.models.decoders.canvas import seen_box
from afterimage.models.encoders.encoder import Encoder
from afterimage.models.encoders.layers import describe_unseen
from afterimage.runs.results import SeenPart, UsedWeights
from afterimage.runtime.terminal import Progress, silent

NO_AUGMENTATION = (
    "attackers train without random crops and flips, since stored features belong to whole images"
)


@dataclass
class AuditTarget:
    """Target of an audit: a network or a store of features, with all images.

    Attributes:
        config: the audit
        name: name of the network or store
        specs: shapes of the features by layer
        weights: the network's weights; None for a store, which has no network
        image_size: `(height, width)` in pixels
        data: test images, and training images, on which defences are fitted
        pool: images that an attacker may own
        notes: remarks for the audit's notes
        normalised: mean and std of a user's own network, which states them itself; None for any other
    """

    config: AuditConfig
    name: str
    specs: dict[str, FeatureSpec]
    weights: UsedWeights | None
    image_size: tuple[int, int]
    data: Data
    pool: Data
    notes: list[str] = field(default_factory=list)
    normalised: list[tuple[float, ...]] | None = None
    failures: dict[str, Exception] = field(default_factory=dict)
    """Errors of the requested layers that cannot be read, by layer."""

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
        """Return the part of the images that a layer's locations see; None if they see all."""
        return seen_box([self.specs[layer]], self.image_size)

    def seen(self, layer: str) -> SeenPart | None:
        """Return that part with its share of all pixels and a description of the pixels that are not seen."""
        box = self.box(layer)
        if box is None:
            return None
        (top, bottom), (left, right) = box
        height, width = self.image_size
        spec = self.specs[layer]
        unseen = describe_unseen(spec.rows, spec.columns, self.image_size)
        return SeenPart(*box, (bottom - top) * (right - left) / (height * width), unseen)


def open_subject(
    config: AuditConfig, *, cache: Path | None = None, progress: Progress = silent
) -> AuditTarget:
    """Open the network and its weights, or the store, and all images.

    Args:
        config: the audit
        cache: folder of decoded images
        progress: called with the progress

    Returns:
        the target; layers that cannot be read are left out and listed in its `failures`

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
    weights = encoder.weights.used
    network = encoder.network
    normalised = [network.mean, network.std] if network.is_own else None
    return AuditTarget(config, network.name, specs, weights, size, data, pool, notes, normalised, failures)


def _encoder(config: AuditConfig, layers: list[str]) -> Encoder:
    size = config.data.size
    return Encoder(config.model, layers=layers, weights=config.weights, image_size=size, seed=config.seed)


def _store(config: AuditConfig) -> AuditTarget:
    store = load_pairs(config.pairs, test_fraction=config.test_fraction, seed=config.data.split_seed)
    layers = config.layers or tuple(store.specs)
    specs = {layer: store.specs[layer] for layer in layers if layer in store.specs}
    failures: dict[str, Exception] = {
        layer: unknown(f"layer of {config.pairs}", layer, store.specs)
        for layer in layers
        if layer not in specs
    }
    if not specs:
        raise failures[layers[0]]
    name = shown(Path(local_path(config.pairs)).name)
    notes = [*store.notes, NO_AUGMENTATION]
    return AuditTarget(
        config, name, specs, None, store.image_size, store.data, store.data, notes, failures=failures
    )
