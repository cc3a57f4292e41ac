"""State of a running audit: its images, networks and metrics, and its results, notes and failures so far."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch

from afterimage.analysis.audit.condition import AuditCondition
from afterimage.analysis.audit.target import open_subject
from afterimage.config import AfterimageError, to_dict
from afterimage.config.audit import ESTIMATE, WHITE_BOX, AuditConfig
from afterimage.data.images import Data
from afterimage.evaluation.evaluate import SEEN, Box, cropped
from afterimage.evaluation.metrics import Metrics
from afterimage.evaluation.reidentification import Gallery, reduced
from afterimage.runs.audit import Attack, Results
from afterimage.runs.run import TRACEBACK, Run, forget, is_done, record
from afterimage.runtime.device import one_device
from afterimage.runtime.failures import EVERYTHING, as_error, concerns, let_go, of_caller
from afterimage.runtime.terminal import Progress

Item = TypeVar("Item")
KEEP = 4
"""Number of test images of each condition that are stored with their reconstructions."""


class AuditSession:
    """State of a running audit, shared by everything that measures a part of it.

    Args:
        config: the audit
        root: folder of the audit
        cache: folder of decoded images
        accelerator: `cpu`, `cuda`, `mps` or `auto`
        progress: called with the progress; an exception that it raises ends everything

    Attributes:
        target: the network or store, and all images
        fabric: device and precision
        metrics: metrics of the reconstructions
        results: all results so far

    Raises:
        AfterimageError: the network, its weights or the images cannot be read, or there are fewer than 2 test images
    """

    def __init__(
        self,
        config: AuditConfig,
        root: Path,
        *,
        cache: Path | None,
        accelerator: str,
        progress: Progress,
    ) -> None:
        self.config, self.root, self.progress = config, root, of_caller(progress)
        self.target = open_subject(config, cache=cache, progress=self.progress)
        if len(self.target.data.test) < 2:
            raise AfterimageError(
                "an audit needs 2 test images or more: a verdict rests on intervals over them"
            )
        self.fabric = one_device(accelerator, config.recipe.precision)
        self.metrics = Metrics(config.lpips, size=min(self.target.image_size)).to(self.fabric.device)
        self.results = Results(self._describe(), notes=list(self.target.notes))
        self._galleries: dict[Box | None, Gallery] = {}

    def _describe(self) -> dict[str, Any]:
        target = self.target
        return {
            "name": target.name,
            "stored": target.is_stored,
            "weights": asdict(target.weights) if target.weights else {},
            "image": list(target.image_size),
            "features": {k: [s.channels, s.height, s.width] for k, s in target.specs.items()},
            "seen": {layer: asdict(seen) for layer in target.specs if (seen := target.seen(layer))},
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
            "normalised": self.target.normalised,
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

    def galleries(self, layer: str) -> dict[str, Gallery]:
        """Return galleries of the whole test images and, if a layer sees only a part, of that part."""
        box = self.target.box(layer) if layer else None
        for one in {None, box} - self._galleries.keys():
            test = self.target.data.test
            parts = [reduced(cropped(test.crops(i), one)) for i in torch.arange(len(test)).split(16)]
            self._galleries[one] = Gallery(torch.cat(parts).to(self.fabric.device), self.metrics.lpips)
        galleries = {"": self._galleries[None]}
        return galleries if box is None else galleries | {SEEN: self._galleries[box]}

    def begin(self, condition: AuditCondition) -> Run:
        """Create the folder of a condition without the failure of an earlier attempt, and return it."""
        run = condition.begin(self.root)
        forget(run)
        return run

    def is_done(self, condition: AuditCondition) -> bool:
        """Return whether a condition has been measured, by this call or an earlier one."""
        return is_done(condition.run(self.root))

    def save(self, condition: AuditCondition, *measured: Any, seconds: float, notes: Sequence[str]) -> None:
        """Write the result of a condition.

        Args:
            condition: the condition
            measured: the rows, images and reconstructions of `AuditCondition.save`
            seconds: time that the attack took
            notes: remarks for the run's notes
        """
        layer = condition.layer
        condition.save(
            self.root,
            *measured,
            self.galleries(layer),
            data=self.target.data.describe(),
            lpips=self.metrics.lpips_status,
            seconds=seconds,
            notes=notes,
            seen=self.target.seen(layer) if layer else None,
        )

    def collect(self, condition: AuditCondition, into: list[Attack]) -> None:
        """Append the result of a condition to `into`, if it is done."""
        run = condition.run(self.root)
        if run.state == "done":
            into.append(Attack.of(run, self.root))

    def note(self, text: str) -> None:
        """Add a note to the results and report it as progress."""
        self.results.notes.append(text)
        self.progress(text, 1, 1)

    @contextlib.contextmanager
    def ending(self, what: str, conditions: Sequence[AuditCondition] = ()) -> Iterator[None]:
        """Catch errors of the block and record them as the failure of `what` and of these conditions."""
        try:
            yield
        except Exception as error:
            self.failed(what, error, conditions)

    def failed(self, what: str, error: Exception, conditions: Sequence[AuditCondition] = ()) -> None:
        """Record a failure in the results and in the folders of its conditions that are not done.

        Args:
            what: name of the part that failed, for the message
            error: the error
            conditions: the conditions that it leaves unmeasured

        Raises:
            Exception: `error` itself if it concerns everything, see `runtime.failures.concerns`
        """
        if concerns(error) == EVERYTHING:
            raise error
        file = None
        for condition in conditions:
            run = condition.run(self.root)
            if not is_done(run):
                file = file or run.file(TRACEBACK).relative_to(self.root)
                record(run, error)
                self.results.unmeasured.add((condition.layer, condition.defence))
        text = str(as_error(error, what, file))
        text = text if text.startswith(what) else f"{what}: {text}"
        if text not in self.results.failures:
            self.results.failures.append(text)
            self.progress(f"could not be measured: {text}", 1, 1)
        let_go(error)


def together(
    work: Callable[[list[Item]], None], items: Sequence[Item], failed: Callable[[Item, Exception], None]
) -> None:
    """Do `work` for all items at once or, if that raises, for each item alone.

    Args:
        work: called with all items, or with one
        items: the items
        failed: called with an item that fails alone, and its error

    Raises:
        Exception: an error that concerns everything, see `runtime.failures.concerns`
    """
    if not items:
        return
    try:
        work(list(items))
        return
    except Exception as error:
        if concerns(error) == EVERYTHING:
            raise
        if len(items) == 1:
            failed(items[0], error)
            return
        let_go(error)
    for item in items:
        together(work, [item], failed)
