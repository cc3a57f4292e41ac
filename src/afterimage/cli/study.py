"""`afterimage study`: plan or run a grid of runs, with its report."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from afterimage.cli import shared
from afterimage.cli.report import Report
from afterimage.cli.shared import print_failures, print_table, specified_options, table
from afterimage.config import (
    MAX_PROCESSES,
    AfterimageError,
    DecoderConfig,
    RunConfig,
    check_range,
    format_count,
    parse_count,
    printable_path,
)
from afterimage.config.study import StudyConfig, load_study, shipped, study_from_models
from afterimage.runs.run import check_folder, is_done
from afterimage.runtime.failures import clear_error_frames, to_afterimage_error
from afterimage.runtime.terminal import Display, console, format_duration, print_lines


@dataclass(frozen=True)
class Study:
    """Run a study: a shipped one by its name, a TOML file, or any models. Finished runs are kept, not repeated."""

    study: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME|FILE.toml")] = ""
    """Name of a shipped study, or a file. Without it, and without --models, the shipped studies are listed."""
    models: Annotated[str, tyro.conf.arg(metavar="MODEL,MODEL")] = ""
    """Models to study without a file: [PROVIDER/]MODEL each."""
    layers: str = ""
    """With --models: layers, as comma-separated globs over the names that `afterimage layers` lists (default: all)."""
    decoders: Annotated[tuple[str, ...], tyro.conf.arg(aliases=("--decoder",))] = ()
    """Decoders to train, instead of the study's own (default with --models: linear)."""
    parameters: Annotated[str, tyro.conf.arg(metavar="COUNT")] = ""
    """Number of parameters, within 5 %, of every decoder that comes in sizes: 250k, 1.5M, 4_000_000."""
    data: str = ""
    """Source of images, instead of the study's own: folder:PATH, hf:NAME, webdataset:SHARDS, parquet:SHARDS,
    div2k[:PATH], procedural[:COUNT] or photographs."""
    test: str = ""
    """Source of the test images, instead of the study's own (default with --data: its test split)."""
    size: shared.Size = ""
    """Crop size in pixels, instead of the study's own: 256, 256x384 (height x width), or native, each encoder's own."""
    resize: int | None = None
    """Shorter side in pixels after resizing, before the crop, instead of the study's own."""
    protocol: str = ""
    """Protocol, instead of the study's own: study (resize 256, crop 224) or rae (resize and crop 256, final norm)."""
    limit_train: shared.LimitTrain = None
    limit_validation: shared.LimitValidation = None
    limit_test: shared.LimitTest = None
    weights: str = ""
    """Encoder weights, instead of the study's own: pretrained, random, random-init, or a file or folder."""
    epochs: int | None = None
    """Number of epochs in every row, instead of the study's own."""
    batch_size: int | None = None
    """Number of images in each training step of every row, instead of the study's own."""
    loss: str = ""
    """Loss in every row, instead of the study's own: mse, l1, 0.5*mse + 0.5*lpips."""
    precision: str = ""
    """Number format in every row, instead of the study's own: 32-true, bf16-mixed or 16-mixed."""
    seeds: Annotated[tuple[int, ...], tyro.conf.arg(aliases=("--seed",))] = ()
    """Seeds of the runs, instead of the study's own."""
    lpips: str = ""
    """LPIPS network, instead of the study's own: alex, vgg, squeeze, or any (the first whose weights are found)."""
    output_dir: Path | None = None
    """Folder for the run folders and the report (default: runs/NAME)."""
    controls: bool = False
    """Also train matched controls (random weights, a perceptual loss), and measure the controls of every run."""
    invert: int | None = None
    """Number of test images on which every run's measured bound is found, by refining the decoder's reconstructions."""
    estimate_images: int | None = None
    """Number of validation images to learn the best estimates from, instead of the study's own; 0 for no estimates."""
    dry_run: bool = False
    """Print the runs with their sizes and estimated cost, and start nothing."""
    list_groups: bool = False
    """Print the groups of runs that are trained together, one group on each line, and start nothing."""
    shard: Annotated[str, tyro.conf.arg(metavar="K/N")] = ""
    """Run only part K of N: every N-th group from the K-th on, without the report. All N parts make up the study."""
    executor: Literal["local", "ray"] = "local"
    """Train runs in this process (local), or group by group as tasks on a Ray cluster (ray)."""
    address: str = ""
    """With --executor ray: address of the cluster, HOST:PORT or auto (default: RAY_ADDRESS, else one started here)."""
    cpus: int | None = None
    """With --executor ray: number of CPUs, and of threads, for each group (default: an even share of a machine)."""
    retries: int | None = None
    """With --executor ray: number of times that a group is restarted after its worker is lost (default: 3)."""
    cache: shared.Cache = None
    device: shared.Device = "auto"
    devices: shared.Devices = 1

    def run(self) -> None:
        if not self.study and not self.models:
            print_lines("shipped studies: " + ", ".join(shipped()))
            return
        from afterimage.experiments.study import StudyShard, expand_study, run_study
        from afterimage.runtime.distributed import on_main_process

        if self.study and self.models:
            raise AfterimageError("give a study or --models, not both")
        if self.layers and not self.models:
            raise AfterimageError("--layers goes with --models: a study names its own layers")
        if self.dry_run and self.list_groups:
            raise AfterimageError("give --dry-run or --list-groups, not both")
        if self.models:
            split = [[part.strip() for part in text.split(",")] for text in (self.models, self.layers or "*")]
            study, name = study_from_models(*split), "-".join(split[0])
        else:
            study, name = load_study(self.study), Path(self.study).stem
        study = self._apply_options(study)
        if self.estimate_images and not study.invert:
            raise AfterimageError("--estimate-images goes with --invert: this study measures no bounds")
        part = StudyShard.parse(self.shard) if self.shard else StudyShard()
        root = self.output_dir or Path("runs") / name
        check_folder(root, "--output-dir", writable=not (self.dry_run or self.list_groups))
        executor = self._executor()
        with Display() as display:
            if self.dry_run or self.list_groups:
                failures: list[AfterimageError] = []
                configs = part.of(expand_study(study, display, failures))
                if self.dry_run:
                    print_plan(configs, study)
                else:
                    print_groups(configs)
                print_failures(failures)
                if failures:
                    raise SystemExit(1)
                return
            with self._cluster(display):
                runs, failures = run_study(
                    study,
                    root,
                    cache=self.cache,
                    accelerator=self.device,
                    progress=display,
                    part=part,
                    **executor,
                )
        if not on_main_process():
            raise SystemExit(1 if failures else 0)
        try:
            if any(is_done(run) for run in runs):
                print_table(runs)
                if part.count == 1:
                    Report((root,), title=study.title).run()
            if part.count > 1:
                print_lines(
                    f"part {self.shard} of the study; when all are done: afterimage report {printable_path(root)}"
                )
        finally:
            print_failures(failures)
        if failures:
            raise SystemExit(1)

    def _executor(self) -> dict[str, Any]:
        """Return the functions of Ray that train runs and find bounds, with their options; empty for this process."""
        asked = specified_options(self, "cpus", "retries")
        for name, least in (("cpus", 1), ("retries", 0)):
            check_range(f"--{name}", asked.get(name, least), least, MAX_PROCESSES)
        if self.executor == "ray":
            from afterimage.experiments.ray.driver import find_bounds_on_ray, train_on_ray

            return {"train": partial(train_on_ray, **asked), "bounds": partial(find_bounds_on_ray, **asked)}
        for name in specified_options(self, "address", "cpus", "retries"):
            raise AfterimageError(f"--{name} goes with --executor ray")
        return {}

    def _cluster(self, display: Display) -> AbstractContextManager:
        """Connect to the Ray cluster, if there is to be one, for both training and bounds."""
        if self.executor == "local":
            return nullcontext()
        from afterimage.experiments.ray.cluster import connect

        return connect(self.address, partial(display, done=1, total=1))

    def _apply_options(self, study: StudyConfig) -> StudyConfig:
        """Return the study with the options of the command line in place of its own settings."""
        data = specified_options(self, "test", "limit_train", "limit_validation", "limit_test", source="data")
        if self.data:
            data["test"] = self.test
        recipe = specified_options(self, "epochs", "batch_size", "loss", "precision")
        rows = []
        for row in study.rows:
            decoders = tuple(d for d in row.decoders if not self.decoders or d.name in self.decoders)
            if decoders or not row.decoders:  # a row without any wanted decoder is left out
                kept = {key: value for key, value in row.recipe.items() if key not in recipe}
                rows.append(replace(row, decoders=decoders, recipe=kept))
        changed = specified_options(self, "seeds", "weights", "lpips", "invert")
        if self.decoders:
            changed["decoders"] = tuple(map(DecoderConfig, self.decoders))
        if self.parameters:
            changed["parameters"] = parse_count(self.parameters, "--parameters")
        return replace(
            study,
            data=replace(study.data.with_overrides(self.size, self.resize, self.protocol), **data),
            recipe=replace(study.recipe, **recipe),
            rows=tuple(rows),
            controls=self.controls or study.controls,
            estimate=replace(study.estimate, **specified_options(self, images="estimate_images")),
            **changed,
        )


