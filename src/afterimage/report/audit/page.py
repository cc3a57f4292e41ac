"""Files of an audit's report: the verdict as one self-contained page, its privacy-utility curve, and JSON."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from afterimage.config.audit import LimitsConfig
from afterimage.evaluation.intervals import INTERVAL_NAME
from afterimage.report.audit.verdict import (
    INCONCLUSIVE,
    LEAKS,
    SEVERITY,
    SSIM_SEEN,
    UTILITY,
    WITHIN,
    Leak,
    Option,
    Verdict,
    attacker_text,
    highest_identification,
    interval_status,
    ssim_intervals,
)
from afterimage.report.figures.style import (
    MUTED,
    Drawing,
    drawable,
    encoder_styles,
    error_bars,
    grid_lines,
    legend,
    legend_entry,
    log_x,
    render,
    style,
)
from afterimage.report.page.images import data_uri
from afterimage.report.page.page import page_environment
from afterimage.report.rows import group_by
from afterimage.runs.audit import COMPARISON_SIDE, DISTANCES, NO_FEATURES_ATTACKER, AuditResults
from afterimage.runs.files import read_image, write_atomic, write_json
from afterimage.runs.results import Interval
from afterimage.runs.run import Run

TEMPLATES = Path(__file__).with_name("templates")
SHOWN = 3
MARKS = {WITHIN: "good", INCONCLUSIVE: "open", LEAKS: "bad"}
IMAGE_SIDE = 168
"""Longer side of images on the page, in pixels."""


def write_audit(
    results: AuditResults, verdict: Verdict, limits: LimitsConfig, root: str | Path, *, command: str = ""
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
    if drawing:
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
        "limitations": list(LIMITATIONS),
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
        side=COMPARISON_SIDE,
        blind_name=NO_FEATURES_ATTACKER,
        utility_names=UTILITY,
        within=WITHIN,
        has_limits=bool(limits),
    )
    write_atomic(written["index.html"], page)
    return written


LIMITATIONS = (
    "That no stronger attack exists. Every number says what these attackers got: more images, a larger decoder, a "
    "generative model or an idea nobody has had yet may get more. A pass is no proof of privacy.",
    "What leaks besides the image. A reconstruction that nobody recognises can still give away age, place, disease "
    "or identity: none of that was tested.",
    "The risk of individual persons. Scores are means over the test images; the table names the image that was "
    "reconstructed best.",
    "Anything about other images. The test images stand for yours only as far as they resemble them.",
)


def _table(results: AuditResults, limits: LimitsConfig) -> list[dict[str, Any]]:
    """Make one row for each attacker, with the costs of its layer and defence."""
    rows = []
    for row in results.rows:
        distance, found = highest_identification(row)
        cost = results.costs[row.layer, row.defence]
        status = [interval_status(interval, limits.max_ssim) for interval in ssim_intervals(row).values()]
        mark = max(status, key=SEVERITY.index)
        rows.append(vars(row) | {"found": found, "distance": distance, "cost": cost, "mark": mark})
    return rows


def _albums(results: AuditResults, root: Path) -> list[dict[str, Any]]:
    """Return for each layer the first test images and, by defence, the reconstructions of best mean SSIM."""
    albums = []
    for layer, rows in group_by(results.rows, lambda row: row.layer).items():
        columns = {"original": []}
        for defence, own in group_by(rows, lambda row: row.defence).items():
            best = max(own, key=lambda row: row.scores["ssim"].estimate)
            images = Run(root / best.folder).images[:SHOWN]
            columns["original"] = columns["original"] or _encoded(original for _, original, _ in images)
            columns[defence] = _encoded(path for *_, path in images)
        albums.append({"layer": layer, "columns": columns})
    return albums


def _encoded(paths: Iterable[Path]) -> list[str]:
    uris = []
    for path in paths:
        image = read_image(path)
        image.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "WEBP", quality=85)
        uris.append(data_uri(buffer.getvalue(), "image/webp"))
    return uris


def _percent(value: float) -> str:
    """Write `0.4 %` below ten, `31 %` above, with a space that does not break."""
    return f"{value:.{1 if 0 < value < 0.1 else 0}%}".replace("%", "\N{NO-BREAK SPACE}%")


def _size(count: int) -> str:
    return f"{count / 1000:,.1f} kB" if count < 1_000_000 else f"{count / 1e6:,.2f} MB"


PANEL = (3.4, 2.7)
MARKERS = "osD^vPX*<>h"
MEASURES = {"identification": "images identified", "ssim": "SSIM of the reconstruction"}


def privacy_utility(options: Sequence[Option], limits: LimitsConfig, subject: str) -> Drawing | None:
    """Draw a panel for each measure of leakage, with a point for each layer and defence; None without options.

    The x axis shows what the network keeps, or the bytes sent where that is known for no option.

    Args:
        options: layers behind defences
        limits: limits to draw as lines
        subject: name of the audited network
    """
    kinds = {option.cost["kind"] for option in options} - {None}
    shown = [option for option in options if not kinds or option.cost["kind"] is not None]
    if not shown:
        return None
    layers = encoder_styles(list(dict.fromkeys(option.layer for option in shown)))
    defences = dict.fromkeys(option.defence for option in shown)
    markers = dict(zip(defences, itertools.cycle(MARKERS), strict=False))
    height = PANEL[1] + 0.4 + 0.16 * (len(layers) + len(markers))
    figure = Figure((PANEL[0] * 2, height), layout="constrained")
    panels = figure.subplots(1, 2)
    across = " or ".join(UTILITY[kind] for kind in sorted(kinds)) or "bytes sent an image (log scale)"
    for axes, (measure, label) in zip(panels, MEASURES.items(), strict=True):
        for option in shown:
            color, marker = layers[option.layer].color, markers[option.defence]
            _point(axes, option, getattr(option, measure), color, marker)
        limit = limits.max_ssim if measure == "ssim" else limits.max_identification
        if limit is not None:
            axes.axhline(limit, color="#a5232f", lw=0.9, ls=(0, (4, 3)), zorder=0)
        if measure == "identification":
            axes.axhline(shown[0].chance, color=MUTED, lw=0.7, ls=":", zorder=0)
            axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set_ylim(-0.03, 1.03)
        axes.set_ylabel(f"{label} (less is safer)")
        axes.set_xlabel(across)
        if not kinds:
            log_x(axes, lambda value: f"{value / 1000:g} kB", most=6)
            axes.margins(x=0.1)
        grid_lines(axes)
    handles = [legend_entry(drawable(name, 30), color=style.color, lw=3) for name, style in layers.items()]
    handles += [
        legend_entry(drawable(name, 30), color=MUTED, marker=m, mfc="none", ls="none")
        for name, m in markers.items()
    ]
    legend(figure, handles, columns=4)
    caption = (
        f"{subject}: what the strongest attacker measured gets from each layer (colour) behind each defence (marker), "
        f"against {across}. Bars are {INTERVAL_NAME}s of means and exact ones of shares; the dotted line is chance"
        + (", the dashed line the limit." if limits else ".")
    )
    if seen := dict.fromkeys(option.layer for option in shown if option.ssim.by == SSIM_SEEN):
        caption += f" SSIM is that of the part that is seen for {', '.join(seen)}."
    if missing := dict.fromkeys(option.layer for option in options if option not in shown):
        caption += f" What the network keeps is not known for {', '.join(missing)}."
    return Drawing("privacy-utility", "Privacy and utility", caption, figure)


def _point(axes: Axes, option: Option, leak: Leak, color: str, marker: str) -> None:
    score = option.cost["score"]
    x, across = option.cost["bytes"], None
    if score is not None:
        x, across = score["estimate"], error_bars([Interval(**score)])
    found = Interval(leak.estimate, leak.low, leak.high, leak.count)
    axes.errorbar(
        [x], [leak.estimate], xerr=across, yerr=error_bars([found]),
        color=color, marker=marker, ms=5.5, mfc="none", mew=1.1, elinewidth=0.7, capsize=0,
    )  # fmt: skip
