"""Result of an audit, passed from measurement to report."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from afterimage.config import AfterimageError, printable_path
from afterimage.runs.results import AttackFacts
from afterimage.runs.run import Run

NO_FEATURES_ATTACKER = "no features"
"""Name of the attacker without features, whose reconstruction is the mean of the attacker's own images."""


@dataclass(frozen=True)
class Attack(AttackFacts):
    """Facts of one attack, with the notes of its run, and the run's folder relative to the audit's."""

    notes: tuple[str, ...] = ()
    folder: str = ""

    @classmethod
    def from_run(cls, run: Run, root: Path) -> Attack:
        result = run.result
        if result.attack is None:
            raise AfterimageError(
                f"{printable_path(run.path)} holds no attack, but a result of kind {result.kind}"
            )
        return cls(**vars(result.attack), notes=result.notes, folder=str(run.path.relative_to(root)))


@dataclass
class AuditResults:
    """Measurements of an audit: `rows` of attacks, `blind` attacks without features, `costs` by layer and defence."""

    subject: dict[str, Any]
    rows: list[Attack] = field(default_factory=list)
    blind: list[Attack] = field(default_factory=list)
    costs: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    unmeasured: set[tuple[str, str]] = field(default_factory=set)
    """Pairs of layer and defence for which at least one attacker could not be measured."""


COMPARISON_SIDE = 112
"""Shorter side in pixels of images when they are compared; smaller images keep their size."""

DISTANCES = {
    "pixels": "mean squared error of pixels",
    "correlation": "one minus the correlation of pixels, which contrast and brightness do not change",
    "lpips": "LPIPS, a learned perceptual distance",
}
