"""The images that are to be inverted: test images of a source, or files of one's own."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import save
from torch import Tensor

from afterimage.analysis.inversion.invert import Inversion, Snapshot, differentiable, invert, refine
from afterimage.analysis.inversion.parametrizations import HELD_OUT, PARAMETRISATIONS, error_spectrum
from afterimage.config import AfterimageError, DataConfig, load_toml, shown
from afterimage.config.inversion import InversionConfig, InvertConfig
from afterimage.data.dataset import file_notes, load_data, prepare_image
from afterimage.data.images import ImageSet
from afterimage.evaluation.evaluate import (
    Reconstructed,
    evaluate,
    evaluate_together,
    score_notes,
    summarise,
    to_uint8,
)
from afterimage.evaluation.metrics import Metrics, psnr
from afterimage.models.reconstructor import MultiEncoder, Reconstructor
from afterimage.models.weights import weight_notes
from afterimage.runs.environment import environment
from afterimage.runs.files import sha256, write_atomic, write_csv, write_image
from afterimage.runs.results import DataFacts, DecoderAlone, InversionFacts, Result, Score
from afterimage.runs.run import Run
from afterimage.runtime.progress import Progress, silent
from afterimage.training.checkpoint import load_reconstructor, load_tensors, plain


@dataclass(frozen=True)
class InversionInputs:
    """Images, what a summary says of them, and those that a decoder's errors may be learnt from (None: no such)."""

    images: ImageSet
    config: DataConfig
    facts: DataFacts
    notes: tuple[str, ...] = ()
    validation: ImageSet | None = None


def from_data(
    config: DataConfig, *, cache: Path | None = None, progress: Progress = silent
) -> InversionInputs:
    """The test images of a data configuration; raises as `load_data` does."""
    data = load_data(config, cache=cache, progress=progress)
    return InversionInputs(data.test, config, data.describe(), data.notes, data.validation)


def from_files(paths: Sequence[Path], *, resize: int = 256, crop: int = 224) -> InversionInputs:
    """Image files, prepared as test images are: shorter side to `resize`, centre crop.

    Raises `AfterimageError` that names the file where one is no image, or is given twice.
    """
    names = [shown(path) for path in paths]
    if twice := {name for name in names if names.count(name) > 1}:
        raise AfterimageError(f"given twice: {', '.join(sorted(twice))}")
    crops = torch.cat([prepare_image(path, resize, crop) for path in paths])
    digest = hashlib.sha256("".join(sha256(path) for path in paths).encode()).hexdigest()
    config = DataConfig(source="files:" + digest[:16], resize=resize, crop=crop)
    facts = DataFacts("files", "", digest, digest, len(paths), resize, crop)
    return InversionInputs(_Files(names, crops), config, facts, tuple(file_notes(paths, resize)))


class _Files(ImageSet):
    """Crops that are held in memory, `(N, 3, crop, crop)` in [0, 1]."""

    def __init__(self, ids: Sequence[str], crops: Tensor) -> None:
        self.ids, self._crops, self.crop = list(ids), crops, crops.shape[-1]

    def __len__(self) -> int:
        return len(self.ids)

    def crops(self, indices: Any, *, device: str | torch.device = "cpu", **_: Any) -> Tensor:
        return self._crops[torch.as_tensor(indices)].to(device)


Curve = list[dict[str, Any]]


class Batches:
    """Files in `folder`, one a batch; `made_for` says of what they are, besides their images.

    One that was made for anything else, or is damaged, is as if it were not there.
    """

    def __init__(self, folder: Path, made_for: Any) -> None:
        self.folder, self.made_for = folder, json.dumps([made_for, torch.__version__], sort_keys=True)

    def load(self, first: int, images: Tensor) -> tuple[Inversion, Curve] | None:
        """What the batch whose first image has the number `first` came to, and its curve."""
        try:
            tensors, metadata = load_tensors(self._path(first))
            if metadata["key"] != self._key(images):
                return None
            facts = json.loads(metadata["facts"])
            return Inversion(
                tensors["images"].to(images.device), tensors["loss"].to(images.device), facts["seconds"]
            ), facts["curve"]
        except (AfterimageError, KeyError, ValueError):
            return None

    def save(self, first: int, images: Tensor, result: Inversion, curve: Curve) -> None:
        tensors = plain({"images": result.images, "loss": result.loss})
        facts = json.dumps({"seconds": result.seconds, "curve": curve})
        write_atomic(self._path(first), save(tensors, {"key": self._key(images), "facts": facts}))

    def clear(self) -> None:
        for path in self.folder.glob("batch-*.safetensors"):
            path.unlink()

    def _path(self, first: int) -> Path:
        return self.folder / f"batch-{first:06}.safetensors"

    def _key(self, images: Tensor) -> str:
        pixels = images.detach().cpu().contiguous().numpy().tobytes()
        return hashlib.sha256(self.made_for.encode() + pixels).hexdigest()


