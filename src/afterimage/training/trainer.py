"""The training loop: one pass through the encoders feeds every decoder that is trained on them."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from afterimage.config import AfterimageError, RecipeConfig
from afterimage.data.images import Data, ImageSet
from afterimage.data.sampling import order
from afterimage.models.reconstructor import ClosedForm, Reconstructor, no_maps
from afterimage.runtime.distributed import SINGLE_PROCESS, ProcessGroup, RankLost, distributed_context
from afterimage.runtime.failures import ENCODERS, concerning
from afterimage.runtime.memory import retry_with_smaller_batch
from afterimage.runtime.progress import Progress, silent
from afterimage.runtime.signals import Stopped
from afterimage.training.checks import FeatureWatch, check_frozen, check_images, check_split
from afterimage.training.decoder_trainer import DecoderTrainer

VALIDATION_BYTES = 1 << 30
"""Validation features are computed once and kept where they take no more memory than this."""
CHECKPOINT_SECONDS = 45.0
"""With the step that is under way when they have passed, a checkpoint is never older than a minute of work."""

Recorder = Callable[[DecoderTrainer], contextlib.AbstractContextManager[None]]


def train(
    reconstructor: Reconstructor,
    data: Data,
    recipe: RecipeConfig | None = None,
    *,
    seed: int = 42,
    accelerator: str = "auto",
    progress: Progress = silent,
) -> list[dict[str, Any]]:
    """Train a reconstructor's decoder on `data` and leave it with the best weights by validation loss.

    Returns the history, one row an epoch (empty for a decoder that is solved in closed form). The encoders do not
    change by a bit. Raises `AfterimageError` where the loss is not finite.

    In a script that `torchrun` has started several times, all train the one reconstructor together, each on its part
    of every batch, and all are left with it.
    """
    recipe = recipe or RecipeConfig()
    with distributed_context(accelerator) as ranks, contextlib.ExitStack() as stack:
        fabric = ranks.local_fabric(accelerator, recipe.precision)
        reconstructor.to(fabric.device)
        sources = reconstructor.encoders.sources
        member = DecoderTrainer(reconstructor.head, range(len(sources)), recipe, fabric, ranks=ranks)
        stack.callback(lambda: member.best and member.head.load_state_dict(member.best))
        progress = progress if ranks.is_main_process else silent
        encoders = reconstructor.encoders
        Trainer(encoders, data, [member], fabric, seed=seed, progress=progress, ranks=ranks).train()
    reconstructor.eval()
    return member.history


class Trainer:
    """Decoders that learn from the same images in the same order, through the same encoders.

    `recorded(member)` wraps what one member does; it may turn an error into a record and mark the member failed.
    `pause` is called between steps, where every member can be saved, and may raise `Stopped`. Members need not be
    at the same step: each goes on from its own, since a batch depends on seed, epoch and position alone.

    Several `ranks` do the same at the same time, each for its part of every batch (see `ranks`).
    """

    def __init__(
        self,
        encoders: nn.Module,
        data: Data,
        members: Sequence[DecoderTrainer],
        fabric: Fabric,
        *,
        seed: int,
        progress: Progress = silent,
        recorded: Recorder = lambda member: contextlib.nullcontext(),
        pause: Callable[[], None] = lambda: None,
        checkpoint_seconds: float = CHECKPOINT_SECONDS,
        ranks: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        check_split(data)
        self.encoders, self.data, self.members, self.fabric = encoders, data, list(members), fabric
        self.seed, self.progress, self.ranks = seed, progress, ranks
        self._recorded, self._pause = recorded, pause
        self.recipe = members[0].recipe
        self.watch = FeatureWatch(encoders.sources)
        self.checkpoint_seconds, self._saved = checkpoint_seconds, time.monotonic()
        self._at_once = self.recipe.batch_size
        self._kept: list[tuple[list[Tensor], Tensor]] | None = None

    @contextlib.contextmanager
    def recorded(self, member: DecoderTrainer) -> Iterator[None]:
        with self._recorded(member), self.ranks.raise_on_all_ranks():
            yield

    def pause(self) -> None:
        with self.ranks.raise_on_all_ranks():
            self._pause()

    @torch.no_grad()
    def features(self, images: Tensor) -> list[Tensor]:
        """Feature maps of images `(B, 3, H, W)`; fewer images at a time where memory does not suffice."""

        def work(size: int) -> list[Tensor]:
            with self.fabric.autocast():
                parts = [self.encoders(part) for part in images.split(size)]
            return parts[0] if len(parts) == 1 else [torch.cat(maps) for maps in zip(*parts, strict=True)]

        if len(images) == 0:
            return no_maps(self.encoders.specs, images.device)
        wanted = min(self._at_once, len(images))
        with concerning(ENCODERS):
            features, size = retry_with_smaller_batch(work, wanted, "the encoders")
        if size < wanted:
            self._at_once = size
            self.progress(f"out of memory: the encoders see {size} images at a time from here on", 1, 1)
        return features

    @torch.no_grad()
    def batches(
        self, image_set: ImageSet, indices: np.ndarray | Tensor | None = None, **crop: Any
    ) -> Iterator[tuple[list[Tensor], Tensor]]:
        """Features and images `(B, 3, H, W)` of this rank's part of every batch, on the device."""
        check_frozen(self.encoders)
        indices = torch.arange(len(image_set)) if indices is None else torch.as_tensor(indices)
        chunks, ahead = itertools.tee(self._chunks(indices))
        with contextlib.closing(image_set.batches(ahead, device=self.fabric.device, **crop)) as crops:
            for number, chunk in enumerate(chunks):
                with self.ranks.raise_on_all_ranks():
                    images = next(crops)
                    ids = [image_set.ids[index] for index in chunk.tolist()]
                    if number == 0 or images.device.type == "cpu":  # elsewhere asking makes every step wait
                        check_images(images, ids)
                    features = self.seen(image_set, chunk, images, **crop)
                    self.watch.look(features, ids)
                yield features, images
        self.watch.settle()

    def _chunks(self, indices: Tensor) -> Iterator[Tensor]:
        """This rank's part of every batch."""
        for start in range(0, len(indices), self.recipe.batch_size):
            batch = indices[start : start + self.recipe.batch_size]
            yield batch[self.ranks.part(len(batch))]

    def seen(self, image_set: ImageSet, indices: Tensor, images: Tensor, **crop: Any) -> list[Tensor]:
        """The feature maps that decoders get of `images`, the images at `indices`."""
        return self.features(images)

    def training_batches(self, epoch: int, position: int = 0) -> Iterator[tuple[list[Tensor], Tensor]]:
        """One epoch's batches, from a position in it: a pure function of seed and epoch, whatever else is
        trained beside or resumed."""
        train = self.data.train
        indices = order(len(train), seed=self.seed, epoch=epoch)[position:]
        crop = {"seed": self.seed, "epoch": epoch} if self.recipe.augment else {}
        return self.batches(train, indices, **crop) if len(indices) else iter(())

    def views(self, view: int) -> Iterator[tuple[list[Tensor], Tensor]]:
        """The training images for a closed form: centre crops as test images have, then random ones."""
        return self.batches(self.data.train) if view == 0 else self.training_batches(view - 1)

    def validation_batches(self) -> Iterator[tuple[list[Tensor], Tensor]]:
        """The validation images and their features, kept after the first pass where memory allows."""
        if self._kept is not None:
            yield from self._kept
            return
        kept, size = [], 0
        for features, images in self.batches(self.data.validation):
            size += sum(tensor.nbytes for tensor in (*features, images))
            if size <= VALIDATION_BYTES:
                kept.append((features, images))
            yield features, images
        if size <= VALIDATION_BYTES:
            self._kept = kept

    def validation_losses(self, members: Sequence[DecoderTrainer]) -> list[float]:
        """The mean loss of each member; not a number for one that failed on the way."""
        sums = [0.0] * len(members)
        for features, images in self.validation_batches():
            for i, member in enumerate(members):
                with self.recorded(member):
                    sums[i] += math.nan if member.failed else member.validate(features, images)
            self.pause()
        return [
            sum(parts) / len(self.data.validation) for parts in zip(*self.ranks.gather(sums), strict=True)
        ]

    def train(self) -> None:
        """Closed forms first, then the epochs."""
        self.finalize_fit()
        self.train_epochs()

    def train_epochs(self) -> None:
        """Epochs of gradient descent until every member has had its number of them."""
        while active := [member for member in self.members if member.active]:
            epoch = min(member.epoch for member in active)
            members = [member for member in active if member.epoch == epoch]
            try:
                self.train_epoch(epoch, members)
            except Stopped:
                self.save(members)
                raise
            except RankLost:
                if self.ranks.is_main_process:
                    self._rescue(members)
                raise

    def _rescue(self, members: Sequence[DecoderTrainer]) -> None:
        """Keep what can be kept when another rank is lost: nothing may be asked of the others any more."""
        for member in members:
            if member.between_steps and not member.failed:
                with contextlib.suppress(Exception):
                    member.save()

    def save(self, members: Sequence[DecoderTrainer]) -> None:
        """Write the members' checkpoints, wherever they are."""
        for member in members:
            if not member.failed:
                with self.recorded(member):
                    member.save()
        self._saved = time.monotonic()

    def finalize_fit(self) -> None:
        """What has a closed form, before any epoch: fusions first, then the decoders that read them."""
        waiting = [m for m in self.members if m.head.closed_forms and not m.restored and not m.failed]
        for stage in range(max((len(m.head.closed_forms) for m in waiting), default=0)):
            parts = {m: m.head.closed_forms[stage] for m in waiting if stage < len(m.head.closed_forms)}
            self._solve({member: part for member, part in parts.items() if not member.failed})
        for member in waiting:
            with self.recorded(member):
                if member.head.decoder.closed_form and not member.failed:
                    started = time.monotonic()
                    (loss,) = self.validation_losses([member])
                    if member.failed:
                        continue
                    if not math.isfinite(loss):
                        raise AfterimageError(f"{member.name}: the closed form's validation loss is {loss}")
                    member.seconds += time.monotonic() - started
                    member.keep(loss)
                if not member.failed:
                    member.save()

    def _solve(self, parts: Mapping[DecoderTrainer, ClosedForm]) -> None:
        """One part of each member, on one pass over the training and the validation images."""
        started = time.monotonic()
        views: dict[DecoderTrainer, int] = {}
        for member, part in parts.items():
            with self.recorded(member):
                views[member] = part.begin_fit(len(self.data.train), self.seed, self.ranks)
        parts = {member: part for member, part in parts.items() if member in views}
        passes = max(views.values(), default=0)
        done, total = 0, passes * len(self.data.train) + len(self.data.validation)
        for view in range(passes + 1 if parts else 0):
            held_out = view == passes
            for features, images in self.validation_batches() if held_out else self.views(view):
                for member, part in parts.items():
                    if not member.failed and (held_out or view < views[member]):
                        with self.recorded(member):
                            self.watch.check(member.name, member.feature_indices)
                            member.head.partial_fit(
                                part, member.select_features(features), images, validation=held_out
                            )
                done += self.ranks.place(len(images))[1]
                self.progress("fitting in closed form", done, total)
                self.pause()
        shared = (time.monotonic() - started) / max(1, len(parts))
        for member, part in parts.items():
            if not member.failed:
                with self.recorded(member):
                    started = time.monotonic()
                    self.watch.check(member.name, member.feature_indices)
                    member.notes += part.finalize_fit()
                    member.share()
                    member.seconds += shared + time.monotonic() - started
                    member.images_seen += views[member] * len(self.data.train)

    def train_epoch(self, epoch: int, members: list[DecoderTrainer]) -> None:
        """One epoch for `members`; its time is divided evenly between them, since they share the pass.

        It begins where the one that is furthest behind left off; those ahead wait until it is their turn.
        """
        total, last = len(self.data.train), max(member.recipe.epochs for member in members)
        done = begun = min(member.position for member in members)
        for member in members:
            with self.recorded(member):
                member.begin_epoch()
        started = lap = time.monotonic()
        for features, images in self.training_batches(epoch, done):
            count = min(self.recipe.batch_size, total - done)
            stepping = [m for m in members if m.position == done and not m.failed]
            for member in stepping:
                with self.recorded(member):
                    self.watch.check(member.name, member.feature_indices)
                    member.step(features, images, count)
                self.pause()
            if all(member.failed for member in members):
                break
            done += count
            lap = _share(time.monotonic(), lap, stepping)
            if self.ranks.decide(lap - self._saved >= self.checkpoint_seconds):
                self.save(members)
                lap = _share(time.monotonic(), lap, members)
            self.progress(
                "training",
                epoch * total + done,
                last * total,
                epoch=f"{epoch + 1}/{last}",
                loss=lambda: min(member.running_loss for member in members),
                images_per_second=(done - begun) / (time.monotonic() - started),
            )
        members = [member for member in members if not member.failed]
        losses = self.validation_losses(members)
        _share(time.monotonic(), lap, members)
        for member, loss in zip(members, losses, strict=True):
            if not member.failed:
                with self.recorded(member):
                    self.watch.check(member.name, member.feature_indices)
                    member.end_epoch(loss)
        self._saved = time.monotonic()


def _share(now: float, since: float, members: Sequence[DecoderTrainer]) -> float:
    """Divide the time since then between members; returns now."""
    for member in members:
        member.epoch_seconds += (now - since) / len(members)
    return now
