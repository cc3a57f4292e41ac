"""Chains of defences, and the text that names them, such as `noise:0.5+int8`."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import nn

from afterimage.analysis.audit.defences.parts import (
    PCA,
    DefenceStep,
    Drop,
    Map,
    Noise,
    OneBit,
    Pool,
    Quantise,
    Shuffle,
    TopK,
    TransmissionCost,
)
from afterimage.config import AfterimageError, FeatureSpec, unknown_choice_error

DEFENCES: dict[str, type[DefenceStep]] = {
    "noise": Noise, "int": Quantise, "1bit": OneBit, "topk": TopK, "pca": PCA, "drop": Drop, "pool": Pool,
    "shuffle": Shuffle,
}  # fmt: skip
"""Parts of defences by name; `int` is written with its bits, as in `int8`."""


class Defence(nn.Module):
    """A chain of parts for one feature map.

    Attributes:
        name: text from which it was built
        spec: shape of the features
        sent_spec: shape of the features that are sent
        plain_bytes: size in bytes of one image's features as float32
        sent_bytes: size in bytes of the features sent for one image, without entropy coding
        parts: the parts, from left to right
    """

    def __init__(self, name: str, spec: FeatureSpec, parts: Sequence[DefenceStep]) -> None:
        super().__init__()
        self.name, self.spec, self.parts = name, spec, nn.ModuleList(parts)
        self.register_buffer("fitted", torch.tensor(not any(part.requires_fit for part in parts)))
        self.sent_spec = parts[-1].output_spec if parts else spec
        plain = cost = TransmissionCost(spec.values)
        for part in parts:
            cost = part.transmission_cost(cost)
        self.plain_bytes, self.sent_bytes = plain.bytes, cost.bytes

    @property
    def preserves_positions(self) -> bool:
        """True if sent features stay at their locations in the map."""
        return all(part.preserves_positions for part in self.parts)

    def reseed(self, seed: int) -> None:
        """Draw noise and random orders from generators with a fixed seed from now on.

        Only for experiments, since anyone with the seed can undo the defence.
        """
        for i, part in enumerate(self.parts):
            part.generator = torch.Generator().manual_seed(seed + i)

    @torch.no_grad()
    def fit(self, maps: Map) -> Defence:
        """Fit each part on maps `(N, C, h, w)` after the parts before it, and return the defence."""
        for part in self.parts:
            part.measure_statistics(maps)
            maps = part.encode(maps)
        self.fitted.fill_(True)
        return self

    def encode(self, maps: Map, *, random: bool = True) -> Map:
        """Return the features to send; raise an `AfterimageError` if the defence has to be fitted and was not.

        Args:
            maps: the features `(B, C, h, w)`
            random: whether to apply random parts: noise and shuffling
        """
        if not self.fitted:
            raise AfterimageError(f"the defence {self.name} has to be fitted on features before it can run")
        for part in self.parts:
            if random or not part.is_random:
                maps = part.encode(maps)
        return maps

    def decode(self, sent: Map) -> Map:
        """Return maps of the original shape, for the rest of the network."""
        for part in reversed(self.parts):
            sent = part.decode(sent)
        return sent

    def forward(self, maps: Map) -> Map:
        """Return the maps that the rest of the network receives under this defence."""
        return self.decode(self.encode(maps))


def create_defence(
    text: str, spec: FeatureSpec, *, seed: int = 0, image_size: tuple[int, int] | None = None
) -> Defence:
    """Build a defence from a text such as `noise:0.5+int8`, or `none`. The parts run from left to right.

    Args:
        text: the parts, joined by `+`
        spec: shape of the features
        seed: seed of the channels that `drop` keeps
        image_size: `(height, width)` of the images in pixels; needed to place the map that `pool` sends if
            its size does not divide that of the features

    Raises:
        AfterimageError: a part is unknown or its argument is out of range; the message lists what is valid
    """
    parts: list[DefenceStep] = []
    for word in [] if text.strip() == "none" else text.split("+"):
        parts.append(_part(word.strip(), parts[-1].output_spec if parts else spec, seed, image_size))
    return Defence(text, spec, parts)


def _part(word: str, spec: FeatureSpec, seed: int, image_size: tuple[int, int] | None) -> DefenceStep:
    if match := re.fullmatch(r"int(\d+)", word):
        return Quantise(spec, int(match[1]))
    name, colon, argument = word.partition(":")
    if name not in DEFENCES or name == "int":
        raise unknown_choice_error("defence", word, ["none", *(cls.usage for cls in DEFENCES.values())])
    cls = DEFENCES[name]
    if bool(colon) != (":" in cls.usage):
        raise AfterimageError(f"the defence {word!r} is incomplete or too long; write {cls.usage}")
    if not colon:
        return cls(spec)
    try:
        value = int(argument) if re.fullmatch(r"\d+", argument) else float(argument)
    except ValueError:
        raise AfterimageError(f"the defence {word!r} needs a number; write {cls.usage}") from None
    context = {"seed": seed, "image_size": image_size}
    return cls(spec, value, **{name: context[name] for name in cls.context})
