"""What a finished run is, whatever its kind. `summary.json` and `scores.csv` are written and read here alone.

A decoder, a baseline, an inversion and an attacker of an audit are measured alike, so one type holds them all; what
only one kind has (how it was trained, how an image was searched for, what an attack found) is a part of its own.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from afterimage.config import (
    AfterimageError,
    BaselineConfig,
    FeatureSpec,
    FusionConfig,
    RunConfig,
    check_positive,
    from_dict,
    load_toml,
    shown,
    split_source,
    to_dict,
    unknown,
)
from afterimage.config.inversion import InversionConfig
from afterimage.runs.files import read_csv, read_json, write_csv, write_json

VERSION = 1
"""Of the files' layout: raised whenever a key changes its name or its meaning."""

SUMMARY, SCORES, CONFIG = "summary.json", "scores.csv", "config.toml"

KINDS = {"decoder": RunConfig, "baseline": BaselineConfig, "inversion": InversionConfig, "attack": None}
"""Kinds of results, each with what its config.toml holds; an attack is described by its `AttackFacts` alone."""


@dataclass(frozen=True)
class Metric:
    """How a metric is written and which way is better.

    The published study calls PSNR differences below 0.1 dB `negligible`; it names no such margin for SSIM and LPIPS.
    """

    title: str
    unit: str
    digits: int
    higher_is_better: bool
    negligible: float = 0.0

    @property
    def sign(self) -> int:
        """What turns a score so that more is better: 1 or -1."""
        return 1 if self.higher_is_better else -1


METRICS = {
    "psnr": Metric("PSNR", " dB", 2, True, negligible=0.1),
    "ssim": Metric("SSIM", "", 3, True),
    "lpips": Metric("LPIPS", "", 3, False),
}
"""Every metric by its name in files, in the order in which tables show them."""


@dataclass(frozen=True)
class Score:
    """A metric over `count` images: mean and sample standard deviation (None for a single image)."""

    mean: float
    std: float | None
    count: int

    def __post_init__(self) -> None:
        check_positive(self, "count")

    @classmethod
    def of(cls, values: Sequence[float]) -> Score:
        """The score of one number an image; there must be one at least."""
        return cls(
            statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values)
        )


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval, from `count` images."""

    estimate: float
    low: float
    high: float
    count: int
    confidence: float = 0.95

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0

    def within(self, margin: float) -> bool:
        return -margin <= self.low and self.high <= margin


@dataclass(frozen=True, kw_only=True)
class FeatureMap(FeatureSpec):
    """One layer's features as they were measured: shape, placement, and what the encoder costs up to there.

    Attributes:
        module: path of the layer's module
        order: number of modules that finish before it
        reduction: the image's height over the features'
        encoder_parameters: parameters of the encoder up to there
        encoder_macs: multiply-adds of the encoder up to there, for one image
        unseen: the pixels that no location sees, or why positions are unknown; empty if neither applies
    """

    module: str
    order: int
    reduction: float
    encoder_parameters: int
    encoder_macs: int
    unseen: str = ""

    def __post_init__(self) -> None:
        split_source(self.source)
        check_positive(self, "channels", "height", "width")

    @property
    def spec(self) -> FeatureSpec:
        """The shape and placement alone, from which a decoder is built."""
        return FeatureSpec(self.source, *self.shape, self.rows, self.columns)


@dataclass(frozen=True)
class UsedWeights:
    """The weights of one network, see `models.weights.Weights`; `label` is `pretrained` or which random control."""

    model: str
    origin: str
    location: str
    sha256: str
    label: str
    is_random: bool
    note: str = ""

    @property
    def identity(self) -> str:
        """What tells weights apart: the file's digest, or which random draw it is."""
        return self.sha256 or f"{self.label}, {self.location}"


@dataclass(frozen=True)
class LpipsStatus:
    """The LPIPS network and its weights, or the reason why it is not available."""

    net: str
    available: bool = False
    reason: str | None = None
    weights: UsedWeights | None = None


@dataclass(frozen=True)
class DataFacts:
    """The images: how many are in each part, the size they were cropped to as text or a side, and digests of them.

    Rows whose `test_digest` agrees were measured on the same crops, whatever trained them.
    """

    source: str
    test: str
    digest: str
    test_digest: str
    test_images: int
    resize: int
    crop: int | str
    train: int = 0
    validation: int = 0


@dataclass(frozen=True)
class TrainingFacts:
    """How a decoder was trained and which file it is in; `best_epoch` is the one that was kept, 0 the closed form."""

    parameters: int
    macs: int
    ranks: int
    seconds: float
    images_seen: int
    epochs: int
    best_epoch: int | None
    best_validation_loss: float | None
    decoder_sha256: str
    settings_sha256: str


