"""Frozen dataclasses that describe a study, and the studies shipped with the package."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from afterimage.config.errors import (
    MAX_IMAGES,
    MAX_SEED,
    AfterimageError,
    check_choice,
    check_positive,
    check_range,
    unknown_choice_error,
)
from afterimage.config.images import DataConfig
from afterimage.config.inversion import EstimateConfig, InvertConfig
from afterimage.config.names import RANDOM_WEIGHTS, absolute_weights
from afterimage.config.schema import LPIPS_NETS, DecoderConfig, FusionConfig, RecipeConfig
from afterimage.config.toml import MAX_PARAMETERS, Count, load_toml


@dataclass(frozen=True)
class RowConfig:
    """Additional rows of a study with settings of their own.

    Attributes:
        sources: `model:layer` each; one row of all with a `fusion`, otherwise one row each
        decoders: decoders of these rows; empty for the study's
        fusion: fusion of the sources into one map
        weights: weights of these rows; empty for the study's
        recipe: settings that replace those of the study's recipe
    """

    sources: tuple[str, ...]
    decoders: tuple[DecoderConfig, ...] = ()
    fusion: FusionConfig | None = None
    weights: str = ""
    recipe: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", absolute_weights(self.weights))


@dataclass(frozen=True)
class StudyConfig:
    """A study: a grid of sources x decoders x seeds on the same images by the same recipe, and `rows` outside it.

    Attributes:
        title: title of the report
        sources: `model:layer` each; the layer may be a glob, as in `resnet34.tv_in1k:layer*`
        decoders: decoders of the grid
        parameters: number of parameters, within 5 % and without fusions, of every decoder that comes in sizes; None
            keeps the decoders' own
        seeds: seeds of the grid
        weights: `pretrained`, the name of a random control, or a path
        missing_weights: `error`, or the name of the random control to use instead of missing pretrained weights;
            every output names such rows
        baselines: whether the baselines are scored too
        controls: whether every run also gets matched controls (random weights, a perceptual loss), feature ablations,
            an error breakdown and a rate-distortion curve
        invert: number of test images, from the first on, for which the measured bound of every run is found: their most
            consistent images and best estimates
        inversion: settings of the search for the most consistent images; its precision is each run's own
        estimate: settings of the best estimates; their precision likewise
        keep: number of test images whose reconstructions are stored
        lpips: LPIPS network of the scores, or `any` for the first whose weights are found
        data: source and split of the images
        recipe: training recipe of the decoders
        rows: additional rows
    """

    title: str = ""
    sources: tuple[str, ...] = ()
    decoders: tuple[DecoderConfig, ...] = (DecoderConfig(),)
    parameters: Count | None = None
    seeds: tuple[int, ...] = (42,)
    weights: str = "pretrained"
    missing_weights: str = "error"
    baselines: bool = True
    controls: bool = False
    invert: int = 0
    inversion: InvertConfig = InvertConfig()
    estimate: EstimateConfig = EstimateConfig()
    keep: int = 8
    lpips: str = "alex"
    data: DataConfig = DataConfig()
    recipe: RecipeConfig = RecipeConfig()
    rows: tuple[RowConfig, ...] = ()

    def __post_init__(self) -> None:
        if not self.sources and not self.rows:
            raise AfterimageError(
                "a study needs sources (or rows), for example sources = ['resnet34:layer*']"
            )
        if not self.seeds:
            raise AfterimageError("a study needs at least one seed, for example seeds = [42]")
        check_choice("missing_weights", self.missing_weights, ("error", *RANDOM_WEIGHTS))
        check_choice("LPIPS network", self.lpips, (*LPIPS_NETS, "any"))
        for i, seed in enumerate(self.seeds):
            check_range(f"seeds[{i}]", seed, 0, MAX_SEED)
        check_range("keep", self.keep, 0, MAX_IMAGES)
        check_range("invert", self.invert, 0, MAX_IMAGES)
        check_positive(self, "parameters", most=MAX_PARAMETERS)
        object.__setattr__(self, "weights", absolute_weights(self.weights))


def shipped() -> list[str]:
    """Return the names of the studies shipped with the package."""
    folder = resources.files("afterimage.config") / "studies"
    return sorted(
        entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml")
    )


def load_study(name: str) -> StudyConfig:
    """Load a shipped study by its name, or a TOML file by its path.

    Raises:
        AfterimageError: there is no such study, or the file is invalid
    """
    if name.endswith(".toml"):
        return load_toml(StudyConfig, name)
    if name not in shipped():
        raise unknown_choice_error("study", name, [*shipped(), "or the path of a .toml file"])
    with resources.as_file(resources.files("afterimage.config") / "studies" / f"{name}.toml") as path:
        return load_toml(StudyConfig, path)


def study_from_models(
    models: Sequence[str], layers: Sequence[str] = ("*",), decoders: Sequence[str] = ("linear",)
) -> StudyConfig:
    """Create a study of the layers of models without a file.

    Args:
        models: `[provider/]model` each
        layers: layers of each model; globs are allowed, and `*` stands for all stages and blocks
        decoders: names of decoder families
    """
    sources = tuple(f"{model}:{layer}" for model in models for layer in layers)
    return StudyConfig(f"Layers of {', '.join(models)}", sources, tuple(DecoderConfig(d) for d in decoders))
