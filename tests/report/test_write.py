"""write_report: the files and how they hang together."""

import re
from urllib.parse import unquote

import matplotlib
import pytest
from matplotlib.figure import Figure

from afterimage.config import AfterimageError, RunConfig
from afterimage.report.figures import Drawing
from afterimage.report.write import write_report
from afterimage.runs.run import Run
from report_study import sample_image, write_baseline, write_run


@pytest.fixture
def runs(tmp_path):
    originals = [sample_image(0)]
    return [
        write_run(
            tmp_path / "runs", "m.tag", "l1", "attention", originals=originals, notes=["fitted on half"]
        ),
        write_run(tmp_path / "runs", "m.tag", "l2", weights="random", lpips=None),
        write_baseline(tmp_path / "runs", "jpeg-50"),
    ]


def test_every_link_leads_to_a_file_and_the_same_runs_give_the_same_bytes(tmp_path, runs):
    written = write_report(runs, tmp_path / "out")
    text = written["report.md"].read_text()
    links = [unquote(link) for link in re.findall(r"\]\(([^)]+)\)", text)]
    assert len(links) >= 10 and all((tmp_path / "out" / link).is_file() for link in links)
    assert {"report.md", "index.html", "findings.json", "table.md", "table.csv", "table.tex"} < set(written)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {path.relative_to(tmp_path / "out").as_posix() for path in files} == set(written)
    sample_images = {name for name in written if name.endswith((".png", ".svg"))}
    assert sample_images <= set(links) and len(sample_images) >= 8
    with matplotlib.rc_context({"font.size": 30, "lines.linewidth": 9, "axes.grid": True, "savefig.dpi": 30}):
        again = write_report(runs, tmp_path / "again")
    assert {n: p.read_bytes() for n, p in again.items()} == {n: p.read_bytes() for n, p in written.items()}


def test_the_report_says_what_a_reader_must_know(tmp_path, runs, no_figures):
    failed = Run.create(tmp_path / "runs", RunConfig(("m.tag:l3",)))
    failed.set_state("failed", error="the loss is not finite")
    written = write_report([*runs, failed], tmp_path / "out", title="Mine & <i>yours</i>")
    text = written["report.md"].read_text()
    assert text.startswith("# Mine &amp; &lt;i&gt;yours&lt;/i&gt;\n")
    before, table = text.split("## Results")
    assert "[!WARNING]" in before and "RANDOM" in before and "1 run not finished" in before
    for part in ("fitted on half", "LPIPS is unavailable", "**RANDOM**", "SHA-256", "the loss is not finite"):
        assert part in table
    assert "`afterimage study made-up.toml`" in table and 'recipe.loss = "mse"' in table


def test_a_folded_figure_names_itself_without_escapes(tmp_path, monkeypatch):
    drawings = [Drawing("f", "Reconstructions: a_b<i>", "", Figure(), folded=True)]
    monkeypatch.setattr("afterimage.report.figures.draw", lambda *_: iter(drawings))
    monkeypatch.setattr("afterimage.report.figures.render", lambda figure: (b"", b""))
    text = write_report([write_run(tmp_path / "runs", "m", "l")], tmp_path / "out")["report.md"].read_text()
    assert "<summary>Reconstructions: a_b&lt;i&gt;</summary>" in text


def test_nothing_finished_writes_nothing(tmp_path):
    run = Run.create(tmp_path / "runs", RunConfig(("m:l",)))
    with pytest.raises(AfterimageError, match="no finished run"):
        write_report([run], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unwritable_folder_is_one_message(tmp_path, runs):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(AfterimageError, match="cannot write"):
        write_report(runs, tmp_path / "out")


def test_commands_and_environments_stand_with_their_rows(tmp_path, runs, no_figures):
    runs[0].save_environment({"command": ["afterimage", "train", "a b|c"], "commit": "abc"})
    runs[1].file("environment.json").write_text("[]")
    text = write_report(runs, tmp_path / "out")["report.md"].read_text()
    assert "afterimage train 'a b\\|c'" in text and "| not recorded |" in text
    assert "Made with torch 2.4, commit abc; or with an environment that was not recorded." in text