def _check_scores(name: str, scores: Mapping[str, Score | None]) -> None:
    """Raise `AfterimageError` where a metric is missing; only LPIPS may be unavailable."""
    for metric in METRICS:
        if metric not in scores or (scores[metric] is None and metric != "lpips"):
            raise AfterimageError(f"there is no {name}.{metric}")


@dataclass(frozen=True)
class DecoderAlone:
    """What the decoder that an inversion starts from makes of the same images, and its seconds an image.

    `feature_loss` is the mean relative distance `|f - f0|^2 / |f0|^2` between the features of its images and of theirs.
    """

    scores: Mapping[str, Score | None]
    seconds: float
    feature_loss: float

    def __post_init__(self) -> None:
        _check_scores("decoder_alone.scores", self.scores)


@dataclass(frozen=True)
class BoundControls:
    """Scores that owe nothing to an image's own features, and whether what was found finds its original.

    Attributes:
        other_image: of each image found, against the original of another one; None for a single image
        prior_alone: of what the same procedure makes of features that tell nothing (the mean of validation images),
            against every original; None where there are no validation images
        identified: share of the images found that are nearest to their own original among `candidates`
        distance: how near is measured: `lpips`, by a network that took no part in the search, or `correlation`
        candidates: how many originals there are; guessing finds one in so many
    """

    other_image: Mapping[str, Score | None] | None
    prior_alone: Mapping[str, Score | None] | None
    identified: float
    distance: str
    candidates: int

    def __post_init__(self) -> None:
        for name in ("other_image", "prior_alone"):
            if (scores := getattr(self, name)) is not None:
                _check_scores(f"controls.{name}", scores)


@dataclass(frozen=True)
class InversionFacts:
    """How images were searched for: from the decoder of the run `start`, or from grey, for so many `steps`."""

    steps: int
    seconds_per_image: float
    feature_loss: float
    start: str = ""
    start_decoder: str = ""
    start_sha256: str = ""
    decoder_alone: DecoderAlone | None = None
    controls: BoundControls | None = None


@dataclass(frozen=True)
class Attacker:
    """Who attacks: the decoder they train, on how many images of their own, and where these are from.

    `threat_model` is `black-box` or `white-box`; `answer` is `decoded`, `refined` or `best estimate`.
    """

    decoder: str
    images: int
    threat_model: str
    data: str
    answer: str


@dataclass(frozen=True)
class Worst:
    """The image that came back best, and its SSIM."""

    id: str
    ssim: float


@dataclass(frozen=True)
class SeenPart:
    """The part of images that a layer's locations see: first pixel and the one after the last, along each axis."""

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    share: float
    unseen: str


@dataclass(frozen=True)
class AttackFacts:
    """What one attacker got from one layer behind one defence.

    `identification` is the share of reconstructions that are nearest to their own original among `candidates`, by the
    distance that tells.
    """

    layer: str
    defence: str
    attacker: Attacker
    scores: Mapping[str, Interval | None]
    worst: Worst
    identification: Mapping[str, Interval]
    candidates: int
    chance: float
    seconds: float
    seen: SeenPart | None = None
    scores_seen: Mapping[str, Interval | None] | None = None


