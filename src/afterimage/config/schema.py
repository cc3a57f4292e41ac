"""Frozen dataclasses that describe a run, and the content hash that names its folder."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from afterimage.config.errors import AfterimageError, check_positive, check_range, check_seed, unknown
from afterimage.config.paths import absolute_path, absolute_source, local_path
from afterimage.config.toml import MAX_PARAMETERS, Count, to_dict

NATIVE = "native"
"""The size of images that an encoder's weights are for, in place of a number."""
LPIPS_NETS = ("alex", "vgg", "squeeze")
"""Backbone networks of LPIPS; the first is the default."""
MAX_SIDE = 8192
"""Largest side that images may be resized to, in pixels."""
SSIM_WINDOW = 11
"""Side of SSIM's window in pixels: smaller crops cannot be scored."""
LPIPS_SMALLEST = {"alex": 31, "vgg": 16, "squeeze": 17}
"""Side of the smallest image that each LPIPS network takes, in pixels."""
LOSS_NAMES = ("mse", "l1", "lpips", *(f"lpips:{net}" for net in LPIPS_NETS))
"""The terms that a loss may be a sum of."""
MAX_EPOCHS = 10**6
MAX_BATCH = 2**20
MAX_STEPS = 10**7
MAX_PROCESSES = 10**6
MAX_IMAGES = 10**9
MAX_CHANNELS = 2**16
"""Upper bounds of settings. They lie far above any useful value and stop a mistyped number before memory runs
out.
"""
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
"""Names of Lightning Fabric for float32, and for mixed precision with bfloat16 or float16."""

RANDOM_WEIGHTS = {
    "random": "an untrained network whose blocks act",
    "random-init": "an untrained network as its library initialises it, many residual branches closed or nearly so",
}
"""Names of the random controls, which `weights` may hold, and what each of them is."""

WEIGHTS = f"pretrained, {', '.join(RANDOM_WEIGHTS)} or a path"
"""The valid values of `weights`, for error messages."""


def size_pair(size: int | str | Sequence[int], where: str = "image_size") -> tuple[int, int]:
    """Return height and width from one whole number, two, or text such as `256` or `256x384`.

    Args:
        size: height and width in pixels, or the side of a square
        where: name of the setting, for the message

    Raises:
        AfterimageError: the size is anything else
    """
    if isinstance(size, str):
        sides = size.split("x")
        known = [int(side) for side in sides if re.fullmatch(r"[0-9]{1,9}", side)]
        pair = tuple(known if len(sides) > 1 else known * 2) if len(known) == len(sides) else ()
    else:
        pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or not all(isinstance(s, int) and s > 0 for s in pair):
        raise AfterimageError(
            f"{where} must be the side of a square in pixels, such as 224, or HEIGHTxWIDTH, such as 256x384, "
            f"got {size!r}"
        )
    return pair


def size_text(size: tuple[int, int]) -> str:
    """Write a size as `size_pair` reads it: `256`, or `256x384`."""
    height, width = size
    return str(height) if height == width else f"{height}x{width}"


@dataclass(frozen=True)
class Protocol:
    """How figures must be measured to stand beside others' figures.

    Attributes:
        resize: pixels of an image's shorter side after resizing
        crop: side of the centre crop in pixels
        layers: layers that are read; empty for any
        missing: metrics that it has and that are not measured here, each with the reason
    """

    resize: int
    crop: int
    layers: tuple[str, ...] = ()
    missing: Mapping[str, str] = field(default_factory=dict)


PROTOCOLS = {
    "study": Protocol(256, 224),
    "rae": Protocol(
        256,
        256,
        ("norm", "latents"),
        {
            "rFID": "it needs the Inception network of the published figures (pt_inception-2015-12-05), whose weights "
            "are not part of this project; no other network stands in for it"
        },
    ),
}
"""The protocols by name: the published study's, which is the default, and that of representation autoencoders (RAE,
Zheng et al. 2025): the encoder's final norm, on images of 256 pixels."""


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
    """The measured shape of one layer's features, from which a decoder is built.

    Attributes:
        source: `model:layer`
        channels: number of channels
        height: locations from top to bottom
        width: locations from left to right
        rows: vertical positions of the locations; None where their cells divide the image evenly and cover
            every pixel
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
        """The layer's name, without its model's."""
        return split_source(self.source)[1]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        return self.channels, self.height, self.width

    @property
    def locations(self) -> int:
        """Number of locations of the map."""
        return self.height * self.width

    @property
    def values(self) -> int:
        """Number of values of one image's features."""
        return self.channels * self.height * self.width


