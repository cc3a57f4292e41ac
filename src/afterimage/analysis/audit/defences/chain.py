"""Chains of defences, and the text that names them, such as `noise:0.5+int8`."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from afterimage.analysis.audit.defences.base import Part, Wire
from afterimage.analysis.audit.defences.noise import Noise, Shuffle
from afterimage.analysis.audit.defences.quantise import OneBit, Quantise
from afterimage.analysis.audit.defences.reduce import PCA, Drop, Pool, TopK
from afterimage.config import AfterimageError, FeatureSpec, unknown

Maps = Sequence[Float[Tensor, "_ _ _ _"]]


DEFENCES: dict[str, type[Part]] = {
    "noise": Noise, "int": Quantise, "1bit": OneBit, "topk": TopK, "pca": PCA, "drop": Drop, "pool": Pool,
    "shuffle": Shuffle,
}  # fmt: skip
"""Parts of defences by name; `int` is written with its bits, as in `int8`."""


class Defence(nn.Module):
    """A chain of parts for each of several feature maps.

    Attributes:
        name: text from which it was built
        specs: shapes of the features
        sent_specs: shapes of the features that are sent
        plain_bytes: size in bytes of one image's features as float32
        sent_bytes: size in bytes of the features sent for one image, without entropy coding
        chains: parts for each map
    """

    def __init__(self, name: str, specs: Sequence[FeatureSpec], chains: Sequence[Sequence[Part]]) -> None:
        super().__init__()
        self.name, self.specs = name, tuple(specs)
        self.chains = nn.ModuleList(nn.ModuleList(chain) for chain in chains)
        self.sent_specs = tuple(
            chain[-1].sent if chain else spec for chain, spec in zip(chains, specs, strict=True)
        )
        wires = [Wire(spec.values) for spec in specs]
        self.plain_bytes = sum(wire.bytes for wire in wires)
        for i, chain in enumerate(chains):
            for part in chain:
                wires[i] = part.wire(wires[i])
        self.sent_bytes = sum(wire.bytes for wire in wires)

    @property
    def preserves_positions(self) -> bool:
        """True if sent features stay at their locations in the map."""
        return all(part.preserves_positions for chain in self.chains for part in chain)

    def reseed(self, seed: int) -> None:
        """Draw noise and random orders from generators with a fixed seed from now on.

        Only for experiments, since anyone with the seed can undo the defence.
        """
        for i, part in enumerate(part for chain in self.chains for part in chain):
            part.generator = torch.Generator().manual_seed(seed + i)

    @torch.no_grad()
    def fit(self, features: Maps) -> Defence:
        """Fit each part on maps `(N, C, h, w)` after the parts before it, and return the defence."""
        for chain, maps in zip(self.chains, features, strict=True):
            for part in chain:
                part.fit(maps)
                maps = part.encode(maps)
        return self

    def encode(self, features: Maps, *, random: bool = True) -> list[Tensor]:
        """Return the features to send; raise an `AfterimageError` if a part has not been fitted.

        Args:
            features: maps `(B, C, h, w)`
            random: whether to apply random parts: noise and shuffling
        """
        sent = []
        for chain, maps in zip(self.chains, features, strict=True):
            for part in chain:
                if not part.fitted:
                    raise AfterimageError(
                        f"the defence {self.name} has to be fitted on features before it can run"
                    )
                if random or not part.is_random:
                    maps = part.encode(maps)
            sent.append(maps)
        return sent

    def decode(self, sent: Maps) -> list[Tensor]:
        """Return maps of the original shapes, for the rest of the network."""
        restored = []
        for chain, maps in zip(self.chains, sent, strict=True):
            for part in reversed(chain):
                maps = part.decode(maps)
            restored.append(maps)
        return restored

    def forward(self, features: Maps) -> list[Tensor]:
        """Return the maps that the rest of the network receives under this defence."""
        return self.decode(self.encode(features))


def create_defence(
    text: str,
    specs: Sequence[FeatureSpec],
    *,
    seed: int = 0,
    image_size: tuple[int, int] | None = None,
) -> Defence:
    """Build a defence from a text such as `noise:0.5+int8`, or `none`. The parts run from left to right.

    Args:
        text: the parts, joined by `+`
        specs: shapes of the features
        seed: seed of the channels that `drop` keeps
        image_size: `(height, width)` of the images in pixels; needed to place the map that `pool` sends if
            its size does not divide that of the features

    Raises:
        AfterimageError: a part is unknown or its argument is out of range; the message lists what is valid
    """
    return Defence(text, specs, [_chain(text, spec, seed, image_size) for spec in specs])


def _chain(text: str, spec: FeatureSpec, seed: int, image_size: tuple[int, int] | None) -> list[Part]:
    chain: list[Part] = []
    for word in [] if text.strip() == "none" else text.split("+"):
        part = _part(word.strip(), chain[-1].sent if chain else spec, seed, image_size)
        chain.append(part)
    return chain


def _part(word: str, spec: FeatureSpec, seed: int, image_size: tuple[int, int] | None) -> Part:
    if match := re.fullmatch(r"int(\d+)", word):
        return Quantise(spec, int(match[1]))
    name, colon, argument = word.partition(":")
    if name not in DEFENCES or name == "int":
        raise unknown("defence", word, ["none", *(cls.usage for cls in DEFENCES.values())])
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
