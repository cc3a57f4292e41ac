"""Files of a repository of decoders: run folders without private facts, manifest, image grid, model card."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np
from PIL import Image
from skimage.util import montage

from afterimage.config import AfterimageError, DataConfig, RunConfig, dump_toml, join_names, to_dict
from afterimage.report.card import model_card
from afterimage.report.reading import read_rows
from afterimage.report.rows import Rows
from afterimage.runs.files import read_image, sha256
from afterimage.runs.repository import (
    CARD,
    DECODER,
    FILES,
    FORMAT,
    IMAGE_GRID,
    LIBRARY,
    MANIFEST,
    Manifest,
    PublishedDecoder,
    check_shareable,
)
from afterimage.runs.results import CONFIG, DataFacts, Result, WeightsRecord, write_result
from afterimage.runs.run import Run, scan

R = TypeVar("R", bound=Result)

SHAREABLE_SOURCES = {
    "photographs": "photographs that scikit-image carries, in the public domain or free to pass on",
    "procedural": "images of dead leaves that afterimage draws",
}
"""Sources of images that anyone may share, and what they contain."""
SHOWN_IMAGES = 4
"""Number of images in a repository's image grid."""
_IMAGE_FILE = re.compile(r"\.(avif|bmp|gif|jfif|jpe?g|jp2|mpo|p[bgnp]m|png|tiff?|webp)\b", re.IGNORECASE)
_PATH = re.compile(r"(?<![\w.:/])(?:file:/|~)?/(?:[^\s,;:'\"()]+/)*([^\s,;:'\"()/]*)")


@dataclass(frozen=True)
class ImageGrid:
    """Images, uint8 `(H, W, 3)` each, and their reconstructions by several decoders, by the names of their runs.

    `what` describes the images in the caption.
    """

    what: str
    originals: Sequence[np.ndarray]
    reconstructions: Mapping[str, Sequence[np.ndarray]] = field(default_factory=dict)

    @property
    def png(self) -> bytes:
        """PNG file with a row of originals, and below it a row for each decoder."""
        rows = [self.originals, *self.reconstructions.values()]
        height, width = self.originals[0].shape[:2]
        images = [np.array(Image.fromarray(image).resize((width, height))) for row in rows for image in row]
        grid = (len(rows), len(self.originals))
        sheet = montage(images, (255,) * 3, grid_shape=grid, padding_width=6, channel_axis=-1)
        buffer = io.BytesIO()
        Image.fromarray(sheet[6:-6, 6:-6]).save(buffer, "PNG")
        return buffer.getvalue()


def kept_images(runs: Sequence[Run]) -> ImageGrid | None:
    """Return the first test images that all runs kept, with reconstructions; None if there are none."""
    kept = {run.name: {identity: pair for identity, *pair in run.images} for run in runs}
    first, *others = kept.values()
    ids = [i for i in first if all(i in images for images in others)][:SHOWN_IMAGES]
    if not ids:
        return None

    def pixels(path: Path) -> np.ndarray:
        return np.array(read_image(path).convert("RGB"))

    rebuilt = {name: [pixels(images[i][1]) for i in ids] for name, images in kept.items()}
    return ImageGrid("test images", [pixels(first[i][0]) for i in ids], rebuilt)


def is_shareable(data: DataConfig | DataFacts) -> bool:
    """Return True if anyone may share the test images."""
    return _is_free(data.test or data.source)


def _is_free(source: str) -> bool:
    return source.partition(":")[0] in SHAREABLE_SOURCES


def shareable_runs(runs: Sequence[Run]) -> list[Run]:
    """Return the finished runs among these that have a decoder to share.

    Raises:
        AfterimageError: there is none, or one cannot be used elsewhere; the message names it
    """
    found = [run for run in runs if run.has_result and run.result.kind == "decoder"]
    if not found:
        kinds = [f"{run.name} ({run.result.kind if run.has_result else run.state})" for run in runs]
        raise AfterimageError(f"none of these runs has a decoder to share: {join_names(kinds, 5)}")
    for run in found:
        try:
            check_shareable(_public_config(run))
        except AfterimageError as error:
            raise AfterimageError(f"{run.name} cannot be shared: {error}") from None
    return found


def repository_files(
    runs: Sequence[Run], beside: Sequence[Run], name: str, grid: ImageGrid, *, license: str, with_names: bool
) -> dict[str, bytes]:
    """Build the files of a repository.

    No file contains paths of this machine: a folder keeps its last name, weights keep their digest.

    Args:
        runs: runs with a decoder, see `shareable_runs`
        beside: other runs; baselines on the same test images and bounds of these decoders enter the card,
            as do those in the folders of `runs`
        name: `USER/NAME`
        grid: images to show; they must be free to share
        license: the hub's identifier of the decoders' licence
        with_names: keep the names of test images that are not free

    Returns:
        contents of the files, by path

    Raises:
        AfterimageError: a run folder is damaged
    """
    files: dict[str, bytes] = {}
    published: dict[str, PublishedDecoder] = {}
    for run in runs:
        result, folder = run.result, run.name if len(runs) > 1 else ""
        contents = _run_files(run, remove_private_facts([result], with_names=with_names)[0])
        encoders = {weights.model: weights.identity for weights in result.weights}
        digests = {part: hashlib.sha256(content).hexdigest() for part, content in contents.items()}
        published[run.name] = PublishedDecoder(folder, result.sources, encoders, result.decoder, digests)
        files |= {published[run.name].file(part): content for part, content in contents.items()}
    version = metadata.version("afterimage")
    manifest = Manifest(LIBRARY, FORMAT, version, published)
    files[MANIFEST] = (json.dumps(asdict(manifest), indent=2, ensure_ascii=False) + "\n").encode()
    files[IMAGE_GRID] = grid.png
    rows = _card_rows(runs, beside, with_names)
    card = model_card(rows, name, published, grid.what, license=license, version=version)
    files[CARD] = card.encode()
    return files


