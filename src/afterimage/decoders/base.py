"""What every decoder is: built from measured shapes alone, returns pictures in [0, 1]."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from afterimage.config import AfterimageError, FeatureSpec
from afterimage.decoders.canvas import Canvas, Window
from afterimage.ranks import ALONE, Ranks


class Decoder(nn.Module, ABC):
    """A map from feature maps `[(B, C, h, w), ...]` to pictures `(B, 3, H, W)` in [0, 1].

    What a decoder makes of a map is its `canvas`, the pixels of the map's cells; the canvas then puts it where these
    lie in the image. A decoder with `closed_form` is first shown the data once (`prepare`, `accumulate`, `solve`);
    one with `trainable` is then trained by gradient descent. The two may go together.
    """

    closed_form = False
    trainable = True
    decays = True
    """Whether the recipe's weight decay applies to it."""
    size_option: str | None = None
    """The option that makes the decoder larger or smaller, in steps of `size_step`."""
    size_step = 1
    fine_option: str | None = None
    """A second option, between half and twice its default, that evens out what a step leaves."""
    smaller: ClassVar[dict[str, Any]] = {}
    """Options with which the decoder can be smaller still, for sizes that are out of reach without them."""

    def __init__(self, specs: Sequence[FeatureSpec], image_size: tuple[int, int]) -> None:
        super().__init__()
        if len(specs) != 1:
            names = ", ".join(spec.source for spec in specs)
            raise AfterimageError(
                f"{type(self).__name__} takes one feature map, got {len(specs)} ({names}); fuse them first"
            )
        self.spec = specs[0]
        self.image_size = image_size
        self.canvas = Canvas(self.spec, image_size)

    def forward(
        self, features: Sequence[Float[Tensor, "batch _ _ _"]], window: Window | None = None
    ) -> Float[Tensor, "batch 3 height width"]:
        """Rebuild pictures `(B, 3, H, W)` in [0, 1] from a list with one feature map `(B, C, h, w)`.

        With one of its `windows`, only that part of the pictures (`cut` cuts it out of a picture).
        """
        (features,) = features
        expected = (self.spec.channels, self.spec.height, self.spec.width)
        if features.shape[1:] != expected:
            raise AfterimageError(
                f"this decoder was built for {self.spec.source} with features of shape {expected}, "
                f"got {tuple(features.shape[1:])}"
            )
        if window is None:
            return clamp(self.canvas.place(self.decode(features)))
        rows, columns = self.canvas.window(window)[0]
        return clamp(self.decode(features, window)[..., rows, columns])

    @abstractmethod
    def decode(self, features: Tensor) -> Tensor:
        """Fill canvases `(B, 3, *canvas.size)`, not yet held to [0, 1].

        A decoder with `windows` takes one as a second argument.
        """

    def windows(self, generator: torch.Generator) -> list[Window | None]:
        """The parts of a batch's maps to train on, an optimizer step each; None is all of it."""
        return [None]

    def cut(self, images: Tensor, window: Window | None) -> Tensor:
        """The part of pictures `(B, 3, H, W)` that belongs to a window of their features."""
        if window is None:
            return images
        rows, columns = self.canvas.window(window)[1]
        return images[..., rows, columns]

    def stepped(self) -> None:
        """Called after every optimizer step."""

    def prepare(self, pictures: int, seed: int, ranks: Ranks = ALONE) -> int:
        """Announce how many training pictures there are; returns how many views of each are wanted.

        Each of the `ranks` is then given its part of every batch, which may be none, and all solve together.
        """
        return 1

    def accumulate(self, features: Sequence[Tensor], images: Tensor, *, validation: bool = False) -> None:
        """Take in a batch for the closed-form solution."""

    def solve(self) -> list[str]:
        """Compute the closed-form solution; returns notes for the report."""
        return []

    @property
    def bytes_to_solve(self) -> int:
        """Memory that the closed form takes beside the decoder itself."""
        return 0

    def macs_to_solve(self, pictures: int) -> int:
        """Multiply-adds of the closed form on so many training pictures, those in float64 counted twice."""
        return 0