def absolute_weights(weights: str) -> str:
    """Return `weights` with a path made absolute; keywords such as `pretrained`, and addresses, stay as they are."""
    if (
        not weights
        or weights in ("pretrained", *RANDOM_WEIGHTS)
        or re.match(r"(hf-hub|hf_hub|https?):", weights)
    ):
        return weights
    return absolute_path(weights)


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
            raise unknown("loss", name, LOSS_NAMES) if name else _malformed(text)
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
        name: decoder family, a module of one's own, `python/package.module:factory` or `python/FILE.py:factory`, or a
            published one, `diffusers/ID_OR_FOLDER`
        parameters: number of parameters to build it at, within 5 %; None for the family's default size
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
        channels: channels of the fused map
        size: locations a side of the fused map; None takes the finest of the maps
    """

    name: str = "attention"
    channels: int = 256
    size: int | None = None

    def __post_init__(self) -> None:
        check_positive(self, "channels", most=MAX_CHANNELS)
        check_positive(self, "size", most=MAX_SIDE)


@dataclass(frozen=True)
class DataConfig:
    """The images of a run, and their division into training, validation and test images.

    A source is `folder:PATH`, `hf:NAME[@REVISION][:SPLIT]` (a dataset of the Hugging Face hub),
    `webdataset:SHARDS`, `parquet:SHARDS`, `div2k`, `div2k:PATH`, `procedural`, `procedural:COUNT` or
    `photographs`. SHARDS is a pattern of files such as `data/{000..099}.tar` or `data/*.parquet`. Paths and
    patterns become absolute when the config is built, so that its meaning does not depend on the working
    folder.

    Attributes:
        source: source of the images
        test: source of the test images; empty for the source's own test split, or else `test_fraction` of it
        resize: pixels of an image's shorter side after resizing, before it is cropped; for crops that are not square,
            of the shorter side of the box of their shape that the resized image covers
        crop: size of the crops: pixels a side of squares, text `HEIGHTxWIDTH`, or `native` in a study or an audit, the
            size that the encoder's weights are for; at least 11 (SSIM's window)
        validation_fraction: share of the images outside the test split that is for validation
        test_fraction: share of the images that is for testing, where there is no test split
        split_seed: seed of the split
        limit_train: number of training images to keep, the first ones; None keeps all
        limit_validation: number of validation images to keep, likewise
        limit_test: number of test images to keep, likewise
        protocol: name of a protocol, which says `resize`, `crop` and which layers are read; reports name its figures
            by it
    """

    source: str = "div2k"
    test: str = ""
    resize: int = 256
    crop: int | str = 224
    validation_fraction: float = 0.2
    test_fraction: float = 0.1
    split_seed: int = 42
    limit_train: int | None = None
    limit_validation: int | None = None
    limit_test: int | None = None
    protocol: str | None = None

    def __post_init__(self) -> None:
        check_positive(self, "resize", most=MAX_SIDE)
        if self.crop != NATIVE:
            size = size_pair(self.crop, "crop")
            text = size_text(size)
            object.__setattr__(self, "crop", int(text) if text.isdecimal() else text)
            if min(size) < SSIM_WINDOW:
                raise AfterimageError(
                    f"crop must lie between {SSIM_WINDOW}, the side of SSIM's window, and resize, got {text}"
                )
            if max(size) > MAX_SIDE:
                raise AfterimageError(f"crop must be at most {MAX_SIDE}, got {text}")
            if min(size) > self.resize:
                raise AfterimageError(f"crop ({text}) must not be larger than resize ({self.resize})")
        if self.protocol is not None:
            self._follow(self.protocol)
        for name in ("validation_fraction", "test_fraction"):
            if not 0 < getattr(self, name) < 1:
                raise AfterimageError(f"{name} must lie between 0 and 1, got {getattr(self, name)}")
        check_seed("split_seed", self.split_seed)
        check_positive(self, "limit_train", "limit_validation", "limit_test", most=MAX_IMAGES)
        for name in ("source", "test"):
            object.__setattr__(self, name, absolute_source(getattr(self, name)))

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the crops in pixels.

        Raises:
            AfterimageError: they have the native size of an encoder that is not known here
        """
        if self.crop == NATIVE:
            raise AfterimageError(f"crop = {NATIVE!r} needs an encoder, whose size it is; give HEIGHTxWIDTH")
        return size_pair(self.crop)

    @property
    def box(self) -> tuple[int, int]:
        """Height and width of the box that resized images cover: the crop's shape, its shorter side `resize`."""
        height, width = self.size
        short = min(height, width)
        return self.resize * height // short, self.resize * width // short

    def sized(self, crop: int | str, resize: int | None = None) -> DataConfig:
        """Return these settings with crops of another size.

        Args:
            crop: as the attribute
            resize: as the attribute; None for these settings' own, or as much as the crop needs if that is more
        """
        if resize is None:
            resize = self.resize if crop == NATIVE else max(self.resize, min(size_pair(crop, "size")))
        return replace(self, crop=crop, resize=resize)

    def _follow(self, name: str) -> None:
        if name not in PROTOCOLS:
            raise unknown("protocol", name, PROTOCOLS)
        for key in ("resize", "crop"):
            value, default = getattr(PROTOCOLS[name], key), getattr(PROTOCOLS["study"], key)
            if getattr(self, key) not in (value, default):
                raise AfterimageError(f"protocol {name} has {key} {value}, got {getattr(self, key)}")
            object.__setattr__(self, key, value)
        if name == "study":  # without a protocol it is the same, and so is the digest
            object.__setattr__(self, "protocol", None)


