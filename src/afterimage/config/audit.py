"""What an audit is: whose features, which defences, who attacks with how much, and which limits must hold."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from afterimage.config.errors import AfterimageError, unknown
from afterimage.config.paths import absolute_path, absolute_source
from afterimage.config.schema import (
    LPIPS_NETS,
    MAX_IMAGES,
    MAX_STEPS,
    DataConfig,
    RecipeConfig,
    absolute_weights,
    check_range,
    check_seed,
)
from afterimage.config.toml import to_dict

BLACK_BOX, WHITE_BOX = THREAT_MODELS = ("black-box", "white-box")
DEFENCES = ("none", "noise:0.5", "int8", "1bit", "topk:0.1", "pca:8")


@dataclass(frozen=True)
class LimitsConfig:
    """What must hold for every layer, defence and attacker: upper ends of the 95 % intervals at most these.

    `max_ssim` bounds the mean SSIM over test images, `max_identification` the share of reconstructions that find
    their own original. None: not limited.
    """

    max_ssim: float | None = None
    max_identification: float | None = None

    def __post_init__(self) -> None:
        for name, limit in to_dict(self).items():
            if not 0 < limit <= 1:
                raise AfterimageError(f"{name} must lie between 0 and 1, got {limit}")

    def __bool__(self) -> bool:
        return self.max_ssim is not None or self.max_identification is not None


@dataclass(frozen=True)
class AttackersConfig:
    """Who attacks: every combination is a row.

    `images` are numbers of images of their own, or `all`, a fifth of which they validate on. `data` is where
    they come from, empty for the same source as the audited images. In the threat model `black-box` they train a
    decoder on defended features; in `white-box` they have the weights too, and refine each reconstruction,
    `refine_steps` steps, for the first `refine_images` test images.
    """

    decoders: tuple[str, ...] = ("linear",)
    images: tuple[Any, ...] = ("all",)
    threat_models: tuple[str, ...] = (BLACK_BOX,)
    data: str = ""
    refine_steps: int = 200
    refine_images: int = 20

    def __post_init__(self) -> None:
        for name in ("decoders", "images", "threat_models"):
            if not getattr(self, name):
                raise AfterimageError(f"an audit needs at least one of attackers.{name}")
        for count in self.images:
            if count != "all" and not (re.fullmatch("[0-9]{1,10}", str(count)) and int(count) >= 5):
                raise AfterimageError(
                    f"an attacker's images must be a number from 5 on, or 'all', got {count!r:.80}"
                )
        for model in self.threat_models:
            if model not in THREAT_MODELS:
                raise unknown("threat model", model, THREAT_MODELS)
        if self.refine_steps < 1 or self.refine_images < 2:
            raise AfterimageError("refine_steps must be 1 or more, refine_images 2 or more, for an interval")
        check_range("refine_steps", self.refine_steps, 1, MAX_STEPS)
        check_range("refine_images", self.refine_images, 2, MAX_IMAGES)
        object.__setattr__(self, "data", absolute_source(self.data))


@dataclass(frozen=True)
class AuditConfig:
    """One audit. Exactly one of `model` (timm), `encoder` (`package.module:factory`) and `pairs` (a file).

    `mean` and `std` are what images are normalised with before they reach an own encoder; `prefix_tokens` says how
    many of its tokens come before those of the map, where that cannot be measured; `prediction` says what
    such a network returns: `classes`, `embedding`, or `auto` (a timm model's classifier, else an embedding).
    `test_fraction` of stored pairs is held out; images from elsewhere follow `data`.
    """

    model: str = ""
    encoder: str = ""
    pairs: str = ""
    layers: tuple[str, ...] = ()
    weights: str = "pretrained"
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    prefix_tokens: int | None = None
    prediction: str = "auto"
    data: DataConfig = DataConfig()
    test_fraction: float = 0.2
    defences: tuple[str, ...] = DEFENCES
    attackers: AttackersConfig = AttackersConfig()
    limits: LimitsConfig = LimitsConfig()
    recipe: RecipeConfig = RecipeConfig()
    seed: int = 42
    lpips: str = "alex"

    def __post_init__(self) -> None:
        named = [name for name in ("model", "encoder", "pairs") if getattr(self, name)]
        if len(named) != 1:
            raise AfterimageError(
                "an audit is of one thing: a timm MODEL, --encoder package.module:factory, or --feature-store FILE; "
                f"got {' and '.join(named) or 'none'}"
            )
        if not self.layers and not self.pairs:
            raise AfterimageError("name at least one layer to audit, for example --layers layer1 layer2")
        if not self.defences:
            raise AfterimageError("name at least one defence, or none")
        if self.prediction not in ("auto", "classes", "embedding"):
            raise unknown("prediction", self.prediction, ("auto", "classes", "embedding"))
        if self.prefix_tokens is not None and (not self.encoder or self.prefix_tokens < 0):
            raise AfterimageError("prefix_tokens is a whole number from 0 on, and goes with an own encoder")
        if self.lpips not in LPIPS_NETS:
            raise unknown("LPIPS network", self.lpips, LPIPS_NETS)
        if self.pairs and self.attackers.threat_models != (BLACK_BOX,):
            raise AfterimageError(
                "stored pairs hold no weights: attackers.threat_models can only be black-box"
            )
        if self.pairs and self.attackers.data:
            raise AfterimageError(
                "stored pairs cannot be attacked with images from elsewhere: there is no encoder"
            )
        if self.pairs and self.recipe.augment:  # features belong to the image as it is
            object.__setattr__(self, "recipe", replace(self.recipe, augment=False))
        if len(self.mean) != 3 or len(self.std) != 3 or not all(0 < std < math.inf for std in self.std):
            raise AfterimageError("mean and std must be three numbers each, std greater than 0")
        if not all(math.isfinite(mean) for mean in self.mean):
            raise AfterimageError(f"mean must be finite, got {self.mean}")
        check_seed("seed", self.seed)
        if not 0 < self.test_fraction < 1:
            raise AfterimageError(f"test_fraction must lie between 0 and 1, got {self.test_fraction}")
        object.__setattr__(self, "weights", absolute_weights(self.weights))
        if self.pairs:
            object.__setattr__(self, "pairs", absolute_path(self.pairs))
        file, colon, factory = self.encoder.rpartition(":")
        if file.endswith(".py"):
            object.__setattr__(self, "encoder", absolute_path(file) + colon + factory)

    @property
    def subject(self) -> str:
        return self.model or self.encoder or self.pairs


def digest(settings: Mapping[str, Any]) -> str:
    """Eight digits that name a set of settings."""
    text = json.dumps(settings, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]
