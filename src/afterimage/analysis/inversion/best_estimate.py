"""The best estimate of an image from features: the image of least expected squared error.

A refined image fits the features. Where these do not determine the image, it shows only one of many images
that fit, while the least error needs the mean of all of them. A small network learns this mean from images
that were refined in the same way and whose originals are known: it leaves alone what is usually right and
averages out details that are usually wrong. It never sees the features, so everything it shows was either
recovered from them by the search or is typical of images in general.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from afterimage.analysis.inversion.invert import Images
from afterimage.config.inversion import EstimateConfig
from afterimage.runtime.terminal import Progress, no_progress

BATCH = 8
CROP = 112
"""Largest side in pixels of the crops that a corrector is trained on."""
MAX_IMAGE_USES = 75
"""Largest mean number of times that training uses an image: with few images the network soon overfits."""
SIZE_DIVISOR = 16
"""Divisor in pixels of the sides of the network's inputs, which it halves four times."""
LEARNING_RATE, WEIGHT_DECAY, WARM_UP = 1e-3, 1e-3, 30


class Corrector(nn.Module):
    """U-Net that estimates the original from the decoded and the refined image.

    The estimate is `decoded + mix * (refined - decoded) + scale * network`. Training starts from the given
    `mix`, the best single number, and from a last layer of zeros. The constant `scale` is the size of the
    remaining error, so that corrections are fine enough for a layer that is nearly inverted, too.

    Args:
        channels: width at half resolution; lower resolutions have twice and four times as many channels
        mix: share of the step from decoded to refined image
        step: root mean square of that step
        scale: root mean square of the error that the mixture leaves
    """

    def __init__(self, channels: int, mix: float, step: float, scale: float) -> None:
        super().__init__()
        widths = (channels, 2 * channels, 4 * channels, 4 * channels)
        self.mix = nn.Parameter(torch.tensor(mix))
        self.step, self.scale = step, scale
        self.first = nn.Conv2d(4 * 6, widths[0], 3, padding=1)
        self.down = nn.ModuleList(nn.Conv2d(a, b, 2, stride=2) for a, b in itertools.pairwise(widths))
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, stride=2) for a, b in itertools.pairwise(widths))
        self.before, self.after = (
            nn.ModuleList(_block(width) for width in part) for part in (widths, widths[:-1])
        )
        self.last = nn.Conv2d(widths[0], 4 * 3, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        self.to(memory_format=torch.channels_last)

    def forward(self, decoded: Images, refined: Images) -> Images:
        """Estimate the originals; all images are `(B, 3, H, W)`, around [0, 1]."""
        seen = torch.cat([4 * decoded - 2, (refined - decoded) / self.step], 1)
        height, width = seen.shape[-2:]
        margins = (0, -width % SIZE_DIVISOR, 0, -height % SIZE_DIVISOR)
        x = F.pixel_unshuffle(F.pad(seen, margins, mode="replicate"), 2)
        x = self.first(x.contiguous(memory_format=torch.channels_last))
        skips = []
        for block, down in zip(self.before[:-1], self.down, strict=True):
            skips.append(x + block(x))
            x = down(skips[-1])
        x = x + self.before[-1](x)
        for block, up, skip in zip(self.after[::-1], self.up[::-1], reversed(skips), strict=True):
            x = up(x) + skip
            x = x + block(x)
        correction = F.pixel_shuffle(self.last(F.silu(x)), 2)[..., :height, :width].float()
        return decoded + self.mix * (refined - decoded) + self.scale * correction


def _block(width: int) -> nn.Module:
    layers = [nn.Conv2d(width, width, 3, padding=1) for _ in range(2)]
    return nn.Sequential(nn.SiLU(), layers[0], nn.SiLU(), layers[1])


def corrector_steps(config: EstimateConfig, images: int) -> int:
    """Return the number of optimizer steps for a number of images: `config.steps`, fewer for few images."""
    return min(config.steps, -(-MAX_IMAGE_USES * images // BATCH))


def corrector_training_macs(config: EstimateConfig, size: tuple[int, int]) -> int:
    """Count the multiply-adds of `train_corrector` on images of `(height, width)`, forward and backward."""
    with torch.device("meta"), torch.no_grad():
        network, crops = Corrector(config.channels, 1.0, 1.0, 1.0), torch.empty(BATCH, 3, *_crop(size))
        with FlopCounterMode(display=False) as counter:
            network(crops, crops)
    return 3 * corrector_steps(config, config.images) * counter.get_total_flops() // 2


def _crop(size: tuple[int, int]) -> tuple[int, int]:
    """Return height and width of the crops that a corrector is trained on."""
    height, width = (min(CROP, max(SIZE_DIVISOR, length // SIZE_DIVISOR * SIZE_DIVISOR)) for length in size)
    return height, width


def _rms(x: Tensor) -> float:
    return max(float(x.square().mean().sqrt()), 1e-6)


@torch.no_grad()
def correct(corrector: Corrector, decoded: Images, refined: Images, precision: str) -> Images:
    """Return best estimates in [0, 1] from decoded and refined images in [0, 1].

    Each is the mean of two: of the images, and of their mirror images (self-ensemble, Lim et al. 2017, section 3.4).
    """
    decoded = decoded.clamp(0, 1)
    with torch.autocast(decoded.device.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
        straight = corrector(decoded, refined).float()
        mirrored = corrector(decoded.flip(-1), refined.flip(-1)).float().flip(-1)
    return ((straight + mirrored) / 2).clamp(0, 1)


def train_corrector(
    originals: Images,
    decoded: Images,
    refined: Images,
    config: EstimateConfig,
    *,
    precision: str = "32-true",
    seed: int = 0,
    device: str = "cpu",
    progress: Progress = no_progress,
) -> Corrector:
    """Train a corrector to minimise the squared error, on random crops that every other step mirrors.

    Args:
        originals: the images to estimate, `(N, 3, H, W)` in [0, 1]
        decoded: the decoder's reconstructions
        refined: the images that the search found from there
        config: width of the network and largest number of steps
        precision: `32-true`, or `bf16-mixed` to train in bfloat16
        seed: seed of the initial weights, the crops and their order
        device: device to train on
        progress: called with each step and its loss
    """
    step, wanted = refined - decoded, originals - decoded
    mix = float((step * wanted).sum() / step.square().sum().clamp_min(1e-20))
    scale = _rms(wanted - mix * step)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Corrector(config.channels, mix, _rms(step), scale).to(device)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    size = originals.shape[-2:]
    side = _crop(size)
    mixed, steps = precision == "bf16-mixed", corrector_steps(config, len(originals))
    for number in range(steps):
        warm = min(1, (number + 1) / WARM_UP)
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * warm * (1 - number / steps)
        chosen = torch.randint(len(originals), (BATCH,), generator=generator)
        top, left = (
            int(torch.randint(max(0, length - part) + 1, (1,), generator=generator))
            for length, part in zip(size, side, strict=True)
        )
        area = (chosen, slice(None), slice(top, top + side[0]), slice(left, left + side[1]))
        crops = [images[area].to(device) for images in (originals, decoded, refined)]
        if number % 2:
            crops = [crop.flip(-1) for crop in crops]
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=mixed):
            estimate = network(*crops[1:])
        loss = ((estimate - crops[0]) / scale).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress("learning what to correct", number + 1, steps, loss=lambda value=loss: value.item())
    return network.eval()
