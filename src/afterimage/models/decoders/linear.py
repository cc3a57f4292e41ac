"""Decoder by ridge regression in closed form: from a neighbourhood of features to a block of pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afterimage.config import AfterimageError, FeatureSpec
from afterimage.models.decoders.base import Decoder
from afterimage.models.layers.blocks import pixel_shuffle, resize, to_float64_device
from afterimage.runtime.distributed import SINGLE_PROCESS, ProcessGroup

FEW_ROWS = 200
"""Training rows per input below which a second view of each image still lowers the error."""

PANELS = 6
"""Number of panels in which the upper half of X'X is summed."""
RIDGE_OUTPUTS = 96
"""Approximate number of outputs on which the error of a ridge parameter is measured."""

RIDGES = (1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""Candidates for lambda. Larger ones do lower the error on few images of a deep layer, but only by blurring
away the differences between images."""


class LinearDecoder(Decoder):
    """Best linear map from each 3x3 neighbourhood of features to the block of pixels at its centre.

    Ridge regression (Hoerl & Kennard 1970): `W = (X'X + lambda D)^-1 X'Y`, where D is the diagonal of X'X, so
    that the penalty is the same for channels of different scale. A row of X is the neighbourhood of one
    location of one image, and the same row of Y is its block of pixels. X'X and X'Y are summed over one pass,
    or over two crops of each image if there are few rows. Lambda is the best on the validation images, among
    every second of `RIDGES` and the two neighbours of the best of these. At the border the outermost features
    are repeated. If the image is not a whole multiple of the features, blocks are rounded up and the result
    is resampled.

    Parameters are counted as for any convolution: `9 C (3 b^2) + 3 b^2` for blocks of b x b pixels.

    Args:
        specs: shape of the features; exactly one.
        image_size: height and width of the images in pixels.
        kernel: side of the neighbourhood in locations, odd.
        rows_per_input: number of rows for each value of a neighbourhood above which locations are sampled at
            random; `finalize_fit` then returns a note.
    """

    closed_form = True
    trainable = False
    vector_options: ClassVar = {"kernel": 1}

    def __init__(
        self,
        specs: Sequence[FeatureSpec],
        image_size: tuple[int, int],
        *,
        kernel: int = 3,
        rows_per_input: int = 1000,
    ) -> None:
        super().__init__(specs, image_size)
        if kernel % 2 == 0:
            raise AfterimageError(f"the linear decoder's kernel must be odd, got {kernel}")
        self.kernel = kernel
        self.rows_per_input = rows_per_input
        self.block = tuple(
            max(1, math.ceil(pixels / cells - 1e-6))
            for pixels, cells in zip(self.canvas.size, (self.spec.height, self.spec.width), strict=True)
        )
        inputs = self.spec.channels * kernel**2
        self.weight = nn.Parameter(torch.zeros(self.outputs, inputs), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(self.outputs), requires_grad=False)
        self._kinds, self._present = self._cells()
        self._inside = (self._kinds >= 0).nonzero().flatten()
        self._sums: dict[bool, list[_NormalEquations]] = {}

    def _cells(self) -> tuple[Tensor, Tensor]:
        """Return the kind of each location's cell `(h w,)`, and the mask of each kind `(kinds, 3 bh bw)`.

        Pixels outside the image have no target. The mask of a kind says which outputs lie inside the image. All
        cells inside the image are of one kind, with all outputs. Cells entirely outside the image have kind -1.
        """
        spans = (self.canvas.rows, self.canvas.columns)
        (rows, row), (columns, column) = (
            torch.unique(span.inside_mask(block), dim=0, return_inverse=True)
            for span, block in zip(spans, self.block, strict=True)
        )
        present = (rows[:, None, None, :, None] & columns[None, :, None, None, :]).expand(-1, -1, 3, -1, -1)
        present = present.reshape(len(rows) * len(columns), self.outputs)
        some = present.any(1)
        numbers = torch.where(some, some.cumsum(0) - 1, -1)
        return numbers[(row[:, None] * len(columns) + column).flatten()], present[some]

    @property
    def outputs(self) -> int:
        return 3 * self.block[0] * self.block[1]

    @property
    def fit_bytes(self) -> int:
        inputs = self.weight.shape[1] + 1
        # Sums of training and validation images for each kind of cell. While solving: sums over several
        # kinds, and a penalised copy of X'X with its diagonal and its factor.
        sums = 2 * len(self._present) * inputs * (inputs + self.outputs)
        several = 2 * inputs * (inputs + self.outputs) if len(self._present) > 1 else 0
        return 8 * (sums + several + 3 * inputs**2)

    def fit_macs(self, images: int) -> int:
        views, locations = self._sampling(images)
        rows = views * images * locations
        inputs = self.weight.shape[1] + 1
        searched = len(RIDGES[::2]) + 2
        # Half of the symmetric X'X and all of X'Y; then n^3 / 6 in float64 for each factorisation of the
        # search and of the solutions.
        solved = len(torch.unique(self._present, dim=1).T)
        return rows * inputs * (inputs // 2 + self.outputs) + 2 * (searched + solved) * inputs**3 // 6

    def decode(self, features: Tensor) -> Tensor:
        return resize(self.unblock(self.blocks(pad(features, self.kernel // 2))), self.canvas.size)

    def blocks(self, padded: Tensor) -> Tensor:
        """Return the blocks of pixels `(B, 3 bh bw, h, w)` for features that are padded by half a kernel."""
        c, k = self.spec.channels, self.kernel
        kernel = self.weight.view(self.outputs, k, k, c).permute(0, 3, 1, 2)
        # Exact even under autocast: large coefficients of correlated channels cancel each other.
        exact = nullcontext() if padded.is_meta else torch.autocast(padded.device.type, enabled=False)
        with exact:
            return F.conv2d(padded.to(self.weight.dtype), kernel, self.bias)

    def unblock(self, blocks: Tensor) -> Tensor:
        """Arrange blocks `(B, 3 bh bw, h, w)` as images `(B, 3, h bh, w bw)`."""
        return pixel_shuffle(blocks, self.block)

    def extract_blocks(self, images: Tensor) -> Tensor:
        """Return the pixels of each location of images `(B, 3, H, W)`, as rows `(B, h w, 3 bh bw)`."""
        h, w = self.spec.height, self.spec.width
        images = resize(self.canvas.cut(images), (h * self.block[0], w * self.block[1]))
        parts = images.view(images.shape[0], 3, h, self.block[0], w, self.block[1])
        return parts.permute(0, 2, 4, 1, 3, 5).reshape(images.shape[0], h * w, self.outputs)

    def begin_fit(self, images: int, seed: int, ranks: ProcessGroup = SINGLE_PROCESS) -> int:
        self._ranks = ranks
        views, self._locations_per_view = self._sampling(images)
        self._generator = torch.Generator().manual_seed(seed)
        self._sums = {}
        return views

    def _sampling(self, images: int) -> tuple[int, int]:
        """Return the numbers of views of each training image, and of locations of each view, to fit on."""
        inputs = self.weight.shape[1] + 1
        budget = max(self.rows_per_input * inputs, 100_000)
        locations = min(len(self._inside), math.ceil(budget / max(1, images)))
        return 1 if images * locations >= FEW_ROWS * inputs else 2, locations

    @torch.no_grad()
    def partial_fit(self, features: Sequence[Tensor], images: Tensor, *, validation: bool = False) -> None:
        maps, images = to_float64_device(features[0]), to_float64_device(images)
        b, c, h, w = maps.shape
        margin = self.kernel // 2
        rows = pad(maps.float(), margin).permute(0, 2, 3, 1).reshape(-1, c)
        image, location = self._locations(b, maps.device)
        stride = w + 2 * margin
        corner = image * (h + 2 * margin) * stride + (location // w) * stride + location % w
        steps = torch.arange(self.kernel, device=maps.device)
        offsets = (steps[:, None] * stride + steps).flatten()
        inputs = rows[corner[:, None] + offsets].flatten(1)
        targets = self.extract_blocks(images.float())[image, location]
        if validation not in self._sums:
            shift, scale = self._sums[False][0].frame if validation else self._frame(inputs)
            self._sums[validation] = [_NormalEquations(shift, scale, self.outputs) for _ in self._present]
        if len(self._present) == 1:
            self._sums[validation][0].add(inputs, targets)
            return
        kinds = self._kinds[location.cpu()].to(location.device)
        for kind, (sums, present) in enumerate(zip(self._sums[validation], self._present, strict=True)):
            rows = kinds == kind
            sums.add(inputs[rows], targets[rows] * present.to(targets))

    def _frame(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and the standard deviation of each input.

        Inputs are standardised by them, which conditions the sums; the penalty applies to standardised inputs.
        """
        count, mean, variance = self._ranks.moments(inputs)
        variance = variance * count / (count - 1).clamp(min=1)
        overall = (variance + (mean - mean.mean()).square()).mean().sqrt()
        return mean, variance.sqrt().clamp(min=1e-6 * float(overall) + 1e-12)

    def _locations(self, images: int, device: torch.device) -> tuple[Tensor, Tensor]:
        n = len(self._inside)
        if self._locations_per_view >= n:
            location = self._inside.repeat(images)
        else:
            # Drawn for the whole batch, so that an image's locations do not depend on the number of ranks.
            before, total = self._ranks.batch_offset(images)
            draws = torch.rand(total, n, generator=self._generator)[before : before + images]
            location = self._inside[draws.topk(self._locations_per_view).indices.flatten()]
        image = torch.arange(images).repeat_interleave(min(self._locations_per_view, n))
        return image.to(device), location.to(device)

    @torch.no_grad()
    def finalize_fit(self) -> list[str]:
        for kinds in self._sums.values():
            for sums in kinds:
                self._ranks.sum(sums.tensors)
        train = [sums.symmetrise() for sums in self._sums[False]]
        judge = [sums.symmetrise() for sums in self._sums[True]] if True in self._sums else train
        rows = sum(float(sums.rows) for sums in train)
        ridge = None
        for outputs, kinds in self._groups():
            fitted, judged = (
                _NormalEquations.of([sums[kind] for kind in kinds], outputs) for sums in (train, judge)
            )
            # The ridge is chosen once, on the outputs that most kinds of cells have.
            ridge = self._ridge(fitted, judged) if ridge is None else ridge
            solution = fitted.solve(ridge)
            if solution is None:
                raise AfterimageError(f"the linear decoder found no finite solution for {self.spec.source}")
            weight = solution[:-1].T / fitted.scale
            self.weight[outputs] = weight.to(self.weight)
            self.bias[outputs] = (solution[-1] - weight @ fitted.shift).to(self.bias)
        notes = [f"ridge {ridge:g}, chosen on the validation images"]
        if self._locations_per_view < len(self._inside):
            share = self._locations_per_view / len(self._inside)
            notes.append(f"fitted on {int(rows):,} locations, a random {share:.0%} of each training image's")
        self._sums = {}
        return notes

    def _groups(self) -> list[tuple[slice | Tensor, list[int]]]:
        """Return groups of outputs that the same kinds of cells have, with these kinds; most kinds first."""
        if len(self._present) == 1:
            return [(slice(None), [0])]
        found, group = torch.unique(self._present.T, dim=0, return_inverse=True)
        groups = [
            ((group == i).nonzero().flatten(), found[i].nonzero().flatten().tolist())
            for i in range(len(found))
        ]
        return sorted((g for g in groups if g[1]), key=lambda g: -len(g[1]))

    def _ridge(self, train: _NormalEquations, judge: _NormalEquations) -> float:
        # The error on every n-th output is as good a measure as that on all outputs, and much less work.
        some = slice(None, None, max(1, train.xy.shape[1] // RIDGE_OUTPUTS))
        errors: dict[float, float] = {}

        def best(ridges: Sequence[float]) -> float:
            for ridge in ridges:
                solution = train.solve(ridge, some)
                errors[ridge] = math.inf if solution is None else judge.error(solution, some)
            return min(errors, key=errors.__getitem__)

        # Each ridge costs a factorisation. The error may have two minima, so a descent from the middle could
        # fail.
        coarse = RIDGES.index(best(RIDGES[::2]))
        ridge = best([RIDGES[i] for i in (coarse - 1, coarse + 1) if 0 <= i < len(RIDGES)])
        if not math.isfinite(errors[ridge]):
            raise AfterimageError(f"the linear decoder found no finite solution for {self.spec.source}")
        return ridge


def pad(maps: Tensor, margin: int) -> Tensor:
    """Repeat the outermost features `margin` times on every side."""
    return F.pad(maps, (margin,) * 4, mode="replicate") if margin else maps


class _NormalEquations:
    """The upper half of `X'X`, `X'Y` and the diagonal of `Y'Y`, with a column of ones in X for the bias.

    They are summed in float64, batch by batch.
    """

    def __init__(self, shift: Tensor, scale: Tensor, outputs: int) -> None:
        self.shift, self.scale = shift, scale
        n = shift.numel() + 1
        self.xx = torch.zeros(n, n, dtype=torch.float64, device=shift.device)
        self.xy = torch.zeros(n, outputs, dtype=torch.float64, device=shift.device)
        self.yy = torch.zeros(outputs, dtype=torch.float64, device=shift.device)
        self.rows = torch.zeros((), dtype=torch.float64, device=shift.device)

    @classmethod
    def of(cls, parts: Sequence[_NormalEquations], outputs: slice | Tensor) -> _NormalEquations:
        """Sum over kinds of cells for some outputs; for a slice (one kind), return that kind's sums."""
        if isinstance(outputs, slice):
            return parts[0]
        first, outputs = parts[0], outputs.to(parts[0].xy.device)
        total = cls(*first.frame, len(outputs))
        for part in parts:
            total.xx += part.xx
            total.xy += part.xy[:, outputs]
            total.yy += part.yy[outputs]
            total.rows += part.rows
        return total

    @property
    def tensors(self) -> list[Tensor]:
        return [self.xx, self.xy, self.yy, self.rows]

    @property
    def frame(self) -> tuple[Tensor, Tensor]:
        return self.shift, self.scale

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        x = torch.ones(len(inputs), inputs.shape[1] + 1, device=inputs.device)
        torch.sub(inputs, self.shift.float(), out=x[:, :-1])
        x[:, :-1] /= self.scale.float()
        step = -(-x.shape[1] // PANELS)
        for first in range(0, x.shape[1], step):  # the upper half of a symmetric matrix, panel by panel
            self.xx[first : first + step, first:] += x[:, first : first + step].T @ x[:, first:]
        self.xy += x.T @ targets
        self.yy += targets.square().sum(0)
        self.rows += len(x)

    def symmetrise(self) -> _NormalEquations:
        """Fill in the lower half of `X'X` and return the sums; call it once, after the last batch."""
        self.xx = self.xx.triu() + self.xx.triu(1).T
        return self

    def solve(self, ridge: float, outputs: slice = slice(None)) -> Tensor | None:
        """Return the solution `(inputs + 1, outputs)` for some outputs; None if it cannot be computed."""
        diagonal = self.xx.diagonal()
        penalty = ridge * torch.where(diagonal > 0, diagonal, self.rows)  # for channels that never vary
        penalty[-1] = 0  # the bias is not penalised
        factor, failed = torch.linalg.cholesky_ex(self.xx + penalty.diag())
        return None if failed else torch.cholesky_solve(self.xy[:, outputs], factor)

    def error(self, solution: Tensor, outputs: slice = slice(None)) -> float:
        """Return the mean squared error of a solution on the summed rows."""
        explained = (solution * (self.xx @ solution - 2 * self.xy[:, outputs])).sum()
        return float((self.yy[outputs].sum() + explained) / (self.rows * solution.shape[1]))
