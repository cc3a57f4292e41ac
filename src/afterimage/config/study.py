"""Frozen dataclasses that say what a study is, and the studies shipped with the package."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from afterimage.config.errors import AfterimageError, unknown
from afterimage.config.schema import (
    LPIPS_NETS,
    MAX_IMAGES,
    RANDOM_WEIGHTS,
    DataConfig,
    DecoderConfig,
    FusionConfig,
    RecipeConfig,
    absolute_weights,
    check_positive,
    check_range,
    check_seed,
)
from afterimage.config.toml import MAX_PARAMETERS, Count, load_toml


@dataclass(frozen=True)
class RowConfig:
    """Rows with settings of their own. With a fusion all sources are one row; without, each is a row."""

    sources: tuple[str, ...]
    decoders: tuple[DecoderConfig, ...] = ()
    fusion: FusionConfig | None = None
    weights: str = ""
    recipe: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", absolute_weights(self.weights))


@dataclass(frozen=True)
class StudyConfig:
    """Sources x decoders x seeds on the same images by the same recipe; `rows` adds what does not fit the grid.

    A layer may be a glob (`resnet34.tv_in1k:layer*`). With `parameters` every decoder that comes in sizes is built
    at that one, within 5 %, whatever its own says; a fusion's parameters come on top. `lpips` may be `any`: the
    first network whose weights are found. With `missing_weights = "random"` (or `random-init`) an encoder without
    pretrained weights goes on with random ones, said in every output; otherwise it is an error. With `controls` runs
    get their twins and are held against controls.
    """

    title: str = ""
    sources: tuple[str, ...] = ()
    decoders: tuple[DecoderConfig, ...] = (DecoderConfig(),)
    parameters: Count | None = None
    seeds: tuple[int, ...] = (42,)
    weights: str = "pretrained"
    missing_weights: str = "error"
    references: bool = True
    controls: bool = False
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
        if self.missing_weights not in ("error", *RANDOM_WEIGHTS):
            raise unknown("missing_weights", self.missing_weights, ("error", *RANDOM_WEIGHTS))
        if self.lpips not in (*LPIPS_NETS, "any"):
            raise unknown("LPIPS network", self.lpips, (*LPIPS_NETS, "any"))
        for i, seed in enumerate(self.seeds):
            check_seed(f"seeds[{i}]", seed)
        check_range("keep", self.keep, 0, MAX_IMAGES)
        check_positive(self, "parameters", most=MAX_PARAMETERS)
        object.__setattr__(self, "weights", absolute_weights(self.weights))


def shipped() -> list[str]:
    """The names of the studies that come with the package."""
    folder = resources.files("afterimage.config") / "studies"
    return sorted(
        entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml")
    )


def load_study(name: str) -> StudyConfig:
    """A shipped study by name, or any TOML file by path."""
    if name.endswith(".toml"):
        return load_toml(StudyConfig, name)
    if name not in shipped():
        raise unknown("study", name, [*shipped(), "or the path of a .toml file"])
    with resources.as_file(resources.files("afterimage.config") / "studies" / f"{name}.toml") as path:
        return load_toml(StudyConfig, path)


def from_models(
    models: Sequence[str], layers: Sequence[str] = ("*",), decoders: Sequence[str] = ("linear",)
) -> StudyConfig:
    """A study of the stages and blocks of any timm models, without a file. `layers` may hold globs."""
    sources = tuple(f"{model}:{layer}" for model in models for layer in layers)
    return StudyConfig(f"Layers of {', '.join(models)}", sources, tuple(DecoderConfig(d) for d in decoders))
