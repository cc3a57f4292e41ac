"""Find the weights of a network: the file (by path, in a folder, a cache or the hub), and its tensors in that file."""

from __future__ import annotations

import difflib
import functools
import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from afterimage.config import RANDOM_WEIGHTS, WEIGHTS, AfterimageError, join_names, local_path, printable_path
from afterimage.models.weight_files import NamedTensors
from afterimage.runs.files import sha256
from afterimage.runs.results import WeightsRecord
from afterimage.runtime.hub import (
    CONFIG,
    Unavailable,
    download,
    download_url,
    find_cached,
    list_shards,
    read_config,
    torch_hub_file,
)

SUFFIXES = (".safetensors", ".pth")
"""Endings of weight files in folders, the preferred one first."""
WEIGHTS_VARIABLE = "AFTERIMAGE_WEIGHTS"
"""Environment variable that names a folder of weights."""
SNAPSHOT = tuple(
    f"{name}{end}" for name in ("model.safetensors", "pytorch_model.bin") for end in ("", ".index.json")
)
"""Names of the weights in a repository of the hub: one file, or an index of several files."""
State = Mapping[str, Tensor]
AVERAGED = {"ema", "swa", "averaged"}
"""Words in a prefix that mark averaged weights, which are preferred."""
PREFERRED_CONTAINERS = ("state_dict", "model")
"""Containers that are preferred after averaged weights, in this order."""
LAST_RESORT_WORDS = {"student", "momentum", "optimizer", "optim", "grad", "grads"}
"""Words in a prefix that mark tensors to be taken only as a last resort."""
PREFERENCE_NOTE = (
    "of several that fit, averaged weights (ema) come first, then state_dict, then model, then the order of the file; "
    "student, momentum and optimizer come last"
)
"""The order of preference, for notes."""
CANDIDATES = 12
"""Number of prefixes that are tried with a model's filter, which may be slow."""
MAX_FOREIGN_SHARE = 0.1
"""Largest share of names unknown to the model; above it, another network is the more likely owner of the
tensors."""


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
        code: SHA-256 of the file with the code of a user's network; empty for others
    """

    model: str
    origin: str
    location: str
    sha256: str = ""
    file: Path | None = field(default=None, repr=False, compare=False)
    note: str = ""
    code: str = ""

    @property
    def is_random(self) -> bool:
        """True if the network is a random control."""
        return self.origin in RANDOM_WEIGHTS

    @property
    def label(self) -> str:
        """`pretrained`, or the name of the random control."""
        return self.origin if self.is_random else "pretrained"

    @property
    def record(self) -> WeightsRecord:
        """The weights as a run's result records them."""
        known = (self.model, self.origin, self.location, self.sha256)
        return WeightsRecord(*known, self.label, self.is_random, self.note, self.code)


def weight_notes(records: Iterable[WeightsRecord]) -> list[str]:
    """Return notes on weights, for a run's result."""
    return [f"weights of {weights.model}: {weights.note}" for weights in records if weights.note]


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
    folder = os.environ.get(WEIGHTS_VARIABLE)
    if folder:
        path = Path(folder).expanduser()
        if not path.is_dir():
            raise AfterimageError(f"{WEIGHTS_VARIABLE} names {folder}, which is not a folder")
        if file := _in_folder(path, names):
            return _weights(model, "folder", str(file), file)
        tried.append(f"the folder {folder} that {WEIGHTS_VARIABLE} names (no {', '.join(names)})")
    else:
        tried.append(f"no folder, as {WEIGHTS_VARIABLE} is not set")
    hub = (name, revision or None, files) if name else ()
    if found := _cached_or_downloaded(model, hub, url, tried):
        return found
    advice = advice or (
        f"give --weights PATH (a file, or a folder with {' or '.join(names[:2])}), set "
        f"{WEIGHTS_VARIABLE} to such a folder, "
        "or give --weights random (a control: the network has then learned nothing)"
    )
    raise AfterimageError(f"no weights for {model}. Tried: {'; '.join(tried)}. To go on, {advice}")


