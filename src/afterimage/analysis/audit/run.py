"""The audit itself: layer by layer, every defence and attacker; what is finished is not done again."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from afterimage.analysis.audit.attackers import (
    DefendedFeatureLoader,
    DefendedFeatures,
    attacker_data,
    attacker_decoder,
    calibration,
    evaluate_attackers,
    mean_image,
)
from afterimage.analysis.audit.condition import VERSION, AuditCondition
from afterimage.analysis.audit.defences.chain import Defence, create_defence
from afterimage.analysis.audit.target import AuditTarget, open_subject
from afterimage.analysis.audit.task_utility import Unavailable, measure_cost, no_cost, whole_network
from afterimage.config import AfterimageError, FeatureSpec, dump_toml, to_dict
from afterimage.config.audit import BLACK_BOX, WHITE_BOX, AuditConfig, digest
from afterimage.data.images import Data
from afterimage.evaluation.evaluate import SEEN, Box, cropped, evaluate
from afterimage.evaluation.metrics import Metrics
from afterimage.evaluation.reidentification import Gallery, reduced
from afterimage.models.decoders.canvas import seen_box
from afterimage.models.encoders.placement import describe_unseen
from afterimage.runs.audit import BLIND, Attack, Results
from afterimage.runs.environment import environment
from afterimage.runs.failures import TRACEBACK, forget, is_done, record
from afterimage.runs.files import read_json, write_atomic, write_json
from afterimage.runs.results import SeenPart
from afterimage.runs.run import Run
from afterimage.runtime.device import one_device
from afterimage.runtime.failures import EVERYTHING, as_error, concerns, foreseen, let_go, of_caller, one_line
from afterimage.runtime.progress import Progress, silent
from afterimage.training.checkpoint import load_tensors, remove_checkpoints
from afterimage.training.context import RunContext
from afterimage.training.decoder_trainer import DecoderTrainer
from afterimage.training.trainer import Trainer


def run_audit(
    config: AuditConfig,
    root: str | Path,
    *,
    cache: Path | None = None,
    accelerator: str = "auto",
    progress: Progress = silent,
    keep: int = 4,
) -> Results:
    """Measure every cell that is not done yet, each into a folder below `root`; returns all of them.

    `keep` test images a cell are stored. A layer, a defence or an attacker that fails, whatever is raised, is noted
    in `failures`, its cells hold the traceback, and the others go on; raises `AfterimageError` for what concerns them
    all: the network, its weights, the images, a defence's text.
    """
    audit = _Audit(config, Path(root), cache, accelerator, progress, keep)
    return audit.run()


@dataclass(kw_only=True)
class AttackContext(RunContext):
    """The surroundings of attackers that are trained together: one that fails is recorded, and the others go on."""

    audit: _Audit
    cells: dict[Run, AuditCondition] = field(default_factory=dict)
    """What each attacker's folder is to hold."""

    def record_failure(self, run: Run, error: Exception) -> None:
        self.audit.cell_failed(self.cells[run], error)


