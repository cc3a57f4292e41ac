"""State of a running audit: its target and metrics, its conditions with their folders, and all results so far."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from afterimage.analysis.audit.target import open_target
from afterimage.config import AfterimageError, to_dict
from afterimage.config.audit import ESTIMATE, WHITE_BOX, AuditConfig, short_digest
from afterimage.data.images import Data
from afterimage.evaluation.evaluate import VISIBLE_SUFFIX, Box, crop_to_box, score_notes, summarise
from afterimage.evaluation.intervals import mean_interval, share_interval
from afterimage.evaluation.metrics import Metrics
from afterimage.evaluation.reidentification import Compared, Gallery, downscale
from afterimage.runs.audit import Attack, AuditResults
from afterimage.runs.files import write_json
from afterimage.runs.results import METRICS, Attacker, AttackFacts, Interval, Result, WorstCase
from afterimage.runs.run import TRACEBACK, Run, is_done, remove_traceback, write_failure
from afterimage.runtime.device import create_single_device_fabric
from afterimage.runtime.failures import (
    EVERYTHING,
    clear_error_frames,
    error_scope,
    protect_callback,
    to_afterimage_error,
)
from afterimage.runtime.terminal import Progress

KEEP = 4
"""Number of test images of each condition that are stored with their reconstructions."""
VERSION = 2
"""Version of the measurements, increased whenever the same settings would give other numbers."""


@dataclass(frozen=True)
class AuditCondition:
    """One attacker, with the number of images that it owns, on one layer behind one defence.

    The attacker without features has no layer. `settings` is everything else that changes the result; the folder's
    name ends with their digest.
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
        return f"{slug[:100]}-{short_digest({**self.settings, 'cell': parts, 'version': VERSION})}"

    @property
    def attacker(self) -> Attacker:
        """Facts of the attacker."""
        source = self.settings["attacker_data"]
        return Attacker(self.decoder, self.images, self.threat_model, source, self.answer)