def _from_path(model: str, path: Path, names: Sequence[str], snapshot: Sequence[str]) -> Weights:
    file = _in_folder(path, [*names, *snapshot]) if path.is_dir() else path
    if file is None:
        inside = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))
        raise AfterimageError(
            f"the folder {printable_path(path)} holds no weights for {model}: none of "
            f"{', '.join(names)}, nor a snapshot "
            f"of the hub ({' or '.join(snapshot)}). It holds {join_names(inside, 5) or 'nothing'}; "
            "name a file to read just that"
        )
    if path.is_dir() and (path / CONFIG).is_file():
        found = read_config(str(path.absolute())).get("architecture")
        if isinstance(found, str):  # a network of timm's
            own = read_config(model).get("architecture") if "/" in model else model
            if found.partition(".")[0] != str(own).partition(".")[0]:
                raise AfterimageError(
                    f"the folder {printable_path(path)} holds weights of {found}, by its {CONFIG}, and not of {model}"
                )
    if not file.is_file():
        raise AfterimageError(f"there are no weights at {printable_path(path)}; write {WEIGHTS}")
    return _weights(model, "path", str(file), file)


def _in_folder(folder: Path, names: Sequence[str]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _weights(model: str, origin: str, location: str, file: Path) -> Weights:
    return Weights(model, origin, location, file_digest(file), file)


def _cached_or_downloaded(model: str, hub: tuple, url: str | None, tried: list[str]) -> Weights | None:
    from huggingface_hub import constants

    if hub:
        if file := find_cached(*hub):
            return _weights(model, "cache", hub[0], file)
        tried.append(f"the hub's cache {constants.HF_HUB_CACHE} (no {hub[0]})")
    if url:
        file = torch_hub_file(url)
        if file.is_file():
            return _weights(model, "cache", url, file)
        tried.append(f"torch.hub's cache (no {file})")
    if constants.HF_HUB_OFFLINE:
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
        digests = [f"{shard.name} {file_digest(shard)}\n" for shard in list_shards(file)]
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


@dataclass(frozen=True)
class Match:
    """The tensors of a file under a prefix, as the model's filter returned them, and how well they fit a model.

    Attributes:
        score: measures of the fit, the most important one first; larger is better
        missing: required tensors that the file lacks
    """

    prefix: str
    state: State
    score: tuple[int, ...]
    missing: tuple[str, ...]


def best_match(
    file: NamedTensors,
    own: State,
    required: Sequence[tuple[str, ...]],
    convert: Callable[[dict[str, Tensor]], State],
) -> tuple[Match, str]:
    """Find the tensors of a file that belong to a model.

    The chosen prefix, a container of the file or a part of the names, is the one under which most required
    tensors have the model's shapes. If no names fit directly, `convert`, which turns a publisher's names and
    shapes into the model's, is tried on each prefix.

    Args:
        file: the tensors of the file
        own: the model's state dict
        required: the tensors that the file must hold, each as a tuple of all its names
        convert: function that turns tensors into the model's names and shapes

    Returns:
        the match, and a note on its position in the file, empty if that is obvious

    Raises:
        AfterimageError: `convert` fails on everything in the file
    """
    prefixes = _by_names(file, own)
    found = [_match(file, prefix, own, required) for prefix in prefixes]
    if fits := [match for match in found if not match.missing]:
        best, note = _chosen(file, fits)
        return _match(file, best.prefix, own, required, convert), note
    refused: list[AfterimageError] = []
    for prefix in dict.fromkeys([*prefixes[:CANDIDATES], *_by_count(file, len(required))]):
        try:
            fits.append(_match(file, prefix, own, required, convert))
        except AfterimageError as error:
            refused.append(error)
    if not fits:
        raise refused[0]
    return _chosen(file, fits)


def most_similar_name(file: NamedTensors, missing: str) -> str:
    """Return the name, of a file's first 2,000, that is most similar to a missing one; empty if none is."""
    names = list(file.tensors)[:2000]
    ends = [name for name in names if name.endswith(f".{missing}")]
    return next(iter(ends or difflib.get_close_matches(missing, names, n=1, cutoff=0.75)), "")


def _by_names(file: NamedTensors, own: State) -> list[str]:
    """List the prefixes under which the model's names occur, the most frequent first."""
    counts = Counter(name.removesuffix(rest) for name in file.tensors for rest in _ends(name) if rest in own)
    return [prefix for prefix, _ in counts.most_common(4 * CANDIDATES)]


def _by_count(file: NamedTensors, required: int) -> list[str]:
    """List the prefixes with at least half as many tensors as the model needs, and the empty prefix."""
    counts = Counter(name.removesuffix(rest) for name in file.tensors for rest in _ends(name))
    enough = [prefix for prefix, count in counts.items() if 2 * count >= required]
    return sorted(dict.fromkeys(["", *enough]), key=lambda prefix: prefix.count("."))[:CANDIDATES]


def _ends(name: str) -> Iterator[str]:
    """Yield a name, then the same name with one more leading part removed each time."""
    while name:
        yield name
        name = name.partition(".")[2]


def _match(
    file: NamedTensors,
    prefix: str,
    own: State,
    required: Sequence[tuple[str, ...]],
    convert: Callable[[dict[str, Tensor]], State] | None = None,
) -> Match:
    """Score the tensors under a prefix: required ones of right shape, required ones, then all that fit."""
    container = _container(file, prefix)
    under = {name: name[len(prefix) :] for name in file.tensors if name.startswith(prefix)}
    # A tensor of another container belongs to this state dict only if the model has its name.
    names = {rest: name for name, rest in under.items() if rest in own or file.containers[name] == container}
    state: State = {rest: file.tensors[name] for rest, name in names.items()}
    foreign = sum(rest not in own for rest in names)
    if convert is not None:
        state = convert(dict(state))
    right = {key for key, value in state.items() if key in own and value.shape == own[key].shape}
    missing = tuple(names[0] for names in required if not state.keys() & set(names))
    score = (
        sum(not right.isdisjoint(names) for names in required),
        len(required) - len(missing),
        len(right),
        foreign <= MAX_FOREIGN_SHARE * len(names),
    )
    return Match(prefix, state, tuple(map(int, score)), missing)


def _container(file: NamedTensors, prefix: str) -> str:
    """Return the innermost container of the file that a prefix leads into."""
    inside = {container for container in file.containers.values() if prefix.startswith(container)}
    return max(inside, key=len, default="")


def _order(prefix: str) -> tuple[int, int]:
    """Return the rank of a prefix according to `PREFERENCE_NOTE`."""
    words = set(re.split(r"[._]", prefix.lower()))
    containers = prefix.split(".")
    first = min(
        (PREFERRED_CONTAINERS.index(word) for word in containers if word in PREFERRED_CONTAINERS),
        default=len(PREFERRED_CONTAINERS),
    )
    return (0 if words & AVERAGED else 2 if words & LAST_RESORT_WORDS else 1), first


def _chosen(file: NamedTensors, fits: list[Match]) -> tuple[Match, str]:
    """Choose the best match, by `PREFERENCE_NOTE` among those that fit equally well, and write the note."""
    top = max(match.score for match in fits)
    fits = [match for match in fits if match.score == top]
    indices = {name: index for index, name in enumerate(file.tensors)}
    begins = {m.prefix: min(i for n, i in indices.items() if n.startswith(m.prefix)) for m in fits}
    best, *others = sorted(fits, key=lambda match: (*_order(match.prefix), begins[match.prefix]))
    parts = []
    if best.prefix:
        container = _container(file, best.prefix)
        where = [f"in {container[:-1]!r}"] if container else []
        rest = best.prefix[len(container) :]
        taken = [f"without the beginning {rest!r} of their names"] if rest else []
        parts.append(f"the tensors {', '.join(where + taken)}")
    if others:
        also = " and ".join(repr(match.prefix.rstrip(".")) or "the file's own" for match in others[:4])
        parts.append(f"{also} would fit as well ({PREFERENCE_NOTE})")
    if file.unread:
        parts.append(f"not read: {', '.join(file.unread[:5])}{', ...' if len(file.unread) > 5 else ''}")
    return best, "; ".join(parts)
