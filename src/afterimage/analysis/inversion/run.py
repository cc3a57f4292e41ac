"""Invert features from a finished run's reconstructions or from grey; each kind of result becomes a run folder."""

from __future__ import annotations

import functools
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from afterimage.analysis.inversion.best_estimate import corrector_steps
from afterimage.analysis.inversion.inputs import InversionInputs
from afterimage.analysis.inversion.invert import Images, encode
from afterimage.analysis.inversion.measure import (
    BATCH,
    BatchCache,
    Search,
    bound_controls,
    mean_features,
    measure,
)
from afterimage.analysis.inversion.objective import feature_distance
from afterimage.analysis.inversion.refinement import (
    BestEstimate,
    Refinement,
    choose_passes,
    decoder_errors,
    search_from_grey,
    train_on_refined,
)
from afterimage.config import AfterimageError, format_count, load_toml
from afterimage.config.inversion import (
    MAX_ERROR_IMAGES,
    EstimateConfig,
    InversionConfig,
    InvertConfig,
    num_error_images,
    tuning_image_indices,
)
from afterimage.data.images import ImageSet
from afterimage.evaluation.evaluate import evaluate, score_notes, summarise, to_uint8
from afterimage.evaluation.metrics import Metrics
from afterimage.models.reconstructor import FeatureSource, Reconstructor
from afterimage.models.weights import weight_notes
from afterimage.runs.files import sha256, write_csv, write_image
from afterimage.runs.results import (
    DataFacts,
    InversionFacts,
    Result,
    StartDecoder,
    WeightsRecord,
)
from afterimage.runs.run import Run, environment
from afterimage.runtime.terminal import Progress, no_progress
from afterimage.training.checkpoint import load_reconstructor


def invert_run(
    run: Run,
    root: Path,
    method: InvertConfig,
    inputs: InversionInputs,
    *,
    from_grey: bool = True,
    estimate: EstimateConfig | None = None,
    weights: str | None = None,
    seed: int = 0,
    lpips: str | None = None,
    device: str = "cpu",
    progress: Progress = no_progress,
) -> list[Run]:
    """Refine the reconstructions of a finished run until their features are those of the originals.

    Each kind of result becomes a run folder below `root`; those that are done are left alone, unless they were made
    from another decoder, other weights or other images of the same names. The decoder's
    errors are learned from the first half of the validation images, at most `MAX_ERROR_IMAGES`; the others serve to
    choose the number of passes and to learn the best estimates.

    Args:
        method: settings of the search
        from_grey: also invert the same features from grey, without the decoder or any other image
        estimate: also find the best estimates, which need validation images; None to leave them out
        weights: weights of the encoders; None takes the run's own
        seed: seed of the searches
        lpips: LPIPS network of the scores; None takes the run's own

    Returns:
        the run folders: of the refined images, and of best estimates and images from grey where asked for

    Raises:
        AfterimageError: the encoder is not known, the decoder cannot be loaded, there are no validation
            images for best estimates, or a search diverged
    """
    sources, where = run.config.sources, weights or run.config.weights
    if not where:
        raise AfterimageError(
            f"{run.name} was trained on stored features whose encoder is not recorded: an inversion runs images "
            "through it again and again"
        )
    lpips = lpips or run.lpips_net
    common = {"data": inputs.config, "seed": seed, "lpips": lpips}
    configs = [InversionConfig(sources, where, run.name, method, **common)]
    if estimate and estimate.images:
        configs.append(InversionConfig(sources, where, run.name, method, estimate=estimate, **common))
    if from_grey:
        configs.append(InversionConfig(sources, where, "", method, **common))
    folders = {config.result_kind: Run.create(root, config) for config in configs}
    get_metrics = functools.cache(lambda: Metrics(lpips, size=min(inputs.config.size)))
    weights_then = run.result.weights if run.has_result else ()
    now = weights_then, inputs.facts, lpips, get_metrics
    missing = {
        answer: folder
        for answer, folder in folders.items()
        if not (run.has_result and is_current(folder, run, *now, progress=progress))
    }
    if not missing:
        return list(folders.values())
    reconstructor = load_reconstructor(run, weights=where).to(device)
    options: dict[str, Any] = {"metrics": get_metrics(), "device": device, "progress": progress}
    if missing.keys() & {"refined", "estimate"}:
        _from_decoder(run, folders, missing, reconstructor, method, inputs, estimate, seed, **options)
    if folder := missing.get("inversion"):
        invert_sources(folder, reconstructor.encoders, method, inputs, seed=seed, **options)
    return list(folders.values())


