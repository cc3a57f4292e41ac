"""What a report knows of a run: plain values, in the order in which tables and figures show them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from afterimage.runs.run import Run

METRICS = ("psnr", "ssim", "lpips")
DECODERS = ("linear", "transposed", "attention", "wavelet", "frequency", "residual")


@dataclass(frozen=True)
class Score:
    """A metric over `count` images: mean and sample standard deviation (None for a single image)."""

    mean: float
    std: float | None
    count: int

    @property
    def margin(self) -> float | None:
        """Half the width of the 95 % t interval of the mean, the images taken as a random sample."""
        if self.std is None or self.count < 2:
            return None
        from scipy.special import stdtrit

        return float(stdtrit(self.count - 1, 0.975)) * self.std / math.sqrt(self.count)

    @classmethod
    def of(cls, values: Sequence[float]) -> Score:
        mean = math.fsum(values) / len(values)
        spread = math.fsum((v - mean) ** 2 for v in values)
        return cls(mean, math.sqrt(spread / (len(values) - 1)) if len(values) > 1 else None, len(values))


@dataclass(frozen=True)
class Row:
    """One finished run as it enters tables and figures. `features` are `Encoder.describe()` entries.

    `fusion_weights` are the sources' mean weights over all test images, empty where the fusion has none.
    """

    run: Run
    kind: str
    label: str
    sources: tuple[str, ...]
    features: tuple[Mapping[str, Any], ...]
    decoder: str
    fusion: Mapping[str, Any] | None
    weights: tuple[Mapping[str, Any], ...]
    parameters: int | None
    seed: int | None
    train_seconds: float | None
    lpips_net: str
    lpips_reason: str
    scores: Mapping[str, Score | None]
    images: tuple[Mapping[str, Any], ...]
    data: Mapping[str, Any]
    notes: tuple[str, ...]
    settings: Mapping[str, Any]
    fusion_weights: tuple[float, ...] = ()
    variant: str = ""
    fusion_letter: str = ""

    @property
    def models(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(source.partition(":")[0] for source in self.sources))

    @property
    def encoder(self) -> str:
        """What the row is grouped by: the encoder's name, or `fusion` for several sources."""
        return "fusion" if len(self.sources) > 1 else self.models[0] if self.models else ""

    @property
    def layer(self) -> str:
        return f"fusion {self.fusion_letter}" if len(self.sources) > 1 else self.sources[0].partition(":")[2]

    @cached_property
    def weights_label(self) -> str:
        """`pretrained`, `random`, `random-init`, or `partly random` where a fusion mixes them."""
        labels = {str(w.get("label") or w.get("origin") or "unknown") for w in self.weights}
        return labels.pop() if len(labels) == 1 else "partly random" if self.is_random else "unknown"

    @cached_property
    def is_random(self) -> bool:
        return any(w["is_random"] for w in self.weights)

    @property
    def control(self) -> str:
        """Which random control it is, loud, as `RANDOM weights`; empty for trained weights."""
        return f"{self.weights_label.upper()} weights" if self.is_random else ""

    @property
    def decoder_label(self) -> str:
        return f"{self.decoder} ({self.variant})" if self.variant else self.decoder

    @property
    def shapes(self) -> tuple[str, ...]:
        return tuple(f"{f['channels']}×{f['height']}×{f['width']}" for f in self.features)

    @property
    def reductions(self) -> tuple[str, ...]:
        """Image height over feature height, as text; empty where it is not known."""
        return tuple(f"{f['reduction']:g}" if f.get("reduction") else "" for f in self.features)

    @property
    def grid(self) -> str:
        """The locations as `56×56`, after fusion where there is one."""
        if len(self.sources) > 1 and self.fusion and self.fusion.get("size"):
            return f"{self.fusion['size']}×{self.fusion['size']}"
        finest = max(self.features, key=lambda f: int(f["height"]) * int(f["width"]), default=None)
        return f"{finest['height']}×{finest['width']}" if finest else ""

    @property
    def locations(self) -> int | None:
        """Feature locations that the decoder sees: `height * width`, after fusion where there is one."""
        if len(self.sources) > 1 and self.fusion and self.fusion.get("size"):
            return int(self.fusion["size"]) ** 2
        return max((int(f["height"]) * int(f["width"]) for f in self.features), default=None)

    @property
    def order(self) -> tuple[Any, ...]:
        depth = tuple(f["order"] if isinstance(f.get("order"), int) else math.inf for f in self.features)
        return (
            len(self.sources) > 1, natural(self.encoder), self.control, self.fusion_letter, depth,
            [natural(s) for s in self.sources], self.decoder_order, self.seed or 0, natural(self.run.name),
        )  # fmt: skip

    @property
    def decoder_order(self) -> tuple[Any, ...]:
        place = DECODERS.index(self.decoder) if self.decoder in DECODERS else len(DECODERS)
        return place, natural(self.decoder), natural(self.variant)

    def values(self, metric: str) -> dict[str, float]:
        """The metric by image id, finite values only."""
        found = {p["id"]: p.get(metric) for p in self.images}
        return {k: float(v) for k, v in found.items() if isinstance(v, int | float) and math.isfinite(v)}


@dataclass(frozen=True)
class Unfinished:
    """A run that has no result: `state` is new, running, failed or damaged."""

    run: Run
    state: str
    error: str


@dataclass(frozen=True)
class Rows:
    """Decoder rows by encoder, depth of the layer and decoder; baselines; what has no result."""

    decoders: tuple[Row, ...]
    references: tuple[Row, ...]
    unfinished: tuple[Unfinished, ...]
    warnings: tuple[str, ...] = field(default=())

    @property
    def all(self) -> tuple[Row, ...]:
        return self.decoders + self.references

    @property
    def nets(self) -> tuple[str, ...]:
        """The LPIPS networks that measured at least one row; distances of different ones do not compare."""
        return tuple(sorted({r.lpips_net for r in self.all if r.scores["lpips"] is not None}))


def pool(rows: Sequence[Row], metric: str) -> Score | None:
    """One score for runs that differ only in their seed: the mean over runs, then over images."""
    if len(rows) == 1:
        return rows[0].scores[metric]
    values = [row.values(metric) for row in rows]
    common = [key for key in values[0] if all(key in v for v in values)]
    return Score.of([math.fsum(v[key] for v in values) / len(values) for key in common]) if common else None


def natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key that puts `blocks.2` before `blocks.11`."""
    pieces = re.split(r"(\d+)", name)
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in pieces if p]
