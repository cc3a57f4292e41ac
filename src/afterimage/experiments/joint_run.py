"""Joint training of runs on one pass through their encoders, from checkpoints to scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from lightning_fabric import Fabric

from afterimage.config import AfterimageError, RunConfig
from afterimage.data.images import Data
from afterimage.evaluation.evaluate import (
    VISIBLE_SUFFIX,
    Box,
    Evaluation,
    Reconstructed,
    evaluate_batches,
    score_notes,
    summarise,
    visibility_notes,
)
from afterimage.evaluation.metrics import Metrics
from afterimage.models.decoders import decoder_digest
from afterimage.models.decoders.canvas import visible_box
from afterimage.models.fusion import WeightMaps
from afterimage.models.reconstructor import FeatureDecoder, build_feature_decoder
from afterimage.models.weights import weight_notes
from afterimage.runs.files import sha256
from afterimage.runs.lock import Lock
from afterimage.runs.results import Result, TrainingFacts
from afterimage.runs.run import TRACEBACK, Run, environment, remove_traceback, write_failure
from afterimage.runtime.failures import (
    ENCODERS,
    clear_error_frames,
    error_scope,
    run_all_or_each,
    set_error_scope,
    to_afterimage_error,
)
from afterimage.runtime.process import LockLost
from afterimage.training.checkpoint import remove_checkpoint
from afterimage.training.decoder_trainer import DecoderTrainer
from afterimage.training.feature_loader import FeatureLoader, RunContext, build_encoders
from afterimage.training.trainer import Trainer


@dataclass(kw_only=True)
class StudyContext(RunContext):
    """Context of runs that are trained together: the failure of one is recorded, and the others continue.

    Args:
        locks: lock of each run's folder; the main process holds them
        failures: list to which the error of each failed run is added
        measured: set to which each run is added when its test images are measured
    """

    locks: Mapping[Run, Lock]
    failures: list[AfterimageError]
    measured: set[Run] = field(default_factory=set)

    @property
    def ended_runs(self) -> set[Run]:
        """Runs that have failed or are measured."""
        return self.failed_runs | self.measured

    def check_lock(self, run: Run) -> None:
        self.locks[run].check()

    def record_failure(self, run: Run, error: Exception) -> None:
        """Record an error in the run's folder, or raise it if it affects more than this run."""
        if error_scope(error):
            raise error
        if isinstance(error, LockLost):
            # The process that took over the lock writes to the folder now.
            self.log(str(error))
            return
        self.failures.append(to_afterimage_error(error, run.name, run.file(TRACEBACK)))
        if self.ranks.is_main_process:
            write_failure(run, error)
        clear_error_frames(error)


