"""Write what is generated: the tables between `<!-- table: FILE -->` and `<!-- end -->`, and docs/reference.md.

    python docs/update.py            # rewrite README.md and docs/*.md
    python docs/update.py --check    # say what would change, exit 1 if anything would

A table comes from a CSV file in docs/results, the `table.csv` of a report; the command that made it stands beside it.
The reference comes from the public docstrings, the options of the commands and the keys of a study's file.
"""

import csv
import dataclasses
import inspect
import re
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

import tyro

import afterimage
from afterimage.cli import COMMANDS, command, option_texts
from afterimage.config.study import RowConfig

ROOT = Path(__file__).resolve().parents[1]
MARKERS = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
KEYS = {
    "the study": afterimage.StudyConfig,
    "`[data]`": afterimage.DataConfig,
    "`[recipe]`": afterimage.RecipeConfig,
    "`[[rows]]`": RowConfig,
    "each of `decoders`": afterimage.DecoderConfig,
    "`fusion` of a row": afterimage.FusionConfig,
}
"""The tables of a study's file, and the dataclass of each."""
WIDTH = 100


def table(path: Path) -> str:
    """Make a Markdown table of a report's CSV: decoders in order, then baselines."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["state"] == "done"]
    nets = sorted({row["lpips_net"] for row in rows} - {""})
    head = [
        "features",
        "shape",
        "decoder",
        "parameters",
        "training",
        "PSNR (dB)",
        "SSIM",
        f"LPIPS ({', '.join(nets)})",
    ]
    lines = [head, ["---", "---", "---", *["---:"] * 5]]
    for row in rows:
        source = row["sources"] or row["label"]
        if row["fusion"]:
            source += f", {row['fusion']}"
        if row["weights"] == "random":
            source += " **RANDOM WEIGHTS**"
        size = f"{int(row['parameters']):,}" if row["kind"] == "decoder" else ""
        trained = f"{float(row['train_seconds']):,.0f} s" if row["kind"] == "decoder" else ""
        scores = [spread(row, "psnr", 2), spread(row, "ssim", 3), spread(row, "lpips", 3)]
        lines.append([source, row["shapes"], row["decoder"], size, trained, *scores])
    return markdown(lines)


def spread(row: dict, name: str, digits: int) -> str:
    if not row[f"{name}_mean"]:
        return "unavailable"
    mean, deviation = float(row[f"{name}_mean"]), row[f"{name}_std"]
    return f"{mean:.{digits}f}" + (f" ± {float(deviation):.{digits}f}" if deviation else "")


def markdown(lines: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def reference() -> str:
    """Write the reference: functions and classes, options, keys."""
    parts = [
        "# Reference\n\nWritten by `docs/update.py`; do not edit. [Concepts](concepts.md) explain the numbers.\n",
        "## Python\n\nAll of these are imported from `afterimage`.\n",
    ]
    for name in sorted(afterimage.__all__, key=str.lower):
        thing = getattr(afterimage, name)
        if thing not in KEYS.values():
            parts += [f"### {name}\n", mapping(thing) if isinstance(thing, dict) else described(name, thing)]
    parts.append("## Command line\n")
    for name in COMMANDS:
        lines = [["option", "default", "what"], ["---"] * 3, *options(command(name))]
        parts += [f"### afterimage {name}\n", docstring(command(name)), markdown(lines)]
    parts.append("## Keys of a study's file\n\nThe same dataclasses serve in Python.\n")
    for where, config in KEYS.items():
        lines = [["key", "type", "default"], ["---"] * 3]
        for field in dataclasses.fields(config):
            lines.append([field.name, code(field.type), code(default(field))])
        parts += [f"### {config.__name__}: {where}\n", docstring(config), markdown(lines)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(parts))


def mapping(things: dict) -> str:
    rows = [[f"`{name}`", first_paragraph(inspect.getdoc(thing))] for name, thing in things.items()]
    return markdown([["name", "class"], ["---"] * 2, *rows])


def first_paragraph(text: str) -> str:
    return " ".join(text.split("\n\n")[0].split())


def described(name: str, thing: typing.Any) -> str:
    """A signature, the docstring, and of a class its public members and those of its bases here, a line each."""
    text = docstring(thing)
    if inspect.isclass(thing):
        members: dict[str, typing.Any] = {}
        for kind in reversed(inspect.getmro(thing)):
            if kind.__module__.partition(".")[0] == "afterimage":
                members |= {m: v for m, v in vars(kind).items() if m not in members or v.__doc__}
        for member, value in members.items():
            value = getattr(value, "__func__", value)
            if (
                (inspect.isfunction(value) or isinstance(value, property))
                and member[0] != "_"
                and value.__doc__
            ):
                text += (
                    f"- `{signature(member, value)}`: {first_paragraph(inspect.cleandoc(value.__doc__))}\n"
                )
        if issubclass(thing, Exception):
            return text
    return f"```python\n{signature(name, thing, WIDTH)}\n```\n\n{text}"


def signature(name: str, thing: typing.Any, width: float = float("inf")) -> str:
    """A call as it is written in code; one parameter a line where it is longer than `width`."""
    if isinstance(thing, property):
        return name
    found = inspect.signature(thing)
    parameters, star = [], False
    for parameter in found.parameters.values():
        if parameter.name in ("self", "cls"):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            parameters, star = [*parameters, "*"], True
        value = parameter.default
        if value is not parameter.empty and repr(value)[0] == "<":
            parameter = parameter.replace(
                default=Plain(getattr(value, "__name__", f"{type(value).__name__}()"))
            )
        elif dataclasses.is_dataclass(value):
            parameter = parameter.replace(default=Plain(f"{type(value).__name__}()"))
        parameters.append(str(parameter.replace(annotation=Plain(parameter.annotation))))
    end = "" if found.return_annotation in (None, "None", found.empty) else f" -> {found.return_annotation}"
    line = f"{name}({', '.join(parameters)}){end}"
    return line if len(line) <= width else f"{name}(\n    " + ",\n    ".join(parameters) + f",\n){end}"


class Plain(str):
    """Text that a signature shows without quotes."""

    __repr__ = str.__str__


def docstring(thing: typing.Any) -> str:
    """The docstring as Markdown: `Args:` and the like become lists."""
    lines, listed = [], False
    for line in (inspect.getdoc(thing) or "").splitlines():
        if heading := re.fullmatch(r"(Args|Returns|Raises|Attributes|Notes?):", line):
            lines, listed = [*lines, f"**{heading[1]}**", ""], heading[1] != "Returns"
        elif listed and line.startswith("    "):
            lines.append(("- " if line[4] != " " else "  ") + line.strip())
        else:
            lines.append(line.strip() if line.startswith("    ") else line)
    return "\n".join(lines) + "\n\n"


def options(command: type) -> Iterator[list[str]]:
    """An option, its default and what it does, for each field of a command's dataclass."""
    texts = option_texts(command)
    hints = typing.get_type_hints(command, include_extras=True)
    for field in dataclasses.fields(command):
        given = getattr(hints[field.name], "__metadata__", ())
        if dataclasses.is_dataclass(config := field.default):  # its fields are options of their own
            yield from options(type(config))
            continue
        names = {
            key: getattr(one, key) for one in given for key in ("metavar", "name") if getattr(one, key, None)
        }
        name = names.get("name", field.name).replace("_", "-")
        value = f" {names['metavar']}" if "metavar" in names else ""
        shown = names.get("metavar", name.upper()) if tyro.conf.Positional in given else f"--{name}{value}"
        text = texts.get(field.name, "").replace("|", "\\|")
        yield [code(shown), code(default(field)), text]


def default(field: dataclasses.Field) -> str:
    value = field.default
    if value is dataclasses.MISSING:
        return "" if field.default_factory is dataclasses.MISSING else repr(field.default_factory())
    if dataclasses.is_dataclass(value):
        return f"{type(value).__name__}()"
    if isinstance(value, tuple):
        value = [Plain(f"{type(one).__name__}()") if dataclasses.is_dataclass(one) else one for one in value]
    return "" if value in (None, "", [], {}) else str(value)


def code(text: str) -> str:
    return f"`{text}`".replace("|", "\\|") if text else ""


def updated(path: Path, text: str) -> str:
    if path.name == "reference.md":
        return reference()
    return MARKERS.sub(lambda match: match[1] + table(ROOT / match[2]) + match[3], text)


def main(arguments: list[str]) -> int:
    stale = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        before = path.read_text(encoding="utf-8")
        after = updated(path, before)
        if after != before:
            stale.append(path.name)
            if "--check" not in arguments:
                path.write_text(after, encoding="utf-8")
    if stale:
        print(f"{'out of date' if '--check' in arguments else 'updated'}: {', '.join(stale)}")
    return int("--check" in arguments and bool(stale))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
