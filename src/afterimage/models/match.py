"""Find a model's tensors in a file: those under the name prefix that best fits the model's own names."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from afterimage.config import AfterimageError
from afterimage.models.weight_files import NamedTensors

State = Mapping[str, Tensor]
AVERAGED = {"ema", "swa", "averaged"}
"""Words in a prefix that mark averaged weights, which are preferred."""
FIRST = ("state_dict", "model")
"""Containers that come next in preference, in this order."""
LAST = {"student", "momentum", "optimizer", "optim", "grad", "grads"}
"""Words in a prefix that mark tensors to be taken only as a last resort."""
RULE = (
    "of several that fit, averaged weights (ema) come first, then state_dict, then model, then the order of the file; "
    "student, momentum and optimizer come last"
)
"""The order of preference, for notes."""
CANDIDATES = 12
"""Number of prefixes that are tried with a model's filter, which may be slow."""
FOREIGN = 0.1
"""Largest share of names unknown to the model; above it, another network is the more likely owner of the
tensors."""


@dataclass(frozen=True)
class Match:
    """The tensors of a file under a prefix, and the quality of their fit to a model.

    Attributes:
        prefix: the prefix
        state: the tensors, as the model's filter returned them
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
        the match, and a note on its place in the file, empty if that is obvious

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


def nearest(file: NamedTensors, missing: str) -> str:
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
        foreign <= FOREIGN * len(names),
    )
    return Match(prefix, state, tuple(map(int, score)), missing)


def _container(file: NamedTensors, prefix: str) -> str:
    """Return the innermost container of the file that a prefix leads into."""
    inside = {container for container in file.containers.values() if prefix.startswith(container)}
    return max(inside, key=len, default="")


def _order(prefix: str) -> tuple[int, int]:
    """Return the rank of a prefix according to `RULE`."""
    words = set(re.split(r"[._]", prefix.lower()))
    containers = prefix.split(".")
    first = min((FIRST.index(word) for word in containers if word in FIRST), default=len(FIRST))
    return (0 if words & AVERAGED else 2 if words & LAST else 1), first


def _chosen(file: NamedTensors, fits: list[Match]) -> tuple[Match, str]:
    """Choose the best match, by `RULE` among those that fit equally well, and write the note."""
    top = max(match.score for match in fits)
    fits = [match for match in fits if match.score == top]
    places = {name: place for place, name in enumerate(file.tensors)}
    begins = {m.prefix: min(p for n, p in places.items() if n.startswith(m.prefix)) for m in fits}
    best, *others = sorted(fits, key=lambda match: (*_order(match.prefix), begins[match.prefix]))
    parts = []
    if best.prefix:
        container = _container(file, best.prefix)
        where = [f"in {container[:-1]!r}"] if container else []
        rest = best.prefix[len(container) :]
        taken = [f"without the beginning {rest!r} of their names"] if rest else []
        parts.append(f"the tensors {', '.join(where + taken)}")
    if file.wrappers:
        parts.append(f"{' and '.join(map(repr, file.wrappers))} taken out of their names")
    if others:
        also = " and ".join(repr(match.prefix.rstrip(".")) or "the file's own" for match in others[:4])
        parts.append(f"{also} would fit as well ({RULE})")
    if file.unread:
        parts.append(f"not read: {', '.join(file.unread[:5])}{', ...' if len(file.unread) > 5 else ''}")
    return best, "; ".join(parts)