def print_groups(configs: list[RunConfig]) -> None:
    """Print one line for each group of runs that are trained together: `1/5` and the names of its runs."""
    from afterimage.experiments.study import study_groups

    split = study_groups(configs)
    for number, group in enumerate(split, 1):
        print_lines(" ".join([f"{number}/{len(split)}", *(config.name for config in group)]))


def print_plan(configs: list[RunConfig], study: StudyConfig) -> None:
    """Print a table of a study's runs with their estimated cost, and the estimated cost of its measured bounds."""
    from afterimage.analysis.inversion.best_estimate import corrector_training_macs
    from afterimage.cli.layers import print_unseen
    from afterimage.experiments.cost import estimate_cost, macs_per_second
    from afterimage.experiments.study import study_groups
    from afterimage.models.fusion import FUSIONS

    plans, problems = [], []
    for config in configs:
        try:
            plans.append(estimate_cost(config))
        except Exception as error:
            problems.append(f"cannot be built: {to_afterimage_error(error, config.name)}")
            clear_error_frames(error)
    numbers = ("parameters", "encoder MACs", "decoder MACs", "epochs", "time", "memory")
    found = table(
        f"{format_count(len(configs), 'run')}, none started", ("features", "shape", "decoder"), numbers
    )
    for one in plans:
        config = one.config
        sources = list(config.sources)
        if config.fusion is not None:
            channels = f" {config.fusion.channels}" if FUSIONS[config.fusion.name].trainable else ""
            sources.append(f"fused: {config.fusion.name}{channels} at {config.fusion.size or 'finest'}")
        if config.weights != "pretrained":
            sources.append(f"weights: {config.weights}")
        found.add_row(
            "\n".join(sources),
            "\n".join(f"{s.channels}×{s.height}×{s.width}" for s in one.specs),
            config.decoder.name + ("" if config.recipe.loss == "mse" else f"\nloss: {config.recipe.loss}"),
            f"{one.parameters:,}",
            f"{one.encoder_macs / 1e6:,.0f} M",
            f"{one.decoder_macs / 1e6:,.0f} M",
            str(one.epochs),
            f"~{format_duration(one.seconds)}",
            f"~{one.bytes / 2**30:.1f} GiB",
        )
    console(180).print(found)
    print_unseen({source: text for one in plans for source, text in one.unseen.items()})
    print_lines(*problems)
    if study.invert and plans:
        steps, held_out, learn = study.inversion.steps, study.inversion.held_out, study.estimate.images
        text = f"{format_count(study.invert, 'image')} of each run"
        if learn:
            text += f" and {learn} to learn best estimates from"
        elif held_out:
            text += f" and {held_out} to choose the number of passes on"
        macs = sum(3 * steps * (study.invert + max(learn, held_out)) * one.encoder_macs for one in plans)
        if learn:
            macs += sum(corrector_training_macs(study.estimate, one.config.data.size) for one in plans)
        print_lines(
            f"measured bounds: {text}, at most {format_count(steps, 'pass', 'passes')} forward and backward each: "
            f"~{format_duration(macs / macs_per_second())}"
        )
    total = sum(one.seconds for one in plans)
    print_lines(
        f"{format_count(len(study_groups(configs)), 'group')} of runs that are trained together (--list-groups)"
    )
    print_lines(
        f"estimates at {macs_per_second() / 1e9:.0f} GMAC/s, measured here on one convolution: "
        f"~{format_duration(total)} if each "
        "run were trained alone; runs that share encoders share their pass. MACs are for one image."
    )
