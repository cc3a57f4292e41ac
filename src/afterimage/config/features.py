"""Measured shape of features, and their positions in the image."""

from __future__ import annotations

from dataclasses import dataclass

from afterimage.config.names import split_source


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
