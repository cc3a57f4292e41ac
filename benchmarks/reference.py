"""Plain reference implementation of the published study's training, against which `afterimage` is measured.

A DataLoader's workers decode the originals again in every epoch, everything is float32, attention stores its N x N
matrices, every decoder runs its own encoder pass, decoders are trained one after the other, and validation features are
computed again each time. Pixel range, initial weights, order of images, crops and flips are as in `afterimage.train`,
so that both sides compute the same and must reach the same quality.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from afterimage.config import AfterimageError, RunConfig
from afterimage.data.dataset import cache_folder
from afterimage.data.sampling import centre_crop_positions, epoch_order, random_crop_positions, split
from afterimage.data.sources import read_source
from afterimage.models.decoders import create_decoder
from afterimage.models.encoders.encoder import Encoder

Images = Float[Tensor, "batch 3 height width"]


class Originals(Dataset):
    """Dataset of image files, decoded on access: `(3, crop, crop)` float32 in [0, 1]."""

    def __init__(self, paths: Sequence[str], resize: int, crop: int, seed: int | None) -> None:
        self.paths, self.resize, self.crop, self.seed, self.epoch = list(paths), resize, crop, seed, 0

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        image = Image.open(self.paths[index]).convert("RGB")
        scale = self.resize / min(image.size)
        sides = [self.resize if side == min(image.size) else int(side * scale) for side in image.size]
        pixels = np.asarray(image.resize(sides, Image.Resampling.BICUBIC), np.float32) / 255
        height, width = (np.array([side]) for side in pixels.shape[:2])
        if self.seed is None:
            (top,), (left,), flip = *centre_crop_positions(height, width, self.crop), [False]
        else:
            draw = random_crop_positions(height, width, self.crop, np.array([index]), self.seed, self.epoch)
            (top,), (left,), flip = draw
        pixels = pixels[top : top + self.crop, left : left + self.crop]
        return torch.from_numpy(np.ascontiguousarray(pixels[:, ::-1] if flip[0] else pixels)).permute(2, 0, 1)


class Block(nn.Module):
    """Pre-norm transformer block with attention written out as in Vaswani et al. (2017), equation 1."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.projection = nn.Linear(channels, channels)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(
            nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels)
        )

    def forward(self, tokens: Float[Tensor, "batch n c"]) -> Float[Tensor, "batch n c"]:
        b, n, c = tokens.shape
        q, k, v = self.qkv(self.norm1(tokens)).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) / math.sqrt(c // self.heads)).softmax(dim=-1)
        tokens = tokens + self.projection((weights @ v).transpose(1, 2).reshape(b, n, c))
        return tokens + self.mlp(self.norm2(tokens))


class ReferenceDecoder(nn.Module):
    """Decoder of four `Block`s (none for `transposed`), then 4x4 transposed convolutions with batch norm and ReLU."""

    def __init__(self, channels: int, size: int, image_size: int, depth: int = 4) -> None:
        super().__init__()
        heads = math.gcd(8, channels)
        self.blocks = nn.Sequential(*(Block(channels, heads) for _ in range(depth)))
        stages = []
        for _ in range(round(math.log2(image_size / size))):
            narrower = max(32, channels // 2)
            convolution = nn.ConvTranspose2d(channels, narrower, 4, stride=2, padding=1)
            stages.append(nn.Sequential(convolution, nn.BatchNorm2d(narrower), nn.ReLU()))
            channels = narrower
        self.stages = nn.Sequential(*stages)
        self.to_rgb = nn.Conv2d(channels, 3, 3, padding=1)
        self.image_size = image_size

    def forward(self, features: Float[Tensor, "batch c h w"]) -> Images:
        if self.blocks:
            tokens = self.blocks(features.flatten(2).transpose(1, 2))
            features = tokens.transpose(1, 2).reshape(features.shape)
        features = self.stages(features)
        if features.shape[-1] != self.image_size:
            features = nn.functional.interpolate(features, (self.image_size,) * 2, mode="bilinear")
        images = self.to_rgb(features)
        return images + (images.clamp(0, 1) - images).detach()  # clamp, but pass gradients through


def build(config: RunConfig) -> tuple[Encoder, ReferenceDecoder]:
    """Return the encoder up to its layer, and a decoder with the same initial weights as ours."""
    (source,), crop = config.sources, config.data.crop
    encoder = Encoder(source, weights=config.weights, image_size=crop, seed=config.seed)
    ours = create_decoder(config.decoder.name, encoder.specs, crop, seed=config.seed)
    depth = len(getattr(ours, "blocks", ()))
    if config.decoder.name not in ("attention", "transposed") or config.decoder.options:
        raise AfterimageError(
            f"the reference is attention or transposed, without options; got {config.decoder}"
        )
    decoder = ReferenceDecoder(encoder.specs[0].channels, encoder.specs[0].height, crop, depth)
    decoder.load_state_dict(ours.state_dict())
    return encoder, decoder


def train(
    config: RunConfig,
    *,
    micro_batch: int | None = None,
    after_epoch: Callable[[nn.Module, nn.Module], bool] | None = None,
    limit: float = math.inf,
    device: str | torch.device = "cpu",
) -> dict[str, Any]:
    """Train one decoder.

    Args:
        config: the run
        micro_batch: number of images in a forward pass, whose gradients are added up to a batch, if memory is short;
            batch norm then sees these smaller batches. None for whole batches
        after_epoch: called with encoder and decoder after each epoch, off the clock; training stops if it returns True
        limit: seconds of training after which training stops, also within an epoch
        device: device of encoder and decoder

    Returns:
        best validation loss, last training loss, seconds, processor seconds, and number of epochs
    """
    recipe, data = config.recipe, config.data
    encoder, decoder = build(config)
    encoder, decoder = encoder.to(device), decoder.to(device)
    source = read_source(data.source, {"train", "test"}, cache_folder())
    parts = split(data.source, source, data.validation_fraction, data.test_fraction, data.split_seed)
    limits = data.limit_train, data.limit_validation
    paths = [[str(o.path) for o in part[:limit]] for part, limit in zip(parts, limits, strict=False)]
    image_set = Originals(paths[0], data.resize, data.crop, config.seed if recipe.augment else None)
    validation = Originals(paths[1], data.resize, data.crop, None)
    micro, workers = micro_batch or recipe.batch_size, min(4, os.cpu_count() or 1)
    adam = torch.optim.Adam(decoder.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
        adam, factor=recipe.plateau_factor, patience=recipe.plateau_patience
    )
    best, loss, started, aside, busy = math.inf, math.nan, time.perf_counter(), 0.0, sum(os.times()[:4])
    for epoch in range(recipe.epochs):
        decoder.train()
        image_set.epoch = epoch
        indices = epoch_order(len(image_set), seed=config.seed, epoch=epoch).tolist()
        loader = DataLoader(image_set, recipe.batch_size, sampler=indices, num_workers=workers)
        for images in loader:
            for part in images.to(device).split(micro):
                error = nn.functional.mse_loss(decoder(encoder(part)[0]), part)
                (error * len(part) / len(images)).backward()
            adam.step()
            adam.zero_grad()
            loss = error.item()
            if time.perf_counter() - started - aside > limit:
                break
        late = time.perf_counter() - started - aside > limit
        decoder.eval()
        with torch.no_grad():
            errors = [
                nn.functional.mse_loss(decoder(encoder(part)[0]), part).item() * len(part)
                for images in DataLoader(validation, recipe.batch_size, num_workers=workers)
                for part in images.to(device).split(micro)
            ]
        best = min(best, sum(errors) / len(validation))
        plateau.step(sum(errors) / len(validation))
        paused = time.perf_counter()
        stop = after_epoch is not None and after_epoch(encoder, decoder)
        aside += time.perf_counter() - paused
        if stop or late:
            break
    return {
        "validation_loss": best,
        "train_loss": loss,
        "seconds": time.perf_counter() - started - aside,
        "cpu_seconds": sum(os.times()[:4]) - busy,
        "epochs": epoch + 1,
    }
