"""The command line. Heavy imports wait until a command needs them."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from afterimage.config import (
    AfterimageError,
    DataConfig,
    DecoderConfig,
    RecipeConfig,
    RunConfig,
)

if TYPE_CHECKING:
    from afterimage.study import StudyConfig

Sources = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MODEL:LAYER [...]")]
Flat = tyro.conf.OmitArgPrefixes


@dataclass(frozen=True)
class Layers:
    """List what can be inverted in a model: every layer with its shape and cost."""

    model: Annotated[str, tyro.conf.Positional]
    """A timm name, for example resnet34.tv_in1k; the default weights' tag is taken where none is given."""
    image_size: int = 224
    """Side of the picture in pixels."""
    every: bool = False
    """List each module whose output can be inverted, not only stages and blocks."""

    def run(self) -> None:
        from afterimage.encoders import list_layers

        print_layers(self.model, list_layers(self.model, self.image_size, every=self.every))


@dataclass(frozen=True)
class Train:
    """Train decoders on frozen features, measure what comes back, and write one run folder each.

    All MODEL:LAYER x decoder pairs of one model are trained together on one pass through it.
    """

    sources: Sources
    """Features to rebuild pictures from, for example resnet34.tv_in1k:layer1."""
    decoder: tuple[str, ...] = ("attention",)
    """Decoders to train: attention, transposed, linear."""
    weights: str = "pretrained"
    """`pretrained` (folder AFTERIMAGE_WEIGHTS, hub cache, hub), `random` (a control), or a file or folder."""
    data: str = "div2k"
    """div2k, div2k:PATH, folder:PATH, procedural[:COUNT] or photographs."""
    test: str = ""
    """Another source whose pictures are the test set."""
    resize: int = 256
    """Shorter side in pixels after resizing."""
    crop: int = 224
    """Side of the crop in pixels."""
    limit_train: int | None = None
    """Use only so many training pictures."""
    limit_validation: int | None = None
    """Use only so many validation pictures."""
    limit_test: int | None = None
    """Use only so many test pictures."""
    recipe: Flat[RecipeConfig] = RecipeConfig()
    """The training recipe; the defaults are the published study's."""
    seed: int = 42
    """Decides initial weights, order, crops and flips."""
    lpips: str = "alex"
    """LPIPS network: alex, vgg or squeeze."""
    root: Path = Path("runs")
    """Folder that holds the run folders."""
    cache: Path | None = None
    """Where decoded pictures are kept (default: AFTERIMAGE_CACHE, else ~/.cache/afterimage)."""
    accelerator: str = "auto"
    """cpu, cuda, mps or auto."""

    def run(self) -> None:
        from afterimage.encoders import resolve
        from afterimage.jobs import train_runs
        from afterimage.progress import Display

        data = DataConfig(
            source=self.data,
            test=self.test,
            resize=self.resize,
            crop=self.crop,
            limit_train=self.limit_train,
            limit_validation=self.limit_validation,
            limit_test=self.limit_test,
        )
        configs = [
            RunConfig(
                sources=(resolve(source),),
                weights=self.weights,
                decoder=DecoderConfig(decoder),
                data=data,
                recipe=self.recipe,
                seed=self.seed,
                lpips=self.lpips,
            )
            for source in self.sources
            for decoder in self.decoder
        ]
        if not configs:
            raise AfterimageError("name at least one MODEL:LAYER, for example resnet34.tv_in1k:layer1")
        with Display() as display:
            runs = train_runs(
                configs, self.root, cache=self.cache, accelerator=self.accelerator, progress=display
            )
        print_table(runs)
        print("\n".join(f"run: {run.path}" for run in runs))


@dataclass(frozen=True)
class Evaluate:
    """Measure a finished run's decoder again, on its own test pictures or on others."""

    run_folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(name="run", metavar="RUN")]
    """A run folder."""
    data: str | None = None
    """Another source of pictures to measure on, such as folder:PATH (default: the run's own test pictures)."""
    weights: str | None = None
    """Where the encoder's weights are, if not where they were in training."""
    lpips: str = "alex"
    """LPIPS network: alex, vgg or squeeze."""
    output: Path | None = None
    """Write the per-picture scores to this CSV file."""
    cache: Path | None = None
    """Where decoded pictures are kept."""

    def run(self) -> None:
        from afterimage.evaluate import summarise
        from afterimage.metrics import Metrics
        from afterimage.progress import Display
        from afterimage.rerun import evaluate_run
        from afterimage.runs import Run, write_csv

        run = Run.open(self.run_folder)
        metrics = Metrics(self.lpips, size=run.config.data.crop)
        with Display() as display:
            rows, _ = evaluate_run(
                run, metrics, test=self.data, weights=self.weights, cache=self.cache, progress=display
            )
        if self.output is not None:
            write_csv(self.output, rows)
            print(f"scores of {len(rows)} pictures: {self.output}")
        for name, score in summarise(rows).items():
            print(score_line(name, score, metrics.lpips_status))


