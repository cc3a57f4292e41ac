"""The training state of one decoder: optimizer, schedule, history, best weights, checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, ReduceLROnPlateau

from afterimage.config import AfterimageError, RecipeConfig, printable_path
from afterimage.models.layers.blocks import adapt_batch_norms
from afterimage.models.reconstructor import FeatureDecoder
from afterimage.models.weight_files import save_decoder
from afterimage.runs.run import Run
from afterimage.runtime.device import Result, retry_with_smaller_batch
from afterimage.training.checkpoint import (
    load_checkpoint,
    pack_optimizer,
    prefixed,
    save_checkpoint,
    unpack_optimizer,
    without_prefix,
)
from afterimage.training.feature_loader import RunContext
from afterimage.training.losses import create_loss

CHECKPOINT_ATTRIBUTES = (
    "history", "notes", "best_loss", "best_epoch", "epoch", "position", "seconds", "epoch_seconds", "images_seen",
    "micro_batch",
)  # fmt: skip
"""Attributes of `DecoderTrainer` that a checkpoint stores besides tensors. No random state is needed: order, crops and
flips are functions of seed, epoch and image, which a test checks for every decoder.
"""
SINGLE_VALUE_NOTE = (
    "a batch had a single value per channel (one image on 1x1 maps): batch norm normalised it by its running "
    "statistics, which it left as they were"
)


class DecoderTrainer:
    """The training state of one decoder: optimizer and schedule, best weights so far, history and checkpoints.

    If several ranks train together, all have the same state and the main process writes it.

    Args:
        model: the decoder, with its fusion if it reads several feature maps
        feature_indices: indices of its feature maps among those of the loader
        fabric: device and precision of its computations
        name: its name in messages
        run: run whose folder receives history and checkpoints; None writes nothing
        identity: facts by name that must match those of a checkpoint to resume it, such as digests of the images and of
            the encoders' weights; the decoder's file records `sources`, `weights` and `code`
    """

    def __init__(
        self,
        model: FeatureDecoder,
        feature_indices: Sequence[int],
        recipe: RecipeConfig,
        fabric: Fabric,
        *,
        name: str = "decoder",
        run: Run | None = None,
        identity: Mapping[str, Any] | None = None,
        context: RunContext | None = None,
    ) -> None:
        self.name, self.recipe, self.fabric, self.run = name, recipe, fabric, run
        self.identity, self.context = dict(identity or {}), context or RunContext()
        self.feature_indices = list(feature_indices)
        self._norms = adapt_batch_norms(model, self.context.ranks)
        self.synchronises = self.context.ranks.world_size > 1 and bool(self._norms)
        self.model = model.to(fabric.device)
        if model.decoder.channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.loss = create_loss(recipe.loss).to(fabric.device)
        self.history: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.best: dict[str, Tensor] = {}
        self.best_loss, self.best_epoch, self.epoch, self.seconds = math.inf, 0, 0, 0.0
        self.epoch_seconds = 0.0
        self.images_seen = self.position = 0  # images in all completed epochs, and in the current epoch
        self.micro_batch = self._evaluation_batch = recipe.batch_size
        self.restored = False
        self.between_steps = True
        """False while a training step is incomplete; training can resume only from a state between steps."""
        self.total_loss = torch.zeros((), device=fabric.device)
        """Sum of the losses of the epoch's images so far."""
        if model.trainable:
            optimizer = create_optimizer(model, recipe)
            self.fabric_model, self.optimizer = fabric.setup(self.model, optimizer)
            self.scheduler = _scheduler(optimizer, recipe)
        else:
            self.fabric_model, self.optimizer, self.scheduler = self.model, None, None
        self.broadcast_weights()

    def broadcast_weights(self) -> None:
        """Copy the main process's decoder to all ranks, since other machines may round differently."""
        if self.context.ranks.world_size > 1:
            state = {name: tensor.cpu() for name, tensor in self.model.state_dict().items()}
            self.model.load_state_dict(self.context.ranks.broadcast(state))

    @property
    def parameters(self) -> int:
        """Number of parameters of fusion and decoder."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def failed(self) -> bool:
        """True if an error ended the training of this decoder and was recorded."""
        return self.run in self.context.failed_runs

    @property
    def active(self) -> bool:
        """True if epochs are left to train."""
        return not self.failed and self.optimizer is not None and self.epoch < self.recipe.epochs

    @property
    def running_loss(self) -> float:
        """Mean training loss of the epoch so far; reading it waits for the device."""
        return float(self.total_loss) / max(1, self.position)

    @property
    def best_text(self) -> str:
        """Best epoch and its validation loss, as text for messages."""
        return f"epoch {self.best_epoch}, validation loss {self.best_loss:.6f}" if self.best else "none yet"

    def select_features(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return the feature maps that this decoder reads, out of those of all sources."""
        return [features[i] for i in self.feature_indices]

    def shrink_micro_batch(self, size: int) -> None:
        """Sum gradients over micro-batches of `size` images from now on; add this to the notes."""
        self.micro_batch = size
        note = f"out of memory: gradients are summed over micro-batches of {size}, the same mathematics"
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in self.model.modules()):
            note += f" except that batch norm sees {size * self.context.ranks.world_size} images at a time"
        self.notes.append(f"{note}; from epoch {self.epoch + 1} on")
        self.context.log(f"{self.name}: {note}")

    def note_single_values(self) -> None:
        """Add a note, once, if batch norm met a batch with a single value per channel."""
        if any(norm.met_single for norm in self._norms) and not any(
            SINGLE_VALUE_NOTE in note for note in self.notes
        ):
            self.notes.append(f"{SINGLE_VALUE_NOTE}, first in epoch {self.epoch + 1}")
            self.context.log(f"{self.name}: {SINGLE_VALUE_NOTE}")

    @torch.no_grad()
    def validate(self, features: Sequence[Tensor], images: Tensor) -> float:
        """Return the loss summed over the images of a validation batch, which may be empty."""
        self.model.eval()
        if len(images) == 0:
            return 0.0

        def work(size: int) -> float:
            parts = split_batch(self.select_features(features), images, size)
            return sum(float(self.loss(self.fabric_model(maps), part)) * len(part) for maps, part in parts)

        return self._without_gradients(work)

    def end_epoch(self, validation_loss: float) -> None:
        """Record an epoch in the history, store the weights if they are best, step the scheduler, save a checkpoint.

        Raises:
            AfterimageError: the training or the validation loss is not finite
        """
        train_loss = self.running_loss
        if not (math.isfinite(train_loss) and math.isfinite(validation_loss)):
            raise AfterimageError(
                f"{self.name}: the loss is not finite in epoch {self.epoch + 1} (training {train_loss}, validation "
                f"{validation_loss}); the best decoder so far ({self.best_text}) is kept"
            )
        self.epoch += 1
        self.seconds += self.epoch_seconds
        self.images_seen += self.position
        self.history.append(
            {
                "epoch": self.epoch,
                "train_loss": train_loss,
                "validation_loss": validation_loss,
                "learning_rate": self.optimizer.param_groups[0]["lr"],
                "seconds": round(self.epoch_seconds, 3),
                "images_per_second": round(self.position / max(self.epoch_seconds, 1e-9), 2),
            }
        )
        self.position, self.epoch_seconds = 0, 0.0
        self.total_loss.zero_()
        if validation_loss < self.best_loss:
            self.store_best(validation_loss)
        self.scheduler.step(*([validation_loss] if self.recipe.scheduler == "plateau" else []))
        self.save()

    def store_best(self, validation_loss: float) -> None:
        """Store a copy of the current weights as the best ones."""
        self.best = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
        self.best_loss, self.best_epoch = validation_loss, self.epoch

    def save(self) -> None:
        """Write a checkpoint for `restore`, and the history; only the main process writes."""
        if self.run is None or not self.context.ranks.is_main_process:
            return
        self.context.check_lock(self.run)
        tensors = (
            prefixed("model", self.model.state_dict())
            | prefixed("best", self.best)
            | {"total": self.total_loss}
        )
        facts = {name: getattr(self, name) for name in CHECKPOINT_ATTRIBUTES}
        facts |= {
            "identity": self.identity,
            "torch": torch.__version__,
            "ranks": self.context.ranks.world_size,
        }
        if self.optimizer is not None:
            moments, groups = pack_optimizer(self.optimizer.optimizer)
            tensors |= prefixed("optimizer", moments)
            facts |= groups | {"scheduler": self.scheduler.state_dict()}
            facts["precision"] = self.fabric.strategy.precision.state_dict()
        save_checkpoint(self.run, tensors, facts)
        if self.history:
            self.run.save_history(self.history)

    def save_best(self) -> None:
        """Write the best decoder to the run's `decoder.safetensors`, and the history."""
        self.context.check_lock(self.run)
        made_for = {key: self.identity[key] for key in ("sources", "weights", "code") if key in self.identity}
        save_decoder(self.run.file("decoder.safetensors"), self.best, made_for)
        if self.history:
            self.run.save_history(self.history)

    def restore(self) -> bool:
        """Restore the state from the run's checkpoint.

        Returns:
            True if a checkpoint was restored; the reason why one cannot be used is logged

        Raises:
            AfterimageError: the checkpoint does not fit the decoder
        """
        found = None
        if self.run is not None and self.context.ranks.is_main_process:
            found = load_checkpoint(self.run, self.context.log)
        if found := self.context.ranks.broadcast(found):
            tensors, facts = found
            made_on = facts["identity"]
            changed = [key for key in self.identity if made_on.get(key) != self.identity[key]]
            if changed:
                self.context.log(
                    f"{self.name}: starts over, since a checkpoint was made on other {', '.join(changed)}"
                )
                return False
            try:
                self._restore(tensors, facts)
            except (RuntimeError, KeyError, ValueError) as error:
                raise AfterimageError(
                    f"{self.name}: its checkpoint does not fit ({error!s:.200}); delete the folder "
                    f"{printable_path(self.run.path)} to start over"
                ) from None
            return True
        return False

    def _restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        self.model.load_state_dict(without_prefix("model", tensors))
        self.best = {
            name: tensor.to(self.fabric.device) for name, tensor in without_prefix("best", tensors).items()
        }
        self.total_loss.copy_(tensors["total"])
        if self.optimizer is not None:
            unpack_optimizer(self.optimizer.optimizer, without_prefix("optimizer", tensors), facts)
            self.scheduler.load_state_dict(facts["scheduler"])
            self.fabric.strategy.precision.load_state_dict(facts["precision"])
        for name in CHECKPOINT_ATTRIBUTES:
            setattr(self, name, facts[name])
        if (before := facts.get("ranks", 1)) != self.context.ranks.world_size:
            self.notes.append(
                f"resumed with {self.context.ranks.world_size} instead of {before} processes in epoch "
                f"{self.epoch + 1}, which rounds sums in another order"
            )
        if facts["torch"] != torch.__version__:
            self.notes.append(
                f"resumed under PyTorch {torch.__version__} after {facts['torch']} in epoch {self.epoch + 1}"
            )
        self.restored = True

    @torch.inference_mode()
    def reconstruct(self, features: Sequence[Tensor]) -> Tensor:
        """Decode the feature maps `(B, C, h, w)` of all sources into images `(B, 3, H, W)` in [0, 1]."""
        self.model.eval()
        picked = self.select_features(features)
        if len(picked[0]) == 0:
            return picked[0].new_zeros(0, 3, *self.model.decoder.image_size)

        def work(size: int) -> Tensor:
            with self.fabric.autocast():
                parts = zip(*(maps.split(size) for maps in picked), strict=True)
                return torch.cat([self.model(list(part)).float() for part in parts])

        return self._without_gradients(work)

    def _without_gradients(self, work: Callable[[int], Result]) -> Result:
        """Call `work` with the number of images to process at a time, with a smaller one if memory runs out."""
        result, size = retry_with_smaller_batch(work, self._evaluation_batch, self.name)
        if size < self._evaluation_batch:
            self._evaluation_batch = size
            self.context.log(f"{self.name}: out of memory: it is measured on {size} images at a time")
        return result


def split_batch(
    features: Sequence[Tensor], images: Tensor, size: int
) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Yield a batch in parts of at most `size` images."""
    if len(images) <= size:
        yield list(features), images
        return
    for maps, part in zip(
        zip(*(f.split(size) for f in features), strict=True), images.split(size), strict=True
    ):
        yield list(maps), part


def create_optimizer(model: FeatureDecoder, recipe: RecipeConfig) -> torch.optim.Adam:
    """Create Adam for the trainable parameters; without weight decay unless the decoder `uses_weight_decay`."""
    spared = set() if model.decoder.uses_weight_decay else set(model.decoder.parameters())
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p not in spared], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trained if p in spared], "weight_decay": 0.0},
    ]
    return torch.optim.Adam([g for g in groups if g["params"]], recipe.learning_rate, fused=True)


def _scheduler(optimizer: torch.optim.Optimizer, recipe: RecipeConfig) -> Any:
    if recipe.scheduler == "plateau":
        return ReduceLROnPlateau(optimizer, factor=recipe.plateau_factor, patience=recipe.plateau_patience)
    if recipe.scheduler == "cosine":
        return CosineAnnealingLR(optimizer, T_max=recipe.epochs)
    return LambdaLR(optimizer, lambda epoch: 1.0)
