"""`afterimage invert`: inversion by optimising the image, from grey or from a decoder's answer: the measured bound."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from afterimage.cli.output import image_lines
from afterimage.cli.report import sort_arguments
from afterimage.config import LPIPS_NETS, MAX_SEED, AfterimageError, DataConfig, check_range, shown
from afterimage.config.inversion import EstimateConfig
from afterimage.runtime.terminal import say

if TYPE_CHECKING:
    from afterimage.analysis.inversion.inputs import InversionInputs
    from afterimage.config.inversion import InvertConfig
    from afterimage.runs.run import Run


@dataclass(frozen=True)
class Invert:
    """Rebuild images from features alone by optimising them until their own features are the same.

    `invert IMAGE... MODEL:LAYER...` starts from grey and uses all layers at once. `invert RUN` starts from that
    run's decoder and refines its answer. Without images it takes the run's own test images (`--max-images` keeps the
    first), learns the best estimates of them from validation images, inverts them from grey as well, and puts
    decoder, best estimate, inversion and refinement in one table: bounds.csv, bounds.json and the curve of PSNR
    against passes, saturation.png, of all that the output folder holds. What comes back is a lower bound on what the
    features hold: it was reached. Decoders approximate it at a fraction of the time.
    """

    what: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[RUN|IMAGE|MODEL:LAYER ...]")
    ] = ()
    """Run folders whose decoders to start from; or layers as model:layer, to start from grey. And image files."""
    data: str = ""
    """A source of images such as folder:PATH, instead of files or of a run's own."""
    size: Annotated[str, tyro.conf.arg(metavar="SIDE|HxW|native", aliases=("--crop",))] = ""
    """With MODEL:LAYER: size of the crop in pixels (default 224): 256, 256x384 (height x width), or native, the
    encoder's own. A run's images have the size that it was trained on."""
    max_images: int | None = None
    """Only the first images of the source's test split."""
    method: str = "fourier"
    """What is optimised: pixels, fourier or prior (a deep image prior)."""
    optimizer: str = "lbfgs"
    """lbfgs or adam."""
    steps: int = 200
    """Passes through the encoder and back; from a run's decoder at most so many."""
    held_out: int = 8
    """Validation images on which the number of passes from a run's decoder is chosen; 0 takes --steps."""
    learning_rate: float | None = None
    """Adam's, and the size of L-BFGS's first step."""
    starts: int = 1
    """Starts of each image in one batch; the one whose features come nearest is kept."""
    jitter: int = 0
    """Shift the image by up to this many pixels before each pass (adam)."""
    tv: float = 0.0
    """Weight of the total variation; 1 is the weight Mahendran and Vedaldi propose."""
    alpha_norm: float = 0.0
    """Weight of the alpha-norm; 1 is the weight Mahendran and Vedaldi propose."""
    precision: str = "32-true"
    """32-true, or bf16-mixed to run the encoder in bfloat16 until its rounding would tell."""
    estimate_images: int = EstimateConfig.images
    """Validation images that the best estimates of a run's test images are learned from; 0 for none."""
    refine_only: bool = False
    """Of a run: leave out the inversion from grey."""
    output_dir: Path = Path("runs/inversion")
    """Folder for the run folders; each holds progress.png while it is made."""
    weights: str | None = None
    """pretrained, random, random-init, or a file or folder."""
    seed: int = 0
    lpips: str | None = None
    """LPIPS network: alex, vgg or squeeze (default: of a run the one that it was measured with, else alex)."""
    cache: Path | None = None
    """Where decoded images are kept."""
    device: str = "auto"
    """cpu, cuda, mps or auto."""

    def run(self) -> None:
        from afterimage.config.inversion import InvertConfig
        from afterimage.runs.run import check_folder
        from afterimage.runtime.device import device_name
        from afterimage.runtime.progress import Display

        check_folder(self.output_dir, "--output-dir")
        check_range("seed", self.seed, 0, MAX_SEED)
        names = (
            "method",
            "optimizer",
            "steps",
            "held_out",
            "learning_rate",
            "starts",
            "jitter",
            "tv",
            "alpha_norm",
            "precision",
        )
        method = InvertConfig(**{name: getattr(self, name) for name in names})
        folders, files, sources = self._sort()
        device = device_name(self.device)
        with Display() as display:
            if folders:
                done = self._refine(folders, method, files, device, display)
            else:
                done = [self._plain(method, files, sources, device, display)]
        self._show(done, each=not folders)

    def _sort(self) -> tuple[list[Path], list[Path], list[str]]:
        """Run folders, image files and layers, in a combination that means something."""
        folders, files, sources = sort_arguments(self.what)
        if folders and sources:
            raise AfterimageError(f"a run's layers are its own; leave out {', '.join(sources)}")
        if self.refine_only and not folders:
            raise AfterimageError("--refine-only needs a RUN: without a decoder there is nothing to refine")
        if folders and self.size:
            raise AfterimageError("a run's images have their size; leave out --size")
        if files and self.data:
            raise AfterimageError("give image files or --data, not both")
        if not folders and not (sources and (files or self.data)):
            raise AfterimageError(
                "give images and layers, `afterimage invert IMAGE MODEL:LAYER`, or a run whose decoder to start "
                "from, `afterimage invert RUN`"
            )
        return folders, files, sources

    def _given(self, files: list[Path], data: DataConfig, progress: object) -> InversionInputs:
        from afterimage.analysis.inversion.inputs import from_data, from_files

        if files:
            return from_files(files, resize=data.resize, crop=data.crop)
        return from_data(data, cache=self.cache, progress=progress)

    def _refine(
        self, paths: list[Path], method: InvertConfig, files: list[Path], device: str, progress: object
    ) -> list[Run]:
        from afterimage.analysis.inversion.run import invert_run
        from afterimage.runs.run import Run

        folders = []
        estimate = None if files else EstimateConfig(self.estimate_images)
        for path in paths:
            run = Run.open(path)
            data = replace(
                run.config.data,
                limit_test=run.config.data.limit_test if self.max_images is None else self.max_images,
            )
            given = self._given(files, replace(data, test=self.data or data.test), progress)
            folders += invert_run(
                run, self.output_dir, method, given, plain=not self.refine_only, estimate=estimate,
                weights=self.weights, seed=self.seed, lpips=self.lpips, device=device, progress=progress,
            )  # fmt: skip
        return folders

    def _plain(
        self, method: InvertConfig, files: list[Path], sources: list[str], device: str, progress: object
    ) -> Run:
        from afterimage.analysis.inversion.run import invert_sources
        from afterimage.config.inversion import InversionConfig
        from afterimage.evaluation.metrics import Metrics
        from afterimage.models.encoders.providers import at_native_size
        from afterimage.models.reconstructor import MultiEncoder
        from afterimage.runs.run import Run

        data = DataConfig(source=self.data or "photographs", limit_test=self.max_images)
        data = at_native_size(data.sized(self.size) if self.size else data, sources)
        given = self._given(files, data, progress)
        lpips = self.lpips or LPIPS_NETS[0]
        where, size = self.weights or "pretrained", given.config.size
        encoders = MultiEncoder(sources, weights=where, image_size=size, seed=self.seed).to(device)
        config = InversionConfig(encoders.sources, where, "", method, given.config, self.seed, lpips)
        folder = Run.create(self.output_dir, config)
        if folder.state != "done":
            metrics = Metrics(lpips, size=min(size))
            options = {"metrics": metrics, "seed": self.seed, "device": device, "progress": progress}
            invert_sources(folder, encoders, method, given, **options)
        return folder

    def _show(self, folders: list[Run], each: bool) -> None:
        """Print the table of all inversions, and with `each` the scores of every image."""
        from afterimage.report.inversion import print_bounds, write_bounds
        from afterimage.report.rows import Row
        from afterimage.runs.results import METRICS
        from afterimage.runs.run import scan

        # Decoders of one layer have one inversion from grey.
        made = [Row.of(folder) for folder in {folder.path: folder for folder in folders}.values()]
        print_bounds(made)
        if each:
            for row in made[0].per_image:
                lines = image_lines({name: row[name] for name in METRICS}, made[0].lpips)
                say(f"{row['id']}: {', '.join(lines)}; feature loss {row['feature_loss']:.3g}")
        done = [Row.of(run) for run in scan(self.output_dir) if run.state == "done"]
        written = write_bounds([row for row in done if row.kind == "inversion"], self.output_dir)
        say(*map(shown, [*written, *(row.run.path for row in made)]))
