"""The report's findings and the published figures beside ours: what they say, and what they do when they fail."""

import json
import re
import subprocess
import sys

import pytest

from afterimage import cli
from afterimage.config import AfterimageError
from afterimage.report.findings import build_findings
from afterimage.report.write import write_report
from afterimage.runs.files import read_json
from afterimage.runs.run import scan
from report_study import RESNET, VIT, sample_image, write_baseline, write_run, write_study
from simulated_runs import edit
from simulated_study import analyse, write_published_study

ATTENTION = (RESNET[0], "layer1", "attention")


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    monkeypatch.setattr("afterimage.report.figures.draw", lambda *_: iter(()))


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Two encoders, two decoders, two rows on random weights."""
    root = tmp_path_factory.mktemp("answers")
    runs = write_study(root, originals=[sample_image(0)], baselines=("mean",))
    for i in (1, 2):
        layer = f"layer{i}"
        runs.append(write_run(root, RESNET[0], layer, weights="random", features=RESNET[1][layer], order=i))
    return runs


@pytest.fixture(scope="module")
def told(study, tmp_path_factory):
    """The report's text and its folder."""
    out = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("afterimage.report.figures.draw", lambda *_: iter(()))
        return write_report(study, out)["report.md"].read_text(), out


def section(text, heading):
    return text.split(f"## {heading}\n")[1].split("\n## ")[0]


def test_every_hypothesis_has_verdict_rule_and_numbers(study, told):
    analysis, findings = analyse(study), section(told[0], "Findings")
    step = next(d for d in analysis.depth if d.setting == "attention").encoders[0].steps[0]
    for h, claim in (
        ("H1", "quality falls"),
        ("H2", "spatial resolution"),
        ("H3", "different architectures"),
    ):
        part = re.search(rf"### {h}: {claim}.*?(?=\n### )", findings, re.DOTALL)[0]
        verdict = re.search(r"\*\*Verdict: (.*?)\.\*\*", part)[1]
        assert verdict in ("supported", "contradicted", "undecided")
        assert re.search(rf"\| {h}: .* \| \*\*{verdict}\*\* \|", findings)
        assert "*Rule. " in part and "p &lt; 0.05" in part and "dB \\[" in part
    assert f"{step.difference.estimate:+.2f} dB".replace("-", "−") in findings
    assert "How far decoders fall" in findings and "What quality costs" in findings and "per cent" in findings
    assert read_json(told[1] / "findings.json") == analysis.as_dict()


def test_controls_on_random_weights_are_labelled_and_decide_nothing(study, told):
    findings = section(told[0], "Findings")
    assert "Settings marked RANDOM weights are controls" in findings
    lines = [line for line in findings.splitlines() if "random" in line.lower()]
    assert len(lines) >= 4 and all("RANDOM" in line for line in lines)
    controls = [run for run in study if run.result.is_random]
    (h1, *_) = build_findings(analyse(controls))
    assert h1.verdict == "supported (RANDOM weights only)"


def test_the_other_random_control_decides_nothing_either(tmp_path):
    options = {"weights": "random-init", "lpips": None}
    layers = list(RESNET[1].items())[:2]
    runs = [
        write_run(tmp_path, RESNET[0], layer, features=features, order=i, **options)
        for i, (layer, features) in enumerate(layers)
    ]
    (h1, *_) = build_findings(analyse(runs))
    assert h1.verdict == "supported (RANDOM-INIT weights only)"


def test_a_hypothesis_that_cannot_be_tested_says_so_in_a_line(tmp_path):
    text = write_report([write_run(tmp_path / "runs", *ATTENTION)], tmp_path / "out")["report.md"].read_text()
    for h in ("H1", "H2", "H3"):
        (line,) = (line for line in text.splitlines() if line.startswith(f"{h} is not testable"))
        assert "needs" in line
    assert "*Rule" not in text


def test_baselines_alone_are_a_report(tmp_path):
    text = write_report([write_baseline(tmp_path / "runs", "mean")], tmp_path / "out")[
        "report.md"
    ].read_text()
    assert "nothing to compare" in section(text, "Findings")


def test_what_cannot_be_computed_is_said_with_its_reason(tmp_path, monkeypatch):
    def refused(*args):
        raise AfterimageError("no <layers>")

    run = write_run(tmp_path / "runs", *ATTENTION, originals=[sample_image(0)])
    monkeypatch.setattr("afterimage.report.statistics.analysis.falls_with_depth", refused)
    monkeypatch.setattr("afterimage.report.findings.published_finding", lambda rows: refused(rows))
    written = write_report([run], tmp_path / "out")
    text, page = written["report.md"].read_text(), written["index.html"].read_text()
    for what in ("findings", "comparison with the published figures"):
        assert f"**The {what} could not be computed: no &lt;layers&gt;" in text
        assert f"The {what} could not be computed: no &lt;layers&gt;" in page
    assert len(json.loads(written["findings.json"].read_text())["problems"]) == 2


