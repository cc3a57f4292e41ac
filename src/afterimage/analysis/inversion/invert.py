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

from afterimage.analysis.inversion.batched_lbfgs import LBFGS
from afterimage.analysis.inversion.decoder_errors import DecoderErrors
from afterimage.analysis.inversion.objective import GREY, FeatureFunction, Objective
from afterimage.analysis.inversion.parametrisations import PARAMETRISATIONS, Parametrisation
from afterimage.config import AfterimageError
from afterimage.config.inversion import InvertConfig
from afterimage.runtime.terminal import Progress, no_progress

Images = Float[Tensor, "batch 3 height width"]

NOISE = 0.01
"""Standard deviation of the noise added to a start, so that starts differ and grey has a gradient."""
FINAL_LR_SHARE = 0.02
"""Share of the learning rate at which Adam's cosine schedule ends."""


@dataclass(frozen=True)
class Inversion:
    """Best images of a search so far, in [0, 1], and the relative feature distance of these very images.

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
    feature_function: FeatureFunction,
    targets: Sequence[Tensor],
    size: tuple[int, int],
    *,
    start: Images | None = None,
    method: InvertConfig | None = None,
    errors: DecoderErrors | None = None,
    seed: int = 0,
    progress: Progress = no_progress,
    milestones: Iterable[int] | None = None,
) -> Iterator[Inversion]:
    """Search for images `(B, 3, *size)` whose features are `targets`, from `start` or from grey.

    Args:
        feature_function: differentiable function from images, about in [0, 1], to a list of feature maps; it
            handles each image independently of the others
        targets: the feature maps of the images to find, `(B, ...)` each
        size: height and width of the images in pixels
        start: images in [0, 1] to start from; with several starts, all but the first add noise to them
        method: settings of the search
        errors: statistics of the start's errors, if it is a decoder's reconstruction: `fourier` uses those of
            colours and frequencies, every method those of features
        seed: seed of the noise, of the jitter and of `prior`
        progress: called with the number of passes and the mean feature distance
        milestones: numbers of passes after which to yield; None for `curve_steps`

    Yields:
        the start, the best images after each milestone, and at last the result: the best images found, or the start
            where nothing was better. They are clamped only here, and `loss` is measured on the clamped images, in
            float32 and without jitter. An image's result depends on `seed` but not on the other images of the batch

    Raises:
        AfterimageError: shapes do not match, or a loss is not finite
    """
    config = method or InvertConfig()
    targets = list(targets)
    if not targets or len({len(target) for target in targets}) != 1:
        raise AfterimageError("targets must be one feature map or more, all of the same number of images")
    count, device = len(targets[0]), targets[0].device
    if start is not None and tuple(start.shape) != (count, 3, *size):
        raise AfterimageError(f"the start must have shape {(count, 3, *size)}, got {tuple(start.shape)}")
    generator = torch.Generator().manual_seed(seed)
    begin = _starts(start, (count, 3, *size), config.starts, generator).to(device)
    objective = Objective(
        feature_function,
        [target.repeat(config.starts, *[1] * (target.ndim - 1)) for target in targets],
        config,
        errors and errors.whitening,
    )
    form = PARAMETRISATIONS[config.method](begin, seed, errors and errors.spectrum)
    milestones = {0, *(curve_steps(config.steps) if milestones is None else milestones), config.steps}
    best, seconds, lap = _Best(count, config.starts), 0.0, time.monotonic()
    for step, (images, loss, distance) in enumerate(
        OPTIMIZERS[config.optimizer](form, objective, config, generator)
    ):
        best.update(images, loss, distance, step)
        progress("inverting", step, config.steps, feature_distance=best.distance_so_far)
        if step in milestones:
            seconds += time.monotonic() - lap
            yield Inversion(*best.measure(objective), seconds, step)
            lap = time.monotonic()


def invert(*arguments: Any, **options: Any) -> Inversion:
    """Return the result of a `search`; the arguments are the same."""
    *_, result = search(*arguments, milestones=(), **options)
    return result


def _starts(start: Tensor | None, shape: tuple[int, ...], count: int, generator: torch.Generator) -> Tensor:
    """Return all starts, `(count * B, 3, H, W)`, start by start; every image gets the same noise."""
    begin = torch.full(shape, GREY) if start is None else start.detach().cpu().float()
    noise = NOISE * torch.randn(count, 1, *shape[1:], generator=generator)
    if start is not None:
        noise[0] = 0
    return (begin + noise).clamp(0, 1).flatten(0, 1)


def _adam(
    form: Parametrisation, objective: Objective, config: InvertConfig, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Optimise with Adam; yield images, losses and feature distances of the start and after every step."""
    parameters = form.initial.requires_grad_()
    rate = config.learning_rate or form.learning_rate
    optimizer = torch.optim.Adam([parameters], rate, betas=(0.9, 0.99))
    for step in range(config.steps + 1):
        shift = torch.randint(-config.jitter, config.jitter + 1, (2,), generator=generator).tolist()
        images = form.images(parameters)
        loss, distance = objective(images, tuple(shift))
        yield images.detach(), loss.detach(), distance
        if step < config.steps:
            share = FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * (1 + math.cos(math.pi * step / config.steps)) / 2
            optimizer.param_groups[0]["lr"] = rate * share
            (parameters.grad,) = torch.autograd.grad(loss.sum(), parameters)
            optimizer.step()


