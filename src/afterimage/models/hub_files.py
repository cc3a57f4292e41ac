"""Files of the Hugging Face hub and of torch.hub: from the local caches, else downloaded, else why not."""

from __future__ import annotations

import functools
import json
import re
import socket
import urllib.error
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from afterimage.config import AfterimageError, first_line
from afterimage.runtime.hub import CONNECT_SECONDS, ask_for_file, ask_soon, busy, refusal

STALL_SECONDS = 30.0
CONFIG = "config.json"


class Unavailable(Exception):
    """A file cannot be had; the text says why and what to do, and names the place."""


def cached(repository: str, revision: str | None, names: Sequence[str]) -> Path | None:
    """The first of the files that the hub's client has downloaded before."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_CACHE

    for name in names:
        file = try_to_load_from_cache(repository, name, cache_dir=HF_HUB_CACHE, revision=revision)
        if isinstance(file, str):
            return Path(file)
    return None


def download(repository: str, revision: str | None, names: Sequence[str]) -> Path:
    """Download the first of the files that a repository of the hub holds. Raises `Unavailable`."""
    from huggingface_hub import constants, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    for name in names:
        try:
            ask_for_file(hf_hub_url(repository, name, revision=revision))
            return Path(hf_hub_download(repository, name, revision=revision, etag_timeout=CONNECT_SECONDS))
        except LocalEntryNotFoundError as error:  # the client's word for any failure, and no missing entry
            raise Unavailable(refusal(repository, revision, error.__cause__ or error)) from None
        except EntryNotFoundError:
            continue
        except Exception as error:
            raise Unavailable(refusal(repository, revision, error)) from None
    raise Unavailable(f"the hub's {repository} at {constants.ENDPOINT} (it holds no {' or '.join(names)})")


def _knock(url: str) -> None:
    """Raise OSError unless something answers at an address."""
    from huggingface_hub.utils import get_session

    ask_soon(lambda: get_session().head(url, timeout=CONNECT_SECONDS))


def torch_hub_file(url: str) -> Path:
    """Where torch.hub keeps what it has downloaded from an address."""
    return Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]


def download_url(url: str) -> Path:
    """Download whole or not at all, into torch.hub's cache; the digest in its file names is checked.

    Raises `Unavailable`.
    """
    file = torch_hub_file(url)
    expected = re.search(r"-([0-9a-f]{8,})\.", file.name)
    before = socket.getdefaulttimeout()
    try:
        _knock(url)
        socket.setdefaulttimeout(STALL_SECONDS)
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(file), expected and expected[1])
    except urllib.error.HTTPError as error:
        raise Unavailable(
            f"{url} {busy(error.code, error.headers.get) or f'({first_line(error)})'}"
        ) from None
    except Exception as error:
        raise Unavailable(f"{url} ({first_line(error)})") from None
    finally:
        socket.setdefaulttimeout(before)
    return file


@functools.cache
def repository_config(name: str) -> dict[str, Any]:
    """The config.json of a repository of the hub, `OWNER/NAME` or `OWNER/NAME@REVISION`.

    It is taken from the hub's cache where it is there. Raises AfterimageError that says where it was looked for.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError

    repository, _, revision = name.partition("@")
    try:
        file = cached(repository, revision or None, [CONFIG])
        if file is None and constants.HF_HUB_OFFLINE:
            where = f"the hub's cache {constants.HF_HUB_CACHE} has none"
            raise Unavailable(f"{where}, and nothing is downloaded, as HF_HUB_OFFLINE is set")
        file = file or download(repository, revision or None, [CONFIG])
        config = json.loads(file.read_bytes())
    except Unavailable as reason:
        raise AfterimageError(
            f"cannot read the {CONFIG} of {name}, a repository of the hub: {reason}"
        ) from None
    except (OSError, ValueError) as error:
        if isinstance(error, HFValidationError):
            raise AfterimageError(f"{name!r} is no name of a repository: write OWNER/NAME") from None
        raise AfterimageError(f"cannot read the {CONFIG} of {name}: {first_line(error)}") from None
    if not isinstance(config, dict):
        raise AfterimageError(f"cannot read the {CONFIG} of {name}: it is no table of settings")
    return config
