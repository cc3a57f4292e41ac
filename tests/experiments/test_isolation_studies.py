"""A study of which a row, a baseline, a part of the controls or a run fails goes on without it."""

import json
from dataclasses import replace

import pytest

from afterimage import AfterimageError
from afterimage.analysis.controls import run as measure
from afterimage.analysis.controls.run import run_controls
from afterimage.cli import main
from afterimage.config import DataConfig, DecoderConfig, FusionConfig, RecipeConfig, dump_toml
from afterimage.config.study import RowConfig, StudyConfig
from afterimage.evaluation import baselines
from afterimage.evaluation.baselines import run_baselines
from afterimage.experiments.study import FAILURES, expand_study, run_study
from afterimage.models.decoders import DECODERS
from afterimage.runs.run import TRACEBACK, Run, scan
from afterimage.runtime.failures import UnexpectedError
from children import MODEL, result
from stand_ins import decoder

BUG = RuntimeError("a bug in\nsomebody's code")
DATA = DataConfig("procedural:12", test="procedural:3", resize=36, crop=32)
STUDY = StudyConfig(
    "Small",
    sources=(f"{MODEL}:layer[12]",),
    decoders=(DecoderConfig("linear"),),
    weights="random",
    lpips="squeeze",
    data=DATA,
    recipe=RecipeConfig(epochs=1, batch_size=4),
)
FUSION = FusionConfig("concat", channels=8)
UNRESOLVED = ("resnt18:layer1", f"{MODEL}:stage*", "no model at all")


@pytest.fixture(scope="module")
def whole(cache, tmp_path_factory):
    """The study of which nothing fails, by run."""
    root = tmp_path_factory.mktemp("whole")
    runs, failures = run_study(STUDY, root, cache=cache, accelerator="cpu")
    assert not failures
    return {run.name: decoded(run) for run in runs}


def decoded(run):
    return result(run) if run.file("decoder.safetensors").exists() else run.result.per_image


def check_rest(root, whole, *, without=()):
    """All other runs of the study are done, with the same results."""
    found = {run.name: run for run in scan(root)}
    assert found.keys() >= whole.keys()
    for name in whole.keys() - set(without):
        assert found[name].state == "done" and decoded(found[name]) == whole[name]


def test_rows_that_cannot_be_resolved_end_no_others(whole, cache, tmp_path, monkeypatch):
    """Nor does one whose model makes timm raise, which has no message of ours."""
    import afterimage.experiments.study

    traced = afterimage.experiments.study.trace

    def tracing(network, size):
        if network.name.startswith("resnet34."):
            raise BUG
        return traced(network, size)

    monkeypatch.setattr(afterimage.experiments.study, "trace", tracing)
    rows = (RowConfig(("resnet34:layer*",)), RowConfig((f"{MODEL}:layer1", "resnt18:layer1"), fusion=FUSION))
    study = replace(STUDY, sources=(*UNRESOLVED, *STUDY.sources), rows=rows)
    runs, failures = run_study(study, tmp_path, cache=cache, accelerator="cpu")
    assert {run.name for run in runs} == whole.keys()
    check_rest(tmp_path, whole)
    assert len(failures) == 5
    for source, error in zip((*UNRESOLVED, "resnet34:layer*"), failures, strict=False):
        assert source in str(error) and "\n" not in str(error)
    assert isinstance(failures[3], UnexpectedError) and f"{MODEL}:layer1 + resnt18:layer1" in str(failures[4])
    written = (tmp_path / FAILURES).read_text()
    assert all(str(error) in written for error in failures)
    assert written.count("Traceback") == 1 and "in tracing" in written
    assert not run_study(STUDY, tmp_path, cache=cache, accelerator="cpu")[1]
    assert not (tmp_path / FAILURES).exists()


def test_without_a_list_the_first_row_that_fails_is_raised():
    with pytest.raises(AfterimageError, match="did you mean 'resnet18'"):
        expand_study(replace(STUDY, sources=(*STUDY.sources, "resnt18:layer1")))


def test_a_setting_that_is_none_is_told_before_anything_is_done(cache, tmp_path):
    study = replace(STUDY, rows=(RowConfig(STUDY.sources, recipe={"epoch": 1}),))
    with pytest.raises(AfterimageError, match=r"rows\[0\]\.recipe\.epoch"):
        run_study(study, tmp_path, cache=cache, accelerator="cpu")


def test_a_study_of_which_nothing_resolves_is_its_failures(cache, tmp_path):
    runs, failures = run_study(replace(STUDY, sources=UNRESOLVED), tmp_path, cache=cache, accelerator="cpu")
    assert not runs and len(failures) == 3


def test_a_baseline_that_raises_ends_itself_alone(whole, cache, tmp_path, monkeypatch):
    def raising(images, quality):
        raise BUG

    monkeypatch.setattr(baselines, "jpeg", raising)
    runs, failures = run_study(STUDY, tmp_path, cache=cache, accelerator="cpu")
    (broken,) = [run for run in runs if run.state == "failed"]
    assert "jpeg" in broken.name
    check_rest(tmp_path, whole, without=[broken.name])
    (error,) = failures
    assert broken.name in str(error) and "a bug in somebody's code" in str(error) and "\n" not in str(error)
    assert "in raising" in broken.file(TRACEBACK).read_text() and not list(tmp_path.rglob("lock.*"))
    monkeypatch.undo()
    again = run_baselines(DATA, tmp_path, lpips="squeeze", cache=cache)
    assert {run.state for run in again} == {"done"} and not broken.file(TRACEBACK).exists()


