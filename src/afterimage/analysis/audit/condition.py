"""One condition of an audit, an attacker on a layer behind a defence: its name, folder and result."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from afterimage.config.audit import digest
from afterimage.evaluation.evaluate import SEEN, score_notes, summarise
from afterimage.evaluation.intervals import mean_interval, share_interval
from afterimage.evaluation.reidentification import Compared, Gallery
from afterimage.runs.files import write_json
from afterimage.runs.results import (
    METRICS,
    Attacker,
    AttackFacts,
    DataFacts,
    Interval,
    LpipsStatus,
    Result,
    SeenPart,
    Worst,
)
from afterimage.runs.run import Run

VERSION = 2
"""Version of the measurements, increased whenever the same settings would give other numbers."""


@dataclass(frozen=True)
class AuditCondition:
    """One attacker on one layer behind one defence.

    Attributes:
        layer: name of the layer; empty for the attacker without features
        defence: text of the defence
        decoder: name of the attacker's decoder
        images: number of images that the attacker owns
        threat_model: `black-box` or `white-box`
        answer: `decoded`, `refined` or `best estimate`
        settings: everything else that changes the result; the folder's name ends with their digest
    """

    layer: str
    defence: str
    decoder: str
    images: int
    threat_model: str
    answer: str
    settings: Mapping[str, Any]

    @property
    def label(self) -> str:
        """Name in messages, such as `layer1, int8, linear`."""
        return f"{self.layer}, {self.defence}, {self.decoder}"

    @property
    def name(self) -> str:
        """Name of the condition's folder."""
        parts = (self.layer, self.defence, self.decoder, str(self.images), self.threat_model, self.answer)
        slug = re.sub(r"[^A-Za-z0-9_.+]+", "-", "-".join(parts)).strip("-.")
        return f"{slug[:100]}-{digest({**self.settings, 'cell': parts, 'version': VERSION})}"

    def run(self, root: Path) -> Run:
        """Return the condition's run folder below the audit's."""
        return Run(root / "cells" / self.name)

    def attacker(self) -> Attacker:
        """Return the facts of the attacker."""
        return Attacker(
            self.decoder, self.images, self.threat_model, self.settings["attacker_data"], self.answer
        )

    def begin(self, root: Path) -> Run:
        """Create the condition's run folder with its settings in `cell.json`, and return it."""
        run = self.run(root)
        if not run.file("cell.json").exists():
            asked = {
                "layer": self.layer,
                "defence": self.defence,
                **asdict(self.attacker()),
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
        data: DataFacts,
        lpips: LpipsStatus,
        seconds: float,
        notes: Sequence[str],
        seen: SeenPart | None = None,
    ) -> None:
        """Identify originals, and write the result of the attack into the condition's run folder.

        Args:
            root: folder of the audit
            rows: scores from `evaluate`, one row for each test image
            images: id, original and reconstruction of the test images to keep
            reconstructions: all reconstructions, reduced for re-identification
            galleries: the test images to compare them with, by the same names
            data: facts of the images
            lpips: state of the LPIPS metric
            seconds: time that the attack took
            notes: remarks for the run's notes
            seen: part of the images that the layer's locations see; None if they see all
        """
        found = {
            f"{name}{part}": values
            for part, small in reconstructions.items()
            for name, values in galleries[part].find(small).items()
        }
        columns = {f"found_by_{name}": values for name, values in found.items()}
        rows = [row | {k: int(v[i]) for k, v in columns.items()} for i, row in enumerate(rows)]
        worst, ssim = max(((row["id"], _most(row)) for row in rows), key=lambda pair: pair[1])
        candidates = len(galleries[""].originals)
        facts = AttackFacts(
            layer=self.layer,
            defence=self.defence,
            attacker=self.attacker(),
            scores=_intervals(rows),
            worst=Worst(worst, ssim),
            identification={name: share_interval(values) for name, values in found.items()},
            candidates=candidates,
            chance=1 / candidates,
            seconds=round(seconds, 2),
            seen=seen,
            scores_seen=None if seen is None else _intervals(rows, SEEN),
        )
        found = Result(
            kind="attack",
            label=" · ".join(filter(None, (self.layer, self.defence, self.decoder))),
            config=None,
            data=data,
            lpips=lpips,
            scores=summarise(rows),
            per_image=tuple(rows),
            attack=facts,
            scores_seen=None if seen is None else summarise(rows, SEEN),
            notes=(*notes, *score_notes(rows)),
        )
        run = self.run(root)
        run.save_result(found, images)
        run.set_state("done")


def _most(row: Mapping[str, Any]) -> float:
    """Return the SSIM of a whole image or of its seen part, whichever is higher."""
    part = row.get(f"ssim{SEEN}")
    return row["ssim"] if part is None else max(row["ssim"], part)


def _intervals(rows: Sequence[Mapping[str, Any]], suffix: str = "") -> dict[str, Interval | None]:
    columns = {name: [row[f"{name}{suffix}"] for row in rows] for name in METRICS}
    return {
        name: None if None in values else mean_interval(np.array(values), METRICS[name].limits)
        for name, values in columns.items()
    }
