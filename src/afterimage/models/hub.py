"""Download decoders from the Hugging Face hub, pinned and checked against their digests, and upload them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from afterimage.config import AfterimageError, first_line, join_names
from afterimage.runs.files import sha256
from afterimage.runs.repository import (
    CARD,
    CARD_KEY,
    DECODER,
    FILES,
    LIBRARY,
    MANIFEST,
    PREFIX,
    SCORES_TABLE,
    TABLE,
    Manifest,
    PublishedDecoder,
    check_shareable,
)
from afterimage.runs.run import Run
from afterimage.runtime.hub import Unavailable, call_with_timeout, download, explain_unavailable, find_cached

SPELLING = (
    "hub:USER/NAME, of a repository with several decoders hub:USER/NAME/DECODER, with @REVISION if need be"
)
_COMMIT = re.compile("[0-9a-f]{40}")


@dataclass(frozen=True)
class PulledRun(Run):
    """A decoder from the hub: a run folder in the hub's cache.

    Attributes:
        address: origin, with the revision as a commit: `hub:USER/NAME@COMMIT`
    """

    address: str

    @property
    def name(self) -> str:
        return self.address

    @property
    def origin(self) -> str:
        return self.address


def pull(address: str, *, revision: str | None = None) -> PulledRun:
    """Download a decoder, or find it in the hub's cache, and check the digests in its manifest and card.

    A branch or tag is looked up on the hub; a commit that is in the cache is not. With HF_HUB_OFFLINE only
    the cache is read. Nothing in a repository is unpickled or run.

    Args:
        address: `[hub:]USER/NAME[/DECODER][@REVISION]`
        revision: branch, tag or commit if the address names none; None for `main`

    Raises:
        AfterimageError: the repository is not available or holds no such decoder, or the decoder is not the
            one that its manifest and card describe
    """
    return _pull(address, revision, every=False)[0]


def pull_all(address: str) -> list[PulledRun]:
    """Download every decoder of a repository as `pull` does, or only the one that the address names.

    Args:
        address: `[hub:]USER/NAME[/DECODER][@REVISION]`

    Raises:
        AfterimageError: as for `pull`
    """
    return _pull(address, None, every=True)


def _pull(address: str, revision: str | None, *, every: bool) -> list[PulledRun]:
    repository, wanted, named = _parsed(address, "decoder", SPELLING)
    try:
        file = _fetch(repository, named or revision, MANIFEST)
        try:
            manifest = Manifest.parse(file.read_bytes())
        except AfterimageError as error:
            raise AfterimageError(f"{MANIFEST}: {error}") from None
        several = every and not wanted and len(manifest.decoders) > 1
        names = manifest.decoders if several else [wanted]
        return [_pull_decoder(repository, file.parent.name, manifest, name) for name in names]
    except Unavailable as reason:
        raise AfterimageError(f"cannot get {PREFIX}{repository}: {reason}") from None
    except AfterimageError as error:
        raise AfterimageError(f"{PREFIX}{repository} is refused: {error}") from None


def _pull_decoder(repository: str, commit: str, manifest: Manifest, name: str) -> PulledRun:
    """Download and check one decoder; an empty `name` means the only one."""
    decoder = manifest.get_decoder(name)
    _check_card(_fetch(repository, commit, CARD), decoder)
    for part in FILES:
        found = _fetch(repository, commit, decoder.file(part))
        if sha256(found) != decoder.sha256[part]:
            raise AfterimageError(
                f"its {decoder.file(part)} was swapped or changed: its SHA-256 is {sha256(found)}, not "
                f"{decoder.sha256[part]} as in {MANIFEST}"
            )
    run = PulledRun(found.parent, f"{PREFIX}{repository}{name and f'/{name}'}@{commit}")
    check_shareable(run.config)
    return run


def pull_table(address: str) -> tuple[Path, str]:
    """Download the table of a study that `afterimage push --dataset` shared, or find it in the hub's cache.

    Args:
        address: `hub:USER/NAME[@REVISION]`

    Returns:
        the Parquet file, and the address with the revision as a commit

    Raises:
        AfterimageError: the data set is not available or has no table
    """
    repository, _, named = _parsed(address, "data set", "hub:USER/NAME or hub:USER/NAME@REVISION")
    try:
        file = _fetch(repository, named, TABLE, "dataset")
    except Unavailable as reason:
        raise AfterimageError(f"cannot get the data set {PREFIX}{repository}: {reason}") from None
    return file, f"{PREFIX}{repository}@{file.parent.name}"


def _parsed(address: str, what: str, spelling: str) -> tuple[str, str, str | None]:
    """Split an address into repository, decoder (empty if not named) and revision (None if not named)."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    name, at, revision = address.removeprefix(PREFIX).partition("@")
    parts = name.split("/")
    try:
        if (
            len(parts) not in ((2, 3) if what == "decoder" else (2,))
            or not all(parts)
            or (at and not revision)
        ):
            raise HFValidationError
        validate_repo_id("/".join(parts[:2]))
    except HFValidationError:
        raise AfterimageError(f"{address!r:.200} is no {what} of the hub: write {spelling}") from None
    return "/".join(parts[:2]), "".join(parts[2:]), revision or None


