"""Verdict of an audit: the layers and defences within the limits, and the split to recommend."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from afterimage.config.audit import LimitsConfig
from afterimage.evaluation.intervals import share_interval
from afterimage.report.rows import group_by
from afterimage.runs.audit import AuditResults
from afterimage.runs.results import Attacker, AttackFacts, Interval

WITHIN, INCONCLUSIVE, LEAKS = "within limits", "not shown to be safe", "leaks"
SEVERITY = (WITHIN, INCONCLUSIVE, LEAKS)
UTILITY = {"classes": "same top-1 prediction", "embedding": "cosine of the embedding"}
"""Measures that compare the network with and without the defence, by the kind of its final output."""
SCOPE = (
    "measured were pixels (how alike a reconstruction and its original look) and own originals (whether a "
    "reconstruction finds its own among the test images), and not which labels, captions or persons can be read from "
    "the same features"
)
"""Statement of scope in every verdict, whether it passed, failed or had no limits."""
SSIM, SSIM_SEEN = "SSIM", "SSIM of what is seen"
"""Names of the two SSIMs of a layer whose locations do not see the whole image; the higher one counts."""
MIN_UTILITY = 0.9
"""Share of the network's own answers to keep for a recommendation where no limits are set."""


def interval_status(interval: Interval | Leak, limit: float | None) -> str:
    """Compare an interval with a limit: return `WITHIN` (also without a limit), `INCONCLUSIVE` or `LEAKS`."""
    if limit is None or interval.high <= limit:
        return WITHIN
    return LEAKS if interval.low > limit else INCONCLUSIVE


@dataclass(frozen=True)
class Leak:
    """Score of an attacker by one measure, as an interval; `by` is the measure, `attacker` the attacker."""

    estimate: float
    low: float
    high: float
    count: int
    by: str
    attacker: str

    def text(self, limit: float) -> str:
        """Write the estimate with the decisive end of its interval."""
        share = self.by not in (SSIM, SSIM_SEEN)
        estimate = f"{self.estimate:.0%}" if share else f"{self.estimate:.3f}"
        end, value = ("at least", self.low) if interval_status(self, limit) == LEAKS else ("up to", self.high)
        return f"{estimate} ({end} {value:.1%})" if share else f"{estimate} ({end} {value:.3f})"


@dataclass(frozen=True)
class Option:
    """One layer behind one defence, with the scores of its strongest attackers.

    `chance` is the share of images that guessing would identify, `cost` a result of `measure_cost`, `status` `WITHIN`,
    `INCONCLUSIVE` or `LEAKS`; `reasons` say what is not within the limits.
    """

    layer: str
    defence: str
    ssim: Leak
    identification: Leak
    chance: float
    cost: Mapping[str, Any]
    status: str
    reasons: tuple[str, ...]

    @property
    def utility(self) -> float | None:
        """Share of its own answers that the network keeps, in [0, 1]; None where it is not known."""
        return None if self.cost["score"] is None else self.cost["score"]["estimate"]


@dataclass(frozen=True)
class Verdict:
    """Verdict of an audit.

    `passed` is True if all options are within the limits and nothing failed, None without limits;
    `recommended` the option to deploy, if there is one, for `reason`; `scope` says what was measured and what
    was not.
    """

    options: tuple[Option, ...]
    passed: bool | None
    recommended: Option | None
    reason: str
    remarks: tuple[str, ...]
    scope: str = SCOPE


def attacker_text(attacker: Attacker) -> str:
    """Describe an attacker and the kind of its reconstructions: `linear, 640 images, white-box, refined`."""
    source = f" from {attacker.data}" if attacker.data else ""
    return (
        f"{attacker.decoder}, {attacker.images:,} images{source}, {attacker.threat_model}, {attacker.answer}"
    )


def highest_identification(row: AttackFacts) -> tuple[str, Interval]:
    """Return the distance by which most reconstructions found their original, and the share that did."""
    return max(row.identification.items(), key=lambda item: item[1].high)


