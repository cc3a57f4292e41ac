"""Invert features from a finished run's reconstructions or from grey; each answer becomes a run folder."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from afterimage.analysis.inversion.batches import Batches
from afterimage.analysis.inversion.best_estimate import learning_steps
from afterimage.analysis.inversion.honesty import bound_controls, mean_features
from afterimage.analysis.inversion.inputs import InversionInputs
from afterimage.analysis.inversion.invert import (
    Inversion,
    encode,
)
from afterimage.analysis.inversion.measure import BATCH, measure
from afterimage.analysis.inversion.objective import feature_distance
from afterimage.analysis.inversion.refinement import (
    BestEstimate,
    Refinement,
    choose_passes,
    decoder_errors,
    learn_from,
    plain_search,
    with_passes,
)
from afterimage.config import AfterimageError, counted, load_toml
from afterimage.config.inversion import (
    HELD_OUT,
    EstimateConfig,
    InversionConfig,
    InvertConfig,
    error_images,
)
from afterimage.data.images import ImageSet
from afterimage.evaluation.evaluate import evaluate, score_notes, summarise, to_uint8
from afterimage.evaluation.metrics import Metrics
from afterimage.models.reconstructor import Encoders, Reconstructor
from afterimage.models.weights import weight_notes
from afterimage.runs.files import sha256, write_csv, write_image
from afterimage.runs.results import DecoderAlone, InversionFacts, Result
from afterimage.runs.run import Run, environment
from afterimage.runtime.terminal import Progress, silent
from afterimage.training.checkpoint import load_reconstructor

Images = Float[Tensor, "batch 3 height width"]


def invert_run(
    run: Run,
    root: Path,
    method: InvertConfig,
    given: InversionInputs,
    *,
    plain: bool = True,
    estimate: EstimateConfig | None = None,
    weights: str | None = None,
    seed: int = 0,
    lpips: str | None = None,
    device: str = "cpu",
    progress: Progress = silent,
) -> list[Run]:
    """Refine the reconstructions of a finished run until their features are those of the originals.

    Each kind of answer becomes a run folder below `root`; folders that are done are left alone. The decoder's
    errors are learned from the first half of the validation images, at most `HELD_OUT`; the others serve to
    choose the number of passes and to learn the best estimates.

    Args:
        run: a finished run of a decoder
        root: folder for the run folders
        method: settings of the search
        given: the images
        plain: also invert the same features from grey, without the decoder or any other image
        estimate: also find the best estimates, which need validation images; None to leave them out
        weights: weights of the encoders; None takes the run's own
        seed: seed of the searches
        lpips: LPIPS network of the scores; None takes the run's own
        device: device to compute on
        progress: called during searches and measurements

    Returns:
        The run folders: of the refined images, and of best estimates and images from grey where asked for.

    Raises:
        AfterimageError: the encoder is not known, the decoder cannot be loaded, there are no validation
            images for best estimates, or a search diverged
    """
    sources, where = run.config.sources, weights or run.config.weights
    if not where:
        raise AfterimageError(
            f"{run.name} was trained on stored features whose encoder nobody has named: a search takes images through "
            "it again and again"
        )
    lpips = lpips or run.lpips_net
    common = {"data": given.config, "seed": seed, "lpips": lpips}
    configs = [InversionConfig(sources, where, run.name, method, **common)]
    if estimate and estimate.images:
        configs.append(InversionConfig(sources, where, run.name, method, estimate=estimate, **common))
    if plain:
        configs.append(InversionConfig(sources, where, "", method, **common))
    folders = {config.answer: Run.create(root, config) for config in configs}
    missing = {answer: folder for answer, folder in folders.items() if folder.state != "done"}
    if not missing:
        return list(folders.values())
    reconstructor = load_reconstructor(run, weights=where).to(device)
    metrics = Metrics(lpips, size=min(given.config.size))
    options: dict[str, Any] = {"metrics": metrics, "device": device, "progress": progress}
    if missing.keys() & {"refined", "estimate"}:
        start = _start(run, reconstructor, given, metrics, device)
        known = error_images(len(given.validation or ()))
        errors, note = decoder_errors(reconstructor, given.validation, known, device)
        refinement = Refinement(reconstructor, method, errors, seed)
        made_for = _made_for(reconstructor.encoders, start.run.name, start.digest, given, metrics)
        aside = folders["refined"].path / "validation"
        if method.held_out and given.validation is not None and method.optimizer == "lbfgs":
            if "refined" in missing:
                batches, lpips_used = Batches(aside, [made_for, method.steps]), metrics.lpips_status
                steps = choose_passes(refinement, given.validation, batches, metrics, device, progress)
            else:
                finished = folders["refined"].result
                steps, lpips_used = finished.inversion.steps, finished.lpips
            refinement, chosen = with_passes(refinement, steps, given.validation, lpips_used)
            note = [*note, chosen]
        kept, learning = (
            Batches(path, [made_for, refinement.steps]) for path in (folders["refined"].path, aside)
        )
    if folder := missing.get("refined"):
        _make(
            folder, reconstructor.encoders, refinement, refinement.steps, given, note, start, kept, **options
        )
    if folder := missing.get("estimate"):
        if given.validation is None:
            raise AfterimageError(
                f"{run.name}: a best estimate is learned from validation images, and there are none"
            )
        corrector, count = learn_from(
            refinement, given.validation, estimate, learning, seed, device, progress
        )
        best = BestEstimate(refinement, corrector, method.precision, kept)
        images = counted(count, "other validation image")
        steps = learning_steps(estimate, count)
        learned = f"learned from {images}, refined alike, in {counted(steps, 'step')}"
        # No batches of its own: the estimates start from those of the refinement.
        _make(
            folder, reconstructor.encoders, best, best.steps, given, [*note, learned], start, None, **options
        )
    if missing.keys() & {"refined", "estimate"}:
        kept.clear()
        shutil.rmtree(aside, ignore_errors=True)
    if folder := missing.get("inversion"):
        invert_sources(folder, reconstructor.encoders, method, given, seed=seed, **options)
    return list(folders.values())


def invert_sources(
    folder: Run,
    encoders: Encoders,
    method: InvertConfig,
    given: InversionInputs,
    *,
    seed: int,
    **options: Any,
) -> None:
    """Invert images from grey through all sources of `encoders` together, into a run folder."""
    made_for = _made_for(encoders, "", "", given, options["metrics"])
    batches = Batches(folder.path, [made_for, method.steps])
    _make(
        folder,
        encoders,
        plain_search(encoders, method, seed),
        method.steps,
        given,
        [],
        None,
        batches,
        **options,
    )
    batches.clear()


def _decoder_alone(
    reconstructor: Reconstructor, image_set: ImageSet, metrics: Metrics, device: str
) -> DecoderAlone:
    started = time.monotonic()
    scores = summarise(evaluate(reconstructor, image_set, metrics, batch_size=BATCH, device=device).rows)
    # An upper bound, since it includes measuring the scores; small beside the time of an inversion.
    seconds = (time.monotonic() - started) / len(image_set)
    losses = []
    for images in image_set.batches(torch.arange(len(image_set)).split(BATCH), device=device):
        targets = encode(reconstructor.encoders, images)
        with torch.no_grad():
            decoded = reconstructor.feature_decoder(targets).clamp(0, 1)
            losses += feature_distance(reconstructor.encoders(decoded), targets).tolist()
    return DecoderAlone(scores, seconds, sum(losses) / len(losses))


@dataclass(frozen=True)
class _Start:
    """The run whose decoder gives the starting images, and facts that its answers share.

    Attributes:
        run: the decoder's run
        digest: SHA-256 of the decoder's file
        alone: scores of the decoder alone on the same images
        prior: mean feature maps of validation images; None if there are none
    """

    run: Run
    digest: str
    alone: DecoderAlone
    prior: list[Tensor] | None


def _start(
    run: Run, reconstructor: Reconstructor, given: InversionInputs, metrics: Metrics, device: str
) -> _Start:
    prior = None
    if given.validation is not None:
        few = torch.arange(min(HELD_OUT, len(given.validation))).split(BATCH)
        prior = mean_features(reconstructor.encoders, given.validation.batches(few, device=device))
    alone = _decoder_alone(reconstructor, given.images, metrics, device)
    return _Start(run, sha256(run.file("decoder.safetensors")), alone, prior)


def _made_for(
    encoders: Encoders, start: str, digest: str, given: InversionInputs, metrics: Metrics
) -> list[Any]:
    """Return what finished batches depend on besides their images: weights, decoder's run and file, data, LPIPS."""
    weights = map(asdict, encoders.weights_of(encoders.sources))
    return [*weights, start, digest, asdict(given.facts), asdict(metrics.lpips_status)]


