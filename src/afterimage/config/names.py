"""Names of models, their layers and their weights; and paths, made absolute so that each folder has one name."""

from __future__ import annotations

import contextlib
import glob
import os
import re
import urllib.parse
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from afterimage.config.errors import AfterimageError, printable_path

RANDOM_WEIGHTS = {
    "random": "an untrained network whose blocks act",
    "random-init": "an untrained network as its library initialises it, many residual branches closed or nearly so",
}
"""Random controls by their names in `weights`, each with a description."""
WEIGHTS = f"pretrained, {', '.join(RANDOM_WEIGHTS)} or a path"
"""Valid values of `weights`, for error messages."""


def absolute_weights(weights: str) -> str:
    """Return `weights` with a path made absolute; keywords such as `pretrained`, and addresses, stay as they are."""
    if (
        not weights
        or weights in ("pretrained", *RANDOM_WEIGHTS)
        or re.match(r"(hf-hub|hf_hub|https?):", weights)
    ):
        return weights
    return absolute_path(weights)


HUB_PREFIX = re.compile(r"^hf[-_]hub:(?=[^:/]+/)", re.IGNORECASE)
"""Optional prefix of `OWNER/NAME`, an encoder in a repository of the Hugging Face hub."""
PROVIDERS = ("timm", "torchvision", "transformers", "open_clip", "diffusers", "python")
"""Libraries that provide encoders, as written in `PROVIDER/MODEL`; the first is the default."""


def split_source(source: str) -> tuple[str, str]:
    """Split `[provider/]model:layer` at its last colon; the prefix `hf-hub:` of a repository is removed.

    Raises:
        AfterimageError: the text has no model or no layer
    """
    model, colon, layer = re.sub(HUB_PREFIX, "", source).rpartition(":")
    if not (model and colon and layer):
        raise AfterimageError(
            f"{source!r} names no layer; write [provider/]model:layer, for example resnet34.tv_in1k:layer1 "
            f"(`afterimage layers {model or layer or 'MODEL'}` lists the layers); providers: {', '.join(PROVIDERS)}"
        )
    return model, layer


def split_provider(model: str) -> tuple[str, str]:
    """Split `[provider/]model` into the provider (timm by default) and that provider's name of the model.

    The prefix of `timm/NAME` is kept, because that is also a repository of the hub.
    """
    model = re.sub(HUB_PREFIX, "", model)
    provider, _, rest = model.partition("/")
    return (provider, rest) if provider in PROVIDERS[1:] else (PROVIDERS[0], model)


def absolute_model(model: str) -> str:
    """Return an encoder's name with its path, a file of python/ or a folder of other providers, made absolute."""
    provider, rest = split_provider(model)
    file, colon, factory = rest.rpartition(":")
    if provider == "python" and file.endswith(".py"):
        return f"python/{absolute_path(file)}{colon}{factory}"
    if provider in ("transformers", "diffusers") and os.path.isdir(local_path(rest)):
        return f"{provider}/{absolute_path(rest)}"
    return model


def short_names(models: Iterable[str]) -> dict[str, str]:
    """Return short names by model: without the weights' tag, and without the path of files, if that is unique."""
    bare = {model: _short_name(model) for model in dict.fromkeys(models)}
    count = Counter(bare.values())
    return {model: name if count[name] == 1 else model for model, name in bare.items()}


def _short_name(model: str) -> str:
    provider, name = split_provider(model)
    if name.startswith("/"):
        return name.rstrip("/").rpartition("/")[2]
    return model if provider == "python" else model.partition(".")[0]


def absolute_path(path: str) -> str:
    """Return a path that is valid from every working folder; `x`, `./x` and `x/` give the same one.

    Symbolic links keep their names, except that `..` is resolved as the operating system does. A path that is
    not UTF-8 becomes a `file://` address, which any text file can hold; `local_path` decodes it.
    """
    try:
        absolute = Path(local_path(path))
        absolute = absolute if absolute.is_absolute() else Path(_working_folder(), absolute)
        parts = absolute.parts
        if ".." in parts:
            end = len(parts) - parts[::-1].index("..")
            if not any(sign in part for part in parts[:end] for sign in "*?[{"):
                absolute = Path(os.path.realpath(Path(*parts[:end])), *parts[end:])
    except ValueError:
        return path  # a null byte: opening the file raises the error
    text = str(absolute)
    try:
        text.encode()
    except UnicodeEncodeError:
        return "file://" + urllib.parse.quote(os.fsencode(absolute))
    return text


def _working_folder() -> str:
    try:
        return os.getcwd()
    except OSError as error:
        raise AfterimageError(f"the working folder no longer exists: {error.strerror}") from None


def local_path(path: str) -> str:
    """Return a path of a configuration in the operating system's form: `file://` decoded, `~` expanded."""
    if path.startswith("file://"):
        return os.fsdecode(urllib.parse.unquote_to_bytes(path.removeprefix("file://")))
    return os.path.expanduser(path)


def absolute_source(source: str) -> str:
    """Return a source of images with its path or its pattern of shards made absolute.

    Sources without a path stay as they are.
    """
    kind, _, path = source.partition(":")
    if not path or kind not in ("folder", "div2k", "webdataset", "parquet", "pairs"):
        return source
    if kind in ("webdataset", "parquet"):
        return f"{kind}:{_absolute_pattern(path)}"
    return f"{kind}:{absolute_path(path)}"


def _absolute_pattern(pattern: str) -> str:
    """Make a pattern with braces and globs absolute; glob characters in the working folder's own name are escaped."""
    plain = local_path(pattern)
    if os.path.isabs(plain) or re.match(r"\{[^{}]*(?<![^{,])[/~]", plain):
        return absolute_path(pattern) if os.path.isabs(plain) else pattern
    here = _working_folder()
    if re.search(r"\{[^{}]*(,|\.\.)[^{}]*\}", here):
        raise AfterimageError(
            f"the working folder {printable_path(here)} has braces in its name, which a pattern of "
            "shards takes for its own; "
            "start from another folder"
        )
    return absolute_path(os.path.join(glob.escape(here), plain))


@contextlib.contextmanager
def utf8_path(path: str | Path) -> Iterator[str]:
    """Yield a UTF-8 path to a file, valid inside the block, for libraries that refuse other paths."""
    text = str(path)
    try:
        text.encode()
    except UnicodeEncodeError:
        with open(path, "rb") as file:
            yield f"/dev/fd/{file.fileno()}"
    else:
        yield text