def ssim_intervals(row: AttackFacts) -> dict[str, Interval]:
    """Return intervals of the mean SSIM: of whole images, and of the part that is seen if that is not all."""
    part = row.scores_seen["ssim"] if row.scores_seen else None
    return {SSIM: row.scores["ssim"]} | ({} if part is None else {SSIM_SEEN: part})


def judge(results: AuditResults, limits: LimitsConfig) -> Verdict:
    """Judge everything measured.

    Of several attackers and distances the worst counts: one that is shown to leak, else one that is not shown
    to be safe, and among equals the one with the highest decisive end of its interval. Where a layer's
    locations do not see the whole image, the worse of two measurements counts: of whole images, and of the
    seen part alone. What was brought back from behind a longer chain of defences counts too, since an attacker who
    gets `pca:8`, or undefended features, can apply the rest of `pca:8+int8` to them. Where an attacker could not be
    measured, a layer and its defence are never within limits.
    """
    attacks = group_by(results.rows, lambda row: (row.layer, row.defence))
    options = tuple(
        _option(_attainable(key, attacks), cost, limits, key not in results.unmeasured)
        for key, cost in results.costs.items()
        if key in attacks
    )
    missing = [f"{layer}, {defence}" for layer, defence in results.costs if (layer, defence) not in attacks]
    passed = None
    if limits:
        passed = (
            not (missing or results.failures) and all(o.status == WITHIN for o in options) and bool(options)
        )
    return Verdict(options, passed, *_recommend(options, limits), tuple(_remarks(results, limits, missing)))


def _attainable(
    key: tuple[str, str], attacks: Mapping[tuple[str, str], Sequence[AttackFacts]]
) -> list[AttackFacts]:
    """Return the attacks on one option, and those on options whose features can be computed from its features."""
    layer, defence = key
    beyond = [
        row
        for (other, chain), rows in attacks.items()
        if other == layer and chain != defence and (defence == "none" or chain.startswith(f"{defence}+"))
        for row in rows
    ]
    return [*attacks[key], *beyond]


def _option(
    rows: Sequence[AttackFacts], cost: Mapping[str, Any], limits: LimitsConfig, complete: bool
) -> Option:
    first = rows[0]
    ssim = _worst([(row, ssim_intervals(row)) for row in rows], limits.max_ssim, first.defence)
    found = _worst([(row, row.identification) for row in rows], limits.max_identification, first.defence)
    judged = ((ssim.by, ssim, limits.max_ssim), ("identification", found, limits.max_identification))
    reasons = {}
    for name, leak, limit in judged:
        if (status := interval_status(leak, limit)) != WITHIN:
            reason = f"{name} {leak.text(limit)} against a limit of {limit:g}, {leak.attacker}: {status}"
            reasons[reason] = status
    if not complete:
        reasons[f"an attacker could not be measured: {INCONCLUSIVE}"] = INCONCLUSIVE
    status = max(reasons.values(), key=SEVERITY.index, default=WITHIN)
    return Option(first.layer, first.defence, ssim, found, first.chance, cost, status, tuple(reasons))


def _worst(
    measured: Iterable[tuple[AttackFacts, Mapping[str, Interval]]], limit: float | None, defence: str
) -> Leak:
    """Choose the worst, a shown leak before a possible one: wide intervals reach far but show little."""

    def name(row: AttackFacts) -> str:
        through = "" if row.defence == defence else f", after {row.defence}"
        return attacker_text(row.attacker) + through

    leaks = [
        Leak(i.estimate, i.low, i.high, i.count, by, name(row))
        for row, intervals in measured
        for by, i in intervals.items()
    ]

    def weight(leak: Leak) -> tuple[int, float]:
        status = interval_status(leak, limit)
        return SEVERITY.index(status), leak.low if status == LEAKS else leak.high

    return max(leaks, key=weight)


