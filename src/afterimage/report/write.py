"""Files of a report: report.md, the table in three formats, the figures, the findings and the page."""

from __future__ import annotations

import html
import json
import os
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from afterimage.config import RANDOM_WEIGHTS, AfterimageError, format_count
from afterimage.report.format import (
    markdown,
    markdown_block,
    markdown_code,
    markdown_finding,
    markdown_grid,
    single_line,
)
from afterimage.report.page.page import write_page
from afterimage.report.reading import read_rows
from afterimage.report.rows import Row, Rows, flatten
from afterimage.report.tables import csv_table, latex_table, markdown_table
from afterimage.runs.files import read_json, remove_temporary_files, write_atomic
from afterimage.runs.run import Run
from afterimage.runtime.terminal import Progress, no_progress

if TYPE_CHECKING:
    from afterimage.report.figures import Drawing


BOUND_FIGURES = ("kept", "kept-by-depth")
"""Names of the figures with the measured bound, before everything else."""
ON_PAGE = ("kept-by-depth", "training-curves", "distributions", "controls", "lost-by", "rate")
"""Beginnings of the names of figures that the page embeds; it draws the others itself."""
STALE_SECONDS = 3600.0
"""Age in seconds from which a half-written file is a killed process's; others may be in use."""
TITLE = "How much of an image is left in the features?"


def write_report(
    runs: Iterable[Run], out: str | Path, *, title: str = TITLE,
    spread: str = "std", progress: Progress = no_progress,
) -> dict[str, Path]:  # fmt: skip
    """Write the report of these runs.

    report.md and index.html contain all of it; table.md, .csv and .tex, figures/ and findings.json are parts.
    Where the findings, a figure or the page cannot be made, report.md says why.

    Args:
        runs: the runs
        out: folder of the report
        title: title of the report
        spread: what follows means in the tables, `std` or `interval`
        progress: called with the progress

    Returns:
        the files written, by their path below `out`; without index.html where it could not be made

    Raises:
        AfterimageError: no run is finished, or a file cannot be written
    """
    from afterimage.report.bounds import bounds_of
    from afterimage.report.controls import control_findings
    from afterimage.report.findings import compute_findings, markdown_findings
    from afterimage.report.inversion import bound_findings

    rows, out, written = read_rows(runs), Path(out), {}
    remove_temporary_files(out, min_age=STALE_SECONDS)

    def write(name: str, content: str | bytes) -> Path:
        written[name] = out / name
        write_atomic(written[name], content)
        return written[name]

    write("table.md", markdown_table(rows, spread=spread))
    write("table.csv", csv_table(rows))
    write("table.tex", latex_table(rows, spread=spread))
    # The statistics compare decoders, not inversions.
    found = bounds_of(rows)
    study = compute_findings([row for row in rows.all if row.kind != "inversion"], found)
    write("findings.json", study.json)
    bounds = bound_findings(found)
    more = [*([study.published] if study.published else []), *control_findings(rows.decoders)]
    progress("statistics", 1, 1)
    problems: list[str] = []
    drawn = list(_draw(rows, write, progress, problems))
    front, rest = ([d for d in drawn if (d.name in BOUND_FIGURES) == is_front] for is_front in (True, False))
    on_page = [[d for d in group if d.name.startswith(ON_PAGE)] for group in (front, rest)]
    try:
        written["index.html"] = write_page(
            rows, out / "index.html", title=title, bounds=bounds,
            bound_figures=[(d.caption, out / f"figures/{d.name}.png") for d in on_page[0]],
            findings=[*study.findings, *more], lead=study.lead, problems=[*study.problems, *problems],
            figures=[(d.title, out / f"figures/{d.name}.png") for d in on_page[1]], progress=progress,
        )  # fmt: skip
    except AfterimageError as error:
        problems.append(f"The page index.html could not be written: {error}")
        (out / "index.html").unlink(missing_ok=True)  # an earlier report's page must not pass for this one's
    parts = [
        f"# {markdown(title)}", _sentence(rows), *_warning_blocks(rows, problems),
        *(["Also as [a page](index.html) with every image and chart."] if "index.html" in written else []),
        *(block for finding in bounds for block in markdown_finding(finding, "##")), *map(_figure, front),
        "## Results",
        markdown_table(rows, spread=spread).rstrip(),
        "Also as [CSV](table.csv) and [LaTeX](table.tex).",
        "## Findings", *markdown_findings(study),
        *(["All numbers as [JSON](findings.json)."] if study.findings else []),
        *(block for finding in more for block in markdown_finding(finding, "##")),
        "## Figures", *map(_figure, rest),
        *_unfinished(rows), "## Weights", *_weights(rows), "## How each row was made", *_origins(rows, out),
    ]  # fmt: skip
    write("report.md", "\n\n".join(parts) + "\n")
    return written


def _draw(
    rows: Rows, write: Callable[[str, bytes], Path], progress: Progress, problems: list[str]
) -> Iterable[Drawing]:
    """Draw and write the figures; yield what remains of each: all but the drawing itself, which is large."""
    from afterimage.report.figures import DRAWING_ERRORS, draw, render

    for drawing in draw(rows, progress, problems):
        try:
            png, svg = render(drawing.figure)
        except DRAWING_ERRORS as error:
            problems.append(f"The figure {drawing.name} could not be drawn: {error}")
            continue
        write(f"figures/{drawing.name}.png", png)
        write(f"figures/{drawing.name}.svg", svg)
        yield replace(drawing, figure=None)


