"""A run folder: create, open, scan, status."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from afterimage.config import LPIPS_NETS, AfterimageError, RunConfig, dump_toml, load_toml, shown
from afterimage.runs.files import (
    read_csv,
    read_json,
    reading,
    remove_leftovers,
    write_atomic,
    write_csv,
    write_image,
    write_json,
)


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
        images: Iterable[tuple[str, Any, Any]],
        fusion_maps: Sequence[Any] = (),
    ) -> None:
        """Write scores, images as `(id, original, reconstruction)` in uint8 `(H, W, 3)`, then the summary.

        `fusion_maps` holds uint8 `(sources, h, w)` for each image, 255 for a weight of 1, where a fusion has such.
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
        write_csv(self.file("scores.csv"), rows)
        write_json(self.file("summary.json"), summary)

    @property
    def images(self) -> list[tuple[str, Path, Path]]:
        """The saved test images as `(id, original, reconstruction)`, in their fixed order."""
        with reading(self._index_file):
            return [
                (str(e["id"]), *map(self._saved, (e["original"], e["reconstruction"]))) for e in self._index()
            ]

    @property
    def fusion_maps(self) -> dict[str, list[Path]]:
        """Where a fusion weighs its sources: each saved image's maps, a grey PNG a source, 255 a weight of 1."""
        with reading(self._index_file):
            return {str(e["id"]): list(map(self._saved, e.get("fusion_maps", ()))) for e in self._index()}

    @property
    def _index_file(self) -> Path:
        return self.file("reconstructions") / "index.json"

    def _index(self) -> list[dict[str, Any]]:
        return read_json(self._index_file) if self._index_file.exists() else []

    def _saved(self, name: str) -> Path:
        """A saved image's file, which must lie in the run folder, whatever the index or a link says."""
        path = self.file("reconstructions") / name
        if path.name != name or not path.resolve().is_relative_to(self.path.resolve()):
            raise AfterimageError(f"{self._index_file} names {name!r:.200}, which is no file of its folder")
        return path


def origin(summary: Mapping[str, Any]) -> str:
    """`pretrained`, or which random control where an encoder of the row was one."""
    return next((w["label"] for w in summary["weights"] if w["is_random"]), "pretrained")


def scored_on(data: Sequence[Mapping[str, Any]]) -> list[str]:
    """Which test images each of several rows was measured on, as a name; `data` is what their summaries say of it.

    Older summaries lack the digest of the test part. Where one does, the digest of all
    images stands in for every row's, which tells training sets apart as well.
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
