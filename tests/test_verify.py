import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from afterimage import train_runs
from afterimage.cli import main
from afterimage.controls import run_references
from afterimage.runs import Run, read_csv, scan, write_csv, write_json
from afterimage.verify import verify_runs
from children import small_configs, small_pictures


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished study of three decoders and two reference lines: its pictures, its folder, its cache."""
    folder = tmp_path_factory.mktemp("study")
    configs = small_configs(small_pictures(folder / "pictures"), epochs=1)
    options = {"cache": folder / "cache"}
    train_runs(configs, folder / "runs", accelerator="cpu", **options)
    run_references(configs[0].data, folder / "runs", names=["mean", "jpeg-50"], **options)
    return folder


@pytest.fixture
def study(done, tmp_path):
    """A copy that a test may change; the pictures keep their place, which the runs name."""
    import shutil

    shutil.copytree(done / "runs", tmp_path / "runs")
    return tmp_path / "runs"


def verdict(study, done, kind="linear"):
    runs = [run for run in scan(study) if kind in run.name]
    assert len(runs) == 1
    return verify_runs(runs, cache=done / "cache", accelerator="cpu")[0]


def test_everything_holds(study, done):
    verdicts = verify_runs(scan(study), cache=done / "cache", accelerator="cpu")
    assert len(verdicts) == 5
    for one in verdicts:
        assert one.holds and not one.changes and one.pictures == 2
        assert one.worst["psnr"] <= 1e-4


def edit(run: Run, name, change):
    content = json.loads(run.file(name).read_text())
    change(content)
    write_json(run.file(name), content)


def run_of(study, kind):
    (run,) = [run for run in scan(study) if kind in run.name]
    return run


def test_another_decoder_does_not_hold_and_is_named(study, done):
    path = run_of(study, "linear").file("decoder.safetensors")
    tensors = load_file(path)
    tensors["decoder.bias"] += 0.05
    save_file(tensors, path)
    found = verdict(study, done)
    assert not found.holds and "psnr differs by up to" in found.problems[0]
    assert found.changes == ("the decoder: decoder.safetensors is not the one that was measured",)


def test_the_same_decoder_saved_anew_is_a_change_whose_scores_hold(study, done):
    path = run_of(study, "linear").file("decoder.safetensors")
    save_file(load_file(path), path, metadata={"by": "another program"})
    found = verdict(study, done)
    assert found.holds and "decoder.safetensors is not the one" in found.changes[0]


@pytest.mark.parametrize("kind", ["linear", "mean"])
def test_a_score_that_was_touched_up_does_not_hold(study, done, kind):
    run = run_of(study, kind)
    rows = read_csv(run.file("scores.csv"))
    rows[0]["psnr"] += 0.02
    write_csv(run.file("scores.csv"), rows)
    found = verdict(study, done, kind)
    assert not found.holds
    assert any(
        rows[0]["id"] in problem and "psnr differs by up to 0.02" in problem for problem in found.problems
    )
    assert any("summary.json and scores.csv do not agree about psnr" in problem for problem in found.problems)


def test_a_summary_that_was_touched_up_does_not_hold(study, done):
    edit(run_of(study, "linear"), "summary.json", lambda s: s["scores"]["ssim"].update(mean=0.99))
    assert verdict(study, done).problems == ("summary.json and scores.csv do not agree about ssim",)


def test_other_weights_do_not_hold(study, done):
    edit(run_of(study, "linear"), "summary.json", lambda s: s["weights"][0].update(sha256="1" * 64))
    found = verdict(study, done)
    assert not found.holds and "trained on weights" in found.problems[0] and "1" * 12 in found.problems[0]


def test_other_settings_and_versions_are_named(study, done):
    run = run_of(study, "linear")
    text = run.file("config.toml").read_text()
    run.file("config.toml").write_text(text.replace("epochs = 1", "epochs = 2"))
    edit(run, "environment.json", lambda e: e["versions"].update(torch="1.0") or e.update(threads=99))
    found = verdict(study, done)
    assert found.holds and found.changes == (
        "the settings: config.toml is not the one that named the folder",
    )
    edit(run, "summary.json", lambda s: s["scores"]["psnr"].update(mean=1.0))
    found = verdict(study, done)
    assert not found.holds and f"torch: 1.0 then, {torch.__version__.split('+')[0]}" in str(found.changes)
    assert f"threads: 99 then, {torch.get_num_threads()} now" in found.changes


def test_other_pictures_are_named(tmp_path):
    pictures = small_pictures(tmp_path / "pictures")
    (run,) = train_runs(small_configs(pictures)[1], tmp_path / "runs", cache=tmp_path / "cache")
    small_pictures(pictures, 24)
    (found,) = verify_runs([run], cache=tmp_path / "cache")
    assert not found.holds and "other test pictures" in found.problems[0]
    assert "training/validation/test 14/4/2 then" in found.changes[0]


@pytest.mark.parametrize("state", ["stopped", "failed"])
def test_what_is_not_finished_does_not_hold(study, done, state):
    run_of(study, "linear").set_state(state)
    assert verdict(study, done).problems == (f"it is not finished (state: {state})",)


def test_other_kinds_of_rows_are_skipped_and_said(study, done):
    edit(run_of(study, "linear"), "summary.json", lambda s: s.update(kind="dream"))
    found = verdict(study, done)
    assert not found.holds and not found.problems and "kind dream" in found.skipped


def test_the_command_says_so_and_ends_with_one(study, done, capsys, monkeypatch):
    monkeypatch.setenv("AFTERIMAGE_CACHE", str(done / "cache"))
    main(["study", "verify", str(study), "--accelerator", "cpu"])
    out = capsys.readouterr().out
    assert out.count("holds  ") == 5 and "5 of 5 runs hold, 0 do not" in out and "psnr by" in out
    edit(run_of(study, "linear"), "summary.json", lambda s: s["scores"]["ssim"].update(mean=0.99))
    with pytest.raises(SystemExit) as stopped:
        main(["verify", str(study), "--accelerator", "cpu"])
    out = capsys.readouterr().out
    assert stopped.value.code == 1 and "DOES NOT HOLD" in out and "4 of 5 runs hold, 1 do not" in out