def _sentence(rows: Rows) -> str:
    models = {model for row in rows.decoders for model in row.models}
    sources = {source for row in rows.decoders for source in row.sources}
    decoders = {row.decoder for row in rows.decoders}
    images = {markdown(r.data.test or r.data.source) for r in rows.all}
    parts = []
    if rows.decoders:
        layers = f"{format_count(len(sources), 'layer')} of {format_count(len(models), 'frozen encoder')}"
        runs = format_count(len(rows.decoders), "run")
        parts.append(f"{runs} on {layers} with {format_count(len(decoders), 'decoder')}")
    if rows.baselines:
        parts.append(format_count(len(rows.baselines), "baseline"))
    return (
        "A decoder rebuilds images from the features of a frozen vision encoder; what comes back, measured "
        f"on images that it was not trained on, tells what the features kept. {', '.join(parts)}. "
        f"Test images: {', '.join(sorted(images))}."
    )


def _warning_blocks(rows: Rows, problems: Sequence[str]) -> Iterable[str]:
    """Yield a block of warnings to show before the first number, if there are any."""
    loud = [*rows.warnings, *problems]
    if rows.unfinished:
        loud.append(f"{format_count(len(rows.unfinished), 'run')} not finished: see below.")
    if loud:
        yield "\n>\n".join(["> [!WARNING]", *(f"> **{markdown(warning)}**" for warning in loud)])


def _figure(drawing: Drawing) -> str:
    title, file = markdown(drawing.title), f"figures/{drawing.name}"
    shown = f"![{title}]({file}.png)\n\n{markdown(drawing.caption)} ([SVG]({file}.svg))"
    if drawing.folded:
        return (
            f"<details><summary>{html.escape(single_line(drawing.title))}</summary>\n\n{shown}\n\n</details>"
        )
    return f"### {title}\n\n{shown}"


def _unfinished(rows: Rows) -> Iterable[str]:
    if rows.unfinished:
        yield "## Not finished"
        told = ((markdown_code(u.run.name), markdown(u.state), markdown(u.error)) for u in rows.unfinished)
        yield markdown_grid(("run", "state", "error"), told)


def _weights(rows: Rows) -> Iterable[str]:
    lines = []
    for weights in (w for row in rows.decoders for w in row.weights):
        where = markdown_code(weights.location)
        if weights.is_random:
            what = f"{RANDOM_WEIGHTS[weights.label]}, a control, not a pretrained network"
            text = f"**{weights.label.upper()}**, {where}: {what}"
        else:
            proof = f", SHA-256 {markdown_code(weights.sha256[:12])}…" if weights.sha256 else ""
            text = f"{markdown(weights.label)}, from {markdown(weights.origin)} {where}{proof}"
        lines.append(f"- {markdown_code(weights.model)}: {text}")
    yield "\n".join(dict.fromkeys(lines)) or "No encoder was used: these are baselines."


def _origins(rows: Rows, out: Path) -> Iterable[str]:
    """Yield the settings that all rows share, the environments, and each row's configuration and command."""
    settings = [flatten(row.settings) for row in rows.decoders or rows.baselines]
    keys = sorted(set().union(*settings))
    shared = [k for k in keys if all(k in each and each[k] == settings[0][k] for each in settings)]
    if shared:
        yield f"Settings that all {'decoder' if rows.decoders else 'baseline'} rows share:"
        text = "\n".join(f"{key} = {json.dumps(settings[0][key], default=str)}" for key in shared)
        yield markdown_block(text, "toml")
    facts = [_facts(row.run) for row in rows.with_inversions]
    yield f"Made with {_environments(facts)}."
    made = zip(rows.with_inversions, facts, strict=True)
    lines = ((markdown(_label(row)), _link(row.run, out), _command(each)) for row, each in made)
    yield markdown_grid(("row", "configuration", "command"), lines)


def _label(row: Row) -> str:
    tail = [row.variant, f"seed {row.seed}" if row.kind == "decoder" and row.seed is not None else ""]
    return ", ".join([row.label, *filter(None, tail)]) + (f" ({row.control})" if row.is_random else "")


def _link(run: Run, out: Path) -> str:
    file = run.file("config.toml")
    if not file.exists():
        return markdown_code(run.name)
    return f"[{markdown(run.name)}]({quote(os.fsencode(os.path.relpath(file, out)))})"


def _facts(run: Run) -> Mapping[str, Any]:
    """Return the run's environment.json; empty where it is missing or damaged, which the report says."""
    try:
        facts = read_json(run.file("environment.json"))
    except AfterimageError:
        return {}
    return facts if isinstance(facts, dict) else {}


def _environments(runs: Iterable[Mapping[str, Any]]) -> str:
    """Write versions and machines, each value once."""
    known = []
    for facts in runs:
        versions = facts.get("versions")
        known.append({**(versions if isinstance(versions, dict) else {}), **facts})
    parts, unknown = [], known
    for name in ("afterimage", "torch", "timm", "python", "platform", "commit", "device", "threads"):
        if values := dict.fromkeys(str(each[name]) for each in known if each.get(name)):
            parts.append(f"{name} {' or '.join(values)}")
            unknown = [each for each in unknown if not each.get(name)]
    told = [markdown(", ".join(parts))] if parts else []
    return "; or with ".join(told + ["an environment that was not recorded"] * bool(unknown))


def _command(facts: Mapping[str, Any]) -> str:
    command = facts.get("command")
    text = shlex.join(map(str, command)) if isinstance(command, list) else single_line(command or "")
    return markdown_code(text) if text else "not recorded"
