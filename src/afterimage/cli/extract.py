"""`afterimage extract`: write the features of images to disk, with the images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from afterimage.cli.train import Sources
from afterimage.config import DataConfig, counted, shown
from afterimage.runtime.terminal import say


@dataclass(frozen=True)
class Extract:
    """Write the features of images to disk, with the images, for `audit --feature-store` and `train --features`.

    All layers belong to one encoder and share its pass. Memory holds one shard at a time. The same command continues
    an interrupted extraction with the missing shards.
    """

    sources: Sources
    """Layers to extract, all of one encoder, for example resnet34.tv_in1k:layer1 resnet34.tv_in1k:layer2."""
    out: Annotated[Path, tyro.conf.arg(aliases=("--output",), metavar="FILE")]
    """File for the features: .safetensors, .parquet or .npz. FILE.index.json lists its shards if there are several."""
    data: str = "div2k"
    """Source of images: folder:PATH, hf:NAME, webdataset:SHARDS, parquet:SHARDS, div2k[:PATH], procedural[:COUNT]
    or photographs."""
    test: str = ""
    """Source of the test images (default: the test split of --data)."""
    split: str = "all"
    """Images to encode: train, validation, test or all."""
    size: Annotated[str, tyro.conf.arg(metavar="SIDE|HxW|native", aliases=("--crop",))] = "224"
    """Crop size in pixels: 256, 256x384 (height x width), or native, the encoder's own."""
    resize: int | None = None
    """Shorter side in pixels after resizing, before the crop (default: 256, or as much as the crop needs)."""
    limit_train: int | None = None
    """Limit the number of training images."""
    limit_validation: int | None = None
    """Limit the number of validation images."""
    limit_test: int | None = None
    """Limit the number of test images."""
    weights: str = "pretrained"
    """Encoder weights: pretrained (from the folder AFTERIMAGE_WEIGHTS, the hub's cache or the hub), a file or folder,
    random (a random control whose blocks act) or random-init (one as its library initialises it)."""
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
    cache: Path | None = None
    """Folder for decoded images (default: AFTERIMAGE_CACHE, else ~/.cache/afterimage)."""
    device: str = "auto"
    """Device to compute on: cpu, cuda, mps or auto."""

    def run(self) -> None:
        from afterimage.experiments.extract import Extraction, extract, plan_extraction
        from afterimage.runs.run import check_file
        from afterimage.runtime.terminal import Display

        data = DataConfig(
            source=self.data,
            test=self.test,
            limit_train=self.limit_train,
            limit_validation=self.limit_validation,
            limit_test=self.limit_test,
        ).sized(self.size, self.resize)
        wanted = Extraction(
            self.sources, data, self.split, self.weights, self.seed, self.dtype, self.shard_images,
            self.batch_size,
        )  # fmt: skip
        if self.dry_run:
            plan = plan_extraction(wanted, self.out, cache=self.cache)
            for layer, size in zip(plan.layers, plan.features, strict=True):
                shape = f"{layer.channels}×{layer.height}×{layer.width}"
                say(f"{layer.source}: {shape} {self.dtype}, {size:,} bytes")
            say(
                f"{counted(plan.images, 'image')}, {plan.pixels:,} bytes of pixels",
                f"in all {plan.pixels + sum(plan.features):,} bytes in {counted(plan.shards, 'file')}; "
                "nothing was written",
            )
            return
        check_file(self.out, "--out")
        with Display() as display:
            facts = extract(wanted, self.out, cache=self.cache, accelerator=self.device, progress=display)
        layers = ", ".join(found.layer for found in facts.features)
        say(f"features of {counted(facts.images, 'image')} in {facts.model} ({layers}): {shown(self.out)}")
