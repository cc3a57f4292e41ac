"""Options with their help texts, arguments that name runs, and terminal output, as several commands share them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from afterimage.config import AfterimageError, format_count, printable_path
from afterimage.runs.repository import PREFIX
from afterimage.runs.results import METRICS, LpipsStatus, Score
from afterimage.runs.run import Run, check_file, scan
from afterimage.runtime.terminal import console, print_error, printable

if TYPE_CHECKING:
    from rich.table import Table

    from afterimage.report.format import TextTable

Sources = Annotated[tuple[str, ...], Positional, arg(metavar="MODEL:LAYER [...]")]
Images = Annotated[
    str,
    arg(
        help="Source of images: folder:PATH, hf:NAME, webdataset:SHARDS, parquet:SHARDS, div2k[:PATH], "
        "procedural[:COUNT] or photographs."
    ),
]
TestImages = Annotated[str, arg(help="Source of the test images (default: the test split of --data).")]
Size = Annotated[str, arg(metavar="SIDE|HxW|native", aliases=("--crop",))]
Resize = Annotated[
    int | None,
    arg(
        help="Shorter side in pixels after resizing, before the crop (default: 256, or as much as the crop needs)."
    ),
]
LimitTrain = Annotated[int | None, arg(help="Limit the number of training images.")]
LimitValidation = Annotated[int | None, arg(help="Limit the number of validation images.")]
LimitTest = Annotated[int | None, arg(help="Limit the number of test images.")]
Weights = Annotated[
    str,
    arg(
        help="Encoder weights: pretrained (from the folder AFTERIMAGE_WEIGHTS, the hub's cache or the hub), a file or "
        "folder, random (a random control whose blocks act) or random-init (one as its library initialises it)."
    ),
]
WeightsOverride = Annotated[
    str | None,
    arg(help="File or folder of the encoders' weights, if they have moved since training."),
]
LpipsOverride = Annotated[
    str | None,
    arg(help="LPIPS network: alex, vgg or squeeze (default: the network that each run was measured with)."),
]
Cache = Annotated[
    Path | None,
    arg(help="Folder for decoded images (default: AFTERIMAGE_CACHE, else ~/.cache/afterimage)."),
]
Device = Annotated[str, arg(help="Device to compute on: cpu, cuda, mps or auto.")]
Devices = Annotated[
    int,
    arg(
        help="Number of GPUs, or of processes on a CPU, that train each run; the result is the same as with one."
    ),
]


def specified_options(command: Any, *names: str, **fields: str) -> dict[str, Any]:
    """Return the options of a command that are neither None nor empty.

    Args:
        command: the command
        names: names of options
        fields: names of options whose values are returned under other names, by these names
    """
    values = {name: getattr(command, field) for name, field in ({n: n for n in names} | fields).items()}
    return {name: value for name, value in values.items() if value not in (None, "", ())}


def option_name(name: str) -> str:
    """Return an option as it is written on the command line, such as `--max-images` for `max_images`."""
    return f"--{name.replace('_', '-')}"


def find_runs(folders: tuple[Path, ...]) -> list[Run]:
    """Find the runs in folders, each of which is a run folder or holds run folders.

    Raises:
        AfterimageError: no folder is given, one does not exist, or there is no run in any
    """
    if not folders:
        raise AfterimageError("name at least one run folder, or a folder that holds some")
    runs = [
        run
        for folder in folders
        for run in ([Run(folder)] if (folder / "config.toml").exists() else scan(folder))
    ]
    if not runs:
        raise AfterimageError(f"there is no run in {', '.join(map(printable_path, folders))}")
    return runs


def find_local_or_hub_runs(names: tuple[str, ...]) -> list[Run]:
    """Find the runs in folders, as `find_runs` does, and all decoders at addresses of the hub (`hub:USER/NAME`)."""
    addresses = [name for name in names if name.startswith(PREFIX)]
    folders = tuple(Path(name) for name in names if name not in addresses)
    runs = find_runs(folders) if folders or not addresses else []
    if addresses:
        from afterimage.models.hub import pull_all

        runs += [run for address in addresses for run in pull_all(address)]
    return runs


def classify_arguments(given: tuple[str, ...]) -> tuple[list[Path], list[Path], list[str]]:
    """Sort arguments into run folders, image files and `model:layer` by what exists on disk.

    Raises:
        AfterimageError: an argument is none of the three; the message names it
    """
    folders, files, layers = [], [], []
    for name in given:
        path = Path(name)
        if path.exists():
            (folders if path.is_dir() else files).append(path)
        elif ":" in name:
            layers.append(name)
        else:
            raise AfterimageError(
                f"{printable_path(name)} is no image file, no run folder and no MODEL:LAYER"
            )
    return folders, files, layers


def check_png(path: Path) -> None:
    """Raise unless the file of --output is a PNG file that can be written."""
    if path.suffix.lower() != ".png":
        raise AfterimageError(f"--output {printable_path(path)}: the figure is a PNG file, name it .png")
    check_file(path, "--output")


def print_failures(failures: Iterable[AfterimageError]) -> None:
    """Print each failure on standard error."""
    for error in failures:
        print_error("failed", error)


def table(title: str, left: Sequence[str], right: Sequence[str] = (), last: Sequence[str] = ()) -> Table:
    """Create a table with columns of text on the left, of numbers beside them, and of text again at the end."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for names, side in ((left, "left"), (right, "right"), (last, "left")):
        for name in names:
            table.add_column(name, overflow="fold", justify=side)
    return table


def print_numbers(numbers: TextTable, columns: Table, width: int) -> None:
    """Print the rows of a table of numbers under the given columns."""
    for row in numbers.rows:
        columns.add_row(*map(printable, row))
    console(width).print(columns)


def score_line(name: str, score: Score | None, lpips: LpipsStatus) -> str:
    """Return a score as text, such as `PSNR 24.31 ± 2.80 dB over 100 images`; None for an unavailable metric."""
    metric = METRICS[name]
    if score is None:
        return f"{metric.title} unavailable: {lpips.reason}"
    label = f"LPIPS ({lpips.net})" if name == "lpips" else metric.title
    unit, digits = metric.unit, 2 if name == "psnr" else 4
    if score.std is None:
        return f"{label} {score.mean:.{digits}f}{unit}"
    return f"{label} {score.mean:.{digits}f} ± {score.std:.{digits}f}{unit} over {format_count(score.count, 'image')}"


def image_lines(scores: Mapping[str, float | None], lpips: LpipsStatus) -> list[str]:
    """Return a `score_line` for each score of one image."""
    return [
        score_line(name, None if value is None else Score(value, None, 1), lpips)
        for name, value in scores.items()
    ]


def print_table(runs: list) -> None:
    """Print the table of results, and below it the table of measured bounds if there are any."""
    from afterimage.report.reading import read_rows
    from afterimage.report.tables import console_table

    rows = read_rows(runs)
    console(160).print(console_table(rows))
    if rows.inversions:
        from afterimage.report.inversion import print_bounds

        print_bounds(rows.inversions)
