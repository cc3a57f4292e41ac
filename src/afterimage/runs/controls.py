"""Controls in the folder of a finished run: types, reader and writer of each part's JSON file and CSV by image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from afterimage.config import AfterimageError, from_dict, printable_path
from afterimage.runs.files import check_number, read_csv, read_object, write_csv, write_json
from afterimage.runs.results import LpipsStatus, Score
from afterimage.runs.run import Run

FORMAT = 1
"""Version of the files' content; files of another version are measured again."""
ABLATIONS = {
    "another": "another image's features",
    "shuffled": "shuffled features",
    "mean": "mean features",
    "zero": "zero features",
    "colour": "the image's mean colour",
}
"""Feature ablations in the order of tables: what replaces the image's own features."""
PLANES = {"luma": "luma", "cb": "Cb", "cr": "Cr"}
"""Planes of an image in ITU-R BT.601."""
CODECS = ("JPEG", "WebP")
"""Lossy codecs that features are compared with."""
REGIONS = ("flat", "edge", "texture")
"""Kinds of region, defined by the luma around a pixel."""


@dataclass(frozen=True, kw_only=True)
class ControlResult:
    """Facts common to all parts: the number of test images, and the SHA-256 digest of the measured decoder."""

    images: int
    decoder: str


@dataclass(frozen=True)
class Distances:
    """Mean distances from an image's features, divided by their norm.

    Attributes:
        reencoded: distance to the features of its reconstruction
        random_pair: distance to the features of another image
    """

    reencoded: float
    random_pair: float


@dataclass(frozen=True, kw_only=True)
class Controls(ControlResult):
    """Scores of the decoder on features other than the image's own.

    Attributes:
        lpips: LPIPS network of the scores
        controls: scores for each of `ABLATIONS`, and for the image's `own` features
        distances: distances between features
    """

    lpips: LpipsStatus
    controls: Mapping[str, Mapping[str, Score | None]]
    distances: Distances


@dataclass(frozen=True)
class PlaneError:
    """Squared error in one plane, and the plane's own variance within images."""

    variance: float
    error: float


@dataclass(frozen=True)
class RegionError:
    """Share of one kind of region among all pixels, and its mean squared error; None if there are no such pixels."""

    share: float
    mse: float | None


@dataclass(frozen=True)
class Regions:
    """Rule that classifies pixels, and the error on each kind of region."""

    window: int
    flat_below: float
    edge_from: float
    flat: RegionError
    edge: RegionError
    texture: RegionError


@dataclass(frozen=True)
class Spectra:
    """Power of images, reconstructions, their shared part and the error, in each band of `frequencies`."""

    image: tuple[float | None, ...]
    reconstruction: tuple[float | None, ...]
    shared: tuple[float | None, ...]
    error: tuple[float | None, ...]


@dataclass(frozen=True, kw_only=True)
class ErrorBreakdown(ControlResult):
    """Error of reconstructions by frequency (cycles per pixel), plane, position and kind of region."""

    frequencies: tuple[float, ...]
    spectra: Mapping[str, Spectra]
    planes: Mapping[str, PlaneError]
    place: tuple[tuple[float, ...], ...]
    regions: Regions

    def __post_init__(self) -> None:
        lengths = {len(getattr(power, f.name)) for power in self.spectra.values() for f in fields(power)}
        if not {"luma", "chroma"} <= self.spectra.keys() or lengths != {len(self.frequencies)}:
            raise AfterimageError(
                "spectra must hold luma and chroma, each with a number for each of frequencies"
            )
        if not PLANES.keys() <= self.planes.keys():
            raise AfterimageError(f"planes must hold {', '.join(PLANES)}")
        if not self.place or not self.place[0] or len({len(row) for row in self.place}) > 1:
            raise AfterimageError("place must be a table of numbers")


@dataclass(frozen=True)
class RatePoint:
    """Features quantised to `bits` per value: their coded size, and the decoder's PSNR on them."""

    bits: int
    bits_per_pixel: float
    psnr: float
    entropy_bits_per_pixel: float | None = None


@dataclass(frozen=True)
class CodecPoint:
    """The same images as files of a codec; lossless codecs have no quality and no PSNR."""

    codec: str
    quality: int | None
    bits_per_pixel: float
    psnr: float | None


@dataclass(frozen=True, kw_only=True)
class RateDistortion(ControlResult):
    """Rate and distortion of coded features and of codecs; `range` are the quantiles that the quantiser spans."""

    coder: str
    range: tuple[float, ...]
    training_images: int
    points: tuple[RatePoint, ...]
    codecs: tuple[CodecPoint, ...]

    def __post_init__(self) -> None:
        if min((point.bits_per_pixel for point in (*self.points, *self.codecs)), default=0) <= 0:
            raise AfterimageError("points and codecs must hold bits_per_pixel above 0")
        for codec in CODECS:
            if not any(point.codec == codec and point.psnr is not None for point in self.codecs):
                raise AfterimageError(f"codecs must hold {codec} with its psnr")
        if all(point.psnr is not None for point in self.codecs):
            raise AfterimageError("codecs must hold a lossless one, whose psnr is null")


CONTROL_TYPES: dict[str, type[ControlResult]] = {
    "controls": Controls,
    "error_breakdown": ErrorBreakdown,
    "rate_distortion": RateDistortion,
}
"""Parts of the controls by the names of their files."""
COLUMNS = {
    "controls": tuple(f"{name}_psnr" for name in ("own", *ABLATIONS)),
    "error_breakdown": tuple(f"psnr_{plane}" for plane in PLANES),
    "rate_distortion": ("bits", "psnr"),
}
"""Columns of each part's CSV that a report shows."""

Rows = list[dict[str, Any]]


def write_part(run: Run, part: str, facts: Mapping[str, Any], rows: Rows) -> None:
    """Write a part into the run's folder, the CSV first, so that a folder with the JSON file has both."""
    write_csv(run.file(f"{part}.csv"), rows)
    write_json(run.file(f"{part}.json"), {"format": FORMAT, **facts})


def read_part(run: Run, part: str) -> tuple[Any, Rows]:
    """Read a part: the facts, of its type in `CONTROL_TYPES`, and the rows by image.

    Raises:
        AfterimageError: a file is missing, damaged or of another version; the message names the file and the key
    """
    path = run.file(f"{part}.json")
    values = read_object(path, "format", FORMAT)
    try:
        facts = from_dict(CONTROL_TYPES[part], values)
    except AfterimageError as error:
        raise AfterimageError(f"{printable_path(path)}: {error}") from None
    path = path.with_suffix(".csv")
    rows = read_csv(path)
    if not rows:
        raise AfterimageError(f"{printable_path(path)} has no rows")
    for row in rows:
        for column in COLUMNS[part]:
            check_number(path, row, column)
    if part == "rate_distortion" and {p.bits for p in facts.points} != {row["bits"] for row in rows}:
        raise AfterimageError(f"{printable_path(path)} and {part}.json hold different bits")
    return facts, rows
