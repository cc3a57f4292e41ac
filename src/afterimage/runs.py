"""The run folder: create, open, scan, atomic write, status. Holds no torch, so that reports start at once.

config.toml           what was asked for
environment.json      versions, commit, device, weights' tag and digest
history.csv           one row an epoch
scores.csv            one row a test picture: id, psnr, ssim, lpips
summary.json          what a report needs (see `Run.summary`)
decoder.safetensors   the best decoder by validation loss
reconstructions/      a fixed set of test pictures: NAME.original.png and NAME.png; index.json
                      NAME.weights.N.png: how much a fusion gave its source N, where it weighs them
status.json           state: running, stopped, done or failed; with the error
checkpoint*           while it is trained: what training goes on from, and the one before (see `checkpoint`)
lock.*                while it is worked on: which process does (see `lock`)
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import os
import platform
import re
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from afterimage.config import LPIPS_NETS, AfterimageError, RunConfig, dump_toml, load_toml, read_text
from afterimage.terminal import shown

# What a damaged or foreign file can raise while it is read; anything else is a bug here and should show.
DAMAGE = (
    *(AfterimageError, ArithmeticError, AttributeError, LookupError, OSError, RecursionError),
    *(TypeError, ValueError),
)
MAX_PIXELS = 2**26
"""Pixels of the largest picture that a run folder may hold."""

LEFTOVER = ".part"
"""How files that are being written end; one that stays was left by a process that was killed."""


def write_atomic(path: str | Path, content: bytes | str, *, keep: Path | None = None) -> None:
    """Write a file whole or not at all: a temporary file beside it, flushed to disk, then renamed over it.

    With `keep` the file that was there gets that name, once the new one is safe on disk.
    """
    path = Path(path)
    # A name that is no text has lone surrogates, which UTF-8 cannot hold; their escape is JSON's too.
    content = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=LEFTOVER)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        if not isinstance(error, OSError):
            raise
        raise AfterimageError(f"cannot write {shown(path)}: {error.strerror or error}") from error
    _sync_folder(path.parent)


def check_folder(path: str | Path, setting: str, *, writable: bool = True) -> None:
    """Raise `AfterimageError` naming the setting unless a folder is there, or could be made there, and written into.

    Asked before long work whose result is to go there; nothing is made.
    """
    path = Path(path)
    for place in (path.absolute(), *path.absolute().parents):
        try:
            mode = place.stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            if place.is_symlink():
                raise AfterimageError(
                    f"{setting} {shown(path)}: {shown(place)} is a link to nothing"
                ) from None
            continue
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise AfterimageError(f"{setting} {shown(path)}: {reason}") from None
        if not stat.S_ISDIR(mode):
            raise AfterimageError(f"{setting} {shown(path)}: {shown(place)} is a file, not a folder")
        if writable and not os.access(place, os.W_OK | os.X_OK):
            raise AfterimageError(f"{setting} {shown(path)}: the folder {shown(place)} cannot be written")
        return


def check_file(path: str | Path, setting: str) -> None:
    """Raise `AfterimageError` naming the setting unless a file can be written there."""
    path = Path(path)
    check_folder(path.absolute().parent, setting)
    if path.is_dir():
        raise AfterimageError(f"{setting} {shown(path)} is a folder; name a file")


def remove_leftovers(folder: Path, *, older: float = 0.0) -> None:
    """Remove half-written files below a folder that have not changed for `older` seconds."""
    for path in folder.rglob(f".*{LEFTOVER}"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime >= older:
                path.unlink()


def _sync_folder(path: Path) -> None:
    """Make renames in a folder last through a power cut, where the system can."""
    with contextlib.suppress(OSError):
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_json(path: str | Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal; raises `AfterimageError` where it cannot be read."""
    if path.exists() and not path.is_file():
        raise AfterimageError(f"cannot read {shown(path)}: it is not a regular file")
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise AfterimageError(f"cannot read {shown(path)}: {error.strerror}") from None


# Of the surrogates those of bytes in a file's name are kept, as Python writes them (PEP 383).
_HALF = re.compile("[\ud800-\udc7f\udd00-\udfff]")


def read_json(path: str | Path) -> Any:
    text = read_text(path)
    try:
        value = json.loads(text)
        if "\\u" in text and (half := _HALF.search(json.dumps(value, ensure_ascii=False))):
            raise ValueError(f"{half[0]!r} is half a character")
        return value
    except (ValueError, RecursionError) as error:
        raise AfterimageError(f"{shown(path)} is not valid JSON: {error}") from None


