"""Find the weights of a network: a path, a folder, a local cache, the hub, or a seed. Nothing is unpickled."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from afterimage.config import RANDOM_WEIGHTS, WEIGHTS, AfterimageError, listed, local_path, shown
from afterimage.models.hub_files import (
    CONFIG,
    Unavailable,
    cached,
    download,
    download_url,
    named_config,
    torch_hub_file,
)
from afterimage.models.weight_files import shards
from afterimage.runs.files import sha256
from afterimage.runs.results import UsedWeights

SUFFIXES = (".safetensors", ".pth")
"""Endings of weight files in folders, the preferred one first."""
FOLDER = "AFTERIMAGE_WEIGHTS"
"""Environment variable that names a folder of weights."""
SNAPSHOT = tuple(
    f"{name}{end}" for name in ("model.safetensors", "pytorch_model.bin") for end in ("", ".index.json")
)
"""Names of the weights in a repository of the hub: one file, or an index of several files."""


@dataclass(frozen=True)
class Weights:
    """The origin of a network's weights.

    Attributes:
        model: name of the model, with its tag
        origin: `path`, `folder` (named by AFTERIMAGE_WEIGHTS), `cache`, `hub`, `own` (a user's network that
            brings its own weights), or one of `RANDOM_WEIGHTS`
        location: a path, a repository, an address, or `seed N`
        sha256: digest of the file; empty for random weights
        file: the file; None for random weights
        note: position of the weights in the file, known once they are read; empty if it is obvious
    """

    model: str
    origin: str
    location: str
    sha256: str = ""
    file: Path | None = field(default=None, repr=False, compare=False)
    note: str = ""

    @property
    def is_random(self) -> bool:
        """True if the network is a random control."""
        return self.origin in RANDOM_WEIGHTS

    @property
    def label(self) -> str:
        """`pretrained`, or the name of the random control."""
        return self.origin if self.is_random else "pretrained"

    @property
    def used(self) -> UsedWeights:
        """The weights as a run's result records them."""
        known = (self.model, self.origin, self.location, self.sha256)
        return UsedWeights(*known, label=self.label, is_random=self.is_random, note=self.note)


def weight_notes(used: Iterable[UsedWeights]) -> list[str]:
    """Return remarks on weights, for a run's notes."""
    return [f"weights of {weights.model}: {weights.note}" for weights in used if weights.note]


def search_weights(
    model: str,
    weights: str | Path,
    stems: Sequence[str] = (),
    repository: str = "",
    files: Sequence[str] = (),
    url: str | None = None,
    advice: str = "",
) -> Weights:
    """Find a network's weight file.

    For `pretrained` the search order is: the folder that AFTERIMAGE_WEIGHTS names, the local caches of the hub and
    of torch.hub, the hub.

    Args:
        model: name of the model
        weights: `pretrained`, or the path of a file or folder
        stems: file names to try in a folder, without their endings; by default, the repository's name
        repository: `OWNER/NAME[@REVISION]` on the hub, or the absolute path of a copy of one; empty if there is none
        files: file names to try in the repository, the preferred one first
        url: address at torch.hub; None if it has none
        advice: what to do if nothing is found; by default, to give --weights

    Raises:
        AfterimageError: nothing was found; the message lists what was tried and what to do next
    """
    is_folder = Path(repository).is_absolute()
    name, _, revision = (repository, "", "") if is_folder else repository.partition("@")
    names = [f"{stem}{suffix}" for stem in stems or [name.rpartition("/")[2]] for suffix in SUFFIXES]
    if str(weights) != "pretrained":
        return _from_path(model, Path(local_path(str(weights))), names, [*dict.fromkeys((*SNAPSHOT, *files))])
    if is_folder:
        return _from_path(model, Path(name), files, files)
    tried = []
    folder = os.environ.get(FOLDER)
    if folder:
        path = Path(folder).expanduser()
        if not path.is_dir():
            raise AfterimageError(f"{FOLDER} names {folder}, which is not a folder")
        if file := _in_folder(path, names):
            return _weights(model, "folder", str(file), file)
        tried.append(f"the folder {folder} that {FOLDER} names (no {', '.join(names)})")
    else:
        tried.append(f"no folder, as {FOLDER} is not set")
    hub = (name, revision or None, files) if name else ()
    if found := _in_cache(model, hub, url, tried) or _from_hub(model, hub, url, tried):
        return found
    advice = advice or (
        f"give --weights PATH (a file, or a folder with {' or '.join(names[:2])}), set {FOLDER} to such a folder, "
        "or give --weights random (a control: the network has then learned nothing)"
    )
    raise AfterimageError(f"no weights for {model}. Tried: {'; '.join(tried)}. To go on, {advice}")


