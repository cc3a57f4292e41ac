"""Find the weights of a network: a path, a folder, a local cache, the hub, or a seed. Nothing is unpickled."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from afterimage.config import RANDOM_WEIGHTS, WEIGHTS, AfterimageError, first_line, local_path, shown, unknown
from afterimage.models.hub_files import (
    CONFIG,
    Unavailable,
    cached,
    download,
    download_url,
    repository_config,
    torch_hub_file,
)
from afterimage.models.weight_files import read_named_tensors, shards
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
NESTS = ("state_dict_ema", "model_ema", "state_dict", "model")
"""Keys under which checkpoints nest a state dict, the preferred one first."""


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


def random_weights(model: str, kind: str, seed: int) -> Weights:
    """Return the description of a random control's weights.

    Args:
        model: name of the model
        kind: one of `RANDOM_WEIGHTS`
        seed: seed of the random numbers
    """
    return Weights(model, kind, f"seed {seed}")


def find_weights(model: str, weights: str | Path = "pretrained") -> Weights:
    """Find the weight file of a timm model or of a repository of the hub.

    For `pretrained` the search order is: the folder that AFTERIMAGE_WEIGHTS names, the local caches of the
    hub and of torch.hub, the hub.

    Args:
        model: timm's name with its tag, or `OWNER/NAME`
        weights: `pretrained`, or the path of a file or folder

    Raises:
        AfterimageError: nothing was found; the message lists what was tried and what to do next
    """
    from timm.models import get_pretrained_cfg

    if "/" in model:
        stem = model.partition("@")[0].rpartition("/")[2]
        return search_weights(
            model, weights, [f"{stem}{suffix}" for suffix in SUFFIXES], _hub_files(model, None), None
        )
    architecture = model.partition(".")[0]
    names = [f"{stem}{suffix}" for stem in dict.fromkeys([model, architecture]) for suffix in SUFFIXES]
    config = get_pretrained_cfg(model, allow_unregistered=True)
    hub = _hub_files(config.hf_hub_id, config.hf_hub_filename) if config and config.hf_hub_id else ()
    url = config.url if config and isinstance(config.url, str) and not config.url.endswith(".npz") else None
    return search_weights(model, weights, names, hub, url)


def find_torchvision_weights(name: str, weights: str | Path = "pretrained") -> Weights:
    """Find torchvision's ImageNet weights of a network, which LPIPS needs.

    Args:
        name: torchvision's name of the network
        weights: `pretrained` (searched as in `find_weights`, including torch.hub's cache), or the path of a
            file or of a folder with `NAME.torchvision.safetensors` or `.pth`

    Raises:
        AfterimageError: nothing was found; the message lists what was tried and what to do next
    """
    from torchvision.models import get_model_weights, list_models

    if name not in list_models():
        raise unknown("torchvision model", name, list_models())
    names = [f"{name}.torchvision{suffix}" for suffix in SUFFIXES]
    url = get_model_weights(name).IMAGENET1K_V1.url
    # No command has an option for these weights: --weights is for the encoder's.
    advice = (
        f"set {FOLDER} to a folder with {' or '.join(names[:2])}, or take another LPIPS network with --lpips"
    )
    return search_weights(f"torchvision/{name}", weights, names, (), url, advice)


def search_weights(
    model: str,
    weights: str | Path,
    names: list[str],
    hub: tuple = (),
    url: str | None = None,
    advice: str = "",
) -> Weights:
    """Find a network's weight file: at the given path, or in AFTERIMAGE_WEIGHTS, the caches and the hub.

    Args:
        model: name of the model
        weights: `pretrained`, or the path of a file or folder
        names: file names to try in a folder, the preferred one first
        hub: repository, revision and file names to try there; empty if it is on no hub
        url: address at torch.hub; None if it has none
        advice: what to do if nothing is found; by default, to give --weights

    Raises:
        AfterimageError: nothing was found; the message lists what was tried and what to do next
    """
    if str(weights) != "pretrained":
        return _from_path(model, Path(local_path(str(weights))), names)
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
    if found := _in_cache(model, hub, url, tried) or _from_hub(model, hub, url, tried):
        return found
    advice = advice or (
        f"give --weights PATH (a file, or a folder with {' or '.join(names[:2])}), set {FOLDER} to such a folder, "
        "or give --weights random (a control: the network has then learned nothing)"
    )
    raise AfterimageError(f"no weights for {model}. Tried: {'; '.join(tried)}. To go on, {advice}")


def _from_path(model: str, path: Path, names: list[str]) -> Weights:
    file = (_in_folder(path, names) or _in_snapshot(model, path)) if path.is_dir() else path
    if file is None:
        inside = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))
        more = ", ..." if len(inside) > 5 else ""
        raise AfterimageError(
            f"the folder {shown(path)} holds no weights for {model}: none of {', '.join(names)}, nor a snapshot "
            f"of the hub ({' or '.join(SNAPSHOT)}). It holds {', '.join(inside[:5]) or 'nothing'}{more}; "
            "name a file to read just that"
        )
    if not file.is_file():
        raise AfterimageError(f"there are no weights at {shown(path)}; write {WEIGHTS}")
    return _weights(model, "path", str(file), file)


def _in_folder(folder: Path, names: list[str]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _in_snapshot(model: str, folder: Path) -> Path | None:
    """Find the weights in a copy of a hub repository, whose config.json must not name another network.

    The folder may also be a repository in the hub's cache, which keeps one snapshot per commit.
    """
    commit = folder / "refs" / "main"
    if commit.is_file() and (folder / "snapshots").is_dir():
        folder = folder / "snapshots" / commit.read_text().strip()
    file = _in_folder(folder, list(SNAPSHOT))
    if file is None or not (folder / CONFIG).is_file():
        return file
    try:
        config = json.loads((folder / CONFIG).read_bytes())
    except (OSError, ValueError) as error:
        raise AfterimageError(f"cannot read {folder / CONFIG}: {first_line(error)}") from None
    found = config.get("architecture") if isinstance(config, dict) else None
    own = repository_config(model).get("architecture") if "/" in model else model
    if isinstance(found, str) and _architecture(found) != _architecture(str(own)):
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


def _hub_files(repository: str, filename: str | None) -> tuple[str, str | None, list[str]]:
    """Return the repository, the revision, and the file names to try, safetensors first."""
    repository, _, revision = repository.partition("@")
    names = [filename] if filename else ["model.safetensors", "pytorch_model.bin"]
    if filename and not filename.endswith(".safetensors"):
        names.insert(0, f"{Path(filename).stem}.safetensors")
    return repository, revision or None, names


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


def read_weights(file: str | Path) -> dict[str, Tensor]:
    """Read a file's state dict without comparing it with a model; no code in the file runs.

    From a checkpoint with several state dicts the averaged weights are preferred, then `state_dict`, then
    `model`, then the container with the most tensors.

    Raises:
        AfterimageError: as for `read_named_tensors`
    """
    found = read_named_tensors(file)
    sizes = Counter(found.containers.values())
    nested = next((f"{key}." for key in NESTS if f"{key}." in sizes), "")
    container = nested if nested or "" in sizes else sizes.most_common(1)[0][0]
    return {
        _strip(name.removeprefix(container)): tensor
        for name, tensor in found.tensors.items()
        if found.containers[name] == container
    }


def _strip(key: str) -> str:
    """Remove the prefix that data-parallel training adds to names."""
    return key.removeprefix("module.")