@contextlib.contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Inside the block, whatever a file of another shape raises becomes an `AfterimageError` that names it."""
    try:
        yield
    except AfterimageError:
        raise
    except DAMAGE as error:
        what = f"{type(error).__name__}: {error}"
        raise AfterimageError(f"{shown(path)} does not hold what it should ({what:.300})") from error


def write_csv(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows under a header; None becomes an empty cell, floats keep every digit."""
    rows = list(rows)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue())


def write_image(path: str | Path, pixels: Any) -> None:
    """Write uint8 pixels, `(H, W, 3)` or grey `(H, W)`, as PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    write_atomic(path, buffer.getvalue())


def read_image(path: str | Path, content: bytes | None = None) -> Any:
    """A picture of a run folder, PNG, as a loaded Pillow picture; `content` where its bytes are read already.

    Raises `AfterimageError` naming a file that is missing, damaged, of another format or too large.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content) if content is not None else path, formats=["PNG"]) as image:
            if image.width * image.height > MAX_PIXELS:
                raise AfterimageError(
                    f"cannot read the picture {shown(path)}: it has over {MAX_PIXELS:,} pixels"
                )
            image.load()
            return image
    except AfterimageError:
        raise
    except Exception as error:  # a decoder may raise anything on a damaged file
        raise AfterimageError(f"cannot read the picture {shown(path)}: {error}") from None


def read_csv(path: str | Path) -> list[dict[str, Any]]:
    """Read rows back; cells that are numbers become numbers, empty cells None. The id stays text.

    Raises `AfterimageError` for a file that cannot be read, and for a row with more or fewer cells than columns.
    """
    rows = []
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
    try:
        for row in reader:
            if None in row or None in row.values():
                raise AfterimageError(
                    f"{shown(path)}, line {reader.line_num}: the row does not have the header's "
                    f"{len(reader.fieldnames or ())} cells"
                )
            rows.append({k: v if k == "id" else _number(v) for k, v in row.items()})
    except csv.Error as error:
        raise AfterimageError(f"cannot read {shown(path)}: {error}") from None
    return rows


def _number(cell: str | None) -> Any:
    if not cell:
        return None
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(cell)
    return cell


@runtime_checkable
class Named(Protocol):
    """A configuration that names its run folder, a dataclass such as `RunConfig`."""

    @property
    def name(self) -> str: ...


