"""Files of the Hugging Face hub and of torch.hub: from the local caches, else downloaded, else why not."""

from __future__ import annotations

import functools
import json
import re
import socket
import threading
import urllib.error
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from afterimage.config import AfterimageError
from afterimage.models.weight_files import first_line

CONNECT_SECONDS = 5.0
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
            _ask(hf_hub_url(repository, name, revision=revision))
            return Path(hf_hub_download(repository, name, revision=revision, etag_timeout=CONNECT_SECONDS))
        except LocalEntryNotFoundError as error:  # the client's word for any failure, and no missing entry
            raise Unavailable(_refusal(repository, revision, error.__cause__ or error)) from None
        except EntryNotFoundError:
            continue
        except Exception as error:
            raise Unavailable(_refusal(repository, revision, error)) from None
    raise Unavailable(f"the hub's {repository} at {constants.ENDPOINT} (it holds no {' or '.join(names)})")


def _ask(url: str) -> None:
    """Ask for a file of the hub once. Raises what the client raises, or OSError where nothing answers.

    The client itself goes on asking for minutes where there is no network or the hub is busy.
    """
    from huggingface_hub import get_hf_file_metadata

    _soon(lambda: get_hf_file_metadata(url, timeout=CONNECT_SECONDS))


def _knock(url: str) -> None:
    """Raise OSError unless something answers at an address."""
    from huggingface_hub.utils import get_session

    _soon(lambda: get_session().head(url, timeout=CONNECT_SECONDS))


def _soon(ask: Callable[[], Any]) -> None:
    """Ask, and give up after CONNECT_SECONDS: a name server that never answers holds up any client for longer."""
    outcome: list[Exception | None] = []

    def run() -> None:
        try:
            ask()
            outcome.append(None)
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS + 1)
    if not outcome:
        raise OSError(f"no answer within {CONNECT_SECONDS:.0f} s")
    if outcome[0] is not None:
        raise outcome[0]


def _refusal(repository: str, revision: str | None, error: BaseException) -> str:
    """Why the hub does not give a file, and what can be done, by the status of its answer."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError

    response = getattr(error, "response", None)
    if response is None:
        return f"the hub at {constants.ENDPOINT} ({first_line(error)})"
    status, page = int(response.status_code), f"{constants.ENDPOINT}/{repository}"
    what, code = f"the hub's {repository}", response.headers.get("X-Error-Code", "")
    if busy := _busy(status, response.headers.get):
        return f"the hub at {constants.ENDPOINT} {busy}"
    if isinstance(error, RevisionNotFoundError):
        return f"{what} at {constants.ENDPOINT} has no revision {revision or 'main'} ({status})"
    told = get_token() is not None
    log_in = "with the account of your token" if told else "and log in with `hf auth login`, or set HF_TOKEN"
    if status == 403 and not code and not isinstance(error, GatedRepoError):
        return (
            f"{what} was refused (403) without the hub's own reason, as a proxy or firewall does: ask who runs it; if "
            f"the model is gated, accept its licence on {page} {log_in}"
        )
    if isinstance(error, GatedRepoError):
        return f"{what} is gated, and access was refused ({status}): accept its licence on {page} {log_in}"
    if status in (401, 403):
        unless = "your token may not read it" if told else "it is private or gated"
        return (
            f"{what} does not exist, or {unless} ({status}): check its name on {page}; where it is gated, accept its "
            f"licence there {log_in}"
        )
    if status in (404, 410):
        return f"{what} does not exist at {constants.ENDPOINT} ({status}); check its name on {page}"
    return f"the hub at {constants.ENDPOINT} refuses {repository} ({status}: {first_line(error)})"


def _busy(status: int, header: Callable[[str, str], str]) -> str:
    """What to say where a server could not answer for now; empty for any other answer. `header` finds one by name."""
    if status not in (408, 429) and status < 500:
        return ""
    seconds = header("Retry-After", "").strip()
    if not seconds and (limit := re.search(r"\bt=(\d+)", header("RateLimit", ""))):
        seconds = limit[1]
    when = f"in {seconds} s, as it asks" if seconds.isdigit() else f"after {seconds}" if seconds else "later"
    if status == 429:
        return f"is busy, with too many requests from here (429): try again {when}"
    return f"is not available for now ({status}): try again {when}"


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
            f"{url} {_busy(error.code, error.headers.get) or f'({first_line(error)})'}"
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