def _recommend(options: Sequence[Option], limits: LimitsConfig) -> tuple[Option | None, str]:
    unshuffled = [option for option in options if "shuffle" not in option.defence]
    if not unshuffled:
        return None, "nothing that can be recommended was measured"
    least = min(unshuffled, key=lambda o: (o.identification.high, o.ssim.high))
    aside = ", shuffled features aside" if len(unshuffled) < len(options) else ""
    least_text = f"{least.layer} with {least.defence} leaks least{aside}"
    safe = [option for option in unshuffled if option.status == WITHIN]
    known = [option for option in (safe if limits else unshuffled) if option.utility is not None]
    keeps = f"{MIN_UTILITY:.0%} of the network's own answers"
    if not limits:
        enough = [option for option in known if option.utility >= MIN_UTILITY and option.status == WITHIN]
        if enough:
            best = min(enough, key=lambda o: (o.identification.high, o.ssim.high, o.cost["bytes"]))
            return best, f"no limits were set: it leaks least of what keeps {keeps}"
        who = f"none keeps {keeps}" if known else "what each costs is unknown"
        return None, f"no limits were set and {who}; {least_text}"
    if not safe:
        got = f"{least.identification.estimate:.0%} identified and SSIM {least.ssim.estimate:.3f}"
        return None, f"no combination is within the limits; {least_text}: {got}"
    rule = "within the limits for every attacker measured"
    if not known:
        best = min(safe, key=lambda o: (o.cost["bytes"], o.identification.high))
        return best, f"{rule}, and the fewest bytes of those; what it costs in accuracy is not known"
    best = max(known, key=lambda o: (o.utility, -o.cost["bytes"]))
    unknown = len(safe) - len(known)
    others = f"; for {unknown} others within the limits that is not known" if unknown else ""
    return best, f"{rule}, and keeps most of the network's own answers ({best.utility:.0%}){others}"


def _remarks(results: AuditResults, limits: LimitsConfig, missing: Sequence[str]) -> list[str]:
    rows, blind = results.rows, results.blind
    remarks = [f"could not be measured: {failure}" for failure in (*results.failures, *missing)]
    for row in blind:
        floor = row.scores["ssim"]
        if limits.max_ssim is not None and floor.high > limits.max_ssim:
            remarks.append(
                f"the limit on SSIM is below what is reached without any features: the mean of the attacker's "
                f"{row.attacker.images:,} images has SSIM {floor.estimate:.3f} (up to {floor.high:.3f})"
            )
            break
    if limits.max_identification is not None:
        for count in sorted({highest_identification(row)[1].count for row in rows}):
            least = share_interval(np.zeros(count, bool)).high
            if least > limits.max_identification:
                remarks.append(
                    f"{count} test images are too few to show an identification below {limits.max_identification:g}: "
                    f"even without a single hit the interval reaches {least:.3f}"
                )
    unseen = {row.layer: row.seen for row in rows if row.seen}
    for layer, seen in unseen.items():
        remarks.append(
            f"{layer}: {seen.unseen}, {1 - seen.share:.1%} of their pixels. That protects none of the others: "
            "every attacker was measured on whole images and on what is seen of them alone, and what leaks more counts"
        )
    floor = max((row.scores["ssim"].estimate for row in blind), default=0.0)
    for row in rows:
        found, ssim = highest_identification(row)[1], row.scores["ssim"].estimate
        if row.defence == "none" and found.low <= row.chance and ssim <= floor:
            remarks.append(
                f"{row.layer}, undefended: {attacker_text(row.attacker)} got no more than one without features; "
                "are these the features of these images?"
            )
    if any("shuffle" in row.defence for row in rows):
        remarks.append(
            "no attacker here puts shuffled places back in order, though that is known to be possible (as a jigsaw "
            "puzzle is solved): shuffled features are measured, but not recommended"
        )
    return remarks
