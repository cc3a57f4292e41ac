"""Frozen dataclasses that describe a run and the measured shape of its features; the content hash names its folder."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from afterimage.config.errors import (
    MAX_BATCH,
    MAX_CHANNELS,
    MAX_EPOCHS,
    MAX_SEED,
    MAX_SIDE,
    AfterimageError,
    check_choice,
    check_positive,
    check_range,
    unknown_choice_error,
)
from afterimage.config.images import PROTOCOLS, DataConfig
from afterimage.config.names import (
    RANDOM_WEIGHTS,
    absolute_model,
    absolute_path,
    absolute_weights,
    split_source,
)
from afterimage.config.toml import MAX_PARAMETERS, Count, to_dict


@dataclass(frozen=True)
class Axis:
    """Positions of a feature map's locations along one axis of the image, in pixels from its top or left edge.

    Location `i` covers the cell from `start + i * stride` to `start + (i + 1) * stride`. The cells may end
    before the image does or reach beyond it. Pixels before `first` and from `last` on influence no location.
    """

    start: float
    stride: float
    first: int
    last: int


@dataclass(frozen=True)
class FeatureSpec:
    """Measured shape of one layer's features, from which a decoder is built.

    Attributes:
        source: `model:layer`
        channels: number of channels
        height: number of locations from top to bottom
        width: number of locations from left to right
        rows: vertical positions of the locations; None if their cells divide the image evenly and cover every pixel
        columns: horizontal positions, likewise
    """

    source: str
    channels: int
    height: int
    width: int
    rows: Axis | None = None
    columns: Axis | None = None

    @property
    def layer(self) -> str:
        """Name of the layer, without the model."""
        return split_source(self.source)[1]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        return self.channels, self.height, self.width

    @property
    def locations(self) -> int:
        """Number of locations in the feature map."""
        return self.height * self.width

    @property
    def values(self) -> int:
        """Number of feature values of one image."""
        return self.channels * self.height * self.width


LPIPS_NETS = ("alex", "vgg", "squeeze")
"""Backbone networks of LPIPS; the first is the default."""
LPIPS_MIN_SIDE = {"alex": 31, "vgg": 16, "squeeze": 17}
"""Side of the smallest image that each LPIPS network accepts, in pixels."""
LOSS_NAMES = ("mse", "l1", "lpips", *(f"lpips:{net}" for net in LPIPS_NETS))
"""Names of the terms of a loss."""
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
"""Precisions by Lightning Fabric's names: float32, and mixed precision with bfloat16 or float16."""


def parse_loss(text: str) -> dict[str, float]:
    """Parse a weighted sum of loss terms: `"0.5*mse + 0.5*lpips"` gives `{"mse": 0.5, "lpips": 0.5}`.

    A term without a weight has weight 1.

    Raises:
        AfterimageError: a name is unknown or occurs twice, or a weight is not a positive number
    """
    terms: dict[str, float] = {}
    for term in re.split(r"(?<!\d[eE])\+", text):
        weight, star, name = (part.strip() for part in term.rpartition("*"))
        if name not in LOSS_NAMES:
            raise unknown_choice_error("loss", name, LOSS_NAMES) if name else _malformed(text)
        if name in terms:
            raise AfterimageError(f"loss {text!r} names {name} twice")
        try:
            terms[name] = float(weight) if star else 1.0
        except ValueError:
            raise _malformed(text) from None
        if not (math.isfinite(terms[name]) and terms[name] > 0):
            raise AfterimageError(f"loss {text!r}: the weight of {name} must be greater than 0, got {weight}")
    return terms


