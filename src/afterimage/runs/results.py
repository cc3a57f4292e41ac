"""Result of a finished run of any kind. Only this module reads and writes `summary.json` and `scores.csv`.

Decoders, baselines, inversions and the attackers of an audit are measured alike, so one type holds all of them. Facts
of only one kind (the training, the search, the attack) are parts with types of their own.
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
    printable_path,
    split_source,
    to_dict,
    unknown_choice_error,
)
from afterimage.config.inversion import InversionConfig
from afterimage.runs.files import check_number, read_csv, read_object, write_csv, write_json

VERSION = 1
"""Version of the files' layout, raised whenever a key changes its name or its meaning."""

SUMMARY, SCORES, CONFIG = "summary.json", "scores.csv", "config.toml"

KINDS = {"decoder": RunConfig, "baseline": BaselineConfig, "inversion": InversionConfig, "attack": None}
"""Kinds of results, each with the type of its config.toml; an attack has only its `AttackFacts`."""


@dataclass(frozen=True)
class Metric:
    """Title, unit, number of decimals and direction of a metric, and the lowest and highest possible score.

    Differences below `negligible` do not matter: the published study names 0.1 dB for PSNR, and no margin for SSIM and
    LPIPS.
    """

    title: str
    unit: str
    digits: int
    higher_is_better: bool
    limits: tuple[float, float] = (-math.inf, math.inf)
    negligible: float = 0.0

    @property
    def sign(self) -> int:
        """Factor, 1 or -1, that makes a higher score better."""
        return 1 if self.higher_is_better else -1


METRICS = {
    "psnr": Metric("PSNR", " dB", 2, True, negligible=0.1),
    "ssim": Metric("SSIM", "", 3, True, (-1.0, 1.0)),
    "lpips": Metric("LPIPS", "", 3, False, (0.0, math.inf)),
}
"""Metrics by their names in files, in the order of tables."""


@dataclass(frozen=True)
class Score:
    """Mean and sample standard deviation (None for a single image) of a metric over `count` images."""

    mean: float
    std: float | None
    count: int

    def __post_init__(self) -> None:
        check_positive(self, "count")

    @classmethod
    def of(cls, values: Sequence[float]) -> Score:
        """Compute the score of at least one value, one for each image."""
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
        """True if the whole interval lies above or below 0."""
        return self.low > 0 or self.high < 0

    def within(self, margin: float) -> bool:
        """Return whether the whole interval lies in `[-margin, margin]`."""
        return -margin <= self.low and self.high <= margin


@dataclass(frozen=True, kw_only=True)
class FeatureMap(FeatureSpec):
    """Measured features of one layer: shape, positions, and the encoder's cost up to that layer.

    Attributes:
        module: path of the layer's module
        order: number of modules that finish before it
        reduction: height of the image divided by the height of the features
        encoder_parameters: number of parameters of the encoder up to the layer
        encoder_macs: number of multiply-adds of the encoder up to the layer, for one image
        unseen: note on pixels that lie in no location's receptive field, or on why the positions are unknown; empty if
            neither applies
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
        """Shape and positions alone, from which a decoder is built."""
        return FeatureSpec(self.source, *self.shape, self.rows, self.columns)


@dataclass(frozen=True)
class WeightsRecord:
    """Weights and code of one network, see `models.weights.Weights`.

    `label` is `pretrained` or the name of a random control.
    """

    model: str
    origin: str
    location: str
    sha256: str
    label: str
    is_random: bool
    note: str = ""
    code: str = ""

    @property
    def identity(self) -> str:
        """Digest of the file, or label and seed of a random control; and the digest of a user's code."""
        weights = self.sha256 or f"{self.label}, {self.location}"
        return f"{weights}, code {self.code}" if self.code else weights


@dataclass(frozen=True)
class LpipsStatus:
    """The LPIPS network and its weights, or the reason why it is unavailable."""

    net: str
    available: bool = False
    reason: str | None = None
    weights: WeightsRecord | None = None

    def is_by(self, net: str) -> bool:
        """Return whether LPIPS was measured, and by this network."""
        return self.available and self.net == net


