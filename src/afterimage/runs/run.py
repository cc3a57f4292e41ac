"""Run folders: creation, state, failure, files, and search; and the environment of a run."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import stat
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from afterimage.config import (
    AfterimageError,
    BaselineConfig,
    RunConfig,
    dump_toml,
    from_dict,
    join_names,
    load_toml,
    printable_path,
)
from afterimage.config.inversion import InversionConfig
from afterimage.runs.files import (
    read_csv,
    read_json,
    read_object,
    remove_temporary_files,
    write_atomic,
    write_csv,
    write_image,
    write_json,
)
from afterimage.runs.results import SUMMARY, Result, read_result, write_result
from afterimage.runtime.failures import (
    UnexpectedError,
    error_message,
    is_expected,
    to_afterimage_error,
    traceback_text,
)
from afterimage.runtime.terminal import printable


def check_folder(path: str | Path, setting: str, *, writable: bool = True) -> None:
    """Check, before long work, that a folder exists or could be created, and could be written, without creating it.

    Raises:
        AfterimageError: the folder cannot be used; the message names `setting`, such as `--output-dir`
    """
    path = Path(path)
    for folder in (path.absolute(), *path.absolute().parents):
        try:
            mode = folder.stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            if folder.is_symlink():
                raise AfterimageError(
                    f"{setting} {printable_path(path)}: {printable_path(folder)} is a broken link"
                ) from None
            continue
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise AfterimageError(f"{setting} {printable_path(path)}: {reason}") from None
        if not stat.S_ISDIR(mode):
            raise AfterimageError(
                f"{setting} {printable_path(path)}: {printable_path(folder)} is a file, not a folder"
            )
        if writable and not os.access(folder, os.W_OK | os.X_OK):
            raise AfterimageError(
                f"{setting} {printable_path(path)}: the folder {printable_path(folder)} cannot be written"
            )
        return


def check_file(path: str | Path, setting: str) -> None:
    """Check that a file can be written; raise an `AfterimageError` that names the setting if it cannot."""
    path = Path(path)
    check_folder(path.absolute().parent, setting)
    if path.is_dir():
        raise AfterimageError(f"{setting} {printable_path(path)} is a folder; name a file")


@dataclass(frozen=True)
class Run:
    """A run folder. Every property reads its file anew; nothing is cached."""

    path: Path

    @classmethod
    def create(cls, root: str | Path, config: RunConfig | BaselineConfig | InversionConfig) -> Run:
        """Create the folder that a configuration names; an existing one is not changed."""
        run = cls(Path(root) / config.name)
        if not run.file("config.toml").exists():
            write_atomic(run.file("config.toml"), dump_toml(config))
        return run

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """Open a run folder; raise `AfterimageError` if it holds neither config.toml nor summary.json."""
        run = cls(Path(path))
        if not run.file("config.toml").exists() and not run.file("summary.json").exists():
            inside = [own.path.name for own in scan(path)] if run.path.is_dir() else []
            hint = f"; it is a folder of runs, name one of them: {join_names(inside, 3)}" if inside else ""
            raise AfterimageError(
                f"{printable_path(path)} is not a run folder: it holds neither config.toml nor summary.json{hint}"
            )
        return run

    def file(self, name: str) -> Path:
        return self.path / name

    @property
    def name(self) -> str:
        """Name of the folder as printable text, with undecodable bytes and control characters escaped."""
        return printable_path(self.path.name)

    @property
    def origin(self) -> str:
        """Path of the folder as printable text."""
        return printable_path(self.path)

    @property
    def config(self) -> RunConfig:
        """Configuration of a decoder's run; for finished runs of any kind see `result`."""
        return load_toml(RunConfig, self.file("config.toml"))

    @property
    def state(self) -> str:
        """State of the run: `new`, `running`, `stopped`, `done` or `failed`."""
        state = self.status.get("state", "new")
        if not isinstance(state, str):
            raise AfterimageError(
                f"{printable_path(self.file('status.json'))}: state must be text, got {state!r:.80}"
            )
        return state

    @property
    def status(self) -> dict[str, Any]:
        """The state and its details, such as `error`; empty for a run that was never started."""
        path = self.file("status.json")
        return read_object(path) if path.exists() else {}

    def set_state(self, state: str, **details: Any) -> None:
        write_json(self.file("status.json"), {"state": state, **details})

    def remove_leftovers(self) -> None:
        """Remove files that a killed process left partly written; the caller must hold the run's lock."""
        remove_temporary_files(self.path)

    def save_environment(self, facts: Mapping[str, Any]) -> None:
        write_json(self.file("environment.json"), facts)

    def save_history(self, rows: Iterable[Mapping[str, Any]]) -> None:
        write_csv(self.file("history.csv"), rows)

    @property
    def has_result(self) -> bool:
        return self.file(SUMMARY).exists()

    @property
    def result(self) -> Result:
        """Result of the run; raises `AfterimageError` if it has not finished or a file is damaged."""
        return read_result(self.path)

    @property
    def lpips_net(self) -> str:
        """LPIPS network that the run was, or will be, measured with."""
        return self.result.lpips.net if self.has_result else self.config.lpips

    @property
    def history(self) -> list[dict[str, Any]]:
        """Training history, one row for each epoch; empty for runs that are not trained in epochs."""
        path = self.file("history.csv")
        return read_csv(path) if path.exists() else []

    def save_result(
        self, result: Result, images: Iterable[tuple[str, Any, Any]], fusion_maps: Sequence[Any] = ()
    ) -> None:
        """Write the images to keep, then the result.

        Args:
            result: the result
            images: `(id, original, reconstruction)` each, the latter two uint8 `(H, W, 3)`
            fusion_maps: weights of a fusion for each image, uint8 `(sources, h, w)` with 255 for 1; empty without any
        """
        index = []
        for i, (identity, *pair) in enumerate(images):
            names = [f"{i:03}.original.png", f"{i:03}.png"]
            for name, pixels in zip(names, pair, strict=True):
                write_image(self.file("reconstructions") / name, pixels)
            entry = {"id": identity, "original": names[0], "reconstruction": names[1]}
            if len(fusion_maps):
                entry["fusion_maps"] = [f"{i:03}.weights.{k}.png" for k in range(len(fusion_maps[i]))]
                for name, pixels in zip(entry["fusion_maps"], fusion_maps[i], strict=True):
                    write_image(self.file("reconstructions") / name, pixels)
            index.append(entry)
        write_json(self.file("reconstructions") / "index.json", index)
        write_result(self.path, result)

    @property
    def images(self) -> list[tuple[str, Path, Path]]:
        """Saved test images as `(id, original, reconstruction)`, in their fixed order."""
        return [(e.id, self._saved(e.original), self._saved(e.reconstruction)) for e in self._index()]

    @property
    def fusion_maps(self) -> dict[str, list[Path]]:
        """Weight maps of a fusion by saved image: a grey PNG file for each source, with 255 for a weight of 1."""
        return {entry.id: list(map(self._saved, entry.fusion_maps)) for entry in self._index()}

    def _index(self) -> list[_SavedImage]:
        path = self.file("reconstructions") / "index.json"
        entries = read_json(path) if path.exists() else []
        try:
            return list(from_dict(_Index, {"images": entries}).images)
        except AfterimageError as error:
            raise AfterimageError(f"{printable_path(path)}: {error}") from None

    def _saved(self, name: str) -> Path:
        """Return a saved image's path; raise if the index or a link leads out of the run folder."""
        path = self.file("reconstructions") / name
        if path.name != name or not path.resolve().is_relative_to(self.path.resolve()):
            raise AfterimageError(
                f"{printable_path(path.parent / 'index.json')} names {name!r:.200}, which is not a file of its folder"
            )
        return path


