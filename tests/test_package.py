"""The package as it is built: what the wheel holds, and what works where only the wheel is."""

import io
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from afterimage.report.space import build_wheel

ROOT = Path(__file__).parents[1]
BUILD = "import sys, setuptools.build_meta as b; print(getattr(b, sys.argv[1])(sys.argv[2]))"


def python(*arguments, cwd, **environment):
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from the source distribution, which is built from the files that matter."""
    pytest.importorskip("setuptools", "77", reason="setuptools of 77 or newer builds the package: not tested")
    folder = tmp_path_factory.mktemp("package")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(
        ROOT / "src/afterimage", folder / "src/afterimage", ignore=shutil.ignore_patterns("__pycache__")
    )
    sdist = python("-c", BUILD, "build_sdist", "dist", cwd=folder).splitlines()[-1]
    shutil.unpack_archive(folder / "dist" / sdist, folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").iterdir()
    return source / "dist" / python("-c", BUILD, "build_wheel", "dist", cwd=source).splitlines()[-1]


@pytest.fixture(scope="module")
def installed(wheel):
    """The folder that the wheel alone is installed in; what it depends on is the tests' own."""
    target = wheel.parents[1] / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def test_the_wheel_holds_every_file_and_says_what_it_is(wheel, installed):
    files = {
        path.relative_to(ROOT / "src") for path in (ROOT / "src/afterimage").rglob("*") if path.is_file()
    }
    files = {path for path in files if "__pycache__" not in path.parts}
    assert {path for path in files if not (installed / path).exists()} == set()
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert wheel.name == f"afterimage-{version}-py3-none-any.whl"
    metadata = (installed / f"afterimage-{version}.dist-info/METADATA").read_text()
    assert "License-Expression: MIT" in metadata and "License-File: LICENSE" in metadata
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_wheel_of_a_space_holds_the_same(wheel):
    """It is packed from what runs here, without a build; pip reads the digests of its RECORD."""
    ours = build_wheel()
    assert ours == build_wheel() and ours.name == wheel.name
    with zipfile.ZipFile(wheel) as built, zipfile.ZipFile(io.BytesIO(ours.content)) as packed:
        names = {name for name in built.namelist() if not name.endswith("/top_level.txt")}
        assert set(packed.namelist()) == names
        same = names - {name for name in names if name.endswith(("/RECORD", "/WHEEL", "/METADATA"))}
        assert [name for name in same if packed.read(name) != built.read(name)] == []
        (record,) = (name for name in names if name.endswith("/RECORD"))
        rows = [set(archive.read(record).decode().split()) for archive in (built, packed)]
    of_package = [{row for row in found if row.startswith("afterimage/")} for found in rows]
    assert of_package[0] == of_package[1]


def test_the_readmes_ten_lines_and_the_command_run_from_the_wheel(installed, tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(code.strip().splitlines()) <= 10
    small = code.replace('resnet18.tv_in1k:layer1"', 'test_resnet.r160_in1k:layer1", weights="random"')
    small = small.replace("procedural:400", "procedural:12")
    assert small != code
    small += "\nfrom afterimage.cli import main\nmain(['--version'])\nimport afterimage\nprint(afterimage.__file__)"
    (tmp_path / "ten.py").write_text(small)
    said = python("ten.py", cwd=tmp_path, PYTHONPATH=str(installed), AFTERIMAGE_CACHE=str(tmp_path))
    scores, version, path = said.splitlines()[-3:]
    assert "psnr" in scores and version.startswith("afterimage ") and path.startswith(str(installed))


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_shells_complete_the_command(installed, tmp_path, shell):
    said = python(
        "-m", "afterimage", "--tyro-print-completion", shell, cwd=tmp_path, PYTHONPATH=str(installed)
    )
    assert "reconstruct" in said and "--output-dir" in said
