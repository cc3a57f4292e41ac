"""Environment of a run: versions, commit and platform."""

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
    """Return versions, commit, platform, command and time, to explain a result that cannot be reproduced."""
    return _software() | {"command": sys.argv, "started": datetime.now(UTC).isoformat(timespec="seconds")}


@functools.cache
def _software() -> dict[str, Any]:
    """Return versions, commit and platform, cached so that later edits of the source files do not change them."""
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
    """Return the commit of the source tree that this package runs from, with `+changes` if it was edited since."""
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