@dataclass(frozen=True)
class Run:
    """One run folder. Every property reads the file anew; nothing is cached."""

    path: Path

    @classmethod
    def create(cls, root: str | Path, config: Named) -> Run:
        """Make (or find) the folder that this configuration names. An existing one is left as it is."""
        run = cls(Path(root) / config.name)
        if not run.file("config.toml").exists():
            write_atomic(run.file("config.toml"), dump_toml(config))
        return run

    @classmethod
    def open(cls, path: str | Path) -> Run:
        run = cls(Path(path))
        if not run.file("config.toml").exists() and not run.file("summary.json").exists():
            raise AfterimageError(
                f"{shown(path)} is not a run folder: it holds neither config.toml nor summary.json"
            )
        return run

    def file(self, name: str) -> Path:
        return self.path / name

    @property
    def name(self) -> str:
        """The folder's name as text that can always be printed: other bytes and control characters are escaped."""
        return shown(self.path.name)

    @property
    def config(self) -> RunConfig:
        return load_toml(RunConfig, self.file("config.toml"))

    @property
    def state(self) -> str:
        """`new`, `running`, `stopped`, `done` or `failed`."""
        state = self.status.get("state", "new")
        if not isinstance(state, str):
            raise AfterimageError(f"{shown(self.file('status.json'))}: state must be text, got {state!r:.80}")
        return state

    @property
    def status(self) -> dict[str, Any]:
        """The state and what goes with it, such as `error`; empty for a run that was never started."""
        path = self.file("status.json")
        if not path.exists():
            return {}
        status = read_json(path)
        if not isinstance(status, dict):
            raise AfterimageError(f"{shown(path)} must hold a JSON object with a state, got {status!r:.80}")
        return status

    def set_state(self, state: str, **details: Any) -> None:
        write_json(self.file("status.json"), {"state": state, **details})

    def remove_leftovers(self) -> None:
        """Remove what a process that was killed left half written; only for who holds the run's lock."""
        remove_leftovers(self.path)

    def save_environment(self, facts: Mapping[str, Any]) -> None:
        write_json(self.file("environment.json"), facts)

    def save_history(self, rows: Iterable[Mapping[str, Any]]) -> None:
        write_csv(self.file("history.csv"), rows)

    @property
    def summary(self) -> dict[str, Any]:
        """What the run came to. Keys are those of `evaluate.summarise`; scores are None where unavailable."""
        summary = read_json(self.file("summary.json"))
        if not isinstance(summary, dict):
            raise AfterimageError(
                f"{shown(self.file('summary.json'))} must hold a JSON object, got {summary!r:.80}"
            )
        return summary

    @property
    def lpips_net(self) -> str:
        """The LPIPS network that the run was measured with, or is to be."""
        measured = self.summary.get("lpips") if self.file("summary.json").exists() else None
        net = measured.get("net") if isinstance(measured, dict) else None
        return net if net in LPIPS_NETS else self.config.lpips

    @property
    def scores(self) -> list[dict[str, Any]]:
        rows = read_csv(self.file("scores.csv"))
        if rows and "id" not in rows[0]:
            raise AfterimageError(f"{shown(self.file('scores.csv'))} has no column 'id'")
        return rows

    @property
    def history(self) -> list[dict[str, Any]]:
        """One row an epoch; empty for rows that are not trained by epochs."""
        path = self.file("history.csv")
        return read_csv(path) if path.exists() else []

    def save_result(
        self,
        summary: Mapping[str, Any],
        rows: Iterable[Mapping[str, Any]],
        pictures: Iterable[tuple[str, Any, Any]],
        fusion_maps: Sequence[Any] = (),
    ) -> None:
        """Write scores, pictures as `(id, original, reconstruction)` in uint8 `(H, W, 3)`, then the summary.

        `fusion_maps` holds uint8 `(sources, h, w)` for each picture, 255 for a weight of 1, where a fusion has such.
        """
        index = []
        for i, (identity, *pair) in enumerate(pictures):
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
        write_csv(self.file("scores.csv"), rows)
        write_json(self.file("summary.json"), summary)

    @property
    def pictures(self) -> list[tuple[str, Path, Path]]:
        """The saved test pictures as `(id, original, reconstruction)`, in their fixed order."""
        with reading(self._index_file):
            return [
                (str(e["id"]), *map(self._saved, (e["original"], e["reconstruction"]))) for e in self._index()
            ]

    @property
    def fusion_maps(self) -> dict[str, list[Path]]:
        """Where a fusion weighs its sources: each saved picture's maps, a grey PNG a source, 255 a weight of 1."""
        with reading(self._index_file):
            return {str(e["id"]): list(map(self._saved, e.get("fusion_maps", ()))) for e in self._index()}

    @property
    def _index_file(self) -> Path:
        return self.file("reconstructions") / "index.json"

    def _index(self) -> list[dict[str, Any]]:
        return read_json(self._index_file) if self._index_file.exists() else []

    def _saved(self, name: str) -> Path:
        """A saved picture's file, which must lie in the run folder, whatever the index or a link says."""
        path = self.file("reconstructions") / name
        if path.name != name or not path.resolve().is_relative_to(self.path.resolve()):
            raise AfterimageError(f"{self._index_file} names {name!r:.200}, which is no file of its folder")
        return path


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment() -> dict[str, Any]:
    """Versions, commit and machine: what one needs to explain a number that does not come out again."""
    packages = (
        "afterimage",
        "torch",
        "torchvision",
        "timm",
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
        "command": sys.argv,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
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


def origin(summary: Mapping[str, Any]) -> str:
    """`pretrained`, or which random control where an encoder of the row was one."""
    return next((w["label"] for w in summary["weights"] if w["is_random"]), "pretrained")


def scored_on(data: Sequence[Mapping[str, Any]]) -> list[str]:
    """Which test pictures each of several rows was measured on, as a name; `data` is what their summaries say of it.

    Older summaries lack the digest of the test part. Where one does, the digest of all
    pictures stands in for every row's, which tells training sets apart as well.
    """
    key = "test_digest" if all(entry.get("test_digest") for entry in data) else "digest"
    return [str(entry.get(key)) for entry in data]


def scan(root: str | Path) -> Iterator[Run]:
    """Every run folder directly below `root`, by name."""
    root = Path(root)
    if not root.is_dir():
        raise AfterimageError(f"there is no folder {root}")
    for path in sorted(root.iterdir()):
        if path.is_dir() and (path / "config.toml").exists():
            yield Run(path)
