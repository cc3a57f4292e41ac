"""Run folders with scores drawn from a known law, so that tests know what the statistics should find."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from afterimage.config import (
    RANDOM_WEIGHTS,
    BaselineConfig,
    DataConfig,
    DecoderConfig,
    FusionConfig,
    RecipeConfig,
    RunConfig,
)
from afterimage.runs.files import write_csv, write_json
from afterimage.runs.run import Run

DATA = {
    "source": "procedural",
    "test": "",
    "digest": "d" * 64,
    "train": 640,
    "validation": 160,
    "test_images": 100,
    "resize": 256,
    "crop": 224,
}
# channels, side, decoder parameters and published PSNR of the study's rows
SHAPES = {
    "resnet34.tv_in1k:layer1": (64, 56, 250_147, 14.32),
    "resnet34.tv_in1k:layer2": (128, 28, 974_563, 14.04),
    "resnet34.tv_in1k:layer3": (256, 14, 3_865_187, 13.12),
    "resnet34.tv_in1k:layer4": (512, 7, 15_413_603, 12.72),
    "vgg16.tv_in1k:block1": (64, 112, 233_667, 14.45),
    "vgg16.tv_in1k:block2": (128, 56, 958_083, 14.34),
    "vgg16.tv_in1k:block3": (256, 28, 3_848_707, 14.01),
    "vgg16.tv_in1k:block4": (512, 14, 15_397_123, 13.40),
    "vgg16.tv_in1k:block5": (512, 7, 15_413_603, 12.68),
    "vit_base_patch16_224.augreg2_in21k_ft_in1k:block0": (768, 14, 34_621_827, 14.29),
    "vit_base_patch16_224.augreg2_in21k_ft_in1k:block1": (768, 14, 34_621_827, 14.01),
    "vit_base_patch16_224.augreg2_in21k_ft_in1k:block11": (768, 14, 34_621_827, 12.85),
}
LAYERS_OF_FUSION = (
    "resnet34.tv_in1k:layer1",
    "vgg16.tv_in1k:block1",
    "vit_small_patch16_224.augreg_in21k_ft_in1k:block1",
    "pvt_v2_b2.in1k:stage1",
)
_MORE_SHAPES = {LAYERS_OF_FUSION[2]: (384, 14, 0, 0.0), LAYERS_OF_FUSION[3]: (64, 56, 0, 0.0)}


def sample_images(count: int = 100) -> list[str]:
    return [f"image-{i:03d}" for i in range(count)]


def scores(mean: float, *, count: int = 100, noise: float = 0.2, seed: int = 0) -> list[dict[str, object]]:
    """Rows of scores.csv: PSNR = mean + what the image brings + noise; SSIM and LPIPS follow it."""
    common = np.random.default_rng(1).normal(0, 2.5, count)
    psnr = mean + common - common.mean() + np.random.default_rng(seed).normal(0, noise, count)
    return [
        {"id": name, "psnr": value, "ssim": value / 40, "lpips": 1 - value / 40}
        for name, value in zip(sample_images(count), psnr.tolist(), strict=True)
    ]


def write_run(
    root: Path,
    sources: str | tuple[str, ...],
    rows: list[dict[str, object]],
    *,
    decoder: DecoderConfig | None = None,
    recipe: RecipeConfig | None = None,
    fusion: FusionConfig | None = None,
    data: DataConfig | None = None,
    weights: str = "pretrained",
    seed: int = 42,
    parameters: int | None = None,
    seconds: float = 120.0,
    lpips_net: str = "alex",
) -> Run:
    sources = (sources,) if isinstance(sources, str) else sources
    decoder, recipe = decoder or DecoderConfig(), recipe or RecipeConfig()
    config = RunConfig(sources, weights, fusion, decoder, data or DataConfig("procedural"), recipe, seed=seed)
    run = Run.create(root, config)
    features = []
    for source in sources:
        channels, side, _, _ = (SHAPES | _MORE_SHAPES)[source]
        order = list(SHAPES | _MORE_SHAPES).index(source)
        features.append(
            {"source": source, "channels": channels, "height": side, "width": side, "order": order}
        )
    is_random = weights in RANDOM_WEIGHTS
    label = weights if is_random else "pretrained"
    summary = {
        "kind": "decoder",
        "label": f"{' + '.join(sources)} · {decoder.name}",
        "sources": list(sources),
        "decoder": decoder.name,
        "reference": None,
        "fusion": None,
        "weights": [{"model": s.partition(":")[0], "label": label, "is_random": is_random} for s in sources],
        "features": features,
        "parameters": SHAPES[sources[0]][2] if parameters is None else parameters,
        "train_seconds": seconds,
        "seed": seed,
    }
    return _finish(run, summary, rows, lpips_net)


def write_reference(root: Path, reference: str, rows: list[dict[str, object]]) -> Run:
    run = Run.create(root, BaselineConfig(reference, DataConfig()))
    summary = {
        "kind": "reference",
        "label": reference,
        "sources": [],
        "decoder": None,
        "reference": reference,
        "weights": [],
        "features": [],
        "parameters": 0,
        "train_seconds": 0.0,
    }
    return _finish(run, summary, rows, "alex")


def _finish(run: Run, summary: dict[str, object], rows: list[dict[str, object]], lpips_net: str) -> Run:
    has_lpips = any(row.get("lpips") is not None for row in rows)
    summary |= {
        "data": DATA | {"test_images": len(rows)},
        "lpips": {"net": lpips_net, "available": has_lpips, "reason": None},
        "scores": {"lpips": {} if has_lpips else None} if not has_lpips else {"lpips": {"mean": 0.5}},
    }
    write_json(run.file("summary.json"), summary)
    write_csv(run.file("scores.csv"), rows)
    return run


def write_published_study(root: Path, *, noise: float = 0.2, count: int = 100) -> list[Run]:
    """The published means as a study of `count` images, and the mean-colour line at 10 dB."""
    runs = [
        write_run(root, source, scores(mean, noise=noise, count=count, seed=i))
        for i, (source, (_, _, _, mean)) in enumerate(SHAPES.items())
    ]
    return [*runs, write_reference(root, "mean", scores(10.0, noise=noise, count=count, seed=99))]
