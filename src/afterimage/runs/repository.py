"""Layout of a repository of decoders on the Hugging Face hub: a run folder each, a manifest and a model card."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from afterimage.config import (
    RANDOM_WEIGHTS,
    AfterimageError,
    RunConfig,
    from_dict,
    join_names,
    split_provider,
    unknown_choice_error,
)
from afterimage.runs.results import CONFIG, SCORES, SUMMARY

PREFIX = "hub:"
"""Optional prefix of an address on the hub, of a decoder or a data set, which distinguishes it from a folder."""
LIBRARY = "afterimage"
"""`library_name` of a repository's card and manifest."""
MANIFEST, CARD, IMAGE_GRID = "config.json", "README.md", "picture.png"
"""Files of a repository in addition to those of its decoders. The hub counts downloads by the first."""
DECODER = "decoder.safetensors"
FILES = (CONFIG, SUMMARY, SCORES, DECODER)
"""Files of each decoder: the part of its run folder that is needed to use it and to read its scores."""
SCORES_TABLE, TABLE = "scores.parquet", "table.parquet"
"""Files of a data set: one row for each image and run, and one row for each run, in the columns of table.csv."""
CARD_KEY = "decoder_sha256"
"""Key of the card's metadata that lists the digest of every decoder in the repository."""
FORMAT = 1


@dataclass(frozen=True)
class PublishedDecoder:
    """One decoder of a repository.

    Attributes:
        folder: folder of its files; empty for the repository's own folder
        sources: layers that it decodes, `model:layer` each
        encoders: identity of each encoder's weights, by model: a SHA-256, or the label and seed of a random control
        decoder: name of its family
        sha256: digest of each of `FILES`
    """

    folder: str
    sources: tuple[str, ...]
    encoders: Mapping[str, str]
    decoder: str
    sha256: Mapping[str, str]

    def __post_init__(self) -> None:
        if not re.fullmatch(r"([A-Za-z0-9_-][A-Za-z0-9_.-]*)?", self.folder):
            raise AfterimageError(f"folder {self.folder!r:.200} is not a valid folder name")
        if missing := [name for name in FILES if name not in self.sha256]:
            raise AfterimageError(f"sha256 lacks the digests of {join_names(missing)}")

    def file(self, name: str) -> str:
        """Return the path of one of `FILES` in the repository."""
        return f"{self.folder}/{name}" if self.folder else name


@dataclass(frozen=True)
class Manifest:
    """The contents of a repository, as its config.json lists them."""

    library_name: str
    format: int
    afterimage_version: str
    decoders: Mapping[str, PublishedDecoder]

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise AfterimageError(f"format is {self.format}; this version reads {FORMAT}")
        if not self.decoders:
            raise AfterimageError("it names no decoder")

    @classmethod
    def parse(cls, content: bytes) -> Manifest:
        """Read a manifest.

        Raises:
            AfterimageError: the content is not a manifest of this library and format
        """
        try:
            values = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise AfterimageError(f"it is not valid JSON: {error}") from None
        if not isinstance(values, dict):
            raise AfterimageError("it is not a table of settings")
        if values.get("library_name") != LIBRARY:
            raise AfterimageError(f"its library_name is {values.get('library_name')!r:.80}, not {LIBRARY!r}")
        return from_dict(cls, values)

    def get_decoder(self, name: str) -> PublishedDecoder:
        """Return a decoder by its name; an empty name stands for the only decoder.

        Raises:
            AfterimageError: there is no decoder of that name, or several decoders and no name
        """
        if name and name not in self.decoders:
            raise unknown_choice_error("decoder", name, self.decoders)
        if not name and len(self.decoders) > 1:
            raise AfterimageError(
                f"it holds {len(self.decoders)} decoders; append the name of one to the repository, "
                f"USER/NAME/DECODER: {join_names(list(self.decoders), 40)}"
            )
        return self.decoders[name or next(iter(self.decoders))]


def check_shareable(config: RunConfig) -> None:
    """Check that other people can use a run without its owner's files or code.

    Raises:
        AfterimageError: an encoder or the decoder is the owner's code or folder, or the weights are a file or folder
    """
    for model in [*config.models, *([config.decoder.name] if "/" in config.decoder.name else [])]:
        provider, rest = split_provider(model)
        if provider == "python" or Path(rest).is_absolute():
            what = "code" if provider == "python" else "a folder"
            raise AfterimageError(
                f"{model} is {what} that only you have, so nobody else could use the decoder"
            )
    if config.weights not in ("pretrained", *RANDOM_WEIGHTS):
        raise AfterimageError(f"its weights are {config.weights!r:.200}, which nobody else has")
