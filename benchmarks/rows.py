"""Results of measurements: figures of both sides, their ratio, the goal, and whether it is met."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from afterimage.cli.shared import table
from afterimage.runtime.terminal import console

_MET = {None: "not decided", True: "yes", False: "NO"}


@dataclass(frozen=True)
class Goal:
    """Goal of a measurement: the least ratio (`ratio`) or the largest figure of ours (`at most`)."""

    kind: str
    value: float

    def __str__(self) -> str:
        return f"{self.value:g}x" if self.kind == "ratio" else f"at most {self.value:g}"


@dataclass(frozen=True)
class Quality:
    """Quality that both sides reached, and the largest difference at which their speeds are comparable."""

    what: str
    ours: float
    reference: float
    tolerance: float

    @property
    def equal(self) -> bool:
        return abs(self.ours - self.reference) <= self.tolerance

    def __str__(self) -> str:
        verdict = "equal" if self.equal else "NOT EQUAL"
        return (
            f"{self.what}: ours {self.ours:.4g}, reference {self.reference:.4g}; {verdict} "
            f"(difference {abs(self.ours - self.reference):.2g}, tolerance {self.tolerance:g})"
        )


@dataclass(frozen=True)
class Row:
    """Result of one measurement.

    Attributes:
        name: name of the row
        what: description of the measured quantity
        unit: unit of the figures
        ours: our figures, one per repeat
        reference: figures of the reference, one per repeat, taken in turns with ours
        higher_is_better: whether larger figures are better
        goal: the goal, if there is one
        bound: `at least` if the reference was stopped, so that the ratio is a lower bound; `computed` if its figure was
            computed and not measured
        quality: quality that both sides reached
        notes: remarks
        unavailable: reason why there are no figures; empty if there are
        points: figures behind those of `ours`, such as one for each size
    """

    name: str
    what: str
    unit: str = ""
    ours: Sequence[float] = ()
    reference: Sequence[float] = ()
    higher_is_better: bool = False
    goal: Goal | None = None
    bound: str = ""
    quality: Quality | None = None
    notes: Sequence[str] = ()
    unavailable: str = ""
    points: Sequence[dict[str, Any]] = field(default_factory=list)

    @property
    def ratios(self) -> list[float]:
        """Factor by which ours is better, one per repeat; repeats with a figure that is not positive have none."""
        pairs = [(o, r) for o, r in zip(self.ours, self.reference, strict=False) if min(o, r) > 0]
        return [o / r if self.higher_is_better else r / o for o, r in pairs]

    @property
    def ratio(self) -> float | None:
        return statistics.median(self.ratios) if self.ratios else None

    @property
    def met(self) -> bool | None:
        """True if the goal is met; None without a goal or a measurement, or if a lower bound cannot decide.

        A ratio does not meet its goal if the two sides reach different quality.
        """
        if self.goal is None or self.unavailable:
            return None
        if self.goal.kind != "ratio":
            return statistics.median(self.ours) <= self.goal.value
        if self.ratio is None:
            return None
        if self.quality is not None and not self.quality.equal:
            return False
        met = self.ratio >= self.goal.value
        return None if self.bound == "at least" and not met else met

    def as_dict(self) -> dict[str, Any]:
        derived = {"ratios": self.ratios, "ratio": self.ratio, "met": self.met}
        equal = None if self.quality is None else self.quality.equal
        return asdict(self) | derived | {"quality_equal": equal}


def row_line(row: Row) -> str:
    """Return a row as one line of text."""
    if row.unavailable:
        return f"{row.name}: unavailable: {row.unavailable}"
    figures = [
        f"{who} {_figure(values, row.unit)}"
        for who, values in (("ours", row.ours), ("reference", row.reference))
        if values
    ]
    goal = f"goal {row.goal}: {_MET[row.met]}" if row.goal else ""
    return f"{row.name}: {', '.join(filter(None, [*figures, _ratio(row), goal]))}"


def print_rows(rows: Sequence[Row]) -> None:
    """Print all rows as a table, and below it their qualities and notes."""
    figures = ("ours", "reference", "ratio (min to max)", "goal", "met")
    found = table("ours against the plain reference", ("measurement", "what"), figures)
    for row in rows:
        if row.unavailable:
            found.add_row(row.name, row.what, "unavailable", "", "", str(row.goal or ""), "")
            continue
        met = _MET[row.met] if row.goal else ""
        figures = [_figure(values, row.unit) for values in (row.ours, row.reference)]
        found.add_row(row.name, row.what, *figures, _ratio(row), str(row.goal or ""), met)
    screen = console(150)
    screen.print(found)
    for row in rows:
        lines = [f"unavailable: {row.unavailable}"] if row.unavailable else []
        lines += [str(row.quality)] if row.quality else []
        for line in (*lines, *row.notes):
            screen.print(f"{row.name}: {line}", soft_wrap=True)


def _figure(values: Sequence[float], unit: str) -> str:
    return f"{statistics.median(values):.3g} {unit}" if values else ""


def _ratio(row: Row) -> str:
    if row.ratio is None:
        return ""
    text = f"{row.ratio:.2f}x"
    if len(row.ratios) > 1:
        text += f" ({min(row.ratios):.2f} to {max(row.ratios):.2f})"
    return f"{row.bound} {text}".strip()
