"""Files of the Hugging Face hub and torch.hub: find them in local caches, download them, or explain the failure.

Nothing is retried, and a server that does not answer is given up within seconds.
"""

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

from afterimage.config import AfterimageError, first_line, join_names, printable_path

CONNECT_SECONDS = 5.0
"""Seconds without an answer after which the hub counts as unreachable."""


def check_file_exists(url: str) -> None:
    """Ask the hub once whether it has a file.

    The client itself would retry for minutes without a network or while the hub is busy.

    Raises:
        OSError: nothing answers
        Exception: the hub refuses; any error of its client
    """
    from huggingface_hub import get_hf_file_metadata

    call_with_timeout(lambda: get_hf_file_metadata(url, timeout=CONNECT_SECONDS))


def call_with_timeout(ask: Callable[[], Any]) -> None:
    """Call `ask`, and raise OSError if it takes longer than about `CONNECT_SECONDS`.

    A dead name server would block a client for longer.
    """
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


def explain_refusal(repository: str, revision: str | None, error: BaseException, kind: str = "") -> str:
    """Return an explanation, from the status of the hub's answer, of why a file is refused and what the user can do.

    Args:
        repository: `OWNER/NAME`
        revision: the requested revision; None for `main`
        error: the client's exception
        kind: prefix of the repository's address: `datasets/`, or empty for models
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError

    response = getattr(error, "response", None)
    if response is None:
        return f"the hub at {constants.ENDPOINT} ({first_line(error)})"
    status, page = int(response.status_code), f"{constants.ENDPOINT}/{kind}{repository}"
    what, code = f"the hub's {repository}", response.headers.get("X-Error-Code", "")
    if wait := explain_unavailable(status, response.headers.get):
        return f"the hub at {constants.ENDPOINT} {wait}"
    if isinstance(error, RevisionNotFoundError):
        return f"{what} at {constants.ENDPOINT} has no revision {revision or 'main'} ({status})"
    has_token = get_token() is not None
    log_in = (
        "with the account of your token" if has_token else "and log in with `hf auth login`, or set HF_TOKEN"
    )
    if isinstance(error, GatedRepoError):
        return f"{what} is gated, and access was refused ({status}): accept its licence on {page} {log_in}"
    if status == 403 and not code:
        return (
            f"{what} was refused (403) without the hub's own reason, as a proxy or firewall does: ask who runs it; if "
            f"{repository} is gated, accept its licence on {page} {log_in}"
        )
    if status in (401, 403):
        unless = "your token may not read it" if has_token else "it is private or gated"
        return (
            f"{what} does not exist, or {unless} ({status}): check its name on {page}; where it is gated, accept its "
            f"licence there {log_in}"
        )
    if status in (404, 410):
        return f"{what} does not exist at {constants.ENDPOINT} ({status}); check its name on {page}"
    return f"the hub at {constants.ENDPOINT} refuses {repository} ({status}: {first_line(error)})"


def explain_unavailable(status: int, header: Callable[[str, str], str]) -> str:
    """Return an explanation of an answer by which a server says that it cannot respond for now; empty for others.

    `header` returns a header of the answer by its name, or the default in its second argument.
    """
    if status not in (408, 429) and status < 500:
        return ""
    seconds = header("Retry-After", "").strip()
    if not seconds and (limit := re.search(r"\bt=(\d+)", header("RateLimit", ""))):
        seconds = limit[1]
    when = f"in {seconds} s, as it asks" if seconds.isdigit() else f"after {seconds}" if seconds else "later"
    if status == 429:
        return f"is busy, with too many requests from here (429): try again {when}"
    return f"is not available for now ({status}): try again {when}"


STALL_SECONDS = 30.0
"""Seconds without data after which a download counts as failed."""
CONFIG = "config.json"
"""File that describes the network of a hub repository."""

INDEX = ".index.json"
"""Ending of an index of weights that are split into several files."""


class Unavailable(Exception):
    """Error for a file that is not available; the message names the place, the reason and the remedy."""


def find_cached(
    repository: str, revision: str | None, names: Sequence[str], kind: str = "model"
) -> Path | None:
    """Return the first of several files of a hub repository that is in the local cache, or None.

    Args:
        repository: `OWNER/NAME`
        revision: branch, tag or commit; None for `main`
        names: file names, the preferred one first
        kind: `model` or `dataset`
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_CACHE

    for name in names:
        file = try_to_load_from_cache(repository, name, HF_HUB_CACHE, revision, repo_type=kind)
        if isinstance(file, str) and _has_shards(Path(file)):
            return Path(file)
    return None


def _has_shards(file: Path) -> bool:
    """Return whether all files that an index of shards lists exist; always true for any other file."""
    try:
        return not file.name.endswith(INDEX) or bool(list_shards(file))
    except AfterimageError:
        return False


