"""The training loop: one pass through the encoders feeds every decoder that is trained on them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from afterimage.config import AfterimageError, RecipeConfig, RunConfig, split_source
from afterimage.data import Data, Pictures, load_data, order
from afterimage.evaluate import evaluate_together, score_notes, summarise
from afterimage.member import Member
from afterimage.metrics import Metrics
from afterimage.progress import Progress, silent
from afterimage.reconstructor import Encoders, Reconstructor, build_head
from afterimage.runs import Run, environment

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
        self, pictures: Pictures, indices: Tensor | None = None, **crop: Any
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
        """Closed forms first, then epochs until every member has had its number of them."""
        self.solve()
        while active := [member for member in self.members if member.active]:
            epoch = min(member.epoch for member in active)
            self.train_epoch(epoch, [member for member in active if member.epoch == epoch])

    def solve(self) -> None:
        """One pass over the training and the validation pictures for decoders with a closed form."""
        members = [m for m in self.members if m.head.decoder.closed_form and not m.restored and not m.failed]
        if not members:
            return
        started = time.monotonic()
        done, total = 0, len(self.data.train) + len(self.data.validation)
        for member in members:
            member.head.decoder.prepare(len(self.data.train), self.seed)
        for held_out, batches in ((False, self.training_batches(0)), (True, self.validation_batches())):
            for features, images in batches:
                for member in members:
                    member.head.accumulate(member.pick(features), images, validation=held_out)
                done += len(images)
                self.progress("fitting in closed form", done, total)
        shared = (time.monotonic() - started) / len(members)
        for member in members:
            with self.recorded(member):
                started = time.monotonic()
                member.notes += member.head.decoder.solve()
                member.seconds += shared + time.monotonic() - started
                member.pictures_seen += len(self.data.train)
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


def train_runs(
    configs: RunConfig | Sequence[RunConfig],
    root: str | Path = "runs",
    *,
    cache: Path | None = None,
    accelerator: str = "auto",
    progress: Progress = silent,
    keep: int = 8,
    failures: list[AfterimageError] | None = None,
) -> list[Run]:
    """Train every run that is not done yet; returns all of them, in the order asked for.

    Runs that share encoders, pictures, batches and seed are trained together on one pass. Each keeps its best
    decoder by validation loss, is measured on the test pictures, and stores `keep` of them. A run that fails is
    recorded with its error and the others go on; the errors are added to `failures`, or the first is raised at
    the end where no such list is given.
    """
    configs = [configs] if isinstance(configs, RunConfig) else list(configs)
    runs = {config.digest: Run.create(root, config) for config in configs}
    groups: dict[tuple, dict[str, RunConfig]] = {}
    for config in configs:
        if runs[config.digest].state == "done":
            progress(f"{config.name} is done already, nothing to do", 1, 1)
            continue
        models = frozenset(split_source(source)[0] for source in config.sources)
        recipe = replace(config.recipe, epochs=1, learning_rate=1, weight_decay=0, loss="mse")
        shared = (models, config.weights, config.data, config.seed, config.lpips, recipe)
        groups.setdefault(shared, {})[config.digest] = config
    collected: list[AfterimageError] = []
    for number, group in enumerate(groups.values(), 1):
        if len(groups) > 1:
            progress(f"group {number} of {len(groups)}: {', '.join(c.name for c in group.values())}", 1, 1)
        members = [(config, runs[config.digest]) for config in group.values()]
        try:
            _train_group(members, collected, cache, accelerator, progress, keep)
        except AfterimageError as error:
            collected.append(error)
            for _, run in members:
                if run.state != "done":
                    run.set_state("failed", error=str(error))
    if failures is not None:
        failures += collected
    elif collected:
        raise collected[0]
    return [runs[config.digest] for config in configs]


def _train_group(
    group: Sequence[tuple[RunConfig, Run]],
    failures: list[AfterimageError],
    cache: Path | None,
    accelerator: str,
    progress: Progress,
    keep: int,
) -> None:
    first = group[0][0]
    fabric = Fabric(accelerator=accelerator, devices=1, precision=first.recipe.precision)
    data = load_data(first.data, cache=cache, progress=progress)
    sources = list(dict.fromkeys(source for config, _ in group for source in config.sources))
    encoders = Encoders(sources, weights=first.weights, image_size=first.data.crop, seed=first.seed)
    encoders.to(fabric.device)
    for entry in encoders.weights_of(encoders.sources):
        progress(f"{entry['model']}: {entry['label'].upper()} weights from {entry['origin']} {entry['location']}", 1, 1)

    @contextlib.contextmanager
    def recorded(run: Run, member: Member | None = None) -> Iterator[None]:
        """An error ends one run, is written into its folder, and leaves the others alone."""
        try:
            yield
        except AfterimageError as error:
            failures.append(error)
            if member is not None:
                member.failed = True
            with contextlib.suppress(AfterimageError):
                run.set_state("failed", error=str(error))

    members: dict[Member, RunConfig] = {}
    for config, run in group:
        with recorded(run):
            picks = [encoders.sources.index(source) for source in config.sources]
            head = build_head(config, [encoders.specs[i] for i in picks])
            member = Member(head, picks, config.recipe, fabric, name=f"run {run.name}", run=run)
            run.set_state("running")
            run.save_environment(environment() | {"device": str(fabric.device), "threads": torch.get_num_threads()})
            if member.restore():
                progress(f"{run.name} goes on after epoch {member.epoch}", 1, 1)
            members[member] = config
    if not members:
        return
    Together(
        encoders,
        data,
        list(members),
        fabric,
        seed=first.seed,
        progress=progress,
        recorded=lambda member: recorded(member.run, member),
    ).train()

    finished = [member for member in members if member.best]
    for member in finished:
        member.head.load_state_dict(member.best)
        with recorded(member.run, member):
            member.save_best()
    metrics = Metrics(first.lpips, size=first.data.crop)

    def reconstruct(images: Tensor) -> list[Tensor]:
        with fabric.autocast():
            features = encoders(images)
        return [member.reconstruct(features) for member in finished]

    results = evaluate_together(
        reconstruct,
        data.test,
        metrics,
        names=[member.run.name for member in finished],
        batch_size=first.recipe.batch_size,
        device=fabric.device,
        progress=progress,
        keep=keep,
    )
    features = encoders(data.test.crops([0], device=fabric.device))
    for member, result in zip(finished, results, strict=True):
        with recorded(member.run, member):
            facts = _summary(member, members[member], encoders, features)
            facts |= {"data": data.describe(), "lpips": metrics.lpips_status, "scores": summarise(result.rows)}
            facts["notes"] = [*member.notes, *data.notes, *score_notes(result.rows)]
            member.run.save_result(facts, result.rows, result.pictures)
            if not member.failed:
                member.run.set_state("done")
                member.run.file("checkpoint.safetensors").unlink(missing_ok=True)


def _summary(member: Member, config: RunConfig, encoders: Encoders, features: list[Tensor]) -> dict[str, Any]:
    entries = encoders.describe()
    return {
        "kind": "decoder",
        "label": f"{' + '.join(config.sources)} · {config.decoder.name}",
        "sources": list(config.sources),
        "decoder": config.decoder.name,
        "reference": None,
        "fusion": None,
        "weights": encoders.weights_of([encoders.sources[i] for i in member.picks]),
        "features": [entries[i] for i in member.picks],
        "parameters": member.parameters,
        "macs": member.macs(features),
        "seed": config.seed,
        "loss": config.recipe.loss,
        "train_seconds": round(member.seconds, 2),
        "pictures_seen": member.pictures_seen,
        "epochs": member.epoch,
        "best_epoch": member.best_epoch,
        "best_validation_loss": member.best_loss,
        "batch_size": config.recipe.batch_size,
    }
