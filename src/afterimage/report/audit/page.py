"""Files of an audit's report: the verdict as one self-contained page for people who decide, and as JSON."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from afterimage.config.audit import LimitsConfig
from afterimage.report.audit.figures import privacy_utility
from afterimage.report.audit.verdict import (
    LEAKS,
    OPEN,
    SEVERITY,
    UTILITY,
    WITHIN,
    Verdict,
    attacker_text,
    interval_status,
    likeness,
    strongest,
)
from afterimage.report.figures import render, style
from afterimage.report.page.images import data_uri
from afterimage.report.page.page import page_environment
from afterimage.runs.audit import BLIND, DISTANCES, SIDE, Attack, Results
from afterimage.runs.files import read_image, write_atomic, write_json
from afterimage.runs.run import Run

TEMPLATES = Path(__file__).with_name("templates")
SHOWN = 3
MARKS = {WITHIN: "good", OPEN: "open", LEAKS: "bad"}
IMAGE = 168
"""Longer side of images on the page, in pixels."""


def write_audit(
    results: Results,
    verdict: Verdict,
    limits: LimitsConfig,
    root: str | Path,
    *,
    command: str = "",
) -> dict[str, Path]:
    """Write `audit.json`, the page `index.html` and the curve `privacy-utility.png` and `.svg`.

    Args:
        results: everything measured
        verdict: the verdict of `judge`
        limits: the limits of the verdict
        root: folder of the audit
        command: command line to show

    Returns:
        paths of the files by their names

    Raises:
        AfterimageError: a file cannot be written, or a kept image cannot be read
    """
    root = Path(root)
    written = {name: root / name for name in ("audit.json", "index.html")}
    with style():
        drawing = privacy_utility(verdict.options, limits, results.subject["name"])
    figure = {}
    if drawing is not None:
        for suffix, content in zip((".png", ".svg"), render(drawing.figure), strict=True):
            path = root / f"{drawing.name}{suffix}"
            write_atomic(path, content)
            written[path.name] = path
            figure = {"uri": data_uri(content, "image/svg+xml"), "caption": drawing.caption}
    costs = [{"layer": k[0], "defence": k[1], **cost} for k, cost in results.costs.items()]
    values = {
        "subject": results.subject,
        "limits": asdict(limits),
        "verdict": asdict(verdict),
        "rows": [asdict(row) for row in results.rows],
        "without_features": [asdict(row) for row in results.blind],
        "costs": costs,
        "notes": results.notes,
        "does_not_show": list(DOES_NOT_SHOW),
        "command": command,
    }
    write_json(written["audit.json"], values)
    environment = page_environment(TEMPLATES)
    environment.filters |= {"percent": _percent, "size": _size, "attacker": attacker_text}
    page = environment.get_template("page.html").render(
        **values,
        v=verdict,
        table=_table(results, limits),
        marks=MARKS,
        albums=_albums(results, root),
        figure=figure,
        distances=DISTANCES,
        side=SIDE,
        blind_name=BLIND,
        utility_names=UTILITY,
        within=WITHIN,
        has_limits=bool(limits),
    )
    write_atomic(written["index.html"], page)
    return written


DOES_NOT_SHOW = (
    "That no stronger attack exists. Every number says what these attackers got: more images, a larger decoder, a "
    "generative model or an idea nobody has had yet may get more. A pass is no proof of privacy.",
    "What leaks besides the image. A reconstruction that nobody recognises can still give away age, place, disease "
    "or identity: none of that was tested.",
    "What single people risk. Scores are means over the test images; the table names the one that came back best.",
    "Anything about other images. The test images stand for yours only as far as they resemble them.",
)


def _table(results: Results, limits: LimitsConfig) -> list[dict[str, Any]]:
    """Make one row for each attacker, with the costs of its layer and defence."""
    rows = []
    for row in results.rows:
        distance, found = strongest(row)
        cost = results.costs[row.layer, row.defence]
        status = [interval_status(interval, limits.max_ssim) for interval in likeness(row).values()]
        mark = max(status, key=SEVERITY.index)
        rows.append({**vars(row), "found": found, "distance": distance, "cost": cost, "mark": mark})
    return rows


def _albums(results: Results, root: Path) -> list[dict[str, Any]]:
    """Return for each layer the first test images and, by defence, the answers of best mean SSIM."""
    albums = []
    for layer in dict.fromkeys(row.layer for row in results.rows):
        best: dict[str, Attack] = {}
        for row in (row for row in results.rows if row.layer == layer):
            known = best.get(row.defence)
            if known is None or row.scores["ssim"].estimate > known.scores["ssim"].estimate:
                best[row.defence] = row
        stored = {defence: Run(root / row.folder).images[:SHOWN] for defence, row in best.items()}
        originals = next((images for images in stored.values() if images), [])
        columns = [{"name": "original", "images": _encoded(original for _, original, _ in originals)}]
        columns += [
            {"name": defence, "images": _encoded(path for _, _, path in images)}
            for defence, images in stored.items()
        ]
        albums.append({"layer": layer, "columns": columns})
    return albums


def _encoded(paths: Iterable[Path]) -> list[str]:
    uris = []
    for path in paths:
        image = read_image(path)
        image.thumbnail((IMAGE, IMAGE))
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "WEBP", quality=85)
        uris.append(data_uri(buffer.getvalue(), "image/webp"))
    return uris


def _percent(value: float) -> str:
    """Write `0.4 %` below ten, `31 %` above, with a space that does not break."""
    return (
        f"{100 * value:.1f}\N{NO-BREAK SPACE}%"
        if 0 < value < 0.1
        else f"{100 * value:.0f}\N{NO-BREAK SPACE}%"
    )


def _size(count: int) -> str:
    return f"{count / 1000:,.1f} kB" if count < 1_000_000 else f"{count / 1e6:,.2f} MB"
