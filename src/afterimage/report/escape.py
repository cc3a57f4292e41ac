"""Names, labels, notes and errors come from strangers: make them safe to set in a document."""

from __future__ import annotations

import re
import unicodedata

_MARKDOWN = {
    "&": "&amp;", "<": "&lt;", ">": "&gt;",
    **{c: "\\" + c for c in "\\`*_[]|#~$!"},
}  # fmt: skip
_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "_": r"\_",
    "%": r"\%",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "'": r"\textquotesingle{}", '"': r"\textquotedbl{}", "`": r"\textasciigrave{}",
    "±": r"$\pm$", "×": r"$\times$", "·": r"$\cdot$", "↑": r"$\uparrow$", "↓": r"$\downarrow$",
    "[": "{[}", "*": "{*}",  # after a line's end they would be taken for its options
    "–": "--", "—": "---", "…": r"\dots{}",
}  # fmt: skip
_CODE = re.compile(r"[\w.:/+ @=,()\-]+")


def plain(text: object, limit: int = 0) -> str:
    """One line without control characters; longer than `limit` (where given), it is cut in the middle."""
    spaced = " ".join(str(text).split())
    clean = "".join(c for c in spaced if unicodedata.category(c)[0] != "C")
    if limit and len(clean) > limit:
        tail = (limit - 1) // 2
        clean = f"{clean[: limit - 1 - tail]}…{clean[len(clean) - tail :]}"
    return clean


def markdown(text: object) -> str:
    """Text that shows as itself in GitHub's Markdown, inside a table too."""
    return "".join(_MARKDOWN.get(c, c) for c in plain(text))


def markdown_code(text: object) -> str:
    """A code span; escaped text instead where the name holds what a code span cannot."""
    clean = plain(text)
    return f"`{clean}`" if _CODE.fullmatch(clean) else markdown(clean)


def markdown_block(text: str, language: str = "text") -> str:
    """A fenced block whose fence is longer than any run of backticks in the text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    lines = ("".join(c for c in line if unicodedata.category(c)[0] != "C") for line in text.splitlines())
    return "\n".join([f"{fence}{language}", *lines, fence])


def latex(text: object) -> str:
    """Text that shows as itself in LaTeX (UTF-8 input, `textcomp` symbols)."""
    return "".join(_LATEX.get(c, c) for c in plain(text))


def spreadsheet(text: object) -> str:
    """A text cell that no spreadsheet takes for a formula."""
    clean = plain(text)
    return f"'{clean}" if clean[:1] in ("=", "+", "-", "@") else clean
