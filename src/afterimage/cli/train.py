"""`afterimage train`: train decoders on layers of one or several models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from afterimage.cli import shared
from afterimage.cli.shared import option_name, print_failures, print_table, specified_options
from afterimage.config import (
    MAX_STEPS,
    AfterimageError,
    DataConfig,
    DecoderConfig,
    FeaturesConfig,
    FusionConfig,
    RecipeConfig,
    RunConfig,
    check_range,
    parse_count,
    printable_path,
    unknown_choice_error,
)
from afterimage.runs.run import is_done
from afterimage.runtime.terminal import Display, print_lines

Flat = tyro.conf.OmitArgPrefixes


@dataclass(frozen=True)
class Train:
    """Train decoders on frozen features, measure their reconstructions, and write one run folder for each.

    All MODEL:LAYER x decoder pairs of one model are trained together on one pass through it. With --features no encoder
    is needed: the features come from a store, and MODEL:LAYER, or LAYER alone, picks some of its layers.
    """

    sources: shared.Sources = ()
    """Layers to rebuild images from, for example resnet34.tv_in1k:layer1."""
    decoders: Annotated[tuple[str, ...], tyro.conf.arg(aliases=("--decoder",))] = ("attention",)
    """Decoders to train: attention, transposed, linear, wavelet, frequency, residual, your own module as
    python/package.module:factory or python/FILE.py:factory, or a published decoder as diffusers/ID_OR_FOLDER."""
    fusion: str = ""
    """Fusion of all layers into one feature map: sum, aligned, stacked, attention, concat or weighted."""
    parameters: Annotated[str, tyro.conf.arg(metavar="COUNT")] = ""
    """Number of parameters, within 5 %, of every decoder: 250k, 1.5M, 4_000_000."""
    features: Annotated[Path | None, tyro.conf.arg(metavar="STORE")] = None
    """Stored features to train on, from `afterimage extract` or any file that `audit --feature-store` reads.
    Their images are taken from --data, by their ids."""
    weights: shared.Weights = "pretrained"
    data: shared.Images = "div2k"
    test: shared.TestImages = ""
    size: shared.Size = ""
    """Crop size in pixels: 256, 256x384 (height x width), or native, the encoder's own (default: 224)."""
    resize: shared.Resize = None
    protocol: str = ""
    """Protocol of figures to compare with: study (resize 256, crop 224) or rae (resize and crop 256, final norm)."""
    limit_train: shared.LimitTrain = None
    limit_validation: shared.LimitValidation = None
    limit_test: shared.LimitTest = None
    recipe: Flat[RecipeConfig] = RecipeConfig()
    """Training recipe; the defaults are the published study's."""
    seed: int = 42
    """Seed of initial weights, order, crops and flips."""
    lpips: str = "alex"
    """LPIPS network: alex, vgg or squeeze."""
    output_dir: Path = Path("runs")
    """Folder for the run folders."""
    cache: shared.Cache = None
    device: shared.Device = "auto"
    devices: shared.Devices = 1
    profile: Annotated[int, tyro.conf.arg(metavar="STEPS")] = 0
    """Number of steps to profile instead of training; prints their times, and traces them in OUTPUT_DIR/profiles."""

    def run(self) -> None:
        from afterimage.experiments.queue import train_runs
        from afterimage.runtime.distributed import on_main_process

        configs = self._configs()
        if not configs:
            raise AfterimageError("name at least one MODEL:LAYER, for example resnet34.tv_in1k:layer1")
        for name in ("plateau_factor", "plateau_patience"):
            changed = getattr(self.recipe, name) != getattr(RecipeConfig, name)
            if changed and self.recipe.scheduler != "plateau":
                raise AfterimageError(f"{option_name(name)} goes with --scheduler plateau")
        check_range("--profile", self.profile, 0, MAX_STEPS)
        if self.profile and self.devices > 1:
            raise AfterimageError("--profile measures one process: leave out --devices")
        if self.profile:
            self._profile(configs)
            return
        failures: list[AfterimageError] = []
        with Display() as display:
            where = {"cache": self.cache, "accelerator": self.device}
            runs = train_runs(configs, self.output_dir, failures=failures, progress=display, **where)
        if on_main_process() and any(is_done(run) for run in runs):
            print_table(runs)
            print_lines(*(f"run: {printable_path(run.path)}" for run in runs))
        if failures and not on_main_process():
            raise SystemExit(1)
        print_failures(failures[1:])
        if failures:
            raise failures[0]

    def _configs(self) -> list[RunConfig]:
        from afterimage.models.decoders import DECODERS, decoder_family
        from afterimage.models.encoders.providers import at_native_size, resolve_source
        from afterimage.models.fusion import FUSIONS

        images = specified_options(
            self, "test", "limit_train", "limit_validation", "limit_test", source="data"
        )
        data = DataConfig(**images).with_overrides(self.size, self.resize, self.protocol)
        families = {name: decoder_family(name) for name in self.decoders}  # before any image is read
        if self.fusion and self.fusion not in FUSIONS:
            raise unknown_choice_error("fusion", self.fusion, FUSIONS)
        count = parse_count(self.parameters, "--parameters") if self.parameters else None
        fixed = [name for name, family in families.items() if not family.size_option]
        if count is not None and fixed:
            sized = ", ".join(name for name, family in DECODERS.items() if family.size_option)
            only = f"{', '.join(fixed)} has one size only"
            raise AfterimageError(f"--parameters: {only}; decoders that come in sizes: {sized}")
        if self.features is None:
            features, weights, resolved = None, self.weights, tuple(map(resolve_source, self.sources))
        else:
            features, weights, resolved = self._stored()
        if self.fusion and len(resolved) < 2:
            raise AfterimageError(
                f"--fusion {self.fusion} makes one of several MODEL:LAYER; name two or more"
            )
        return [
            RunConfig(
                sources=sources,
                weights=weights,
                fusion=FusionConfig(self.fusion) if self.fusion else None,
                decoder=DecoderConfig(decoder, count),
                data=at_native_size(data, sources),
                recipe=self.recipe,
                seed=self.seed,
                lpips=self.lpips,
                features=features,
            )
            for sources in ([resolved] if self.fusion else [(source,) for source in resolved])
            for decoder in self.decoders
        ]

    def _stored(self) -> tuple[FeaturesConfig, str, tuple[str, ...]]:
        """Return the store to train on, the `weights` setting of its encoder, and the chosen layers."""
        from afterimage.data.feature_store import open_store

        if self.weights != Train.weights:
            raise AfterimageError("stored features have their encoder's weights: leave out --weights")
        with Display() as display:
            store = open_store(self.features, display)
        layers = {layer: spec.source for layer, spec in store.specs.items()}
        sources = []
        for asked in self.sources or layers:
            if asked not in layers and asked not in layers.values():
                raise unknown_choice_error(f"layer of {printable_path(self.features)}", asked, layers)
            sources.append(layers.get(asked, asked))
        weights = "" if store.facts is None else store.facts.weights
        return FeaturesConfig(str(store.path), store.digest), weights, tuple(dict.fromkeys(sources))

    def _profile(self, configs: list[RunConfig]) -> None:
        from afterimage.training.profiler import print_profile, profile_run

        for config in configs:
            with Display() as display:
                where = {"cache": self.cache, "accelerator": self.device, "progress": display}
                result = profile_run(config, self.output_dir, steps=self.profile, **where)
            print_profile(result)
