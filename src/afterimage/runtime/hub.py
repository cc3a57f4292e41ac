"""Requests to the Hugging Face hub without retries and with a short time limit, and explanations of its refusals."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from typing import Any

from afterimage.config import first_line

CONNECT_SECONDS = 5.0
"""Seconds without an answer after which the hub counts as unreachable."""


def ask_for_file(url: str) -> None:
    """Ask the hub once whether it has a file.

    The client itself would retry for minutes without a network or while the hub is busy.

    Raises:
        OSError: nothing answers
        Exception: the hub refuses; any error of its client
    """
    from huggingface_hub import get_hf_file_metadata

    ask_soon(lambda: get_hf_file_metadata(url, timeout=CONNECT_SECONDS))


def ask_soon(ask: Callable[[], Any]) -> None:
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


def refusal(repository: str, revision: str | None, error: BaseException, kind: str = "") -> str:
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
    if wait := busy(status, response.headers.get):
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


def busy(status: int, header: Callable[[str, str], str]) -> str:
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