def _lbfgs(
    form: Parametrisation, objective: Objective, config: InvertConfig, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Optimise with L-BFGS, one independent search for each image; yield what `_adam` yields."""
    initial = form.initial
    first = config.learning_rate or form.learning_rate
    searches = [LBFGS(row, first=first) for row in initial.flatten(1)]
    for step in range(config.steps + 1):
        parameters = torch.stack([search.trial for search in searches]).view_as(initial).requires_grad_()
        images = form.images(parameters)
        loss, distance = objective(images)
        yield images.detach(), loss.detach(), distance
        if step < config.steps:
            (gradient,) = torch.autograd.grad(loss.sum(), parameters)
            for search, value, row in zip(searches, loss.tolist(), gradient.flatten(1), strict=True):
                search.update(value, row)


OPTIMIZERS = {"adam": _adam, "lbfgs": _lbfgs}


class _Best:
    """Best image of every start by the objective, and best start of every image by the feature distance."""

    def __init__(self, count: int, starts: int) -> None:
        self.count, self.starts = count, starts
        self.images = self.loss = self.distance = None

    def update(self, images: Tensor, loss: Tensor, distance: Tensor, step: int) -> None:
        if self.images is None:
            if not torch.isfinite(loss).all():
                raise AfterimageError(
                    "the features of the start are not finite, or overflow when they are compared"
                )
            self.images, self.loss, self.distance = images.clone(), loss.clone(), distance.clone()
            return
        better = loss < self.loss
        self.images[better] = images[better]
        self.loss = torch.where(better, loss, self.loss)
        self.distance = torch.where(better, distance, self.distance)
        if torch.isnan(loss).all():
            raise AfterimageError(
                f"the loss is not finite after {step} steps; a lower learning_rate may help"
            )

    def distance_so_far(self) -> float:
        """Return the mean feature distance of each image's best start, as the search itself measures it."""
        return float(self.distance.view(self.starts, self.count).amin(0).mean())

    def measure(self, objective: Objective) -> tuple[Tensor, Tensor]:
        """Return the images in [0, 1] of each image's best start, and their feature distance."""
        images = self.images.clamp(0, 1)
        distance = objective.distance(images).view(self.starts, self.count)
        pick, rows = distance.argmin(0), torch.arange(self.count, device=distance.device)
        return images.unflatten(0, (self.starts, self.count))[pick, rows], distance[pick, rows]


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