@dataclass(frozen=True)
class _SavedImage:
    """Entry of reconstructions/index.json, with names of files in the same folder."""

    id: str
    original: str
    reconstruction: str
    fusion_maps: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Index:
    images: tuple[_SavedImage, ...]


def scan(root: str | Path) -> Iterator[Run]:
    """Yield every run folder directly below `root`, sorted by name."""
    root = Path(root)
    if not root.is_dir():
        raise AfterimageError(f"there is no folder {printable_path(root)}")
    for path in sorted(root.iterdir()):
        if path.is_dir() and (path / "config.toml").exists():
            yield Run(path)


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
    folder = Path(__file__).resolve().parents[3]
    if not (folder / ".git").exists():
        return None
    git = ["git", "-C", str(folder)]
    try:
        commit = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        )
        status = [*git, "status", "--porcelain", "--untracked-files=no"]
        changes = subprocess.run(status, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


TRACEBACK = "traceback.txt"
"""File in a failed run's folder that holds the traceback."""


def write_failure(run: Run, error: Exception) -> None:
    """Set a run's state to `failed`, with the error, and write the traceback, if its folder can be written."""
    write_traceback(run, error)
    details = {} if is_expected(error) else {"traceback": TRACEBACK}
    with contextlib.suppress(Exception):
        run.set_state("failed", error=printable(error_message(error)), **details)


def read_failure(run: Run) -> AfterimageError:
    """Return the error of a failed run, as recorded in its folder."""
    status = run.status
    error = UnexpectedError if "traceback" in status else AfterimageError
    return to_afterimage_error(error(str(status.get("error"))), run.name, run.file(TRACEBACK))


def is_done(run: Run) -> bool:
    """Return whether a run is done; False if its folder cannot be read."""
    try:
        return run.state == "done"
    except AfterimageError:
        return False


def write_traceback(run: Run, error: Exception, file: str = TRACEBACK) -> None:
    """Write an exception's traceback into a run's folder, if it can be written."""
    with contextlib.suppress(Exception):
        write_atomic(run.file(file), traceback_text(error))


def remove_traceback(run: Run, file: str = TRACEBACK) -> None:
    """Remove the traceback that an earlier attempt at a run left."""
    with contextlib.suppress(OSError):
        run.file(file).unlink(missing_ok=True)