Images = Float[Tensor, "batch 3 height width"]

BATCH = 4


def curve_steps(steps: int) -> list[int]:
    """Where a saturation curve is measured: about six times a doubling of the passes, the last included."""
    return sorted(
        {max(1, round(2 ** (i / 3))) for i in range(3 * steps.bit_length())} & set(range(steps)) | {steps}
    )


@dataclass
class Measured:
    """What one way of inverting came to: rows and curve by image, seconds an image without the measuring."""

    rows: list[dict[str, Any]]
    images: list[tuple[str, Any, Any]]
    seconds: float
    curve: list[dict[str, Any]] = field(default_factory=list)


def measure(
    search: Callable[..., Inversion],
    image_set: ImageSet,
    metrics: Metrics,
    steps: int,
    *,
    batch_size: int = BATCH,
    device: str = "cpu",
    progress: Progress = silent,
    snapshot: Callable[[Images], None] | None = None,
    batches: Batches | None = None,
) -> Measured:
    """Search for every image, then score what was found, and the way there.

    Args:
        search: is called as `search(images, callback=, milestones=, progress=)`, a batch at a time.
        image_set: the images whose features are inverted.
        metrics: what is measured of the images found.
        steps: how many passes a search takes.
        batch_size: images at a time.
        device: where.
        progress: is told how far each search is, and then how many images have been measured.
        snapshot: is given the images so far at every milestone.
        batches: keeps finished batches, and gives back those that it has.
    """
    parts = torch.arange(len(image_set)).split(batch_size)
    curve: Curve = []
    losses: list[float] = []
    found: list[Tensor] = []
    seconds = 0.0
    for indices in parts:
        images = image_set.crops(indices, device=device)
        first = int(indices[0])
        kept = batches.load(first, images) if batches else None
        if kept is None:
            ids, own = [image_set.ids[index] for index in indices.tolist()], []

            def callback(look: Snapshot, ids=ids, images=images, own=own) -> None:
                own += _curve_rows(ids, images, look)
                if snapshot is not None:
                    snapshot(look.images)

            result = search(images, callback=callback, milestones=curve_steps(steps), progress=progress)
            if batches:
                batches.save(first, images, result, own)
        else:
            result, own = kept
        curve += own
        seconds += result.seconds
        losses += result.loss.tolist()
        # In one order of memory, whether it was kept or not: sums depend on it.
        found.append(result.images.contiguous().cpu())

    def reconstructions() -> Iterator[Reconstructed]:
        for indices, images in zip(parts, found, strict=True):
            yield indices, image_set.crops(indices, device=device), [images.to(device)]

    (scored,) = evaluate_together(
        reconstructions(), image_set.ids, metrics, progress=progress, keep=len(image_set)
    )
    rows = [row | {"feature_loss": loss} for row, loss in zip(scored.rows, losses, strict=True)]
    return Measured(rows, scored.images, seconds / len(image_set), curve)


def _curve_rows(ids: Sequence[str], images: Images, look: Snapshot) -> Curve:
    """A row an image: how near it is after so many passes, in PSNR and in its features."""
    values = zip(ids, psnr(look.images, images).tolist(), look.loss.tolist(), strict=True)
    return [
        {
            "id": name,
            "step": look.step,
            "seconds": look.seconds / len(images),
            "psnr": value,
            "feature_loss": loss,
        }
        for name, value, loss in values
    ]


def invert_run(
    run: Run,
    root: Path,
    method: InvertConfig,
    given: InversionInputs,
    *,
    plain: bool = True,
    weights: str | None = None,
    seed: int = 0,
    lpips: str | None = None,
    device: str = "cpu",
    progress: Progress = silent,
) -> list[Run]:
    """Refine what a finished run's decoder makes of images, and with `plain` invert the same from grey too.

    Each becomes a run folder below `root` (see `_make`); one that is done is not made again. Where the
    method is `fourier` and there are validation images, the decoder's errors are learnt from the first `HELD_OUT`
    of them. Plain inversion knows no images and no decoder. `lpips` is by default the network that the run was
    measured with. Raises `AfterimageError` as `load_reconstructor` and `invert` do.
    """
    sources, where = run.config.sources, weights or run.config.weights
    lpips = lpips or run.lpips_net
    wanted = [("refined", run.name), *([("inversion", "")] if plain else [])]
    made = {
        kind: Run.create(root, InversionConfig(sources, where, start, method, given.config, seed, lpips))
        for kind, start in wanted
    }
    missing = [kind for kind, folder in made.items() if folder.state != "done"]
    if not missing:
        return list(made.values())
    reconstructor = load_reconstructor(run, weights=weights).to(device)
    metrics = Metrics(lpips, size=given.config.crop)
    options: dict[str, Any] = {"metrics": metrics, "seed": seed, "device": device, "progress": progress}
    if "refined" in missing:
        spectrum, note = _spectrum(reconstructor, method, given, device)

        def search(images: Images, **more: Any) -> Inversion:
            return refine(reconstructor, images, method=method, spectrum=spectrum, seed=seed, **more)

        started = time.monotonic()
        alone = evaluate(reconstructor, given.images, metrics, batch_size=BATCH, device=device)
        # Measuring the scores is in it: an upper bound, and small beside what inversion takes.
        seconds = (time.monotonic() - started) / len(given.images)
        start = _Start(run, summarise(alone.rows), seconds)
        _make(made["refined"], reconstructor.encoders, search, given, note, start, **options)
    if "inversion" in missing:
        invert_sources(made["inversion"], reconstructor.encoders, method, given, **options)
    return list(made.values())


