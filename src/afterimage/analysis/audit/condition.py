"""A cell of the audit: one attacker on one layer behind one defence; finished ones are not done again."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from afterimage.analysis.audit.reidentification import Compared, Gallery
from afterimage.config.audit import digest
from afterimage.evaluation.evaluate import SCORES, SEEN, score_notes
from afterimage.evaluation.intervals import interval_dict, mean_interval, share_interval
from afterimage.runs.files import write_json
from afterimage.runs.run import Run

VERSION = 1
"""Raised whenever the same settings would give other numbers."""


@dataclass(frozen=True)
class AuditCondition:
    """What is measured; everything that changes the result is in `settings`, whose digest ends the folder's name."""

    layer: str
    defence: str
    decoder: str
    images: int
    threat_model: str
    settings: Mapping[str, Any]

    @property
    def name(self) -> str:
        parts = (self.layer, self.defence, self.decoder, str(self.images), self.threat_model)
        slug = re.sub(r"[^A-Za-z0-9_.+]+", "-", "-".join(parts)).strip("-.")
        return f"{slug[:100]}-{digest({**self.settings, 'cell': parts, 'version': VERSION})}"

    def run(self, root: Path) -> Run:
        return Run(root / "cells" / self.name)

    def attacker(self) -> dict[str, Any]:
        return {
            "decoder": self.decoder,
            "images": self.images,
            "threat_model": self.threat_model,
            "data": self.settings["attacker_data"],
        }

    def begin(self, root: Path) -> Run:
        """The cell's folder with what was asked for; `runs` says what else it comes to hold."""
        run = self.run(root)
        if not run.file("cell.json").exists():
            asked = {
                "layer": self.layer,
                "defence": self.defence,
                **self.attacker(),
                "settings": self.settings,
            }
            write_json(run.file("cell.json"), asked)
        return run

    def save(
        self,
        root: Path,
        rows: Sequence[Mapping[str, Any]],
        images: Sequence[tuple[str, Any, Any]],
        reconstructions: Compared,
        galleries: Mapping[str, Gallery],
        *,
        seconds: float,
        notes: Sequence[str],
        seen: Mapping[str, Any] | None = None,
    ) -> None:
        """Write what leaked: `rows` from `evaluate`, one a test image, and `reconstructions` as they are compared.

        `galleries` go by the same names as these. `seen` says which part of the images is seen, where it is not all.
        """
        found = {
            f"{name}{part}": values
            for part, small in reconstructions.items()
            for name, values in galleries[part].find(small).items()
        }
        columns = {f"found_by_{name}": values for name, values in found.items()}
        rows = [row | {k: int(v[i]) for k, v in columns.items()} for i, row in enumerate(rows)]
        worst, ssim = max(((row["id"], _most(row)) for row in rows), key=lambda pair: pair[1])
        summary = {
            "layer": self.layer,
            "defence": self.defence,
            "attacker": self.attacker(),
            "scores": {name: _interval([row[name] for row in rows]) for name in SCORES},
            "worst": {"id": worst, "ssim": ssim},
            "identification": {name: share_interval(values) for name, values in found.items()},
            "candidates": len(galleries[""].originals),
            "chance": 1 / len(galleries[""].originals),
            "seconds": round(seconds, 2),
            "notes": [*notes, *score_notes(rows)],
        }
        if seen is not None:
            columns = {name: [row[f"{name}{SEEN}"] for row in rows] for name in SCORES}
            summary["seen"] = {
                **seen,
                "scores": {name: _interval(values) for name, values in columns.items()},
            }
        run = self.run(root)
        run.save_result(summary, rows, images)
        run.set_state("done")


def _most(row: Mapping[str, Any]) -> float:
    """The SSIM of a whole image, or of what is seen of it, whichever is higher."""
    part = row.get(f"ssim{SEEN}")
    return row["ssim"] if part is None else max(row["ssim"], part)


def _interval(values: Sequence[float | None]) -> dict[str, Any] | None:
    return None if None in values else interval_dict(mean_interval(np.array(values)))