def test_an_error_of_the_statistics_is_no_line_of_the_report(tmp_path, monkeypatch):
    def broken(*args):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("afterimage.report.statistics.analysis.falls_with_depth", broken)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        write_report([write_run(tmp_path / "runs", *ATTENTION)], tmp_path / "out")


def test_a_image_that_is_gone_costs_the_page_and_is_named(tmp_path):
    run = write_run(tmp_path / "runs", *ATTENTION, originals=[sample_image(0)])
    assert "index.html" in write_report([run], tmp_path / "out")
    run.file("reconstructions/000.png").unlink()
    written = write_report([run], tmp_path / "out")
    assert "index.html" not in written and not (tmp_path / "out" / "index.html").exists()
    text = written["report.md"].read_text()
    assert "index.html could not be written" in text and "000.png" in text and "](index.html)" not in text


def test_rows_with_a_published_counterpart_stand_beside_it(study, told):
    part = section(told[0], "Beside the published figures")
    ours = next(r for r in study if r.result.label.endswith("layer1 · attention")).result.scores
    (line,) = (line for line in part.splitlines() if line.startswith("| resnet34.tv\\_in1k:layer1"))
    assert f"14.32 ± 0.94 → {ours['psnr'].mean:.2f}" in line and "0.455 ± 0.031 → " in line
    assert "perfect decoder would have scored" in part and "Computed here" in part
    page = (told[1] / "index.html").read_text()
    assert (
        "Beside the published figures" in page and f"<td>14.32 ± 0.94 → {ours['psnr'].mean:.2f}</td>" in page
    )


def test_lpips_of_another_network_does_not_stand_beside_the_published_one(tmp_path):
    run = write_run(tmp_path / "runs", *ATTENTION, lpips="squeeze")
    part = section(
        write_report([run], tmp_path / "out")["report.md"].read_text(), "Beside the published figures"
    )
    assert "0.455 ± 0.031 → unavailable" in part and "No test images are kept" in part


def test_the_published_study_itself_is_told_as_it_told_itself(tmp_path):
    h1, h2, h3, *rest = build_findings(analyse(write_published_study(tmp_path)))
    assert h1.verdict == "supported" and {h2.verdict, h3.verdict} <= {
        "supported",
        "contradicted",
        "undecided",
    }
    assert all(len(row) == len(t.header) for f in (h1, h2, h3, *rest) for t in f.tables for row in t.rows)
    assert [f.title for f in rest][:2] == [
        "How far decoders fall from the best layer to the worst",
        "What quality costs",
    ]


def test_verdicts_that_differ_between_decoders_are_all_named(tmp_path):
    for decoder, qualities in (("linear", (0.8, 0.4)), ("transposed", (0.4, 0.8))):
        for i, quality in enumerate(qualities):
            write_run(tmp_path, "m.tag", f"l{i}", decoder, features=(8, 14, quality), order=i)
    (h1, *_) = build_findings(analyse(scan(tmp_path)))
    assert h1.verdict == "supported with linear; contradicted with transposed"


def test_the_command_prints_two_paths_and_needs_no_torch(tmp_path):
    write_run(tmp_path / "runs", *ATTENTION)
    code = (
        "import sys; from afterimage.cli import main\n"
        "main(['report', sys.argv[1], '--intervals'])\n"
        "print([name for name in ('torch', 'timm', 'torchvision', 'lightning_fabric') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "runs"], capture_output=True, text=True, check=True
    )
    out = tmp_path / "runs" / "report"
    report, page, more, loaded = done.stdout.splitlines()
    assert (report, page, loaded) == (f"{out / 'report.md'}", f"{out / 'index.html'}", "[]")
    files = [path for path in out.rglob("*") if path.is_file()]
    assert more == f"and {len(files) - 2} more files beside them"
    assert "its 95 % BCa interval" in (out / "report.md").read_text()
    assert "figures" in done.stderr


def test_the_command_says_when_there_is_no_page(tmp_path, capsys):
    run = write_run(tmp_path / "runs", *ATTENTION, originals=[sample_image(0)])
    run.file("reconstructions/000.png").write_bytes(b"no image")
    cli.main(["report", str(tmp_path / "runs")])
    captured = capsys.readouterr()
    assert "index.html" not in captured.out and "page could not be written" in captured.err


def test_a_summary_without_digest_is_named(tmp_path):
    run = write_run(tmp_path, VIT[0], "blocks.0")
    edit(run, data={"source": "procedural"})
    with pytest.raises(AfterimageError, match=r"summary\.json: missing setting: data\.test, data\.digest"):
        analyse([run])
