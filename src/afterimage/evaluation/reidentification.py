"""Re-identification: test whether a reconstruction is nearest to its own original among all test images."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from afterimage.config import LPIPS_MIN_SIDE
from afterimage.evaluation.evaluate import VISIBLE_SUFFIX, Box, crop_to_box
from afterimage.models.lpips import LPIPS
from afterimage.runs.audit import COMPARISON_SIDE

Images = Float[Tensor, "_ 3 height width"]
Distances = Float[Tensor, "queries candidates"]


def downscale(images: Images) -> Float[Tensor, "_ 3 _ _"]:
    """Reduce images for comparison to at most `COMPARISON_SIDE` pixels on the shorter side, antialiased."""
    height, width = images.shape[-2:]
    scale = COMPARISON_SIDE / min(height, width)
    if scale >= 1:
        return images
    return F.interpolate(
        images, (round(height * scale), round(width * scale)), mode="bilinear", antialias=True
    )


Compared = dict[str, Float[Tensor, "_ 3 _ _"]]
"""Reduced images for comparison: whole images under "", and the visible part, if that is not all, under
`VISIBLE_SUFFIX`."""


def prepare_images(images: Images, box: Box | None) -> Compared:
    """Reduce images and, if there is a box, their part in it, and move them to the CPU."""
    whole = {"": downscale(images).cpu()}
    return whole if box is None else whole | {VISIBLE_SUFFIX: downscale(crop_to_box(images, box)).cpu()}


def concatenate_batches(batches: Sequence[Compared]) -> Compared:
    """Concatenate several batches."""
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


class Gallery:
    """Test images to which reconstructions are compared by each of `DISTANCES`: pixels, correlation and LPIPS.

    Args:
        originals: all test images, reduced
        lpips: network of the LPIPS distance, which is left out without a network or if images are too small for it
    """

    def __init__(self, originals: Images, lpips: LPIPS | None = None) -> None:
        fits = lpips is not None and min(originals.shape[-2:]) >= LPIPS_MIN_SIDE[lpips.net]
        self.originals, self.lpips = originals, lpips if fits else None
        self._known = {name: embed(originals) for name, embed in self._embeddings().items()}

    def _embeddings(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """Return an embedding for each distance: the distance is the squared one of embeddings, up to a factor."""
        embeddings = {"pixels": lambda images: images.flatten(1), "correlation": _standardised}
        return embeddings if self.lpips is None else embeddings | {"lpips": self._perceptual}

    @torch.inference_mode()
    def _perceptual(self, images: Tensor) -> Tensor:
        # LPIPS is a weighted squared difference of features: multiply each side by the square roots of the weights.
        rows = []
        for part in images.split(8):
            columns = []
            for index, maps in enumerate(self.lpips.features(part)):
                weights = getattr(self.lpips, f"head{index}") / maps[0, 0].numel()
                columns.append((maps * weights.clamp(min=0).sqrt()[:, None, None]).flatten(1))
            rows.append(torch.cat(columns, 1))
        return torch.cat(rows)

    def distances(self, reconstructions: Images) -> dict[str, Distances]:
        """Compute squared distances of every reconstruction to every test image, up to a factor for each distance."""
        found = {}
        for name, embed in self._embeddings().items():
            known, rows = self._known[name], embed(reconstructions)
            found[name] = rows.square().sum(1)[:, None] + known.square().sum(1) - 2 * rows @ known.T
        return found

    def identify(self, reconstructions: Images) -> dict[str, Bool[np.ndarray, " queries"]]:
        """Return, for each distance, whether reconstruction `i` is nearest to test image `i`.

        Ties are broken in a fixed random order, so that reconstructions without information are re-identified at the
        rate of chance.
        """
        order = torch.from_numpy(np.random.default_rng(0).permutation(len(self.originals)))
        own = torch.arange(len(reconstructions))
        distances = self.distances(reconstructions.to(self.originals.device))
        return {
            name: (order[values.cpu()[:, order].argmin(1)] == own).numpy()
            for name, values in distances.items()
        }


def _standardised(images: Tensor) -> Tensor:
    rows = images.flatten(1) - images.flatten(1).mean(1, keepdim=True)
    length = rows.norm(dim=1, keepdim=True)
    # A reconstruction without contrast becomes zero, so that rounding errors give it no direction.
    return torch.where(
        length > 1e-4 * rows.shape[1] ** 0.5, rows / length.clamp(min=1e-12), torch.zeros_like(rows)
    )
