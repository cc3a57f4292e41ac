"""The training loop: one pass of images through frozen encoders feeds every decoder that reads their features.

From top to bottom: `train` trains one reconstructor in one call, `Trainer` several decoders by closed forms and then
epoch by epoch, `training_step` one decoder on one batch.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from afterimage.config import AfterimageError, RecipeConfig
from afterimage.data.duplicates import check_split
from afterimage.data.images import Data
from afterimage.models.decoders.base import ClosedForm, FeatureCrop
from afterimage.models.reconstructor import Reconstructor
from afterimage.runtime.device import retry_with_smaller_batch
from afterimage.runtime.distributed import RankLost, distributed_context
from afterimage.runtime.process import Stopped
from afterimage.runtime.terminal import Progress, no_progress
from afterimage.training.decoder_trainer import DecoderTrainer, split_batch
from afterimage.training.feature_loader import FeatureLoader, RunContext

IMPORTED_DECODER_NOTE = "trained elsewhere: there is nothing to train, the decoder is measured as it is"


def train(
    reconstructor: Reconstructor,
    data: Data,
    recipe: RecipeConfig | None = None,
    *,
    seed: int = 42,
    accelerator: str = "auto",
    progress: Progress = no_progress,
) -> list[dict[str, Any]]:
    """Train a reconstructor's decoder and leave it with the best weights by validation loss.

    The encoders are not changed. In a script that `torchrun` started as several processes, all of them train the same
    reconstructor together, each on its part of every batch, and end with identical decoders.

    Args:
        reconstructor: frozen encoders and the decoder to train
        data: training and validation images
        recipe: epochs, batch size, loss, learning rate and so on; None for the defaults
        seed: seed of the order of the images and of their random crops
        accelerator: `cpu`, `cuda`, `mps` or `auto`
        progress: callback for progress and messages, see `Progress`

    Returns:
        the history, one row for each epoch; empty for a decoder that is fitted in closed form

    Raises:
        AfterimageError: the loss is not finite, or a test image is among the training images
    """
    recipe = recipe or RecipeConfig()
    with distributed_context(accelerator) as ranks:
        context = RunContext(ranks=ranks, progress=progress if ranks.is_main_process else no_progress)
        fabric = ranks.local_fabric(accelerator, recipe.precision)
        reconstructor.to(fabric.device)
        encoders = reconstructor.encoders
        decoder = DecoderTrainer(
            reconstructor.feature_decoder, range(len(encoders.sources)), recipe, fabric, context=context
        )
        loader = FeatureLoader(encoders, data, recipe, fabric, seed=seed, context=context)
        try:
            Trainer(loader, [decoder]).train()
        finally:
            if decoder.best:
                decoder.model.load_state_dict(decoder.best)
    reconstructor.eval()
    return decoder.history


class Trainer:
    """Joint training of decoders that use the same encoders and the same images in the same order.

    Each decoder ends bit-identical to one that is trained alone. The decoders need not be at the same step: each
    continues from its own, since a batch depends on seed, epoch and position alone. If the context records failures, a
    decoder that fails is skipped from then on.
    """

    def __init__(self, loader: FeatureLoader, decoders: Sequence[DecoderTrainer]) -> None:
        check_split(loader.data)
        self.loader, self.decoders = loader, list(decoders)
        self.data, self.recipe, self.context = loader.data, loader.recipe, loader.context
        self._saved = time.monotonic()

    def train(self) -> None:
        """Fit closed forms, then train every decoder for its number of epochs."""
        self.fit_closed_forms()
        self.train_epochs()

    # Gradient descent

    def train_epochs(self) -> None:
        """Train every decoder for its number of epochs, those with the fewest completed epochs first.

        Raises:
            Stopped: the process was asked to stop; checkpoints have been written
        """
        while active := [decoder for decoder in self.decoders if decoder.active]:
            epoch = min(decoder.epoch for decoder in active)
            decoders = [decoder for decoder in active if decoder.epoch == epoch]
            try:
                self.train_epoch(epoch, decoders)
            except Stopped:
                self.save(decoders)
                raise
            except RankLost:
                self._save_alone(decoders)
                raise

    def train_epoch(self, epoch: int, decoders: Sequence[DecoderTrainer]) -> None:
        """Train for one epoch, or for the rest of a partly trained one, then validate.

        The epoch starts at the lowest position of any decoder; decoders that are further ahead skip batches until then.
        The time is divided evenly between the decoders that share the pass.
        """
        total, epochs = len(self.data.train), max(decoder.recipe.epochs for decoder in decoders)
        done = begun = min(decoder.position for decoder in decoders)
        for decoder in decoders:
            with self.context.isolate(decoder.run):
                decoder.model.train()
        started = lap = time.monotonic()
        for _, images, features in self.loader.training_batches(epoch, done):
            # All decoders at this position take one step on the same features.
            batch_size = min(self.recipe.batch_size, total - done)
            stepping = [one for one in decoders if one.position == done and not one.failed]
            for decoder in stepping:
                with self.context.isolate(decoder.run):
                    self.check_features(decoder)
                    training_step(decoder, features, images, batch_size)
                self.context.check_shutdown()
            if all(decoder.failed for decoder in decoders):
                break
            done += batch_size
            lap = _share_time(lap, stepping)

            # Save checkpoints at regular intervals.
            if self.context.ranks.decide(lap - self._saved >= self.context.checkpoint_seconds):
                self.save(decoders)
                lap = _share_time(lap, decoders)

            self.context.progress(
                "training",
                epoch * total + done,
                epochs * total,
                epoch=f"{epoch + 1}/{epochs}",
                loss=lambda: min(decoder.running_loss for decoder in decoders),
                images_per_second=(done - begun) / (time.monotonic() - started),
            )

        # Validate, and keep each decoder that has improved.
        decoders = [decoder for decoder in decoders if not decoder.failed]
        if not decoders:
            return
        losses = self.validation_losses(decoders)
        _share_time(lap, decoders)
        for decoder, loss in zip(decoders, losses, strict=True):
            if not decoder.failed:
                with self.context.isolate(decoder.run):
                    self.check_features(decoder)
                    decoder.end_epoch(loss)
        self._saved = time.monotonic()

    def validation_losses(self, decoders: Sequence[DecoderTrainer]) -> list[float]:
        """Return the mean validation loss of each decoder, which means nothing for a decoder that failed."""
        sums = [0.0] * len(decoders)
        for _, images, features in self.loader.validation_batches():
            for i, decoder in enumerate(decoders):
                if not decoder.failed:
                    with self.context.isolate(decoder.run):
                        sums[i] += decoder.validate(features, images)
            self.context.check_shutdown()
            if all(decoder.failed for decoder in decoders):
                break
        gathered = self.context.ranks.gather(sums)
        return [sum(parts) / len(self.data.validation) for parts in zip(*gathered, strict=True)]

    # Closed forms

    def fit_closed_forms(self) -> None:
        """Fit all fusions and decoders that have a closed form, fusions before the decoders that read them.

        Decoders that need no gradient descent are also measured here, on the validation images, and kept as the best;
        a decoder without a closed form keeps the weights it came with.
        """
        waiting = [d for d in self.decoders if d.model.closed_forms or not d.model.trainable]
        waiting = [d for d in waiting if not d.restored and not d.failed]
        for stage in range(max((len(d.model.closed_forms) for d in waiting), default=0)):
            parts = {d: d.model.closed_forms[stage] for d in waiting if stage < len(d.model.closed_forms)}
            self._fit({decoder: part for decoder, part in parts.items() if not decoder.failed})
        for decoder in (d for d in waiting if not d.failed):
            with self.context.isolate(decoder.run):
                if decoder.model.decoder.closed_form or not decoder.model.trainable:
                    started = time.monotonic()
                    (loss,) = self.validation_losses([decoder])
                    if decoder.failed:
                        continue
                    if not math.isfinite(loss):
                        raise AfterimageError(f"{decoder.name}: the validation loss is {loss}")
                    if decoder.model.closed_forms:
                        decoder.seconds += time.monotonic() - started
                    else:
                        decoder.notes.append(IMPORTED_DECODER_NOTE)
                        self.context.log(f"{decoder.name}: {IMPORTED_DECODER_NOTE}")
                    decoder.store_best(loss)
                decoder.save()

    def _fit(self, parts: Mapping[DecoderTrainer, ClosedForm]) -> None:
        """Fit one closed-form part (fusion or decoder) of each decoder, on shared passes over the images."""
        started = time.monotonic()
        views: dict[DecoderTrainer, int] = {}
        for decoder, part in parts.items():
            with self.context.isolate(decoder.run):
                views[decoder] = part.begin_fit(len(self.data.train), self.loader.seed, self.context.ranks)
        parts = {decoder: part for decoder, part in parts.items() if decoder in views}

        # As many passes over the training images as any part asks for, then one over the validation images.
        passes = max(views.values(), default=0)
        done, total = 0, passes * len(self.data.train) + len(self.data.validation)
        for view in range(passes + 1 if parts else 0):
            held_out = view == passes
            batches = self.loader.validation_batches() if held_out else self.loader.closed_form_batches(view)
            for _, images, features in batches:
                for decoder, part in parts.items():
                    if not decoder.failed and (held_out or view < views[decoder]):
                        with self.context.isolate(decoder.run):
                            self.check_features(decoder)
                            selected = decoder.select_features(features)
                            decoder.model.partial_fit(part, selected, images, validation=held_out)
                done += self.context.ranks.batch_offset(len(images))[1]
                self.context.progress("fitting in closed form", done, total)
                self.context.check_shutdown()
                if all(decoder.failed for decoder in parts):
                    return

        shared = (time.monotonic() - started) / max(1, len(parts))
        for decoder, part in parts.items():
            if not decoder.failed:
                with self.context.isolate(decoder.run):
                    started = time.monotonic()
                    self.check_features(decoder)
                    decoder.notes += part.finalize_fit()
                    decoder.broadcast_weights()
                    decoder.seconds += shared + time.monotonic() - started
                    decoder.images_seen += views[decoder] * len(self.data.train)

    # Failures and checkpoints

    def check_features(self, decoder: DecoderTrainer) -> None:
        """Raise an `AfterimageError` if a feature map of a decoder has had a value that is not finite."""
        self.loader.non_finite_check.check(decoder.name, decoder.feature_indices)

    def save(self, decoders: Sequence[DecoderTrainer]) -> None:
        """Write a checkpoint of every decoder that has not failed."""
        for decoder in decoders:
            if not decoder.failed:
                with self.context.isolate(decoder.run):
                    decoder.save()
        self._saved = time.monotonic()

    def _save_alone(self, decoders: Sequence[DecoderTrainer]) -> None:
        """Save what is possible after another rank is lost, without communicating with the remaining ranks."""
        for decoder in decoders if self.context.ranks.is_main_process else ():
            if decoder.between_steps and not decoder.failed:
                with contextlib.suppress(Exception):
                    decoder.save()


def _share_time(since: float, decoders: Sequence[DecoderTrainer]) -> float:
    """Divide the time since `since` evenly between decoders; return the current time."""
    now = time.monotonic()
    for decoder in decoders:
        decoder.epoch_seconds += (now - since) / len(decoders)
    return now


# The training step


def training_step(
    decoder: DecoderTrainer, features: Sequence[Tensor], images: Tensor, batch_size: int | None = None
) -> None:
    """Train one decoder on one batch, with one optimizer step for each feature crop (usually the whole feature map).

    Args:
        decoder: the decoder's training state; its model is in training mode
        features: feature maps of all sources, `(B, C, h, w)` each
        images: the images of these features, `(B, 3, H, W)` in [0, 1]
        batch_size: number of images in the whole batch, if several ranks each have a part of it; None for `B`

    Raises:
        AfterimageError: the loss is not finite; raised at once on a CPU. On other devices `DecoderTrainer.end_epoch`
            raises it, so that steps need not wait for the device
    """
    batch_size = len(images) if batch_size is None else batch_size
    selected = decoder.select_features(features)
    # Crops depend only on the position in the run, so that a resumed run draws the same ones.
    generator = torch.Generator().manual_seed((decoder.epoch << 32) + decoder.position)
    feature_crops = decoder.model.decoder.feature_crops(generator)
    for number, crop in enumerate(feature_crops):
        loss = _optimizer_step(decoder, selected, images, batch_size, crop)
        decoder.total_loss += loss / len(feature_crops)
        decoder.between_steps = number == len(feature_crops) - 1
    decoder.note_single_values()
    decoder.position += batch_size


def _optimizer_step(
    decoder: DecoderTrainer, features: list[Tensor], images: Tensor, batch_size: int, crop: FeatureCrop | None
) -> Tensor:
    """Take one optimizer step; return the loss summed over the images of the whole batch.

    If memory runs out, gradients are summed over micro-batches, whose size is halved until they fit.
    """
    ranks, context = decoder.context.ranks, decoder.context
    largest_part = ranks.max_rank_size(batch_size)
    wanted = min(decoder.micro_batch, largest_part)
    buffers = [buffer.clone() for buffer in decoder.model.buffers()]

    def undo() -> None:
        decoder.optimizer.zero_grad(set_to_none=True)
        for buffer, before in zip(decoder.model.buffers(), buffers, strict=True):
            buffer.copy_(before)

    def work(size: int) -> Tensor:
        if size < wanted:  # the previous attempt failed
            undo()
        with ranks.raise_on_all_ranks():
            parts = list(split_batch(features, images, size))
            if decoder.synchronises:  # batch norm communicates, so all ranks need the same number of parts
                nothing = [maps[:0] for maps in features], images[:0]
                parts = [part for part in parts if len(part[1])]
                parts += [nothing] * (-(-largest_part // size) - len(parts))
            losses = [_accumulate_gradients(decoder, maps, part, batch_size, crop) for maps, part in parts]
            return _all_reduce(decoder, sum(losses, decoder.total_loss.new_zeros(())))

    try:
        loss, size = retry_with_smaller_batch(work, wanted, decoder.name)
    except RankLost:
        undo()
        raise
    if size < wanted:
        decoder.shrink_micro_batch(size)
    with context.section("optimizer"):
        decoder.optimizer.step()
        decoder.model.decoder.after_optimizer_step()
        decoder.optimizer.zero_grad(set_to_none=True)
    return loss


def _accumulate_gradients(
    decoder: DecoderTrainer, features: list[Tensor], images: Tensor, batch_size: int, crop: FeatureCrop | None
) -> Tensor:
    """Add the gradients of some of the batch's images; return the sum of their losses."""
    context = decoder.context
    if len(images) == 0:
        if decoder.synchronises:
            decoder.fabric.backward(decoder.fabric_model(features, crop).sum())
        return decoder.total_loss.new_zeros(())
    with context.section("decoder forward"):
        loss = decoder.loss(
            decoder.fabric_model(features, crop), decoder.model.decoder.crop_images(images, crop)
        )
        if loss.device.type == "cpu" and not math.isfinite(loss.item()):
            raise AfterimageError(
                f"{decoder.name}: the loss is {loss.item()} in epoch {decoder.epoch + 1}, step "
                f"{decoder.position // decoder.recipe.batch_size + 1}; the best decoder so far "
                f"({decoder.best_text}) is kept. A lower learning_rate may help."
            )
    with context.section("backward"):
        decoder.fabric.backward(loss if len(images) == batch_size else loss * (len(images) / batch_size))
    return loss.detach() * len(images)


def _all_reduce(decoder: DecoderTrainer, loss: Tensor) -> Tensor:
    """Sum gradients and loss over ranks, in place; return the loss."""
    if decoder.context.ranks.world_size > 1:
        trainable = [p for p in decoder.model.parameters() if p.requires_grad]
        for parameter in trainable:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        decoder.context.ranks.sum([*(parameter.grad for parameter in trainable), loss])
    return loss