@dataclass(frozen=True, kw_only=True)
class Result:
    """One finished run.

    `scores` holds a `Score` for each of `METRICS`, of which only LPIPS may be None (`lpips` then says why);
    `scores_seen` the same of the pixels that some location sees, where that is not all of them. `per_image` are the
    rows of scores.csv: `id`, the metrics, and what else was measured by image. `fusion_weights` are the sources' mean
    weights over the test images, empty where there is no fusion that weighs them.
    """

    kind: str
    label: str
    config: RunConfig | BaselineConfig | InversionConfig | None
    data: DataFacts
    lpips: LpipsStatus
    scores: Mapping[str, Score | None]
    per_image: tuple[Mapping[str, Any], ...]
    features: tuple[FeatureMap, ...] = ()
    weights: tuple[UsedWeights, ...] = ()
    fusion_weights: tuple[float, ...] = ()
    training: TrainingFacts | None = None
    inversion: InversionFacts | None = None
    attack: AttackFacts | None = None
    scores_seen: Mapping[str, Score | None] | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown("kind of result", self.kind, KINDS)
        part = {"decoder": "training", "inversion": "inversion", "attack": "attack"}.get(self.kind)
        if part and getattr(self, part) is None:
            raise AfterimageError(f"a result of kind {self.kind} needs {part}")
        _check_scores("scores", self.scores)
        if self.kind in ("decoder", "inversion") and len(self.features) != len(self.sources):
            raise AfterimageError(
                f"features must be as many as the {len(self.sources)} sources, got {len(self.features)}"
            )
        if self.fusion_weights and len(self.fusion_weights) != len(self.sources):
            raise AfterimageError(
                f"fusion_weights must have one value for each of {len(self.sources)} sources"
            )

    @property
    def sources(self) -> tuple[str, ...]:
        """The layers whose features were inverted, as `model:layer`; none for a baseline."""
        return getattr(self.config, "sources", ())

    @property
    def is_baseline(self) -> bool:
        return self.kind == "baseline"

    @property
    def decoder(self) -> str:
        """The decoder's name; of an inversion how it was made, `linear + refined`, say, or `inversion`; else empty."""
        if isinstance(self.config, RunConfig):
            return self.config.decoder.name
        if self.inversion is None:
            return ""
        if not self.inversion.start:
            return "inversion"
        how = "best estimate" if self.config.estimate else "refined"
        return f"{self.inversion.start_decoder} + {how}"

    @property
    def fusion(self) -> FusionConfig | None:
        return getattr(self.config, "fusion", None)

    @property
    def seed(self) -> int | None:
        return getattr(self.config, "seed", None)

    @property
    def parameters(self) -> int | None:
        """Of the decoder; None for an inversion, which has none to count."""
        return self.training.parameters if self.training else 0 if self.is_baseline else None

    @property
    def trained_elsewhere(self) -> bool:
        """Whether the decoder came trained: it saw no training images here, and is measured as it is."""
        return self.training is not None and self.training.images_seen == 0

    @property
    def train_seconds(self) -> float | None:
        return self.training.seconds if self.training else 0.0 if self.is_baseline else None

    @property
    def is_random(self) -> bool:
        """Whether an encoder was untrained, which makes the run a random control."""
        return any(weights.is_random for weights in self.weights)

    @property
    def origin(self) -> str:
        """`pretrained`, or which random control where an encoder of the run was one."""
        return next((weights.label for weights in self.weights if weights.is_random), "pretrained")

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The configuration as plain values, settings that are None left out."""
        return {} if self.config is None else to_dict(self.config)

    def values(self, column: str) -> dict[str, float]:
        """One column of `per_image` by image id, without the images that have none."""
        found = ((row["id"], row.get(column)) for row in self.per_image)
        return {identity: float(value) for identity, value in found if value is not None}


def write_result(folder: Path, result: Result) -> None:
    """Write scores.csv, then summary.json: a folder that has the second is whole."""
    write_csv(folder / SCORES, result.per_image)
    names = [f.name for f in dataclasses.fields(Result) if f.name not in ("config", "per_image")]
    write_json(folder / SUMMARY, {"version": VERSION, **{name: getattr(result, name) for name in names}})


def read_result(folder: Path) -> Result:
    """Read a finished run's result.

    Raises:
        AfterimageError: a file is missing, damaged or of another version; it names the file and the key.
    """
    path = folder / SUMMARY
    values = read_json(path)
    if not isinstance(values, dict):
        raise AfterimageError(f"{shown(path)} must hold a JSON object, got {values!r:.80}")
    if (version := values.pop("version", None)) != VERSION:
        raise AfterimageError(f"{shown(path)} has version {version!r:.80}; this one reads {VERSION}")
    kind = values.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise AfterimageError(f"{shown(path)}: {unknown('kind of result', str(kind), KINDS)}")
    config = KINDS[kind] and load_toml(KINDS[kind], folder / CONFIG)
    rows = _read_scores(folder / SCORES)
    try:
        result = from_dict(Result, values | {"config": config, "per_image": rows})
        check_finite(values)  # of known types by now, hence of no great depth
        return result
    except AfterimageError as error:
        raise AfterimageError(f"{shown(path)}: {error}") from None


def _read_scores(path: Path) -> list[dict[str, Any]]:
    """The rows of scores.csv. Every id is there once, everything beside it is a finite number or None."""
    rows, seen = read_csv(path), set()
    for row in rows:
        if not row.get("id"):
            raise AfterimageError(f"{shown(path)} has no column 'id', or a row without one")
        if row["id"] in seen:
            raise AfterimageError(f"{shown(path)} scores image {row['id']!r:.200} twice")
        seen.add(row["id"])
        if missing := METRICS.keys() - row.keys():
            raise AfterimageError(f"{shown(path)} has no column {', '.join(sorted(missing))}")
        for column, value in row.items():
            number = isinstance(value, int | float) and math.isfinite(value)
            if column != "id" and value is not None and not number:
                raise AfterimageError(
                    f"{shown(path)}: {column} of image {row['id']!r:.200} is {value!r:.80}, not a finite number"
                )
            if number and column.startswith(tuple(METRICS)):
                row[column] = float(value)  # `1` in the file of a perfect image
    return rows


def check_finite(value: Any, where: str = "") -> None:
    """Raise for numbers that JSON does not know but Python reads, `NaN` and `1e999`."""
    if isinstance(value, float) and not math.isfinite(value):
        raise AfterimageError(f"{where} is not finite")
    pairs: Iterable[tuple[Any, Any]] = value.items() if isinstance(value, dict) else ()
    pairs = enumerate(value) if isinstance(value, list) else pairs
    for key, entry in pairs:
        check_finite(entry, f"{where}.{key}" if where else str(key))
