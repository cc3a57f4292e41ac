"""Decoders that are fitted on demand, in closed form, for layers that no run has decoded."""

from __future__ import annotations

import hashlib
import json
from importlib import metadata
from pathlib import Path

from afterimage.config import NATIVE, DataConfig, DecoderConfig, RunConfig
from afterimage.data.dataset import cache_folder, current_digests
from afterimage.experiments.queue import train_runs
from afterimage.models.encoders.providers import at_native_size, resolve_source
from afterimage.models.reconstructor import MultiEncoder
from afterimage.runs.run import Run
from afterimage.runtime.terminal import Progress, no_progress

ON_DEMAND_DECODER = "linear"
"""Name of the decoder that is fitted on demand, in closed form, within seconds."""
FIT_LIMITS = {"limit_train": 256, "limit_validation": 64, "limit_test": 16}
"""Limits of the images that fit this decoder, choose its ridge and score it, so that the wait stays short."""


def fit_run(
    source: str,
    data: str,
    *,
    weights: str = "pretrained",
    lpips: str = "alex",
    cache: Path | None = None,
    device: str = "cpu",
    progress: Progress = no_progress,
) -> Run:
    """Fit a decoder to one layer on demand, or return the run of an earlier, identical fit.

    The run folder lies in the cache, in a folder named after a digest of the encoder's weights, the images and the
    package version. Images have the encoder's native size.

    Args:
        source: `model:layer`
        data: source of the images, limited by `FIT_LIMITS`; decoders of procedural images are scored on photographs
        weights: `pretrained`, a file or folder of weights, or a random control
        lpips: LPIPS network of the scores
        cache: folder of decoded images and of these runs; None for the default
        device: device of the computations
        progress: callback for progress and messages, see `Progress`

    Returns:
        the finished run

    Raises:
        AfterimageError: the model, layer or source is unknown, or weights or images are not available
    """
    source = resolve_source(source)
    drawn = data.partition(":")[0] == "procedural"
    named = DataConfig(data, test="photographs" if drawn else "", **FIT_LIMITS)
    images = at_native_size(named.with_size(NATIVE), [source])
    config = RunConfig((source,), weights, decoder=DecoderConfig(ON_DEMAND_DECODER), data=images, lpips=lpips)
    # An unknown layer raises before any image is read.
    encoder = MultiEncoder(config.sources, weights=weights, image_size=images.size, seed=config.seed)
    digest, _ = current_digests(images, cache=cache, progress=progress)
    made_of = [encoder.weight_digests(config.sources), digest, metadata.version("afterimage")]
    key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
    root = cache_folder(cache) / "fitted" / key[:16]
    (run,) = train_runs(config, root, cache=cache, accelerator=device, progress=progress)
    return run
