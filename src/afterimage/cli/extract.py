"""`afterimage extract`: write the features of images to disk, with the images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from afterimage.cli import shared
from afterimage.cli.shared import specified_options
from afterimage.config import DataConfig, format_count, printable_path
from afterimage.runs.run import check_file
from afterimage.runtime.terminal import Display, print_lines


@dataclass(frozen=True)
class Extract:
    """Write the features of images to disk, with the images, for `audit --feature-store` and `train --features`.

    All layers belong to one encoder and share its pass. Memory holds one shard at a time. The same command continues
    an interrupted extraction with the missing shards.
    """

    sources: shared.Sources
    """Layers to extract, all of one encoder, for example resnet34.tv_in1k:layer1 resnet34.tv_in1k:layer2."""
    output: Annotated[Path, tyro.conf.arg(aliases=("--out",), metavar="FILE")]
    """File for the features: .safetensors, .parquet or .npz. FILE.index.json lists its shards if there are several."""
    data: shared.Images = "div2k"
    test: shared.TestImages = ""
    split: str = "all"
    """Images to encode: train, validation, test or all."""
    size: shared.Size = "224"
    """Crop size in pixels: 256, 256x384 (height x width), or native, the encoder's own."""
    resize: shared.Resize = None
    limit_train: shared.LimitTrain = None
    limit_validation: shared.LimitValidation = None
    limit_test: shared.LimitTest = None
    weights: shared.Weights = "pretrained"
    seed: int = 42
    """Seed of random weights."""
    dtype: str = "float32"
    """Number format of the features: float32, float16 or bfloat16 (.safetensors only)."""
    shard_images: int | None = None
    """Number of images in each shard (default: as many as fit into 256 MiB)."""
    batch_size: int = 16
    """Number of images in each pass through the encoder."""
    dry_run: bool = False
    """Print the number of bytes that would be written, and write nothing."""
    cache: shared.Cache = None
    device: shared.Device = "auto"

    def run(self) -> None:
        from afterimage.experiments.extract import Extraction, extract, plan_extraction

        images = specified_options(
            self, "test", "limit_train", "limit_validation", "limit_test", source="data"
        )
        data = DataConfig(**images).with_size(self.size, self.resize)
        wanted = Extraction(
            self.sources, data, self.split, self.weights, self.seed, self.dtype, self.shard_images,
            self.batch_size,
        )  # fmt: skip
        if self.dry_run:
            plan = plan_extraction(wanted, self.output, cache=self.cache)
            for layer, size in zip(plan.layers, plan.features, strict=True):
                shape = f"{layer.channels}×{layer.height}×{layer.width}"
                print_lines(f"{layer.source}: {shape} {self.dtype}, {size:,} bytes")
            print_lines(
                f"{format_count(plan.images, 'image')}, {plan.pixels:,} bytes of pixels",
                f"in all {plan.pixels + sum(plan.features):,} bytes in {format_count(plan.shards, 'file')}; "
                "nothing was written",
            )
            return
        check_file(self.output, "--output")
        with Display() as display:
            facts = extract(wanted, self.output, cache=self.cache, accelerator=self.device, progress=display)
        layers = ", ".join(found.layer for found in facts.features)
        print_lines(
            f"features of {format_count(facts.images, 'image')} in {facts.model} ({layers}): "
            f"{printable_path(self.output)}"
        )
