"""One self-contained HTML page that shows a study: its pictures first, then charts, findings and the table.

The page opens from disk and asks the network for nothing: scripts, styles and pictures are inlined, and its
content security policy allows those scripts alone, so that no name out of a run folder can become code.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from afterimage.config import AfterimageError, read_text
from afterimage.progress import Progress, silent
from afterimage.report.album import Album, data_uri, embed, gather
from afterimage.report.entries import best_scores, describe_rows, grouped, main_net, picture_ids
from afterimage.report.layout import DIGITS, NONE, duration
from afterimage.report.read import read_rows
from afterimage.report.rows import METRICS, Row, Rows
from afterimage.runs import Run, write_atomic

PAGE_BYTES = 58_000_000
TEMPLATES = Path(__file__).with_name("templates")
STYLES = ("base.css", "viewer.css", "results.css")
SCRIPTS = (
    "dom.js", "data.js", "images.js", "strip.js", "walk.js", "weights.js", "panes.js", "zoom.js", "table.js", "plot.js",
    "depth.js", "scatter.js", "main.js",
)  # fmt: skip
IMAGES = {".png": "image/png", ".svg": "image/svg+xml", ".jpg": "image/jpeg", ".webp": "image/webp"}


def write_page(
    runs: Sequence[Run],
    out: str | Path,
    *,
    title: str,
    findings: Sequence[Mapping[str, Any]] = (),
    lead: str = "",
    problems: Sequence[str] = (),
    figures: Sequence[Path | tuple[str, Path]] = (),
    limit: int = PAGE_BYTES,
    progress: Progress = silent,
) -> Path:
    """Write the page of these runs to the file `out` and return its path.

    `findings` hold `title`, `verdict`, `rule`, `paragraphs` and `tables` (each with `title`, `header` and
    `rows` of text); `lead` goes before them, and `problems` say what could not be computed. `figures` are
    image files, with or without a caption before them. The page stays below `limit` bytes: pictures are
    re-encoded, then left out, and the page says so. Raises `AfterimageError` where no run is finished, a
    picture cannot be read, or the limit is too small for the page without pictures.
    """
    rows = read_rows(runs)
    shown = [_figure(figure) for figure in figures]
    pictures = gather(rows.all)
    entries = describe_rows(rows, pictures)
    context = {"title": title, "findings": findings, "lead": lead, "problems": problems, "figures": shown}
    # Rendered once without pictures, to learn how much room is left for them.
    room = limit - len(_render(rows, entries, Album(total=len(pictures)), **context).encode())
    if room < 0:
        raise AfterimageError(
            f"{out}: tables, charts and figures alone take more than the limit of {limit:,} bytes"
        )
    album = embed(pictures, room, progress)
    write_atomic(out, _render(rows, entries, album, **context))
    return Path(out)


def _render(
    rows: Rows, entries: Sequence[Mapping[str, Any]], album: Album, *, title: str, **context: Any
) -> str:
    theme, style = _text("theme.js"), "\n".join(map(_text, STYLES))
    script = "\n".join(["(() => {", '"use strict";', *map(_text, SCRIPTS), "})();"])
    data = {
        "runs": entries,
        "pictures": album.pictures,
        "ids": picture_ids(rows),
        "net": main_net(rows),
    }
    return _page_template().render(
        title=title,
        theme=theme,
        style=style,
        script=script,
        script_hashes=[_hash(theme), _hash(script)],
        style_hash=_hash(style),
        rows=list(zip(rows.all, entries, strict=True)),
        unfinished=rows.unfinished,
        warnings=rows.warnings,
        notes=grouped(
            (note, entry["name"]) for row, entry in zip(rows.all, entries, strict=True) for note in row.notes
        ),
        lpips_missing=grouped((row.lpips_reason, row.label) for row in rows.all if not row.scores["lpips"]),
        nets=rows.nets,
        best=best_scores(rows),
        metrics=[(metric, DIGITS[metric]) for metric in METRICS],
        data=data,
        album=album,
        config_text=_config_text,
        duration=duration,
        dash=NONE,
        **context,
    )


def page_environment(templates: Path) -> Environment:
    """Templates of a folder, escaping everything they show; an undefined name is an error."""
    return Environment(
        loader=FileSystemLoader(templates),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _page_template() -> Template:
    environment = page_environment(TEMPLATES)
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    return environment.get_template("page.html")


def _config_text(row: Row) -> str:
    path = row.run.file("config.toml")
    return read_text(path) if path.exists() else "This run folder holds no config.toml."


def _figure(figure: Path | tuple[str, Path]) -> dict[str, str]:
    caption, path = figure if isinstance(figure, tuple) else (Path(figure).stem.replace("_", " "), figure)
    kind = IMAGES.get(Path(path).suffix.lower())
    if kind is None:
        raise AfterimageError(f"the page cannot show the figure {path}; it shows {', '.join(IMAGES)}")
    try:
        return {"caption": caption, "uri": data_uri(Path(path).read_bytes(), kind)}
    except OSError as error:
        raise AfterimageError(f"cannot read the figure {path}: {error.strerror}") from None


def _text(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
