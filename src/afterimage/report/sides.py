"""Verdicts on the hypotheses for decoders, beside those for the measured bound of the same layers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from afterimage.evaluation.intervals import NAME
from afterimage.report.format import difference
from afterimage.report.statistics.analysis import Analysis
from afterimage.report.statistics.hypotheses import (
    SUPPORTED,
    UNDECIDED,
    UNTESTABLE,
    Architectures,
    Depth,
    Resolution,
)
from afterimage.report.statistics.rows import Setting
from afterimage.runs.results import METRICS

Hypothesis = Depth | Resolution | Architectures


@dataclass(frozen=True)
class BothSides:
    """Analyses of decoders and of their measured bounds, for the same layers and images."""

    decoders: Analysis
    bound: Analysis

    def as_dict(self) -> dict[str, Any]:
        """Return both analyses as JSON values for findings.json."""
        return {"decoders_beside_bound": self.decoders.as_dict(), "measured_bound": self.bound.as_dict()}


@dataclass(frozen=True)
class Sides:
    """Answers to one hypothesis; those that are not testable are left out.

    Attributes:
        decoders: answers for decoders on all images, by metric and setting
        same: answers for decoders on the images of their bounds, by metric and setting
        bound: answers for the measured bound
    """

    decoders: dict[tuple[str, Setting], Hypothesis]
    same: dict[tuple[str, Setting], Hypothesis]
    bound: tuple[Hypothesis, ...]

    @classmethod
    def of(cls, name: str, analysis: Analysis, both: BothSides | None) -> Sides:
        """Collect the answers in the field `name` of each analysis."""
        analyses = (analysis, both.decoders, both.bound) if both else (analysis,)
        tested = [[r for r in getattr(each, name) if r.verdict != UNTESTABLE] for each in analyses]
        decoders, same, bound = [*tested, [], []][:3]
        first, second = ({(r.metric, r.setting): r for r in side} for side in (decoders, same))
        return cls(first, second, tuple(bound))

    @property
    def sentences(self) -> list[str]:
        """Sentences that compare the verdicts for the bound with those for decoders.

        Agreement is stated for the first metric only, except where quality falls with depth for decoders.
        """
        told = []
        for found in self.bound:
            key = found.metric, found.setting
            if (decoder := self.decoders.get(key)) is None:
                continue
            what, alike = f"{METRICS[found.metric].title}, {found.setting}", decoder.verdict == found.verdict
            same = self.same[key].verdict if key in self.same else UNTESTABLE
            few = found.verdict == same == UNDECIDED and not alike
            if isinstance(found, Depth) and decoder.verdict == SUPPORTED:
                told.append(
                    f"Quality falls with depth ({what}): the measured bound does too."
                    if alike
                    else "The decoder's score falls with depth over all test images; the images of the measured bound "
                    f"are too few to tell ({what}): on them it is undecided for the decoder too."
                    if few
                    else f"The decoder's score falls with depth, the measured bound does not ({what}): "
                    f"{found.verdict}, {found.reason}."
                )
            elif not alike:
                told.append(
                    f"Decoders and bound differ ({what}): {decoder.verdict} for decoders, {found.verdict} for the "
                    f"bound{', as for decoders on its few images' if few else ''}, {found.reason}."
                )
            elif found.metric == self.bound[0].metric:
                told.append(f"The measured bound says the same ({what}): {found.verdict}, {found.reason}.")
        if not self.bound and any(
            isinstance(r, Depth) and r.verdict == SUPPORTED for r in self.decoders.values()
        ):
            told.append(
                "That is what decoders show. Whether layers lose it or decoders miss it, a measured bound tells "
                "(study --invert)."
            )
        return told

    @property
    def tables(self) -> Iterable[tuple[str, tuple[str, ...], tuple[tuple[str, ...], ...]]]:
        """Title, header and rows of each table: the verdicts, and for H1 each step of decoder and bound."""
        rows, steps = [], []
        for found in self.bound:
            key = found.metric, found.setting
            verdicts = [side[key].verdict if key in side else "–" for side in (self.decoders, self.same)]
            rows.append((METRICS[found.metric].title, found.setting, *verdicts, found.verdict))
            if isinstance(found, Depth) and key in self.same:
                for decoder, bound in zip(self.same[key].encoders, found.encoders, strict=True):
                    where = (*rows[-1][:2], bound.encoder)
                    names = (f"{shallow} → {deep}" for shallow, deep in pairwise(bound.layers))
                    for name, *pair in zip(names, decoder.steps, bound.steps, strict=True):
                        steps.append((*where, name, *map(difference, pair)))
        header = (
            "metric",
            "decoder",
            "decoders, all images",
            "decoders, the bound's images",
            "measured bound",
        )
        yield "Verdicts for decoders and for the measured bound", header, tuple(rows)
        header = (
            "metric",
            "decoder",
            "encoder",
            "step",
            f"decoder's difference [{NAME}]",
            "the bound's",
        )
        yield "Each step of both, on the bound's images, paired by image", header, tuple(steps)
