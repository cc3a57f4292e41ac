"""Self-contained HTML page of a study: its images first, then charts, findings and the table.

The page opens from disk and makes no network requests: scripts, styles and images are inlined, and its
content security policy allows only those scripts, so that no name from a run folder can become code.
"""

from __future__ import annotations

import base64
import hashlib
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from afterimage.config import AfterimageError, printable_path, read_text, short_names
from afterimage.evaluation.intervals import INTERVAL_NAME
from afterimage.report.bounds import Bound, bounds_of, curve, main_bounds
from afterimage.report.format import MISSING, Finding
from afterimage.report.page.images import (
    QUALITY,
    EmbeddedImages,
    PageImage,
    collect_images,
    data_uri,
    embed,
    read_bytes,
)
from afterimage.report.rows import Row, Rows, group_by
from afterimage.report.tables import best_mean, duration, lpips_reason
from afterimage.runs.files import write_atomic
from afterimage.runs.results import METRICS
from afterimage.runtime.terminal import Progress, no_progress

PAGE_BYTES = 58_000_000
TEMPLATES = Path(__file__).with_name("templates")
STYLES = ("base.css", "viewer.css", "results.css")
SCRIPTS = (
    "dom.js", "data.js", "images.js", "strip.js", "walk.js", "weights.js", "panes.js", "zoom.js", "table.js", "plot.js",
    "depth.js", "scatter.js", "main.js",
)  # fmt: skip


def write_page(
    rows: Rows,
    out: str | Path,
    *,
    title: str,
    bounds: Sequence[Finding] = (),
    bound_figures: Sequence[tuple[str, Path]] = (),
    findings: Sequence[Finding] = (),
    lead: str = "",
    problems: Sequence[str] = (),
    figures: Sequence[tuple[str, Path]] = (),
    limit: int = PAGE_BYTES,
    progress: Progress = no_progress,
) -> Path:
    """Write the page of these rows.

    Args:
        rows: rows of the report
        out: file to write
        title: title of the page
        bounds: findings on measured bounds, shown first
        bound_figures: `(caption, PNG file)` pairs to show with the bounds
        findings: other findings
        lead: text before the findings
        problems: sentences on what could not be computed
        figures: `(caption, PNG file)` pairs
        limit: largest size of the page in bytes; images are re-encoded, then left out, and the page says so
        progress: called with the progress

    Returns:
        path of the page

    Raises:
        AfterimageError: an image cannot be read, or the limit is too small for the page without images
    """
    images = collect_images(rows.with_inversions)
    entries = describe_rows(rows, images)
    context = {
        "title": title, "lead": lead, "problems": problems, "bounds": bounds, "findings": findings,
        "figures": _embedded(figures), "bound_figures": _embedded(bound_figures), **_shared(rows, entries),
    }  # fmt: skip
    environment = page_environment(TEMPLATES)
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    template, ids, net = environment.get_template("page.html"), image_ids(rows), main_net(rows)

    def render(album: EmbeddedImages) -> str:
        data = {"runs": entries, "rows": len(rows.all), "images": album.images, "ids": ids, "net": net}
        return template.render(album=album, data=data, **context)

    # A first rendering, with the viewer around one image without content, shows how much room is left for images.
    viewer = EmbeddedImages(len(images), [{}] if images else [], quality=QUALITY)
    room = limit - len(render(viewer).encode())
    if room < 0:
        raise AfterimageError(
            f"{printable_path(out)}: tables, charts and figures alone take more than the limit of {limit:,} bytes"
        )
    write_atomic(out, render(embed(images, room, progress)))
    return Path(out)


def _embedded(figures: Iterable[tuple[str, Path]]) -> list[dict[str, str]]:
    return [{"caption": text, "uri": data_uri(read_bytes(path), "image/png")} for text, path in figures]


def _shared(rows: Rows, entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the template's values that depend on the rows alone, and those of every page."""
    theme, style = _text("theme.js"), "\n".join(map(_text, STYLES))
    script = "\n".join(["(() => {", '"use strict";', *map(_text, SCRIPTS), "})();"])
    named = zip(rows.with_inversions, entries, strict=True)
    notes = [(note, entry["name"]) for row, entry in named for note in row.notes]
    missing = [(lpips_reason(row), row.label) for row in rows.all if not row.scores["lpips"]]
    comparable = [metric for metric in METRICS if metric != "lpips" or len(rows.nets) < 2]
    return {
        "interval_name": INTERVAL_NAME,
        "theme": theme,
        "style": style,
        "script": script,
        "script_hashes": [_hash(theme), _hash(script)],
        "style_hash": _hash(style),
        "report": rows,
        "rows": list(zip(rows.all, entries, strict=False)),
        "every": list(zip(rows.with_inversions, entries, strict=True)),
        "answers": any(entry["answers"] for entry in entries),
        "notes": _by_text(notes),
        "lpips_missing": _by_text(missing),
        "best": {metric: best_mean(rows.decoders, metric) for metric in comparable},
        "metrics": [(name, metric.digits) for name, metric in METRICS.items()],
        "config_text": _config_text,
        "duration": duration,
        "lpips_reason": lpips_reason,
        "dash": MISSING,
    }


def _by_text(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, list[str]]]:
    """Return each text with the names of the rows that share it."""
    return [(text, [name for _, name in own]) for text, own in group_by(pairs, lambda p: p[0]).items()]


