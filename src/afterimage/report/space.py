"""Files of a Hugging Face Space that serves a repository's decoders as a live page, and its wheel."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from afterimage.config import AfterimageError, split_provider
from afterimage.report.card import with_metadata
from afterimage.runs.repository import CARD, LIBRARY, PREFIX
from afterimage.runs.run import Run

APP, REQUIREMENTS = "app.py", "requirements.txt"
SDK = "gradio"
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest in a zip file; a fixed time makes wheels reproducible


@dataclass(frozen=True)
class Wheel:
    """A wheel of this package: its file's name and content."""

    name: str
    content: bytes

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()


def build_wheel() -> Wheel:
    """Pack the running package, however it is installed, into a wheel: a Space runs the code that made it.

    Raises:
        AfterimageError: the package is not installed, so that its requirements are unknown
    """
    try:
        installed = metadata.distribution(LIBRARY)
    except metadata.PackageNotFoundError:
        raise AfterimageError(
            f"no wheel can be made for the Space: {LIBRARY} runs from source files that are not installed; "
            "`pip install -e .` in their folder installs them"
        ) from None
    package = Path(__file__).parents[1]
    files = {
        path.relative_to(package.parent).as_posix(): path.read_bytes()
        for path in sorted(package.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }
    info = f"{LIBRARY}-{installed.version}.dist-info"
    for name in ("METADATA", "entry_points.txt", "licenses/LICENSE"):
        if text := installed.read_text(name):
            files[f"{info}/{name}"] = text.encode()
    files[f"{info}/WHEEL"] = (
        b"Wheel-Version: 1.0\nGenerator: afterimage\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    )
    lines = [f"{name},sha256={_digest(content)},{len(content)}\n" for name, content in files.items()]
    files[f"{info}/RECORD"] = "".join([*lines, f"{info}/RECORD,,\n"]).encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, content, zipfile.ZIP_DEFLATED)
    return Wheel(f"{LIBRARY}-{installed.version}-py3-none-any.whl", buffer.getvalue())


def _digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


def sdk_version() -> str:
    """Return the installed version of Gradio.

    Raises:
        AfterimageError: Gradio is not installed
    """
    try:
        return metadata.version(SDK)
    except metadata.PackageNotFoundError:
        raise AfterimageError(
            "a Space runs the version of Gradio that is installed here, and none is: pip install 'afterimage[app]'"
        ) from None


def space_files(
    runs: Sequence[Run], name: str, commit: str, wheel: Wheel, url: str, *, license: str
) -> dict[str, bytes]:
    """Build the files of a Space.

    Args:
        runs: decoders to show
        name: `USER/NAME` of their repository, and of the Space
        commit: commit of their repository
        wheel: wheel that the Space installs
        url: address from which it downloads the wheel
        license: the hub's identifier of the licence

    Returns:
        contents of the files, by path
    """
    from huggingface_hub import SpaceCardData

    title = name.rpartition("/")[2]
    data = SpaceCardData(
        title=title, sdk=SDK, sdk_version=sdk_version(), app_file=APP, license=license, models=[name], tags=[LIBRARY],
        python_version=f"{sys.version_info.major}.{sys.version_info.minor}",
    )  # fmt: skip
    address = f"{PREFIX}{name}@{commit}"
    card = [
        f"# {title}",
        "A live page: drop an image, and see what decoders make of its features.",
        f"It is `afterimage app {address}`, run by the afterimage that pushed it: `{REQUIREMENTS}` installs "
        f"`{wheel.name}`, which lies here.",
    ]
    # The hub connects to port 7860 from outside the Space's container.
    app = (
        "import os\n\nfrom afterimage.cli import main\n\n"
        f'port = os.environ.get("GRADIO_SERVER_PORT", "7860")\n'
        f'main(["app", {json.dumps(address)}, "--host", "0.0.0.0", "--port", port])\n'
    )
    requirement = f"{LIBRARY}[{','.join(_extras(runs))}] @ {url}#sha256={wheel.sha256}\n"
    return {
        CARD: with_metadata(data, card).encode(),
        APP: app.encode(),
        REQUIREMENTS: requirement.encode(),
    }


def _extras(runs: Sequence[Run]) -> list[str]:
    """Return the extras of this package that the live page and the models of these runs need."""
    models = [model for run in runs for model in run.config.models]
    decoders = [run.config.decoder.name for run in runs if "/" in run.config.decoder.name]
    libraries = {split_provider(model)[0] for model in (*models, *decoders)}
    known = metadata.metadata(LIBRARY).get_all("Provides-Extra") or []
    return ["app", *sorted(libraries.intersection(known))]