class _Clamp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pictures):
        ctx.save_for_backward(pictures)
        return pictures.clamp(0, 1)

    @staticmethod
    def backward(ctx, gradient):
        (pictures,) = ctx.saved_tensors
        outward = ((pictures > 1) & (gradient < 0)) | ((pictures < 0) & (gradient > 0))
        return gradient.masked_fill(outward, 0)


def clamp(pictures: Tensor) -> Tensor:
    """Hold pictures to [0, 1] and let gradients pass, but for those that lead further beyond the range.

    A sigmoid saturates where photographs have most of their black and white; a plain clamp has no gradient to
    bring a value back. Straight through, a value beyond the range is drawn back unless its target is the bound.
    Errors of pixels never lead outward there; LPIPS may, and without end, as what it sees does not change.
    """
    return _Clamp.apply(pictures)


def for_sums(tensor: Tensor) -> Tensor:
    """Where it can be summed in float64: on the CPU where it lies on an Apple GPU, which has no such numbers."""
    return tensor.cpu() if tensor.device.type == "mps" else tensor


def enlarge(maps: Float[Tensor, "batch cbb h w"], block: tuple[int, int]) -> Float[Tensor, "batch c hb wb"]:
    """Give every location its block of pixels: a pixel shuffle whose blocks need not be square, also of no maps."""
    (b, cbb, h, w), (bh, bw) = maps.shape, block
    if bh == bw and b:
        return F.pixel_shuffle(maps, bh)
    c = cbb // (bh * bw)
    return maps.view(b, c, bh, bw, h, w).permute(0, 1, 4, 2, 5, 3).reshape(b, c, h * bh, w * bw)


def shrink(maps: Float[Tensor, "batch c hb wb"], block: tuple[int, int]) -> Float[Tensor, "batch cbb h w"]:
    """The inverse of `enlarge`."""
    (b, c, height, width), (bh, bw) = maps.shape, block
    if bh == bw and b:  # of no maps it forgets to unshuffle
        return F.pixel_unshuffle(maps, bh)
    maps = maps.view(b, c, height // bh, bh, width // bw, bw).permute(0, 1, 3, 5, 2, 4)
    return maps.reshape(b, c * bh * bw, height // bh, width // bw)


def adapter(channels: int, wanted: int | None) -> nn.Module:
    """A 1x1 convolution to `wanted` channels; nothing where none are asked for."""
    return nn.Identity() if wanted is None else nn.Conv2d(channels, wanted, kernel_size=1)


class Doubling(nn.ConvTranspose2d):
    """A transposed convolution (4x4) that doubles height and width: `(B, C, h, w)` to `(B, narrower, 2h, 2w)`.

    The bias is added by itself: on a CPU its gradient within the kernel takes as long as the other two together.
    """

    def __init__(self, channels: int, narrower: int) -> None:
        super().__init__(channels, narrower, kernel_size=4, stride=2, padding=1)

    def forward(self, maps: Tensor) -> Tensor:
        doubled = F.conv_transpose2d(maps, self.weight, None, self.stride, self.padding)
        return doubled + self.bias.to(doubled.dtype)[:, None, None]


def stage(convolution: nn.Module) -> nn.Sequential:
    """A convolution, batch norm and ReLU."""
    return nn.Sequential(convolution, nn.BatchNorm2d(convolution.out_channels), nn.ReLU(inplace=True))


def stages_between(size: tuple[int, int], target: tuple[int, int]) -> int:
    """The number of doublings that brings `size` nearest to `target`."""
    ratio = math.sqrt((target[0] * target[1]) / (size[0] * size[1]))
    return max(0, round(math.log2(ratio)))


def resize(pictures: Float[Tensor, "batch c _ _"], size: tuple[int, int]) -> Float[Tensor, "batch c _ _"]:
    """Bilinear, antialiased when it shrinks; the identity where the size already fits."""
    if tuple(pictures.shape[-2:]) == tuple(size):
        return pictures
    shrinks = size[0] < pictures.shape[-2] or size[1] < pictures.shape[-1]
    # PyTorch antialiases in float32 only.
    exact = pictures.float() if shrinks and pictures.dtype in (torch.bfloat16, torch.float16) else pictures
    resized = F.interpolate(exact, size=tuple(size), mode="bilinear", antialias=shrinks, align_corners=False)
    return resized.to(pictures.dtype)
