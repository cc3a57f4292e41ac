"""Baselines: mean colour, bicubic thumbnails and JPEG, measured like decoders."""

from __future__ import annotations

import contextlib
import functools
import io
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from afterimage.config import AfterimageError, BaselineConfig, DataConfig, join_names, unknown_choice_error
from afterimage.data.dataset import current_digests, load_data
from afterimage.data.images import Data
from afterimage.evaluation.evaluate import (
    Evaluation,
    evaluate_batches,
    reconstruct_batches,
    score_notes,
    summarise,
    to_uint8,
)
from afterimage.evaluation.metrics import Metrics
from afterimage.runs.lock import hold_lock
from afterimage.runs.results import Result
from afterimage.runs.run import TRACEBACK, Run, environment, remove_traceback, write_failure
from afterimage.runtime.failures import (
    clear_error_frames,
    error_scope,
    protect_callback,
    run_all_or_each,
    to_afterimage_error,
)
from afterimage.runtime.terminal import Progress, no_progress

BASELINES = (
    "mean",
    "thumbnail-7",
    "thumbnail-14",
    "thumbnail-28",
    "thumbnail-56",
    "thumbnail-112",
    "jpeg-50",
)

Images = Float[Tensor, "batch 3 height width"]


def baseline(name: str) -> Callable[[Images], Images]:
    """Return the function of a baseline, from images `(B, 3, H, W)` in [0, 1] to reconstructions of the same shape.

    Raises an `AfterimageError` unless the name is `mean`, `thumbnail-N` or `jpeg-Q`.
    """
    kind, number = _parse(name)
    if kind == "mean":
        return mean_colour
    if kind == "thumbnail":
        return lambda images: thumbnail(images, number)
    return lambda images: jpeg(images, number)