class AuditSession:
    """State of a running audit, shared by everything that measures a part of it.

    Attributes:
        target: the network or store, and all images
        fabric: device and precision
        metrics: metrics of the reconstructions
        results: all results so far

    Raises:
        AfterimageError: the network, its weights or the images cannot be read, or there are fewer than 2 test images
    """

    def __init__(
        self, config: AuditConfig, root: Path, *, cache: Path | None, accelerator: str, progress: Progress
    ) -> None:
        self.config, self.root, self.progress = config, root, protect_callback(progress)
        self.target = open_target(config, cache=cache, progress=self.progress)
        if len(self.target.data.test) < 2:
            raise AfterimageError(
                "an audit needs 2 test images or more: a verdict rests on intervals over them"
            )
        self.fabric = create_single_device_fabric(accelerator, config.recipe.precision)
        self.metrics = Metrics(config.lpips, size=min(self.target.image_size)).to(self.fabric.device)
        self.results = AuditResults(self._describe(), notes=list(self.target.notes))
        self._galleries: dict[Box | None, Gallery] = {}

    def _describe(self) -> dict[str, Any]:
        target = self.target
        return {
            "name": target.name,
            "stored": target.is_stored,
            "weights": asdict(target.weights) if target.weights else {},
            "image": list(target.image_size),
            "features": {k: [s.channels, s.height, s.width] for k, s in target.specs.items()},
            "seen": {layer: asdict(seen) for layer in target.specs if (seen := target.visible_region(layer))},
            "data": asdict(target.data.describe()),
            "attacker_data": self.config.attackers.data or "the same source as the test images",
            "lpips": asdict(self.metrics.lpips_status),
        }

    def condition(
        self, layer: str, defence: str, decoder: str, data: Data, threat_model: str, answer: str
    ) -> AuditCondition:
        """Return the condition of an attacker who owns `data`, with everything that changes its result."""
        config, target = self.config, self.target
        spec = target.specs.get(layer)
        settings = {
            "subject": target.name,
            "weights": target.weights.identity if target.weights else "",
            "normalised": target.normalised,
            "features": None if spec is None else [spec.channels, spec.height, spec.width],
            "test": target.data.digest,
            "attacker_data": config.attackers.data,
            "pool": data.digest,
            "image": target.image_size,
            "recipe": to_dict(config.recipe),
            "seed": config.seed,
            "lpips": config.lpips if self.metrics.lpips_status.available else "",
        }
        if spec is not None and (spec.rows or spec.columns):
            settings["placement"] = [
                None if axis is None else asdict(axis) for axis in (spec.rows, spec.columns)
            ]
        if threat_model == WHITE_BOX:
            settings |= {k: getattr(config.attackers, k) for k in ("refine_steps", "refine_images")}
        if answer == ESTIMATE:
            settings["estimate"] = to_dict(config.attackers.estimate)
        images = len(data.train) + len(data.validation)
        return AuditCondition(layer, defence, decoder, images, threat_model, answer, settings)

    def run(self, condition: AuditCondition) -> Run:
        """Return the run folder of a condition."""
        return Run(self.root / "cells" / condition.name)

    def is_done(self, condition: AuditCondition) -> bool:
        """Return whether a condition has been measured, by this call or an earlier one."""
        return is_done(self.run(condition))

    def create_folder(self, condition: AuditCondition) -> Run:
        """Create a condition's folder with its settings, without the failure of an earlier attempt, and return it."""
        run = self.run(condition)
        if not run.file("cell.json").exists():
            asked = {"layer": condition.layer, "defence": condition.defence, **asdict(condition.attacker)}
            write_json(run.file("cell.json"), asked | {"settings": condition.settings})
        remove_traceback(run)
        return run

    def save(
        self,
        condition: AuditCondition,
        rows: Sequence[Mapping[str, Any]],
        images: Sequence[tuple[str, Any, Any]],
        reconstructions: Compared,
        *,
        seconds: float,
        notes: Sequence[str],
    ) -> None:
        """Identify originals, and write the result of an attack into the condition's run folder.

        Args:
            rows: scores as in `Evaluation.rows`
            images: id, original and reconstruction of the test images to keep
            reconstructions: all reconstructions, reduced for re-identification
        """
        layer = condition.layer
        galleries = self._gallery(layer)
        found = {
            f"{name}{part}": values
            for part, small in reconstructions.items()
            for name, values in galleries[part].identify(small).items()
        }
        columns = {f"found_by_{name}": values for name, values in found.items()}
        rows = [row | {k: int(v[i]) for k, v in columns.items()} for i, row in enumerate(rows)]
        worst, ssim = max(((row["id"], _max_ssim(row)) for row in rows), key=lambda pair: pair[1])
        candidates = len(galleries[""].originals)
        seen = self.target.visible_region(layer) if layer else None
        facts = AttackFacts(
            layer=layer,
            defence=condition.defence,
            attacker=condition.attacker,
            scores=_intervals(rows),
            worst=WorstCase(worst, ssim),
            identification={name: share_interval(values) for name, values in found.items()},
            candidates=candidates,
            chance=1 / candidates,
            seconds=round(seconds, 2),
            seen=seen,
            scores_seen=None if seen is None else _intervals(rows, VISIBLE_SUFFIX),
        )
        result = Result(
            kind="attack",
            label=" · ".join(filter(None, (layer, condition.defence, condition.decoder))),
            config=None,
            data=self.target.data.describe(),
            lpips=self.metrics.lpips_status,
            scores=summarise(rows),
            per_image=tuple(rows),
            attack=facts,
            scores_seen=None if seen is None else summarise(rows, VISIBLE_SUFFIX),
            notes=(*notes, *score_notes(rows)),
        )
        run = self.run(condition)
        run.save_result(result, images)
        run.set_state("done")

    def _gallery(self, layer: str) -> dict[str, Gallery]:
        """Return galleries of the whole test images and, if it is only a part of them, of the visible region."""
        box = self.target.box(layer) if layer else None
        for region in {None, box} - self._galleries.keys():
            test = self.target.data.test
            parts = [downscale(crop_to_box(test.crops(i), region)) for i in torch.arange(len(test)).split(16)]
            self._galleries[region] = Gallery(torch.cat(parts).to(self.fabric.device), self.metrics.lpips)
        galleries = {"": self._galleries[None]}
        return galleries if box is None else galleries | {VISIBLE_SUFFIX: self._galleries[box]}

    def collect(self, condition: AuditCondition, into: list[Attack]) -> None:
        """Append the result of a condition to `into`, if it is done."""
        run = self.run(condition)
        if run.state == "done":
            into.append(Attack.from_run(run, self.root))

    def note(self, text: str) -> None:
        """Add a note to the results and report it as progress."""
        self.results.notes.append(text)
        self.progress(text, 1, 1)

    @contextlib.contextmanager
    def catch_failure(self, what: str, conditions: Sequence[AuditCondition] = ()) -> Iterator[None]:
        """Catch errors of the block and record them as the failure of `what` and of these conditions."""
        try:
            yield
        except Exception as error:
            self.record_failure(what, error, conditions)

    def record_failure(self, what: str, error: Exception, conditions: Sequence[AuditCondition] = ()) -> None:
        """Record the failure of `what` in the results, and in the folders of its conditions that are not done.

        Raises:
            Exception: `error` itself if it concerns everything, see `runtime.failures.error_scope`
        """
        if error_scope(error) == EVERYTHING:
            raise error
        file = None
        for condition in conditions:
            run = self.run(condition)
            if not is_done(run):
                file = file or run.file(TRACEBACK).relative_to(self.root)
                write_failure(run, error)
                self.results.unmeasured.add((condition.layer, condition.defence))
        text = str(to_afterimage_error(error, what, file))
        text = text if text.startswith(what) else f"{what}: {text}"
        if text not in self.results.failures:
            self.results.failures.append(text)
            self.progress(f"could not be measured: {text}", 1, 1)
        clear_error_frames(error)


def _max_ssim(row: Mapping[str, Any]) -> float:
    """Return the SSIM of a whole image or of its visible region, whichever is higher."""
    part = row.get(f"ssim{VISIBLE_SUFFIX}")
    return row["ssim"] if part is None else max(row["ssim"], part)


def _intervals(rows: Sequence[Mapping[str, Any]], suffix: str = "") -> dict[str, Interval | None]:
    columns = {name: [row[f"{name}{suffix}"] for row in rows] for name in METRICS}
    return {
        name: None if None in values else mean_interval(np.array(values), METRICS[name].limits)
        for name, values in columns.items()
    }
