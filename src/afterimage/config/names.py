"""Names of models, their layers and their weights."""

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
    bare = {model: _bare(model) for model in dict.fromkeys(models)}
    count = Counter(bare.values())
    return {model: name if count[name] == 1 else model for model, name in bare.items()}


def _bare(model: str) -> str:
    provider, name = split_provider(model)
    if name.startswith("/"):
        return name.rstrip("/").rpartition("/")[2]
    return model if provider == "python" else model.partition(".")[0]
