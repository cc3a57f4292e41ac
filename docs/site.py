"""Hooks of mkdocs: README.md is the site's first page, CONTRIBUTING.md its last."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)(#[^)]*)?\)")


PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md"}
"""Pages that lie outside docs/, by their path in the repository."""


def on_files(files, config):
    """Add the pages from outside docs/."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=_moved(text, ROOT)))
    return files


def on_page_markdown(markdown, page, **_):
    """Make links to the pages from outside docs/ lead to where they are on the site."""
    return markdown if page.file.src_uri in PAGES.values() else _moved(markdown, ROOT / "docs")


def _moved(text, folder):
    def link(match):
        target = (folder / match[1]).resolve()
        source = target.relative_to(ROOT).as_posix() if target.is_relative_to(ROOT) else match[1]
        return f"]({PAGES.get(source, source.removeprefix('docs/'))}{match[2] or ''})"

    return LINK.sub(link, text)
