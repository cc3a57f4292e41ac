"""Settings that a visitor of the live page can choose, and links that store them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import torch
from torch import Tensor

from afterimage.config import AfterimageError, Axis, FeatureSpec, unknown_choice_error
from afterimage.data.sources.sample_images import whole_photographs

OWN = "own"
"""Name of an image that a visitor uploaded; a link cannot contain such an image."""
CHANGES = ("none", "zero", "swap", "average")
"""Changes of the chosen values: unchanged, set to 0, the second image's values, or the mean of both images' values."""


@cache
def examples() -> dict[str, Path]:
    """Return the files of the photographs that come with scikit-image, by name."""
    return {path.stem: path for path in whole_photographs()}


def _number(low: int, high: int, default: int | float, what: str) -> Any:
    return dataclasses.field(default=default, metadata={"range": (low, high), "what": what})


@dataclass(frozen=True)
class LiveState:
    """Settings of a visitor; field names are the parameters of a link.

    Attributes:
        image: name of the image whose features are decoded: one of `examples`, or `own`
        second: name of the image whose features are swapped or averaged in: one of `examples`, or `own`
        pca: number of principal components that are kept, in percent of the channels
        top: share of the values, those of largest magnitude, that are kept, in percent
        noise: standard deviation of added noise, as a multiple of each channel's own
        bits: bits per value; 16 leaves values unchanged
        change: one of `CHANGES`, applied to the values chosen by channel and region
        channel: index of the channel that is changed; -1 for all
        left, top_edge, right, bottom: region that is changed, in percent of the image's width or height
    """

    image: str = "astronaut"
    second: str = "coffee"
    pca: int = _number(1, 100, 100, "Principal components (% of channels)")
    top: int = _number(1, 100, 100, "Largest values (%)")
    noise: int | float = _number(0, 4, 0.0, "Noise (× each channel's std)")
    bits: int = _number(1, 16, 16, "Bits a value (16: all)")
    change: str = "none"
    channel: int = _number(-1, 65_535, -1, "Channel (-1: all)")
    left: int = _number(0, 100, 0, "Region from the left (%)")
    right: int = _number(0, 100, 100, "Region up to (% of the width)")
    top_edge: int = _number(0, 100, 0, "Region from the top (%)")
    bottom: int = _number(0, 100, 100, "Region down to (% of the height)")

    def __post_init__(self) -> None:
        for name in ("image", "second"):
            if getattr(self, name) not in (OWN, *examples()):
                raise unknown_choice_error(name, getattr(self, name), [OWN, *examples()])
        if self.change not in CHANGES:
            raise unknown_choice_error("change", self.change, CHANGES)
        for field in dataclasses.fields(self):
            value, (low, high) = getattr(self, field.name), field.metadata.get("range", (None, None))
            if low is not None and not low <= value <= high:  # false for NaN too
                raise AfterimageError(f"{field.name} must lie between {low} and {high}, got {value}")

    @classmethod
    def from_query(cls, query: Mapping[str, str]) -> LiveState:
        """Parse the parameters of a link; parameters that begin with two underscores are Gradio's and ignored.

        Raises:
            AfterimageError: a parameter is unknown or its value is not valid; the message names it
        """
        known = {field.name: field for field in dataclasses.fields(cls)}
        values: dict[str, Any] = {}
        for name, text in query.items():
            if name.startswith("__"):
                continue
            if name not in known:
                raise unknown_choice_error("parameter of the link", name, known)
            kind = type(known[name].default)
            try:
                values[name] = kind(text)
            except ValueError:
                raise AfterimageError(f"{name} must be a number, got {text!r:.80}") from None
        return cls(**values)

    def query(self) -> str:
        """Return the parameters of a link: the settings that differ from their defaults."""
        return urlencode(
            {
                field.name: value
                for field in dataclasses.fields(self)
                if (value := getattr(self, field.name)) != field.default
            }
        )

    def defence(self, spec: FeatureSpec) -> str:
        """Return the defence of a feature map, in the syntax of `create_defence` and `afterimage audit --defences`."""
        parts = []
        if self.pca < 100:
            parts.append(f"pca:{max(1, round(spec.channels * self.pca / 100))}")
        if self.top < 100:
            parts.append(f"topk:{self.top / 100:g}")
        if self.noise:
            parts.append(f"noise:{self.noise:g}")
        if self.bits < 16:
            parts.append("1bit" if self.bits == 1 else f"int{self.bits}")
        return "+".join(parts) or "none"

    def change_mask(self, spec: FeatureSpec, size: tuple[int, int]) -> Tensor:
        """Return a mask `(C, h, w)` of the values to change: in the channel, at locations centred in the region.

        Args:
            spec: shape and placement of the feature map
            size: height and width of the image in pixels
        """
        rows = _inside(spec.rows, spec.height, size[0], self.top_edge, self.bottom)
        columns = _inside(spec.columns, spec.width, size[1], self.left, self.right)
        channels = torch.arange(spec.channels)
        in_channel = channels >= 0 if self.channel < 0 else channels == self.channel
        return in_channel[:, None, None] & rows[:, None] & columns


def _inside(axis: Axis | None, count: int, pixels: int, low: int, high: int) -> Tensor:
    axis = axis or Axis(0.0, pixels / count, 0, pixels)
    centre = 100 * (axis.start + axis.stride * (torch.arange(count) + 0.5)) / pixels
    return (centre >= low) & ((centre < high) | (high == 100))
