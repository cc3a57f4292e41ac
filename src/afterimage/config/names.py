"""How models, their layers and their weights are named."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable

from afterimage.config.errors import AfterimageError
from afterimage.config.paths import absolute_path, local_path

RANDOM_WEIGHTS = {
    "random": "an untrained network whose blocks act",
    "random-init": "an untrained network as its library initialises it, many residual branches closed or nearly so",
}
"""Names of the random controls, which `weights` may hold, and what each of them is."""
WEIGHTS = f"pretrained, {', '.join(RANDOM_WEIGHTS)} or a path"
"""The valid values of `weights`, for error messages."""


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
"""The optional prefix of `OWNER/NAME`, an encoder in a repository of the Hugging Face hub."""
PROVIDERS = ("timm", "torchvision", "transformers", "open_clip", "diffusers", "python")
"""The libraries that encoders come from, as the beginning of `PROVIDER/MODEL`; the first needs no naming."""


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
    """Split `provider/model` into its provider, timm where none is named, and what that provider calls the model.

    `timm/NAME` keeps its beginning: it is a repository of the hub too.
    """
    model = re.sub(HUB_PREFIX, "", model)
    provider, _, rest = model.partition("/")
    return (provider, rest) if provider in PROVIDERS[1:] else (PROVIDERS[0], model)


def absolute_model(model: str) -> str:
    """Return an encoder's name with the path in it made absolute: a file of python/, a folder of others."""
    provider, rest = split_provider(model)
    file, colon, factory = rest.rpartition(":")
    if provider == "python" and file.endswith(".py"):
        return f"python/{absolute_path(file)}{colon}{factory}"
    if provider in ("transformers", "diffusers") and os.path.isdir(local_path(rest)):
        return f"{provider}/{absolute_path(rest)}"
    return model


def short_names(models: Iterable[str]) -> dict[str, str]:
    """Return encoders' names without the weights' tag, those of files without the path, where that is unique."""
    bare = {model: _bare(model) for model in dict.fromkeys(models)}
    count = Counter(bare.values())
    return {model: name if count[name] == 1 else model for model, name in bare.items()}


def _bare(model: str) -> str:
    provider, name = split_provider(model)
    if name.startswith("/"):
        return name.rstrip("/").rpartition("/")[2]
    return model if provider == "python" else model.partition(".")[0]