def is_current(
    folder: Run,
    start: Run | None,
    weights: Sequence[WeightsRecord],
    data: DataFacts,
    lpips: str,
    get_metrics: Callable[[], Metrics],
    *,
    progress: Progress = no_progress,
) -> bool:
    """Return whether an inversion is done, and was made from the same decoder, weights and images as would be now.

    Args:
        folder: the inversion's run folder
        start: run of the decoder, which an inversion from grey does not read
        weights: weights of the encoders
        data: facts about the images
        lpips: LPIPS network of the scores; one that is unavailable makes nothing again
        get_metrics: returns the metrics of that network; called only if the inversion was not measured by it
        progress: callback for the reason why a finished inversion is made again
    """
    if folder.state != "done":
        return False
    result = folder.result
    differs = {
        "another decoder": bool(result.inversion.start)
        and result.inversion.start_sha256 != sha256(start.file("decoder.safetensors")),
        "other weights of the encoder": bool(result.other_weights(weights)),
        "other images": result.data.digest != data.digest,
        "another LPIPS network, or none": not result.lpips.is_by(lpips)
        and get_metrics().lpips_status.available,
    }
    changed = [name for name, different in differs.items() if different]
    if changed:
        progress(f"{folder.name} was made with {' and '.join(changed)}: it is made again", 1, 1)
    return not changed


def _from_decoder(
    run: Run,
    folders: Mapping[str, Run],
    missing: Mapping[str, Run],
    reconstructor: Reconstructor,
    method: InvertConfig,
    inputs: InversionInputs,
    estimate: EstimateConfig | None,
    seed: int,
    **options: Any,
) -> None:
    """Refine a decoder's reconstructions and find best estimates, whichever is missing."""
    metrics, device, progress = (options[name] for name in ("metrics", "device", "progress"))
    encoders, validation = reconstructor.encoders, inputs.validation
    start = {
        "start": run.name,
        "start_decoder": run.config.decoder.name,
        "start_sha256": sha256(run.file("decoder.safetensors")),
        "decoder_alone": _decoder_alone(reconstructor, inputs.images, metrics, device),
    }
    prior = None
    if validation is not None:
        few = torch.arange(min(MAX_ERROR_IMAGES, len(validation))).split(BATCH)
        prior = mean_features(encoders, validation.batches(few, device=device))
    if known := num_error_images(len(validation or ())):
        errors = decoder_errors(reconstructor, validation, known, device)
        images = format_count(known, "validation image")
        notes = [f"the decoder's errors, in images and in features, are learnt from {images}"]
    else:
        few = "no validation images" if validation is None else "too few validation images"
        errors, notes = None, [f"the decoder's errors are not known, natural images stand for them: {few}"]
    refinement = Refinement(reconstructor, method, errors, seed)
    made_for = _made_for(encoders, run.name, start["start_sha256"], inputs, metrics)
    validation_folder = folders["refined"].path / "validation"
    if method.held_out and validation is not None and method.optimizer == "lbfgs":
        if "refined" in missing:
            batches, lpips = BatchCache(validation_folder, [made_for, method.steps]), metrics.lpips_status
            steps = choose_passes(refinement, validation, batches, metrics, device, progress)
        else:
            finished = folders["refined"].result
            steps, lpips = finished.inversion.steps, finished.lpips
        refinement = replace(refinement, method=replace(method, steps=steps))
        what = "LPIPS" if lpips.available else "PSNR"
        images = format_count(
            len(tuning_image_indices(len(validation), method.held_out)), "other validation image"
        )
        notes.append(
            f"the number of passes, {steps} of at most {method.steps}, is the best in {what} for {images}"
        )
    test_batches, validation_batches = (
        BatchCache(path, [made_for, refinement.method.steps])
        for path in (folders["refined"].path, validation_folder)
    )
    options |= {"start": start, "prior": prior}
    if folder := missing.get("refined"):
        _run_inversion(folder, encoders, refinement, inputs, notes, test_batches, **options)
    if folder := missing.get("estimate"):
        if validation is None:
            raise AfterimageError(
                f"{run.name}: a best estimate is learned from validation images, and there are none"
            )
        corrector, count = train_on_refined(
            refinement, validation, estimate, validation_batches, seed, device, progress
        )
        images = format_count(count, "other validation image")
        steps = format_count(corrector_steps(estimate, count), "step")
        notes.append(f"learned from {images}, refined alike, in {steps}")
        best = BestEstimate(refinement, corrector, test_batches)
        # No batches of its own: the estimates start from those of the refinement.
        _run_inversion(folder, encoders, best, inputs, notes, None, **options)
    test_batches.clear()
    shutil.rmtree(validation_folder, ignore_errors=True)