@dataclass(frozen=True)
class Reconstruct:
    """Rebuild your own picture through a finished run; saves original and reconstruction side by side."""

    picture: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PICTURE")]
    """Any picture file."""
    run_folder: Annotated[Path, tyro.conf.arg(name="run", metavar="RUN")]
    """A run folder."""
    output: Path | None = None
    """Where to save (default: beside the working folder, PICTURE.reconstruction.png)."""
    weights: str | None = None
    """Where the encoder's weights are, if not where they were in training."""
    lpips: str = "alex"
    """LPIPS network: alex, vgg or squeeze."""

    def run(self) -> None:
        from afterimage.metrics import Metrics
        from afterimage.rerun import reconstruct_picture
        from afterimage.runs import Run

        output = self.output or Path(f"{self.picture.stem}.reconstruction.png")
        run = Run.open(self.run_folder)
        metrics = Metrics(self.lpips, size=run.config.data.crop)
        scores = reconstruct_picture(self.picture, run, output, metrics, weights=self.weights)
        for name, value in scores.items():
            print(score_line(name, value if value is None else {"mean": value}, metrics.lpips_status))
        print(f"saved: {output} (original left, reconstruction right)")


@dataclass(frozen=True)
class Study:
    """Run a study: a shipped one by name, a TOML file, or any timm models. What is done is not done again."""

    study: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME|FILE.toml")] = ""
    """Without a name and models the shipped studies are listed."""
    models: Annotated[str, tyro.conf.arg(metavar="MODEL,MODEL")] = ""
    """Study these timm models without a file."""
    layers: str = "*"
    """With --models: which layers, as comma-separated globs over those that `afterimage layers` lists."""
    decoder: tuple[str, ...] = ()
    """Only these decoders, in place of the study's own (with --models: linear)."""
    data: str = ""
    """Pictures instead of the study's own: div2k, div2k:PATH, folder:PATH, procedural[:COUNT] or photographs."""
    test: str = ""
    """Another source whose pictures are the test set."""
    weights: str = ""
    """Weights instead of the study's own: pretrained, random, or a file or folder."""
    epochs: int | None = None
    """Epochs instead of the study's own."""
    limit_train: int | None = None
    """Use only so many training pictures."""
    lpips: str = ""
    """LPIPS network instead of the study's own: alex, vgg, squeeze, or any whose weights are found."""
    root: Path | None = None
    """Folder for the study's run folders and report (default: runs/NAME)."""
    dry_run: bool = False
    """Print the resolved runs with their sizes and estimated cost, and start nothing."""
    cache: Path | None = None
    """Where decoded pictures are kept (default: AFTERIMAGE_CACHE, else ~/.cache/afterimage)."""
    accelerator: str = "auto"
    """cpu, cuda, mps or auto."""

    def run(self) -> None:
        from afterimage.progress import Display
        from afterimage.study import expand, from_models, load_study, run_study, shipped

        if not self.study and not self.models:
            print("shipped studies: " + ", ".join(shipped()))
            return
        if self.study and self.models:
            raise AfterimageError("give a study or --models, not both")
        if self.models:
            split = [[part.strip() for part in text.split(",")] for text in (self.models, self.layers)]
            study, name = from_models(*split), "-".join(split[0])
        else:
            study, name = load_study(self.study), Path(self.study).stem
        study = self._changed(study)
        with Display() as display:
            if self.dry_run:
                print_plan(expand(study, display))
                return
            root = self.root or Path("runs") / name
            runs, failures = run_study(
                study, root, cache=self.cache, accelerator=self.accelerator, progress=display
            )
        if any(run.state == "done" for run in runs):
            print_table(runs)
            Report((root,), title=study.title).run()
        for error in failures:
            print(f"failed: {error}", file=sys.stderr)
        if failures:
            raise SystemExit(1)

    def _changed(self, study: StudyConfig) -> StudyConfig:
        data = {"source": self.data, "limit_train": self.limit_train}
        data = {key: value for key, value in data.items() if value}
        if self.data or self.test:
            data["test"] = self.test
        chosen = {
            "decoders": tuple(map(DecoderConfig, self.decoder)),
            "rows": self._rows(study),
            "weights": self.weights,
            "lpips": self.lpips,
            "data": replace(study.data, **data),
            "recipe": replace(study.recipe, epochs=self.epochs) if self.epochs is not None else None,
        }
        changed = {key: value for key, value in chosen.items() if value}
        return replace(study, **(changed | {"rows": chosen["rows"]}))

    def _rows(self, study: StudyConfig) -> tuple:
        """The study's extra rows, without those whose own decoders were not asked for."""
        if not self.decoder:
            return study.rows
        wanted = [(row, tuple(d for d in row.decoders if d.name in self.decoder)) for row in study.rows]
        return tuple(replace(row, decoders=own) for row, own in wanted if own or not row.decoders)


