"""Options that several commands share, with their help texts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

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
MovedWeights = Annotated[
    str | None,
    arg(help="File or folder of the encoders' weights, if they have moved since training."),
]
OwnLpips = Annotated[
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


def given(command: Any, *names: str, **fields: str) -> dict[str, Any]:
    """Return the options of a command that are neither None nor empty.

    Args:
        command: the command
        names: names of options
        fields: names of options whose values are returned under other names, by these names
    """
    values = {name: getattr(command, field) for name, field in ({n: n for n in names} | fields).items()}
    return {name: value for name, value in values.items() if value not in (None, "", ())}


def flag(name: str) -> str:
    """Return an option as it is written on the command line, such as `--max-images` for `max_images`."""
    return f"--{name.replace('_', '-')}"