@dataclass(frozen=True)
class RecipeConfig:
    """The training recipe of a decoder. The defaults are the published study's.

    Attributes:
        epochs: passes over the training images
        batch_size: images a step
        learning_rate: Adam's learning rate
        weight_decay: L2 penalty on the weights
        scheduler: schedule of the learning rate: `plateau`, `cosine` or `constant`
        plateau_factor: factor on the learning rate when the validation loss stops falling
        plateau_patience: epochs without improvement before that
        loss: weighted sum of terms, for example `0.5*mse+0.5*lpips`
        augment: whether training crops are random and flipped, instead of central
        precision: `32-true`, `bf16-mixed` or `16-mixed`
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
        if self.scheduler not in ("plateau", "cosine", "constant"):
            raise unknown("scheduler", self.scheduler, ("plateau", "cosine", "constant"))
        if self.precision not in PRECISIONS:
            raise unknown("precision", self.precision, PRECISIONS)
        parse_loss(self.loss)


@dataclass(frozen=True)
class FeaturesConfig:
    """Stored features that decoders are trained on, without an encoder.

    Attributes:
        path: the store, see `afterimage extract`
        sha256: digest of its files
    """

    path: str
    sha256: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", absolute_path(self.path))


@dataclass(frozen=True)
class RunConfig:
    """One run: features, decoder, images and recipe.

    Attributes:
        sources: layers to decode, `model:layer` each, with the tag of the weights pinned
        weights: `pretrained`, the name of a random control (`RANDOM_WEIGHTS`), or a path; empty for stored features
            that nobody has named an encoder of
        fusion: how several sources become one map; None for a single source
        decoder: the decoder
        data: where images come from and how they are split
        recipe: how the decoder is trained
        seed: seed of the initial weights and of the order of the images
        lpips: LPIPS network of the scores; not part of the hash, as it does not change the decoder
        features: stored features that the sources are layers of; training then has no random crops and flips
    """

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
        if self.features is not None and self.recipe.augment:  # features belong to the image as it is
            object.__setattr__(self, "recipe", replace(self.recipe, augment=False))
        if self.lpips not in LPIPS_NETS:
            raise unknown("LPIPS network", self.lpips, LPIPS_NETS)
        check_seed("seed", self.seed)
        object.__setattr__(self, "weights", absolute_weights(self.weights))
        for term in parse_loss(self.recipe.loss):
            name, _, net = term.partition(":")
            smallest = LPIPS_SMALLEST[net or LPIPS_NETS[0]] if name == "lpips" else 0
            if min(self.data.size) < smallest:
                raise AfterimageError(
                    f"the loss {term} needs a crop of {smallest} pixels or more, got {self.data.crop}"
                )

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON of all settings that change the result."""
        settings = to_dict(self)
        settings.pop("lpips")
        text = json.dumps(settings, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def name(self) -> str:
        """The run folder's name: a readable slug and the first eight digits of the hash."""
        parts = [*self.sources, self.decoder.name]
        if self.fusion is not None:
            parts.insert(-1, self.fusion.name)
        if self.weights in RANDOM_WEIGHTS:
            parts.append(self.weights)
        return folder_name(parts, self.digest)


@dataclass(frozen=True)
class BaselineConfig:
    """A baseline: images reduced by other means than an encoder, and scored like a decoder's reconstructions.

    Attributes:
        baseline: `mean`, `thumbnail-SIZE` or `jpeg-QUALITY`
        data: where images come from and how they are split
        lpips: LPIPS network of the scores; not part of the hash
    """

    baseline: str
    data: DataConfig = DataConfig()
    lpips: str = "alex"

    @property
    def digest(self) -> str:
        """SHA-256 of all settings but `lpips`."""
        return settings_digest(self)

    @property
    def name(self) -> str:
        """The run folder's name."""
        return folder_name(("baseline", self.baseline), self.digest)


def settings_digest(config: Any) -> str:
    """Return the SHA-256 of the JSON of a config without `lpips`, which only chooses how the result is scored."""
    settings = to_dict(config)
    settings.pop("lpips")
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def folder_name(parts: Sequence[str], digest: str) -> str:
    """Return the name of a run folder.

    Args:
        parts: what the run consists of; becomes a readable slug of at most 100 characters
        digest: hash of the settings, of which eight digits are appended
    """
    slug = re.sub(r"[^A-Za-z0-9_.]+", "-", "-".join(parts)).strip("-.")
    return f"{slug[:100]}-{digest[:8]}"


HUB_PREFIX = re.compile(r"^hf[-_]hub:(?=[^:/]+/)", re.IGNORECASE)
"""The optional prefix of `OWNER/NAME`, an encoder in a repository of the Hugging Face hub."""
PROVIDERS = ("timm", "torchvision", "transformers", "open_clip", "diffusers", "python")
"""The libraries that encoders come from, as the beginning of `PROVIDER/MODEL`; the first needs no naming."""


def split_source(source: str) -> tuple[str, str]:
    """Split `[provider/]model:layer` at its last colon; the prefix `hf-hub:` of a repository is removed.

    Raises:
        AfterimageError: the text has no model or no layer
    """
    model, colon, layer = re.sub(HUB_PREFIX, "", source).rpartition(":")
    if not (model and colon and layer):
        raise AfterimageError(
            f"{source!r} names no layer; write [provider/]model:layer, for example resnet34.tv_in1k:layer1 "
            f"(`afterimage layers {model or layer or 'MODEL'}` lists the layers); providers: {', '.join(PROVIDERS)}"
        )
    return model, layer


def split_provider(model: str) -> tuple[str, str]:
    """Split `provider/model` into its provider, timm where none is named, and what that provider calls the model.

    `timm/NAME` keeps its beginning: it is a repository of the hub too.
    """
    model = re.sub(HUB_PREFIX, "", model)
    provider, _, rest = model.partition("/")
    return (provider, rest) if provider in PROVIDERS[1:] else (PROVIDERS[0], model)


def absolute_model(model: str) -> str:
    """Return an encoder's name with the path in it made absolute: a file of python/, a folder of others."""
    provider, rest = split_provider(model)
    file, colon, factory = rest.rpartition(":")
    if provider == "python" and file.endswith(".py"):
        return f"python/{absolute_path(file)}{colon}{factory}"
    if provider in ("transformers", "diffusers") and os.path.isdir(local_path(rest)):
        return f"{provider}/{absolute_path(rest)}"
    return model