def invert_sources(
    folder: Run,
    encoders: FeatureSource,
    method: InvertConfig,
    inputs: InversionInputs,
    *,
    seed: int,
    **options: Any,
) -> None:
    """Invert images from grey through all sources of `encoders` together, into a run folder."""
    batches = BatchCache(folder.path, [_made_for(encoders, "", "", inputs, options["metrics"]), method.steps])
    _run_inversion(folder, encoders, search_from_grey(encoders, method, seed), inputs, [], batches, **options)
    batches.clear()


def _decoder_alone(
    reconstructor: Reconstructor, image_set: ImageSet, metrics: Metrics, device: str
) -> StartDecoder:
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
    return StartDecoder(scores, seconds, sum(losses) / len(losses))


def _made_for(
    encoders: FeatureSource, start: str, digest: str, inputs: InversionInputs, metrics: Metrics
) -> list[Any]:
    """Return what finished batches depend on besides their images: weights, decoder's run and file, data, LPIPS."""
    weights = map(asdict, encoders.weights_of(encoders.sources))
    return [*weights, start, digest, asdict(inputs.facts), asdict(metrics.lpips_status)]


def _run_inversion(
    folder: Run,
    encoders: FeatureSource,
    search: Search,
    inputs: InversionInputs,
    notes: Sequence[str],
    batches: BatchCache | None,
    *,
    metrics: Metrics,
    device: str,
    progress: Progress,
    start: Mapping[str, Any] | None = None,
    prior: Sequence[Tensor] | None = None,
) -> None:
    """Search, measure and write the run folder, and `curve.csv` with the scores by image and step.

    Args:
        start: facts of the decoder's run as in `InversionFacts`; None for a search from grey
        prior: mean feature maps of validation images, for a search from a decoder; None if there are none
    """
    config = load_toml(InversionConfig, folder.file("config.toml"))
    weights = encoders.weights_of(encoders.sources)

    def snapshot(images: Images) -> None:
        write_image(folder.file("progress.png"), np.concatenate(list(to_uint8(images)), axis=1))

    measured = measure(
        search, inputs.images, metrics, device=device, progress=progress, snapshot=snapshot, batches=batches
    )  # fmt: skip
    prior_image = None if prior is None else list(search.refine_features(prior))[-1].images
    steps = measured.curve[-1]["step"]
    took = f"{format_count(steps, 'pass', 'passes')} an inversion, {measured.seconds:.1f} s an image"
    facts = InversionFacts(
        steps=steps,
        seconds_per_image=measured.seconds,
        feature_loss=sum(row["feature_loss"] for row in measured.rows) / len(measured.rows),
        controls=bound_controls(measured.images, metrics, prior_image, device=device),
        **start or {},
    )
    how = "best estimate" if config.estimate else "refined"
    name = f"{facts.start_decoder} + {how}" if start else "inversion"
    result = Result(
        kind="inversion",
        label=f"{' + '.join(config.sources)} · {name}",
        config=config,
        data=inputs.facts,
        lpips=metrics.lpips_status,
        scores=summarise(measured.rows),
        per_image=tuple(measured.rows),
        features=tuple(encoders.describe()),
        weights=tuple(weights),
        inversion=facts,
        notes=(
            took,
            *weight_notes(weights),
            *encoders.notes_of(encoders.sources),
            *notes,
            *inputs.notes,
            *score_notes(measured.rows),
        ),
    )
    folder.save_environment(environment() | {"device": device, "threads": torch.get_num_threads()})
    write_csv(folder.file("curve.csv"), measured.curve)
    folder.save_result(result, measured.images)
    folder.set_state("done")