def _malformed(text: str) -> AfterimageError:
    return AfterimageError(
        f"cannot read loss {text!r}; write a sum of {', '.join(LOSS_NAMES)}, each with an optional weight, "
        "for example 0.5*mse+0.5*lpips"
    )


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder by name.

    Attributes:
        name: decoder family, your own module as `python/package.module:factory` or `python/FILE.py:factory`, or a
            published decoder as `diffusers/ID_OR_FOLDER`
        parameters: number of parameters to build it with, within 5 %; None for the family's default size
        options: options of the family, or keyword arguments of the factory
    """

    name: str = "attention"
    parameters: Count | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_positive(self, "parameters", most=MAX_PARAMETERS)
        if "/" in self.name:
            object.__setattr__(self, "name", absolute_model(self.name))


@dataclass(frozen=True)
class FusionConfig:
    """A fusion of several feature maps into one.

    Attributes:
        name: fusion family
        channels: number of channels of the fused map
        size: number of locations along each side of the fused map; None takes that of the finest map
    """

    name: str = "attention"
    channels: int = 256
    size: int | None = None

    def __post_init__(self) -> None:
        check_positive(self, "channels", most=MAX_CHANNELS)
        check_positive(self, "size", most=MAX_SIDE)


@dataclass(frozen=True)
class RecipeConfig:
    """The training recipe of a decoder. The defaults are the published study's.

    The attributes' descriptions are also the help texts of `afterimage train`.

    Attributes:
        epochs: Number of epochs.
        batch_size: Number of images in each training step.
        learning_rate: Learning rate of Adam.
        weight_decay: L2 penalty on the weights.
        scheduler: Schedule of the learning rate: plateau, cosine or constant.
        plateau_factor: With plateau: factor on the learning rate when the validation loss stops falling.
        plateau_patience: With plateau: number of epochs without improvement before that.
        loss: Loss, a weighted sum of terms: mse, l1, 0.5*mse + 0.5*lpips.
        augment: Take and flip training crops at random, instead of from the centre.
        precision: Number format: 32-true, bf16-mixed or 16-mixed.
    """

    epochs: int = 30
    batch_size: int = 8
    learning_rate: float = 1e-3
    weight_decay: float = 1e-5
    scheduler: str = "plateau"
    plateau_factor: float = 0.5
    plateau_patience: int = 5
    loss: str = "mse"
    augment: bool = True
    precision: str = "32-true"

    def __post_init__(self) -> None:
        check_positive(self, "epochs", most=MAX_EPOCHS)
        check_positive(self, "batch_size", most=MAX_BATCH)
        check_positive(self, "learning_rate", "plateau_factor")
        if self.plateau_factor >= 1:
            raise AfterimageError(f"plateau_factor must be less than 1, got {self.plateau_factor}")
        if self.weight_decay < 0 or not math.isfinite(self.weight_decay):
            raise AfterimageError(f"weight_decay must be 0 or more, got {self.weight_decay}")
        check_range("plateau_patience", self.plateau_patience, 0, MAX_EPOCHS)
        check_choice("scheduler", self.scheduler, ("plateau", "cosine", "constant"))
        check_choice("precision", self.precision, PRECISIONS)
        parse_loss(self.loss)


@dataclass(frozen=True)
class FeaturesConfig:
    """Stored features that decoders are trained on, without an encoder.

    Attributes:
        path: path of the store, see `afterimage extract`
        sha256: digest of the store's files
    """

    path: str
    sha256: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", absolute_path(self.path))


class HashedConfig:
    """A config whose hash names its run folder."""

    separators: ClassVar[tuple[str, str] | None] = None
    """Separators of the hashed JSON, as for `json.dumps`."""

    @property
    def digest(self) -> str:
        """SHA-256 of the JSON of all settings but `lpips`, which only chooses how the result is scored."""
        settings = {name: value for name, value in to_dict(self).items() if name != "lpips"}
        return sha256_of(settings, self.separators)


@dataclass(frozen=True)
class RunConfig(HashedConfig):
    """One run: features, decoder, images and recipe.

    Attributes:
        sources: layers to decode, `model:layer` each, with the tag of the weights pinned
        weights: `pretrained`, the name of a random control (`RANDOM_WEIGHTS`), or a path; empty for stored features
            whose encoder is unknown
        fusion: fusion of several sources into one map; None for a single source
        decoder: the decoder
        data: source and split of the images
        recipe: training recipe of the decoder
        seed: seed of the initial weights and of the order of the images
        lpips: LPIPS network of the scores; not part of the hash, because it does not change the decoder
        features: stored features that hold the sources; training then has no random crops and flips
    """

    separators = (",", ":")

    sources: tuple[str, ...]
    weights: str = "pretrained"
    fusion: FusionConfig | None = None
    decoder: DecoderConfig = DecoderConfig()
    data: DataConfig = DataConfig()
    recipe: RecipeConfig = RecipeConfig()
    seed: int = 42
    lpips: str = "alex"
    features: FeaturesConfig | None = None

    def __post_init__(self) -> None:
        if not self.sources:
            raise AfterimageError("a run needs at least one source, written model:layer")
        layers = PROTOCOLS[self.data.protocol or "study"].layers
        for source in self.sources:
            model, layer = split_source(source)
            if layers and layer not in layers:
                raise AfterimageError(
                    f"protocol {self.data.protocol} reads {' or '.join(f'{model}:{name}' for name in layers)}, "
                    f"got {source}"
                )
        if len(self.sources) > 1 and self.fusion is None:
            object.__setattr__(self, "fusion", FusionConfig())
        if self.features is not None and self.recipe.augment:  # features are of unaugmented images
            object.__setattr__(self, "recipe", replace(self.recipe, augment=False))
        check_choice("LPIPS network", self.lpips, LPIPS_NETS)
        check_range("seed", self.seed, 0, MAX_SEED)
        object.__setattr__(self, "weights", absolute_weights(self.weights))
        for term in parse_loss(self.recipe.loss):
            name, _, net = term.partition(":")
            smallest = LPIPS_MIN_SIDE[net or LPIPS_NETS[0]] if name == "lpips" else 0
            if min(self.data.size) < smallest:
                raise AfterimageError(
                    f"the loss {term} needs a crop of {smallest} pixels or more, got {self.data.crop}"
                )

    @property
    def models(self) -> tuple[str, ...]:
        """Networks of the sources, `[provider/]model` each."""
        return tuple(dict.fromkeys(split_source(source)[0] for source in self.sources))

    @property
    def name(self) -> str:
        """Name of the run folder: a readable slug and the first eight digits of the hash."""
        parts = [*self.sources, self.decoder.name]
        if self.fusion is not None:
            parts.insert(-1, self.fusion.name)
        if self.weights in RANDOM_WEIGHTS:
            parts.append(self.weights)
        return folder_name(parts, self.digest)


@dataclass(frozen=True)
class BaselineConfig(HashedConfig):
    """A baseline: images reduced by other means than an encoder, and scored like a decoder's reconstructions.

    Attributes:
        baseline: `mean`, `thumbnail-SIZE` or `jpeg-QUALITY`
        data: source and split of the images
        lpips: LPIPS network of the scores; not part of the hash
    """

    baseline: str
    data: DataConfig = DataConfig()
    lpips: str = "alex"

    @property
    def name(self) -> str:
        """Name of the run folder."""
        return folder_name(("baseline", self.baseline), self.digest)


def sha256_of(settings: Mapping[str, Any], separators: tuple[str, str] | None) -> str:
    """Return the SHA-256 of settings as JSON with sorted keys; `separators` as for `json.dumps`."""
    text = json.dumps(settings, sort_keys=True, separators=separators, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def folder_name(parts: Sequence[str], digest: str) -> str:
    """Return the name of a run folder: a slug of its parts, at most 100 characters, and 8 digits of a hash."""
    slug = re.sub(r"[^A-Za-z0-9_.]+", "-", "-".join(parts)).strip("-.")
    return f"{slug[:100]}-{digest[:8]}"
