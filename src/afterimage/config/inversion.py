"""How an image is searched for: what is optimised, by which method, for how long."""

from __future__ import annotations

import math
from dataclasses import dataclass

from afterimage.config.errors import AfterimageError, unknown
from afterimage.config.schema import (
    MAX_BATCH,
    MAX_SIDE,
    MAX_STEPS,
    DataConfig,
    absolute_weights,
    check_positive,
    check_range,
    check_seed,
    folder_name,
    settings_digest,
)

METHODS = ("pixels", "fourier", "prior")
OPTIMIZERS = ("adam", "lbfgs")


@dataclass(frozen=True)
class InvertConfig:
    """Inversion by optimising the image itself.

    `method` is what is optimised: `pixels`, `fourier` (decorrelated colours and frequencies, see
    `parametrise.Fourier`) or `prior` (the weights of an untrained network, see `parametrise.Prior`). `steps` counts
    passes through the encoder and back, so that both optimizers cost the same a step; `learning_rate` is Adam's, by
    default the method's own. `starts` runs are made of every image and the one whose features come nearest is
    kept. `jitter` shifts the image by up to so many pixels before each pass. `tv` and `alpha_norm` weigh the
    regularisers of `objective`, with the exponents `beta` and `alpha`; 0 leaves one out.
    """

    method: str = "fourier"
    optimizer: str = "lbfgs"
    steps: int = 200
    learning_rate: float | None = None
    starts: int = 1
    jitter: int = 0
    tv: float = 0.0
    alpha_norm: float = 0.0
    beta: float = 2.0
    alpha: float = 6.0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise unknown("inversion method", self.method, METHODS)
        if self.optimizer not in OPTIMIZERS:
            raise unknown("optimizer", self.optimizer, OPTIMIZERS)
        check_positive(self, "steps", most=MAX_STEPS)
        check_positive(self, "starts", most=MAX_BATCH)
        check_positive(self, "beta", "alpha", "learning_rate")
        check_range("jitter", self.jitter, 0, MAX_SIDE)
        for name in ("tv", "alpha_norm"):
            if not 0 <= getattr(self, name) < math.inf:  # false for NaN too
                raise AfterimageError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if self.jitter and self.optimizer == "lbfgs":
            raise AfterimageError(
                "jitter changes the objective from step to step, which L-BFGS cannot follow; use adam"
            )


@dataclass(frozen=True)
class InversionConfig:
    """One inversion of test images as it is written into its run folder.

    `start` is the run whose decoder made the start, empty for grey. `lpips` is not part of the hash.
    """

    sources: tuple[str, ...]
    weights: str
    start: str
    inversion: InvertConfig
    data: DataConfig
    seed: int = 0
    lpips: str = "alex"

    def __post_init__(self) -> None:
        check_seed("seed", self.seed)
        object.__setattr__(self, "weights", absolute_weights(self.weights))

    @property
    def digest(self) -> str:
        return settings_digest(self)

    @property
    def name(self) -> str:
        """The run folder's name: what was inverted, whether from grey or refined, eight digits of the hash."""
        kind = "refined" if self.start else "inversion"
        return folder_name([*self.sources, kind], self.digest)
