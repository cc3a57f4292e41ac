"""Feature inversion itself: optimise images until their features are as near to the targets as possible."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from afterimage.analysis.inversion.decoder_errors import DecoderErrors, Spectrum, natural_spectrum, radii
from afterimage.analysis.inversion.objective import FeaturesOf, Objective
from afterimage.config import AfterimageError
from afterimage.config.inversion import InvertConfig
from afterimage.runtime.terminal import Progress, silent

Images = Float[Tensor, "batch 3 height width"]

GREY, NOISE = 0.5, 0.01
"""Mean and standard deviation of a start without a decoder: without the noise grey would have no gradient."""
FIRST_STEP = 0.02
"""Root mean square of the first step, for each parameter."""
ARMIJO = 1e-4
SHORTEST = 1e-6
MEMORY = 10


@dataclass(frozen=True)
class Inversion:
    """Best images of a search so far, in [0, 1], and their relative feature distance.

    `seconds` is the time that the whole batch took, and `step` the number of passes.
    """

    images: Images
    loss: Float[Tensor, " batch"]
    seconds: float
    step: int


def curve_steps(steps: int) -> list[int]:
    """Return the steps of a saturation curve: about three for each doubling of the passes, and the last."""
    return sorted(
        {max(1, round(2 ** (i / 3))) for i in range(3 * steps.bit_length())} & set(range(steps)) | {steps}
    )


def search(
    features_of: FeaturesOf,
    targets: Sequence[Tensor],
    size: tuple[int, int],
    *,
    start: Images | None = None,
    method: InvertConfig | None = None,
    errors: DecoderErrors | None = None,
    seed: int = 0,
    progress: Progress = silent,
    milestones: Iterable[int] | None = None,
) -> Iterator[Inversion]:
    """Search for images `(B, 3, *size)` whose features are `targets`, from `start` or from grey.

    Args:
        features_of: differentiable function from images, about in [0, 1], to a list of feature maps; it
            handles each image independently of the others
        targets: the feature maps of the images to find, `(B, ...)` each
        size: height and width of the images in pixels
        start: images in [0, 1] to start from; None for grey with a little noise
        method: settings of the search
        errors: statistics of the start's errors, if it is a decoder's reconstruction; None for those of natural
            images, and plain features
        seed: seed of the noise
        progress: called with the number of passes and the mean feature distance
        milestones: numbers of passes after which to yield; None for `curve_steps`

    Yields:
        the start, the best images after each milestone, and at last the result: the best images found, or the start
            where nothing was better. They are clamped only here, `loss` belongs to the images before. An image's
            result depends on `seed` but not on the other images of the batch

    Raises:
        AfterimageError: shapes do not match, or a loss is not finite
    """
    config = method or InvertConfig()
    shape = (len(targets[0]), 3, *size)
    if start is None:
        generator = torch.Generator().manual_seed(seed)
        noise = NOISE * torch.randn(1, *shape[1:], generator=generator)
        start = (GREY + noise).clamp(0, 1).expand(shape).contiguous()
    form = Fourier(start.detach().clamp(0, 1).to(targets[0].device), errors and errors.spectrum)
    mixed = config.precision == "bf16-mixed"
    objective = Objective(features_of, targets, errors and errors.whitening, mixed=mixed)
    searches = [LBFGS(row, first=FIRST_STEP) for row in form.initial.flatten(1)]
    milestones = {0, *(curve_steps(config.steps) if milestones is None else milestones), config.steps}
    best: Images | None = None
    seconds, lap = 0.0, time.monotonic()
    for step in range(config.steps + 1):
        # Each pass evaluates every image at the trial point of its own search.
        parameters = torch.stack([search.trial for search in searches]).view_as(form.initial)
        images = form.images(parameters.requires_grad_())
        loss, distance = objective(images)

        # Keep the best image by the objective.
        found, value = images.detach(), loss.detach()
        if best is None:
            if not torch.isfinite(value).all():
                raise AfterimageError(
                    "the features of the start are not finite, or overflow when they are compared"
                )
            best, lowest, nearest = found.clone(), value, distance
        elif torch.isnan(value).all():
            raise AfterimageError(f"the loss is not finite after {step} steps")
        better = value < lowest
        best[better] = found[better]
        lowest, nearest = torch.where(better, value, lowest), torch.where(better, distance, nearest)
        progress("inverting", step, config.steps, feature_distance=lambda near=nearest: float(near.mean()))
        if step in milestones:
            seconds += time.monotonic() - lap
            yield Inversion(best.clamp(0, 1), nearest, seconds, step)
            lap = time.monotonic()

        if step < config.steps:
            (gradient,) = torch.autograd.grad(loss.sum(), parameters)
            for search, one, row in zip(searches, loss.tolist(), gradient.flatten(1), strict=True):
                search.tell(one, row)


def invert(*arguments: Any, **options: Any) -> Inversion:
    """Return the result of a `search`; the arguments are the same."""
    *_, result = search(*arguments, milestones=(), **options)
    return result


class Fourier:
    """Images as a start plus a correction, whose parameters are amplitudes of frequencies in decorrelated colours.

    Each is scaled by the root of its expected power. Without a `spectrum` the expectation is that of natural images,
    amplitudes of 1/f, as in Olah, Mordvintsev & Schubert (2017), "Feature Visualization". With one (see
    `DecoderErrors`) it is that of the errors of the start's decoder. L-BFGS from 0 then approaches, if the encoder is
    linear, the mean of a Gaussian posterior: whatever the features do not determine takes the value expected from what
    they do.

    Values may leave [0, 1] during the search and are clamped at its end: a clamp during the search would give L-BFGS
    gradients of a different objective, and it would go astray.

    Attributes:
        initial: parameters of the start itself, one row for each image
    """

    def __init__(self, start: Images, spectrum: Spectrum | None = None) -> None:
        self.start, size = start, tuple(start.shape[-2:])
        roots = (natural_spectrum(size) if spectrum is None else spectrum)[radii(size)]
        # Normalised, so that parameters of size 1 give corrections of size 1 for any scale of the spectrum.
        roots = roots / roots.square().sum((-2, -1)).mean().div(3).sqrt()
        self.roots = roots.to(start.device, torch.complex64)
        self.initial = torch.zeros(len(start), 3, *roots.shape[:2], 2, device=start.device)

    def images(self, parameters: Tensor) -> Images:
        """Return the images of parameters."""
        spectrum = torch.einsum("hwij,bjhw->bihw", self.roots, torch.view_as_complex(parameters))
        return self.start + torch.fft.irfft2(spectrum, s=self.start.shape[-2:], norm="ortho")


class LBFGS:
    """Limited-memory BFGS of one image (Nocedal & Wright 2006, algorithm 7.4), as a dialogue.

    Evaluate at `trial`, `tell` what came out, evaluate at the next `trial`. Steps backtrack with quadratic
    interpolation until the loss has fallen enough (Armijo, 1e-4). A pair without positive curvature is left out of
    the memory. `torch.optim.LBFGS` would search along one line for the whole batch, and so let each image
    depend on its mates; here each searches along its own, and every pass serves all of them.

    The first step has a root mean square of `first` a parameter.
    """

    def __init__(self, point: Tensor, *, first: float) -> None:
        self.point = self.trial = point
        self.first = first
        self.loss = math.inf
        self._pairs: list[tuple[Tensor, Tensor, float]] = []
        self._length = 1.0

    def tell(self, loss: float, gradient: Tensor) -> None:
        """Take in the loss and the gradient at `trial`."""
        if math.isinf(self.loss):
            self.loss, self.gradient = loss, gradient
            return self._search()
        if loss <= self.loss + ARMIJO * self._length * self._slope:  # false for a loss that is not a number
            moved, bent = self.trial - self.point, gradient - self.gradient
            curvature = float(moved.dot(bent))
            if curvature > 1e-10 * float(moved.norm() * bent.norm()):
                self._pairs = [*self._pairs[1 - MEMORY :], (moved, bent, curvature)]
            self.point, self.loss, self.gradient = self.trial, loss, gradient
            return self._search()
        self._shorten(loss)

    def _search(self) -> None:
        """Choose a new direction from the point reached."""
        self._direction = self._newton()
        self._slope = float(self._direction.dot(self.gradient))
        if self._slope >= 0:  # rounding has eaten the curvature
            self._pairs, self._direction = [], -self.gradient
            self._slope = -float(self.gradient.dot(self.gradient))
        norm = float(self._direction.norm())
        self._length = 1.0 if self._pairs else self.first * math.sqrt(self.point.numel()) / max(norm, 1e-30)
        self._shortest = SHORTEST * self._length
        self.trial = self.point + self._length * self._direction

    def _shorten(self, loss: float) -> None:
        excess = loss - self.loss - self._length * self._slope
        guess = -self._slope * self._length**2 / (2 * excess) if math.isfinite(excess) and excess > 0 else 0.0
        self._length = min(max(guess, 0.1 * self._length), 0.5 * self._length)
        if self._length < self._shortest and self._pairs:
            self._pairs = []
            return self._search()
        self.trial = self.point + self._length * self._direction

    def _newton(self) -> Tensor:
        """Minus the inverse Hessian's estimate times the gradient, by two loops over the remembered pairs."""
        direction, shares = -self.gradient, []
        # In place: a vector of an image's parameters is large enough that a new one costs more than its arithmetic.
        for moved, bent, curvature in reversed(self._pairs):
            shares.append(float(moved.dot(direction)) / curvature)
            direction.sub_(bent, alpha=shares[-1])
        if self._pairs:
            _, bent, curvature = self._pairs[-1]
            direction.mul_(curvature / float(bent.dot(bent)))
        for (moved, bent, curvature), share in zip(self._pairs, reversed(shares), strict=True):
            direction.add_(moved, alpha=share - float(bent.dot(direction)) / curvature)
        return direction


@torch.no_grad()
def encode(encoders: nn.Module, images: Images) -> list[Tensor]:
    """Return copies of the feature maps of `images`, which the encoder's next call does not overwrite."""
    return [target.clone() for target in encoders(images)]


@contextlib.contextmanager
def differentiable(encoders: nn.Module) -> Iterator[Callable[[Images], Sequence[Tensor]]]:
    """Let gradients flow from an encoder's features to its images inside the block; yield the encoder."""
    with contextlib.ExitStack() as stack:
        for encoder in getattr(encoders, "encoders", [encoders]):
            stack.enter_context(encoder.gradients())
        yield encoders
