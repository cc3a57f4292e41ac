"""Settings of an inversion: parametrisation, optimizer and number of steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

from afterimage.config.errors import (
    MAX_BATCH,
    MAX_IMAGES,
    MAX_SEED,
    MAX_SIDE,
    MAX_STEPS,
    AfterimageError,
    check_choice,
    check_positive,
    check_range,
)
from afterimage.config.images import DataConfig
from afterimage.config.names import absolute_weights
from afterimage.config.schema import HashedConfig, folder_name

METHODS = ("pixels", "fourier", "prior")
"""Parametrisations of the image: its pixels, its Fourier coefficients, or an untrained network's weights."""
OPTIMIZERS = ("adam", "lbfgs")
"""Optimizers of the image."""
INVERSION_PRECISIONS = ("32-true", "bf16-mixed")
"""Precisions of the encoder: float32, or bfloat16 for as long as its rounding does not matter."""

MAX_ERROR_IMAGES = 32
"""Largest number of validation images that a decoder's errors are learnt from."""


def num_error_images(count: int) -> int:
    """Return the number of validation images, the first of `count`, to learn a decoder's errors from: at most half."""
    return min(MAX_ERROR_IMAGES, count // 2)


def tuning_image_indices(count: int, wanted: int) -> range:
    """Return the indices of up to `wanted` of `count` validation images.

    On these the number of passes is chosen and the best estimate is trained. They follow the `num_error_images`: a
    search that was fitted to an image's own errors does better on it than on test images.
    """
    first = num_error_images(count)
    return range(first, min(first + wanted, count))


def search_precision(recipe: str) -> str:
    """Return the precision of searches that start from a decoder trained in the precision `recipe`."""
    return recipe if recipe in INVERSION_PRECISIONS else INVERSION_PRECISIONS[0]


@dataclass(frozen=True)
class InvertConfig:
    """An inversion's settings: the image itself is optimised until its features match the target's.

    Attributes:
        method: parametrisation of the image: `pixels`, `fourier` (decorrelated colours and frequencies) or `prior` (the
            weights of an untrained network)
        optimizer: `adam` or `lbfgs`
        steps: number of forward and backward passes through the encoder, which cost the same with both optimizers; the
            maximum when the search starts from a decoder's reconstruction
        held_out: number of validation images on which the number of passes of such a search is chosen, for the lowest
            LPIPS (the highest PSNR if LPIPS is unavailable); 0, or `adam`, takes `steps`
        learning_rate: Adam's learning rate, or the size of L-BFGS's first step; None takes the method's own
        starts: number of starts for each image; the result with the nearest features is kept
        jitter: largest random shift of the image before each pass, in pixels; with Adam only
        tv: weight of the total variation, 0 to leave it out
        alpha_norm: weight of the alpha-norm of the pixels, 0 to leave it out
        precision: `32-true`, or `bf16-mixed` to run the encoder in bfloat16 until its rounding matters, and the best
            estimate's network as well
        beta: exponent of the total variation
        alpha: exponent of the alpha-norm
    """

    method: str = "fourier"
    optimizer: str = "lbfgs"
    steps: int = 200
    held_out: int = 8
    learning_rate: float | None = None
    starts: int = 1
    jitter: int = 0
    tv: float = 0.0
    alpha_norm: float = 0.0
    precision: str = "32-true"
    beta: float = 2.0
    alpha: float = 6.0

    def __post_init__(self) -> None:
        check_choice("inversion method", self.method, METHODS)
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        check_choice("precision of an inversion", self.precision, INVERSION_PRECISIONS)
        check_positive(self, "steps", most=MAX_STEPS)
        check_positive(self, "starts", most=MAX_BATCH)
        check_positive(self, "beta", "alpha", "learning_rate")
        check_range("held_out", self.held_out, 0, MAX_IMAGES)
        check_range("jitter", self.jitter, 0, MAX_SIDE)
        for name in ("tv", "alpha_norm"):
            if not 0 <= getattr(self, name) < math.inf:  # false for NaN too
                raise AfterimageError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if self.jitter and self.optimizer == "lbfgs":
            raise AfterimageError(
                "jitter changes the objective from step to step, which L-BFGS cannot follow; use adam"
            )


@dataclass(frozen=True)
class EstimateConfig:
    """Settings of the best estimate, the image of least expected squared error.

    A small network computes it from the decoder's image and the refined one. It is trained on validation images that
    were refined the same way, and removes details that the features do not determine.

    Attributes:
        images: number of validation images to train the network on, at most those that the search has not learned from;
            0 for no best estimates
        steps: largest number of optimizer steps of the network; few images are seen 75 times each
        channels: width of the network at half resolution
    """

    images: int = 64
    steps: int = 600
    channels: int = 32

    def __post_init__(self) -> None:
        check_range("images", self.images, 0, MAX_IMAGES)
        check_positive(self, "steps", most=MAX_STEPS)
        check_positive(self, "channels", most=MAX_SIDE)


@dataclass(frozen=True)
class InversionConfig(HashedConfig):
    """One inversion of test images, as its run folder stores it.

    Attributes:
        sources: the inverted layers, `model:layer` each
        weights: `pretrained`, the name of a random control, or a path
        start: name of the run whose reconstructions are the starting points; empty to start from grey
        inversion: settings of the optimisation
        data: source and split of the images
        seed: seed of the random numbers
        lpips: LPIPS network of the scores; not part of the hash
        estimate: settings of the best estimate; None for the most consistent image
    """

    sources: tuple[str, ...]
    weights: str
    start: str
    inversion: InvertConfig
    data: DataConfig
    seed: int = 0
    lpips: str = "alex"
    estimate: EstimateConfig | None = None

    def __post_init__(self) -> None:
        check_range("seed", self.seed, 0, MAX_SEED)
        object.__setattr__(self, "weights", absolute_weights(self.weights))

    @property
    def result_kind(self) -> str:
        """Kind of image: `estimate` (best estimate), `refined` (from a decoder) or `inversion` (from grey)."""
        if self.estimate:
            return "estimate"
        return "refined" if self.start else "inversion"

    @property
    def name(self) -> str:
        """Name of the run folder: the sources, the kind of image, and eight digits of the hash."""
        return folder_name([*self.sources, self.result_kind], self.digest)
