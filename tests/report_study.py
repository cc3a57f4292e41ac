"""A made-up study on disk for the report's tests: run folders as training would leave them, in a second."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from rich.console import Console

from afterimage.config import (
    RANDOM_WEIGHTS,
    BaselineConfig,
    DataConfig,
    DecoderConfig,
    FusionConfig,
    RecipeConfig,
    RunConfig,
)
from afterimage.report.rows import Rows
from afterimage.report.tables import console_table
from afterimage.runs.run import Run

# Layer: channels, side of the square map, how good its reconstructions are (1 best).
RESNET = ("resnet34.tv_in1k", {f"layer{i}": (32 * 2**i, 112 // 2**i, 1 - 0.2 * i) for i in range(1, 5)})
VIT = (
    "vit_base_patch16_224.augreg2_in21k_ft_in1k",
    {"blocks.0": (768, 14, 0.75), "blocks.5": (768, 14, 0.45), "blocks.11": (768, 14, 0.15)},
)
PARAMETERS = {"linear": 1728, "transposed": 90_000, "attention": 250_147}
BONUS = {"linear": 0.0, "transposed": 0.05, "attention": 0.08}
BASELINES = {
    "mean": ("Mean colour", 12.4, 0.26, 0.90), "thumbnail-7": ("Bicubic thumbnail 7×7", 16.1, 0.33, 0.80),
    "thumbnail-14": ("Bicubic thumbnail 14×14", 18.0, 0.40, 0.70),
    "thumbnail-28": ("Bicubic thumbnail 28×28", 20.2, 0.50, 0.57),
    "thumbnail-56": ("Bicubic thumbnail 56×56", 23.0, 0.66, 0.40),
    "thumbnail-112": ("Bicubic thumbnail 112×112", 27.2, 0.85, 0.2),
    "jpeg-50": ("JPEG quality 50", 31.1, 0.91, 0.08),
}  # fmt: skip


def sample_image(seed: int, size: int = 64) -> Image.Image:
    """Overlapping discs on a gradient, the same for the same seed."""
    random = np.random.default_rng(seed)
    image = Image.linear_gradient("L").resize((size, size)).convert("RGB")
    draw = ImageDraw.Draw(image)
    for _ in range(40):
        x, y, radius = *random.uniform(0, size, 2).tolist(), float(size * random.power(0.4) / 4 + 1)
        draw.ellipse(
            (x - radius, y - radius, x + radius, y + radius), tuple(random.integers(0, 256, 3).tolist())
        )
    return image


def rebuilt(original: Image.Image, quality: float) -> Image.Image:
    side = max(2, round(original.width * 0.02 * 25**quality))
    return original.resize((side, side), Image.Resampling.BOX).resize(original.size, Image.Resampling.BICUBIC)


def write_run(
    root: Path, model: str, layer: str, decoder: str = "linear", *, originals: Sequence[Image.Image] = (),
    count: int = 20, weights: str = "pretrained", lpips: str | None = "alex", notes: Sequence[str] = (),
    seed: int = 42, features: tuple[int, int, float] = (64, 56, 0.8), parameters: int | None = None,
    fusion: FusionConfig | None = None, sources: Sequence[str] = (), order: int = 0, loss: str = "mse",
    fusion_maps: Sequence[np.ndarray] = (),
) -> Run:  # fmt: skip
    """One finished decoder run. `features` is channels, side and quality between 0 and 1.

    `fusion_maps` are uint8 `(sources, h, w)`, one for each original.
    """
    channels, side, quality = features
    sources = tuple(sources) or (f"{model}:{layer}",)
    config = RunConfig(
        sources, weights, fusion, DecoderConfig(decoder, parameters), DataConfig("procedural"),
        RecipeConfig(loss=loss), seed=seed,
    )  # fmt: skip
    run = Run.create(root, config)
    quality += BONUS.get(decoder, 0.1) + 0.02 * math.log10((parameters or 1e6) / 1e6) + 0.002 * (seed - 42)
    is_random = weights in RANDOM_WEIGHTS
    quality -= 0.2 if is_random else 0
    mean = np.array([12 + 14 * quality, 0.25 + 0.6 * quality, 0.9 - 0.75 * quality])
    size = parameters or PARAMETERS.get(decoder, 500_000) * channels // 64
    summary = {
        "kind": "decoder", "label": f"{' + '.join(sources)} · {decoder}", "sources": list(sources),
        "decoder": decoder, "reference": None,
        "fusion": config.fusion and dataclasses.asdict(config.fusion),
        "weights": [
            {"model": s.partition(":")[0], "origin": weights if is_random else "folder",
             "location": "seed 0" if is_random else "/weights/model.safetensors",
             "sha256": "" if is_random else "ab" * 32, "label": weights, "is_random": is_random}
            for s in sources
        ],
        "features": [
            {"source": s, "module": s.partition(":")[2], "channels": channels, "height": side, "width": side,
             "reduction": 224 / side, "locations": side**2, "values_per_pixel_value": 1.0, "order": order,
             "encoder_parameters": 1000, "encoder_macs": 1000}
            for s in sources
        ],
        "parameters": size, "macs": 123_456_789, "seed": seed, "train_seconds": 20 + size / 5000,
        "images_seen": 19200,
        "epochs": 30, "best_epoch": 28, "best_validation_loss": 0.004, "batch_size": 8,
        "fusion_weights": (np.mean(fusion_maps, (0, 2, 3)) / 255).tolist() if len(fusion_maps) else None,
    }  # fmt: skip
    history = []
    if decoder != "linear":
        for epoch in range(1, 31):
            best = 10 ** (-mean[0] / 10)
            loss_value = best * (1 + 3 * math.exp(-epoch / 4) + 0.05 * math.sin(epoch * 1.7 + channels))
            rate = 1e-3 * 0.5 ** ((epoch > 14) + (epoch > 22))
            history.append({"epoch": epoch, "train_loss": loss_value * 0.95, "validation_loss": loss_value,
                            "learning_rate": rate, "seconds": 4.0, "images_per_second": 160.0})  # fmt: skip
        run.save_history(history)
    return _finish(run, summary, mean, quality, originals, count, lpips, notes, fusion_maps)


def write_fused(root: Path, sources: Sequence[str], originals: Sequence[Image.Image], **options) -> Run:
    """A run whose fusion listens to its first source more from left to right, and to the others alike."""
    ramp = np.broadcast_to(np.linspace(0, 1, 8), (8, 8))
    maps = [ramp, *[(1 - ramp) / (len(sources) - 1)] * (len(sources) - 1)]
    maps = (np.array(maps) * 255).round().astype(np.uint8)
    return write_run(
        root, "", "", "transposed", sources=sources, originals=originals, fusion=FusionConfig(size=8),
        fusion_maps=[maps] * len(originals), **options,
    )  # fmt: skip


def write_reference(
    root: Path,
    name: str,
    *,
    originals: Sequence[Image.Image] = (),
    count: int = 20,
    lpips: str | None = "alex",
) -> Run:
    label, *mean = BASELINES[name]
    run = Run.create(root, BaselineConfig(name, DataConfig("procedural")))
    summary = {
        "kind": "reference", "label": label, "sources": [], "decoder": None, "reference": name,
        "fusion": None, "weights": [], "features": [], "parameters": 0, "macs": None, "seed": 0,
        "train_seconds": None,
    }  # fmt: skip
    return _finish(run, summary, np.array(mean), (mean[0] - 12) / 14, originals, count, lpips, ())


def _finish(run, summary, mean, quality, originals, count, lpips, notes, fusion_maps=()) -> Run:
    spread = np.array([2.0, 0.08, 0.06])
    easy = np.random.default_rng(7).normal(size=(count, 1))
    own = np.random.default_rng(sum(run.name.encode())).normal(size=(count, 3))
    values = mean + spread * (0.8 * easy * np.array([1, 1, -1]) + 0.4 * own)
    values[:, 1:] = values[:, 1:].clip(0.01, 0.99)
    rows = [
        {"id": f"image-{i:03}", "psnr": p, "ssim": s, "lpips": None if lpips is None else d}
        for i, (p, s, d) in enumerate(values.tolist())
    ]
    stats = {
        m: {"mean": float(v.mean()), "std": float(v.std(ddof=1)) if count > 1 else None, "count": count}
        for m, v in zip(("psnr", "ssim", "lpips"), values.T, strict=True)
    }
    reason = None if lpips else "no weights for alexnet: looked in AFTERIMAGE_WEIGHTS and the hub's cache"
    summary |= {
        "lpips": {"net": lpips or "alex", "available": lpips is not None, "reason": reason},
        "scores": stats | ({} if lpips else {"lpips": None}), "notes": list(notes),
        "data": {"source": "procedural", "test": "", "digest": "d1", "train": 640, "validation": 160,
                 "test_images": count, "resize": 256, "crop": 224},
    }  # fmt: skip
    saved = [
        (f"image-{i:03}", np.asarray(o), np.asarray(rebuilt(o, quality))) for i, o in enumerate(originals)
    ]
    run.save_environment({"versions": {"torch": "2.4"}, "command": ["afterimage", "study", "made-up.toml"]})
    run.save_result(summary, rows, saved, fusion_maps)
    run.set_state("done")
    return run


def write_study(
    root: Path, *, encoders=(RESNET, VIT), decoders: Sequence[str] = ("linear", "attention"),
    originals: Sequence[Image.Image] = (), references: Sequence[str] = tuple(BASELINES), **options,
) -> list[Run]:  # fmt: skip
    """Every layer of every encoder with every decoder, and the baselines."""
    runs = [
        write_run(root, model, layer, decoder, features=features, order=order, originals=originals, **options)
        for model, layers in encoders
        for order, (layer, features) in enumerate(layers.items())
        for decoder in decoders
    ]
    common = {k: v for k, v in options.items() if k in ("count", "lpips")}
    return runs + [write_reference(root, name, originals=originals, **common) for name in references]


def printed(rows: Rows, width: int) -> str:
    """The terminal's table as plain text."""
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(console_table(rows, width=width))
    return console.file.getvalue()