def _fetch(repository: str, revision: str | None, name: str, kind: str = "model") -> Path:
    """Return a file at a revision, in the commit's folder; for a commit or offline, try the cache first."""
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE
    if (offline or _COMMIT.fullmatch(revision or "")) and (
        file := find_cached(repository, revision, [name], kind)
    ):
        return file
    if offline:
        raise Unavailable(
            f"the hub's cache {constants.HF_HUB_CACHE} has no {name} of it at {revision or 'main'}, and nothing is "
            "downloaded, as HF_HUB_OFFLINE is set"
        )
    return download(repository, revision, [name], kind)


def _check_card(file: Path, decoder: PublishedDecoder) -> None:
    """Check that a card describes this decoder."""
    from huggingface_hub import ModelCard

    try:
        data = ModelCard(file.read_text(encoding="utf-8")).data.to_dict()
    except Exception as error:  # the client's parsers of YAML and of results raise many types
        raise AfterimageError(f"its card {CARD} cannot be read: {first_line(error)}") from None
    if data.get("library_name") != LIBRARY:
        raise AfterimageError(
            f"its card {CARD} says library_name {data.get('library_name')!r:.80}, not {LIBRARY!r}"
        )
    if decoder.sha256[DECODER] not in (data.get(CARD_KEY) or ()):
        raise AfterimageError(
            f"its card {CARD} is about another decoder: {CARD_KEY} does not list {decoder.sha256[DECODER]}"
        )


def upload(files: Mapping[str, bytes], repository: str, *, private: bool = False, kind: str = "model") -> str:
    """Create a repository if it does not exist, and upload files to it as one commit.

    Args:
        files: contents by path
        repository: `USER/NAME`
        private: whether a new repository is private
        kind: `model`, `dataset` or `space`

    Returns:
        the commit

    Raises:
        AfterimageError: the hub does not answer or refuses, or the repository holds something else
    """
    from huggingface_hub import CommitOperationAdd, HfApi, constants

    api = HfApi()
    try:
        options = {"private": private or None, "space_sdk": "gradio" if kind == "space" else None}
        call_with_timeout(lambda: api.create_repo(repository, repo_type=kind, exist_ok=True, **options))
        _check_empty(set(api.list_repo_files(repository, repo_type=kind)), repository, kind)
        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        return api.create_commit(repository, operations, commit_message="From afterimage", repo_type=kind).oid
    except AfterimageError:
        raise
    except Exception as error:
        where = f"cannot push to {repository} at {constants.ENDPOINT}"
        raise AfterimageError(f"{where}: {_explain_error(error)}") from None


def add_to_collection(title: str, repository: str, kinds: Sequence[str], *, private: bool = False) -> str:
    """Add repositories of one name to a collection of their owner, which is created if it does not exist.

    Args:
        title: title of the collection
        repository: `USER/NAME`
        kinds: kinds of the repositories: `model`, `dataset` or `space`
        private: whether a new collection is private

    Returns:
        the collection's address

    Raises:
        AfterimageError: the hub does not answer or refuses
    """
    from huggingface_hub import HfApi, constants

    api, owner = HfApi(), repository.partition("/")[0]
    try:
        found = api.create_collection(title, namespace=owner, private=private, exists_ok=True)
        for kind in kinds:
            api.add_collection_item(found.slug, repository, kind, exists_ok=True)
    except Exception as error:
        where = f"cannot put {repository} into the collection {title!r:.200} at {constants.ENDPOINT}"
        raise AfterimageError(f"{where}: {_explain_error(error)}") from None
    return found.url


def _check_empty(names: set[str], repository: str, kind: str) -> None:
    """Check that a repository is empty or came from this package, so that no other files are overwritten."""
    try:
        if kind == "dataset" and {SCORES_TABLE, TABLE} <= names:
            return
        if kind == "space" and any(re.fullmatch(rf"{LIBRARY}-.*\.whl", name) for name in names):
            return
        made_with_it = {".gitattributes", "LICENSE", *([CARD] if kind == "space" else [])}
        if kind == "model" and MANIFEST in names:
            Manifest.parse(download(repository, None, [MANIFEST]).read_bytes())
        elif others := sorted(names - made_with_it):
            missing = {"model": MANIFEST, "dataset": TABLE, "space": f"wheel of {LIBRARY}"}[kind]
            raise AfterimageError(f"it has {join_names(others)}, and no {missing}")
    except (AfterimageError, Unavailable) as error:
        raise AfterimageError(
            f"{repository} holds files other than those that {LIBRARY} pushes ({error}): name another repository"
        ) from None


def _explain_error(error: Exception) -> str:
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    response = getattr(error, "response", None)
    if response is None:
        return " ".join(str(error).split())  # the hub's objections to a card span several lines
    status = int(response.status_code)
    if status in (401, 403):
        have = "your token may not write there" if get_token() else "you are not logged in"
        return f"{have} ({status}): log in with `hf auth login`, or set HF_TOKEN, with a token that may write"
    return explain_unavailable(status, response.headers.get) or f"{status}, {first_line(error)}"
