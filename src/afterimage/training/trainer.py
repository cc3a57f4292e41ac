"""The training loop: one pass of images through frozen encoders feeds every decoder that reads their features.

From top to bottom: `train` is the whole library in one call; a `Trainer` fits closed forms and then trains, epoch
after epoch; `training_step` trains one decoder on one batch.
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
from afterimage.models.decoders.base import FeatureCrop
from afterimage.models.reconstructor import ClosedForm, Reconstructor
from afterimage.runtime.distributed import RankLost, distributed_context
from afterimage.runtime.memory import retry_with_smaller_batch
from afterimage.runtime.progress import Progress, silent
from afterimage.runtime.signals import Stopped
from afterimage.training.context import RunContext
from afterimage.training.decoder_trainer import DecoderTrainer, split_batch
from afterimage.training.feature_loader import FeatureLoader

TRAINED_ELSEWHERE = "trained elsewhere: there is nothing to train, the decoder is measured as it is"


def train(
    reconstructor: Reconstructor,
    data: Data,
    recipe: RecipeConfig | None = None,
    *,
    seed: int = 42,
    accelerator: str = "auto",
    progress: Progress = silent,
) -> list[dict[str, Any]]:
    """Train a reconstructor's decoder and leave it with the best weights by validation loss.

    The encoders are not changed. In a script that `torchrun` has started several times, all processes train the one
    reconstructor together, each on its part of every batch, and all end with the same decoder.

    Args:
        reconstructor: frozen encoders and the decoder to train
        data: training and validation images
        recipe: epochs, batch size, loss, learning rate and so on; None for the defaults
        seed: seed of the order of the images and of their random crops
        accelerator: `cpu`, `cuda`, `mps` or `auto`
        progress: called as `progress(what, done, total, **figures)`

    Returns:
        the history, one row for each epoch; empty for a decoder that is solved in closed form

    Raises:
        AfterimageError: the loss is not finite, or a test image is among the training images
    """
    recipe = recipe or RecipeConfig()
    with distributed_context(accelerator) as ranks, contextlib.ExitStack() as stack:
        context = RunContext(ranks=ranks, progress=progress if ranks.is_main_process else silent)
        fabric = ranks.local_fabric(accelerator, recipe.precision)
        reconstructor.to(fabric.device)
        encoders = reconstructor.encoders
        decoder = DecoderTrainer(
            reconstructor.feature_decoder, range(len(encoders.sources)), recipe, fabric, context=context
        )
        # Also after an error: what was best until then is kept.
        stack.callback(lambda: decoder.best and decoder.model.load_state_dict(decoder.best))
        loader = FeatureLoader(encoders, data, recipe, fabric, seed=seed, context=context)
        Trainer(loader, [decoder]).train()
    reconstructor.eval()
    return decoder.history


class Trainer:
    """Trains decoders that learn from the same images in the same order, through the same encoders.

    Each decoder gets the same bits as if it were trained alone. The decoders need not be at the same step: each goes on
    from its own, since a batch depends on seed, epoch and position alone. If the context records failures, a decoder
    that fails is left out from then on.

    Args:
        loader: the images and their features
        decoders: training state of each decoder
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
        """Train until every decoder has had its epochs; those furthest behind come first.

        Raises:
            Stopped: the process was asked to stop; every decoder has a checkpoint
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
        """Train for one epoch or the rest of one, then validate.

        The epoch begins where the decoder that is furthest behind left off; those ahead wait for their turn. Its time
        is divided evenly between the decoders, since they share the pass.
        """
        total, epochs = len(self.data.train), max(decoder.recipe.epochs for decoder in decoders)
        done = begun = min(decoder.position for decoder in decoders)
        for decoder in decoders:
            with self.context.isolate(decoder.run):
                decoder.begin_epoch()
        started = lap = time.monotonic()
        for _, images, features in self.loader.training_batches(epoch, done):
            # Every decoder takes its step on the same features.
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

            # Save from time to time.
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

        # Validate, and keep each decoder that is better than it was.
        decoders = [decoder for decoder in decoders if not decoder.failed]
        losses = self.validation_losses(decoders)
        _share_time(lap, decoders)
        for decoder, loss in zip(decoders, losses, strict=True):
            if not decoder.failed:
                with self.context.isolate(decoder.run):
                    self.check_features(decoder)
                    decoder.end_epoch(loss)
        self._saved = time.monotonic()

    def validation_losses(self, decoders: Sequence[DecoderTrainer]) -> list[float]:
        """Return the mean validation loss of each decoder; NaN for one that failed on the way."""
        sums = [0.0] * len(decoders)
        for _, images, features in self.loader.validation_batches():
            for i, decoder in enumerate(decoders):
                if decoder.failed:
                    sums[i] = math.nan
                    continue
                with self.context.isolate(decoder.run):
                    sums[i] += decoder.validate(features, images)
            self.context.check_shutdown()
        gathered = self.context.ranks.gather(sums)
        return [sum(parts) / len(self.data.validation) for parts in zip(*gathered, strict=True)]

    # Closed forms

    def fit_closed_forms(self) -> None:
        """Fit everything that has a closed form: fusions first, then the decoders that read them.

        A decoder of which nothing is trained is measured here too, on the validation images, and kept as it is.
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
                        decoder.notes.append(TRAINED_ELSEWHERE)
                        self.context.log(f"{decoder.name}: {TRAINED_ELSEWHERE}")
                    decoder.keep(loss)
                decoder.save()

    def _fit(self, parts: Mapping[DecoderTrainer, ClosedForm]) -> None:
        """Fit one part of each decoder, on one pass over the training and the validation images."""
        started = time.monotonic()
        views: dict[DecoderTrainer, int] = {}
        for decoder, part in parts.items():
            with self.context.isolate(decoder.run):
                views[decoder] = part.begin_fit(len(self.data.train), self.loader.seed, self.context.ranks)
        parts = {decoder: part for decoder, part in parts.items() if decoder in views}

        # The training images, as often as the parts want to see them, then the validation images.
        passes = max(views.values(), default=0)
        done, total = 0, passes * len(self.data.train) + len(self.data.validation)
        for view in range(passes + 1 if parts else 0):
            held_out = view == passes
            batches = self.loader.validation_batches() if held_out else self.loader.views(view)
            for _, images, features in batches:
                for decoder, part in parts.items():
                    if not decoder.failed and (held_out or view < views[decoder]):
                        with self.context.isolate(decoder.run):
                            self.check_features(decoder)
                            own = decoder.select_features(features)
                            decoder.model.partial_fit(part, own, images, validation=held_out)
                done += self.context.ranks.place(len(images))[1]
                self.context.progress("fitting in closed form", done, total)
                self.context.check_shutdown()

        shared = (time.monotonic() - started) / max(1, len(parts))
        for decoder, part in parts.items():
            if not decoder.failed:
                with self.context.isolate(decoder.run):
                    started = time.monotonic()
                    self.check_features(decoder)
                    decoder.notes += part.finalize_fit()
                    decoder.share()
                    decoder.seconds += shared + time.monotonic() - started
                    decoder.images_seen += views[decoder] * len(self.data.train)

    # Failures and checkpoints

    def check_features(self, decoder: DecoderTrainer) -> None:
        """Check that none of the feature maps that a decoder reads was found not finite.

        Raises:
            AfterimageError: one was; the message names source and image
        """
        self.loader.watch.check(decoder.name, decoder.feature_indices)

    def save(self, decoders: Sequence[DecoderTrainer]) -> None:
        """Write checkpoints of the decoders."""
        for decoder in decoders:
            if not decoder.failed:
                with self.context.isolate(decoder.run):
                    decoder.save()
        self._saved = time.monotonic()

    def _save_alone(self, decoders: Sequence[DecoderTrainer]) -> None:
        """Keep what can be kept when another rank is lost: nothing may be asked of the others any more."""
        for decoder in decoders if self.context.ranks.is_main_process else ():
            if decoder.between_steps and not decoder.failed:
                with contextlib.suppress(Exception):
                    decoder.save()


