"""`afterimage invert`: optimise images, from grey or from a decoder's reconstruction, to find the measured bound."""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated

import tyro

from afterimage.cli import shared
from afterimage.cli.shared import classify_arguments, image_lines, option_name, specified_options
from afterimage.config import LPIPS_NETS, MAX_SEED, AfterimageError, DataConfig, check_range, printable_path
from afterimage.config.inversion import EstimateConfig, InversionConfig, InvertConfig
from afterimage.runs.results import METRICS
from afterimage.runs.run import Run, check_folder, scan
from afterimage.runtime.terminal import Display, print_lines


@dataclass(frozen=True)
class Invert:
    """Rebuild images from features alone by optimising them until their own features are the same.

    With image files and MODEL:LAYER it starts from grey and uses all layers at once. With RUN it refines the
    reconstructions of that run's decoder, on image files or on the run's own test images. For the latter it also learns
    best estimates from validation images, inverts from grey for comparison, and writes a table (bounds.csv,
    bounds.json) and the curve of PSNR against passes (saturation.png) of all runs in the output folder. The result is a
    lower bound on what the features hold; decoders approximate it much faster.
    """

    what: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[RUN|IMAGE|MODEL:LAYER ...]")
    ] = ()
    """Run folders, to start from their decoders, or layers (MODEL:LAYER), to start from grey; and image files."""
    data: str = ""
    """Source of images, such as folder:PATH, instead of image files (default: the run's own test images)."""
    size: shared.Size = ""
    """With MODEL:LAYER: crop size, 256, 256x384 (height x width), or native, the encoder's own (default: 224)."""
    max_images: int | None = None
    """With RUN or --data: limit the number of test images; the first are taken."""
    method: str = "fourier"
    """Parametrisation of the image: pixels, fourier or prior (a deep image prior)."""
    optimizer: str = "lbfgs"
    """Optimizer: lbfgs or adam."""
    steps: int = 200
    """Number of forward and backward passes through the encoder; the maximum when starting from a run's decoder."""
    held_out: int | None = None
    """With RUN: number of validation images to choose the number of passes on (default: 8); 0 takes --steps."""
    learning_rate: float | None = None
    """Learning rate of Adam, or size of L-BFGS's first step (default: the method's own)."""
    starts: int = 1
    """Number of starts for each image; the result whose features come nearest is kept."""
    jitter: int = 0
    """With --optimizer adam: largest random shift of the image before each pass, in pixels."""
    tv: float = 0.0
    """Weight of the total variation; 1 is the weight that Mahendran and Vedaldi propose."""
    alpha_norm: float = 0.0
    """Weight of the alpha-norm; 1 is the weight that Mahendran and Vedaldi propose."""
    precision: str = "32-true"
    """Number format: 32-true, or bf16-mixed to run the encoder in bfloat16 until its rounding matters."""
    estimate_images: int | None = None
    """With RUN: number of validation images to learn the best estimates from (default: 64); 0 for no estimates."""
    refine_only: bool = False
    """With RUN: leave out the inversion from grey."""
    output_dir: Path = Path("runs/inversion")
    """Folder for the run folders; each shows its progress in progress.png."""
    weights: str | None = None
    """Encoder weights: pretrained, random, random-init, or a file or folder (default: the run's own, or pretrained)."""
    seed: int = 0
    """Seed of the searches."""
    lpips: str | None = None
    """LPIPS network: alex, vgg or squeeze (default: the network that the run was measured with, or alex)."""
    cache: shared.Cache = None
    device: shared.Device = "auto"

    def run(self) -> None:
        from afterimage.runtime.device import device_name

        check_folder(self.output_dir, "--output-dir")
        check_range("seed", self.seed, 0, MAX_SEED)
        names = [field.name for field in fields(InvertConfig) if hasattr(self, field.name)]
        method = InvertConfig(**specified_options(self, *names))
        folders, files, sources = self._sort()
        device = device_name(self.device)
        with Display() as display:
            if folders:
                done = self._refine(folders, method, files, device, display)
            else:
                done = [self._invert_from_grey(method, files, sources, device, display)]
        self._show(done, each=not folders)

    def _sort(self) -> tuple[list[Path], list[Path], list[str]]:
        """Return the run folders, image files and layers that were given; raise if they do not go together."""
        folders, files, sources = classify_arguments(self.what)
        if folders and sources:
            raise AfterimageError(f"a run already defines its layers; leave out {', '.join(sources)}")
        if self.refine_only and not folders:
            raise AfterimageError("--refine-only needs a RUN: without a decoder there is nothing to refine")
        if folders and self.size:
            raise AfterimageError("a run already defines its image size; leave out --size")
        if files and self.data:
            raise AfterimageError("give image files or --data, not both")
        for name in ("held_out", "estimate_images"):
            if getattr(self, name) and (files or not folders):  # 0 asks for what is done anyway
                raise AfterimageError(
                    f"{option_name(name)} needs a RUN without image files: it takes the run's validation images"
                )
        if self.held_out and self.optimizer != "lbfgs":
            raise AfterimageError("--held-out goes with --optimizer lbfgs; adam takes --steps")
        if files and self.max_images is not None:
            raise AfterimageError(
                "--max-images limits the images of a RUN or of --data; name fewer image files"
            )
        if not folders and not (sources and (files or self.data)):
            raise AfterimageError(
                "give images and layers, `afterimage invert IMAGE MODEL:LAYER`, or a run whose decoder to start "
                "from, `afterimage invert RUN`"
            )
        return folders, files, sources

    def _refine(
        self, paths: list[Path], method: InvertConfig, files: list[Path], device: str, progress: object
    ) -> list[Run]:
        from afterimage.analysis.inversion.inputs import from_data, from_files
        from afterimage.analysis.inversion.run import invert_run

        folders = []
        estimate = None if files else EstimateConfig(**specified_options(self, images="estimate_images"))
        for path in paths:
            run = Run.open(path)
            data = run.config.data
            if files:
                inputs = from_files(files, resize=data.resize, crop=data.crop)
            else:
                limit = specified_options(self, limit_test="max_images")
                if self.data:
                    limit = {"test": self.data, "limit_test": self.max_images}
                data = replace(data, **limit)
                inputs = from_data(data, cache=self.cache, progress=progress)
            folders += invert_run(
                run, self.output_dir, method, inputs, from_grey=not self.refine_only, estimate=estimate,
                weights=self.weights, seed=self.seed, lpips=self.lpips, device=device, progress=progress,
            )  # fmt: skip
        return folders

    def _invert_from_grey(
        self, method: InvertConfig, files: list[Path], sources: list[str], device: str, progress: object
    ) -> Run:
        from afterimage.analysis.inversion.inputs import from_files, from_source
        from afterimage.analysis.inversion.run import invert_sources, is_current
        from afterimage.evaluation.metrics import Metrics
        from afterimage.models.encoders.providers import at_native_size
        from afterimage.models.reconstructor import MultiEncoder

        named = self.data or "photographs"
        data = at_native_size(
            DataConfig(named, named, limit_test=self.max_images).with_overrides(self.size), sources
        )
        if files:
            inputs = from_files(files, resize=data.resize, crop=data.crop)
        else:
            inputs = from_source(data, cache=self.cache, progress=progress)
        lpips = self.lpips or LPIPS_NETS[0]
        where, size = self.weights or "pretrained", inputs.config.size
        encoders = MultiEncoder(sources, weights=where, image_size=size, seed=self.seed).to(device)
        config = InversionConfig(encoders.sources, where, "", method, inputs.config, self.seed, lpips)
        folder = Run.create(self.output_dir, config)
        used = encoders.weights_of(encoders.sources)
        get_metrics = functools.cache(lambda: Metrics(lpips, size=min(size)))
        if not is_current(folder, None, used, inputs.facts, lpips, get_metrics, progress=progress):
            search = {"metrics": get_metrics(), "seed": self.seed, "device": device, "progress": progress}
            invert_sources(folder, encoders, method, inputs, **search)
        return folder

    def _show(self, folders: list[Run], each: bool) -> None:
        """Print the table of all inversions and, with `each`, the scores of every image; write the bounds' files."""
        from afterimage.report.inversion import print_bounds, write_bounds
        from afterimage.report.rows import Row

        # Decoders of the same layer share one inversion from grey.
        made = [Row.from_run(folder) for folder in {folder.path: folder for folder in folders}.values()]
        print_bounds(made)
        if each:
            for row in made[0].per_image:
                lines = image_lines({name: row[name] for name in METRICS}, made[0].lpips)
                print_lines(f"{row['id']}: {', '.join(lines)}; feature loss {row['feature_loss']:.3g}")
        done = [Row.from_run(run) for run in scan(self.output_dir) if run.state == "done"]
        written = write_bounds([row for row in done if row.kind == "inversion"], self.output_dir)
        print_lines(*map(printable_path, [*written, *(row.run.path for row in made)]))
