"""Settings of an audit: the encoder or the stored features, the defences, the attackers, and the limits."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from afterimage.config.errors import (
    MAX_IMAGES,
    MAX_SEED,
    MAX_STEPS,
    AfterimageError,
    check_choice,
    check_fraction,
    check_range,
)
from afterimage.config.images import DataConfig
from afterimage.config.inversion import EstimateConfig
from afterimage.config.names import absolute_model, absolute_path, absolute_source, absolute_weights
from afterimage.config.schema import LPIPS_NETS, RecipeConfig, sha256_of
from afterimage.config.toml import to_dict

BLACK_BOX, WHITE_BOX = THREAT_MODELS = ("black-box", "white-box")
"""Threat models: a black-box attacker has only features and images, a white-box one also the encoder's weights."""
DECODED, REFINED, ESTIMATE = "decoded", "refined", "best estimate"
"""Kinds of reconstruction that an attacker is scored on: the decoder's own, the refined one (white-box only), and the
best estimate from either."""
DEFENCES = ("none", "noise:0.5", "int8", "1bit", "topk:0.1", "pca:8")
"""Default defences of an audit."""


@dataclass(frozen=True)
class LimitsConfig:
    """Limits on the upper ends of the 95 % intervals, for every layer, defence and attacker.

    Attributes:
        max_ssim: limit on the mean SSIM over test images, in (0, 1]; None sets no limit
        max_identification: limit on the share of reconstructions that identify their own original, in (0, 1];
            None sets no limit
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
    """The attackers of an audit, one for every combination of decoder, number of images and threat model.

    In the threat model `black-box` an attacker trains a decoder on defended features. In `white-box` it also has the
    encoder's weights and refines each reconstruction by optimisation. Either attacker then learns best estimates from
    its own images; they are scored in addition to the reconstructions that they start from.

    Attributes:
        decoders: names of decoder families, or `python/FILE.py:factory`
        images: numbers of images that the attacker owns, 5 or more each, or `all`; a fifth is used for validation
        threat_models: `black-box`, `white-box` or both
        data: source of the attacker's images; empty for the source of the audited images
        refine_steps: number of optimisation steps for each image in `white-box`
        refine_images: number of test images, from the first on, to refine in `white-box`
        estimate: settings of the best estimate, which is learned from the attacker's own validation images
    """

    decoders: tuple[str, ...] = ("linear",)
    images: tuple[Any, ...] = ("all",)
    threat_models: tuple[str, ...] = (BLACK_BOX,)
    data: str = ""
    refine_steps: int = 200
    refine_images: int = 20
    estimate: EstimateConfig = EstimateConfig()

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
            check_choice("threat model", model, THREAT_MODELS)
        check_range("refine_steps", self.refine_steps, 1, MAX_STEPS)
        check_range("refine_images", self.refine_images, 2, MAX_IMAGES)  # an interval needs two
        object.__setattr__(self, "data", absolute_source(self.data))
        object.__setattr__(self, "decoders", tuple(map(absolute_model, self.decoders)))

    def result_kinds(self, threat_model: str) -> tuple[str, ...]:
        """Return the kinds of an attacker's reconstructions: `DECODED` or `REFINED`, then `ESTIMATE` if asked for."""
        first = DECODED if threat_model == BLACK_BOX else REFINED
        return (first, ESTIMATE) if self.estimate.images else (first,)


@dataclass(frozen=True)
class AuditConfig:
    """An audit of either an encoder or stored pairs of images and features.

    Attributes:
        model: `[provider/]model`
        pairs: file of stored pairs of images and features
        layers: layers to audit
        weights: `pretrained`, the name of a random control, or a path
        prediction: output of the network: `classes`, `embedding`, or `auto` (the classes of a published network with
            a classifier, otherwise an embedding)
        data: source and split of the images
        test_fraction: share of stored pairs that is held out for testing
        defences: defences to try, as text such as `pca:8+int8`
        attackers: settings of the attackers
        limits: limits to check
        recipe: training recipe of the attackers' decoders
        seed: seed of the attackers and of random weights
        lpips: LPIPS network of the scores
    """

    model: str = ""
    pairs: str = ""
    layers: tuple[str, ...] = ()
    weights: str = "pretrained"
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
        named = [name for name in ("model", "pairs") if getattr(self, name)]
        if len(named) != 1:
            raise AfterimageError(
                "an audit has one target: [PROVIDER/]MODEL, or --feature-store FILE; "
                f"got {' and '.join(named) or 'none'}"
            )
        if not self.layers and not self.pairs:
            raise AfterimageError("name at least one layer to audit, for example --layers layer1 layer2")
        if not self.defences:
            raise AfterimageError("name at least one defence, or none")
        check_choice("prediction", self.prediction, ("auto", "classes", "embedding"))
        check_choice("LPIPS network", self.lpips, LPIPS_NETS)
        if self.pairs and self.attackers.threat_models != (BLACK_BOX,):
            raise AfterimageError(
                "stored pairs hold no weights: attackers.threat_models can only be black-box"
            )
        if self.pairs and self.attackers.data:
            raise AfterimageError(
                "a feature store cannot be attacked with other images: computing their features needs the encoder"
            )
        if self.pairs and self.recipe.augment:  # features are of unaugmented images
            object.__setattr__(self, "recipe", replace(self.recipe, augment=False))
        check_range("seed", self.seed, 0, MAX_SEED)
        check_fraction(self, "test_fraction")
        object.__setattr__(self, "weights", absolute_weights(self.weights))
        if self.pairs:
            object.__setattr__(self, "pairs", absolute_path(self.pairs))
        object.__setattr__(self, "model", absolute_model(self.model))

    @property
    def target_name(self) -> str:
        """`model` or `pairs`, whichever is given."""
        return self.model or self.pairs


def short_digest(settings: Mapping[str, Any]) -> str:
    """Return the first eight hexadecimal digits of the settings' SHA-256, as a name for them."""
    return sha256_of(settings, (",", ":"))[:8]
