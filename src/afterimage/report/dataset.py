"""A study as a Hugging Face data set: a row for each run and image, the table of the runs, and a card."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from typing import Any

from afterimage.config import AfterimageError
from afterimage.report.card import with_metadata
from afterimage.report.format import markdown_code
from afterimage.report.publish import is_shareable, public_rows
from afterimage.report.reading import read_rows
from afterimage.report.rows import Row, Rows
from afterimage.report.tables import markdown_table, records
from afterimage.runs.files import read_image
from afterimage.runs.repository import CARD, LIBRARY, SCORES_TABLE, TABLE
from afterimage.runs.results import METRICS
from afterimage.runs.run import Run

IMAGES = ("original", "reconstruction")
"""Columns with PNG images; empty where an image may not be shared or the run kept none."""


def dataset_files(runs: Iterable[Run], name: str, *, license: str, own_images: bool) -> dict[str, bytes]:
    """Build the files of a data set.

    No file contains paths of this machine. Names of images that are not free are replaced by numbers.

    Args:
        runs: the runs; unfinished ones are left out
        name: `USER/NAME`
        license: the hub's identifier of the licence
        own_images: include images that are not free as well, with their names

    Returns:
        contents of the files, by path

    Raises:
        AfterimageError: no run is finished, a run folder is damaged, or pyarrow is missing
    """
    found = read_rows(runs)
    rows = public_rows(found, with_names=own_images)
    lines = [
        line
        for row, told in zip(found.with_inversions, rows.with_inversions, strict=True)
        for line in _lines(row, told, own_images)
    ]
    card = _card(rows, name, license, images=any(line[IMAGES[0]] for line in lines))
    return {SCORES_TABLE: _parquet(lines, IMAGES), TABLE: _parquet(records(rows)), CARD: card.encode()}


def _lines(row: Row, told: Row, own_images: bool) -> Iterable[dict[str, Any]]:
    """Yield a line for each test image of a run, with the images that it kept if they may be shared."""
    kept = {}
    if own_images or is_shareable(row.data):
        kept = {identity: pair for identity, *pair in row.run.images}
    for image, shown in zip(row.per_image, told.per_image, strict=True):
        line = {
            "run": row.run.name, "kind": row.kind, "features": row.features_text, "decoder": row.decoder,
            "weights": " + ".join(weights.identity for weights in row.weights), "seed": row.seed, "image": shown["id"],
            **{metric: shown[metric] for metric in METRICS}, "lpips_net": row.lpips.net,
        }  # fmt: skip
        pair = kept.get(image["id"], (None, None))
        for column, path in zip(IMAGES, pair, strict=True):
            line[column] = None
            if path:
                line[column] = {"bytes": path.read_bytes(), "path": None}  # the format of the hub's data sets
                read_image(path, line[column]["bytes"])
        yield line


def _parquet(lines: Sequence[dict[str, Any]], images: Sequence[str] = ()) -> bytes:
    """Write lines as a Parquet file whose metadata mark the image columns for the hub."""
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise AfterimageError(
            "a data set is Parquet and needs pyarrow: pip install 'afterimage[datasets]'"
        ) from None
    table = pyarrow.Table.from_pylist(list(lines))
    if images:
        # A column without any value becomes one of strings: the hub does not show columns of type null.
        image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
        types = {f.name: pyarrow.string() if f.type == pyarrow.null() else f.type for f in table.schema}
        types |= dict.fromkeys(images, image)
        table = pyarrow.Table.from_pylist(list(lines), pyarrow.schema(types.items()))
        names = {pyarrow.int64(): "int64", pyarrow.float64(): "float64"}
        features = {
            name: {"_type": "Image"} if name in images else
            {"dtype": names.get(kind, "string"), "_type": "Value"} for name, kind in types.items()
        }  # fmt: skip
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    buffer = io.BytesIO()
    parquet.write_table(table, buffer)
    return buffer.getvalue()


def _card(rows: Rows, name: str, license: str, *, images: bool) -> str:
    from huggingface_hub import DatasetCardData

    files = {"scores": SCORES_TABLE, "table": TABLE}
    data = DatasetCardData(
        license=license, pretty_name=name.rpartition("/")[2], tags=[LIBRARY, "feature-inversion"],
        configs=[
            {"config_name": config, "data_files": file, **({"default": True} if config == "scores" else {})}
            for config, file in files.items()
        ],
    )  # fmt: skip
    sources = dict.fromkeys(row.data.test or row.data.source for row in rows.with_inversions)
    held = "The images that runs keep are in it." if images else "No image is in it."
    parts = [
        f"# {name.rpartition('/')[2]}",
        "How much of an image is left in the features of frozen vision encoders, measured with afterimage: "
        f"`{SCORES_TABLE}` has a row for each run and test image, `{TABLE}` a row for each run, the columns of a "
        f"report's table.csv. Test images: {', '.join(map(markdown_code, sources))}. {held} A score is a lower bound: "
        "it says what a decoder could bring back, not what a layer lost.",
        "```python\nfrom datasets import load_dataset\n\n"
        f'scores = load_dataset("{name}", "scores", split="train")\n```',
        markdown_table(rows, spread="interval").rstrip(),
    ]
    return with_metadata(data, parts)
