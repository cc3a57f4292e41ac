"""Record the versions, commit and device behind a run."""

from __future__ import annotations

import contextlib
import functools
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any


def environment() -> dict[str, Any]:
    """Versions, commit and machine: what one needs to explain a number that does not come out again."""
    return _software() | {"command": sys.argv, "started": datetime.now(UTC).isoformat(timespec="seconds")}


@functools.cache
def _software() -> dict[str, Any]:
    """What stays the same as long as the process lives, also where its source files are edited meanwhile."""
    packages = (
        "afterimage",
        "torch",
        "torchvision",
        "timm",
        "transformers",
        "open_clip_torch",
        "lightning-fabric",
        "numpy",
        "pillow",
        "safetensors",
        "numba",
    )
    versions = {}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The commit of the source tree this package runs from, with `+changes` where it was edited since."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    git = ["git", "-C", str(folder)]
    try:
        commit = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        )
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() + ("+changes" if changes.stdout.strip() else "")