def list_shards(index: str | Path) -> list[Path]:
    """Return the files that an index of shards such as `model.safetensors.index.json` lists.

    Raises:
        AfterimageError: the index is not valid, or lists a file that is missing or in another folder
    """
    path = Path(index)
    try:
        files = json.loads(path.read_bytes())["weight_map"].values()
        names = sorted({str(name) for name in files})
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"it has no table weight_map ({first_line(error)})"
        raise AfterimageError(f"{printable_path(path)} is no index of shards: {reason}") from None
    found = [path.parent / name for name in names]
    if outside := [name for name in names if Path(name).name != name]:
        raise AfterimageError(f"{printable_path(path)} lists {outside[0]!r}, which is not beside it")
    if missing := [file.name for file in found if not file.is_file()]:
        raise AfterimageError(
            f"{printable_path(path)} lists {join_names(missing)}, which {printable_path(path.parent)} lacks"
        )
    return found


def download(repository: str, revision: str | None, names: Sequence[str], kind: str = "model") -> Path:
    """Download the first of several files that exists in a hub repository; for an index, also its shards.

    Args:
        repository: `OWNER/NAME`
        revision: branch, tag or commit; None for `main`
        names: file names, the preferred one first
        kind: `model` or `dataset`

    Raises:
        Unavailable: the hub does not answer, refuses, or has none of the files
    """
    from huggingface_hub import constants, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    told = functools.partial(
        explain_refusal, repository, revision, kind="datasets/" if kind == "dataset" else ""
    )
    for name in names:
        try:
            check_file_exists(hf_hub_url(repository, name, repo_type=kind, revision=revision))
            get = functools.partial(
                hf_hub_download, repository, repo_type=kind, revision=revision, etag_timeout=CONNECT_SECONDS
            )
            file = Path(get(name))
            if name.endswith(INDEX):
                for shard in sorted(set(json.loads(file.read_bytes())["weight_map"].values())):
                    get(shard)
            return file
        except LocalEntryNotFoundError as error:  # raised for any failure of the client
            raise Unavailable(told(error.__cause__ or error)) from None
        except EntryNotFoundError:
            continue
        except Exception as error:
            raise Unavailable(told(error)) from None
    raise Unavailable(f"the hub's {repository} at {constants.ENDPOINT} (it holds no {' or '.join(names)})")


def torch_hub_file(url: str) -> Path:
    """Return the path at which torch.hub caches the file of an address."""
    return Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]


def download_url(url: str) -> Path:
    """Download a file into torch.hub's cache, completely or not at all, and check the digest in its name.

    Raises:
        Unavailable: the download failed
    """
    from huggingface_hub.utils import get_session

    file = torch_hub_file(url)
    expected = re.search(r"-([0-9a-f]{8,})\.", file.name)
    before = socket.getdefaulttimeout()
    try:
        call_with_timeout(lambda: get_session().head(url, timeout=CONNECT_SECONDS))
        socket.setdefaulttimeout(STALL_SECONDS)
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(file), expected and expected[1])
    except urllib.error.HTTPError as error:
        raise Unavailable(
            f"{url} {explain_unavailable(error.code, error.headers.get) or f'({first_line(error)})'}"
        ) from None
    except Exception as error:
        raise Unavailable(f"{url} ({first_line(error)})") from None
    finally:
        socket.setdefaulttimeout(before)
    return file


def read_config(name: str, files: tuple[str, ...] = (CONFIG,)) -> dict[str, Any]:
    """Read the first existing one of several JSON files in a folder (an absolute path) or a hub repository.

    Args:
        name: the folder, or `OWNER/NAME[@REVISION]`, which is read from the local cache if it is there
        files: file names

    Raises:
        AfterimageError: no file is available, or it is not valid; the message says where it was searched
    """
    if not Path(name).is_absolute():
        return repository_config(name, files)
    found = next((Path(name) / file for file in files if (Path(name) / file).is_file()), None)
    if found is None:
        raise AfterimageError(
            f"cannot read the {files[0]} of {name}: the folder has no {' and no '.join(files)}"
        )
    return _settings(found, name, files)


@functools.cache
def repository_config(name: str, files: tuple[str, ...]) -> dict[str, Any]:
    """Read a JSON file of a hub repository for `read_config`."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError

    repository, _, revision = name.partition("@")
    try:
        file = find_cached(repository, revision or None, files)
        if file is None and constants.HF_HUB_OFFLINE:
            where = f"the hub's cache {constants.HF_HUB_CACHE} has none"
            raise Unavailable(f"{where}, and nothing is downloaded, as HF_HUB_OFFLINE is set")
        return _settings(file or download(repository, revision or None, files), name, files)
    except Unavailable as reason:
        raise AfterimageError(
            f"cannot read the {files[0]} of {name}, a repository of the hub: {reason}"
        ) from None
    except HFValidationError:
        raise AfterimageError(f"{name!r} is no name of a repository: write OWNER/NAME") from None


def _settings(file: Path, name: str, files: Sequence[str]) -> dict[str, Any]:
    try:
        settings = json.loads(file.read_bytes())
        if not isinstance(settings, dict):
            raise ValueError("it is not a table of settings")
    except (OSError, ValueError) as error:
        raise AfterimageError(f"cannot read the {files[0]} of {name}: {first_line(error)}") from None
    return settings
