"""Settings for the images of a run: source, size, split, and evaluation protocol."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from afterimage.config.errors import (
    MAX_IMAGES,
    MAX_SEED,
    MAX_SIDE,
    AfterimageError,
    check_choice,
    check_fraction,
    check_positive,
    check_range,
)
from afterimage.config.names import absolute_source

NATIVE = "native"
"""Value of `crop` that stands for the image size that an encoder's weights are made for."""
SSIM_WINDOW = 11
"""Side of SSIM's window in pixels; smaller crops cannot be scored."""


def size_pair(size: int | str | Sequence[int], where: str = "image_size") -> tuple[int, int]:
    """Return height and width from one whole number, a pair, or text such as `256` or `256x384`.

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
    """Return a size as text that `size_pair` reads: `256`, or `256x384`."""
    height, width = size
    return str(height) if height == width else f"{height}x{width}"


@dataclass(frozen=True)
class Protocol:
    """An evaluation protocol, whose results can be compared with published figures.

    Attributes:
        resize: pixels of an image's shorter side after resizing
        crop: side of the centre crop in pixels
        layers: layers that may be decoded; empty for any
        unavailable_metrics: the protocol's metrics that are not measured here, each with the reason
    """

    resize: int
    crop: int
    layers: tuple[str, ...] = ()
    unavailable_metrics: Mapping[str, str] = field(default_factory=dict)


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
"""Protocols by name: `study`, the published study's and the default; `rae`, that of representation autoencoders (RAE,
Zheng et al. 2025), which decode the encoder's final norm on images of 256 pixels."""


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
        resize: shorter side of images in pixels after resizing, before the crop; for crops that are not square, shorter
            side of the box in the crop's shape that the resized image covers
        crop: size of the crops, at least 11 pixels a side (SSIM's window): the side of squares in pixels, the text
            `HEIGHTxWIDTH`, or, in a study or an audit, `native`, the size that the encoder's weights are made for
        validation_fraction: share of the images outside the test split that becomes the validation split
        test_fraction: share of the images that becomes the test split if the source has none
        split_seed: seed of the split
        limit_train: number of training images to keep, from the first on; None keeps all
        limit_validation: number of validation images to keep, likewise
        limit_test: number of test images to keep, likewise
        protocol: name of a protocol, which sets `resize`, `crop` and the allowed layers; reports name it beside the
            figures
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
            self._apply_protocol(self.protocol)
        check_fraction(self, "validation_fraction", "test_fraction")
        check_range("split_seed", self.split_seed, 0, MAX_SEED)
        check_positive(self, "limit_train", "limit_validation", "limit_test", most=MAX_IMAGES)
        for name in ("source", "test"):
            object.__setattr__(self, name, absolute_source(getattr(self, name)))

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the crops in pixels.

        Raises:
            AfterimageError: `crop` is `native`, which only an encoder defines
        """
        if self.crop == NATIVE:
            raise AfterimageError(f"crop = {NATIVE!r} needs an encoder, whose size it is; give HEIGHTxWIDTH")
        return size_pair(self.crop)

    @property
    def box(self) -> tuple[int, int]:
        """Height and width of the box that resized images cover: in the crop's shape, with shorter side `resize`."""
        height, width = self.size
        short = min(height, width)
        return self.resize * height // short, self.resize * width // short

    def with_size(self, crop: int | str, resize: int | None = None) -> DataConfig:
        """Return a copy of these settings with crops of another size.

        Without `resize`, the copy keeps that of these settings, raised to the crop's shorter side if it is smaller.
        """
        if resize is None:
            resize = self.resize if crop == NATIVE else max(self.resize, min(size_pair(crop, "size")))
        return replace(self, crop=crop, resize=resize)

    def with_overrides(self, size: str = "", resize: int | None = None, protocol: str = "") -> DataConfig:
        """Return a copy of these settings with options of a command line; empty text and None keep a setting.

        Args:
            size: see `crop`
            resize: see the attribute; None as in `with_size`
            protocol: see the attribute

        Raises:
            AfterimageError: the protocol has another size than the options
        """
        protocol, data = protocol or self.protocol or "", replace(self, protocol=None)
        if size or resize is not None:
            data = data.with_size(size or data.crop, resize)
        if not protocol:
            return data
        data = replace(data, protocol=protocol)
        for key, value in {"crop": size, "resize": resize}.items():
            if value and str(value) != str(getattr(data, key)):
                raise AfterimageError(f"protocol {protocol} has {key} {getattr(data, key)}, got {value}")
        return data

    def _apply_protocol(self, name: str) -> None:
        check_choice("protocol", name, PROTOCOLS)
        for key in ("resize", "crop"):
            value, default = getattr(PROTOCOLS[name], key), getattr(PROTOCOLS["study"], key)
            if getattr(self, key) not in (value, default):
                raise AfterimageError(f"protocol {name} has {key} {value}, got {getattr(self, key)}")
            object.__setattr__(self, key, value)
        if name == "study":  # the default protocol is left out, so that it does not change the digest
            object.__setattr__(self, "protocol", None)