def _run_files(run: Run, result: Result) -> dict[str, bytes]:
    decoder = run.file(DECODER)
    if sha256(decoder) != result.training.decoder_sha256:
        raise AfterimageError(
            f"{decoder} is not the decoder that {run.name} was measured with; train it again"
        )
    with TemporaryDirectory() as folder:
        write_result(Path(folder), result)
        (Path(folder) / CONFIG).write_text(dump_toml(_public_settings(run)), encoding="utf-8")
        (Path(folder) / DECODER).write_bytes(decoder.read_bytes())
        return {part: (Path(folder) / part).read_bytes() for part in FILES}


def _public_settings(run: Run) -> dict[str, Any]:
    """Return a run's configuration without paths; a `RunConfig` would make them absolute again."""
    settings = to_dict(run.config)
    settings.pop("features", None)  # a store exists only here; users of the decoder have the encoder
    for key in ("source", "test"):
        settings["data"][key] = public_source(settings["data"][key])
    if not run.result.is_random:
        settings["weights"] = "pretrained"
    return settings


def _public_config(run: Run) -> RunConfig:
    known = all(weights.origin != "store" for weights in run.result.weights)
    return replace(run.config, weights="pretrained") if known and not run.result.is_random else run.config


def public_source(source: str) -> str:
    """Return a source of images without the path of its folder: `folder:/me/birds` becomes `folder:birds`."""
    kind, colon, path = source.partition(":")
    return f"{kind}{colon}{_last(path)}" if kind in ("folder", "div2k", "webdataset", "parquet") else source


def _last(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def remove_private_facts(results: Sequence[R], *, with_names: bool) -> list[R]:
    """Return results, or rows, without paths of this machine and without names of images that are not free.

    A number replaces each name, the same one in all results.

    Args:
        results: results or rows
        with_names: keep the names of images that are not free
    """
    private = [result for result in results if not (with_names or is_shareable(result.data))]
    ids = sorted({image["id"] for result in private for image in result.per_image})
    numbers = {identity: f"{i:05d}" for i, identity in enumerate(ids)}
    hidden = set(map(id, private))
    return [_public(result, numbers if id(result) in hidden else {}, with_names) for result in results]


def _public(result: R, numbers: Mapping[str, str], with_names: bool) -> R:
    data = result.data
    keep_notes = with_names or all(map(_is_free, filter(None, (data.source, data.test))))
    data = replace(data, source=public_source(data.source), test=public_source(data.test))
    notes = [note for note in result.notes if keep_notes or not _IMAGE_FILE.search(note)]
    if left := len(result.notes) - len(notes):
        notes.append(f"left out here: {left} notes that name images")
    lpips = result.lpips
    lpips = replace(
        lpips, weights=lpips.weights and _public_weights(lpips.weights),
        reason=lpips.reason and _PATH.sub(r"\1", lpips.reason),
    )  # fmt: skip
    images = tuple({**image, "id": numbers.get(image["id"], image["id"])} for image in result.per_image)
    return replace(
        result, data=data, notes=tuple(_PATH.sub(r"\1", note) for note in notes), lpips=lpips, per_image=images,
        weights=tuple(map(_public_weights, result.weights)),
    )  # fmt: skip


def _public_weights(weights: WeightsRecord) -> WeightsRecord:
    is_path = weights.location.startswith("/") or weights.origin in ("path", "folder")
    location = _last(weights.location) if is_path else weights.location
    return replace(weights, location=location, note=_PATH.sub(r"\1", weights.note))


def _card_rows(runs: Sequence[Run], beside: Sequence[Run], with_names: bool) -> Rows:
    """Return the rows of a card: decoders, baselines on the same test images, and the decoders' bounds."""
    names, tests = {run.name for run in runs}, {run.result.data.test_digest for run in runs}
    folders = dict.fromkeys(run.path.resolve().parent for run in runs)
    others = {run.path.resolve(): run for run in itertools.chain(beside, *map(scan, folders))}
    found = list(runs)
    for other in others.values():
        try:
            result = other.result if other.has_result else None
        except AfterimageError:
            continue  # a damaged run beside the shared ones does not concern them
        is_baseline = result and result.is_baseline and result.data.test_digest in tests
        if is_baseline or (result and result.inversion and result.inversion.start in names):
            found.append(other)
    return public_rows(read_rows(found), with_names=with_names)


def public_rows(rows: Rows, *, with_names: bool) -> Rows:
    """Apply `remove_private_facts` to rows and drop unfinished runs, whose errors may contain private names."""
    shown = dict(
        zip(
            map(id, rows.with_inversions),
            remove_private_facts(rows.with_inversions, with_names=with_names),
            strict=True,
        )
    )
    decoders, baselines, inversions = (
        tuple(shown[id(row)] for row in group) for group in (rows.decoders, rows.baselines, rows.inversions)
    )
    return replace(rows, decoders=decoders, baselines=baselines, inversions=inversions, unfinished=())
