"""The rows of a report: finished runs with the names under which tables and figures show them."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from afterimage.config import (
    AfterimageError,
    FusionConfig,
    RunConfig,
    join_names,
    short_names,
    split_source,
)  # fmt: skip
from afterimage.evaluation.intervals import mean_interval
from afterimage.report.format import single_line
from afterimage.runs.results import METRICS, Interval, Result
from afterimage.runs.run import Run

Item = TypeVar("Item")
Key = TypeVar("Key", bound=Hashable)

DECODERS = ("linear", "transposed", "attention", "wavelet", "frequency", "residual")
"""Order of decoders in tables; other decoders follow, by name."""
LISTED_SETTINGS = ("sources", "seed", "lpips", "decoder.name", "fusion.")
"""Prefixes of settings that have a column or an axis of their own, or do not change the result."""


@dataclass(frozen=True, kw_only=True)
class Row(Result):
    """One finished run as tables and figures show it.

    Attributes:
        run: the run
        variant: settings in which the row differs from others of the same encoder and decoder, as text
        fusion_letter: letter that stands for the way of fusing several sources; empty for one source
        start: settings of the run whose decoder an inversion started from; None if that is not among the runs
    """

    run: Run
    variant: str = ""
    fusion_letter: str = ""
    start: RunConfig | None = None

    @classmethod
    def from_run(cls, run: Run) -> Row:
        """Read a finished run. Raises `AfterimageError` as `Run.result` does."""
        result = run.result
        return cls(run=run, **{f.name: getattr(result, f.name) for f in dataclasses.fields(Result)})

    @property
    def models(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(split_source(source)[0] for source in self.sources))

    @property
    def encoder(self) -> str:
        """Name to group rows by: the encoder's, `fusion` for several sources, empty for a baseline."""
        return "fusion" if self.is_fused else self.models[0] if self.models else ""

    @property
    def layer(self) -> str:
        return f"fusion {self.fusion_letter}" if self.is_fused else split_source(self.sources[0])[1]

    @property
    def is_fused(self) -> bool:
        return len(self.sources) > 1

    @property
    def fusion(self) -> FusionConfig | None:
        """The fusion; that of an inversion is its decoder's."""
        return self.start.fusion if self.start else super().fusion

    @property
    def control(self) -> str:
        """Name of the random control in capitals, such as `RANDOM weights`; empty for trained weights."""
        return f"{self.weights_label.upper()} weights" if self.is_random else ""

    @property
    def protocol(self) -> str:
        """Name of the protocol that its images follow; empty for the study's own."""
        return str(self.settings.get("data", {}).get("protocol") or "")

    @property
    def decoder_label(self) -> str:
        return f"{self.decoder} ({self.variant})" if self.variant else self.decoder

    @property
    def features_text(self) -> str:
        """Sources in one text, joined by ` + `."""
        return " + ".join(self.sources)

    @property
    def shapes(self) -> tuple[str, ...]:
        return tuple(f"{f.channels}×{f.height}×{f.width}" for f in self.features)

    @property
    def reductions(self) -> tuple[str, ...]:
        """Image height over feature height of each source, as text."""
        return tuple(f"{f.reduction:g}" for f in self.features)

    @property
    def sides(self) -> tuple[int, ...]:
        """Height and width of the finest feature map; those of the fused features if they have a size of their own."""
        if self.is_fused and self.fusion and self.fusion.size:
            return self.fusion.size, self.fusion.size
        finest = max(self.features, key=lambda f: f.locations, default=None)
        return (finest.height, finest.width) if finest else ()

    @property
    def grid(self) -> str:
        return "×".join(map(str, self.sides))

    @property
    def locations(self) -> int | None:
        """Number of feature locations that the decoder sees; None without features."""
        return math.prod(self.sides) if self.sides else None

    @property
    def values_per_pixel(self) -> float | None:
        """Number of feature values for each value of the image (three a pixel); None without features."""
        if not self.features or self.config is None:
            return None
        height, width = self.config.data.size
        return sum(math.prod(f.shape) for f in self.features) / (3 * height * width)

    @property
    def order(self) -> tuple[Any, ...]:
        return (
            self.is_fused, natural_sort_key(self.encoder), self.control, self.fusion_letter,
            tuple(f.order for f in self.features), [natural_sort_key(s) for s in self.sources], self.decoder_order,
            self.seed or 0, natural_sort_key(self.run.name),
        )  # fmt: skip

    @property
    def decoder_order(self) -> tuple[Any, ...]:
        place = DECODERS.index(self.decoder) if self.decoder in DECODERS else len(DECODERS)
        return place, natural_sort_key(self.decoder), natural_sort_key(self.variant)

    @property
    def fusion_text(self) -> str:
        """Description of the fusion, for example `attention fusion, 256 channels at 28×28`."""
        if (fusion := self.fusion) is None:
            # From grey, the image is fitted to the features of all sources, which nothing fuses.
            return "unknown fusion" if self.inversion is None or self.inversion.start else "joint inversion"
        wide = "" if fusion.name in ("aligned", "stacked", "sum") else f", {fusion.channels} channels"
        size = f"{fusion.size}×{fusion.size}" if fusion.size else "the finest resolution"
        return f"{fusion.name} fusion{wide} at {size}"

    @cached_property
    def intervals(self) -> dict[str, Interval | None]:
        """Mean of each metric with its interval; None where it was not measured."""
        columns = {metric: [value for _, value in sorted(self.values(metric).items())] for metric in METRICS}
        return {
            metric: mean_over_images(values, metric) if values else None for metric, values in columns.items()
        }

    @cached_property
    def distinguishing(self) -> dict[str, Any]:
        """Settings that nothing else in a table shows, by their dotted names."""
        return {
            key: value for key, value in flatten(self.settings).items() if not key.startswith(LISTED_SETTINGS)
        }