def _make(
    folder: Run,
    encoders: Encoders,
    search: Refinement | BestEstimate | Callable[..., Inversion],
    steps: int,
    given: InversionInputs,
    notes: Sequence[str],
    start: _Start | None,
    batches: Batches | None,
    *,
    metrics: Metrics,
    device: str,
    progress: Progress,
) -> None:
    """Search, measure and write the run folder, and `curve.csv` with the scores by image and step."""
    config = load_toml(InversionConfig, folder.file("config.toml"))
    weights = encoders.weights_of(encoders.sources)

    def snapshot(images: Images) -> None:
        write_image(folder.file("progress.png"), np.concatenate(list(to_uint8(images)), axis=1))

    measured = measure(
        search, given.images, metrics, steps, device=device, progress=progress, snapshot=snapshot, batches=batches
    )  # fmt: skip
    prior = None
    if start and start.prior is not None:
        prior = search.of_features(start.prior, measured.images[0][1].shape[:2]).images
    took = f"{counted(steps, 'pass', 'passes')} an inversion, {measured.seconds:.1f} s an image"
    facts = InversionFacts(
        steps=steps,
        seconds_per_image=measured.seconds,
        feature_loss=sum(row["feature_loss"] for row in measured.rows) / len(measured.rows),
        start=start.run.name if start else "",
        start_decoder=start.run.config.decoder.name if start else "",
        start_sha256=start.digest if start else "",
        decoder_alone=start and start.alone,
        controls=bound_controls(measured.images, metrics, prior, device=device),
    )
    how = "best estimate" if config.estimate else "refined"
    name = f"{facts.start_decoder} + {how}" if start else "inversion"
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
        notes=(
            took,
            *weight_notes(weights),
            *encoders.remarks_of(encoders.sources),
            *notes,
            *given.notes,
            *score_notes(measured.rows),
        ),
    )
    folder.save_environment(environment() | {"device": device, "threads": torch.get_num_threads()})
    write_csv(folder.file("curve.csv"), measured.curve)
    folder.save_result(found, measured.images)
    folder.set_state("done")