class JointRun:
    """Runs that share encoders, images, batches and seed: trained on one pass and measured on another.

    An error that affects all runs is raised. It is marked with `ENCODERS` if runs that read other layers might succeed
    without the encoders that failed.

    Args:
        runs: folder and configuration of each run
        load_images: function that returns the images of all runs; it is called once encoders and decoders are built, so
            that a wrong layer or option is reported before any image is read
        context: the context of training; collects failures and finished runs
        accelerator: `cpu`, `cuda`, `mps` or `auto`
        keep: number of test images that each run stores with their reconstructions
    """

    def __init__(
        self,
        runs: Mapping[Run, RunConfig],
        load_images: Callable[[], Data],
        context: StudyContext,
        *,
        accelerator: str,
        keep: int,
    ) -> None:
        self.runs, self.context, self.ranks = runs, context, context.ranks
        self.accelerator, self.keep = accelerator, keep
        self.first = next(iter(runs.values()))
        self.fabric = self._fabric()
        sources = list(dict.fromkeys(source for config in runs.values() for source in config.sources))
        with set_error_scope(ENCODERS):
            # The main process goes first: the others then find its downloads.
            self.encoders = self.ranks.main_process_first(
                lambda: build_encoders(self.first, sources, progress=context.progress)
            )
            self.encoders.to(self.fabric.device)
        self.models: dict[Run, FeatureDecoder] = {}
        for run, config in runs.items():
            with context.isolate(run):
                specs = [self.encoders.specs[i] for i in self._feature_indices(config)]
                self.models[run] = build_feature_decoder(config, specs)
        if not self.models:
            return
        self.data = load_images()
        if self.first.features is not None:
            self.encoders.check(self.data)
            for note in self.encoders.notes_of(sources):
                context.log(note)
        for entry in self.encoders.weights_of(self.encoders.sources):
            note = f" ({entry.note})" if entry.note else ""
            context.log(
                f"{entry.model}: {entry.label.upper()} weights from {entry.origin} {entry.location}{note}"
            )
        self.metrics = self.ranks.main_process_first(
            lambda: Metrics(self.first.lpips, size=min(self.first.data.size))
        )
        self.loader = FeatureLoader(
            self.encoders, self.data, self.first.recipe, self.fabric, seed=self.first.seed, context=context
        )

    def _fabric(self) -> Fabric:
        return self.ranks.local_fabric(self.accelerator, self.first.recipe.precision)

    def train(self) -> None:
        """Train every run from its checkpoint, or from the start, and measure it on the test images."""
        decoders = []
        for run, model in self.models.items():
            with self.context.isolate(run):
                decoders.append(self._decoder_trainer(run, self.runs[run], model))
        if not decoders:
            return
        trainer = Trainer(self.loader, decoders)
        trainer.fit_closed_forms()
        # Results of decoders that need no epochs are written before the long training, which may be stopped.
        early = [one for one in decoders if one.best and not one.active and not one.failed]
        self.evaluate_and_save(early)
        trainer.train_epochs()
        self.evaluate_and_save([one for one in decoders if one.best and one not in early])

    def _feature_indices(self, config: RunConfig) -> list[int]:
        return [self.encoders.index(source) for source in config.sources]

    def _decoder_trainer(self, run: Run, config: RunConfig, model: FeatureDecoder) -> DecoderTrainer:
        feature_indices = self._feature_indices(config)
        sources = [self.encoders.sources[i] for i in feature_indices]
        code = decoder_digest(config.decoder.name)
        decoder = DecoderTrainer(
            model,
            feature_indices,
            config.recipe,
            # A gradient scaler adapts to the losses it sees: each decoder gets its own, as if trained alone.
            self._fabric() if config.recipe.precision == "16-mixed" else self.fabric,
            name=f"run {run.name}",
            run=run,
            identity={
                "settings": config.digest,
                "images": self.data.digest,
                "sources": sources,
                "weights": self.encoders.weight_digests(sources),
                **({"code": code} if code else {}),
            },
            context=self.context,
        )
        machine = {"device": str(self.fabric.device), "threads": torch.get_num_threads()}
        if self.ranks.is_main_process:
            run.remove_leftovers()
            remove_traceback(run)
            run.set_state("running")
            run.save_environment(environment() | machine | {"ranks": self.ranks.world_size})
        if decoder.restore():
            where = f", image {decoder.position}" if decoder.position else ""
            self.context.log(f"{run.name} goes on after epoch {decoder.epoch}{where}")
        return decoder

    def evaluate_and_save(self, decoders: list[DecoderTrainer]) -> None:
        """Measure the decoders with their best weights on the test images, and write the results."""
        saved = []
        for decoder in decoders:
            with self.context.isolate(decoder.run):
                decoder.model.load_state_dict(decoder.best)
                if self.ranks.is_main_process:
                    decoder.save_best()
                saved.append(decoder)

        def failed(decoder: DecoderTrainer, error: Exception) -> None:
            if not decoder.failed:  # one whose training failed is measured too, by its best weights so far
                self.context.fail(decoder.run, error)

        run_all_or_each(self._measure, saved, failed)

    def _measure(self, decoders: list[DecoderTrainer]) -> None:
        weighted = [d for d in decoders if d.model.fusion is not None and d.model.fusion.has_weights]
        maps = {decoder: WeightMaps(decoder.model.fusion, self.keep) for decoder in weighted}

        def reconstructions() -> Iterator[Reconstructed]:
            for indices, images, features in self.loader.batches(self.data.test):
                self.context.check_shutdown()
                outputs = [decoder.reconstruct(features) for decoder in decoders]
                with self.fabric.autocast():
                    for decoder, weight_maps in maps.items():
                        weight_maps.add(decoder.select_features(features))
                yield indices, images, outputs

        with self.ranks.raise_on_all_ranks():
            results = evaluate_batches(
                reconstructions(),
                self.data.test.ids,
                self.metrics,
                names=[decoder.run.name for decoder in decoders],
                progress=self.context.progress,
                keep=self.keep,
                seen=[self._visible_box(decoder) for decoder in decoders],
                ranks=self.ranks,
            )
            for weight_maps in maps.values():
                weight_maps.gather(self.ranks)
        for decoder, result in zip(decoders, results, strict=True):
            with self.context.isolate(decoder.run):
                if self.ranks.is_main_process:
                    self._write(decoder, result, maps.get(decoder))
            self.context.measured.add(decoder.run)

    def _visible_box(self, decoder: DecoderTrainer) -> Box | None:
        """Return the visible region of a decoder's sources together; None if it is the whole image."""
        return visible_box([self.encoders.specs[i] for i in decoder.feature_indices], self.first.data.size)

    def _write(self, decoder: DecoderTrainer, result: Evaluation, maps: WeightMaps | None) -> None:
        """Write a decoder's result, mark its run as done, and remove the checkpoints."""
        config, layers = self.runs[decoder.run], self.encoders.describe()
        features = tuple(layers[i] for i in decoder.feature_indices)
        sources = [self.encoders.sources[i] for i in decoder.feature_indices]
        weights = self.encoders.weights_of(sources)
        size, box = self.first.data.size, self._visible_box(decoder)
        notes = [*decoder.notes]
        if code := decoder.identity.get("code"):
            notes.append(f"{config.decoder.name} has the SHA-256 {code}")
        notes += decoder.model.decoder.notes
        notes += visibility_notes(features, box, size, () if box is None else result.rows)
        notes += [*weight_notes(weights), *self.encoders.notes_of(sources), *self.data.notes]
        training = TrainingFacts(
            parameters=decoder.parameters,
            macs=decoder.model.macs([self.encoders.specs[i] for i in decoder.feature_indices]),
            ranks=self.ranks.world_size,
            seconds=round(decoder.seconds, 2),
            images_seen=decoder.images_seen,
            epochs=decoder.epoch,
            best_epoch=decoder.best_epoch,
            best_validation_loss=decoder.best_loss,
            decoder_sha256=sha256(decoder.run.file("decoder.safetensors")),
            settings_sha256=config.digest,
        )
        record = Result(
            kind="decoder",
            label=f"{' + '.join(config.sources)} · {config.decoder.name}",
            config=config,
            data=self.data.describe(),
            lpips=self.metrics.lpips_status,
            scores=summarise(result.rows),
            per_image=tuple(result.rows),
            features=features,
            weights=tuple(weights),
            fusion_weights=() if maps is None else tuple(maps.means),
            training=training,
            scores_seen=None if box is None else summarise(result.rows, VISIBLE_SUFFIX),
            notes=(*notes, *score_notes(result.rows)),
        )
        self.context.check_lock(decoder.run)
        decoder.run.save_result(record, result.images, () if maps is None else maps.images)
        if not decoder.failed:
            decoder.run.set_state("done")
            remove_checkpoint(decoder.run)
