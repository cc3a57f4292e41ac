"""The training loop: one pass through the encoders feeds every decoder that is trained on them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from afterimage.config import RecipeConfig
from afterimage.data import Data, Pictures, order
from afterimage.member import Member
from afterimage.progress import Progress, silent
from afterimage.reconstructor import Reconstructor

VALIDATION_BYTES = 1 << 30
"""Validation features are computed once and kept where they take no more memory than this."""

Recorder = Callable[[Member], contextlib.AbstractContextManager[None]]


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
    """
    recipe = recipe or RecipeConfig()
    fabric = Fabric(accelerator=accelerator, devices=1, precision=recipe.precision)
    reconstructor.to(fabric.device)
    member = Member(reconstructor.head, range(len(reconstructor.encoders.sources)), recipe, fabric)
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: member.best and member.head.load_state_dict(member.best))
        Together(reconstructor.encoders, data, [member], fabric, seed=seed, progress=progress).train()
    reconstructor.eval()
    return member.history


class Together:
    """Decoders that learn from the same pictures in the same order, through the same encoders.

    `recorded(member)` wraps what one member does; it may turn an error into a record and mark the member failed.
    """

    def __init__(
        self,
        encoders: nn.Module,
        data: Data,
        members: Sequence[Member],
        fabric: Fabric,
        *,
        seed: int,
        progress: Progress = silent,
        recorded: Recorder = lambda member: contextlib.nullcontext(),
    ) -> None:
        self.encoders, self.data, self.members, self.fabric = encoders, data, list(members), fabric
        self.seed, self.progress, self.recorded = seed, progress, recorded
        self.recipe = members[0].recipe
        self._kept: list[tuple[list[Tensor], Tensor]] | None = None

    @torch.no_grad()
    def batches(
        self, pictures: Pictures, indices: np.ndarray | Tensor | None = None, **crop: Any
    ) -> Iterator[tuple[list[Tensor], Tensor]]:
        """Features and pictures `(B, 3, H, W)`, batch by batch, on the device."""
        indices = torch.arange(len(pictures)) if indices is None else torch.as_tensor(indices)
        for chunk in indices.split(self.recipe.batch_size):
            images = pictures.crops(chunk, device=self.fabric.device, **crop)
            with self.fabric.autocast():
                features = self.encoders(images)
            yield features, images

    def training_batches(self, epoch: int) -> Iterator[tuple[list[Tensor], Tensor]]:
        """One epoch's batches: a pure function of seed and epoch, whatever else is trained beside or resumed."""
        indices = order(len(self.data.train), seed=self.seed, epoch=epoch)
        crop = {"seed": self.seed, "epoch": epoch} if self.recipe.augment else {}
        return self.batches(self.data.train, indices, **crop)

    def views(self, view: int) -> Iterator[tuple[list[Tensor], Tensor]]:
        """The training pictures for a closed form: centre crops as test pictures have, then random ones."""
        return self.batches(self.data.train) if view == 0 else self.training_batches(view - 1)

    def validation_batches(self) -> Iterator[tuple[list[Tensor], Tensor]]:
        """The validation pictures and their features, kept after the first pass where memory allows."""
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

    def validation_losses(self, members: Sequence[Member]) -> list[float]:
        sums = [0.0] * len(members)
        for features, images in self.validation_batches():
            for i, member in enumerate(members):
                sums[i] += member.validate(features, images)
        return [total / len(self.data.validation) for total in sums]

    def train(self) -> None:
        """Closed forms first, then the epochs."""
        self.solve()
        self.train_epochs()

    def train_epochs(self) -> None:
        """Epochs of gradient descent until every member has had its number of them."""
        while active := [member for member in self.members if member.active]:
            epoch = min(member.epoch for member in active)
            self.train_epoch(epoch, [member for member in active if member.epoch == epoch])

    def solve(self) -> None:
        """One pass over the training and the validation pictures for decoders with a closed form."""
        members = [m for m in self.members if m.head.decoder.closed_form and not m.restored and not m.failed]
        if not members:
            return
        started = time.monotonic()
        views = {m: m.head.decoder.prepare(len(self.data.train), self.seed) for m in members}
        passes = max(views.values())
        done, total = 0, passes * len(self.data.train) + len(self.data.validation)
        for view in range(passes + 1):
            held_out = view == passes
            for features, images in self.validation_batches() if held_out else self.views(view):
                for member in members:
                    if held_out or view < views[member]:
                        member.head.accumulate(member.pick(features), images, validation=held_out)
                done += len(images)
                self.progress("fitting in closed form", done, total)
        shared = (time.monotonic() - started) / len(members)
        for member in members:
            with self.recorded(member):
                started = time.monotonic()
                member.notes += member.head.decoder.solve()
                member.seconds += shared + time.monotonic() - started
                member.pictures_seen += views[member] * len(self.data.train)
                member.keep(self.validation_losses([member])[0])

    def train_epoch(self, epoch: int, members: list[Member]) -> None:
        """One epoch for `members`; its time is divided evenly between them, since they share the pass."""
        started, done, total = time.monotonic(), 0, len(self.data.train)
        last = max(member.recipe.epochs for member in members)
        for member in members:
            member.begin_epoch()
        for features, images in self.training_batches(epoch):
            for member in members:
                if not member.failed:
                    with self.recorded(member):
                        member.step(features, images)
            done += len(images)
            self.progress(
                "training",
                epoch * total + done,
                last * total,
                epoch=f"{epoch + 1}/{last}",
                loss=lambda: min(member.running_loss for member in members),
                pictures_per_second=done / (time.monotonic() - started),
            )
        members = [member for member in members if not member.failed]
        losses = self.validation_losses(members)
        seconds = (time.monotonic() - started) / max(1, len(members))
        for member, loss in zip(members, losses, strict=True):
            with self.recorded(member):
                member.end_epoch(loss, seconds)
