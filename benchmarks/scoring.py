"""Measure the speed of PSNR, SSIM and LPIPS: ours in batches, against scikit-image and lpips image by image."""

from __future__ import annotations

import importlib.util
import statistics
import time
import warnings
from collections.abc import Iterator
from typing import Any

from benchmarks.child import in_child
from benchmarks.rows import Goal, Quality, Row
from benchmarks.settings import Settings

NET, SCORES = "alex", ("psnr", "ssim", "lpips")
THUMBNAILS = (56, 28, 14, 7)
"""Sides in pixels to which images are reduced, to stand in for reconstructions of decreasing quality."""


def evaluation(settings: Settings) -> Iterator[Row]:
    """Score 100 images (20 if quick) by PSNR, SSIM and LPIPS, for one run and for four runs on the same images."""
    missing = [name for name in ("skimage", "lpips") if importlib.util.find_spec(name) is None]
    for name, runs in (("evaluate", 1), ("evaluate-4", 4)):
        yield _row(settings, name, runs, missing)


def _row(settings: Settings, name: str, runs: int, missing: list[str]) -> Row:
    count, goal = 20 if settings.quick else 100, Goal("ratio", 5.0)
    what = (
        f"PSNR, SSIM and LPIPS ({NET}) of {count} images of {settings.crop}, "
        f"{'one reconstruction' if runs == 1 else f'{runs} reconstructions'} of each, against scikit-image and lpips"
    )
    if missing:
        reason = f"the reference needs {' and '.join(missing)}: pip install scikit-image lpips"
        return Row(name, what, goal=goal, unavailable=reason)
    weights = settings.folder / f"{NET}.safetensors"
    if not weights.exists():
        in_child("scoring:write_weights", net=NET, path=str(weights))
    arguments = {"count": count, "size": settings.crop, "net": NET, "weights": str(weights), "runs": runs}
    ours, reference = settings.in_turns(
        1 if settings.quick else 3,
        name,
        lambda: in_child("scoring:ours", accelerator=settings.accelerator, **arguments).value,
        lambda: in_child("scoring:reference", **arguments).value,
    )
    apart = {
        score: max(abs(a - b) for a, b in zip(ours[-1][score], reference[-1][score], strict=True))
        for score in SCORES
    }
    mean = [sum(side[-1]["lpips"]) / len(side[-1]["lpips"]) for side in (ours, reference)]
    return Row(
        name,
        what,
        "images/s",
        [count / o["seconds"] for o in ours],
        [count / r["seconds"] for r in reference],
        higher_is_better=True,
        goal=goal,
        quality=Quality("mean LPIPS", *mean, 1e-4),
        notes=[
            "largest difference of any image: "
            + ", ".join(f"{score} {difference:.1g}" for score, difference in apart.items()),
            "random LPIPS weights, the same on both sides, which cost the same; images are at hand on both sides",
            f"the passes through LPIPS' network, {runs + 1} an image, take ours "
            f"{statistics.median(o['network'] / o['seconds'] for o in ours):.0%} of its time by themselves; with "
            "them alone the ratio would be "
            f"{statistics.median(r['seconds'] / o['network'] for o, r in zip(ours, reference, strict=True)):.2f}x",
        ],
    )


def write_weights(net: str, path: str) -> None:
    """Write random weights of an LPIPS backbone, under the names of torchvision's file."""
    import torch
    import torchvision
    from safetensors.torch import save_file

    from afterimage.models.lpips import BACKBONES

    torch.manual_seed(0)
    network = getattr(torchvision.models, BACKBONES[net][0])(weights=None)
    save_file(network.features.state_dict(prefix="features."), path)


def ours(
    count: int, size: int, net: str, weights: str, runs: int = 1, accelerator: str = "cpu"
) -> dict[str, Any]:
    """Score images by `Metrics.compare` in batches, as `evaluate_batches` does.

    Returns:
        seconds, seconds of the LPIPS network alone, and the scores of all images by metric
    """
    import torch
    from lightning_fabric import Fabric

    from afterimage.evaluation.metrics import CHUNK, Metrics

    device = Fabric(accelerator=accelerator, devices=1).device
    metrics = Metrics(net, weights=weights).to(device)
    originals, *rebuilt = (images.to(device) for images in _images(count, size, runs))
    metrics(rebuilt[0][:8], originals[:8])
    tables: list[dict[str, list[float]]] = [{name: [] for name in SCORES} for _ in rebuilt]
    started = time.perf_counter()
    for indices in torch.arange(count).split(16):
        scores = metrics.compare([images[indices] for images in rebuilt], originals[indices])
        for table, columns in zip(tables, scores, strict=True):
            for name in SCORES:
                table[name] += columns[name]
    seconds = time.perf_counter() - started
    started = time.perf_counter()
    with torch.inference_mode():
        for images in (originals, *rebuilt):
            for part in images.split(CHUNK if device.type == "cpu" else 16):
                metrics.lpips.features(part)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    network = time.perf_counter() - started
    columns = {name: [v for table in tables for v in table[name]] for name in SCORES}
    return {"seconds": seconds, "network": network} | columns


def reference(count: int, size: int, net: str, weights: str, runs: int = 1) -> dict[str, Any]:
    """Score image by image: scikit-image on arrays, the package lpips on tensors in [-1, 1].

    Returns:
        seconds, and the scores of all images by metric
    """
    import lpips
    import torch
    from safetensors.torch import load_file
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    with warnings.catch_warnings():  # the package uses deprecated arguments of torchvision
        warnings.simplefilter("ignore", UserWarning)
        distance = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    tensors = load_file(weights)
    # The package cuts the network into slices, but keeps the numbers of its layers.
    names = {name: f"features.{name.split('.', 1)[1]}" for name in distance.net.state_dict()}
    distance.net.load_state_dict({name: tensors[key] for name, key in names.items()})
    originals, *rebuilt = _images(count, size, runs)

    @torch.no_grad()
    def score(index: int, images: Any) -> tuple[float, float, float]:
        original, image = (x[index].permute(1, 2, 0).numpy() for x in (originals, images))
        ratio = peak_signal_noise_ratio(original, image, data_range=1.0)
        similarity = structural_similarity(
            original,
            image,
            data_range=1.0,
            channel_axis=-1,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        pair = (2 * x[index : index + 1] - 1 for x in (images, originals))
        return float(ratio), float(similarity), float(distance(*pair))

    score(0, rebuilt[0])
    started = time.perf_counter()
    rows = [score(index, images) for images in rebuilt for index in range(count)]
    seconds = time.perf_counter() - started
    return {"seconds": seconds} | dict(zip(SCORES, map(list, zip(*rows, strict=True)), strict=True))


def _images(count: int, size: int, runs: int) -> list[Any]:
    """Return dead leaves and `runs` degraded copies of them: tensors `(count, 3, size, size)` in [0, 1]."""
    import numpy as np
    import torch
    import torch.nn.functional as F

    from afterimage.data.sources.dead_leaves import dead_leaves

    # A few different images are enough: the cost does not depend on the content.
    leaves = [np.asarray(dead_leaves(2, index, size, size)) for index in range(min(8, count))]
    image_set = torch.from_numpy(np.stack(leaves)).permute(0, 3, 1, 2).float() / 255
    originals = image_set.repeat(-(-count // len(leaves)), 1, 1, 1)[:count].contiguous()
    small = [F.interpolate(originals, (side,) * 2, mode="area") for side in THUMBNAILS[:runs]]
    return [originals, *(F.interpolate(images, (size, size), mode="bilinear") for images in small)]
