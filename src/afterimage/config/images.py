"""The images of a run: where they come from, their size, their split, and the protocol they follow."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from afterimage.config.errors import (
    MAX_IMAGES,
    MAX_SEED,
    MAX_SIDE,
    AfterimageError,
    check_positive,
    check_range,
    unknown,
)
from afterimage.config.paths import absolute_source

NATIVE = "native"
"""The size of images that an encoder's weights are for, in place of a number."""
SSIM_WINDOW = 11
"""Side of SSIM's window in pixels: smaller crops cannot be scored."""


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
        check_range("split_seed", self.split_seed, 0, MAX_SEED)
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

    def asked(self, size: str = "", resize: int | None = None, protocol: str = "") -> DataConfig:
        """Return these settings with what a command line asks for; empty text and None ask for nothing.

        Raises:
            AfterimageError: the protocol has another size than is asked for
        """
        protocol, data = protocol or self.protocol or "", replace(self, protocol=None)
        if size or resize is not None:
            data = data.sized(size or data.crop, resize)
        if not protocol:
            return data
        data = replace(data, protocol=protocol)
        for key, value in {"crop": size, "resize": resize}.items():
            if value and str(value) != str(getattr(data, key)):
                raise AfterimageError(f"protocol {protocol} has {key} {getattr(data, key)}, got {value}")
        return data

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