@dataclass(frozen=True)
class Report:
    """Make a report from run folders alone: report.md, the page index.html, tables and figures."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER [...]")]
    """Run folders, or folders that hold run folders."""
    output: Path | None = None
    """Folder for the report (default: FOLDER/report)."""
    title: str = ""
    """The report's title."""
    intervals: bool = False
    """Show 95 % intervals of the means in the tables instead of standard deviations over pictures."""

    def run(self) -> None:
        from afterimage.progress import Display
        from afterimage.report import write_report
        from afterimage.runs import Run, scan

        if not self.folders:
            raise AfterimageError("name at least one run folder, or a folder that holds some")
        runs = [
            run
            for folder in self.folders
            for run in ([Run(folder)] if (folder / "config.toml").exists() else scan(folder))
        ]
        output = self.output or self.folders[0] / "report"
        title, spread = self.title or self.folders[0].resolve().name, "interval" if self.intervals else "std"
        with Display() as display:
            written = write_report(runs, output, title=title, spread=spread, progress=display)
        shown = [written[name] for name in ("report.md", "index.html") if name in written]
        print(*shown, f"and {len(written) - len(shown)} more files beside them", sep="\n")
        if "index.html" not in written:
            print("afterimage: the page could not be written; report.md says why", file=sys.stderr)


COMMANDS = {
    "layers": Layers,
    "train": Train,
    "evaluate": Evaluate,
    "reconstruct": Reconstruct,
    "study": Study,
    "report": Report,
}


def score_line(name: str, score: dict | None, status: dict) -> str:
    """`PSNR 24.31 ± 2.80 dB over 100 pictures`."""
    if score is None:
        return f"{name.upper()} unavailable: {status['reason']}"
    label = f"LPIPS ({status['net']})" if name == "lpips" else name.upper()
    unit = " dB" if name == "psnr" else ""
    digits = 2 if name == "psnr" else 4
    spread = ""
    if score.get("std") is not None:
        spread = f" ± {score['std']:.{digits}f}{unit} over {score['count']} pictures"
    return f"{label} {score['mean']:.{digits}f}{'' if spread else unit}{spread}"


def print_table(runs: list) -> None:
    """The table of results on the terminal."""
    from rich.console import Console

    from afterimage.report import console_table, read_rows

    Console(width=None if sys.stdout.isatty() else 160).print(console_table(read_rows(runs)))


def print_plan(configs: list[RunConfig]) -> None:
    """What a study would run and cost, one line a run."""
    from rich.console import Console
    from rich.table import Table

    from afterimage.plan import macs_per_second, plan
    from afterimage.progress import clock

    plans = plan(configs)
    table = Table(title=f"{len(plans)} runs, none started", title_justify="left")
    for column in ("features", "shape", "decoder"):
        table.add_column(column, overflow="fold")
    for column in ("parameters", "encoder MACs", "decoder MACs", "epochs", "time", "memory"):
        table.add_column(column, justify="right")
    for one in plans:
        config = one.config
        sources = list(config.sources)
        if config.fusion is not None:
            sources.append(
                f"fused: {config.fusion.name} {config.fusion.channels} at {config.fusion.size or 'finest'}"
            )
        if config.weights != "pretrained":
            sources.append(f"weights: {config.weights}")
        table.add_row(
            "\n".join(sources),
            "\n".join(f"{s.channels}×{s.height}×{s.width}" for s in one.specs),
            config.decoder.name,
            f"{one.parameters:,}",
            f"{one.encoder_macs / 1e6:,.0f} M",
            f"{one.decoder_macs / 1e6:,.0f} M",
            str(config.recipe.epochs),
            f"~{clock(one.seconds)}",
            f"~{one.bytes / 2**30:.1f} GiB",
        )
    Console(width=None if sys.stdout.isatty() else 180).print(table)
    total = sum(one.seconds for one in plans)
    print(
        f"estimates at {macs_per_second() / 1e9:.0f} GMAC/s, measured here on one convolution: ~{clock(total)} if each "
        "run were trained alone; runs that share encoders share their pass. MACs are for one picture."
    )


def print_layers(model: str, layers: list) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=model, title_justify="left")
    table.add_column("layer", overflow="fold")
    for column in (
        "shape",
        "reduction",
        "locations",
        "values per pixel value",
        "parameters",
        "multiply-adds",
    ):
        table.add_column(column, justify="right")
    for layer in layers:
        table.add_row(
            layer.name,
            f"{layer.channels}×{layer.height}×{layer.width}",
            f"{layer.reduction:g}",
            f"{layer.locations:,}",
            f"{layer.values_per_pixel_value:.3f}",
            f"{layer.encoder_parameters:,}",
            f"{layer.encoder_macs / 1e6:,.1f} M",
        )
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def main(arguments: list[str] | None = None) -> None:
    """Run one command; an error a user can put right is one message and exit code 1."""
    try:
        chosen = tyro.cli(
            _union(),
            prog="afterimage",
            description="How much of a picture is left in the features of a frozen vision encoder?",
            args=arguments,
        )
        chosen.run()
    except AfterimageError as error:
        print(f"afterimage: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print(
            "\nafterimage: stopped; what is done is kept, the same command goes on from there",
            file=sys.stderr,
        )
        raise SystemExit(130) from None


def _union():
    from typing import Union

    return Union[tuple(Annotated[cls, tyro.conf.subcommand(name)] for name, cls in COMMANDS.items())]  # noqa: UP007


if __name__ == "__main__":
    main()
