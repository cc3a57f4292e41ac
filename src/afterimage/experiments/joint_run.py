"""Runs that are trained together on one pass through their encoders, from their checkpoints to their scores."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from lightning_fabric import Fabric
from torch import Tensor

from afterimage.config import AfterimageError, RunConfig
from afterimage.data.images import Data
from afterimage.evaluation.evaluate import (
    SEEN,
    Box,
    Evaluation,
    evaluate_together,
    score_notes,
    seen_notes,
    summarise,
)
from afterimage.evaluation.metrics import Metrics
from afterimage.models.decoders.canvas import seen_box
from afterimage.models.encoders.providers.timm import resolve
from afterimage.models.fusion import WeightMaps
from afterimage.models.reconstructor import MultiEncoder, build_feature_decoder
from afterimage.models.weights import weight_notes
from afterimage.runs.environment import environment
from afterimage.runs.failures import TRACEBACK, forget, record
from afterimage.runs.files import sha256
from afterimage.runs.lock import Lock
from afterimage.runs.results import Result, TrainingFacts
from afterimage.runs.run import Run
from afterimage.runtime.distributed import SINGLE_PROCESS, ProcessGroup
from afterimage.runtime.failures import ENCODERS, as_error, concerning, concerns, let_go
from afterimage.runtime.process import LockLost
from afterimage.runtime.progress import Progress
from afterimage.training.checkpoint import remove_checkpoints
from afterimage.training.checks import check_frozen
from afterimage.training.decoder_trainer import DecoderTrainer
from afterimage.training.trainer import CHECKPOINT_SECONDS, Trainer


class JointRun:
    """Runs that share encoders, images, batches and seed; this process holds the lock of each, or the leading
    one of several `ranks` does, which alone writes.

    A run that fails is recorded in its folder, its error added to `failures`, and the others go on. `over` takes the
    runs that have failed or are done. What ends all of them is raised; it concerns `ENCODERS` where runs that read
    other layers might do without what failed.
    """

    def __init__(
        self,
        runs: Mapping[Run, RunConfig],
        locks: Mapping[Run, Lock],
        data: Data,
        failures: list[AfterimageError],
        over: set[Run],
        *,
        accelerator: str,
        progress: Progress,
        keep: int,
        pause: Callable[[], None],
        checkpoint_seconds: float = CHECKPOINT_SECONDS,
        ranks: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        self.ranks = ranks
        self.runs, self.locks, self.data, self.failures, self.over = runs, locks, data, failures, over
        self.accelerator, self.progress, self.keep = accelerator, progress, keep
        self.pause, self.checkpoint_seconds = pause, checkpoint_seconds
        self.first = next(iter(runs.values()))
        self.fabric = self._fabric()
        sources = list(dict.fromkeys(source for config in runs.values() for source in config.sources))
        with concerning(ENCODERS):
            # One after the other: what is downloaded is then there for all.
            self.encoders = ranks.main_process_first(lambda: build_encoders(self.first, sources))
            self.encoders.to(self.fabric.device)
        for entry in self.encoders.weights_of(self.encoders.sources):
            note = f" ({entry.note})" if entry.note else ""
            self.say(
                f"{entry.model}: {entry.label.upper()} weights from {entry.origin} {entry.location}{note}"
            )
        self.metrics = ranks.main_process_first(lambda: Metrics(self.first.lpips, size=self.first.data.crop))

    def say(self, text: str) -> None:
        self.progress(text, 1, 1)

    def _fabric(self) -> Fabric:
        return self.ranks.local_fabric(self.accelerator, self.first.recipe.precision)

    @contextlib.contextmanager
    def recorded(self, run: Run, member: DecoderTrainer | None = None) -> Iterator[None]:
        """An error ends one run, is written into its folder, and leaves the others alone."""
        try:
            yield
        except Exception as error:
            if concerns(error):
                raise
            self.over.add(run)
            if member is not None:
                member.failed = True
            if isinstance(error, LockLost):
                # Whoever took the run over writes its folder now.
                self.say(str(error))
                return
            self.failures.append(as_error(error, run.name, run.file(TRACEBACK)))
            if self.ranks.is_main_process:
                record(run, error)
            let_go(error)

    @contextlib.contextmanager
    def raise_on_all_ranks(self, run: Run, member: DecoderTrainer | None = None) -> Iterator[None]:
        """As `recorded`, for what may go wrong on one rank only."""
        with self.recorded(run, member), self.ranks.raise_on_all_ranks():
            yield

    def train(self) -> None:
        """Train what is not trained, and measure it."""
        members = []
        for run, config in self.runs.items():
            with self.raise_on_all_ranks(run):
                members.append(self._member(run, config))
        if not members:
            return
        self.together = Trainer(
            self.encoders,
            self.data,
            members,
            self.fabric,
            seed=self.first.seed,
            progress=self.progress,
            recorded=lambda member: self.recorded(member.run, member),
            pause=self.pause,
            checkpoint_seconds=self.checkpoint_seconds,
            ranks=self.ranks,
        )
        self.together.finalize_fit()
        # What needs no epochs is written down before hours of training that may be stopped.
        early = [member for member in members if member.best and not member.active and not member.failed]
        self.finish(early)
        self.together.train_epochs()
        self.finish([member for member in members if member.best and member not in early])

    def _member(self, run: Run, config: RunConfig) -> DecoderTrainer:
        feature_indices = [self.encoders.sources.index(resolve(source)) for source in config.sources]
        head = build_feature_decoder(config, [self.encoders.specs[i] for i in feature_indices])
        sources = [self.encoders.sources[i] for i in feature_indices]
        member = DecoderTrainer(
            head,
            feature_indices,
            config.recipe,
            # A gradient scaler learns from the losses it sees: one for each, whatever is trained beside it.
            self._fabric() if config.recipe.precision == "16-mixed" else self.fabric,
            name=f"run {run.name}",
            run=run,
            identity={
                "settings": config.digest,
                "images": self.data.digest,
                "sources": sources,
                "weights": self.encoders.weight_digests(sources),
            },
            guard=lambda: self.locks[run].check(),
            said=self.say,
            ranks=self.ranks,
        )
        machine = {"device": str(self.fabric.device), "threads": torch.get_num_threads()}
        if self.ranks.is_main_process:
            run.remove_leftovers()
            forget(run)
            run.set_state("running")
            run.save_environment(environment() | machine | {"ranks": self.ranks.count})
        if member.restore():
            where = f", image {member.position}" if member.position else ""
            self.say(f"{run.name} goes on after epoch {member.epoch}{where}")
        return member

    def finish(self, members: list[DecoderTrainer]) -> None:
        """Measure the members' best decoders on the test images and write down what they came to."""
        saved = []
        for member in members:
            with self.raise_on_all_ranks(member.run, member):
                member.head.load_state_dict(member.best)
                if self.ranks.is_main_process:
                    member.save_best()
                saved.append(member)
        if not saved:
            return
        try:
            with self.ranks.raise_on_all_ranks():
                self._measure(saved)
            return
        except Exception as error:
            if concerns(error):
                raise
            let_go(error)
        # One of them cannot be measured; which one shows when each is measured alone.
        for member in saved:
            if member.run not in self.over:
                with self.raise_on_all_ranks(member.run, member):
                    self._measure([member])

    def _measure(self, members: list[DecoderTrainer]) -> None:
        check_frozen(self.encoders)
        weighted = [m for m in members if m.head.fusion is not None and m.head.fusion.has_weights]
        maps = {m: WeightMaps(m.head.fusion, self.keep) for m in weighted}

        def reconstruct(images: Tensor) -> list[Tensor]:
            self.pause()
            features = self.together.features(images)
            image_set = [member.reconstruct(features) for member in members]
            with self.fabric.autocast():
                for member, own in maps.items():
                    own.add(member.select_features(features))
            return image_set

        results = evaluate_together(
            reconstruct,
            self.data.test,
            self.metrics,
            names=[member.run.name for member in members],
            batch_size=self.first.recipe.batch_size,
            device=self.fabric.device,
            progress=self.progress,
            keep=self.keep,
            seen=[self._seen(member) for member in members],
            ranks=self.ranks,
        )
        for own in maps.values():
            own.gather(self.ranks)
        for member, result in zip(members, results, strict=True):
            with self.raise_on_all_ranks(member.run, member):
                if self.ranks.is_main_process:
                    self._write(member, result, maps.get(member))
            self.over.add(member.run)

    def _seen(self, member: DecoderTrainer) -> Box | None:
        """The part of images that a member's sources see; None for all of it."""
        side = self.first.data.crop
        return seen_box([self.encoders.specs[i] for i in member.feature_indices], (side, side))

    def _write(self, member: DecoderTrainer, result: Evaluation, maps: WeightMaps | None) -> None:
        """Write what a member came to; its run is then done."""
        config, layers = self.runs[member.run], self.encoders.describe()
        features = tuple(layers[i] for i in member.feature_indices)
        weights = self.encoders.weights_of([self.encoders.sources[i] for i in member.feature_indices])
        size, box = (self.first.data.crop, self.first.data.crop), self._seen(member)
        unseen = seen_notes(features, box, size, () if box is None else result.rows)
        found = Result(
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
            training=self._training(member),
            scores_seen=None if box is None else summarise(result.rows, SEEN),
            notes=(
                *(*member.notes, *unseen, *weight_notes(weights), *self.data.notes),
                *score_notes(result.rows),
            ),
        )
        member.guard()
        member.run.save_result(found, result.images, () if maps is None else maps.images)
        if not member.failed:
            member.run.set_state("done")
            remove_checkpoints(member.run)

    def _training(self, member: DecoderTrainer) -> TrainingFacts:
        return TrainingFacts(
            parameters=member.parameters,
            macs=member.head.macs([self.encoders.specs[i] for i in member.feature_indices]),
            ranks=self.ranks.count,
            seconds=round(member.seconds, 2),
            images_seen=member.images_seen,
            epochs=member.epoch,
            best_epoch=member.best_epoch,
            best_validation_loss=member.best_loss,
            decoder_sha256=sha256(member.run.file("decoder.safetensors")),
            settings_sha256=self.runs[member.run].digest,
        )


def build_encoders(config: RunConfig, sources: Sequence[str]) -> MultiEncoder:
    """The encoders of a run's weights, image size and seed, for these sources."""
    return MultiEncoder(sources, weights=config.weights, image_size=config.data.crop, seed=config.seed)


def try_encoders(config: RunConfig, data: Data, accelerator: str, ranks: ProcessGroup) -> None:
    """Build the encoders of one run alone and run them on one image; raises what they raise."""
    fabric = ranks.local_fabric(accelerator, config.recipe.precision)
    encoders = build_encoders(config, config.sources).to(fabric.device)
    with torch.no_grad(), fabric.autocast():
        encoders(data.train.crops(torch.arange(1), device=fabric.device))
