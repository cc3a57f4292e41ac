"""Run configurations become finished run folders: grouped, trained together, measured, written down."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor

from afterimage.config import AfterimageError, DataConfig, RunConfig, split_source, to_dict
from afterimage.data import Data, load_data
from afterimage.evaluate import evaluate_together, score_notes, summarise
from afterimage.member import Member
from afterimage.metrics import Metrics
from afterimage.progress import Progress, silent
from afterimage.reconstructor import Encoders, build_head
from afterimage.runs import Run, environment
from afterimage.train import Together


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
        recipe = replace(config.recipe, epochs=1, learning_rate=1.0, weight_decay=0.0, loss="mse")
        shared = (models, config.weights, config.data, config.seed, config.lpips, recipe)
        groups.setdefault(shared, {})[config.digest] = config
    collected: list[AfterimageError] = []
    # Groups mostly share their pictures, which are found, read and checked once.
    loaded: dict[DataConfig, Data] = {}
    for number, group in enumerate(groups.values(), 1):
        if len(groups) > 1:
            progress(f"group {number} of {len(groups)}: {', '.join(c.name for c in group.values())}", 1, 1)
        members = [(config, runs[config.digest]) for config in group.values()]
        try:
            data = members[0][0].data
            if data not in loaded:
                loaded[data] = load_data(data, cache=cache, progress=progress)
            _train_group(members, loaded[data], collected, accelerator, progress, keep)
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
    data: Data,
    failures: list[AfterimageError],
    accelerator: str,
    progress: Progress,
    keep: int,
) -> None:
    first = group[0][0]
    fabric = Fabric(accelerator=accelerator, devices=1, precision=first.recipe.precision)
    sources = list(dict.fromkeys(source for config, _ in group for source in config.sources))
    encoders = Encoders(sources, weights=first.weights, image_size=first.data.crop, seed=first.seed)
    encoders.to(fabric.device)
    for entry in encoders.weights_of(encoders.sources):
        progress(
            f"{entry['model']}: {entry['label'].upper()} weights from {entry['origin']} {entry['location']}",
            1,
            1,
        )

    metrics = Metrics(first.lpips, size=first.data.crop)

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
            run.save_environment(
                environment() | {"device": str(fabric.device), "threads": torch.get_num_threads()}
            )
            if member.restore():
                progress(f"{run.name} goes on after epoch {member.epoch}", 1, 1)
            members[member] = config
    if not members:
        return
    together = Together(
        encoders,
        data,
        list(members),
        fabric,
        seed=first.seed,
        progress=progress,
        recorded=lambda member: recorded(member.run, member),
    )

    def finish(finished: list[Member]) -> None:
        """Measure the members' best decoders on the test pictures and write down what they came to."""
        if not finished:
            return
        for member in finished:
            member.head.load_state_dict(member.best)
            with recorded(member.run, member):
                member.save_best()

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
                facts |= {"data": data.describe(), "lpips": metrics.lpips_status}
                facts |= {"scores": summarise(result.rows)}
                facts["notes"] = [*member.notes, *data.notes, *score_notes(result.rows)]
                member.run.save_result(facts, result.rows, result.pictures)
                if not member.failed:
                    member.run.set_state("done")
                    member.run.file("checkpoint.safetensors").unlink(missing_ok=True)

    together.solve()
    # What needs no epochs is written down before hours of training that may be stopped.
    early = [member for member in members if member.best and not member.active and not member.failed]
    finish(early)
    together.train_epochs()
    finish([member for member in members if member.best and member not in early])


def _summary(member: Member, config: RunConfig, encoders: Encoders, features: list[Tensor]) -> dict[str, Any]:
    entries = encoders.describe()
    return {
        "kind": "decoder",
        "label": f"{' + '.join(config.sources)} · {config.decoder.name}",
        "sources": list(config.sources),
        "decoder": config.decoder.name,
        "reference": None,
        "fusion": None if member.head.fusion is None else to_dict(config.fusion),
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
