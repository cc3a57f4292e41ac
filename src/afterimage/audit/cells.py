"""A cell of the audit: one attacker on one layer behind one defence; finished ones are not done again."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from afterimage.audit.config import digest
from afterimage.audit.identification import Gallery, interval_dict, share
from afterimage.evaluate import score_notes
from afterimage.runs import Run, write_json
from afterimage.statistics import mean_interval

VERSION = 1
"""Raised whenever the same settings would give other numbers."""


@dataclass(frozen=True)
class Cell:
    """What is measured; everything that changes the result is in `settings`, whose digest ends the folder's name."""

    layer: str
    defence: str
    decoder: str
    pictures: int
    access: str
    settings: Mapping[str, Any]

    @property
    def name(self) -> str:
        parts = (self.layer, self.defence, self.decoder, str(self.pictures), self.access)
        slug = re.sub(r"[^A-Za-z0-9_.+]+", "-", "-".join(parts)).strip("-.")
        return f"{slug[:100]}-{digest({**self.settings, 'cell': parts, 'version': VERSION})}"

    def run(self, root: Path) -> Run:
        return Run(root / "cells" / self.name)

    def attacker(self) -> dict[str, Any]:
        return {
            "decoder": self.decoder,
            "pictures": self.pictures,
            "access": self.access,
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
        pictures: Sequence[tuple[str, Any, Any]],
        reconstructions: Tensor,
        gallery: Gallery,
        *,
        seconds: float,
        notes: Sequence[str],
    ) -> None:
        """Write what leaked: `rows` from `evaluate`, one a test picture, and `reconstructions` as they are compared."""
        found = gallery.find(reconstructions)
        columns = {f"found_by_{name}": values for name, values in found.items()}
        rows = [row | {k: int(v[i]) for k, v in columns.items()} for i, row in enumerate(rows)]
        worst = max(rows, key=lambda row: row["ssim"])
        summary = {
            "layer": self.layer,
            "defence": self.defence,
            "attacker": self.attacker(),
            "scores": {name: _interval([row[name] for row in rows]) for name in ("psnr", "ssim", "lpips")},
            "worst": {"id": worst["id"], "ssim": worst["ssim"]},
            "identification": {name: share(values) for name, values in found.items()},
            "candidates": len(gallery.originals),
            "chance": 1 / len(gallery.originals),
            "seconds": round(seconds, 2),
            "notes": [*notes, *score_notes(rows)],
        }
        run = self.run(root)
        run.save_result(summary, rows, pictures)
        run.set_state("done")


def _interval(values: Sequence[float | None]) -> dict[str, Any] | None:
    return None if None in values else interval_dict(mean_interval(np.array(values)))
