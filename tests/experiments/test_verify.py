import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from afterimage import Metrics, evaluate, load_data, load_reconstructor, train_runs
from afterimage.cli import main
from afterimage.config import dump_toml
from afterimage.config.inversion import InversionConfig, InvertConfig
from afterimage.evaluation.baselines import run_baselines
from afterimage.experiments.inference import evaluate_run
from afterimage.experiments.verify import verify_runs
from afterimage.models.weight_files import load_tensors
from afterimage.runs.files import read_csv, write_csv, write_json
from afterimage.runs.run import Run, scan
from children import MODEL, small_configs, small_images


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished study of three decoders and two baselines: its images, its folder, its cache."""
    folder = tmp_path_factory.mktemp("study")
    configs = small_configs(small_images(folder / "images"), epochs=1)
    options = {"cache": folder / "cache"}
    train_runs(configs, folder / "runs", accelerator="cpu", **options)
    run_baselines(configs[0].data, folder / "runs", names=["mean", "jpeg-50"], **options)
    return folder


@pytest.fixture
def study(done, tmp_path):
    """A copy that a test may change; the images keep their place, which the runs name."""
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
        assert one.holds and not one.changes and one.images == 2
        assert one.max_differences["psnr"] <= 1e-4


def test_a_run_is_measured_again_in_the_precision_of_its_training(done, tmp_path):
    config = small_configs(done / "images", epochs=1)[0]
    config = replace(config, recipe=replace(config.recipe, precision="bf16-mixed"))
    (run,) = train_runs(config, tmp_path, cache=done / "cache", accelerator="cpu")
    stored = [row["psnr"] for row in run.result.per_image]
    metrics = Metrics("alex", size=min(config.data.size))
    again = evaluate_run(run, metrics, cache=done / "cache").rows
    assert [row["psnr"] for row in again] == pytest.approx(stored, abs=1e-5)
    exact = evaluate(load_reconstructor(run), load_data(config.data, cache=done / "cache").test, metrics).rows
    assert max(abs(row["psnr"] - before) for row, before in zip(exact, stored, strict=True)) > 1e-4


def edit(run: Run, name, change):
    content = json.loads(run.file(name).read_text())
    change(content)
    write_json(run.file(name), content)


def run_of(study, kind):
    (run,) = [run for run in scan(study) if kind in run.name]
    return run


def test_another_decoder_does_not_hold_and_is_named(study, done):
    path = run_of(study, "linear").file("decoder.safetensors")
    tensors, made_for = load_tensors(path)
    tensors["decoder.bias"] += 0.05
    save_file(tensors, path, made_for)
    found = verdict(study, done)
    assert not found.holds and "psnr differs by up to" in found.problems[0]
    assert found.changes == ["the decoder: decoder.safetensors is not the one that was measured"]


def test_the_same_decoder_saved_anew_is_a_change_whose_scores_hold(study, done):
    path = run_of(study, "linear").file("decoder.safetensors")
    tensors, made_for = load_tensors(path)
    save_file(tensors, path, made_for | {"by": "another program"})
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
    (problem,) = found.problems
    assert "summary.json and " in problem and "scores.csv do not agree about psnr" in problem
    mean = sum(row["psnr"] for row in rows) / len(rows)
    edit(run, "summary.json", lambda s: s["scores"]["psnr"].update(mean=mean))
    (problem,) = verdict(study, done, kind).problems
    assert rows[0]["id"] in problem and "psnr differs by up to 0.02" in problem


def test_a_summary_that_was_touched_up_does_not_hold(study, done):
    edit(run_of(study, "linear"), "summary.json", lambda s: s["scores"]["ssim"].update(mean=0.99))
    (problem,) = verdict(study, done).problems
    assert "summary.json and " in problem and "scores.csv do not agree about ssim" in problem


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
    assert found.holds and found.changes == ["the settings: config.toml is not the one that named the folder"]
    edit(run, "summary.json", lambda s: s["scores"]["psnr"].update(mean=1.0))
    found = verdict(study, done)
    assert not found.holds and f"torch: 1.0 then, {torch.__version__.split('+')[0]}" in str(found.changes)
    assert f"threads: 99 then, {torch.get_num_threads()} now" in found.changes


def test_other_images_are_named(tmp_path):
    sample_images = small_images(tmp_path / "images")
    (run,) = train_runs(small_configs(sample_images)[1], tmp_path / "runs", cache=tmp_path / "cache")
    small_images(sample_images, 24)
    (found,) = verify_runs([run], cache=tmp_path / "cache")
    assert not found.holds and not found.problems and "other test images" in found.missing[0]
    assert "training/validation/test 14/4/2 then" in found.changes[0]


@pytest.mark.parametrize("state", ["stopped", "failed"])
def test_what_is_not_finished_is_not_measured(study, done, state):
    run_of(study, "linear").set_state(state)
    found = verdict(study, done)
    assert not found.holds and not found.problems
    assert found.missing == [f"it is not finished (state: {state})"]


def test_other_kinds_of_rows_are_skipped_and_said(study, done):
    run = run_of(study, "linear")
    config = InversionConfig(run.config.sources, "random", "", InvertConfig(), run.config.data)
    facts = {"steps": 1, "seconds_per_image": 1.0, "feature_loss": 1.0}
    edit(run, "summary.json", lambda s: s.update(kind="inversion", inversion=facts))
    run.file("config.toml").write_text(dump_toml(config))
    found = verdict(study, done)
    assert not found.holds and not found.problems and "kind inversion" in found.skipped


def test_the_command_says_so_and_ends_with_one(study, done, capsys, monkeypatch):
    monkeypatch.setenv("AFTERIMAGE_CACHE", str(done / "cache"))
    main(["study", "verify", str(study), "--device", "cpu"])
    out = capsys.readouterr().out
    assert out.count("holds  ") == 5 and "5 of 5 runs hold, 0 do not" in out and "psnr by" in out
    edit(run_of(study, "linear"), "summary.json", lambda s: s["scores"]["ssim"].update(mean=0.99))
    with pytest.raises(SystemExit) as stopped:
        main(["verify", str(study), "--device", "cpu"])
    out = capsys.readouterr().out
    assert stopped.value.code == 1 and "DOES NOT HOLD" in out and "4 of 5 runs hold, 1 do not" in out


@pytest.fixture
def moved(done, tmp_path):
    """Runs whose images are a folder of their own, which a test may take away; test images from another."""
    sample_images, tests = small_images(tmp_path / "images"), tmp_path / "tests"
    tests.mkdir()
    for i in (17, 18, 19):
        (sample_images / f"{i}.png").rename(tests / f"{i}.png")
    config = small_configs(sample_images, epochs=1)[1]
    data = replace(config.data, test=f"folder:{tests}")
    train_runs(
        [config, replace(config, data=data)], tmp_path / "runs", accelerator="cpu", cache=tmp_path / "cache"
    )
    runs = {bool(run.config.data.test): run for run in scan(tmp_path / "runs")}
    return tmp_path, runs[False], runs[True]


def test_missing_images_are_not_measured_and_not_a_failure(moved, capsys, monkeypatch):
    folder, own, elsewhere = moved
    monkeypatch.setenv("AFTERIMAGE_CACHE", str(folder / "empty"))
    (folder / "images").rename(folder / "away")
    alone, other = verify_runs([own, elsewhere], cache=folder / "cache", accelerator="cpu")
    assert not alone.holds and not alone.problems and "cannot read the folder" in alone.missing[0]
    assert other.holds and other.images == 3, "its test images are here"
    assert "it could not be checked" in other.changes[0] and str(folder / "images") in other.changes[0]
    with pytest.raises(SystemExit) as stopped:
        main(["verify", str(own.path), "--device", "cpu"])
    out = capsys.readouterr().out
    assert stopped.value.code == 4 and "NOT MEASURED" in out and "DOES NOT HOLD" not in out
    assert "0 of 1 runs hold, 0 do not, 1 could not be measured" in out
    edit(elsewhere, "summary.json", lambda s: s["scores"]["ssim"].update(mean=0.99))
    with pytest.raises(SystemExit) as stopped:
        main(["verify", str(folder / "runs"), "--device", "cpu"])
    out = capsys.readouterr().out
    assert stopped.value.code == 1 and "0 of 2 runs hold, 1 do not, 1 could not be measured" in out


def test_a_test_image_that_is_missing_is_named(moved):
    folder, _, elsewhere = moved
    (folder / "tests" / "18.png").unlink()
    (found,) = verify_runs([elsewhere], cache=folder / "cache", accelerator="cpu")
    assert not found.problems and found.missing[0].endswith("missing: 18.png")


def test_a_decoder_that_is_missing_is_not_measured(study, done):
    run_of(study, "linear").file("decoder.safetensors").unlink()
    found = verdict(study, done)
    assert not found.holds and not found.problems
    assert found.missing == ["decoder.safetensors is missing from the run's folder"]


def test_weights_that_are_missing_are_not_measured(study, done, monkeypatch, tmp_path):
    run = run_of(study, "linear")
    text = run.file("config.toml").read_text()
    run.file("config.toml").write_text(text.replace('weights = "random"', f'weights = "{tmp_path}/gone"'))
    found = verdict(study, done)
    assert not found.holds and not found.problems and f"{tmp_path}/gone" in found.missing[0]


def test_a_score_that_cannot_be_measured_is_not_measured(study, done):
    run = run_of(study, "linear")
    write_csv(run.file("scores.csv"), [row | {"lpips": 0.5} for row in run.result.per_image])
    edit(run, "summary.json", lambda s: s["scores"].update(lpips={"mean": 0.5, "std": 0.0, "count": 2}))
    found = verdict(study, done)
    assert (
        found.missing == ["lpips cannot be measured here"]
        and not found.problems
        and "psnr" in found.max_differences
    )


def test_evaluating_on_other_images_needs_no_training_images_and_keeps_the_network(
    moved, capsys, monkeypatch
):
    folder, own, _ = moved
    monkeypatch.setenv("AFTERIMAGE_CACHE", str(folder / "empty"))
    edit(own, "summary.json", lambda s: s["lpips"].update(net="vgg"))
    (folder / "images").rename(folder / "away")
    main(["evaluate", str(own.path), "--data", f"folder:{folder}/tests"])
    out, err = capsys.readouterr()
    assert "over 3 images" in out and "vgg" in out and "it could not be checked" in err
    (folder / "away").rename(folder / "images")
    (folder / "tests" / "00.png").write_bytes((folder / "images" / "00.png").read_bytes())
    with pytest.raises(SystemExit):
        main(["evaluate", str(own.path), "--data", f"folder:{folder}/tests"])
    assert "are also training or validation images" in capsys.readouterr().err


def test_a_run_can_be_used_from_another_working_folder(tmp_path, monkeypatch, capsys):
    small_images(tmp_path / "here" / "images")
    (tmp_path / "there").mkdir()
    monkeypatch.setenv("AFTERIMAGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path / "here")
    common = [
        f"{MODEL}:layer1",
        "--decoders",
        "linear",
        "--weights",
        "random",
        "--resize",
        "48",
        "--crop",
        "32",
    ]
    for spelling in ("images", "./images", "images/"):
        main(
            [
                "train",
                *common,
                "--data",
                f"folder:{spelling}",
                "--output-dir",
                str(tmp_path / "runs"),
                "--device",
                "cpu",
            ]
        )
    (run,) = scan(tmp_path / "runs")
    monkeypatch.chdir(tmp_path / "there")
    capsys.readouterr()
    main(["verify", str(run.path), "--device", "cpu"])
    assert "1 of 1 runs hold, 0 do not\n" in capsys.readouterr().out
    main(["evaluate", str(run.path)])
    assert "over 2 images" in capsys.readouterr().out