def test_images_that_baselines_cannot_have_end_no_run(whole, cache, tmp_path, monkeypatch):
    def nothing(*arguments, **options):
        raise BUG

    monkeypatch.setattr(baselines, "load_data", nothing)
    _, failures = run_study(STUDY, tmp_path, cache=cache, accelerator="cpu")
    lines = [name for name in whole if name.startswith("baseline")]
    check_rest(tmp_path, whole, without=lines)
    assert len(failures) == 1 and all(Run(tmp_path / name).state == "failed" for name in lines)


def test_a_part_of_the_controls_that_raises_ends_itself_alone(whole, cache, tmp_path, monkeypatch):
    runs, _ = run_study(replace(STUDY, baselines=False), tmp_path, cache=cache, accelerator="cpu")
    add, calls = measure._RateDistortionMeasure.add, []

    def adding(self, ids, *others):
        calls.append(ids)
        if len(calls) == 1:
            raise BUG
        add(self, ids, *others)

    monkeypatch.setattr(measure._RateDistortionMeasure, "add", adding)
    failures = run_controls(runs, cache=cache, accelerator="cpu")
    (error,) = failures
    assert "rate_distortion of " + runs[0].name in str(error) and "\n" not in str(error)
    assert "in adding" in runs[0].file(f"rate_distortion.{TRACEBACK}").read_text()
    files = [sorted(path.name for path in run.path.glob("*.json")) for run in runs]
    assert set(files[1]) - set(files[0]) == {"rate_distortion.json"} and set(files[1]) >= {
        "controls.json",
        "error_breakdown.json",
    }
    assert {run.state for run in runs} == {"done"}
    monkeypatch.undo()
    assert not run_controls(runs, cache=cache, accelerator="cpu")
    assert (
        runs[0].file("rate_distortion.json").exists()
        and not runs[0].file(f"rate_distortion.{TRACEBACK}").exists()
    )


def test_controls_of_a_run_that_cannot_be_opened_end_themselves_alone(cache, tmp_path, monkeypatch):
    runs, _ = run_study(replace(STUDY, baselines=False), tmp_path, cache=cache, accelerator="cpu")
    opened = measure.load_reconstructor

    def opening(run, **options):
        if run == runs[0]:
            raise BUG
        return opened(run, **options)

    monkeypatch.setattr(measure, "load_reconstructor", opening)
    (error,) = run_controls(runs, cache=cache, accelerator="cpu")
    assert runs[0].name in str(error) and runs[0].file(f"controls.{TRACEBACK}").exists()
    assert runs[1].file("controls.json").exists() and {run.state for run in runs} == {"done"}


def test_the_command_writes_table_and_report_and_ends_with_1(
    cache, tmp_path, monkeypatch, capsys, no_figures
):
    monkeypatch.setitem(DECODERS, "broken", decoder("step", BUG))
    rows = (RowConfig((f"{MODEL}:layer1",), (DecoderConfig("broken"),)), RowConfig((f"{MODEL}:nolayer",)))
    study = replace(STUDY, sources=(*STUDY.sources, "resnt18:layer1"), rows=rows, baselines=False)
    file = tmp_path / "study.toml"
    file.write_text(dump_toml(study))
    flags = ["--output-dir", str(tmp_path / "runs"), "--cache", str(cache), "--device", "cpu"]
    with pytest.raises(SystemExit) as ended:
        main(["study", str(file), *flags])
    shown = capsys.readouterr()
    assert ended.value.code == 1 and (tmp_path / "runs/report/index.html").exists()
    assert "layer2" in shown.out and "Traceback" not in shown.out + shown.err
    lines = [line for line in shown.err.splitlines() if line.startswith("failed: ")]
    assert len(lines) == 3
    assert sum("RuntimeError: a bug in somebody's code (traceback: " in line for line in lines) == 1
    states = {run.name: run.state for run in scan(tmp_path / "runs")}
    assert sorted(states.values()) == ["done", "done", "failed", "failed"]
    for flag in ("--dry-run", "--list-groups"):
        with pytest.raises(SystemExit) as ended:
            main(["study", str(file), flag, *flags])
        assert ended.value.code == 1 and "failed: the row resnt18:layer1" in capsys.readouterr().err


def test_a_plan_that_raises_is_told_beside_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(DECODERS, "broken", decoder("build", BUG))
    file = tmp_path / "study.toml"
    study = replace(STUDY, rows=(RowConfig((f"{MODEL}:layer1",), (DecoderConfig("broken"),)),))
    file.write_text(dump_toml(study))
    main(["study", str(file), "--dry-run"])
    out = capsys.readouterr().out
    assert "layer2" in out
    assert "cannot be built: " in out and "RuntimeError: a bug in somebody's code" in out


def test_train_tells_every_failure_in_a_line(cache, tmp_path, monkeypatch, capsys):
    arguments = [
        "train",
        f"{MODEL}:layer1",
        f"{MODEL}:nolayer",
        "--decoders",
        "linear",
        "--weights",
        "random",
    ]
    arguments += ["--data", DATA.source, "--resize", "36", "--crop", "32", "--lpips", "squeeze"]
    monkeypatch.setitem(DECODERS, "broken", decoder("finalize_fit", BUG, DECODERS["linear"]))
    arguments.insert(5, "broken")
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--output-dir", str(tmp_path), "--cache", str(cache), "--device", "cpu"])
    err = capsys.readouterr().err
    assert ended.value.code == 1 and "Traceback" not in err
    lines = [line for line in err.splitlines() if line.startswith(("failed: ", "afterimage: "))]
    assert len(lines) == 2 and sum("nolayer" in line for line in lines) == 1
    states = sorted(json.loads(path.read_text())["state"] for path in tmp_path.glob("*/status.json"))
    assert states == ["done", "failed", "failed", "failed"]
