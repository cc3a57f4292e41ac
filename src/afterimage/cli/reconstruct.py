"""`afterimage reconstruct`: rebuild your own images with finished runs, decoders of the hub, or layers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from afterimage.cli import shared
from afterimage.cli.shared import check_png, classify_arguments, find_runs, image_lines
from afterimage.config import LPIPS_NETS, AfterimageError, printable_path
from afterimage.runs.files import write_atomic
from afterimage.runs.run import Run
from afterimage.runtime.terminal import Display, print_lines

if TYPE_CHECKING:
    from afterimage.experiments.inference import ReconstructedImage


@dataclass(frozen=True)
class Reconstruct:
    """Rebuild your own images with finished runs, decoders of the hub, or layers of any encoder.

    For one image and one decoder, the figure shows original and reconstruction side by side. For several of either, it
    has a column for each decoder and an enlarged detail of each image. A decoder for a layer is fitted on the spot, in
    closed form, and kept for the next time.
    """

    what: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN|MODEL:LAYER [...] IMAGE [...]")
    ]
    """Run folders, folders that hold run folders, or layers (MODEL:LAYER), which need no run; and image files."""
    from_: Annotated[
        tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(name="from", metavar="hub:USER/NAME")
    ] = ()
    """Decoder of the Hugging Face hub: hub:USER/NAME, or hub:USER/NAME/DECODER in a repository of several, each with an
    optional @REVISION. May be given more than once, and together with runs."""
    data: str = ""
    """With MODEL:LAYER: source of the images to fit its decoder on, such as folder:PATH (default: procedural:100).
    Your own photographs make a better decoder than the default, drawn images."""
    output: Path | None = None
    """PNG file for the figure; several figures become FILE-1.png, FILE-2.png and so on (default:
    IMAGE.reconstruction.png in the working folder, named after the first image)."""
    weights: shared.WeightsOverride = None
    lpips: shared.LpipsOverride = None
    device: shared.Device = "auto"

    def run(self) -> None:
        folders, images, layers = classify_arguments(self.what)
        runs = find_runs(tuple(folders)) if folders or not (layers or self.from_) else []
        if not images:
            raise AfterimageError("name at least one image file")
        if self.data and not layers:
            raise AfterimageError("--data goes with MODEL:LAYER: a finished decoder is not fitted again")
        if len(set(images)) < len(images):
            raise AfterimageError("an image file is named twice")
        output = self.output or Path(f"{images[0].stem}.reconstruction.png")
        check_png(output)
        if self.from_:
            from afterimage.models.hub import pull

            runs += [pull(address) for address in self.from_]
            print_lines(*(f"decoder: {run.name}" for run in runs[-len(self.from_) :]))
        runs += self._fitted(layers, images) if layers else []
        if len(runs) == len(images) == 1:
            self._reconstruct_one(runs[0], images, output)
        else:
            self._reconstruct_several(runs, images, output)

    def _fitted(self, layers: list[str], images: list[Path]) -> list[Run]:
        """Fit a decoder for each layer, after checking that all image files can be read."""
        from afterimage.data.decode import load_image
        from afterimage.experiments.fit import fit_run

        for image in images:
            load_image(image)
        lpips, runs = self.lpips or LPIPS_NETS[0], []
        with Display() as display:
            for layer in layers:
                options = {"weights": self.weights or "pretrained", "lpips": lpips, "device": self.device}
                runs.append(fit_run(layer, self.data or "procedural:100", progress=display, **options))
        print_lines(
            *(f"decoder: {_describe_weights(run)}; kept in {printable_path(run.path)}" for run in runs)
        )
        return runs

    def _reconstruct_one(self, run: Run, images: list[Path], output: Path) -> None:
        from afterimage.data.dataset import file_notes
        from afterimage.evaluation.metrics import Metrics
        from afterimage.experiments.inference import reconstruct_files, write_side_by_side
        from afterimage.runtime.device import device_name

        metrics = Metrics(self.lpips or run.lpips_net, size=min(run.config.data.size))
        (rebuilt,) = reconstruct_files(
            images, run, metrics, weights=self.weights, device=device_name(self.device)
        )
        write_side_by_side(rebuilt, output, _describe_weights(run))
        notes = file_notes(images, run.config.data)
        print_lines(*image_lines(rebuilt.scores, metrics.lpips_status), *notes)
        print_lines(f"saved: {printable_path(output)} (original left, reconstruction right)")

    def _reconstruct_several(self, runs: list[Run], images: list[Path], output: Path) -> None:
        from afterimage.data.dataset import file_notes
        from afterimage.evaluation.metrics import Metrics
        from afterimage.experiments.inference import reconstruct_files
        from afterimage.report.figures import own_images, render
        from afterimage.report.reading import read_rows
        from afterimage.runtime.device import device_name

        read = read_rows(runs)
        rows = replace(read, decoders=tuple(r for r in read.decoders if r.kind == "decoder"), baselines=())
        if not rows.decoders:
            raise AfterimageError("none of the runs has a decoder; baselines and inversions rebuild nothing")
        sizes = {(d.resize, d.crop): row.run.name for row in rows.decoders for d in [row.config.data]}
        if len(sizes) > 1:
            told = ", ".join(
                f"{resize} cropped to {crop} in {name}" for (resize, crop), name in sizes.items()
            )
            raise AfterimageError(f"the runs see images at different sizes ({told}); give those of one size")
        names, device = _names(images), device_name(self.device)
        data = rows.decoders[0].config.data
        nets = {row.run: self.lpips or row.lpips.net for row in rows.decoders}
        metrics = {net: Metrics(net, size=min(data.size)) for net in set(nets.values())}
        found: dict[Run, dict[str, ReconstructedImage]] = {}
        with Display() as display:
            for number, row in enumerate(rows.decoders):
                display("reconstructing", number, len(rows.decoders), run=row.run.name)
                results = reconstruct_files(
                    images, row.run, metrics[nets[row.run]], weights=self.weights, device=device
                )
                found[row.run] = dict(zip(names, results, strict=True))
            display("reconstructing", len(rows.decoders), len(rows.decoders))
        for row in rows.decoders:
            for name, rebuilt in found[row.run].items():
                lines = image_lines(rebuilt.scores, metrics[nets[row.run]].lpips_status)
                print_lines(f"{row.label}, {name}: {', '.join(lines)}")
        print_lines(*file_notes(images, data))
        for left in rows.unfinished:
            print_lines(f"left out: {left.run.name} ({left.state})")
        drawings = own_images(rows, found)
        for number, drawing in enumerate(drawings, 1):
            several = len(drawings) > 1
            path = output.with_stem(f"{output.stem}-{number}") if several else output
            write_atomic(path, render(drawing.figure)[0])
            print_lines(
                f"saved: {printable_path(path)} ({f'{drawing.title}; ' if several else ''}mean: over a "
                "run's own test images)"
            )


def _describe_weights(run: Run) -> str:
    """Describe a decoder and its training images without their folder's path, because figures are passed on."""
    if not run.has_result:
        return run.name
    from afterimage.report.publish import public_source

    result, data = run.result, run.result.data
    if result.is_imported:
        return f"{result.label}, trained elsewhere ({run.name})"
    how = "trained" if result.training.epochs else "fitted"
    images = f"{data.train:,} images of {public_source(data.source)} (digest {data.digest[:12]})"
    return f"{result.label}, {how} on {images}, {data.validation:,} more for validation ({run.name})"


def _names(paths: list[Path]) -> list[str]:
    """Return the images' names in the figure: their stems, or whole paths if stems repeat."""
    stems = [printable_path(path.stem) for path in paths]
    names = stems if len(set(stems)) == len(stems) else [printable_path(path) for path in paths]
    # Two names may differ only in bytes that are not valid text.
    return names if len(set(names)) == len(names) else [f"{name} ({i})" for i, name in enumerate(names, 1)]
