"""A repository of decoders, as it lies on the Hugging Face hub: a run folder each, a manifest and a model card."""

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
    listed,
    split_provider,
    split_source,
    unknown,
)
from afterimage.runs.results import CONFIG, SCORES, SUMMARY

LIBRARY = "afterimage"
"""`library_name` of a repository's card and manifest."""
MANIFEST, CARD, IMAGE_GRID = "config.json", "README.md", "picture.png"
"""Files of a repository beside those of its decoders. The hub counts downloads by the first."""
DECODER = "decoder.safetensors"
FILES = (CONFIG, SUMMARY, SCORES, DECODER)
"""Files of each decoder: a run folder, as much of it as is needed to use it and to look at its scores."""
SCORES_TABLE, TABLE = "scores.parquet", "table.parquet"
"""Files of a data set: a row an image and run, and a row a run, the columns of a report's table.csv."""
CARD_KEY = "decoder_sha256"
"""Key of the card's metadata that lists the digest of every decoder it is about."""
FORMAT = 1


@dataclass(frozen=True)
class PublishedDecoder:
    """One decoder of a repository.

    Attributes:
        folder: where its files are; empty for the repository's own folder
        sources: layers that it decodes, `model:layer`
        encoders: what tells each encoder's weights apart, by model: a SHA-256, or which random draw they are
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
            raise AfterimageError(f"folder {self.folder!r:.200} is no name of a folder")
        if missing := [name for name in FILES if name not in self.sha256]:
            raise AfterimageError(f"sha256 has nothing of {listed(missing)}")

    def file(self, name: str) -> str:
        """The path of one of `FILES` in the repository."""
        return f"{self.folder}/{name}" if self.folder else name


@dataclass(frozen=True)
class Manifest:
    """What a repository holds; its config.json."""

    library_name: str
    format: int
    afterimage_version: str
    decoders: Mapping[str, PublishedDecoder]

    def __post_init__(self) -> None:
        if self.library_name != LIBRARY:
            raise AfterimageError(f"library_name is {self.library_name!r:.80}, not {LIBRARY!r}")
        if self.format != FORMAT:
            raise AfterimageError(f"format is {self.format}; this version reads {FORMAT}")
        if not self.decoders:
            raise AfterimageError("it names no decoder")

    @classmethod
    def parse(cls, content: bytes) -> Manifest:
        """Read a manifest.

        Raises:
            AfterimageError: it is none of this library and version
        """
        try:
            values = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise AfterimageError(f"it is not valid JSON: {error}") from None
        if not isinstance(values, dict):
            raise AfterimageError("it is no table of settings")
        if values.get("library_name") != LIBRARY:
            raise AfterimageError(f"its library_name is {values.get('library_name')!r:.80}, not {LIBRARY!r}")
        return from_dict(cls, values)

    def choose(self, name: str) -> PublishedDecoder:
        """Return a decoder by its name, or the only one where there is no name.

        Raises:
            AfterimageError: there is none of that name, or no name and several decoders
        """
        if name and name not in self.decoders:
            raise unknown("decoder", name, self.decoders)
        if not name and len(self.decoders) > 1:
            raise AfterimageError(
                f"it holds {len(self.decoders)} decoders; name one of them behind the repository, "
                f"USER/NAME/DECODER: {listed(list(self.decoders), 40)}"
            )
        return self.decoders[name or next(iter(self.decoders))]


def check_shareable(config: RunConfig) -> None:
    """Check that a stranger can use a run without files or code of ours, and we theirs without running any.

    Raises:
        AfterimageError: an encoder or the decoder is code or a folder of one's own, or the weights are a file
    """
    models = [split_source(source)[0] for source in config.sources]
    for model in [*models, *([config.decoder.name] if "/" in config.decoder.name else [])]:
        provider, rest = split_provider(model)
        if provider == "python" or Path(rest).is_absolute():
            what = "code" if provider == "python" else "a folder"
            raise AfterimageError(
                f"{model} is {what} of one's own, which no repository of the hub brings along"
            )
    if config.weights not in ("pretrained", *RANDOM_WEIGHTS):
        raise AfterimageError(f"its weights are {config.weights!r:.200}, which nobody else has")