def invert_sources(
    folder: Run,
    encoders: MultiEncoder,
    method: InvertConfig,
    given: InversionInputs,
    *,
    seed: int,
    **options: Any,
) -> None:
    """Invert images from grey through all sources of `encoders` at once, into a run folder."""
    _make(folder, encoders, plain_search(encoders, method, seed), given, [], None, seed=seed, **options)


def _spectrum(
    reconstructor: Reconstructor, method: InvertConfig, given: InversionInputs, device: str
) -> tuple[Tensor | None, list[str]]:
    if not PARAMETRISATIONS[method.method].takes_spectrum:
        return None, []
    if given.validation is None:
        return None, ["the spectrum of natural images stands for the decoder's errors: no validation images"]
    count = min(HELD_OUT, len(given.validation))
    batches = (given.validation.crops(batch, device=device) for batch in torch.arange(count).split(BATCH))
    errors = (images - reconstructor(images) for images in batches)
    note = f"the spectrum of the decoder's errors is learnt from {count} validation images"
    return error_spectrum(errors), [note]


@dataclass(frozen=True)
class _Start:
    """The run whose decoder made the start, and what that decoder alone came to on the same images."""

    run: Run
    scores: Mapping[str, Score | None]
    seconds: float


def _make(
    folder: Run,
    encoders: MultiEncoder,
    search: Callable[..., Inversion],
    given: InversionInputs,
    notes: Sequence[str],
    start: _Start | None,
    *,
    metrics: Metrics,
    seed: int,
    device: str,
    progress: Progress,
) -> None:
    """Search, measure, and write the folder as any run's, and curve.csv, PSNR and feature loss by image and pass."""
    config = load_toml(InversionConfig, folder.file("config.toml"))
    steps, weights = config.inversion.steps, encoders.weights_of(encoders.sources)
    digest = sha256(start.run.file("decoder.safetensors")) if start else ""

    def snapshot(images: Images) -> None:
        write_image(folder.file("progress.png"), np.concatenate(list(to_uint8(images)), axis=1))

    made_for = [*map(asdict, weights), start.run.name if start else "", digest, asdict(given.facts)]
    batches = Batches(folder.path, made_for)
    measured = measure(
        search, given.images, metrics, steps, device=device, progress=progress, snapshot=snapshot, batches=batches
    )  # fmt: skip
    took = f"{steps} passes an inversion, {measured.seconds:.1f} s an image"
    before = [row["feature_loss"] for row in measured.curve if row["step"] == 0]
    facts = InversionFacts(
        steps=steps,
        seconds_per_image=measured.seconds,
        feature_loss=sum(row["feature_loss"] for row in measured.rows) / len(measured.rows),
        start=start.run.name if start else "",
        start_decoder=start.run.config.decoder.name if start else "",
        start_sha256=digest,
        decoder_alone=start and DecoderAlone(start.scores, start.seconds, sum(before) / len(before)),
    )
    name = f"{facts.start_decoder} + refined" if start else "inversion"
    found = Result(
        kind="inversion",
        label=f"{' + '.join(config.sources)} · {name}",
        config=config,
        data=given.facts,
        lpips=metrics.lpips_status,
        scores=summarise(measured.rows),
        per_image=tuple(measured.rows),
        features=tuple(encoders.describe()),
        weights=tuple(weights),
        inversion=facts,
        notes=(took, *weight_notes(weights), *notes, *given.notes, *score_notes(measured.rows)),
    )
    folder.save_environment(environment() | {"device": device, "threads": torch.get_num_threads()})
    write_csv(folder.file("curve.csv"), measured.curve)
    folder.save_result(found, measured.images)
    folder.set_state("done")
    batches.clear()


def plain_search(encoders: MultiEncoder, method: InvertConfig, seed: int) -> Callable[..., Inversion]:
    """Inversion from grey, as `measure` takes it."""

    def search(images: Images, **options: Any) -> Inversion:
        with torch.no_grad():
            targets = [target.clone() for target in encoders(images)]
        with differentiable(encoders) as features_of:
            return invert(features_of, targets, tuple(images.shape[-2:]), method=method, seed=seed, **options)

    return search
