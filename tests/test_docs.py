import ast
import importlib.util
import json
import re
import shlex
import tomllib
from pathlib import Path

import huggingface_hub
import pytest

from afterimage import DECODERS
from afterimage.cli import COMMANDS, _parsed, command
from afterimage.config import from_dict
from afterimage.config.study import StudyConfig, shipped
from afterimage.models.fusion import FUSIONS

ROOT = Path(__file__).parents[1]
PAGES = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in (
        "README.md",
        "CONTRIBUTING.md",
        "docs/guide.md",
        "docs/concepts.md",
        "docs/slurm.md",
        "docs/atlas.md",
        "docs/gallery.md",
    )
}
README, GUIDE, CONCEPTS = (PAGES[name] for name in ("README.md", "docs/guide.md", "docs/concepts.md"))
LINK = re.compile(r"\]\(([^)#]*)(?:#([^)]+))?\)")


def commands() -> list[str]:
    """Every `afterimage ...` line of the pages' code, whatever starts it, without the comments."""
    lines = []
    for page in PAGES.values():
        code = re.sub(r"\\\n\s*", "", page)
        lines += re.findall(r"^    (?:torchrun .* -m )?(afterimage .*?)(?:  +#.*)?$", code, re.MULTILINE)
    return sorted(set(lines))


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_what_is_generated_is_what_its_sources_say(capsys):
    """If this fails: python docs/update.py."""
    spec = importlib.util.spec_from_file_location("update", ROOT / "docs/update.py")
    update = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(update)
    assert update.main(["--check"]) == 0, capsys.readouterr().out
    assert "<!-- table:" in README


def test_docstrings_open_with_a_verb_or_a_noun():
    """None opens with a relative clause, as in "What a layer keeps": those must be read twice."""
    asks = re.compile(r"(what|how|where|whether|which|who|whose|why|that|as)\b", re.IGNORECASE)
    found = []
    for path in sorted(file for room in ("src", "benchmarks") for file in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            body = getattr(node, "body", None)
            for line in body if isinstance(body, list) else ():
                value = line.value if isinstance(line, ast.Expr) else None
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    found += [f"{path}:{line.lineno}"] if asks.match(value.value) else []
    assert not found


def test_links_and_images_exist():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target, anchor in LINK.findall(page.read_text(encoding="utf-8")):
            if target.startswith("http"):
                continue
            path = page.parent / target if target else page
            assert path.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in headings(path), f"{page.name}: {target}#{anchor}"


@pytest.mark.parametrize("line", commands())
def test_every_command_shown_parses(line):
    _, *arguments = shlex.split(line)
    assert isinstance(_parsed(arguments), command(arguments[0]))


def test_the_tree_of_the_readme_is_the_packages():
    (tree,) = re.findall(r"```\nsrc/afterimage/\n(.*?)```", README, re.DOTALL)
    package = ROOT / "src/afterimage"
    found, above = set(), {}
    for line in tree.splitlines():
        indent, name, text = re.fullmatch(r"( +)(\w+)/ +(.+)", line).groups()
        above[len(indent)] = folder = above.get(len(indent) - 2, package) / name
        found.add(folder)
        for file in re.findall(r"\b\w+\.py\b", text):
            assert (folder / file).is_file(), f"{folder.relative_to(package)} has no {file}"
    folders = {file.parent for kind in ("*.py", "*.toml") for file in package.rglob(kind)} - {package}
    assert found == folders
    for path in re.findall(r"`([\w/]+(?:/|\.py))`", README[README.index("| looking for") :].split("\n\n")[0]):
        assert (package / path).exists(), path


def test_paths_that_contributing_names_exist():
    paths = re.findall(r"`([\w./]+/[\w.]*)`", PAGES["CONTRIBUTING.md"])
    assert paths
    for path in paths:
        assert (ROOT / path).exists() or (ROOT / "src/afterimage" / path).exists(), path


def test_every_command_decoder_fusion_and_study_is_explained():
    assert all(f"afterimage {name} " in GUIDE for name in COMMANDS)
    assert all(f"| `{name}` |" in CONCEPTS for name in (*DECODERS, *FUSIONS))
    assert "published" in shipped() and "afterimage study published " in GUIDE


def test_the_studies_shown_are_studies():
    texts = re.findall(r"```toml\n(.*?)```", GUIDE + PAGES["docs/gallery.md"], re.DOTALL)
    assert len(texts) > 1 and all(from_dict(StudyConfig, tomllib.loads(text)) for text in texts)


def test_the_notebook_runs_from_top_to_bottom_and_keeps_no_output(tmp_path, monkeypatch, capsys):
    """On few and small images, in this process, as a kernel would; without weights it takes random ones."""
    notebook = json.loads((ROOT / "docs/afterimage.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    for name, value in {
        "MPLBACKEND": "Agg",
        "AFTERIMAGE_CACHE": str(tmp_path),
        "HF_HOME": str(tmp_path),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (settings,) = (cell for cell in cells if "parameters" in cell["metadata"].get("tags", ()))
    names: dict = {}
    for cell in cells:
        exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
        if cell is settings:
            names |= {"IMAGES": 12, "SIDE": 48, "PASSES": 3, "LAYERS": ["layer1", "layer3"]}
    assert names["results"]["layer1"]["psnr"] > names["results"]["mean"]["psnr"]
    assert {len(found) for found in names["answers"].values()} == {1} and len(names["guesses"]) == 4
    assert f"weights: {names['WEIGHTS']}" in capsys.readouterr().out


def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path, monkeypatch):
    pytest.importorskip("mkdocs", reason="mkdocs-material is not installed (pip install 'afterimage[docs]')")
    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True))
    for page in ("index", "guide/index", "reference/index"):
        text = (tmp_path / f"{page}.html").read_text(encoding="utf-8")
        assert not re.findall(
            r"<(?:script|img)[^>]* src=\"https?:|<link[^>]*stylesheet[^>]*href=\"https?:", text
        )
    assert '<h3 id="reconstructor"' in text