def _share_time(since: float, decoders: Sequence[DecoderTrainer]) -> float:
    """Divide the time since then between decoders; returns the time now."""
    now = time.monotonic()
    for decoder in decoders:
        decoder.epoch_seconds += (now - since) / len(decoders)
    return now


# The training step


def training_step(
    decoder: DecoderTrainer, features: Sequence[Tensor], images: Tensor, batch_size: int | None = None
) -> None:
    """Train one decoder on one batch: one optimizer step on the whole images, or one for each of its feature crops.

    Args:
        decoder: the decoder's training state; its model is in training mode (see `DecoderTrainer.begin_epoch`)
        features: feature maps of all sources, `(B, C, h, w)` each
        images: the images they were computed from, `(B, 3, H, W)` in [0, 1]
        batch_size: images of the whole batch, of which several ranks each have a part; None for `B`

    Raises:
        AfterimageError: the loss is not finite; raised at once on a CPU, and by `DecoderTrainer.end_epoch` on other
            devices, so that steps need not wait for the device
    """
    batch_size = len(images) if batch_size is None else batch_size
    own = decoder.select_features(features)
    # Crops depend on the position in the run alone, so that a run that is resumed draws the same.
    generator = torch.Generator().manual_seed((decoder.epoch << 32) + decoder.position)
    feature_crops = decoder.model.decoder.feature_crops(generator)
    for number, crop in enumerate(feature_crops):
        loss = _optimizer_step(decoder, own, images, batch_size, crop)
        decoder.total_loss += loss / len(feature_crops)
        decoder.between_steps = number == len(feature_crops) - 1
    decoder.note_single_values()
    decoder.position += batch_size


def _optimizer_step(
    decoder: DecoderTrainer, features: list[Tensor], images: Tensor, batch_size: int, crop: FeatureCrop | None
) -> Tensor:
    """Take one optimizer step; returns the loss summed over the whole batch's images.

    Where memory does not suffice, gradients are summed over micro-batches of half the size, and so on.
    """
    ranks, context = decoder.context.ranks, decoder.context
    largest_part = ranks.most(batch_size)
    wanted = min(decoder.micro_batch, largest_part)
    buffers = [buffer.clone() for buffer in decoder.model.buffers()]

    def undo() -> None:
        decoder.optimizer.zero_grad(set_to_none=True)
        for buffer, before in zip(decoder.model.buffers(), buffers, strict=True):
            buffer.copy_(before)

    def work(size: int) -> Tensor:
        if size < wanted:  # what the attempt that failed has left
            undo()
        with ranks.raise_on_all_ranks():
            parts = list(split_batch(features, images, size))
            if decoder.synchronises:  # batch norm needs every rank in every part
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
    """Add the gradients of some of the batch's images; returns the sum of their losses."""
    context = decoder.context
    if len(images) == 0:
        if decoder.synchronises:
            decoder.fabric.backward(decoder.trained(features, crop).sum())
        return decoder.total_loss.new_zeros(())
    with context.section("decoder forward"):
        loss = decoder.loss(decoder.trained(features, crop), decoder.model.decoder.cut(images, crop))
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
    """Sum gradients over ranks, and the loss, which is returned."""
    if decoder.context.ranks.count > 1:
        trainable = [p for p in decoder.model.parameters() if p.requires_grad]
        for parameter in trainable:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        decoder.context.ranks.sum([*(parameter.grad for parameter in trainable), loss])
    return loss