class _Audit:
    def __init__(
        self,
        config: AuditConfig,
        root: Path,
        cache: Path | None,
        accelerator: str,
        progress: Progress,
        keep: int,
    ) -> None:
        progress = of_caller(progress)
        self.config, self.root, self.progress, self.keep = config, root, progress, keep
        self.subject: AuditTarget = open_subject(config, cache=cache, progress=progress)
        if len(self.subject.data.test) < 2:
            raise AfterimageError(
                "an audit needs 2 test images or more: a verdict rests on intervals over them"
            )
        self._check_defences()
        self.fabric = one_device(accelerator, config.recipe.precision)
        self.metrics = Metrics(config.lpips, size=min(self.subject.image_size)).to(self.fabric.device)
        self.results = Results(self._describe(), notes=list(self.subject.notes))
        self._galleries: dict[Box | None, Gallery] = {}

    def _check_defences(self) -> None:
        """Raise for a text that no layer allows, before anything is trained."""
        for text in self.config.defences:
            errors: list[Exception] = []
            for spec in self.subject.specs.values():
                try:
                    self._defence(text, spec)
                except Exception as error:
                    errors.append(error)
            if len(errors) == len(self.subject.specs) and foreseen(errors[0]):
                raise errors[0]

    def _describe(self) -> dict[str, Any]:
        subject = self.subject
        return {
            "name": subject.name,
            "stored": subject.is_stored,
            "weights": asdict(subject.weights) if subject.weights else {},
            "image": list(subject.image_size),
            "features": {k: [s.channels, s.height, s.width] for k, s in subject.specs.items()},
            "seen": {layer: asdict(seen) for layer in subject.specs if (seen := self._seen(layer))},
            "data": asdict(subject.data.describe()),
            "attacker_data": self.config.attackers.data or "the same source as the test images",
            "lpips": asdict(self.metrics.lpips_status),
        }

    def run(self) -> Results:
        path, text = self.root / "audit.toml", dump_toml(self.config)
        if path.exists() and path.read_text(encoding="utf-8") != text:
            self._note(
                f"{self.root} held another audit: its cells are kept, its page, audit.json and audit.toml replaced"
            )
        write_atomic(path, text)
        write_json(self.root / "environment.json", environment() | {"device": str(self.fabric.device)})
        for layer, error in self.subject.failures.items():
            self._failed(layer, error)
        attackers = dict(self._attackers())
        for data in attackers.values():
            cell = self._cell("", "", BLIND, data, BLACK_BOX)
            with self._ending(f"{BLIND}, {cell.images:,} images", [cell]):
                self._blind(cell, data)
        for layer in self.subject.layers:
            self._layer(layer, attackers)
        return self.results

    @contextlib.contextmanager
    def _ending(self, what: str, cells: Sequence[AuditCondition] = ()) -> Iterator[None]:
        """An error inside the block ends `what`, with these cells, and leaves the others alone."""
        try:
            yield
        except Exception as error:
            self._failed(what, error, cells)

    def _failed(self, what: str, error: Exception, cells: Sequence[AuditCondition] = ()) -> None:
        """Note what could not be measured, in the folders of its cells too, or raise what concerns everything."""
        if concerns(error) == EVERYTHING:
            raise error
        file = None
        for cell in cells:
            run = cell.run(self.root)
            if not is_done(run):
                file = file or run.file(TRACEBACK).relative_to(self.root)
                record(run, error)
                self.results.unmeasured.add((cell.layer, cell.defence))
        text = str(as_error(error, what, file))
        text = text if text.startswith(what) else f"{what}: {text}"
        if text not in self.results.failures:
            self.results.failures.append(text)
            self.progress(f"could not be measured: {text}", 1, 1)
        let_go(error)

    def _begin(self, cell: AuditCondition) -> Run:
        """The folder of a cell that is about to be measured."""
        run = cell.begin(self.root)
        forget(run)
        return run

    def _attackers(self) -> Iterator[tuple[int, Data]]:
        """What each attacker owns, by the number of images; numbers that the pool does not have are left out."""
        for count in self.config.attackers.images:
            data = attacker_data(self.subject.data, self.subject.pool, count, self.config.seed)
            if data is None:
                have = len(self.subject.pool.train) + len(self.subject.pool.validation)
                self._note(f"an attacker with {count} images was left out: there are {have} to own")
            else:
                yield len(data.train) + len(data.validation), data

    def _note(self, text: str) -> None:
        self.results.notes.append(text)
        self.progress(text, 1, 1)

    def _box(self, layer: str) -> Box | None:
        """The part of images that a layer's locations see; None where that is all of them."""
        return seen_box([self.subject.specs[layer]], self.subject.image_size)

    def _seen(self, layer: str) -> SeenPart | None:
        """The same with its share of all pixels, and in words what is not seen."""
        box = self._box(layer)
        if box is None:
            return None
        height, width = self.subject.image_size
        (top, bottom), (left, right) = box
        share = (bottom - top) * (right - left) / (height * width)
        spec = self.subject.specs[layer]
        text = describe_unseen(spec.rows, spec.columns, self.subject.image_size)
        return SeenPart(*box, share, text)

    def _compared(self, layer: str) -> dict[str, Gallery]:
        """The test images, and what a layer's locations see of them, as galleries."""
        box = self._box(layer) if layer else None
        for one in {None, box} - self._galleries.keys():
            test = self.subject.data.test
            parts = [reduced(cropped(test.crops(i), one)) for i in torch.arange(len(test)).split(16)]
            self._galleries[one] = Gallery(torch.cat(parts).to(self.fabric.device), self.metrics.lpips)
        galleries = {"": self._galleries[None]}
        return galleries if box is None else galleries | {SEEN: self._galleries[box]}

    def _cell(self, layer: str, defence: str, decoder: str, data: Data, threat_model: str) -> AuditCondition:
        config, subject = self.config, self.subject
        spec = subject.specs.get(layer)
        settings = {
            "subject": subject.name,
            "weights": subject.weights.identity if subject.weights else "",
            "normalised": [config.mean, config.std] if config.encoder else None,
            "features": None if spec is None else [spec.channels, spec.height, spec.width],
            "test": subject.data.digest,
            "attacker_data": config.attackers.data,
            "pool": data.digest,
            "image": subject.image_size,
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
        return AuditCondition(
            layer, defence, decoder, len(data.train) + len(data.validation), threat_model, settings
        )

    def _collect(self, cell: AuditCondition, into: list[Attack]) -> None:
        run = cell.run(self.root)
        if run.state == "done":
            into.append(Attack.of(run, self.root))

    def _save(self, cell: AuditCondition, *measured: Any, **facts: Any) -> None:
        data, lpips = self.subject.data.describe(), self.metrics.lpips_status
        cell.save(self.root, *measured, data=data, lpips=lpips, **facts)

    def _blind(self, cell: AuditCondition, data: Data) -> None:
        if cell.run(self.root).state != "done":
            self._begin(cell)
            started = time.monotonic()
            mean = mean_image(data.train, 16)
            result = evaluate(
                lambda images: mean.to(images.device).expand(len(images), -1, -1, -1).contiguous(),
                data.test,
                self.metrics,
                device=self.fabric.device,
                progress=self.progress,
            )
            small = {"": reduced(mean).expand(len(data.test), -1, -1, -1)}
            seconds = time.monotonic() - started
            self._save(cell, result.rows, [], small, self._compared(""), seconds=seconds, notes=[])
        self._collect(cell, self.results.blind)

    def _layer(self, layer: str, attackers: dict[int, Data]) -> None:
        wanted = {
            count: [
                self._cell(layer, defence, decoder, data, threat_model)
                for defence in self.config.defences
                for decoder in self.config.attackers.decoders
                for threat_model in self.config.attackers.threat_models
            ]
            for count, data in attackers.items()
        }
        costs = {text: self._cost_file(layer, text) for text in self.config.defences}
        with self._ending(layer, [cell for cells in wanted.values() for cell in cells]):
            missing = any(not is_done(c.run(self.root)) for cells in wanted.values() for c in cells)
            unknown = [text for text, path in costs.items() if not path.exists()]
            if missing or unknown:
                encoder = None
                if not self.subject.is_stored:
                    encoder = self.subject.encoder(layer).to(self.fabric.device)
                defences = self._defences(layer, encoder, wanted)
                self._costs(layer, encoder, {t: defences[t] for t in unknown if t in defences}, costs)
                for count, cells in wanted.items():
                    own = [cell for cell in cells if cell.defence in defences]
                    self._attack_all(layer, encoder, defences, attackers[count], own)
        for text, path in costs.items():
            with self._ending(f"{layer}, {text}"):
                if path.exists():
                    self.results.costs[layer, text] = read_json(path)
        for cells in wanted.values():
            for cell in cells:
                try:
                    self._collect(cell, self.results.rows)
                except Exception as error:
                    self.results.unmeasured.add((layer, cell.defence))
                    self._failed(cell.label, error)

    def _defences(
        self, layer: str, encoder: nn.Module | None, wanted: Mapping[int, Sequence[AuditCondition]]
    ) -> dict[str, Defence]:
        """Every defence that can be, fitted on the first training images of whoever defends."""
        spec, device = self.subject.specs[layer], self.fabric.device
        images, batch_size = self.subject.data.train, self.config.recipe.batch_size
        maps = calibration(DefendedFeatures(spec.source, [], encoder), images, device, batch_size)
        found: dict[str, Defence] = {}
        for text in self.config.defences:
            own = [cell for cells in wanted.values() for cell in cells if cell.defence == text]
            with self._ending(f"{layer}, {text}", own):
                found[text] = self._defence(text, spec).to(device).fit(maps)
        return found

    def _defence(self, text: str, spec: FeatureSpec) -> Defence:
        return create_defence(text, [spec], seed=self.config.seed, image_size=self.subject.image_size)

    def _cost_file(self, layer: str, defence: str) -> Path:
        settings = self._cell(layer, defence, "", self.subject.data, BLACK_BOX).settings
        named = digest(
            {
                **settings,
                "layer": layer,
                "defence": defence,
                "kind": self.config.prediction,
                "version": VERSION,
            }
        )
        return self.root / "costs" / f"{named}.json"

    def _costs(
        self,
        layer: str,
        encoder: nn.Module | None,
        defences: Mapping[str, Defence],
        files: Mapping[str, Path],
    ) -> None:
        """Measure what defences cost and write it down, together or, where that fails, each by itself."""
        if not defences:
            return
        try:
            found = self._measured_costs(layer, encoder, list(defences.values()))
        except Exception as error:
            if len(defences) == 1:
                ((text, defence),) = defences.items()
                self.results.costs[layer, text] = no_cost(defence, f"measuring it failed: {one_line(error)}")
                self._failed(f"{layer}, {text}, what it costs", error)
                return
            if concerns(error) == EVERYTHING:
                raise
            let_go(error)
            for text, defence in defences.items():
                self._costs(layer, encoder, {text: defence}, files)
            return
        for text, cost in zip(defences, found, strict=True):
            write_json(files[text], cost)

    def _measured_costs(
        self, layer: str, encoder: nn.Module | None, defences: Sequence[Defence]
    ) -> list[dict[str, Any]]:
        if encoder is None:
            return [no_cost(defence, "a store holds no network to go on with") for defence in defences]
        try:
            return measure_cost(
                whole_network(encoder, layer, self.config.prediction),
                defences,
                self.subject.data.test,
                batch_size=self.config.recipe.batch_size,
                seed=self.config.seed,
                device=self.fabric.device,
                progress=self.progress,
            )
        except Unavailable as error:
            return [no_cost(defence, str(error)) for defence in defences]

    def cell_failed(self, cell: AuditCondition, error: Exception) -> None:
        self._failed(cell.label, error, [cell])

    def _attack_all(
        self,
        layer: str,
        encoder: nn.Module | None,
        defences: dict[str, Defence],
        data: Data,
        cells: Sequence[AuditCondition],
    ) -> None:
        """Attack every defence on one pass or, where that fails, each on a pass of its own."""
        try:
            self._attack(layer, encoder, defences, data, cells)
            return
        except Exception as error:
            if len(defences) == 1:
                self._failed(f"{layer}, {next(iter(defences))}", error, cells)
                return
            if concerns(error) == EVERYTHING:
                raise
            let_go(error)
        for text, defence in defences.items():
            own = [cell for cell in cells if cell.defence == text]
            self._attack_all(layer, encoder, {text: defence}, data, own)

    def _attack(
        self,
        layer: str,
        encoder: nn.Module | None,
        defences: dict[str, Defence],
        data: Data,
        cells: Sequence[AuditCondition],
    ) -> None:
        """Everyone with the same images, on one pass through the encoder."""
        names = list(defences)
        missing = [cell for cell in cells if not is_done(cell.run(self.root))]
        wanted = list(dict.fromkeys((cell.defence, cell.decoder) for cell in missing))
        context = AttackContext(progress=self.progress, audit=self)
        decoders: list[DecoderTrainer] = []
        for defence, decoder in wanted:
            # Whoever refines decodes first: the decoder is that of the black-box attacker.
            cell = self._cell(layer, defence, decoder, data, BLACK_BOX)
            with self._ending(cell.label, [cell]):
                run = self._begin(cell)
                context.cells[run] = cell
                decoders.append(
                    attacker_decoder(
                        decoder,
                        names.index(defence),
                        defences[defence],
                        self.subject.image_size,
                        self.config.recipe,
                        self.fabric,
                        seed=self.config.seed,
                        run=run,
                        context=context,
                    )
                )
        if not decoders:
            return
        sent = DefendedFeatures(self.subject.specs[layer].source, list(defences.values()), encoder)
        loader = DefendedFeatureLoader(
            sent, data, self.config.recipe, self.fabric, seed=self.config.seed, context=context
        )
        self._train(loader, decoders)
        sound = [decoder for decoder in decoders if decoder.best and not decoder.failed]
        for cell in missing:
            asked = (cell.defence, cell.decoder)
            of = [d for d in sound if (context.cells[d.run].defence, context.cells[d.run].decoder) == asked]
            if cell.threat_model == WHITE_BOX and of:
                self._refine(loader, of[0], cell)

    def _train(self, loader: DefendedFeatureLoader, decoders: Sequence[DecoderTrainer]) -> None:
        """Train and measure the decoders of black-box attackers, but for those that are done."""
        context, fresh = loader.context, []
        for decoder in decoders:
            path = decoder.run.file("decoder.safetensors")
            with context.isolate(decoder.run):
                if is_done(decoder.run) and path.exists():
                    decoder.best, _ = load_tensors(path)
                    decoder.model.load_state_dict(decoder.best)
                else:
                    decoder.restore()
                    fresh.append(decoder)
        if fresh:
            Trainer(loader, fresh).train()
        for decoder in [d for d in fresh if d.best and not d.failed]:
            with context.isolate(decoder.run):
                decoder.model.load_state_dict(decoder.best)
                decoder.save_best()
        if sound := [d for d in fresh if d.best and not d.failed]:
            self._measure(loader, sound)

    def _measure(self, loader: DefendedFeatureLoader, decoders: Sequence[DecoderTrainer]) -> None:
        """Measure attackers on one pass or, where that fails, each on a pass of its own."""
        context = loader.context
        layer = context.cells[decoders[0].run].layer
        try:
            results, small = evaluate_attackers(
                loader, decoders, self.metrics, keep=self.keep, box=self._box(layer)
            )
        except Exception as error:
            if len(decoders) == 1:
                with context.isolate(decoders[0].run):
                    raise
                return
            if concerns(error) == EVERYTHING:
                raise
            let_go(error)
            for decoder in decoders:
                self._measure(loader, [decoder])
            return
        for decoder, result, reconstructions in zip(decoders, results, small, strict=True):
            with context.isolate(decoder.run):
                self._save(
                    context.cells[decoder.run], result.rows, result.images, reconstructions, self._compared(layer),
                    seconds=decoder.seconds, notes=decoder.notes, seen=self._seen(layer),
                )  # fmt: skip
                remove_checkpoints(decoder.run)

    def _refine(self, loader: DefendedFeatureLoader, decoder: DecoderTrainer, cell: AuditCondition) -> None:
        if not loader.encoders.defences[decoder.feature_indices[0]].preserves_positions:
            self._note(
                f"{cell.layer}, {cell.defence}: not refined, since a shuffled order leaves nothing to compare "
                "features with place by place; an attacker may find a way"
            )
            return
        from afterimage.analysis.audit.white_box import refined

        with self._ending(cell.label, [cell]):
            self._begin(cell)
            limits = self.config.attackers
            rows, images, small, seconds = refined(
                loader, decoder, self.metrics,
                count=limits.refine_images, steps=limits.refine_steps, keep=self.keep,
                box=self._box(cell.layer), progress=self.progress,
            )  # fmt: skip
            notes = [f"decoded by {cell.decoder}, then refined for {limits.refine_steps} steps"]
            self._save(
                cell, rows, images, small, self._compared(cell.layer),
                seconds=seconds, notes=notes, seen=self._seen(cell.layer),
            )  # fmt: skip