@dataclass(frozen=True)
class DataFacts:
    """Facts about the images: their sources, digests and size, and the number in each split.

    Runs with the same `test_digest` were measured on the same crops, whatever they were trained on.
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
    """Facts about a decoder's training, and its file's digest; `best_epoch` is the kept epoch, 0 for a closed form."""

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
    """Check that no metric is missing, and that none but LPIPS is None; raise `AfterimageError` otherwise."""
    for metric in METRICS:
        if metric not in scores or (scores[metric] is None and metric != "lpips"):
            raise AfterimageError(f"there is no {name}.{metric}")


@dataclass(frozen=True)
class StartDecoder:
    """Scores on the same images of the decoder that an inversion starts from, and its seconds for each image.

    `feature_loss` is the mean relative distance `|f - f0|^2 / |f0|^2` between the features `f` of its reconstructions
    and the features `f0` of the images.
    """

    scores: Mapping[str, Score | None]
    seconds: float
    feature_loss: float

    def __post_init__(self) -> None:
        _check_scores("decoder_alone.scores", self.scores)


@dataclass(frozen=True)
class BoundControls:
    """Controls of a measured bound: scores that do not use an image's own features, and re-identification.

    Attributes:
        other_image: scores of each reconstruction against the original of another image; None for a single image
        prior_alone: scores, against every original, of the same procedure on features without information (the mean of
            validation images); None if there are no validation images
        identified: share of reconstructions that are nearest to their own original among `candidates`
        distance: distance of re-identification: `lpips`, by a network not used in the search, or `correlation`
        candidates: number of originals; a guess is right with probability 1 / `candidates`
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
    """Facts about the search for images in `steps` passes, from the decoder of the run `start`, or from grey."""

    steps: int
    seconds_per_image: float
    feature_loss: float
    start: str = ""
    start_decoder: str = ""
    start_sha256: str = ""
    decoder_alone: StartDecoder | None = None
    controls: BoundControls | None = None


@dataclass(frozen=True)
class Attacker:
    """An attacker: the decoder that it trains, and the number and source of its own images.

    `threat_model` is `black-box` or `white-box`; `answer`, the kind of its reconstructions, is `decoded`, `refined` or
    `best estimate`.
    """

    decoder: str
    images: int
    threat_model: str
    data: str
    answer: str


@dataclass(frozen=True)
class WorstCase:
    """Id and SSIM of the image that an attacker reconstructed best: the worst case for its owner."""

    id: str
    ssim: float


@dataclass(frozen=True)
class VisibleRegion:
    """Part of the images that a layer's locations see: first pixel, and pixel after the last, along each axis.

    `share` is its share of all pixels, `unseen` a note on the others.
    """

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    share: float
    unseen: str


@dataclass(frozen=True)
class AttackFacts:
    """Measured success of one attacker on one layer behind one defence.

    `identification` is, for each distance, the share of reconstructions that are nearest to their own original among
    `candidates`; a guess is right with probability `chance`. `scores_seen` are the scores within the part `seen`.
    """

    layer: str
    defence: str
    attacker: Attacker
    scores: Mapping[str, Interval | None]
    worst: WorstCase
    identification: Mapping[str, Interval]
    candidates: int
    chance: float
    seconds: float
    seen: VisibleRegion | None = None
    scores_seen: Mapping[str, Interval | None] | None = None


