"""Decode by ridge regression, solved in closed form: from a neighbourhood of features to a block of pixels."""

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
from afterimage.models.layers.blocks import for_sums, pixel_shuffle, resize
from afterimage.runtime.distributed import SINGLE_PROCESS, ProcessGroup

FEW_ROWS = 200
"""Below so many rows an input a second view of each image still lowers the error."""

PANELS = 6
JUDGED = 96

RIDGES = (1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""Larger ones lower the error of a few images of a deep layer, by blurring away what tells images apart."""


class LinearDecoder(Decoder):
    """Maps each 3x3 neighbourhood of features to the block of pixels at its centre, by the best linear map.

    Ridge regression (Hoerl & Kennard 1970): `W = (X'X + lambda D)^-1 X'Y` with D the diagonal of X'X, so that
    channels of different scale are held back alike. A row of X is the neighbourhood of one location of one image, the
    same row of Y its block of pixels; X'X and X'Y are summed over one pass, or over two crops of each image where rows
    are few. Lambda is the best on the validation images of every other one of `RIDGES` and of the two beside it. At
    the border the outermost features are repeated. Where the image is not a whole multiple of the features, blocks
    are rounded up and the result resampled.

    Parameters are counted as any convolution's: `9 C (3 b^2) + 3 b^2` for blocks of b x b pixels.

    Args:
        specs: the shape of the features; one.
        image_size: height and width of the images in pixels.
        kernel: side of the neighbourhood in locations, odd.
        rows_per_input: above so many rows for each value of a neighbourhood, locations are sampled at random, which
            `finalize_fit` notes.
    """

    closed_form = True
    trainable = False
    single_location: ClassVar = {"kernel": 1}

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
        self._sums: dict[bool, list[_Sums]] = {}

    def _cells(self) -> tuple[Tensor, Tensor]:
        """Each location's kind, `(h w,)`, and which outputs a cell of each kind has, `(kinds, 3 bh bw)`.

        Cells within the image are of one kind and have all. What reaches beyond it has no target; -1 where that is all
        of a cell.
        """
        spans = (self.canvas.rows, self.canvas.columns)
        (rows, row), (columns, column) = (
            torch.unique(span.present(block), dim=0, return_inverse=True)
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
        # The sums of training and validation images by kind of cell; while it solves, those of some kinds together,
        # and a penalised copy, its diagonal and its factor.
        sums = 2 * len(self._present) * inputs * (inputs + self.outputs)
        several = 2 * inputs * (inputs + self.outputs) if len(self._present) > 1 else 0
        return 8 * (sums + several + 3 * inputs**2)

    def fit_macs(self, images: int) -> int:
        views, locations = self._sampling(images)
        rows = views * images * locations
        inputs = self.weight.shape[1] + 1
        searched = len(RIDGES[::2]) + 2
        # Half of the symmetric X'X and all of X'Y; then factorisations of n^3 / 6 in float64, the last to solve.
        solved = len(torch.unique(self._present, dim=1).T)
        return rows * inputs * (inputs // 2 + self.outputs) + 2 * (searched + solved) * inputs**3 // 6

    def decode(self, features: Tensor) -> Tensor:
        return resize(self.unblock(self.blocks(pad(features, self.kernel // 2))), self.canvas.size)

    def blocks(self, padded: Tensor) -> Tensor:
        """Blocks of pixels `(B, 3 bh bw, h, w)` of features that are padded by half a kernel."""
        c, k = self.spec.channels, self.kernel
        kernel = self.weight.view(self.outputs, k, k, c).permute(0, 3, 1, 2)
        # Exact under autocast too: large coefficients of correlated channels cancel each other.
        exact = nullcontext() if padded.is_meta else torch.autocast(padded.device.type, enabled=False)
        with exact:
            return F.conv2d(padded.to(self.weight.dtype), kernel, self.bias)

    def unblock(self, blocks: Tensor) -> Tensor:
        """`(B, 3 bh bw, h, w)` to `(B, 3, h bh, w bw)`."""
        return pixel_shuffle(blocks, self.block)

    def blocks_of(self, images: Tensor) -> Tensor:
        """`(B, 3, H, W)` to one row of pixels a location: `(B, h w, 3 bh bw)`."""
        h, w = self.spec.height, self.spec.width
        images = resize(self.canvas.cut(images), (h * self.block[0], w * self.block[1]))
        parts = images.view(images.shape[0], 3, h, self.block[0], w, self.block[1])
        return parts.permute(0, 2, 4, 1, 3, 5).reshape(images.shape[0], h * w, self.outputs)

    def begin_fit(self, images: int, seed: int, ranks: ProcessGroup = SINGLE_PROCESS) -> int:
        self._ranks = ranks
        views, self._quota = self._sampling(images)
        self._generator = torch.Generator().manual_seed(seed)
        self._sums = {}
        return views

    def _sampling(self, images: int) -> tuple[int, int]:
        """How many views of each of so many training images are fitted on, and how many locations of a view."""
        inputs = self.weight.shape[1] + 1
        budget = max(self.rows_per_input * inputs, 100_000)
        locations = min(len(self._inside), math.ceil(budget / max(1, images)))
        return 1 if images * locations >= FEW_ROWS * inputs else 2, locations

    @torch.no_grad()
    def partial_fit(self, features: Sequence[Tensor], images: Tensor, *, validation: bool = False) -> None:
        maps, images = for_sums(features[0]), for_sums(images)
        b, c, h, w = maps.shape
        margin = self.kernel // 2
        rows = pad(maps.float(), margin).permute(0, 2, 3, 1).reshape(-1, c)
        image, location = self._locations(b, maps.device)
        stride = w + 2 * margin
        corner = image * (h + 2 * margin) * stride + (location // w) * stride + location % w
        steps = torch.arange(self.kernel, device=maps.device)
        offsets = (steps[:, None] * stride + steps).flatten()
        inputs = rows[corner[:, None] + offsets].flatten(1)
        targets = self.blocks_of(images.float())[image, location]
        if validation not in self._sums:
            shift, scale = self._sums[False][0].frame if validation else self._frame(inputs)
            self._sums[validation] = [_Sums(shift, scale, self.outputs) for _ in self._present]
        if len(self._present) == 1:
            self._sums[validation][0].add(inputs, targets)
            return
        kinds = self._kinds[location.cpu()].to(location.device)
        for kind, (sums, present) in enumerate(zip(self._sums[validation], self._present, strict=True)):
            own = kinds == kind
            sums.add(inputs[own], targets[own] * present.to(targets))

    def _frame(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Shift and scale that keep the sums well conditioned. The penalty is measured in them."""
        count, mean, variance = self._ranks.moments(inputs)
        variance = variance * count / (count - 1).clamp(min=1)
        overall = (variance + (mean - mean.mean()).square()).mean().sqrt()
        return mean, variance.sqrt().clamp(min=1e-6 * float(overall) + 1e-12)

    def _locations(self, images: int, device: torch.device) -> tuple[Tensor, Tensor]:
        n = len(self._inside)
        if self._quota >= n:
            location = self._inside.repeat(images)
        else:
            # Drawn for the whole batch, so that an image's do not depend on how many ranks there are.
            before, total = self._ranks.place(images)
            draws = torch.rand(total, n, generator=self._generator)[before : before + images]
            location = self._inside[draws.topk(self._quota).indices.flatten()]
        image = torch.arange(images).repeat_interleave(min(self._quota, n))
        return image.to(device), location.to(device)

    @torch.no_grad()
    def finalize_fit(self) -> list[str]:
        for kinds in self._sums.values():
            for sums in kinds:
                self._ranks.sum(sums.tensors)
        train = [sums.whole() for sums in self._sums[False]]
        judge = [sums.whole() for sums in self._sums[True]] if True in self._sums else train
        rows = sum(float(sums.rows) for sums in train)
        ridge = None
        for outputs, kinds in self._groups():
            fitted, judged = (_Sums.of([sums[kind] for kind in kinds], outputs) for sums in (train, judge))
            # What most cells have chooses for what all but those at the border have.
            ridge = self._ridge(fitted, judged) if ridge is None else ridge
            solution = fitted.solve(ridge)
            if solution is None:
                raise AfterimageError(f"the linear decoder found no finite solution for {self.spec.source}")
            weight = solution[:-1].T / fitted.scale
            self.weight[outputs] = weight.to(self.weight)
            self.bias[outputs] = (solution[-1] - weight @ fitted.shift).to(self.bias)
        notes = [f"ridge {ridge:g}, chosen on the validation images"]
        if self._quota < len(self._inside):
            share = self._quota / len(self._inside)
            notes.append(f"fitted on {int(rows):,} locations, a random {share:.0%} of each training image's")
        self._sums = {}
        return notes

    def _groups(self) -> list[tuple[slice | Tensor, list[int]]]:
        """Outputs that the same kinds of cells have, and these kinds; those that most have come first."""
        if len(self._present) == 1:
            return [(slice(None), [0])]
        found, group = torch.unique(self._present.T, dim=0, return_inverse=True)
        groups = [
            ((group == i).nonzero().flatten(), found[i].nonzero().flatten().tolist())
            for i in range(len(found))
        ]
        return sorted((g for g in groups if g[1]), key=lambda g: -len(g[1]))

    def _ridge(self, train: _Sums, judge: _Sums) -> float:
        # A ridge is judged on every n-th output, which is as good and much less work than on all.
        some = slice(None, None, max(1, train.xy.shape[1] // JUDGED))
        errors: dict[float, float] = {}

        def best(ridges: Sequence[float]) -> float:
            for ridge in ridges:
                solution = train.solve(ridge, some)
                errors[ridge] = math.inf if solution is None else judge.error(solution, some)
            return min(errors, key=errors.__getitem__)

        # Each costs a factorisation. Not downhill from the middle: there may be two valleys.
        coarse = RIDGES.index(best(RIDGES[::2]))
        ridge = best([RIDGES[i] for i in (coarse - 1, coarse + 1) if 0 <= i < len(RIDGES)])
        if not math.isfinite(errors[ridge]):
            raise AfterimageError(f"the linear decoder found no finite solution for {self.spec.source}")
        return ridge


def pad(maps: Tensor, margin: int) -> Tensor:
    """Repeat the outermost features `margin` times on every side."""
    return F.pad(maps, (margin,) * 4, mode="replicate") if margin else maps


class _Sums:
    """The upper half of `X'X`, `X'Y` and the diagonal of `Y'Y`, with a column of ones for the bias.

    Summed in float64, batch by batch.
    """

    def __init__(self, shift: Tensor, scale: Tensor, outputs: int) -> None:
        self.shift, self.scale = shift, scale
        n = shift.numel() + 1
        self.xx = torch.zeros(n, n, dtype=torch.float64, device=shift.device)
        self.xy = torch.zeros(n, outputs, dtype=torch.float64, device=shift.device)
        self.yy = torch.zeros(outputs, dtype=torch.float64, device=shift.device)
        self.rows = torch.zeros((), dtype=torch.float64, device=shift.device)

    @classmethod
    def of(cls, parts: Sequence[_Sums], outputs: slice | Tensor) -> _Sums:
        """The sums of several kinds of cells, for some outputs; of one kind and all outputs, these sums themselves."""
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

    def whole(self) -> _Sums:
        """Fill in the lower half of `X'X`; call it once, when everything is added."""
        self.xx = self.xx.triu() + self.xx.triu(1).T
        return self

    def solve(self, ridge: float, outputs: slice = slice(None)) -> Tensor | None:
        """The solution for some outputs, `(inputs + 1, outputs)`; None where it is numerically out of reach."""
        diagonal = self.xx.diagonal()
        penalty = ridge * torch.where(diagonal > 0, diagonal, self.rows)  # a channel that never varies
        penalty[-1] = 0  # the bias is free
        factor, failed = torch.linalg.cholesky_ex(self.xx + penalty.diag())
        return None if failed else torch.cholesky_solve(self.xy[:, outputs], factor)

    def error(self, solution: Tensor, outputs: slice = slice(None)) -> float:
        """The mean squared error of a solution on the summed rows."""
        explained = (solution * (self.xx @ solution - 2 * self.xy[:, outputs])).sum()
        return float((self.yy[outputs].sum() + explained) / (self.rows * solution.shape[1]))