def page_environment(templates: Path) -> Environment:
    """Return an environment for a folder's templates; it escapes all values and rejects undefined names."""
    return Environment(
        loader=FileSystemLoader(templates),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _config_text(row: Row) -> str:
    path = row.run.file("config.toml")
    return read_text(path) if path.exists() else "This run folder holds no config.toml."


def _text(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def describe_rows(rows: Rows, images: Sequence[PageImage]) -> list[dict[str, Any]]:
    """Return an entry for each of `rows.with_inversions`, in that order. Numbers are None where they are unavailable.

    `series` and `decoder` place a row in a walk over layers; per-image scores follow `image_ids(rows)`; rows
    compare image by image only where their `testSet` agrees. For a decoder with a measured bound, `answers`
    holds the positions of the bound's entries, `estimate` and `refined`, and `missed` the means of decoder
    and bound over the bound's images, for each metric that both have.
    """
    ids = image_ids(rows)
    seeds = len({row.seed for row in rows.decoders}) > 1
    names = short_names([row.encoder for row in rows.with_inversions if row.sources])
    test_sets = _test_sets(rows.with_inversions, images)
    places = {row.run: place for place, row in enumerate(rows.with_inversions)}
    bounds = {bound.decoder.run: bound for bound in main_bounds(bounds_of(rows))}
    entries = []
    for row, test_set in zip(rows.with_inversions, test_sets, strict=True):
        bound = bounds.get(row.run)
        found = {"estimate": bound.estimate, "refined": bound.refined} if bound else {}
        weights = zip(row.sources, row.fusion_weights, strict=True) if row.fusion_weights else ()
        entries.append({
            **_names(row, names, seeds),
            **_numbers(row, bound, ids),
            "testSet": test_set,
            "fusion": [{"source": source, "weight": weight} for source, weight in weights],
            "answers": {kind: places[answer.run] for kind, answer in found.items() if answer},
            "missed": _missed(bound) if bound else {},
        })  # fmt: skip
    return entries


def _missed(bound: Bound) -> dict[str, dict[str, float]]:
    ends = {}
    for metric in METRICS:
        if gaps := bound.gap_to_decoder(metric):
            values = bound.decoder.values(metric)
            decoder = statistics.fmean(values[name] for name in gaps)
            found = decoder + statistics.fmean(gaps.values())
            ends[metric] = {"decoder": decoder, "bound": found, "images": len(gaps)}
    return ends


def _distances(row: Row, bound: Bound | None, ids: Sequence[str]) -> list[float | None]:
    """Return each image's feature distance from its original; a decoder's is that at a search's start."""
    values = row.values("feature_loss")
    if bound and bound.refined:
        values = {
            entry["id"]: entry["feature_loss"] for entry in curve(bound.refined.run) if entry["step"] == 0
        }
    return [None if (value := values.get(name)) is None else float(f"{value:.3g}") for name in ids]


def image_ids(rows: Rows) -> list[str]:
    """Return the ids of the test images of all rows, in the order of their first appearance."""
    return list(dict.fromkeys(image["id"] for row in rows.with_inversions for image in row.per_image))


def main_net(rows: Rows) -> str:
    """Return the LPIPS network that measured the most rows; empty where LPIPS is unavailable throughout."""
    nets = Counter(row.lpips.net for row in rows.all if row.scores["lpips"])
    return nets.most_common(1)[0][0] if nets else ""


def _names(row: Row, names: dict[str, str], seeds: bool) -> dict[str, Any]:
    if row.is_baseline:
        series, short = "Baselines", row.settings["baseline"].replace("-", " ")
        return {
            "name": row.label, "baseline": True, "random": "", "series": series, "encoder": series,
            "layer": row.label, "short": short, "decoder": "", "shape": "",
        }  # fmt: skip
    encoder = names[row.encoder]
    series = f"{encoder} ({row.weights_label} weights)" if row.is_random else encoder
    decoder = row.decoder_label + (f", seed {row.seed}" if seeds else "")
    return {
        "name": f"{series} · {row.layer} · {decoder}", "baseline": False, "random": row.control,
        "series": series, "encoder": encoder, "layer": row.layer, "short": row.layer, "decoder": decoder,
        "shape": " + ".join(row.shapes),
    }  # fmt: skip


def _numbers(row: Row, bound: Bound | None, ids: Sequence[str]) -> dict[str, Any]:
    values = {metric: row.values(metric) for metric in METRICS}
    per_image = {
        m: [None if (v := values[m].get(id)) is None else round(v, 4) for id in ids] for m in METRICS
    }
    return {
        "parameters": None if row.is_baseline else row.parameters,
        "seconds": None if row.is_baseline else row.train_seconds,
        "locations": None if row.is_baseline else row.locations,
        "net": row.lpips.net,
        "scores": {metric: _score(row, metric) for metric in METRICS},
        "perImage": per_image | {"distance": _distances(row, bound, ids)},
    }


def _score(row: Row, metric: str) -> dict[str, Any] | None:
    score = row.scores[metric]
    if score is None:
        return None
    # A folder from elsewhere may have a mean without scores by image: then there is no interval to draw.
    interval = row.intervals[metric]
    low, high = (interval.low, interval.high) if interval else (score.mean, score.mean)
    return {"mean": score.mean, "std": score.std, "count": score.count, "low": low, "high": high}


def _test_sets(rows: Sequence[Row], images: Sequence[PageImage]) -> list[str]:
    """Return a name of each row's test images, equal where rows were tested on the same or share a saved image."""
    names = [row.data.test_digest for row in rows]
    for image in images:  # the first images of a test set have a digest of their own
        same = {names[i] for i in image.reconstructions}
        names = [min(same) if name in same else name for name in names]
    return names