def display_name(name: str, size: tuple[int, int] = (1, 1)) -> str:
    """Return a baseline's display name for images of a `size` (height, width)."""
    kind, number = _parse(name)
    if kind == "mean":
        return "Mean colour"
    height, width = (number * side // min(size) for side in size)
    return f"Bicubic thumbnail {height}×{width}" if kind == "thumbnail" else f"JPEG quality {number}"


def run_baselines(
    data: DataConfig,
    root: str | Path,
    *,
    names: Sequence[str] | None = None,
    lpips: str = "alex",
    cache: Path | None = None,
    progress: Progress = no_progress,
    keep: int = 8,
    failures: list[AfterimageError] | None = None,
) -> list[Run]:
    """Measure baselines on the test images, each in a run folder of its own.

    Finished ones are repeated only if the test images have changed, or if the LPIPS that is asked for is new.

    Args:
        names: names of the baselines; None for all of `BASELINES` but thumbnails that are not smaller than the images
        progress: called with the progress; its exceptions end all work
        keep: number of images that are stored with their reconstructions
        failures: receives the errors of failed baselines, while the others continue

    Returns:
        the run folders

    Raises:
        AfterimageError: a name is unknown, or a baseline failed and no `failures` are given
    """
    progress = protect_callback(progress)
    if names is None:
        most = min(data.size)
        names = [name for name in BASELINES if _parse(name)[0] != "thumbnail" or _parse(name)[1] < most]
    functions = {name: baseline(name) for name in names}
    runs = {name: Run.create(root, BaselineConfig(name, data, lpips)) for name in names}
    failed: list[AfterimageError] = []

    @contextlib.contextmanager
    def recorded(*which: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if error_scope(error):
                raise
            ended = join_names([runs[name].name for name in which])
            failed.append(to_afterimage_error(error, ended, runs[which[0]].file(TRACEBACK)))
            for name in which:
                write_failure(runs[name], error)
            clear_error_frames(error)

    get_metrics = functools.cache(lambda: Metrics(lpips, size=min(data.size)))

    @functools.cache
    def test_digest() -> str:
        try:
            return current_digests(data, cache=cache)[1]
        except AfterimageError:  # raised again below if a baseline needs the images
            return ""

    def is_current(run: Run) -> bool:
        if run.state != "done":
            return False
        before, now = run.result, test_digest()
        if not now:
            return True
        has_lpips = before.lpips.is_by(lpips) or not get_metrics().lpips_status.available
        return has_lpips and now == before.data.test_digest

    with contextlib.ExitStack() as stack:
        missing = []
        for name in names:
            with recorded(name):
                if not is_current(runs[name]):
                    stack.enter_context(hold_lock(runs[name].path, lambda text: progress(text, 1, 1)))
                    if not is_current(runs[name]):
                        missing.append(name)
        if missing:
            with recorded(*missing):
                metrics = get_metrics()
                loaded = load_data(data, cache=cache, progress=progress)

                def measure(which: list[str]) -> None:
                    batches = reconstruct_batches(
                        lambda images: [functions[name](images) for name in which], loaded.test
                    )
                    results = evaluate_batches(
                        batches, loaded.test.ids, metrics, names=which, progress=progress, keep=keep
                    )
                    for name, result in zip(which, results, strict=True):
                        with recorded(name):
                            _save(runs[name], name, result, loaded, metrics)

                def alone(name: str, error: Exception) -> None:
                    with recorded(name):
                        raise error

                run_all_or_each(measure, missing, alone)
    if failures is not None:
        failures += failed
    elif failed:
        raise failed[0]
    return list(runs.values())


def _save(run: Run, name: str, result: Evaluation, data: Data, metrics: Metrics) -> None:
    remove_traceback(run)
    run.save_environment(environment())
    found = Result(
        kind="baseline",
        label=display_name(name, data.config.size),
        config=BaselineConfig(name, data.config, metrics.lpips_status.net),
        data=data.describe(),
        lpips=metrics.lpips_status,
        scores=summarise(result.rows),
        per_image=tuple(result.rows),
        notes=(*data.notes, *score_notes(result.rows)),
    )
    run.save_result(found, result.images)
    run.set_state("done")


def mean_colour(images: Images) -> Images:
    """Replace each image by its own mean colour."""
    return images.mean((2, 3), keepdim=True).expand_as(images).contiguous()


def thumbnail(images: Images, size: int) -> Images:
    """Reduce images to a shorter side of `size` pixels and enlarge them again, by Pillow's bicubic filter, clamped."""
    height, width = images.shape[-2:]
    if size > min(height, width):
        raise AfterimageError(f"a thumbnail of {size} pixels is larger than the images, {height}x{width}")
    short = min(height, width)
    small = F.interpolate(
        images, (size * height // short, size * width // short), mode="bicubic", antialias=True
    )
    # Enlarging needs no antialiasing, but the flag also selects Pillow's kernel: a = -0.5 instead of -0.75.
    return F.interpolate(small, (height, width), mode="bicubic", antialias=True).clamp(0, 1)


def jpeg(images: Images, quality: int) -> Images:
    """Encode images as 8-bit JPEG with a quality of 1 to 100 and chroma at half resolution, and decode them."""
    files = [encode_image(array, "JPEG", quality=quality) for array in to_uint8(images)]
    return decode_images(files).to(images.device)


def encode_image(pixels: UInt8[np.ndarray, "height width 3"], codec: str, **options: Any) -> bytes:
    """Return an image as a file of one of Pillow's formats."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, codec, **options)
    return file.getvalue()


def decode_images(files: Sequence[bytes]) -> Images:
    """Return the images of files of one size, `(B, 3, H, W)` in [0, 1]."""
    arrays = np.stack([np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float().div(255)


def _parse(name: str) -> tuple[str, int]:
    if name == "mean":
        return "mean", 0
    match = re.fullmatch(r"(thumbnail|jpeg)-([1-9]\d{0,4})", name)
    if match is None or (match[1] == "jpeg" and int(match[2]) > 100):
        raise unknown_choice_error(
            "baseline", name, (*BASELINES, "thumbnail-SIZE", "jpeg-QUALITY (1 to 100)")
        )
    return match[1], int(match[2])