@dataclass(frozen=True, kw_only=True)
class Result:
    """The result of a finished run.

    `scores` holds a `Score` for each of `METRICS`; only that of LPIPS may be None (`lpips` then has the reason).
    `scores_seen` holds scores over the pixels that the layer's locations see, if these are not all pixels. `per_image`
    are the rows of scores.csv: `id`, the metrics, and other values for each image. `fusion_weights` are the sources'
    mean weights over the test images; empty without a fusion that weights them.
    """

    kind: str
    label: str
    config: RunConfig | BaselineConfig | InversionConfig | None
    data: DataFacts
    lpips: LpipsStatus
    scores: Mapping[str, Score | None]
    per_image: tuple[Mapping[str, Any], ...]
    features: tuple[FeatureMap, ...] = ()
    weights: tuple[WeightsRecord, ...] = ()
    fusion_weights: tuple[float, ...] = ()
    training: TrainingFacts | None = None
    inversion: InversionFacts | None = None
    attack: AttackFacts | None = None
    scores_seen: Mapping[str, Score | None] | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown_choice_error("kind of result", self.kind, KINDS)
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
        """Layers that were decoded or inverted, as `model:layer`; empty for a baseline."""
        return getattr(self.config, "sources", ())

    @property
    def is_baseline(self) -> bool:
        return self.kind == "baseline"

    @property
    def decoder(self) -> str:
        """Name of the decoder; of an inversion its kind, such as `linear + refined` or `inversion`; else empty."""
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
        """Number of the decoder's parameters; 0 for a baseline, None for an inversion or an attack."""
        return self.training.parameters if self.training else 0 if self.is_baseline else None

    @property
    def is_imported(self) -> bool:
        """True if the decoder was trained before this run, which showed it no training images."""
        return self.training is not None and self.training.images_seen == 0

    @property
    def train_seconds(self) -> float | None:
        """Seconds of training; 0 for a baseline, None for an inversion, an attack or an imported decoder."""
        if self.is_imported:
            return None
        return self.training.seconds if self.training else 0.0 if self.is_baseline else None

    @property
    def is_random(self) -> bool:
        """True if an encoder was untrained, which makes the run a random control."""
        return any(weights.is_random for weights in self.weights)

    @property
    def weights_label(self) -> str:
        """`pretrained`, or the name of the random control if an encoder of the run is one."""
        return next((weights.label for weights in self.weights if weights.is_random), "pretrained")

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Configuration as plain values, without settings that are None."""
        return {} if self.config is None else to_dict(self.config)

    def other_weights(self, weights: Iterable[WeightsRecord]) -> list[tuple[WeightsRecord, WeightsRecord]]:
        """Return the recorded weights of each network for which `weights` are others, with those others."""
        recorded = {own.model: own for own in self.weights}
        pairs = ((recorded.get(now.model, now), now) for now in weights)
        return [(before, now) for before, now in pairs if before.identity != now.identity]

    def values(self, column: str) -> dict[str, float]:
        """Return one column of `per_image` by image id, without images that have no value."""
        found = ((row["id"], row.get(column)) for row in self.per_image)
        return {identity: float(value) for identity, value in found if value is not None}


def write_result(folder: Path, result: Result) -> None:
    """Write scores.csv, then summary.json, so that a folder with summary.json is complete."""
    write_csv(folder / SCORES, result.per_image)
    names = [f.name for f in dataclasses.fields(Result) if f.name not in ("config", "per_image")]
    write_json(folder / SUMMARY, {"version": VERSION, **{name: getattr(result, name) for name in names}})


def read_result(folder: Path) -> Result:
    """Read a finished run's result.

    Raises:
        AfterimageError: a file is missing, damaged or of another version, or the two files do not agree; the message
            names the file and the key
    """
    path = folder / SUMMARY
    values = read_object(path, "version", VERSION)
    kind = values.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise AfterimageError(
            f"{printable_path(path)}: {unknown_choice_error('kind of result', str(kind), KINDS)}"
        )
    config = KINDS[kind] and load_toml(KINDS[kind], folder / CONFIG)
    rows = _read_scores(folder / SCORES)
    try:
        result = from_dict(Result, values | {"config": config, "per_image": rows})
    except AfterimageError as error:
        raise AfterimageError(f"{printable_path(path)}: {error}") from None
    for metric, score in result.scores.items():
        if why := _disagreement(score, list(result.values(metric).values())):
            both = f"{printable_path(path)} and {printable_path(folder / SCORES)} do not agree"
            raise AfterimageError(f"{both} about {metric}: {why}; one of the files was changed")
    return result


def _disagreement(score: Score | None, values: Sequence[float]) -> str:
    """Return how the score of a summary differs from that of the images; empty where it does not."""
    then, now = score.count if score else 0, len(values)
    if then != now:
        return f"{then} images were scored, {now} are listed"
    if score and not math.isclose(score.mean, mean := statistics.fmean(values), rel_tol=1e-9, abs_tol=1e-9):
        return f"the mean is {score.mean:g}, that of the images {mean:g}"
    return ""


def _read_scores(path: Path) -> list[dict[str, Any]]:
    """Return the rows of scores.csv, after checking that ids are unique and all else is a finite number or None."""
    rows, seen = read_csv(path), set()
    for row in rows:
        if not row.get("id"):
            raise AfterimageError(f"{printable_path(path)} has no column 'id', or a row without one")
        if row["id"] in seen:
            raise AfterimageError(f"{printable_path(path)} scores image {row['id']!r:.200} twice")
        seen.add(row["id"])
        if missing := METRICS.keys() - row.keys():
            raise AfterimageError(f"{printable_path(path)} has no column {', '.join(sorted(missing))}")
        for column, value in row.items():
            if column != "id" and value is not None:
                check_number(path, row, column)
                # A perfect score is `1` in the file.
                row[column] = float(value) if column.startswith(tuple(METRICS)) else value
    return rows
