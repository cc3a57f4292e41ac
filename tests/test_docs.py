import re
import subprocess
import sys
from pathlib import Path

from afterimage import DECODERS
from afterimage.config.study import shipped

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_tables_are_what_their_results_say():
    result = subprocess.run(
        [sys.executable, ROOT / "docs/update.py", "--check"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout
    assert "<!-- table:" in README


def test_links_and_images_exist():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_ten_lines_run(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(code.strip().splitlines()) <= 10
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AFTERIMAGE_CACHE", str(tmp_path))
    small = code.replace('resnet18.tv_in1k:layer1"', 'test_resnet.r160_in1k:layer1", weights="random"')
    small = small.replace("procedural:400", "procedural:12")
    assert small != code
    exec(compile(small, "README.md", "exec"), {})


def test_every_decoder_and_study_is_explained():
    page = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in page for name in DECODERS)
    assert "published" in shipped() and "`published`" in page