def _from_path(model: str, path: Path, names: Sequence[str], snapshot: Sequence[str]) -> Weights:
    file = (_in_folder(path, names) or _in_snapshot(model, path, snapshot)) if path.is_dir() else path
    if file is None:
        inside = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))
        raise AfterimageError(
            f"the folder {shown(path)} holds no weights for {model}: none of {', '.join(names)}, nor a snapshot "
            f"of the hub ({' or '.join(snapshot)}). It holds {listed(inside, 5) or 'nothing'}; "
            "name a file to read just that"
        )
    if not file.is_file():
        raise AfterimageError(f"there are no weights at {shown(path)}; write {WEIGHTS}")
    return _weights(model, "path", str(file), file)


def _in_folder(folder: Path, names: Sequence[str]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _in_snapshot(model: str, folder: Path, names: Sequence[str]) -> Path | None:
    """Find the weights in a copy of a hub repository, whose config.json must not name another network.

    The folder may also be a repository in the hub's cache, which keeps one snapshot per commit.
    """
    commit = folder / "refs" / "main"
    if commit.is_file() and (folder / "snapshots").is_dir():
        folder = folder / "snapshots" / commit.read_text().strip()
    file = _in_folder(folder, names)
    if file is None or not (folder / CONFIG).is_file():
        return file
    found = named_config(str(folder.absolute())).get("architecture")
    if isinstance(found, str):
        own = named_config(model).get("architecture") if "/" in model else model
        if _architecture(found) != _architecture(str(own)):
            raise AfterimageError(
                f"the folder {folder} holds weights of {found}, by its {CONFIG}, and not of {model}"
            )
    return file


def _architecture(name: str) -> str:
    """Return a model's name without its tag, with timm's old names replaced by current ones."""
    from timm.models._registry import _deprecated_models

    name = name.partition(".")[0]
    return (_deprecated_models.get(name) or name).partition(".")[0]


def _weights(model: str, origin: str, location: str, file: Path) -> Weights:
    return Weights(model, origin, location, file_digest(file), file)


def _in_cache(model: str, hub: tuple, url: str | None, tried: list[str]) -> Weights | None:
    from huggingface_hub.constants import HF_HUB_CACHE

    if hub:
        if file := cached(*hub):
            return _weights(model, "cache", hub[0], file)
        tried.append(f"the hub's cache {HF_HUB_CACHE} (no {hub[0]})")
    if url:
        file = torch_hub_file(url)
        if file.is_file():
            return _weights(model, "cache", url, file)
        tried.append(f"torch.hub's cache (no {file})")
    return None


def _from_hub(model: str, hub: tuple, url: str | None, tried: list[str]) -> Weights | None:
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        tried.append("no download, as HF_HUB_OFFLINE is set")
        return None
    for location, get in ((hub and hub[0], lambda: download(*hub)), (url, lambda: download_url(url))):
        if location:
            try:
                return _weights(model, "hub", location, get())
            except Unavailable as reason:
                tried.append(str(reason))
    if not hub and not url:
        tried.append("no download, as none is published")
    return None


def file_digest(file: str | Path) -> str:
    """Return the SHA-256 of a file; it is computed again only if the size or modification time has changed.

    The digest of an index of shards covers the shards' names and digests.

    Raises:
        AfterimageError: the file cannot be read
    """
    if str(file).endswith(".index.json"):
        digests = [f"{shard.name} {file_digest(shard)}\n" for shard in shards(file)]
        return hashlib.sha256("".join(digests).encode()).hexdigest()
    path = Path(file).resolve()
    try:
        status = path.stat()
        return _digest(path, status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise AfterimageError(f"cannot read {file}: {error.strerror}") from None


@functools.cache
def _digest(path: Path, size: int, changed: int) -> str:
    return sha256(path)
