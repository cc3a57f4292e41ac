"""One decoder while it is trained: its optimizer and schedule, and what it has reached so far."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, ReduceLROnPlateau
from torch.utils.flop_counter import FlopCounterMode

from afterimage.checkpoint import (
    load_tensors,
    pack_optimizer,
    prefixed,
    save_tensors,
    unpack_optimizer,
    without_prefix,
)
from afterimage.config import AfterimageError, RecipeConfig
from afterimage.losses import create_loss
from afterimage.reconstructor import Head
from afterimage.runs import Run

PROGRESS = ("history", "notes", "best_loss", "best_epoch", "epoch", "seconds", "pictures_seen")


class Member:
    """A decoder in training beside others on the same features; `picks` says which features are its own.

    With a run it writes its history and a checkpoint there after every epoch.
    """

    def __init__(
        self,
        head: Head,
        picks: Sequence[int],
        recipe: RecipeConfig,
        fabric: Fabric,
        *,
        name: str = "decoder",
        run: Run | None = None,
    ) -> None:
        self.name, self.recipe, self.fabric, self.run = name, recipe, fabric, run
        self.picks = list(picks)
        self.head = head.to(fabric.device, memory_format=torch.channels_last)
        self.loss = create_loss(recipe.loss).to(fabric.device)
        self.history: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.best: dict[str, Tensor] = {}
        self.best_loss, self.best_epoch, self.epoch, self.seconds = math.inf, 0, 0, 0.0
        self.pictures_seen = self._seen = 0
        self.failed = self.restored = False
        self._total = torch.zeros((), device=fabric.device)
        trainable = [p for p in head.parameters() if p.requires_grad]
        if trainable:
            optimizer = torch.optim.Adam(trainable, recipe.learning_rate, weight_decay=recipe.weight_decay)
            self.trained, self.optimizer = fabric.setup(self.head, optimizer)
            self.scheduler = _scheduler(optimizer, recipe)
        else:
            self.trained, self.optimizer, self.scheduler = self.head, None, None

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.head.parameters())

    @property
    def active(self) -> bool:
        """Whether there are epochs left to train."""
        return not self.failed and self.optimizer is not None and self.epoch < self.recipe.epochs

    @property
    def running_loss(self) -> float:
        """The mean loss of the epoch so far; asking waits for the device."""
        return float(self._total) / max(1, self._seen)

    @property
    def best_text(self) -> str:
        return f"epoch {self.best_epoch}, validation loss {self.best_loss:.6f}" if self.best else "none yet"

    def pick(self, features: Sequence[Tensor]) -> list[Tensor]:
        return [features[i] for i in self.picks]

    def begin_epoch(self) -> None:
        self.head.train()
        self._total.zero_()
        self._seen = 0

    def step(self, features: Sequence[Tensor], images: Tensor) -> None:
        """One optimizer step on the features of `images`, both already on the device.

        Raises `AfterimageError` for a loss that is not finite: at once on a CPU, where asking is free; on other
        devices `end_epoch` does, so that steps need not wait.
        """
        loss = self.loss(self.trained(self.pick(features)), images)
        if loss.device.type == "cpu" and not math.isfinite(loss.item()):
            raise AfterimageError(
                f"{self.name}: the loss is {loss.item()} in epoch {self.epoch + 1}, step "
                f"{self._seen // self.recipe.batch_size + 1}; the best decoder so far ({self.best_text}) is kept. "
                "A lower learning_rate may help."
            )
        self.fabric.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._total += loss.detach() * len(images)
        self._seen += len(images)

    @torch.no_grad()
    def validate(self, features: Sequence[Tensor], images: Tensor) -> float:
        """The loss summed over the pictures of one validation batch."""
        self.head.eval()
        return float(self.loss(self.trained(self.pick(features)), images)) * len(images)

    def end_epoch(self, validation_loss: float, seconds: float) -> None:
        """Note an epoch, keep the decoder if it is the best, move the schedule, write a checkpoint."""
        train_loss = self.running_loss
        if not (math.isfinite(train_loss) and math.isfinite(validation_loss)):
            raise AfterimageError(
                f"{self.name}: the loss is not finite in epoch {self.epoch + 1} (training {train_loss}, validation "
                f"{validation_loss}); the best decoder so far ({self.best_text}) is kept"
            )
        self.epoch += 1
        self.seconds += seconds
        self.pictures_seen += self._seen
        self.history.append(
            {
                "epoch": self.epoch,
                "train_loss": train_loss,
                "validation_loss": validation_loss,
                "learning_rate": self.optimizer.param_groups[0]["lr"],
                "seconds": round(seconds, 3),
                "pictures_per_second": round(self._seen / max(seconds, 1e-9), 2),
            }
        )
        if validation_loss < self.best_loss:
            self.keep(validation_loss)
        self.scheduler.step(*([validation_loss] if self.recipe.scheduler == "plateau" else []))
        self.save()

    def keep(self, validation_loss: float) -> None:
        """Remember the decoder as it is now as the best one."""
        self.best = {name: tensor.detach().clone() for name, tensor in self.head.state_dict().items()}
        self.best_loss, self.best_epoch = validation_loss, self.epoch

    def save(self) -> None:
        """Write the checkpoint that `restore` goes on from."""
        if self.run is None or self.optimizer is None:
            return
        tensors, facts = pack_optimizer(self.optimizer.optimizer)
        tensors = (
            prefixed("optimizer", tensors)
            | prefixed("head", self.head.state_dict())
            | prefixed("best", self.best)
        )
        facts |= {name: getattr(self, name) for name in PROGRESS} | {"scheduler": self.scheduler.state_dict()}
        save_tensors(self.run.file("checkpoint.safetensors"), tensors, facts)
        self.run.save_history(self.history)

    def save_best(self) -> None:
        save_tensors(self.run.file("decoder.safetensors"), self.best)

    def restore(self) -> bool:
        """Go on from the run's checkpoint; False where there is none."""
        if self.run is None or self.optimizer is None or not self.run.file("checkpoint.safetensors").exists():
            return False
        tensors, facts = load_tensors(self.run.file("checkpoint.safetensors"))
        self.head.load_state_dict(without_prefix("head", tensors))
        self.best = {
            k: tensor.to(self.fabric.device) for k, tensor in without_prefix("best", tensors).items()
        }
        unpack_optimizer(self.optimizer.optimizer, without_prefix("optimizer", tensors), facts)
        self.scheduler.load_state_dict(facts["scheduler"])
        for name in PROGRESS:
            setattr(self, name, facts[name])
        self.restored = True
        return True

    @torch.inference_mode()
    def reconstruct(self, features: Sequence[Tensor]) -> Tensor:
        """Pictures `(B, 3, H, W)` in [0, 1] from the features of all encoders."""
        self.head.eval()
        with self.fabric.autocast():
            return self.head(self.pick(features)).float()

    @torch.no_grad()
    def macs(self, features: Sequence[Tensor]) -> int:
        """Multiply-adds of fusion and decoder for one picture, counted on the features of one picture."""
        self.head.eval()
        with FlopCounterMode(display=False) as counter:
            self.head(self.pick(features))
        return counter.get_total_flops() // 2


def _scheduler(optimizer: torch.optim.Optimizer, recipe: RecipeConfig) -> Any:
    if recipe.scheduler == "plateau":
        return ReduceLROnPlateau(optimizer, factor=recipe.plateau_factor, patience=recipe.plateau_patience)
    if recipe.scheduler == "cosine":
        return CosineAnnealingLR(optimizer, T_max=recipe.epochs)
    return LambdaLR(optimizer, lambda epoch: 1.0)