@dataclass(frozen=True)
class Unfinished:
    """A run without a result; its `state` is new, running, stopped, failed or damaged."""

    run: Run
    state: str
    error: str

    def __str__(self) -> str:
        return ": ".join(filter(None, (self.run.name, self.state, self.error)))


@dataclass(frozen=True)
class Rows:
    """All runs of a report.

    Attributes:
        decoders: decoder rows by encoder, depth of the layer and decoder; the inversions where there are
            neither decoders nor baselines
        baselines: baselines by their mean PSNR
        unfinished: runs without a result
        warnings: sentences on rows whose scores do not compare or need care
        inversions: inversions; a few test images were inverted, so they do not stand beside decoders
    """

    decoders: tuple[Row, ...]
    baselines: tuple[Row, ...]
    unfinished: tuple[Unfinished, ...]
    warnings: tuple[str, ...] = ()
    inversions: tuple[Row, ...] = ()

    @property
    def all(self) -> tuple[Row, ...]:
        return self.decoders + self.baselines

    @property
    def with_inversions(self) -> tuple[Row, ...]:
        """All rows and the inversions, each once."""
        return tuple({id(row): row for row in self.all + self.inversions}.values())

    @property
    def nets(self) -> tuple[str, ...]:
        """LPIPS networks of all rows; distances of different networks do not compare."""
        return lpips_nets(self.all)

    @property
    def protocol(self) -> str:
        """Protocol that all rows follow; empty for the study's own.

        Raises:
            AfterimageError: the rows follow several protocols, whose figures must not share a column
        """
        found = group_by(self.with_inversions, lambda row: row.protocol)
        if len(found) > 1:
            told = (
                f"{name or 'study'} ({join_names([row.run.name for row in rows], 3)})"
                for name, rows in sorted(found.items())
            )
            raise AfterimageError(
                f"these runs were measured by different protocols: {'; '.join(told)}; report on those of one at a time"
            )
        return next(iter(found), "")


def short_encoders(rows: Iterable[Row]) -> dict[str, str]:
    """Return encoder names for figures: without the weights' tag where they stay distinct."""
    names = short_names(row.encoder for row in rows if row.sources)
    return {name: single_line(short, 40) for name, short in names.items()}


def lpips_nets(rows: Iterable[Row]) -> tuple[str, ...]:
    """Return the LPIPS networks that measured at least one row, sorted by name."""
    return tuple(sorted({row.lpips.net for row in rows if row.scores["lpips"] is not None}))


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by their dotted names."""
    flat = {}
    for key, value in table.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat


def group_by(items: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    """Group items by a key, keys and items in the order of their first appearance."""
    groups: dict[Key, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def mean_over_images(values: Sequence[float], metric: str = "") -> Interval:
    """Compute the mean of scores by a metric, or of other values, with its interval; of a single image a point."""
    if len(values) == 1:
        return Interval(values[0], values[0], values[0], 1)
    return mean_interval(np.array(values), *([METRICS[metric].limits] if metric else []))


def natural_sort_key(name: str) -> list[tuple[int, int, str]]:
    """Return a sort key that puts `blocks.2` before `blocks.11`."""
    pieces = re.split(r"(\d+)", name)
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in pieces if p]
