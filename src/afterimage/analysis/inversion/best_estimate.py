"""The best estimate of an image from features: least expected squared error, learnt on images that came the same way.

A refined image fits the features, and where they leave the image open it shows one of many that fit. Least error
needs their mean. A small network learns it from refined images whose originals are known: where such images are
usually right it leaves them alone, and what they usually invent it averages away. It never sees the features, so what
it adds was read from them by the passes or is what images in general are like.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afterimage.analysis.inversion.batches import Batches
from afterimage.analysis.inversion.decoder_errors import DecoderErrors
from afterimage.analysis.inversion.invert import (
    Images,
    Inversion,
    Snapshot,
    differentiable,
    encode,
    invert,
)
from afterimage.analysis.inversion.objective import feature_distance
from afterimage.config.inversion import EstimateConfig, InvertConfig
from afterimage.data.images import ImageSet
from afterimage.models.reconstructor import Reconstructor
from afterimage.runtime.progress import Progress, silent

BATCH = 8
CROP = 112
"""Side of the crops that a corrector learns from, at most."""
GRID = 16
"""Sides of what the network sees are multiples of this: it halves them four times."""
LEARNING_RATE, WEIGHT_DECAY, WARM_UP = 1e-3, 1e-3, 30


class Corrector(nn.Module):
    """A U-Net from decoded, current and refined image to an estimate of the original.

    The estimate is `current + mix * (refined - current) + scale * network`. `mix` starts as the best single number,
    the last layer at 0; `scale` is the remaining error's, so that a layer that is nearly inverted is corrected as
    finely as one that is not.

    Args:
        channels: width at half resolution; twice and four times as much below
        mix: share of the step from current to refined image
        spread: root mean squares of current less decoded image, refined less current, and of the remaining error
    """

    def __init__(self, channels: int, mix: float, spread: Sequence[float]) -> None:
        super().__init__()
        widths = (channels, 2 * channels, 4 * channels, 4 * channels)
        self.mix = nn.Parameter(torch.tensor(mix))
        self.spread = tuple(spread)
        self.first = nn.Conv2d(4 * 9, widths[0], 3, padding=1)
        self.down = nn.ModuleList(nn.Conv2d(a, b, 2, stride=2) for a, b in itertools.pairwise(widths))
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, stride=2) for a, b in itertools.pairwise(widths))
        self.before, self.after = (
            nn.ModuleList(_block(width) for width in part) for part in (widths, widths[:-1])
        )
        self.last = nn.Conv2d(widths[0], 4 * 3, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        self.to(memory_format=torch.channels_last)

    def forward(self, decoded: Images, current: Images, refined: Images) -> Images:
        """Estimate the originals; all images are `(B, 3, H, W)` in [0, 1], and so is the answer, but for rounding."""
        moved, step, scale = self.spread
        seen = torch.cat([4 * decoded - 2, (current - decoded) / moved, (refined - current) / step], 1)
        height, width = seen.shape[-2:]
        margins = (0, -width % GRID, 0, -height % GRID)
        x = self.first(_channels_last(F.pixel_unshuffle(F.pad(seen, margins, mode="replicate"), 2)))
        skips = []
        for block, down in zip(self.before[:-1], self.down, strict=True):
            skips.append(x + block(x))
            x = down(skips[-1])
        x = x + self.before[-1](x)
        for block, up, skip in zip(self.after[::-1], self.up[::-1], reversed(skips), strict=True):
            x = up(x) + skip
            x = x + block(x)
        correction = F.pixel_shuffle(self.last(F.silu(x)), 2)[..., :height, :width].float()
        return current + self.mix * (refined - current) + scale * correction


def _block(width: int) -> nn.Module:
    layers = [nn.Conv2d(width, width, 3, padding=1) for _ in range(2)]
    return nn.Sequential(nn.SiLU(), layers[0], nn.SiLU(), layers[1])


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _rms(x: Tensor) -> float:
    return max(float(x.square().mean().sqrt()), 1e-6)


@dataclass(frozen=True)
class BestEstimate:
    """Rounds of passes and corrections that lead from a decoder's answer to the best estimate.

    Attributes:
        reconstructor: the encoder, and the decoder whose answer is the start
        method: settings of the passes of a round
        rounds: what each round's start is expected to lack, and the corrector of what its passes lead to
        images: how many images they were learned from
    """

    reconstructor: Reconstructor
    method: InvertConfig
    rounds: Sequence[tuple[DecoderErrors, Corrector]]
    images: int

    def __call__(
        self,
        images: Images,
        *,
        callback: Callable[[Snapshot], None] | None = None,
        milestones: Sequence[int] = (),
        progress: Progress = silent,
    ) -> Inversion:
        """Encode `images` and estimate them from their features.

        Args:
            images: `(B, 3, H, W)` in [0, 1]
            callback: is told the decoder's answer and the estimate after each round
            milestones: not used; an estimate exists after each round only
            progress: is told how far the passes of a round are
        """
        targets, size = encode(self.reconstructor, images), tuple(images.shape[-2:])
        return self.of_features(targets, size, callback=callback, progress=progress)

    def of_features(
        self,
        targets: Sequence[Tensor],
        size: tuple[int, int],
        *,
        callback: Callable[[Snapshot], None] | None = None,
        progress: Progress = silent,
    ) -> Inversion:
        """Estimate images of `size` from their feature maps; arguments as those of the call."""
        with torch.no_grad():
            decoded = self.reconstructor.feature_decoder(targets).clone()
        current, started, watched = decoded, time.monotonic(), 0.0

        def tell(number: int) -> Tensor:
            nonlocal watched
            paused = time.monotonic()
            with torch.no_grad():
                distance = feature_distance(self.reconstructor.encoders(current), targets)
            if callback is not None:
                callback(Snapshot(number * self.method.steps, paused - started - watched, current, distance))
            watched += time.monotonic() - paused
            return distance

        distance = tell(0)
        for number, (errors, corrector) in enumerate(self.rounds, 1):
            refined = _refine(self.reconstructor, targets, current, self.method, errors, progress).images
            current = _correct(corrector, decoded, current, refined, self.method.precision)
            distance = tell(number)
        return Inversion(current, distance, time.monotonic() - started - watched)


def learn_estimate(
    reconstructor: Reconstructor,
    image_set: ImageSet,
    config: EstimateConfig,
    folder: Path,
    *,
    made_for: Any = None,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress = silent,
) -> BestEstimate:
    """Learn to estimate on the first images of a set that the decoder was not fitted on.

    In each round the decoder's errors are learned anew from where the images are by then. The passes of finished
    batches are kept in `folder`, so that an interrupted search goes on from there.

    Args:
        reconstructor: encoder and decoder
        image_set: images that the decoder was not fitted on; `config.images` of them are taken, or all
        config: how many images, rounds, passes and steps
        folder: takes files of finished batches; `clear` of its `Batches` removes them
        made_for: what else the batches depend on
        seed: of the passes and of the correctors
        device: where
        progress: is told how far it is

    Raises:
        AfterimageError: there are no images
    """
    parts = torch.arange(min(config.images, len(image_set))).split(BATCH)
    originals = [image_set.crops(indices, device=device) for indices in parts]
    targets = [encode(reconstructor, images) for images in originals]
    with torch.no_grad():
        decoded = [reconstructor.feature_decoder(maps).clone() for maps in targets]
    current = decoded
    method = InvertConfig(steps=config.passes, precision=config.precision)
    rounds: list[tuple[DecoderErrors, Corrector]] = []
    for number in range(config.rounds):
        errors = DecoderErrors.learn(_errors(reconstructor, originals, targets, current))
        kept = Batches(folder, [made_for, asdict(config), number])
        refined = []
        for indices, wanted, start in zip(parts, targets, current, strict=True):
            first = number * len(image_set) + int(indices[0])
            found, _ = kept.load(first, start) or (None, None)
            if found is None:
                found = _refine(reconstructor, wanted, start, method, errors, progress)
                kept.save(first, start, found, [])
            # In one order of memory, whether it was kept or not: sums depend on it.
            refined.append(found.images.contiguous())
            what = f"round {number + 1} of {config.rounds}: refining images to learn from"
            progress(what, int(indices[-1]) + 1, int(parts[-1][-1]) + 1)
        images = [torch.cat(group).cpu() for group in (originals, decoded, current, refined)]
        corrector = learn_corrector(*images, config, seed=seed, device=device, progress=progress)
        rounds.append((errors, corrector))
        current = [
            _correct(corrector, *group, config.precision)
            for group in zip(decoded, current, refined, strict=True)
        ]
    return BestEstimate(reconstructor, method, rounds, sum(map(len, parts)))


def _refine(
    reconstructor: Reconstructor,
    targets: Sequence[Tensor],
    start: Images,
    method: InvertConfig,
    errors: DecoderErrors,
    progress: Progress,
) -> Inversion:
    with differentiable(reconstructor.encoders) as features_of:
        size = tuple(start.shape[-2:])
        return invert(
            features_of, targets, size, start=start, method=method, errors=errors, progress=progress
        )


@torch.no_grad()
def _correct(
    corrector: Corrector, decoded: Images, current: Images, refined: Images, precision: str
) -> Images:
    with torch.autocast(decoded.device.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
        return corrector(decoded, current, refined).float().clamp(0, 1)


@torch.no_grad()
def _errors(
    reconstructor: Reconstructor,
    originals: Sequence[Tensor],
    targets: Sequence[Sequence[Tensor]],
    current: Sequence[Tensor],
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    for images, wanted, found in zip(originals, targets, current, strict=True):
        yield images - found, [a - b for a, b in zip(reconstructor.encoders(found), wanted, strict=True)]


def learn_corrector(
    originals: Images,
    decoded: Images,
    current: Images,
    refined: Images,
    config: EstimateConfig,
    *,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress = silent,
) -> Corrector:
    """Train a corrector for the squared error, on crops that are mirrored half of the time.

    Args:
        originals: what is to come out, `(N, 3, H, W)` in [0, 1]
        decoded: the decoder's answers
        current: what each refinement started from
        refined: what it ended with
        config: width and number of steps, and `precision`: `bf16-mixed` trains in bfloat16
        seed: of the initial weights, the crops and their order
        device: where
        progress: is told the step and its loss
    """
    step, wanted = refined - current, originals - current
    mix = float((step * wanted).sum() / step.square().sum().clamp_min(1e-20))
    spread = (_rms(current - decoded), _rms(step), _rms(wanted - mix * step))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Corrector(config.channels, mix, spread).to(device)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    size = originals.shape[-2:]
    side = [min(CROP, max(GRID, length // GRID * GRID)) for length in size]
    mixed = config.precision == "bf16-mixed"
    for number in range(config.steps):
        warm = min(1, (number + 1) / WARM_UP)
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * warm * (1 - number / config.steps)
        chosen = torch.randint(len(originals), (BATCH,), generator=generator)
        top, left = (
            int(torch.randint(max(0, length - part) + 1, (1,), generator=generator))
            for length, part in zip(size, side, strict=True)
        )
        area = (chosen, slice(None), slice(top, top + side[0]), slice(left, left + side[1]))
        crops = [images[area].to(device) for images in (originals, decoded, current, refined)]
        if number % 2:
            crops = [crop.flip(-1) for crop in crops]
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=mixed):
            estimate = network(*crops[1:])
        loss = ((estimate - crops[0]) / spread[-1]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress("learning what to correct", number + 1, config.steps, loss=lambda value=loss: float(value))
    return network.eval()
